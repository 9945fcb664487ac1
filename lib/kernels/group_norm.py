"""Triton kernels for group norm with its SiLU, forward and backward, in channels-last layout.

PyTorch's need several passes and another layout. Here a thread reads eight channels at once, one tile ahead of what it
computes, and per element there is one multiplication and one addition: the norm, its weight and bias are folded into
a slope and an offset a channel. Where a map is small one kernel does it all, elsewhere one sums and another applies.
What they take by size: bench/norm_speed.py. Where Triton cannot be had `channels_last.missing_kernels` says why, and
PyTorch's kernels remain.
"""

import math

import torch

from lib.kernels.compiling import tl, triton

WHOLE = 2**14  # values of a group that one program takes, its channels filled up to a power of two
SUMMED = APPLIED = 2**11  # that a program sums, or applies the norm to, at once
ACROSS = 64  # channels of a program that applies: all of Stable Diffusion's maps are so many times as wide
PROGRAMS = 1024  # that apply, if there are not more blocks of channels
# (pixels of a map up to which a group is summed up by so many programs, forward; and by so many, backward)
PARTS = (2**10, 8, 32), (2**14, 32, 128), (math.inf, 128, 128)
# Pixels of maps for which there are kernels of their own, with Stable Diffusion's groups of channels.
KINDS_OF_MAPS = 64, 256, 2**10, 2**12, 2**14 + 16

