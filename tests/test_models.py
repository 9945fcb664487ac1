"""What the scripts share: models from a hub or a folder, and the command line."""

import importlib
import os
import re
import shutil
import time
import types

import huggingface_hub
import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import inference
import study
import train
from lib import cache, models, values
from lib.config import parse_config
from lib.errors import UserError
from lib.evaluation.metrics import clip_scores

REPOSITORY = [
    "model_index.json",
    "README.md",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/model.safetensors",
    "safety_checker/model.fp16.safetensors",
    "scheduler/scheduler_config.json",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    *[
        f"{part}{ending}"
        for part in ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
        for ending in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
    ],
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
]


@pytest.fixture
def hub(monkeypatch, tmp_path, tiny_model):
    """A hub that has REPOSITORY and "downloads" the tiny model's files, empty ones for those that it
    lacks; returns what was downloaded."""
    fetched = []

    def model_info(self, name, revision=None):
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in REPOSITORY])

    def snapshot_download(name, revision=None, allow_patterns=None, local_files_only=False):
        for path in huggingface_hub.utils.filter_repo_objects(REPOSITORY, allow_patterns=allow_patterns):
            fetched.append(path)
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            known = tiny_model / path
            (tmp_path / path).write_bytes(known.read_bytes() if known.is_file() else b"")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fetched


@pytest.mark.parametrize(("half", "ending"), [(True, ".fp16.safetensors"), (False, ".safetensors")])
def test_only_what_is_used_is_fetched_from_a_hub(hub, half, ending):
    models.fetch_base_model("owner/model", None, half)
    weights = sorted(path for path in set(hub) if "config" not in path and "tokenizer" not in path)
    assert weights == [
        "model_index.json",
        f"text_encoder/model{ending}",
        f"unet/diffusion_pytorch_model{ending}",
        f"vae/diffusion_pytorch_model{ending}",
    ]


def test_without_a_hub_the_cache_is_tried_and_then_one_line_says_so(monkeypatch, tmp_path, tiny_model):
    def offline(*arguments, **options):
        raise ConnectionError("no route to host")

    def cached(name, revision=None, local_files_only=False, **options):
        if not local_files_only:
            raise ConnectionError("no route to host")
        return str(tiny_model)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert models.fetch_base_model("owner/model") == tiny_model
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="owner/model is unavailable") as error:
        models.fetch_base_model("owner/model")
    assert "\n" not in str(error.value)


