"""Triton, where it can be had, and compiling kernels in threads, all at once: at their first use, one after
the other, they would take longer than all else before the first step."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import torch

from lib.errors import is_memory, one_line

try:
    import triton
    import triton.language as tl
except ImportError:  # no NVIDIA build of torch
    triton = tl = None

__all__ = ["failure", "in_threads", "tl", "triton"]


def in_threads(jobs, device):
    """Start `jobs` in threads, all at once; returns a function that waits for the last of them."""

    def on_device(job):
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            job()  # a thread begins with the first GPU as its own

    pool = ThreadPoolExecutor()
    started = [pool.submit(on_device, job) for job in jobs]

    def wait():
        pool.shutdown()  # until all have ended, also when one has failed
        try:
            for job in started:
                job.result()
        finally:
            started.clear()  # an error holds what its job worked on

    return wait


def failure(work):
    """Why `work` failed, in one line, or what it returns: a compiler, a driver or an unknown GPU may
    raise anything, and training goes on without their kernels."""
    try:
        return work()
    except Exception as problem:
        if is_memory(problem):
            raise
        return f"{type(problem).__name__}: {one_line(problem, 160)}"
