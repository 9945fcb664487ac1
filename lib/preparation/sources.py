"""What lies in a folder of source images: the images, and the captions that a person wrote."""

import csv
import io
import json
import re
from pathlib import Path

from lib.errors import UserError
from lib.masks import find_masks
from lib.texts import Names, alike, read_text, text_lines

LISTINGS = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
CAPTION_ENDINGS = (".txt", ".caption")  # of a file beside its image: photo.txt or photo.jpg.txt
# What the columns of a listing are called, the first name ours.
FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_file", "path")
TEXT_COLUMNS = ("text", "caption", "prompt")
# Not images, and no one means them to be: neither read nor reported as skipped.
IGNORED = re.compile(r"\..*|thumbs\.db|desktop\.ini|(readme|licen[sc]e|copying)(\.(md|txt|rst|html?|pdf))?", re.I)
# What telephones lay beside an image of the same name: the clip of a Live Photo, a record of edits.
COMPANIONS = (".aae", ".mov", ".mp4")


def image_names(data_dir):
    """(names, masks, companions): of what may be an image in `data_dir`, without captions, masks and hidden files;
    {image: [its masks]}; and what a telephone lays beside its images."""
    names = sorted(path.name for path in data_dir.iterdir())
    named = [name for name in names if not IGNORED.fullmatch(name) and alike(name) not in LISTINGS]
    beside = [name for name in named if name.lower().endswith(COMPANIONS)]
    captions = [name for name in named if name.lower().endswith(CAPTION_ENDINGS)]
    pictures = Names(name for name in named if name not in {*beside, *captions})
    companions = [name for name in beside if pictures.find(Path(name).stem)]
    passed_over = {*companions, *(name for name in captions if pictures.find(Path(name).stem))}
    found = [name for name in named if name not in passed_over]
    masks = find_masks(found)
    taken = {mask for some in masks.values() for mask in some}
    return [name for name in found if name not in taken], masks, companions


def read_captions(folder, names):
    """What a person wrote about the images: {image name: {key: (words, file they came from)}}.

    The keys are `text`, in place of the fixed caption, and `description`, which an experiment trains on. A file of
    CAPTION_ENDINGS beside an image is a text, and comes before a row of one of the LISTINGS (an image's name and
    `text`, `description` or both). Lines become one; that is said. Raises UserError naming the file and line of a
    malformed row, of an empty caption, of an image that is not there or that has two different ones.
    """
    captions, known = {name: {} for name in names}, Names(names)
    files = sorted(path.name for path in folder.iterdir())
    for source in [name for name in files if alike(name) in LISTINGS]:
        for where, spelt, given in listed(folder / source):
            found = known.find(spelt.removeprefix("./"))
            # A listing names a file; what stands before its ending might be that of another.
            found = [name for name in found if alike(name) == alike(spelt.removeprefix("./"))]
            if len(found) != 1:
                raise UserError(f"{where}: there is no {spelt} in {folder}")
            for key, text in given.items():
                what = f"the {key} of {found[0]}"
                if not isinstance(text, str) or not text.strip():
                    raise UserError(f"{where}: {what} is empty")
                if not is_text(text):
                    raise UserError(f"{where}: {what} holds half of a character")
                text = " ".join(text.split())
                if captions[found[0]].setdefault(key, (text, source))[0] != text:
                    raise UserError(f"{where}: {what} differs from a second one; keep one")
    several = []
    for source in [name for name in files if name.lower().endswith(CAPTION_ENDINGS)]:
        pictures = [name for name in known.find(Path(source).stem) if name != source]
        if not pictures:
            continue
        text = read_text(folder / source)
        if sum(bool(line.strip()) for line in text_lines(text)) > 1:
            several.append(source)
        text = " ".join(text.split())
        if not text:
            raise UserError(f"{folder / source} is empty; write a caption into it or delete it")
        for name in pictures:
            before = captions[name].get("text", (text, None))
            if before[0] != text and before[1].lower().endswith(CAPTION_ENDINGS):
                raise UserError(f"{folder / source}: the text of {name} differs from that in {before[1]}; keep one")
            captions[name]["text"] = (text, source)
    if several:
        more = ", …" if several[1:] else ""
        print(f"{folder}: {len(several)} captions have several lines, which become one ({several[0]}{more})")
    return captions


def listed(path):
    """Yield (where, image's name, {key: words}) of each row of a listing, UserError naming the line that is
    malformed."""
    rows = csv_rows(path) if path.suffix.lower() == ".csv" else json_rows(path)
    for where, row in rows:
        name = next((row[column] for column in FILE_COLUMNS if column in row), None)
        texts = {"text": next((row[column] for column in TEXT_COLUMNS if column in row), None)}
        given = {
            k: v for k, v in (texts | {"description": row.get("description")}).items() if k in row or v is not None
        }
        if not isinstance(name, str) or not given:
            form = '{"file_name": …, "text": …} ("description" beside or in place of "text")'
            raise UserError(f"{where}: not of the form {form}")
        yield where, name, given


def json_rows(path):
    """Yield (where, row) of each line of a JSON Lines file."""
    for number, line in enumerate(text_lines(read_text(path)), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield f"{path}, line {number}", row if isinstance(row, dict) else {}


def csv_rows(path):
    """Yield (where, row) of each row of a table whose first line names the columns, separated by a comma, a semicolon
    or a tab; what is empty is left out."""
    text = read_text(path)
    head = text_lines(text)[0]
    wanted = {*FILE_COLUMNS}, {*TEXT_COLUMNS, "description"}
    for separator in ",;\t":
        columns = [column.strip().strip('"').strip().lower() for column in head.split(separator)]
        if all(some & {*columns} for some in wanted):
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


def is_text(words):
    """Whether a string can be written as UTF-8: JSON and file names can hold what cannot."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True
