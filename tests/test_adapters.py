"""Adapters: into a model and out, both file layouts, and every way in which a file can be wrong."""

import json
import shutil

import pytest
import torch
from conftest import assert_close
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from lib import adapter_files, adapters
from lib.errors import UserError
from lib.evaluation.generation import load_pipeline, probe


@pytest.fixture
def pipeline(tiny_model):
    return load_pipeline(tiny_model, torch.float32, "cpu")


def models_of(pipeline):
    return {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}


def rewrite(folder, target, change):
    """A copy of an adapter folder whose tensors went through `change` (a dict to a dict)."""
    shutil.copytree(folder, target)
    path = target / adapter_files.WEIGHTS
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(change(load_file(path)), path, metadata=header)
    return target


def test_parameter_counts_of_the_full_size_model():
    def count(model, rank, targets):
        adapters.add_lora(model, rank, rank, targets)
        return sum(a.numel() + b.numel() for a, b in adapters.factors(model).values())

    with torch.device("meta"):
        for rank, expected in ((32, 6_377_472), (8, 1_594_368)):
            unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
            assert count(unet, rank, ("to_k", "to_q", "to_v", "to_out.0")) == expected
        text_encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
        assert count(text_encoder, 32, ("q_proj", "v_proj")) == 1_179_648


def larger(tensors):
    """A few steps move little: so much that no rounding can be taken for it."""
    return {k: v * 30 if "lora_B" in k else v for k, v in tensors.items()}


def test_round_trip_and_equal_output_in_diffusers(trained, tiny_model, pipeline, tmp_path):
    folder = rewrite(trained / "lora_weights_rank_32", tmp_path / "larger", larger)
    base = probe(pipeline)
    adapter = adapter_files.read_adapter(folder)
    applied = adapters.Applied(adapter, models_of(pipeline))
    ours = probe(pipeline)
    for name, output in ours.items():
        assert (output - base[name]).abs().max() > 0.05 * base[name].abs().max()

    theirs = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    theirs.load_lora_weights(folder)
    for name, output in probe(theirs).items():
        assert_close(output, ours[name])

    applied.set_scale(0.5)
    theirs.set_adapters(theirs.get_active_adapters(), 0.5)
    half = probe(pipeline)
    for name, output in probe(theirs).items():
        assert_close(output, half[name])
        assert (output - ours[name]).abs().max() > 0.02 * ours[name].abs().max()

    applied.set_scale(0)
    for name, output in probe(pipeline).items():
        assert torch.equal(output, base[name])


def test_alpha_other_than_rank_survives_the_file(tmp_path, tiny_model):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    models = models_of(pipeline)
    for component, targets in (("unet", ["to_q"]), ("text_encoder", ["q_proj"])):
        adapters.add_lora(models[component], 4, 2.0, targets)
        for _, b in adapters.factors(models[component]).values():
            torch.nn.init.normal_(b.data)
    expected = probe(pipeline)
    targets = {"unet": ["to_q"], "text_encoder": ["q_proj"]}
    adapter_files.save_adapter(tmp_path, models, 4, 2.0, targets, {"caption": "x"})
    assert adapter_files.read_adapter(tmp_path).alpha == {"unet": 2.0, "text_encoder": 2.0}
    theirs = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    theirs.load_lora_weights(tmp_path)
    ours = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    adapters.Applied(adapter_files.read_adapter(tmp_path), models_of(ours))
    for reader in (theirs, ours):
        for name, output in probe(reader).items():
            assert_close(output, expected[name])


@pytest.mark.parametrize("prefix", ["text_model.", ""])
@pytest.mark.parametrize("at_root", [True, False])
def test_published_peft_layout(tmp_path, trained, pipeline, prefix, at_root):
    """PEFT folders, with and without the `text_model.` level, give the same as our own file."""
    tensors = load_file(trained / "lora_weights_rank_32" / adapter_files.WEIGHTS)
    for component in ["text_encoder"] if at_root else ["unet", "text_encoder"]:
        place = tmp_path if at_root else tmp_path / component
        place.mkdir(exist_ok=True)
        own = {k.removeprefix(f"{component}."): v for k, v in tensors.items() if k.startswith(component)}
        own = {k.replace("text_model.", prefix): v for k, v in own.items()}
        save_file({f"base_model.model.{k}": v for k, v in own.items()}, place / "adapter_model.safetensors")
        names = ["q_proj", "v_proj"] if component == "text_encoder" else ["to_k", "to_q", "to_v", "to_out.0"]
        config = dict(peft_type="LORA", r=4, lora_alpha=4, target_modules=names)
        (place / "adapter_config.json").write_text(json.dumps(config))
    published = adapter_files.read_adapter(tmp_path)
    ours = adapter_files.read_adapter(trained / "lora_weights_rank_32")
    if not at_root:
        assert adapters.fingerprint(published) == adapters.fingerprint(ours)
    applied = adapters.Applied(ours, models_of(pipeline))
    expected = probe(pipeline)["text_encoder"]
    applied.set_scale(0)
    adapters.Applied(published, models_of(pipeline))
    assert torch.equal(probe(pipeline)["text_encoder"], expected)


