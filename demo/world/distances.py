"""The distance to the nearest surface of a whole scene, which rays are marched by."""

import functools
import sys

import torch

from demo.world.parameters import named
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
    """Distance to the nearest surface and its slot, both [R, T]; table [R, K]: rows' parameters."""
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


_compiled: dict = {}  # by kind; "failed" once the compiler has given up


def distance_function(kind, device, fuse):
    """nearest_surface of a kind, (table, x, y, z) -> (distance, slot).

    Compiled on CUDA if `fuse`, where fusing its some 500 operations pays.
    """
    eager = functools.partial(nearest_surface, kind)
    if not fuse or torch.device(device).type != "cuda" or _compiled.get("failed"):
        return eager
    if kind not in _compiled:
        # Each kind is a program; past this limit dynamo would silently run the rest eagerly.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        compiled = torch.compile(eager, dynamic=False)

        def guarded(*arguments):
            if not _compiled.get("failed"):
                try:
                    return compiled(*arguments)
                except Exception as error:  # no compiler on this machine, or one that gives up
                    _compiled["failed"] = True
                    why = f"torch.compile failed ({type(error).__name__})"
                    print(f"world: {why}; rendering eagerly", file=sys.stderr)
            return eager(*arguments)

        _compiled[kind] = guarded
    return _compiled[kind]
