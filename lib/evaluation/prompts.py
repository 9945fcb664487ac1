"""Evaluation prompts: their three categories, the prompts file, folder names."""

import re
from dataclasses import dataclass

from lib.errors import UserError
from lib.texts import read_text, text_lines


@dataclass(frozen=True)
class Category:
    """One of the three kinds of prompts, and what a report calls it."""

    name: str  # in prompts files and metrics.json
    title: str  # above its images
    plain: str  # in sentences for readers who know no score
    wish: str  # for its images
    changes: bool  # whether the adapter should change its images
    overview: int  # how many of its prompts an overview shows

    @property
    def noun(self):
        """“near prompts”."""
        return f"{self.name} prompts"


CATEGORIES = {
    category.name: category
    for category in (
        Category("success", "The concept", "prompts that ask for it", "should change", True, 2),
        # The class without the concept: what an adapter changes first.
        Category("near", "Close to the concept", "prompts close to it", "should stay as it was", False, 1),
        Category("unrelated", "Unrelated to it", "unrelated prompts", "should stay as it was", False, 2),
    )
}
UNTAUGHT = tuple(category for category in CATEGORIES.values() if not category.changes)
# Device names of Windows, which no folder can have.
DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(10))}


def read_prompts(path):
    """[(category, prompt)] of a prompts file.

    Each line is one prompt, prefixed with `success:`, `near:` or `unrelated:` in any case; without a prefix
    it is a success prompt. Empty lines and lines starting with # are skipped. UserError names a wrong line.
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
                f"{path}, line {number}: “{named[1]}” is no category ({', '.join(CATEGORIES)}); to use it as a "
                f"prompt, write “success: {line}”"
            )
        if not prompt:
            raise UserError(f"{path}, line {number}: no prompt after “{line}”")
        if prompt in [known for _, known in prompts]:
            raise UserError(f"{path}, line {number}: duplicate prompt “{prompt}”")
        prompts.append((category, prompt))
    if not prompts:
        raise UserError(f"prompts file {path} has no prompts")
    return prompts


def check_prompt_lengths(prompts, tokenizer, limit, reader):
    """UserError naming a prompt of more than `limit` tokens, which `reader` would truncate."""
    for _, prompt in prompts:
        length = len(tokenizer(prompt, verbose=False).input_ids)
        if length > limit:
            raise UserError(f"the prompt “{prompt[:60]}…” has {length} tokens; {reader} reads at most {limit}")


def slugs(prompts):
    """A unique folder name for each (category, prompt): its letters and digits, numbered where two agree."""
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


def first_of_each(prompts, most=None):
    """The indices of the first prompts of each category, category by category: at most `most` of each, by default
    those of an overview."""
    return [
        index for name, category in CATEGORIES.items() for index in members(prompts, name)[: most or category.overview]
    ]


def bounded(prompts, most=60):
    """The indices of all prompts in order or, if there are more than `most`, of the first of each category."""
    every = range(len(prompts))
    return list(every) if len(prompts) <= most else sorted(first_of_each(prompts, most // len(CATEGORIES)))
