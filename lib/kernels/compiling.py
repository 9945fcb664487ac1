"""Compiles kernels in parallel before the first step: Triton's and those of cuDNN's attention.

Compiled one by one at first use, they would take longer than everything else before the first step.
"""

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lib.errors import is_memory, one_line
from lib.kernels import compile_ahead

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch without CUDA
    triton = tl = None

__all__ = ["attention_jobs", "compile_attention", "failure", "in_threads", "tl", "triton"]


def in_threads(jobs, device):
    """Start `jobs` in threads, all at once; returns a function that waits for all and raises their first error."""

    def on_device(job):
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            job()  # a new thread would use the first GPU

    pool = ThreadPoolExecutor()
    started = [pool.submit(on_device, job) for job in jobs]

    def wait():
        pool.shutdown()  # waits for all, also if one has failed
        try:
            for job in started:
                job.result()
        finally:
            started.clear()  # an error keeps the tensors of its job alive

    return wait


def failure(work):
    """What `work` returns, or its error in one line, except for memory errors, which are raised.

    A compiler, a driver or an unknown GPU may raise anything; training continues without their kernels.
    """
    try:
        return work()
    except Exception as problem:
        if is_memory(problem):
            raise
        return f"{type(problem).__name__}: {one_line(problem, 160)}"


def compile_attention(call, device, training=False):
    """Start compiling the attention kernels that `call()` needs, in threads; returns a function that waits for them.

    On recent GPUs PyTorch chooses cuDNN's attention, for which the driver compiles a kernel per layer size at its first
    use on a machine and caches it on disk. `call` is called once here, without its attention. With `training` the
    kernels of the backward pass are compiled too. Nothing happens if this machine has compiled them before.
    """
    if device.type != "cuda" or compile_ahead.compiled_before():
        return lambda: None

    def start():
        jobs = attention_jobs(call, training)
        torch.cuda.empty_cache()  # or the memory of the call would stay reserved
        return in_threads(jobs, device)

    started = failure(start)

    def wait():
        reason = started if isinstance(started, str) else failure(started)
        torch.cuda.empty_cache()
        if reason:
            print(f"note: the attention kernels were not compiled ahead of time: {reason}")

    return wait


def attention_jobs(call, training):
    """For each attention kernel that `call()` would launch, a function that launches it."""
    with torch.no_grad(), _AttentionCalls() as recorded:
        call()

    def forward(inputs, others, named):
        with torch.no_grad():
            F.scaled_dot_product_attention(*inputs, *others, **named)

    def forward_backward(inputs, others, named):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = F.scaled_dot_product_attention(*inputs, *others, **named)
        # In this thread: autograd's own thread would compile them one after another.
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.grad(out, inputs, torch.zeros_like(out))

    passes = (forward_backward, forward) if training else (forward,)
    return [functools.partial(launch, *arguments) for launch in passes for arguments in recorded.arguments.values()]


class _AttentionCalls(TorchFunctionMode):
    """Records the arguments of one scaled_dot_product_attention per layout and options; returns zeros instead."""

    def __init__(self):
        super().__init__()
        self.arguments = {}

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is F.scaled_dot_product_attention:
            return self.keep(*arguments, **(named or {}))
        return function(*arguments, **(named or {}))

    def keep(self, query, key, value, *others, **named):
        inputs = query, key, value
        layout = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
        options = str([(k, x.shape if torch.is_tensor(x) else x) for k, x in (*enumerate(others), *named.items())])
        self.arguments[layout, options] = inputs, others, named
        return query.new_zeros(*query.shape[:-1], value.shape[-1])
