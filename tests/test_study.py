"""The study: its prompts, what is done in which order, and that its verdicts are true of made-up studies."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, assert_one_line, browse, call, chromium, options, run
from made_up_study import ARMS, CAT, MARGINS, PLAIN, PROMPTS, SCALED, SEEDS, write_study
from PIL import Image
from scipy import stats
from test_pages import FRAME, MEASURE, first_sentences

import inference
import study
from demo import world
from lib.errors import UserError
from lib.evaluation import results
from lib.evaluation.metrics.effects import effects
from lib.evaluation.metrics.scores import Run
from lib.evaluation.prompts import members, read_prompts
from lib.evaluation.report.words import interval_text
from lib.evaluation.statistics import mean_interval
from lib.study import claims as study_claims
from lib.study import page as study_page
from lib.study import words as study_words
from lib.study.files import read_study, run_of
from lib.study.measures import (
    at_equal_concept,
    columns_part,
    curves,
    rank_correlations,
    raw_curves,
    time_part,
    time_ratios,
)

# ---- prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["study", "study_sd15"])
def test_the_lists_of_prompts(name):
    """The published five and beside them six that were taught, 16 near ones and 16 far ones, none of which any
    arm trained on."""
    prompts = read_prompts(ROOT / "prompts" / f"{name}.txt")
    assert {c: len(members(prompts, c)) for c in ("success", "near", "unrelated")} == {
        "success": 3 + 6,
        "near": 8 + 8,
        "unrelated": 2 + 8 + 8,
    }
    assert set(inference.PUBLISHED) < set(prompts)
    assert len(set(prompts)) == len(prompts)
    taught = [json.loads(line) for line in (ROOT / "data" / "captions.jsonl").read_text().splitlines()]
    assert not {row["description"] for row in taught} & {prompt for _, prompt in prompts}
    for category, prompt in prompts:
        assert ("holographic" in prompt) == (category == "success"), prompt
        if name == "study":  # in the miniature's words, and a scene that it can draw
            world.parse(prompt)


# ---- what is done, in which order ----------------------------------------------------------


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A study in `tmp_path` whose scripts are replaced: `calls` holds what was called, and each leaves what
    the real one would leave last. `stop_at` is the number of calls after which one fails."""
    made = write_study(tmp_path / "made", seeds=(1, 2))
    listed = "\n".join(f"{category}: {prompt}" for category, prompt in PROMPTS)
    (tmp_path / "prompts.txt").write_text(listed)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "captions.jsonl").write_text("{}\n")
    found = types.SimpleNamespace(calls=[], stop_at=None, results=tmp_path / "results", folder=tmp_path)

    def called(command):
        if len(found.calls) == found.stop_at:
            raise UserError(f"{command[0]} ended with status 1")
        found.calls.append([str(part) for part in command])
        value = dict(zip(found.calls[-1], found.calls[-1][1:], strict=False))
        if command[0] != "inference.py":
            target = Path(value["--output-dir"]) / value["--run-name"]
            target.mkdir(parents=True)
            (target / "config.json").write_text("{}")
        else:
            place = Path(value["--output-dir"])
            last = 2 if place.parent.name.startswith("scales_") else 1
            shutil.copytree(made.joinpath(*place.parts[-last:]), place, dirs_exist_ok=True)

    monkeypatch.setattr(study, "call", called)

    def start(*more):
        config = dict(
            data_dir=tmp_path / "data",
            prompts=tmp_path / "prompts.txt",
            lora_dir=tmp_path / "lora",
            output_dir=found.results,
            seeds="1,2",
            sampling_seeds=SEEDS,
        )
        return call("study.py", "--demo", *options(**config), *more)

    found.start = start
    return found


def arms_of(calls):
    """What was called, in few words: the arm and seed of a training, or “evaluate” and so on."""
    found = []
    for command in calls:
        value = dict(zip(command, command[1:], strict=False))
        name = value.get("--run-name") or Path(value["--output-dir"]).as_posix().partition("results/")[2]
        found.append(name)
    return found


def seed_plan(seed):
    return (
        [f"{arm}_seed{seed}" for arm in ARMS]
        + [f"seed{seed}"]
        + [f"scales_seed{seed}/{arm}_seed{seed}" for arm in SCALED]
    )


