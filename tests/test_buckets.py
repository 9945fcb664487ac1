"""Images that keep their shape, what is cut off of them, and masks: prepared, and trained on."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, TINY_RUN, assert_one_line, call, options, picture
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from test_preprocess import GREEN, RED, WHITE, close, prepare
from test_safety import assert_equal_runs, kill, succeeded, training

import train
from lib.dataset import read_dataset
from lib.errors import UserError
from lib.preparation.framing import bucket_sizes, choose_sizes, framed, kept_share, nearest_size, subject_box, view
from lib.training import setup
from lib.training.latents import latent_masks
from lib.training.losses import diffusion_loss
from lib.training.micro_step import MicroStep
from lib.training.samples import Samples, epoch_order

# ---- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [64, 128, 256, 512, 768])
def test_sizes_have_about_the_area_and_go_in_steps(resolution):
    step = min(64, resolution // 8)
    sizes = bucket_sizes(resolution)
    assert (resolution, resolution) in sizes
    for width, height in sizes:
        assert width % step == height % step == 0
        assert abs(width * height / resolution**2 - 1) <= 1 / 8
        assert (height, width) in sizes
    # What cameras and telephones make loses a thin margin at most.
    for shape in ((3, 4), (4, 3), (2, 3), (3, 2), (9, 16), (16, 9), (1, 1), (4, 5)):
        assert kept_share(shape, nearest_size(shape, sizes)) > 0.93, shape


def test_rare_and_too_many_sizes_are_merged():
    shapes = [(900, 1200)] * 30 + [(1200, 900)] * 30 + [(1000, 1000)] + [(2000, 500)]
    sizes, merged = choose_sizes(shapes, 512)
    assert (448, 576) in sizes
    assert (576, 448) in sizes
    assert merged == {}  # a single square would lose a quarter, and the panorama more than half
    near_square = (1150, 900)
    sizes, merged = choose_sizes([*shapes[:60], near_square, (1000, 880)], 512)
    assert sizes == [(448, 576), (576, 448)]
    assert merged == {(512, 448): 1}  # (1150, 900) is nearest to 4:3 anyway
    every = [size for size in bucket_sizes(512) for _ in range(9)]
    sizes, merged = choose_sizes(every, 512)
    assert len(sizes) == 6
    assert sum(merged.values()) == 9 * (len(bucket_sizes(512)) - 6)


def mixed(folder):
    """Portraits, landscapes and squares, each with a white circle in its middle."""
    folder.mkdir()
    for number, size in enumerate([(120, 160)] * 5 + [(160, 120)] * 4 + [(100, 100)] * 3):
        image = picture(number, size).point(lambda level: level // 2)
        x, y = size[0] // 2, size[1] // 2
        ImageDraw.Draw(image).ellipse((x - 30, y - 30, x + 29, y + 29), fill=WHITE)
        image.save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def buckets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("buckets")
    prepare(mixed(folder / "data"), folder / "out", resolution=64, buckets=True, processes=2)
    return folder / "out"


def test_pictures_keep_their_shape_and_are_never_squashed(buckets, capsys):
    manifest = json.loads((buckets / "manifest.json").read_text())
    assert {tuple(row["size"]) for row in manifest["pictures"]} == {(56, 72), (72, 56), (64, 64)}
    for row in manifest["pictures"]:
        with Image.open(buckets / row["file_name"]) as image:
            assert list(image.size) == row["size"]
            white = np.asarray(image)[:, :, 1] > 190
        spread = [np.ptp(np.nonzero(white)[axis]) for axis in (0, 1)]
        assert abs(spread[0] - spread[1]) <= 1, row


# ---- what is cut off ----------------------------------------------------------------------------


def thing_on_backdrop(at, size=(300, 600), colour=RED):
    image = Image.new("RGB", size, (200, 205, 210))
    ImageDraw.Draw(image).rectangle(at, fill=colour)
    return image


def test_crops_are_where_they_should_be():
    image = thing_on_backdrop((100, 30, 200, 130))
    for crop, top in (("centre", 150), ("top", 0), ("subject", 0)):
        ready, _, frame = framed(image, (96, 96), crop)
        assert frame["box"] == pytest.approx((0, top, 300, top + 300), abs=1), crop
        assert ready.size == (96, 96)
        assert frame["kept"] == 0.5
    low = thing_on_backdrop((100, 380, 200, 480))
    assert framed(low, (96, 96), "subject")[2]["box"][1] == pytest.approx(280, abs=8)
    # One that is taller than the square begins a little above its top.
    tall = thing_on_backdrop((100, 120, 200, 560))
    assert framed(tall, (96, 96), "subject")[2]["box"][1] == pytest.approx(102, abs=8)
    left = thing_on_backdrop((20, 20, 90, 280), (600, 300))
    assert framed(left, (96, 96), "subject")[2]["box"][0] == 0


def test_without_a_plain_backdrop_the_centre_is_taken_and_said():
    noise = np.random.default_rng(1).integers(0, 256, (600, 300, 3), dtype=np.uint8)
    busy = Image.fromarray(noise).resize((30, 60), 0).resize((300, 600), 0)
    assert subject_box(busy) is None
    frame = framed(busy, (96, 96), "subject")[2]
    assert "at the centre, as no subject was found" in frame["words"]
    assert frame["box"] == framed(busy, (96, 96))[2]["box"]
    assert subject_box(Image.new("RGB", (300, 600), WHITE)) is None
    mask = Image.new("L", busy.size)
    mask.paste(255, (0, 500, 300, 600))
    assert framed(busy, (96, 96), "subject", mask)[2]["box"] == (0, 300, 300, 600)


def test_the_sheet_shows_what_is_lost_and_masked():
    image = Image.new("RGB", (300, 600), RED)
    thumbnail = view(image, framed(image, (64, 64))[2])
    assert thumbnail.size == (80, 160)
    assert close(thumbnail.getpixel((40, 80)), RED)
    assert min(thumbnail.getpixel((40, 10))) > 120  # pale
    assert not close(thumbnail.getpixel((40, 40)), RED)  # the outline
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, 150, 600))
    tinted = view(image, framed(image, (300, 600))[2], mask)
    assert close(tinted.getpixel((10, 80)), RED)
    assert tinted.getpixel((70, 80))[2] > 100


def test_pictures_that_lose_more_than_a_quarter_are_counted(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for number, size in enumerate([(300, 700), (300, 390), (500, 300), (300, 300)]):
        picture(number, size).save(data / f"{number}.png")
    prepare(data, tmp_path / "out")
    assert "2 images lose more than a quarter" in capsys.readouterr().out
    done = call("preprocess.py", "--data-dir", data, "--output-dir", tmp_path / "x", "--crop", "left")
    assert_one_line(done, "crop is left", "centre, top, subject")


# ---- masks --------------------------------------------------------------------------------------


def test_masks_beside_pictures_and_in_them(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    mask = Image.new("L", (300, 600))
    mask.paste(255, (0, 300, 300, 600))  # the lower half, of which the square shows a half
    picture(1, (300, 600)).save(data / "a.jpg")
    mask.resize((150, 300)).save(data / "a.mask.png")
    clear = picture(2, (300, 600)).convert("RGBA")
    clear.putalpha(mask)
    clear.save(data / "b.png")
    picture(3, (300, 600)).save(data / "c.png")
    picture(4, (300, 600)).save(data / "d.png")
    Image.new("L", (300, 300), 255).save(data / "d.mask.png")
    mask.save(data / "e.mask.png")
    manifest = prepare(data, tmp_path / "out")
    assert [row["source"] for row in manifest["pictures"]] == ["a.jpg", "b.png", "c.png"]
    skipped = {row["source"]: row["reason"] for row in manifest["skipped"]}
    assert "another shape" in skipped["d.png"]
    assert "no image of that name" in skipped["e.mask.png"]
    assert "masked by a.mask.png" in manifest["pictures"][0]["done"]
    rows = read_dataset(tmp_path / "out", 64)
    for index in (0, 1):
        cells = rows.mask(index, (8, 8)).numpy()
        assert cells[:4].max() < 20
        assert cells[4:].min() > 235
    assert rows.mask(2, (8, 8)).min() == 255
    assert len(list((tmp_path / "out" / "images").iterdir())) == 5


def subject(size=(64, 64), mode="L", white=255):
    """A mask of the left half."""
    mask = Image.new(mode, size)
    mask.paste(white, (0, 0, size[0] // 2, size[1]))
    return mask


def cut_out(black, white, outside):
    """A mask painted in RGB, the left half `white`, the right one `black`, transparent where `outside` says."""
    image = Image.new("RGBA", (64, 64), (black,) * 3 + (255,))
    image.paste((white,) * 3 + (255,), (0, 0, 32, 64))
    image.paste((255, 255, 255, 0), outside)
    return image


def voc_palette():
    image = subject(mode="P", white=1)
    image.putpalette([0, 0, 0, 128, 0, 0])
    return image


RIGHT_HALF, LOWER_RIGHT = (32, 0, 64, 64), (32, 32, 64, 64)
LEFT_MARKED = {
    "0 and 255": subject(),
    "0 and 1": subject(white=1),
    "a bit": subject(mode="1", white=1),
    "16 bits, 0 and 1": Image.fromarray(np.asarray(subject(white=1), np.uint16)),
    "16 bits, 0 and 65535": Image.fromarray(np.asarray(subject(), np.uint16) * 257),
    "floats": Image.fromarray(np.asarray(subject(), np.float32) / 255),
    "labels with colours": voc_palette(),
    "white, the rest cut out": cut_out(255, 255, RIGHT_HALF),
    "black, the rest cut out": cut_out(0, 0, RIGHT_HALF),
    "grey, the rest cut out": cut_out(90, 120, RIGHT_HALF),
    "black and white, a corner cut out": cut_out(0, 255, LOWER_RIGHT),
    "black and white, all there": cut_out(0, 255, (0, 0, 0, 0)),
}


@pytest.mark.parametrize("kind", LEFT_MARKED)
def test_masks_as_programs_write_them(tmp_path, kind):
    """Prepared or given to train.py as they are, they mark the same."""
    data = tmp_path / "data"
    data.mkdir()
    picture(1).save(data / "a.png")
    mask = LEFT_MARKED[kind]
    mask.save(data / "a.mask.png", "TIFF" if mask.mode == "F" else "PNG")
    prepare(data, tmp_path / "out")
    (data / "captions.jsonl").write_text('{"file_name": "a.png", "text": "a coat"}')
    for folder in (tmp_path / "out", data):
        cells = read_dataset(folder, 64).mask(0, (8, 8)).numpy()
        assert cells[:, :4].min() > 250, folder
        assert cells[:, 4:].max() < 5, folder


MASK_NAMES = [
    "photo.mask.png",
    "photo.Mask.PNG",
    "PHOTO.MASK.png",
    "photo.mask.jpg",
    "photo.mask.webp",
    "photo-masklabel.png",
    "photo.masklabel.png",
    "photo-mask.png",
    "photo_mask.tif",
    "photo.JPG.mask.png",
]


@pytest.mark.parametrize("name", MASK_NAMES)
def test_masks_are_known_by_their_usual_names(tmp_path, name, capsys):
    data = tmp_path / "data"
    data.mkdir()
    picture(1).save(data / "photo.JPG")
    picture(2).save(data / "other.jpg")
    subject().save(data / name)
    manifest = prepare(data, tmp_path / "out")
    assert [row["source"] for row in manifest["pictures"]] == ["other.jpg", "photo.JPG"]
    assert f"masked by {name}" in manifest["pictures"][1]["done"]
    assert "masks      1 beside images, 0 of transparent" in capsys.readouterr().out
    listing = [dict(file_name=n, text="a coat") for n in ("other.jpg", "photo.JPG")]
    (data / "captions.jsonl").write_text("\n".join(map(json.dumps, listing)))
    rows = read_dataset(data, 64)
    assert [rows.has_mask(index) for index in (0, 1)] == [False, True]


def test_a_picture_of_a_mask_is_a_picture_and_two_masks_are_one_too_many(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number, name in enumerate(["carnival_mask.jpg", "venice-mask.png", "photo.jpg", "twice.jpg"]):
        picture(number).save(data / name)
    subject().save(data / "lost.masklabel.png")
    for name in ("twice.mask.png", "twice-masklabel.png"):
        subject().save(data / name)
    manifest = prepare(data, tmp_path / "out")
    assert [row["source"] for row in manifest["pictures"]] == ["carnival_mask.jpg", "photo.jpg", "venice-mask.png"]
    reasons = {row["source"]: row["reason"] for row in manifest["skipped"]}
    assert reasons == {
        "lost.masklabel.png": "a mask, but there is no image of that name",
        "twice.jpg": "it has 2 masks, twice-masklabel.png and twice.mask.png; keep one",
    }


def nothing(kind):
    """(an image, its mask or None, why it has nothing to train on)."""
    if kind == "clear":
        image = picture(1).convert("RGBA")
        image.putalpha(0)
        return image, None, "transparent everywhere"
    if kind == "plain":
        return Image.new("RGB", (64, 64), (9, 99, 200)), None, "of one colour everywhere"
    if kind == "empty":
        return picture(1), Image.new("L", (64, 64)), "marks nothing"
    if kind == "labels":
        mask = subject(white=1)
        mask.paste(2, (40, 0, 64, 64))
        return picture(1), mask, "2 levels besides black, the brightest 2 of 255"
    mask = Image.new("L", (64, 256))
    mask.paste(255, (0, 0, 64, 60))
    return picture(1, (64, 256)), mask, "nothing"


@pytest.mark.parametrize("kind", ["clear", "plain", "empty", "labels", "cut off"])
def test_what_has_no_content_is_named(tmp_path, kind):
    data = tmp_path / "data"
    data.mkdir()
    image, mask, words = nothing(kind)
    image.save(data / "a.png")
    if mask:
        mask.save(data / "a.mask.png")
    picture(2).save(data / "b.png")
    manifest = prepare(data, tmp_path / "out")
    assert [row["source"] for row in manifest["pictures"]] == ["b.png"]
    assert words in manifest["skipped"][0]["reason"]
    (data / "captions.jsonl").write_text('{"file_name": "a.png", "text": "a coat"}')
    with pytest.raises(UserError, match=words) as error:
        read_dataset(data, 64).mask(0, (8, 8))
    assert str(data / "a.png") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_picture_whose_transparency_is_opaque_has_no_mask(tmp_path):
    for number, mode in enumerate(("RGB", "RGBA", "LA")):
        picture(number).convert(mode).save(tmp_path / f"{number}.png")
    rows = [json.dumps(dict(file_name=f"{n}.png", text="a coat")) for n in range(3)]
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    found = read_dataset(tmp_path, 64)
    assert not any(map(found.has_mask, range(3)))
    assert found.mask(1, (8, 8)).min() == 255


def test_a_thin_subject_stays_marked(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    picture(1, (1024, 1024)).save(data / "a.png")
    mask = Image.new("L", (1024, 1024))
    mask.paste(255, (500, 0, 503, 1024))
    mask.save(data / "a.mask.png")
    prepare(data, tmp_path / "out")
    assert read_dataset(tmp_path / "out", 64).mask(0, (64, 64)).max() > 200


def test_how_many_masks_are_used_is_said(tiny_model, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        picture(number).save(data / f"{number}.png")
    subject().save(data / "1.mask.png")
    prepare(data, tmp_path / "out")
    config = TINY_RUN | dict(base_model=tiny_model, data_dir=tmp_path / "out", max_steps=2)
    for weight, words in ((1.0, "which mask_weight 1 leaves unused"), (0.25, "the loss counts 0.25")):
        done = call("train.py", *options(**config, output_dir=tmp_path / "x", mask_weight=weight))
        succeeded(done)
        assert "1 of 4 images have a mask" in done.stdout
        assert words in done.stdout


# ---- training -----------------------------------------------------------------------------------


def test_micro_batches_hold_one_shape_and_processes_share_them():
    shapes = {i: (4, 8, 8) if i % 3 else (4, 9, 7) for i in range(20)}
    pictures = np.arange(2, 20)

    def samples(size, processes=1, process=0):
        return Samples(pictures, 7, shapes.get, 1000, size, processes, process)

    large = samples(4)
    seen = []
    for number in range(18):  # four epochs of 18 images
        batch, draws = large.micro_batch(number)
        assert {shapes[i] for i in batch} == {draws[0][0].shape}
        seen += batch
        halves = [samples(2, 2, process).micro_batch(number) for process in (0, 1)]
        assert halves[0][0] + halves[1][0] == batch
        joined = halves[0][1] + halves[1][1]
        assert all(np.array_equal(a[1], b[1]) for a, b in zip(draws, joined, strict=True))
    assert Counter(seen) == dict.fromkeys(pictures, 4)
    assert [large.micro_batch(n)[0] for n in range(18)] != [large.micro_batch(n)[0] for n in range(18, 36)]
    # One at a time: each image once an epoch, as without shapes.
    plain = Samples(pictures, 7, lambda i: (4, 8, 8), 1000, 1, 1, 0)
    one = samples(1)
    assert [one.micro_batch(n)[0] for n in range(40)] == [plain.micro_batch(n)[0] for n in range(40)]


@pytest.mark.parametrize("counts", [(15, 1), (16,), (7, 5, 3), (1, 1, 1, 30), (2, 40)])
@pytest.mark.parametrize(("batch", "processes"), [(1, 1), (3, 1), (8, 1), (8, 4)])
def test_every_picture_is_seen_as_often_as_every_other(counts, batch, processes):
    shape_of = [(4, 8, 8 + kind) for kind, count in enumerate(counts) for _ in range(count)]
    pictures, size = np.arange(len(shape_of)), batch * processes
    everyone = [
        Samples(pictures, 42, shape_of.__getitem__, 1000, batch, processes, process) for process in range(processes)
    ]
    seen, by_shape = Counter(), Counter()
    for number in range(3 * len(pictures)):
        found = [int(i) for samples in everyone for i in samples.micro_batch(number)[0]]
        seen.update(found)
        (shape,) = {shape_of[i] for i in found}
        by_shape[shape] += size
        # At no time is a shape more than a batch from its share.
        for kind, count in enumerate(counts):
            due = (number + 1) * size * count / len(pictures)
            assert abs(by_shape[4, 8, 8 + kind] - due) <= size + count
    assert seen == dict.fromkeys(map(int, pictures), 3 * size)
    small = sum(count for count in counts if count < size) if len(counts) > 1 else 0
    assert [f"{small} of {len(pictures)} images" in note for note in everyone[0].notes()] == ([True] if small else [])


def test_pictures_of_one_shape_are_drawn_in_the_order_of_the_epochs():
    found = Samples(np.arange(7), 5, lambda i: (4, 8, 8), 1000, 3, 2, 0)
    orders = [epoch_order(5, epoch, 7) for epoch in range(20)]
    assert [found.picture(sample) for sample in range(140)] == list(np.concatenate(orders))


BUCKETED = TINY_RUN | dict(resolution=64, max_steps=9, checkpoint_every=3, validation_count=3)


@pytest.mark.parametrize("kind", ["plain", "protected"])
def test_training_on_buckets_goes_on_bit_for_bit(tiny_model, buckets, tmp_path, protected, kind):
    """Protected, the pass of each shape draws the base model's prediction for no text too."""
    more = protected if kind == "protected" else {}
    config = BUCKETED | dict(base_model=tiny_model, data_dir=buckets, batch_size=2) | more
    for name, at in (("whole", {}), ("killed", {5: kill})):
        (tmp_path / name).mkdir()
        training(tmp_path / name, config | dict(output_dir=tmp_path / name), at)
    succeeded(training(tmp_path / "killed", config | dict(output_dir=tmp_path / "killed")))
    folder = "lora_weights_rank_32"
    assert_equal_runs(tmp_path / "whole" / folder, tmp_path / "killed" / folder)
    record = json.loads((tmp_path / "whole" / folder / "config.json").read_text())
    assert bool(record["protection"]) == (kind == "protected")
    shown = Counter(Image.open(buckets / "images" / Path(name).name).size for name in record["data"]["trained_on"])
    assert record["data"]["size_counts"] == {"{}x{}".format(*size): n for size, n in shown.items()}
    card = (tmp_path / "whole" / folder / "README.md").read_text()
    assert f"| sizes, precision | {', '.join(record['data']['size_counts'])}; no |" in card


