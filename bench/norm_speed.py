#!/usr/bin/env python3
"""What a group norm with its SiLU takes forward, of maps of Stable Diffusion's sizes: by the kernels of norms.py and by
those of large_maps.py, and which of the two is taken.

    python bench/norm_speed.py

Needs a CUDA GPU. Microseconds of one of twenty calls that are recorded as one graph, the least of five replays: what is
read lies in the GPU's cache as far as it fits, as it does behind a convolution.
"""

import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from bench.step_profile import milliseconds
from lib.errors import UserError, run_script
from lib.kernels import norms
from lib.kernels.graphs import captured

# (maps, channels, side): of a UNet that draws 8 guided pictures, trains on one and on 8, and of a decoder.
SHAPES = [(16, 320, 64), (16, 640, 64), (16, 960, 64), (16, 640, 32), (16, 1280, 16), (1, 320, 64), (1, 1280, 8),
          (8, 320, 64), (1, 128, 512), (1, 256, 256), (1, 512, 128)]  # fmt: skip
GROUPS, CALLS, REPLAYS = 32, 20, 5


def microseconds(call):
    def calls():
        for _ in range(CALLS):
            call()

    (replay,) = captured([calls], torch.device("cuda"))
    replay()
    return min(milliseconds(replay, 1) for _ in range(REPLAYS)) / CALLS * 1e3


@torch.no_grad()
def main():
    if norms.triton is None or not torch.cuda.is_available():
        raise UserError("this needs a CUDA GPU and Triton")
    print(torch.cuda.get_device_name())
    print(
        "\n| maps, channels, side | norms.py, us | large_maps.py, us | taken |\n|---|--:|--:|---|"
    )
    for n, channels, side in SHAPES:
        x = torch.randn(n, channels, side, side, device="cuda", dtype=torch.float16)
        x = x.to(memory_format=torch.channels_last)
        weight, bias = torch.randn(2, channels, device="cuda", dtype=torch.float16)
        statistics = torch.empty(n * GROUPS, 2, device="cuda")
        times = []
        for large in (x.numel(), 1):  # from how many pixels on maps are large: none are, all are
            with patch.object(norms, "LARGE", large):
                times.append(microseconds(lambda: norms.group_norm(
                    x, None, None, None, statistics, weight, bias, GROUPS, 1e-5, True  # noqa: B023, of this shape
                )))  # fmt: skip
        taken = "large_maps" if n * side**2 >= norms.LARGE else "norms"
        small, large = (f"{time:.1f}" for time in times)
        print(f"| {n}, {channels}, {side} | {small} | {large} | {taken} |", flush=True)


if __name__ == "__main__":
    run_script(main)
