"""Adapters as other programs write them: the change of each weight is the one that diffusers makes of the same file."""

import json
import re

import pytest
import torch
from conftest import assert_close, assert_one_line, call, options
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from test_adapters import models_of

from lib import adapter_files, adapters
from lib.errors import UserError
from lib.evaluation.generation import load_pipeline

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def models(tiny_model):
    return models_of(load_pipeline(tiny_model, torch.float32, "cpu"))


def random_layers(models, targets, ranks=(4,)):
    """{component: {layer: (A, B)}} of random values for the layers whose names end in `targets`, {component: endings};
    their ranks take turns. Convolutions have factors of four dimensions."""
    generator, layers = torch.Generator().manual_seed(0), {}
    for component, endings in targets.items():
        rows = layers[component] = {}
        for name, module in models[component].named_modules():
            if adapters.is_matrix(module) and adapters.matches(name, endings):
                rank, (out, width, *kernel) = ranks[len(rows) % len(ranks)], module.weight.shape
                a, b = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
                rows[name] = (a.reshape(rank, width, *kernel), b.reshape(out, rank, *kernel))
    return layers


def in_file(component, name):
    return f"text_model.{name.removeprefix('text_model.')}" if component == "text_encoder" else name


def diffusers_file(path, layers, **settings):
    """Write `layers` in diffusers' format with PEFT's `settings` in the header, the same for each component."""
    tensors = {
        f"{component}.{in_file(component, name)}.lora_{factor}.weight": weight
        for component, rows in layers.items()
        for name, pair in rows.items()
        for factor, weight in zip("AB", pair, strict=True)
    }
    stated = {f"{component}.{key}": value for component in layers for key, value in settings.items()}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(stated)} if stated else None)
    return path


def old_file(path, layers):
    """Write `layers` as diffusers did in early 2023: attn1.processor.to_q_lora.down for attn1.to_q.lora_A."""
    tensors = {}
    for component, rows in layers.items():
        for name, pair in rows.items():
            place, part = re.fullmatch(r"(.*(?:attn\d|self_attn))\.(.*)", in_file(component, name)).groups()
            part = {"to_out.0": "to_out", "out_proj": "to_out"}.get(part, f"to_{part.replace('to_', '')[0]}")
            place += ".processor" if component == "unet" else ""
            for factor, weight in zip(("down", "up"), pair, strict=True):
                tensors[f"{component}.{place}.{part}_lora.{factor}.weight"] = weight
    save_file(tensors, path)
    return path


def kohya_file(path, layers, alpha=2.0, **header):
    tensors = {}
    for component, rows in layers.items():
        for name, pair in rows.items():
            key = f"lora_{'unet' if component == 'unet' else 'te'}_{in_file(component, name).replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": pair[0], f"{key}.lora_up.weight": pair[1]}
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, header)
    return path


