"""Sentences of reports say no word more than was shown: of copies, of training images that are unknown, of shares."""

import re

import numpy as np
import pytest
from PIL import Image
from test_evaluation import MARGINS, PROMPTS, SEEDS, base_pairs, fake_run, few_seeds
from test_pages import drawn, first_sentences, shown
from test_scores import training_set

from lib.evaluation.metrics import scores
from lib.evaluation.report import pages, words
from lib.evaluation.statistics import UNCLEAR, mean_interval
from lib.evaluation.verdicts import analyse, picked_up

HERE = dict(metadata=dict(data_sha256="x"), training=None)
IN_CONFIG = dict(metadata={}, training=dict(data_sha256="described"))
OTHER = dict(metadata=dict(data_sha256="other"), training=None)
UNKNOWN = dict(metadata={}, training=None)  # a downloaded adapter, or one moved without its config.json


@pytest.fixture
def training():
    found = training_set(28)
    found.pictures, found.data_dir = [Image.new("RGB", (64, 64))] * 28, "processed_data"
    return found


def embedded(adapter, training):
    """A run of `adapter` with images and embeddings, which resemble nothing."""
    run = drawn(fake_run("mine", concept=0.3))
    run.adapter = dict(adapter)
    embeddings = np.random.default_rng(1).standard_normal((3, len(PROMPTS), SEEDS, 8)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    run.embeddings = dict(zip(("base", "lora", "lora_mirrored"), embeddings, strict=True))
    for row in run.rows:
        row.update(nearest_picture=training.names[0], nearest_similarity=0.5)
    return run


def summary_of(run, training):
    return analyse([run], PROMPTS, base_pairs(), MARGINS | dict(copies=1 / 3), training)


# ---- training images that are unknown ------------------------------------------------------


@pytest.mark.parametrize("adapter", [HERE, IN_CONFIG], ids=["metadata", "config.json"])
def test_copies_are_judged_where_the_training_images_are_known(adapter, training):
    summary = summary_of(embedded(adapter, training), training)
    assert "memorised" in [v["question"] for v in summary["verdicts"]]
    assert "memorised" in summary and "similarity" not in summary
    notes = scores.training_notes([embedded(adapter, training)], training)
    held_out = "without its config.json it is unknown which images in processed_data were held out"
    assert [note for note in notes if held_out in note] == (notes if adapter is HERE else [])
    assert "- **learned: " in words.verdict_text(summary)


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (UNKNOWN, "which images it was trained on is unknown"),
        (OTHER, "it was trained on other images, captions or sizes than processed_data has"),
    ],
    ids=["no hash", "another hash"],
)
def test_copies_of_unknown_training_images_are_not_judged(adapter, reason, training):
    run = embedded(adapter, training)
    summary = summary_of(run, training)
    assert "memorised" not in [v["question"] for v in summary["verdicts"]]
    assert "memorised" not in summary
    text = summary["similarity"]["text"]
    assert re.fullmatch(
        r"Success images reach a median of 0\.\d+ to the nearest of these images; these reach 0\.\d+ to one another\. "
        rf"Copying is not judged: {reason}\.",
        text,
    )
    assert f"- **Similarity to the images in processed_data.** {text}" in words.verdict_text(summary)

    [note] = scores.training_notes([run], training)
    assert note.startswith(f"mine: {reason}. ")
    assert ("trained on other images" in note) == (adapter is OTHER)
    page = pages.run_page(run, summary, shown(warnings=[note]) | dict(training=training))
    assert first_sentences(page)[-1] == ("none", f"Similarity to the images in processed_data: s{text[1:]}")
    assert "copying of training images" not in page
    nearest = page[page.index("Images in processed_data and their nearest generated images") :]
    assert "On the left an image in processed_data" in nearest
    assert "training image" not in nearest[: nearest.index("<h2>Scores of every image")]
    assert note in page


@pytest.mark.parametrize("gain", [0.3, 0.0])
def test_whether_it_learned_unknown_images_is_not_claimed(gain, training):
    """It is judged by the user's own images, and the sentences say so."""
    run = embedded(UNKNOWN, training)
    run.rows = fake_run("mine", concept=gain).rows
    for row in run.rows:
        row.update(nearest_picture=training.names[0], nearest_similarity=0.5)
    summary, answer = summary_of(run, training), "yes" if gain else "no"
    text = words.verdict_text(summary)
    assert (
        f"- **similar to the images in processed_data: {answer}.** On success prompts the similarity to the images"
        in text
    )
    assert "near kept: yes.** On near prompts the similarity to the images in processed_data changed by" in text
    page = pages.run_page(run, summary, shown() | dict(training=training))
    negation = "" if gain else "does not generate"
    assert f"It {negation or 'generates'} what the images in processed_data show" in page
    for sentence in (text, page.partition("<h2>Scores")[0]):
        assert not re.search("training images|learn (it|“)|learned (it|“)|learned: ", sentence)


