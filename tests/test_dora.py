"""DoRA adapters: in files, in diffusers, merged into the weights, refused where they are damaged.

Their layers are tested in test_lora_layers.py, resumed runs in test_resume.py."""

import json
import re

import pytest
import torch
from conftest import TINY_RUN, assert_close, options, run
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft import inject_adapter_in_model as inject
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapters import models_of, rewrite

from lib import adapter_files, adapters
from lib.adapter_files import kohya
from lib.errors import UserError
from lib.evaluation.generation import load_pipeline, probe

MAGNITUDE = ".lora_magnitude_vector.weight"


@pytest.fixture
def pipeline(tiny_model):
    return load_pipeline(tiny_model, torch.float32, "cpu")


@pytest.fixture(scope="module")
def dora(tiny_model, processed_data, tmp_path_factory):
    """The folder of a tiny DoRA run, alpha twice the rank."""
    folder = tmp_path_factory.mktemp("dora")
    config = TINY_RUN | dict(base_model=tiny_model, data_dir=processed_data, output_dir=folder, alpha=8)
    run("train_experiment_dora.py", *options(**config))
    return folder / "lora_weights_dora"


def larger(tensors):
    """A few steps move the weights little. Scale that up, so that it cannot be mistaken for rounding."""
    torch.manual_seed(0)
    return {
        key: value * 30
        if "lora_B" in key
        else value * (1 + 0.3 * torch.rand(value.shape))
        if MAGNITUDE in key
        else value
        for key, value in tensors.items()
    }


@pytest.fixture
def large(dora, tmp_path):
    return rewrite(dora, tmp_path / "large", larger)


def test_a_run_writes_magnitudes_for_every_layer(dora):
    tensors = load_file(dora / adapter_files.WEIGHTS)
    layers = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")}
    assert {key.removesuffix(MAGNITUDE) for key in tensors if key.endswith(MAGNITUDE)} == layers
    sizes = json.loads((dora / "config.json").read_text())["parameters"]
    for part, size in sizes.items():
        assert size == sum(w.numel() for key, w in tensors.items() if key.startswith(part + "."))
    adapter = adapter_files.read_adapter(dora)
    assert sum(len(rows) for rows in adapter.magnitudes.values()) == len(layers)
    assert adapter.alpha == {"unet": 8.0, "text_encoder": 8.0}


def test_a_merged_adapter_gives_diffusers_output(large, tiny_model, pipeline):
    base = probe(pipeline)
    applied = adapters.Applied(adapter_files.read_adapter(large), models_of(pipeline))
    ours = probe(pipeline)
    theirs = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    theirs.load_lora_weights(large)
    assert any("magnitude" in name for name, _ in theirs.unet.named_parameters())
    for name, output in probe(theirs).items():
        assert_close(output, ours[name])
        assert (output - base[name]).abs().max() > 0.05 * base[name].abs().max()
    applied.set_scale(0)
    for name, output in probe(pipeline).items():
        assert torch.equal(output, base[name])


def test_a_scale_interpolates_between_base_and_trained_weight(large, pipeline):
    weight = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
    start = weight.detach().clone()
    applied = adapters.Applied(adapter_files.read_adapter(large), models_of(pipeline))
    end = weight.detach().clone()
    assert (end - start).norm() > 0.1 * start.norm()
    applied.set_scale(0.25)
    assert_close(weight, 0.75 * start + 0.25 * end, 1e-6)
    applied.set_scale(1)
    assert torch.equal(weight, end)


def test_a_merged_adapter_gives_pefts_output(large, tiny_model, pipeline, tmp_path):
    """PEFT's layers with the values of the file, and the same from PEFT's own folders."""
    tensors = load_file(large / adapter_files.WEIGHTS)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    folder = tmp_path / "peft"
    folder.mkdir()
    own = {k.removeprefix("unet."): w for k, w in tensors.items() if k.startswith("unet.")}
    # PEFT's own files lack the ending.
    saved = {k.removesuffix(".weight") if MAGNITUDE in k else k: w for k, w in own.items()}
    save_file({f"base_model.model.{k}": w for k, w in saved.items()}, folder / "adapter_model.safetensors")
    config = dict(peft_type="LORA", r=4, lora_alpha=8, target_modules=targets, use_dora=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))

    model = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    inject(LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=True), model.unet)
    for name, layer in adapters.lora_layers(model.unet).items():
        layer.lora_A["default"].weight.data = own[f"{name}.lora_A.weight"]
        layer.lora_B["default"].weight.data = own[f"{name}.lora_B.weight"]
        layer.lora_magnitude_vector["default"].weight.data = own[name + MAGNITUDE]
    adapters.Applied(adapter_files.read_adapter(folder), models_of(pipeline))
    assert_close(probe(pipeline)["unet"], probe(model)["unet"])


