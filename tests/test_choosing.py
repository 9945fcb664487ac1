"""Which snapshot or scale to take: the choice is right where it can be, and its figure is not flattered."""

import json
import shutil

import numpy as np
import pytest
from conftest import TINY_RUN, assert_one_line, call, options, run
from PIL import Image
from test_evaluation import MARGINS, PROMPTS, SEEDS, base_pairs, fake_run
from test_results import reseeded

from lib.adapter_files import WEIGHTS
from lib.evaluation import choosing
from lib.evaluation.choosing import BASE, Point, choose
from lib.evaluation.metrics.scores import Run
from lib.evaluation.report import charts, words
from lib.evaluation.runs import held_out_losses
from lib.evaluation.statistics import mean_interval

NAME = "lora_weights_rank_32"
STEPS = [Point(step, 1.0) for step in range(100, 900, 100)]


def gains_of(means, rng, noise=0.004, own=0.002):
    """What points gain on 8 seeds: a seed's luck that they share, and some of their own."""
    shared = noise * rng.standard_normal(SEEDS)
    return {p: mean + shared + own * rng.standard_normal(SEEDS) for p, mean in means.items()}


def test_the_reported_figure_is_not_flattered():
    """Eight equal snapshots: the best of them by its score looks better than it is, on the seeds that
    chose it, and neither it nor the one that is advised does on the others."""
    rng = np.random.default_rng(1)
    flattered, reported = [], []
    for _ in range(400):
        gains = gains_of(dict.fromkeys(STEPS, 0.1), rng, noise=0.01, own=0.02)
        figures = [choosing.both_figures(gains[point]) for point in choose(gains, {}, 0.001)]
        flattered.append([figure["choosing"] - 0.1 for figure in figures])
        reported.append([figure["reported"]["mean"] - 0.1 for figure in figures])
    error = np.std(reported, axis=0) / len(reported) ** 0.5
    assert (np.abs(np.mean(reported, axis=0)) < 4 * error).all()
    assert np.mean(flattered, axis=0)[1] > 8 * error[1]


def test_the_seeds_that_report_have_no_say():
    rng = np.random.default_rng(2)
    gains = gains_of({p: 0.001 * p.step for p in STEPS}, rng, own=0.02)
    spoiled = gains_of(dict.fromkeys(STEPS, 0.0), rng)
    before = choose(gains, spoiled, 0.02)
    _, reporting = choosing.halves(SEEDS)
    for values in (*gains.values(), *spoiled.values()):
        values[reporting] = rng.standard_normal(len(reporting))
    assert choose(gains, spoiled, 0.02) == before


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        # Nothing more from step 400 on; what comes later is noise.
        ((0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2, 0.2), 400),
        # Something more at every step, each above the margin.
        ((0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4), 800),
        # A measurable gain within the margin is negligible.
        ((0.05, 0.1, 0.15, 0.2, 0.202, 0.204, 0.206, 0.207), 400),
        # It is better in the middle than at the end.
        ((0.05, 0.1, 0.15, 0.2, 0.25, 0.2, 0.1, 0.0), 500),
        # Nothing is gained at all.
        ((0.0,) * 8, 0),
        ((-0.1,) * 8, 0),
    ],
)
def test_the_earliest_from_which_more_gains_nothing(means, expected):
    gains = gains_of(dict(zip(STEPS, means, strict=True)), np.random.default_rng(3))
    chosen, best = choose(gains, {}, 0.02)
    assert chosen.step == expected
    assert (chosen == BASE) == (expected == 0)
    if expected:
        assert gains[best][::2].mean() == max(values[::2].mean() for values in gains.values())


def test_higher_is_above_the_margin_and_above_one_standard_error():
    steady, wide = np.array([0.9, 1.0, 1.1, 1.0]), np.array([-2.0, 4.0, 0.0, 2.0])
    assert steady.mean() == wide.mean() == 1
    assert choosing.is_higher(steady, 0.5)
    assert not choosing.is_higher(steady, 1.5)
    assert not choosing.is_higher(wide, 0.5)  # a standard error of 1.29
    assert choosing.is_higher(wide + 0.5, 0.5)
    assert not choosing.is_higher(-steady, 0.5)


