"""Output folders are replaced whole and locked: by every script, through kills at any moment."""

import fcntl
import importlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import assert_one_line, call, finish, forked, options, picture
from training_runs import NAME, kill, start_training, succeeded, training

from lib import errors, files
from lib.errors import UserError
from lib.evaluation import image_files
from lib.evaluation.results import recover


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
            place = image_files if (script, name) == ("inference", "fresh_folder") else writer
            setattr(place, name, lambda *rest: kill())
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
