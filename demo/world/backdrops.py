"""Backdrops: a studio, a street, a street in the rain, a garden; and falling rain in front.

A backdrop returns the colours [R, T, 3] of rays that hit no thing. o, d: origin and direction in world coordinates.
screen: (u, v) in -1..1. floor: (x, z, t), the ray's intersection with the floor, t < 0 if there is none.
"""

import torch

from demo.world.fields import hashed, mix, norm, smoothstep, value_noise
from demo.world.materials.palette import rgb, swatch


def _studio(p, o, d, screen, floor):
    wall = rgb(p, "wall")
    u, v = screen
    glow = 1.12 - 0.22 * (u * u + (v - 0.15) ** 2)
    lit = mix(glow, 0.93 + 0.06 * v, smoothstep(-0.10, -0.30, d[1]))
    return wall * lit[..., None] * (0.55 + 0.45 * rgb(p, "key") / 2.2)


def _facades(p, x, y, far: bool, wet: bool):
    """A row of houses: x along the street and y up, metres."""
    seed = p["seed"]
    width = 5.0 if far else 3.4
    cell = (x / width + seed).floor()
    pick = hashed(cell, 1.0 * far, seed)[..., None]
    colour = torch.where(pick < 0.8, swatch(x, "6f7f95"), swatch(x, "c99a5b"))  # slate, ochre
    colour = torch.where(pick < 0.55, swatch(x, "d8c6a6"), colour)  # cream
    colour = torch.where(pick < 0.3, swatch(x, "a8583f"), colour)  # brick
    wx, wy = (x / 1.13 + seed) % 1.0, ((y - 0.35) / 1.45) % 1.0
    inside = smoothstep(0.18, 0.24, wx) * smoothstep(0.82, 0.76, wx)
    inside = inside * smoothstep(0.2, 0.25, wy) * smoothstep(0.84, 0.79, wy)
    bars = smoothstep(0.03, 0.015, (wx - 0.5).abs()) + smoothstep(0.025, 0.01, (wy - 0.52).abs())
    lamp = hashed((x / 1.13 + seed).floor(), ((y - 0.35) / 1.45).floor(), seed)[..., None]
    glass = torch.where(lamp > (0.55 if wet else 0.82), swatch(x, "ffd98a"), swatch(x, "3d4c63"))
    glass = mix(glass, swatch(x, "efe9dd"), bars.clamp(0, 1)[..., None])
    band = smoothstep(0.03, 0.0, (y - 3.2).abs()) + smoothstep(0.05, 0.03, (y - 0.12).abs())
    colour = colour * (0.92 + 0.1 * value_noise(x * 3, y * 9, seed))[..., None]
    colour = mix(colour, glass, inside[..., None])
    colour = mix(colour, swatch(x, "efe9dd"), 0.6 * band.clamp(0, 1)[..., None])
    roof = 3.0 + 3.2 * hashed(cell, 7.0 + far, seed)
    return colour, smoothstep(roof + 0.03, roof - 0.03, y)


def _street_scenery(p, o, d, wet):
    """Sky and houses along directions that reach the houses before the floor."""
    up = d[1].clamp(-0.3, 1)
    sky = mix(swatch(up, "dfeaf3"), swatch(up, "7fb2e5"), smoothstep(0.0, 0.35, up)[..., None])
    dusk = (p["warm"] * smoothstep(0.4, 0.0, up))[..., None]
    sky = mix(sky, swatch(up, "ffc58a").expand_as(sky), 0.65 * dusk)
    if wet:
        sky = mix(swatch(up, "aab6c2"), swatch(up, "7d8b9b"), smoothstep(0.0, 0.3, up)[..., None])
    depth = (-d[2]).clamp_min(1e-3)
    colour = sky
    for far, z, haze in ((True, 16.0, 0.62), (False, 8.5, 0.0)):
        reach = (o[2] + z) / depth
        x, y = o[0] + d[0] * reach, o[1] + d[1] * reach + (1.6 if far else 0.0)
        houses, cover = _facades(p, x, y, far, wet)
        houses = mix(houses, sky, haze + (0.42 if wet else 0.12) * (1 - haze))
        colour = mix(colour, houses * (0.72 if wet else 0.9), (cover * (d[2] < 0))[..., None])
    return colour


