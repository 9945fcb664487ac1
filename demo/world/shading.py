"""The colour of a surface point: its paint and weave, under the light that reaches it."""

import torch

from demo.world.fields import mix, norm, smoothstep, value_noise
from demo.world.light import ambient_occlusion, incoming_light, key_shadow, mirrored_light
from demo.world.materials.film import film_colour
from demo.world.materials.paint import painted
from demo.world.materials.palette import DENIM, FUR, HOLOGRAPHIC, LEATHER, rgb, swatch
from demo.world.scenes import WEARERS
from demo.world.shapes.slots import MAIN, SKIN
from demo.world.tracing import to_local, to_world


def shade(kind, nearest, table, p, palette, finishes, o, d, t, studio):
    """Colour [R, T, 3] of the surface points at distance t along local rays.

    palette: [R, slots, 3], finishes: [R, slots, 4], see materials.palette; studio: 1 or 0
    """
    point = x, y, z = tuple(a + b * t for a, b in zip(o, d, strict=True))
    normal = _normal(nearest, table, x, y, z)
    _distance, slot = nearest(table, x, y, z)
    facing = -(normal[0] * d[0] + normal[1] * d[1] + normal[2] * d[2])
    index = slot.long()
    rows = torch.arange(len(index), device=index.device)[:, None]
    colour, decal = painted(kind, p, x, y, z, slot, palette[rows, index])
    coat, shine, sheen, cover = finishes[rows, index].unbind(-1)
    if kind[0] in WEARERS:
        colour = _woven(x, y, z, slot, cover, colour)
    normal = to_world(p, *normal)
    local_normal = to_local(p, *normal)
    occlusion = ambient_occlusion(nearest, table, point, local_normal)
    toward = normal[0] * p["light_0"] + normal[1] * p["light_1"] + normal[2] * p["light_2"]
    shadow = key_shadow(nearest, table, p, point, local_normal, toward)
    wrap = torch.where((slot == SKIN) | (cover == FUR), 0.25, 0.08)
    incoming = incoming_light(p, normal, toward, wrap, shadow, occlusion)
    facing = facing.clamp(0.02, 1)  # a crease may turn the normal away from the eye
    rim = (sheen * (1 - facing) ** 3 * occlusion)[..., None]
    result = colour * incoming + rim * (0.3 + 0.7 * colour) * rgb(p, "sky")
    direction = to_world(p, *d)
    around, mirror, highlight = mirrored_light(p, direction, normal, facing, shine, shadow, studio)
    result = result + coat[..., None] * occlusion[..., None] * mirror + coat[..., None] * highlight
    film = cover == HOLOGRAPHIC
    if bool(film.any()):
        foil = _foil(p, x, y, z, facing, colour, around, incoming)
        foil = foil * (0.35 + 0.65 * occlusion)[..., None]
        foil = foil + 0.10 * colour * incoming + 0.9 * highlight + 0.55 * mirror
        result = torch.where(film[..., None], mix(foil, result, decal[..., None]), result)
    return result


def _normal(nearest, table, x, y, z):
    """The unit normal of the surface at a point, from the distances at four points around it."""
    eps = 0.0012
    grad = [0.0, 0.0, 0.0]
    for signs in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        distance, _slot = nearest(table, x + eps * signs[0], y + eps * signs[1], z + eps * signs[2])
        grad = [g + s * distance for g, s in zip(grad, signs, strict=True)]
    size = norm(*grad).clamp_min(1e-9)
    return tuple(g / size for g in grad)


def _woven(x, y, z, slot, cover, colour):
    """`colour` with the grain of leather, and with denim's twill and seams."""
    grain = value_noise(x * 150 + z * 90, y * 150) - 0.5
    twill = torch.sin((x + y) * 520) * 0.5 + (value_noise(x * 240, y * 90) - 0.5)
    weave = 1 + (cover == LEATHER) * 0.25 * grain + (cover == DENIM) * 0.22 * twill
    colour = colour * weave[..., None]
    stitch = smoothstep(0.004, 0.002, (x.abs() - 0.045).abs())
    stitch = stitch * (torch.sin(y * 420) > 0) * (y < 1.38) * (z > 0)
    stitch = (cover == DENIM) * stitch * 0.9 * (slot == MAIN)
    return mix(colour, swatch(x, "d59a4a"), stitch[..., None])


def _foil(p, x, y, z, facing, colour, around, incoming):
    """The reflection of silvery cloth under a film whose thickness varies smoothly over the cloth."""
    phase = p["fold_phase"]
    flow = torch.sin(6.1 * x + 2.3 * y + 1.9 * torch.sin(4.3 * y + 5.1 * z + phase) + phase)
    swirl = 2.1 * torch.sin(5.7 * x + phase)
    flow = flow + 0.6 * torch.sin(9.7 * y - 7.3 * x + 4.0 * z + swirl)
    thickness = p["film_nm"] + p["film_spread"] * 0.55 * flow
    tint = 4.2 * film_colour(thickness.clamp(130, 1150), facing.clamp_min(0.3))
    tint = mix(tint, tint.amax(-1, keepdim=True), 0.10)
    silver = mix(colour, torch.ones_like(colour), 0.45)
    return tint * silver * (0.6 * around + 0.5 * incoming + 0.14)
