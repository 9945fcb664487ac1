"""The verdicts of studies whose truth is known, and what would decide the undecided claims."""

import re
from unittest.mock import patch

import numpy as np
import pytest
from made_up_study import CAT, MARGINS, SEEDS, made_study

from lib.study import claims as study_claims
from lib.study import words as study_words
from lib.study.claims import CLAIMS, Scores, deciding, equal_columns, judge_claims, judged
from lib.study.page import claim_bars


def verdicts(study):
    """{(claim number, what a part is about): verdict}."""
    with patch.object(study_claims, "deciding", lambda *row: dict(training_seeds=9, sampling_seeds=8, text="more")):
        claims, _ = judge_claims(study)
    return {(claim["number"], part["about"]): part["verdict"] for claim in claims for part in claim["parts"]}


NEAR, FAR, TAUGHT = "near prompts", "unrelated prompts", "the concept"
EQUIVALENT, NONE = "equivalent within the margin", "refuted: equivalent within the margin"
NOT_HERE, FULL_SIZE = "not testable here", dict(base_model="a model of full size")
# Of arms with equal effects, which is no protection.
ALIKE = {
    (1, TAUGHT): EQUIVALENT,
    (1, NEAR): EQUIVALENT,
    (1, FAR): EQUIVALENT,
    (2, NEAR): NOT_HERE,
    (2, FAR): NOT_HERE,
    (4, TAUGHT): NONE,
    (5, TAUGHT): EQUIVALENT,
    (5, NEAR): EQUIVALENT,
    (5, FAR): EQUIVALENT,
    (6, "the columns"): "refuted",
    (7, NEAR): "refuted",
    (7, FAR): "refuted",
    (8, "the adapter"): EQUIVALENT,
    (9, TAUGHT): EQUIVALENT,
    (10, NEAR): "refuted",
    (10, FAR): "refuted",
}
HARMLESS = dict(near=(0.0, 0.01), unrelated=(0.0, 0.01))
LEFT_ALONE = {(7, NEAR): EQUIVALENT, (7, FAR): EQUIVALENT, (10, NEAR): "supported", (10, FAR): "supported"}


@pytest.mark.parametrize(
    ("arms", "changed"),
    [
        ({}, {}),
        (dict(rank8=dict(success=(0.1, 0.8))), {(1, TAUGHT): "refuted"}),
        (dict(rank8=dict(clip=0.03)), {(1, TAUGHT): "refuted"}),
        (dict(rank8=dict(success=(0.3, 0.8))), {(1, TAUGHT): "supported"}),
        (dict(rank8=dict(near=(0.2, 0.5))), {(1, NEAR): "refuted"}),
        (dict(unet_only=dict(unrelated=(0.08, 0.9))), {}),  # not testable on the miniature
        (FULL_SIZE, {(2, NEAR): NONE, (2, FAR): NONE}),
        (FULL_SIZE | dict(unet_only=dict(unrelated=(0.08, 0.2))), {(2, NEAR): NONE, (2, FAR): "supported"}),
        (FULL_SIZE | dict(unet_only=dict(near=(0.1, 0.9))), {(2, NEAR): "supported", (2, FAR): NONE}),
        (FULL_SIZE | dict(unet_only=dict(near=(0.0, 0.5))), {(2, NEAR): "refuted", (2, FAR): NONE}),
        (FULL_SIZE | dict(unet_only=dict(near=(0.0, 0.9))), {(2, NEAR): study_claims.MIXED, (2, FAR): NONE}),
        (dict(varied_captions=dict(success=(0.1, 0.8))), {(4, TAUGHT): "supported"}),
        (dict(varied_captions=dict(success=(0.3, 0.8))), {(4, TAUGHT): "refuted"}),
        (dict(dora=dict(success=(0.3, 0.8))), {(5, TAUGHT): "refuted"}),
        (dict(dora=dict(near=(0.0, 0.5))), {(5, NEAR): "refuted"}),
        (dict(dora=dict(near=(0.2, 0.5))), {(5, NEAR): "supported"}),
        (dict(protected=HARMLESS), LEFT_ALONE),
        (dict(protected=HARMLESS | dict(success=(0.3, 0.8))), LEFT_ALONE | {(9, TAUGHT): "supported"}),
        (dict(protected=HARMLESS | dict(success=(0.15, 0.8))), LEFT_ALONE | {(9, TAUGHT): "refuted"}),
        # A seventh of the movement is within the margin of none, and more than a tenth of it.
        (
            dict(of_runs=0.0, protected=HARMLESS | dict(near=(0.014, 0.01))),
            LEFT_ALONE | {(10, NEAR): study_claims.MIXED},
        ),
        (dict(protected=HARMLESS | dict(near=(0.0, -0.2))), LEFT_ALONE | {(7, NEAR): "refuted"}),
        (
            dict(protected=HARMLESS | dict(unrelated=(0.01, 0.1))),
            LEFT_ALONE | {(7, FAR): "refuted", (10, FAR): "refuted"},
        ),
        (dict(protected_plain_loss=HARMLESS), {}),
        (dict(large_batch=dict(unrelated=(0.1, 0.2))), {(8, "the adapter"): "refuted"}),
    ],
)
def test_verdicts_are_true(arms, changed):
    found = verdicts(made_study(**arms))
    # The correlation depends on all arms and has tests of its own.
    assert {key: verdict for key, verdict in found.items() if key[0] != 3} == ALIKE | changed


