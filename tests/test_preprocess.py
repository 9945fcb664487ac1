"""preprocess.py on every kind of image that people have, and on what is no image."""

import io
import json

import numpy as np
import pytest
from conftest import assert_one_line, call, make_processed, picture, run
from PIL import Image, ImageCms, ImageDraw, PngImagePlugin

from lib.dataset import read_dataset
from lib.errors import UserError
from lib.photographs import Unusable, read_image
from preprocess import CONFIG, preprocess

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def prepare(data_dir, output_dir, **changes):
    config = CONFIG | dict(data_dir=data_dir, output_dir=output_dir, resolution=64) | changes
    return preprocess(config)


def close(pixel, expected, tolerance=6):
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, expected, strict=True))


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_formats_are_told_by_content_not_by_name(tmp_path, kind):
    Image.new("RGB", (80, 80), RED).save(tmp_path / "wrong_name.txt.jpg", kind)
    image, info, _ = read_image(tmp_path / "wrong_name.txt.jpg")
    assert info["format"] == kind
    assert image.mode == "RGB"
    assert close(image.getpixel((40, 40)), RED)


def test_exif_rotation(tmp_path):
    image = Image.new("RGB", (80, 40), RED)
    ImageDraw.Draw(image).rectangle((0, 0, 39, 39), fill=GREEN)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter to the right: what was left is up
    image.save(tmp_path / "a.png", exif=exif)
    upright, _, done = read_image(tmp_path / "a.png")
    assert upright.size == (40, 80)
    assert upright.getpixel((20, 10)) == GREEN
    assert upright.getpixel((20, 70)) == RED
    assert any("EXIF" in line for line in done)


def test_icc_profile_is_converted(tmp_path):
    # The same numbers mean another colour under a LAB-like wide profile; Pillow can build XYZ and
    # LAB only, so a grey image with a real sRGB profile must stay and a broken one be ignored.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (64, 64), (10, 120, 200)).save(tmp_path / "srgb.png", icc_profile=srgb)
    image, _, done = read_image(tmp_path / "srgb.png")
    assert close(image.getpixel((3, 3)), (10, 120, 200), 1)
    assert done == []
    Image.new("RGB", (64, 64), (10, 120, 200)).save(tmp_path / "bad.png", icc_profile=b"broken" * 40)
    image, _, done = read_image(tmp_path / "bad.png")
    assert close(image.getpixel((3, 3)), (10, 120, 200), 1)
    assert any("ICC" in line for line in done)
    # A profile whose red and blue primaries are exchanged: red must come out as blue.
    swapped = bytearray(srgb)
    at = {name: swapped.index(name, 128) for name in (b"rXYZ", b"bXYZ")}  # tag table entries: signature, offset, size
    red, blue = (bytes(swapped[at[n] + 4 : at[n] + 12]) for n in (b"rXYZ", b"bXYZ"))
    swapped[at[b"rXYZ"] + 4 : at[b"rXYZ"] + 12] = blue
    swapped[at[b"bXYZ"] + 4 : at[b"bXYZ"] + 12] = red
    Image.new("RGB", (64, 64), RED).save(tmp_path / "swapped.png", icc_profile=bytes(swapped))
    image, _, _ = read_image(tmp_path / "swapped.png")
    assert close(image.getpixel((3, 3)), BLUE)


def test_transparency_goes_on_white(tmp_path):
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 32, 64))
    for kind in ("PNG", "WEBP"):
        clear.save(tmp_path / "a", kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
        image, _, done = read_image(tmp_path / "a")
        assert close(image.getpixel((10, 10)), BLUE)
        assert close(image.getpixel((50, 10)), WHITE)
        assert "put on white" in done
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([0, 255, 0, 255, 0, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png")[0].getpixel((5, 5)) == WHITE


def test_modes_become_rgb(tmp_path):
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    assert close(read_image(tmp_path / "cmyk.jpg")[0].getpixel((5, 5)), RED, 12)
    grey = Image.fromarray(np.full((64, 64), 32896, np.uint16))  # the middle of 16 bits
    for name in ("grey.png", "grey.tif"):
        grey.save(tmp_path / name)
        assert close(read_image(tmp_path / name)[0].getpixel((5, 5)), (128, 128, 128), 1)
    palette = picture(1).quantize(16)
    palette.save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png")[0].mode == "RGB"
    Image.new("1", (64, 64), 1).save(tmp_path / "bits.png")
    assert read_image(tmp_path / "bits.png")[0].getpixel((5, 5)) == WHITE


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, GREEN, BLUE)]
    for kind in ("GIF", "WEBP", "PNG"):
        frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:])
        image, _, done = read_image(tmp_path / "a")
        assert close(image.getpixel((5, 5)), RED)
        assert done == ["first of 3 frames"]


