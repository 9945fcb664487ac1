"""Colour and finish of each part of an image."""

from collections.abc import Sequence

import numpy as np
import torch

from demo.world.fields import mix
from demo.world.scenes import ANIMALS, Scene
from demo.world.shapes.slots import (
    DARK,
    EYES,
    HAIR,
    LEGS,
    MAIN,
    METAL,
    SECOND,
    SHIRT,
    SHOES,
    SKIN,
    SLOT_COUNT,
    STAND,
    TRIM,
)

HEX = {  # sRGB of the colour words
    "red": "d3202c",
    "orange": "f5821f",
    "yellow": "f9cf1e",
    "green": "2f9e4f",
    "blue": "2563c9",
    "purple": "7d3cb5",
    "pink": "f583b4",
    "white": "f4f3ef",
    "black": "1b1b1f",
    "brown": "7a4a2b",
    "grey": "8d9196",
}
_HAIR_HEX = {
    "black": "17130f",
    "brown": "4d2f1c",
    "blonde": "e2bb6a",
    "red": "b5471c",
    "grey": "a8a8a8",
    "pink": "ee7fb2",
}
_SKIN_HEX = ("f9dcc8", "f0c3a0", "d79e73", "a86b43", "75452a", "4a2a1a")
_FUR_HEX = {"orange": "d98a3d", "black": "25242a", "white": "f1ece4", "grey": "8b8f97", "brown": "7b5234"}
_LEGS_HEX = ("2b3550", "20222a", "5b6478", "3d3a37", "7c6f5e", "39506e")
_SHOES_HEX = ("1d1d20", "f0eeea", "6b4226", "b3262e", "e0b530", "2c4a7d")
_SHIRT_HEX = ("f2f2f2", "dfe3ea", "33363f", "e8d9c5")
_WOOD_HEX = ("b98a56", "8a5a33", "d9b382", "5a3b25")
_CAT_EYES_HEX = ("c6b53a", "7fb24a", "6aa6cf")
_DENIM_HEX = {"blue": "3f638f", "black": "2c2f36"}

# A slot's finish: coat (strength of the mirror-like layer), shine (exponent of its highlight; higher is narrower),
# sheen, kind
PLAIN, LEATHER, DENIM, HOLOGRAPHIC, FUR = range(5)
_FINISHES = {
    "matte": (0.02, 12.0, 0.08, PLAIN),
    "glossy": (1.0, 220.0, 0.0, PLAIN),
    "leather": (0.85, 34.0, 0.05, LEATHER),
    "denim": (0.01, 10.0, 0.1, DENIM),
    "holographic": (1.0, 300.0, 0.0, HOLOGRAPHIC),
}


def linear_rgb(code: str) -> np.ndarray:
    """A six-digit sRGB colour as linear RGB."""
    value = np.array([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def swatch(reference: torch.Tensor, code: str) -> torch.Tensor:
    """A six-digit sRGB colour as linear RGB [3] on the device of `reference`."""
    return torch.tensor(linear_rgb(code), dtype=torch.float32, device=reference.device)


def rgb(p, name):
    """The colour `name` from the parameters of the rows: linear [R, 1, 3]."""
    return torch.stack([p[f"{name}_{i}"] for i in range(3)], -1)


def _ramp(codes: Sequence[str], t: float) -> np.ndarray:
    """Linear RGB at t in 0..1 on a scale of sRGB colours."""
    position = t * (len(codes) - 1)
    i = min(int(position), len(codes) - 2)
    return mix(linear_rgb(codes[i]), linear_rgb(codes[i + 1]), position - i)


def palette_of(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Colours [slots, 3] (linear) and finishes [slots, 4] of an image."""
    return _colours(scene), _finishes(scene)


def _colours(scene: Scene) -> np.ndarray:
    rng = np.random.default_rng(scene.seed + 1)
    colours = np.full((SLOT_COUNT, 3), 0.5)
    animal = scene.thing in ANIMALS
    main = _FUR_HEX[scene.colour] if animal and scene.colour in _FUR_HEX else HEX[scene.colour]
    if scene.material == "denim":
        main = _DENIM_HEX.get(scene.colour, main)
    colours[MAIN] = linear_rgb(main)
    if scene.material == "leather":
        colours[MAIN] *= 0.8  # darker than cloth, so that its sheen is visible
    colours[SECOND] = linear_rgb(HEX[scene.second_colour or "grey"])
    dark = colours[MAIN].mean() < 0.12
    if dark or scene.material == "leather":
        colours[TRIM] = linear_rgb("c9ccd2")
    else:
        colours[TRIM] = linear_rgb("f4f4f4" if rng.random() < 0.4 else "3a3a40")
    if scene.material == "denim":
        colours[TRIM] = linear_rgb("c98a3a")
    colours[SKIN] = _ramp(_SKIN_HEX, scene.skin)
    colours[HAIR] = linear_rgb(_HAIR_HEX[scene.hair or "brown"])
    if scene.thing == "dress":
        colours[LEGS] = colours[SKIN]
    else:
        colours[LEGS] = linear_rgb(_LEGS_HEX[rng.integers(len(_LEGS_HEX))])
    colours[SHOES] = linear_rgb(_SHOES_HEX[rng.integers(len(_SHOES_HEX))])
    wood = _WOOD_HEX[rng.integers(len(_WOOD_HEX))]
    colours[STAND] = linear_rgb("ece4d8" if scene.wearer == "mannequin" else wood)
    colours[METAL] = linear_rgb("9a9da3")
    colours[SHIRT] = linear_rgb(_SHIRT_HEX[rng.integers(len(_SHIRT_HEX))])
    nose = "2a1c1c" if scene.thing == "dog" else "c9787a"
    colours[DARK] = linear_rgb(nose if animal else "33261f")
    cat = scene.thing == "cat"
    colours[EYES] = linear_rgb(_CAT_EYES_HEX[rng.integers(3)] if cat else "20130d")
    return colours


def _finishes(scene: Scene) -> np.ndarray:
    finishes = np.tile(np.array(_FINISHES["matte"]), (SLOT_COUNT, 1))
    fur = scene.thing in ANIMALS
    finishes[MAIN] = (0.03, 14.0, 0.22, FUR) if fur else _FINISHES[scene.material]
    if scene.second == "umbrella":
        finishes[SECOND] = _FINISHES["glossy"]
    finishes[HAIR] = (0.06, 30.0, 0.15, PLAIN)
    finishes[SHOES] = (0.25, 60.0, 0.0, PLAIN)
    finishes[METAL] = (0.7, 90.0, 0.0, PLAIN)
    finishes[STAND] = (0.12, 40.0, 0.05, PLAIN)
    finishes[SKIN] = finishes[LEGS] if scene.thing == "dress" else (0.05, 20.0, 0.12, PLAIN)
    finishes[EYES] = finishes[DARK] = (0.8, 200.0, 0.0, PLAIN)
    return finishes
