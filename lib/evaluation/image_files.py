"""The images of an evaluation on disk: written as they are generated, read when they are needed.

Memory does not grow with their number, and an interruption loses none. Until an evaluation is complete, its images lie in
the hidden folder `unfinished(run.target)`, beside STARTED, which records what they are generated from. The same command
generates only what is missing there.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from lib.cache import prefetch
from lib.errors import UserError
from lib.evaluation.prompts import slugs
from lib.files import fresh_folder, replacing, unfinished, write_json

STARTED = "generating.json"
THREADS = min(8, max(1, (os.cpu_count() or 1) // 2))  # that encode images


class SavedImages(Sequence):
    """RGB images in files, each read when it is asked for; iterating reads a few ahead in threads.

    `folder` changes when an unfinished evaluation is moved to its place; `names` are relative to it.
    """

    def __init__(self, folder, names):
        self.folder, self.names = Path(folder), list(names)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return SavedImages(self.folder, self.names[place])
        return open_image(self.path(place))

    def __iter__(self):
        return prefetch(self.__getitem__, range(len(self)))

    def path(self, place):
        """The file of an image."""
        return self.folder / self.names[place]

    def missing(self):
        """The indices of the images that have no file, or a damaged one."""

        def is_missing(place):
            try:
                self[place]
            except UserError:
                return True
            return False

        return [place for place, found in enumerate(prefetch(is_missing, range(len(self)))) if found]


def image_names(prompts, seeds, kind):
    """The files of one model's images in an evaluation's folder: prompt by prompt and seed by seed. `kind` is base, lora
    or a Point's `file_stem`."""
    return [f"images/{slug}/{kind}_{seed}.png" for slug in slugs(prompts) for seed in seeds]


def open_image(path):
    """An RGB image; UserError naming the file if it is missing or damaged."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            return image.convert("RGB")
    except Exception as problem:  # a decoder may raise almost anything on a damaged file
        raise UserError(f"{path} cannot be read as an image: {problem}") from None


def write_image(path, image):
    """Writes a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, "PNG")


def copy_image(source, path):
    """Copies an image as an RGB PNG."""
    with Image.open(source) as image:
        same = image.format == "PNG" and image.mode == "RGB"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path) if same else write_image(path, open_image(source))


def write_images(images, places, generated):
    """Writes the images that the iterator `generated` yields as those of SavedImages at `places`, encoded in threads
    beside the generation. Few wait in memory, and those are written even if the generation is interrupted."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = deque()
        for place, image in zip(places, generated, strict=True):
            waiting.append(pool.submit(write_image, images.path(place), image))
            if len(waiting) > 2 * THREADS:
                waiting.popleft().result()
        for written in waiting:
            written.result()


# ---- interrupted evaluations ---------------------------------------------------------------


def count_images(folder):
    """The number of images in an evaluation's folder."""
    return sum(1 for _ in (folder / "images").glob("*/*.png"))


def begin_folder(target, settings, overwrite=False):
    """Prepares `unfinished(target)` for the images of an evaluation. Images of an interrupted one stay if it had the same
    `settings`, a dict of all that decides them; None for images that are not generated now.

    Images with other settings are discarded with `overwrite`; without it they raise a UserError.
    """
    folder = unfinished(target)
    try:
        before = json.loads((folder / STARTED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        before = None
    count = count_images(folder) if isinstance(before, dict) else 0
    if count and before == settings:
        print(f"note: {count} images in {folder}, of an interrupted evaluation, are used again")
        return
    if count and not overwrite:
        changes = [key for key in settings or () if before.get(key) != settings[key]]
        other = f" that differs in {', '.join(changes)}" if changes else ""
        raise UserError(
            f"{folder} holds {count} images of an interrupted evaluation{other}; repeat its command to complete it, or "
            "discard them with --overwrite"
        )
    fresh_folder(target)
    if settings:
        write_json(folder / STARTED, settings)


def note_kept(targets):
    """Prints where the images of an evaluation are that fails or is interrupted, if there are any."""
    folders = [folder for folder in map(unfinished, targets) if (folder / STARTED).is_file()]
    if count := sum(map(count_images, folders)):
        more = f" and {len(folders) - 1} more folders" if len(folders) > 1 else ""
        print(f"note: {count} images are kept in {folders[0]}{more}; the same command generates only the rest")
