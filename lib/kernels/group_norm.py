"""Triton kernels for group norm with its SiLU, forward and backward, in channels-last layout.

    out = silu(slope x + offset)     slope and offset, per channel, contain the norm, weight and bias

PyTorch's kernels need several passes and another layout. Here a thread reads eight channels at once and prefetches the
next tile. Small feature maps take one kernel. Large ones take two: one computes the sums, one applies the norm. Times
by size: bench/norm_speed.py. Without Triton, `channels_last.missing_kernels` gives the reason and PyTorch's kernels
remain.
"""

import math

import torch

from lib.kernels.compiling import tl, triton

WHOLE = 2**14  # values of a group, its channels padded to a power of two, that one program normalizes
SUMMED = APPLIED = 2**11  # values of a tile of the kernel that sums, and of the one that applies the norm
ACROSS = 64  # channels of a program that applies: a divisor of the channels of all Stable Diffusion's feature maps
PROGRAMS = 1024  # that apply, unless there are more blocks of channels
# (most pixels, programs that sum a group forward, and backward)
PARTS = (2**10, 8, 32), (2**14, 32, 128), (math.inf, 128, 128)
# Sizes of feature maps, in pixels, for which other kernels are compiled, with Stable Diffusion's groups of channels.
COMPILED_PIXELS = 64, 256, 2**10, 2**12, 2**14 + 16

