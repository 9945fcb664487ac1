"""Images of scenes: rays in tiles; along each ray the backdrop, the shadow on the floor, the thing.

Things stand in a *local* frame, rotated by the scene's yaw, so that the composition of the backdrop is fixed. Colours
are linear RGB until the last step.
"""

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from demo.world.backdrops import BACKDROPS, rain_streaks
from demo.world.distances import distance_function
from demo.world.fields import mix, norm
from demo.world.materials.paint import paint_columns
from demo.world.materials.palette import palette_of
from demo.world.parameters import named, scene_parameters
from demo.world.scenes import PLACES, Scene, kind_of
from demo.world.shading import shade
from demo.world.tracing import box_span, march, rows_where, to_local

_TILE = 16  # a row is a tile of 16x16 rays


def render(
    scenes: Sequence[Scene],
    size: int,
    device="cpu",
    antialias: float = 2,
    fuse: bool = True,
    numbers: Sequence[np.ndarray] | None = None,
) -> torch.Tensor:
    """Images of the scenes: uint8 [N, size, size, 3] on the device, sRGB.

    antialias: rays per pixel along each axis; 1.5 means three rays on two pixels. An image depends only on its scene,
    size, antialias and the kind of device, not on its neighbours in the batch. On CUDA, batches of hundreds pay; with
    `fuse` the distances are kernels there (kernels.py), which changes images by rounding. numbers: numbers_of(scenes),
    if already computed. Raises ValueError unless size and antialias are positive.
    """
    if size < 1 or antialias <= 0:
        raise ValueError(f"size and antialias must be positive, got {size} and {antialias}")
    result = torch.empty(len(scenes), size, size, 3, dtype=torch.uint8, device=device)
    groups: dict[tuple, list[int]] = {}
    for i, scene in enumerate(scenes):
        groups.setdefault(kind_of(scene), []).append(i)
    at_once = max(1, int((1 << 26) / (size * antialias) ** 2))
    with _workers(device) as workers:
        for kind, members in groups.items():
            for first in range(0, len(members), at_once):
                part = members[first : first + at_once]
                some = [scenes[i] for i in part]
                given = numbers_of(some) if numbers is None else [array[part] for array in numbers]
                images = _render_kind(kind, some, given, size, device, antialias, workers, fuse)
                result[torch.tensor(part, device=device)] = (images * 255 + 0.5).to(torch.uint8)
    return result


@contextlib.contextmanager
def _workers(device):
    """A map over chunks. On a CPU each thread takes a chunk: splitting every small operation among the threads would
    make them wait for one another (100 times slower on a busy machine).
    """
    if torch.device(device).type != "cpu":
        yield map
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)


def numbers_of(scenes: Sequence[Scene]) -> list[np.ndarray]:
    """float32 inputs of the renderer: parameters [N, K], colours [N, slots, 3] and finishes [N, slots, 4].

    Takes a millisecond per scene; processes can share the work.
    """
    table = np.array([[*scene_parameters(scene).values()] for scene in scenes])
    palettes, finishes = zip(*(palette_of(scene) for scene in scenes), strict=True)
    return [array.astype(np.float32) for array in (table, np.stack(palettes), np.stack(finishes))]


