#!/usr/bin/env python3
"""Turn the pictures in data/ into a training set: processed_data/images/ and captions.jsonl.

    python preprocess.py                          # data/ -> processed_data/
    python preprocess.py --data-dir ~/photographs --caption "a red umbrella"

Telephones' HEIC pictures are read like others, cameras' raw files are named. Each picture is rotated
as its EXIF says, converted to sRGB, put on white where it is transparent, and resized and
centre-cropped to a square (never squashed). What cannot be used is named with its reason; of
near-duplicates the better one is kept. The output also holds contact_sheet.png, to look at, and
manifest.json: for each picture its source, the source's SHA-256 and what was done to it.
"""

import json
import re
from pathlib import Path

import imagehash
import numpy as np
import PIL
from PIL import Image, ImageOps
from tqdm import tqdm

from lib.config import check_range, parse_config
from lib.errors import UserError, disk_for, run_script
from lib.files import (
    check_output_folder,
    fresh_folder,
    locked,
    real_folder,
    recover_folder,
    replace_folder,
    sha256_file,
    write_marker,
)
from lib.photographs import Unusable, read_picture
from lib.pictures import contact_sheet

CONFIG = dict(
    data_dir="data",  # pictures, directly in this folder; captions beside them, see README
    output_dir="processed_data",  # replaced whole, once the new one is complete
    caption="a holographic raincoat",  # for every picture without a caption of its own
    resolution=512,  # side of the square, pixels; Stable Diffusion v1.5 was trained at 512
    max_megapixels=200,  # larger pictures are refused: a small file can hide gigabytes
    duplicate_bits=6,  # of the 64 bits of the perceptual hash: this many or fewer differ, and
    duplicate_colour=12.0,  # thumbnails differ by at most this (mean of 0..255): a duplicate
    strict=False,  # True: any skipped or duplicate picture is an error
)

CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")
# Not pictures, and no one means them to be: neither read nor reported as skipped.
IGNORED = re.compile(r"\..*|thumbs\.db|desktop\.ini|(readme|licen[sc]e|copying)(\..*)?", re.I)
# What telephones lay beside a picture of the same name: the clip of a Live Photo, a record of edits.
COMPANIONS = (".aae", ".mov", ".mp4")


def square(image, resolution):
    """The centre of a picture as a square of `resolution` pixels, its proportions unchanged."""
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)


def are_duplicates(one, other, bits=CONFIG["duplicate_bits"], colour=CONFIG["duplicate_colour"]):
    """Whether two fingerprints (see `fingerprint`) are of the same picture.

    The hash sees brightness only, and shops photograph one cut in many colours, so the colours of
    the thumbnails must agree too.
    """
    return (
        one["phash"] - other["phash"] <= bits
        and np.abs(one["thumbnail"] - other["thumbnail"]).mean() <= colour
    )


def fingerprint(image):
    """What near-duplicates share: the 64-bit DCT hash of imagehash, and a 16x16 thumbnail."""
    thumbnail = np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32)
    return dict(phash=imagehash.phash(image), thumbnail=thumbnail)


def read_captions(folder, names):
    """Captions that a person wrote: {picture name: (caption, file it came from)}.

    `photo.txt` beside `photo.jpg` comes before a row of captions.jsonl or metadata.jsonl
    (`file_name` and `text`). Raises UserError naming the file and line of a malformed row, of an
    empty caption, of a picture that is not there or one that has two different captions.
    """
    captions = {}
    for source in CAPTION_FILES:
        if not (folder / source).is_file():
            continue
        for number, line in enumerate(read_text(folder / source).splitlines(), 1):
            where = f"{folder / source}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, text = row["file_name"], row["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f'{where}: not of the form {{"file_name": …, "text": …}}') from None
            if name not in names:
                raise UserError(f"{where}: there is no {name} in {folder}")
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{where}: the caption of {name} is empty")
            text = " ".join(text.split())
            if not is_text(text):
                raise UserError(f"{where}: the caption of {name} holds half of a character")
            if captions.get(name, (text,))[0] != text:
                raise UserError(f"{where}: a second, different caption for {name}; keep one")
            captions[name] = (text, source)
    for name in names:
        beside = folder / f"{Path(name).stem}.txt"
        if beside.is_file() and beside.name != name:
            text = " ".join(read_text(beside).split())
            if not text:
                raise UserError(f"{beside} is empty; write a caption into it or delete it")
            captions[name] = (text, beside.name)
    return captions


