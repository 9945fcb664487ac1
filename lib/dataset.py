"""The training set as preprocess.py wrote it: captions.jsonl and its pictures.

Pictures are read when they are needed, so that their number costs no memory. What is known of them by their
names, sizes and times of change is kept in latents/pictures.json beside them.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from lib.errors import UserError, one_line
from lib.files import sha256_file
from lib.kept import ahead, first_process, keep

KEPT = "latents"  # the folder in the training set where what was computed of it is kept


class Row(NamedTuple):
    """One picture of a training set."""

    name: str
    caption: str
    path: Path
    sha256: str  # of the file's bytes


class Dataset:
    """The rows of a training set and each picture's size in `sizes`, (width, height) in pixels: that of `resolution` or,
    where preprocess.py was told to keep their shapes, its own. `sha256` is over captions and pixels, in the order of
    the rows."""

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
        """By what a picture is known, whatever it is called: its bytes and its size."""
        return "{} {}x{}".format(self.rows[index].sha256, *self.sizes[index])

    def pixels(self, index):
        """A picture as uint8 [3, height, width]."""
        return read_pixels(self.rows[index].path, self.sizes[index])

    def image(self, index):
        """The same as a PIL picture."""
        return Image.fromarray(self.pixels(index).permute(1, 2, 0).numpy())

    def mask_path(self, index):
        """Where a picture's mask lies, if it has one."""
        return self.rows[index].path.with_suffix(".mask.png")

    def mask(self, index, size):
        """How much of the subject (0 to 255) each cell of a picture of `size` (width, height) shows, uint8 [height,
        width]; 255 everywhere for a picture without a mask."""
        path = self.mask_path(index)
        if not path.is_file():
            return torch.full((size[1], size[0]), 255, dtype=torch.uint8)
        mask = read_pixels(path, self.sizes[index])[0]
        return torch.from_numpy(
            np.array(Image.fromarray(mask.numpy()).resize(size, Image.Resampling.BOX))
        )

    def masks_sha256(self):
        """SHA-256 over the masks, in the order of the rows."""
        paths = map(self.mask_path, range(len(self)))
        found = [sha256_file(path) if path.is_file() else None for path in paths]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()


