"""Output folders: links, files that are a person's own, locks, and other systems' rules."""

import os
from pathlib import Path

import pytest
from conftest import TINY_RUN, assert_one_line, call, make_processed, options, picture
from test_safety import succeeded

import common
import inference
from common import UserError

# ---- links -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Pictures for preprocess.py, what it makes of them, and a file of two prompts."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "data").mkdir()
    for number in range(1, 5):
        picture(number).save(folder / "data" / f"{number}.png")
    make_processed(folder / "processed", 4)
    (folder / "prompts.txt").write_text("a coat\nfailure: a cat\n")
    return folder


@pytest.fixture(scope="module")
def commands(tiny_model, sources):
    """{script: what it is called with, beside the output folder}."""
    training = TINY_RUN | dict(base_model=tiny_model, data_dir=sources / "processed", max_steps=2)
    succeeded(call("train.py", *options(**training, output_dir=sources, run_name="adapter")))
    return {
        "preprocess.py": dict(data_dir=sources / "data", resolution=64),
        "train.py": training,
        "inference.py": dict(
            base_model=tiny_model, lora_dir=sources / "adapter", clip_model="none", resolution=64, steps=1,
            seeds=1, prompts=sources / "prompts.txt",
        ),
    }  # fmt: skip


def to(script, folder):
    """The options that make `folder` the one that a script replaces."""
    if script == "train.py":
        return dict(output_dir=Path(folder).parent, run_name=Path(folder).name)
    return dict(output_dir=folder)


MARKERS = {"preprocess.py": "manifest.json", "train.py": "config.json", "inference.py": "metrics.json"}  # fmt: skip
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
    common.check_output_folder(tmp_path / "link" / "run", "marker")
    new = common.fresh_folder(tmp_path / "link" / "run")
    assert new == tmp_path / "real" / ".run.unfinished"
    common.replace_folder(tmp_path / "link" / "run")
    assert (tmp_path / "real" / "run").is_dir()


def test_what_a_kill_left_beside_a_linked_run_is_mended(tmp_path):
    real = tmp_path / "disk" / "run"
    (real.parent / ".run.old").mkdir(parents=True)
    (real.parent / ".run.old" / "metrics.json").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run").symlink_to(real)
    (tmp_path / "out" / "mine").symlink_to(tmp_path / "nowhere" / "at" / "all")
    inference.recover(tmp_path / "out")
    assert (real / "metrics.json").is_file()


def test_where_a_disk_is_mounted_nothing_can_be_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    with pytest.raises(UserError, match="mounted"):
        common.check_output_folder(tmp_path / "disk", "marker")
    common.check_output_folder(tmp_path / "disk" / "run", "marker")
    with pytest.raises(UserError, match="mounted"):
        common.unfinished("/")
