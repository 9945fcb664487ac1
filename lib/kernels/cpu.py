"""Faster on a CPU: one thread where several would wait for one another, and other forms of GEGLU and upsampling.

A training step of the miniature is two thousand operations of about 30 µs. For up to two images, one thread is about as
fast as two on idle cores, and twice as fast if another process is busy (bench/README.md, "On a CPU"). The other forms
give the same results to rounding, without gradients. On the miniature GEGLU saves 12% of the time per image, upsampling
3%.
"""

import contextlib
import functools
import os

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.upsampling import Upsample2D

SMALL = 50_000  # values of a UNet's first feature map in a micro-batch; the miniature's has 24,576 per image


def threads_for(values, device):
    """The number of CPU threads that train a UNet whose first feature map has `values` values. OMP_NUM_THREADS takes
    precedence."""
    small = torch.device(device).type == "cpu" and values <= SMALL
    return 1 if small and "OMP_NUM_THREADS" not in os.environ else torch.get_num_threads()


@contextlib.contextmanager
def computing_with(threads):
    """Context in which PyTorch uses `threads` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def use_cpu_forms(model):
    """Generate faster with a UNet or VAE on a CPU. Adapters must not change its 3x3 convolutions."""
    for module in model.modules():
        if type(module) is GEGLU and type(module.proj) is torch.nn.Linear and module.proj.bias is not None:
            module.forward = functools.partial(_geglu_forward, module)
        elif isinstance(module, Upsample2D) and _is_plain(module):
            kernels = _small_kernels(module.conv)
            module.forward = functools.partial(_upsample_forward, module, module.forward, *kernels)


def _geglu_forward(geglu, x):
    """(x W_vᵀ + b_v) gelu(x W_gᵀ + b_g) with two products: PyTorch takes three times as long for half rows."""
    (value, gate), biases = geglu.proj.weight.chunk(2), geglu.proj.bias.chunk(2)
    gate = torch.ops.aten.gelu_(F.linear(x, gate, biases[1]))
    return gate.mul_(F.linear(x, value, biases[0]))


def _is_plain(upsampler):
    convolution = upsampler.conv
    return (
        upsampler.interpolate
        and upsampler.norm is None
        and type(convolution) is torch.nn.Conv2d
        and convolution.kernel_size == (3, 3)
        and convolution.padding == convolution.stride == convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.bias is not None
    )


# Upsampling turns a pixel into two per axis. For the first and for the second: the rows (or columns) of a 3x3 kernel
# that read the same pixel of the small feature map.
SHARED_ROWS = ((0,), (1, 2)), ((0, 1), (2,))


@torch.no_grad()
def _small_kernels(convolution):
    """A 3x3 convolution after nearest upsampling as a 2x2 convolution of the small feature map, with four output pixels
    as channels: (weights [4 * out, in, 2, 2], bias [4 * out]). A 3x3 window covers at most 2x2 different pixels. The
    weights on equal pixels are summed."""
    weight = convolution.weight
    kernels = [
        torch.stack(
            [torch.stack([weight[:, :, row][..., column].sum((2, 3)) for column in columns], -1) for row in rows], -2
        )
        for rows in SHARED_ROWS
        for columns in SHARED_ROWS
    ]
    return torch.cat(kernels).contiguous(memory_format=_layout(weight)), convolution.bias.repeat(4)


def _layout(x):
    """The memory format of a 4D tensor."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _upsample_forward(module, forward, weight, bias, x, output_size=None):
    """An upsampler's forward pass with 4/9 of the multiplications. Other sizes than twice go to its own `forward`."""
    if output_size is not None:
        return forward(x, output_size)
    n, _, h, w = x.shape
    four = F.conv2d(x, weight, bias, padding=1).unflatten(1, (2, 2, -1))
    out = torch.empty(n, four.shape[3], 2 * h, 2 * w, dtype=x.dtype, memory_format=_layout(x))
    for row in (0, 1):
        for column in (0, 1):
            pixels = four[:, row, column, :, row : row + h, column : column + w]
            out[:, :, row::2, column::2] = pixels
    return out


def cpu_note(doing):
    """The line that says why `doing` ("training", "generating") happens on the CPU.

    Apple's GPUs are left alone: nobody has compared what MPS computes here with a CPU or a CUDA GPU, and it lacks
    float64, in which protection is computed.
    """
    if torch.backends.mps.is_available():
        return f"Apple's GPU (MPS) is not used, since the scripts are untested on it: {doing} on the CPU, in fp32"
    return f"no CUDA GPU found: {doing} on the CPU, in fp32"