def test_a_comparison_names_what_was_not_judged(training):
    groups = {"one": [embedded(HERE, training)], "two": [embedded(UNKNOWN, training)]}
    summaries = {name: summary_of(*runs, training) for name, runs in groups.items()}
    page = pages.comparison_page(groups, summaries, [], shown())
    assert "two: similarity to the images in processed_data" in page
    assert "one: similarity" not in page
    assert ["memorised?", summaries["one"]["verdicts"][-1]["answer"], "–"] in words.comparison_table(summaries)


# ---- copies: what cannot be ruled out ------------------------------------------------------


def test_the_share_of_copies_that_cannot_be_ruled_out_stands_in_the_sentence():
    summary = dict(memorised=dict(high=0.331), categories={}, margins={})

    def sentence(answer, summary):
        return words.plain_sentence(dict(question="memorised", answer=answer), "it", summary)

    still = "p to 33% of its images may be as near to one as these are to one another."
    assert sentence("no", summary) == f"No copying of training images was found; u{still}"
    assert sentence(UNCLEAR, summary) == f"Unclear: does it copy training images? U{still}"
    assert sentence("yes", summary) == "Some of its images are nearer to training images than chance allows."
    summary["memorised"]["high"] = None
    assert sentence("no", summary) == "No copying of training images was found."


def test_no_image_is_called_a_near_copy(training):
    """Of 28 training images 13 may lie above the level, and nobody would call them copies."""
    run = embedded(HERE, training)
    summary = summary_of(run, training)
    page = pages.run_page(run, summary, shown() | dict(training=training))
    level = summary["memorised"]["level"]
    assert f"above {level:.3f}: as near as training images to one another" in page
    for text in (page, words.summary_text(summary)):
        assert not re.search("near-cop", text)


# ---- how much of the concept others pick up ------------------------------------------------


def test_a_share_is_printed_with_its_interval_and_a_word_that_all_of_it_allows():
    def sentence(run):
        summary = analyse([run], PROMPTS, base_pairs(), MARGINS)
        return words.plain_sentence(dict(question="near kept", answer="no"), "it", summary)

    assert re.search(
        r"pick up most of it \(7\d% \[[67]\d%, [78]\d%\]\)\.$", sentence(fake_run("a", concept=0.3, near=0.225))
    )
    wide = sentence(fake_run("wide", concept=0.3, near=0.15, noise=0.1))
    low, high = map(int, re.search(r"pick it up \(\d+% \[(\d+)%, (\d+)%\]\)\.$", wide).groups())
    assert low < 60 < high


def test_the_interval_of_a_share_is_that_of_a_ratio():
    run = fake_run("one", concept=0.3, near=0.2, noise=0.03)
    summary = analyse([run], PROMPTS, base_pairs(), MARGINS)
    totals = summary["categories"]
    near, gained = (totals[category]["concept_similarity"] for category in ("near", "success"))
    share = totals["near"]["picked_up"]
    assert share["mean"] == pytest.approx(near["mean"] / gained["mean"])
    # The error of the denominator is in it: it is wider than the movement over an exact gain.
    assert share["high"] - share["low"] > 1.05 * (near["high"] - near["low"]) / gained["mean"]


def test_ratios_cover_the_truth():
    """Independent gains of 0.3 and 0.2 with a spread of a third: the 95% interval of their ratio."""
    rng, held = np.random.default_rng(5), 0
    for _ in range(400):
        gains = np.stack([0.3 + 0.1 * rng.standard_normal(SEEDS), 0.2 + 0.1 * rng.standard_normal(SEEDS)])[None]
        share = picked_up(dict(concept_similarity=gains), PROMPTS[:2], "near")
        held += share["low"] <= 2 / 3 <= share["high"]
    assert held / 400 > 0.92


def test_no_share_is_computed_from_too_little():
    run, pairs = few_seeds(3, concept=0.3, near=0.2)
    assert "picked_up" not in analyse([run], PROMPTS, pairs, MARGINS)["categories"]["near"]
    nothing = fake_run("nothing", near=0.2)
    assert "picked_up" not in analyse([nothing], PROMPTS, base_pairs(), MARGINS)["categories"]["near"]
    runs = [fake_run(f"r{seed}", concept=gain, near=0.1, seed=seed) for seed, gain in enumerate((0.4, 0.4, -0.05))]
    assert "picked_up" not in analyse(runs, PROMPTS, base_pairs(), MARGINS)["categories"]["near"]
    assert mean_interval(np.ones((1, 2)))["mean"] == 1
