"""Verdicts and comparisons on simulated scores: what may be claimed, and what must stop a claim."""

import csv
import re
import zlib

import numpy as np
import pytest

from lib.errors import UserError
from lib.evaluation import results
from lib.evaluation.comparison import compare
from lib.evaluation.metrics import lpips_distances
from lib.evaluation.metrics.effects import effects, no_change_reason
from lib.evaluation.metrics.scores import Run
from lib.evaluation.metrics.table import METRICS, measures
from lib.evaluation.report import words
from lib.evaluation.runs import group_runs
from lib.evaluation.statistics import UNCLEAR, jackknife, mean_interval
from lib.evaluation.verdicts import analyse, deciding_text

PROMPTS = [("success", "a raincoat"), ("near", "a yellow coat"), ("unrelated", "a cat")]
MARGINS = dict(concept_similarity=0.02, clip=0.02, change=0.05, variety=0.25)
SEEDS = 8


# ---- verdicts on simulated scores ----------------------------------------------------------


def pairs_of(mean, rng, spread=0.02):
    """Symmetric distances between the images of one prompt, about `mean`."""
    found = np.triu(mean + spread * rng.standard_normal((SEEDS, SEEDS)), 1)
    return found + found.T


def base_pairs(ceilings=(0.6, 0.5, 0.2)):
    """Distances between base images, with a ceiling of its own for each prompt."""
    rng = np.random.default_rng(7)
    return np.stack([pairs_of(ceiling, rng) for ceiling in ceilings])


