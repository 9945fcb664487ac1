"""A script's CONFIG and its command line."""

import argparse
import os
import re
import sys
from pathlib import Path

from lib.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python {self.prog} --help lists every option)")


def parse_config(config, description, demo=None, argv=None):
    """CONFIG with the command line's overrides.

    Every key `some_key` is an option `--some-key VALUE`; booleans are `--some-key` and
    `--no-some-key`; tuples are comma-separated. With `demo` (a dict of a few of the same keys)
    there is also `--demo`, which puts those values under the ones typed on the command line.
    Raises UserError for an unknown option or a value of the wrong type.
    """
    spec = sys.modules["__main__"].__spec__  # of a module that was started with -m
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
    for key, value in config.items():
        option = "--" + key.replace("_", "-")
        shown = f"default: {value!r}".replace("%", "%%")
        if isinstance(value, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, help=shown)
        elif isinstance(value, (tuple, list)):
            parser.add_argument(option, type=_tuple_of(type(value[0]) if value else str), help=shown, metavar="A,B,…")
        elif key == "resolution":
            parser.add_argument(option, type=_resolution, help=shown, metavar="PIXELS")
        else:
            kind = str if value is None else type(value)
            parser.add_argument(option, type=kind, help=shown, metavar=kind.__name__.upper())
    typed = vars(parser.parse_args(argv))
    swapped = demo if typed.pop("demo", False) else {}
    found = config | swapped | typed
    return found | {key: at_home(key, found[key]) for key in PATHS if key in found}


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
    "similarity_model",
    "work_dir",
)


def at_home(key, value):
    """A path with a “~” at its start as the home folder that it means, where no shell has seen to it: in CONFIG and
    in --key=~/folder. UserError if there is none; what is no path stays as it is."""
    if not isinstance(value, str):
        return value
    parts = value.split(",") if key == "score_dir" else [value]
    for place, part in enumerate(parts):
        if part.startswith("~") and not os.path.lexists(part):
            parts[place] = os.path.expanduser(part)
            if parts[place] == part:
                raise UserError(
                    f"{key} is {value}, but there is no home folder {part.split('/')[0]}; a folder of that very "
                    f"name is written ./{part}"
                )
    return ",".join(parts)


def _tuple_of(kind):
    def convert(text):
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())

    convert.__name__ = f"comma-separated {kind.__name__}"
    return convert


def _resolution(text):
    """As it stands in CONFIG; what is no resolution stays as it is, for check_resolution to refuse."""
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

    UserError for anything else.
    """
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", str(resolution))
    if not found:
        raise UserError(f"resolution is {resolution}, but must be a number of pixels, or WIDTHxHEIGHT as in 512x768")
    return int(found[1]), int(found[2] or found[1])


def check_resolution(config, step=8, least=8, square=True):
    """Raise UserError unless the sides of config["resolution"] are multiples of `step` from `least` to 4096
    pixels and, if `square`, one number.

    Blocks of 8x8 pixels are what a VAE makes a latent of; that of a base model with larger ones asks for more
    (check_base_model).
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
    """About half of a resolution, in whole blocks of any VAE, as text."""
    halves = [max(16, side // 32 * 16) for side in image_size(resolution)]
    return "x".join(map(str, dict.fromkeys(halves)))
