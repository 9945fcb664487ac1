#!/usr/bin/env python3
"""What the GPU does in one training step: how long a replay of the recorded pass takes, and its kernels.

    python -m demo.random_sd15 MODEL
    python bench/step_profile.py --base-model MODEL                     # as train.py is configured
    python bench/step_profile.py --base-model MODEL --no-gradient-checkpointing --dora

Takes train.py's options and needs processed_data/ and a CUDA GPU. Prints the time of a replay, and the kernels of one by
name, those that take the most time together first, as torch.profiler saw them in five.
"""

import collections
import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["WANDB_MODE"] = "disabled"

import torch
from torch.profiler import ProfilerActivity, profile

import train
from lib.config import parse_config
from lib.errors import UserError, run_script
from lib.training import micro_step

REPLAYS, MOST = 5, 60  # profiled; names printed


def recorded_pass(config):
    """The first pass that train.py records with this configuration: a function that replays it."""
    kept, record = [], micro_step.captured

    def captured(functions, device):
        kept.extend(record(functions, device))
        return kept[-len(functions) :]

    with patch.object(micro_step, "captured", captured), tempfile.TemporaryDirectory() as folder:
        train.train(
            config
            | dict(
                output_dir=folder,
                run_name="profile",
                resume=False,
                max_steps=10,
                warmup_steps=1,
                preview_every=0,
                snapshot_every=0,
            )
        )
    return kept[0]


def milliseconds(call, times):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def main():
    config = parse_config(train.CONFIG, __doc__)
    if not torch.cuda.is_available():
        raise UserError("this needs a CUDA GPU: without one nothing is recorded")
    replay = recorded_pass(config)
    for _ in range(5):
        replay()
    print(f"\na replay takes {milliseconds(replay, 60):.2f} ms")
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(REPLAYS):
            replay()
        torch.cuda.synchronize()
    kernels = collections.defaultdict(list)
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name].append(event.device_time)
    count, total = sum(map(len, kernels.values())), sum(map(sum, kernels.values()))
    print(f"in it {count / REPLAYS:.0f} kernels, {total / REPLAYS / 1e3:.2f} ms together\n")
    print("| ms | kernels | us each | name |\n|--:|--:|--:|---|")
    for name, times in sorted(kernels.items(), key=lambda pair: -sum(pair[1]))[:MOST]:
        print(
            f"| {sum(times) / REPLAYS / 1e3:.3f} | {len(times) / REPLAYS:.0f} | "
            f"{sum(times) / len(times):.1f} | {name[:100]} |"
        )


if __name__ == "__main__":
    run_script(main)
