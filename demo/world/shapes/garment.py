"""Coats, jackets and dresses: the cut of each, and the distance to its cloth."""

import math

import numpy as np
import torch

from demo.world.fields import mix, norm, smooth_max, smooth_min, smoothstep
from demo.world.scenes import GARMENTS, Scene
from demo.world.shapes.body import HEAD_LIFT, joint_at
from demo.world.shapes.primitives import capsule, ellipsoid

# Heights (hem, waist, neck, shoulder_y), radii (r_, sleeve_, ring, pouch) and depths of relief (fold,
# crease) in metres. `depth`: how much narrower the body is in z than in x; `slope`: of the shoulders; `ring`: the
# lowered hood or the collar; `placket`, `lapel`: their visibility.
_CUTS = {
    "raincoat": dict(
        hem=0.64,
        waist=1.04,
        r_waist=0.196,
        r_chest=0.21,
        r_hem=0.305,
        depth=1.36,
        slope=0.52,
        neck=1.43,
        shoulder_x=0.168,
        shoulder_y=1.29,
        sleeve_top=0.076,
        sleeve_mid=0.066,
        sleeve_end=0.068,
        fold=0.016,
        fold_count=7.0,
        crease=0.0045,
        ring=0.105,
        ring_tube=0.034,
        ring_back=0.042,
        ring_flat=0.75,
        pouch=0.085,
        pouch_z=0.185,
        neck_hole=0.062,
        placket=1.0,
        lapel=0.0,
    ),
    "jacket": dict(
        hem=0.88,
        waist=1.0,
        r_waist=0.19,
        r_chest=0.208,
        r_hem=0.178,
        depth=1.36,
        slope=0.52,
        neck=1.425,
        shoulder_x=0.168,
        shoulder_y=1.29,
        sleeve_top=0.072,
        sleeve_mid=0.062,
        sleeve_end=0.05,
        fold=0.004,
        fold_count=9.0,
        crease=0.003,
        ring=0.085,
        ring_tube=0.022,
        ring_back=0.012,
        ring_flat=0.6,
        pouch=0.01,
        pouch_z=0.05,
        neck_hole=0.06,
        placket=0.8,
        lapel=1.0,
    ),
    "dress": dict(
        hem=0.5,
        waist=1.06,
        r_waist=0.155,
        r_chest=0.196,
        r_hem=0.44,
        depth=1.25,
        slope=0.55,
        neck=1.42,
        shoulder_x=0.152,
        shoulder_y=1.285,
        sleeve_top=0.066,
        sleeve_mid=0.075,
        sleeve_end=0.075,
        fold=0.03,
        fold_count=9.0,
        crease=0.0015,
        ring=0.06,
        ring_tube=0.0,
        ring_back=0.0,
        ring_flat=1.0,
        pouch=0.01,
        pouch_z=0.05,
        neck_hole=0.085,
        placket=0.0,
        lapel=0.0,
    ),
}


def garment_parameters(scene: Scene, rng: np.random.Generator) -> dict[str, float]:
    """Cut and folds of the garment; a raincoat's in a scene without a garment."""
    p = dict(_CUTS[scene.thing if scene.thing in GARMENTS else "raincoat"])
    p["crease"] *= {"glossy": 1.4, "holographic": 1.4, "leather": 1.3}.get(scene.material, 1.0)
    crumple = {"glossy": 0.008, "holographic": 0.012, "leather": 0.006}
    p["crumple"] = crumple.get(scene.material, 0.0)
    if scene.wearer == "hanger":
        p |= dict(depth=p["depth"] * 1.3, slope=0.56, r_hem=p["r_hem"] * 0.86)
    p["fold_phase"] = rng.uniform(0, 2 * math.pi)
    p["hem"] += rng.uniform(-0.05, 0.03)
    return p | dict(hood_up=float(scene.hood == "up"))


def garment_distance(x, y, z, p):
    """Coat, jacket or dress: an elliptic body with waist and open hem, sleeves, hood or collar."""
    slope = p["slope"]
    inner = _tube(x, y, z, p)
    shoulders = (y + x.abs() * slope - p["neck"]) / (1 + slope * slope).sqrt()
    body = smooth_max(inner, shoulders, 0.09)
    body = torch.maximum(body, p["hem"] - y)
    body = torch.maximum(body, -torch.maximum(inner + 0.036, y - p["hem"] - 0.14))
    body = smooth_min(body, _sleeve(x, y, z, p), 0.05)
    hood_up = p["hood_up"] > 0.5
    distance = torch.where(hood_up, _with_hood(body, x, y, z), _with_collar(body, x, y, z, p))
    placket = smoothstep(0.034, 0.026, x.abs())
    placket = placket * (z > 0) * (y < p["neck"] - 0.04) * p["placket"]
    return (distance + _relief(x, y, z, p) - 0.006 * placket) * 0.86


