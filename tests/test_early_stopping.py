"""Early stopping: when a run ends before max_steps, and that everything it writes says so."""

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, assert_one_line, call, make_processed, options
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from training_runs import NAME, assert_equal_runs, succeeded, training, training_in_two

import train
from lib import adapter_files
from lib.adapter_files import WEIGHTS
from lib.evaluation import generation, runs
from lib.files import unfinished
from lib.training import checkpoints, run_folder
from lib.training.early_stopping import LOOKS, MARGIN, EarlyStopping
from lib.training.journal import Journal

STEPS = 10  # fewer than LOOKS: each one is a look
STOPPING = TINY_RUN | dict(
    max_steps=STEPS,
    warmup_steps=0,
    log_every=4,
    checkpoint_every=4,
    validate_every=5,
    validation_count=3,
    snapshot_every=3,
    preview_every=STEPS,  # at the start and at the end
    preview_prompts="a cat",
    report_to="none",
    stop_early=True,
)
ENDS = 6  # with `falling`


def ending(max_steps=STEPS, warmup_steps=0):
    config = dict(stop_early=True, max_steps=max_steps, warmup_steps=warmup_steps)
    return EarlyStopping(config, train.learning_rate_factor)


def falling(share, tau=0.2):
    """Losses of three images that fall exponentially with the share of the learning rate that is behind."""
    return [0.4 - 0.1 * size * (1 - np.exp(-share / tau)) for size in (0.8, 1.0, 1.3)]


def evenly(share):
    return [0.4 - 0.1 * size * share for size in (0.8, 1.0, 1.3)]


def rows(losses_at, rule):
    steps = [step for step in range(rule.max_steps + 1) if rule.is_look(step)]
    return [dict(step=step, validation_losses=losses_at(rule.shares[step])) for step in steps]


# ---- the rule ----------------------------------------------------------------------------------


def test_there_are_sixteen_looks_whatever_the_number_of_steps():
    for max_steps in (16, 100, 800, 4000):
        rule = ending(max_steps)
        looks = [step for step in range(max_steps + 1) if rule.is_look(step)]
        assert (len(looks), looks[0], looks[-1]) == (LOOKS + 1, 0, max_steps)
    assert all(ending(5).is_look(step) for step in range(6))
    off = EarlyStopping(dict(stop_early=False, max_steps=16, warmup_steps=0), train.learning_rate_factor)
    assert not any(off.is_look(step) for step in range(17))


def test_the_run_ends_where_the_rest_gains_less_than_the_margin():
    rule = ending(800, 50)
    for tau, latest in ((0.1, 450), (0.2, 500), (0.3, 600)):
        last = rule.last_step(rows(lambda share, tau=tau: falling(share, tau), rule))
        assert 250 < last <= latest
        now, end, start = (np.mean(falling(rule.shares[step], tau)) for step in (last, 800, 0))
        assert now - end < MARGIN * (start - now)
    # Even a loss that falls at once is not trusted before half of the learning rate is behind.
    assert rule.shares[rule.last_step(rows(lambda share: falling(share, 1e-3), rule))] > 0.5


def test_an_even_fall_is_trained_until_hardly_anything_remains():
    rule = ending(800, 50)
    last = rule.last_step(rows(evenly, rule))
    assert 1 - rule.shares[last] < MARGIN * rule.shares[last]
    assert rule.shares[500] < rule.shares[last]  # a curve that bends ends earlier


def test_one_passing_look_is_not_enough():
    rule = ending(800, 50)
    log = rows(falling, rule)
    last = rule.last_step(log)
    place = next(place for place, row in enumerate(log) if row["step"] == last)
    for moved in (0, -1):  # one of the two looks shows a gain
        changed = [dict(row) for row in log]
        changed[place + moved]["validation_losses"] = [loss - 0.05 for loss in log[place]["validation_losses"]]
        assert rule.last_step(changed) > last


def test_images_that_disagree_are_trained_on():
    rule = ending(800, 50)
    last = rule.last_step(rows(falling, rule))
    one_gains = rows(lambda share: [*falling(share)[:2], 0.4 - 0.1 * share], rule)
    assert rule.last_step(one_gains) > last


@pytest.mark.parametrize(
    ("gained", "passes"),
    [([0.05] * 3, True), ([0.07] * 3, False), ([0, 0, 0.09], False), ([0.02, 0.03, 0.04], True), ([-0.1] * 3, True)],
)
def test_a_look_passes_if_less_than_a_tenth_was_gained_with_confidence(gained, passes):
    """Of a fall of 0.6 so far; the stretch before step 600 begins at step 500."""
    rule = ending(800, 50)
    assert rule.shares[550] > 2 * rule.shares[600] - 1 >= rule.shares[500]
    now = np.full(3, 0.4)
    assert rule.passes({0: now + 0.6, 500: now + gained, 550: now + 9, 600: now}, 600) == passes


def test_other_rows_of_the_log_do_not_count():
    rule = ending(800, 50)
    log = rows(falling, rule)
    more = [dict(step=step, loss=1.0) for step in (10, 500)]
    more += [dict(step=step, validation_losses=[9.0, 1.0, 5.0]) for step in (333, 444)]
    assert rule.last_step(sorted(log + more, key=lambda row: row["step"])) == rule.last_step(log)


# ---- runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def common(tiny_model, tmp_path_factory):
    return STOPPING | dict(base_model=tiny_model, data_dir=make_processed(tmp_path_factory.mktemp("data"), 12))


