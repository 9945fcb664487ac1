"""Details painted on surfaces: zips, lapels and seams, faces, markings of fur."""

import numpy as np
import torch

from demo.world.fields import mix, norm, smoothstep, value_noise
from demo.world.materials.palette import rgb, swatch
from demo.world.scenes import WEARERS, Scene
from demo.world.shapes.animals import to_animal
from demo.world.shapes.body import HEAD_LIFT
from demo.world.shapes.slots import EYES, HAIR, MAIN, SHIRT, SKIN, TRIM


def paint_parameters(scene: Scene, rng: np.random.Generator) -> dict[str, float]:
    """The parameters of surfaces and backdrops."""
    return dict(
        seed=float(scene.seed % 1000),
        film_nm=scene.film_nm,
        film_spread=scene.film_spread_nm,
        iris=rng.uniform(0, 1),
        marks=float(rng.random() < 0.55),
        closure=float(scene.closure == "buttons"),
    )


def paint_columns(palette: torch.Tensor) -> dict[str, torch.Tensor]:
    """The palette's paint colours as columns [R, 1], like the parameters."""
    slots = dict(paint_trim=TRIM, paint_hair=HAIR, paint_shirt=SHIRT)
    return {f"{name}_{i}": palette[:, slot, i, None] for name, slot in slots.items() for i in range(3)}


def painted(kind, p, x, y, z, slot, colour):
    """`colour` [R, T, 3] of surfaces at local points, with painted details.

    Also returns the coverage by decals, which hide the film under them, [R, T] in 0..1.
    """
    decal = torch.zeros_like(x)
    if kind[0] in WEARERS:
        colour, decal = _on_garment(p, x, y, z, slot, colour)
    if kind[0] == "person":
        colour = _on_face(p, x, y - HEAD_LIFT, z, slot, colour)
    if kind[0] == "animal":
        colour = _on_fur(p, *to_animal(x, y, z, p), slot, colour)
    return colour, decal


def _over(colour, mask, shade):
    """`shade` over `colour` with opacity `mask` [R, T]."""
    return mix(colour, shade, mask[..., None])


def _on_garment(p, x, y, z, slot, colour):
    """Zip or buttons, a jacket's lapels over a shirt, pockets and hem; returns colour and decal."""
    side = x.abs()
    front = (slot == MAIN) & (z > 0.02)
    closed = front & (y < 1.40) & (p["placket"] > 0)
    zip_line = smoothstep(0.013, 0.009, side) * (1 - p["closure"])
    button = norm(x, ((y + 0.02) / 0.115 % 1.0 - 0.5) * 0.115)
    button = smoothstep(0.016, 0.012, button) * p["closure"]
    decal = (zip_line + button).clamp(0, 1) * closed
    colour = _over(colour, decal, rgb(p, "paint_trim"))
    # A jacket's lapels: a dark edge around the triangle of the shirt
    inside = (y - 1.2) * 0.62 - side
    open_neck = front & (p["lapel"] > 0) & (y < 1.45)
    shirt = smoothstep(-0.003, 0.003, inside) * open_neck
    colour = _over(colour, shirt, rgb(p, "paint_shirt"))
    edge = smoothstep(0.009, 0.004, (inside + 0.075 - 0.6 * (1.33 - y).abs()).abs())
    edge = edge * (inside < -0.004)
    colour = _over(colour, 0.6 * edge * open_neck * (y > 1.2), 0.2 * colour)
    edge = smoothstep(0.008, 0.004, (inside + 0.004).abs())
    colour = _over(colour, 0.6 * edge * open_neck * (y > 1.2), 0.2 * colour)
    pocket = smoothstep(0.007, 0.003, (y - 0.93 + 0.35 * (side - 0.13)).abs())
    pocket = pocket * (side > 0.09) * (side < 0.19)
    colour = _over(colour, 0.5 * pocket * closed, 0.25 * colour)
    seam = smoothstep(0.008, 0.003, (y - p["hem"] - 0.03).abs())
    seam = seam * (slot == MAIN) * (p["placket"] > 0)
    sewn = 0.4 * torch.maximum(seam, pocket * closed)  # visible through a film
    decal = torch.maximum(torch.maximum(decal, shirt), sewn)
    return _over(colour, 0.35 * seam, 0.3 * colour), decal


