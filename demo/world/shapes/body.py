"""The body under a garment: the head, and the joints of the arms."""

import numpy as np
import torch

from demo.world.fields import mix, smooth_min
from demo.world.scenes import Scene
from demo.world.shapes.primitives import capsule, ellipsoid

HEAD_LIFT = 0.045  # metres; added to the heights of the parts of the head

# Elbow, wrist and finger tips of an arm in metres, x outwards
_ARMS = {
    "hanging": ((0.28, 1.05, -0.015), (0.322, 0.82, 0.04), (0.328, 0.735, 0.06)),
    "hip": ((0.40, 1.10, -0.07), (0.225, 0.965, 0.09), (0.165, 0.925, 0.125)),
    "waving": ((0.43, 1.24, 0.04), (0.46, 1.49, 0.10), (0.475, 1.585, 0.11)),
    "pocket": ((0.325, 1.06, 0.02), (0.215, 0.90, 0.155), (0.165, 0.855, 0.165)),
    "holding": ((0.30, 1.06, 0.06), (0.26, 1.19, 0.27), (0.215, 1.225, 0.285)),
    "stand": ((0.28, 1.05, 0.0), (0.325, 0.81, 0.02), (0.325, 0.81, 0.02)),
    "limp": ((0.295, 1.05, 0.0), (0.37, 0.79, 0.01), (0.37, 0.79, 0.01)),
}
_ARM_PAIRS = (  # by Scene.arms
    ("hanging", "hanging"),
    ("hip", "hanging"),
    ("hip", "hip"),
    ("waving", "hanging"),
    ("pocket", "pocket"),
)


def arm_parameters(scene: Scene, rng: np.random.Generator, shoulder: tuple[float, float, float]) -> dict[str, float]:
    """The joints of both arms and both sleeves, which begin at the `shoulder`.

    A dress has short sleeves. The names are joint_axis_side: cuff_y_l.
    """
    pair = _ARM_PAIRS[scene.arms]
    if scene.wearer in ("mannequin", "hanger"):
        pair = ("stand", "stand") if scene.wearer == "mannequin" else ("limp", "limp")
    if scene.second == "umbrella":
        pair = ("holding", "hanging")
    elif rng.random() < 0.5:
        pair = pair[::-1]
    p, shoulder = {}, np.array(shoulder)
    for side, arm in zip("rl", pair, strict=True):
        elbow, wrist, tip = (np.array(joint) for joint in _ARMS[arm])
        if scene.thing == "dress":
            joints = {"elbow": mix(shoulder, elbow, 0.45), "cuff": mix(shoulder, elbow, 0.5)}
        else:
            joints = {"elbow": elbow, "cuff": mix(elbow, wrist, 0.93)}
        for name, joint in (joints | {"arm": elbow, "hand": wrist, "tip": tip}).items():
            for axis, value in zip("xyz", joint, strict=True):
                p[f"{name}_{axis}_{side}"] = value
    return p


def joint_at(x, p, name):
    """Coordinates of a joint of the arm on the point's side of the body, x outwards."""
    right = x >= 0
    return tuple(torch.where(right, p[f"{name}_{a}_r"], p[f"{name}_{a}_l"]) for a in "xyz")


def head_distance(x, y, z, egg):
    """A head of stylised proportions; an egg has no features."""
    y = y - HEAD_LIFT
    skull = ellipsoid(x, y - 1.56, z + 0.005, 0.112, 0.125, 0.122)
    jaw = ellipsoid(x, y - 1.495, z - 0.025, 0.086, 0.098, 0.092)
    head = smooth_min(skull, jaw, 0.06)
    neck = capsule(x, y, z, (0.0, 1.22, -0.01), (0.0, 1.46, -0.005), 0.058, 0.05)
    head = smooth_min(head, neck, 0.025)
    if egg:
        return head
    nose = capsule(x, y, z, (0.0, 1.545, 0.112), (0.0, 1.512, 0.13), 0.010, 0.017)
    ear = ellipsoid(x.abs() - 0.112, y - 1.535, z + 0.005, 0.016, 0.034, 0.024)
    return smooth_min(smooth_min(head, nose, 0.025), ear, 0.012)