def _tube(x, y, z, p):
    """The body without its ends: waist, chest and draped folds below the waist."""
    depth = p["depth"]
    wide = z * depth
    q = norm(x, wide)
    above = smoothstep(0.0, 1.0, (y - p["waist"]) / (1.28 - p["waist"]))
    upper = mix(p["r_waist"], p["r_chest"], above)
    down = ((p["waist"] - y) / (p["waist"] - p["hem"])).clamp(0, 1.1)
    radius = upper + (p["r_hem"] - p["r_waist"]) * down
    around = torch.atan2(wide, x)
    phase = p["fold_phase"]
    drape = torch.cos(around * p["fold_count"] + phase + 1.5 * torch.sin(3 * y + phase))
    radius = radius + p["fold"] * down * drape
    return (q - radius) * q / norm(x, wide * depth)


def _relief(x, y, z, p):
    """Creases and crumpled ridges of the cloth, metres.

    They run obliquely: sines of bent coordinates, not of x, y, z.
    """
    phase = p["fold_phase"]
    bend = torch.sin(7 * y + 5 * x + phase)
    crease = torch.sin(17 * x + 12 * y + 2.2 * bend)
    crease = crease * torch.sin(13 * y - 9 * x + 11 * z + 1.7 * bend)
    fine = torch.sin(41 * y + 23 * x + 4 * bend) * torch.sin(37 * x - 19 * y + 29 * z)
    ridge = torch.sin(10.5 * x - 8 * y + 6 * z + 1.6 * bend).abs()
    ridge = ridge * torch.sin(9 * y + 7 * x + phase).abs()
    return p["crease"] * (crease + 0.35 * fine) + p["crumple"] * (ridge - 0.4)


def _sleeve(x, y, z, p):
    mirrored = x.abs()
    shoulder = (p["shoulder_x"], p["shoulder_y"], 0.0 * p["shoulder_x"])
    elbow, cuff = joint_at(x, p, "elbow"), joint_at(x, p, "cuff")
    upper = capsule(mirrored, y, z, shoulder, elbow, p["sleeve_top"], p["sleeve_mid"])
    lower = capsule(mirrored, y, z, elbow, cuff, p["sleeve_mid"], p["sleeve_end"], flat=True)
    return smooth_min(upper, lower, 0.03)


def _with_hood(body, x, y, z):
    """A raised hood: a shell around the head, open in front, with a soft point behind."""
    hx, hy, hz = x, y - 1.535 - HEAD_LIFT, z + 0.015
    hood = ellipsoid(hx, hy - (-hz).clamp_min(0) * 0.25, hz, 0.165, 0.2, 0.185)
    neck = capsule(x, y, z, (0.0, 1.34, -0.02), (0.0, 1.42, -0.02), 0.14, 0.12)
    hood = smooth_min(hood, neck, 0.06)
    face = ellipsoid(x, y - 1.525 - HEAD_LIFT, z - 0.12, 0.122, 0.165, 0.16)
    return smooth_max(smooth_min(body, hood, 0.05), -face, 0.02)


def _with_collar(body, x, y, z, p):
    """A lowered hood or a collar: a ring around the neck, thicker behind, with a pouch there."""
    back = smoothstep(-0.05, 0.16, -z)
    ring_y = (y - p["neck"] + 0.035 - 0.03 * back) * p["ring_flat"]
    ring = norm(norm(x, z + 0.025) - p["ring"], ring_y)
    ring = ring - p["ring_tube"] - p["ring_back"] * back
    r = p["pouch"]
    pouch = ellipsoid(x, y - 1.31, z + p["pouch_z"], r * 1.35, r * 1.5, r * 0.75)
    lowered = smooth_min(smooth_min(body, ring, 0.03), pouch, 0.04)
    start, r = (0.0, p["neck"] - 0.05, 0.01), p["neck_hole"]
    neck_hole = capsule(x, y, z, start, (0.0, 1.6, 0.03), r, r + 0.03)
    return smooth_max(lowered, -neck_hole, 0.012)
