"""Operations around channels-last convolutions other than norms: biases and sums, concatenation, upsampling.

PyTorch's kernels for these take two to eight times as long as the memory traffic alone.
"""

import torch
import torch.nn.functional as F

from lib.kernels.compiling import tl, triton

TALL, WIDE = 32, 64  # pixels and channels of a program

if triton:
    # out = x + bias, and with ADD x + bias + y; rounded once
    @triton.jit(do_not_specialize=["ROWS"])
    def _add_bias(
        x,  # [ROWS, C]
        y,  # [ROWS, C], read with ADD
        bias,  # [C]
        out,  # [ROWS, C]
        ROWS,
        C,
        ADD: tl.constexpr,
        TALL: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * TALL
        rows = tl.arange(0, TALL)[:, None]
        column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)[None, :]
        inside = (row + rows < ROWS) & (column < C)
        begin, offset = row * C, rows * C + column
        result = tl.load(x + begin + offset, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            result += tl.load(y + begin + offset, mask=inside, other=0.0).to(tl.float32)
        result += tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
        tl.store(out + begin + offset, result.to(out.dtype.element_ty), mask=inside)


class AddBias(torch.autograd.Function):
    """x + bias[:, None, None] + y, rounded once, of x and y [n, c, h, w] (y may be None) and a frozen bias [c]."""

    @staticmethod
    def forward(ctx, x, y, bias):
        ctx.added = y is not None
        return run_add_bias(x, y, bias)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad if ctx.added else None, None


def run_add_bias(x, y, bias):
    """Launch the kernel (see AddBias)."""
    out = torch.empty_like(x, memory_format=torch.channels_last)
    pixels = (maps.permute(0, 2, 3, 1).contiguous() for maps in (x, x if y is None else y))
    rows, others = (each.view(-1, len(bias)) for each in pixels)
    grid = triton.cdiv(len(rows), TALL), triton.cdiv(len(bias), WIDE)
    _add_bias[grid](rows, others, bias, out, len(rows), len(bias), y is not None, TALL, WIDE)
    return out


def conv_add(convolution, x, y=None):
    """convolution(x), or convolution(x) + y if y is given. Its bias is frozen."""
    return AddBias.apply(conv_without_bias(convolution, x), y, convolution.bias)


def conv_without_bias(convolution, x):
    settings = convolution.stride, convolution.padding, convolution.dilation, convolution.groups
    return F.conv2d(x, convolution.weight, None, *settings)


class ConcatChannels(torch.autograd.Function):
    """torch.cat([x, y], 1) of x [n, c, h, w] and y [n, d, h, w]."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.channels = x.shape[1], y.shape[1]
        (n, _, h, w), both = x.shape, [maps.permute(0, 2, 3, 1) for maps in (x, y)]
        if all(map(_fits_16_bytes, both)):
            both = map(_as_16_bytes, both)
        pixels = torch.cat([*both], -1).view(-1).view(x.dtype)
        return pixels.view(n, h, w, sum(ctx.channels)).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad):
        return grad.split(ctx.channels, 1)


class UpsampleNearest2x(torch.autograd.Function):
    """F.interpolate(x, scale_factor=2.0, mode="nearest"): [n, c, h, w] -> [n, c, 2h, 2w]."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = n, c, h, w = x.shape
        pixels = x.permute(0, 2, 3, 1)
        pixels = _as_16_bytes(pixels) if _fits_16_bytes(pixels) else pixels
        four = pixels[:, :, None, :, None].expand(n, h, 2, w, 2, -1).contiguous()
        return four.view(-1).view(x.dtype).view(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous(memory_format=torch.channels_last)
        size = grad.shape[2:]
        return torch.ops.aten.upsample_nearest2d_backward(grad, size, ctx.shape, 2.0, 2.0)


def _fits_16_bytes(pixels):
    """Whether the channels of pixels [n, h, w, c] are a multiple of 16 bytes, the most that a thread copies at once."""
    return pixels.shape[-1] * pixels.element_size() % 16 == 0


def _as_16_bytes(pixels):
    """Pixels [n, h, w, c] in a dtype of 16 bytes. They are flattened first: a single pixel may have any strides, and
    then it cannot be viewed as another dtype."""
    pixels = pixels.contiguous()
    return pixels.view(-1).view(torch.complex128).view(*pixels.shape[:-1], -1)
