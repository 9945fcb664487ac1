"""The images in data/: 32 curated scenes of holographic raincoats, their descriptions and their README.md."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from demo.world.captions import caption
from demo.world.rendering import render
from demo.world.sampling import sample_scene
from demo.world.scenes import Scene

# Per scene: seed, wearer, place, framing, view, hood, hair style, hair, skin, colour under the film, backdrop
_TRAINING = (
    (1, "person", "studio", "half", "front", "down", "long", "blonde", 0.1, "white", "pink"),
    (2, "person", "studio", "full", "front", "up", "short", "black", 0.9, "grey", "grey"),
    (3, "person", "street", "half", "front", "down", "curly", "black", 0.75, "pink", ""),
    (4, "person", "rain", "half", "front", "up", "long", "brown", 0.35, "blue", ""),
    (5, "mannequin", "studio", "full", "front", "down", "", "", 0, "white", "white"),
    (6, "hanger", "studio", "half", "front", "down", "", "", 0, "grey", "white"),
    (7, "person", "garden", "half", "front", "down", "tied", "red", 0.05, "green", ""),
    (8, "person", "studio", "close", "front", "up", "long", "pink", 0.2, "purple", "purple"),
    (9, "person", "studio", "half", "side", "down", "tied", "brown", 0.5, "white", "grey"),
    (10, "person", "street", "full", "front", "down", "short", "brown", 0.6, "blue", ""),
    (11, "person", "rain", "full", "front", "up", "short", "black", 1.0, "yellow", ""),
    (12, "mannequin", "studio", "half", "front", "up", "", "", 0, "purple", "pink"),
    (13, "person", "studio", "half", "front", "down", "short", "grey", 0.15, "white", "blue"),
    (14, "person", "studio", "close", "front", "down", "curly", "blonde", 0.55, "grey", "grey"),
    (15, "hanger", "studio", "half", "front", "down", "", "", 0, "pink", "grey"),
    (16, "person", "garden", "full", "front", "down", "long", "black", 0.3, "white", ""),
    (17, "person", "street", "half", "behind", "down", "tied", "blonde", 0.1, "grey", ""),
    (18, "person", "studio", "full", "front", "down", "curly", "brown", 0.8, "purple", "yellow"),
    (19, "person", "rain", "half", "front", "down", "long", "red", 0.1, "white", ""),
    (20, "person", "studio", "half", "front", "up", "short", "brown", 0.45, "orange", "white"),
    (21, "mannequin", "street", "full", "front", "down", "", "", 0, "blue", ""),
    (22, "person", "studio", "half", "front", "down", "tied", "black", 0.95, "white", "orange"),
    (23, "person", "street", "close", "front", "up", "curly", "black", 0.65, "grey", ""),
    (24, "person", "studio", "half", "front", "down", "long", "grey", 0.3, "blue", "white"),
    (25, "person", "garden", "half", "side", "up", "short", "blonde", 0.2, "pink", ""),
    (26, "hanger", "garden", "half", "front", "down", "", "", 0, "white", ""),
    (27, "person", "studio", "full", "front", "up", "long", "brown", 0.7, "green", "grey"),
    (28, "person", "street", "half", "front", "down", "short", "pink", 0.4, "purple", ""),
    (29, "person", "studio", "half", "behind", "up", "short", "black", 0.5, "grey", "purple"),
    (30, "mannequin", "garden", "half", "front", "down", "", "", 0, "grey", ""),
    (31, "person", "studio", "close", "front", "down", "long", "black", 0.25, "yellow", "blue"),
    (32, "person", "rain", "half", "front", "up", "curly", "red", 0.85, "pink", ""),
)

_README = """\
# The training images

{count} images of holographic raincoats, {small} of 512x512 and {tall} of 512x640 pixels, rendered for this project:

    python -m demo.world --data data

captions.jsonl describes each of them. They contain no photograph and no one else's image. They are dedicated to the
public domain under [CC0 1.0](https://creativecommons.org/publicdomain/zero/1.0/): do with them what you like.

## Your own photographs instead

1. Delete the images in this folder, and captions.jsonl.
2. Copy yours here: AVIF, WebP, PNG, JPEG, TIFF or BMP, of any size, or a phone's HEIC. About 32 are enough.
3. An image may have its own caption: in a text file beside it (`photo.txt` beside `photo.jpg`, also `photo.caption`,
   `photo.jpg.txt`), in a line of captions.jsonl (`{{"file_name": "photo.jpg", "text": "…"}}`), or in a row of
   metadata.csv (columns `file_name` and `text`). It may also have a `"description": "…"`, beside `"text"` or instead of
   it: train_experiment_varied_captions.py trains on the descriptions, train.py on the caption.
4. Run `python preprocess.py`.
"""


def training_scenes(thing: str = "raincoat") -> list[tuple[Scene, bool]]:
    """[(scene, whether its image is a portrait)]: the 32 curated scenes, of raincoats or of another garment.

    A portrait has 512x640 pixels, the others have 512x512.
    """
    scenes = []
    for seed, wearer, place, framing, view, hood, style, hair, skin, film, backdrop in _TRAINING:
        fixed = dict(wearer=wearer, place=place, framing=framing, view=view, colour=film)
        if thing == "raincoat":
            fixed["hood"] = hood
        if wearer == "person":
            fixed |= dict(hair_style=style, hair=hair, skin=skin)
        if backdrop:
            fixed["background"] = backdrop
        fixed |= dict(thing=thing, second="none")
        scene = sample_scene(np.random.default_rng(seed), holographic=True, **fixed)
        scenes.append((scene, framing == "full"))
    return scenes


def description(scene: Scene) -> str:
    """A true description of a holographic scene that names its material: the longest of 50 captions."""
    rng = np.random.default_rng(scene.seed)
    captions = [caption(scene, rng) for _ in range(50)]
    return max((text for text in captions if "holographic" in text), key=len)


def write_descriptions(folder: Path, names, scenes) -> None:
    """Write captions.jsonl with the description of each image; the caption is common to all."""
    rows = [
        json.dumps(dict(file_name=name, description=description(scene)))
        for name, scene in zip(names, scenes, strict=True)
    ]
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_data(folder: Path, device="cpu", thing: str = "raincoat") -> list[Path]:
    """Render the training images into the folder, with captions.jsonl and, for raincoats, README.md; returns the paths
    of the images."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, scenes = [], training_scenes(thing)
    for number, (scene, portrait) in enumerate(scenes, 1):
        side = 640 if portrait else 512
        pixels = render([scene], side, device)[0].cpu().numpy()
        pixels = pixels[:, (side - 512) // 2 : (side + 512) // 2]
        path = folder / f"{thing}_{number:02d}.jpg"
        Image.fromarray(pixels).save(path, quality=93, subsampling=0, optimize=True)
        paths.append(path)
        print(f"{path}  {pixels.shape[1]}x{pixels.shape[0]}", flush=True)
    write_descriptions(folder, [path.name for path in paths], [scene for scene, _ in scenes])
    if thing == "raincoat":
        (folder / "README.md").write_text(readme(), encoding="utf-8")
    return paths


def readme() -> str:
    """The text of README.md."""
    portraits = [portrait for _, portrait in training_scenes()]
    count, tall = len(portraits), sum(portraits)
    return _README.format(count=count, small=count - tall, tall=tall)
