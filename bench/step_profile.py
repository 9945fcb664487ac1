#!/usr/bin/env python3
"""Kernel profile of one training step.

    python preprocess.py
    python -m demo.random_sd15 MODEL
    python bench/step_profile.py --base-model MODEL                     # train.py's configuration
    python bench/step_profile.py --base-model MODEL --no-gradient-checkpointing --dora

Takes train.py's options; needs a CUDA GPU. Prints the time of a replay of the step's CUDA graph, then its kernels by
name, sorted by total time (torch.profiler over five replays).
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

REPLAYS, NAMES = 5, 60  # profiled; printed


def captured_pass(config):
    """The first pass that train.py captures with this configuration: a function that replays it."""
    replays, capture = [], micro_step.captured

    def captured(functions, device):
        replays.extend(capture(functions, device))
        return replays[-len(functions) :]

    with patch.object(micro_step, "captured", captured), tempfile.TemporaryDirectory() as folder:
        short = dict(output_dir=folder, run_name="profile", resume=False, preview_every=0, snapshot_every=0)
        train.train(config | short | dict(max_steps=10, warmup_steps=1))
    return replays[0]


def milliseconds(call, times):
    """Mean time of a call on the GPU."""
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
        raise UserError("bench/step_profile.py needs a CUDA GPU: there is no CUDA graph without one")
    replay = captured_pass(config)
    for _ in range(5):
        replay()
    print(f"\none replay takes {milliseconds(replay, 60):.2f} ms")
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(REPLAYS):
            replay()
        torch.cuda.synchronize()
    kernels = collections.defaultdict(list)
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name].append(event.device_time)
    count, total = sum(map(len, kernels.values())), sum(map(sum, kernels.values()))
    print(f"{count / REPLAYS:.0f} kernels per replay, {total / REPLAYS / 1e3:.2f} ms together\n")
    print("| ms | kernels | us each | name |\n|--:|--:|--:|---|")
    for name, times in sorted(kernels.items(), key=lambda pair: -sum(pair[1]))[:NAMES]:
        print(
            f"| {sum(times) / REPLAYS / 1e3:.3f} | {len(times) / REPLAYS:.0f} | "
            f"{sum(times) / len(times):.1f} | {name[:100]} |"
        )


if __name__ == "__main__":
    run_script(main)
