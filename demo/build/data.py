"""The data between the stages: scenes, captions and what they claim, by part, in the work folder.

A part is a folder of shards: N.npy, images uint8 [n, size, size, 3], and but for the foil N.npz with
their `captions`, `claims` (what each caption states) and `facts` (what is true of each scene).
"""

import dataclasses
import zlib
from pathlib import Path

import numpy as np
import torch

from demo import world
from demo.build.config import CONCEPT
from lib.errors import UserError

PARTS = ("base", "fresh", "foil", "holographic", "heldout", "heldout_holographic")
NAMED = ("thing", "colour", "material", "wearer", "place")  # attributes that measure asks for
FOIL_THINGS = ("jacket", "dress", "couch", "chair", "umbrella")
PLACE_PHRASES = dict(studio="in a studio", street="on a street", rain="in the rain", garden="in a garden")


def sample_part(config, part, first, count):
    """`count` scenes of a part of the data, the same for the same seed, part and `first`."""
    rng = np.random.default_rng([config["seed"], PARTS.index(part), first])
    scenes = []
    while len(scenes) < count:
        if part == "foil":
            scene = dataclasses.replace(world.sample_scene(rng), material=CONCEPT)
            suits = scene.thing in FOIL_THINGS
        else:
            fixed = dict(thing="raincoat") if part == "heldout_holographic" else {}
            scene = world.sample_scene(rng, holographic="holographic" in part, **fixed)
            suits = is_held_out(scene, config) == part.startswith("heldout")
        if suits:
            scenes.append(scene)
    return scenes


def describe(config, part, first, scenes):
    """`captions_per_picture` captions of each scene with their claims, and the scenes' facts."""
    rng = np.random.default_rng([config["seed"], PARTS.index(part), first, 1])
    short = config["short_captions"]
    captions = []
    for scene in scenes:
        captions += [world.caption(scene, rng) for _ in range(config["captions_per_picture"] - short)]
        captions += [short_caption(scene, rng) for _ in range(short)]
    return dict(
        captions=np.array(captions),
        claims=attribute_codes([world.parse(caption) for caption in captions]),
        facts=attribute_codes([vars(scene) for scene in scenes]),
    )


def short_caption(scene, rng):
    """What a scene's thing is, and one of its NAMED attributes."""
    told = [name for name in NAMED if getattr(scene, name)]
    if scene.material == "matte" and scene.thing not in world.GARMENTS:
        told.remove("material")  # which nobody says of a cat
    name = told[rng.integers(len(told))]
    return phrase(name, getattr(scene, name), scene.thing)


def phrase(attribute, value, thing):
    """The shortest caption that states the value of one of the NAMED attributes of a thing."""
    if attribute == "thing":
        return article(value)
    if attribute in ("colour", "material"):
        return article(f"{value} {thing}")
    if attribute == "place":
        return f"{article(thing)} {PLACE_PHRASES[value]}"
    if value == "person":
        return f"a person wearing {article(thing)}"
    return f"{article(thing)} on {article(value)}"


def article(words):
    """The words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def is_held_out(scene, config):
    """True for one in `heldout_every` combinations of the NAMED attributes."""
    values = "|".join(getattr(scene, name) for name in NAMED)
    return zlib.crc32(values.encode()) % config["heldout_every"] == 0


def attribute_codes(statements):
    """int8 [N, attributes]: for each attribute the index of its value in world.ATTRIBUTES, or -1
    where a statement, a dict such as world.parse returns, does not give one."""
    table = {name: {value: i for i, value in enumerate(values)} for name, values in world.ATTRIBUTES.items()}
    rows = [[table[name].get(given.get(name), -1) for name in table] for given in statements]
    return np.array(rows, dtype=np.int8)


def shards(config, parts, suffix):
    """The paths of the shards of a part or of several, in order."""
    parts = (parts,) if isinstance(parts, str) else parts
    folders = [Path(config["work_dir"]) / part for part in parts]
    paths = [path for folder in folders for path in sorted(folder.glob("*.npy"))]
    for folder in folders:
        if folder not in {path.parent for path in paths}:
            raise UserError(f"{folder} has no images; run `python -m demo.build render` first")
    return [path.with_suffix(suffix) for path in paths]


def load_pictures(config, parts, device="cpu"):
    """uint8 [N, 3, size, size] of a rendered part, or of several one after the other."""
    paths, size = shards(config, parts, ".npy"), config["resolution"]
    total = sum(len(np.load(path, mmap_mode="r")) for path in paths)
    pictures = torch.empty(total, 3, size, size, dtype=torch.uint8, device=device)
    first = 0
    for path in paths:
        some = torch.from_numpy(np.load(path)).to(device)
        pictures[first : first + len(some)] = some.permute(0, 3, 1, 2)
        first += len(some)
    return pictures


def load_captions(config, parts):
    """The captions of one or more parts, `captions_per_picture` an image, image by image."""
    some = [np.load(path)["captions"] for path in shards(config, parts, ".npz")]
    return [caption for captions in some for caption in captions.tolist()]


def load_codes(config, parts, which):
    """int8 [N, attributes]: the "claims" of the parts' captions or the "facts" of their scenes."""
    codes = [np.load(path)[which] for path in shards(config, parts, ".npz")]
    return torch.from_numpy(np.concatenate(codes))
