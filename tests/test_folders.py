"""Output folders: links, files that are a person's own, locks, and other systems' rules."""

import errno
import fcntl
import functools
import json
import os
import re
import signal
import stat
import sys
from pathlib import Path

import pytest
from conftest import TINY_RUN, assert_one_line, call, command, finish, forked, make_processed, options, picture
from test_replacement import folder_with
from training_runs import kill, succeeded, training

from lib import files
from lib.errors import UserError
from lib.evaluation import results
from lib.evaluation.image_files import STARTED

# ---- links -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Images for preprocess.py, what it makes of them, and a file of two prompts."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "data").mkdir()
    for number in range(1, 5):
        picture(number).save(folder / "data" / f"{number}.png")
    make_processed(folder / "processed", 4)
    (folder / "prompts.txt").write_text("a coat\nunrelated: a cat\n")
    return folder


@pytest.fixture(scope="module")
def commands(tiny_model, sources):
    """{script: what it is called with, beside the output folder}."""
    training = TINY_RUN | dict(base_model=tiny_model, data_dir=sources / "processed", max_steps=2, validation_count=1)
    succeeded(call("train.py", *options(**training, output_dir=sources, run_name="adapter")))
    return {
        "preprocess.py": dict(data_dir=sources / "data", resolution=64),
        "train.py": training,
        "inference.py": dict(
            base_model=tiny_model,
            lora_dir=sources / "adapter",
            clip_model="none",
            similarity_model="clip",
            resolution=64,
            steps=1,
            seeds=1,
            prompts=sources / "prompts.txt",
        ),
    }


def to(script, folder):
    """The options that make `folder` the one that a script replaces."""
    if script == "train.py":
        return dict(output_dir=Path(folder).parent, run_name=Path(folder).name)
    return dict(output_dir=folder)


MARKERS = {"preprocess.py": "manifest.json", "train.py": "config.json", "inference.py": "metrics.json"}
SCRIPTS = list(MARKERS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_link_to_a_folder_is_followed(commands, tmp_path, script):
    real, link = tmp_path / "disk" / "real", tmp_path / "here" / "link"
    real.parent.mkdir()
    link.parent.mkdir()
    link.symlink_to(Path("..") / "disk" / "real")
    config = options(**commands[script] | to(script, link))
    for _ in range(2):  # to begin with the link points to nothing, then to an earlier output
        succeeded(call(script, *config))
        assert link.is_symlink()
        assert (real / MARKERS[script]).is_file()
        assert [path.name for path in real.parent.iterdir()] == ["real"]
        assert [path.name for path in link.parent.iterdir()] == ["link"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_link_to_nothing_and_one_to_a_file_are_named(commands, tmp_path, script):
    link, loop, to_file = (tmp_path / name for name in ("link", "loop", "to_file"))
    link.symlink_to(tmp_path / "none" / "real")
    loop.symlink_to(loop)
    to_file.symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("a person's own")
    for place, words in (
        (link, [link, tmp_path / "none" / "real"]),
        (loop, [loop, "is a link to"]),
        (to_file, [to_file, "a link to the file", tmp_path / "file"]),
    ):
        done = call(script, *options(**commands[script] | to(script, place)))
        assert_one_line(done, *words)
    assert (tmp_path / "file").read_text() == "a person's own"
    assert not (tmp_path / "none").exists()


def test_a_folder_in_a_linked_one_is_written_through_the_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.check_output_folder(tmp_path / "link" / "run", "marker")
    new = files.fresh_folder(tmp_path / "link" / "run")
    assert new == tmp_path / "real" / ".run.unfinished"
    files.replace_folder(tmp_path / "link" / "run", "marker")
    assert (tmp_path / "real" / "run").is_dir()


def test_what_a_kill_left_beside_a_linked_run_is_mended(tmp_path):
    real = tmp_path / "disk" / "run"
    (real.parent / ".run.old").mkdir(parents=True)
    (real.parent / ".run.old" / "metrics.json").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run").symlink_to(real)
    (tmp_path / "out" / "mine").symlink_to(tmp_path / "nowhere" / "at" / "all")
    results.recover(tmp_path / "out")
    assert (real / "metrics.json").is_file()


def test_a_mount_point_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    with pytest.raises(UserError, match="mount point"):
        files.check_output_folder(tmp_path / "disk", "marker")
    files.check_output_folder(tmp_path / "disk" / "run", "marker")
    with pytest.raises(UserError, match="mount point"):
        files.unfinished("/")


# ---- what a person keeps in an output folder ---------------------------------------------------


def keep_things_in(folder):
    """Files of a person's own in an output folder; returns {name: content}."""
    mine = {
        "notes.txt": "mine",
        "images/notes.txt": "beside ours",
        "other_run/metrics.json": "{}",
        "other_run/images/a-coat/base_42.png": "of another run",
        "images/of mine/image_01.png": "in a folder of mine",
    }
    for name, content in mine.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("notes.txt")
    (folder / "to_folder").symlink_to(folder.parent)
    return mine


def assert_kept(folder, mine):
    for name, content in mine.items():
        assert (folder / name).read_text() == content, name
    assert (folder / "empty").is_dir()
    assert (folder / "link").readlink() == Path("notes.txt")
    assert (folder / "to_folder").readlink() == folder.parent


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_what_a_script_wrote_is_replaced(commands, tmp_path, script):
    folder = tmp_path / "out"
    config = commands[script] | to(script, folder)
    succeeded(call(script, *options(**config)))
    marker = folder / MARKERS[script]
    ours = [name for name in json.loads(marker.read_text())["files_written"] if name != STARTED]  # it is gone
    assert sorted(ours) == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    before = {name: (folder / name).stat().st_mtime_ns for name in ours}
    mine = keep_things_in(folder)
    succeeded(call(script, *options(**config)))
    assert_kept(folder, mine)
    assert all((folder / name).stat().st_mtime_ns > before[name] for name in ours)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*ours, *mine, "link"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_longer_written_goes_and_a_name_that_is_taken_is_kept_beside(tmp_path, capsys):
    def write(*names):
        new = files.fresh_folder(tmp_path / "out")
        for name in names:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text("ours")
        files.write_marker(new / "marker", {"config": {}})
        files.replace_folder(tmp_path / "out", "marker")

    write("images/a/1.png", "images/b/1.png", "sweep.png")
    (tmp_path / "out" / "images" / "a" / "mine").write_text("mine")
    (tmp_path / "out" / "images" / "c").write_text("mine")
    (tmp_path / "out" / "forest.png").write_text("mine")
    write("images/a/2.png", "images/c/1.png", "forest.png")
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert found == [
        "out/forest.png",
        "out/forest.png.kept1",
        "out/images/a/2.png",
        "out/images/a/mine",
        "out/images/c.kept1",
        "out/images/c/1.png",
        "out/marker",
    ]
    assert (tmp_path / "out" / "forest.png.kept1").read_text() == "mine"
    assert f"your forest.png is kept as {tmp_path / 'out' / 'forest.png.kept1'}" in (capsys.readouterr().out)
    assert not (tmp_path / "out" / "images" / "b").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "null", '{"model_type": "clip"}', '{"files_written": ["mine"]}', '{"config": 1}']
)
def test_a_folder_with_a_file_of_that_name_is_still_a_persons_own(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="did not write"):
        files.check_output_folder(tmp_path, "config.json")


