"""The distance to the nearest surface of a scene, for ray marching."""

import functools
import sys

import torch

from demo.world.kernels import DistanceKernels
from demo.world.parameters import NAMES, named
from demo.world.shapes.animals import animal_surfaces
from demo.world.shapes.furniture import chair_surfaces, couch_surfaces
from demo.world.shapes.slots import MAIN, SECOND
from demo.world.shapes.umbrella import umbrella_surfaces
from demo.world.shapes.wearers import hanger_surfaces, mannequin_surfaces, person_surfaces

_PARTS = {
    "person": person_surfaces,
    "mannequin": mannequin_surfaces,
    "hanger": hanger_surfaces,
    "animal": animal_surfaces,
    "couch": couch_surfaces,
    "chair": chair_surfaces,
    "umbrella": umbrella_surfaces,
}


def nearest_surface(kind, table, x, y, z):
    """Distance to the nearest surface and its slot, both [R, T]; table: parameters of the rows [R, K]."""
    p = named(table)
    distance = slot = None
    for i, part in enumerate(kind):
        for d, name in _PARTS[part](x, y, z, p, (MAIN, SECOND)[i]):
            if distance is None:
                distance, slot = d, torch.full_like(d, name)
            else:
                slot = torch.where(d < distance, float(name), slot)
                distance = torch.minimum(distance, d)
    return distance, slot


@functools.cache
def distance_function(kind, device, fuse):
    """nearest_surface of a kind: (table, x, y, z) -> (distance, slot). With `fuse` its roughly 500 operations become a
    kernel on CUDA."""
    eager = functools.partial(nearest_surface, kind)
    if not fuse or torch.device(device).type != "cuda":
        return eager
    try:
        return DistanceKernels(eager, len(NAMES))
    except Exception as error:  # any error of a missing or unsuitable CUDA toolkit
        why = f"no kernels here ({type(error).__name__}: {error})"
        print(f"world: {why}; rendering slowly with PyTorch", file=sys.stderr)
        return eager
