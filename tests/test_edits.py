"""What a person changed by hand in a training set is preserved when it is written again."""

import json

import pytest
from conftest import assert_one_line, call, picture
from PIL import Image
from test_preprocess import prepare

from lib.dataset import read_dataset


@pytest.fixture
def prepared(tmp_path):
    """(sources, output) of four images, the second with a mask and a caption of its own."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        picture(number, (80, 80)).save(data / f"{number}.png")
    mask = Image.new("L", (80, 80))
    mask.paste(255, (0, 0, 40, 80))
    mask.save(data / "1.mask.png")
    (data / "1.txt").write_text("its own")
    prepare(data, tmp_path / "out")
    return data, tmp_path / "out"


def rows_of(folder):
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().split("\n") if line]


def write_rows(folder, rows):
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def by_source(folder):
    """{source: (row of captions.jsonl, bytes of its image, of its mask or None)}."""
    found = {}
    manifest = json.loads((folder / "manifest.json").read_text())
    for row, record in zip(rows_of(folder), manifest["pictures"], strict=True):
        path = folder / row["file_name"]
        mask = path.with_suffix(".mask.png")
        words = {key: value for key, value in row.items() if key != "file_name"}
        found[record["source"]] = words, path.read_bytes(), mask.is_file() and mask.read_bytes()
    return found


def test_what_was_changed_by_hand_is_kept(prepared, capsys):
    data, out = prepared
    rows = rows_of(out)
    rows[0] |= dict(text="corrected", note="looked at")
    rows[1]["description"] = "described anew"
    write_rows(out, rows)
    images = out / "images"
    for name, seed, mode in (("image_03.png", 77, "RGB"), ("image_02.mask.png", 78, "L")):
        picture(seed, (64, 64), mode).save(images / name)
    changed = by_source(out)
    # Images before and after them, so that the others get new numbers, twice.
    for name in ("00.png", "99.png"):
        picture(int(name[:2]) + 500, (80, 80)).save(data / name)
        prepare(data, out)
        assert by_source(out).items() >= changed.items()
        said = capsys.readouterr().out
        assert "changes preserved in 2 captions, 2 images or masks" in said
    assert len(changed) == 4
    assert len(by_source(out)) == 6
    manifest = json.loads((out / "manifest.json").read_text())
    assert [row["source"] for row in manifest["pictures"] if row["caption_from"] == "a change by hand"] == ["0.png"]
    assert read_dataset(out, 64).mask(2, (8, 8)).float().std() > 10
    prepare(data, out, keep_edits=False)
    anew = by_source(out)
    assert all(anew[source] != changed[source] for source in changed if source != "3.png")
    assert anew["1.png"][0] == dict(text="its own", description="its own")
    prepare(data, out)
    assert by_source(out) == anew
    assert "by hand" not in capsys.readouterr().out


def test_pictures_and_masks_that_were_taken_out_stay_out(prepared, capsys):
    data, out = prepared
    write_rows(out, rows_of(out)[:3])
    (out / "images/image_02.mask.png").unlink()
    for _ in range(2):
        picture(200, (80, 80)).save(data / "9.png")
        prepare(data, out)
        assert list(by_source(out)) == ["0.png", "1.png", "2.png", "9.png"]
        assert by_source(out)["1.png"][2] is False
        assert "left out   1 whose rows were removed from captions.jsonl (3.png)" in capsys.readouterr().out
    prepare(data, out, keep_edits=False)
    assert list(by_source(out)) == ["0.png", "1.png", "2.png", "3.png", "9.png"]
    assert by_source(out)["1.png"][2]


def test_the_caption_of_a_source_that_is_gone_is_said(prepared, capsys):
    data, out = prepared
    rows = rows_of(out)
    rows[3]["text"] = "a long thought"
    write_rows(out, rows)
    (data / "3.png").unlink()
    prepare(data, out)
    assert "the caption of 3.png is dropped with it: “a long thought”" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_captions_may_be_saved_by_an_editor_of_windows(prepared, encoding):
    data, out = prepared
    rows = rows_of(out)
    rows[0]["text"] = "corrected"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (out / "captions.jsonl").write_bytes("\r\n".join(lines).encode(encoding))
    prepare(data, out)
    assert by_source(out)["0.png"][0] == dict(text="corrected")


def other_source(data, out):
    picture(7, (64, 64)).save(out / "images/image_01.png")
    picture(70, (80, 80)).save(data / "0.png")


def other_size(data, out):
    picture(7, (32, 32)).save(out / "images/image_01.png")


def no_picture(data, out):
    (out / "images/image_01.png").write_bytes(b"words")


def foreign_mask(data, out):
    picture(7, (64, 64), "L").save(out / "images/image_01.mask.png")


def foreign_row(data, out):
    picture(7, (64, 64)).save(out / "images/mine.png")
    write_rows(out, [*rows_of(out), dict(file_name="images/mine.png", text="mine")])


def broken_row(data, out):
    (out / "captions.jsonl").write_text("words\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_source, "image_01.png was changed by hand, and its source 0.png or the size has changed"),
        (other_size, "image_01.png was changed by hand and is not an image of 64x64"),
        (no_picture, "image_01.png was changed by hand and is not an image of 64x64"),
        (foreign_mask, "image_01.mask.png is not from preprocess.py"),
        (foreign_row, "line 5: images/mine.png is not from preprocess.py"),
        (broken_row, "line 1: changed, but not of the form"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_changes_that_cannot_be_kept_are_refused_by_name(prepared, change, words):
    data, out = prepared
    change(data, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = call("preprocess.py", "--data-dir", data, "--output-dir", out, "--resolution", 64)
    assert_one_line(done, words)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
