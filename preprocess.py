#!/usr/bin/env python3
"""Turn the images in data/ into a training set: processed_data/images/ and captions.jsonl.

    python preprocess.py                          # data/ -> processed_data/
    python preprocess.py --data-dir ~/photographs --caption "a red umbrella"

Telephones' HEIC images are read like others, cameras' raw files are named. Each image is rotated
as its EXIF says, converted to sRGB, put on white where it is transparent, and resized and
centre-cropped to a square (never squashed). What cannot be used is named with its reason; of
near-duplicates the better one is kept. The output also holds contact_sheet.jpg, to look at (of many
images in numbered pages), and manifest.json: for each image its source, the source's SHA-256 and
what was done to it. A run that was interrupted goes on where it stopped; captions, images and masks
that were changed in processed_data/ by hand stay as they were changed.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import PIL

from lib.cache import prefetch
from lib.config import check_range, check_resolution, parse_config
from lib.errors import UserError, disk_for, run_script
from lib.files import (
    beside,
    check_output_folder,
    fresh_folder,
    locked,
    real_folder,
    recover_folder,
    replace_folder,
    sha256_file,
    write_marker,
)
from lib.photographs import upright_shape
from lib.preparation.duplicates import with_those_of_duplicates, without_duplicates
from lib.preparation.edits import NO_EDIT, Edits, fitting_edits, read_edits
from lib.preparation.framing import CROPS, choose_sizes, nearest_size
from lib.preparation.sheets import write_sheets
from lib.preparation.sources import image_names, read_captions
from lib.preparation.work import MASK, VIEW, prepare_images

CONFIG = dict(
    data_dir="data",  # images, directly in this folder; captions beside them, see README
    output_dir="processed_data",  # replaced whole, once the new one is complete
    caption="a holographic raincoat",  # for every image without a caption of its own
    resolution=512,  # side of the square, pixels; Stable Diffusion v1.5 was trained at 512
    buckets=False,  # True: images keep their shape, in a few sizes of about that square's area
    crop="centre",  # centre, top or subject: where what does not fit is cut off
    max_megapixels=200,  # larger images are refused: a small file can hide gigabytes
    duplicate_bits=6,  # of the 64 bits of the perceptual hash: this many or fewer differ, and
    duplicate_colour=12.0,  # thumbnails differ by at most this (mean of 0..255): a duplicate
    processes=0,  # at work at once; 0: one a core
    keep_edits=True,  # what a person changed in output_dir; False: everything is made anew
    strict=False,  # True: any skipped or duplicate image is an error
)


def check_config(config):
    """Refuse values that make no sense, and folders that would eat one another."""
    check_resolution(config, step=1)
    if config["crop"] not in CROPS:
        raise UserError(f"crop is {config['crop']}, but must be one of {', '.join(CROPS)}")
    check_range(config, "max_megapixels", 1)
    check_range(config, "duplicate_bits", 0, 64)
    check_range(config, "duplicate_colour", 0, 255)
    check_range(config, "processes", 0, 1024)
    if not config["caption"].strip():
        raise UserError("caption is empty; describe what the images show")
    data_dir, output_dir = Path(config["data_dir"]), Path(config["output_dir"])
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder; make it and put images in it")
    source, target = data_dir.resolve(), real_folder(output_dir)
    if source == target or source in target.parents or target in source.parents:
        raise UserError(f"output_dir {output_dir} and data_dir {data_dir} lie in one another")
    check_output_folder(output_dir, "manifest.json")


def preprocess(config):
    """Write the training set of `data_dir` to `output_dir`; return the manifest (a dict)."""
    data_dir, output_dir = Path(config["data_dir"]), Path(config["output_dir"])
    names, masks, companions = image_names(data_dir)
    if companions:
        print(
            f"{data_dir}: {len(companions)} clips and records beside images of the same name are passed "
            f"over ({companions[0]}{', …' if companions[1:] else ''})"
        )
    captions = read_captions(data_dir, names)
    edits = read_edits(output_dir) if config["keep_edits"] else Edits({}, set())

    # Each image is made ready, and lies in `parts` until it is known which are kept.
    settings = dict(max_megapixels=config["max_megapixels"], crop=config["crop"])
    parts = beside(output_dir, "parts")
    parts.mkdir(parents=True, exist_ok=True)
    sizes = (
        image_sizes(data_dir, names, config["resolution"])
        if config["buckets"]
        else [[config["resolution"]] * 2] * len(names)
    )
    pictures, skipped = prepare_images(data_dir, names, masks, sizes, parts, settings, config["processes"])
    kept, duplicates = without_duplicates(pictures, config["duplicate_bits"], config["duplicate_colour"])
    captions = with_those_of_duplicates(captions, duplicates)
    report_counts(len(names), kept, skipped, duplicates, data_dir)
    if left_out := sorted({picture["source"] for picture in kept} & edits.left_out):
        print(
            f"  left out   {len(left_out)} whose rows were removed from captions.jsonl ({left_out[0]}"
            f"{', …' if left_out[1:] else ''}); --no-keep-edits brings them back"
        )
    kept = [picture for picture in kept if picture["source"] not in left_out]
    if not kept:
        shutil.rmtree(parts)
        raise UserError(f"{data_dir}: no usable image in it; put JPEG, PNG, WebP or HEIC files there")
    if config["strict"] and (skipped or duplicates):
        shutil.rmtree(parts)
        raise UserError(
            f"--strict: {len(skipped)} skipped and {len(duplicates)} duplicate images, named above; nothing was written"
        )
    changed, notes = fitting_edits(edits, kept)
    for note in notes:
        print(f"  by hand    {note}")

    new = fresh_folder(output_dir)
    views = [parts / f"{picture['key']}{VIEW}" for picture in kept]
    sheet = write_sheets(new, views, [picture["source"] for picture in kept])
    records = write_images(new, parts, kept, captions, config["caption"], changed)
    manifest = dict(
        config=dict(
            caption=config["caption"],
            duplicate_bits=config["duplicate_bits"],
            duplicate_colour=config["duplicate_colour"],
            resolution=config["resolution"],
            buckets=config["buckets"],
        )
        | settings,
        pillow=PIL.__version__,
        pictures=records,
        skipped=skipped,
        duplicates=duplicates,
        left_out=left_out,
    )
    write_marker(new / "manifest.json", manifest)
    replace_folder(output_dir, "manifest.json")
    shutil.rmtree(parts)
    own = sum(record["caption_from"] != "CONFIG" for record in records)
    described = sum("description" in record for record in records)
    print(
        f"{output_dir}: {len(kept)} images of {count_sizes(kept)}; {len(kept) - own} with the "
        f"caption “{config['caption']}”, {own} with their own, {described} with a description. "
        f"Look at {output_dir / sheet}"
    )
    return manifest


def image_sizes(data_dir, names, resolution):
    """The size [width, height] of each image of `names` in buckets; says which were given up."""
    shapes = list(prefetch(lambda name: upright_shape(data_dir / name), names))
    known = [shape for shape in shapes if shape]
    sizes, merged = choose_sizes(known, resolution) if known else ([], {})
    for (width, height), count in sorted(merged.items()):
        print(f"buckets: {count} images nearest to {width}x{height} go into the next size, as they are few")
    square = [resolution, resolution]  # of what turns out to be no image
    return [list(nearest_size(shape, sizes)) if shape else square for shape in shapes]


def count_sizes(pictures):
    """How many images there are of each size, in words."""
    count = Counter("{}x{}".format(*picture["size"]) for picture in pictures)
    if len(count) == 1:
        return next(iter(count))
    return ", ".join(f"{size} ({number})" for size, number in count.most_common())


def write_images(folder, parts, pictures, captions, caption, edits):
    """Write images/ and captions.jsonl into `folder`, the images moved from the folder `parts`; return what the
    manifest says of each image.

    `captions` is what `read_captions` gives, `caption` the text of every image without one, `edits` what
    `fitting_edits` gives.
    """
    (folder / "images").mkdir()
    digits = max(2, len(str(len(pictures))))
    rows, records = [], []
    for number, picture in enumerate(pictures, 1):
        file_name = f"images/image_{number:0{digits}}.png"
        edit, files = edits.get(picture["source"], NO_EDIT), {}
        for ending in {**picture["files"], **edit.files}:
            goal = (folder / file_name).with_suffix(ending)
            if ending not in edit.files:
                (parts / f"{picture['key']}{ending}").rename(goal)
                files[ending] = picture["files"][ending]
            elif edit.files[ending] is not None:
                shutil.copyfile(edit.files[ending], goal)
                files[ending] = sha256_file(goal)
        own = captions[picture["source"]]
        text, caption_from = own.get("text", (caption, "CONFIG"))
        if edit.words.get("text"):
            text, caption_from = edit.words["text"], "a change by hand"
        row = dict(file_name=file_name, text=text)
        if own:  # without a description the image's own text is one
            row["description"] = own.get("description", own.get("text"))[0]
        row = {key: words for key, words in (row | edit.words).items() if words is not None}
        rows.append(json.dumps(row, ensure_ascii=False))
        record = {k: picture[k] for k in "source sha256 format mode width height size done".split()}
        record |= dict(files=files, edited=edit.words, edited_files=sorted(edit.files))
        records.append(row | dict(caption_from=caption_from) | record)
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return records


def report_counts(read, kept, skipped, duplicates, data_dir):
    """Print what went in, what comes out and why the two differ."""
    print(
        f"{data_dir}: {read} files, {read - len(skipped)} images read, "
        f"{len(skipped)} skipped, {len(duplicates)} duplicates, {len(kept)} kept"
    )
    for row in skipped:
        print(f"  skipped    {row['source']}: {row['reason']}")
    for row in duplicates:
        detail = "" if row["reason"] == "the same file" else f" ({row['bits']} of 64 hash bits differ)"
        for words in row["notes"]:
            detail += f"; {words}"
        print(f"  duplicate  {row['source']}: {row['reason']} as {row['duplicate_of']}{detail}")
    for picture in kept:
        if picture["enlarged"]:
            print(
                "  warning    {}: {}x{} is enlarged to {}x{} and will be soft".format(
                    picture["source"], picture["width"], picture["height"], *picture["size"]
                )
            )
        for action in picture["done"]:
            if "ICC" in action:
                print(f"  warning    {picture['source']}: {action}")
    masked = [picture for picture in kept if MASK in picture["files"]]
    if masked:
        clear = sum("masked by its transparency" in picture["done"] for picture in masked)
        print(
            f"  masks      {len(masked) - clear} beside images, {clear} of transparent images; "
            "train.py --mask-weight uses them"
        )
    if cut := sum(picture["kept"] < 0.75 for picture in kept):
        print(
            f"  warning    {cut} images lose more than a quarter, which the contact sheet shows pale; "
            "--buckets keeps their shape, --crop subject what matters"
        )


def main():
    config = parse_config(CONFIG, __doc__)
    check_config(config)
    with disk_for(config["output_dir"]), locked(config["output_dir"]):
        recover_folder(config["output_dir"], "manifest.json")
        preprocess(config)


if __name__ == "__main__":
    run_script(main)
