#!/usr/bin/env python3
"""Turn the images in data/ into a training set: processed_data/images/ and captions.jsonl.

    python preprocess.py                          # data/ -> processed_data/
    python preprocess.py --data-dir ~/photographs --caption "a red umbrella"

Images may also be HEIC files from phones; camera raw files are skipped and named. Each image is rotated as its EXIF
says, converted to sRGB, put on white where it is transparent, and resized and centre-cropped to a square (never
squashed). Unusable images are named with the reason. Of near-duplicates only the better one is kept. The output
also holds contact_sheet.jpg, to check the result at a glance (numbered pages if there are many images), and
manifest.json: for each image its source, the source's SHA-256 and what was done to it. An interrupted run resumes where
it stopped. Captions, images and masks that were changed by hand in processed_data/ are preserved.
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
    check_output_folder,
    fresh_folder,
    hidden_sibling,
    locked,
    real_folder,
    recover_folder,
    replace_folder,
    sha256_file,
    write_marker,
)
from lib.photographs import upright_shape
from lib.preparation.duplicates import inherit_captions, without_duplicates
from lib.preparation.edits import NO_EDIT, Edits, fitting_edits, read_edits
from lib.preparation.framing import CROPS, choose_sizes, nearest_size, write_contact_sheets
from lib.preparation.sources import image_names, read_captions
from lib.preparation.work import MASK, VIEW, prepare_images

CONFIG = dict(
    data_dir="data",  # images, directly in this folder; captions next to them, see data/README.md
    output_dir="processed_data",  # replaced as a whole, once the new one is complete
    caption="a holographic raincoat",  # for every image without a caption of its own
    resolution=512,  # side of the square, pixels; Stable Diffusion v1.5 was trained at 512
    buckets=False,  # True: images keep their shape, in a few sizes of about that square's area
    crop="centre",  # centre, top or subject: which part of an image is kept
    max_megapixels=200,  # larger images are refused: a small file can hide gigabytes
    duplicate_bits=6,  # a duplicate: at most this many of the 64 bits of the perceptual hash differ, and
    duplicate_colour=12.0,  # thumbnails differ by at most this (mean of 0..255)
    processes=0,  # processes that prepare images; 0: one per core
    keep_edits=True,  # preserve manual edits in output_dir; False: discard them
    strict=False,  # True: any skipped or duplicate image is an error
)


def check_config(config):
    """Reject invalid values, and folders nested in one another."""
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
        raise UserError(f"output_dir {output_dir} and data_dir {data_dir} must not contain one another")
    check_output_folder(output_dir, "manifest.json")


def preprocess(config):
    """Write the training set of `data_dir` to `output_dir`. Returns its manifest, a dict."""
    data_dir, output_dir = Path(config["data_dir"]), Path(config["output_dir"])

    # Read the sources and what was changed by hand in the last output.
    names, masks, companions = image_names(data_dir)
    if companions:
        print(f"{data_dir}: {len(companions)} clips and records next to images are ignored ({first_of(companions)})")
    captions = read_captions(data_dir, names)
    edits = read_edits(output_dir) if config["keep_edits"] else Edits({}, set())

    # Prepare each image; the results wait in `parts`, where an interrupted run finds them again.
    settings = dict(max_megapixels=config["max_megapixels"], crop=config["crop"])
    sizes = image_sizes(data_dir, names, config["resolution"], config["buckets"])
    parts = hidden_sibling(output_dir, "parts")
    parts.mkdir(parents=True, exist_ok=True)
    images, skipped = prepare_images(data_dir, names, masks, sizes, parts, settings, config["processes"])

    # Drop duplicates and rows removed by hand.
    images, duplicates = without_duplicates(images, config["duplicate_bits"], config["duplicate_colour"])
    captions = inherit_captions(captions, duplicates)
    report_counts(len(names), images, skipped, duplicates, data_dir)
    if left_out := sorted({image["source"] for image in images} & edits.left_out):
        print(
            f"  left out   {len(left_out)} whose rows were removed from captions.jsonl ({first_of(left_out)}); "
            "--no-keep-edits brings them back"
        )
    images = [image for image in images if image["source"] not in left_out]
    if not images:
        shutil.rmtree(parts)
        raise UserError(f"{data_dir}: no usable image in it; put JPEG, PNG, WebP or HEIC files there")
    if config["strict"] and (skipped or duplicates):
        shutil.rmtree(parts)
        raise UserError(
            f"--strict: {len(skipped)} skipped and {len(duplicates)} duplicate images, named above; nothing was written"
        )
    changes, notes = fitting_edits(edits, images)
    for note in notes:
        print(f"  by hand    {note}")

    # Write the new output and put it in the place of the last one.
    new = fresh_folder(output_dir)
    views = [parts / f"{image['key']}{VIEW}" for image in images]
    sheet = write_contact_sheets(new, views, [image["source"] for image in images])
    records = write_images(new, parts, images, captions, config["caption"], changes)
    recorded = {key: config[key] for key in "caption duplicate_bits duplicate_colour resolution buckets".split()}
    manifest = dict(
        config=recorded | settings,
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
        f"{output_dir}: {len(images)} images of {count_sizes(images)}; {len(images) - own} with the "
        f"caption “{config['caption']}”, {own} with their own, {described} with a description. "
        f"Look at {output_dir / sheet}"
    )
    return manifest


def first_of(names):
    return f"{names[0]}{', …' if names[1:] else ''}"


def image_sizes(data_dir, names, resolution, buckets):
    """The size [width, height] of each image of `names`: the square or, with `buckets`, one of a few chosen sizes."""
    square = [resolution, resolution]
    if not buckets:
        return [square] * len(names)
    shapes = list(prefetch(lambda name: upright_shape(data_dir / name), names))
    known = [shape for shape in shapes if shape]
    sizes, merged = choose_sizes(known, resolution) if known else ([], {})
    for (width, height), count in sorted(merged.items()):
        print(f"buckets: too few images ({count}) are nearest to {width}x{height}; they go into the next size")
    return [list(nearest_size(shape, sizes)) if shape else square for shape in shapes]  # None: not an image


def count_sizes(images):
    """The number of images of each size, in words."""
    count = Counter("{}x{}".format(*image["size"]) for image in images)
    if len(count) == 1:
        return next(iter(count))
    return ", ".join(f"{size} ({number})" for size, number in count.most_common())


def write_images(folder, parts, images, captions, caption, edits):
    """Write images/ and captions.jsonl into `folder`, moving the images from `parts`. Returns the manifest's record of
    each image.

    `captions` is from `read_captions`, `caption` the text of images without one, `edits` from `fitting_edits`.
    """
    (folder / "images").mkdir()
    digits = max(2, len(str(len(images))))
    rows, records = [], []
    for number, image in enumerate(images, 1):
        file_name = f"images/image_{number:0{digits}}.png"
        edit, files = edits.get(image["source"], NO_EDIT), {}
        for ending in {**image["files"], **edit.files}:
            goal = (folder / file_name).with_suffix(ending)
            if ending not in edit.files:
                (parts / f"{image['key']}{ending}").rename(goal)
                files[ending] = image["files"][ending]
            elif edit.files[ending] is not None:
                shutil.copyfile(edit.files[ending], goal)
                files[ending] = sha256_file(goal)
        own = captions[image["source"]]
        text, caption_from = own.get("text", (caption, "CONFIG"))
        if edit.words.get("text"):
            text, caption_from = edit.words["text"], "a change by hand"
        row = dict(file_name=file_name, text=text)
        if own:  # the image's own text serves as its description if it has none
            row["description"] = own.get("description", own.get("text"))[0]
        row = {key: words for key, words in (row | edit.words).items() if words is not None}
        rows.append(json.dumps(row, ensure_ascii=False))
        record = {key: image[key] for key in "source sha256 format mode width height size done".split()}
        record |= dict(files=files, edited=edit.words, edited_files=sorted(edit.files))
        records.append(row | dict(caption_from=caption_from) | record)
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return records


def report_counts(read, images, skipped, duplicates, data_dir):
    """Print how many files were read and images kept, and why the numbers differ."""
    print(
        f"{data_dir}: {read} files, {read - len(skipped)} images read, "
        f"{len(skipped)} skipped, {len(duplicates)} duplicates, {len(images)} kept"
    )
    for row in skipped:
        print(f"  skipped    {row['source']}: {row['reason']}")
    for row in duplicates:
        bits = "" if row["reason"] == "the same file" else f" ({row['bits']} of 64 hash bits differ)"
        detail = "; ".join([bits, *row["notes"]])
        print(f"  duplicate  {row['source']}: {row['reason']} as {row['duplicate_of']}{detail}")
    for image in images:
        if image["enlarged"]:
            sizes = "{}x{} is enlarged to {}x{}".format(image["width"], image["height"], *image["size"])
            print(f"  warning    {image['source']}: {sizes} and will be soft")
        for action in image["done"]:
            if "ICC" in action:
                print(f"  warning    {image['source']}: {action}")
    masked = [image for image in images if MASK in image["files"]]
    if masked:
        clear = sum("masked by its transparency" in image["done"] for image in masked)
        print(
            f"  masks      {len(masked) - clear} next to images, {clear} of transparent images; "
            "train.py --mask-weight uses them"
        )
    if cut := sum(image["kept"] < 0.75 for image in images):
        print(
            f"  warning    {cut} images lose more than a quarter, pale in the contact sheet; "
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
