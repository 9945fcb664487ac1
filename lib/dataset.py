"""The training set: captions.jsonl and its images, written by preprocess.py or by hand.

Images are read on demand, so memory does not grow with their number. Their hashes are cached in latents/pictures.json,
with file sizes and modification times.
"""

import contextlib
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from lib.cache import file_state, first_process, prefetch, write_cached
from lib.errors import UserError
from lib.files import sha256_file
from lib.masks import find_masks, only_mask, subject_mask
from lib.photographs import Unusable, check_content, fetched_by, read_layers
from lib.texts import Names, alike, read_text, text_lines

READER = 2  # version of the code that reads images: another number invalidates everything cached of them
KEPT = "latents"  # the cache folder of a training set
FACT = [int, int, int, str]  # types of a `file_fact`


class Row(NamedTuple):
    """One image of a training set."""

    name: str
    caption: str
    path: Path
    sha256: str  # of the file's bytes


class Dataset:
    """The rows of a training set, and the size of each image in `sizes`: (width, height) in pixels, `resolution` twice
    or, if preprocess.py ran with --buckets, the image's own. `sha256` covers captions and pixels in row order."""

    def __init__(self, folder, rows, resolution, sizes):
        self.folder, self.rows, self.resolution, self.sizes = folder, rows, resolution, sizes
        self.sha256 = None

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def key(self, index):
        """The cache key of an image, independent of its name: its bytes, its size and how it is read."""
        return "{} {}x{} {}".format(self.rows[index].sha256, *self.sizes[index], READER)

    def notes(self):
        """Lines to print about images that are resized or cropped, if preprocess.py did not prepare them."""
        if prepared_as(self.folder)[0]:
            return []
        small = cut = 0
        for row, (width, height) in zip(self.rows, self.sizes, strict=True):
            with contextlib.suppress(Exception), Image.open(row.path) as image:
                small += image.width < width or image.height < height
                cut += image.width * height != image.height * width
        counts = [(small, "smaller and are enlarged"), (cut, "of another shape and are cropped")]
        size = self.resolution
        return [
            f"note: {self.folder}: of {len(self)} images {count} are {words} ({size}x{size} are trained on)"
            for count, words in counts
            if count
        ]

    def pixels(self, index):
        """An image as uint8 [3, height, width]."""
        return read_pixels(self.rows[index].path, self.sizes[index])

    def image(self, index):
        """The same as a PIL image."""
        return Image.fromarray(self.pixels(index).permute(1, 2, 0).numpy())

    @functools.cached_property
    def mask_names(self):
        """{folder: {image: [its masks]}} of the folders that hold images."""
        return {folder: find_masks(sorted(os.listdir(folder))) for folder in {row.path.parent for row in self}}

    def mask_path(self, index):
        """The path of an image's mask file, None if it has none. Raises UserError if it has several."""
        path = self.rows[index].path
        try:
            masks = self.mask_names[path.parent].get(path.name, [])
            return only_mask([path.with_name(name) for name in masks])
        except Unusable as reason:
            raise UserError(f"{path} cannot be used: {reason}") from None

    def has_mask(self, index):
        """Whether an image has a mask: a file, or its transparency."""
        if self.mask_path(index) is not None:
            return True
        path = self.rows[index].path
        return may_be_transparent(path) and read_layers_of(path)[1] is not None

    def mask(self, index, size):
        """An image's mask at `size` (width, height) as uint8 [height, width], 255 where the subject is; 255 everywhere if
        it has none. Raises UserError for a mask that marks nothing."""
        path, mask_path, mask = self.rows[index].path, self.mask_path(index), None
        if mask_path is not None or may_be_transparent(path):
            image, alpha = read_layers_of(path)
            try:
                mask, _ = subject_mask(mask_path, image, alpha)
            except Unusable as reason:
                raise UserError(f"{path} cannot be used: {reason}") from None
        if mask is None:
            return torch.full((size[1], size[0]), 255, dtype=torch.uint8)
        if mask.size != self.sizes[index]:
            mask = ImageOps.fit(mask, self.sizes[index], Image.Resampling.BILINEAR)
        if mask.getextrema()[1] == 0:
            raise UserError(f"{path} cannot be used: its mask marks nothing in the part that is trained on")
        return torch.from_numpy(np.array(mask.resize(size, Image.Resampling.BOX)))

    def masks_sha256(self):
        """SHA-256 over the masks, in the order of the rows."""
        hashes = [path and sha256_file(path) for path in map(self.mask_path, range(len(self)))]
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