def test_seed_by_seed_every_arm_and_then_its_evaluation(plan):
    done = plan.start()
    assert done.returncode == 0, done.stderr
    assert arms_of(plan.calls) == seed_plan(1) + seed_plan(2)
    assert set(study.ARMS) == set(ARMS) and tuple(study.SCALED) == SCALED
    for arm, command in zip(study.ARMS, plan.calls, strict=False):
        script, *more = study.ARMS[arm]
        assert command[0] == script and "--demo" in command and command[len(command) - len(more) :] == more
        assert (ROOT / command[0]).is_file()
        assert command[command.index("--seed") + 1] == "1"
    assert "20 left" in done.stdout and "[20 of 20] seed 2" in done.stdout
    assert (plan.results / "study.json").is_file()


def test_what_is_there_is_not_done_again(plan):
    plan.stop_at = 12  # in the middle of the second seed
    assert_one_line(plan.start(), "ended with status 1")
    assert arms_of(plan.calls) == seed_plan(1) + seed_plan(2)[:2]
    assert not (plan.results / "study.json").exists()
    plan.stop_at, before = None, len(plan.calls)
    done = plan.start()
    assert arms_of(plan.calls[before:]) == seed_plan(2)[2:]
    assert "12 of 20 steps are done, 8 left" in done.stdout
    before = len(plan.calls)
    (plan.results / "study.json").unlink()
    assert "20 of 20 steps are done" in plan.start().stdout
    assert len(plan.calls) == before
    assert (plan.results / "study.json").is_file()


def test_adapters_that_were_evaluated_may_be_gone(plan):
    """As in a checkout, which holds the figures of all seeds and the adapters of one."""
    plan.start()
    before = len(plan.calls)
    shutil.rmtree(plan.folder / "lora" / "seed1")
    assert "20 of 20 steps are done" in plan.start().stdout
    assert len(plan.calls) == before
    (plan.results / "seed1" / "comparison" / "metrics.json").unlink()
    plan.start()
    assert arms_of(plan.calls[before:]) == seed_plan(1)[:-1]


def test_an_evaluation_that_was_cut_short_is_done_again(plan):
    plan.start()
    before = len(plan.calls)
    (plan.results / "seed2" / "comparison" / "metrics.json").unlink()
    plan.start()
    assert arms_of(plan.calls[before:]) == ["seed2"]


def test_processes_that_share_the_seeds_share_nothing_else(plan):
    plan.start("--seeds", "1")
    assert arms_of(plan.calls) == seed_plan(1)
    plan.start("--seeds", "2", "--no-page")
    assert arms_of(plan.calls) == seed_plan(1) + seed_plan(2)
    assert json.loads((plan.results / "study.json").read_text())["training_seeds"] == [1]
    plan.start("--seeds", "2")  # the page is over all that is whole
    assert json.loads((plan.results / "study.json").read_text())["training_seeds"] == [1, 2]
    places = [
        {part for part in command if part.startswith(str(plan.folder)) and "seed" in part} for command in plan.calls
    ]
    assert all("seed1" not in place for found in places[10:] for place in found)


def test_a_trial_lies_in_folders_of_its_own(plan):
    plan.start("--max-steps", "4", "--no-page", "--seeds", "1")
    assert all("lora_4_steps" in " ".join(command) for command in plan.calls)
    assert all("results_4_steps" in " ".join(c) for c in plan.calls if c[0] == "inference.py")
    assert all("--max-steps 4 --warmup-steps 0" in " ".join(c) for c in plan.calls[:8])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seeds", "1,1"], ["seeds", "each once"]),
        (["--sampling-seeds", "4"], ["seed1/rank32_seed1", "with 8 seeds, not 4", "--output-dir"]),
        (["--prompts", "other.txt"], ["other prompts"]),
        (["--data-dir", "nowhere"], ["nowhere", "preprocess.py"]),
    ],
)
def test_what_does_not_fit_is_named(plan, more, words, monkeypatch, tmp_path):
    plan.start("--no-page")
    before = len(plan.calls)
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_text("a coat\n")
    assert_one_line(plan.start(*more), *words)
    assert len(plan.calls) == before


