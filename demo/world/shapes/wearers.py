"""Wearers of a garment: a person, a mannequin, a hanger on a rail."""

import numpy as np
import torch

from demo.world.fields import norm, smooth_max, smooth_min
from demo.world.scenes import Scene
from demo.world.shapes.body import HEAD_LIFT, arm_parameters, head_distance, joint_at
from demo.world.shapes.garment import garment_distance, garment_parameters
from demo.world.shapes.primitives import capsule, ellipsoid
from demo.world.shapes.slots import HAIR, LEGS, METAL, SHOES, SKIN, STAND


def figure_parameters(scene: Scene, rng: np.random.Generator) -> dict[str, float]:
    """Garment, arms, hair and legs; those of a person in a raincoat in a scene without a garment."""
    p = garment_parameters(scene, rng)
    p |= arm_parameters(scene, rng, (p["shoulder_x"], p["shoulder_y"], 0.0))
    style = scene.hair_style or "short"
    p |= dict(
        hair_r={"short": 0.129, "long": 0.131, "curly": 0.158, "tied": 0.126}[style],
        hair_low={"short": 1.5, "long": 1.24, "curly": 1.5, "tied": 1.52}[style],
        bun=0.058 if style == "tied" else 0.0,
        lock=0.04 if style == "long" and scene.hood != "up" else -1.0,
        curl=0.008 if style == "curly" else 0.0,
        curly=float(style == "curly"),
    )
    shows_head = scene.wearer == "mannequin" and scene.hood != "up"
    p["headless"] = float(shows_head and rng.random() < 0.6)
    boots = rng.random() < (0.7 if scene.place == "rain" else 0.3)
    return p | dict(calf=0.06, ankle=0.042, boot=0.3 if boots else 0.1)


def person_surfaces(x, y, z, p, slot):
    """A person: the garment, skin of head and hands, hair, legs, shoes."""
    skin = torch.minimum(head_distance(x, y, z, egg=False), _arm(x, y, z, p))
    leg, shoe = _leg_and_shoe(x.abs(), y, z, p)
    cloth, hair = garment_distance(x, y, z, p), _hair(x, y - HEAD_LIFT, z, p)
    return [(cloth, slot), (skin, SKIN), (hair, HAIR), (leg, LEGS), (shoe, SHOES)]


def _arm(x, y, z, p):
    mirrored = x.abs()
    shoulder = (p["shoulder_x"] - 0.01, p["shoulder_y"], 0.0 * p["slope"])
    elbow, hand, tip = joint_at(x, p, "arm"), joint_at(x, p, "hand"), joint_at(x, p, "tip")
    arm = capsule(mirrored, y, z, shoulder, elbow, 0.05, 0.04)
    arm = smooth_min(arm, capsule(mirrored, y, z, elbow, hand, 0.04, 0.029), 0.02)
    palm = capsule(mirrored, y, z, hand, tip, 0.036, 0.024)
    thumb = tuple(0.45 * a + 0.55 * b for a, b in zip(hand, tip, strict=True))
    thumb = (thumb[0] - 0.038, thumb[1], thumb[2] + 0.022)
    palm = smooth_min(palm, capsule(mirrored, y, z, hand, thumb, 0.018, 0.013), 0.012)
    return smooth_min(arm, palm, 0.02)


def _leg_and_shoe(mirrored, y, z, p):
    knee, ankle = (0.094, 0.47, 0.012), (0.098, 0.08, -0.01)
    leg = capsule(mirrored, y, z, (0.086, 0.92, 0.0), knee, 0.086, 0.06)
    leg = smooth_min(leg, capsule(mirrored, y, z, knee, ankle, p["calf"], p["ankle"]), 0.03)
    boot = capsule(mirrored, y, z, (0.098, p["boot"], -0.01), (0.098, 0.05, -0.01), 0.072, 0.056)
    foot = ellipsoid(mirrored - 0.102, y - 0.042, z - 0.055, 0.056, 0.052, 0.125)
    return leg, smooth_min(boot, foot, 0.03)


