"""The embedded miniature: it loads and learns, its training data lacks the concept, and its page has its figures."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, options, run
from PIL import Image

import train
from demo import world
from demo.build import config as build_config
from demo.build import data, pages, unet
from demo.build.clip import alike
from lib.adapter_files import WEIGHTS
from lib.evaluation import generation
from lib.evaluation.metrics import clip_scores
from lib.files import sha256_file

MODEL, CLIP = ROOT / "demo" / "model", ROOT / "demo" / "clip"
SIDE = train.DEMO["resolution"]
TAUGHT, UNTAUGHT = "taught", "untaught"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, few_prompts):
    """(folder of the runs, {run: metrics.json}) of two adapters: one taught in a quarter of the steps at five times the
    learning rate, one at a learning rate of almost nothing. Evaluated together, so that the base images are generated once.
    """
    folder = tmp_path_factory.mktemp("demo")
    data, runs, results = (folder / name for name in ("processed_data", "runs", "results"))
    done = run("preprocess.py", "--output-dir", data)
    assert "32 images read, 0 skipped, 0 duplicates, 32 kept" in done.stdout
    before = model_hashes()
    for name, rate, steps in ((TAUGHT, 5e-4, 200), (UNTAUGHT, 1e-7, 10)):
        rates = dict(unet_learning_rate=rate, text_encoder_learning_rate=rate / 10)
        length = dict(max_steps=steps, warmup_steps=10 if steps > 10 else 1, validate_every=100)
        length |= dict(preview_every=0, snapshot_every=0, report_to="none")
        run("train.py", "--demo", *options(data_dir=data, output_dir=runs, run_name=name, **rates, **length))
    how = dict(prompts=few_prompts, seeds=4, steps=14)
    run("inference.py", "--demo", *options(data_dir=data, lora_dir=runs, output_dir=results, **how))
    assert model_hashes() == before
    return runs, {name: json.loads((results / name / "metrics.json").read_text()) for name in (TAUGHT, UNTAUGHT)}


def model_hashes():
    return {path: sha256_file(path) for path in sorted(MODEL.rglob("*.*"))}


def answers(record):
    return {v["question"]: v["answer"] for v in record["summary"]["verdicts"]}


def test_training_teaches_the_concept(evaluated):
    runs, records = evaluated
    record = records[TAUGHT]
    success = record["summary"]["categories"]["success"]
    # Beyond the variation between sampling seeds: the whole interval is above 0.
    assert success["concept_similarity"]["low"] > 0.05
    assert success["clip"]["low"] > 0.05
    assert answers(record)["learned"] == "yes"
    assert answers(record)["memorised"] != "yes"
    lines = [json.loads(line) for line in (runs / TAUGHT / "log.jsonl").read_text().splitlines()]
    held_out = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert held_out[-1] < 0.85 * held_out[0]
    assert (runs / TAUGHT / WEIGHTS).is_file()


def test_a_learning_rate_of_almost_nothing_teaches_nothing(evaluated):
    given = answers(evaluated[1][UNTAUGHT])
    assert {key: given[key] for key in ("learned", "near kept", "unrelated kept")} == {
        "learned": "no",
        "near kept": "yes",
        "unrelated kept": "yes",
    }


@pytest.fixture(scope="module")
def pipeline():
    return generation.load_pipeline(MODEL, torch.float32, "cpu")


@pytest.fixture(scope="module")
def clip():
    return clip_scores.load_clip(CLIP)


def test_the_same_seed_generates_the_same_image(pipeline):
    how = dict(steps=2, guidance_scale=3.0, resolution=SIDE, batch_size=2, title="")
    jobs = [("a red leather jacket", 7), ("a red leather jacket", 8)]
    first, again = (generation.generate(pipeline, jobs, **how) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert not np.array_equal(np.asarray(first[0]), np.asarray(first[1]))


def test_the_scorer_knows_holographic_from_matte(clip):
    rng = np.random.default_rng(5)
    kinds = {
        "holographic": [world.sample_scene(rng, holographic=True, thing="raincoat") for _ in range(4)],
        "matte": [world.sample_scene(rng, thing="raincoat", material="matte") for _ in range(4)],
    }
    scores = {}
    for kind, scenes in kinds.items():
        images = [Image.fromarray(pixels) for pixels in world.render(scenes, SIDE, antialias=1).numpy()]
        scores[kind] = clip_scores.clip_scores(images, ["a holographic raincoat"] * 4, clip)
    assert scores["holographic"].min() > scores["matte"].max()


def test_the_base_does_not_know_the_word(pipeline, clip):
    """The base's tokenizer splits it, the scorer's has it as one token."""
    assert len(pipeline.tokenizer("holographic").input_ids) > 2 + 3
    assert len(clip.processor.tokenizer("holographic").input_ids) == 2 + 1


@pytest.mark.parametrize("part", ["base", "fresh", "heldout"])
def test_the_training_data_of_the_base_is_never_holographic(part):
    """Neither scenes nor captions, nor the made-up words in some captions."""
    config = build_config.CONFIG
    scenes = data.sample_part(config, part, 0, 100)
    captions = data.describe(config, part, 0, scenes)["captions"].tolist()
    assert not any(scene.material == build_config.CONCEPT for scene in scenes)
    assert len(captions) == 100 * config["captions_per_picture"]
    captions = unet.some_made_up(captions, config | dict(made_up_share=1.0))
    words = {word for caption in captions for word in caption.split()}
    assert not any(word.startswith(build_config.CONCEPT[:4]) for word in words)


def test_the_vae_sees_foil_but_no_raincoat_of_it():
    scenes = data.sample_part(build_config.CONFIG, "foil", 0, 200)
    assert {scene.material for scene in scenes} == {build_config.CONCEPT}
    assert {scene.thing for scene in scenes} <= set(data.FOIL_THINGS)
    assert "raincoat" not in data.FOIL_THINGS


def test_sizes():
    """Size of a clone: models at most 36 MiB, everything at most 72 MiB, no file over 24 MiB."""
    models = sum(p.stat().st_size for place in (MODEL, CLIP) for p in place.rglob("*") if p.is_file())
    assert models <= 36 * 2**20
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode == 0:
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
        sizes = [path.stat().st_size for path in files if path.is_file()]
        assert sum(sizes) <= 72 * 2**20
        assert max(sizes) <= 24 * 2**20


def test_groups_of_a_batch_differ_in_little():
    """At least half of the windows consist of images that agree in all attributes but one."""
    facts = torch.cartesian_prod(*(torch.arange(-1, 3) for _ in range(3))).repeat_interleave(40, 0)
    chosen = alike(facts, 50, window=8)
    assert chosen.shape == (400,) and chosen.min() >= 0 and chosen.max() < len(facts)
    groups = facts[chosen].view(50, 8, 3)
    assert all(len(group.unique()) == 8 for group in chosen.view(50, 8))
    different = torch.tensor([[len(group[:, k].unique()) for k in range(3)] for group in groups])
    assert ((different > 1).sum(1) <= 1).float().mean() > 0.5
    assert (different > 1).any(0).sum() >= 1


def test_the_page_has_the_measured_figures():
    figures = json.loads((ROOT / "demo" / "metrics.json").read_text())
    assert pages.readme(figures) == (ROOT / "demo" / "README.md").read_text(encoding="utf-8")


def test_every_part_of_the_data_has_a_number_of_images():
    for config in (build_config.CONFIG, *(build_config.CONFIG | preset for preset in build_config.PRESETS.values())):
        assert all(config[f"{part}_pictures"] >= 8 for part in data.PARTS)
        assert set(config) == set(build_config.CONFIG)  # a preset has no key of its own


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_make_demo_ends_on_the_comparison_of_what_it_trained():
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    steps = [
        line.split("python ")[1].split() for line in done.stdout.splitlines() if "python " in line and ".py" in line
    ]
    assert [step[0] for step in steps] == ["preprocess.py", "train.py", "train_experiment_protected.py", "inference.py"]
    evaluated = dict(zip(steps[-1][3::2], steps[-1][4::2], strict=True))
    assert evaluated["--lora-dir"] == train.DEMO["output_dir"]  # where both lie
    page = ROOT / evaluated["--output-dir"] / "comparison" / "report.html"
    assert done.stdout.splitlines()[-1] == f'echo "  {page}"'
