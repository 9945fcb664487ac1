"""As few CPU threads as are faster: one, where a micro-batch is so small that several wait for one another.

A training step of the miniature, two thousand operations of some 30 µs, took 77 to 82 ms with one thread on two
quiet cores, 118 to 127 ms with two of them; beside a busy process 77 and 137 ms. From a micro-batch of four pictures
on two are faster (bench/README.md).
"""

import contextlib
import os

import torch

SMALL = 512  # cells of a micro-batch's latents, of one channel


def threads_for(cells, device):
    """How many CPU threads are to train on micro-batches of so many cells; OMP_NUM_THREADS has the last word."""
    small = torch.device(device).type == "cpu" and cells <= SMALL
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
