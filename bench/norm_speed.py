#!/usr/bin/env python3
"""Speed of group norm with SiLU at Stable Diffusion's sizes: PyTorch's kernels and those of lib/kernels/group_norm.py.

    python bench/norm_speed.py

Needs a CUDA GPU. Prints microseconds per call: the fastest of five replays of a CUDA graph of twenty calls. The input
stays in the GPU's cache as far as it fits, as it does behind a convolution.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

from bench.step_profile import milliseconds
from lib.errors import UserError, run_script
from lib.kernels import group_norm
from lib.kernels.graphs import captured

# (n, channels, side)
SHAPES = [(16, 320, 64), (16, 640, 64), (16, 960, 64), (16, 640, 32), (16, 1280, 16)]  # a UNet, 8 guided images
SHAPES += [(1, 320, 64), (1, 1280, 8), (8, 320, 64)]  # a UNet in training, batches of 1 and of 8
SHAPES += [(1, 128, 512), (1, 256, 256), (1, 512, 128)]  # a decoder
GROUPS, CALLS, REPLAYS = 32, 20, 5


def microseconds(call):
    """Time of one call."""

    def calls():
        for _ in range(CALLS):
            call()

    (replay,) = captured([calls], torch.device("cuda"))
    replay()
    return min(milliseconds(replay, 1) for _ in range(REPLAYS)) / CALLS * 1e3


@torch.no_grad()
def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if group_norm.triton is None or not torch.cuda.is_available():
        raise UserError("bench/norm_speed.py needs a CUDA GPU and Triton")
    print(torch.cuda.get_device_name())
    print("\n| n, channels, side | PyTorch, us | group_norm.py, us | its backward pass, us |\n|---|--:|--:|--:|")
    for n, channels, side in SHAPES:
        x = torch.randn(n, channels, side, side, device="cuda", dtype=torch.float16)
        x = x.to(memory_format=torch.channels_last)
        weight, bias = torch.randn(2, channels, device="cuda", dtype=torch.float16)
        statistics = torch.rand(n * GROUPS, 2, device="cuda")
        common = statistics, weight, bias, GROUPS, 1e-5, True
        calls = (
            lambda: F.silu(F.group_norm(x, GROUPS, weight, bias, 1e-5)),  # noqa: B023, of this shape
            lambda: group_norm.group_norm(x, None, None, None, *common),  # noqa: B023
            lambda: group_norm.group_norm(x, None, x, None, *common),  # noqa: B023
        )
        times = (f"{microseconds(call):.1f}" for call in calls)
        print(f"| {n}, {channels}, {side} | {' | '.join(times)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
