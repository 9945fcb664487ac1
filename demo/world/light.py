"""Light on a surface: key light, ambient light and reflections.

Points, normals and directions are triples of [R, T]; colours are [R, T, 3], linear.
"""

import torch

from demo.world.fields import mix, smoothstep
from demo.world.materials.palette import rgb
from demo.world.tracing import box_span, march, to_local


def surroundings(p, x, y, z, studio):
    """The surroundings in a world direction, [R, T, 3]: sky, ground, soft boxes, the key light.

    studio: 1 or 0. Outside a studio, houses darken the horizon and the soft boxes are weaker.
    """
    sky, ground = rgb(p, "sky"), rgb(p, "ground")
    horizon = sky * 0.75 + 0.25
    colour = mix(horizon, ground, smoothstep(0.03, -0.12, y)[..., None])
    colour = mix(colour, sky * 0.8, smoothstep(0.1, 0.8, y)[..., None])
    blocks = smoothstep(0.28, 0.22, y + 0.12 * torch.sin(9 * x + p["seed"]) * torch.sin(5 * z))
    blocks = blocks * smoothstep(-0.1, 0.0, y)
    colour = colour * (1 - 0.55 * (blocks * (1 - studio)))[..., None]
    around = torch.atan2(x, z)
    boxes = torch.zeros_like(x)
    for centre, half, low, high, power in (
        (0.95, 0.22, -0.25, 0.75, 2.6),
        (-1.15, 0.3, -0.3, 0.7, 1.7),
        (2.6, 0.25, 0.0, 0.7, 1.4),
    ):
        box = power * smoothstep(half + 0.07, half - 0.07, (around - centre).abs())
        box = box * smoothstep(low - 0.1, low + 0.1, y) * smoothstep(high + 0.1, high - 0.1, y)
        boxes = boxes + box
    boxes = boxes + 2.2 * smoothstep(0.78, 0.9, y)
    boxes = boxes * (studio + 0.45 * (1 - studio))
    colour = colour + boxes[..., None] * (0.4 + 0.25 * rgb(p, "key"))
    sun = (x * p["light_0"] + y * p["light_1"] + z * p["light_2"]).clamp(0, 1)
    return colour + (1.2 * sun**40)[..., None] * rgb(p, "key") * 0.6


def ambient_occlusion(nearest, table, point, normal):
    """Openness of the surroundings of a surface point, 0.08..1, from the distances above it."""
    occlusion = 1.0
    for reach, weight in ((0.035, 0.55), (0.13, 0.45)):
        above = (a + reach * b for a, b in zip(point, normal, strict=True))
        distance, _slot = nearest(table, *above)
        occlusion = occlusion - weight * (1 - distance / reach).clamp(0, 1)
    return occlusion.clamp(0.08, 1)


def key_shadow(nearest, table, p, point, normal, toward):
    """Share of the key light that reaches a surface point; toward = normal · light direction."""
    start = tuple(a + 0.012 * b for a, b in zip(point, normal, strict=True))
    light = to_local(p, p["light_0"], p["light_1"], p["light_2"])
    span = box_span(p, start, light)
    light = tuple(v.expand_as(toward) for v in light)
    far = torch.where(toward > -0.15, span[1].clamp(0, 1.4), torch.zeros_like(toward))
    near = torch.full_like(toward, 0.015)
    _t, shadow = march(nearest, table, start, light, near, far, soft=9)
    return shadow


def incoming_light(p, normal, toward, wrap, shadow, occlusion):
    """Diffuse light on a surface with a normal in world coordinates: key, ambient and a weak fill.

    `wrap` lets the key light reach around edges, more on skin and fur than on cloth.
    """
    nx, ny, nz = normal
    lambert = ((toward + wrap) / (1 + wrap)).clamp_min(0) * shadow
    key, sky, ground = rgb(p, "key"), rgb(p, "sky"), rgb(p, "ground")
    ambient = mix(ground, sky, (0.5 + 0.5 * ny)[..., None]) * occlusion[..., None]
    fill = (nz * 0.9 - nx * p["light_0"].sign() * 0.4 + 0.1).clamp_min(0)
    fill = (0.32 * fill * occlusion)[..., None]
    return 0.36 * lambert[..., None] * key + 0.62 * ambient + fill


def mirrored_light(p, direction, normal, facing, shine, shadow, studio):
    """Reflections of a polished layer: (surroundings, their reflection, the key light's highlight).

    The reflection follows Schlick's approximation of Fresnel's law. The highlight has the exponent `shine`. Below 100
    the layer is rough and reflects a blurred sky.
    """
    rx, ry, rz = (a + 2 * facing * b for a, b in zip(direction, normal, strict=True))
    around = surroundings(p, rx, ry, rz, studio)
    fresnel = 0.05 + 0.75 * (1 - facing) ** 5
    glint = (rx * p["light_0"] + ry * p["light_1"] + rz * p["light_2"]).clamp(0, 1)
    glint = glint**shine * shadow
    rough = (shine < 100) * 0.6
    mirror = mix(around, rgb(p, "sky") * 0.6, rough[..., None]) * fresnel[..., None]
    highlight = (glint * (0.15 + 0.02 * shine.clamp_max(60)))[..., None] * rgb(p, "key") * 0.5
    return around, mirror, highlight