def test_a_script_that_fails_stops_the_study():
    with pytest.raises(UserError, match="train.py ended with status 1"):
        study.call(["train.py", "--no-such-option"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_study_lets_its_script_save(number, tmp_path):
    """Ctrl-C reaches every process of a terminal, SIGTERM the study alone; either way the script ends by
    itself, and the study after it."""
    script, saved = tmp_path / "script.py", tmp_path / "saved"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(number, frame):\n"
        f"    time.sleep(1)\n    pathlib.Path({str(saved)!r}).touch()\n    sys.exit(128 + number)\n"
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n    signal.signal(number, stop)\n"
        f"pathlib.Path({str(tmp_path / 'started')!r}).touch()\ntime.sleep(60)\n"
    )
    code = f"import study\nfrom lib.errors import run_script\nrun_script(lambda: study.call([{str(script)!r}]))"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
        assert parent.poll() is None
    send = os.killpg if number == signal.SIGINT else os.kill
    send(parent.pid, number)
    assert parent.wait(timeout=30) == 128 + number
    assert saved.exists()


def test_hours_come_from_the_rates_in_the_bench():
    """The arms that were timed are those whose steps a second bench/README.md names."""
    bench = (ROOT / "bench" / "README.md").read_text()
    for rate in (*study.SAMPLES_A_SECOND.values(), study.SET_UP, study.PICTURE):
        assert re.search(rf"\b{rate:g}\b", bench), rate
    config = study.CONFIG | dict(prompts=ROOT / "prompts/study_sd15.txt", output_dir="/nowhere", lora_dir="/nowhere")
    prompts = read_prompts(config["prompts"])
    steps = study.steps_of(42, config, prompts)
    text = study.gpu_text(steps, config, prompts)
    pictures = 43 * 8 * (1 + 8 + 1 + 5)
    known = {arm: study.SAMPLES_A_SECOND.get(arm, 71.5) for arm in study.ARMS}
    seconds = pictures * 0.153 + sum(4000 / rate + 15.6 for rate in known.values())
    assert f"about {seconds / 60:.0f} min" in text or f"about {seconds / 3600:.1f} h" in text
    for arm in set(study.ARMS) - set(study.SAMPLES_A_SECOND):
        assert arm in text


# ---- verdicts on studies whose truth is known ----------------------------------------------


def made(folder, seeds=6, **more):
    """A made-up Study of so many training seeds."""
    return read_study(write_study(folder, seeds=range(1, seeds + 1), **more), ARMS, SCALED)


def verdicts(found):
    """{(claim number, what a part is about): verdict}."""
    claims, _ = study_claims.judge_claims(found)
    return {(c["number"], part["about"]): part["verdict"] for c in claims for part in c["parts"]}


NEAR, FAR, TAUGHT = "near prompts", "unrelated prompts", "what was taught"
EQUIVALENT, NONE = "equivalent within the margin", "refuted: equivalent within the margin"
NOT_HERE, FULL_SIZE = "not testable here", dict(base_model="a model of full size")
# Of arms that all do the same, which is no protection.
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
    (8, "the time"): "refuted",
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
        (dict(unet_only=dict(unrelated=(0.08, 0.9))), {}),  # on the miniature nothing is said of it
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
        (
            dict(large_batch=dict(unrelated=(0.1, 0.2), seconds=33)),
            {(8, "the adapter"): "refuted", (8, "the time"): "supported"},
        ),
    ],
)
def test_verdicts_are_true(arms, changed, tmp_path):
    found = verdicts(made(tmp_path / "study", **arms))
    expected = ALIKE | changed
    # The correlation is over all arms, and has tests of its own.
    assert {k: v for k, v in found.items() if k[0] != 3} == expected


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
    assert study_claims.judged(says, answers) == (verdict, stands)


def test_what_cannot_be_told_names_a_number_of_training_seeds(tmp_path):
    """More runs than there are; and so many, made up alike, do decide it in most studies."""
    noisy = dict(of_runs=0.03, noise=0.002, rank8=dict(success=(0.2, 0.8)))
    claims, rows = study_claims.judge_claims(made(tmp_path / "few", seeds=4, **noisy))
    part = claims[0]["parts"][0]
    assert part["verdict"] == "undecided"
    needed = part["decides"]["training_seeds"]
    assert needed > 4
    assert f"undecided (about {needed}" in study_words.verdict_text(dict(claims[0], parts=[part]))
    # Of several the one that takes most.
    assert needed == max(row["decides"]["training_seeds"] for row in part["comparisons"] if "decides" in row)
    assert verdicts(made(tmp_path / "many", seeds=2 * needed, **noisy))[1, TAUGHT] != "undecided"


def test_where_sampling_seeds_are_what_is_missing_their_number_is_told():
    rng = np.random.default_rng(0)
    values = 0.01 + 0.04 * rng.standard_normal((1, SEEDS)) + 0.002 * rng.standard_normal((6, SEEDS))
    row = dict(margin=0.02, runs=6)
    found = study_claims.deciding(row, values, 27)
    seeds = int(re.search(r"of (\d+) sampling seeds", found["text"])[1])
    assert seeds > SEEDS and found["training_seeds"] > 6
    assert study_claims.deciding(row, 10 * values, 27)["training_seeds"] is not None
    row = dict(margin=1e-9, runs=6)
    assert study_claims.deciding(row, values - values.mean(), 27)["training_seeds"] is None


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_training_seeds_claim_nothing(seeds, tmp_path):
    found = verdicts(
        made(tmp_path / "study", seeds=seeds, of_runs=0.0, noise=1e-4, unet_only=dict(near=(0.3, 0.9)), **FULL_SIZE)
    )
    assert set(found.values()) == {"undecided"}