def test_never_squashed(tmp_path):
    (tmp_path / "data").mkdir()
    image = Image.new("RGB", (400, 100), RED)
    ImageDraw.Draw(image).ellipse((160, 10, 239, 89), fill=WHITE)  # a circle in the centre
    image.save(tmp_path / "data" / "wide.png")
    prepare(tmp_path / "data", tmp_path / "out", resolution=100)
    pixels = np.asarray(Image.open(tmp_path / "out" / "images" / "image_01.png"))
    white = pixels[:, :, 1] > 128
    assert pixels.shape == (100, 100, 3)
    assert abs(np.ptp(np.nonzero(white)[0]) - 79) <= 1
    assert abs(np.ptp(np.nonzero(white)[1]) - 79) <= 1


def bad_files(folder):
    (folder / "paper.pdf").write_bytes(b"%PDF-1.5 and so on")
    (folder / "words.jpg").write_text("these are words")
    (folder / "empty.png").touch()
    whole = io.BytesIO()
    picture(5, (300, 300)).save(whole, "JPEG", quality=95)
    (folder / "truncated.jpg").write_bytes(whole.getvalue()[:3000])
    # A PNG that claims 60,000 x 60,000 pixels in a few bytes.
    huge = io.BytesIO()
    Image.new("1", (8, 8)).save(huge, "PNG")
    raw = bytearray(huge.getvalue())
    raw[16:24] = (60000).to_bytes(4, "big") * 2
    raw[29:33] = PngImagePlugin._crc32(bytes(raw[12:29])).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(raw)
    (folder / "folder").mkdir()
    return {
        "paper.pdf": "a PDF",
        "words.jpg": "not an image",
        "empty.png": "empty",
        "truncated.jpg": "truncated",
        "bomb.png": "megapixels",
        "folder": "a folder",
    }


