"""A run that was killed, at any step and in any way, resumes bit for bit, or says why it cannot."""

import json
import shutil
import signal
import sys

import pytest
import torch
from conftest import ROOT, assert_one_line, command, finish, forked, options
from safetensors.torch import load_file
from training_runs import NAME, assert_equal_runs, kill, send, succeeded, training, training_in_two

import train
from lib import adapter_files, errors, files
from lib.training import checkpoints, run_folder


def test_a_killed_run_goes_on_bit_for_bit(exact, uninterrupted, tmp_path):
    """Killed twice, each time in the middle of an epoch and of the steps between two log rows."""
    config = exact | dict(output_dir=tmp_path)
    for step in (4, 7):
        done = training(tmp_path, config, {step: kill})
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / NAME).exists()
        state = checkpoints.latest(files.unfinished(tmp_path / NAME))[1]
        assert state["step"] == step - 1
        assert state["step"] * 5 % 7  # mid-epoch
    done = succeeded(training(tmp_path, config))
    assert f"continuing {NAME} after step 6" in done.stdout
    assert_equal_runs(tmp_path / NAME, uninterrupted)
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize("variant", ["dora", "protected"])
def test_a_killed_run_of_a_variant_goes_on_bit_for_bit(exact, tmp_path, protected, variant):
    config = exact | dict(dora=dict(dora=True), protected=protected)[variant]
    succeeded(training(tmp_path, config | dict(output_dir=tmp_path / "whole")))
    killed = config | dict(output_dir=tmp_path / "killed")
    assert training(tmp_path, killed, {4: kill}).returncode == -signal.SIGKILL
    assert f"continuing {NAME} after step 3" in succeeded(training(tmp_path, killed)).stdout
    assert_equal_runs(tmp_path / "killed" / NAME, tmp_path / "whole" / NAME)


def test_both_groups_have_8_bit_state_in_these_runs(interrupted, tmp_path):
    tensors, _ = checkpoints.latest(files.unfinished(tmp_path / NAME))
    for group in ("unet", "text_encoder"):
        for moment in ("state1", "state2"):
            state = tensors[f"{group}.optimizer.{moment}"]
            assert state.dtype == torch.uint8
            assert state.unique().numel() > 2  # it was saved after it had been used


def test_a_killed_command_goes_on_bit_for_bit(exact, uninterrupted, tmp_path):
    """The same from the shell, each time in a process of its own."""
    wrapper = tmp_path / "killed.py"
    wrapper.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        "factor = train.learning_rate_factor\n"
        "def watched(step, *rest):\n"
        "    return factor(step, *rest) if step < 5 else os.kill(os.getpid(), signal.SIGKILL)\n"
        "train.learning_rate_factor = watched\n"
        "train.main(train.CONFIG, train.__doc__)\n"
    )
    config = options(**exact, output_dir=tmp_path)
    assert command(wrapper, *config, check=False).returncode == -signal.SIGKILL
    assert f"continuing {NAME} after step 3" in command("train.py", *config).stdout
    assert_equal_runs(tmp_path / NAME, uninterrupted)


def test_two_processes_go_on_bit_for_bit(exact, tmp_path):
    """Both are killed, as a launcher does with the others when it has lost one."""

    def train_in_two(folder, at=None):
        return training_in_two(folder, exact | dict(output_dir=folder, gradient_accumulation_steps=1), at)

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert [done.returncode for done in train_in_two(killed, {5: kill})] == [-signal.SIGKILL] * 2
    # A signal may reach them in different steps; they stop together where they next log a loss.
    first, second = train_in_two(killed, {4: send(signal.SIGTERM)})
    assert first.returncode == second.returncode == 143
    assert "after step 3" in first.stdout
    assert "stopped after step 6" in first.stdout
    first, second = map(succeeded, train_in_two(killed))
    assert "after step 6" in first.stdout
    assert second.stdout == ""
    for done in train_in_two(whole):
        succeeded(done)
    assert json.loads((whole / NAME / "config.json").read_text())["processes"] == 2
    assert_equal_runs(killed / NAME, whole / NAME)


def test_what_differs_is_listed_and_refused(interrupted, tmp_path, exact, processed_data):
    before = sorted(files.unfinished(tmp_path / NAME).iterdir())
    changed = interrupted | dict(rank=8, unet_learning_rate=2e-3)
    done = training(tmp_path, changed)
    assert_one_line(done, "rank: 16 then, 8 now", "unet_learning_rate: 0.001 then, 0.002 now", "--no-resume")
    assert "alpha" not in done.stderr

    other = tmp_path / "data"
    shutil.copytree(processed_data, other)
    listing = other / "captions.jsonl"
    listing.write_text(listing.read_text().replace("raincoat", "umbrella", 1))
    done = training(tmp_path, interrupted | dict(data_dir=other))
    assert_one_line(done, "images and captions", "data_dir")
    assert sorted(files.unfinished(tmp_path / NAME).iterdir()) == before

    # What does not change the numbers may differ.
    done = training(tmp_path, interrupted | dict(log_every=1, keep_checkpoints=1), {7: kill})
    assert "after step 3" in done.stdout
    # --no-resume drops the old start, after which the new run has one of its own.
    done = succeeded(training(tmp_path, changed | dict(resume=False)))
    assert "continuing" not in done.stdout
    assert json.loads((tmp_path / NAME / "config.json").read_text())["config"]["rank"] == 8


