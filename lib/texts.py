"""Text files and file names as people and other systems write them."""

import codecs
import unicodedata
from pathlib import Path

from lib.errors import UserError

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path, what=""):
    """A text file's content: UTF-8, or UTF-16 with its mark. UserError naming the file, `what` it is before it, if it
    is neither."""
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
    """The lines of a text, without their ends. Python's splitlines ends them at signs (U+0085, U+2028) that JSON and
    captions hold."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def alike(name):
    """A file's name as different systems spell the same one: composed, without a difference of case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


class Names:
    """File names of one folder, found by a name or by what stands before its ending."""

    def __init__(self, names):
        self.same, self.alike = {}, {}
        for name in names:
            for spelt in dict.fromkeys((name, Path(name).stem)):
                self.same.setdefault(spelt, []).append(name)
                self.alike.setdefault(alike(spelt), []).append(name)

    def find(self, spelt):
        """The names that are spelt so, or else those that are but for case and Unicode's forms: a list."""
        return self.same.get(spelt) or self.alike.get(alike(spelt), [])