def is_text(words):
    """Whether a string can be written as UTF-8: JSON and file names can hold what cannot."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_text(path):
    """A text file's content; UserError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as problem:
        raise UserError(f"{path} cannot be read as UTF-8 text: {problem}") from None


def check_config(config):
    """Refuse values that make no sense, and folders that would eat one another."""
    check_range(config, "resolution", 8, 4096)
    check_range(config, "max_megapixels", 1)
    check_range(config, "duplicate_bits", 0, 64)
    check_range(config, "duplicate_colour", 0, 255)
    if not config["caption"].strip():
        raise UserError("caption is empty; describe what the pictures show")
    data_dir, output_dir = Path(config["data_dir"]), Path(config["output_dir"])
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder; make it and put pictures in it")
    source, target = data_dir.resolve(), real_folder(output_dir)
    if source == target or source in target.parents or target in source.parents:
        raise UserError(f"output_dir {output_dir} and data_dir {data_dir} lie in one another")
    check_output_folder(output_dir, "manifest.json")


def preprocess(*, data_dir, output_dir, caption, resolution, max_megapixels, duplicate_bits,
               duplicate_colour, strict):  # fmt: skip
    """Write the training set of `data_dir` to `output_dir`; return the manifest (a dict)."""
    data_dir, output_dir = Path(data_dir), Path(output_dir)
    names, companions = picture_names(data_dir)
    if companions:
        print(f"{data_dir}: {len(companions)} clips and records beside pictures of the same name are passed "
              f"over ({companions[0]}{', …' if companions[1:] else ''})")  # fmt: skip
    captions = read_captions(data_dir, names)
    pictures, skipped = read_pictures(data_dir, names, resolution, max_megapixels)
    kept, duplicates = without_duplicates(pictures, data_dir, duplicate_bits, duplicate_colour)
    report_counts(len(names), kept, skipped, duplicates, data_dir, resolution)
    if not kept:
        raise UserError(
            f"{data_dir}: no usable picture in it; put JPEG, PNG, WebP or HEIC files there"
        )
    if strict and (skipped or duplicates):
        raise UserError(
            f"--strict: {len(skipped)} skipped and {len(duplicates)} duplicate pictures, named above; "
            "nothing was written"
        )

    new = fresh_folder(output_dir)
    records = write_pictures(new, kept, captions, caption)
    sheet = contact_sheet([p["image"] for p in kept], [p["source"] for p in kept])
    sheet.save(new / "contact_sheet.png")
    manifest = dict(
        config=dict(caption=caption, resolution=resolution, max_megapixels=max_megapixels,
                    duplicate_bits=duplicate_bits, duplicate_colour=duplicate_colour),
        pillow=PIL.__version__,
        pictures=records,
        skipped=skipped,
        duplicates=duplicates,
    )  # fmt: skip
    write_marker(new / "manifest.json", manifest)
    replace_folder(output_dir, "manifest.json")
    own = sum(record["caption_from"] != "CONFIG" for record in records)
    print(
        f"{output_dir}: {len(kept)} pictures of {resolution}x{resolution}; {len(kept) - own} with the "
        f"caption «{caption}», {own} with their own. Look at {output_dir / 'contact_sheet.png'}"
    )
    return manifest


def picture_names(data_dir):
    """(names, companions), sorted: of what may be a picture in `data_dir`, without captions and hidden
    files, and of what a telephone lays beside its pictures."""
    names = sorted(path.name for path in data_dir.iterdir())
    apart = {Path(n).stem for n in names if not n.lower().endswith((".txt", *COMPANIONS))}
    companions = [n for n in names if n.lower().endswith(COMPANIONS) and Path(n).stem in apart]
    stems = {Path(name).stem for name in names if not name.endswith(".txt")}
    pictures = [
        name
        for name in names
        if not IGNORED.fullmatch(name)
        and name not in CAPTION_FILES
        and not (name.endswith(".txt") and Path(name).stem in stems)
        and name not in companions
    ]
    return pictures, companions