def first(tensors, part="unet", factor="lora_B"):
    return next(key for key in sorted(tensors) if key.startswith(part) and factor in key)


def dropped_layer(tensors):
    layer = first(tensors).split(".lora_")[0]
    return {k: v for k, v in tensors.items() if not k.startswith(layer + ".")}


def renamed_layer(tensors):
    layer = first(tensors).split(".lora_")[0]
    return {k.replace(layer, layer.replace("down_blocks.0", "down_blocks.7")): v for k, v in tensors.items()}


def dropped_factor(tensors):
    return {k: v for k, v in tensors.items() if k != first(tensors)}


def zeroed(tensors):
    return {k: v * 0 if "lora_B" in k and k.startswith("unet") else v for k, v in tensors.items()}


def not_finite(tensors):
    return tensors | {first(tensors): torch.full_like(tensors[first(tensors)], float("nan"))}


def other_shape(tensors):
    key = first(tensors)
    return tensors | {key: torch.ones(tensors[key].shape[0] + 8, tensors[key].shape[1])}


def unknown_key(tensors):
    return tensors | {"unet.conv_in.weight": torch.ones(1)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dropped_layer, "1 layers of the model have no weights"),
        (renamed_layer, "1 of 32 layers in the file are not in the model"),
        (dropped_factor, "one factor only"),
        (zeroed, "does nothing"),
        (not_finite, "NaN"),
        (other_shape, "another shape"),
        (unknown_key, "no key of a LoRA adapter"),
    ],
)
def test_a_wrong_file_is_refused_and_named(tmp_path, trained, pipeline, change, words):
    wrong = rewrite(trained / "lora_weights_rank_32", tmp_path / "wrong", change)
    with pytest.raises(UserError, match=words) as error:
        adapters.Applied(adapter_files.read_adapter(wrong), models_of(pipeline))
    assert str(wrong) in str(error.value)


def test_damaged_files(tmp_path, trained):
    source = trained / "lora_weights_rank_32" / adapter_files.WEIGHTS
    for name, content in (("cut", source.read_bytes()[:500]), ("zero", b"\0" * 900), ("text", b"hello")):
        (tmp_path / name).mkdir()
        (tmp_path / name / adapter_files.WEIGHTS).write_bytes(content)
        with pytest.raises(UserError, match="safetensors"):
            adapter_files.read_adapter(tmp_path / name)


def test_find_adapters(trained, tmp_path):
    found = [name for name, _ in adapter_files.find_adapters(trained)]
    assert found == ["lora_weights_rank8", "lora_weights_rank_32", "lora_weights_unet_only"]
    one = adapter_files.find_adapters(trained / "lora_weights_rank8")
    assert [name for name, _ in one] == ["lora_weights_rank8"]
    with pytest.raises(UserError, match="no adapter in it"):
        adapter_files.find_adapters(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        adapter_files.find_adapters(tmp_path / "none")


def test_fingerprint_tells_adapters_apart_and_copies_not(tmp_path, trained):
    prints = {
        adapters.fingerprint(adapter_files.read_adapter(path)) for _, path in adapter_files.find_adapters(trained)
    }
    assert len(prints) == 3
    copy = rewrite(trained / "lora_weights_rank8", tmp_path / "copy", lambda tensors: tensors)
    assert adapters.fingerprint(adapter_files.read_adapter(copy)) in prints


def test_a_target_that_matches_nothing(pipeline):
    with pytest.raises(UserError, match="to_z"):
        adapters.add_lora(pipeline.unet, 4, 4, ["to_q", "to_z"])
