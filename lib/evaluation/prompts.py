"""Evaluation prompts: their three categories, the file that lists them, their folders' names.

`success` prompts ask for what was taught. `near` prompts ask for its class without the concept, which
is what an adapter changes first. `unrelated` prompts have nothing to do with it.
"""

import re

from lib.errors import UserError
from lib.texts import read_text, text_lines

CATEGORIES = ("success", "near", "unrelated")
# Names that Windows keeps for devices; no folder can have them.
DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(10))}


def read_prompts(path):
    """[(category, prompt)] of a prompts file.

    A line holds one prompt, with `success:`, `near:` or `unrelated:` before it (in any case; without
    one it is a success prompt). Empty lines and lines that begin with # are passed over. Raises
    UserError naming the line that is wrong.
    """
    lines = text_lines(read_text(path, "prompts file "))
    prompts = []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        category, prompt = "success", line
        named = re.fullmatch(r"([^\s:]+)\s*:\s*(.*)", line)
        if named:
            category, prompt = named[1].lower(), named[2]
        if category not in CATEGORIES:
            raise UserError(
                f"{path}, line {number}: “{named[1]}” is no category ({', '.join(CATEGORIES)}); a prompt "
                f"that begins that way is written with one: “success: {line}”"
            )
        if not prompt:
            raise UserError(f"{path}, line {number}: no prompt behind “{line}”")
        if prompt in [known for _, known in prompts]:
            raise UserError(f"{path}, line {number}: “{prompt}” is there twice")
        prompts.append((category, prompt))
    if not prompts:
        raise UserError(f"prompts file {path} holds no prompts")
    return prompts


def check_prompt_lengths(prompts, tokenizer, limit, reader):
    """Raise UserError naming a prompt of more than `limit` tokens, which `reader` would cut off."""
    for _, prompt in prompts:
        length = len(tokenizer(prompt, verbose=False).input_ids)
        if length > limit:
            raise UserError(f"the prompt “{prompt[:60]}…” has {length} tokens; {reader} reads {limit}")


def slugs(prompts):
    """A folder name for each (category, prompt), no two equal: the prompt's letters and digits, with
    a number behind them where another prompt has the same."""
    names = []
    for number, (_, prompt) in enumerate(prompts, 1):
        plain = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "prompt"
        name = plain
        while name in names or name in DEVICES:
            name = f"{plain}-{number}"
            number += 1
        names.append(name)
    return names


def members(prompts, category):
    """The indices of the prompts of one category."""
    return [index for index, (name, _) in enumerate(prompts) if name == category]


# How many prompts of each category stand for an evaluation where there is no room for all: five.
OVERVIEW = {"success": 2, "near": 1, "unrelated": 2}


def first_of_each(prompts, most):
    """The indices of the first prompts of each category, category by category; `most` is {category: how
    many}."""
    return [index for category in most for index in members(prompts, category)[: most[category]]]
