"""Triton kernels for the rows of transformers: a sum with the layer norm that follows it, GEGLU and CLIP's activation.

A transformer adds each layer's output to the residual stream and hands the next layer a norm of the
sum. PyTorch takes a kernel for the sum and one for the norm, and backward one for the norm's gradient
and one to add the residual stream's. Here it is one each way.
"""

import torch

from lib.kernels.compiling import tl, triton

MANY = 2048  # rows from which on a program has several

if triton:

    @triton.jit
    def sigmoid(x):
        """By approximations of the hardware, to 22 bits: exact division takes longer than a norm's other work."""
        more = 1 + tl.exp2(-1.4426950408889634 * x)
        return tl.rsqrt(more * more)

    @triton.jit(do_not_specialize=["ROWS"])
    def _sum_norm(
        x,
        y,
        STRIDE,
        weight,
        bias,
        total,
        statistics,
        out,
        ROWS,
        eps,
        WIDTH: tl.constexpr,
        TILE: tl.constexpr,
        TALL: tl.constexpr,
        ADD: tl.constexpr,
    ):
        """total = x + y, rounded as it is stored, and its layer norm; without ADD that of x; of TALL rows.

        Rows of y are STRIDE apart."""
        column, rows = tl.arange(0, TILE)[None, :], tl.arange(0, TALL)[:, None]
        row = tl.program_id(0).to(tl.int64) * TALL
        exists = column < WIDTH
        inside = exists & (row + rows < ROWS)
        begin, place = row * WIDTH, rows * WIDTH + column
        value = tl.load(x + begin + place, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
        b = tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)
        if ADD:
            other = tl.load(y + row * STRIDE + rows * STRIDE + column, mask=inside, other=0.0)
            rounded = (value + other.to(tl.float32)).to(total.dtype.element_ty)
            tl.store(total + begin + place, rounded, mask=inside)
            value = rounded.to(tl.float32)
        mean = (tl.sum(value, 1) / WIDTH)[:, None]
        apart = tl.where(inside, value - mean, 0.0)
        rstd = 1 / tl.sqrt((tl.sum(apart * apart, 1) / WIDTH)[:, None] + eps)
        tl.store(statistics + row * 2 + rows * 2, mean, mask=row + rows < ROWS)
        tl.store(statistics + row * 2 + rows * 2 + 1, rstd, mask=row + rows < ROWS)
        tl.store(out + begin + place, (apart * rstd * w + b).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _sum_norm_backward(
        total, grad_total, grad_norm, weight, statistics, out, WIDTH: tl.constexpr, TILE: tl.constexpr
    ):
        """The gradient of x and of y alike, of one row: grad_total and what comes through the norm."""
        column = tl.arange(0, TILE)
        inside = column < WIDTH
        row = tl.program_id(0).to(tl.int64)
        place = row * WIDTH + column
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(statistics + row * 2)
        rstd = tl.load(statistics + row * 2 + 1)
        hat = (tl.load(total + place, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        dz = tl.load(grad_norm + place, mask=inside, other=0.0).to(tl.float32) * w
        first = tl.sum(dz, 0) / WIDTH
        second = tl.sum(dz * hat, 0) / WIDTH
        result = tl.load(grad_total + place, mask=inside, other=0.0).to(tl.float32)
        result += rstd * (dz - first - hat * second)
        tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _places(ROWS, STRIDE, WIDTH, TALL: tl.constexpr, WIDE: tl.constexpr):
        """Of this program's values, TALL rows and WIDE columns: where rows STRIDE apart begin and where the values lie
        behind that, the same for rows that lie close together, and which of them exist."""
        row = tl.program_id(0).to(tl.int64) * TALL
        rows = tl.arange(0, TALL)[:, None]
        column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)[None, :]
        inside = (row + rows < ROWS) & (column < WIDTH)
        return row * STRIDE, rows * STRIDE + column, row * WIDTH, rows * WIDTH + column, inside

    @triton.jit
    def _normal(x):
        """(the standard normal distribution's integral up to x, exp(-x²/2)), the first to 1e-7: Abramowitz and
        Stegun's 7.1.26, with which a GPU waits for memory, where erf itself makes it compute longer."""
        bell = tl.exp2(-0.7213475204444817 * x * x)
        more = 1 + 0.3275911 * 0.7071067811865476 * tl.abs(x)
        t = tl.rsqrt(more * more)
        tail = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
        tail = 0.5 * t * bell * (0.254829592 + t * (-0.284496736 + t * tail))
        return tl.where(x > 0, 1 - tail, tail), bell

    @triton.jit(do_not_specialize=["ROWS"])
    def _geglu(x, STRIDE, grad, out, ROWS, HALF, TALL: tl.constexpr, WIDE: tl.constexpr, BACKWARD: tl.constexpr):
        """out = x[:, :HALF] gelu(x[:, HALF:]), or backward both halves of the gradient of x, whose rows are STRIDE
        apart."""
        start, own, begin, place, inside = _places(ROWS, STRIDE, HALF, TALL, WIDE)
        value = tl.load(x + start + own, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(x + start + HALF + own, mask=inside, other=0.0).to(tl.float32)
        normal, bell = _normal(gate)
        if BACKWARD:
            dy = tl.load(grad + begin + place, mask=inside, other=0.0).to(tl.float32)
            d_gate = dy * value * (normal + gate * bell * 0.3989422804014327)
            start, own, _, _, _ = _places(ROWS, 2 * HALF, HALF, TALL, WIDE)
            tl.store(out + start + own, (dy * gate * normal).to(out.dtype.element_ty), mask=inside)
            tl.store(out + start + HALF + own, d_gate.to(out.dtype.element_ty), mask=inside)
        else:
            result = value * gate * normal
            tl.store(out + begin + place, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["ROWS"])
    def _quick_gelu(x, STRIDE, grad, out, ROWS, WIDTH, TALL: tl.constexpr, WIDE: tl.constexpr, BACKWARD: tl.constexpr):
        """out = x sigmoid(1.702 x), or backward the gradient of x, whose rows are STRIDE apart."""
        start, own, begin, place, inside = _places(ROWS, STRIDE, WIDTH, TALL, WIDE)
        value = tl.load(x + start + own, mask=inside, other=0.0).to(tl.float32)
        slope = sigmoid(1.702 * value)
        result = value * slope
        if BACKWARD:
            dy = tl.load(grad + begin + place, mask=inside, other=0.0).to(tl.float32)
            result = dy * slope * (1 + 1.702 * value * (1 - slope))
        tl.store(out + begin + place, result.to(out.dtype.element_ty), mask=inside)


class SumNorm(torch.autograd.Function):
    """(x + y, layer_norm(x + y)) of rows x and y [..., width]; without y, None, (x, layer_norm(x)).

    weight and bias [width] are frozen. Sums over a row are float32. Of the forward pass x + y is kept,
    which the residual stream keeps anyway, and of each row its mean and deviation.
    """

    @staticmethod
    def forward(ctx, x, y, weight, bias, eps):
        x = x.contiguous()
        total, norm, statistics = run_sum_norm(x, y, weight, bias, eps)
        ctx.save_for_backward(total, weight, statistics)
        ctx.added = y is not None
        return total, norm

    @staticmethod
    def backward(ctx, grad_total, grad_norm):
        total, weight, statistics = ctx.saved_tensors
        grad = run_sum_norm_backward(total, grad_total, grad_norm, weight, statistics)
        return grad, grad if ctx.added else None, None, None, None


def sum_and_norm(norm, x, y=None):
    """(x + y, which may be None, and its layer norm)"""
    return SumNorm.apply(x, y, norm.weight, norm.bias, norm.eps)


def rows_of(x):
    """x [..., width] as rows [n, width], whose values lie side by side: a view also of some columns of wider rows, as
    an adapted layer's outputs are."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _sizes(width):
    """What the kernels of rows are compiled for: a thread has eight values, 16 bytes in half precision."""
    tile = triton.next_power_of_2(width)
    return dict(WIDTH=width, TILE=tile, num_warps=max(1, tile // 256))


def run_sum_norm(x, y, weight, bias, eps):
    """(x + y or, with a y of None, x itself; its layer norm; mean and 1 / deviation of each row [rows, 2])."""
    width, add = x.shape[-1], y is not None
    total, out = torch.empty_like(x) if add else x, torch.empty_like(x)
    statistics = x.new_empty(x.numel() // width, 2, dtype=torch.float32)
    rows = rows_of(y if add else x)
    sizes, tall = _sizes(width), 4 if len(rows) >= MANY else 1
    sizes |= dict(TALL=tall, num_warps=max(tall, sizes["num_warps"]))
    inputs = x, rows, rows.stride(0), weight, bias
    _sum_norm[triton.cdiv(len(rows), tall),](*inputs, total, statistics, out, len(rows), eps, ADD=add, **sizes)
    return total, out, statistics


def run_sum_norm_backward(total, grad_total, grad_norm, weight, statistics):
    """The gradient of x and of y, from those of what `run_sum_norm` gave."""
    out, gradients = torch.empty_like(total), (grad_total.contiguous(), grad_norm.contiguous())
    grid, sizes = (len(statistics),), _sizes(total.shape[-1])
    _sum_norm_backward[grid](total, *gradients, weight, statistics, out, **sizes)
    return out


def run_quick_gelu(x, grad):
    """CLIP's x sigmoid(1.702 x), or with `grad` the gradient of x."""
    return _run_activation(_quick_gelu, x, grad, x.new_empty(x.shape), x.shape[-1])


def run_geglu(x, grad):
    """x[..., :half] gelu(x[..., half:]) (Shazeer 2020), or with `grad` the gradient of x."""
    half = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], half) if grad is None else x.new_empty(x.shape)
    return _run_activation(_geglu, x, grad, out, half)


def _run_activation(kernel, x, grad, out, width):
    """Launch the kernel of an activation of `width` values a row, forward where `grad` is None, or backward."""
    rows, wide = rows_of(x), 256
    tall = 2048 // wide
    grid = triton.cdiv(len(rows), tall), triton.cdiv(width, wide)
    backward = grad is not None
    inputs = rows, rows.stride(0), grad if backward else rows
    kernel[grid](*inputs, out, len(rows), width, tall, wide, backward)
    return out


def _activation(run):
    """What `run` computes as a function of autograd, which keeps x alone for the backward pass."""

    class Activation(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return run(x, None)

        @staticmethod
        def backward(ctx, grad):
            return run(*ctx.saved_tensors, grad.contiguous())

    return Activation


QuickGelu, Geglu = _activation(run_quick_gelu), _activation(run_geglu)