def test_a_list_cannot_name_files_elsewhere(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "mine").write_text("mine")
    record = {"config": {}, "files_written": ["../mine", str(tmp_path / "mine"), ".", "marker"]}
    (folder / "marker").write_text(json.dumps(record))
    files.write_marker(files.fresh_folder(folder) / "marker", {"config": {}})
    files.replace_folder(folder, "marker")
    assert (tmp_path / "mine").read_text() == "mine"


def test_killed_at_each_step_of_a_replacement_a_persons_files_are_kept(tmp_path):
    """Killed at its first, second, … system call that changes the folders, and once more in the
    recovery: nothing of a person's is lost, and nothing of ours is left."""
    code = None
    for count in range(40):
        place = tmp_path / str(count) / "out"
        for folder, word in ((place, "old"), (files.unfinished(place), "new")):
            (folder / "images").mkdir(parents=True)
            for name in ("content", "images/1.png", f"images/{word}.png"):
                (folder / name).write_text(word)
            files.write_marker(folder / "marker", {"config": {}})
        mine = keep_things_in(place)

        def interrupted(work, count=count):
            def act():
                done = 0

                def counted(event, arguments):
                    nonlocal done
                    if event in ("os.rename", "os.remove", "os.rmdir"):
                        done += 1
                        if done > count:
                            kill()

                sys.addaudithook(counted)
                work()

            return finish(forked(act, tmp_path), tmp_path).returncode

        code = interrupted(lambda place=place: files.replace_folder(place, "marker"))
        interrupted(lambda place=place: files.recover_folder(place, "marker"), 2)
        files.recover_folder(place, "marker")
        assert_kept(place, mine)
        ours = sorted(path.name for path in (place / "images").iterdir() if path.is_file())
        assert ours == ["1.png", "new.png", "notes.txt"]
        assert (place / "content").read_text() == "new"
        assert [path.name for path in place.parent.iterdir()] == ["out"]
        if code == 0:
            break
    assert code == 0
    assert count > 10