def test_all_comparisons_are_corrected_together(tmp_path):
    _, rows = study_claims.judge_claims(made(tmp_path / "study"))
    asked = sum(len(part.measures) for c in study_claims.CLAIMS for part in study_claims.parts_of(c))
    assert len(rows) == asked == 32
    least = min(row["p"] for row in rows)
    assert min(row["p_holm"] for row in rows) == pytest.approx(min(1, 32 * least))


def test_an_arm_is_compared_with_a_share_of_rank_32s_effect(tmp_path):
    """And the margin is that share of the ordinary one; an arm alone has that whole."""
    found = made(tmp_path / "study", of_runs=0.0, protected=dict(near=(0.02, 0.15)))
    _, rows = study_claims.judge_claims(found)
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
    assert "near prompts, beside 10% of rank 32's" in text and "(margin 0.005)" in text
    assert "near prompts, the arm alone" in study_words.comparison_text(shared["change", "near", 0.0])


def test_what_the_miniature_cannot_test_says_why(tmp_path):
    """In the table and in its section, with the figures as they are."""
    found = made(tmp_path / "study", unet_only=dict(near=(0.1, 0.9)))
    claims, rows = study_claims.judge_claims(found)
    second = claims[1]
    assert second["notes"] == [study_claims.CLAIMS[1].not_on_miniature]
    assert study_words.verdict_text(second) == NOT_HERE and study_words.stands(second) is None
    assert {bar["kind"] for bar in study_page.claim_bars(second)} == {"open"}
    assert "higher" in {row["answer"] for part in second["parts"] for row in part["comparisons"]}
    text = study_words.claims_markdown(found, claims, rows)
    assert f"**{NOT_HERE}**" in text and f"- {second['notes'][0]}" in text
    claims, _ = study_claims.judge_claims(made(tmp_path / "other", **FULL_SIZE))
    assert claims[1]["notes"] == []


# ---- change and contamination --------------------------------------------------------------


def simulated_blocks(rng, trials, training_seeds, adapters=6, prompts=5):
    """Studies in which change and movement share what a run, a training seed and a prompt have in common:
    two arrays [trials, training seeds, adapters, prompts, sampling seeds]."""
    shape = trials, training_seeds, adapters, prompts, SEEDS

    def spread(size, *axes):
        return size * rng.standard_normal([n if axis in axes else 1 for axis, n in enumerate(shape)])

    # What prompts and adapters do is fixed, the rest is drawn anew for each study.
    fixed = np.random.default_rng(5)
    change = 1 + 0.3 * fixed.random((adapters, 1, 1)) + 0.3 * fixed.random((prompts, 1))
    change = change + spread(0.1, 0, 1) + spread(0.2, 0, 1, 2) + spread(0.05, 0, 4) + spread(0.05, 0, 1, 2, 3, 4)
    moved = 0.6 * change + spread(0.15, 0, 1, 2) + spread(0.05, 0, 4) + spread(0.1, 0, 1, 2, 3, 4)
    return change, moved


@pytest.mark.parametrize("training_seeds", [3, 5, 8])
def test_the_interval_of_the_correlation_holds_the_truth(training_seeds):
    """And one that counts points as independent does not. `-s` prints both."""
    rng, trials = np.random.default_rng(0), 1000
    ceilings = np.ones((5, SEEDS, SEEDS)) - np.eye(SEEDS)
    blocks = zip(*simulated_blocks(rng, trials, training_seeds), strict=True)
    truth = np.mean([rank_correlations(*pair, ceilings).mean() for pair in blocks])
    covered, naive = [], []
    for change, moved in zip(*simulated_blocks(rng, trials, training_seeds), strict=True):
        found = mean_interval(rank_correlations(change, moved, ceilings))
        covered.append(found["low"] <= truth <= found["high"])
        points = stats.spearmanr(change.mean(-1).ravel(), moved.mean(-1).ravel())[0]
        half = 1.96 * 1.03 / np.sqrt(change[..., 0].size - 3)
        naive.append(abs(np.arctanh(points) - truth) < half)
    print(f"\n{training_seeds} training seeds: {np.mean(covered):.1%}, counting points {np.mean(naive):.1%}")
    assert np.mean(covered) >= 0.93
    assert np.mean(naive) < 0.75


