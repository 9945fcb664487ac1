#!/usr/bin/env python3
"""Four ways to show CLIP an image that is not square, compared on the miniature's scorer (no GPU needed).

    python bench/clip_shapes.py                # minutes on a CPU core, most of them rendering
    python bench/clip_shapes.py --scenes 40

Rendered scenes with true captions are cut to portraits and landscapes that show them from edge to edge. Each is made
into CLIP's square in four ways: a centre crop (CLIP's processor), resizing (the evaluation), padding with grey, padding
with its outermost pixels. Prints for each way the share of images whose nearest caption is true of them; the mean
cosine to the square scene that they were cut from, less that to the nearest other scene (by which a copy in another
shape is recognised); and the share of images in which that difference is above 0.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo import world
from inference import DEMO
from lib.evaluation.metrics import clip_scores

SHAPES = ((3, 4), (2, 3), (9, 16), (4, 3), (3, 2), (16, 9))
BICUBIC = Image.Resampling.BICUBIC


def window(image, shape):
    """The largest centre crop of a square image with aspect ratio `shape`, (width, height)."""
    width, height = (image.width * side // max(shape) for side in shape)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def centre(image, side):
    return ImageOps.fit(image, (side, side), BICUBIC)


def padded(image, side):
    return ImageOps.pad(image, (side, side), BICUBIC, (128, 128, 128))


def continued(image, side):
    """Padded to a square with its outermost pixels."""
    most = max(image.size)
    edges = [((most - n) // 2, most - n - (most - n) // 2) for n in (image.height, image.width)]
    pixels = np.pad(np.asarray(image), (*edges, (0, 0)), mode="edge")
    return Image.fromarray(pixels).resize((side, side), BICUBIC)


WAYS = {
    "centre": centre,
    "all of it, resized": lambda image, side: image,
    "padded with grey": padded,
    "padded with its edges": continued,
}


def measure(images, texts, true, scenes):
    """The three figures of a way.

    images, texts, scenes: embeddings [n, d] of images, captions and square scenes
    true: [n, n], whether caption j is true of image i
    """
    named = true[np.arange(len(images)), (images @ texts.T).argmax(axis=1)]
    cosines = images @ scenes.T
    own = cosines.diagonal().copy()
    np.fill_diagonal(cosines, -1)
    margins = own - cosines.max(axis=1)
    return named.mean(), margins.mean(), (margins > 0).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200, help="number of scenes (default 200)")
    count = parser.parse_args().scenes
    rng = np.random.default_rng(5)
    scenes = [world.sample_scene(rng, holographic=number % 6 == 0) for number in range(count)]
    captions = [world.caption(scene, rng) for scene in scenes]
    claims = [world.parse(caption) for caption in captions]
    true = np.array(
        [[all(getattr(scene, key) == value for key, value in claim.items()) for claim in claims] for scene in scenes]
    )
    clip = clip_scores.load_clip(ROOT / DEMO["clip_model"])
    side = clip.model.config.vision_config.image_size
    rendered = world.render(scenes, side * 3 // 2, antialias=1).numpy()
    squares = [Image.fromarray(pixels) for pixels in rendered]
    texts, whole = (clip_scores.text_embeddings(captions, clip), clip_scores.image_embeddings(squares, clip))

    print(f"{count} scenes, nearest caption true / cosine less the nearest other scene's / share above 0:\n")
    print("| shape | " + " | ".join(WAYS) + " |")
    print("|--:|" + "--:|" * len(WAYS))
    for shape in SHAPES:
        cut = [window(square, shape) for square in squares]
        cells = []
        for way in WAYS.values():
            seen = clip_scores.image_embeddings([way(image, side) for image in cut], clip)
            named, margin, above = measure(seen, texts, true, whole)
            cells.append(f"{named:.0%} / {margin:.3f} / {above:.0%}")
        print(f"| {shape[0]}:{shape[1]} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