@pytest.mark.parametrize(
    ("says", "answers", "verdict", "stands"),
    [
        ("same", ["equivalent", "equivalent"], EQUIVALENT, True),
        ("same", ["equivalent", "undecided"], "undecided", None),
        ("same", ["higher", "undecided"], "refuted", False),
        ("same", ["equivalent", "lower"], "refuted", False),
        ("higher", ["higher", "undecided"], "supported", True),
        ("higher", ["equivalent", "lower"], "refuted", False),
        ("higher", ["equivalent", "undecided"], "undecided", None),
        ("higher", ["equivalent"], NONE, False),
        ("lower", ["higher", "lower"], study_claims.MIXED, None),
        ("not higher", ["lower", "undecided"], "undecided", None),
        ("not higher", ["lower", "equivalent"], "supported", True),
        ("not higher", ["equivalent"], EQUIVALENT, True),
        ("not lower", ["lower", "undecided"], "refuted", False),
    ],
)
def test_a_verdict_is_no_more_than_its_answers(says, answers, verdict, stands):
    assert judged(says, answers) == (verdict, stands)


def test_an_undecided_claim_names_the_training_seeds_that_would_decide(monkeypatch):
    """More than there are; and a made-up study of twice as many does decide."""
    monkeypatch.setattr(study_claims, "CLAIMS", CLAIMS[:1])
    noisy = dict(of_runs=0.012, noise=0.002, rank8=dict(success=(0.2, 0.8)))
    claims, _ = judge_claims(made_study(seeds=3, **noisy))
    part = claims[0]["parts"][0]
    assert part["verdict"] == "undecided"
    needed = part["decides"]["training_seeds"]
    assert needed > 3
    assert f"undecided (about {needed} training seeds of" in study_words.verdict_text(dict(claims[0], parts=[part]))
    # Of several comparisons the one that takes most.
    assert needed == max(row["decides"]["training_seeds"] for row in part["comparisons"] if "decides" in row)
    assert verdicts(made_study(seeds=2 * needed, **noisy))[1, TAUGHT] != "undecided"


def test_where_sampling_seeds_are_missing_their_number_is_named():
    rng = np.random.default_rng(0)
    values = 0.01 + 0.04 * rng.standard_normal((1, SEEDS)) + 0.002 * rng.standard_normal((6, SEEDS))
    row = dict(margin=0.02, runs=6)
    decides = deciding(row, values, 27)
    seeds, few = map(
        int, re.search(r"of (\d+) sampling seeds would decide; of (\d+), not even", decides["text"]).groups()
    )
    assert seeds == decides["sampling_seeds"] > few == SEEDS and decides["training_seeds"] > 6
    clear = deciding(row, 0.01 + 0.002 * rng.standard_normal((6, SEEDS)), 27)
    assert clear["text"] == f"about {clear['training_seeds']} training seeds of {SEEDS} sampling seeds would decide"
    nothing = deciding(dict(margin=1e-9, runs=6), values - values.mean(), 27)
    assert nothing["training_seeds"] is None
    assert nothing["text"] == f"not even 1,000 training seeds of {8 * SEEDS} sampling seeds would decide"


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_training_seeds_claim_nothing(seeds):
    found = verdicts(made_study(seeds, of_runs=0.0, noise=1e-4, unet_only=dict(near=(0.3, 0.9)), **FULL_SIZE))
    assert set(found.values()) == {"undecided"}


