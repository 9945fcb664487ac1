"""DINOv2 as the encoder of similarities, on a small model of the real class with random weights."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import COSINE, assert_one_line, call, options, picture
from transformers import AutoImageProcessor, AutoModel, BitImageProcessor, Dinov2Config, Dinov2Model

import inference
from lib.dataset import KEPT
from lib.errors import UserError
from lib.evaluation.metrics import clip_scores, dinov2, scores


@pytest.fixture(scope="module")
def tiny_dinov2(tmp_path_factory):
    """A DINOv2 folder with random weights, whose processor resizes and crops as that of facebook/dinov2-base does."""
    folder = tmp_path_factory.mktemp("tiny") / "dinov2"
    torch.manual_seed(2)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    size, crop = dict(shortest_edge=32), dict(height=28, width=28)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    BitImageProcessor(size=size, crop_size=crop, image_mean=mean, image_std=std).save_pretrained(folder)
    return folder


def test_embeddings_are_the_models_own_class_tokens(tiny_dinov2):
    """Images are processed as the model's own processor does it."""
    model, processor = AutoModel.from_pretrained(tiny_dinov2).eval(), AutoImageProcessor.from_pretrained(tiny_dinov2)
    images = [picture(seed, size) for seed, size in enumerate([(64, 64), (90, 90), (32, 32)])]
    with torch.no_grad():
        pixels = processor(images, return_tensors="pt").pixel_values
        tokens = model(pixel_values=pixels).last_hidden_state[:, 0]
    encoder = dinov2.load_dinov2(tiny_dinov2)
    embeddings = encoder.embed(images)
    assert (embeddings.shape, embeddings.dtype) == ((3, encoder.width), np.float32)
    expected = torch.nn.functional.normalize(tokens).numpy()
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=COSINE)
    np.testing.assert_allclose(encoder.embed(images[1:2])[0], embeddings[1], rtol=0, atol=COSINE)


def test_portraits_are_seen_whole(tiny_dinov2):
    """The processor's own centre crop would miss the head and the hem."""
    encoder = dinov2.load_dinov2(tiny_dinov2)
    whole = picture(1, (64, 128))
    without_hem = whole.copy()
    without_hem.paste((0, 0, 0), (0, 100, 64, 128))
    own = encoder.image_processor([whole, without_hem], return_tensors="pt").pixel_values
    assert torch.equal(own[0], own[1])
    one, other = encoder.embed([whole, without_hem])
    assert one @ other < 1 - 10 * COSINE


@pytest.fixture
def pair(tmp_path, tiny_clip, tiny_dinov2, processed_data):
    """Options of an evaluation of two folders of images, with training images of its own."""
    count = 2 * len(inference.PUBLISHED)
    for kind, shift in (("base", 0), ("lora", 100)):
        (tmp_path / kind).mkdir()
        for number in range(count):
            picture(number + shift).save(tmp_path / kind / f"{number}.png")
    data = shutil.copytree(processed_data, tmp_path / "data", ignore=shutil.ignore_patterns(KEPT))
    return dict(
        score_dir=f"{tmp_path / 'base'},{tmp_path / 'lora'}",
        output_dir=tmp_path / "out",
        clip_model=tiny_clip,
        similarity_model=tiny_dinov2,
        data_dir=data,
        resolution=64,
    )


def evaluated(config, *more):
    done = call("inference.py", *more, *options(**config))
    assert done.returncode == 0, done.stderr
    return json.loads((config["output_dir"] / "metrics.json").read_text())


def test_without_the_default_model_clips_encoder_takes_its_place_with_a_warning(pair, tiny_clip, monkeypatch):
    assert inference.CONFIG["similarity_model"] == dinov2.DEFAULT
    asked = []

    def unavailable(name, revision=None):
        asked.append(name)
        raise UserError(f"model {name} is unavailable")

    monkeypatch.setattr(scores, "fetch_dinov2", unavailable)
    default = {key: value for key, value in pair.items() if key != "similarity_model"}
    done = call("inference.py", *options(**default))
    assert done.returncode == 0, done.stderr
    assert asked == [dinov2.DEFAULT]
    assert f"warning: model {dinov2.DEFAULT} is unavailable. Similarities are those of CLIP's" in done.stdout
    record = json.loads((pair["output_dir"] / "metrics.json").read_text())
    assert record["scorers"]["similarity"] == record["scorers"]["clip"]
    assert record["config"]["similarity_model"] == "clip"
    done = call(
        "inference.py", *options(**pair | dict(similarity_model="another/model", output_dir=pair["output_dir"] / "x"))
    )
    assert done.returncode == 1 and "another/model is unavailable" in done.stderr