def comfyui_weight(dora_scale, weight, difference):
    """ComfyUI 0.3's merged weight, of a weight [out, in] and alpha / rank * up @ down."""
    merged = weight + difference
    if dora_scale.shape[0] == merged.shape[0]:
        norm = weight.norm(dim=1, keepdim=True)
    else:
        norm = merged.norm(dim=0, keepdim=True)
    return merged * (dora_scale / norm)


def test_comfyui_reads_kohyas_file_as_diffusers_reads_its_own(large, tiny_model, tmp_path):
    """To half precision's rounding of A and B, although kohya's norm is that of the base weight."""
    model = load_pipeline(tiny_model, torch.float32, "cpu").unet
    tensors = load_file(large / adapter_files.WEIGHTS)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    inject(LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=True), model)
    for name, layer in adapters.lora_layers(model).items():
        layer.lora_A["default"].weight.data = tensors[f"unet.{name}.lora_A.weight"]
        layer.lora_B["default"].weight.data = tensors[f"unet.{name}.lora_B.weight"]
        layer.lora_magnitude_vector["default"].weight.data = tensors[f"unet.{name}{MAGNITUDE}"]
    scales = dict(unet=adapters.dora_scales(model))
    path = tmp_path / "kohya.safetensors"
    kohya.save_kohya(path, dict(unet=adapters.factors(model)), 8.0, {}, scales)

    written, far = load_file(path), 0
    expected, found = (load_pipeline(tiny_model, torch.float32, "cpu") for _ in range(2))
    adapters.Applied(adapter_files.read_adapter(large), models_of(expected))
    adapters.Applied(adapter_files.read_adapter(path), models_of(found))
    for name, layer in adapters.lora_layers(model).items():
        key = f"lora_unet_{name.replace('.', '_')}"
        a, b = (written[f"{key}.lora_{half}.weight"].float() for half in ("down", "up"))
        base = layer.get_base_layer().weight.data
        weight = comfyui_weight(written[f"{key}.dora_scale"], base, written[f"{key}.alpha"] / 4 * b @ a)
        assert_close(weight, expected.unet.get_submodule(name).weight, 2e-3)
        assert_close(found.unet.get_submodule(name).weight, weight, 1e-5)
        far += (scales["unet"][name][:, 0] / tensors[f"unet.{name}{MAGNITUDE}"] - 1).abs().max() > 0.02
    assert far  # so the test would detect m itself in the file


def test_a_dora_scale_of_inputs_scales_columns():
    generator = torch.Generator().manual_seed(0)
    base, change = torch.randn(2, 6, 4, generator=generator)
    scale = torch.rand(1, 4, generator=generator)
    found = adapters.with_norms(base + change, base, scale)
    assert_close(found, comfyui_weight(scale, base, change))
    assert_close(found.norm(dim=0), scale[0])


def test_a_run_writes_both_formats(dora, pipeline):
    outputs = []
    for path in (dora, dora / f"{dora.name}.safetensors"):
        applied = adapters.Applied(adapter_files.read_adapter(path), models_of(pipeline))
        outputs.append(probe(pipeline))
        applied.set_scale(0)
    for name, output in outputs[0].items():
        assert_close(output, outputs[1][name], 1e-3)


# ---- the plain LoRA beside it ----------------------------------------------------------------