class Images:
    """The PIL images of a Dataset as a lazy sequence."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data.image(index)


def read_dataset(data_dir, resolution, caption_from="text"):
    """The Dataset of `data_dir`/captions.jsonl and its images.

    Captions are under the key `caption_from` of each row. File names are relative to `data_dir` or, as in the published
    study's data, to its images/ folder. Images whose size and times have not changed since the last call are not read
    again. Raises UserError naming the line or image that is wrong.
    """
    data_dir = Path(data_dir)
    listing, known = read_listing(data_dir, caption_from), read_known(data_dir)
    facts = {name: file_fact(name, path, known["pictures"]) for name, _, path in listing}
    rows = [Row(name, caption, path, facts[name][3]) for name, caption, path in listing]
    data = Dataset(data_dir, rows, resolution, image_sizes(data_dir, rows, resolution))
    content = [[row.caption, data.key(index)] for index, row in enumerate(rows)]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    data.sha256 = known["data"].get(key) or data_hash(data)
    if first_process() and (facts != known["pictures"] or key not in known["data"]):
        recent = list((known["data"] | {key: data.sha256}).items())[-16:]
        record = json.dumps(dict(pictures=facts, data=dict(recent))).encode()
        write_cached(data_dir / KEPT / "pictures.json", lambda path: path.write_bytes(record))
    return data


def image_sizes(data_dir, rows, resolution):
    """[(width, height)] of the rows: from preprocess.py's manifest if it ran with --buckets, else squares.

    Raises UserError if it ran with another resolution. Squares may be reduced, but not enlarged.
    """
    prepared, sizes = prepared_as(data_dir)
    if prepared and not sizes and prepared < resolution:
        raise UserError(
            f"{data_dir}: its images were prepared for a resolution of {prepared} and would be enlarged to "
            f"{resolution}; run preprocess.py again with --resolution {resolution}, or add --resolution {prepared}"
        )
    if sizes and prepared != resolution:
        raise UserError(
            f"{data_dir}: its images were prepared with --buckets for a resolution of {prepared}, not {resolution}; "
            f"add --resolution {prepared}, or run preprocess.py again with --resolution {resolution}"
        )
    for name, size in sizes.items():
        if not (len(size) == 2 and all(isinstance(n, int) and n > 0 and n % 8 == 0 for n in size)):
            raise UserError(f"{data_dir / 'manifest.json'}: the size of {name} is no width and height in steps of 8")
    return [sizes.get(row.name, (resolution, resolution)) for row in rows]


def prepared_as(data_dir):
    """(resolution, {file name: (width, height)}) from preprocess.py's manifest.json, the dict empty unless it ran with
    --buckets; (None, {}) without a manifest."""
    try:
        manifest = json.loads((Path(data_dir) / "manifest.json").read_text(encoding="utf-8"))
        config, images = manifest["config"], manifest["pictures"]
        sizes = {image["file_name"]: tuple(image["size"]) for image in images if config["buckets"]}
        return int(config["resolution"]), sizes
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None, {}


def read_known(data_dir):
    """The cache latents/pictures.json: `pictures`, {name: its file_fact}, and `data`, {hash of rows and keys: SHA-256 of
    the training set}. Both are empty if it is missing or damaged."""
    try:
        record = json.loads((data_dir / KEPT / "pictures.json").read_text(encoding="utf-8"))
        facts = {name: fact for name, fact in record["pictures"].items() if [*map(type, fact)] == FACT}
        return dict(pictures=facts, data={k: v for k, v in record["data"].items() if type(v) is str})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return dict(pictures={}, data={})


def file_fact(name, path, known):
    """[*file_state, SHA-256] of an image. The hash is from `known` if the state is unchanged."""
    try:
        state = file_state(path)
        if (fact := known.get(name)) and fact[:3] == state:
            return fact
        return [*state, sha256_file(path)]
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem.strerror}") from None


def read_listing(data_dir, caption_from):
    """[(file name, caption, path)] of `data_dir`/captions.jsonl, with captions under the key `caption_from`. Raises
    UserError naming the line that is wrong."""
    listing = data_dir / "captions.jsonl"
    if not listing.is_file():
        raise UserError(f"{listing}: no such file; run python preprocess.py first")
    lines = text_lines(read_text(listing))
    rows, seen, folders = [], {}, {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{listing}, line {number}"
        try:
            row = json.loads(line)
            name, caption = row["file_name"], row["text"]
            caption = caption if caption_from == "text" else row.get(caption_from)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f'{where}: not of the form {{"file_name": …, "text": …}}') from None
        if caption is None and caption_from != "text":
            raise UserError(
                f"{where}: {name} has no {caption_from}; write one next to the image (data/README.md says "
                "how) and run preprocess.py again"
            )
        if not (isinstance(name, str) and isinstance(caption, str) and caption.strip()):
            raise UserError(f"{where}: file_name and {caption_from} must be strings, and {caption_from} not empty")
        try:
            caption.encode()  # fails for a lone surrogate, which JSON can hold
            path = find_file([data_dir / name, data_dir / "images" / name], folders)
        except (OSError, ValueError):  # too long, a zero byte, a lone surrogate
            raise UserError(f"{where}: file_name cannot be a file's, or {caption_from} is no text") from None
        if Path(name).is_absolute():
            raise UserError(f"{where}: {name} is an absolute path; name images from {data_dir}")
        if Path(os.path.normpath(name)).parts[:1] == ("..",):
            raise UserError(f"{where}: {name} lies outside {data_dir}")
        if path is None:
            raise UserError(f"{where}: there is no {name} in {data_dir} or {data_dir / 'images'}")
        if not path.is_file():
            raise UserError(f"{where}: {name} is a link to {os.readlink(path)}, which is not there{fetched_by(path)}")
        real = path.resolve()
        if real in seen:
            raise UserError(f"{where}: {name} was already named in line {seen[real]}")
        seen[real] = number
        rows.append((name, caption, path))
    if not rows:
        raise UserError(f"{listing} names no images; run python preprocess.py first")
    return rows


def find_file(places, folders):
    """The first of the paths `places` that is a file, else one whose name differs only in case or Unicode normalization,
    else a broken link, else None. `folders` caches the Names of each folder between calls."""
    if path := next((place for place in places if place.is_file()), None):
        return path
    for place in places:
        if place.name and place.parent.is_dir():
            if place.parent not in folders:
                folders[place.parent] = Names(os.listdir(place.parent))
            names = folders[place.parent].find(place.name)
            names = [name for name in names if alike(name) == alike(place.name)]
            if len(names) == 1 and place.with_name(names[0]).is_file():
                return place.with_name(names[0])
    return next((place for place in places if place.is_symlink() and not place.exists()), None)


def may_be_transparent(path):
    """Whether an image may have transparency, by its header."""
    with Image.open(path) as image:
        return image.has_transparency_data


def read_layers_of(path):
    """(RGB PIL image, its transparency or None), read as preprocess.py reads images. Raises UserError if it cannot be
    read or shows nothing."""
    try:
        image, alpha, _, _ = read_layers(path)
        check_content(image, alpha)
        return image, alpha
    except (Unusable, OSError) as reason:
        raise UserError(
            f"{path} cannot be read as an image: {reason}; repair it, or remove it from captions.jsonl"
        ) from None


def read_pixels(path, size):
    """An image as uint8 [3, height, width], resized and centre-cropped to `size` (width, height) if necessary."""
    image, _ = read_layers_of(path)
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def data_hash(data):
    """SHA-256 over captions and pixels, in the order of the rows."""
    digest = hashlib.sha256()
    for row, pixels in zip(data, prefetch(data.pixels, range(len(data))), strict=True):
        digest.update(row.caption.encode() + b"\0" + pixels.contiguous().numpy().tobytes())
    return digest.hexdigest()
