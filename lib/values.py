"""The values that the keys of a CONFIG may have. Each script has a table, checked once at the start."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

from lib.errors import UserError


class Kind(NamedTuple):
    """A kind of value: in words, and as a predicate."""

    words: str
    holds: Callable
    may_be_none: bool = False


MOST = 10**9  # the bound of numbers without one


def whole(low, high=MOST):
    """Whole numbers from `low` to `high`."""
    words = f"a whole number {bounds(low, high)}"
    return Kind(words, lambda value: type(value) is int and low <= value <= high)


def number(low, high=MOST):
    """Numbers from `low` to `high`, never NaN."""
    words = f"a number {bounds(low, high)}"
    return Kind(words, lambda value: type(value) in (int, float) and low <= value <= high)


def bounds(low, high):
    return f"of at least {low}" if high == MOST else f"from {low} to {high}"


def is_text(value):
    """Whether a value is a text that UTF-8 can hold, not empty."""
    if not (isinstance(value, str) and value.strip() and "\0" not in value):
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in value)  # from a file name that is not UTF-8


def several(kind, least=0):
    """Tuples or lists of at least `least` values of a kind."""
    words = f"a tuple{f' of at least {least}' if least else ''}, each {kind.words}"
    example = '("text",)' if kind is TEXT else "(1,)"
    words += f"; a single one needs a comma: {example}" if least < 2 else ""

    def holds(value):
        return isinstance(value, (tuple, list)) and len(value) >= least and all(map(kind.holds, value))

    return Kind(words, holds)


def choice(*values):
    """One of these values."""
    return Kind(f"{', '.join(values[:-1])} or {values[-1]}", lambda value: value in values)


def or_none(kind):
    """None, or a value of a kind."""
    return Kind(f"None or {kind.words}", lambda value: value is None or kind.holds(value), True)


# Names that Windows reserves, with any extension.
DEVICES = {"con", "prn", "aux", "nul", *(f"{name}{n}" for name in ("com", "lpt") for n in range(10))}


def is_name(value):
    """Whether a text is a valid file name on any system and in A1111's prompts: <lora:NAME:1>."""
    if not is_text(value) or len(value.encode()) > 150 or any(c in '<>:"/\\|?*' for c in value):
        return False
    return (
        value.isprintable()
        and value == value.strip()
        and not value.startswith((".", "-"))
        and not value.endswith(".")
        and value.split(".")[0].strip().lower() not in DEVICES
    )


NAME = Kind("a plain folder name: on any system, and in A1111's <lora:NAME:1>", is_name)
TEXT = Kind("a text in UTF-8 that is not empty", is_text)
FLAG = Kind("True or False", lambda value: isinstance(value, bool))
SIZE = Kind("a resolution", lambda value: isinstance(value, (int, str)))  # see check_resolution


def check(config, table):
    """UserError naming the key unless `config` has exactly the keys of `table`, [(kind, "key key …")], with values of those
    kinds.

    The command line gives text for a key whose default is None. Where a number is meant, `config` gets the number.
    """
    kinds = {key: kind for kind, keys in table for key in keys.split()}
    for key in kinds:
        if key not in config:
            raise UserError(f"CONFIG has no {key}; add it")
    for key, value in config.items():
        if key not in kinds:
            raise UserError(f"CONFIG has {key}, which nothing reads; is it misspelled?")
        if kinds[key].may_be_none and not kinds[key].holds(value):
            config[key] = number_in(value)
        if not kinds[key].holds(config[key]):
            raise UserError(f"{key} is {value!r}, but must be {kinds[key].words}")


def number_in(text):
    """The number that a text spells, or the value itself."""
    for kind in (int, float):
        with contextlib.suppress(ValueError, TypeError):
            return kind(text) if isinstance(text, str) else text
    return text
