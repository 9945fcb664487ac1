"""Masks beside images and in their transparency: prepared, read and trained on."""

import json
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import COSINE, ROOT, TINY_RUN, assert_one_line, call, options, picture
from PIL import Image
from safetensors.torch import load_file
from test_preprocess import GREEN, prepare
from training_runs import succeeded

import train
from lib.dataset import read_dataset
from lib.errors import UserError
from lib.evaluation.metrics import scores
from lib.evaluation.metrics.concept_scale import concept_scale, subject_level
from lib.evaluation.metrics.scores import ImageSet
from lib.evaluation.metrics.similarity import Subjects
from lib.evaluation.metrics.table import METRICS
from lib.evaluation.report.words import scale_text
from lib.training import setup
from lib.training.latents import latent_masks
from lib.training.micro_step import MicroStep, diffusion_loss
from lib.training.samples import Samples


def test_masks_beside_images_and_in_them(tmp_path):
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
    """A mask painted in RGB: the left half `white`, the right one `black`, transparent in the box `outside`."""
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
def test_masks_in_the_formats_of_other_programs(tmp_path, kind):
    """They mark the same area prepared and as train.py reads them."""
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
def test_masks_are_recognised_by_their_usual_names(tmp_path, name, capsys):
    data = tmp_path / "data"
    data.mkdir()
    picture(1).save(data / "photo.JPG")
    picture(2).save(data / "other.jpg")
    subject().save(data / name)
    manifest = prepare(data, tmp_path / "out")
    assert [row["source"] for row in manifest["pictures"]] == ["other.jpg", "photo.JPG"]
    assert f"masked by {name}" in manifest["pictures"][1]["done"]
    assert "masks      1 next to images, 0 of transparent" in capsys.readouterr().out
    listing = [dict(file_name=n, text="a coat") for n in ("other.jpg", "photo.JPG")]
    (data / "captions.jsonl").write_text("\n".join(map(json.dumps, listing)))
    rows = read_dataset(data, 64)
    assert [rows.has_mask(index) for index in (0, 1)] == [False, True]


def test_an_image_of_a_mask_is_an_image_and_two_masks_are_too_many(tmp_path):
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


def empty(kind):
    """(an image, its mask or None, why there is nothing to train on)"""
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
def test_images_without_content_are_named(tmp_path, kind):
    data = tmp_path / "data"
    data.mkdir()
    image, mask, words = empty(kind)
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


def test_an_opaque_alpha_channel_is_no_mask(tmp_path):
    for number, mode in enumerate(("RGB", "RGBA", "LA")):
        picture(number).convert(mode).save(tmp_path / f"{number}.png")
    rows = [json.dumps(dict(file_name=f"{n}.png", text="a coat")) for n in range(3)]
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    rows = read_dataset(tmp_path, 64)
    assert not any(map(rows.has_mask, range(3)))
    assert rows.mask(1, (8, 8)).min() == 255


