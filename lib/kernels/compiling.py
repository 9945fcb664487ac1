"""Which attention is cuDNN's, and kernels compiled in parallel before the first step: Triton's and cuDNN's attention.

Compiled one by one at first use, they would take longer than everything else before the first step.
"""

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lib.errors import is_memory, one_line

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch without CUDA
    triton = tl = None

__all__ = ["attention_jobs", "attention_kernels", "compile_attention", "failure", "in_threads", "tl", "triton"]

# Pairs of a query and a key from which cuDNN's attention is used. Each of its plans takes 33 ms to build, 73 with the
# backward pass, in every process. Over 4000 steps it saves seconds in the self-attentions of the two largest maps of
# Stable Diffusion at 512 pixels, and elsewhere hardly more than its plan takes (bench/LOG.md).
CUDNN_PAIRS = 1024 * 1024
NO_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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


def attention_kernels(query, key):
    """Context for a fused layer's attention of `query` [..., rows, width] to `key`: PyTorch's choice of kernels (on recent
    GPUs cuDNN's), without cuDNN's where there are fewer than CUDNN_PAIRS pairs.

    It sets flags of the whole process: no other thread may compute attention meanwhile.
    """
    if not query.is_cuda or _many_pairs(query, key):
        return contextlib.nullcontext()
    return sdpa_kernel(NO_CUDNN)


def _many_pairs(query, key):
    return query.shape[-2] * key.shape[-2] >= CUDNN_PAIRS


def compile_attention(call, device, training=False):
    """Compile the attention kernels that `call()` needs, in threads, on a GPU.

    On recent GPUs PyTorch chooses cuDNN's attention, for which the driver compiles a kernel per layer size at its first
    use on a machine and caches it on disk. `call` is called once here, without its attention; its tensors may be on the
    "meta" device. With `training` the kernels of the backward pass are compiled too. Attention to which
    `attention_kernels` gives no cuDNN is left out. Memory errors are raised, other errors printed as a note.
    """
    if device.type == "cuda":
        try:
            reason = failure(lambda: in_threads(attention_jobs(call, device, training), device)())
        finally:
            torch.cuda.empty_cache()
        if reason:
            print(f"note: the attention kernels were not compiled ahead of time: {reason}")


def attention_jobs(call, device, training):
    """For each attention kernel that `call()` would launch, a function that launches it on `device`, with zeros."""
    with torch.no_grad(), _AttentionCalls() as recorded:
        call()

    def zeros(x):
        if not torch.is_tensor(x):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).zero_()

    def attend(inputs, others, named):
        named = {key: zeros(value) for key, value in named.items()}
        return F.scaled_dot_product_attention(*inputs, *map(zeros, others), **named)

    def forward(inputs, *options):
        with torch.no_grad():
            attend(map(zeros, inputs), *options)

    def forward_backward(inputs, *options):
        inputs = [zeros(x).requires_grad_() for x in inputs]
        out = attend(inputs, *options)
        # In this thread: autograd's own thread would compile them one after another.
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.grad(out, inputs, torch.zeros_like(out))

    passes = (forward_backward, forward) if training else (forward,)
    return [functools.partial(launch, *arguments) for launch in passes for arguments in recorded.arguments.values()]


class _AttentionCalls(TorchFunctionMode):
    """Records the arguments of one scaled_dot_product_attention per layout and options that `attention_kernels` leaves to
    PyTorch; returns zeros instead."""

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
        if _many_pairs(query, key):
            self.arguments[layout, options] = inputs, others, named
        return query.new_zeros(*query.shape[:-1], value.shape[-1])
