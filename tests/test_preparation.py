"""Many images: on every core, through interruptions, without holding or comparing them all."""

import json
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
import types

import imagehash
import numpy as np
import pytest
from conftest import ROOT, picture
from PIL import Image
from test_preprocess import prepare

from lib.files import hidden_sibling
from lib.preparation import work
from lib.preparation.duplicates import fingerprint, without_duplicates
from lib.preparation.framing import THUMBNAILS_PER_PAGE, write_contact_sheets


def sources(folder, count, size=(90, 70)):
    folder.mkdir()
    for number in range(count):
        picture(number, size).save(folder / f"{number:03}.png")
    return folder


def same_files(one, other):
    files = sorted(path.relative_to(one) for path in one.rglob("*.*"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.*"))
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def test_several_processes_give_the_order_and_the_bytes_of_one(tmp_path):
    data = sources(tmp_path / "data", 30)
    (data / "011.png").write_bytes(b"no image")
    (data / "zz_copy.png").write_bytes((data / "004.png").read_bytes())
    picture(900, (700, 900)).save(data / "005.png")  # takes longer than those behind it
    for processes in (1, 3):
        manifest = prepare(data, tmp_path / f"of_{processes}", processes=processes)
        assert len(manifest["pictures"]) == 29
        assert [row["source"] for row in manifest["skipped"]] == ["011.png"]
    same_files(tmp_path / "of_1", tmp_path / "of_3")
    assert not hidden_sibling(tmp_path / "of_3", "parts").exists()


def test_a_killed_run_goes_on_without_repeating_what_has_not_changed(tmp_path, capsys):
    data = sources(tmp_path / "data", 24, (500, 400))
    out, parts = tmp_path / "out", hidden_sibling(tmp_path / "out", "parts")
    options = ["--data-dir", data, "--output-dir", out, "--processes", 2, "--resolution", 256]
    child = subprocess.Popen(
        [sys.executable, *map(str, ["preprocess.py", *options])],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    until = time.monotonic() + 60
    while len(list(parts.glob("*.json"))) < 6 and time.monotonic() < until:
        time.sleep(0.02)
    child.kill()
    # Ends only when nobody can write to the pipe any more: the processes that it started are gone too.
    child.communicate(timeout=30)
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    made = {path.stem: path.stat().st_mtime_ns for path in parts.glob("*.json")}
    assert 6 <= len(made) < 24
    # Two of them cannot be used again: one part is damaged, one image has changed.
    first, second = sorted(made)[:2]
    (parts / f"{first}.png").write_bytes((parts / f"{first}.png").read_bytes()[:-1])
    changed = next(
        path
        for path in sorted(data.iterdir())
        if work.sha256_file(path) == json.loads((parts / f"{second}.json").read_text())["sha256"]
    )
    picture(999, (600, 500)).save(changed)
    worked = []
    settings = dict(data_dir=data, output_dir=out, resolution=256, processes=1)
    whole = work.write_parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "write_parts", lambda path, *rest: worked.append(path.name) or whole(path, *rest))
        prepare(**settings)
    assert len(worked) == 24 - (len(made) - 2)
    assert f"{len(made) - 2} images were prepared by an interrupted run" in capsys.readouterr().out
    assert not parts.exists()
    prepare(**settings | dict(output_dir=tmp_path / "anew"))
    same_files(out, tmp_path / "anew")


def test_ctrl_c_says_how_far_it_came(tmp_path, monkeypatch, capsys):
    data = sources(tmp_path / "data", 5)
    whole = work.write_parts

    def interrupted(path, *rest):
        if path.name == "003.png":
            raise KeyboardInterrupt
        return whole(path, *rest)

    monkeypatch.setattr(work, "write_parts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, tmp_path / "out")
    assert "stopped at 3 of 5 images; the same command resumes" in capsys.readouterr().out


def test_duplicates_are_those_of_comparing_each_pair():
    """Against the rule in plain words, on fingerprints that lie close together."""
    rng = np.random.default_rng(5)
    pictures = []
    for number in range(300):
        image = picture(number % 40, (48, 48))
        noisy = np.asarray(image, np.int16) + rng.integers(-4, 5, 3) * (number // 40)
        noisy = noisy + rng.integers(-3, 4, noisy.shape)
        noisy = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        pictures.append(
            dict(
                source=f"{number:03}",
                sha256=str(number),
                pixels=int(rng.integers(5)),
                bytes=int(rng.integers(3)),
                hash=imagehash.phash(noisy),
                small=np.asarray(noisy.resize((16, 16), Image.Resampling.BOX), float),
                **fingerprint(noisy),
            )
        )
    kept, expected = [], {}
    for one in sorted(pictures, key=lambda p: (-p["pixels"], -p["bytes"], p["source"])):
        for other in kept:
            bits = one["hash"] - other["hash"]
            if bits <= 6 and np.abs(one["small"] - other["small"]).mean() <= 12:
                expected[one["source"]] = (other["source"], bits)
                break
        else:
            kept.append(one)
    found, duplicates = without_duplicates(pictures, 6, 12.0)
    assert [p["source"] for p in found] == sorted(p["source"] for p in kept)
    assert {d["source"]: (d["duplicate_of"], d["bits"]) for d in duplicates} == expected
    assert 60 < len(kept) < 240  # both happen, often


def test_a_page_of_the_contact_sheet_holds_at_most_200(tmp_path):
    (tmp_path / "red.jpg").touch()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.jpg")
    count = THUMBNAILS_PER_PAGE + 1
    first = write_contact_sheets(tmp_path, [tmp_path / "red.jpg"] * count, ["red"] * count)
    assert first == "contact_sheet_01.jpg"
    pages = sorted(path.name for path in tmp_path.glob("contact_sheet*"))
    assert pages == ["contact_sheet_01.jpg", "contact_sheet_02.jpg"]
    reds = []
    for page in pages:
        with Image.open(tmp_path / page) as image:
            pixels = np.asarray(image.convert("RGB"), np.int16)
        reds.append(((pixels[..., 0] - pixels[..., 1]) > 200).sum())
    assert reds[0] == pytest.approx(THUMBNAILS_PER_PAGE * reds[1], rel=0.2)


def test_large_pictures_wait_for_one_another(tmp_path, monkeypatch):
    """No more megapixels than are meant are in memory at once, and an image larger than that comes alone."""
    slots, turn = multiprocessing.Semaphore(4), multiprocessing.Lock()
    monkeypatch.setattr(work, "_share", (slots, turn))
    monkeypatch.setattr(work, "MEGAPIXELS_AT_ONCE", 4)
    for side in (1000, 1900, 4000):
        Image.new("L", (side, side)).save(tmp_path / f"{side}.png")
    now, most, lock = types.SimpleNamespace(sum=0), [], threading.Lock()

    def hold(side):
        with work.memory_share(tmp_path / f"{side}.png"):
            with lock:
                now.sum += side
                most.append(now.sum)
            time.sleep(0.02)
            with lock:
                now.sum -= side

    threads = [threading.Thread(target=hold, args=[side]) for side in (1000, 1900, 4000, 1000, 1000) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert now.sum == 0
    assert max(most) == 4000  # the largest alone; four of 1000, or 1900 alone, which takes all four
    assert slots.get_value() == 4
