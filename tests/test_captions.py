"""Captions of a source folder as other programs and people write them, and those of duplicates."""

import pytest
from conftest import picture
from test_preprocess import prepare

from lib.errors import UserError
from lib.preparation.sources import image_names, read_captions

CAPTION_NAMES = {
    "photo.TXT": "photo.jpg",
    "photo.caption": "photo.jpg",
    "photo.jpg.txt": "photo.jpg",
    "PHOTO.Caption": "photo.JPG",
    "photo.JPG.Caption": "photo.jpg",
    "cafe\u0301.txt": "caf\u00e9.jpg",
    "caf\u00e9.txt": "cafe\u0301.jpg",
    "two.dots.txt": "two.dots.jpg",
}


@pytest.mark.parametrize("name", CAPTION_NAMES)
def test_captions_are_known_by_their_usual_names(tmp_path, name):
    picture(1).save(tmp_path / CAPTION_NAMES[name], "JPEG")
    (tmp_path / name).write_text("a silver coat")
    names, _, _ = image_names(tmp_path)
    assert names == [CAPTION_NAMES[name]]
    assert read_captions(tmp_path, names)[names[0]] == {"text": ("a silver coat", name)}


LISTED = {
    "captions.jsonl": '{"file_name": "A.jpg", "text": "one\u2028two"}\n{"file_name": "b.jpg", "text": "x\u0085y"}',
    "metadata.jsonl": '{"image": "a.JPG", "prompt": "one two"}\r\n{"filename": "./b.jpg", "caption": "x y"}\r\n',
    "metadata.csv": 'file_name,text,more\na.jpg,"one\ntwo",1\nb.jpg,x y,2\n',
    "Captions.CSV": "\ufeffImage;Caption\r\na.jpg;one two\r\nb.jpg;x y\r\n",
}


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_listings_with_the_columns_and_encodings_of_others(tmp_path, name, encoding):
    for number, file in enumerate(("a.jpg", "b.jpg")):
        picture(number).save(tmp_path / file)
    text = LISTED[name] if encoding == "utf-8" else LISTED[name].removeprefix("\ufeff")
    (tmp_path / name).write_bytes(text.encode(encoding))
    names, _, _ = image_names(tmp_path)
    assert names == ["a.jpg", "b.jpg"]
    found = read_captions(tmp_path, names)
    assert [found[name]["text"][0] for name in names] == ["one two", "x y"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("photo.txt", "a coat".encode("utf-16-le"), "zero bytes, as UTF-16"),
        ("photo.txt", "caf\u00e9".encode("latin-1"), "cannot be read as UTF-8"),
        ("photo.caption", b" ", "photo.caption is empty"),
        ("photo.jpg.txt", b"another", "the text of photo.jpg differs from that in"),
        ("metadata.csv", b"name,words\nphoto.jpg,x", "no columns file_name and text"),
        ("metadata.csv", b"file_name,text\nother.jpg,x", "line 2: there is no other.jpg"),
        ("metadata.csv", b"file_name,text\n,x", "line 2: not of the form"),
        ("metadata.jsonl", b'{"file_name": "photo.jpg", "words": "x"}', "line 1: not of the form"),
    ],
)
def test_captions_that_cannot_be_used_are_named(tmp_path, name, content, words):
    picture(1).save(tmp_path / "photo.jpg")
    if name == "photo.jpg.txt":
        (tmp_path / "photo.txt").write_text("one")
    (tmp_path / name).write_bytes(content)
    names, _, _ = image_names(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        read_captions(tmp_path, names)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_caption_of_another_case_is_not_that_of_a_second_picture(tmp_path):
    for number, file in enumerate(("a.jpg", "A.jpg")):
        picture(number).save(tmp_path / file)
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system makes no difference of case")
    (tmp_path / "A.txt").write_text("the large one")
    assert read_captions(tmp_path, ["A.jpg", "a.jpg"]) == {"A.jpg": {"text": ("the large one", "A.txt")}, "a.jpg": {}}


def test_texts_without_a_picture_and_several_lines_are_said(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    picture(1).save(data / "a.jpg")
    (data / "a.txt").write_text("one\r\ntwo\r\n")
    for name in ("b.txt", "b.caption", "tags.json"):
        (data / name).write_text("words")
    (data / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    manifest = prepare(data, tmp_path / "out")
    reasons = {row["source"]: row["reason"] for row in manifest["skipped"]}
    assert set(reasons) == {"b.txt", "b.caption", "tags.json", "pointer.jpg"}
    assert "a pointer to an image that was not fetched; run git lfs pull" in reasons.pop("pointer.jpg")
    assert all("captions are read from photo.txt next to photo.jpg" in why for why in reasons.values())
    assert "1 captions have several lines, which are joined (a.txt)" in capsys.readouterr().out
    assert manifest["pictures"][0]["text"] == "one two"


def test_what_was_written_for_a_duplicate_is_used_or_said(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        picture(number, (90, 90)).save(data / f"{number}.png")
        picture(number, (90, 90)).resize((180, 180)).save(data / f"{number} large.png")
        (data / f"{number}.txt").write_text(f"words {number}")
    (data / "1 large.txt").write_text("other words")
    (data / "2 large.txt").write_text("words 2")
    picture(9, (90, 90), "L").save(data / "0.mask.png")
    manifest = prepare(data, tmp_path / "out")
    assert [(row["source"], row["text"]) for row in manifest["pictures"]] == [
        ("0 large.png", "words 0"),
        ("1 large.png", "other words"),
        ("2 large.png", "words 2"),
    ]
    said = capsys.readouterr().out
    for number, words in (
        (0, "its mask is not used; its caption is used there"),
        (1, "its caption is not used: “words 1”"),
    ):
        assert words in next(line for line in said.splitlines() if f"duplicate  {number}.png" in line)


def test_a_licence_is_no_picture_but_a_picture_may_be_called_so(tmp_path):
    for number, name in enumerate(("licence.jpg", "README.png", "copying.webp")):
        picture(number).save(tmp_path / name)
    for name in ("LICENSE", "licence.txt", "readme.md", "README.rst"):
        (tmp_path / name).write_text("words")
    assert set(image_names(tmp_path)[0]) == {"licence.jpg", "README.png", "copying.webp"}