def _render_kind(kind, scenes, numbers, size, device, antialias, workers, fuse) -> torch.Tensor:
    """Images of scenes of one kind, float [N, size, size, 3] in 0..1; workers: a map function."""
    table, palettes, finishes = (torch.from_numpy(array).to(device) for array in numbers)
    places = torch.tensor([PLACES.index(scene.place) for scene in scenes], device=device)
    nearest = distance_function(kind, device, fuse)
    side = round(size * antialias)
    tiles = -(-side // _TILE)
    cuda = torch.device(device).type == "cuda"
    chunk = 16384 if cuda else 96
    lane = torch.arange(_TILE * _TILE, device=device)
    image = torch.empty(len(scenes) * tiles * tiles, _TILE * _TILE, 3, device=device)

    def fill(first):
        row = torch.arange(first, min(first + chunk, len(image)), device=device)
        owner, tile = row // (tiles * tiles), row % (tiles * tiles)
        column = (tile % tiles)[:, None] * _TILE + lane % _TILE
        line = (tile // tiles)[:, None] * _TILE + lane // _TILE
        u = (column + 0.5) * (2 / side) - 1
        v = 1 - (line + 0.5) * (2 / side)
        rows = [w[owner] for w in (table, palettes, finishes, places)]
        image[row] = _trace(kind, nearest, *rows, u, v)

    list(workers(fill, range(0, len(image), chunk)))
    image = image.view(len(scenes), tiles, tiles, _TILE, _TILE, 3).transpose(2, 3)
    image = image.reshape(len(scenes), tiles * _TILE, tiles * _TILE, 3)[:, :side, :side]
    image = F.interpolate(image.permute(0, 3, 1, 2), (size, size), mode="area")
    return image.permute(0, 2, 3, 1)


@torch.no_grad()  # not in render: worker threads do not inherit it
def _trace(kind, nearest, table, palette, finishes, places, u, v):
    """Colours [R, T, 3] (sRGB) of rays through the screen points u, v in -1..1."""
    p = named(table) | paint_columns(palette)
    eye, world, floor = _rays(p, u, v)
    colour = _backdrop(p, places, eye, world, (u, v), floor)
    o, d, reach = to_local(p, *eye), to_local(p, *world), floor[-1]
    near, far = box_span(p, o, d)
    far = torch.where(reach > 0, torch.minimum(far, reach), far)
    t, hit = march(nearest, table, o, d, near, far)
    studio = (places == PLACES.index("studio")).float()[:, None]
    wet = (places == PLACES.index("rain")).float()[:, None]
    lit = (reach > 0) & ~hit
    dim = _floor_shadow(nearest, table, p, o, d, reach, lit, 0.42 + 0.1 * studio - 0.17 * wet)
    colour = colour * torch.where(lit, dim, torch.ones_like(u))[..., None]
    for rows in rows_where(hit):
        part = {name: value[rows] for name, value in p.items()}
        shaded = shade(
            kind,
            nearest,
            table[rows],
            part,
            palette[rows],
            finishes[rows],
            [w[rows] for w in o],
            [w[rows] for w in d],
            t[rows],
            studio[rows],
        )
        colour[rows] = torch.where(hit[rows][..., None], shaded, colour[rows])
    drops = wet * rain_streaks(p, u, v)
    colour = mix(colour, torch.full_like(colour, 0.80), 0.62 * drops[..., None])
    return _tone_mapped(colour * (1 - 0.05 * (u * u + v * v))[..., None])


def _rays(p, u, v):
    """(eye, directions through the screen points, their intersections with the floor) in world coordinates.

    An intersection is (x, z, distance), with distance -1 if there is none.
    """
    tilt = (p["target_y"] - p["camera_y"]) / p["camera_z"]
    scale = 1 / (1 + tilt * tilt).sqrt()
    right, up = (u + p["shift"]) / p["focal"], v / p["focal"]
    size = norm(torch.ones_like(u), right, up)
    world = (right / size, (tilt + up) * scale / size, (up * tilt - 1) * scale / size)
    eye = (0.0 * u, p["camera_y"] + 0 * u, p["camera_z"] + 0 * u)
    down = world[1].clamp_max(-1e-4)
    reach = torch.where(world[1] < -1e-3, -eye[1] / down, torch.full_like(u, -1.0))
    return eye, world, (eye[0] + reach * world[0], eye[2] + reach * world[2], reach)


def _backdrop(p, places, eye, world, screen, floor):
    """The colours of the rays' backdrops, by the place of each row."""
    colour = torch.zeros(*screen[0].shape, 3, device=screen[0].device)
    for i, place in enumerate(PLACES):
        rows = (places == i).nonzero().squeeze(1)
        if len(rows):
            part = {name: value[rows] for name, value in p.items()}
            vectors = [[w[rows] for w in group] for group in (eye, world, screen, floor)]
            colour[rows] = BACKDROPS[place](part, *vectors)
    return colour


def _floor_shadow(nearest, table, p, o, d, reach, lit, depth):
    """Light on the floor where `lit`: the key light's soft shadow of strength `depth`, darker near the thing."""
    ground = tuple(a + reach * b for a, b in zip(o, d, strict=True))
    ground = (ground[0], torch.zeros_like(reach) + 0.004, ground[2])
    light = to_local(p, p["light_0"], p["light_1"], p["light_2"])
    light = tuple(w.expand_as(reach) for w in light)
    span = box_span(p, ground, light, margin=0.25)  # room for the half-shadow
    start = torch.maximum(span[0], torch.full_like(reach, 0.03))
    end = torch.where(lit, span[1], torch.zeros_like(reach))
    _t, shadow = march(nearest, table, ground, light, start, end, soft=6)
    touch = torch.zeros_like(reach)
    beside = lit & (ground[0].abs() < p["half_x"] + 0.2)
    beside = beside & ((ground[2] - p["box_z"]).abs() < p["half_z"] + 0.2)
    for rows in rows_where(beside):
        distance, _slot = nearest(table[rows], *(g[rows] for g in ground))
        touch[rows] = (1 - distance / 0.22).clamp(0, 1) ** 2
    return (1 - depth * (1 - shadow)) * (1 - 0.45 * touch * beside)


def _tone_mapped(colour: torch.Tensor) -> torch.Tensor:
    """Linear light to sRGB in 0..1; highlights above `knee` roll off softly."""
    peak = colour.amax(-1, keepdim=True)
    knee = 0.72
    rolled = 1 - (1 - knee) ** 2 / (peak.clamp_min(knee) + 1 - 2 * knee)
    colour = torch.where(peak > knee, colour * rolled / peak.clamp_min(1e-6), colour)
    colour = mix(colour, torch.ones_like(colour), ((peak - 1.6) * 0.25).clamp(0, 0.8))
    colour = colour.clamp(0, 1)
    bright = 1.055 * colour.clamp_min(1e-4) ** (1 / 2.4) - 0.055
    return torch.where(colour <= 0.0031308, 12.92 * colour, bright)
