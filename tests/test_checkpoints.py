"""Checkpoints: damaged ones, old ones, kills while one is written, and disks that fill up."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import assert_one_line, finish, forked
from training_runs import NAME, assert_equal_runs, kill, succeeded, training

from lib import files
from lib.errors import UserError
from lib.training import checkpoints

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
    assert "skipped" in said[0]


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
    assert f"warning: {newest} is skipped" in done.stdout
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
    """40 kills: the newest state is whole each time, and none older than the last one reported."""
    rng = random.Random(0)
    (tmp_path / "state").mkdir()
    saved_steps(tmp_path / "state", 0)
    half_written = 0
    for _ in range(40):
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
