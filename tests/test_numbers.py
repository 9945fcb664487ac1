"""Numbers that are not finite: NaN, overflows in fp16, and rates that break the weights."""

import json
import re
import signal
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from conftest import assert_one_line
from training_runs import NAME, assert_equal_runs, kill, succeeded, training

import train
from lib import files
from lib.training import checkpoints, micro_step, samples, updates


def nan_at(step, monkeypatch, accumulation=1):
    """Let the loss of one step be NaN."""
    calls = 0
    loss = micro_step.diffusion_loss

    def poisoned(*arguments):
        nonlocal calls
        if torch.is_grad_enabled():
            calls += 1
        found = loss(*arguments)
        return found * float("nan") if calls == step * accumulation else found

    monkeypatch.setattr(micro_step, "diffusion_loss", poisoned)


def test_nan_stops_before_the_update_and_names_step_and_picture(exact, uninterrupted, tmp_path, monkeypatch):
    config = exact | dict(output_dir=tmp_path)
    with monkeypatch.context() as patched:
        nan_at(5, patched, accumulation=5)
        done = training(tmp_path, config)
    assert_one_line(done, "NaN", "at step 5", "images/image_0")
    assert "step 3 in" in done.stderr
    named = set(re.findall(r"images/image_\d+\.png", done.stderr))
    assert named <= {f"images/image_{number:02}.png" for number in range(1, 9)}
    assert 1 <= len(named) <= 5
    tensors, state = checkpoints.latest(files.unfinished(tmp_path / NAME))
    assert (state["step"], state["gave_up"]) == (3, True)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    succeeded(training(tmp_path, config))
    assert_equal_runs(tmp_path / NAME, uninterrupted)


def test_the_picture_that_is_named_is_the_one_of_that_step(exact, tmp_path, monkeypatch):
    nan_at(3, monkeypatch)
    done = training(tmp_path, exact | dict(output_dir=tmp_path, gradient_accumulation_steps=1))
    held_out = np.random.default_rng([42, samples.HELD_OUT]).permutation(8)[:1]
    trained_on = np.setdiff1d(np.arange(8), held_out)
    number = trained_on[samples.epoch_order(42, 0, 7)[2]] + 1
    assert_one_line(done, "at step 3 (images/image_")
    assert re.findall(r"images/image_\d+", done.stderr) == [f"images/image_{number:02}"]


def test_a_run_whose_rate_broke_the_weights_goes_on_from_before_that(exact, uninterrupted, tmp_path, monkeypatch):
    """In step 6, after which a checkpoint is due; the loss shows it one step later, so two checkpoints are kept even where
    one was asked for. What broke the weights is nothing that a checkpoint knows."""
    config = exact | dict(output_dir=tmp_path, keep_checkpoints=1)
    with monkeypatch.context() as patched:
        factor = train.learning_rate_factor
        patched.setattr(
            train, "learning_rate_factor", lambda step, *rest: factor(step, *rest) * (1e33 if step == 5 else 1)
        )
        done = training(tmp_path, config)
    assert_one_line(done, "NaN or infinite at step 7", "learning rates")
    assert "the checkpoint of step 3 in" in done.stderr
    (left,) = checkpoints.listed(files.unfinished(tmp_path / NAME))
    assert checkpoints.read(left)[1]["step"] == 3
    done = succeeded(training(tmp_path, config))
    assert "after step 3" in done.stdout
    assert_equal_runs(tmp_path / NAME, uninterrupted)


def test_an_absurd_learning_rate_ends_in_one_line_and_can_be_lowered(exact, uninterrupted, tmp_path):
    """Without a warm-up the first update breaks the weights, before any checkpoint."""
    config = exact | dict(output_dir=tmp_path)
    for every in (1, 3):
        done = training(tmp_path, config | dict(unet_learning_rate=1e30, warmup_steps=0, checkpoint_every=every))
        assert_one_line(done, "NaN or infinite at step 2", "learning rates")
        assert "starts over" in done.stderr
        assert not (tmp_path / NAME).exists()
        assert checkpoints.listed(files.unfinished(tmp_path / NAME)) == []
    succeeded(training(tmp_path, config))
    assert_equal_runs(tmp_path / NAME, uninterrupted)


