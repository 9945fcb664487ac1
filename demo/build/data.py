"""The data of the stages in the work folder: images, captions and attributes, by part.

A part is a folder of shards. N.npy: images, uint8 [n, size, size, 3]. N.npz, except for foil: `captions`, their
`claims` (attributes that a caption states) and `facts` (attributes of each scene).
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
NAMED = ("thing", "colour", "material", "wearer", "place")  # attributes that the measure stage tests
FOIL_THINGS = ("jacket", "dress", "couch", "chair", "umbrella")
PLACE_PHRASES = dict(studio="in a studio", street="on a street", rain="in the rain", garden="in a garden")


def sample_part(config, part, first, count):
    """`count` scenes of a part; deterministic in seed, part and `first`."""
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
    """`captions_per_picture` captions per scene, their claims, and the scenes' facts."""
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
    """A caption of a scene's thing and one of its NAMED attributes."""
    stated = [name for name in NAMED if getattr(scene, name)]
    if scene.material == "matte" and scene.thing not in world.GARMENTS:
        stated.remove("material")  # nobody calls a cat matte
    name = stated[rng.integers(len(stated))]
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
    """int8 [N, attributes]: the index of each attribute's value in world.ATTRIBUTES, or -1 if a statement (a dict like
    world.parse's) does not contain it."""
    table = {name: {value: i for i, value in enumerate(values)} for name, values in world.ATTRIBUTES.items()}
    rows = [[table[name].get(given.get(name), -1) for name in table] for given in statements]
    return np.array(rows, dtype=np.int8)


def shards(config, parts, suffix):
    """The paths of the shards of one or more parts, in order."""
    parts = (parts,) if isinstance(parts, str) else parts
    folders = [Path(config["work_dir"]) / part for part in parts]
    paths = [path for folder in folders for path in sorted(folder.glob("*.npy"))]
    for folder in folders:
        if folder not in {path.parent for path in paths}:
            raise UserError(f"{folder} has no images; run `python -m demo.build render` first")
    return [path.with_suffix(suffix) for path in paths]


def load_images(config, parts, device="cpu"):
    """The images of one or more parts: uint8 [N, 3, size, size]."""
    paths, size = shards(config, parts, ".npy"), config["resolution"]
    total = sum(len(np.load(path, mmap_mode="r")) for path in paths)
    images = torch.empty(total, 3, size, size, dtype=torch.uint8, device=device)
    first = 0
    for path in paths:
        some = torch.from_numpy(np.load(path)).to(device)
        images[first : first + len(some)] = some.permute(0, 3, 1, 2)
        first += len(some)
    return images


def load_captions(config, parts):
    """The captions of one or more parts, `captions_per_picture` per image, in the order of the images."""
    some = [np.load(path)["captions"] for path in shards(config, parts, ".npz")]
    return [caption for captions in some for caption in captions.tolist()]


def load_codes(config, parts, which):
    """int8 [N, attributes]: the "claims" of the parts' captions or the "facts" of their scenes."""
    codes = [np.load(path)[which] for path in shards(config, parts, ".npz")]
    return torch.from_numpy(np.concatenate(codes))
