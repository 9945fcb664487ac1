"""Distances of a couch and a chair, which have no parameters."""

import torch

from demo.world.shapes.primitives import capsule, rounded_box
from demo.world.shapes.slots import STAND


def couch_surfaces(x, y, z, p, slot):
    """A couch for two: base, back, arms, two cushions and two pillows, short legs."""
    mirrored = x.abs()
    base = rounded_box(x, y - 0.22, z, 0.72, 0.12, 0.34, 0.04)
    back = rounded_box(x, y - 0.52, z + 0.3 + 0.12 * (y - 0.5), 0.72, 0.34, 0.1, 0.07)
    arm = rounded_box(mirrored - 0.75, y - 0.34, z, 0.11, 0.26, 0.37, 0.09)
    cushion = rounded_box(mirrored - 0.325, y - 0.38, z - 0.06, 0.315, 0.075, 0.31, 0.05)
    pillow = rounded_box(mirrored - 0.325, y - 0.6, z + 0.19 + 0.15 * (y - 0.6), 0.31, 0.2, 0.085, 0.07)
    soft = torch.minimum(arm, torch.minimum(cushion, pillow))
    soft = torch.minimum(torch.minimum(base, back), soft)
    legs = capsule(mirrored, y, z.abs(), (0.68, 0.1, 0.27), (0.7, 0.0, 0.29), 0.03, 0.018)
    return [(soft * 0.97, slot), (legs, STAND)]


def chair_surfaces(x, y, z, p, slot):
    """A wooden chair with an upholstered seat and back."""
    mirrored = x.abs()
    seat = rounded_box(x, y - 0.47, z - 0.01, 0.25, 0.045, 0.24, 0.04)
    back = rounded_box(x, y - 0.86, z + 0.235 + 0.12 * (y - 0.6) - 0.5 * x * x, 0.235, 0.19, 0.035, 0.03)
    front = capsule(mirrored, y, z, (0.2, 0.44, 0.2), (0.225, 0.0, 0.235), 0.024, 0.016)
    rear = capsule(mirrored, y, z, (0.2, 0.46, -0.2), (0.215, 0.0, -0.26), 0.024, 0.017)
    post = capsule(mirrored, y, z, (0.2, 0.44, -0.21), (0.2, 0.98, -0.275), 0.022, 0.02)
    rung = capsule(x, y, z, (-0.2, 0.2, 0.22), (0.2, 0.2, 0.22), 0.012, 0.012)
    wood = torch.minimum(torch.minimum(front, rear), torch.minimum(post, rung))
    return [(torch.minimum(seat, back) * 0.95, slot), (wood, STAND)]