def _street(p, o, d, screen, floor, wet=False):
    scenery = _street_scenery(p, o, d, wet)
    x, z, t = floor
    speckle = value_noise(x * 40, z * 40) * 0.12 + value_noise(x * 4, z * 4) * 0.12
    slab = swatch(x, "8a96a3" if wet else "b9b4ab") * (0.85 + speckle)[..., None]
    seam = smoothstep(0.035, 0.015, (x / 0.9 % 1.0 - 0.5).abs() * 0.9)
    seam = seam + smoothstep(0.035, 0.015, (z / 0.9 % 1.0 - 0.5).abs() * 0.9)
    slab = slab * (1 - 0.22 * seam.clamp(0, 1))[..., None]
    road = swatch(x, "55606d" if wet else "5c5c60") * (0.8 + speckle * 1.6)[..., None]
    dash = smoothstep(0.1, 0.07, (z + 4.2).abs()) * (((x + p["seed"]) % 2.2) < 1.2)
    road = mix(road, swatch(x, "e8e4d8"), dash[..., None])
    kerb = smoothstep(0.12, 0.09, (z + 2.0).abs())
    ground = torch.where((z > -2.0)[..., None], slab, road)
    ground = mix(ground, swatch(x, "d4d0c8") * (0.7 if wet else 1.0), kerb[..., None])
    far_side = (z < -7.0)[..., None]
    ground = torch.where(far_side, slab * 0.9, ground)
    if wet:
        ripple = (value_noise(x * 7, z * 22, p["seed"]) - 0.5) * 0.10
        bounced = (d[0] + ripple, -d[1] + ripple, d[2])
        mirror = _street_scenery(p, (o[0], o[1] * 0.0, o[2]), bounced, wet)
        puddle = smoothstep(0.38, 0.62, value_noise(x * 1.1, z * 2.0, p["seed"] + 3.0))
        gloss = (0.25 + 0.5 * puddle)[..., None]
        ground = mix(ground * 0.75, mirror, gloss)
    on_floor = ((t > 0) & (z > -8.5))[..., None]
    if not wet:
        ground = ground * (0.55 + 0.2 * rgb(p, "key"))
    return torch.where(on_floor, ground, scenery * (0.7 + 0.12 * rgb(p, "key")))


def _rain(p, o, d, screen, floor):
    return _street(p, o, d, screen, floor, wet=True)


# Distance, lowest height and its variation (metres), frequency along x, colour
_HEDGES = ((15.0, 2.6, 3.2, 0.35, "7fae72"), (9.0, 1.5, 1.7, 0.7, "4f9148"), (5.5, 0.55, 0.65, 1.5, "2f7a39"))


def _garden(p, o, d, screen, floor):
    x, z, t = floor
    on_floor = ((t > 0) & (z > -5.5))[..., None]
    colour = torch.where(on_floor, _lawn(p, x, z), _hedges(p, o, d, _garden_sky(p, d)))
    return colour * (0.62 + 0.15 * rgb(p, "key"))


def _garden_sky(p, d):
    seed, up = p["seed"], d[1]
    sky = mix(swatch(up, "e4f0f7"), swatch(up, "68a9e6"), smoothstep(-0.02, 0.4, up)[..., None])
    dusk = (p["warm"] * smoothstep(0.4, 0.0, up))[..., None]
    sky = mix(sky, swatch(up, "ffcf9a").expand_as(sky), 0.6 * dusk)
    cloud = value_noise(d[0] * 7 + seed, up * 14, seed) * 0.7
    cloud = cloud + value_noise(d[0] * 20, up * 40, seed) * 0.3
    cloud = smoothstep(0.5, 0.75, cloud)
    return mix(sky, torch.ones_like(sky), 0.8 * cloud[..., None])


