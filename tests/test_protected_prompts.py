"""Lists of protected prompts: how they are read, what ours contain, and the grammar that writes them."""

import random
import re
from collections import Counter

import pytest
from conftest import ROOT

import inference
import train
from demo.world.captions import parse
from lib.errors import UserError
from lib.evaluation.prompts import read_prompts
from lib.training import protected_prompts
from lib.training.protected_prompts import read_protected
from prompts import write_protected
from prompts.write_protected import FILES, Grammar, Lines, plural

TAUGHT = "a holographic raincoat"
SYNONYMS = ("holograph", "hologram", "iridescen", "prismatic", "pearlescen", "opalescen")


def listed(name):
    """The prompts of one list, as they stand."""
    lines = (ROOT / "prompts" / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def written(path, *prompts):
    path.write_text("\n".join(prompts), encoding="utf-8")
    return path


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


# ---- reading a list ----------------------------------------------------------------------

CAPTION = "a holographic raincoat"
THINGS = [
    "a cup",
    "a table",
    "a green tree",
    "an old house",
    "a loaf of bread",
    "a bicycle",
    "a blue car",
    "a lamp on a desk",
    "two birds",
    "a river",
    "a wooden chair",
    "a red door",
]


@pytest.mark.parametrize(
    ("caption", "noun", "concept"),
    [
        ("a holographic raincoat", "raincoat", ["holographic"]),
        ("a photo of a sks dog on a beach", "dog", ["sks"]),
        ("a person wearing a holographic raincoat in the rain", "raincoat", ["holographic"]),
        ("a close-up photo of an iridescent, holographic raincoat", "raincoat", ["iridescent", "holographic"]),
        ("a painting of sks", "sks", []),
        ("the", "", []),
    ],
)
def test_what_a_caption_is_about(caption, noun, concept):
    """Its noun is what {class} stands for; the words that make it the concept are in no protected prompt."""
    assert protected_prompts.class_of(caption) == noun
    assert protected_prompts.concept_words_of(caption, noun) == concept


def test_a_made_up_word_alone_takes_its_class_from_the_key(tmp_path):
    """“a photo of sks” names no kind of thing; a caption about something else than the key is refused."""
    path = tmp_path / "list.txt"
    path.write_text("\n".join([*THINGS, "a red {class}", "a photo of an old {class}", "a sks {class}"]))
    found = read_protected(path, "dog", ["a photo of sks"])
    assert {"a red dog", "a photo of an old dog"} <= {*found.listed, *found.held_out}
    assert (found.noun, found.concept_words, found.left_out) == ("dog", ("sks",), 1)
    with pytest.raises(UserError, match="“a sks table” is about a table"):
        read_protected(path, "dog", ["a sks table"])


def test_class_is_filled_in_and_prompts_of_the_concept_are_left_out(tmp_path):
    path = written(
        tmp_path / "list.txt",
        "\ufeff# comment",
        "",
        "  a {class}  ",
        "a Holographic {class}",
        "holographic",
        "A holographic Raincoat!",
        "a {class}",
        *THINGS,
    )
    found = read_protected(path, None, ["a holographic raincoat", "a coat"])
    assert found.listed[0] == ""
    everything = {*found.listed[1:], *found.held_out}
    assert everything == {"a raincoat", *THINGS}
    assert len(found.listed) - 1 + len(found.held_out) == 13 and len(found.held_out) == 1
    assert (found.noun, found.noun_is_given, found.left_out) == ("raincoat", False, 3)
    assert found.concept_words == ("holographic",)
    text = found.text()
    assert f"13 prompts of {path}, 1 more held out" in text.replace("protected: ", "")
    assert "{class} is raincoat, from the caption; --protected-class names another" in text
    assert "note: 3 of its prompts describe the concept (holographic) and are left out" in text

    given = read_protected(path, "coat", ["a holographic raincoat", "a coat"])
    assert {"a coat"} & {*given.listed, *given.held_out} == set()  # a caption itself
    assert given.noun_is_given and "{class} is coat" in given.text()
    assert "--protected-class" not in given.text()
    plain = read_protected(written(tmp_path / "plain.txt", *THINGS), None, [CAPTION])
    assert plain.noun == "" and "{class}" not in plain.text() and "note" not in plain.text()


def test_a_tenth_is_held_out_and_always_the_same_one(tmp_path):
    """Whatever the hash seed, the day and the machine: an interrupted run goes on with the same parts."""
    path = written(tmp_path / "list.txt", *(f"a {word}{n}" for n in range(50) for word in ("cup", "cat")))
    found = read_protected(path, None, [CAPTION])
    assert (len(found.listed), len(found.held_out)) == (91, 10)
    assert not set(found.listed) & set(found.held_out)
    held_out = (
        "a cat4",
        "a cat5",
        "a cat27",
        "a cup28",
        "a cat29",
        "a cat31",
        "a cat43",
        "a cat46",
        "a cup47",
        "a cup48",
    )
    assert found.held_out == held_out
    other = written(tmp_path / "other.txt", *(f"a {word}{n}" for n in range(50) for word in ("cup", "dog")))
    assert read_protected(other, None, [CAPTION]).sha256 != found.sha256


@pytest.mark.parametrize(
    ("content", "noun", "caption", "words"),
    [
        (None, None, CAPTION, ["list.txt cannot be read"]),
        ("\n".join(THINGS).encode("utf-16-le"), None, CAPTION, ["list.txt cannot be read", "save it as UTF-8"]),
        ("a café\n".encode("latin-1"), None, CAPTION, ["list.txt cannot be read"]),
        (b"a cup\n# a comment\n\n", None, CAPTION, ["list.txt holds 1 prompts", "at least 10 are needed"]),
        (b"a {class}\n", None, "in the", ["“in the”", "--protected-class raincoat"]),
        (b"a {class}\n", " ", CAPTION, ["--protected-class raincoat"]),
        (b"a raincoat\na {class}\n", "umbrella", CAPTION, ["protected_class is umbrella", "a holographic raincoat"]),
    ],
)
def test_a_list_that_cannot_be_used_is_named(tmp_path, content, noun, caption, words):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as problem:
        read_protected(path, noun, [caption])
    for word in words:
        assert word in str(problem.value)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_may_be_saved_by_an_editor_of_windows(tmp_path, encoding):
    plain = written(tmp_path / "plain.txt", *THINGS)
    path = tmp_path / "list.txt"
    path.write_bytes("\r\n".join(THINGS).encode(encoding))
    assert read_protected(path, None, [CAPTION]).sha256 == read_protected(plain, None, [CAPTION]).sha256
