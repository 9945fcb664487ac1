"""The source folder: which files are images, and the captions that a person wrote for them."""

import csv
import io
import json
import re
from pathlib import Path

from lib.errors import UserError
from lib.masks import find_masks
from lib.texts import Names, alike, is_utf8, read_text, text_lines

LISTINGS = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
CAPTION_ENDINGS = (".txt", ".caption")  # of a file next to its image: photo.txt or photo.jpg.txt
# Accepted names of the columns of a listing; the first is this project's.
FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_file", "path")
TEXT_COLUMNS = ("text", "caption", "prompt")
# Obviously not training images: neither read nor reported as skipped.
IGNORED = re.compile(r"\..*|thumbs\.db|desktop\.ini|(readme|licen[sc]e|copying)(\.(md|txt|rst|html?|pdf))?", re.I)
# Written by phones next to an image of the same name: the clip of a Live Photo, a record of edits.
COMPANIONS = (".aae", ".mov", ".mp4")


def image_names(data_dir):
    """(names, masks, companions): the files in `data_dir` that may be images, without captions, masks and hidden
    files; {image: [its masks]}; and the clips and records of a phone next to its images."""
    names = sorted(path.name for path in data_dir.iterdir())
    names = [name for name in names if not IGNORED.fullmatch(name) and alike(name) not in LISTINGS]
    clips = [name for name in names if name.lower().endswith(COMPANIONS)]
    captions = [name for name in names if name.lower().endswith(CAPTION_ENDINGS)]
    images = Names(name for name in names if name not in {*clips, *captions})
    companions = [name for name in clips if images.find(Path(name).stem)]
    ignored = {*companions, *(name for name in captions if images.find(Path(name).stem))}
    names = [name for name in names if name not in ignored]
    masks = find_masks(names)
    mask_names = {mask for masks_of_image in masks.values() for mask in masks_of_image}
    return [name for name in names if name not in mask_names], masks, companions


def read_captions(folder, names):
    """The captions in `folder` for the images `names`: {image name: {key: (words, file they came from)}}.

    The keys are `text`, which replaces the fixed caption, and `description`, which an experiment trains on. A file
    with one of CAPTION_ENDINGS next to an image is its `text` and takes precedence over the LISTINGS, whose rows hold
    an image's name and `text`, `description` or both. Several lines are joined, which is printed. Raises UserError
    naming the file and line of a malformed row, an empty caption, a missing image, or a second, different caption.
    """
    captions, known = {name: {} for name in names}, Names(names)
    files = sorted(path.name for path in folder.iterdir())
    for source in [name for name in files if alike(name) in LISTINGS]:
        for where, file_name, texts in listing_rows(folder / source):
            key_name = file_name.removeprefix("./")
            # A listing names a whole file; Names also finds others of the same stem.
            images = [name for name in known.find(key_name) if alike(name) == alike(key_name)]
            if len(images) != 1:
                raise UserError(f"{where}: there is no {file_name} in {folder}")
            for key, text in texts.items():
                what = f"the {key} of {images[0]}"
                if not isinstance(text, str) or not text.strip():
                    raise UserError(f"{where}: {what} is empty")
                if not is_utf8(text):
                    raise UserError(f"{where}: {what} holds half of a character")
                text = " ".join(text.split())
                if captions[images[0]].setdefault(key, (text, source))[0] != text:
                    raise UserError(f"{where}: {what} differs from a second one; keep one")
    joined = []
    for source in [name for name in files if name.lower().endswith(CAPTION_ENDINGS)]:
        images = [name for name in known.find(Path(source).stem) if name != source]
        if not images:
            continue
        text = read_text(folder / source)
        if sum(bool(line.strip()) for line in text_lines(text)) > 1:
            joined.append(source)
        text = " ".join(text.split())
        if not text:
            raise UserError(f"{folder / source} is empty; write a caption into it or delete it")
        for name in images:
            before = captions[name].get("text", (text, None))
            if before[0] != text and before[1].lower().endswith(CAPTION_ENDINGS):
                raise UserError(f"{folder / source}: the text of {name} differs from that in {before[1]}; keep one")
            captions[name]["text"] = (text, source)
    if joined:
        more = ", …" if joined[1:] else ""
        print(f"{folder}: {len(joined)} captions have several lines, which are joined ({joined[0]}{more})")
    return captions


def listing_rows(path):
    """Yield (where, image's name, {key: text}) of each row of a listing. Raises UserError naming a malformed line."""
    rows = csv_rows(path) if path.suffix.lower() == ".csv" else json_rows(path)
    for where, row in rows:
        name = next((row[column] for column in FILE_COLUMNS if column in row), None)
        text = next((row[column] for column in TEXT_COLUMNS if column in row), None)
        texts = dict(text=text, description=row.get("description"))
        texts = {key: text for key, text in texts.items() if key in row or text is not None}
        if not isinstance(name, str) or not texts:
            form = '{"file_name": …, "text": …} ("description" in addition to or instead of "text")'
            raise UserError(f"{where}: not of the form {form}")
        yield where, name, texts


def json_rows(path):
    """Yield (where, row) of each line of a JSON Lines file; a row is {} if it is not an object."""
    for number, line in enumerate(text_lines(read_text(path)), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield f"{path}, line {number}", row if isinstance(row, dict) else {}


def csv_rows(path):
    """Yield (where, row) of each row of a table whose first line names the columns. Columns are separated by commas,
    semicolons or tabs; empty cells are omitted."""
    text = read_text(path)
    head = text_lines(text)[0]
    for separator in ",;\t":
        columns = [column.strip().strip('"').strip().lower() for column in head.split(separator)]
        if {*FILE_COLUMNS} & {*columns} and {*TEXT_COLUMNS, "description"} & {*columns}:
            break
    else:
        raise UserError(
            f"{path}: its first line names no columns {FILE_COLUMNS[0]} and {TEXT_COLUMNS[0]} (or description)"
        )
    reader = csv.reader(io.StringIO(text), delimiter=separator)
    try:
        next(reader)
        for row in reader:
            filled = {key: value for key, value in zip(columns, row, strict=False) if value.strip()}
            if filled:
                yield f"{path}, line {reader.line_num}", filled
    except csv.Error as problem:
        raise UserError(f"{path}, line {reader.line_num}: {problem}") from None