def fake_run(
    name, concept=0.0, clip=0.0, near=0.0, cat=0.0, variety=1.0, seed=None, noise=0.01, clip_noise=None, lpips=0.3
):
    """A Run whose scores are set: what LoRA adds to concept and CLIP, and to the others' concept."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    clip_noise = noise if clip_noise is None else clip_noise
    rows = []
    for category, prompt in PROMPTS:
        more = dict(success=concept, near=near, unrelated=cat)[category]
        for s in range(SEEDS):
            base = dict(
                prompt=prompt,
                category=category,
                seed=s,
                model="base",
                lpips=None,
                clip=0.3 + noise * rng.standard_normal(),
                concept_similarity=0.4 + noise * rng.standard_normal(),
            )
            lora = base | dict(
                model="lora",
                lpips=lpips + noise * rng.standard_normal(),
                clip=base["clip"] + clip + clip_noise * rng.standard_normal(),
                concept_similarity=base["concept_similarity"] + more + noise * rng.standard_normal(),
            )
            rows += [base, lora]
    metadata = {} if seed is None else {"seed": str(seed)}
    pairs = np.stack([pairs_of(variety * c, rng) for c in (0.6, 0.5, 0.2)])
    adapter = dict(metadata=metadata, training=None if seed is None else dict(seed=seed))  # without: from elsewhere
    return Run(name, None, adapter, [], [], rows=rows, pairs=pairs)


def analysed(*runs):
    return analyse(list(runs), PROMPTS, base_pairs(), MARGINS)


def answers(*runs):
    return {v["question"]: v["answer"] for v in analysed(*runs)["verdicts"]}


def test_nothing_done_is_a_claim_that_can_be_won():
    assert answers(fake_run("a")) == {"learned": "no", "near kept": "yes", "unrelated kept": "yes", "collapsed": "no"}


@pytest.mark.parametrize(
    ("changes", "question", "answer"),
    [
        (dict(concept=0.1), "learned", "yes"),
        (dict(concept=-0.1), "learned", "no"),
        # It looks like the training images, but no longer like the prompt.
        (dict(concept=0.1, clip=-0.1), "learned", "no"),
        # The mean of the CLIP difference is allowed, its bound is not known well enough: on average
        # nothing was lost, but the interval reaches far below the margin.
        (dict(concept=0.1, clip_noise=0.15), "learned", UNCLEAR),
        (dict(concept=0.1, noise=0.3), "learned", UNCLEAR),
        (dict(near=0.1), "near kept", "no"),
        (dict(near=0.02, noise=0.05), "near kept", UNCLEAR),
        (dict(cat=0.1), "unrelated kept", "no"),
        (dict(cat=-0.1), "unrelated kept", "yes"),
        (dict(noise=0.2), "unrelated kept", UNCLEAR),
        (dict(variety=0.3), "collapsed", "yes"),
        (dict(variety=0.9), "collapsed", "no"),
    ],
)
def test_verdicts_say_what_is_there_and_nothing_else(changes, question, answer):
    run = fake_run(f"run {changes}", **changes)
    assert answers(run)[question] == answer
    others = {"learned": "no", "near kept": "yes", "unrelated kept": "yes", "collapsed": "no"}
    if "noise" not in changes:
        assert {k: v for k, v in answers(run).items() if k != question} == {
            k: v for k, v in others.items() if k != question
        }


def test_what_cannot_be_told_says_what_would_decide_it():
    runs = [fake_run(f"u{i}", seed=i, cat=c, noise=0.005) for i, c in enumerate((0.0, 0.03, 0.0))]
    verdict = next(v for v in analysed(*runs)["verdicts"] if v["question"] == "unrelated kept")
    assert verdict["answer"] == UNCLEAR
    assert re.search(r"With 3 training runs of 8 seeds only changes above about 0\.\d+ are noticed", verdict["text"])
    assert re.search(r"about \d+ training runs would decide about a margin of 0\.02", verdict["text"])
    one = analysed(fake_run("one", cat=0.015, noise=0.03))
    alone = next(v for v in one["verdicts"] if v["question"] == "unrelated kept")
    assert "try --seeds 16" in alone["text"]


def few_seeds(count, **changes):
    """A run of which only the first sampling seeds were generated, and its base pairs."""
    run = fake_run(f"few {changes}", **changes)
    run.rows = [row for row in run.rows if row["seed"] < count]
    run.pairs = run.pairs[:, :count, :count]
    return run, base_pairs()[:, :count, :count]


def test_no_change_is_named_that_is_larger_than_a_metric_can_show():
    run, pairs = few_seeds(2, concept=0.1, noise=0.3)
    texts = [v["text"] for v in analyse([run], PROMPTS, pairs, MARGINS)["verdicts"] if v["answer"] == UNCLEAR]
    assert texts
    for text in texts:
        assert text.endswith("Two sampling seeds do not show how much images differ by chance; try --seeds 16.")
    values = np.random.default_rng(1).standard_normal((1, 4))
    assert re.search(r"only changes above about 2\.\d+ are noticed", deciding_text(values, 0.02))
    assert "not even the largest possible change would be noticed" in deciding_text(values, 0.02, most=2.0)
    assert METRICS["clip"].most == METRICS["concept_similarity"].most == 2  # cosines
    assert METRICS["change"].most == METRICS["variety"].most == 1


def test_a_change_is_a_share_of_its_own_prompts_ceiling():
    run = fake_run("c", lpips=0.3, noise=1e-4)
    rows = analysed(run)["prompts"]
    for row, pairs in zip(rows, base_pairs(), strict=True):
        ceiling = pairs[np.triu_indices(SEEDS, 1)].mean()
        assert row["change"]["mean"] == pytest.approx(0.3 / ceiling, rel=1e-3)
        assert row["lpips_ceiling"] == pytest.approx(ceiling)


def test_change_carries_the_error_of_its_ceiling():
    """Distances in a random embedding: the truth is known, the ceiling only from 8 images."""
    rng, held, exact = np.random.default_rng(3), 0, 0
    far = rng.standard_normal((200_000, 2, 4))
    truth = 0.5 / np.linalg.norm(far[:, 0] - far[:, 1], axis=-1).mean()
    for _ in range(400):
        points = rng.standard_normal((SEEDS, 4))
        pairs = np.linalg.norm(points[:, None] - points, axis=-1)
        lpips = (0.5 + 0.05 * rng.standard_normal(SEEDS))[None]
        values = jackknife(lambda k, x=lpips, d=pairs: x[:, k].mean(-1) / lpips_distances.pair_mean(d[k][:, k]), SEEDS)
        interval = mean_interval(values)
        held += interval["low"] <= truth <= interval["high"]
        naive = mean_interval(lpips / lpips_distances.pair_mean(pairs))
        exact += naive["low"] <= truth <= naive["high"]
    assert held / 400 > 0.92
    assert exact / 400 < 0.8  # taking the ceiling for exact would not do


def test_too_few_seeds_give_no_change():
    run = fake_run("few")
    run.rows = [row for row in run.rows if row["seed"] < 3]
    few = base_pairs()[:, :3, :3]
    assert {"change", "variety"}.isdisjoint(effects([run], PROMPTS, few))
    assert "3 seeds a prompt" in no_change_reason(few)


def test_base_pictures_that_are_all_the_same_give_no_change_and_no_traceback():
    """A base model that draws black images in half precision is reported, not divided by."""
    flat = base_pairs()
    flat[1] = 0
    assert "all identical" in no_change_reason(flat)
    summary = analyse([fake_run("flat")], PROMPTS, flat, MARGINS)
    assert "change" not in summary["prompts"][0]
    assert words.summary_text(summary)


def test_several_training_runs_are_the_outer_level():
    """Runs that disagree widely say less than one of them alone pretends."""
    runs = [fake_run(f"r_seed{i}", concept=c, seed=i) for i, c in enumerate((0.3, -0.1, 0.05))]
    assert answers(runs[0])["learned"] == "yes"
    assert answers(*runs)["learned"] == UNCLEAR
    summary = analysed(*runs)
    assert summary["categories"]["success"]["concept_similarity"]["runs"] == 3
    assert "3 training runs" in words.spread_text(summary)
    assert "nothing of what another training run" in words.spread_text(analysed(runs[0]))


def compared_rows(groups):
    return {
        (r["first"], r["second"], r["metric"], r["category"]): r
        for r in compare(groups, PROMPTS, base_pairs(), MARGINS)
    }


def test_experiments_are_compared_in_pairs():
    groups = {
        "one": [fake_run(f"one_seed{i}", concept=0.2, seed=i) for i in range(5)],
        "same": [fake_run(f"same_seed{i}", concept=0.2, seed=i) for i in range(5)],
        "less": [fake_run(f"less_seed{i}", concept=0.05, seed=i) for i in range(5)],
    }
    rows = compared_rows(groups)
    assert len(rows) == 3 * len(measures("compared"))
    assert all(row["paired_by_training_seed"] for row in rows.values())
    key = ("concept_similarity", "success")
    assert rows["one", "same", *key]["answer"] == "equivalent"
    assert rows["one", "less", *key]["answer"] == "lower"
    assert rows["one", "less", *key]["mean"] == pytest.approx(-0.15, abs=0.02)
    assert "equivalent within 0.02" in words.pair_sentence(rows["one", "same", *key])
    assert "less is lower" in words.pair_sentence(rows["one", "less", *key])


def test_runs_are_paired_by_their_training_seed_not_their_order():
    """What a seed does to every experiment cancels, but only between runs of that seed."""
    own = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.15, 4: 0.25}
    groups = {
        "one": [fake_run(f"one{i}", concept=own[i], seed=i, noise=1e-3) for i in (0, 1, 2, 3, 4)],
        "two": [fake_run(f"two{i}", concept=own[i] + 0.05, seed=i, noise=1e-3) for i in (3, 0, 4, 2, 1)],
    }
    row = compared_rows(groups)["one", "two", "concept_similarity", "success"]
    assert row["answer"] == "higher"
    assert row["high"] - row["low"] < 0.01


def test_fewer_than_three_training_runs_claim_nothing():
    for count, word in ((1, "One training run does not show"), (2, "Two training runs do not show")):
        groups = {
            name: [fake_run(f"{name}{i}", concept=c, seed=i, noise=1e-3 * (i + 1)) for i in range(count)]
            for name, c in (("one", 0.2), ("two", 0.0))
        }
        row = compared_rows(groups)["one", "two", "concept_similarity", "success"]
        assert row["answer"] == "undecided"
        assert word in words.pair_sentence(row)


def test_two_adapters_from_elsewhere_are_compared_as_they_are():
    """Nobody can train a stranger's adapter five times."""
    groups = {"one": [fake_run("one", concept=0.2)], "two": [fake_run("two", concept=0.1)]}
    rows = compared_rows(groups)
    row = rows["one", "two", "concept_similarity", "success"]
    assert (row["answer"], row["level"], row["runs"]) == ("lower", "files", 1)
    assert rows["one", "two", "clip", "success"]["answer"] == "equivalent"
    label = "for these adapters as they are; another training run may differ"
    assert words.pair_sentence(row).endswith(f"two is lower ({label})")
    assert all("five would" not in words.pair_sentence(row) for row in rows.values())
    [sentence] = words.difference_sentences(list(rows.values()))
    assert sentence.startswith("two against one: lower in 1, equivalent in ") and sentence.endswith(f", {label}.")
    note = words.pair_note(list(rows.values()))
    assert "over other sampling seeds" in note and "another training run may differ" in note
    assert "training seed" not in note and "nothing is claimed" not in note
    wide = {"one": [fake_run("one", concept=0.2, noise=0.2)], "two": [fake_run("two", concept=0.1, noise=0.2)]}
    row = compared_rows(wide)["one", "two", "concept_similarity", "success"]
    assert row["answer"] == "undecided" and "try --seeds 16" in row["decides"]