def _hair(x, y, z, p):
    """Hair of every style; y excludes HEAD_LIFT."""
    mirrored = x.abs()
    hair = ellipsoid(x, y - 1.575, z + 0.016, p["hair_r"], p["hair_r"] * 1.08, p["hair_r"] * 1.08)
    length = p["hair_low"]
    fall = capsule(x * 0.62, y, z, (0.0, 1.56, -0.05), (0.0, length + 0.06, -0.075), 0.085, 0.07)
    hair = smooth_min(hair, fall, 0.05)
    line = z - 0.035 - 1.1 * (y - 1.6).clamp_min(0) + 0.25 * (0.05 - mirrored).clamp_min(0)
    hair = smooth_max(hair, line * 0.8, 0.025)
    hair = torch.minimum(hair, norm(x, y - 1.715, z + 0.075) - p["bun"])
    # Long hair falls over the shoulders, outside a collar
    collar, r = (0.135, 1.4, 0.07), p["lock"]
    lock = capsule(mirrored, y, z, (0.1, 1.58, 0.0), collar, r, r)
    lock = smooth_min(lock, capsule(mirrored, y, z, collar, (0.125, 1.2, 0.15), r, r * 0.6), 0.04)
    hair = smooth_min(hair, lock, 0.03)
    curls = torch.sin(70 * x) * torch.sin(70 * y) * torch.sin(70 * z) * p["curl"]
    strands = 0.0013 * torch.sin(85 * torch.atan2(x, z + 0.02) + 2 * torch.sin(30 * y))
    strands = strands * (1 - p["curly"])
    hair = (hair + curls + strands) * 0.8
    hidden = ellipsoid(x, y - 1.535, z + 0.015, 0.15, 0.18, 0.165)
    return torch.where(p["hood_up"] > 0.5, torch.maximum(hair, hidden), hair)


def mannequin_surfaces(x, y, z, p, slot):
    """A tailor's dummy on a pole, with an egg-shaped head or a knob."""
    cloth = garment_distance(x, y, z, p)
    neck = capsule(x, y, z, (0.0, 1.25, 0.0), (0.0, 1.44, 0.0), 0.058, 0.05)
    head = torch.where(p["headless"] > 0.5, neck, head_distance(x, y, z, egg=True))
    knob = norm(x, (y - 1.455) * 1.3, z) - 0.032 * p["headless"]
    pole = capsule(x, y, z, (0.0, 0.02, 0.0), (0.0, 0.9, 0.0), 0.017, 0.017)
    base = norm(norm(x, z).clamp_min(0.19) - 0.19, y - 0.018) - 0.016
    metal = torch.minimum(torch.minimum(knob, pole), base)
    return [(cloth, slot), (head, STAND), (metal, METAL)]


def hanger_surfaces(x, y, z, p, slot):
    """A wooden hanger on a rail with two posts."""
    cloth = garment_distance(x, y, z, p)
    bar = capsule(x.abs(), y, z, (0.0, 1.47, 0.0), (0.15, 1.345, 0.0), 0.013, 0.014)
    stem = capsule(x, y, z, (0.0, 1.475, 0.0), (0.0, 1.55, 0.0), 0.0075, 0.0075)
    hy = y - 1.60
    hook = norm(norm(x, hy) - 0.05, z) - 0.0075
    hook = torch.maximum(hook, torch.minimum(-x, -hy) * 0.9)  # the lower left quarter is open
    rail = norm(y - 1.632, z) - 0.017
    post = norm(x.abs() - 0.62, z) - 0.017
    post = torch.maximum(post, y - 1.64)
    feet = capsule(x.abs(), y, z.abs(), (0.62, 0.02, 0.0), (0.62, 0.02, 0.28), 0.017, 0.017)
    rail = torch.maximum(rail, x.abs() - 0.66)
    frame = torch.minimum(torch.minimum(rail, post), feet)
    return [(cloth, slot), (bar, STAND), (torch.minimum(torch.minimum(stem, hook), frame), METAL)]
