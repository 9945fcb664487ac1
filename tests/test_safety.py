"""No run is lost and no fault is hidden: kills, signals, damaged files, full disks, bad numbers."""

import contextlib
import fcntl
import importlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import psutil
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from conftest import ROOT, TINY_RUN, assert_one_line, call, command, finish, forked, make_processed, options, picture
from safetensors.torch import load_file

import train
from lib import adapter_files, adapters, dataset, errors, files, models
from lib.errors import UserError
from lib.evaluation import generation
from lib.evaluation.results import recover
from lib.kernels import compiling, graphs
from lib.training import advice, checkpoints, micro_step, run_folder, samples, stopping, updates

NAME = "lora_weights_rank_32"

# Rank 16 gives both groups the 4,096 parameters from which on bitsandbytes keeps its state in 8 bits;
# the 5 samples of a step do not divide the 7 of an epoch.
EXACT = TINY_RUN | dict(
    rank=16,
    alpha=16,
    max_steps=9,
    log_every=2,
    validate_every=4,
    checkpoint_every=3,
    gradient_accumulation_steps=5,
    validation_count=1,
)


def start_training(folder, config, at=None, prepare=lambda: None):
    """train.py with `config` in a fork; `at` is {step: what to call when that step begins}."""

    def work():
        prepare()
        factor = train.learning_rate_factor

        def watched(step, *rest):
            (at or {}).get(step, lambda: None)()
            return factor(step, *rest)

        train.learning_rate_factor = watched
        sys.argv = ["train.py", *options(**config)]
        errors.run_script(lambda: train.main(train.CONFIG, train.__doc__))

    return forked(work, folder)


def training(folder, config, at=None):
    return finish(start_training(folder, config, at), folder)


def send(*numbers):
    """Send these signals to the process itself, one after another."""

    def act():
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


kill = send(signal.SIGKILL)