@pytest.mark.parametrize("count", [1, 2])
def test_few_runs_of_ones_own_are_compared_as_they_are_beside_their_experiments(count):
    groups = {
        name: [fake_run(f"{name}{i}", concept=c + i * more, seed=i) for i in range(count)]
        for name, c, more in (("one", 0.2, 0.0), ("two", 0.0, 0.1))
    }
    rows = list(compared_rows(groups).values())
    [row] = [row for row in rows if (row["metric"], row["category"]) == ("concept_similarity", "success")]
    assert (row["answer"], row["files"]["answer"], row["files"]["runs"]) == ("undecided", "lower", 1)
    assert row["files"]["mean"] == pytest.approx(row["mean"])
    if count == 2:  # the runs differ, which the interval over both shows and that of the adapters as they are does not
        assert row["files"]["high"] - row["files"]["low"] < 0.1 * (row["high"] - row["low"])
    sentence = words.pair_sentence(row)
    assert "do not show" in sentence or "does not show" in sentence
    assert "These adapters as they are: two is lower" in sentence and "another training run may differ" in sentence
    [sentence] = words.difference_sentences(rows)
    assert "no difference between the experiments could be shown" in sentence
    assert "these adapters as they are: lower in 1, equivalent in" in sentence
    assert "nothing is claimed of the experiments" in words.pair_note(rows)
    flat = [results.flattened(row) for row in rows]
    assert {row["files_answer"] for row in flat} >= {"lower", "equivalent"} and len({tuple(row) for row in flat}) == 1


