"""The scale of the concept: its two ends, the shares on it with their intervals, and the margin that it gives."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, call, make_processed, options, picture
from made_up_study import ARMS, SCALED, write_study
from PIL import Image
from test_evaluation import MARGINS, PROMPTS, base_pairs, fake_run
from test_scores import training_set

import inference
import study
from lib.dataset import read_dataset
from lib.evaluation.choosing import Point, sweep_summary
from lib.evaluation.metrics import concept_scale
from lib.evaluation.metrics.clip_scores import load_clip
from lib.evaluation.metrics.concept_scale import MARGIN, level_without, share_interval
from lib.evaluation.metrics.table import margins_of
from lib.evaluation.report import words
from lib.evaluation.statistics import jackknife, mean_interval
from lib.evaluation.verdicts import analyse
from lib.study import levels
from lib.study.claims import judge_claims
from lib.study.files import LEVELS, read_study


def unit(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def test_the_level_is_the_mean_over_pairs_of_images_trained_on():
    embeddings = unit(np.random.default_rng(0).standard_normal((6, 8)) + 1)
    trained = np.array([True, True, False, True, True, True])

    def pairs(chosen):
        return np.mean([embeddings[i] @ embeddings[j] for i in chosen for j in chosen if i != j])

    level, without = level_without(embeddings, trained)
    chosen = np.flatnonzero(trained)
    assert level == pytest.approx(pairs(chosen))
    np.testing.assert_allclose(without, [pairs(chosen[chosen != image]) for image in range(6)])
    _, without = level_without(embeddings, np.arange(6) < 2)
    assert np.isnan(without[:2]).all()


# ---- the interval --------------------------------------------------------------------------


def simulated(rng, images, runs=1, weight=0.7, spread=0.1):
    """(lora, base, levels, without) of `share_interval`, and the mean embeddings that the truth is made of."""
    concept, start = np.eye(32)[0], 0.6 * np.eye(32)[0] + 0.8 * np.eye(32)[1]
    training = concept + spread * rng.standard_normal((images, 32))
    noise = 0.1 * rng.standard_normal((2, 8, 32))
    base = np.broadcast_to((start + noise[0]) @ training.T, (runs, 8, images))
    lora = np.stack([(start + weight * (concept - start) + noise[0] + noise[1]) @ training.T] * runs)
    level, without = level_without(training, np.ones(images, bool))
    return lora, base, np.full(runs, level), np.tile(without, (runs, 1))


def test_a_share_is_the_way_from_the_base_to_the_training_images():
    lora, base, levels, without = simulated(np.random.default_rng(1), 12, runs=2)
    share = share_interval(lora, base, levels, without)
    assert share["mean"] == pytest.approx((lora.mean() - base.mean()) / (levels[0] - base.mean()), abs=0.01)
    assert share["low"] < share["mean"] < share["high"]
    same = share_interval(base, base, levels, without)
    assert (same["mean"], same["low"], same["high"]) == (0, 0, 0)


def test_the_interval_carries_the_error_of_both_ends():
    """These embeddings are not scaled to unit length, so that the truth is exactly 70%."""
    rng, held, fixed, studies = np.random.default_rng(2), 0, 0, 400
    for _ in range(studies):
        lora, base, levels, without = simulated(rng, 8)
        share = share_interval(lora, base, levels, without)
        held += share["low"] <= 0.7 <= share["high"]
        ends = lora.mean(axis=2), base.mean(axis=2)

        def of_seeds(kept, ends=ends, levels=levels):
            one, two = (values[:, kept].mean(axis=1) for values in ends)
            return (one - two) / (levels - two)

        interval = mean_interval(jackknife(of_seeds, 8))
        fixed += interval["low"] <= 0.7 <= interval["high"]
    assert held / studies > 0.93
    assert fixed / studies < held / studies - 0.02  # taking the training images as given would not do


def test_no_share_where_the_scale_itself_may_be_nothing():
    rng = np.random.default_rng(3)
    lora, base, levels, without = simulated(rng, 12)
    shift = levels[0] - base.mean()
    assert share_interval(lora, base + shift, levels, without) is None
    assert share_interval(lora[:, :1], base[:, :1], levels, without) is None
    assert share_interval(*simulated(rng, 2)) is None


# ---- the margin ----------------------------------------------------------------------------


def levels_of(*values, images=28):
    return [dict(level=value, held_out=None, images=images) for value in values]


def test_the_margin_is_a_share_of_the_way_as_a_cosine():
    scale = concept_scale.scale_of(levels_of(0.55, 0.57), 0.3324, "success", 0.1)
    assert (scale["level"], scale["margin"], scale["reason"]) == (pytest.approx(0.56), 0.0228, None)
    config = inference.CONFIG
    assert margins_of(config, scale)["concept_similarity"] == 0.0228
    assert margins_of(config, scale)["clip"] == config["clip_margin"]
    text = words.scale_text(scale)
    assert "0.560 to one another" in text and "0.0228, is 10% of the way" in text
    known = words.scale_text(scale | dict(held_out=0.5))
    assert "held-out images one of 0.500 to them" in known


@pytest.mark.parametrize(
    ("rows", "base", "reason"),
    [
        (levels_of(None, images=1), 0.3, "only one training image is known"),
        (levels_of(None, images=0), 0.3, "no training image is known"),
        (
            levels_of(0.4, 0.4),
            0.45,
            r"as similar to the training images \(0.450\) as these are to one another \(0.400\)",
        ),
    ],
)
def test_without_a_scale_nothing_rests_on_the_concept(rows, base, reason):
    scale = concept_scale.scale_of(rows, base, "success", 0.1)
    assert scale["margin"] is None and re.search(reason, scale["reason"])
    margins = margins_of(inference.CONFIG, scale)
    assert "concept_similarity" not in margins
    run = fake_run("one", concept=0.2)
    summary = analyse([run], PROMPTS, base_pairs(), margins, scale=scale)
    assert {verdict["question"] for verdict in summary["verdicts"]} == {"collapsed"}
    assert f"No verdict rests on concept similarity: {scale['reason']}." in words.summary_text(summary)
    run.sweep = {Point(None, 1.0): run}
    assert "scale of concept similarity is unknown" in sweep_summary(run, PROMPTS, base_pairs(), margins)["advice"]


def test_the_share_stands_in_verdicts_tables_and_sentences():
    training, rng = training_set(6), np.random.default_rng(4)
    training.embeddings = unit(0.4 * training.embeddings + 1).astype(np.float32)
    run = fake_run("one", concept=0.2)
    run.adapter |= dict(held_out=["images/image_00.png"], metadata=dict(data_sha256=training.hashes[0]))
    concept = training.embeddings.sum(axis=0)
    base = unit(np.array([1, -1] * 4) + 0.1 * rng.standard_normal((3, 8, 8))).astype(np.float32)
    run.embeddings = dict(base=base, lora=unit(0.3 * base + concept), lora_mirrored=base)
    summary = analyse([run], PROMPTS, base_pairs(), MARGINS | dict(copies=1 / 3), training)
    share = summary["categories"]["success"]["concept_share"]
    trained = training.embeddings[1:]
    level = (trained @ trained.T)[~np.eye(5, dtype=bool)].mean()
    assert share["level"] == pytest.approx(level, abs=1e-6)
    to_all = [(values[0] @ training.embeddings.T).mean() for values in (run.embeddings["lora"], base)]
    assert share["mean"] == pytest.approx((to_all[0] - to_all[1]) / (level - to_all[1]), rel=0.05)
    text = words.share_text(share)
    verdict = next(v for v in summary["verdicts"] if v["question"] == "learned")
    assert f"{text} of the way to them" in verdict["text"]
    sentence = words.plain_sentence(verdict, "it", summary)
    assert sentence == f"It learned it: its images went {text} of the way to the training images."
    near = next(v for v in summary["verdicts"] if v["question"] == "near kept")
    assert "of the way to them (negligible below 0.02)" in near["text"]
    assert words.scale_table(summary)[1][0] == "success prompts" and words.scale_table(summary)[1][-1] == text
    assert text in words.summary_text(summary)
    rows = words.comparison_table({"one": summary, "two": summary})
    assert ["way to the training images, success prompts", text, text] in rows


def test_a_share_near_nothing_has_no_negative_zero():
    assert words.share_text(dict(mean=-0.0004, low=-0.013, high=0.0004)) == "0% [−1%, 0%]"
    assert words.share_text(dict(mean=0.716, low=0.6, high=1.204)) == "72% [60%, 120%]"


# ---- the whole way of inference.py ---------------------------------------------------------


@pytest.fixture
def pair(tmp_path, tiny_clip):
    """Options of an evaluation whose LoRA images lie between the base images and the training images."""
    data = make_processed(tmp_path / "data", 4)
    for number in range(1, 5):  # alike
        Image.blend(picture(0), picture(number), 0.2).save(data / "images" / f"image_{number:02}.png")
    count = 4 * len(inference.PUBLISHED)
    for kind, weight in (("base", 1.0), ("lora", 0.6)):
        (tmp_path / kind).mkdir()
        for number in range(count):
            Image.blend(picture(0), picture(100 + number), weight).save(tmp_path / kind / f"{number}.png")
    return dict(
        score_dir=f"{tmp_path / 'base'},{tmp_path / 'lora'}",
        output_dir=tmp_path / "out",
        clip_model=tiny_clip,
        similarity_model="clip",
        data_dir=data,
        resolution=64,
    )


def evaluated(config, *more):
    done = call("inference.py", *more, *options(**config))
    assert done.returncode == 0, done.stderr
    return json.loads((config["output_dir"] / "metrics.json").read_text())["summary"], done.stdout


def test_level_and_margin_are_measured_written_and_shown(pair, tiny_clip):
    summary, _ = evaluated(pair)
    clip = load_clip(tiny_clip)
    training = clip.embed([Image.open(path) for path in sorted((pair["data_dir"] / "images").iterdir())])
    level = (training @ training.T)[~np.eye(4, dtype=bool)].mean()
    base, _ = concept_scale.base_similarity(
        json.loads((pair["output_dir"] / "metrics.json").read_text())["pictures"], [("success", "")]
    )
    scale = summary["concept_scale"]
    assert (scale["level"], scale["base"]) == (pytest.approx(level, abs=1e-5), pytest.approx(base, abs=1e-5))
    assert summary["margins"]["concept_similarity"] == scale["margin"] == pytest.approx(0.1 * (level - base), rel=0.01)
    share = summary["categories"]["success"]["concept_share"]
    assert 0 < share["low"] < share["high"] < 1.2
    page = (pair["output_dir"] / "report.html").read_text()
    for text in (words.share_text(share), words.scale_text(scale)):
        assert text in page.replace("&#39;", "'")
    assert words.share_text(share) in (pair["output_dir"] / "summary.md").read_text()

    again = {key: value for key, value in pair.items() if key != "score_dir"} | dict(concept_margin=0.5)
    more, _ = evaluated(again, "--rescore")
    assert more["margins"]["concept_similarity"] == pytest.approx(0.5 * (level - base), rel=0.01)


def test_one_training_image_gives_no_verdict_on_the_concept(pair):
    shutil.rmtree(pair["data_dir"])
    make_processed(pair["data_dir"], 1)
    summary, printed = evaluated(pair)
    warning = "No verdict rests on concept similarity: only one training image is known"
    assert warning in printed and warning in (pair["output_dir"] / "report.html").read_text()
    questions = {verdict["question"] for verdict in summary["verdicts"]}
    assert "collapsed" in questions and not questions & {"learned", "near kept", "unrelated kept"}
    assert "concept_similarity" in summary["categories"]["success"]


# ---- the study -----------------------------------------------------------------------------


def test_the_committed_study_is_judged_on_the_scale_of_its_training_images():
    folder = ROOT / "results" / "study"
    committed = read_study(folder, study.ARMS, study.SCALED)
    runs = json.loads((folder / LEVELS).read_text())["runs"]
    assert len(runs) == len(study.ARMS) * len(committed.training_seeds)
    level = np.mean([run["level"] for run in runs.values()])
    base = np.mean(
        [
            row["concept_similarity"]
            for row in committed.arms["rank32"][0].rows
            if (row["model"], row["category"]) == ("base", "success")
        ]
    )
    assert committed.margins["concept_similarity"] == float(f"{MARGIN * (level - base):.3g}")
    assert committed.scale["margin"] == committed.margins["concept_similarity"]
    assert any("was set after these evaluations, which had one of 0.02" in note for note in committed.notes)


def test_levels_are_measured_for_evaluations_without_them(tmp_path, tiny_clip, processed_data):
    folder = write_study(tmp_path / "study", seeds=(1, 2, 3))
    places = [path for path in folder.glob("*/*/metrics.json") if path.parent.name != "comparison"]
    assert not levels.write_levels(folder, processed_data) and not (folder / LEVELS).exists()
    for path in places:
        record = json.loads(path.read_text())
        del record["summary"]["concept_scale"]
        record["config"] |= dict(clip_model=str(tiny_clip), clip_revision=None)
        record["adapter"]["held_out"] = ["images/image_01.png"]
        record["adapter"]["metadata"] |= dict(data_sha256=read_dataset(processed_data, 64).sha256)
        path.write_text(json.dumps(record))
    unknown = read_study(folder, ARMS, SCALED)
    assert "concept_similarity" not in unknown.margins
    assert any("No verdict rests on concept similarity" in note for note in unknown.notes)
    claims, rows = judge_claims(unknown)
    assert "concept_similarity" not in {row["metric"] for row in rows}

    levels.write_levels(folder, processed_data)
    record = json.loads((folder / LEVELS).read_text())
    clip = load_clip(tiny_clip)
    embeddings = clip.embed([picture(number) for number in range(2, 9)])
    expected = (embeddings @ embeddings.T)[~np.eye(7, dtype=bool)].mean()
    assert record["encoder"]["sha256"] == clip.digest
    assert set(record["runs"]) == {path.parent.name for path in places}
    for run in record["runs"].values():
        assert (run["images"], run["level"]) == (7, pytest.approx(expected, abs=1e-5))
    scale = read_study(folder, ARMS, SCALED).scale
    assert scale["level"] == pytest.approx(expected, abs=1e-5)