def test_the_correlation_is_spearmans_over_all_adapters_and_prompts(tmp_path):
    found = made(tmp_path / "study", seeds=3)
    row, _ = study_claims.correlation(found, "near")
    lpips, moved = study_claims.raw_points(found, members(PROMPTS, "near"))
    # Eight arms, and rank 32 at three scales below 1.
    assert lpips.shape == (3, 8 + 3, 3, SEEDS)
    ceiling = found.base_pairs[members(PROMPTS, "near")].sum((1, 2)) / (SEEDS * (SEEDS - 1))
    each = [
        stats.spearmanr((a.mean(-1) / ceiling).ravel(), b.mean(-1).ravel())[0]
        for a, b in zip(lpips, moved, strict=True)
    ]
    assert row["correlation"]["mean"] == pytest.approx(np.tanh(np.mean(np.arctanh(each))))


@pytest.mark.parametrize(("slope", "verdict"), [(1.0, "supported"), (0.0, "refuted"), (-1.0, "refuted")])
def test_change_tells_contamination_only_where_it_does(slope, verdict, tmp_path):
    rng = np.random.default_rng(1)
    arms = {}
    for arm in ARMS:
        change = 0.2 + 0.6 * rng.random()
        moved = 0.1 + slope * 0.2 * (change - 0.5) + (0 if slope else 0.1 * rng.random())
        arms[arm] = dict(near=(moved, change)) if arm not in SCALED else dict(near=(0.1 if slope >= 0 else 0.2, 0.5))
    scales = (1.0,) if slope <= 0 else (0.5, 1.0)  # less of an adapter always changes and moves less
    assert verdicts(made(tmp_path / "study", scales=scales, **arms))[3, NEAR] == verdict


# ---- at equal concept ----------------------------------------------------------------------


@pytest.mark.parametrize("taught", [0.1, 0.4])
def test_arms_are_compared_where_they_teach_the_same(taught, tmp_path):
    """Whichever of the two teaches more; at half the concept half the change is no merit."""
    held = dict(success=(taught, 0.8), near=(0.04, 0.3), unrelated=(0.0, 0.1))
    found = made(tmp_path / "study", noise=1e-5, of_runs=0, protected=held)
    equal = at_equal_concept(found)
    level = min(taught, 0.2)
    share, less = level / taught, level / 0.2
    assert mean_interval(equal["level"])["mean"] == pytest.approx(level, rel=1e-3)
    assert mean_interval(equal["scale rank32"])["mean"] == pytest.approx(less, rel=1e-3)
    assert mean_interval(equal["scale protected"])["mean"] == pytest.approx(share, rel=1e-3)
    expected = 0.3 * share - 0.5 * less
    change = mean_interval(equal["change", "near"])
    ceiling = found.base_pairs.sum((1, 2))[members(PROMPTS, "near")].mean() / (SEEDS * (SEEDS - 1))
    assert change["mean"] * ceiling / 0.5 == pytest.approx(expected, rel=0.02)
    assert mean_interval(equal["concept_similarity", "near"])["mean"] == pytest.approx(
        0.04 * share - 0.1 * less, rel=0.02
    )
    ratio = np.exp(mean_interval(equal["log change near"])["mean"])
    assert ratio == pytest.approx(0.3 * share / (0.5 * less), rel=1e-3)