@pytest.fixture
def random_dora():
    """DoRA layers with random weights, one of them narrower than twice their rank."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"wide": torch.nn.Linear(48, 40), "narrow": torch.nn.Linear(40, 6)})
    adapters.add_lora(model, 4, 4.0, ("wide", "narrow"), dora=True)
    for pair in adapters.factors(model).values():
        pair[1].data.normal_(0, 0.1)
    for magnitude in adapters.magnitudes(model).values():
        magnitude.data.mul_(1 + 0.1 * torch.rand(magnitude.shape))
    return {"unet": model}


def dora_changes(model):
    return {
        name: adapters.with_norms(changed, base, magnitude) - base
        for name, base, changed, magnitude in adapters.dora_weights(model)
    }


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.001])
def test_the_closest_lora_is_as_close_as_its_rank_allows(random_dora, tolerance):
    changes = dora_changes(random_dora["unet"])
    norm = torch.stack([change.norm() for change in changes.values()]).norm()

    def best(rank):
        tails = [torch.linalg.svdvals(change)[rank:].norm() for change in changes.values()]
        return (torch.stack(tails).norm() / norm).item()

    pairs, rank, error = adapters.closest_lora(random_dora, 8, tolerance)
    assert rank == next((r for r in range(1, 9) if best(r) <= tolerance), 8)
    assert all(a.shape[0] == b.shape[1] == rank for a, b in pairs["unet"].values())
    rest = [(b @ a - changes[name]).norm() for name, (a, b) in pairs["unet"].items()]
    assert error == pytest.approx(torch.stack(rest).norm().item() / norm.item(), rel=1e-3)
    assert error == pytest.approx(best(rank), rel=0.02)
    torch.manual_seed(5)
    again = adapters.closest_lora(random_dora, 8, tolerance)[0]["unet"]
    assert all(torch.equal(a, again[name][0]) for name, (a, _) in pairs["unet"].items())
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))  # other random numbers do not change


def test_a_run_writes_a_plain_lora_for_other_programs(dora, tiny_model):
    """As far from the DoRA as it says, in our reader and in diffusers, and no second adapter of the run."""
    plain = json.loads((dora / "config.json").read_text())["plain_lora"]
    path = dora / plain["file"]
    assert path.name == "lora_weights_dora_lora.safetensors"
    tensors = load_file(path)
    assert not [key for key in tensors if "dora_scale" in key]
    ranks = {t.shape[0] if "lora_down" in key else t.shape[1] for key, t in tensors.items() if "alpha" not in key}
    assert ranks == {plain["rank"]}
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert (header["ss_network_dim"], header["ss_output_name"]) == (str(plain["rank"]), path.stem)
    assert adapter_files.find_adapters(dora.parent) == [(dora.name, dora)]

    weights, outputs = {}, {}
    for place in (None, dora, path):
        ours = load_pipeline(tiny_model, torch.float32, "cpu")
        if place:
            applied = adapters.Applied(adapter_files.read_adapter(place), models_of(ours))
            weights[place] = torch.cat([(w - base).flatten() for w, base, *_ in applied.layers])
        outputs[place] = probe(ours)
    away = (weights[path] - weights[dora]).norm() / weights[dora].norm()
    assert away.item() == pytest.approx(plain["error"], rel=0.05, abs=1e-3)
    theirs = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    theirs.load_lora_weights(path)
    for name, output in probe(theirs).items():
        assert_close(output, outputs[path][name])
        assert (output - outputs[None][name]).norm() > 0


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (torch.ones(2, 1), "has shape (2, 1)"),
        (torch.ones(32), "has shape (32,)"),
        (torch.full((32, 1), torch.inf), "NaN or infinity"),
    ],
)
def test_a_damaged_dora_scale_is_refused_and_named(dora, tmp_path, scale, words):
    tensors = load_file(dora / f"{dora.name}.safetensors")
    key = next(key for key in sorted(tensors) if "dora_scale" in key)
    assert tensors[key].shape == (32, 1)
    save_file(tensors | {key: scale}, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=re.escape(words)) as error:
        adapter_files.read_adapter(tmp_path / "wrong.safetensors")
    assert "wrong.safetensors" in str(error.value)


def test_magnitudes_change_the_fingerprint(dora, tmp_path):
    def shifted(tensors):
        key = next(key for key in tensors if MAGNITUDE in key)
        return tensors | {key: tensors[key] * 1.001}

    one, two = (adapter_files.read_adapter(path) for path in (dora, rewrite(dora, tmp_path / "x", shifted)))
    assert adapters.fingerprint(one) != adapters.fingerprint(two)


def first(tensors):
    return next(key for key in sorted(tensors) if key.startswith("unet") and MAGNITUDE in key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {k: w for k, w in t.items() if k != first(t)}, "magnitudes of the unet do not fit"),
        (lambda t: t | {first(t): t[first(t)][:-1]}, "magnitudes of the unet do not fit"),
        (lambda t: t | {first(t): t[first(t)] * float("nan")}, "NaN"),
    ],
)
def test_a_damaged_file_is_refused_and_named(dora, tmp_path, change, words):
    wrong = rewrite(dora, tmp_path / "wrong", lambda tensors: {k: w.contiguous() for k, w in change(tensors).items()})
    with pytest.raises(UserError, match=words) as error:
        adapter_files.read_adapter(wrong)
    assert str(wrong) in str(error.value)
