"""A script's CONFIG and its command line."""

import argparse
import ast
import io
import os
import re
import sys
import tokenize
from pathlib import Path

from lib.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists every option)")


def parse_config(config, description, demo=None, argv=None):
    """CONFIG with the command line's overrides.

    Every key `some_key` is an option `--some-key VALUE`; booleans are `--some-key` and `--no-some-key`; tuples are
    comma-separated. With `demo` (a dict of a few of the same keys) there is also `--demo`, whose values yield to
    explicit options. `--help` takes its text from the comments in CONFIG; `description` is the docstring of the script.
    Raises UserError for an unknown option or a value of the wrong type.
    """
    spec = sys.modules["__main__"].__spec__  # of a module started with -m
    parser = _Parser(
        prog=f"-m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name,
        description=description,
        usage="python %(prog)s [--option VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    if demo is not None:
        listed = ", ".join(f"{key}={value!r}" for key, value in demo.items())
        parser.add_argument("--demo", action="store_true", help=f"use the embedded model: {listed}".replace("%", "%%"))
    comments = key_comments(_source(description))
    group, title = parser, None
    for key, value in config.items():
        heading, comment = comments.get(key, (None, ""))
        if heading != title:
            group, title = parser.add_argument_group(heading), heading
        option = "--" + key.replace("_", "-")
        shown = f"{comment} (default: {value!r})".strip().replace("%", "%%")
        if isinstance(value, bool):
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=shown)
        elif isinstance(value, (tuple, list)):
            group.add_argument(option, type=_tuple_of(type(value[0]) if value else str), help=shown, metavar="A,B,…")
        elif key == "resolution":
            group.add_argument(option, type=_resolution, help=shown, metavar="PIXELS")
        else:
            kind = str if value is None else type(value)
            group.add_argument(option, type=kind, help=shown, metavar=kind.__name__.upper())
    typed = vars(parser.parse_args(argv))
    swapped = demo if typed.pop("demo", False) else {}
    config = config | swapped | typed
    return config | {key: at_home(key, config[key]) for key in PATHS if key in config}


def _source(description):
    """The source of the module with this docstring, "" if there is none."""
    for module in list(sys.modules.values()):
        if description and getattr(module, "__doc__", None) is description and getattr(module, "__file__", None):
            return Path(module.__file__).read_text(encoding="utf-8")
    return ""


def key_comments(source):
    """{key: (heading, comment)} of a script's CONFIG = dict(...): the comments on the key's lines, joined, and the last
    comment on lines of its own before it, None if there is none."""
    comments, own_line = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ").replace("<- changed", "").strip()
            (comments if token.line[: token.start[1]].strip() else own_line)[token.start[0]] = text
    texts, heading = {}, None
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "CONFIG":
            before = node.lineno
            for key in getattr(node.value, "keywords", ()):
                above = [own_line[line] for line in range(before, key.lineno) if line in own_line]
                heading = " ".join(above).rstrip(".") or heading
                lines = range(key.lineno, key.end_lineno + 1)
                texts[key.arg] = heading, " ".join(comments[line] for line in lines if line in comments)
                before = key.end_lineno
    return texts


# Keys of the CONFIGs that may hold paths; score_dir two of them, with a comma.
PATHS = (
    "base_model",
    "clip_model",
    "data_dir",
    "lora_dir",
    "output_dir",
    "prompts",
    "protected_prompts",
    "score_dir",
    "second_lora_dir",
    "similarity_model",
    "work_dir",
)


def at_home(key, value):
    """A path with its leading “~” expanded, as no shell does it in CONFIG and in --key=~/folder.

    Raises UserError for an unknown home folder. Other values are returned unchanged.
    """
    if not isinstance(value, str):
        return value
    parts = value.split(",") if key == "score_dir" else [value]
    for place, part in enumerate(parts):
        if part.startswith("~") and not os.path.lexists(part):
            parts[place] = os.path.expanduser(part)
            if parts[place] == part:
                raise UserError(
                    f"{key} is {value}, but there is no home folder {part.split('/')[0]}; write ./{part} "
                    "for a folder with that name"
                )
    return ",".join(parts)


def _tuple_of(kind):
    def convert(text):
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())

    convert.__name__ = f"comma-separated {kind.__name__}"
    return convert


def _resolution(text):
    """The value as in CONFIG; an invalid one is returned unchanged, for check_resolution to refuse."""
    try:
        width, height = image_size(text.lower())
    except UserError:
        return text
    return width if width == height else f"{width}x{height}"


def check_range(config, key, low, high=float("inf")):
    """Raise UserError unless low <= config[key] <= high (NaN is never in range)."""
    if not low <= config[key] <= high:
        bound = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
        raise UserError(f"{key} is {config[key]}, but must be {bound}")


def image_size(resolution):
    """(width, height) in pixels of a resolution: a number, for a square, or the text "WIDTHxHEIGHT".

    Raises UserError for anything else.
    """
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", str(resolution))
    if not sides:
        raise UserError(f"resolution is {resolution}, but must be a number of pixels, or WIDTHxHEIGHT as in 512x768")
    return int(sides[1]), int(sides[2] or sides[1])


def check_resolution(config, step=8, least=8, square=True):
    """Raise UserError unless the sides of config["resolution"] are multiples of `step` from `least` to 4096 pixels and,
    if `square`, one number.

    A VAE turns blocks of 8x8 pixels into a latent; a base model with larger ones is checked by check_base_model.
    """
    resolution = config["resolution"]
    sides = image_size(resolution)
    if square and not isinstance(resolution, int):
        raise UserError(
            f"resolution is {resolution}, but must be one number here: images become squares, or keep their "
            "shapes (preprocess.py --buckets)"
        )
    for side in sides:
        if side % step:
            raise UserError(f"resolution is {resolution}, but must be a multiple of {step}")
        if not least <= side <= 4096:
            raise UserError(f"resolution is {resolution}, but must be from {least} to 4096")


def half_resolution(resolution):
    """About half of a resolution, in multiples of any VAE's block, as text."""
    halves = [max(16, side // 32 * 16) for side in image_size(resolution)]
    return "x".join(map(str, dict.fromkeys(halves)))
