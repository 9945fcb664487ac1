"""A small rendered world: garments on wearers, animals, furniture and umbrellas, and true captions.

    python -m demo.world --data data                           # render the 32 training images into a folder
    python -m demo.world --data /tmp/dresses --thing dress     # the same of another garment
    python -m demo.world --sheet cats.png --caption "a cat sitting on a couch" --count 12

--sheet renders --count scenes of which --caption is true (any scenes without --caption), --size pixels wide, each
titled with its own caption; another --seed gives other scenes.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from demo.world.captions import caption, parse
from demo.world.rendering import render
from demo.world.sampling import sample_scene
from demo.world.scenes import GARMENTS
from demo.world.training_images import write_data
from lib.config import parse_config
from lib.errors import UserError, run_script
from lib.images import contact_sheet

CONFIG = dict(
    data=None,  # folder for the training images
    thing="raincoat",  # their subject: a holographic raincoat, jacket or dress
    sheet=None,  # file for a contact sheet
    caption=None,  # subject of the sheet
    count=12,  # images on the sheet
    size=128,  # width of an image on the sheet, pixels
    seed=0,  # of the sheet's scenes
    device="cuda" if torch.cuda.is_available() else "cpu",
)


def main(arguments: Sequence[str] | None = None) -> None:
    config = parse_config(CONFIG, __doc__, argv=arguments)
    data, sheet, device = config["data"], config["sheet"], config["device"]
    count, size, seed = config["count"], config["size"], config["seed"]
    if not data and not sheet:
        raise UserError("nothing to do: add --data FOLDER or --sheet FILE")
    if config["thing"] not in GARMENTS:
        raise UserError(f"--thing is {config['thing']}, but must be one of {', '.join(GARMENTS)}")
    if count < 1 or size < 8 or seed < 0:
        raise UserError("--count must be at least 1, --size at least 8, --seed at least 0")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device {device!r} is not available; choose cpu or cuda") from None
    try:
        fixed = parse(config["caption"]) if config["caption"] else {}
        if data:
            write_data(Path(data), device, config["thing"])
        if sheet:
            write_sheet(Path(sheet), fixed, count, size, seed, device)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None


def write_sheet(path: Path, fixed: dict, count: int, size: int, seed=0, device="cpu") -> None:
    """Write a contact sheet of `count` random scenes with the fields `fixed`, captions below."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, **fixed) for _ in range(count)]
    images = [Image.fromarray(pixels) for pixels in render(scenes, size, device).cpu().numpy()]
    titles = [caption(scene, rng) for scene in scenes]
    contact_sheet(images, titles, columns=math.ceil(count**0.5), side=size).save(path)


if __name__ == "__main__":
    run_script(main)