def _on_face(p, x, y, z, slot, colour):
    """Cheeks, eyes, brows and lips; y excludes HEAD_LIFT."""
    side, white = x.abs(), swatch(x, "fbf8f4")
    skin = (slot == SKIN) & (z > 0.03) & (y > 1.4)
    eye_x, eye_y = side - 0.044, y - 1.548
    blush = torch.exp(-((side - 0.066) ** 2 + (y - 1.505) ** 2) / 0.0006)
    colour = _over(colour, 0.28 * blush * skin, colour * swatch(x, "f59a94"))
    eye = smoothstep(1.0, 0.8, norm(eye_x / 0.024, eye_y / 0.0165))
    colour = _over(colour, eye * skin, white)
    iris = torch.where((p["iris"] < 0.6)[..., None], swatch(x, "33211a"), swatch(x, "2f5570"))
    eye = smoothstep(1.0, 0.8, norm(eye_x / 0.0135, eye_y / 0.0155))
    colour = _over(colour, eye * skin, iris)
    glint = norm((x - 0.004).abs() - 0.044, eye_y - 0.005) / 0.0045
    colour = _over(colour, smoothstep(1.0, 0.6, glint) * skin, white)
    lash = smoothstep(0.005, 0.002, (eye_y - 0.0165 + 9.0 * eye_x**2).abs())
    lash = lash * (eye_x.abs() < 0.026)
    colour = _over(colour, 0.85 * lash * skin, swatch(x, "22150f"))
    brow = smoothstep(0.0055, 0.003, (eye_y - 0.034 + 7.0 * (eye_x + 0.004) ** 2).abs())
    brow = brow * (eye_x.abs() < 0.027)
    colour = _over(colour, 0.8 * brow * skin, rgb(p, "paint_hair") * 0.6)
    curve = y - 1.458 - 7.0 * x * x
    full = 1 - (side / 0.036) ** 2  # thick in the middle, nothing at the corners
    lips = smoothstep(0.0035, 0.0, (curve + 0.002).abs() - 0.0085 * full) * (full > 0)
    return _over(colour, 0.8 * lips * skin, swatch(x, "b5404a"))


def _on_fur(p, x, y, z, slot, colour):
    """A cat's stripes or a dog's patches, muzzle, chest, ears, mouth and pupils, at points in the animal's frame."""
    hx, hy, hz = x - p["head_x"], y - p["head_y"], z - p["head_z"]
    side, white = hx.abs(), swatch(x, "fbf8f4")
    fur = slot == MAIN
    cat = p["dog"] < 0.5
    stripes = smoothstep(0.0, 0.8, torch.sin(50 * z + 8 * torch.sin(9 * y)) * (y > 0.1))
    stripes = stripes * (hz < 0.02)
    brow = smoothstep(0.2, 0.6, torch.sin(hx * 95 + 1.57))
    stripes = stripes + brow * (hy > 0.045) * (hz > 0.0)
    colour = _over(colour, 0.5 * stripes.clamp(0, 1) * fur * cat * p["marks"], 0.35 * colour)
    patch = smoothstep(0.52, 0.6, value_noise(x * 7 + p["seed"], z * 7 + y * 5, p["seed"]))
    colour = _over(colour, 0.75 * patch * fur * (~cat) * p["marks"] * (hz < 0.04), 0.4 * colour)
    muzzle = smoothstep(1.0, 0.75, norm(side / 0.05, (hy + 0.04) / 0.035)) * (hz > 0.06)
    chest = smoothstep(1.0, 0.7, norm(x / 0.055, (y - 0.24) / 0.12))
    chest = chest * (z > p["chest_z"] + 0.05) * (hz < 0.05)
    colour = _over(colour, 0.75 * (muzzle + chest).clamp(0, 1) * fur * p["marks"], white)
    inner = smoothstep(1.0, 0.6, norm((side - 0.076) / 0.022, (hy - 0.105) / 0.04)) * (hz > -0.02)
    colour = _over(colour, 0.7 * inner * fur * cat, swatch(x, "e39a94"))
    mouth = (hy + p["nose_y"] + 0.032 - 0.5 * (side - 0.02).abs()).abs()
    mouth = smoothstep(0.005, 0.002, mouth) * (side < 0.035)
    colour = _over(colour, 0.7 * mouth * fur * (hz > 0.09), 0.2 * colour)
    wide, high = torch.where(cat, 0.01, 0.03), torch.where(cat, 0.021, 0.017)
    pupil = norm((side - p["eye_x"] - 0.004) / wide, (hy - p["eye_y"]) / high)
    pupil = smoothstep(1.0, 0.8, pupil) * (slot == EYES)
    return _over(colour, pupil, swatch(x, "120d0b"))
