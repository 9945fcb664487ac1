"""What stands around convolutions in channels-last layout besides norms: a bias, with the sum that follows it; maps
beside one another; twice as many pixels each way. PyTorch's kernels for these take two to eight times what reading and
writing takes."""

import torch
import torch.nn.functional as F

from lib.kernels.compiling import tl, triton

TALL, WIDE = 32, 64  # pixels and channels of a program

if triton:

    @triton.jit(do_not_specialize=["ROWS"])
    def _sum_bias(x, y, bias, out, ROWS, C, ADD: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr):
        """out = x + bias, and with ADD + y, of rows of C channels."""
        row = tl.program_id(0).to(tl.int64) * TALL
        rows = tl.arange(0, TALL)[:, None]
        column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)[None, :]
        inside = (row + rows < ROWS) & (column < C)
        begin, place = row * C, rows * C + column
        result = tl.load(x + begin + place, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            result += tl.load(y + begin + place, mask=inside, other=0.0).to(tl.float32)
        result += tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
        tl.store(out + begin + place, result.to(out.dtype.element_ty), mask=inside)


class SumBias(torch.autograd.Function):
    """x + bias + y of maps x and y [n, c, h, w], y may be None, and a frozen bias [c]; rounded once."""

    @staticmethod
    def forward(ctx, x, y, bias):
        ctx.added = y is not None
        return run_sum_bias(x, y, bias)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad if ctx.added else None, None


def run_sum_bias(x, y, bias):
    out = torch.empty_like(x, memory_format=torch.channels_last)
    pixels = (maps.permute(0, 2, 3, 1).contiguous() for maps in (x, x if y is None else y))
    rows, others = (each.view(-1, len(bias)) for each in pixels)
    grid = triton.cdiv(len(rows), TALL), triton.cdiv(len(bias), WIDE)
    _sum_bias[grid](rows, others, bias, out, len(rows), len(bias), y is not None, TALL, WIDE)
    return out


class Beside(torch.autograd.Function):
    """The channels of x [n, c, h, w] and those of y [n, d, h, w] behind them, [n, c + d, h, w]."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.channels = x.shape[1], y.shape[1]
        (n, _, h, w), both = x.shape, [maps.permute(0, 2, 3, 1) for maps in (x, y)]
        if all(map(_is_whole, both)):
            both = map(_wholes, both)
        pixels = torch.cat([*both], -1).view(-1).view(x.dtype)
        return pixels.view(n, h, w, sum(ctx.channels)).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad):
        return grad.split(ctx.channels, 1)


class Twice(torch.autograd.Function):
    """Every pixel of x [n, c, h, w] as four, [n, c, 2h, 2w]: the nearest neighbour's."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = n, c, h, w = x.shape
        pixels = x.permute(0, 2, 3, 1)
        pixels = _wholes(pixels) if _is_whole(pixels) else pixels
        four = pixels[:, :, None, :, None].expand(n, h, 2, w, 2, -1).contiguous()
        return four.view(-1).view(x.dtype).view(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous(memory_format=torch.channels_last)
        size = grad.shape[2:]
        return torch.ops.aten.upsample_nearest2d_backward(grad, size, ctx.shape, 2.0, 2.0)


def _is_whole(pixels):
    """Whether pixels [n, h, w, c] are of so many times 16 bytes, the most that a thread copies at once."""
    return pixels.shape[-1] * pixels.element_size() % 16 == 0


def _wholes(pixels):
    """Pixels [n, h, w, c] in a type of 16 bytes. As a vector, since a map of a single pixel may have any strides, and
    then has no view of another type."""
    pixels = pixels.contiguous()
    return pixels.view(-1).view(torch.complex128).view(*pixels.shape[:-1], -1)


def convolved(convolution, x, y=None):
    """A convolution of maps x, with a frozen bias, and where y is not None the sum with y."""
    return SumBias.apply(without_bias(convolution, x), y, convolution.bias)


def without_bias(convolution, x):
    settings = convolution.stride, convolution.padding, convolution.dilation, convolution.groups
    return F.conv2d(x, convolution.weight, None, *settings)
