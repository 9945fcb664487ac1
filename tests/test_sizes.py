"""Images that are not square: drawn, scored, shown and measured again; squares as before."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, assert_one_line, call, options, picture, run
from PIL import Image
from test_buckets import mixed
from test_preprocess import prepare

from lib.config import check_resolution, half_resolution, image_size
from lib.errors import UserError
from lib.evaluation import generation
from lib.evaluation.metrics import clip_scores, similarity
from lib.evaluation.report import charts
from lib.images import shown, strip
from lib.training.monitor import LARGEST_SIDE

NAME = "lora_weights_rank_32"

# ---- what a resolution is ------------------------------------------------------------------------


def test_a_resolution_is_a_number_or_two():
    assert image_size(512) == image_size("512") == (512, 512)
    assert image_size("512x768") == (512, 768)
    assert [half_resolution(size) for size in (512, 520, "512x768", 16)] == ["256", "256", "256x384", "16"]
    check_resolution(dict(resolution=512))
    check_resolution(dict(resolution="512x768"), square=False)
    for wrong in ("512", "512x512"):  # in CONFIG a square is a number
        with pytest.raises(UserError, match="one number"):
            check_resolution(dict(resolution=wrong))


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("64x", "WIDTHxHEIGHT"),
        ("x64", "WIDTHxHEIGHT"),
        ("64x96x3", "WIDTHxHEIGHT"),
        ("-64x96", "WIDTHxHEIGHT"),
        ("64.0", "WIDTHxHEIGHT"),
        ("64x100", "64x100, but must be a multiple of 8"),
        ("24x64", "from 32 to 4096"),
        ("64x8192", "from 32 to 4096"),
    ],
)
def test_bad_sizes_get_one_line(typed, words):
    assert_one_line(call("inference.py", f"--resolution={typed}"), "resolution is", words)


def test_training_takes_one_number():
    for script in ("train.py", "train_experiment_rank8.py", "preprocess.py"):
        assert_one_line(call(script, "--resolution", "64x96"), "resolution is 64x96", "--buckets")


# ---- drawing -------------------------------------------------------------------------------------

JOBS = [("a raincoat", 1), ("a cat", 2)]
HOW = dict(steps=2, guidance_scale=6.0, batch_size=2, title="")


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return generation.load_pipeline(tiny_model, torch.float32, "cpu")


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (72, 40)])
def test_pictures_are_those_of_the_pipeline_at_that_size(pipeline, size):
    """Whose sides are neither swapped nor cut, and whose noise comes from each image's seed."""
    width, height = size
    found = generation.generate(pipeline, JOBS, resolution=f"{width}x{height}", **HOW)
    noise = [
        torch.randn((4, height // 8, width // 8), generator=torch.Generator().manual_seed(seed)) for _, seed in JOBS
    ]
    expected = pipeline(
        [prompt for prompt, _ in JOBS],
        latents=torch.stack(noise),
        width=width,
        height=height,
        num_inference_steps=2,
        guidance_scale=6.0,
    ).images
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.size == size
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    if width == height:  # as by the number
        again = generation.generate(pipeline, JOBS, resolution=width, **HOW)
        assert [image.tobytes() for image in again] == [image.tobytes() for image in found]


def test_a_recorded_unet_knows_its_shape(tiny_model, monkeypatch):
    pipeline = generation.load_pipeline(tiny_model, torch.float32, "cpu")
    expected = generation.generate(pipeline, JOBS, resolution="64x96", **HOW)
    calls = []

    def counted(functions, device):
        return [functions[0], lambda: calls.append(1) or functions[1]()]

    monkeypatch.setattr(generation, "captured", counted)
    generation.capture_unet(pipeline, 2, generation.latent_size(pipeline, "64x96"), True)
    found = generation.generate(pipeline, JOBS, resolution="64x96", **HOW)
    assert len(calls) == 3  # a call more than steps
    for a, b in zip(expected, found, strict=True):
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 1
    generation.generate(pipeline, JOBS, resolution="96x64", **HOW)
    assert len(calls) == 3


def test_how_many_at_once_goes_by_the_area(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3.2 * 2**30, 80 * 2**30))
    at_once = [generation.choose_batch_size(840, 0, size, gpu) for size in ("256x1024", 512, "512x768")]
    assert at_once == [8, 8, 5]


# ---- seen by CLIP --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tiny_clip):
    return clip_scores.load_clip(tiny_clip)


def test_clip_sees_squares_as_its_processor_does(clip):
    images = [picture(number, (side, side)) for number, side in enumerate((32, 64, 96, 50))]
    processed = clip.processor.image_processor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = clip.model.get_image_features(pixel_values=processed).pooler_output
    found = clip_scores.image_embeddings(images, clip)
    np.testing.assert_array_equal(found, similarity.unit_length(expected))


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_clip_sees_all_of_a_picture(clip, size):
    """The processor's centre crop passes over the outer sixths."""
    whole, changed = picture(1, size), picture(1, size)
    changed.paste((255, 0, 0), (0, 0, *((64, 12) if size == (64, 96) else (12, 64))))
    cropped = clip.processor.image_processor([whole, changed], return_tensors="pt").pixel_values
    assert torch.equal(*cropped)
    one, other = clip_scores.image_embeddings([whole, changed], clip)
    assert one @ other < 0.999
    # Of images of several shapes each is seen as if it were alone.
    several = [picture(2, (64, 64)), whole, picture(3, (80, 64))]
    together = clip_scores.image_embeddings(several, clip)
    alone = [clip_scores.image_embeddings([image], clip)[0] for image in several]
    np.testing.assert_allclose(together, alone, atol=1e-5)


# ---- on sheets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64)])
def test_sheets_show_pictures_in_their_shape(size):
    plain = Image.new("RGB", size, (0, 0, 0))
    marked = plain.copy()
    side = size[0] // 2
    top = (size[1] - side) // 2
    marked.paste((255, 0, 0), (side // 2, top, side // 2 + side, top + side))
    # The marked image's row is the first, so that one of the next would lie over what is too tall.
    prompts = [("success", "a coat")] * 2
    sheets = [
        charts.overview_figure([("base", [marked, plain]), ("lora", [plain, plain])], prompts, side=128),
        strip({"base": [marked, plain], "lora": [plain, plain]}, ["a coat"] * 2, side=128),
    ]
    for sheet in sheets:
        pixels = np.asarray(sheet).astype(int)
        red = (pixels[:, :, 0] > 127) & (pixels[:, :, 1:].max(axis=2) < 64)
        spread = [np.ptp(np.nonzero(red)[axis]) + 1 for axis in (0, 1)]
        assert np.abs(np.subtract(spread, 64)).max() <= 1
        black = pixels.max(axis=2) < 32
        assert black.sum() >= 3.5 * 128 * 128 * size[1] / size[0]  # all of each is there


# ---- the whole way -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def common(tiny_model, tiny_clip, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a holographic raincoat\nnear: a raincoat\nunrelated: a cat\n")
    return dict(base_model=tiny_model, clip_model=tiny_clip, similarity_model="clip", steps=1, seeds=2, prompts=prompts)


@pytest.fixture(scope="module")
def portrait(common, processed_data, trained, tmp_path_factory):
    """A run on squares, drawn at 64x96 with two scales."""
    folder = tmp_path_factory.mktemp("portrait") / "out"
    config = common | dict(
        data_dir=processed_data, lora_dir=trained / NAME, output_dir=folder, resolution="64X96", lora_scales="0.5,1"
    )
    return config, folder, run("inference.py", *options(**config))


def test_what_an_evaluation_of_portraits_leaves(portrait):
    _, folder, done = portrait
    files = list((folder / "images").rglob("*.png"))
    assert len(files) == 3 * 2 * 3
    assert {Image.open(path).size for path in files} == {(64, 96)}
    record = json.loads((folder / "metrics.json").read_text())
    assert record["config"]["resolution"] == "64x96"
    # The training images are read as they were trained on, whatever is drawn.
    assert "was trained on other images" not in done.stdout
    lora = [row for row in record["pictures"] if row["model"] == "lora"]
    assert {row["nearest_picture"] for row in lora}.isdisjoint(record["adapter"]["held_out"])
    (warning,) = [text for text in record["warnings"] if "no training image has" in text]
    assert f"warning: {warning}" in done.stdout
    assert warning in (folder / "report.html").read_text()
    with Image.open(folder / "overview.webp") as sheet:  # a row each of the three prompts, its line above it
        assert sheet.height == 256 // 6 * 2 + 3 * (256 // 4 + 256 * 96 // 64) + 256 // 6


def test_portraits_measured_again_are_the_same(portrait, tmp_path):
    config, folder, _ = portrait
    before = json.loads((folder / "metrics.json").read_text())
    succeeded = call("inference.py", *options(**config | dict(resolution=64)), "--rescore")
    assert succeeded.returncode == 0, succeeded.stderr
    after = json.loads((folder / "metrics.json").read_text())
    assert after["pictures"] == before["pictures"]
    assert after["config"]["resolution"] == "64x96"


def test_pictures_drawn_elsewhere(common, processed_data, tmp_path):
    for number, kind in enumerate(("base", "lora")):
        (tmp_path / kind).mkdir()
        for index in range(6):
            picture(10 * number + index, (48, 64)).save(tmp_path / kind / f"{index}.png")
    config = common | dict(
        data_dir=processed_data, output_dir=tmp_path / "out", score_dir=f"{tmp_path / 'base'},{tmp_path / 'lora'}"
    )
    done = call("inference.py", *options(**config))
    assert done.returncode == 0, done.stderr
    assert "The images are 48x64" in done.stdout
    for kind in ("base", "lora"):
        picture(5, (64, 48)).save(tmp_path / kind / "5.png")
    assert_one_line(call("inference.py", *options(**config)), "5.png", "4.png", "nothing is resized")
    for kind in ("base", "lora"):
        for index in (4, 5):
            picture(5, (64, 24)).save(tmp_path / kind / f"{index}.png")
    assert_one_line(call("inference.py", *options(**config)), "4.png", "32 pixels")


@pytest.fixture(scope="module")
def bucketed(tiny_model, tmp_path_factory):
    """(training set, run) of portraits, landscapes and squares, with previews."""
    folder = tmp_path_factory.mktemp("bucketed")
    prepare(mixed(folder / "data"), folder / "set", resolution=64, buckets=True, processes=1)
    config = TINY_RUN | dict(
        base_model=tiny_model, data_dir=folder / "set", output_dir=folder, max_steps=2, preview_every=2
    )
    run("train.py", *options(**config))
    return folder / "set", folder / NAME


def test_previews_have_the_commonest_size(bucketed):
    _, folder = bucketed
    for step in (0, 2):
        with Image.open(folder / "previews" / f"step_{step:06}.webp") as column:
            assert column.size == (56, 3 * 72)
    with Image.open(folder / "previews.webp") as sheet:
        assert sheet.height == 24 + 3 * (72 + 6 + 24)
    wide = shown(Image.new("RGB", (512, 768)), LARGEST_SIDE)
    assert wide.size == (256, 384)


def test_a_run_on_buckets_is_drawn_at_any_size(common, bucketed, tmp_path):
    data, folder = bucketed
    config = common | dict(data_dir=data, lora_dir=folder, seeds=1)
    for size, told in (("80x64", False), (128, False), ("96x32", True)):
        done = call("inference.py", *options(**config, resolution=size, output_dir=tmp_path / str(size)))
        assert done.returncode == 0, done.stderr
        assert "was trained on other images" not in done.stdout
        assert ("no training image has" in done.stdout) == told, size
