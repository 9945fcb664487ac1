"""What the scripts share: models from a hub or a folder, and the command line."""

import shutil
import types

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from lib import models
from lib.config import parse_config
from lib.errors import UserError
from lib.evaluation import clip_scores

REPOSITORY = [
    "model_index.json", "README.md", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors",
    "feature_extractor/preprocessor_config.json", "safety_checker/model.safetensors",
    "safety_checker/model.fp16.safetensors", "scheduler/scheduler_config.json",
    "tokenizer/merges.txt", "tokenizer/vocab.json",
    *[f"{part}{ending}"
      for part in ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
      for ending in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")],
    "text_encoder/config.json", "unet/config.json", "vae/config.json",
]  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path, tiny_model):
    """A hub that has REPOSITORY and "downloads" the tiny model's files, empty ones for those that it
    lacks; returns what was downloaded."""
    fetched = []

    def model_info(self, name, revision=None):
        return types.SimpleNamespace(
            siblings=[types.SimpleNamespace(rfilename=name) for name in REPOSITORY]
        )

    def snapshot_download(name, revision=None, allow_patterns=None, local_files_only=False):
        for path in huggingface_hub.utils.filter_repo_objects(
            REPOSITORY, allow_patterns=allow_patterns
        ):
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


def test_without_a_hub_the_cache_is_tried_and_then_one_line_says_so(
    monkeypatch, tmp_path, tiny_model
):
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
    with pytest.raises(UserError, match="owner/model cannot be had") as error:
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
    for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
                 "scheduler/scheduler_config.json", "unet/config.json"):  # fmt: skip
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + b" ")
        assert models.base_model_digest(folder, False) != whole
        (folder / name).write_bytes(content)
    assert models.base_model_digest(folder, False) == whole


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