# ---- locks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_said_and_not_taken_for_another_run(tmp_path, monkeypatch, number):
    def refuse(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "data").mkdir()
    folders = dict(data_dir=tmp_path / "data", output_dir=tmp_path / "out")
    done = call("preprocess.py", *options(**folders))
    assert_one_line(done, f"{tmp_path / '.out.lock'} cannot be locked", os.strerror(number))
    assert "being written" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_one_holds_the_lock_of_many_who_come_at_once(tmp_path):
    """Each of eight processes comes 30 times; the file on which they meet goes and comes with them."""

    def work():
        for _ in range(30):
            try:
                with files.locked(tmp_path / "out"):
                    (tmp_path / "inside").mkdir()  # fails if another one is there
                    (tmp_path / "inside").rmdir()
                    print("had it")
            except UserError as error:
                print(error)

    places = [tmp_path / str(number) for number in range(8)]
    for place in places:
        place.mkdir()
    children = [forked(work, place) for place in places]
    ended = [succeeded(finish(*pair)) for pair in zip(children, places, strict=True)]
    assert sum("had it" in done.stdout for done in ended) > 1
    lines = {line for done in ended for line in done.stdout.splitlines()}
    assert all(line == "had it" or "is being written by" in line for line in lines)
    assert not list(tmp_path.glob(".*"))


# ---- Windows -----------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows what a process holds open")
def test_the_scripts_run_without_posix_modules_and_under_windows_rules(commands, sources, tmp_path):
    """All three twice, the second time over the first's output, with an interrupted run to go on
    from: see as_on_windows.py."""
    interrupted = commands["train.py"] | dict(
        output_dir=tmp_path, run_name="run", max_steps=4, checkpoint_every=1, keep_checkpoints=1
    )
    assert training(tmp_path, interrupted, {2: kill}).returncode == -signal.SIGKILL
    # Without fcntl filelock takes a file that is there for a lock. (Windows itself has real ones.)
    (tmp_path / ".run.lock").unlink()
    drawing = commands["inference.py"] | dict(lora_dir=tmp_path / "run", output_dir=tmp_path / "results")
    preparing = commands["preprocess.py"] | dict(output_dir=tmp_path / "processed")
    words = []
    for _ in range(2):
        for script, config in (("preprocess.py", preparing), ("train.py", interrupted), ("inference.py", drawing)):
            words += [script, *options(**config), ","]
    # What is printed holds letters that a Windows console's file may not know.
    done = command("tests/as_on_windows.py", *words[:-1], env={"PYTHONIOENCODING": "ascii"})
    assert "after step 2" in done.stdout
    assert done.stdout.count("run: 4 steps, ") == 2
    expected = r"note: (without a CLIP model|1 seed a prompt cannot|not 2, as at most|\S+ holds a finished run)"
    assert "note:" not in re.sub(expected, "", done.stdout)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "results", "processed", "out", "err"}
    assert (tmp_path / "results" / "metrics.json").is_file()


def test_a_folder_that_is_in_use_is_named_and_nothing_is_lost(tmp_path, monkeypatch):
    """Windows renames no folder while a file in it is open."""
    folder_with(tmp_path / "out", "old")
    folder_with(files.unfinished(tmp_path / "out"), "new")
    rename = Path.rename

    def refuse(self, target):
        if self.name == "out":
            raise PermissionError(13, "The process cannot access the file")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refuse)
        with pytest.raises(UserError, match="cannot be replaced: The process cannot") as error:
            files.replace_folder(tmp_path / "out", "marker")
    assert str(files.unfinished(tmp_path / "out")) in str(error.value)
    assert (tmp_path / "out" / "content").read_text() == "old"
    files.recover_folder(tmp_path / "out", "marker")
    assert (tmp_path / "out" / "content").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_old_output_that_is_in_use_goes_later(tmp_path, monkeypatch, capsys):
    folder_with(tmp_path / "out", "old")
    folder_with(files.unfinished(tmp_path / "out"), "new")
    unlink = Path.unlink

    def refuse(self, **named):
        if self.name == "content":
            raise PermissionError(13, "The process cannot access the file")
        unlink(self, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        files.replace_folder(tmp_path / "out", "marker")
    assert "cannot be removed yet" in capsys.readouterr().out
    assert (tmp_path / "out" / "content").read_text() == "new"
    files.recover_folder(tmp_path / "out", "marker")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "content").read_text() == "new"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO, errno.EACCES])
def test_a_folder_that_cannot_be_flushed_is_no_error_but_a_file_is(tmp_path, monkeypatch, number):
    """As on SMB, FUSE and WSL."""
    fsync = os.fsync

    def refuse(opened, folders=True):
        if stat.S_ISDIR(os.fstat(opened).st_mode) == folders:
            raise OSError(number, os.strerror(number))
        fsync(opened)

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_bytes(tmp_path / "file", b"content")
    new = files.fresh_folder(tmp_path / "out")
    (new / "file").write_text("new")
    files.replace_folder(tmp_path / "out", "marker")
    assert (tmp_path / "out" / "file").read_text() == "new"
    monkeypatch.setattr(os, "fsync", functools.partial(refuse, folders=False))
    with pytest.raises(UserError, match=re.escape(os.strerror(number))):
        files.write_bytes(tmp_path / "file", b"other")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_full_disk_is_an_error_of_a_folder_too(tmp_path, monkeypatch):
    def refuse(opened):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="full"):
        files.flush(tmp_path)