class Pictures:
    """The PIL pictures of a Dataset as a sequence that reads each when it is asked for."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data.image(index)


def read_dataset(data_dir, resolution, caption_from="text"):
    """The Dataset of `data_dir`/captions.jsonl and its pictures; see there for their sizes.

    A picture's caption is what its row has under `caption_from`. File names are relative to `data_dir` or, as in the
    published study's data, to its images/ folder. Raises UserError naming the line or the picture that is wrong.
    Pictures that were looked at before and have not changed since, by their size and time of change, are not read
    again.
    """
    data_dir = Path(data_dir)
    listing, known = read_listing(data_dir, caption_from), read_known(data_dir)
    facts = {name: file_fact(name, path, known["pictures"]) for name, _, path in listing}
    rows = [Row(name, caption, path, facts[name][2]) for name, caption, path in listing]
    data = Dataset(data_dir, rows, resolution, picture_sizes(data_dir, rows, resolution))
    made_of = [[row.caption, data.key(index)] for index, row in enumerate(rows)]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    data.sha256 = known["data"].get(key) or data_hash(data)
    if first_process() and (facts != known["pictures"] or key not in known["data"]):
        recent = list((known["data"] | {key: data.sha256}).items())[-16:]
        record = json.dumps(dict(pictures=facts, data=dict(recent))).encode()
        keep(data_dir / KEPT / "pictures.json", lambda path: path.write_bytes(record))
    return data


def picture_sizes(data_dir, rows, resolution):
    """[(width, height)] of the rows: what preprocess.py says of those whose shape it kept, else a square.

    UserError if it was told another resolution.
    """
    prepared, said = prepared_as(data_dir)
    if said and prepared != resolution:
        raise UserError(
            f"{data_dir}: its pictures were prepared with --buckets for a resolution of {prepared}, not {resolution}; "
            f"add --resolution {prepared}, or run preprocess.py again with --resolution {resolution}"
        )
    for name, size in said.items():
        if not (len(size) == 2 and all(isinstance(n, int) and n > 0 and n % 8 == 0 for n in size)):
            raise UserError(
                f"{data_dir / 'manifest.json'}: the size of {name} is no width and height in steps of 8"
            )
    return [said.get(row.name, (resolution, resolution)) for row in rows]


def prepared_as(data_dir):
    """(resolution, {file name: (width, height)} of the pictures whose shape was kept) as preprocess.py says in
    manifest.json; (None, {}) where there is none of its."""
    try:
        manifest = json.loads((Path(data_dir) / "manifest.json").read_text(encoding="utf-8"))
        config, pictures = manifest["config"], manifest["pictures"]
        sizes = {
            picture["file_name"]: tuple(picture["size"])
            for picture in pictures
            if config["buckets"]
        }
        return int(config["resolution"]), sizes
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None, {}


def read_known(data_dir):
    """What latents/pictures.json says: dicts of `pictures`, {name: [bytes, time of change, SHA-256]}, and `data`,
    {what a training set is made of: its SHA-256}; both empty where there is none or it is damaged."""
    try:
        record = json.loads((data_dir / KEPT / "pictures.json").read_text(encoding="utf-8"))
        if all(isinstance(record[key], dict) for key in ("pictures", "data")):
            return record
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return dict(pictures={}, data={})


def file_fact(name, path, known):
    """[bytes, time of change in ns, SHA-256] of a picture, the last as `known` where the others agree."""
    try:
        state = path.stat()
        if (fact := known.get(name)) and fact[:2] == [state.st_size, state.st_mtime_ns]:
            return fact
        return [state.st_size, state.st_mtime_ns, sha256_file(path)]
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem.strerror}") from None


def read_listing(data_dir, caption_from):
    """[(file name, caption, path)] of `data_dir`/captions.jsonl, the caption being what the row has under
    `caption_from`; UserError naming the line that is wrong."""
    listing = data_dir / "captions.jsonl"
    if not listing.is_file():
        raise UserError(f"{listing}: no such file; run python preprocess.py first")
    try:
        lines = listing.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"{listing} cannot be read as UTF-8 text: {problem}") from None
    rows, seen, inside = [], {}, data_dir.resolve()
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
                f"{where}: {name} has no {caption_from}; write one beside the picture (data/README.md says "
                "how) and run preprocess.py again"
            )
        if not (isinstance(name, str) and isinstance(caption, str) and caption.strip()):
            raise UserError(
                f"{where}: file_name and {caption_from} must be strings, and {caption_from} not empty"
            )
        try:
            caption.encode()  # JSON can spell half of a surrogate pair, which is no text
            places = (data_dir / name, data_dir / "images" / name)
            path = next((place for place in places if place.is_file()), None)
        except (OSError, ValueError):  # too long, a zero byte, half of a surrogate pair
            raise UserError(
                f"{where}: file_name cannot be a file's, or {caption_from} is no text"
            ) from None
        if Path(name).is_absolute():
            raise UserError(f"{where}: {name} is an absolute path; name pictures from {data_dir}")
        if path is None:
            raise UserError(f"{where}: there is no {name} in {data_dir} or {data_dir / 'images'}")
        real = path.resolve()
        if inside not in real.parents:
            raise UserError(f"{where}: {name} lies outside {data_dir}")
        if real in seen:
            raise UserError(f"{where}: {name} was already named in line {seen[real]}")
        seen[real] = number
        rows.append((name, caption, path))
    if not rows:
        raise UserError(f"{listing} names no pictures; run python preprocess.py first")
    return rows


def read_pixels(path, size):
    """A picture as uint8 [3, height, width], resized and centre-cropped to `size` (width, height) if need be."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "TIFF")) as image:
            image = image.convert("RGB")
    # A decoder may raise almost anything on a damaged file.
    except Exception as problem:
        reason = one_line(problem, 100)
        raise UserError(
            f"{path} cannot be read as a picture: {reason}; run preprocess.py"
        ) from None
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def data_hash(data):
    """SHA-256 over captions and pixels, in the order of the rows."""
    digest = hashlib.sha256()
    for row, pixels in zip(data, ahead(data.pixels, range(len(data))), strict=True):
        digest.update(row.caption.encode() + b"\0" + pixels.contiguous().numpy().tobytes())
    return digest.hexdigest()
