"""Text files and file names in the encodings and spellings of different systems."""

import codecs
import unicodedata
from pathlib import Path

from lib.errors import UserError

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path, what=""):
    """The content of a text file: UTF-8, or UTF-16 with a byte order mark.

    Raises UserError naming the file if it is neither; `what` precedes the name in the message.
    """
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-16" if content.startswith(UTF_16) else "utf-8-sig")
    except (UnicodeDecodeError, OSError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(f"{what}{path} cannot be read as UTF-8 text: {reason}") from None
    if "\0" in text:
        raise UserError(
            f"{what}{path} cannot be read as UTF-8 text: it holds zero bytes, as UTF-16 does; save it as UTF-8"
        )
    return text


def text_lines(text):
    """The lines of a text without their ends. (str.splitlines also splits at U+0085 and U+2028, which are valid within
    JSON strings and captions.)"""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def alike(name):
    """A key that is equal for file names that differ only in case or Unicode normalization."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def is_utf8(words):
    """Whether a string can be encoded as UTF-8. JSON and file names can hold lone surrogates, which cannot."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


class Names:
    """File names of one folder, looked up by their name or stem."""

    def __init__(self, names):
        self.same, self.alike = {}, {}
        for name in names:
            for key in dict.fromkeys((name, Path(name).stem)):
                self.same.setdefault(key, []).append(name)
                self.alike.setdefault(alike(key), []).append(name)

    def find(self, key):
        """A list of the names with exactly this name or stem, or else of those that differ only in case or Unicode
        normalization."""
        return self.same.get(key) or self.alike.get(alike(key), [])