def test_all_comparisons_are_corrected_together():
    """And a new metric does not join them: their number is fixed."""
    _, rows = judge_claims(made_study())
    assert len(rows) == 32
    least = min(row["p"] for row in rows)
    assert min(row["p_holm"] for row in rows) == pytest.approx(min(1, 32 * least))
    [adapter] = [part.measure for claim in CLAIMS if claim.number == 8 for part in claim.parts]
    assert adapter == Scores("large_batch", study_claims.EVERY_SCORE) and len(adapter.scores) == 7


def test_an_arm_is_compared_with_a_share_of_rank_32s_effect():
    """And the margin is that share of the ordinary one; an arm alone has the whole margin."""
    study = made_study(of_runs=0.0, protected=dict(near=(0.02, 0.15)))
    _, rows = judge_claims(study)
    shared = {(row["metric"], row["category"], row["share"]): row for row in rows if "share" in row}
    kinds = {("change", "near"), ("concept_similarity", "near"), ("change", "unrelated")}
    assert set(shared) == {(*kind, 0.1) for kind in kinds} | {
        (*kind, 0.0) for kind in (*kinds, ("concept_similarity", "unrelated"))
    }
    for (metric, category, share), row in shared.items():
        assert row["margin"] == pytest.approx(MARGINS[metric] * (share or 1))
        part = 0.1 * share if metric == "concept_similarity" else 0.5 * share
        own = 0.02 if metric == "concept_similarity" else 0.15
        if category == "near":
            assert row["mean"] == pytest.approx(own - part, abs=0.004)
    text = study_words.comparison_text(shared["change", "near", 0.1])
    assert "near prompts, minus 10% of rank 32's" in text and "(margin 0.005)" in text
    assert "near prompts, the arm alone" in study_words.comparison_text(shared["change", "near", 0.0])


def test_a_claim_that_the_miniature_cannot_test_gives_the_reason():
    """In the table and in its section, with the figures as they are."""
    study = made_study(unet_only=dict(near=(0.1, 0.9)))
    claims, rows = judge_claims(study)
    second = claims[1]
    assert second["notes"] == [CLAIMS[1].not_on_miniature]
    assert study_words.verdict_text(second) == NOT_HERE and study_words.stands(second) is None
    assert {bar["kind"] for bar in claim_bars(second)} == {"open"}
    assert "higher" in {row["answer"] for part in second["parts"] for row in part["comparisons"]}
    text = study_words.claims_markdown(study, claims, rows)
    assert f"**{NOT_HERE}**" in text and f"- {second['notes'][0]}" in text
    assert judge_claims(made_study(3, **FULL_SIZE))[0][1]["notes"] == []


def test_without_the_concept_scores_a_claim_is_not_measured():
    study = made_study(3)
    for runs in study.arms.values():
        for run in runs:
            run.rows = [row | dict(concept_similarity=None, clip=None) for row in run.rows]
    [ninth] = [claim for claim in judge_claims(study)[0] if claim["number"] == 9]
    assert ninth["parts"] == [] and ninth["notes"][0].startswith("Not measured")
    assert study_words.verdict_text(ninth) == "not measured"


def test_equal_columns_are_found():
    study = made_study()
    part = equal_columns(study)
    assert part["verdict"] == "refuted" and "in 0 of 48 pairs of columns" in part["text"]
    for one, other in zip(study.arms["rank32"], study.arms["rank8"], strict=True):
        other.rows = one.rows  # as the published study scored one adapter under two names
    part = equal_columns(study)
    assert part["verdict"] == "supported" and "in 48 of 48" in part["text"]
    study.prompts = [(category, prompt) for category, prompt in study.prompts if prompt != CAT]
    assert equal_columns(study) is None
