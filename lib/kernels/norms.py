"""Triton kernels for what stands between convolutions: group norm with its SiLU, and GEGLU.

They read and write the channels-last layout once. Group norms of large maps have kernels of their own for the
forward pass, large_maps.py. Where Triton cannot be had `channels_last.missing_kernels` says why, and PyTorch's
kernels remain.
"""

import torch

from lib.kernels.compiling import tl, triton
from lib.kernels.large_maps import LARGE, norm_of_large_maps
from lib.kernels.rows import rows_of

MOST_PARTS = 16  # into which a group's pixels are divided, to be summed in parallel
# Values of a group, filled up to a power of two a pixel, that are one program's: launching two takes longer.
WHOLE = 2**14

if triton:

    @triton.jit
    def _offsets(HW, C, GROUP: tl.constexpr):
        """This program's picture, where its group of that begins, and the group's first channel."""
        picture, group = tl.program_id(0) // (C // GROUP), tl.program_id(0) % (C // GROUP)
        return picture, picture.to(tl.int64) * HW * C + group * GROUP, group * GROUP

    @triton.jit
    def _tile(row, begin, EACH, HW, start, C, column, GROUP: tl.constexpr, ROWS: tl.constexpr):
        """Where the values of ROWS pixels from `row` on lie, and which of them are this program's."""
        rows = tl.arange(0, ROWS)[:, None]
        inside = (row + rows < tl.minimum(begin + EACH, HW)) & (column < GROUP)
        return start + tl.cast(row, tl.int64) * C + rows * C + column, inside

    @triton.jit
    def _value(x, place, inside, s):
        """x and the shift of its channel, float32."""
        return tl.load(x + place, mask=inside, other=0.0).to(tl.float32) + s

    @triton.jit
    def _normalised(x, mean, rstd, weight, bias, SILU):
        """(hat = x normalised, z = hat weight + bias or the SiLU of it, derivative of that)"""
        hat = (x - mean) * rstd
        z = hat * weight + bias
        sigmoid = tl.sigmoid(z)
        slope = tl.where(SILU != 0, sigmoid * (1 + z * (1 - sigmoid)), 1.0)
        return hat, tl.where(SILU != 0, z * sigmoid, z), slope

    @triton.jit
    def _two_sums(x, grad, begin, EACH, HW, start, C, column, s, x0, mean, rstd, w, b, SILU,
                  GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
                  BACKWARD: tl.constexpr):  # fmt: skip
        """Over a part of one group, of x - x0 and its square, or backward of w dz and w dz hat.

        x0 is the group's first value: the variance is a difference of the two, which are small only near
        the values themselves."""
        first = tl.zeros([ROWS, WIDTH], tl.float32)
        second = tl.zeros([ROWS, WIDTH], tl.float32)
        for row in range(begin, tl.minimum(begin + EACH, HW), ROWS):
            place, inside = _tile(row, begin, EACH, HW, start, C, column, GROUP, ROWS)
            value = _value(x, place, inside, s)
            if BACKWARD:
                hat, _, slope = _normalised(value, mean, rstd, w, b, SILU)
                dz = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * slope * w
                first += dz
                second += dz * hat
            else:
                value = tl.where(inside, value - x0, 0.0)
                first += value
                second += value * value
        return tl.sum(tl.sum(first, 1), 0), tl.sum(tl.sum(second, 1), 0)

    @triton.jit
    def _known(x, shift, STRIDE, statistics, weight, bias, picture, start, channel, column, GROUP: tl.constexpr,
               BACKWARD: tl.constexpr):  # fmt: skip
        """(shift, x0, mean, rstd, weight, bias) of this program's group, of mean and rstd what is known beforehand.

        STRIDE is from one picture's shift to the next's, or negative where there is none."""
        w = tl.load(weight + channel + column, mask=column < GROUP, other=0.0).to(tl.float32)
        b = tl.load(bias + channel + column, mask=column < GROUP, other=0.0).to(tl.float32)
        shifts, shifted = shift + picture * STRIDE + channel, STRIDE >= 0
        s = tl.load(shifts + column, mask=(column < GROUP) & shifted, other=0.0).to(tl.float32)
        x0 = tl.load(x + start).to(tl.float32)
        x0 += tl.load(shifts, mask=shifted, other=0.0).to(tl.float32)
        mean, rstd = x0, x0
        if BACKWARD:
            mean = tl.load(statistics + tl.program_id(0) * 2)
            rstd = tl.load(statistics + tl.program_id(0) * 2 + 1)
        return s, x0, mean, rstd, w, b

    @triton.jit(do_not_specialize=["SILU", "STRIDE"])
    def _norm_sums(x, shift, STRIDE, grad, statistics, weight, bias, sums, HW, EACH, C, SILU,
                   GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
                   BACKWARD: tl.constexpr):  # fmt: skip
        """The two sums over a part of one group, for _norm_apply."""
        picture, start, channel = _offsets(HW, C, GROUP)
        column = tl.arange(0, WIDTH)[None, :]
        s, x0, mean, rstd, w, b = _known(x, shift, STRIDE, statistics, weight, bias, picture, start, channel,
                                         column, GROUP, BACKWARD)  # fmt: skip
        begin = tl.program_id(1) * EACH
        first, second = _two_sums(x, grad, begin, EACH, HW, start, C, column, s, x0, mean, rstd, w, b, SILU,
                                  GROUP, WIDTH, ROWS, BACKWARD)  # fmt: skip
        part = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 2
        tl.store(sums + part, first)
        tl.store(sums + part + 1, second)

    @triton.jit(do_not_specialize=["SILU", "STRIDE", "ADD"])
    def _norm_apply(x, shift, STRIDE, grad, statistics, weight, bias, sums, HW, EACH, C, SILU, eps, more, ADD, out,
                    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
                    PARTS: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
        """The normalised x, after its SiLU, or backward the gradient of x, with ADD and `more`; of a part of a group.

        PARTS is the most that _norm_sums summed, or 0: then this program has a whole group, and sums itself."""
        picture, start, channel = _offsets(HW, C, GROUP)
        column = tl.arange(0, WIDTH)[None, :]
        s, x0, mean, rstd, w, b = _known(x, shift, STRIDE, statistics, weight, bias, picture, start, channel,
                                         column, GROUP, BACKWARD)  # fmt: skip
        begin = tl.program_id(1) * EACH
        if PARTS == 0:
            first, second = _two_sums(x, grad, begin, EACH, HW, start, C, column, s, x0, mean, rstd, w, b, SILU,
                                      GROUP, WIDTH, ROWS, BACKWARD)  # fmt: skip
        else:
            part = tl.arange(0, PARTS)
            known = part < tl.num_programs(1)
            parts = (tl.program_id(0) * tl.num_programs(1) + part) * 2
            first = tl.sum(tl.load(sums + parts, mask=known, other=0.0), 0)
            second = tl.sum(tl.load(sums + parts + 1, mask=known, other=0.0), 0)
        first = first / (HW * GROUP)
        second = second / (HW * GROUP)
        if not BACKWARD:
            mean = x0 + first
            rstd = 1 / tl.sqrt(tl.maximum(second - first * first, 0.0) + eps)
            if tl.program_id(1) == 0:
                tl.store(statistics + tl.program_id(0) * 2, mean)
                tl.store(statistics + tl.program_id(0) * 2 + 1, rstd)
        for row in range(begin, tl.minimum(begin + EACH, HW), ROWS):
            place, inside = _tile(row, begin, EACH, HW, start, C, column, GROUP, ROWS)
            hat, result, slope = _normalised(_value(x, place, inside, s), mean, rstd, w, b, SILU)
            if BACKWARD:
                dz = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * slope * w
                result = rstd * (dz - first - hat * second)
                result += tl.load(more + place, mask=inside & (ADD != 0), other=0.0).to(tl.float32)
            tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _geglu(x, STRIDE, grad, out, COUNT, HALF, BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
        """out = x[:, :HALF] gelu(x[:, HALF:]), or backward both halves of the gradient of x, whose rows are STRIDE
        apart."""
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < COUNT
        left = place // HALF * STRIDE + place % HALF
        value = tl.load(x + left, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(x + left + HALF, mask=inside, other=0.0).to(tl.float32)
        normal = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))  # the distribution's integral
        if BACKWARD:
            dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
            density = tl.exp(-0.5 * gate * gate) * 0.3989422804014327
            d_gate = dy * value * (normal + gate * density)
            left = place // HALF * 2 * HALF + place % HALF
            tl.store(out + left, (dy * gate * normal).to(out.dtype.element_ty), mask=inside)
            tl.store(out + left + HALF, d_gate.to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(out + place, (value * gate * normal).to(out.dtype.element_ty), mask=inside)


class GroupNormSilu(torch.autograd.Function):
    """(x, group norm (Wu & He 2018) of x + shift, after its SiLU) of x [n, c, h, w] in channels-last layout.

    shift is [n, c] or None and gets no gradient, weight and bias [c] are frozen. Sums are float32. Of the
    forward pass x is kept, and of each group its mean and deviation. x itself is returned for what else reads
    it, so that the backward pass need not add its gradient to the norm's by another kernel.
    """

    @staticmethod
    def forward(ctx, x, shift, weight, bias, groups, eps, silu):
        ctx.set_materialize_grads(False)
        pixels = x.contiguous(memory_format=torch.channels_last)
        statistics = x.new_empty(x.shape[0] * groups, 2, dtype=torch.float32)
        if shift is not None and shift.stride(1) != 1:
            shift = shift.contiguous()
        ctx.save_for_backward(pixels, shift, weight, bias, statistics)
        ctx.settings = groups, eps, silu
        return x, group_norm(pixels, shift, None, None, statistics, weight, bias, groups, eps, silu)

    @staticmethod
    def backward(ctx, more, grad):
        x, shift, weight, bias, statistics = ctx.saved_tensors
        if grad is None:
            return more, *[None] * 6
        grads = (g if g is None else g.contiguous(memory_format=torch.channels_last) for g in (grad, more))  # fmt: skip
        grad_x = group_norm(x, shift, *grads, statistics, weight, bias, *ctx.settings)
        return grad_x, *[None] * 6


def group_norm(x, shift, grad, more, statistics, weight, bias, groups, eps, silu):
    """Launch either pass: the sums of the parts of each group and then the result, or both by one kernel where
    a group is small. Backward adds `more`, if it is not None."""
    n, channels, height, width = x.shape
    pixels, group = height * width, channels // groups
    if grad is None and n * pixels >= LARGE:
        return norm_of_large_maps(x, shift, statistics, weight, bias, groups, eps, silu)
    width_of_tile = triton.next_power_of_2(group)
    rows_of_tile = max(1, 8192 // width_of_tile)
    # Enough programs to fill a GPU, each of whole tiles.
    parts = max(1, min(triton.cdiv(pixels, rows_of_tile), MOST_PARTS, 512 // (n * groups)))
    whole = pixels * width_of_tile <= WHOLE * n
    each = triton.cdiv(triton.cdiv(pixels, 1 if whole else parts), rows_of_tile) * rows_of_tile
    grid = (n * groups, triton.cdiv(pixels, each))
    sums = x.new_empty(*grid, 2, dtype=torch.float32)
    shifted, given = (x, -1) if shift is None else (shift, shift.stride(0)), grad is not None
    inputs = (x, *shifted, grad if given else x, statistics, weight, bias, sums, pixels, each, channels, int(silu))  # fmt: skip
    # Compiled anew for each of these, so what does not need to be known beforehand is not here.
    known = dict(GROUP=group, WIDTH=width_of_tile, ROWS=rows_of_tile, BACKWARD=given, num_warps=8)  # fmt: skip
    out = torch.empty_like(x)
    if not whole:
        _norm_sums[grid](*inputs, **known)
    added = (x, 0) if more is None else (more, 1)
    _norm_apply[grid](*inputs, eps, *added, out, PARTS=0 if whole else MOST_PARTS, **known)
    return out


class Geglu(torch.autograd.Function):
    """x[..., :half] gelu(x[..., half:]) (Shazeer 2020), keeping x alone for the backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return run_geglu(x, None)

    @staticmethod
    def backward(ctx, grad):
        return run_geglu(*ctx.saved_tensors, grad.contiguous())


def run_geglu(x, grad):
    half, count = x.shape[-1] // 2, x.numel() // 2
    out = x.new_empty(*x.shape[:-1], half) if grad is None else x.new_empty(x.shape)
    x = rows_of(x)
    grid = (triton.cdiv(count, 1024),)
    _geglu[grid](x, x.stride(0), x if grad is None else grad, out, count, half, 1024, grad is not None)  # fmt: skip
    return out