def _hedges(p, o, d, colour):
    """`colour` behind three rows of hedges; the nearest is in flower."""
    seed = p["seed"]
    depth = (-d[2]).clamp_min(1e-3)
    for layer, (z, low, swing, scale, code) in enumerate(_HEDGES):
        reach = (o[2] + z) / depth
        x, y = o[0] + d[0] * reach, o[1] + d[1] * reach
        edge = low + swing * value_noise(x * scale, 0 * x, seed + layer)
        edge = edge + 0.25 * value_noise(x * 5, y * 5, seed)
        leaf = value_noise(x * 9, y * 9, seed) * 0.5 + value_noise(x * 22, y * 22, seed) * 0.5
        lit = 0.45 + 0.55 * (y / edge).clamp(0, 1) + 0.75 * (leaf - 0.4)
        leaves = swatch(x, code) * lit[..., None]
        if layer == 2:
            leaves = _flowers(x, y, seed, leaves)
        cover = smoothstep(edge + 0.04, edge - 0.04, y) * (d[2] < 0)
        colour = mix(colour, leaves.clamp_min(0), cover[..., None])
    return colour


def _flowers(x, y, seed, leaves):
    """`leaves` with a flower of five petals in some cells of a grid, each bush of one colour."""
    cx, cy = x / 0.2, y / 0.2
    i, j = cx.floor(), cy.floor()
    ox = cx - i - 0.25 - 0.5 * hashed(i, j, seed)
    oy = cy - j - 0.25 - 0.5 * hashed(j, i, seed)
    r = norm(ox, oy) * (1 + 0.22 * torch.cos(5 * torch.atan2(oy, ox)))
    r = r / (0.6 + 0.6 * hashed(i, j, seed + 2.0))
    bloom = smoothstep(0.25, 0.19, r) * (hashed(i, j, seed + 5.0) > 0.55)
    hue = hashed(i * 0 + (x / 2.2).floor(), 3.0, seed)[..., None]
    petal = torch.where(hue < 0.7, swatch(x, "fdf3f0"), swatch(x, "f7c93a"))
    petal = torch.where(hue < 0.35, swatch(x, "f56a97"), petal)
    return mix(leaves, petal, bloom[..., None])


def _lawn(p, x, z):
    """Grass with daisies."""
    seed = p["seed"]
    blade = value_noise(x * 60, z * 24) * 0.5 + value_noise(x * 9, z * 6, seed) * 0.5
    grass = mix(swatch(x, "3f8f35"), swatch(x, "8cc152"), blade[..., None])
    grass = grass * (0.75 + 0.25 * smoothstep(-5.0, -2.0, z))[..., None]
    i, j = (x / 0.3).floor(), (z / 0.42).floor()
    ox = x / 0.3 - i - 0.5 + 0.4 * (hashed(i, j) - 0.5)
    oz = z / 0.42 - j - 0.5 + 0.4 * (hashed(j, i) - 0.5)
    daisy = smoothstep(0.16, 0.12, norm(ox, oz)) * (hashed(i, j, seed) > 0.8)
    white = (hashed(i, j, 9.0) > 0.5)[..., None]
    petal = torch.where(white, swatch(x, "ffffff"), swatch(x, "ffd84a"))
    return mix(grass, petal, daisy[..., None])


BACKDROPS = {"studio": _studio, "street": _street, "rain": _rain, "garden": _garden}


def rain_streaks(p, u, v):
    """Coverage of the screen points u, v by falling rain, 0..1: three layers of streaks."""
    total = torch.zeros_like(u)
    layers = ((17.0, 2.6, 0.085), (26.0, 3.6, 0.10), (40.0, 5.2, 0.13))
    for layer, (columns, rows, width) in enumerate(layers):
        x = (u + 0.10 * v) * columns * 0.5 + 0.37 * layer
        i = x.floor()
        fall = v * rows * 0.5 + 9.0 * hashed(i, 2.0 + layer, p["seed"])
        j = fall.floor()
        length = 0.25 + 0.45 * hashed(i, j, p["seed"] + layer)
        along = fall - j
        centre = 0.25 + 0.5 * hashed(j, i, p["seed"])
        streak = smoothstep(width, width * 0.35, (x - i - centre).abs())
        streak = streak * (along < length) * smoothstep(0.0, 0.15, along)
        shown = hashed(i, j, p["seed"] + 11.0) > 0.35
        total = total + streak * shown * (0.62 - 0.13 * layer)
    return total.clamp(0, 0.8)