def read_pictures(data_dir, names, resolution, max_megapixels):
    """(pictures, skipped): a dict for each file of `names`, its square `image` and what is known of it;
    and source and reason of each that cannot be used."""
    pictures, skipped = [], []
    for name in tqdm(names, desc="reading", unit="picture", leave=False):
        path = data_dir / name
        try:
            if not is_text(name):
                name = name.encode("utf-8", "replace").decode()
                raise Unusable("its name is not UTF-8; give it another")
            if not path.is_file():
                raise Unusable("a folder or special file; only files directly in it are read")
            image, info, done = read_picture(path, max_megapixels)
        except Unusable as reason:
            skipped.append(dict(source=name, reason=str(reason)))
            continue
        smaller = min(image.size)
        done.append(
            f"resized by {resolution / smaller:.3f} and cropped to {resolution}x{resolution}"
        )
        pictures.append(dict(
            source=name, sha256=sha256_file(path), **info, done=done, enlarged=smaller < resolution,
            pixels=image.width * image.height, image=square(image, resolution), **fingerprint(image),
        ))  # fmt: skip
    return pictures, skipped


def without_duplicates(pictures, data_dir, duplicate_bits, duplicate_colour):
    """(kept, duplicates), by their sources' names: of two that are nearly the same the better one is
    kept, which is the one with more pixels, then the larger file."""
    kept, duplicates = [], []
    by_quality = sorted(
        pictures,
        key=lambda p: (-p["pixels"], -(data_dir / p["source"]).stat().st_size, p["source"]),
    )
    for picture in by_quality:
        twins = (
            other
            for other in kept
            if are_duplicates(picture, other, duplicate_bits, duplicate_colour)
        )
        twin = next(twins, None)
        if twin is None:
            kept.append(picture)
        else:
            exact = picture["sha256"] == twin["sha256"]
            duplicates.append(dict(
                source=picture["source"], duplicate_of=twin["source"],
                reason="the same file" if exact else "nearly the same picture",
                bits=int(picture["phash"] - twin["phash"]),
            ))  # fmt: skip
    kept.sort(key=lambda picture: picture["source"])
    duplicates.sort(key=lambda row: row["source"])
    return kept, duplicates


def write_pictures(folder, pictures, captions, caption):
    """Write images/ and captions.jsonl into `folder`; return what the manifest says of each picture.

    `captions` is {source: (text, where it is from)}, `caption` the text of every other picture.
    """
    (folder / "images").mkdir()
    digits = max(2, len(str(len(pictures))))
    rows, records = [], []
    for number, picture in enumerate(
        tqdm(pictures, desc="writing", unit="picture", leave=False), 1
    ):
        file_name = f"images/image_{number:0{digits}}.png"
        picture["image"].save(folder / file_name)
        text, caption_from = captions.get(picture["source"], (caption, "CONFIG"))
        rows.append(json.dumps(dict(file_name=file_name, text=text), ensure_ascii=False))
        record = {k: picture[k] for k in "source sha256 format mode width height done".split()}
        records.append(dict(file_name=file_name, text=text, caption_from=caption_from) | record)
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return records


def report_counts(read, kept, skipped, duplicates, data_dir, resolution):
    """Print what went in, what comes out and why the two differ."""
    print(
        f"{data_dir}: {read} files, {read - len(skipped)} pictures read, "
        f"{len(skipped)} skipped, {len(duplicates)} duplicates, {len(kept)} kept"
    )
    for row in skipped:
        print(f"  skipped    {row['source']}: {row['reason']}")
    for row in duplicates:
        detail = (
            "" if row["reason"] == "the same file" else f" ({row['bits']} of 64 hash bits differ)"
        )
        print(f"  duplicate  {row['source']}: {row['reason']} as {row['duplicate_of']}{detail}")
    for picture in kept:
        if picture["enlarged"]:
            size = f"{picture['width']}x{picture['height']}"
            print(
                f"  warning    {picture['source']}: {size} is enlarged to {resolution} and will be soft"
            )
        for action in picture["done"]:
            if "ICC" in action:
                print(f"  warning    {picture['source']}: {action}")


def main():
    config = parse_config(CONFIG, __doc__)
    check_config(config)
    with disk_for(config["output_dir"]), locked(config["output_dir"]):
        recover_folder(config["output_dir"], "manifest.json")
        preprocess(**config)


if __name__ == "__main__":
    run_script(main)