def test_a_thin_subject_stays_marked(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    picture(1, (1024, 1024)).save(data / "a.png")
    mask = Image.new("L", (1024, 1024))
    mask.paste(255, (500, 0, 503, 1024))
    mask.save(data / "a.mask.png")
    prepare(data, tmp_path / "out")
    assert read_dataset(tmp_path / "out", 64).mask(0, (64, 64)).max() > 200


def test_the_number_of_masks_used_is_printed(tiny_model, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        picture(number).save(data / f"{number}.png")
    subject().save(data / "1.mask.png")
    prepare(data, tmp_path / "out")
    config = TINY_RUN | dict(base_model=tiny_model, data_dir=tmp_path / "out", max_steps=1, warmup_steps=0)
    for weight, words in ((1.0, "unused at mask_weight 1"), (0.25, "the loss counts 0.25")):
        done = call("train.py", *options(**config, output_dir=tmp_path / "x", mask_weight=weight))
        succeeded(done)
        assert "1 of 4 images have a mask" in done.stdout
        assert words in done.stdout


def test_a_mask_weight_without_masks_is_refused(tiny_model, processed_data, tmp_path):
    config = TINY_RUN | dict(base_model=tiny_model, data_dir=processed_data, output_dir=tmp_path)
    assert_one_line(call("train.py", *options(**config, mask_weight=0.5)), "no image", "has a mask")
    assert_one_line(call("train.py", *options(**config, mask_weight=2)), "mask_weight is 2")


def test_the_background_of_masked_images_is_learned_less(tmp_path):
    """On the miniature: images with a striped background, with and without its loss."""
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
    config = train.CONFIG | train.DEMO | dict(rank=8, alpha=8, batch_size=4, seed=1)
    tokens = setup.caption_tokens(folder, rows, [])

    def outside_loss(models):
        """The loss of the background of every image, at fixed noise."""
        total = 0.0
        for index in range(4):
            noise = torch.randn(latents.shape(index), generator=torch.Generator().manual_seed(index))
            indices = torch.tensor([index])
            with torch.no_grad():
                inputs = latents[index][0][None], noise[None], torch.tensor([600]), models.texts(indices)
                total += diffusion_loss(models.unet, models.scheduler, *inputs, 1 - masks[index][None]).item()
        return total

    gained = {}
    for weight, used in ((0.0, masks), (1.0, None)):
        models = setup.adapted_models(
            folder, tokens, None, config, torch.float32, accelerator.device, lambda line: None
        )
        trained = models.trained
        micro = MicroStep(models, latents, used, config, accelerator)
        samples = Samples(np.arange(4), config["seed"], latents.shape, 1000, config["batch_size"])
        micro.prepare(samples.micro_batch(0))
        optimizer = torch.optim.Adam([part.flat for part in trained.values()], lr=1e-3)
        before = outside_loss(models)
        for step in range(12):
            micro.fill(*samples.micro_batch(step))
            micro.run()
            optimizer.step()
            micro.begin_sum()
        for part in trained.values():
            part.refresh()
        gained[weight] = before - outside_loss(models)
    assert gained[1.0] > 0
    assert gained[0.0] < 0.7 * gained[1.0], gained


def test_masks_change_nothing_at_weight_one(tiny_model, tmp_path):
    data, prepared = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for number in range(4):
        picture(number, (64, 64)).save(data / f"{number}.png")
        subject().save(data / f"{number}.mask.png")
    prepare(data, prepared)
    weights = {}
    for name, mask_weight in (("masked", 0.3), ("weight one", 1.0), ("unmasked", 1.0)):
        if name == "unmasked":
            for path in (prepared / "images").glob("*.mask.png"):
                path.unlink()
        config = TINY_RUN | dict(base_model=tiny_model, data_dir=prepared, max_steps=2, output_dir=tmp_path / name)
        succeeded(call("train.py", *options(**config, mask_weight=mask_weight)))
        (folder,) = (tmp_path / name).iterdir()
        weights[name] = load_file(folder / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(weight, weights["unmasked"][key]) for key, weight in weights["weight one"].items())
    assert any(not torch.equal(weight, weights["masked"][key]) for key, weight in weights["weight one"].items())


# ---- the subject alone, in an evaluation ---------------------------------------------------


@pytest.fixture
def masked_set(tmp_path):
    """Five images, of which the first four have a mask, the left half. The fourth is the first with another right half."""
    images = [picture(seed) for seed in (1, 2, 3, 1, 5)]
    images[3].paste((200, 30, 90), (32, 0, 64, 64))
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
        if number < 4:
            subject().save(tmp_path / f"{number}.mask.png")
    rows = [dict(file_name=f"{number}.png", text="a coat") for number in range(5)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def scorers_of(folder, clip):
    config = dict(
        clip_model=str(clip), clip_revision=None, similarity_model="clip", data_dir=str(folder), resolution=64
    )
    return scores.load_scorers(config, [], [], "cpu")


def test_what_lies_outside_the_masks_does_not_change_the_subject_similarity(masked_set, tiny_clip):
    scorers = scorers_of(masked_set, tiny_clip)
    training = scorers.training
    assert training.masked == [0, 1, 2, 3]
    np.testing.assert_allclose(training.subjects[0], training.subjects[3], atol=COSINE)
    assert np.abs(training.embeddings[0] - training.embeddings[3]).max() > 100 * COSINE
    grey = np.array(Subjects(read_dataset(masked_set, 64), [0], scorers.encoder)[0])[:, 32:]
    assert (grey == [round(255 * level) for level in scorers.encoder.image_processor.image_mean]).all()

    images = ImageSet([picture(7)], ["a coat"], **vars(scorers))
    expected = (scorers.encoder.embed([picture(7)]) @ training.subjects.T).mean()
    assert METRICS["subject_similarity"].scorer(images, {}) == pytest.approx([expected], abs=COSINE)
    # The cache follows the masks, which are files of their own.
    subject().transpose(Image.Transpose.ROTATE_180).save(masked_set / "0.mask.png")
    assert np.abs(scorers_of(masked_set, tiny_clip).training.subjects[0] - training.subjects[0]).max() > 100 * COSINE


def test_training_images_have_a_subject_similarity_to_the_others(masked_set, tiny_clip):
    training = scorers_of(masked_set, tiny_clip).training
    adapter = dict(metadata=dict(data_sha256=training.hashes[0]), held_out=["1.png"])
    pairs = [(i, j) for i in (0, 2, 3, 4) for j in (0, 2, 3) if i != j]  # 1 is held out, 4 has no mask
    cosines = training.embeddings @ training.subjects.T
    found = subject_level(training, adapter)
    assert found == dict(level=pytest.approx(np.mean([cosines[i, j] for i, j in pairs])), images=3, held_out=ANY)
    assert found["held_out"] == pytest.approx(cosines[1, [0, 2, 3]].mean())
    run = scores.Run("one", None, adapter, [], [])
    run.rows = [dict(model="base", category="success", prompt="a coat", concept_similarity=-1.0)]
    scale = concept_scale([run], [("success", "a coat")], training, 0.1)
    assert f"Training images have a subject similarity of {found['level']:.3f} to one another" in scale_text(scale)
    assert subject_level(training, adapter | dict(held_out=["0.png", "1.png", "2.png"])) is None


def test_without_masks_there_is_no_subject_similarity(processed_data, tiny_clip):
    scorers = scorers_of(processed_data, tiny_clip)
    assert scorers.training.subjects is None
    assert METRICS["subject_similarity"].scorer(ImageSet([picture(1)], ["a coat"], **vars(scorers)), {}) is None
    assert not list(processed_data.rglob("subjects_*"))
