"""Triton kernels for transformers: a sum with the layer norm that follows it, GEGLU and CLIP's activation.

A transformer adds each layer's output to the residual stream and passes a norm of the sum to the next layer. PyTorch
launches two kernels forward (sum, norm) and two backward (the norm's gradient, the sum with the residual stream's).
Here one kernel does each pass. All kernels treat [..., width] as [rows, width].
"""

import torch

from lib.kernels.compiling import tl, triton

MANY_ROWS = 2048  # from here on a program has several rows

if triton:

    @triton.jit
    def sigmoid(x):
        """1 / (1 + exp(-x)) to 22 bits, with the hardware's approximations: exact division takes longer than the rest
        of a norm."""
        more = 1 + tl.exp2(-1.4426950408889634 * x)
        return tl.rsqrt(more * more)

    # total = x + y, rounded as it is stored; without ADD x
    # out = (total - mean) rstd weight + bias, where rstd = 1 / sqrt(variance + eps)
    @triton.jit(do_not_specialize=["ROWS"])
    def _add_layer_norm(
        x,  # [ROWS, WIDTH]
        y,  # [ROWS, WIDTH], rows STRIDE apart; read with ADD
        STRIDE,
        weight,  # [WIDTH]
        bias,  # [WIDTH]
        total,  # [ROWS, WIDTH], written with ADD
        statistics,  # float32 [ROWS, 2]: mean, rstd
        out,  # [ROWS, WIDTH]
        ROWS,
        eps,
        WIDTH: tl.constexpr,
        TILE: tl.constexpr,  # WIDTH padded to a power of two
        TALL: tl.constexpr,  # rows of a program
        ADD: tl.constexpr,
    ):
        column, rows = tl.arange(0, TILE)[None, :], tl.arange(0, TALL)[:, None]
        row = tl.program_id(0).to(tl.int64) * TALL
        in_row = column < WIDTH
        inside = in_row & (row + rows < ROWS)
        begin, offset = row * WIDTH, rows * WIDTH + column
        value = tl.load(x + begin + offset, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
        b = tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)
        if ADD:
            other = tl.load(y + row * STRIDE + rows * STRIDE + column, mask=inside, other=0.0)
            rounded = (value + other.to(tl.float32)).to(total.dtype.element_ty)
            tl.store(total + begin + offset, rounded, mask=inside)
            value = rounded.to(tl.float32)
        mean = (tl.sum(value, 1) / WIDTH)[:, None]
        apart = tl.where(inside, value - mean, 0.0)
        rstd = 1 / tl.sqrt((tl.sum(apart * apart, 1) / WIDTH)[:, None] + eps)
        tl.store(statistics + row * 2 + rows * 2, mean, mask=row + rows < ROWS)
        tl.store(statistics + row * 2 + rows * 2 + 1, rstd, mask=row + rows < ROWS)
        tl.store(out + begin + offset, (apart * rstd * w + b).to(out.dtype.element_ty), mask=inside)

    # dx = dy = grad_total + rstd (dz - mean(dz) - hat mean(dz hat))
    # where hat = (total - mean) rstd and dz = grad_norm weight; one row per program
    @triton.jit
    def _add_layer_norm_backward(
        total,  # [rows, WIDTH]
        grad_total,  # [rows, WIDTH]
        grad_norm,  # [rows, WIDTH]
        weight,  # [WIDTH]
        statistics,  # float32 [rows, 2]: mean, rstd
        out,  # [rows, WIDTH]
        WIDTH: tl.constexpr,
        TILE: tl.constexpr,
    ):
        column = tl.arange(0, TILE)
        inside = column < WIDTH
        row = tl.program_id(0).to(tl.int64)
        offset = row * WIDTH + column
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(statistics + row * 2)
        rstd = tl.load(statistics + row * 2 + 1)
        hat = (tl.load(total + offset, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        dz = tl.load(grad_norm + offset, mask=inside, other=0.0).to(tl.float32) * w
        first = tl.sum(dz, 0) / WIDTH
        second = tl.sum(dz * hat, 0) / WIDTH
        result = tl.load(grad_total + offset, mask=inside, other=0.0).to(tl.float32)
        result += rstd * (dz - first - hat * second)
        tl.store(out + offset, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _offsets(ROWS, STRIDE, WIDTH, TALL: tl.constexpr, WIDE: tl.constexpr):
        """This program's tile [TALL, WIDE]: its start and the offsets behind that in rows STRIDE apart, both again in
        contiguous rows, and the mask."""
        row = tl.program_id(0).to(tl.int64) * TALL
        rows = tl.arange(0, TALL)[:, None]
        column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)[None, :]
        inside = (row + rows < ROWS) & (column < WIDTH)
        return row * STRIDE, rows * STRIDE + column, row * WIDTH, rows * WIDTH + column, inside

    @triton.jit
    def _normal(x):
        """(Φ(x), exp(-x²/2)), Φ being the standard normal distribution function, to 1e-7: Abramowitz and Stegun 7.1.26.
        With it the kernel is memory-bound, with erf itself compute-bound."""
        bell = tl.exp2(-0.7213475204444817 * x * x)
        more = 1 + 0.3275911 * 0.7071067811865476 * tl.abs(x)
        t = tl.rsqrt(more * more)
        tail = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
        tail = 0.5 * t * bell * (0.254829592 + t * (-0.284496736 + t * tail))
        return tl.where(x > 0, 1 - tail, tail), bell

    # value, gate = x[:, :HALF], x[:, HALF:]
    # forward   out = value gate Φ(gate)
    # backward  out = (grad gate Φ(gate), grad value (Φ(gate) + gate exp(-gate²/2) / sqrt(2π)))
    @triton.jit(do_not_specialize=["ROWS"])
    def _geglu(
        x,  # [ROWS, 2 * HALF], rows STRIDE apart
        STRIDE,
        grad,  # [ROWS, HALF], read backward
        out,  # [ROWS, HALF], backward [ROWS, 2 * HALF]
        ROWS,
        HALF,
        TALL: tl.constexpr,
        WIDE: tl.constexpr,
        BACKWARD: tl.constexpr,
    ):
        start, own, begin, offset, inside = _offsets(ROWS, STRIDE, HALF, TALL, WIDE)
        value = tl.load(x + start + own, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(x + start + HALF + own, mask=inside, other=0.0).to(tl.float32)
        normal, bell = _normal(gate)
        if BACKWARD:
            dy = tl.load(grad + begin + offset, mask=inside, other=0.0).to(tl.float32)
            d_gate = dy * value * (normal + gate * bell * 0.3989422804014327)
            start, own, _, _, _ = _offsets(ROWS, 2 * HALF, HALF, TALL, WIDE)
            tl.store(out + start + own, (dy * gate * normal).to(out.dtype.element_ty), mask=inside)
            tl.store(out + start + HALF + own, d_gate.to(out.dtype.element_ty), mask=inside)
        else:
            result = value * gate * normal
            tl.store(out + begin + offset, result.to(out.dtype.element_ty), mask=inside)

    # forward   out = x s, where s = sigmoid(1.702 x)
    # backward  out = grad s (1 + 1.702 x (1 - s))
    @triton.jit(do_not_specialize=["ROWS"])
    def _quick_gelu(
        x,  # [ROWS, WIDTH], rows STRIDE apart
        STRIDE,
        grad,  # [ROWS, WIDTH], read backward
        out,  # [ROWS, WIDTH]
        ROWS,
        WIDTH,
        TALL: tl.constexpr,
        WIDE: tl.constexpr,
        BACKWARD: tl.constexpr,
    ):
        start, own, begin, offset, inside = _offsets(ROWS, STRIDE, WIDTH, TALL, WIDE)
        value = tl.load(x + start + own, mask=inside, other=0.0).to(tl.float32)
        slope = sigmoid(1.702 * value)
        result = value * slope
        if BACKWARD:
            dy = tl.load(grad + begin + offset, mask=inside, other=0.0).to(tl.float32)
            result = dy * slope * (1 + 1.702 * value * (1 - slope))
        tl.store(out + begin + offset, result.to(out.dtype.element_ty), mask=inside)


class AddLayerNorm(torch.autograd.Function):
    """(x + y, F.layer_norm(x + y, [width], weight, bias, eps)) of x and y [..., width]; if y is None, of x alone.

    weight and bias [width] are frozen. Sums over a row are float32. The backward pass needs x + y, which the residual
    stream keeps anyway, and the mean and deviation of each row.
    """

    @staticmethod
    def forward(ctx, x, y, weight, bias, eps):
        x = x.contiguous()
        total, norm, statistics = run_add_layer_norm(x, y, weight, bias, eps)
        ctx.save_for_backward(total, weight, statistics)
        ctx.added = y is not None
        return total, norm

    @staticmethod
    def backward(ctx, grad_total, grad_norm):
        total, weight, statistics = ctx.saved_tensors
        grad = run_add_layer_norm_backward(total, grad_total, grad_norm, weight, statistics)
        return grad, grad if ctx.added else None, None, None, None


def add_layer_norm(norm, x, y=None):
    """AddLayerNorm with the weights of a torch.nn.LayerNorm."""
    return AddLayerNorm.apply(x, y, norm.weight, norm.bias, norm.eps)


def _as_rows(x):
    """x [..., width] as rows [n, width] of adjacent values: a view, also of some columns of wider rows, as an adapted
    layer's outputs are."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _sizes(width):
    """Sizes that the layer norm's kernels are compiled for: a thread has eight values, 16 bytes in half precision."""
    tile = triton.next_power_of_2(width)
    return dict(WIDTH=width, TILE=tile, num_warps=max(1, tile // 256))


def run_add_layer_norm(x, y, weight, bias, eps):
    """(x + y, or x itself if y is None; its layer norm; float32 [rows, 2] of means and 1 / deviations)"""
    width, add = x.shape[-1], y is not None
    total, out = torch.empty_like(x) if add else x, torch.empty_like(x)
    statistics = x.new_empty(x.numel() // width, 2, dtype=torch.float32)
    rows = _as_rows(y if add else x)
    sizes, tall = _sizes(width), 4 if len(rows) >= MANY_ROWS else 1
    sizes |= dict(TALL=tall, num_warps=max(tall, sizes["num_warps"]))
    inputs = x, rows, rows.stride(0), weight, bias
    _add_layer_norm[triton.cdiv(len(rows), tall),](*inputs, total, statistics, out, len(rows), eps, ADD=add, **sizes)
    return total, out, statistics


def run_add_layer_norm_backward(total, grad_total, grad_norm, weight, statistics):
    """The gradient of x and of y, from those of the sum and of its norm."""
    out, gradients = torch.empty_like(total), (grad_total.contiguous(), grad_norm.contiguous())
    grid, sizes = (len(statistics),), _sizes(total.shape[-1])
    _add_layer_norm_backward[grid](total, *gradients, weight, statistics, out, **sizes)
    return out


def run_quick_gelu(x, grad):
    """CLIP's x * torch.sigmoid(1.702 * x), or with `grad` the gradient of x."""
    return _run_activation(_quick_gelu, x, grad, x.new_empty(x.shape), x.shape[-1])


def run_geglu(x, grad):
    """value * F.gelu(gate) of value, gate = x.chunk(2, dim=-1) (Shazeer 2020), or with `grad` the gradient of x."""
    half = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], half) if grad is None else x.new_empty(x.shape)
    return _run_activation(_geglu, x, grad, out, half)


def _run_activation(kernel, x, grad, out, width):
    """Launch an activation with `width` outputs a row: forward if `grad` is None, else backward."""
    rows, wide = _as_rows(x), 256
    tall = 2048 // wide
    grid = triton.cdiv(len(rows), tall), triton.cdiv(width, wide)
    backward = grad is not None
    inputs = rows, rows.stride(0), grad if backward else rows
    kernel[grid](*inputs, out, len(rows), width, tall, wide, backward)
    return out


def _activation(run):
    """`run` as a function of autograd, which keeps only x for the backward pass."""

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