def test_after_nan_a_run_goes_on_with_other_learning_rates(exact, tmp_path, monkeypatch):
    config = exact | dict(output_dir=tmp_path)
    with monkeypatch.context() as patched:
        nan_at(5, patched, accumulation=5)
        done = training(tmp_path, config)
    assert "the checkpoint of step 3 in" in done.stderr
    assert "--unet-learning-rate" in done.stderr
    # Nothing else may differ.
    other = config | dict(unet_learning_rate=2e-4)
    assert_one_line(training(tmp_path, other | dict(rank=8)), "rank: 16 then, 8 now")
    done = training(tmp_path, other, {7: kill})
    assert "unet_learning_rate: 0.0002 from now on, 0.001 before" in done.stdout
    assert "after step 3" in done.stdout
    # From then on it is a run like any other, of these rates.
    assert_one_line(training(tmp_path, config), "unet_learning_rate: 0.0002 then, 0.001 now")
    done = succeeded(training(tmp_path, other))
    assert "from now on" not in done.stdout
    summary = json.loads((tmp_path / NAME / "config.json").read_text())
    assert summary["learning_rate_changes"] == [dict(after_step=3, unet_learning_rate=[0.001, 0.0002])]
    assert summary["config"]["unet_learning_rate"] == 0.0002
    rows = [json.loads(line) for line in (tmp_path / NAME / "log.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["learning_rate"] for row in rows if "loss" in row}
    for step, peak in ((2, 1e-3), (4, 2e-4), (6, 2e-4)):
        factor = train.learning_rate_factor(step - 1, exact["max_steps"], exact["warmup_steps"])
        assert rates[step] == pytest.approx(peak * factor)


def test_overflows_are_skipped_counted_and_in_a_row_too_many(exact, tmp_path, monkeypatch):
    """fp16's scaler needs a GPU; on the CPU a stand-in skips the updates of given steps."""

    def overflowing(steps):
        def prepare(self, optimizer):
            begun = 0
            update = optimizer.step

            def step():
                nonlocal begun
                begun += 1
                optimizer.step_was_skipped = begun in steps
                if begun not in steps:
                    update()

            optimizer.step = step
            self.scaler = SimpleNamespace(
                scale=lambda loss: loss, state_dict=lambda: {"scale": 2.0**begun}, load_state_dict=lambda state: None
            )
            return optimizer

        return prepare

    monkeypatch.setattr(updates, "missing_kernels", lambda device: "the stand-in updates")
    config = exact | dict(output_dir=tmp_path, gradient_accumulation_steps=1, max_overflows=2)
    monkeypatch.setattr(accelerate.Accelerator, "prepare", overflowing({2, 3, 5, 6}))
    done = succeeded(training(tmp_path, config))
    assert "4 skipped for fp16 overflow" in done.stdout
    assert json.loads((tmp_path / NAME / "config.json").read_text())["skipped_steps"] == 4
    monkeypatch.setattr(accelerate.Accelerator, "prepare", overflowing({2, 5, 6, 7}))
    done = training(tmp_path, config | dict(seed=1))
    assert_one_line(done, "overflowed 3 times in a row", "at step 7", "images/image_")


def test_the_loss_scaler_goes_on_where_it_was(exact, tmp_path, monkeypatch):
    """fp16 needs a GPU, but PyTorch's scaler does not: its scale grows after every second step."""

    def prepare(self, optimizer):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        return AcceleratedOptimizer(optimizer, scaler=self.scaler)

    monkeypatch.setattr(accelerate.Accelerator, "prepare", prepare)

    def scaler_after(name, *kills):
        folder = tmp_path / name
        folder.mkdir()
        config = exact | dict(output_dir=folder, gradient_accumulation_steps=1)
        for step in kills:
            done = training(folder, config, {step: kill})
            assert done.returncode == -signal.SIGKILL, done.stderr
        return checkpoints.latest(files.unfinished(folder / NAME))[1]

    whole, continued = scaler_after("whole", 7), scaler_after("continued", 4, 7)
    assert whole["step"] == continued["step"] == 6
    assert whole["skipped"] == 0
    assert whole["scaler"]["scale"] == 4.0 * 2**3
    assert continued["scaler"] == whole["scaler"]