def test_a_folder_of_fp16_variants_loads(tiny_model, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    folder = models.fetch_base_model(str(tmp_path / "half"), half=True)
    for cls, part in ((UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder")):
        model = models.load_part(cls, folder, part, torch.float32)
        expected = getattr(pipeline, part).state_dict()
        for name, weight in model.state_dict().items():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, expected[name].float())


def test_files_that_are_not_loaded_may_come_and_go(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    whole, half = (models.base_model_digest(folder, half) for half in (False, True))
    assert whole == half  # there is one precision only
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    other = {key: weight.half() + 1 for key, weight in weights.items()}
    save_file(other, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", {"format": "pt"})
    (folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"another")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"not used")
    assert models.base_model_digest(folder, False) == whole
    assert models.base_model_digest(folder, True) != half
    for dtype, expected in ((torch.float32, weights), (torch.float16, other)):
        loaded = models.load_part(UNet2DConditionModel, folder, "unet", dtype).state_dict()
        assert all(torch.equal(loaded[key], weight.to(dtype)) for key, weight in expected.items())
    # Every part counts, and its configuration.
    for name in (
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
        "unet/config.json",
    ):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + b" ")
        assert models.base_model_digest(folder, False) != whole
        (folder / name).write_bytes(content)
    assert models.base_model_digest(folder, False) == whole


@pytest.mark.parametrize("digest", [models.model_digest, lambda folder: models.base_model_digest(folder.parent, False)])
def test_a_model_is_known_by_its_content(tiny_model, tmp_path, monkeypatch, digest):
    """Wherever it lies, whatever lay there before with the same sizes and times of change."""
    monkeypatch.setattr(cache, "CLOCK_TICK", -(10**12))  # so that these digests, too, are cached
    one, two = (tmp_path / name / "unet" for name in ("one", "two"))
    for folder in (one, two):
        shutil.copytree(tiny_model, folder.parent)
    path = two / "diffusion_pytorch_model.safetensors"
    content, state = bytearray(path.read_bytes()), (one / path.name).stat()
    content[len(content) // 2] ^= 1
    time.sleep(0.02)  # more than a tick of the clock
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    first, second = digest(one), digest(two)
    assert first != second
    for folder, name in ((one, "aside"), (two, "one"), (tmp_path / "aside" / "unet", "two")):
        folder.parent.rename(tmp_path / name)
    assert (digest(one), digest(two)) == (second, first)


@pytest.mark.parametrize("place", ["digests", "."])
def test_digests_whose_cache_cannot_be_read_or_written(tiny_model, tmp_path, monkeypatch, capsys, place):
    expected = models.model_digest(tiny_model / "unet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache, "CLOCK_TICK", -(10**12))
    (tmp_path / "home" / place).parent.mkdir(exist_ok=True)
    (tmp_path / "home" / place).write_text("a file where the folder would be")
    for _ in range(2):
        assert models.model_digest(tiny_model / "unet") == expected
        assert "cannot be written" in capsys.readouterr().out
    (tmp_path / "home" / place).unlink()
    assert models.model_digest(tiny_model / "unet") == expected
    assert "cannot be written" not in capsys.readouterr().out
    for record in (tmp_path / "home" / "digests").iterdir():
        record.unlink()
        record.mkdir()  # which no reader opens
    assert models.model_digest(tiny_model / "unet") == expected


def test_weights_that_are_missing_or_of_another_shape_are_named(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if k != "conv_in.weight"}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"conv_in\.weight"):
        models.load_part(UNet2DConditionModel, folder, "unet", torch.float32)


def test_a_clip_folder_with_a_pickle_only_is_refused(tiny_clip, tmp_path):
    for path in tiny_clip.iterdir():
        name = "pytorch_model.bin" if path.name == "model.safetensors" else path.name
        (tmp_path / name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="pickle"):
        clip_scores.fetch_clip(str(tmp_path))


def test_the_command_line_overrides_the_demo_and_the_demo_overrides_config():
    config = dict(steps=4000, rate=1e-4, names=("a", "b"), flag=True, folder=None)
    demo = dict(steps=400, rate=1e-3)

    def parse(*argv):
        return parse_config(config, "test", demo, argv)

    assert parse() == config
    assert parse("--demo") == config | demo
    assert parse("--demo", "--steps", "5") == config | demo | dict(steps=5)
    assert parse("--names", "c, d", "--no-flag", "--folder", "x") == config | dict(
        names=("c", "d"), flag=False, folder="x"
    )
    for wrong in (["--steps", "many"], ["--step", "5"], ["stray"]):
        with pytest.raises(UserError):
            parse(*wrong)


def test_a_pointer_in_the_place_of_weights_is_named(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(UserError, match="git lfs pull") as error:
        models.load_part(UNet2DConditionModel, folder, "unet", torch.float32)
    assert str(path) in str(error.value)


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = dict(
        base_model="owner/model",
        data_dir="~",
        output_dir="out",
        score_dir=None,
        caption="~ a coat",
        protected_prompts=None,
    )
    found = parse_config(
        config,
        "",
        argv=[
            "--output-dir=~/loras",
            "--base-model",
            "~/a.safetensors",
            "--score-dir=~/a,~/b,c",
            "--protected-prompts=~/list.txt",
        ],
    )
    assert found == dict(
        base_model=f"{tmp_path}/a.safetensors",
        data_dir=f"{tmp_path}",
        output_dir=f"{tmp_path}/loras",
        score_dir=f"{tmp_path}/a,{tmp_path}/b,c",
        caption="~ a coat",
        protected_prompts=f"{tmp_path}/list.txt",
    )
    with pytest.raises(UserError, match=r"output_dir is ~nobody-of-that-name/x, .* \./~nobody"):
        parse_config(config, "", argv=["--output-dir", "~nobody-of-that-name/x"])
    (tmp_path / "~backup").mkdir()
    assert parse_config(config, "", argv=["--data-dir=~backup"])["data_dir"] == "~backup"


SCRIPTS = [path.stem for path in sorted(ROOT.glob("train*.py"))] + ["inference", "study"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_key_has_values_and_those_of_config_are_among_them(script):
    module = importlib.import_module(script)
    table = (train if script.startswith("train_") else module).VALUES
    for config in (module.CONFIG, module.CONFIG | getattr(module, "DEMO", {})):
        values.check(config, table)
    keys = [key for _, keys in table for key in keys.split()]
    assert sorted(keys) == sorted(module.CONFIG)


@pytest.mark.parametrize(
    ("script", "key", "value", "words"),
    [
        (train, "preview_prompts", "a coat", "needs a comma"),
        (train, "unet_targets", "to_k", "needs a comma"),
        (train, "unet_targets", (), "at least 1"),
        (train, "text_encoder_targets", ("q_proj", ""), "not empty"),
        (train, "preview_prompts", ("a coat", " "), "not empty"),
        (train, "preview_prompts", ("a coat", 3), "each a text"),
        *[(train, key, "", "not empty") for key in "base_model data_dir output_dir wandb_project".split()],
        *[
            (train, "run_name", name, "plain folder name")
            for name in (
                "../coat",
                "a/b",
                "a\\b",
                "coat:v2",
                "<coat>",
                "what?",
                "a*",
                'a"b',
                "a|b",
                "coat.",
                " coat",
                "coat ",
                ".coat",
                "-coat",
                "con",
                "NUL.1",
                "Com1",
                "a\nb",
                "coat\u200b",
                "x" * 151,
                "ё" * 80,
            )
        ],
        (train, "push_to_hub", "", "not empty"),
        (train, "output_dir", "caf\udce9", "UTF-8"),
        (train, "data_dir", "a\0b", "a text"),
        (train, "base_model", None, "a text"),
        (train, "alpha", float("inf"), "from 1e-06 to"),
        (train, "alpha", float("nan"), "from 1e-06 to"),
        (train, "alpha", "32", "a number"),
        (train, "unet_learning_rate", float("inf"), "a number"),
        (train, "unet_learning_rate", 10**400, "a number"),
        (train, "adam_beta2", 1, "from 0 to"),
        (train, "rank", 32.0, "a whole number"),
        (train, "rank", True, "a whole number"),
        (train, "rank", 10**6, "from 1 to 4096"),
        (train, "max_steps", 10**12, "a whole number"),
        (train, "dora", "no", "True or False"),
        (train, "dora", 1, "True or False"),
        (train, "mixed_precision", "fp8", "fp16, bf16 or no"),
        (train, "caption_from", ["text"], "text or description"),
        (train, "resolution", "wide", "a number of pixels"),
        (train, "resolution", None, "a resolution"),
        (train, "rnak", 8, "which nothing reads"),
        (inference, "lora_scales", 1.0, "needs a comma"),
        (inference, "lora_scales", (1.0, float("inf")), "from 0 to 10"),
        (inference, "lora_scales", (), "at least 1"),
        (inference, "prompts", "", "not empty"),
        (inference, "concept_margin", float("nan"), "a number"),
        (inference, "seeds", 2.5, "a whole number"),
        (study, "seeds", 42, "needs a comma"),
        (study, "scales", (0.5, "1"), "from 0 to 10"),
    ],
)
def test_a_value_of_another_kind_is_named(script, key, value, words):
    with pytest.raises(UserError, match="(?s)" + re.escape(words)) as error:
        script.check_config(script.CONFIG | {key: value})
    assert key in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["coat", "Mantel (neu) [2]", "плащ", "coat.v2", "console", "外套", "a_b-c+d!"])
def test_names_that_every_system_can_use(name):
    assert values.is_name(name)


def test_a_key_that_is_missing_is_named():
    config = {key: value for key, value in train.CONFIG.items() if key != "alpha"}
    with pytest.raises(UserError, match="CONFIG has no alpha"):
        train.check_config(config)