def test_similarities_are_dinov2s_and_clips_stands_beside_them(pair, tiny_clip, tiny_dinov2):
    record = evaluated(pair)
    scorers = record["scorers"]
    encoder, clip = dinov2.load_dinov2(tiny_dinov2), clip_scores.load_clip(tiny_clip)
    assert scorers["similarity"] == dict(model="dinov2", sha256=encoder.digest)
    assert scorers["clip"] == dict(model="clip", sha256=clip.digest)
    rows = [row for row in csv.DictReader((pair["output_dir"] / "metrics.csv").open()) if row["model"] == "lora"]
    images = [picture(100 + number) for number in range(len(rows))]
    training = [picture(number) for number in range(1, 9)]
    for model, key in ((encoder, "concept_similarity"), (clip, "clip_image_similarity")):
        expected = (model.embed(images) @ model.embed(training).T).mean(axis=1)
        np.testing.assert_allclose([float(row[key]) for row in rows], expected, rtol=0, atol=COSINE)
    mirrored = encoder.embed([image.transpose(0) for image in training])
    both = np.maximum(encoder.embed(images) @ encoder.embed(training).T, encoder.embed(images) @ mirrored.T)
    nearest = [float(row["nearest_similarity"]) for row in rows]
    np.testing.assert_allclose(nearest, both.max(axis=1), rtol=0, atol=COSINE)
    assert "clip_image_similarity" in record["summary"]["categories"]["success"]
    assert "clip_image_similarity" not in record["summary"]["margins"]
    page = (pair["output_dir"] / "report.html").read_text()
    assert "CLIP image difference" in page
    assert scorers["similarity"]["sha256"] in page

    names = sorted(path.name for path in (pair["data_dir"] / KEPT).glob("embeddings_*.npz"))
    assert names == sorted(f"embeddings_{model.digest[:16]}.npz" for model in (encoder, clip))

    # Measured again by CLIP's own encoder, which then needs no metric of its own.
    again = evaluated({k: v for k, v in pair.items() if k != "score_dir"} | dict(similarity_model="clip"), "--rescore")
    assert again["scorers"]["similarity"] == again["scorers"]["clip"] == scorers["clip"]
    rows = [
        dict(zip(("old", "new"), both, strict=True)) for both in zip(record["pictures"], again["pictures"], strict=True)
    ]
    for row in rows:
        assert row["new"]["clip_image_similarity"] is None
        assert row["new"]["concept_similarity"] == pytest.approx(row["old"]["clip_image_similarity"], abs=COSINE)
    assert "clip_image_similarity" not in again["summary"]["categories"]["success"]


@pytest.mark.parametrize("without", ["clip_model", "similarity_model"])
def test_either_model_can_be_left_out(pair, without):
    record = evaluated(pair | {without: "none"})
    measured = {key for key, value in record["pictures"][1].items() if value is not None}
    with_dinov2 = {"concept_similarity", "nearest_similarity", "nearest_picture"}
    assert measured >= (with_dinov2 if without == "clip_model" else {"clip"})
    assert not measured & ({"clip", "clip_image_similarity"} if without == "clip_model" else with_dinov2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "lacks model.safetensors"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "lacks preprocessor_config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "clip"}'), "its model_type is clip"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "cannot be loaded"),
    ],
)
def test_other_models_are_refused_in_one_line(pair, tiny_dinov2, tmp_path, change, words):
    folder = shutil.copytree(tiny_dinov2, tmp_path / "changed")
    change(folder)
    assert_one_line(call("inference.py", *options(**pair | dict(similarity_model=folder))), words, folder)
    assert not pair["output_dir"].exists()
    done = call("inference.py", *options(**pair | dict(similarity_model="owner/none")))
    assert_one_line(done, "owner/none is unavailable")
