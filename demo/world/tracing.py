"""Rays: coordinate frames, the bounding box, and marching to a surface.

`nearest(table, x, y, z)` returns the distance to the nearest surface and its slot (distances.distance_function).
"""

import torch

from demo.world.kernels import SHADOW_STEPS, STEPS, DistanceKernels


def to_world(p, x, y, z):
    """Rotate a local vector by the scene's yaw."""
    return x * p["yaw_cos"] + z * p["yaw_sin"], y, z * p["yaw_cos"] - x * p["yaw_sin"]


def to_local(p, x, y, z):
    """Rotate a world vector back by the scene's yaw."""
    return x * p["yaw_cos"] - z * p["yaw_sin"], y, z * p["yaw_cos"] + x * p["yaw_sin"]


def box_span(p, o, d, margin=0.0):
    """Distances at which rays enter and leave the box plus a margin in metres; near > far is a miss."""
    near, far = None, None
    for axis, start, step in zip("xyz", o, d, strict=True):
        inverse = 1 / torch.where(step.abs() < 1e-6, torch.full_like(step, 1e-6), step)
        half = p[f"half_{axis}"] + margin
        a = (p[f"box_{axis}"] - half - start) * inverse
        b = (p[f"box_{axis}"] + half - start) * inverse
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        near = low if near is None else torch.maximum(near, low)
        far = high if far is None else torch.minimum(far, high)
    return near.clamp_min(0), far


def rows_where(active: torch.Tensor):
    """[indices of the rows with an active ray], or [] if there are none."""
    rows = active.any(1).nonzero().squeeze(1)
    return [rows] if len(rows) else []


def march(nearest, table, o, d, near, far, soft: int = 0):
    """Sphere-trace rays from near to far in the local frame.

    Returns (t, hit): distances along the rays, and whether they hit a surface. With `soft` > 0 returns (t, light), the
    share of light that passes; a smaller `soft` gives a wider penumbra.
    """
    if isinstance(nearest, DistanceKernels):
        return nearest.march(table, o, d, near, far, soft)
    t, alive = near.clone(), near < far
    light = torch.ones_like(t)
    hit = torch.zeros_like(alive)
    steps, phase = (SHADOW_STEPS, 4) if soft else (STEPS, 6)
    for _phase in range(0, steps, phase):
        for rows in rows_where(alive):
            part = table[rows]
            ro, rd = [v[rows] for v in o], [v[rows] for v in d]
            tt, ff, on, ll, hh = t[rows], far[rows], alive[rows], light[rows], hit[rows]
            for _ in range(phase):
                distance, _slot = nearest(part, *(a + b * tt for a, b in zip(ro, rd, strict=True)))
                if not soft:
                    close = distance < 0.0009 * tt.clamp_min(0.5)
                    hh = hh | (on & close)
                    on = on & ~close
                    tt = torch.where(on, tt + distance, tt)
                else:
                    passed = (soft * distance / tt.clamp_min(0.02)).clamp(0, 1)
                    ll = torch.where(on, torch.minimum(ll, passed), ll)
                    on = on & (ll > 0.01)
                    tt = torch.where(on, tt + distance.clamp(0.025, 0.22), tt)
                on = on & (tt < ff)
            t[rows], alive[rows], light[rows], hit[rows] = tt, on, ll, hh
    return (t, light) if soft else (t, hit)