def test_runs_without_a_training_seed_are_not_counted_twice():
    groups = {
        "one": [fake_run(f"one_{i}", concept=c) for i, c in enumerate((0.3, 0.1, 0.2))],
        "two": [fake_run(f"two_{i}", concept=c) for i, c in enumerate((0.2, 0.3, 0.1))],
    }
    row = compared_rows(groups)["one", "two", "concept_similarity", "success"]
    assert not row["paired_by_training_seed"]
    assert row["answer"] == "undecided"
    assert row["high"] - row["low"] > 0.2  # the runs disagree, and the interval knows it
    assert "in their order" in words.pair_note([row])


def configured(name, seed=1, **changes):
    training = dict(seed=seed, run_name=name, rank=8, max_steps=800, data_sha256="x") | changes
    return Run(name, None, {"metadata": {"seed": str(seed)}, "training": training}, [], [])


def test_runs_are_one_experiment_if_they_differ_in_the_seed_alone():
    runs = [configured("a_seed1"), configured("again", seed=2), configured("b", rank=32)]
    bare = Run("bare", None, {"metadata": {}, "training": None}, [], [])
    groups = group_runs([*runs, bare])
    assert {name: [r.name for r in g] for name, g in groups.items()} == {
        "a": ["a_seed1", "again"],
        "b": ["b"],
        "bare": ["bare"],
    }
    with pytest.raises(UserError, match="a_seed1 and a_seed2 .* differ in max_steps, rank"):
        group_runs([configured("a_seed1"), configured("a_seed2", seed=2, rank=4, max_steps=9)])
    with pytest.raises(UserError, match=r"a_seed1 and other .* same seed \(1\)"):
        group_runs([configured("a_seed1"), configured("other")])


