"""The study's measurements: the rank correlation, two arms at equal concept, and scores read back from files."""

import json

import numpy as np
import pytest
from conftest import options, run
from made_up_study import ARMS, PROMPTS, SCALED, SEEDS, made_study, write_study
from scipy import stats

from lib.errors import UserError
from lib.evaluation import results
from lib.evaluation.metrics.effects import effects
from lib.evaluation.metrics.scores import Run
from lib.evaluation.prompts import members
from lib.evaluation.statistics import mean_interval
from lib.study.claims import INFORMATIVE, Correlation
from lib.study.files import full_pairs, read_study, run_of
from lib.study.measures import (
    adapters,
    at_equal_concept,
    concept_shares,
    curves,
    equal_concept_intervals,
    interpolated,
    lpips_and_movement,
    rank_correlations,
    scale_points,
)

NEAR = members(PROMPTS, "near")


def simulated_blocks(rng, trials, training_seeds, groups=6, prompts=5):
    """Studies in which change and movement share what a run, a training seed and a prompt have in common:
    two arrays [trials, training seeds, adapters, prompts, sampling seeds]."""
    shape = trials, training_seeds, groups, prompts, SEEDS

    def spread(size, *axes):
        return size * rng.standard_normal([n if axis in axes else 1 for axis, n in enumerate(shape)])

    # The effects of prompts and adapters are fixed, the rest is random in each study.
    fixed = np.random.default_rng(5)
    change = 1 + 0.3 * fixed.random((groups, 1, 1)) + 0.3 * fixed.random((prompts, 1))
    change = change + spread(0.1, 0, 1) + spread(0.2, 0, 1, 2) + spread(0.05, 0, 4) + spread(0.05, 0, 1, 2, 3, 4)
    moved = 0.6 * change + spread(0.15, 0, 1, 2) + spread(0.05, 0, 4) + spread(0.1, 0, 1, 2, 3, 4)
    return change, moved


def correlations_of_studies(change, moved):
    """`rank_correlations` of many studies at once: [trials, training seeds, sampling seeds]."""
    ceilings = np.ones((5, SEEDS, SEEDS)) - np.eye(SEEDS)
    flat = (values.reshape(-1, *values.shape[2:]) for values in (change, moved))
    return rank_correlations(*flat, ceilings).reshape(*change.shape[:2], SEEDS)


@pytest.mark.parametrize("training_seeds", [3, 5, 8])
def test_the_interval_of_the_correlation_holds_the_truth(training_seeds):
    """And one that counts points as independent does not. `-s` prints both."""
    rng, trials = np.random.default_rng(0), 1000
    truth = correlations_of_studies(*simulated_blocks(rng, trials, training_seeds)).mean()
    change, moved = simulated_blocks(rng, trials, training_seeds)
    intervals = [mean_interval(z) for z in correlations_of_studies(change, moved)]
    covered = np.mean([interval["low"] <= truth <= interval["high"] for interval in intervals])
    ranks = [stats.rankdata(values.mean(-1).reshape(trials, -1), axis=1) for values in (change, moved)]
    points = [np.corrcoef(x, y)[0, 1] for x, y in zip(*ranks, strict=True)]
    half = 1.96 * 1.03 / np.sqrt(ranks[0].shape[1] - 3)
    naive = np.mean(np.abs(np.arctanh(points) - truth) < half)
    print(f"\n{training_seeds} training seeds: {covered:.1%}, counting points {naive:.1%}")
    assert covered >= 0.93
    assert naive < 0.75


def test_the_correlation_is_spearmans_over_all_adapters_and_prompts():
    study = made_study(seeds=3)
    [(row, _)] = Correlation("near")(study)
    lpips, moved = lpips_and_movement(study, [runs for _, runs in adapters(study)], NEAR)
    # Eight arms, and rank 32 at three scales below 1.
    assert lpips.shape == (3, 8 + 3, 3, SEEDS)
    assert [arm for arm, _ in adapters(study)] == [*ARMS, *3 * SCALED]
    ceiling = study.base_pairs[NEAR].sum((1, 2)) / (SEEDS * (SEEDS - 1))
    each = [
        stats.spearmanr((a.mean(-1) / ceiling).ravel(), b.mean(-1).ravel())[0]
        for a, b in zip(lpips, moved, strict=True)
    ]
    assert row["correlation"]["mean"] == pytest.approx(np.tanh(np.mean(np.arctanh(each))))