if triton:
    from lib.kernels.layer_norm_geglu import sigmoid

    @triton.jit
    def _block(C, SPAN: tl.constexpr, WIDTH: tl.constexpr):
        """This program's image, its channels, and which of them exist."""
        blocks, column = tl.cdiv(C, SPAN), tl.arange(0, WIDTH)
        channel = tl.program_id(0) % blocks * SPAN + column
        return tl.program_id(0) // blocks, channel, (column < SPAN) & (channel < C)

    @triton.jit
    def _tile(picture, row, end, channel, exists, HW, C, ROWS: tl.constexpr):
        """Where the pixels from `row` on begin, where the values of ROWS of them lie behind that, and which of these
        are this program's."""
        rows = tl.arange(0, ROWS)[:, None]
        begin = (tl.cast(picture, tl.int64) * HW + row) * C
        return begin, rows * C + channel[None, :], (row + rows < end) & exists[None, :]

    @triton.jit
    def _values(x, begin, place, inside):
        return tl.load(x + begin + place, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _shift_of(shift, STRIDE, picture, channel, exists):
        """What is added to these channels of an image; 0 where STRIDE, from one image's to the next's, is negative."""
        shifted = exists & (STRIDE >= 0)
        return tl.load(shift + picture * STRIDE + channel, mask=shifted, other=0.0).to(tl.float32)

    @triton.jit
    def _first_values(x, shift, STRIDE, picture, channel, exists, HW, C, GROUP: tl.constexpr):
        """The first value of each channel's group, near which the variance is a difference of small sums."""
        leader = channel // GROUP * GROUP
        begin = tl.cast(picture, tl.int64) * HW * C
        value = tl.load(x + begin + leader, mask=exists, other=0.0).to(tl.float32)
        return value + _shift_of(shift, STRIDE, picture, leader, exists)

    @triton.jit
    def _of_channels(of, channel, exists):
        return tl.load(of + channel, mask=exists, other=0.0).to(tl.float32)

    @triton.jit
    def _known(statistics, shift, STRIDE, weight, bias, picture, channel, exists, C, GROUP: tl.constexpr):
        """(rstd, what is to be added to x rstd, weight, bias) of each channel, for the backward pass."""
        group = picture * (C // GROUP) + channel // GROUP
        mean = tl.load(statistics + group * 2, mask=exists, other=0.0)
        rstd = tl.load(statistics + group * 2 + 1, mask=exists, other=0.0)
        less = (_shift_of(shift, STRIDE, picture, channel, exists) - mean) * rstd
        w, b = _of_channels(weight, channel, exists), _of_channels(bias, channel, exists)
        return rstd, less, w, b

    @triton.jit
    def _forward(x, slope, offset, SILU):
        z = x * slope[None, :] + offset[None, :]
        if SILU != 0:
            z = z * sigmoid(z)
        return z

    @triton.jit
    def _backward(x, grad, rstd, less, w, b, SILU):
        """(gradient of hat, which is the normalised x; hat)"""
        hat = x * rstd[None, :] + less[None, :]
        if SILU != 0:
            z = hat * w[None, :] + b[None, :]
            slope = sigmoid(z)
            grad = grad * (slope + z * slope * (1 - slope))
        return grad * w[None, :], hat

    @triton.jit
    def _deviation(first, second, eps):
        """1 / the standard deviation, from the means of values near zero and of their squares."""
        return tl.rsqrt(tl.maximum(second - first * first, 0.0) + eps)

    @triton.jit(do_not_specialize=["STRIDE", "SILU", "HW", "ADD"])
    def _norm_whole(
        x,
        shift,
        STRIDE,
        grad,
        statistics,
        weight,
        bias,
        HW,
        C,
        SILU,
        eps,
        more,
        ADD,
        out,
        GROUP: tl.constexpr,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        BACKWARD: tl.constexpr,
    ):
        """The normalised x, after its SiLU, or backward the gradient of x, with ADD and `more`; of a whole group."""
        picture, channel, exists = _block(C, GROUP, WIDTH)
        begin, place, inside = _tile(picture, 0, HW, channel, exists, HW, C, ROWS)
        value, count = _values(x, begin, place, inside), HW * GROUP
        if BACKWARD:
            above = _values(grad, begin, place, inside)
            added = _values(more, begin, place, inside & (ADD != 0))
            known = _known(statistics, shift, STRIDE, weight, bias, picture, channel, exists, C, GROUP)
            rstd, less, w, b = known
            dz, hat = _backward(value, above, rstd, less, w, b, SILU)
            first, second = tl.sum(dz) / count, tl.sum(dz * hat) / count
            result = rstd[None, :] * (dz - first - hat * second) + added
        else:
            leader = tl.program_id(0) % (C // GROUP) * GROUP
            near = tl.load(x + begin + leader).to(tl.float32)
            near += _shift_of(shift, STRIDE, picture, leader, True)
            own = _shift_of(shift, STRIDE, picture, channel, exists)
            apart = tl.where(inside, value + (own - near)[None, :], 0.0)
            first, second = tl.sum(apart) / count, tl.sum(apart * apart) / count
            rstd = _deviation(first, second, eps)
            slope = rstd * _of_channels(weight, channel, exists)
            offset = _of_channels(bias, channel, exists) - first * slope
            result = _forward(apart, slope, offset, SILU)
            tl.store(statistics + tl.program_id(0) * 2, near + first)
            tl.store(statistics + tl.program_id(0) * 2 + 1, rstd)
        tl.store(out + begin + place, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["STRIDE", "SILU", "HW", "EACH"])
    def _norm_sums(
        x,
        shift,
        STRIDE,
        grad,
        statistics,
        weight,
        bias,
        sums,
        HW,
        EACH,
        C,
        SILU,
        BEHIND,
        GROUP: tl.constexpr,
        SPAN: tl.constexpr,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        BACKWARD: tl.constexpr,
    ):
        """Of a part of each group, the sums of x - its first value and, BEHIND these, of the square of that; backward of
        hat's gradient and of its product with hat."""
        picture, channel, exists = _block(C, SPAN, WIDTH)
        start = tl.program_id(1) * EACH
        end = tl.minimum(start + EACH, HW)
        begin, place, inside = _tile(picture, start, end, channel, exists, HW, C, ROWS)
        # On its way while the rest is prepared, and then the next while this one is summed.
        value = tl.load(x + begin + place, mask=inside, other=0.0)
        above = value
        if BACKWARD:
            above = tl.load(grad + begin + place, mask=inside, other=0.0)
            known = _known(statistics, shift, STRIDE, weight, bias, picture, channel, exists, C, GROUP)
            rstd, less, w, b = known
        else:
            less = _first_values(x, shift, STRIDE, picture, channel, exists, HW, C, GROUP)
            less -= _shift_of(shift, STRIDE, picture, channel, exists)
        both = tl.zeros([WIDTH, 2], tl.float32)
        for row in range(start, end, ROWS):
            _, _, inside = _tile(picture, row, end, channel, exists, HW, C, ROWS)
            if BACKWARD:
                dz, hat = _backward(value.to(tl.float32), above.to(tl.float32), rstd, less, w, b, SILU)
                both += tl.sum(tl.join(dz, dz * hat), 0)
            else:
                apart = tl.where(inside, value.to(tl.float32) - less[None, :], 0.0)
                both += tl.sum(tl.join(apart, apart * apart), 0)
            begin, place, inside = _tile(picture, row + ROWS, end, channel, exists, HW, C, ROWS)
            value = tl.load(x + begin + place, mask=inside, other=0.0)
            if BACKWARD:
                above = tl.load(grad + begin + place, mask=inside, other=0.0)
        GROUPS: tl.constexpr = SPAN // GROUP
        belongs = tl.arange(0, WIDTH)[:, None] // GROUP == tl.arange(0, GROUPS)[None, :]
        both = tl.sum(tl.where(belongs[:, :, None], both[:, None, :], 0.0), 0)
        groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
        part = groups * tl.num_programs(1) + tl.program_id(1)
        tl.store(sums + part[:, None] + tl.arange(0, 2)[None, :] * BEHIND, both)

    @triton.jit(do_not_specialize=["STRIDE", "SILU", "HW", "EACH", "ADD"])
    def _norm_apply(
        x,
        shift,
        STRIDE,
        grad,
        statistics,
        weight,
        bias,
        sums,
        HW,
        EACH,
        C,
        SILU,
        BEHIND,
        eps,
        more,
        ADD,
        out,
        GROUP: tl.constexpr,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        PARTS: tl.constexpr,
        BACKWARD: tl.constexpr,
    ):
        """As _norm_whole, of a part of any channels, from what _norm_sums gave."""
        picture, channel, exists = _block(C, WIDTH, WIDTH)
        start = tl.program_id(1) * EACH
        end = tl.minimum(start + EACH, HW)
        begin, place, inside = _tile(picture, start, end, channel, exists, HW, C, ROWS)
        value = tl.load(x + begin + place, mask=inside, other=0.0)
        above, added = value, value
        if BACKWARD:
            above = tl.load(grad + begin + place, mask=inside, other=0.0)
            added = tl.load(more + begin + place, mask=inside & (ADD != 0), other=0.0)
        group = picture * (C // GROUP) + channel // GROUP
        parts = sums + group[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
        first = tl.sum(tl.load(parts, mask=exists[:, None], other=0.0), 1) / (HW * GROUP)
        second = tl.sum(tl.load(parts + BEHIND, mask=exists[:, None], other=0.0), 1) / (HW * GROUP)
        if BACKWARD:
            known = _known(statistics, shift, STRIDE, weight, bias, picture, channel, exists, C, GROUP)
            rstd, less, w, b = known
        else:
            rstd = _deviation(first, second, eps)
            mean = first + _first_values(x, shift, STRIDE, picture, channel, exists, HW, C, GROUP)
            leads = exists & (channel % GROUP == 0) & (tl.program_id(1) == 0)
            tl.store(statistics + group * 2, mean, mask=leads)
            tl.store(statistics + group * 2 + 1, rstd, mask=leads)
            slope = rstd * _of_channels(weight, channel, exists)
            offset = _of_channels(bias, channel, exists)
            offset += (_shift_of(shift, STRIDE, picture, channel, exists) - mean) * slope
        for row in range(start, end, ROWS):
            begin, place, inside = _tile(picture, row, end, channel, exists, HW, C, ROWS)
            if BACKWARD:
                dz, hat = _backward(value.to(tl.float32), above.to(tl.float32), rstd, less, w, b, SILU)
                result = rstd[None, :] * (dz - first[None, :] - hat * second[None, :])
                result += added.to(tl.float32)
            else:
                result = _forward(value.to(tl.float32), slope, offset, SILU)
            tl.store(out + begin + place, result.to(out.dtype.element_ty), mask=inside)
            begin, place, inside = _tile(picture, row + ROWS, end, channel, exists, HW, C, ROWS)
            value = tl.load(x + begin + place, mask=inside, other=0.0)
            if BACKWARD:
                above = tl.load(grad + begin + place, mask=inside, other=0.0)
                added = tl.load(more + begin + place, mask=inside & (ADD != 0), other=0.0)


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
        grads = (g if g is None else g.contiguous(memory_format=torch.channels_last) for g in (grad, more))
        grad_x = group_norm(x, shift, *grads, statistics, weight, bias, *ctx.settings)
        return grad_x, *[None] * 6


def group_norm(x, shift, grad, more, statistics, weight, bias, groups, eps, silu):
    """Launch either pass. Backward adds `more`, if it is not None."""
    n, channels, height, width = x.shape
    pixels, group = height * width, channels // groups
    given = grad is not None
    shifted = (x, -1) if shift is None else (shift, shift.stride(0))
    inputs = x, *shifted, grad if given else x, statistics, weight, bias
    out = torch.empty_like(x)
    outputs = eps, *((x, 0) if more is None else (more, 1)), out
    # Compiled anew for each of these, so what does not need to be known beforehand is not here.
    known = dict(GROUP=group, BACKWARD=given)
    wide = triton.next_power_of_2(group)
    if pixels * wide <= WHOLE:
        rows = WHOLE // wide
        if pixels * 4 <= rows:
            rows //= 4
        warps = max(1, min(16, rows * wide // 1024))
        _norm_whole[n * groups,](
            *inputs, pixels, channels, int(silu), *outputs, WIDTH=wide, ROWS=rows, num_warps=warps, **known
        )
        return out
    span = channels_of_a_program(channels, group)
    parts = next(each[1 + given] for each in PARTS if pixels <= each[0])
    sums = x.new_empty(2, n * groups, parts, dtype=torch.float32)
    inputs, others = (*inputs, sums, pixels), (channels, int(silu), n * groups * parts)
    wide = triton.next_power_of_2(span)
    rows = max(1, SUMMED // wide)
    _norm_sums[n * channels // span, parts](
        *inputs, triton.cdiv(pixels, parts), *others, SPAN=span, WIDTH=wide, ROWS=rows, num_warps=1, **known
    )
    wide = min(ACROSS, triton.next_power_of_2(channels))
    rows, blocks = APPLIED // wide, n * triton.cdiv(channels, wide)
    programs = max(1, min(triton.cdiv(pixels, rows), PROGRAMS // blocks))
    each = triton.cdiv(triton.cdiv(pixels, programs), rows) * rows
    _norm_apply[blocks, triton.cdiv(pixels, each)](
        *inputs, each, *others, *outputs, WIDTH=wide, ROWS=rows, PARTS=parts, num_warps=4, **known
    )
    return out


def channels_of_a_program(channels, group):
    """Whole groups, together if possible a multiple of the eight channels that a thread reads at once, and 32 or more:
    at 64 bytes a pixel little is read in vain."""
    span = math.lcm(group, 8)
    if channels % span:
        return group
    while span < 32 and channels % (2 * span) == 0:
        span *= 2
    return span