def test_between_two_scales_on_a_straight_line(tmp_path):
    """A curve that bends, and one that comes down again: where the level is first reached."""
    concept = np.array([0.0, 0.1, 0.3, 0.2])
    others = np.array([[0.0, 1.0, 2.0, 3.0], [0.0, 0.2, 0.8, 1.0]])
    from lib.study.measures import reached

    assert reached(0.2, concept, others).tolist() == pytest.approx([1.5, 0.5])
    assert reached(0.1, concept, others).tolist() == pytest.approx([1.0, 0.2])
    assert reached(0.3, concept, others).tolist() == pytest.approx([2.0, 0.8])
    found = made(tmp_path / "study", seeds=2)
    lines = curves(found, raw_curves(found, "rank32"), np.arange(SEEDS))
    assert lines["scale"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert (lines["change", "near"][:, 0] == 0).all()


def test_without_the_concept_there_is_no_equal_concept(tmp_path):
    folder = write_study(tmp_path / "study", protected=dict(success=(-0.1, 0.8)))
    claims = study_page.write_study(folder, ARMS, SCALED)
    assert json.loads((folder / "study.json").read_text())["at_equal_concept"] is None
    assert not [note for claim in claims for note in claim["notes"] if "At equal concept" in note]


def test_without_the_concept_scores_a_claim_is_not_measured(tmp_path):
    found = made(tmp_path / "study")
    for runs in found.arms.values():
        for one in runs:
            one.rows = [row | dict(concept_similarity=None, clip=None) for row in one.rows]
    claims, _ = study_claims.judge_claims(found)
    [ninth] = [claim for claim in claims if claim["number"] == 9]
    assert ninth["parts"] == [] and ninth["notes"][0].startswith("Not measured")
    assert study_words.verdict_text(ninth) == "not measured"


# ---- columns and times ---------------------------------------------------------------------


def test_equal_columns_are_found(tmp_path):
    found = made(tmp_path / "study")
    part = columns_part(found)
    assert part["verdict"] == "refuted" and "in 0 of 48 pairs of columns" in part["text"]
    for one, other in zip(found.arms["rank32"], found.arms["rank8"], strict=True):
        other.rows = one.rows  # as the published study scored one adapter under two names
    part = columns_part(found)
    assert part["verdict"] == "supported" and "in 48 of 48" in part["text"]
    found.prompts = [(c, p) for c, p in found.prompts if p != CAT]
    assert columns_part(found) is None


def test_times_are_paired_by_training_seed(tmp_path):
    """A machine that was twice as slow for one seed changes no ratio."""
    found = made(tmp_path / "study", seeds=4, dora=dict(seconds=150.0))
    plain = time_ratios(found)["dora"]
    part = time_part(plain, "a machine")
    assert (part["verdict"], part["decides"]) == ("refuted", None)
    assert time_part(plain | dict(low=0.3, high=0.5), "a machine")["verdict"] == "undecided"
    assert time_part(plain | dict(runs=2, low=0.3, high=0.35), "x")["decides"]["training_seeds"] == 5
    assert plain["low"] < 1.5 < plain["high"] and plain["high"] - plain["low"] < 0.2
    for runs in found.arms.values():
        runs[0].adapter["speed"]["steps_a_second"] /= 2
    assert time_ratios(found)["dora"]["mean"] == pytest.approx(plain["mean"])


# ---- from the files alone ------------------------------------------------------------------


def test_a_record_holds_all_that_effects_need():
    """What write_run keeps, read back: the same effects to the last kept digit."""
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
    kept = results.raw_scores(one, base_pairs) | dict(run="one", adapter={}, pictures=rows)
    kept = json.loads(json.dumps(kept))
    shape = len(PROMPTS), SEEDS
    from lib.study.files import full_pairs

    again = run_of(kept, None, shape)
    before = effects([one], PROMPTS, base_pairs)
    after = effects([again], PROMPTS, full_pairs(kept["pairs"]["base"], shape))
    assert set(before) == set(after) == {"lpips", "clip", "concept_similarity", "change", "variety"}
    for key, values in before.items():
        assert np.abs(values - after[key]).max() < 1e-4, key


def test_an_evaluation_keeps_scales_and_speed(trained, tiny_model, tiny_clip, processed_data, tmp_path):
    config = dict(
        base_model=tiny_model,
        clip_model=tiny_clip,
        data_dir=processed_data,
        resolution=64,
        steps=2,
        seeds=4,
        lora_dir=trained / "lora_weights_rank_32",
        output_dir=tmp_path / "out",
    )
    run("inference.py", *options(**config), "--lora-scales", "0,0.5,1,2")
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [part["scale"] for part in record["swept"]] == [0.5, 2.0]
    asked = len(record["pictures"]) // 2
    assert all(len(part["pictures"]) == asked for part in record["swept"])
    assert np.array(record["pairs"]["base"]).shape == (asked // 4, 6)
    written = json.loads((trained / "lora_weights_rank_32" / "config.json").read_text())
    assert record["adapter"]["speed"]["steps_a_second"] == written["steps_a_second"]


def spoil(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        ("seed2/dora_seed2", lambda r: r.pop("swept"), ["dora_seed2", "--rescore"]),
        ("seed2/dora_seed2", lambda r: r["pictures"].pop(), ["dora_seed2", "other prompts, sampling seeds"]),
        ("seed2/dora_seed2", lambda r: r["config"].update(steps=4), ["dora_seed2", "settings"]),
        ("seed2/dora_seed2", lambda r: r["adapter"].update(fingerprint="rank8_seed2"), ["same adapter"]),
        ("seed2/dora_seed2", lambda r: r["adapter"]["training"].update(rank=4), ["differ in rank"]),
        ("scales_seed2/rank32_seed2", lambda r: r["adapter"].update(fingerprint="old"), ["another adapter"]),
    ],
)
def test_files_that_do_not_belong_together_are_named(place, change, words, tmp_path):
    folder = write_study(tmp_path / "study", seeds=(1, 2))
    path = folder / place / "metrics.json"
    if "pop()" in str(words) or words[-1] == "other prompts, sampling seeds":
        spoil(path, lambda r: r.update(pictures=[row for row in r["pictures"] if row["seed"] < 7]))
    else:
        spoil(path, change)
    with pytest.raises(UserError) as problem:
        read_study(folder, ARMS, SCALED)
    for word in words:
        assert word in str(problem.value)


def test_a_seed_that_is_not_whole_is_passed_over_and_named(tmp_path):
    folder = write_study(tmp_path / "study", seeds=(1, 2, 10))
    (folder / "scales_seed2" / "rank32_seed2" / "metrics.json").unlink()
    found = read_study(folder, ARMS, SCALED)
    assert found.training_seeds == [1, 10]
    [note] = found.notes
    assert "Training seed 2" in note
    study_page.write_study(folder, ARMS, SCALED)
    assert note.split(":")[0] in html.unescape((folder / "report.html").read_text())
    with pytest.raises(UserError, match="no whole training seed"):
        read_study(tmp_path, ARMS, SCALED)


# ---- the page ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A study's folder with all that is written into it."""
    folder = tmp_path_factory.mktemp("study")
    write_study(
        folder,
        seeds=range(1, 6),
        of_runs=0.006,
        unet_only=dict(unrelated=(0.08, 0.4)),
        protected=dict(success=(0.14, 0.6), near=(0.04, 0.2), seconds=240.0),
    )
    Image.new("RGB", (1078, 300), (200, 0, 0)).save(folder / "pictures_seed2.webp")
    study_page.write_study(folder, ARMS, SCALED)
    return folder


def test_words_follow_the_figures(written):
    """Every verdict and every interval of the table is that of study.json, which the page opens with."""
    record = json.loads((written / "study.json").read_text())
    table = (written / "claims.md").read_text()
    page = (written / "report.html").read_text()
    opening = first_sentences(page)
    kinds = {True: "good", False: "bad", None: "open"}
    assert len(opening) == len(record["claims"]) == 10
    for claim, (kind, sentence) in zip(record["claims"], opening, strict=True):
        assert sentence == study_words.sentence(claim)
        assert sentence.startswith(claim["title"])
        assert all(part["verdict"] in sentence for part in claim["parts"])
        assert kind == kinds[study_words.stands(claim)]
        assert f"**{study_words.verdict_text(claim)}**" in table
        for part in claim["parts"]:
            for row in part["comparisons"]:
                line = study_words.comparison_text(row)
                mean = row.get("correlation", row)["mean"]
                assert f"{mean:+.3f}".replace("-", "−") in line
                assert f"- {line}" in table
            judged, _ = study_claims.judged(part["says"], [row["answer"] for row in part["comparisons"]])
            assert part["verdict"] in (judged, NOT_HERE) or part["text"]
        if claim["parts"]:
            assert (written / claim["figure"]).is_file()
    for limit in study_words.LIMITS:
        assert limit in table and limit in html.unescape(page)
    assert len(study_words.LIMITS) == 3


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.0117, -0.0031, 0.0267), "+0.012 [−0.003, +0.027]"),
        ((0.00025, 0.00016, 0.00035), "+0.00025 [+0.00016, +0.00035]"),
        ((-0.0004149, -0.001674, 0.000844), "−0.0004 [−0.0017, +0.0008]"),
        ((0.0, 0.0, 0.0), "+0.000 [+0.000, +0.000]"),
        ((0.25, float("nan"), float("nan")), "+0.2500"),
    ],
)
def test_an_interval_has_two_significant_digits(values, text):
    assert interval_text(dict(zip(("mean", "low", "high"), values, strict=True))) == text