def test_of_several_that_would_do_the_one_that_spoils_least():
    """Less training at full scale, or more at a smaller one."""
    means = {Point(s, c): min(0.2, 0.002 * s * c) for s in (100, 200) for c in (0.0, 0.5, 1.0)}
    gains = gains_of(means, np.random.default_rng(4))
    early, late = Point(100, 1.0), Point(200, 0.5)
    for least in (early, late):
        # On the seeds that choose; the others, which say the opposite, are not asked.
        spoiled = {p: np.full(SEEDS, 0.05) for p in means} | {least: np.tile([0.01, 1.0], SEEDS // 2)}
        assert choose(gains, spoiled, 0.02)[0] == least


def test_too_few_seeds_choose_nothing():
    assert choose({STEPS[0]: np.ones(8)}, {}, 0.02) is not None
    assert choose({STEPS[0]: np.ones(7)}, {}, 0.02) is None


# ---- in words and images ---------------------------------------------------------------------


def swept(gains, **changes):
    """A Run whose points have so much more concept similarity each."""
    found = Run("mine", None, {}, [], [])
    for point, gain in gains.items():
        part = fake_run(f"at {point}", concept=gain, noise=1e-3, near=gain / 2, **changes)
        part.rows = [row | dict(nearest_similarity=row["concept_similarity"]) for row in part.rows]
        found.points[point], found.sweep[point] = [], part
    return found


def test_advice_over_steps():
    found = swept({Point(100, 1.0): 0.05, Point(200, 1.0): 0.1, Point(300, 1.0): 0.101})
    found.adapter["held_out_losses"] = {"0": [0.3, 0.5], "100": [0.2, 0.1], "300": [0.25, 0.3]}
    rows, choice, advice = choosing.sweep_summary(found, PROMPTS, base_pairs(), MARGINS).values()
    assert (choice["chosen"]["step"], choice["chosen"]["scale"]) == (200, 1.0)
    assert choice["seeds"] == [4, 4]
    assert advice.startswith("Take step 200. ")
    assert f"{choice['chosen']['choosing']:+.3f} on the 4 choosing seeds" in advice
    assert words.interval_text(choice["chosen"]["reported"]) in advice
    assert "going on to step 300 changed it by" in advice
    assert "near prompts" in advice
    assert "The held-out loss was lowest at step 100" in advice
    # Both halves: the first is of the even seeds alone, the second of the odd ones.
    gains = choosing.swept_values(found.sweep[Point(200, 1.0)], PROMPTS, base_pairs())[choosing.CONCEPT]
    assert choice["chosen"]["choosing"] == pytest.approx(gains[::2].mean())
    assert choice["chosen"]["reported"]["mean"] == pytest.approx(gains[1::2].mean())
    further = choosing.swept_values(found.sweep[Point(300, 1.0)], PROMPTS, base_pairs())[choosing.CONCEPT]
    assert choice["going_on"][choosing.CONCEPT] == mean_interval((further - gains)[1::2][None])
    assert rows[0]["held_out"] == mean_interval([[-0.1, -0.4]])
    assert "held_out" not in rows[1]
    assert [row[0] for row in words.sweep_table(rows)] == ["Step", "100", "200", "300"]
    assert "–" in words.sweep_table(rows)[2]
    assert json.loads(json.dumps(choice))["chosen"]["step"] == 200


def test_advice_over_scales_and_over_both():
    gains = {0.0: 0.0, 0.5: 0.095, 1.0: 0.1}
    found = swept({Point(None, scale): gain for scale, gain in gains.items()})
    rows, choice, advice = choosing.sweep_summary(found, PROMPTS, base_pairs(), MARGINS).values()
    assert [row["scale"] for row in rows] == [0.0, 0.5, 1.0]
    assert advice.startswith("Take scale 0.5. ")
    assert words.sweep_table(rows)[0][:2] == ["Scale", "CLIP, success"]
    assert choosing.grid_table(rows) is None
    both = swept({Point(s, c): min(0.1, s * c / 1000) for s in (100, 200) for c in (0.5, 1.0)})
    rows, choice, advice = choosing.sweep_summary(both, PROMPTS, base_pairs(), MARGINS).values()
    assert advice.startswith("Take step ")
    table = choosing.grid_table(rows)
    assert [row[0] for row in table] == ["Step", "100", "200"]
    assert table[0][1:] == ["scale 0.5", "scale 1"]
    assert table[1][1].startswith(f"{rows[0][choosing.CONCEPT]['mean']:+.3f} / ")
    _, concept, others, *_ = charts.all_curves()
    assert charts.curve_figure(concept, dict(rows=rows, choice=choice))
    labels = [[label for label, _ in charts.curve_lines(c, rows, "step")] for c in (concept, others)]
    assert labels == [
        ["scale 0.5", "scale 1"],
        [
            "near prompts, scale 0.5",
            "unrelated prompts, scale 0.5",
            "near prompts, scale 1",
            "unrelated prompts, scale 1",
        ],
    ]
    assert charts.curve_figure(charts.all_curves()[-1], dict(rows=rows, choice=choice)) is None


def test_no_advice_where_there_is_nothing_to_advise():
    found = swept({Point(100, 1.0): 0.0, Point(200, 1.0): 0.0})
    summary = choosing.sweep_summary(found, PROMPTS, base_pairs(), MARGINS)
    assert summary["advice"].startswith("None is advised")
    assert choosing.chosen_point(summary) is None
    for part in found.sweep.values():
        for row in part.rows:
            row["concept_similarity"] = None
    summary = choosing.sweep_summary(found, PROMPTS, base_pairs(), MARGINS)
    assert "not measured" in summary["advice"]


def test_held_out_losses_that_are_not_there(tmp_path, capsys):
    assert held_out_losses(tmp_path / "log.jsonl", (0, 1)) == {}
    assert "no held-out loss" in capsys.readouterr().out
    log = [dict(step=s, validation_losses=[0.1, s]) for s in range(3)] + [dict(step=1, loss=2)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    assert held_out_losses(tmp_path / "log.jsonl", (0, 2)) == {"0": [0.1, 0], "2": [0.1, 2]}
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nno json')
    with pytest.raises(ValueError, match=r"log.jsonl is not what train.py writes"):
        held_out_losses(tmp_path / "log.jsonl", (0, 2))


# ---- the whole way -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def common(tiny_evaluation):
    return tiny_evaluation | dict(seeds=4)


@pytest.fixture(scope="module")
def kept(tiny_model, processed_data, tmp_path_factory):
    """A run with snapshots."""
    folder = tmp_path_factory.mktemp("kept")
    config = TINY_RUN | dict(base_model=tiny_model, data_dir=processed_data, output_dir=folder, snapshot_every=2)
    run("train.py", *options(**config))
    return folder / NAME


@pytest.fixture(scope="module")
def chosen(common, kept, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chosen") / "out"
    config = common | dict(lora_dir=kept, output_dir=folder, lora_scales="0.5,1")
    return folder, run("inference.py", *options(**config), "--snapshots")


def test_what_a_choice_leaves(chosen, kept):
    folder, done = chosen
    assert {p.name for p in folder.iterdir()} == {
        "choose.html",
        "images",
        "metrics.csv",
        "metrics.json",
        "overview.webp",
        "report.html",
        "summary.md",
    }
    found = {p.name for p in (folder / "images" / "a-yellow-raincoat").iterdir()}
    kinds = {name.rsplit("_", 1)[0] for name in found}
    assert kinds == {"base", "lora", "lora_step_000002", "lora_step_000004"} | {
        f"lora_step_00000{step}_scale_0.5" for step in (2, 4, 6)
    }
    assert len(found) == 4 * len(kinds)
    # The base is drawn once, each snapshot at each scale, and the run's own.
    assert f"{3 * 4 * 7} images in" in done.stdout
    record = json.loads((folder / "metrics.json").read_text())
    assert "reporting on the other needs 8" in record["summary"]["sweep"]["advice"]
    rows = record["summary"]["sweep"]["rows"]
    assert [(row["step"], row["scale"]) for row in rows] == [(s, c) for s in (2, 4, 6) for c in (0.5, 1.0)]
    assert ["held_out" in row for row in rows] == [False, True] * 3
    # Unlike the others, the last step's images are those that the verdicts are of.
    alone = record["summary"]["categories"]["success"]["concept_similarity"]
    assert rows[-1][choosing.CONCEPT]["mean"] == pytest.approx(alone["mean"])
    assert "choose.html" in done.stdout
    assert "choose.html" in (folder / "report.html").read_text()


def test_advice_comes_first_then_images_then_curves_then_tables(chosen):
    page = (chosen[0] / "choose.html").read_text()
    record = json.loads((chosen[0] / "metrics.json").read_text())
    places = [
        page.index(text)
        for text in (
            record["summary"]["sweep"]["advice"].partition(". ")[0],
            'class="strip"',
            "<h2>Curves",
            "<table>",
            "<h2>How this page was made",
        )
    ]
    assert places == sorted(places)
    assert "they say nothing of what another training run would give" in page
    assert page.count('<figure><img src="data:image/webp') + page.count("taken") >= 3 * 7


def test_measured_again_it_is_the_same(chosen, common, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(chosen[0], copy)
    config = {key: common[key] for key in ("clip_model", "similarity_model", "data_dir")}
    run("inference.py", "--rescore", *options(output_dir=copy, **config))
    before, after = (json.loads((place / "metrics.json").read_text()) for place in (chosen[0], copy))
    assert before["summary"] == after["summary"]
    assert before["points"] == after["points"]
    assert (copy / "images" / "a-red-leather-jacket" / "lora_step_000004_43.png").is_file()


def test_the_snapshots_differ_from_one_another(chosen):
    place = chosen[0] / "images" / "a-holographic-raincoat"
    kinds = ("base", "lora", "lora_step_000002", "lora_step_000004", "lora_step_000004_scale_0.5")
    shown = [np.asarray(Image.open(place / f"{kind}_42.png")).tobytes() for kind in kinds]
    assert len(set(shown)) == len(kinds)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: shutil.rmtree(run / "snapshots"), ("needs snapshots", "--snapshot-every")),
        (lambda run: (run / "config.json").unlink(), ("config.json",)),
        (lambda run: (run / "snapshots" / "step_000004" / WEIGHTS).write_bytes(b"x"), ("step_000004",)),
        (
            lambda run: (run / "snapshots" / "step_000004").rename(run / "snapshots" / "step_000009"),
            ("step 9", "after 6"),
        ),
        (
            lambda run: shutil.copytree(run / "snapshots" / "step_000004", run / "snapshots" / "step_000005"),
            ("step 4", "step 5", "the same adapter"),
        ),
    ],
)
def test_what_is_wrong_with_snapshots_is_named(common, kept, tmp_path, damage, words):
    shutil.copytree(kept, tmp_path / "run")
    damage(tmp_path / "run")
    config = common | dict(lora_dir=tmp_path / "run", output_dir=tmp_path / "out")
    assert_one_line(call("inference.py", *options(**config), "--snapshots"), *words)
    assert not (tmp_path / "out").exists()


def test_several_runs_have_a_choice_each(common, kept, tmp_path):
    weights, out = tmp_path / "weights", tmp_path / "out"
    shutil.copytree(kept, weights / f"{NAME}_seed1")
    reseeded(kept, weights / f"{NAME}_seed7", 7, 0.5, snapshot_every=3)
    snapshots = weights / f"{NAME}_seed7" / "snapshots"
    (snapshots / "step_000002").rename(snapshots / "step_000003")
    shutil.rmtree(snapshots / "step_000004")
    config = common | dict(lora_dir=weights, output_dir=out, clip_model="none", similarity_model="clip", seeds=1)
    run("inference.py", *options(**config), "--snapshots")
    points = {}
    for place in sorted(out.glob("*_seed*")):
        assert (place / "choose.html").is_file()
        record = json.loads((place / "metrics.json").read_text())
        points[place.name[-1]] = [tuple(point) for point in record["points"]]
    assert points == {"1": [(2, 1.0), (4, 1.0), (6, 1.0)], "7": [(3, 1.0), (6, 1.0)]}
    comparison = json.loads((out / "comparison" / "metrics.json").read_text())
    assert list(comparison["experiments"]) == [NAME]  # how often it was kept is no part of a recipe


def test_snapshots_of_pictures_drawn_elsewhere(tmp_path):
    done = call("inference.py", "--snapshots", "--score-dir", f"{tmp_path},{tmp_path}")
    assert_one_line(done, "score_dir", "snapshots")
