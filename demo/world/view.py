"""Camera and lighting of a scene as numbers: framing, and the light of each place."""

import math

import numpy as np

from demo.world.fields import mix
from demo.world.materials.palette import HEX, linear_rgb
from demo.world.scenes import GARMENTS, Scene, kind_of

_DISTANCE = 4.2  # of the camera, metres

# In metres: the bounding box (centre, half sizes) of a figure; centre and height of its image
_FIGURE_BOX = ((0.0, 0.91, -0.02), (0.58, 0.94, 0.38))
_FRAMES = {"close": (1.36, 0.86), "half": (1.18, 1.3), "full": (0.87, 1.98)}

# Linear RGB of the key light, the sky and the light that the ground reflects, by place
_KEY = {"studio": (2.3, 2.25, 2.15), "street": (2.5, 2.4, 2.2), "rain": (1.5, 1.55, 1.65), "garden": (2.7, 2.55, 2.2)}
_SKY = {
    "studio": (0.62, 0.64, 0.68),
    "street": (0.55, 0.68, 0.9),
    "rain": (0.66, 0.72, 0.8),
    "garden": (0.5, 0.66, 0.92),
}
_GROUND = {
    "studio": (0.5, 0.5, 0.5),
    "street": (0.3, 0.29, 0.28),
    "rain": (0.2, 0.22, 0.25),
    "garden": (0.16, 0.26, 0.08),
}


def camera_parameters(scene: Scene, rng: np.random.Generator) -> dict[str, float]:
    """Position and target of the camera, rotation of the thing, and its bounding box."""
    centre, height, box = _figure_frame(scene) if scene.thing in GARMENTS else _thing_frame(scene)
    yaw = math.radians(scene.yaw)
    p = dict(
        yaw_cos=math.cos(yaw),
        yaw_sin=math.sin(yaw),
        camera_y=scene.camera_height,
        camera_z=_DISTANCE,
        target_y=centre,
        focal=2 * _DISTANCE / height * scene.zoom,
        shift=rng.uniform(-0.04, 0.04),
    )
    for name, vector in zip(("box", "half"), box, strict=True):
        p |= {f"{name}_{axis}": v for axis, v in zip("xyz", vector, strict=True)}
    return p


def _figure_frame(scene: Scene):
    """Centre and height of the image of a garment, and its bounding box."""
    centre, height = _FRAMES[scene.framing]
    box = _FIGURE_BOX
    if scene.wearer == "hanger":
        low = {"raincoat": 0.6, "jacket": 0.84, "dress": 0.46}[scene.thing]
        frames = {"close": (1.52, 0.0), "half": (1.66, 0.12), "full": (1.66, 0.3)}
        top, margin = frames[scene.framing]
        centre, height = (low + top - margin * 0.6) / 2, (top - low) + margin
        box = ((0.0, 0.83, 0.0), (0.7, 0.84, 0.4))
    elif scene.thing == "dress":
        box = ((0.0, 0.91, 0.0), (0.6, 0.94, 0.5))
    if scene.second == "umbrella":
        centre, height = (1.09, 2.4) if scene.framing == "full" else (1.42, 1.62)
        box = ((0.0, 1.07, 0.12), (0.78, 1.1, 0.8))
    return centre, height, box


def _thing_frame(scene: Scene):
    """Centre and height of the image of any other thing, and its bounding box."""
    largest = kind_of(scene)[-1]
    animals = {"sitting": (0.29, 0.86), "lying": (0.2, 0.95), "standing": (0.34, 1.02)}
    size = 1.2 if scene.thing == "dog" else 1.0
    frames = {"couch": (0.48, 1.95), "chair": (0.52, 1.36), "umbrella": (0.53, 1.5)}
    centre, height = frames.get(largest) or [size * v for v in animals[scene.pose]]
    box = {
        "couch": ((0.0, 0.72, 0.12), (1.05, 0.74, 0.85)),
        "chair": ((0.0, 0.62, 0.05), (0.95, 0.65, 0.6)),
        "umbrella": ((0.05, 0.6, 0.0), (0.95, 0.62, 0.65)),
        "animal": ((0.0, 0.4, 0.0), (0.58, 0.42, 0.58)),
    }[largest]
    if scene.relation == "beside":
        height *= 1.25
    return centre, height, box


def light_parameters(scene: Scene, rng: np.random.Generator) -> dict[str, float]:
    """The direction and colour of the key light, and the colours of sky, ground and backdrop."""
    angle = math.radians(scene.light_angle)
    outside = scene.place != "studio"
    light = np.array([math.sin(angle), 1.25 if outside else 1.1, math.cos(angle)])
    light /= np.linalg.norm(light)
    warm = scene.light == "warm"
    key = np.array(_KEY[scene.place]) * ((1.12, 0.88, 0.58) if warm else 1.0)
    sky = np.array(_SKY[scene.place]) * ((1.1, 0.92, 0.8) if warm else 1.0)
    ground, wall = _GROUND[scene.place], linear_rgb(HEX[scene.background or "grey"])
    if scene.background:
        wall = mix(wall, np.full(3, 0.75), 0.25)
        ground = tuple(wall * 0.7)
    p = dict(warm=float(warm))
    vectors = dict(light=light, key=key, sky=sky, ground=ground, wall=wall)
    for name, vector in vectors.items():
        p |= {f"{name}_{i}": float(v) for i, v in enumerate(vector)}
    return p
