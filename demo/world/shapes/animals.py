"""Cats and dogs: the joints of each pose, and the distances to the limbs between them."""

import math

import numpy as np
import torch

from demo.world.fields import norm, smooth_min
from demo.world.scenes import Scene
from demo.world.shapes.primitives import capsule, ellipsoid
from demo.world.shapes.slots import DARK, EYES

# Joints of the poses in metres; the animal faces +z
_JOINTS = {
    "sitting": dict(
        hip=(0, 0.125, -0.12),
        chest=(0, 0.285, 0.03),
        head=(0, 0.46, 0.075),
        thigh=(0.085, 0.1, -0.08),
        fore_top=(0.05, 0.25, 0.075),
        fore_foot=(0.05, 0.03, 0.095),
        hind_top=(0.1, 0.07, -0.06),
        hind_foot=(0.1, 0.03, 0.04),
        tail0=(0, 0.05, -0.22),
        tail1=(0.2, 0.035, -0.17),
        tail2=(0.25, 0.06, 0.02),
    ),
    "lying": dict(
        hip=(0, 0.115, -0.24),
        chest=(0, 0.13, 0.07),
        head=(0, 0.27, 0.19),
        thigh=(0.085, 0.08, -0.22),
        fore_top=(0.06, 0.07, 0.1),
        fore_foot=(0.06, 0.03, 0.26),
        hind_top=(0.11, 0.06, -0.2),
        hind_foot=(0.12, 0.03, -0.1),
        tail0=(0, 0.09, -0.35),
        tail1=(0.14, 0.035, -0.4),
        tail2=(0.24, 0.035, -0.24),
    ),
    "standing": dict(
        hip=(0, 0.3, -0.19),
        chest=(0, 0.31, 0.1),
        head=(0, 0.46, 0.235),
        thigh=(0.06, 0.25, -0.21),
        fore_top=(0.06, 0.27, 0.12),
        fore_foot=(0.06, 0.03, 0.12),
        hind_top=(0.065, 0.25, -0.2),
        hind_foot=(0.065, 0.03, -0.22),
        tail0=(0, 0.36, -0.3),
        tail1=(0.02, 0.5, -0.4),
        tail2=(0.05, 0.68, -0.37),
    ),
}
# Per species, for all poses: radii, and distances from the middle of the head
_SPECIES = {
    "cat": dict(
        dog=0.0,
        chest_r=0.088,
        tail_r=0.022,
        skull_x=0.118,
        skull_y=0.096,
        snout=0.08,
        snout_r0=0.045,
        snout_r1=0.034,
        ear_r0=0.05,
        ear_r1=0.006,
        nose_y=0.02,
        nose_z=0.112,
        nose_r=0.009,
        eye_x=0.043,
        eye_y=0.02,
        eye_z=0.078,
        eye_r=0.026,
        animal_size=1.0,
    ),
    "dog": dict(
        dog=1.0,
        chest_r=0.1,
        tail_r=0.026,
        skull_x=0.098,
        skull_y=0.098,
        snout=0.155,
        snout_r0=0.06,
        snout_r1=0.042,
        ear_r0=0.03,
        ear_r1=0.038,
        nose_y=0.012,
        nose_z=0.185,
        nose_r=0.02,
        eye_x=0.043,
        eye_y=0.042,
        eye_z=0.075,
        eye_r=0.021,
        animal_size=1.15,
    ),
}


def animal_parameters(scene: Scene, rng: np.random.Generator) -> dict[str, float]:
    """Joints, radii and place of the animal; a sitting cat's in a scene without an animal."""
    species = "dog" if scene.thing == "dog" else "cat"
    pose = scene.pose or "sitting"
    p = {
        f"{name}_{axis}": value
        for name, joint in _joints(species, pose).items()
        for axis, value in zip("xyz", joint, strict=True)
    }
    p |= _SPECIES[species]
    standing = pose == "standing"
    p |= dict(hip_r=0.1 if standing else 0.125, thigh_r=0.1 if standing else 0.085)
    return p | _placement(scene, rng, p["animal_size"])


def _joints(species: str, pose: str) -> dict[str, tuple]:
    """The joints of a pose, with the tail and the ears of a species."""
    joints = dict(_JOINTS[pose])
    if species == "cat":
        return joints | dict(ear0=(0.062, 0.06, -0.01), ear1=(0.085, 0.155, -0.02))
    if pose == "standing":
        joints |= dict(tail1=(0.02, 0.46, -0.38), tail2=(0.03, 0.55, -0.42))
    else:
        z = joints["tail1"][2]
        joints |= dict(tail1=(0.08, 0.06, z), tail2=(0.14, 0.1, z))
    return joints | dict(ear0=(0.1, 0.055, -0.01), ear1=(0.125, -0.075, 0.02))