def test_what_adds_to_a_recipe_stands_behind_it():
    """So that it is shown on its right, and the recipe is subtracted from it."""
    recipe = dict(protected_prompts=None, dora=False)
    runs = [
        configured("a_protected", **recipe | dict(protected_prompts="prompts.txt")),
        configured("b_dora_too", **dict(protected_prompts="prompts.txt", dora=True)),
        configured("rank_32", **recipe),
    ]
    assert list(group_runs(runs)) == ["rank_32", "a_protected", "b_dora_too"]


def test_what_would_group_wrongly_is_refused_or_kept_apart():
    bare = Run("a", None, {"metadata": {}, "training": None}, [], [])
    groups = group_runs([bare, configured("a_seed1"), configured("a_seed2", seed=2)])
    assert [[run.name for run in group] for group in groups.values()] == [["a"], ["a_seed1", "a_seed2"]]
    # One name, two configurations, of which another experiment has the second.
    with pytest.raises(UserError, match="b_seed1 and b_seed2 .* differ in rank"):
        group_runs([configured("a_seed1"), configured("b_seed1", seed=3, rank=4), configured("b_seed2", seed=2)])
    # A run that went on at another learning rate is no seed of the one that did not.
    changed = configured("c", seed=2, learning_rate_changes=[{"after_step": 3}])
    assert list(group_runs([configured("a_seed1"), changed])) == ["a", "c"]


def test_a_comparison_is_a_table_whatever_its_answers_are(tmp_path):
    """The first row decided, a later one not: both have the same columns."""
    groups = {
        name: [fake_run(f"{name}{i}", concept=c, seed=i, near=0.05 * i * (name == "two")) for i in range(3)]
        for name, c in (("one", 0.3), ("two", 0.0))
    }
    rows = compare(groups, PROMPTS, base_pairs(), MARGINS)
    assert {row["answer"] for row in rows} >= {"lower", "undecided"}
    results.write_csv(tmp_path / "comparison.csv", [results.flattened(row) for row in rows])
    written = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [row["answer"] for row in written] == [row["answer"] for row in rows]
    assert float(written[0]["equivalence_low"]) < float(written[0]["equivalence_high"])


def test_the_published_prompts_keep_their_table():
    table = words.study_table(analysed(fake_run("s")))
    assert table[0] == ["Prompt", "Base CLIP", "LoRA CLIP", "LPIPS"]
    assert [row[0] for row in table[1:]] == ["a raincoat (success)", "a cat (unrelated)"]
    assert "| a cat (unrelated) |" in words.summary_text(analysed(fake_run("s")))


def test_experiments_with_unlike_verdicts_stand_side_by_side():
    summaries = {"one": analysed(fake_run("one")), "two": analysed(fake_run("two"))}
    summaries["two"]["verdicts"] = []
    table = words.comparison_table(summaries)
    assert ["learned?", "no", "–"] in table
    assert words.comparison_table(dict(reversed(summaries.items())))[-1][1] == "–"


def test_runs_without_a_partner_are_named():
    groups = {
        "one": [fake_run(f"one{i}", seed=i) for i in (1, 2, 3)],
        "two": [fake_run(f"two{i}", seed=i) for i in (3, 4, 5)],
    }
    rows = compare(groups, PROMPTS, base_pairs(), MARGINS)
    assert rows[0]["left_out"] == ["one1", "one2", "two4", "two5"]
    note = words.pair_note(rows)
    assert "one1, one2, two4, two5" in note
    assert "fewer than three training runs nothing is claimed of the experiments" in note
