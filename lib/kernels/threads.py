"""As few CPU threads as do: one, where a micro-batch is so small that several mostly wait for one another.

A training step of the miniature is two thousand operations of some 30 µs. Up to two images at once one thread is about
as fast as two on quiet cores, and twice as fast beside a busy process (bench/README.md, "On a CPU").
"""

import contextlib
import os

import torch

SMALL = 50_000  # values of a UNet's first map of a micro-batch; the miniature's has 24,576 an image


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