def test_the_held_out_loss_of_buckets_does_not_depend_on_the_batch(tiny_model, buckets, tmp_path):
    found = []
    for size in (1, 3):
        config = BUCKETED | dict(base_model=tiny_model, data_dir=buckets, batch_size=size)
        succeeded(training(tmp_path, config | dict(output_dir=tmp_path / str(size))))
        log = (tmp_path / str(size) / "lora_weights_rank_32" / "log.jsonl").read_text().splitlines()
        found.append(next(r["validation_loss"] for r in map(json.loads, log) if r["step"] == 0))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_another_resolution_than_the_buckets_is_refused(tiny_model, buckets, tmp_path):
    config = BUCKETED | dict(base_model=tiny_model, data_dir=buckets, output_dir=tmp_path)
    done = call("train.py", *options(**config | dict(resolution=128)))
    assert_one_line(done, "--buckets", "resolution of 64, not 128")


def test_squares_are_not_enlarged_in_silence(tiny_model, tmp_path):
    """Made smaller they lose nothing."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        picture(number, (400, 300)).save(data / f"{number}.png")
    prepare(data, tmp_path / "out")
    config = TINY_RUN | dict(base_model=tiny_model, data_dir=tmp_path / "out", max_steps=2)
    done = call("train.py", *options(**config | dict(output_dir=tmp_path / "a", resolution=128)))
    assert_one_line(done, "resolution of 64 and would be enlarged to 128", "--resolution 128")
    done = call("train.py", *options(**config | dict(output_dir=tmp_path / "a", resolution=32)))
    succeeded(done)
    assert "note: not" in done.stdout
    assert "are enlarged" not in done.stdout


def test_what_becomes_of_ones_own_pictures_is_said(tiny_model, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    sizes = [(64, 64), (48, 64), (90, 60), (64, 64)]
    for number, size in enumerate(sizes):
        picture(number, size).save(data / f"{number}.png")
    rows = [json.dumps(dict(file_name=f"{n}.png", text="a coat")) for n in range(4)]
    (data / "captions.jsonl").write_text("\n".join(rows))
    config = TINY_RUN | dict(base_model=tiny_model, data_dir=data, max_steps=2, output_dir=tmp_path)
    done = call("train.py", *options(**config))
    succeeded(done)
    assert "of 4 images 2 are smaller and are enlarged (64x64 are trained on)" in done.stdout
    assert "of 4 images 2 are of another shape and are cropped" in done.stdout


def test_a_mask_weight_without_masks_is_refused(tiny_model, buckets, tmp_path):
    config = BUCKETED | dict(base_model=tiny_model, data_dir=buckets, output_dir=tmp_path)
    assert_one_line(call("train.py", *options(**config, mask_weight=0.5)), "no image", "has a mask")
    assert_one_line(call("train.py", *options(**config, mask_weight=2)), "mask_weight is 2")


def test_the_background_of_masked_pictures_is_learned_less(tmp_path):
    """On the miniature: images with a loud background, with and without its loss."""
    resolution = train.DEMO["resolution"]
    data = tmp_path / "data"
    data.mkdir()
    stripes = np.zeros((resolution, resolution, 3), np.uint8)
    stripes[:, ::2] = GREEN
    for number in range(4):
        image = Image.fromarray(stripes)
        side = resolution // 2
        image.paste(picture(number, (side, side)), (side // 2, side // 2))
        image.save(data / f"{number}.png")
        mask = Image.new("L", image.size)
        mask.paste(255, (side // 2, side // 2, side // 2 * 3, side // 2 * 3))
        mask.save(data / f"{number}.mask.png")
    prepare(data, tmp_path / "out", resolution=resolution, duplicate_bits=0, duplicate_colour=0)
    rows = read_dataset(tmp_path / "out", resolution)
    assert len(rows) == 4
    folder = ROOT / train.DEMO["base_model"]
    accelerator = Accelerator(cpu=True)
    latents = setup.image_latents(folder, rows, torch.float32, accelerator)
    masks = latent_masks(rows, latents, 0.0)
    config = train.CONFIG | train.DEMO | dict(rank=8, alpha=8)
    (input_ids, no_text), scheduler = (setup.caption_tokens(folder, rows, []), setup.noise_scheduler(folder))

    def outside_loss(unet, texts):
        """Of the background alone, of every image at fixed noise."""
        total = 0.0
        for index in range(4):
            noise = torch.randn(latents.shape(index), generator=torch.Generator().manual_seed(index))
            indices = torch.tensor([index])
            with torch.no_grad():
                total += diffusion_loss(
                    unet,
                    scheduler,
                    latents[index][0][None],
                    noise[None],
                    torch.tensor([600]),
                    texts(indices),
                    1 - masks[index][None],
                ).item()
        return total

    gained = {}
    for weight, used in ((0.0, masks), (1.0, None)):
        unet, texts, _, trained, _ = setup.adapted_models(
            folder, input_ids, no_text, None, config, torch.float32, accelerator.device, lambda line: None
        )
        micro = MicroStep(unet, scheduler, latents, texts, trained, None, 4, 1, accelerator.device, used)
        samples = Samples(np.arange(4), 1, latents.shape, scheduler.config.num_train_timesteps, 4, 1, 0)
        micro.prepare(samples.micro_batch(0))
        optimizer = torch.optim.Adam([part.flat for part in trained.values()], lr=1e-3)
        before = outside_loss(unet, texts)
        for step in range(25):
            micro.fill(*samples.micro_batch(step))
            micro.run()
            optimizer.step()
            micro.begin_sum()
        for part in trained.values():
            part.refresh()
        gained[weight] = before - outside_loss(unet, texts)
    assert gained[1.0] > 0
    assert gained[0.0] < 0.7 * gained[1.0], gained


def test_masks_change_nothing_at_weight_one(tiny_model, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        picture(number, (64, 64)).save(data / f"{number}.png")
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, 0, 32, 64))
        mask.save(data / f"{number}.mask.png")
    prepare(data, tmp_path / "out")
    found = {}
    for weight in (1.0, 0.3):
        for masked in (True, False):
            if not masked:
                if weight != 1.0:
                    continue
                for path in (tmp_path / "out" / "images").glob("*.mask.png"):
                    path.rename(tmp_path / path.name)
            target = tmp_path / f"{weight}{masked}"
            config = TINY_RUN | dict(base_model=tiny_model, data_dir=tmp_path / "out", max_steps=3)
            succeeded(call("train.py", *options(**config, output_dir=target, mask_weight=weight)))
            (folder,) = target.iterdir()
            found[weight, masked] = load_file(folder / "pytorch_lora_weights.safetensors")
            for path in tmp_path.glob("*.mask.png"):
                path.rename(tmp_path / "out" / "images" / path.name)
    whole = found[1.0, True]
    assert all(torch.equal(whole[key], found[1.0, False][key]) for key in whole)
    assert any(not torch.equal(whole[key], found[0.3, True][key]) for key in whole)
