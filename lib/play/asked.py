"""What a page asks for: images of one prompt, by the base model and by one or two adapters."""

import json
import re
from dataclasses import dataclass

from lib.errors import UserError

# What a page may ask for, and play.py's options.
MOST_SEEDS = 8
MOST_STEPS = 150
MOST_GUIDANCE = 30
MOST_SCALE = 10  # as in inference.py
MOST_PROMPT = 5000  # characters


@dataclass(frozen=True)
class Asked:
    """One request. `columns` are the models side by side: (name of an adapter, its scale), the base model first as
    (None, 0)."""

    prompt: str
    seeds: tuple
    steps: int
    guidance_scale: float
    columns: tuple


def read_request(body):
    """The Asked of a request's JSON, bytes. Raises UserError, a sentence for the page, for a value that is missing or
    cannot be used."""
    try:
        fields = json.loads(body)
        prompt, adapter, second = fields["prompt"], fields["adapter"], fields.get("second_adapter")
        seeds = read_seeds(fields["seeds"])
        steps = read_number(fields["steps"], "Steps", 1, MOST_STEPS, whole=True)
        guidance_scale = read_number(fields["guidance_scale"], "Guidance", 0, MOST_GUIDANCE)
        scales = [read_number(fields[key], "The scale", 0, MOST_SCALE) for key in ("scale", "second_scale")]
        if not all(isinstance(value, str) for value in (prompt, adapter, second or "")):
            raise ValueError("a text is expected")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError("The server does not understand this request. Reload the page.") from None
    prompt = " ".join(prompt.split())  # as the tokenizer reads it
    if not prompt:
        raise UserError("The prompt is empty. Describe the image that you want to see.")
    if len(prompt) > MOST_PROMPT:
        raise UserError(f"The prompt has {len(prompt):,} characters; at most {MOST_PROMPT:,} are accepted.")
    columns = [(None, 0.0), (adapter, scales[0]), *([(second, scales[1])] if second else [])]
    return Asked(prompt, seeds, steps, guidance_scale, tuple(columns))


def read_seeds(text):
    """The seeds in a text such as "42, 43" or "42-45", each once. Raises UserError naming the part that is not a seed."""
    seeds = []
    for part in re.split(r"[\s,;]+", str(text).strip()):
        span = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", part, re.ASCII)
        if not span:
            raise UserError(f"“{part[:40]}” is no seed. Seeds are whole numbers, such as 42 or 42, 43.")
        first, last = int(span[1]), int(span[2] or span[1])
        if not first <= last <= 2**62:
            raise UserError(f"“{part}” is no seed. Seeds are from 0 to 2^62, the smaller end of a range first.")
        seeds += range(first, min(last, first + MOST_SEEDS) + 1)
    seeds = tuple(dict.fromkeys(seeds))
    if len(seeds) > MOST_SEEDS:
        raise UserError(f"At most {MOST_SEEDS} seeds at once.")
    return seeds


def read_number(value, name, low, high, whole=False):
    """A number from a page, as such or as text. Raises UserError naming the field."""
    try:
        number = (int if whole else float)(value)
        if low <= number <= high and not isinstance(value, bool):
            return number
    except (ValueError, TypeError, OverflowError):
        pass
    kind = "a whole number" if whole else "a number"
    raise UserError(f"{name} is “{str(value)[:40]}”, but must be {kind} from {low} to {high}.")
