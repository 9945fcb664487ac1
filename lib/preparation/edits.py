"""What a person changed in a training set after preprocess.py wrote it, so that writing it again does not undo it.

The manifest says what was written: each image's caption and the SHA-256 of its files. What differs from it was
changed by hand. A change is known by the image's source, as the images' numbers may be others next time.
"""

import json
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lib.errors import UserError
from lib.files import sha256_file
from lib.texts import text_lines

UNDO = "or --no-keep-edits, which makes everything anew"


class Edit(NamedTuple):
    """What was changed of one image."""

    words: dict  # what its row of captions.jsonl has in place of what was written; None: nothing
    files: dict  # {ending: path of the file in place of the one that was written; None: removed}
    sha256: str  # of the source at that time
    size: tuple  # [width, height] that it was prepared at


NO_EDIT = Edit({}, {}, None, None)


class Edits(NamedTuple):
    """`of` is {source: Edit}; `left_out` are the sources whose rows were removed from captions.jsonl."""

    of: dict
    left_out: set


def read_edits(folder):
    """The Edits of a training set in `folder`, none if there is no whole one.

    UserError for what cannot be carried over: a malformed line, a row of an image, or a mask, that preprocess.py did
    not write.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        records = {record["file_name"]: record for record in manifest["pictures"]}
        known = {record["source"]: record["sha256"] for record in records.values()}
        left_out = set(manifest.get("left_out", []))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Edits({}, set())
    rows = read_rows(folder, records)
    found = {}
    for name, record in records.items():
        source, words, files = record["source"], dict(record.get("edited", {})), {}
        if rows is not None and name not in rows:
            left_out.add(source)
            continue
        if rows is not None:
            row = rows[name]
            written = {key: record[key] for key in ("text", "description") if key in record} | words
            keys = {*row, *written} - {"file_name"}
            words |= {key: row.get(key) for key in keys if row.get(key) != written.get(key)}
        written, again = record.get("files", {}), record.get("edited_files", [])
        for ending in {*written, *again}:
            path = (folder / name).with_suffix(ending)
            if not path.is_file():
                if ending != ".png":  # an image that was lost is made again
                    files[ending] = None
            elif ending in again or sha256_file(path) != written[ending]:
                files[ending] = path
        mask = (folder / name).with_suffix(".mask.png")
        if "files" in record and ".mask.png" not in {*written, *again} and mask.is_file():
            raise UserError(
                f"{mask} is not from preprocess.py, and the images' numbers may change; put it into the folder of "
                f"the sources, named after {source}, and remove it here"
            )
        if words or files:
            found[source] = Edit(words, files, known[source], record.get("size"))
    return Edits(found, left_out)


def read_rows(folder, records):
    """{file name: row} of a training set's captions.jsonl, None where there is none; UserError naming the line that is
    malformed or names an image that is not among `records`."""
    listing = folder / "captions.jsonl"
    if not listing.is_file():
        return None
    rows = {}
    try:
        lines = text_lines(listing.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(
            f"{listing} was changed and cannot be read as UTF-8 text ({problem}); mend it, {UNDO}"
        ) from None
    for number, line in enumerate(lines, 1):
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
            raise UserError(f'{where}: changed, but not of the form {{"file_name": …, "text": …}}; mend it, {UNDO}')
        if name not in records:
            raise UserError(
                f"{where}: {row['file_name']} is not from preprocess.py; put the image and its caption into the "
                f"folder of the sources, {UNDO}"
            )
        rows[name] = row
    return rows


def fitting_edits(edits, pictures):
    """({source: Edit} of the `images` that are to be written, words for a person: a list of lines). UserError naming
    a file that was changed by hand where its source or its size is another now."""
    kept, notes = {}, []
    sources = {picture["source"]: picture for picture in pictures}
    for source, edit in edits.of.items():
        if source not in sources:
            if edit.words.get("text"):
                notes.append(f"its caption goes with {source}: “{edit.words['text']}”")
            continue
        for path in filter(None, edit.files.values()):
            wanted = sources[source]
            if edit.sha256 != wanted["sha256"] or list(edit.size or ()) != list(wanted["size"]):
                raise UserError(
                    f"{path} was changed by hand, and its source {source} or the size has changed since: "
                    f"move it away, {UNDO}"
                )
            try:
                with Image.open(path) as image:
                    size = list(image.size)
            except Exception:  # whatever a decoder raises
                size = None
            if size != list(wanted["size"]):
                raise UserError(
                    f"{path} was changed by hand and is no image of {'x'.join(map(str, wanted['size']))} any more; "
                    f"mend it, {UNDO}"
                )
        kept[source] = edit
    words = sum(bool(edit.words) for edit in kept.values())
    files = sum(bool(edit.files) for edit in kept.values())
    if words or files:
        notes.insert(
            0,
            f"changed by hand and kept as changed: {words} captions, {files} images or masks "
            "(--no-keep-edits makes them anew)",
        )
    return kept, notes
