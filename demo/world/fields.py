"""Functions of points as in shading languages: lengths, blends and noise.

Shapes, backdrops and markings are built from these. A point is three tensors x, y, z [R, T]: R rows (square tiles of
rays of one image), T rays per tile. All functions are elementwise and broadcast.
"""

import torch


def norm(*v):
    """Length of the vector with the components `v`; never 0, so that it can be a divisor."""
    total = v[0] * v[0]
    for w in v[1:]:
        total = total + w * w
    return (total + 1e-12).sqrt()


def mix(a, b, t):
    """Linear interpolation from `a` at t = 0 to `b` at t = 1; also of numpy arrays and floats."""
    return a + (b - a) * t


def smoothstep(low, high, v):
    """0 below `low`, 1 above `high`, smooth between; decreasing if low > high."""
    t = ((v - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def smooth_min(a, b, k):
    """The smaller of two distances, blended where they differ by less than `k` metres (Quilez)."""
    h = (k - (a - b).abs()).clamp_min(0)
    return torch.minimum(a, b) - h * h * (0.25 / k)


def smooth_max(a, b, k):
    """The larger of two distances, blended like smooth_min."""
    return -smooth_min(-a, -b, k)


def hashed(i, j, k=0.0):
    """A pseudo-random number in 0..1 per grid cell: the fractional part of a fast sine."""
    v = torch.sin(i * 12.9898 + j * 78.233 + k * 37.719) * 43758.547
    return v - v.floor()


def value_noise(x, y, k=0.0):
    """Smooth value noise in 0..1."""
    i, j = x.floor(), y.floor()
    u, v = x - i, y - j
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    low = mix(hashed(i, j, k), hashed(i + 1, j, k), u)
    return mix(low, mix(hashed(i, j + 1, k), hashed(i + 1, j + 1, k), u), v)