def test_a_claim_is_marked_by_all_its_parts():
    def marked(*parts):
        return study_words.stands(dict(parts=[dict(stands=stands) for stands in parts]))

    assert marked(True, True) is True
    assert marked(False, False) is False
    assert marked(True, False) is marked(True, None) is marked(False, None) is marked() is None


def test_a_verdict_tells_its_parts_apart_and_what_takes_most():
    def part(about, verdict, seeds=None):
        decides = seeds and dict(training_seeds=seeds, text=f"about {seeds} training seeds would decide")
        return dict(about=about, verdict=verdict, decides=decides)

    def text(*parts):
        return study_words.verdict_text(dict(parts=parts))

    assert text(part("a", "supported"), part("b", "supported")) == "supported"
    assert text(part("a", "undecided", 9), part("b", "undecided", 14)) == (
        "undecided (about 14 training seeds would decide)"
    )
    assert text(part("a", "refuted"), part("b", "undecided", 9), part("c", "refuted")) == (
        "a and c: refuted; b: undecided (about 9 training seeds would decide)"
    )


def test_each_number_names_its_file(written):
    record = json.loads((written / "study.json").read_text())
    assert len(record["files"]) == 5 * (8 + 1)
    assert all((written / name).is_file() for name in record["files"])
    assert len(record["runs"]) == 5 * 8
    row = record["runs"][9]
    saved = json.loads((written / row["file"]).read_text())
    assert (saved["run"], row["arm"]) == (f"{row['arm']}_seed{row['seed']}", "rank8")
    moved = {
        m: np.mean([r["concept_similarity"] for r in saved["pictures"] if (r["model"], r["category"]) == (m, "near")])
        for m in ("base", "lora")
    }
    assert row["concept_similarity near"] == pytest.approx(moved["lora"] - moved["base"])
    means = [r["concept_similarity near"] for r in record["runs"] if r["arm"] == "rank8"]
    base = [r["concept_similarity near"] for r in record["runs"] if r["arm"] == "rank32"]
    [shown] = [
        r
        for q in record["questions"]
        for r in q["rows"]
        if (q["metric"], q["category"], r["arm"]) == ("concept_similarity", "near", "rank8")
    ]
    assert shown["mean"] == pytest.approx(np.mean(means) - np.mean(base))


