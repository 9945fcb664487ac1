#!/usr/bin/env python3
"""Speed of another project's training script, run unchanged.

    python bench/time_script.py SCRIPT [ARGUMENTS ...]

Prints the median time between two updates of its tqdm bar, without the first 20, synchronising with the GPU at each,
and the GPU memory that it reserved.
"""

import atexit
import runpy
import statistics
import sys
import time
from pathlib import Path

if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
    sys.exit(print(__doc__))

import torch
import tqdm.auto

WARM_UP = 20  # updates that are not timed
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
