"""Telephones' and cameras' files: HEIC images, what lies beside them, and raw files."""

import io
import json
import struct
import zlib

import numpy as np
import pillow_heif
import pytest
import torch
from conftest import call, picture
from PIL import Image, ImageCms, ImageDraw, PngImagePlugin, TiffImagePlugin
from test_preprocess import BLUE, GREEN, RED, WHITE, close, prepare

from lib.dataset import read_dataset
from lib.photographs import Unusable, read_image, upright_shape


def halves(size=(80, 40)):
    """An image whose left half is green and whose right half is red."""
    image = Image.new("RGB", size, RED)
    ImageDraw.Draw(image).rectangle((0, 0, size[0] // 2 - 1, size[1] - 1), fill=GREEN)
    return image


def save_heic(image, path, **options):
    image.save(path, "HEIF", quality=95, **options)


def test_heic_is_told_by_content(tmp_path):
    save_heic(Image.new("RGB", (80, 80), RED), tmp_path / "IMG_0001.jpg")
    image, info, done = read_image(tmp_path / "IMG_0001.jpg")
    assert (info["format"], info["width"], info["height"]) == ("HEIF", 80, 80)
    assert image.mode == "RGB"
    assert close(image.getpixel((40, 40)), RED)
    assert done == []


@pytest.mark.parametrize(
    ("orientation", "size", "top_left"),
    [(1, (80, 40), GREEN), (3, (80, 40), RED), (6, (40, 80), GREEN), (8, (40, 80), RED)],
)
def test_heic_is_upright_once(tmp_path, orientation, size, top_left):
    """The container turns the image, and its EXIF tells the same: only one of the two may act."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    save_heic(halves(), tmp_path / "a.heic", exif=exif.tobytes())
    image, _, done = read_image(tmp_path / "a.heic")
    assert image.size == size
    assert close(image.getpixel((5, 5)), top_left)
    assert ("rotated as the file says" in done) == (orientation != 1)


def test_heic_colour_profile_is_converted(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # Red and blue exchanged: red must come out as blue.
    swapped = bytearray(srgb)
    at = {name: swapped.index(name, 128) for name in (b"rXYZ", b"bXYZ")}
    red, blue = (bytes(swapped[at[n] + 4 : at[n] + 12]) for n in (b"rXYZ", b"bXYZ"))
    swapped[at[b"rXYZ"] + 4 : at[b"rXYZ"] + 12] = blue
    swapped[at[b"bXYZ"] + 4 : at[b"bXYZ"] + 12] = red
    save_heic(Image.new("RGB", (64, 64), RED), tmp_path / "a.heic", icc_profile=bytes(swapped))
    assert close(read_image(tmp_path / "a.heic")[0].getpixel((30, 30)), BLUE)
    save_heic(Image.new("RGB", (64, 64), RED), tmp_path / "b.heic", icc_profile=srgb)
    assert close(read_image(tmp_path / "b.heic")[0].getpixel((30, 30)), RED)


def test_heic_wide_colours_without_a_profile_are_said(tmp_path):
    for primaries, transfer in ((12, 13), (1, 16), (9, 18)):
        save_heic(
            Image.new("RGB", (64, 64), RED),
            tmp_path / "wide.heic",
            color_primaries=primaries,
            transfer_characteristics=transfer,
        )
        (note,) = read_image(tmp_path / "wide.heic")[2]
        assert "no ICC profile" in note
        assert f"its primaries are {primaries} and its transfer function {transfer}" in note
    save_heic(Image.new("RGB", (64, 64), RED), tmp_path / "srgb.heic", color_primaries=1, transfer_characteristics=13)
    assert read_image(tmp_path / "srgb.heic")[2] == []


def test_heic_of_more_pictures_gives_its_main_one(tmp_path):
    file = pillow_heif.HeifFile()
    for colour in (RED, BLUE, GREEN):
        file.add_from_pillow(Image.new("RGB", (64, 64), colour))
    file.save(tmp_path / "burst.heic", primary_index=1)
    image, _, done = read_image(tmp_path / "burst.heic")
    assert close(image.getpixel((30, 30)), BLUE)
    assert done == ["the main one of 3 images"]


def test_heic_of_ten_bits_and_with_transparency(tmp_path):
    grey = np.full((64, 64, 3), 32896, np.uint16)  # the middle of 16 bits
    pillow_heif.from_bytes("RGB;16", (64, 64), grey.tobytes()).save(tmp_path / "ten.heic", quality=95)
    image, _, done = read_image(tmp_path / "ten.heic")
    assert close(image.getpixel((30, 30)), (128, 128, 128))
    assert "10 bits reduced to 8" in done or "12 bits reduced to 8" in done
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 32, 64))
    save_heic(clear, tmp_path / "clear.heic")
    image, _, done = read_image(tmp_path / "clear.heic")
    assert close(image.getpixel((10, 10)), BLUE)
    assert close(image.getpixel((50, 10)), WHITE)
    assert "put on white" in done


def test_damaged_and_huge_heic(tmp_path):
    whole = io.BytesIO()
    picture(3, (300, 300)).save(whole, "HEIF", quality=95)
    for length, words in ((40, "HEIC"), (len(whole.getvalue()) // 2, "damaged or truncated")):
        (tmp_path / "cut.heic").write_bytes(whole.getvalue()[:length])
        with pytest.raises(Unusable, match=words):
            read_image(tmp_path / "cut.heic")
    (tmp_path / "whole.heic").write_bytes(whole.getvalue())
    with pytest.raises(Unusable, match="megapixels"):
        read_image(tmp_path / "whole.heic", max_megapixels=0.04)
    assert read_image(tmp_path / "whole.heic", max_megapixels=0.1)[0].size == (300, 300)


def test_what_telephones_lay_beside_pictures_is_passed_over(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    save_heic(picture(1, (100, 100)), data / "IMG_0001.HEIC")
    for name in ("IMG_0001.MOV", "IMG_0001.AAE"):
        (data / name).write_bytes(b"\0\0\0\x14ftypqt  film")
    (data / "alone.mov").write_bytes(b"\0\0\0\x14ftypqt  film")
    manifest = prepare(data, tmp_path / "out")
    assert [row["source"] for row in manifest["pictures"]] == ["IMG_0001.HEIC"]
    skipped = {row["source"]: row["reason"] for row in manifest["skipped"]}
    assert list(skipped) == ["alone.mov"]
    assert skipped["alone.mov"].startswith("a video")
    told = capsys.readouterr().out
    assert "2 clips and records next to images are ignored" in told
    assert "IMG_0001.AAE, …" in told


def raw_files(folder):
    """The beginnings of raw files, those that are TIFF files with the small preview that they hold."""
    preview = io.BytesIO()
    picture(2, (160, 120)).save(preview, "TIFF")
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[50706] = b"\1\4\0\0"
    tags.tagtype[50706] = 1
    dng = io.BytesIO()
    picture(2, (160, 120)).save(dng, "TIFF", tiffinfo=tags)
    cr2 = bytearray(preview.getvalue())
    cr2[8:10] = b"CR"
    content = {
        "a.nef": preview.getvalue(),
        "a.arw": preview.getvalue(),
        "a.cr2": bytes(cr2),
        "b.dng": preview.getvalue(),
        "renamed.tif": dng.getvalue(),
        "a.cr3": b"\0\0\0\x18ftypcrx \0\0\0\1",
        "a.raf": b"FUJIFILMCCD-RAW 0201",
        "a.orf": b"IIRO\x08\0\0\0",
        "a.rw2": b"IIU\0\x18\0\0\0",
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return content


def test_raw_files_are_named_with_what_to_do(tmp_path):
    kinds = {"renamed.tif": "DNG"}
    for name in raw_files(tmp_path):
        with pytest.raises(Unusable) as error:
            read_image(tmp_path / name)
        kind = kinds.get(name, name.split(".")[1].upper())
        assert f"a camera's raw file ({kind}); develop it" in str(error.value), name
    # An ordinary TIFF, and an image that only has such a name.
    picture(2, (160, 120)).save(tmp_path / "plain.tif")
    assert read_image(tmp_path / "plain.tif")[1]["format"] == "TIFF"
    picture(2, (160, 120)).save(tmp_path / "renamed.dng", "JPEG")
    assert read_image(tmp_path / "renamed.dng")[1]["format"] == "JPEG"
    (tmp_path / "odd.nef").write_bytes(b"something else")
    with pytest.raises(Unusable, match="by its name a camera's raw file"):
        read_image(tmp_path / "odd.nef")


@pytest.mark.parametrize("head", [b"\xff\x0a\xfa\x7f", b"\0\0\0\x0cJXL \r\n\x87\n"])
def test_jpeg_xl_is_named(tmp_path, head):
    (tmp_path / "a.jxl").write_bytes(head + b"\0" * 40)
    with pytest.raises(Unusable, match="JPEG XL, which is not read; convert it"):
        read_image(tmp_path / "a.jxl")


def test_a_folder_of_heic_becomes_a_training_set(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        save_heic(picture(number, (200, 120)), data / f"IMG_{number}.heic")
    done = call("preprocess.py", "--data-dir", data, "--output-dir", tmp_path / "out", "--resolution", 64)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out/images/image_01.png") as image:
        assert image.size == (64, 64)


# ---- every format alike ---------------------------------------------------------------------------

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'


def saved_turned(path, kind, said_in, compression=None):
    """An image that is to be turned a quarter to the right, green before and red, to be green above and red."""
    image = Image.new("RGB", (80, 40), RED)
    image.paste(GREEN, (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = dict(exif=exif.tobytes()) if "exif" in said_in else {}
    if kind == "TIFF":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        if "exif" in said_in:
            tags[274] = 6
        if "xmp" in said_in:
            tags[700] = XMP
            tags.tagtype[700] = 1
        options = dict(tiffinfo=tags, compression=compression)
    elif "xmp" in said_in and kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP.decode())
        options["pnginfo"] = info
    elif "xmp" in said_in:
        options["xmp"] = XMP
    image.save(path, kind, **options)


@pytest.mark.parametrize("said_in", [["exif"], ["xmp"], ["exif", "xmp"]], ids="+".join)
@pytest.mark.parametrize("kind", ["AVIF", "HEIF", "JPEG", "PNG", "TIFF", "TIFF lzw", "WEBP"])
def test_every_format_is_turned_once(tmp_path, kind, said_in):
    kind, _, compression = kind.partition(" ")
    path = tmp_path / "picture"
    saved_turned(path, kind, said_in, f"tiff_{compression}" if compression else None)
    image, _, done = read_image(path)
    assert image.size == upright_shape(path) == (40, 80)
    assert close(image.getpixel((20, 5)), GREEN, 12)
    assert close(image.getpixel((20, 75)), RED, 12)
    assert any("rotated" in line for line in done)


@pytest.mark.parametrize("bits", [1, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_greys_that_use_part_of_sixteen_bits_are_not_black(tmp_path, bits, kind):
    ramp = np.linspace(0, 1, 64)[None].repeat(64, axis=0)
    Image.fromarray((ramp * (2**bits - 1)).round().astype(np.uint16)).save(tmp_path / "a", kind)
    image, _, done = read_image(tmp_path / "a")
    expected = np.asarray(ramp * 255) if bits > 1 else (ramp.round() * 255)
    assert np.abs(np.asarray(image)[..., 0] - expected).max() <= 1.5
    assert f"with {2**bits - 1} as white" in done[0]


def test_greys_of_other_kinds(tmp_path):
    ramp = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(64, axis=0)
    for name, levels in {
        "fractions": ramp,
        "0 to 255": ramp * 255,
        "32 bits": (ramp * 2**30).astype(np.int32),
        "not all numbers": np.where(ramp > 0.99, np.nan, ramp),
    }.items():
        Image.fromarray(levels).save(tmp_path / "a.tif")
        pixels = np.asarray(read_image(tmp_path / "a.tif")[0])[..., 0]
        assert np.abs(pixels[:, :60] - (ramp * 255)[:, :60]).max() <= 2, name
    # 0 is white in some scanners' files.
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    sixteen = (ramp * 65535).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(sixteen).save(buffer, "TIFF")
    raw = bytearray(buffer.getvalue())
    at = raw.index((262).to_bytes(2, "little") + (3).to_bytes(2, "little"))
    raw[at + 8 : at + 10] = (0).to_bytes(2, "little")
    (tmp_path / "negative.tif").write_bytes(raw)
    pixels = np.asarray(read_image(tmp_path / "negative.tif")[0])[..., 0]
    assert np.abs(pixels - (1 - ramp) * 255).max() <= 1.5


def sixteen_bit_png(levels):
    """A PNG of 16-bit colours, which Pillow does not write."""
    height, width, _ = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    found = b"\x89PNG\r\n\x1a\n"
    for name, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        found += struct.pack(">I", len(data)) + name + data
        found += struct.pack(">I", zlib.crc32(name + data))
    return found


def test_colours_of_sixteen_bits_that_would_come_out_black_are_named(tmp_path):
    levels = np.random.default_rng(1).integers(0, 4096, (32, 32, 3))
    (tmp_path / "twelve.png").write_bytes(sixteen_bit_png(levels))
    with pytest.raises(Unusable, match="nearly black: of 16 bits it uses 12 or fewer"):
        read_image(tmp_path / "twelve.png")
    (tmp_path / "sixteen.png").write_bytes(sixteen_bit_png(levels * 16))
    pixels = np.asarray(read_image(tmp_path / "sixteen.png")[0])
    assert np.abs(pixels - levels / 16).max() <= 1


def test_much_text_in_a_picture_is_no_damage(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    info.add_itxt("prompt", "y" * 3_000_000, zip=True)
    picture(1).save(tmp_path / "comfy.png", pnginfo=info)
    assert np.array_equal(np.asarray(read_image(tmp_path / "comfy.png")[0]), np.asarray(picture(1)))


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "HEIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_too_many_pixels_are_refused_in_every_format(tmp_path, kind):
    picture(1, (120, 120)).save(tmp_path / "a", kind)
    with pytest.raises(Unusable, match=r"more than 0\.01 megapixels"):
        read_image(tmp_path / "a", max_megapixels=0.01)
    assert read_image(tmp_path / "a", max_megapixels=0.0144)[0].size == (120, 120)


def as_taken(folder):
    """A training folder of one's own: images as they come from cameras and programs."""
    folder.mkdir()
    saved_turned(folder / "turned.jpg", "JPEG", ["exif"])
    saved_turned(folder / "turned.tif", "TIFF", ["exif"])
    save_heic(picture(5, (80, 80)), folder / "telephone.heic")
    clear = picture(2, (64, 64)).convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 32, 64))
    clear.save(folder / "clear.png")
    ramp = np.linspace(0, 4095, 64)[None].repeat(64, axis=0)
    Image.fromarray(ramp.astype(np.uint16)).save(folder / "grey.png")
    picture(6, (64, 64)).convert("L").save(folder / "grey.jpg")
    names = sorted(path.name for path in folder.iterdir())
    rows = [json.dumps(dict(file_name=name, text="a coat")) for name in names]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return folder


def test_a_training_folder_of_ones_own_is_read_as_preprocess_reads_it(tmp_path):
    folder = as_taken(tmp_path / "own")
    manifest = prepare(folder, tmp_path / "out", duplicate_bits=0, duplicate_colour=0)
    prepared, own = read_dataset(tmp_path / "out", 64), read_dataset(folder, 64)
    assert [row["source"] for row in manifest["pictures"]] == [row.name for row in own]
    for index in range(len(own)):
        assert torch.equal(prepared.pixels(index), own.pixels(index)), own[index].name
        assert torch.equal(prepared.mask(index, (8, 8)), own.mask(index, (8, 8))), own[index].name
    clear = [row.name for row in own].index("clear.png")
    assert own.pixels(clear)[:, :, :32].min() == 255
    assert own.mask(clear, (8, 8))[:, :4].max() == 0
