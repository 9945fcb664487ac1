"""An open umbrella, held or lying on its rim: parameters and distances."""

import math

import numpy as np
import torch

from demo.world.fields import norm
from demo.world.scenes import GARMENTS, Scene
from demo.world.shapes.primitives import capsule, ellipsoid
from demo.world.shapes.slots import DARK, METAL


def umbrella_parameters(scene: Scene, rng: np.random.Generator) -> dict[str, float]:
    """Tilt and hub of the umbrella: in a hand, lying, or upright on its handle."""
    roll, pitch, hub, canopy = 0.0, 0.12, (0.0, 1.02, 0.0), 0.55
    if scene.thing in GARMENTS:
        roll, pitch, canopy = 0.16, 0.06, 0.56
        hub = (0.235 - 0.86 * math.sin(roll), 1.2 + 0.84, 0.28 + 0.05)
    elif rng.random() < 0.6:  # lying open on its rim and its handle
        roll, pitch, hub = math.radians(53), 0.0, (-0.2, 0.63, 0.0)
    return dict(
        roll_cos=math.cos(roll),
        roll_sin=math.sin(roll),
        pitch_cos=math.cos(pitch),
        pitch_sin=math.sin(pitch),
        hub_x=hub[0],
        hub_y=hub[1],
        hub_z=hub[2],
        canopy=canopy,
    )


def umbrella_surfaces(x, y, z, p, slot):
    """An open canopy of eight panels, in a frame with the hub at 0 and the shaft along -y."""
    x, y, z = x - p["hub_x"], y - p["hub_y"], z - p["hub_z"]
    # Rotated about x, then about z; points are transformed by the inverse.
    c, s = p["roll_cos"], p["roll_sin"]
    x, y = c * x + s * y, -s * x + c * y
    c, s = p["pitch_cos"], p["pitch_sin"]
    y, z = c * y + s * z, -s * y + c * z
    around = torch.atan2(z, x)
    panel = (torch.cos(8 * around) * 0.5 + 0.5).clamp(0, 1)
    r = norm(x, z)
    reach = p["canopy"]
    sag = 1 - 0.05 * (1 - panel) * (r / reach).clamp(0, 1.2)
    dome = ellipsoid(x / sag, y + 0.36, z / sag, reach * 1.04, 0.36, reach * 1.04)
    shell = dome.abs() - 0.009
    rim = -0.27 + 0.045 * (1 - panel)
    shell = torch.maximum(shell, (rim - y) * 0.9) * 0.75
    tip = capsule(x, y, z, (0.0, -0.02, 0.0), (0.0, 0.075, 0.0), 0.014, 0.008)
    shaft = capsule(x, y, z, (0.0, 0.0, 0.0), (0.0, -0.95, 0.0), 0.011, 0.011)
    bend = norm(norm(x - 0.045, y + 0.97) - 0.045, z) - 0.017
    bend = torch.maximum(bend, y + 0.97)
    grip = capsule(x, y, z, (0.0, -0.82, 0.0), (0.0, -0.97, 0.0), 0.017, 0.017)
    return [(shell, slot), (torch.minimum(tip, shaft), METAL), (torch.minimum(bend, grip), DARK)]