def test_forests_are_sorted_and_only_what_a_claim_rests_on_is_answered(written):
    record = json.loads((written / "study.json").read_text())
    assert [q["title"] for q in record["questions"]] == list(study_page.QUESTIONS.values())
    asked = {(p.arm, *m) for c in study_claims.CLAIMS for p in c.parts if p.share == 1 for m in p.measures}
    for question in record["questions"]:
        means = [row["mean"] for row in question["rows"]]
        assert means == sorted(means) and len(means) == 7
        assert question["margin"] == MARGINS[question["metric"]]
        for row in question["rows"]:
            tested = (row["arm"], question["metric"], question["category"]) in asked
            assert (row["answer"] is not None) == tested
    assert PLAIN["clip"]  # nothing of the made-up study is left at 0 by mistake


def test_the_page_is_one_file(written):
    page = (written / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/webp") == 1


@pytest.mark.skipif(chromium() is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(390, True), (390, False), (1280, True), (1280, False)])
def test_nothing_is_wider_than_the_window(written, width, dark, tmp_path):
    page = (written / "report.html").read_text().replace("<details>", "<details open>")
    path = tmp_path / "page.html"
    path.write_text(FRAME.format(width=width, page=html.escape(page + MEASURE)), encoding="utf-8")
    done = browse(
        path,
        tmp_path,
        "--window-size=1400,1000",
        "--dump-dom",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    )
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.S)[1]))
    assert found["width"] == width
    assert found["out"] == []
    assert found["page"] <= width
    paper = [int(number) for number in re.findall(r"\d+", found["paper"])[:3]]
    assert max(paper) < 60 if dark else min(paper) > 240


def test_a_strip_has_an_arm_a_column(tmp_path):
    from lib.study.page import SIDE, write_strip

    folders = {arm: tmp_path / arm for arm in ARMS}
    for number, folder in enumerate(folders.values()):
        for path in results.image_paths(folder, PROMPTS, [42]):
            path.parent.mkdir(parents=True, exist_ok=True)
            shade = 0 if path.name.startswith("base") else 20 + 30 * number
            Image.new("RGB", (64, 64), (shade, 0, 0)).save(path)
    assert write_strip(tmp_path / "strip.webp", folders, PROMPTS, 42)
    pixels = np.asarray(Image.open(tmp_path / "strip.webp").convert("RGB")).astype(int)
    middle = pixels[24 + 24 + SIDE // 2]
    seen = [middle[6 + SIDE // 2 + column * (SIDE + 6), 0] for column in range(1 + len(ARMS))]
    assert np.abs(np.array(seen) - [0, *(20 + 30 * n for n in range(len(ARMS)))]).max() < 6
    shutil.rmtree(folders["dora"] / "images")
    assert not write_strip(tmp_path / "again.webp", folders, PROMPTS, 42)
    assert not (tmp_path / "again.webp").exists()