def _placement(scene: Scene, rng: np.random.Generator, size: float) -> dict[str, float]:
    """Position, rotation and size of the animal: on, beside or without a seat."""
    couch = scene.second == "couch"
    p = dict(animal_x=0.0, animal_y=0.0, animal_z=0.0, animal_size=size)
    turn = 0.0 if scene.pose == "sitting" else rng.choice([-1, 1]) * rng.uniform(0.75, 1.25)
    if scene.relation == "on":
        p |= dict(animal_y=0.45 if couch else 0.51, animal_z=0.12 if couch else 0.05)
        p["animal_x"] = rng.uniform(-0.3, 0.3) if couch else 0.0
        # A cat can fill the image of a couch; a dog would not fit
        p["animal_size"] *= (1.15 if scene.thing == "dog" else 1.4) if couch else 0.9
        turn *= 1.0 if couch else 0.35
    elif scene.relation == "beside":
        side = rng.choice([-1, 1])
        p |= dict(animal_x=side * (0.62 if couch else 0.5), animal_z=0.62 if couch else 0.15)
        p["animal_size"] *= 1.2
    return p | dict(animal_cos=math.cos(turn), animal_sin=math.sin(turn))


def to_animal(x, y, z, p):
    """Local points in the animal's frame, in which it has the size of its joints."""
    turn_c, turn_s = p["animal_cos"], p["animal_sin"]
    x, y, z = x - p["animal_x"], y - p["animal_y"], z - p["animal_z"]
    x, z = turn_c * x - turn_s * z, turn_s * x + turn_c * z
    size = p["animal_size"]
    return x / size, y / size, z / size


def animal_surfaces(x, y, z, p, slot):
    """A cat or dog: the same limbs in every pose, between different joints."""
    x, y, z = to_animal(x, y, z, p)
    hx, hy, hz = x - p["head_x"], y - p["head_y"], z - p["head_z"]
    body = smooth_min(_trunk(x, y, z, p), _skull(hx, hy, hz, p), 0.03)
    fur = 0.0009 * torch.sin(110 * y + 25 * x) * torch.sin(95 * x + 20 * z)
    body = body + fur * torch.sin(90 * z - 30 * y)
    r = p["nose_r"]
    nose = ellipsoid(hx, hy + p["nose_y"], hz - p["nose_z"], r * 1.3, r, r)
    eye = norm(hx.abs() - p["eye_x"], hy - p["eye_y"], hz - p["eye_z"]) - p["eye_r"]
    size = p["animal_size"]
    return [(body * size * 0.9, slot), (nose * size, DARK), (eye * size, EYES)]


def _at(p, name):
    return tuple(p[f"{name}_{axis}"] for axis in "xyz")


def _trunk(x, y, z, p):
    """Everything except the head: body, neck, thighs, legs, tail."""
    mirrored = x.abs()
    hip, chest, head, thigh = _at(p, "hip"), _at(p, "chest"), _at(p, "head"), _at(p, "thigh")
    body = capsule(x * 0.92, y, z, hip, chest, p["hip_r"], p["chest_r"])
    neck = capsule(x, y, z, chest, head, p["chest_r"] * 0.8, 0.075)
    body = smooth_min(body, neck, 0.06)
    tx, ty, tz = mirrored - thigh[0], y - thigh[1], z - thigh[2]
    body = smooth_min(body, ellipsoid(tx, ty, tz, 0.055, p["thigh_r"], 0.1), 0.03)
    for leg in ("fore", "hind"):
        top, foot = _at(p, leg + "_top"), _at(p, leg + "_foot")
        limb = capsule(mirrored, y, z, top, foot, 0.036 * 1.15, 0.036 * 0.8)
        paw = ellipsoid(mirrored - foot[0], y - 0.028, z - foot[2] - 0.02, 0.038, 0.03, 0.052)
        body = smooth_min(body, smooth_min(limb, paw, 0.02), 0.03)
    r = p["tail_r"]
    tail = capsule(x, y, z, _at(p, "tail0"), _at(p, "tail1"), 0.03, r)
    tail = smooth_min(tail, capsule(x, y, z, _at(p, "tail1"), _at(p, "tail2"), r, r * 0.8), 0.03)
    return smooth_min(body, tail, 0.02)


def _skull(x, y, z, p):
    """Head with snout and ears, around its middle."""
    zero = 0.0 * p["animal_size"]
    side = x.abs()
    skull = ellipsoid(x, y, z, p["skull_x"], p["skull_y"], 0.098)
    base, tip = (zero, zero - 0.028, zero + 0.05), (zero, zero - 0.04, p["snout"])
    snout = capsule(x, y, z, base, tip, p["snout_r0"], p["snout_r1"])
    skull = smooth_min(skull, snout, 0.03)
    base, tip, radii = _at(p, "ear0"), _at(p, "ear1"), (p["ear_r0"], p["ear_r1"])
    ear = capsule(side, y, z, base, tip, *radii)
    base, tip = (*base[:2], base[2] * 2), (*tip[:2], tip[2] * 2)  # a cat's ears are flat
    ear_flat = capsule(side, y, z * 2.0, base, tip, *radii)
    ear = torch.where(p["dog"] > 0.5, ear, ear_flat * 0.7)
    return smooth_min(skull, ear, 0.012)
