#!/usr/bin/env python3
"""Run a training script that is not of this project, unchanged, and time its progress bar.

    python bench/time_script.py SCRIPT [ARGUMENTS ...]

Prints the median time between two updates of its tqdm bar, the first ones left out, waiting for the
GPU at each, and the GPU memory that it reserved.
"""

import atexit
import runpy
import statistics
import sys
import time
from pathlib import Path

import torch
import tqdm.auto

WARM_UP = 20  # updates whose time does not count
stamps = []
update = tqdm.auto.tqdm.update


def timed_update(bar, n=1):
    if (bar.total or 0) >= 2 * WARM_UP:
        torch.cuda.synchronize()
        stamps.append(time.perf_counter())
    return update(bar, n)


@atexit.register
def report():
    seconds = [b - a for a, b in zip(stamps, stamps[1:], strict=False)][WARM_UP:]
    if seconds:
        median = statistics.median(seconds)
        gib = torch.cuda.max_memory_reserved() / 2**30
        print(
            f"\n{Path(sys.argv[0]).name}: {1e3 * median:.1f} ms/step = {1 / median:.2f} steps/s; "
            f"{gib:.2f} GiB reserved at most",
            flush=True,
        )


tqdm.auto.tqdm.update = timed_update
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
runpy.run_path(sys.argv[0], run_name="__main__")
