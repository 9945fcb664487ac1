"""Whatever a file holds, its reader gives a valid value or the one error that names the file.

FUZZ_EXAMPLES sets how many inputs each test tries. They differ from run to run.
"""

import io
import json
import os
import shutil
import struct
import warnings

import numpy as np
import pytest
from conftest import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_preprocess import prepare

from lib import photographs
from lib.dataset import read_dataset
from lib.errors import UserError
from lib.preparation import sources

many = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 300)),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

# What JSON can hold, the values that our own keys take among them.
NAMES = ["file_name", "text", "peft_type", "lora_alpha", "target_modules", "use_dora", "r"]
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["LORA", "images/a.png", "a.png", 1e400, 10**400, "\ud800", ["to_q"]]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def mutated(draw, originals):
    """One of `originals` (bytes) with a few bytes changed, cut out, put in or repeated."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        # The beginning of a file is its header, where a byte matters most.
        place = draw(st.integers(0, min(100, len(data))) | st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "cut", "insert", "truncate", "number"])):
            case "flip" if place < len(data):
                data[place] ^= draw(st.integers(1, 255))
            case "cut":
                del data[place : place + draw(st.integers(1, 20))]
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=20))
            case "truncate":
                del data[place:]
            case "number":
                value = draw(st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000]))
                data[place : place + 4] = struct.pack("<I", value)
    return bytes(data)


def check_line(error, *words):
    """The error is of one line, not empty, and holds `words`."""
    text = str(error)
    assert text.strip()
    assert "\n" not in text
    for word in words:
        assert str(word) in text


# ---- captions.jsonl --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "data"
    (folder / "images").mkdir(parents=True)
    for name in ("a.png", "images/a.png", "images/b.png", "../outside.png"):
        picture(1, (8, 8)).save(folder / name)
    (folder / "images" / "link.png").symlink_to("../../outside.png")
    (folder / "images" / "loop.png").symlink_to("loop.png")
    return folder


file_names = (
    st.sampled_from(
        [
            "images/a.png",
            "a.png",
            "b.png",
            "",
            ".",
            "images",
            "../outside.png",
            "link.png",
            "loop.png",
            "x" * 300,
            "/".join(["x"] * 3000),
            "\0",
            "\ud800",
            "/etc/passwd",
            "C:\\a.png",
        ]
    )
    | st.text(max_size=20)
    | json_values
)
rows = st.fixed_dictionaries({}, optional={"file_name": file_names, "text": json_values})
jsonl_lines = (
    st.builds(
        lambda row, ascii: json.dumps(row, ensure_ascii=ascii).encode("utf-8", "replace"),
        rows | json_values,
        st.booleans(),
    )
    | st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace"))
    | st.binary(max_size=40)
    | mutated([b'{"file_name": "images/a.png", "text": "a coat"}'])
    | st.sampled_from([b"[" * 100_000, b"9" * 10_000, b'{"file_name": "b.png", "text": "a coat"}'])
)


@many
@given(st.lists(jsonl_lines, max_size=4).map(b"\n".join))
def test_captions(data, content):
    (data / "captions.jsonl").write_bytes(content)
    try:
        rows = read_dataset(data, 8)
    except UserError as error:
        check_line(error, data)
        return
    for index, row in enumerate(rows):
        assert (data / row.name).exists() or (data / "images" / row.name).exists()
        assert row.caption.strip()
        assert rows.pixels(index).shape == (3, 8, 8)


@many
@given(st.lists(jsonl_lines, max_size=4).map(b"\n".join))
def test_captions_beside_the_pictures(data, content):
    """The listing that preprocess.py reads."""
    (data / "captions.jsonl").write_bytes(content)
    try:
        captions = sources.read_captions(data, ["a.png"])
    except UserError as error:
        check_line(error, data)
        return
    assert set(captions) == {"a.png"}
    for caption, source in captions["a.png"].values():
        assert caption.encode()
        assert source == "captions.jsonl"


# ---- images ------------------------------------------------------------------------------------


def encoded(mode, **options):
    buffer = io.BytesIO()
    picture(3, (24, 16), mode).save(buffer, **options)
    return buffer.getvalue()


def sixteen_bits():
    buffer = io.BytesIO()
    image = Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24) * 99)
    image.save(buffer, "TIFF")
    return buffer.getvalue()


PICTURES = {
    "PNG": [encoded("RGB", format="PNG"), encoded("P", format="PNG"), encoded("RGBA", format="PNG")],
    "JPEG": [
        encoded("RGB", format="JPEG"),
        encoded("CMYK", format="JPEG"),
        encoded("RGB", format="JPEG", progressive=True),
    ],
    "WEBP": [encoded("RGB", format="WEBP"), encoded("RGBA", format="WEBP", lossless=True)],
    "GIF": [encoded("P", format="GIF")],
    "BMP": [encoded("RGB", format="BMP"), encoded("P", format="BMP")],
    "TIFF": [encoded("RGB", format="TIFF"), encoded("RGB", format="TIFF", compression="tiff_lzw"), sixteen_bits()],
    "AVIF": [encoded("RGB", format="AVIF")],
    "HEIF": [encoded("RGB", format="HEIF"), encoded("RGBA", format="HEIF")],
}


@many
@given(mutated(sum(PICTURES.values(), [])) | st.binary(max_size=60))
def test_pictures(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "picture"
    path.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on damaged metadata
            image, info, done = photographs.read_image(path, max_megapixels=1)
    except photographs.Unusable as reason:
        check_line(reason)
        return
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= 1e6
    assert info["format"]


@pytest.mark.parametrize("kind", PICTURES)
def test_the_pictures_that_are_mutated_are_whole(tmp_path, kind):
    for content in PICTURES[kind]:
        (tmp_path / "picture").write_bytes(content)
        image, info, _ = photographs.read_image(tmp_path / "picture")
        assert (image.size, image.mode, info["format"]) == ((24, 16), "RGB", kind)


# ---- folders of images ---------------------------------------------------------------------------

STEMS = [
    "a",
    "A",
    "photo",
    "caf\u00e9",
    "cafe\u0301",
    "photo.jpg",
    "photo_mask",
    "two dots.x",
    "licence",
    "\u5199\u771f",
    "\x07",
    "-x",
    "a\u2028b",
    "captions",
    "metadata",
]
ENDINGS = [
    ".png",
    ".PNG",
    ".jpg",
    ".mask.png",
    ".Mask.PNG",
    "-masklabel.png",
    "_mask.jpg",
    ".txt",
    ".TXT",
    ".caption",
    ".jpg.txt",
    ".json",
    ".jsonl",
    ".csv",
    ".mov",
    "",
]
entry_names = st.builds(str.__add__, st.sampled_from(STEMS) | st.text(max_size=8), st.sampled_from(ENDINGS))
entry_names = entry_names.filter(
    lambda name: (
        name not in ("", ".", "..")
        and not {"/", "\0"} & {*name}
        and len(os.fsencode(name.encode("utf-8", "replace"))) < 200
    )
)
MASKS = [
    encoded("L", format="PNG"),
    encoded("1", format="PNG"),
    encoded("RGBA", format="PNG"),
    encoded("L", format="JPEG"),
]
FLAT = io.BytesIO()
Image.new("L", (24, 16), 1).save(FLAT, "PNG")
LISTINGS = [
    b'{"file_name": "a.png", "text": "a coat"}',
    b"file_name,text\na.png,a coat\n",
    b"Image;Caption\nphoto.jpg;x\n",
]
entries = st.one_of(
    st.sampled_from([*PICTURES["PNG"], *PICTURES["JPEG"], *MASKS, FLAT.getvalue()]),
    st.builds(lambda seed, mode: encoded_of(seed, mode), st.integers(0, 9), st.sampled_from(["RGB", "RGBA", "L"])),
    st.sampled_from([b"a coat", b"", b"two\nlines", "a coat".encode("utf-16"), b"\xff\xfe\0", *LISTINGS]),
    st.tuples(st.just("link"), st.sampled_from(["a.png", "photo.jpg", "../outside.png", "gone", ".", "loop"])),
    st.just("folder"),
)


def encoded_of(seed, mode):
    buffer = io.BytesIO()
    picture(seed, (24, 16), mode).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(folder, found):
    """A folder of these entries, {name: bytes, "folder" or ("link", goal)}, as far as its file system takes the names."""
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    picture(5, (24, 16)).save(folder.parent / "outside.png")
    for name, content in found.items():
        try:
            if content == "folder":
                (folder / name).mkdir()
            elif isinstance(content, tuple):
                (folder / name).symlink_to(name if content[1] == "loop" else content[1])
            else:
                (folder / name).write_bytes(content)
        except (OSError, ValueError):  # such as half of a surrogate pair
            continue


@settings(many, max_examples=max(20, many.max_examples // 16))
@given(st.dictionaries(entry_names, entries, max_size=7), st.booleans())
def test_picture_folders(tmp_path_factory, found, buckets):
    """Masks, captions and links of any name: each file is used or named, or one line says what is wrong."""
    folder = tmp_path_factory.getbasetemp() / "folders" / "data"
    make_folder(folder, found)
    out = folder.parent / "out"
    try:
        manifest = prepare(folder, out, resolution=16, buckets=buckets, processes=1)
    except UserError as error:
        check_line(error, folder)
        assert not out.exists()
        return
    names, masks, _ = sources.image_names(folder)
    told = [row["source"] for key in ("pictures", "skipped", "duplicates") for row in manifest[key]]
    assert sorted(told) == sorted(name.encode("utf-8", "replace").decode() for name in names)
    beside = [*names, *(mask for some in masks.values() for mask in some)]
    for path in folder.iterdir():  # what is left is a caption, a listing, a clip or nobody's image
        assert (
            path.name in beside
            or sources.IGNORED.fullmatch(path.name)
            or path.name.lower().endswith((*sources.CAPTION_ENDINGS, *sources.COMPANIONS))
            or sources.alike(path.name) in sources.LISTINGS
        )
    rows = read_dataset(out, 16)
    assert len(rows) == len(manifest["pictures"])
    for index, row in enumerate(manifest["pictures"]):
        assert [*rows.pixels(index).shape] == [3, *row["size"][::-1]]
        masked = any(line.startswith("masked") for line in row["done"])
        assert rows.has_mask(index) == masked
        assert rows.mask(index, (4, 4)).max() > 0
    again = prepare(folder, out, resolution=16, buckets=buckets, processes=1)
    assert again["pictures"] == manifest["pictures"]


@settings(many, max_examples=max(20, many.max_examples // 16))
@given(st.dictionaries(entry_names, entries, max_size=7), st.lists(entry_names, max_size=3))
def test_training_folders_of_ones_own(tmp_path_factory, found, listed):
    """The same, given to train.py as it is."""
    folder = tmp_path_factory.getbasetemp() / "folders" / "data"
    found.pop("captions.jsonl", None)
    make_folder(folder, found)
    rows = [json.dumps(dict(file_name=name, text="a coat")) for name in [*listed, *list(found)[:3]]]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    try:
        rows = read_dataset(folder, 16)
        rows.notes()
        rows.masks_sha256()
        for index in range(len(rows)):
            assert rows.pixels(index).shape == (3, 16, 16)
            assert 0 < rows.mask(index, (4, 4)).max() <= 255
    except UserError as error:
        check_line(error, folder)
