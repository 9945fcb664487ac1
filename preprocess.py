#!/usr/bin/env python3
"""Turn the pictures in data/ into a training set: processed_data/images/ and captions.jsonl.

    python preprocess.py                          # data/ -> processed_data/
    python preprocess.py --data-dir ~/photographs --caption "a red umbrella"

Each picture is rotated as its EXIF says, converted to sRGB, put on white where it is transparent,
and resized and centre-cropped to a square (never squashed). What cannot be used is named with its
reason; of near-duplicates the better one is kept. The output also holds contact_sheet.png, to look
at, and manifest.json: for each picture its source, the source's SHA-256 and what was done to it.
"""

import io
import json
import re
import warnings
from pathlib import Path

import imagehash
import numpy as np
import PIL
from PIL import Image, ImageCms, ImageOps
from tqdm import tqdm

from lib.captions import CAPTION_FILES, is_text, read_captions
from lib.config import check_range, parse_config
from lib.errors import UserError, disk_for, one_line, run_script
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

# By content, whatever the file's ending says.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Not pictures, and no one means them to be: neither read nor reported as skipped.
IGNORED = re.compile(r"\..*|thumbs\.db|desktop\.ini|(readme|licen[sc]e|copying)(\..*)?", re.I)
SRGB = ImageCms.createProfile("sRGB")


class Unusable(Exception):
    """Why one picture cannot be used."""


def read_picture(path, max_megapixels=CONFIG["max_megapixels"]):
    """One picture file as 8-bit sRGB, upright and opaque.

    Returns (image, info, done): an RGB PIL image; a dict of the source's format, mode, width and
    height; and a list of what was done beyond decoding. Raises Unusable with the reason.
    """
    if path.stat().st_size == 0:
        raise Unusable("empty file")
    Image.MAX_IMAGE_PIXELS = int(max_megapixels * 1e6)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
            info = dict(
                format=image.format, mode=image.mode, width=image.width, height=image.height
            )
            frames = getattr(image, "n_frames", 1)
            image.seek(0)
            image.load()
            # MPO is the JPEG of many cameras and telephones: a picture and its preview or depth map.
            animated = frames > 1 and image.format != "MPO"
            done = [f"first of {frames} frames"] if animated else []
            return to_srgb(image, done), info, done
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Unusable(f"more than {max_megapixels} megapixels") from None
    except PIL.UnidentifiedImageError:
        with path.open("rb") as file:
            kind = (
                "a PDF" if file.read(5) == b"%PDF-" else "not a picture, or one in another format"
            )
        raise Unusable(f"{kind} (read are {', '.join(FORMATS)})") from None
    # A decoder may raise almost anything on a damaged file; whatever it is, the picture is skipped
    # and named, and the others go on.
    except Exception as problem:
        raise Unusable(f"damaged or truncated ({one_line(problem, 100)})") from None


def to_srgb(image, done):
    """An opaque 8-bit sRGB copy of a decoded picture; appends what was done to the list `done`."""
    orientation = image.getexif().get(0x0112, 1)
    profile = image.info.get("icc_profile")
    if orientation in range(2, 9):
        image = ImageOps.exif_transpose(image)
        done.append("rotated as its EXIF says")
    if image.mode.startswith(("I", "F")):
        # 16-bit greys; Pillow keeps 32-bit and float TIFFs as they are, whose white is unknown.
        levels = np.asarray(image).astype(np.float64)
        white = (
            65535.0 if image.mode.startswith("I") and levels.max() > 255 else max(levels.max(), 1)
        )
        image = Image.fromarray(np.clip(levels / white * 255 + 0.5, 0, 255).astype(np.uint8))
        done.append("16 or more bits reduced to 8")
        profile = None  # it describes values that are gone
    alpha = None
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    elif image.mode not in ("RGB", "CMYK", "L", "LAB"):
        image = image.convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            description = ImageCms.getProfileDescription(source).strip()
            image = ImageCms.profileToProfile(image, source, SRGB, outputMode="RGB")
            if not description.startswith("sRGB"):
                done.append(f"colours converted from «{description}» to sRGB")
        except (ImageCms.PyCMSError, OSError) as problem:
            done.append(f"its ICC profile was ignored ({str(problem)[:60]})")
    image = image.convert("RGB")
    if alpha is not None and alpha.getextrema()[0] < 255:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
        done.append("put on white")
    return image


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
    names = picture_names(data_dir)
    captions = read_captions(data_dir, names)
    pictures, skipped = read_pictures(data_dir, names, resolution, max_megapixels)
    kept, duplicates = without_duplicates(pictures, data_dir, duplicate_bits, duplicate_colour)
    report_counts(len(names), kept, skipped, duplicates, data_dir, resolution)
    if not kept:
        raise UserError(
            f"{data_dir}: no usable picture in it; put JPEG, PNG, WebP or AVIF files there"
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
    described = sum("description" in record for record in records)
    print(
        f"{output_dir}: {len(kept)} pictures of {resolution}x{resolution}; {len(kept) - own} with the "
        f"caption «{caption}», {own} with their own, {described} with a description. "
        f"Look at {output_dir / 'contact_sheet.png'}"
    )
    return manifest


def picture_names(data_dir):
    """The sorted names of what may be a picture in `data_dir`: no captions, no hidden files."""
    names = sorted(path.name for path in data_dir.iterdir())
    stems = {Path(name).stem for name in names if not name.endswith(".txt")}
    return [
        name
        for name in names
        if not IGNORED.fullmatch(name)
        and name not in CAPTION_FILES
        and not (name.endswith(".txt") and Path(name).stem in stems)
    ]


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

    `captions` is what `read_captions` gives, `caption` the text of every picture without one.
    """
    (folder / "images").mkdir()
    digits = max(2, len(str(len(pictures))))
    rows, records = [], []
    for number, picture in enumerate(
        tqdm(pictures, desc="writing", unit="picture", leave=False), 1
    ):
        file_name = f"images/image_{number:0{digits}}.png"
        picture["image"].save(folder / file_name)
        own = captions[picture["source"]]
        text, caption_from = own.get("text", (caption, "CONFIG"))
        row = dict(file_name=file_name, text=text)
        if own:  # without a description the picture's own text is one
            row["description"] = own.get("description", own.get("text"))[0]
        rows.append(json.dumps(row, ensure_ascii=False))
        record = {k: picture[k] for k in "source sha256 format mode width height done".split()}
        records.append(row | dict(caption_from=caption_from) | record)
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