@pytest.fixture(scope="module")
def losses():
    """Lets runs log other held-out losses (those of a tiny model hardly fall) and show blank previews, and sends them
    `at` = {step: signal}."""
    record, given = Journal.record, SimpleNamespace(at={}, of=falling)

    def replaced(self, **row):
        if "validation_losses" in row:
            row["validation_losses"] = given.of(ending().shares[row["step"]])
            row["validation_loss"] = float(np.mean(row["validation_losses"]))
        record(self, **row)
        if "validation_losses" in row and row["step"] in given.at:
            os.kill(os.getpid(), given.at[row["step"]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "record", replaced)
        blank = Image.new("RGB", (64, 64))
        patch.setattr(generation, "preview_generator", lambda *others: lambda title: [blank])
        yield given


def trained(folder, common, **changes):
    """(the finished run's folder, its console output)."""
    done = succeeded(training(folder, common | dict(output_dir=folder) | changes))
    return folder / NAME, done.stdout


@pytest.fixture(scope="module")
def stopped(common, losses, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("stopped"), common)


@pytest.fixture(scope="module")
def whole(common, losses, tmp_path_factory):
    """The same without the option."""
    return trained(tmp_path_factory.mktemp("whole"), common, stop_early=False, snapshot_every=ENDS, preview_every=0)


def record_of(folder):
    record = json.loads((folder / "config.json").read_text())
    return record["steps"], record["ended"]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_weights(one, two, dtype=torch.float32):
    ours, theirs = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    return all(torch.equal(ours[key].to(dtype), theirs[key].to(dtype)) for key in ours | theirs)


def test_a_stopped_run_is_the_start_of_the_whole_one(stopped, whole):
    assert same_weights(stopped[0], whole[0] / "snapshots" / f"step_{ENDS:06}", torch.half)
    assert not same_weights(stopped[0], whole[0], torch.half)
    assert record_of(whole[0]) == (STEPS, "max_steps")
    assert f"{NAME}: {STEPS} steps, " in whole[1]


def test_a_stopped_run_says_so(stopped):
    folder, console = stopped
    assert f"{folder}: {ENDS} steps of {STEPS} (early stopping: held-out images show no" in console
    assert record_of(folder) == (ENDS, "stop_early")
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata()["steps"] == str(ENDS)
    with safe_open(folder / f"{NAME}.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["ss_steps"], header["ss_max_train_steps"]) == (str(ENDS), str(STEPS))
    assert header["ss_num_epochs"] == "1"  # six steps of nine images
    card = (folder / "README.md").read_text()
    assert f"| steps | {ENDS}, batch 1; early stopping ended the run of {STEPS} |" in card
    assert [row["step"] for row in log_of(folder) if "loss" in row] == [4, ENDS]
    # The adapter of the last step is the run's own, and the last preview is of it.
    assert sorted(path.name for path in (folder / "snapshots").iterdir()) == ["step_000003"]
    assert sorted(path.stem for path in (folder / "previews").iterdir()) == ["step_000000", f"step_{ENDS:06}"]
    assert not checkpoints.listed(folder)


def test_snapshots_of_a_stopped_run_are_evaluated_up_to_its_end(stopped):
    adapter = adapter_files.read_adapter(stopped[0])
    run = SimpleNamespace(adapter=runs.describe(adapter))
    assert list(runs.with_snapshots(run, adapter)) == [3, ENDS]
    assert list(run.adapter["held_out_losses"]) == ["0", "3", str(ENDS)]


def test_a_run_that_never_stops_is_the_same_bit_for_bit(common, losses, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "of", lambda share: [0.4, 0.4, 0.4 - share])
    folder, console = trained(tmp_path, common, snapshot_every=0, preview_every=0)
    assert f"{NAME}: {STEPS} steps, " in console
    assert same_weights(folder, whole[0])
    assert [[row for row in log_of(run) if "loss" in row] for run in (folder, whole[0])] == [
        [row for row in log_of(whole[0]) if "loss" in row]
    ] * 2


def test_an_interrupted_run_ends_at_the_same_step(common, losses, stopped, tmp_path, monkeypatch):
    """Killed before the look that decides, then told to stop in that very step, after which it is not trained on."""
    config = common | dict(output_dir=tmp_path)
    for step, sent, status, saved in ((5, signal.SIGKILL, -9, 4), (ENDS, signal.SIGTERM, 128 + 15, ENDS)):
        monkeypatch.setattr(losses, "at", {step: sent})
        assert training(tmp_path, config).returncode == status
        assert checkpoints.latest(unfinished(tmp_path / NAME))[1]["step"] == saved
    monkeypatch.setattr(losses, "at", {})
    folder, console = trained(tmp_path, common)
    assert f"{ENDS} steps of {STEPS}" in console
    assert_equal_runs(folder, stopped[0])


def test_all_processes_end_at_the_same_step(common, losses, tmp_path):
    """Only the first one measures the loss."""
    config = common | dict(output_dir=tmp_path, snapshot_every=0, preview_every=0)
    first, second = map(succeeded, training_in_two(tmp_path, config))
    assert f"{ENDS} steps of {STEPS}" in first.stdout
    assert record_of(tmp_path / NAME) == (ENDS, "stop_early")


def test_too_few_held_out_images_are_refused(common, tmp_path):
    done = call("train.py", *options(**common | dict(output_dir=tmp_path, validation_count=2)))
    assert_one_line(done, "stop_early needs 3 held-out images", "validation_count is 2")


def test_the_loss_curve_marks_the_end():
    log = [dict(step=step, loss=1.0, learning_rate=0.1) for step in (10, 20)]
    [title] = [axes.get_title("right") for axes in run_folder.loss_figure(log, "x", 40).axes[:1]]
    assert title == "early stopping after step 20 of 40"
    assert run_folder.loss_figure(log, "x", 20).axes[0].get_title("right") == ""
