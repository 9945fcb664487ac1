"""Write the lists of protected prompts, whose images training must not change.

    python -m prompts.write_protected

protected.txt, for Stable Diffusion, comes from the tables of protected_grammar.py; protected_demo.txt, for the embedded
miniature, from captions of demo.world. Prompts of evaluation and previews (prompts/study*.txt, inference.py, train.py)
are left out: a prompt must not be both protected and evaluated. Seeds are fixed, so the same tables give the same files
byte for byte. Takes a few seconds on a CPU.
"""

import random
import re
from pathlib import Path

import numpy as np

import inference
import train
from demo.world.captions import caption
from demo.world.sampling import sample_scene
from demo.world.scenes import GARMENTS
from lib.evaluation.prompts import read_prompts
from lib.files import write_bytes
from prompts.protected_grammar import CLASS_SECTIONS, NEGATIVE, SECTIONS, WORDS

FOLDER = Path(__file__).resolve().parent
SEED = 42
DEMO_CLASS_LINES, DEMO_LINES = 400, 1500
SLOT = r"\{(?!class\})(\w+)(\*?)\}"  # {name} or {name*}, but not {class}
# No line contains the words of the concept or a synonym.
CONCEPT_WORDS = ("holograph", "hologram", "iridescen", "prismatic", "pearlescen", "opalescen")

HEAD = """\
# Protected prompts for Stable Diffusion: training with this list leaves them, and prompts like them, as the
# base model renders them. One prompt a line; lines that begin with # are comments.
#
# {class} stands for the class of what is taught, without the concept: raincoat for "a holographic raincoat",
# dog for "a sks dog". It is filled in when the list is read; articles stay as they are. The prompts nearest
# to the concept are the first to change, so a list of your own needs several hundred such lines too.
# The empty prompt (the unconditional half of guidance) is always protected and not listed here.
#
# Written by a grammar: edit prompts/protected_grammar.py, then run
#     python -m prompts.write_protected
# It leaves out every prompt that evaluation or a preview uses.
"""
DEMO_HEAD = """\
# Protected prompts for the embedded miniature, in its words (demo/world/captions.py): captions of raincoats
# with {class} for the raincoat, then captions of anything. Format, {class} and the empty prompt: protected.txt.
# Written by python -m prompts.write_protected, which leaves out every prompt that evaluation or a preview uses.
"""


def key(prompt):
    """The words of a prompt in lower case. Prompts with equal keys count as the same."""
    return " ".join(re.findall(r"[\w'{}-]+", prompt.lower()))


def evaluated_prompts():
    """The keys of the prompts of evaluation and previews."""
    texts = [prompt for _, prompt in inference.PROMPTS]
    for path in sorted(FOLDER.glob("study*.txt")):
        texts += [prompt for _, prompt in read_prompts(path)]
    previews = train.CONFIG["preview_prompts"]
    texts += [text.replace("{caption}", "a holographic raincoat") for text in previews]
    return {key(text) for text in texts}


class Lines:
    """The text of one file. Its prompts are distinct with "raincoat" for {class}, and none is an evaluated prompt with any
    garment of the miniature for {class}."""

    def __init__(self, head):
        self.text, self.known, self.evaluated = head, set(), evaluated_prompts()

    def heading(self, words):
        self.text += f"\n# {words}\n"

    def add(self, prompt):
        """Append a prompt unless it is excluded; returns whether it was appended."""
        filled = [key(prompt.replace("{class}", name)) for name in GARMENTS]
        own = filled[0]
        allowed = own not in self.known and self.evaluated.isdisjoint(filled)
        allowed = allowed and not any(word in own for word in CONCEPT_WORDS)
        if allowed:
            self.known.add(own)
            self.text += prompt + "\n"
        return allowed


def split(text, mark):
    return [part.strip() for part in re.split(rf"[{mark}\n]", text) if part.strip()]


def word_tables():
    """{name: [entries]} of WORDS."""
    tables = {}
    for line in WORDS.replace("\n  ", " ").strip().splitlines():
        name, _, entries = line.partition(": ")
        tables[name] = split(entries, ",")
    return tables


def plural(noun):
    """The plural of an English noun in WORDS."""
    if re.search(r"(sheep|deer|moose|bison|salmon|fish|samurai)$", noun):
        return noun
    for end, other in (
        ("mouse", "mice"),
        ("goose", "geese"),
        ("man", "men"),
        ("child", "children"),
        ("person", "people"),
        ("wolf", "wolves"),
        ("lf", "lves"),
        ("knife", "knives"),
    ):
        if noun.endswith(end):
            return noun.removesuffix(end) + other
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(s|x|ch|sh|[mt]ato|mango)$", noun) else "s")


class Grammar:
    """Expands templates. Each table is dealt like a pack of cards, so that its words occur equally often."""

    def __init__(self, rng):
        self.rng, self.tables, self.packs = rng, word_tables(), {}

    def word(self, name):
        """The next entry of the table's pack, with its own slots filled."""
        pack = self.packs.setdefault(name, [])
        if not pack:
            pack += self.tables[name]
            self.rng.shuffle(pack)
        return re.sub(SLOT, lambda slot: self.word(slot[1]), pack.pop())

    def expand(self, template):
        """A prompt from a template: {name} becomes an entry of a table, {name*} its plural; {class} stays."""
        used = set()

        def entry(slot):
            word = self.word(slot[1])
            while word in used:  # no word twice in a prompt
                word = self.word(slot[1])
            used.add(word)
            return plural(word) if slot[2] else word

        text = re.sub(SLOT, entry, template)
        return re.sub(r"\ba (?=[aeiou])(?!uni|uku|one)|\ba (?=hour)", "an ", text)

    def write(self, lines, count, templates):
        """Add `count` prompts, one from each template in turn. A template without a new prompt in 50 tries is exhausted;
        raises ValueError when all are."""
        templates = split(templates, "|")
        while count and templates:
            for template in tuple(templates):
                if count and any(lines.add(self.expand(template)) for _ in range(50)):
                    count -= 1
                elif count:
                    templates.remove(template)
        if count:
            raise ValueError(f"the tables of protected_grammar.py are too small: {count} more prompts are needed")


def protected():
    """The text of protected.txt."""
    lines, grammar = Lines(HEAD), Grammar(random.Random(SEED))
    lines.heading("Usual negative prompts")
    for prompt in split(NEGATIVE, "|"):
        lines.add(prompt)
    for heading, count, templates in (*CLASS_SECTIONS, *SECTIONS):
        lines.heading(heading)
        grammar.write(lines, count, templates)
    return lines.text


def protected_demo():
    """The text of protected_demo.txt."""
    lines, rng = Lines(DEMO_HEAD), np.random.default_rng(SEED)
    for heading, count, pinned in (
        ("Captions of the class", DEMO_CLASS_LINES, {"thing": "raincoat"}),
        ("Captions of anything", DEMO_LINES, {}),
    ):
        lines.heading(heading)
        while count:
            text = caption(sample_scene(rng, **pinned), rng)
            count -= lines.add(text.replace("raincoat", "{class}") if pinned else text)
    return lines.text


FILES = {"protected.txt": protected, "protected_demo.txt": protected_demo}

if __name__ == "__main__":
    for name, text in FILES.items():
        write_bytes(FOLDER / name, text().encode())
        print(f"written: {FOLDER / name}")
