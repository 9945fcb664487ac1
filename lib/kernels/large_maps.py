"""Group norm with its SiLU of many large maps, forward: what drawing, decoding and large batches spend on norms.

Such a norm is bound by reads and writes, where that of one training picture (norms.py) is bound by launching. So a
program has several groups side by side, of which a thread reads eight channels at once, and per element there is one
multiplication and one addition: the norm, its weight and bias are folded into a slope and an offset a channel. What
it is worth by size: bench/norm_speed.py.
"""

import math

import torch

from lib.kernels.compiling import tl, triton

LARGE = 2**15  # pixels of all maps together from which on this is faster
MOST_PARTS = 128  # into which a map's pixels are divided, to be summed in parallel
PROGRAMS = 1024  # in all, if there are not more blocks of channels
TILE = 4096  # values that a program reads at once

if triton:

    @triton.jit
    def _block(HW, C, SPAN: tl.constexpr, WIDTH: tl.constexpr):
        """This program's picture, where that begins, its channels, and which of them exist."""
        picture, column = tl.program_id(0) // (C // SPAN), tl.arange(0, WIDTH)
        channel = tl.program_id(0) % (C // SPAN) * SPAN + column
        return picture, picture.to(tl.int64) * HW * C, channel, column < SPAN

    @triton.jit
    def _shift_of(shift, STRIDE, picture, channel, exists):
        """What is added to these channels of a picture; 0 where STRIDE, from one picture's to the next's, is negative."""
        shifted = exists & (STRIDE >= 0)
        return tl.load(shift + picture * STRIDE + channel, mask=shifted, other=0.0).to(tl.float32)

    @triton.jit
    def _first_values(x, shift, STRIDE, picture, start, channel, exists, GROUP: tl.constexpr):
        """The first value of each channel's group, near which the variance is a difference of small sums."""
        leader = channel // GROUP * GROUP
        value = tl.load(x + start + leader, mask=exists, other=0.0).to(tl.float32)
        return value + _shift_of(shift, STRIDE, picture, leader, exists)

    @triton.jit
    def _belongs(GROUP: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
        """Whether a channel [WIDTH] is of a group [GROUPS]."""
        return tl.arange(0, WIDTH)[:, None] // GROUP == tl.arange(0, GROUPS)[None, :]

    @triton.jit(do_not_specialize=["STRIDE"])
    def _large_sums(x, shift, STRIDE, sums, HW, EACH, C, GROUP: tl.constexpr, SPAN: tl.constexpr,
                    WIDTH: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
        """Of a part of each group, the sums of x - its first value and of the square of that."""
        picture, start, channel, exists = _block(HW, C, SPAN, WIDTH)
        less = _first_values(x, shift, STRIDE, picture, start, channel, exists, GROUP)
        less -= _shift_of(shift, STRIDE, picture, channel, exists)
        begin = tl.program_id(1) * EACH
        end = tl.minimum(begin + EACH, HW)
        rows = tl.arange(0, ROWS)[:, None]
        place = x + start + begin.to(tl.int64) * C + rows * C + channel[None, :]
        first = tl.zeros([ROWS, WIDTH], tl.float32)
        second = tl.zeros([ROWS, WIDTH], tl.float32)
        for row in range(begin, end, ROWS):
            inside = (row + rows < end) & exists[None, :]
            value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(inside, value - less[None, :], 0.0)
            first += value
            second += value * value
            place += ROWS * C
        GROUPS: tl.constexpr = SPAN // GROUP
        belongs = _belongs(GROUP, WIDTH, GROUPS)
        groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
        part = (groups * tl.num_programs(1) + tl.program_id(1)) * 2
        tl.store(sums + part, tl.sum(tl.where(belongs, tl.sum(first, 0)[:, None], 0.0), 0))
        tl.store(sums + part + 1, tl.sum(tl.where(belongs, tl.sum(second, 0)[:, None], 0.0), 0))

    @triton.jit(do_not_specialize=["STRIDE", "SILU"])
    def _large_apply(x, shift, STRIDE, statistics, weight, bias, sums, HW, EACH, C, SILU, eps, out,
                     GROUP: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
                     PARTS: tl.constexpr):  # fmt: skip
        """The norm of a part of each group, after its SiLU, from what _large_sums gave."""
        picture, start, channel, exists = _block(HW, C, SPAN, WIDTH)
        GROUPS: tl.constexpr = SPAN // GROUP
        groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[None, :]
        part = tl.arange(0, PARTS)[:, None]
        known = (part < tl.num_programs(1)) & (groups >= 0)
        parts = sums + (groups * tl.num_programs(1) + part) * 2
        first = tl.sum(tl.load(parts, mask=known, other=0.0), 0) / (HW * GROUP)
        second = tl.sum(tl.load(parts + 1, mask=known, other=0.0), 0) / (HW * GROUP)
        rstd = 1 / tl.sqrt(tl.maximum(second - first * first, 0.0) + eps)
        belongs = _belongs(GROUP, WIDTH, GROUPS)
        mean = _first_values(x, shift, STRIDE, picture, start, channel, exists, GROUP)
        mean += tl.sum(tl.where(belongs, first[None, :], 0.0), 1)
        rstd = tl.sum(tl.where(belongs, rstd[None, :], 0.0), 1)
        group = picture * (C // GROUP) + channel // GROUP
        leads = exists & (channel % GROUP == 0) & (tl.program_id(1) == 0)
        tl.store(statistics + group * 2, mean, mask=leads)
        tl.store(statistics + group * 2 + 1, rstd, mask=leads)

        slope = rstd * tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
        offset = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
        offset += (_shift_of(shift, STRIDE, picture, channel, exists) - mean) * slope
        begin = tl.program_id(1) * EACH
        end = tl.minimum(begin + EACH, HW)
        rows = tl.arange(0, ROWS)[:, None]
        place = start + begin.to(tl.int64) * C + rows * C + channel[None, :]
        for row in range(begin, end, ROWS):
            inside = (row + rows < end) & exists[None, :]
            z = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            z = z * slope[None, :] + offset[None, :]
            z = tl.where(SILU != 0, z * tl.sigmoid(z), z)
            tl.store(out + place, z.to(out.dtype.element_ty), mask=inside)
            place += ROWS * C


def norm_of_large_maps(x, shift, statistics, weight, bias, groups, eps, silu):
    """As norms.group_norm's forward pass, of any maps."""
    n, channels, height, width = x.shape
    pixels, group = height * width, channels // groups
    span = channels_of_a_program(channels, group)
    width_of_tile = triton.next_power_of_2(span)
    rows_of_tile, blocks = TILE // width_of_tile, n * channels // span
    parts = max(1, min(triton.cdiv(pixels, rows_of_tile), MOST_PARTS, PROGRAMS // blocks))
    each = triton.cdiv(triton.cdiv(pixels, parts), rows_of_tile) * rows_of_tile
    grid = (blocks, triton.cdiv(pixels, each))
    sums = x.new_empty(n * groups, grid[1], 2, dtype=torch.float32)
    shifted = (x, -1) if shift is None else (shift, shift.stride(0))
    known = dict(GROUP=group, SPAN=span, WIDTH=width_of_tile, ROWS=rows_of_tile, num_warps=4)
    out = torch.empty_like(x)
    _large_sums[grid](x, *shifted, sums, pixels, each, channels, **known)
    _large_apply[grid](x, *shifted, statistics, weight, bias, sums, pixels, each, channels, int(silu), eps, out,
                       PARTS=MOST_PARTS, **known)  # fmt: skip
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
