"""inference.py, run as a user runs it."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import COSINE, ROOT, assert_close, assert_one_line, call, options, picture, run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib import adapter_files, adapters
from lib.adapter_files import WEIGHTS
from lib.errors import UserError
from lib.evaluation import generation
from lib.evaluation.metrics import clip_scores, lpips_distances


def tiny(model, clip, data):
    return dict(
        base_model=model, clip_model=clip, similarity_model="clip", data_dir=data, resolution=64, steps=2, seeds=2
    )


@pytest.fixture(scope="module")
def evaluated(tiny_model, tiny_clip, processed_data, trained, tmp_path_factory):
    """All three tiny runs, evaluated in one go."""
    folder = tmp_path_factory.mktemp("results")
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a holographic raincoat\nnear: a yellow raincoat\nunrelated: a cat sitting on a couch\n")
    config = tiny(tiny_model, tiny_clip, processed_data) | dict(lora_dir=trained, output_dir=folder, prompts=prompts)
    return folder, run("inference.py", *options(**config))


def test_what_an_evaluation_leaves(evaluated):
    folder, done = evaluated
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["comparison", "lora_weights_rank8", "lora_weights_rank_32", "lora_weights_unet_only"]
    one = folder / "lora_weights_rank8"
    assert sorted(p.name for p in one.iterdir()) == [
        "images",
        "metrics.csv",
        "metrics.json",
        "overview.webp",
        "report.html",
        "summary.md",
    ]
    pictures = sorted(p.name for p in (one / "images" / "a-cat-sitting-on-a-couch").iterdir())
    assert pictures == ["base_42.png", "base_43.png", "lora_42.png", "lora_43.png"]
    rows = list(csv.DictReader((one / "metrics.csv").open()))
    assert len(rows) == 3 * 2 * 2
    summary = json.loads((one / "metrics.json").read_text())
    assert summary["config"]["steps"] == 2
    assert summary["adapter"]["rank"] == {"text_encoder": 2, "unet": 2}
    assert "a cat sitting on a couch" in (one / "summary.md").read_text()
    assert "on the CPU, in fp32" in done.stdout


def test_base_pictures_are_shared_and_lora_pictures_differ(evaluated):
    folder, _ = evaluated

    def pixels(run_name, kind):
        path = folder / run_name / "images" / "a-holographic-raincoat" / f"{kind}_42.png"
        return np.asarray(Image.open(path), np.int16)

    runs = [p.name for p in folder.iterdir() if p.name != "comparison"]
    for name in runs[1:]:
        np.testing.assert_array_equal(pixels(name, "base"), pixels(runs[0], "base"))
    assert not np.array_equal(pixels(runs[0], "lora"), pixels(runs[0], "base"))


def test_figures_are_those_of_the_saved_pictures(evaluated, tiny_clip):
    folder = evaluated[0] / "lora_weights_rank_32"
    rows = [
        r
        for r in json.loads((folder / "metrics.json").read_text())["pictures"]
        if r["model"] == "lora" and r["prompt"] == "a cat sitting on a couch"
    ]
    place = folder / "images" / "a-cat-sitting-on-a-couch"
    lora, base = ([Image.open(place / f"{kind}_{row['seed']}.png") for row in rows] for kind in ("lora", "base"))
    clip = clip_scores.load_clip(tiny_clip)
    assert_close(lpips_distances.lpips_distances(base, lora), [row["lpips"] for row in rows], 1e-3)
    scores = clip_scores.clip_scores(lora, [row["prompt"] for row in rows], clip)
    np.testing.assert_allclose(scores, [row["clip"] for row in rows], rtol=0, atol=COSINE)


def test_another_evaluation_is_kept_before_any_model_is_loaded(evaluated, trained):
    place = evaluated[0] / "lora_weights_rank_32"
    before = (place / "metrics.json").read_bytes()
    config = dict(base_model="nowhere", output_dir=place)
    done = call("inference.py", *options(**config, lora_dir=trained / "lora_weights_rank8"))
    assert_one_line(done, place, "another adapter, “lora_weights_rank_32”", "--overwrite")
    done = call("inference.py", *options(**config, lora_dir=trained / "lora_weights_rank_32"))
    assert_one_line(done, place, "steps 2 -> 28", "other prompts", "--overwrite")
    assert_one_line(
        call("inference.py", *options(**config, lora_dir=trained / "lora_weights_rank8"), "--overwrite"), "nowhere"
    )
    assert (place / "metrics.json").read_bytes() == before


def test_a_picture_does_not_depend_on_its_batch(tiny_model):
    pipeline = generation.load_pipeline(tiny_model, torch.float32, "cpu")
    jobs = [(prompt, seed) for prompt in ("a raincoat", "a cat") for seed in (1, 2, 3)]
    how = dict(steps=2, guidance_scale=6.0, resolution=64, title="")
    together = generation.generate(pipeline, jobs, batch_size=6, **how)
    alone = generation.generate(pipeline, jobs, batch_size=1, **how)
    for a, b in zip(together, alone, strict=True):
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 1
    assert not np.array_equal(np.asarray(together[0]), np.asarray(together[1]))


def test_prompts_file(tmp_path, tiny_model, tiny_clip, processed_data, trained):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# mine\n../../a <b>raincoat</b>\n\nunrelated: a cat\nsuccess: A cat!\n")
    config = tiny(tiny_model, tiny_clip, processed_data) | dict(
        lora_dir=trained / "lora_weights_rank8", output_dir=tmp_path / "out", prompts=prompts, seeds=1
    )
    run("inference.py", *options(**config))
    places = sorted(p.name for p in (tmp_path / "out" / "images").iterdir())
    assert places == ["a-b-raincoat-b", "a-cat", "a-cat-3"]


def test_an_adapter_that_does_nothing_is_refused(tmp_path, tiny_model, tiny_clip, processed_data, trained):
    folder = tmp_path / "zero"
    shutil.copytree(trained / "lora_weights_rank8", folder)
    with safe_open(folder / WEIGHTS, "pt") as file:
        header = file.metadata()
    # Not zero, but so small that adding it changes no float: only the forward pass can tell.
    tensors = {k: v * 1e-30 if "lora_B" in k else v for k, v in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata=header)
    config = tiny(tiny_model, tiny_clip, processed_data) | dict(lora_dir=folder, output_dir=tmp_path / "o")
    assert_one_line(call("inference.py", *options(**config)), folder, "does nothing")
    assert not (tmp_path / "o").exists()


def test_an_adapter_that_cannot_be_switched_off_is_refused(tiny_model, trained, monkeypatch):
    """At scale 0 the base model must come back, or the comparison is with something else."""
    pipeline = generation.load_pipeline(tiny_model, torch.float32, "cpu")
    models = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    adapter = adapter_files.read_adapter(trained / "lora_weights_rank_32")
    for component, rows in adapter.factors.items():  # a few steps move too little to be sure
        adapter.factors[component] = {name: (a, b * 1000) for name, (a, b) in rows.items()}
    base = generation.probe(pipeline)
    applied = adapters.Applied(adapter, models)
    generation.check_switch(pipeline, applied, adapter, base)
    monkeypatch.setattr(applied, "set_scale", lambda scale: None)
    with pytest.raises(UserError, match="at scale 0"):
        generation.check_switch(pipeline, applied, adapter, base)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(lora_dir="nowhere"), "no such folder"),
        (dict(base_model="owner/none"), "owner/none is unavailable"),
        (dict(clip_model="owner/no-clip"), "owner/no-clip is unavailable"),
        (dict(steps=0), "steps is 0"),
        (dict(resolution=20), "multiple of 8"),
        (dict(prompts="no-such-file.txt"), "no-such-file.txt"),
        (dict(seeds="x"), "--seeds"),
    ],
)
def test_mistakes_get_one_line(tmp_path, tiny_model, tiny_clip, processed_data, trained, change, words):
    config = tiny(tiny_model, tiny_clip, processed_data) | dict(
        lora_dir=trained / "lora_weights_rank8", output_dir=tmp_path / "out"
    )
    assert_one_line(call("inference.py", *options(**config | change)), words)
    assert not (tmp_path / "out").exists()


def test_a_long_prompt_is_refused(tmp_path, tiny_model, tiny_clip, processed_data, trained):
    (tmp_path / "prompts.txt").write_text("word " * 60)
    config = tiny(tiny_model, tiny_clip, processed_data) | dict(
        lora_dir=trained / "lora_weights_rank8", output_dir=tmp_path / "out", prompts=tmp_path / "prompts.txt"
    )
    assert_one_line(call("inference.py", *options(**config)), "tokens")


def test_missing_training_images_are_reported_before_generation(tmp_path, tiny_model, tiny_clip, trained, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a coat")
    config = tiny(tiny_model, tiny_clip, tmp_path / "none") | dict(
        lora_dir=trained / "lora_weights_rank8", output_dir=tmp_path / "out", seeds=1, prompts=tmp_path / "prompts.txt"
    )
    generate_runs = generation.generate_runs
    monkeypatch.setattr(generation, "generate_runs", lambda *rest: print("generating") or generate_runs(*rest))
    done = call("inference.py", *options(**config))
    assert "concept similarity is not measured" in done.stdout.partition("\ngenerating\n")[0]
    row = json.loads((tmp_path / "out" / "metrics.json").read_text())["pictures"][0]
    assert row["concept_similarity"] is None
    assert row["clip"] is not None


def test_help_lists_every_key():
    for script in ("preprocess.py", "train.py", "inference.py", "train_experiment_rank8.py"):
        module = __import__(script[:-3])
        done = call(script, "--help")
        for key in module.CONFIG:
            assert f"--{key.replace('_', '-')}" in done.stdout, (script, key)


PUBLISHED = os.environ.get("PUBLISHED_STUDY", "")


@pytest.mark.skipif(not PUBLISHED, reason="set PUBLISHED_STUDY to the folder of the study's images")
def test_published_lpips():
    folder = ROOT / PUBLISHED
    stored = json.loads((folder / "lpips.json").read_text())["lpips_alex"]
    base = [Image.open(folder / "base" / f"base_{n}.png") for n in range(1, 6)]
    for experiment, expected in stored.items():
        lora = [Image.open(folder / experiment / f"lora_{n}.png") for n in range(1, 6)]
        np.testing.assert_allclose(lpips_distances.lpips_distances(base, lora), expected, atol=1e-3)


def test_black_pictures_do_not_stop_the_scores(tiny_clip):
    clip = clip_scores.load_clip(tiny_clip)
    black = Image.new("RGB", (64, 64))
    assert np.isfinite(clip_scores.clip_scores([black], ["x"], clip)).all()
    assert np.isfinite(lpips_distances.lpips_distances([black], [picture(1)])).all()
