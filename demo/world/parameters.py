"""A scene as numbers: a table row with the same named columns for every scene.

Shapes, paint, light and backdrops read their numbers from `p`: columns [R, 1] by name, for R rows of rays (see
`named`). A scene without a garment, an animal or an umbrella has unused numbers for them.
"""

import numpy as np
import torch

from demo.world.materials.paint import paint_parameters
from demo.world.scenes import Scene
from demo.world.shapes.animals import animal_parameters
from demo.world.shapes.umbrella import umbrella_parameters
from demo.world.shapes.wearers import figure_parameters
from demo.world.view import camera_parameters, light_parameters

# In the order in which they use the scene's random numbers
_GROUPS = (
    figure_parameters,
    animal_parameters,
    umbrella_parameters,
    camera_parameters,
    light_parameters,
    paint_parameters,
)


def scene_parameters(scene: Scene) -> dict[str, float]:
    """All numbers for distances and shading, with the same names for every scene."""
    rng = np.random.default_rng(scene.seed)
    p = {}
    for group in _GROUPS:
        numbers = group(scene, rng)
        shared = p.keys() & numbers.keys()
        if shared:
            raise RuntimeError(f"two parameters have one name: {', '.join(sorted(shared))}")
        p |= numbers
    return p


NAMES = tuple(scene_parameters(Scene("raincoat", "red", "matte", "studio")))


def named(table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Columns [R, 1] of a parameter table [R, K], by name."""
    return dict(zip(NAMES, table.split(1, dim=1), strict=True))
