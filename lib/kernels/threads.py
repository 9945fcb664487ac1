"""As few CPU threads as are faster: one, where a micro-batch is so small that several wait for one another.

A training step of the miniature is two thousand operations of some 30 µs. On two cores one thread is faster up to two
pictures at once, and beside a busy process also beyond (bench/README.md, "On a CPU").
"""

import contextlib
import os

import torch

SMALL = (
    50_000  # values of a UNet's first map of a micro-batch; the miniature's has 24,576 a picture
)


def threads_for(values, device):
    """How many CPU threads are to train a UNet whose first map has so many values; OMP_NUM_THREADS has the last word."""
    small = torch.device(device).type == "cpu" and values <= SMALL
    return 1 if small and "OMP_NUM_THREADS" not in os.environ else torch.get_num_threads()


@contextlib.contextmanager
def computing_with(threads):
    """Let PyTorch compute with so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