def their_changes(path, tiny_model):
    """{(component, layer): change of its weight} by diffusers' load_lora_weights."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    return {
        (component, name): layer.get_delta_weight("default_0")
        for component, model in models_of(pipeline).items()
        for name, layer in adapters.lora_layers(model).items()
    }


def our_changes(adapter, models):
    """The same by this project, of every weight that changes."""
    before = {c: {k: w.clone() for k, w in model.state_dict().items()} for c, model in models.items()}
    applied = adapters.Applied(adapter, models)
    changes = {
        (component, name.removesuffix(".weight")): weight - before[component][name]
        for component, model in models.items()
        for name, weight in model.state_dict().items()
        if not torch.equal(weight, before[component][name])
    }
    applied.set_scale(0)
    return changes


def assert_read_alike(path, models, tiny_model):
    """Diffusers and this project change the same weights by the same; returns the adapter."""
    adapter = adapter_files.read_adapter(path)
    ours, theirs = our_changes(adapter, models), their_changes(path, tiny_model)
    assert ours.keys() == {place for place, change in theirs.items() if change.any()}
    for place, change in ours.items():
        # A change is seen through a float32 weight, which rounds it.
        assert_close(change, theirs[place].view_as(change), 1e-5)
    return adapter


BOTH = {"unet": UNET_TARGETS, "text_encoder": ("q_proj", "v_proj")}


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        ((4,), dict(r=4, lora_alpha=3, use_rslora=True)),
        ((4, 2), dict(r=4, lora_alpha=4, rank_pattern={}, use_rslora=True)),
        ((4,), dict(r=4, lora_alpha=4, alpha_pattern={"to_q": 1, "attn2.to_k": 2.5, "q_proj": 8})),
        ((4, 2, 3), {}),
    ],
    ids=["rslora", "rslora and rank_pattern", "alpha_pattern", "ranks without settings"],
)
def test_the_scale_of_each_layer(tmp_path, models, tiny_model, ranks, settings):
    layers = random_layers(models, BOTH, ranks)
    if "rank_pattern" in settings:
        other = {name: 2 for rows in layers.values() for name, (a, _) in rows.items() if len(a) == 2}
        settings = settings | dict(rank_pattern=other)
    if settings:
        settings = settings | dict(target_modules=[*UNET_TARGETS, "q_proj", "v_proj"])
    path = diffusers_file(tmp_path / "a.safetensors", layers, **settings)
    adapter = assert_read_alike(path, models, tiny_model)
    if settings:
        plain = diffusers_file(tmp_path / "b.safetensors", layers)
        assert adapters.fingerprint(adapter) != adapters.fingerprint(adapter_files.read_adapter(plain))


def test_the_same_settings_in_a_peft_folder(tmp_path, models):
    layers = random_layers(models, {"unet": UNET_TARGETS}, (4, 2))
    rank_pattern = {name: 2 for name, (a, _) in layers["unet"].items() if len(a) == 2}
    settings = dict(r=4, lora_alpha=3, use_rslora=True, rank_pattern=rank_pattern, alpha_pattern={"attn1.to_q": 5})
    file = diffusers_file(tmp_path / "a.safetensors", layers, **settings)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "adapter_config.json").write_text(json.dumps(settings | dict(peft_type="LORA")))
    tensors = {
        f"base_model.model.{name}.lora_{factor}.weight": weight
        for name, pair in layers["unet"].items()
        for factor, weight in zip("AB", pair, strict=True)
    }
    save_file(tensors, tmp_path / "unet" / "adapter_model.safetensors")
    one, two = (adapters.fingerprint(adapter_files.read_adapter(path)) for path in (file, tmp_path))
    assert one == two


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(r=8), "rank 4, but the file's settings state 8"),
        (dict(r=4, rank_pattern={"to_q": 8}), "rank 4, but the file's settings state 8"),
        (dict(alpha_pattern={"to_q": 0}), "to_q is 0, but must be a positive number"),
        (dict(alpha_pattern={"to_q(": 1}), "alpha_pattern is not a table"),
        (dict(rank_pattern=[1]), "rank_pattern is not a table"),
        (dict(modules_to_save=["conv_in"]), "modules_to_save"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights pissa_niter_4"),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(tmp_path, models, settings, words):
    path = diffusers_file(tmp_path / "a.safetensors", random_layers(models, {"unet": UNET_TARGETS}), **settings)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        adapter_files.read_adapter(path)
    assert str(path) in str(error.value)


def test_convolutions_in_diffusers_format(tmp_path, models, tiny_model):
    layers = random_layers(models, {"unet": (*UNET_TARGETS, "proj_in", "proj_out")})
    assert any(a.ndim == 4 for a, _ in layers["unet"].values())
    path = diffusers_file(tmp_path / "a.safetensors", layers)
    assert_read_alike(path, models, tiny_model)
    layers["unet"]["down_blocks.0.resnets.0.conv1"] = (torch.ones(4, 32, 3, 3), torch.ones(32, 4, 1, 1))
    with pytest.raises(UserError, match=r"conv1\.lora_A\.weight is of LoCon"):
        adapter_files.read_adapter(diffusers_file(path, layers))


def test_names_of_early_2023(tmp_path, models, tiny_model):
    layers = random_layers(models, {"unet": UNET_TARGETS, "text_encoder": TEXT_TARGETS})
    path = old_file(tmp_path / "a.safetensors", layers)
    assert any(".processor.to_out_lora.up" in key for key in adapter_files.read_write.read_tensors(path)[0])
    assert_read_alike(path, models, tiny_model)


def only(layers, words):
    """The layers of the UNet whose names hold `words`, beside those of the text encoder."""
    return layers | {"unet": {name: pair for name, pair in layers["unet"].items() if words in name}}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("attn2", ["cross-attention (attn2)"]),
        ("attn1", ["self-attention (attn1)"]),
        ("up_blocks", ["2 of 4 blocks of the unet (up_blocks.1.attentions.0, up_blocks.1.attentions.1)"]),
        ("down_blocks.0.attentions", ["1 of 4 blocks of the unet (down_blocks.0.attentions.0)"]),
    ],
)
def test_a_part_of_the_layers(tmp_path, models, tiny_model, words, parts):
    layers = random_layers(models, {"unet": UNET_TARGETS, "text_encoder": TEXT_TARGETS})
    for path in (
        kohya_file(tmp_path / "kohya.safetensors", only(layers, words)),
        diffusers_file(tmp_path / "diffusers.safetensors", only(layers, words)),
    ):
        adapter = assert_read_alike(path, models, tiny_model)
        assert adapters.adapted_parts(adapter, models) == parts


def test_an_adapter_of_all_layers_or_of_stated_ones_is_no_part(tmp_path, models):
    layers = random_layers(models, {"unet": UNET_TARGETS})
    whole = kohya_file(tmp_path / "a.safetensors", layers)
    assert adapters.adapted_parts(adapter_files.read_adapter(whole), models) == []
    targets = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
    stated = diffusers_file(tmp_path / "b.safetensors", only(layers, "attn2"), target_modules=targets)
    assert adapters.adapted_parts(adapter_files.read_adapter(stated), models) == []


def test_a_text_encoder_that_was_not_trained_is_left_out(tmp_path, models, tiny_model, capsys):
    layers = random_layers(models, {"unet": UNET_TARGETS, "text_encoder": TEXT_TARGETS})
    layers["text_encoder"] = {name: (a, b * 0) for name, (a, b) in layers["text_encoder"].items()}
    for path in (
        kohya_file(tmp_path / "kohya.safetensors", layers),
        diffusers_file(tmp_path / "diffusers.safetensors", layers),
    ):
        adapter = assert_read_alike(path, models, tiny_model)
        assert list(adapter.factors) == ["unet"]
        assert f"note: every lora_B of the text_encoder in {path} is zero" in capsys.readouterr().out


def unscored(model):
    """Options of the smallest evaluation, without its adapters and output folder."""
    known = dict(clip_model="none", similarity_model="clip", data_dir="none", resolution=64, steps=1, seeds=1)
    return dict(base_model=model) | known


def test_what_is_refused_or_adapted_in_part_is_printed(tmp_path, models, tiny_model):
    """A folder of downloads: one in part and with clip skip, one of another kind, one whole."""
    folder, layers = tmp_path / "downloads", random_layers(models, {"unet": UNET_TARGETS, "text_encoder": TEXT_TARGETS})
    folder.mkdir()
    kohya_file(folder / "part.safetensors", only(layers, "attn2"), ss_clip_skip="2")
    kohya_file(folder / "whole.safetensors", layers, 4.0, ss_clip_skip="1")
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, folder / "loha.safetensors")
    config = unscored(tiny_model)
    done = call("inference.py", *options(**config, lora_dir=folder, output_dir=tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    assert [line for line in notes if "loha is skipped" in line and "LoHa" in line]
    assert [line for line in notes if "part.safetensors adapts only cross-attention (attn2)" in line]
    assert [line for line in notes if "part was trained with clip skip 2; here the text encoder's last layer" in line]
    assert not [line for line in notes if "whole" in line]
    for name in ("part", "whole", "comparison"):
        assert (tmp_path / "out" / name / "report.html").is_file()
    assert not (tmp_path / "out" / "loha").exists()

    for name in ("part", "whole"):
        (folder / f"{name}.safetensors").write_bytes(b"\0" * 99)
    done = call("inference.py", *options(**config, lora_dir=folder, output_dir=tmp_path / "none"))
    assert done.returncode != 0
    assert f"{folder}: none of its 3 adapters can be read" in done.stderr


def test_an_adapter_of_another_base_model_does_not_end_the_evaluation_of_a_folder(tmp_path, models, tiny_model):
    """It can be read, and is refused once the base model is loaded."""
    folder, layers = tmp_path / "downloads", random_layers(models, {"unet": UNET_TARGETS})
    folder.mkdir()
    elsewhere = {"unet": {f"elsewhere.{name}": pair for name, pair in layers["unet"].items()}}
    for name, factor in (("a", 1), ("c", 2)):
        scaled = {"unet": {layer: (a, factor * b) for layer, (a, b) in elsewhere["unet"].items()}}
        diffusers_file(folder / f"{name}.safetensors", scaled)
    config, out = unscored(tiny_model) | dict(lora_dir=folder, output_dir=tmp_path / "out"), tmp_path / "out"
    done = call("inference.py", *options(**config))
    assert_one_line(done, f"{folder}: none of its 2 adapters can be used with {tiny_model}")
    assert not out.exists()
    diffusers_file(folder / "b.safetensors", layers)
    done = call("inference.py", *options(**config))
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stdout.splitlines() if "is skipped" in line]
    assert [line.split(" is skipped: ")[0] for line in notes] == ["note: a", "note: c"]
    assert all("does not fit the base model's unet" in line for line in notes)
    assert [path.name for path in out.iterdir()] == ["b"]
    (folder / "b.safetensors").unlink()
    (folder / "c.safetensors").unlink()
    alone = call("inference.py", *options(**config | dict(output_dir=tmp_path / "alone")))
    assert_one_line(alone, "a.safetensors does not fit the base model's unet")