@pytest.mark.parametrize("slope", [1.0, 0.0, -1.0])
def test_change_is_informative_only_where_it_is(slope):
    rng = np.random.default_rng(1)
    arms = {}
    for arm in ARMS:
        change = 0.2 + 0.6 * rng.random()
        moved = 0.1 + slope * 0.2 * (change - 0.5) + (0 if slope else 0.1 * rng.random())
        arms[arm] = dict(near=(moved, change)) if arm not in SCALED else dict(near=(0.1 if slope >= 0 else 0.2, 0.5))
    scales = (1.0,) if slope <= 0 else (0.5, 1.0)  # a lower scale always changes and moves less
    [(row, _)] = Correlation("near")(made_study(scales=scales, **arms))
    if slope > 0:
        assert row["correlation"]["low"] > INFORMATIVE and row["low"] > 0
    else:
        assert row["correlation"]["high"] < INFORMATIVE and row["high"] < 0


# ---- at equal concept ----------------------------------------------------------------------


@pytest.mark.parametrize("taught", [0.1, 0.4])
def test_arms_are_compared_at_equal_concept(taught):
    """Whichever of the two learns more; half the change at half the concept is no merit."""
    held = dict(success=(taught, 0.8), near=(0.04, 0.3), unrelated=(0.0, 0.1))
    study = made_study(noise=1e-5, of_runs=0, protected=held)
    means = {key: mean_interval(values)["mean"] for key, values in at_equal_concept(study).items()}
    level = min(taught, 0.2)
    share, less = level / taught, level / 0.2
    assert means["level"] == pytest.approx(level, rel=1e-3)
    assert means["scale rank32"] == pytest.approx(less, rel=1e-3)
    assert means["scale protected"] == pytest.approx(share, rel=1e-3)
    ceiling = study.base_pairs.sum((1, 2))[NEAR].mean() / (SEEDS * (SEEDS - 1))
    change = means["change", "near"] * ceiling / 0.5
    assert change == pytest.approx(0.3 * share - 0.5 * less, rel=0.02)
    assert means["concept_similarity", "near"] == pytest.approx(0.04 * share - 0.1 * less, rel=0.02)
    ratio = equal_concept_intervals(study)["ratio near"]["mean"]
    assert ratio == pytest.approx(0.3 * share / (0.5 * less), rel=1e-3)