def test_a_run_goes_on_after_a_move_and_with_more_files_beside_the_model(
    interrupted, uninterrupted, tmp_path, processed_data, tiny_model
):
    """The data set behind a link, the model in another folder that has one more precision."""
    (tmp_path / "data").symlink_to(processed_data)
    model = tmp_path / "moved"
    shutil.copytree(tiny_model, model)
    half = model / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    half.write_bytes(b"fetched by another run")
    moved = interrupted | dict(data_dir=tmp_path / "data", base_model=model)
    assert "continuing" in succeeded(training(tmp_path, moved)).stdout
    assert_equal_runs(tmp_path / NAME, uninterrupted)


def test_another_base_model_under_the_same_name_is_refused(interrupted, tmp_path, tiny_model):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = training(tmp_path, interrupted | dict(base_model=model))
    assert_one_line(done, "the base model's files", tiny_model, model)


def test_a_changed_package_is_refused(interrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "version", lambda package: "0.0.1")
    assert_one_line(training(tmp_path, interrupted), "torch: ", "then, 0.0.1 now")


def test_a_finished_run_trains_anew_and_stays_until_then(exact, tmp_path):
    config = exact | dict(output_dir=tmp_path, max_steps=4, gradient_accumulation_steps=1)
    succeeded(training(tmp_path, config))
    first = load_file(tmp_path / NAME / adapter_files.WEIGHTS)
    again = config | dict(seed=7)
    assert training(tmp_path, again, {3: kill}).returncode == -signal.SIGKILL
    kept = load_file(tmp_path / NAME / adapter_files.WEIGHTS)
    assert all(torch.equal(first[key], kept[key]) for key in first)
    assert "continuing" in succeeded(training(tmp_path, again)).stdout
    new = load_file(tmp_path / NAME / adapter_files.WEIGHTS)
    assert not all(torch.equal(first[key], new[key]) for key in first)
    assert "continuing" not in succeeded(training(tmp_path, again)).stdout


def test_that_a_finished_run_will_be_replaced_is_said_before_it_begins(exact, tmp_path):
    config = exact | dict(output_dir=tmp_path, max_steps=2)
    assert "finished run" not in succeeded(training(tmp_path, config)).stdout
    done = training(tmp_path, config | dict(max_steps=3), {0: kill})
    assert "holds a finished run (max_steps: 2 then, 3 now). Training starts over" in done.stdout
    assert "of the same configuration" in training(tmp_path, config, {0: kill}).stdout
    # A config.json that holds something else is no reason to stop.
    path = tmp_path / NAME / "config.json"
    record = json.loads(path.read_text())
    for other in ([], None, 3):
        path.write_text(json.dumps(record | dict(config=other)))
        run_folder.note_replaced(tmp_path / NAME, train.CONFIG, print)


def test_killed_when_it_is_all_but_done(exact, uninterrupted, tmp_path):
    """After the last step and before the folder is renamed nothing is lost either."""
    config = exact | dict(output_dir=tmp_path)
    moments = {
        (run_folder, "loss_figure"): lambda work: (work / adapter_files.WEIGHTS).exists(),
        (run_folder, "write_marker"): lambda work: (work / "loss.png").exists(),
        (train, "replace_folder"): lambda work: (work / "config.json").exists(),
    }
    for place, reached in moments.items():

        def work(place=place):
            setattr(*place, lambda *rest: kill())
            sys.argv = ["train.py", *options(**config)]
            errors.run_script(lambda: train.main(train.CONFIG, train.__doc__))

        assert finish(forked(work, tmp_path), tmp_path).returncode == -signal.SIGKILL
        assert reached(files.unfinished(tmp_path / NAME))
        assert checkpoints.listed(files.unfinished(tmp_path / NAME))
    # The folder was complete: the next run puts it in its place before it starts on its own.
    training(tmp_path, config, {0: kill})
    assert_equal_runs(tmp_path / NAME, uninterrupted)


def test_another_commit_of_the_code_is_a_note(interrupted, tmp_path, monkeypatch):
    assert "note: the code's commit" not in training(tmp_path, interrupted, {4: kill}).stdout
    monkeypatch.setattr(checkpoints, "code_commit", lambda: "0123abc")
    done = succeeded(training(tmp_path, interrupted))
    assert "note: the code's commit was" in done.stdout
    assert "it is 0123abc now" in done.stdout
