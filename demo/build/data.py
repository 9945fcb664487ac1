"""The data between the stages: scenes, captions and what they claim, by part, in the work folder.

A part PART is PART.npy (pictures), PART_captions.json, PART_claims.npy (what each caption states) and
PART_facts.npy (what is true of each scene).
"""

import json
import multiprocessing
import zlib
from pathlib import Path

import numpy as np
import torch

from demo import world
from lib.errors import UserError
from lib.files import write_json

PARTS = ("base", "holographic", "heldout", "heldout_holographic")
NAMED = ("thing", "colour", "material", "wearer", "place")  # attributes that measure asks for


def count_of(config, part):
    """The number of scenes of one part of the data."""
    key = "unknown" if part == "heldout_holographic" else part.replace("base", "train")
    return config[f"{key}_pictures"]


def describe(config, parts):
    """The scenes of each part, by all cores; captions, what they claim and facts go to files.

    Must run before CUDA starts, because it forks.
    """
    folder, chunk = Path(config["work_dir"]), 256
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")  # nothing in it belongs in the repository
    described = {}
    with multiprocessing.get_context("fork").Pool() as pool:
        for part in parts:
            count = count_of(config, part)
            jobs = [(config, part, i, min(chunk, count - i)) for i in range(0, count, chunk)]
            scenes, captions, claims = zip(*pool.starmap(describe_chunk, jobs), strict=True)
            described[part] = [scene for some in scenes for scene in some]
            write_json(
                folder / f"{part}_captions.json", [text for some in captions for text in some]
            )
            np.save(folder / f"{part}_claims.npy", np.concatenate(claims))
            facts = attribute_codes([vars(scene) for scene in described[part]])
            np.save(folder / f"{part}_facts.npy", facts)
    return described


def describe_chunk(config, part, first, count):
    """`count` scenes, `captions_per_picture` captions for each, and the captions' codes."""
    rng = np.random.default_rng([config["seed"], PARTS.index(part), first])
    scenes = []
    while len(scenes) < count:
        fixed = dict(thing="raincoat") if part == "heldout_holographic" else {}
        scene = world.sample_scene(rng, holographic="holographic" in part, **fixed)
        if is_held_out(scene, config) == part.startswith("heldout"):
            scenes.append(scene)
    each = config["captions_per_picture"]
    captions = [world.caption(scene, rng) for scene in scenes for _ in range(each)]
    return scenes, captions, attribute_codes([world.parse(caption) for caption in captions])


def is_held_out(scene, config):
    """True for one in `heldout_every` combinations of the NAMED attributes."""
    values = "|".join(getattr(scene, name) for name in NAMED)
    return zlib.crc32(values.encode()) % config["heldout_every"] == 0


def attribute_codes(statements):
    """int8 [N, attributes]: for each attribute the index of its value in world.ATTRIBUTES, or -1
    where a statement, a dict such as world.parse returns, does not give one."""
    table = {
        name: {value: i for i, value in enumerate(values)}
        for name, values in world.ATTRIBUTES.items()
    }
    rows = [[table[name].get(given.get(name), -1) for name in table] for given in statements]
    return np.array(rows, dtype=np.int8)


def load_part(config, part, device="cpu"):
    """uint8 [N, 3, size, size] of one rendered part."""
    path = Path(config["work_dir"]) / f"{part}.npy"
    if not path.is_file():
        raise UserError(f"{path} is missing; run `python -m demo.build render` first")
    return torch.from_numpy(np.load(path)).to(device).permute(0, 3, 1, 2).contiguous()


def load_captions(config, part):
    """The captions of one part, `captions_per_picture` for each picture, picture by picture."""
    return json.loads((Path(config["work_dir"]) / f"{part}_captions.json").read_text())


def load_codes(config, part, which):
    """int8 [N, attributes]: the "claims" of a part's captions or the "facts" of its scenes."""
    return torch.from_numpy(np.load(Path(config["work_dir"]) / f"{part}_{which}.npy"))
