"""The training set as preprocess.py wrote it: captions.jsonl and its pictures."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from lib.errors import UserError, one_line


def read_dataset(data_dir, resolution, caption_from="text"):
    """The rows of `data_dir`/captions.jsonl and their pictures.

    Returns [(file name, caption, pixels)], pixels uint8 [3, resolution, resolution]; the caption is what
    the row has under `caption_from`. File names are relative to `data_dir` or, as in the published
    study's data, to its images/ folder. Raises UserError naming the line or the picture that is wrong.
    """
    data_dir = Path(data_dir)
    listing = data_dir / "captions.jsonl"
    if not listing.is_file():
        raise UserError(f"{listing}: no such file; run python preprocess.py first")
    try:
        lines = listing.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"{listing} cannot be read as UTF-8 text: {problem}") from None
    rows, seen = [], {}
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
        if data_dir.resolve() not in path.resolve().parents:
            raise UserError(f"{where}: {name} lies outside {data_dir}")
        if path.resolve() in seen:
            raise UserError(f"{where}: {name} was already named in line {seen[path.resolve()]}")
        seen[path.resolve()] = number
        rows.append((name, caption, read_pixels(path, resolution)))
    if not rows:
        raise UserError(f"{listing} names no pictures; run python preprocess.py first")
    return rows


def read_pixels(path, resolution):
    """A picture as uint8 [3, resolution, resolution], resized and centre-cropped if need be."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "TIFF")) as image:
            image = image.convert("RGB")
    # A decoder may raise almost anything on a damaged file.
    except Exception as problem:
        reason = one_line(problem, 100)
        raise UserError(
            f"{path} cannot be read as a picture: {reason}; run preprocess.py"
        ) from None
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def data_hash(rows):
    """SHA-256 over captions and pixels, in the order of the rows."""
    digest = hashlib.sha256()
    for _, caption, pixels in rows:
        digest.update(caption.encode() + b"\0" + pixels.contiguous().numpy().tobytes())
    return digest.hexdigest()