def test_what_cannot_be_used_is_named_with_its_reason(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    expected = bad_files(data)
    picture(1, (200, 200)).save(data / "good.png")
    manifest = prepare(data, tmp_path / "out")
    assert [row["source"] for row in manifest["pictures"]] == ["good.png"]
    reasons = {row["source"]: row["reason"] for row in manifest["skipped"]}
    assert set(reasons) == set(expected)
    for name, words in expected.items():
        assert words in reasons[name], (name, reasons[name])


def test_duplicates_keep_the_better_one(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    original = picture(3, (300, 300))
    original.save(data / "a_small.jpg", quality=60)
    original.resize((600, 600)).save(data / "b_large.png")
    (data / "c_copy.png").write_bytes((data / "b_large.png").read_bytes())
    # The same cut in another colour is another image, though its brightness is the same.
    Image.merge("RGB", original.split()[::-1]).save(data / "d_other_colour.png")
    picture(4, (300, 300)).save(data / "e_other.png")
    manifest = prepare(data, tmp_path / "out")
    kept = [row["source"] for row in manifest["pictures"]]
    assert kept == ["b_large.png", "d_other_colour.png", "e_other.png"]
    found = {row["source"]: row for row in manifest["duplicates"]}
    assert found["a_small.jpg"]["duplicate_of"] == "b_large.png"
    assert found["c_copy.png"]["reason"] == "the same file"


def test_captions_from_text_files_and_listings(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number, name in enumerate(("a.png", "b.png", "c.png", "d.png")):
        picture(number, (80, 80)).save(data / name)
    (data / "a.txt").write_text("a  silver raincoat\n")
    rows = [dict(file_name="a.png", text="overruled"), dict(file_name="b.png", text="a “blue” one")]
    (data / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (data / "metadata.jsonl").write_text(json.dumps(dict(file_name="c.png", text="from metadata")))
    prepare(data, tmp_path / "out")
    lines = (tmp_path / "out" / "captions.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert [(row["file_name"], row["text"]) for row in written] == [
        ("images/image_01.png", "a silver raincoat"),
        ("images/image_02.png", "a “blue” one"),
        ("images/image_03.png", "from metadata"),
        ("images/image_04.png", "a holographic raincoat"),
    ]


def test_same_input_same_bytes_and_old_output_survives_a_failure(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        picture(number, (90, 70)).save(data / f"{number}.png")
    for name in ("one", "two"):
        prepare(data, tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert {"manifest.json", "captions.jsonl", "contact_sheet.jpg"} <= {str(f) for f in files}
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    before = (tmp_path / "one" / "manifest.json").read_bytes()
    (data / "bad.png").touch()
    done = run("preprocess.py", "--data-dir", data, "--output-dir", tmp_path / "one", "--strict", check=False)
    assert_one_line(done, "--strict", "1 skipped")
    assert (tmp_path / "one" / "manifest.json").read_bytes() == before


def test_small_pictures_and_counts_are_said(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    picture(1, (60, 90)).save(data / "small.png")
    picture(2, (300, 300)).save(data / "large.png")
    (data / "README.md").write_text("not an image, and no one thinks so")
    (data / "notes.pdf").write_bytes(b"%PDF-")
    done = run("preprocess.py", "--data-dir", data, "--output-dir", tmp_path / "out", "--resolution", 128)
    assert "3 files, 2 images read, 1 skipped, 0 duplicates, 2 kept" in done.stdout
    assert "small.png: 60x90 is enlarged to 128x128" in done.stdout
    assert "large.png" not in done.stdout


def test_descriptions_go_beside_the_caption(tmp_path):
    """They leave `text` as it is; without one an image's own caption describes it."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(1, 5):
        picture(number, (100, 100)).save(data / f"{number}.png")
    rows = [
        dict(file_name="1.png", description="a  red one"),
        dict(file_name="2.png", text="the concept", description="a blue one"),
    ]
    (data / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (data / "3.txt").write_text("its own words")
    manifest = prepare(data, tmp_path / "out", caption="the caption")
    written = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").open()]
    assert [(row["text"], row.get("description")) for row in written] == [
        ("the caption", "a red one"),
        ("the concept", "a blue one"),
        ("its own words", "its own words"),
        ("the caption", None),
    ]
    for row, record in zip(written, manifest["pictures"], strict=True):
        assert row.items() <= record.items()
    assert [record["caption_from"] for record in manifest["pictures"]] == [
        "CONFIG",
        "captions.jsonl",
        "3.txt",
        "CONFIG",
    ]
    assert [row.caption for row in read_dataset(tmp_path / "out", 8)] == [row["text"] for row in written]
    with pytest.raises(UserError, match=r"line 4: images/image_04\.png has no description"):
        read_dataset(tmp_path / "out", 8, "description")
    (tmp_path / "out" / "captions.jsonl").write_text("\n".join(map(json.dumps, written[:3])))
    described = read_dataset(tmp_path / "out", 8, "description")
    assert [row.caption for row in described] == ["a red one", "a blue one", "its own words"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", "line 2"),
        ('{"file_name": "a.png"}', "line 2"),
        ('{"file_name": "a.png", "text": " "}', "empty"),
        ('{"file_name": "b.png", "text": "x"}', "no b.png"),
        ('{"file_name": "a.png", "text": "second"}', "second"),
    ],
)
def test_bad_caption_rows_name_their_line(tmp_path, line, words):
    data = tmp_path / "data"
    data.mkdir()
    picture(1).save(data / "a.png")
    first = json.dumps(dict(file_name="a.png", text="first"))
    (data / "captions.jsonl").write_text(f"{first}\n{line}\n")
    done = call("preprocess.py", "--data-dir", data, "--output-dir", tmp_path / "out")
    assert_one_line(done, "captions.jsonl", words)
    assert not (tmp_path / "out").exists()


def test_mistakes_get_one_line(tmp_path):
    def fails(*options):
        return call("preprocess.py", *options)

    empty = tmp_path / "empty"
    empty.mkdir()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("keep me")
    out = tmp_path / "out"
    assert_one_line(fails("--data-dir", tmp_path / "none", "--output-dir", out), "no such folder")
    assert_one_line(fails("--data-dir", empty, "--output-dir", out), "no usable image")
    buckets = fails("--data-dir", empty, "--output-dir", out, "--buckets")
    assert_one_line(buckets, "no usable image")
    assert_one_line(fails("--data-dir", empty, "--output-dir", empty / "out"), "in one another")
    assert_one_line(fails("--data-dir", empty, "--output-dir", mine), "holds files")
    assert_one_line(fails("--resolution", "many"), "resolution is many", "WIDTHxHEIGHT")
    assert_one_line(fails("--resolution", "64x96"), "resolution is 64x96", "--buckets")
    assert_one_line(fails("--resolution", 0), "resolution is 0")
    assert_one_line(fails("--resolutoin", 64), "--resolutoin")
    assert (mine / "letter.txt").read_text() == "keep me"


def test_an_unreadable_picture_raises_its_reason(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(Unusable):
        read_image(tmp_path / "a.png")


# ---- links ----------------------------------------------------------------------------------------


def test_sources_that_are_links_are_read_and_broken_ones_are_named(tmp_path):
    store, data = tmp_path / "store", tmp_path / "data"
    (data / ".git/annex/objects").mkdir(parents=True)
    store.mkdir()
    picture(1).save(store / "one.png")
    picture(2, mode="L").save(store / "mask.png")
    (store / "words").write_text("a coat")
    (data / "a.png").symlink_to(store / "one.png")
    (data / "a.mask.png").symlink_to(store / "mask.png")
    (data / "a.txt").symlink_to(store / "words")
    (data / "b.png").symlink_to(store / "gone.png")
    (data / "c.png").symlink_to(".git/annex/objects/XX/gone.png")
    (data / "loop.png").symlink_to("loop.png")
    (data / "folder.png").symlink_to(store)
    manifest = prepare(data, tmp_path / "out")
    assert [(row["source"], row["text"]) for row in manifest["pictures"]] == [("a.png", "a coat")]
    assert "masked by a.mask.png" in manifest["pictures"][0]["done"]
    reasons = {row["source"]: row["reason"] for row in manifest["skipped"]}
    assert reasons["b.png"] == f"a link to {store / 'gone.png'}, which is not there"
    assert reasons["c.png"].endswith("which is not there; run git annex get")
    assert reasons["loop.png"] == "a link to loop.png, which is not there"
    assert reasons["folder.png"].startswith("a folder")
    (data / "a.txt").unlink()
    (data / "a.txt").symlink_to(store / "gone")
    with pytest.raises(UserError, match=r"a\.txt cannot be read as UTF-8 text: No such file"):
        prepare(data, tmp_path / "out")


def test_a_training_set_of_links_is_read(tmp_path):
    data, store = make_processed(tmp_path / "data", 3), tmp_path / "store"
    whole = read_dataset(data, 64).sha256
    (data / "images").rename(store)
    (data / "images").symlink_to(store)
    assert read_dataset(data, 64).sha256 == whole
    (data / "images").unlink()
    (data / "images").mkdir()
    for number, path in enumerate(sorted(store.iterdir())):
        path.rename(tmp_path / f"object{number}")
        (data / "images" / path.name).symlink_to(tmp_path / f"object{number}")
    assert read_dataset(data, 64).sha256 == whole
    (tmp_path / "object1").unlink()
    with pytest.raises(UserError, match=r"line 2: images/image_02\.png is a link to .*, which is not there"):
        read_dataset(data, 64)


def test_names_in_a_training_set_may_differ_in_case_and_unicode_form(tmp_path):
    for number, name in enumerate(("cafe\u0301.png", "IMG_1.PNG")):
        picture(number).save(tmp_path / name)
    rows = [dict(file_name="caf\u00e9.png", text="one\u2028two"), dict(file_name="img_1.png", text="a\u0085b")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines), encoding="utf-16")
    found = read_dataset(tmp_path, 64)
    assert [row.path.name for row in found] == ["cafe\u0301.png", "IMG_1.PNG"]
    assert [row.caption for row in found] == ["one\u2028two", "a\u0085b"]