def test_scores_are_interpolated_linearly_between_two_scales():
    """Where a curve that bends, or comes down again, first reaches the level."""
    concept = np.array([0.0, 0.1, 0.3, 0.2])
    others = np.array([[0.0, 1.0, 2.0, 3.0], [0.0, 0.2, 0.8, 1.0]])
    assert interpolated(0.2, concept, others).tolist() == pytest.approx([1.5, 0.5])
    assert interpolated(0.1, concept, others).tolist() == pytest.approx([1.0, 0.2])
    assert interpolated(0.3, concept, others).tolist() == pytest.approx([2.0, 0.8])
    study = made_study(seeds=2)
    lines = curves(study, scale_points(study, "rank32"))
    assert lines["scale"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert (lines["change", "near"][:, 0] == 0).all()


# ---- the way to the training images --------------------------------------------------------


def test_shares_of_the_way_follow_from_scores_and_levels():
    """The made-up level is 0.2 above the base model's success images, which rank 32 moves by 0.2 and near ones by 0.1."""
    study = made_study(of_runs=0.01, protected=dict(success=(0.1, 0.8)))
    shares = concept_shares(study, study.arms["rank32"])
    assert list(shares) == ["success", "near", "unrelated"]
    assert shares["success"]["mean"] == pytest.approx(1, abs=0.1)
    assert concept_shares(study, study.arms["protected"])["success"]["mean"] == pytest.approx(0.5, abs=0.1)
    for category, share in shares.items():
        assert share["low"] < share["mean"] < share["high"], category
    few = [run for run in study.arms["rank32"] if run.name != "rank32_seed1"]
    assert concept_shares(study, few)["near"]["mean"] != shares["near"]["mean"]
    study.levels["rank32_seed1"] = None
    assert concept_shares(study, study.arms["rank32"]) == {}
    study.levels["rank32_seed1"] = 0.3  # not above the base model's images
    assert concept_shares(study, study.arms["rank32"]) == {}


# ---- from the files alone ------------------------------------------------------------------


def test_a_record_holds_all_that_effects_need():
    """What write_run writes, read back: the same effects to the last digit kept."""
    rng = np.random.default_rng(2)

    def symmetric():
        upper = np.triu(0.4 + 0.1 * rng.random((len(PROMPTS), SEEDS, SEEDS)), 1)
        return upper + upper.transpose(0, 2, 1)

    rows = []
    for category, prompt in PROMPTS:
        for seed in range(SEEDS):
            job = dict(prompt=prompt, category=category, seed=seed)
            for model in ("base", "lora"):
                scores = dict(clip=rng.random(), concept_similarity=rng.random())
                rows.append(job | dict(model=model, lpips=rng.random() if model == "lora" else None, **scores))
    base_pairs, one = symmetric(), Run("one", None, {}, [], [], rows=rows, pairs=symmetric())
    written = results.raw_scores(one, base_pairs) | dict(run="one", adapter={}, pictures=rows)
    written = json.loads(json.dumps(written))
    shape = len(PROMPTS), SEEDS
    before = effects([one], PROMPTS, base_pairs)
    after = effects([run_of(written, None, shape)], PROMPTS, full_pairs(written["pairs"]["base"], shape))
    assert set(before) == set(after) == {"lpips", "clip", "concept_similarity", "change", "variety"}
    for key, values in before.items():
        assert np.abs(values - after[key]).max() < 1e-4, key


def test_an_evaluation_keeps_scales_and_speed(trained, tiny_model, tiny_clip, processed_data, tmp_path):
    (tmp_path / "prompts.txt").write_text("a coat\nnear: a dress\n")
    config = dict(
        prompts=tmp_path / "prompts.txt",
        base_model=tiny_model,
        clip_model=tiny_clip,
        similarity_model="clip",
        data_dir=processed_data,
        resolution=64,
        steps=2,
        seeds=2,
        lora_dir=trained / "lora_weights_rank_32",
        output_dir=tmp_path / "out",
    )
    run("inference.py", *options(**config), "--lora-scales", "0,0.5,1,2")
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [part["scale"] for part in record["swept"]] == [0.5, 2.0]
    assert len(record["pictures"]) == 2 * 2 * 2  # models, prompts, seeds
    assert all(len(part["pictures"]) == 2 * 2 for part in record["swept"])
    assert np.array(record["pairs"]["base"]).shape == (2, 1)
    written = json.loads((trained / "lora_weights_rank_32" / "config.json").read_text())
    assert record["adapter"]["speed"]["steps_a_second"] == written["steps_a_second"]


def spoil(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def drop_a_seed(record):
    record["pictures"] = [row for row in record["pictures"] if row["seed"] < SEEDS - 1]


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        ("seed2/dora_seed2", lambda r: r.pop("swept"), ["dora_seed2", "--rescore"]),
        ("seed2/dora_seed2", drop_a_seed, ["dora_seed2", "other prompts, sampling seeds"]),
        ("seed2/dora_seed2", lambda r: r["config"].update(steps=4), ["dora_seed2", "settings"]),
        ("seed2/dora_seed2", lambda r: r["adapter"].update(fingerprint="rank8_seed2"), ["same adapter"]),
        ("seed2/dora_seed2", lambda r: r["adapter"]["training"].update(rank=4), ["differ in rank"]),
        ("scales_seed2/rank32_seed2", lambda r: r["adapter"].update(fingerprint="old"), ["another adapter"]),
    ],
)
def test_files_that_do_not_belong_together_are_named(place, change, words, tmp_path):
    folder = write_study(tmp_path / "study", seeds=(1, 2))
    spoil(folder / place / "metrics.json", change)
    with pytest.raises(UserError) as problem:
        read_study(folder, ARMS, SCALED)
    for word in words:
        assert word in str(problem.value)


def test_an_incomplete_seed_is_skipped_and_named(tmp_path):
    folder = write_study(tmp_path / "study", seeds=(1, 2, 10))
    (folder / "scales_seed2" / "rank32_seed2" / "metrics.json").unlink()
    study = read_study(folder, ARMS, SCALED)
    assert study.training_seeds == [1, 10]
    [note] = study.notes
    assert "Training seed 2 is incomplete" in note and "scales_seed2" in note
    with pytest.raises(UserError, match="no whole training seed"):
        read_study(tmp_path, ARMS, SCALED)
