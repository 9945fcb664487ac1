"""Distances to the basic solids, in metres."""

import torch

from demo.world.fields import norm, smooth_max


def ellipsoid(x, y, z, a, b, c):
    """Approximate distance with the exact sign (Quilez's bound)."""
    x, y, z = x / a, y / b, z / c
    k0 = norm(x, y, z)
    k1 = norm(x / a, y / b, z / c)
    return k0 * (k0 - 1) / k1


def capsule(x, y, z, start, end, r0, r1, flat=False):
    """A capsule whose radius changes from r0 to r1; `flat` cuts off its round far end."""
    ax, ay, az = start
    bx, by, bz = end[0] - ax, end[1] - ay, end[2] - az
    px, py, pz = x - ax, y - ay, z - az
    squared = bx * bx + by * by + bz * bz + 1e-9
    along = (px * bx + py * by + pz * bz) / squared
    h = along.clamp(0, 1)
    distance = norm(px - bx * h, py - by * h, pz - bz * h) - (r0 + (r1 - r0) * h)
    return smooth_max(distance, (along - 1) * squared**0.5, 0.012) if flat else distance


def rounded_box(x, y, z, hx, hy, hz, r):
    """A box of half sizes hx, hy, hz with edges rounded by r."""
    x, y, z = x.abs() - (hx - r), y.abs() - (hy - r), z.abs() - (hz - r)
    inside = torch.maximum(x, torch.maximum(y, z)).clamp_max(0)
    return norm(x.clamp_min(0), y.clamp_min(0), z.clamp_min(0)) + inside - r
