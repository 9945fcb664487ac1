"""What lies in a folder of source pictures: the pictures, and the captions that a person wrote."""

import json
import re
from pathlib import Path

from lib.errors import UserError
from lib.masks import find_masks

CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")
# Not pictures, and no one means them to be: neither read nor reported as skipped.
IGNORED = re.compile(r"\..*|thumbs\.db|desktop\.ini|(readme|licen[sc]e|copying)(\..*)?", re.I)
# What telephones lay beside a picture of the same name: the clip of a Live Photo, a record of edits.
COMPANIONS = (".aae", ".mov", ".mp4")


def picture_names(data_dir):
    """(names, masks, companions): of what may be a picture in `data_dir`, without captions, masks and hidden files;
    {picture: [its masks]}; and what a telephone lays beside its pictures."""
    names = sorted(path.name for path in data_dir.iterdir())
    apart = {Path(n).stem for n in names if not n.lower().endswith((".txt", *COMPANIONS))}
    companions = [n for n in names if n.lower().endswith(COMPANIONS) and Path(n).stem in apart]
    passed_over = set(companions)
    stems = {Path(name).stem for name in names if not name.endswith(".txt")}
    pictures = [
        name
        for name in names
        if not IGNORED.fullmatch(name)
        and name not in CAPTION_FILES
        and not (name.endswith(".txt") and Path(name).stem in stems)
        and name not in passed_over
    ]
    masks = find_masks(pictures)
    taken = {mask for some in masks.values() for mask in some}
    return [name for name in pictures if name not in taken], masks, companions


def read_captions(folder, names):
    """What a person wrote about the pictures: {picture name: {key: (words, file they came from)}}.

    The keys are `text`, in place of the fixed caption, and `description`, which an experiment trains on.
    `photo.txt` beside `photo.jpg` is a text, and comes before a row of captions.jsonl or metadata.jsonl
    (`file_name` and `text`, `description` or both). Raises UserError naming the file and line of a
    malformed row, of an empty caption, of a picture that is not there or that has two different ones.
    """
    captions = {name: {} for name in names}
    for source in CAPTION_FILES:
        if not (folder / source).is_file():
            continue
        for number, line in enumerate(read_text(folder / source).splitlines(), 1):
            where = f"{folder / source}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name = row["file_name"]
                given = {key: row[key] for key in ("text", "description") if key in row}
                if not given:
                    raise KeyError
            except (ValueError, KeyError, TypeError, RecursionError):
                form = '{"file_name": …, "text": …} ("description" beside or in place of "text")'
                raise UserError(f"{where}: not of the form {form}") from None
            if not isinstance(name, str) or name not in captions:
                raise UserError(f"{where}: there is no {name} in {folder}")
            for key, text in given.items():
                what = f"the {key} of {name}"
                if not isinstance(text, str) or not text.strip():
                    raise UserError(f"{where}: {what} is empty")
                if not is_text(text):
                    raise UserError(f"{where}: {what} holds half of a character")
                text = " ".join(text.split())
                if captions[name].setdefault(key, (text, source))[0] != text:
                    raise UserError(f"{where}: {what} differs from a second one; keep one")
    for name in names:
        beside = folder / f"{Path(name).stem}.txt"
        if beside.is_file() and beside.name != name:
            text = " ".join(read_text(beside).split())
            if not text:
                raise UserError(f"{beside} is empty; write a caption into it or delete it")
            captions[name]["text"] = (text, beside.name)
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