if triton:
    from lib.kernels.layer_norm_geglu import sigmoid

    @triton.jit
    def _block(C, SPAN: tl.constexpr, WIDTH: tl.constexpr):
        """This program's image, its channels [WIDTH], and their mask."""
        blocks, column = tl.cdiv(C, SPAN), tl.arange(0, WIDTH)
        channel = tl.program_id(0) % blocks * SPAN + column
        return tl.program_id(0) // blocks, channel, (column < SPAN) & (channel < C)

    @triton.jit
    def _tile(image, row, end, channel, in_c, HW, C, ROWS: tl.constexpr):
        """A tile of ROWS pixels from `row` on: its start, the places behind that [ROWS, WIDTH], and the mask."""
        rows = tl.arange(0, ROWS)[:, None]
        begin = (tl.cast(image, tl.int64) * HW + row) * C
        return begin, rows * C + channel[None, :], (row + rows < end) & in_c[None, :]

    @triton.jit
    def _values(x, begin, at, inside):
        return tl.load(x + begin + at, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _shift_of(shift, STRIDE, image, channel, in_c):
        """The shift of these channels of an image; 0 if STRIDE, from one image to the next, is negative."""
        shifted = in_c & (STRIDE >= 0)
        return tl.load(shift + image * STRIDE + channel, mask=shifted, other=0.0).to(tl.float32)

    @triton.jit
    def _first_values(x, shift, STRIDE, image, channel, in_c, HW, C, GROUP: tl.constexpr):
        """The first value of each channel's group. It is subtracted, so the variance is a difference of small sums."""
        leader = channel // GROUP * GROUP
        begin = tl.cast(image, tl.int64) * HW * C
        value = tl.load(x + begin + leader, mask=in_c, other=0.0).to(tl.float32)
        return value + _shift_of(shift, STRIDE, image, leader, in_c)

    @triton.jit
    def _of_channels(of, channel, in_c):
        return tl.load(of + channel, mask=in_c, other=0.0).to(tl.float32)

    @triton.jit
    def _known(statistics, shift, STRIDE, weight, bias, image, channel, in_c, C, GROUP: tl.constexpr):
        """(rstd, (shift - mean) rstd, weight, bias) of each channel, for the backward pass."""
        group = image * (C // GROUP) + channel // GROUP
        mean = tl.load(statistics + group * 2, mask=in_c, other=0.0)
        rstd = tl.load(statistics + group * 2 + 1, mask=in_c, other=0.0)
        hat_offset = (_shift_of(shift, STRIDE, image, channel, in_c) - mean) * rstd
        w, b = _of_channels(weight, channel, in_c), _of_channels(bias, channel, in_c)
        return rstd, hat_offset, w, b

    @triton.jit
    def _forward(x, slope, offset, SILU):
        z = x * slope[None, :] + offset[None, :]
        if SILU != 0:
            z = z * sigmoid(z)
        return z

    @triton.jit
    def _backward(x, grad, rstd, hat_offset, w, b, SILU):
        """(dz, hat): hat = (x + shift - mean) rstd, and the gradient of hat, through the SiLU and the weight"""
        hat = x * rstd[None, :] + hat_offset[None, :]
        if SILU != 0:
            z = hat * w[None, :] + b[None, :]
            slope = sigmoid(z)
            grad = grad * (slope + z * slope * (1 - slope))
        return grad * w[None, :], hat

    @triton.jit
    def _deviation(first, second, eps):
        """rstd from the means of values near zero and of their squares."""
        return tl.rsqrt(tl.maximum(second - first * first, 0.0) + eps)

    # One whole group per program. With hat = (x + shift - mean) rstd over the group:
    # forward   z = hat weight + bias; out = z sigmoid(z) with SILU, else z
    # backward  out = rstd (dz - mean(dz) - hat mean(dz hat)), and with ADD + skip_grad, where
    #           dz = grad weight, and with SILU times sigmoid(z) (1 + z (1 - sigmoid(z)))
    @triton.jit(do_not_specialize=["STRIDE", "SILU", "HW", "ADD"])
    def _norm_whole(
        x,  # [n, HW, C]
        shift,  # [n, C], images STRIDE apart; ignored if STRIDE < 0
        STRIDE,
        grad,  # [n, HW, C], read backward
        statistics,  # float32 [n * groups, 2]: mean, rstd; written forward, read backward
        weight,  # [C]
        bias,  # [C]
        HW,
        C,
        SILU,
        eps,
        skip_grad,  # [n, HW, C], summed into the gradient with ADD
        ADD,
        out,  # [n, HW, C]
        GROUP: tl.constexpr,  # channels of a group
        WIDTH: tl.constexpr,  # GROUP padded to a power of two
        ROWS: tl.constexpr,  # HW or more
        BACKWARD: tl.constexpr,
    ):
        image, channel, in_c = _block(C, GROUP, WIDTH)
        begin, at, inside = _tile(image, 0, HW, channel, in_c, HW, C, ROWS)
        value, count = _values(x, begin, at, inside), HW * GROUP
        if BACKWARD:
            grad_value = _values(grad, begin, at, inside)
            skip_value = _values(skip_grad, begin, at, inside & (ADD != 0))
            known = _known(statistics, shift, STRIDE, weight, bias, image, channel, in_c, C, GROUP)
            rstd, hat_offset, w, b = known
            dz, hat = _backward(value, grad_value, rstd, hat_offset, w, b, SILU)
            first, second = tl.sum(dz) / count, tl.sum(dz * hat) / count
            result = rstd[None, :] * (dz - first - hat * second) + skip_value
        else:
            leader = tl.program_id(0) % (C // GROUP) * GROUP
            near = tl.load(x + begin + leader).to(tl.float32)
            near += _shift_of(shift, STRIDE, image, leader, True)
            own = _shift_of(shift, STRIDE, image, channel, in_c)
            apart = tl.where(inside, value + (own - near)[None, :], 0.0)
            first, second = tl.sum(apart) / count, tl.sum(apart * apart) / count
            rstd = _deviation(first, second, eps)
            slope = rstd * _of_channels(weight, channel, in_c)
            offset = _of_channels(bias, channel, in_c) - first * slope
            result = _forward(apart, slope, offset, SILU)
            tl.store(statistics + tl.program_id(0) * 2, near + first)
            tl.store(statistics + tl.program_id(0) * 2 + 1, rstd)
        tl.store(out + begin + at, result.to(out.dtype.element_ty), mask=inside)

    # A part of the pixels of each group per program; the arguments are as in _norm_whole.
    # forward   sums = (Σ d, Σ d²), where d = x + shift - the first value of the group
    # backward  sums = (Σ dz, Σ dz hat)
    @triton.jit(do_not_specialize=["STRIDE", "SILU", "HW", "EACH"])
    def _norm_sums(
        x,
        shift,
        STRIDE,
        grad,
        statistics,
        weight,
        bias,
        sums,  # float32 [2, n * groups, parts]: BEHIND = n * groups * parts values lie between the two
        HW,
        EACH,  # pixels of a part
        C,
        SILU,
        BEHIND,
        GROUP: tl.constexpr,
        SPAN: tl.constexpr,  # channels of a program, whole groups
        WIDTH: tl.constexpr,  # SPAN padded to a power of two
        ROWS: tl.constexpr,  # pixels of a tile
        BACKWARD: tl.constexpr,
    ):
        image, channel, in_c = _block(C, SPAN, WIDTH)
        start = tl.program_id(1) * EACH
        end = tl.minimum(start + EACH, HW)
        begin, at, inside = _tile(image, start, end, channel, in_c, HW, C, ROWS)
        # Prefetched: the first tile during set-up, the next ones while the one before is summed.
        value = tl.load(x + begin + at, mask=inside, other=0.0)
        grad_value = value
        if BACKWARD:
            grad_value = tl.load(grad + begin + at, mask=inside, other=0.0)
            known = _known(statistics, shift, STRIDE, weight, bias, image, channel, in_c, C, GROUP)
            rstd, hat_offset, w, b = known
        else:
            near = _first_values(x, shift, STRIDE, image, channel, in_c, HW, C, GROUP)
            near -= _shift_of(shift, STRIDE, image, channel, in_c)
        both = tl.zeros([WIDTH, 2], tl.float32)
        for row in range(start, end, ROWS):
            _, _, inside = _tile(image, row, end, channel, in_c, HW, C, ROWS)
            if BACKWARD:
                dz, hat = _backward(value.to(tl.float32), grad_value.to(tl.float32), rstd, hat_offset, w, b, SILU)
                both += tl.sum(tl.join(dz, dz * hat), 0)
            else:
                apart = tl.where(inside, value.to(tl.float32) - near[None, :], 0.0)
                both += tl.sum(tl.join(apart, apart * apart), 0)
            begin, at, inside = _tile(image, row + ROWS, end, channel, in_c, HW, C, ROWS)
            value = tl.load(x + begin + at, mask=inside, other=0.0)
            if BACKWARD:
                grad_value = tl.load(grad + begin + at, mask=inside, other=0.0)
        GROUPS: tl.constexpr = SPAN // GROUP
        belongs = tl.arange(0, WIDTH)[:, None] // GROUP == tl.arange(0, GROUPS)[None, :]
        both = tl.sum(tl.where(belongs[:, :, None], both[:, None, :], 0.0), 0)
        groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
        part = groups * tl.num_programs(1) + tl.program_id(1)
        tl.store(sums + part[:, None] + tl.arange(0, 2)[None, :] * BEHIND, both)

    # As _norm_whole, from the sums of _norm_sums; a part of the pixels, of any channels, per program.
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
        skip_grad,
        ADD,
        out,
        GROUP: tl.constexpr,
        WIDTH: tl.constexpr,  # channels of a program
        ROWS: tl.constexpr,
        PARTS: tl.constexpr,
        BACKWARD: tl.constexpr,
    ):
        image, channel, in_c = _block(C, WIDTH, WIDTH)
        start = tl.program_id(1) * EACH
        end = tl.minimum(start + EACH, HW)
        begin, at, inside = _tile(image, start, end, channel, in_c, HW, C, ROWS)
        value = tl.load(x + begin + at, mask=inside, other=0.0)
        grad_value, skip_value = value, value
        if BACKWARD:
            grad_value = tl.load(grad + begin + at, mask=inside, other=0.0)
            skip_value = tl.load(skip_grad + begin + at, mask=inside & (ADD != 0), other=0.0)
        group = image * (C // GROUP) + channel // GROUP
        parts = sums + group[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
        first = tl.sum(tl.load(parts, mask=in_c[:, None], other=0.0), 1) / (HW * GROUP)
        second = tl.sum(tl.load(parts + BEHIND, mask=in_c[:, None], other=0.0), 1) / (HW * GROUP)
        if BACKWARD:
            known = _known(statistics, shift, STRIDE, weight, bias, image, channel, in_c, C, GROUP)
            rstd, hat_offset, w, b = known
        else:
            rstd = _deviation(first, second, eps)
            mean = first + _first_values(x, shift, STRIDE, image, channel, in_c, HW, C, GROUP)
            leads = in_c & (channel % GROUP == 0) & (tl.program_id(1) == 0)
            tl.store(statistics + group * 2, mean, mask=leads)
            tl.store(statistics + group * 2 + 1, rstd, mask=leads)
            slope = rstd * _of_channels(weight, channel, in_c)
            offset = _of_channels(bias, channel, in_c)
            offset += (_shift_of(shift, STRIDE, image, channel, in_c) - mean) * slope
        for row in range(start, end, ROWS):
            begin, at, inside = _tile(image, row, end, channel, in_c, HW, C, ROWS)
            if BACKWARD:
                dz, hat = _backward(value.to(tl.float32), grad_value.to(tl.float32), rstd, hat_offset, w, b, SILU)
                result = rstd[None, :] * (dz - first[None, :] - hat * second[None, :])
                result += skip_value.to(tl.float32)
            else:
                result = _forward(value.to(tl.float32), slope, offset, SILU)
            tl.store(out + begin + at, result.to(out.dtype.element_ty), mask=inside)
            begin, at, inside = _tile(image, row + ROWS, end, channel, in_c, HW, C, ROWS)
            value = tl.load(x + begin + at, mask=inside, other=0.0)
            if BACKWARD:
                grad_value = tl.load(grad + begin + at, mask=inside, other=0.0)
                skip_value = tl.load(skip_grad + begin + at, mask=inside & (ADD != 0), other=0.0)


class GroupNormSilu(torch.autograd.Function):
    """(x, F.silu(F.group_norm(x + shift[:, :, None, None], groups, weight, bias, eps))), x [n, c, h, w], channels-last.

    Without `silu` the norm alone (Wu & He 2018). shift is [n, c] or None and gets no gradient, weight and bias [c] are
    frozen. Sums are float32. The backward pass needs x, and the mean and deviation of each group. x itself is returned
    for its other readers, so that their gradient is added inside the norm's backward kernel.
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
    def backward(ctx, skip_grad, grad):
        x, shift, weight, bias, statistics = ctx.saved_tensors
        if grad is None:
            return skip_grad, *[None] * 6
        grads = (g if g is None else g.contiguous(memory_format=torch.channels_last) for g in (grad, skip_grad))
        grad_x = group_norm(x, shift, *grads, statistics, weight, bias, *ctx.settings)
        return grad_x, *[None] * 6


def group_norm(x, shift, grad, skip_grad, statistics, weight, bias, groups, eps, silu):
    """Launch the forward pass, or with `grad` the backward pass, which adds `skip_grad` unless it is None."""
    n, channels, height, width = x.shape
    pixels, group = height * width, channels // groups
    backward = grad is not None
    shifted = (x, -1) if shift is None else (shift, shift.stride(0))
    inputs = x, *shifted, grad if backward else x, statistics, weight, bias
    out = torch.empty_like(x)
    outputs = eps, *((x, 0) if skip_grad is None else (skip_grad, 1)), out
    # A kernel is compiled for each value of these, so only what must be known at compile time is here.
    constants = dict(GROUP=group, BACKWARD=backward)
    wide = triton.next_power_of_2(group)
    if pixels * wide <= WHOLE:
        rows = WHOLE // wide
        if pixels * 4 <= rows:
            rows //= 4
        warps = max(1, min(16, rows * wide // 1024))
        _norm_whole[n * groups,](
            *inputs, pixels, channels, int(silu), *outputs, WIDTH=wide, ROWS=rows, num_warps=warps, **constants
        )
        return out
    span = _channels_of_a_program(channels, group)
    parts = next(each[1 + backward] for each in PARTS if pixels <= each[0])
    sums = x.new_empty(2, n * groups, parts, dtype=torch.float32)
    inputs, others = (*inputs, sums, pixels), (channels, int(silu), n * groups * parts)
    wide = triton.next_power_of_2(span)
    rows = max(1, SUMMED // wide)
    _norm_sums[n * channels // span, parts](
        *inputs, triton.cdiv(pixels, parts), *others, SPAN=span, WIDTH=wide, ROWS=rows, num_warps=1, **constants
    )
    wide = min(ACROSS, triton.next_power_of_2(channels))
    rows, blocks = APPLIED // wide, n * triton.cdiv(channels, wide)
    programs = max(1, min(triton.cdiv(pixels, rows), PROGRAMS // blocks))
    each = triton.cdiv(triton.cdiv(pixels, programs), rows) * rows
    _norm_apply[blocks, triton.cdiv(pixels, each)](
        *inputs, each, *others, *outputs, WIDTH=wide, ROWS=rows, PARTS=parts, num_warps=4, **constants
    )
    return out


def _channels_of_a_program(channels, group):
    """Channels per program: whole groups, if possible a multiple of the eight channels that a thread reads at once, and
    at least 32, because reads of 64 bytes per pixel waste little bandwidth."""
    span = math.lcm(group, 8)
    if channels % span:
        return group
    while span < 32 and channels % (2 * span) == 0:
        span *= 2
    return span
