"""The table of metrics: a new entry reaches every file, table, chart, comparison and verdict, and no claim of a study."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import call, options, picture
from PIL import Image
from test_evaluation import MARGINS, PROMPTS, base_pairs, fake_run

import inference
import study
from lib import values
from lib.evaluation import choosing
from lib.evaluation.choosing import Point
from lib.evaluation.comparison import compare
from lib.evaluation.metrics import scores
from lib.evaluation.metrics.effects import effects
from lib.evaluation.metrics.scores import ImageSet, Run, scores_of
from lib.evaluation.metrics.table import DIFFERENCE, METRICS, Metric, Question
from lib.evaluation.report import charts, pages, words
from lib.evaluation.verdicts import analyse
from lib.study.claims import judge_claims
from lib.study.files import read_study

MARGIN = 0.03
DIMMED = Question(
    name="dimmed",
    asks="Did its images become darker?",
    wanted="no",
    says={"yes": "Its images became darker.", "no": "Its images stay bright.", "unclear": "Unclear: are they darker?"},
    text="The brightness of success prompts changed by {interval} (dimmed below {bound:g}). ",
    ends={"yes": "They lost light.", "no": "They lost none."},
    bar="brightness gained",
)


def mean_brightness(images, adapter):
    return [np.asarray(image).mean() / 255 for image in images.images]


@pytest.fixture
def brightness(monkeypatch):
    """A made-up metric, registered as its entry in the table and its margin in inference.py would be."""
    metric = Metric(
        name="mean brightness",
        short="Brightness",
        explained="Brightness: mean of all pixels.",
        kind=DIFFERENCE,
        scorer=mean_brightness,
        margin="brightness_margin",
        compared=("success",),
        swept={("success",): "Brightness gained"},
        tested={"success": (("below", -1), ("above", -1))},
        questions=(DIMMED,),
    )
    monkeypatch.setitem(METRICS, "brightness", metric)
    monkeypatch.setitem(inference.CONFIG, "brightness_margin", MARGIN)
    known = (*inference.VALUES, (values.number(0, 1), "brightness_margin"))
    monkeypatch.setattr(inference, "VALUES", known)


def brighter_run(name, gain, **changes):
    """A run of test_evaluation whose LoRA images are brighter by `gain`."""
    run = fake_run(name, **changes)
    rng = np.random.default_rng(1)
    for row in run.rows:
        row["brightness"] = 0.5 + 0.001 * rng.standard_normal() + gain * (row["model"] == "lora")
    return run


def evaluated(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_new_metric_is_measured_judged_and_shown(brightness, tmp_path):
    """The whole way of inference.py; measured again with another margin it is judged and shown with that one."""
    count = 4 * len(inference.PUBLISHED)
    for kind, dim in (("base", 0), ("lora", 60)):
        (tmp_path / kind).mkdir()
        for number in range(count):
            dark = np.asarray(picture(number)).astype(int) - dim - number % 3
            Image.fromarray(dark.clip(0).astype(np.uint8)).save(tmp_path / kind / f"{number}.png")
    out, clip = tmp_path / "out", dict(clip_model="none", similarity_model="clip")
    done = call("inference.py", *options(score_dir=f"{tmp_path / 'base'},{tmp_path / 'lora'}", output_dir=out, **clip))
    assert done.returncode == 0, done.stderr
    rows, record = list(csv.DictReader((out / "metrics.csv").open())), evaluated(out)
    moved = [
        float(lora["brightness"]) - float(base["brightness"]) for base, lora in zip(rows[::2], rows[1::2], strict=True)
    ]
    assert len(moved) == count
    assert max(moved) < -0.1
    assert record["pictures"][1]["brightness"] == pytest.approx(float(rows[1]["brightness"]))
    success = record["summary"]["categories"]["success"]
    assert success["brightness"]["mean"] == pytest.approx(np.mean(moved[:12]))
    assert success["brightness"]["low"] < success["brightness"]["mean"] < success["brightness"]["high"] < 0
    verdict = next(v for v in record["summary"]["verdicts"] if v["question"] == "dimmed")
    assert (verdict["answer"], "(dimmed below -0.03)" in verdict["text"]) == ("yes", True)
    page = (out / "report.html").read_text()
    assert words.interval_text(success["brightness"]) in page.replace("\u00a0", " ")
    assert all(text in page for text in ("Brightness difference", DIMMED.bar, DIMMED.says["yes"], "mean of all pixels"))

    done = call("inference.py", "--rescore", *options(output_dir=out, brightness_margin=0.9, **clip))
    assert done.returncode == 0, done.stderr
    again = evaluated(out)
    verdict = next(v for v in again["summary"]["verdicts"] if v["question"] == "dimmed")
    assert (verdict["answer"], "(dimmed below -0.9)" in verdict["text"]) == ("no", True)
    assert again["config"]["brightness_margin"] == again["summary"]["margins"]["brightness"] == 0.9


def test_a_new_metric_is_compared_and_swept(brightness):
    margins = MARGINS | dict(brightness=MARGIN)
    groups = {
        name: [brighter_run(f"{name}{seed}", gain, concept=0.2, seed=seed) for seed in range(3)]
        for name, gain in (("one", 0.0), ("two", 0.2))
    }
    [row] = [row for row in compare(groups, PROMPTS, base_pairs(), margins) if row["metric"] == "brightness"]
    assert (row["answer"], row["margin"]) == ("higher", MARGIN)
    assert "mean brightness on success prompts, two minus one: +0.200" in words.pair_sentence(row)
    summaries = {name: analyse(runs, PROMPTS, base_pairs(), margins) for name, runs in groups.items()}
    assert {"mean brightness, success prompts", "dimmed?"} <= {row[0] for row in words.comparison_table(summaries)}
    assert charts.verdict_bars(summaries)["dimmed"]["two"]["band"] == (-MARGIN, MARGIN)

    swept = Run("mine", None, {}, [], [])
    for step in (100, 200):
        point = Point(step, 1.0)
        swept.points[point], swept.sweep[point] = [], brighter_run(str(point), step / 1000)
    sweep = choosing.sweep_summary(swept, PROMPTS, base_pairs(), margins)
    assert sweep["rows"][1]["brightness success"]["mean"] == pytest.approx(0.2, abs=0.01)
    assert "Brightness, success" in words.sweep_table(sweep["rows"])[0]
    assert "mean of all pixels" in words.sweep_explained()
    [curve] = [curve for curve in pages.all_curves() if curve.title == "Brightness gained"]
    assert pages.curve_figure(curve, sweep)


def test_results_without_a_new_metric_are_still_judged(brightness):
    """An older metrics.json has neither its scores nor its margin: it was not measured there."""
    old, new = fake_run("old", concept=0.2), brighter_run("new", 0.2, concept=0.2)
    summary = analyse([old], PROMPTS, base_pairs(), MARGINS)
    assert "brightness" not in summary["categories"]["success"]
    assert "dimmed" not in [v["question"] for v in summary["verdicts"]]
    assert words.summary_text(summary)
    both = analyse([old, new], PROMPTS, base_pairs(), MARGINS | dict(brightness=MARGIN))
    assert "brightness" not in both["categories"]["success"]
    unjudged = analyse([new], PROMPTS, base_pairs(), MARGINS)  # measured, but its margin is unknown
    assert "brightness" in unjudged["categories"]["success"]
    assert "dimmed" not in [v["question"] for v in unjudged["verdicts"]]


def test_the_claims_of_the_committed_study_do_not_change(brightness, monkeypatch):
    """Nor does the family of comparisons that Holm's correction covers, had the study measured it."""
    committed = read_study(Path(study.__file__).parent / "results" / "study", study.ARMS, study.SCALED)
    before = json.dumps(judge_claims(committed))
    committed.margins["brightness"] = MARGIN
    for row in (row for runs in committed.arms.values() for run in runs for row in run.rows):
        row["brightness"] = 0.5
    claims, rows = judge_claims(committed)
    assert {row["metric"] for row in rows} == {"concept_similarity", "clip", "variety", "change", "rank correlation"}
    assert json.dumps((claims, rows)) == before
    monkeypatch.delitem(METRICS, "brightness")
    assert json.dumps(judge_claims(committed)) == before


def test_base_images_are_scored_once_for_all_adapters(monkeypatch):
    calls = []

    def scorer(images, adapter):
        calls.append(adapter)
        return [1.0] * len(images.images)

    entries = {
        key: Metric(key, key, key, DIFFERENCE, scorer=scorer, of_adapter=key == "own") for key in ("shared", "own")
    }
    monkeypatch.setattr(scores, "METRICS", entries)
    base = ImageSet([picture(1)], ["a coat"])
    for adapter in ("one", "two"):
        assert scores_of(base, adapter) == [dict(shared=1.0, own=1.0)]
    assert calls == ["one", "one", "two"]


def test_metrics_that_no_table_shows_are_left_out_of_the_effects():
    run = fake_run("one")
    for row in run.rows:
        row["nearest_similarity"] = 0.5
    assert "nearest_similarity" not in effects([run], PROMPTS, base_pairs())
    assert "nearest_similarity" in effects([run], PROMPTS, base_pairs(), hidden=True)
