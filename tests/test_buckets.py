"""Buckets: images that keep their shape, prepared and trained on; crops of those that do not."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_RUN, assert_one_line, call, options, picture
from PIL import Image, ImageDraw
from test_preprocess import RED, WHITE, close, prepare
from training_runs import assert_equal_runs, kill, succeeded, training

from lib.preparation.framing import bucket_sizes, choose_sizes, framed, kept_share, nearest_size, subject_box, view
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
    # Images from cameras and phones lose a thin margin at most.
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


def test_images_keep_their_shape_and_are_never_squashed(buckets, capsys):
    manifest = json.loads((buckets / "manifest.json").read_text())
    assert {tuple(row["size"]) for row in manifest["pictures"]} == {(56, 72), (72, 56), (64, 64)}
    for row in manifest["pictures"]:
        with Image.open(buckets / row["file_name"]) as image:
            assert list(image.size) == row["size"]
            white = np.asarray(image)[:, :, 1] > 190
        spread = [np.ptp(np.nonzero(white)[axis]) for axis in (0, 1)]
        assert abs(spread[0] - spread[1]) <= 1, row


# ---- crops ----------------------------------------------------------------------------------------


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
    # The crop of a subject taller than the square starts a little above it.
    tall = thing_on_backdrop((100, 120, 200, 560))
    assert framed(tall, (96, 96), "subject")[2]["box"][1] == pytest.approx(102, abs=8)
    left = thing_on_backdrop((20, 20, 90, 280), (600, 300))
    assert framed(left, (96, 96), "subject")[2]["box"][0] == 0


def test_without_a_plain_backdrop_the_crop_is_central_with_a_note():
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


def test_the_sheet_shows_crops_and_masks():
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


def test_images_that_lose_more_than_a_quarter_are_counted(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for number, size in enumerate([(300, 700), (300, 390), (500, 300), (300, 300)]):
        picture(number, size).save(data / f"{number}.png")
    prepare(data, tmp_path / "out")
    assert "2 images lose more than a quarter" in capsys.readouterr().out
    done = call("preprocess.py", "--data-dir", data, "--output-dir", tmp_path / "x", "--crop", "left")
    assert_one_line(done, "crop is left", "centre, top, subject")


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
    # In batches of one: each image once an epoch, as without shapes.
    plain = Samples(pictures, 7, lambda i: (4, 8, 8), 1000, 1)
    one = samples(1)
    assert [one.micro_batch(n)[0] for n in range(40)] == [plain.micro_batch(n)[0] for n in range(40)]


@pytest.mark.parametrize("counts", [(15, 1), (16,), (7, 5, 3), (1, 1, 1, 30), (2, 40)])
@pytest.mark.parametrize(("batch", "processes"), [(1, 1), (3, 1), (8, 1), (8, 4)])
def test_every_image_is_seen_equally_often(counts, batch, processes):
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
        # A shape is never more than a batch away from its share.
        for kind, count in enumerate(counts):
            due = (number + 1) * size * count / len(pictures)
            assert abs(by_shape[4, 8, 8 + kind] - due) <= size + count
    assert seen == dict.fromkeys(map(int, pictures), 3 * size)
    small = sum(count for count in counts if count < size) if len(counts) > 1 else 0
    assert [f"{small} of {len(pictures)} images" in note for note in everyone[0].notes()] == ([True] if small else [])


def test_images_of_one_shape_follow_the_order_of_the_epochs():
    found = Samples(np.arange(7), 5, lambda i: (4, 8, 8), 1000, 3, 2)
    orders = [epoch_order(5, epoch, 7) for epoch in range(20)]
    assert [found.image(sample) for sample in range(140)] == list(np.concatenate(orders))


BUCKETED = TINY_RUN | dict(resolution=64, max_steps=6, checkpoint_every=3, validation_count=3)
ONE_STEP = dict(max_steps=1, warmup_steps=0)


@pytest.mark.parametrize("kind", ["plain", "protected"])
def test_training_on_buckets_resumes_bit_for_bit(tiny_model, buckets, tmp_path, protected, kind):
    """For a protected adapter the pass of each shape also predicts with the base model and no text."""
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
    assert f"| sizes, precision | {', '.join(record['data']['size_counts'])}; fp32 |" in card


def test_the_held_out_loss_of_buckets_does_not_depend_on_the_batch(tiny_model, buckets, tmp_path):
    losses = []
    for size in (1, 3):
        config = BUCKETED | ONE_STEP | dict(base_model=tiny_model, data_dir=buckets, batch_size=size)
        succeeded(training(tmp_path, config | dict(output_dir=tmp_path / str(size))))
        log = (tmp_path / str(size) / "lora_weights_rank_32" / "log.jsonl").read_text().splitlines()
        losses.append(next(r["validation_loss"] for r in map(json.loads, log) if r["step"] == 0))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_another_resolution_than_the_buckets_is_refused(tiny_model, buckets, tmp_path):
    config = BUCKETED | dict(base_model=tiny_model, data_dir=buckets, output_dir=tmp_path)
    done = call("train.py", *options(**config | dict(resolution=128)))
    assert_one_line(done, "--buckets", "resolution of 64, not 128")


def test_squares_are_not_enlarged_silently(tiny_model, tmp_path):
    """They may be made smaller."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        picture(number, (400, 300)).save(data / f"{number}.png")
    prepare(data, tmp_path / "out")
    config = TINY_RUN | ONE_STEP | dict(base_model=tiny_model, data_dir=tmp_path / "out")
    done = call("train.py", *options(**config | dict(output_dir=tmp_path / "a", resolution=128)))
    assert_one_line(done, "resolution of 64 and would be enlarged to 128", "--resolution 128")
    done = call("train.py", *options(**config | dict(output_dir=tmp_path / "a", resolution=32)))
    succeeded(done)
    assert "note: not" in done.stdout
    assert "are enlarged" not in done.stdout


def test_enlarged_and_cropped_images_of_ones_own_are_counted(tiny_model, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    sizes = [(64, 64), (48, 64), (90, 60), (64, 64)]
    for number, size in enumerate(sizes):
        picture(number, size).save(data / f"{number}.png")
    rows = [json.dumps(dict(file_name=f"{n}.png", text="a coat")) for n in range(4)]
    (data / "captions.jsonl").write_text("\n".join(rows))
    config = TINY_RUN | ONE_STEP | dict(base_model=tiny_model, data_dir=data, output_dir=tmp_path)
    done = call("train.py", *options(**config))
    succeeded(done)
    assert "of 4 images 2 are smaller and are enlarged (64x64 are trained on)" in done.stdout
    assert "of 4 images 2 are of another shape and are cropped" in done.stdout
