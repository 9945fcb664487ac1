"""The lists of protected prompts: what they hold, what they must not hold, and the grammar that writes them."""

import random
import re
from collections import Counter

import pytest
from conftest import ROOT

import inference
import train
from demo.world.captions import parse
from lib.evaluation.prompts import read_prompts
from prompts import write_protected
from prompts.write_protected import FILES, Grammar, Lines, plural

TAUGHT = "a holographic raincoat"
SYNONYMS = ("holograph", "hologram", "iridescen", "prismatic", "pearlescen", "opalescen")


def listed(name):
    """The prompts of one list, as they stand."""
    lines = (ROOT / "prompts" / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def filled(name):
    return [prompt.replace("{class}", "raincoat") for prompt in listed(name)]


@pytest.mark.parametrize("name", FILES)
def test_the_script_writes_the_same_bytes_again(name):
    again = FILES[name]().encode()
    same = (ROOT / "prompts" / name).read_bytes() == again
    assert same, f"{name} is stale: run python -m prompts.write_protected"


@pytest.mark.parametrize("name", FILES)
def test_no_prompt_of_an_evaluation_or_a_preview_is_protected(name):
    asked = {prompt for _, prompt in inference.PROMPTS}
    for path in (ROOT / "prompts").glob("study*.txt"):
        asked |= {prompt for _, prompt in read_prompts(path)}
    asked |= {text.replace("{caption}", TAUGHT) for text in train.CONFIG["preview_prompts"]}
    assert len(asked) > 40
    assert {prompt.lower() for prompt in asked}.isdisjoint(p.lower() for p in filled(name))


@pytest.mark.parametrize("name", FILES)
def test_prompts_are_distinct_and_say_nothing_of_the_concept(name):
    counts = Counter(prompt.lower() for prompt in filled(name))
    assert [prompt for prompt, count in counts.items() if count > 1] == []
    assert [p for p in counts if any(word in p for word in SYNONYMS)] == []


def test_the_list_for_stable_diffusion_is_broad():
    prompts = listed("protected.txt")
    about_class = [prompt for prompt in prompts if "{class}" in prompt]
    lengths = Counter(len(prompt.split()) for prompt in prompts)
    assert 1950 <= len(prompts) <= 2100
    assert 500 <= len(about_class) <= 600
    assert lengths[1] >= 100 and max(lengths) <= 28  # CLIP reads 75 tokens
    assert all(sum(lengths[n] for n in span) >= 100 for span in (range(2, 4), range(9, 30)))
    assert {"ugly", "blurry", "low quality", "bad anatomy", "watermark", "text"} <= set(prompts)
    plain = "blue, red, golden, wooden, leather, plastic, glossy, transparent".split(", ")
    assert {"{class}", "a {class}", *(f"a {word} {{class}}" for word in plain)} <= set(about_class)


def test_the_list_for_stable_diffusion_reads_well():
    for prompt in listed("protected.txt"):
        assert re.fullmatch(r"(?![ ,])(?:[a-z0-9'’,\- ]|\{class\})+(?<![ ,])", prompt), prompt
        assert "  " not in prompt and " ," not in prompt, prompt
        assert not re.search(r"\ba (?:[aeio]|u(?!ni|ku))|\ban (?![aeiou]|hour)", prompt), prompt
        assert not re.search(r"\b(\w+) \1\b", prompt), prompt


def test_the_list_for_the_miniature_holds_captions_of_its_world():
    prompts = listed("protected_demo.txt")
    assert sum("{class}" in prompt for prompt in prompts) == 400
    assert len(prompts) == 400 + 1500
    for prompt in filled("protected_demo.txt"):
        assert parse(prompt).get("material") != "holographic", prompt
    things = Counter(parse(prompt)["thing"] for prompt in prompts if "{class}" not in prompt)
    assert len(things) == 8 and min(things.values()) >= 20


def test_what_is_evaluated_repeated_or_taught_is_not_added():
    lines = Lines("")
    assert lines.add("a {class}")
    refused = (
        "a raincoat",
        "A {class}",
        "a yellow {class}",
        "a cat sitting on a couch",
        "a red leather {class}",
        "a person wearing a black {class} in the rain",
        "a holographic {class}",
        "an iridescent bowl",
    )
    assert [prompt for prompt in refused if lines.add(prompt)] == []
    assert lines.add("a yellow umbrella")
    assert lines.text == "a {class}\na yellow umbrella\n"


@pytest.mark.parametrize(
    ("noun", "many"),
    [
        ("cat", "cats"),
        ("box", "boxes"),
        ("bench", "benches"),
        ("lily", "lilies"),
        ("key", "keys"),
        ("old woman", "old women"),
        ("grandchild", "grandchildren"),
        ("person", "people"),
        ("wolf", "wolves"),
        ("bookshelf", "bookshelves"),
        ("giraffe", "giraffes"),
        ("sheep", "sheep"),
        ("mouse", "mice"),
        ("potato", "potatoes"),
        ("dance school", "dance schools"),
    ],
)
def test_plurals(noun, many):
    assert plural(noun) == many


def test_templates_are_expanded(monkeypatch):
    monkeypatch.setattr(write_protected, "WORDS", "\nanimal: owl, {pet}, ox,\n  horse\npet: unicorn\nunit: hour\n")
    grammar = Grammar(random.Random(0))
    assert {grammar.expand("a {animal} and a {class}") for _ in range(40)} == {
        f"{animal} and a {{class}}" for animal in ("an owl", "a unicorn", "an ox", "a horse")
    }
    assert grammar.expand("a {unit}, {pet*}") == "an hour, unicorns"
    pairs = {grammar.expand("{animal}, {animal}") for _ in range(200)}
    assert len(pairs) == 12  # all, and none of one word twice


def test_each_template_takes_its_turn_and_tables_that_are_too_small_are_an_error(monkeypatch):
    monkeypatch.setattr(write_protected, "WORDS", "\nhue: red, blue, green\nthing: cup, bowl\n")
    lines = Lines("")
    Grammar(random.Random(0)).write(lines, 5, "a {thing} | the {hue} {thing}")
    assert lines.text.count("the ") == 3 and lines.text.count("a ") == 2
    with pytest.raises(ValueError, match="4 more prompts"):
        Grammar(random.Random(0)).write(Lines(""), 10, "{hue} {thing}")
