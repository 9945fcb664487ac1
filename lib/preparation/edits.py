"""Manual changes to a training set, which the next run of preprocess.py preserves.

The manifest records what was written: each image's caption and the SHA-256 of its files. Any difference is a change.
It is stored under the image's source, as image numbers may change from run to run.
"""

import json
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lib.errors import UserError
from lib.files import sha256_file
from lib.texts import read_text, text_lines

UNDO = "or discard all edits with --no-keep-edits"


class Edit(NamedTuple):
    """The changes to one image."""

    words: dict  # {key of its row in captions.jsonl: its new value, None if it was removed}
    files: dict  # {ending: path of the changed file, None if it was removed}
    sha256: str  # of the source at that time
    size: tuple  # [width, height] that it was prepared at


NO_EDIT = Edit({}, {}, None, None)


class Edits(NamedTuple):
    """`of` is {source: Edit}; `left_out` are the sources whose rows were removed from captions.jsonl."""

    of: dict
    left_out: set


def read_edits(folder):
    """The Edits of the training set in `folder`; empty if there is no complete one.

    Raises UserError for a change that cannot be preserved: a malformed line, or an image or mask that preprocess.py
    did not write.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        records = {record["file_name"]: record for record in manifest["pictures"]}
        left_out, edits = set(manifest["left_out"]), {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Edits({}, set())
    rows = read_rows(folder, records)
    for name, record in records.items():
        if rows is not None and name not in rows:
            left_out.add(record["source"])
            continue
        words = changed_words(record, rows[name]) if rows is not None else record["edited"]
        files = changed_files(folder / name, record)
        if words or files:
            edits[record["source"]] = Edit(words, files, record["sha256"], record["size"])
    return Edits(edits, left_out)


def changed_words(record, row):
    """Edit.words of an image, from its record in the manifest and its row of captions.jsonl."""
    words = record["edited"]
    written = {key: record[key] for key in ("text", "description") if key in record} | words
    keys = {*row, *written} - {"file_name"}
    return words | {key: row.get(key) for key in keys if row.get(key) != written.get(key)}


def changed_files(image_path, record):
    """Edit.files of an image, from its record in the manifest."""
    written, changed_before = record["files"], record["edited_files"]
    files = {}
    for ending in {*written, *changed_before}:
        path = image_path.with_suffix(ending)
        if not path.is_file():
            if ending != ".png":  # a lost image is made again
                files[ending] = None
        elif ending in changed_before or sha256_file(path) != written[ending]:
            files[ending] = path
    mask = image_path.with_suffix(".mask.png")
    if ".mask.png" not in {*written, *changed_before} and mask.is_file():
        raise UserError(
            f"{mask} is not from preprocess.py, and image numbers may change; name it after {record['source']}, "
            "put it into the folder of the sources, and remove it here"
        )
    return files


def read_rows(folder, records):
    """{file name: row} of a training set's captions.jsonl, None if there is none. Raises UserError naming a line that
    is malformed or names an image that is not among `records`."""
    listing = folder / "captions.jsonl"
    if not listing.is_file():
        return None
    rows = {}
    for number, line in enumerate(text_lines(read_text(listing)), 1):
        if not line.strip():
            continue
        where = f"{listing}, line {number}"
        try:
            row = json.loads(line)
            name = row["file_name"] if row["file_name"] in records else f"images/{row['file_name']}"
            good = isinstance(row["text"], str) and row["text"].strip()
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            raise UserError(f'{where}: changed, but not of the form {{"file_name": …, "text": …}}; fix it, {UNDO}')
        if name not in records:
            raise UserError(
                f"{where}: {row['file_name']} is not from preprocess.py; put the image and its caption into the "
                f"folder of the sources, {UNDO}"
            )
        rows[name] = row
    return rows


def fitting_edits(edits, images):
    """({source: Edit} of the `images` to be written, notes to print: [str]). Raises UserError naming a changed file
    whose source or size has changed since."""
    fitting, notes = {}, []
    images = {image["source"]: image for image in images}
    for source, edit in edits.of.items():
        if source not in images:
            if edit.words.get("text"):
                notes.append(f"the caption of {source} is dropped with it: “{edit.words['text']}”")
            continue
        image = images[source]
        for path in filter(None, edit.files.values()):
            if edit.sha256 != image["sha256"] or list(edit.size) != list(image["size"]):
                raise UserError(
                    f"{path} was changed by hand, and its source {source} or the size has changed since: "
                    f"move it away, {UNDO}"
                )
            try:
                with Image.open(path) as opened:
                    size = list(opened.size)
            except Exception:  # decoders raise almost anything
                size = None
            if size != list(image["size"]):
                raise UserError(
                    f"{path} was changed by hand and is not an image of {'x'.join(map(str, image['size']))}; "
                    f"fix it, {UNDO}"
                )
        fitting[source] = edit
    words = sum(bool(edit.words) for edit in fitting.values())
    files = sum(bool(edit.files) for edit in fitting.values())
    if words or files:
        notes.insert(
            0, f"changes preserved in {words} captions, {files} images or masks (--no-keep-edits discards them)"
        )
    return fitting, notes