def succeeded(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def assert_equal_runs(a, b):
    """Two finished run folders hold the same weights, bit for bit, and the same log."""
    ours, theirs = load_file(a / adapter_files.WEIGHTS), load_file(b / adapter_files.WEIGHTS)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
    assert (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text()
    assert sorted(path.name for path in a.iterdir()) == sorted(path.name for path in b.iterdir())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_processed(tmp_path_factory.mktemp("safety"), 8)


@pytest.fixture(scope="module")
def exact(tiny_model, data):
    """The configuration of the runs that must agree bit for bit."""
    return EXACT | dict(base_model=tiny_model, data_dir=data)


@pytest.fixture(scope="module")
def uninterrupted(exact, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    succeeded(training(folder, exact | dict(output_dir=folder)))
    return folder / NAME


@pytest.fixture
def interrupted(exact, tmp_path):
    """The configuration of a run that was killed in its fifth step, with a checkpoint of the third."""
    config = exact | dict(output_dir=tmp_path)
    assert training(tmp_path, config, {4: kill}).returncode == -signal.SIGKILL
    return config


# ---- exact resume ------------------------------------------------------------------------------


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


def training_in_two(folder, config, at=None, other=None):
    """`training` in two processes, of which the second may have `other` settings: how both ended."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    children = []
    for rank, mine in enumerate((config, config | (other or {}))):
        places = dict(
            RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        (folder / str(rank)).mkdir(parents=True, exist_ok=True)

        def prepare(places=places):
            os.environ.update({name: str(value) for name, value in places.items()})

        children.append(start_training(folder / str(rank), mine, at, prepare))
    return [finish(child, folder / str(rank)) for rank, child in enumerate(children)]


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


def test_what_differs_is_listed_and_refused(interrupted, tmp_path, exact, data):
    before = sorted(files.unfinished(tmp_path / NAME).iterdir())
    changed = interrupted | dict(rank=8, unet_learning_rate=2e-3)
    done = training(tmp_path, changed)
    assert_one_line(done, "rank: 16 then, 8 now", "unet_learning_rate: 0.001 then, 0.002 now", "--no-resume")
    assert "alpha" not in done.stderr

    other = tmp_path / "data"
    shutil.copytree(data, other)
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
    interrupted, uninterrupted, tmp_path, data, tiny_model
):
    """The data set behind a link, the model in another folder that has one more precision."""
    (tmp_path / "data").symlink_to(data)
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
    assert "holds a finished run (max_steps: 2 then, 3 now). Training begins anew" in done.stdout
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


# ---- checkpoints -------------------------------------------------------------------------------

TENSORS = {"a.parameters": torch.arange(500, dtype=torch.float32), "a.state": torch.ones(64, dtype=torch.uint8)}


def saved_steps(folder, *steps, keep=2):
    for step in steps:
        tensors = TENSORS | {"a.parameters": TENSORS["a.parameters"] + step}
        checkpoints.save(folder, step, tensors, {"identity": {"rank": 4}}, keep)


def truncated(content):
    return content[: len(content) // 2]


def zero_filled(content):
    return content[:300] + bytes(len(content) - 300)


def empty(content):
    return b""


def flipped_bit(content):
    """One bit of one tensor's value, which safetensors itself does not see."""
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


def edited_header(content):
    return content.replace(b'\\"rank\\": 4', b'\\"rank\\": 8')


def without_checksum(content):
    return content.replace(b'"sha256"', b'"sha255"')


def swapped_names(content):
    return content.replace(b'"a.state"', b'"b.state"')


@pytest.mark.parametrize(
    "damage", [truncated, zero_filled, empty, flipped_bit, edited_header, without_checksum, swapped_names]
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, damage):
    saved_steps(tmp_path, 10, 20)
    newest = tmp_path / "checkpoint_0000020.safetensors"
    content = newest.read_bytes()
    newest.write_bytes(damage(content))
    assert newest.read_bytes() != content
    said = []
    tensors, state = checkpoints.latest(tmp_path, said.append)
    assert state == {"identity": {"rank": 4}, "step": 10}
    assert torch.equal(tensors["a.parameters"], TENSORS["a.parameters"] + 10)
    assert len(said) == 1
    assert str(newest) in said[0]
    assert "passed over" in said[0]


def test_nothing_is_said_of_whole_checkpoints_and_none_is_none(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    saved_steps(tmp_path, 1)
    said = []
    tensors, _ = checkpoints.latest(tmp_path, said.append)
    assert tensors.keys() == TENSORS.keys()
    assert said == []
    (tmp_path / "checkpoint_0000001.safetensors").write_bytes(b"")
    assert checkpoints.latest(tmp_path, said.append) is None
    assert len(said) == 1


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(exact, uninterrupted, tmp_path):
    config = exact | dict(output_dir=tmp_path)
    training(tmp_path, config, {7: kill})
    newest, before = checkpoints.listed(files.unfinished(tmp_path / NAME))
    newest.write_bytes(flipped_bit(newest.read_bytes()))
    done = succeeded(training(tmp_path, config))
    assert f"warning: {newest} is passed over" in done.stdout
    assert "after step 3" in done.stdout
    assert_equal_runs(tmp_path / NAME, uninterrupted)


def test_the_newest_are_kept(tmp_path):
    (tmp_path / "checkpoint_notes.safetensors").write_text("a person's own")
    saved_steps(tmp_path, 5, 10, 99, 100, keep=3)
    assert [path.name for path in checkpoints.listed(tmp_path)] == [
        f"checkpoint_{step:07}.safetensors" for step in (100, 99, 10)
    ]
    saved_steps(tmp_path, 10_000_000, keep=1)  # by number, not by name
    assert [path.name for path in checkpoints.listed(tmp_path)] == ["checkpoint_10000000.safetensors"]
    assert (tmp_path / "checkpoint_notes.safetensors").exists()


def test_killed_at_any_moment_of_saving(tmp_path):
    """60 kills: the newest state is whole each time, and none older than the last one reported."""
    rng = random.Random(0)
    (tmp_path / "state").mkdir()
    saved_steps(tmp_path / "state", 0)
    half_written = 0
    for _ in range(60):
        first = checkpoints.latest(tmp_path / "state")[1]["step"] + 1

        def save(first=first):
            for step in range(first, first + 10**6):
                saved_steps(tmp_path / "state", step)
                print(step)

        child = forked(save, tmp_path)
        while not (tmp_path / "out").exists() or not (tmp_path / "out").read_text():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        reported = int(finish(child, tmp_path).stdout.split("\n")[-2])
        (tmp_path / "out").unlink()
        half_written += bool(list((tmp_path / "state").glob(".*")))
        said = []
        tensors, state = checkpoints.latest(tmp_path / "state", said.append)
        assert said == []
        assert reported <= state["step"] <= reported + 1
        assert torch.equal(tensors["a.parameters"], TENSORS["a.parameters"] + state["step"])
    assert half_written  # some of them did hit a file while it was written
    saved_steps(tmp_path / "state", 10**6)
    assert len(list((tmp_path / "state").iterdir())) == 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named_and_costs_no_checkpoint(small_disk):
    saved_steps(small_disk, 1)
    large = {"a.parameters": torch.ones(500_000)}
    with pytest.raises(UserError) as error:
        checkpoints.save(small_disk, 2, large, {}, 2)
    assert str(small_disk / "checkpoint_0000002.safetensors") in str(error.value)
    needed = int(re.search(r"([\d,]+) bytes needed", str(error.value))[1].replace(",", ""))
    assert 2_000_000 < needed < 2_001_000
    assert [path.name for path in small_disk.iterdir()] == ["checkpoint_0000001.safetensors"]
    assert checkpoints.latest(small_disk)[1]["step"] == 1


def test_a_run_onto_a_disk_that_fills_up(exact, small_disk, uninterrupted, tmp_path):
    config = exact | dict(output_dir=small_disk)
    ballast = small_disk / "ballast"

    def fill():
        free = shutil.disk_usage(small_disk).free
        ballast.write_bytes(bytes(free - 8192))

    done = training(tmp_path, config, {4: fill})
    assert_one_line(done, "checkpoint_0000006.safetensors", "bytes needed", "No space left")
    assert checkpoints.latest(files.unfinished(small_disk / NAME))[1]["step"] == 3
    ballast.unlink()
    done = succeeded(training(tmp_path, config))
    assert "after step 3" in done.stdout
    assert_equal_runs(small_disk / NAME, uninterrupted)


def test_a_run_onto_a_full_disk(exact, small_disk, tmp_path):
    with contextlib.suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    done = training(tmp_path, exact | dict(output_dir=small_disk))
    assert_one_line(done, small_disk, "No space left")
    assert [path.name for path in small_disk.iterdir() if path.is_file()] == ["ballast"]


# ---- folders that are replaced -----------------------------------------------------------------


def folder_with(path, word, marker=True):
    path.mkdir()
    (path / "content").write_text(word)
    if marker:
        files.write_marker(path / "marker", {"config": {}})


@pytest.mark.parametrize(
    ("old", "final", "new", "expected"),
    [
        # killed while the new one was being filled
        (None, "old", "half", "old"),
        (None, None, "half", None),
        # … when it was whole
        (None, "old", "whole", "new"),
        (None, None, "whole", "new"),
        # … between the two renames
        ("old", None, "whole", "new"),
        # … before the old one was removed
        ("old", "new", None, "new"),
        # nothing happened, or nothing but a start
        (None, "old", None, "old"),
        (None, None, None, None),
        # the new one was lost by hand, or is not whole: the old one comes back
        ("old", None, None, "old"),
        ("old", None, "half", "old"),
    ],
)
def test_a_replacement_that_was_killed_is_mended(tmp_path, old, final, new, expected):
    place = tmp_path / "out"
    if old:
        folder_with(tmp_path / ".out.old", old)
    if final:
        folder_with(place, final)
    if new:
        folder_with(files.unfinished(place), "new", marker=new == "whole")
    files.recover_folder(place, "marker")
    assert ((place / "content").read_text() if place.exists() else None) == expected
    assert not (tmp_path / ".out.old").exists()
    # A half-filled one stays: a training run goes on from the checkpoints in it.
    assert files.unfinished(place).exists() == (new == "half")


def test_killed_at_each_step_of_a_replacement(tmp_path):
    """The real thing, killed at its first, second, … system call that changes the folders."""
    for count in range(8):
        place = tmp_path / str(count) / "out"
        place.parent.mkdir()
        folder_with(place, "old")
        folder_with(files.unfinished(place), "new")

        def work(count=count, place=place):
            done = 0

            def counted(event, arguments):
                nonlocal done
                if event in ("os.rename", "shutil.rmtree", "os.remove", "os.rmdir"):
                    done += 1
                    if done > count:
                        kill()

            sys.addaudithook(counted)
            files.replace_folder(place, "marker")

        code = finish(forked(work, tmp_path), tmp_path).returncode
        # A reader who comes now finds one of the two whole, or none, but never a part.
        assert not place.exists() or len(list(place.iterdir())) == 2
        files.recover_folder(place, "marker")
        assert (place / "content").read_text() == "new"
        assert [path.name for path in place.parent.iterdir()] == ["out"]
    assert code == 0  # the last round went through


def test_files_reach_the_disk_before_they_are_renamed(tmp_path, monkeypatch):
    order = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace
    monkeypatch.setattr(os, "fsync", lambda f: (order.append(os.readlink(f"/proc/self/fd/{f}")), fsync(f)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (order.append("rename"), rename(a, b)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    files.write_bytes(tmp_path / "file", b"content")
    assert order == [str(tmp_path / ".file.new"), "rename", str(tmp_path)]
    order.clear()
    new = files.fresh_folder(tmp_path / "out")
    (new / "images").mkdir()
    (new / "images" / "one.png").write_text("picture")
    files.replace_folder(tmp_path / "out", "marker")
    assert set(order[: order.index("rename")]) == {str(new), str(new / "images"), str(new / "images" / "one.png")}


# ---- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]
)
def test_a_signal_finishes_the_step_and_saves(exact, uninterrupted, tmp_path, number, code):
    config = exact | dict(output_dir=tmp_path)
    done = training(tmp_path, config, {4: send(number)})
    assert done.returncode == code
    assert "stopped after step 5" in done.stdout
    assert "Traceback" not in done.stderr
    assert checkpoints.latest(files.unfinished(tmp_path / NAME))[1]["step"] == 5
    assert "after step 5" in succeeded(training(tmp_path, config)).stdout
    assert_equal_runs(tmp_path / NAME, uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(exact, tmp_path, monkeypatch, number, code):
    monkeypatch.setattr(stopping, "SAME_SIGNAL", 0)
    config = exact | dict(output_dir=tmp_path)
    done = training(tmp_path, config, {4: send(number, number)})
    assert done.returncode == code
    assert "stopped after" not in done.stdout
    assert checkpoints.latest(files.unfinished(tmp_path / NAME))[1]["step"] == 3


def test_a_signal_that_is_ignored_stays_so(exact, uninterrupted, tmp_path):
    """As `nohup` ignores SIGHUP."""
    config = exact | dict(output_dir=tmp_path)
    child = start_training(
        tmp_path, config, {4: send(signal.SIGHUP)}, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    succeeded(finish(child, tmp_path))
    assert_equal_runs(tmp_path / NAME, uninterrupted)


@pytest.mark.parametrize("gone", ["pipe", "terminal"])
def test_a_run_goes_on_where_nobody_reads_what_it_says(exact, uninterrupted, tmp_path, gone):
    """A `| tee` that has ended, or a terminal that was closed, from which no signal came."""

    def leave():
        reader, writer = os.pipe() if gone == "pipe" else os.openpty()
        os.close(reader)
        for number in (1, 2):
            os.dup2(writer, number)
        with pytest.raises(OSError, match="Broken pipe|error"):
            os.write(1, b"said")
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")

    child = start_training(tmp_path, exact | dict(output_dir=tmp_path), prepare=leave)
    assert finish(child, tmp_path).returncode == 0
    assert_equal_runs(tmp_path / NAME, uninterrupted)


def test_an_error_that_nobody_reads_ends_as_it_would(tmp_path):
    code = "import os; os.close(0); from lib.errors import UserError, run_script\n"
    code += "def main():\n    print('x' * 10**5)\n    raise UserError('wrong')\nrun_script(main)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 1


def test_a_signal_in_the_last_step(exact, uninterrupted, tmp_path):
    config = exact | dict(output_dir=tmp_path)
    assert training(tmp_path, config, {8: send(signal.SIGTERM)}).returncode == 143
    assert "after step 9" in succeeded(training(tmp_path, config)).stdout
    assert_equal_runs(tmp_path / NAME, uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step(tmp_path, number, code):
    done = finish(forked(lambda: errors.run_script(send(number)), tmp_path), tmp_path)
    assert done.returncode == code
    assert "Traceback" not in done.stderr


# ---- numbers -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_whose_rate_broke_the_weights_goes_on_from_before_that(exact, uninterrupted, tmp_path, keep, monkeypatch):
    """In step 6, after which a checkpoint is due; the loss shows it one step later. What broke them is nothing that
    a checkpoint knows."""
    config = exact | dict(output_dir=tmp_path, keep_checkpoints=keep)
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
        assert "begins anew" in done.stderr
        assert not (tmp_path / NAME).exists()
        assert checkpoints.listed(files.unfinished(tmp_path / NAME)) == []
    succeeded(training(tmp_path, config))
    assert_equal_runs(tmp_path / NAME, uninterrupted)


def test_a_checkpoint_that_ends_in_nan_again_gives_way_to_an_older_one(tmp_path):
    def saved(step, updates, gave_up=False):
        state = dict(updates=updates, gave_up=gave_up)
        checkpoints.save(tmp_path, step, TENSORS, state, keep=9)

    def left():
        states = [checkpoints.read(path)[1] for path in checkpoints.listed(tmp_path)]
        return [(state["step"], state["gave_up"]) for state in states]

    for step in (10, 20, 30, 40):
        saved(step, step)
    # The update after step 30 broke the weights; all behind it was skipped for overflow.
    saved(50, 40)
    assert checkpoints.go_back(tmp_path, 40) == 30
    assert left() == [(30, True), (20, False), (10, False)]
    assert checkpoints.go_back(tmp_path, 33) == 20
    assert left() == [(20, True), (10, False)]
    (tmp_path / "checkpoint_0000010.safetensors").write_bytes(b"damaged")
    # The last good one stays, however often.
    assert [checkpoints.go_back(tmp_path, 25) for _ in range(2)] == [20, 20]
    assert checkpoints.go_back(tmp_path, 20) is None


def test_overflows_are_skipped_counted_and_in_a_row_too_many(exact, tmp_path, monkeypatch):
    """fp16's scaler needs a GPU; on the CPU a stand-in skips the updates of the steps it is told."""

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


@pytest.mark.parametrize(
    ("place", "doing", "advice"),
    [
        ("setup.encode_latents", "encoding the images", "--resolution 32"),
        ("micro_step.diffusion_loss", "training with batch_size 4", "--batch-size 2"),
        ("samples.draw_noise", "training with batch_size 4", "--gradient-checkpointing"),
        ("setup.load_part", "loading the models", "nvidia-smi"),
        ("setup.encode_captions", "encoding the captions", "fewer different captions"),
    ],
)
def test_out_of_memory_says_what_was_done_and_what_to_change(exact, tmp_path, monkeypatch, place, doing, advice):
    def full(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(f"lib.training.{place}", full)
    if place == "setup.encode_latents":  # as if none were kept
        monkeypatch.setattr("lib.training.setup.kept_folder", lambda *kept: tmp_path / "none")
    config = exact | dict(
        output_dir=tmp_path,
        batch_size=4,
        validation_count=0 if place == "samples.draw_noise" else 2,
        train_text_encoder=place != "setup.encode_captions",
        gradient_checkpointing=False,
    )
    done = training(tmp_path, config)
    assert_one_line(done, doing)
    after = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert advice in after[1]


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"), "the GPU's memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "the GPU's memory",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "the GPU's memory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "the GPU's memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
            "the computer's memory",
        ),
        (MemoryError(), "the computer's memory"),
    ],
)
def test_memory_that_ran_out_is_known_by_any_of_its_names(monkeypatch, problem, words):
    def full():
        raise problem

    with pytest.raises(UserError, match=words), errors.memory_for("training", "less"):
        full()
    # It is no reason to go on without kernels or graphs.
    with pytest.raises(type(problem)):
        compiling.failure(full)
    if isinstance(problem, RuntimeError):
        nothing = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in dict(
            Stream=lambda device: nothing,
            current_stream=lambda device: nothing,
            empty_cache=lambda: None,
            stream=lambda stream: contextlib.nullcontext(),
            graph_pool_handle=lambda: None,
        ).items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(graphs, "_capture", lambda *arguments: full())
        with pytest.raises(RuntimeError, match=re.escape(str(problem))):
            graphs.captured([lambda: None], torch.device("cuda"))


def test_another_error_is_no_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), errors.memory_for("training", "less"):
        raise RuntimeError("shapes cannot be multiplied")


# ---- two runs at once --------------------------------------------------------------------------


def test_a_second_run_is_refused_and_names_the_first(exact, tmp_path):
    def pause():
        (tmp_path / "started").touch()
        time.sleep(60)

    config = exact | dict(output_dir=tmp_path)
    first = start_training(tmp_path, config, {4: pause})
    try:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        (tmp_path / "second").mkdir()
        done = training(tmp_path / "second", config)
        assert_one_line(done, f"process {first} on", "train.py", tmp_path / NAME)
    finally:
        os.kill(first, signal.SIGKILL)
        finish(first, tmp_path)
    assert (tmp_path / f".{NAME}.lock").exists()  # the dead process left its file, but no lock
    assert "after step 3" in succeeded(training(tmp_path / "second", config)).stdout
    assert not (tmp_path / f".{NAME}.lock").exists()


def test_a_lock_is_free_again_after_success_and_after_an_error(tmp_path):
    with (
        files.locked(tmp_path / "out"),
        pytest.raises(UserError, match=f"process {os.getpid()}"),
        files.locked(tmp_path / "out"),
    ):
        pass
    with pytest.raises(RuntimeError), files.locked(tmp_path / "out"):
        raise RuntimeError
    with files.locked(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_removed_while_it_was_waited_for_is_no_lock(tmp_path, monkeypatch):
    """The first run may remove its file between the second's opening and locking it."""
    lock = fcntl.flock
    path = tmp_path / ".out.lock"
    tries = 0

    def late(file, how):
        nonlocal tries
        tries += 1
        if tries == 1:
            path.unlink()
            path.touch()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with files.locked(tmp_path / "out"):
        assert tries == 2
        with path.open() as file, pytest.raises(OSError, match="temporarily unavailable"):
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("script", ["preprocess.py", "inference.py"])
def test_the_other_scripts_lock_their_output_too(tmp_path, script):
    (tmp_path / "data").mkdir()
    config = dict(data_dir=tmp_path / "data", output_dir=tmp_path / "out")
    if script == "inference.py":
        config |= dict(lora_dir=tmp_path)
    with files.locked(tmp_path / "out"):
        done = call(script, *options(**config))
    assert_one_line(done, f"process {os.getpid()}", tmp_path / "out")


@pytest.mark.parametrize("script", ["preprocess", "inference"])
def test_the_other_scripts_write_the_mark_of_a_whole_folder_last(tiny_model, uninterrupted, tmp_path, script):
    module = importlib.import_module(script)
    writer = importlib.import_module("lib.evaluation.results") if script == "inference" else module
    (tmp_path / "data").mkdir()
    picture(1).save(tmp_path / "data" / "one.png")
    (tmp_path / "prompts.txt").write_text("a coat\n")
    target = tmp_path / "results"
    config = dict(data_dir=tmp_path / "data", output_dir=target, resolution=64)
    if script == "inference":
        config |= dict(
            data_dir="none",
            base_model=tiny_model,
            lora_dir=uninterrupted,
            clip_model="none",
            similarity_model="clip",
            prompts=tmp_path / "prompts.txt",
            seeds=1,
            steps=1,
        )
    marker, others = {
        "preprocess": ("manifest.json", ["captions.jsonl", "contact_sheet.jpg"]),
        "inference": ("metrics.json", ["report.html", "metrics.csv", "summary.md"]),
    }[script]

    def killed_at(name):
        def work():
            setattr(writer, name, lambda *rest: kill())
            sys.argv = [f"{script}.py", *options(**config)]
            errors.run_script(module.main)

        done = finish(forked(work, tmp_path), tmp_path)
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        return files.unfinished(target)

    new = killed_at("write_marker")
    assert not (new / marker).exists()
    assert all((new / name).stat().st_size for name in others)
    new = killed_at("replace_folder")
    assert (new / marker).exists()
    assert not target.exists()
    # The next run puts what was complete in its place, whatever comes of the run itself.
    killed_at("fresh_folder")
    assert (target / marker).exists()


def test_inference_mends_the_folders_of_its_runs_and_no_others(tmp_path):
    def results(path):
        path.mkdir()
        (path / "metrics.json").write_text("{}")

    results(tmp_path / ".run_a.old")
    results(tmp_path / ".run_b.unfinished")
    (tmp_path / ".config.old").mkdir()  # not ours
    recover(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".config.old", "run_a", "run_b"]


def test_out_of_memory_while_drawing_advises_a_smaller_batch():
    class Full:
        vae_scale_factor = 8
        unet = SimpleNamespace(config=SimpleNamespace(in_channels=4), dtype=torch.float32)
        device = torch.device("cpu")

        def encode_prompt(self, prompts, *others):
            return 2 * [torch.zeros(len(prompts), 77, 8)]

        def __call__(self, *arguments, **named):
            raise torch.OutOfMemoryError

    with pytest.raises(UserError) as error:
        generation.generate(
            Full(), [("a coat", 1)] * 8, steps=1, guidance_scale=1, resolution=64, batch_size=8, title="base"
        )
    first, second = str(error.value).splitlines()
    assert "generating 8 images at once" in first
    assert "--batch-size 4" in second


# ---- input -------------------------------------------------------------------------------------


def large_png(path):
    """A PNG of 40 bytes that says it is 60,000 pixels wide and high."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("{outside}/one.png", "a coat", "outside"),  # an absolute path
        ("../outside/one.png", "a coat", "outside"),
        ("images/loop.png", "a coat", "loop.png is a link to loop.png, which is not there"),
        ("images", "a coat", "there is no images"),
        ("", "a coat", "there is no"),
        ("images/../images/image_01.png", "a coat", "already named in line 1"),
        ("images/other.png", "a coat", "already named in line 1"),  # a link to it
        ("x" * 300, "a coat", "cannot be a file's"),
        ("images/image_01.png\0", "a coat", ""),
        ("images/\ud800.png", "a coat", ""),
        ("images/new.png", "half \ud800", "no text"),
        ("images/new.png", "", "not empty"),
        ("images/new.png", " \n", "not empty"),
        ("images/new.png", None, "must be strings"),
        ("images/new.png", ["a coat"], "must be strings"),
        (7, "a coat", "must be strings"),
        ("images/large.png", "a coat", "large.png cannot be read"),
        ("a\nb\x1b[2J", "a coat", "there is no a\\nb\\x1b[2J in"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, text, words):
    data = make_processed(tmp_path / "data", 2)
    outside = tmp_path / "outside"
    outside.mkdir()
    picture(5).save(outside / "one.png")
    picture(6).save(data / "images" / "new.png")
    large_png(data / "images" / "large.png")
    (data / "images" / "loop.png").symlink_to("loop.png")
    (data / "images" / "other.png").symlink_to("image_01.png")
    if isinstance(name, str):
        name = name.replace("{outside}", str(outside))
    with (data / "captions.jsonl").open("a") as file:
        file.write(json.dumps(dict(file_name=name, text=text)) + "\n")
    with pytest.raises(UserError) as error:
        dataset.read_dataset(data, 64)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert "large" in words or "line 3" in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"", b"\n\n", b"[" * 100_000, b"null"])
def test_a_listing_that_is_none(tmp_path, content):
    (tmp_path / "captions.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"captions\.jsonl"):
        dataset.read_dataset(tmp_path, 64)


def test_a_picture_whose_name_is_not_utf_8_is_skipped(tmp_path):
    (tmp_path / "data").mkdir()
    picture(1).save(tmp_path / "data" / "one.png")
    picture(2).save(os.fsdecode(bytes(tmp_path / "data") + b"/caf\xe9.png"), "PNG")
    folders = dict(data_dir=tmp_path / "data", output_dir=tmp_path / "out")
    done = succeeded(call("preprocess.py", *options(**folders, resolution=64)))
    assert "caf?.png: its name is not UTF-8" in done.stdout


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("scheduler/scheduler_config.json", b"{"),
        ("scheduler/scheduler_config.json", b"[]"),
        ("tokenizer/tokenizer.json", b"{"),
        ("tokenizer", None),
        ("unet/config.json", b"{}"),
        ("unet/config.json", b"not json"),
        ("unet/diffusion_pytorch_model.safetensors", b"x" * 100),
        ("text_encoder/config.json", b"{"),
        ("text_encoder/model.safetensors", b""),
        ("vae/config.json", b'{"_class_name": "UNet2DConditionModel"}'),
    ],
)
def test_a_damaged_base_model_is_named(tiny_model, data, tmp_path, file, content):
    broken = tmp_path / "model"
    shutil.copytree(tiny_model, broken)
    if content is None:
        shutil.rmtree(broken / file)
        (broken / file).mkdir()
    else:
        (broken / file).write_bytes(content)
    config = TINY_RUN | dict(base_model=broken, data_dir=data, output_dir=tmp_path / "out")
    done = call("train.py", *options(**config))
    assert_one_line(done, broken, Path(file).parts[0])
    assert not (tmp_path / "out" / NAME).exists()


# ---- security ----------------------------------------------------------------------------------


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


def test_pickles_and_code_beside_the_weights_are_never_read(tiny_model, data, uninterrupted, tmp_path):
    proof = tmp_path / "proof"
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    adapter = tmp_path / "adapter"
    shutil.copytree(uninterrupted, adapter)
    pickles = [
        model / "unet/diffusion_pytorch_model.bin",
        model / "vae/diffusion_pytorch_model.bin",
        model / "text_encoder/pytorch_model.bin",
        adapter / "pytorch_lora_weights.bin",
    ]
    for path in pickles:
        torch.save(Evil(proof), path)
    code = f"from pathlib import Path\nPath({str(proof)!r}).touch()\n"
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (model / part / "evil.py").write_text(code)
        for config in model.glob(f"{part}/*config.json"):
            stated = json.loads(config.read_text())
            kinds = "AutoModel AutoConfig AutoTokenizer".split()
            config.write_text(json.dumps(stated | {"auto_map": dict.fromkeys(kinds, "evil.CLIPTextModel")}))

    def work():
        def refuse(*arguments, **named):
            raise AssertionError("a pickle was read")

        torch.load = pickle.load = pickle.loads = pickle.Unpickler = refuse
        config = TINY_RUN | dict(base_model=model, data_dir=data, output_dir=tmp_path / "runs")
        sys.argv = ["train.py", *options(**config, checkpoint_every=2)]
        train.main(train.CONFIG, train.__doc__)
        pipeline = generation.load_pipeline(model, torch.float32, "cpu")
        models = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
        adapters.Applied(adapter_files.read_adapter(adapter), models)

    succeeded(finish(forked(work, tmp_path), tmp_path))
    assert not proof.exists()
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors missing"):
        models.fetch_base_model(str(model))
    (adapter / adapter_files.WEIGHTS).unlink()
    with pytest.raises(UserError):
        adapter_files.read_adapter(adapter)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save(Evil(proof), adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        adapter_files.read_adapter(adapter)
    assert not proof.exists()
    torch.load(pickles[0], weights_only=False)  # the trap itself works
    assert proof.exists()


# ---- signals that come twice, and runs that go on otherwise --------------------------------------


def test_a_signal_that_is_repeated_at_once_is_the_same_one(exact, tmp_path):
    config = exact | dict(output_dir=tmp_path)
    done = training(tmp_path, config, {4: send(signal.SIGTERM, signal.SIGTERM)})
    assert done.returncode == 143
    assert "stopped after step 5" in done.stdout
    assert checkpoints.latest(files.unfinished(tmp_path / NAME))[1]["step"] == 5


def test_a_signal_to_a_launcher_and_its_workers_alike_saves(exact, tmp_path):
    """As a batch system sends it: the launcher hands it on, so that the workers get it twice, both
    times in the same long step."""
    config = exact | dict(
        output_dir=tmp_path,
        gradient_accumulation_steps=80,
        max_steps=1000,
        checkpoint_every=900,
        log_every=1,
        validation_count=0,
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    started = subprocess.Popen(
        [*launcher, ROOT / "train.py", *options(**config)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = files.unfinished(tmp_path / NAME) / "log.jsonl"

    def workers():  # in process groups of their own
        return psutil.Process(started.pid).children(recursive=True)

    try:
        while started.poll() is None and not (log.exists() and '"step": 1,' in log.read_text()):
            time.sleep(0.05)
        for process in [*workers(), psutil.Process(started.pid)]:
            process.send_signal(signal.SIGTERM)
        out, err = started.communicate(timeout=120)
    finally:
        for process in workers() if started.poll() is None else []:
            process.kill()
        started.kill()
    stopped = re.search(r"stopped after step (\d+), which is saved", out)
    assert stopped, out + err
    found = checkpoints.latest(files.unfinished(tmp_path / NAME))
    assert found[1]["step"] == int(stopped[1])


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


def test_another_commit_of_the_code_is_a_note(interrupted, tmp_path, monkeypatch):
    assert "note: the code's commit" not in training(tmp_path, interrupted, {4: kill}).stdout
    monkeypatch.setattr(checkpoints, "code_commit", lambda: "0123abc")
    done = succeeded(training(tmp_path, interrupted))
    assert "note: the code's commit was" in done.stdout
    assert "it is 0123abc now" in done.stdout


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(batch_size=4, gradient_checkpointing=False), ["--batch-size 2", "--gradient-checkpointing"]),
        (dict(batch_size=4), ["--batch-size 2"]),
        (dict(gradient_checkpointing=False), ["--gradient-checkpointing"]),
        (dict(mixed_precision="no"), ["--mixed-precision"]),
        (dict(), ["nvidia-smi", "--resolution 256"]),
        (dict(resolution=520), ["--resolution 256"]),
    ],
)
def test_memory_advice_names_only_what_would_help(change, named):
    text = advice.memory_advice(train.CONFIG | dict(batch_size=1) | change)
    assert all(option in text for option in named)
    assert sorted(re.findall("--[a-z-]+", text)) == sorted(word.split()[0] for word in named if word.startswith("--"))


def test_drawing_one_picture_at_once_advises_a_smaller_one():
    for batch_size, option in ((2, "--batch-size 1"), (1, "--resolution 256")):
        with pytest.raises(UserError) as error, generation.generation_memory(batch_size, 512):
            raise torch.OutOfMemoryError
        assert re.findall("--[a-z-]+ [0-9]+", str(error.value)) == [option]
