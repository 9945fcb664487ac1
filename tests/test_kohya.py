"""kohya's file format: what other programs find in it, what we read of it, and what is refused."""

import hashlib
import json
import re
import shutil
from datetime import datetime

import pytest
import torch
from conftest import TINY_RUN, assert_close, assert_one_line, call, make_processed, options, picture
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapters import models_of
from transformers import CLIPTextConfig, CLIPTextModel

from lib import adapter_files, adapters
from lib.adapter_files import header, kohya
from lib.errors import UserError
from lib.evaluation.generation import load_pipeline, probe
from lib.training.run_folder import preview_thumbnail

NAME = "lora_weights_rank_32"


@pytest.fixture
def pipeline(tiny_model):
    return load_pipeline(tiny_model, torch.float32, "cpu")


@pytest.fixture(scope="module")
def full_size():
    """Stable Diffusion v1.5's UNet and text encoder, without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    return {"unet": unet, "text_encoder": text_encoder}


def all_layers(models):
    """Every layer of `models` that a kohya file can name: {component: [name]}."""
    return {
        component: [
            name if component == "unet" or name.startswith("text_model.") else f"text_model.{name}"
            for name, module in model.named_modules()
            if adapters.is_matrix(module)
        ]
        for component, model in models.items()
    }


# ---- what other programs find --------------------------------------------------------------


def ldm_layers():
    """Where Stable Diffusion v1's own layers lie, with _ for dots: {name in kohya's files: name}.

    Blocks count on through the levels there: input block 3 * level + number + 1, output block
    3 * level + number, the attention being part 1 of its block; the middle one is middle_block_1.
    """
    inside = ["proj_in", "proj_out"]
    inside += [
        f"transformer_blocks_0_{a}_{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out_0")
    ]
    inside += ["transformer_blocks_0_ff_net_0_proj", "transformer_blocks_0_ff_net_2"]
    places = {
        f"down_blocks_{level}_attentions_{n}": f"input_blocks_{3 * level + n + 1}_1"
        for level in range(3)
        for n in range(2)
    }
    places |= {
        f"up_blocks_{level}_attentions_{n}": f"output_blocks_{3 * level + n}_1"
        for level in range(1, 4)
        for n in range(3)
    }
    places["mid_block_attentions_0"] = "middle_block_1"
    return {f"{ours}_{part}": f"{theirs}_{part}" for ours, theirs in places.items() for part in inside}


def comfyui_keys():
    """ComfyUI's key map for Stable Diffusion v1: diffusers' names of the UNet's layers, and the text
    encoder's layers by number; `.lora_up.weight`, `.lora_down.weight` and `.alpha` follow each."""
    layers = [f"lora_unet_{name}" for name in ldm_layers()]
    parts = "mlp_fc1 mlp_fc2 self_attn_k_proj self_attn_q_proj self_attn_v_proj self_attn_out_proj".split()
    layers += [f"lora_te_text_model_encoder_layers_{n}_{part}" for n in range(12) for part in parts]
    return {f"{layer}.{end}" for layer in layers for end in ("lora_up.weight", "lora_down.weight", "alpha")}


def a1111_layer(key):
    """The module of Stable Diffusion v1 in A1111 that the part of a key before the first dot names."""
    if found := re.match(r"lora_unet_down_blocks_(\d+)_attentions_(\d+)_(.+)", key):
        return f"diffusion_model_input_blocks_{1 + int(found[1]) * 3 + int(found[2])}_1_{found[3]}"
    if found := re.match(r"lora_unet_mid_block_attentions_(\d+)_(.+)", key):
        return f"diffusion_model_middle_block_1_{found[2]}"
    if found := re.match(r"lora_unet_up_blocks_(\d+)_attentions_(\d+)_(.+)", key):
        return f"diffusion_model_output_blocks_{int(found[1]) * 3 + int(found[2])}_1_{found[3]}"
    found = re.match(r"lora_te_text_model_encoder_layers_(\d+)_(.+)", key)
    return f"transformer_text_model_encoder_layers_{found[1]}_{found[2]}" if found else None


def test_comfyui_and_a1111_find_every_tensor_of_the_full_size_model(full_size, tmp_path):
    layers = {
        component: {
            name: (torch.ones(2, 3), torch.ones(4, 2))
            for name in names
            if adapters.matches(name, ("to_k", "to_q", "to_v", "to_out.0", "q_proj", "v_proj"))
        }
        for component, names in all_layers(full_size).items()
    }
    assert {part: len(rows) for part, rows in layers.items()} == {"unet": 128, "text_encoder": 24}
    kohya.save_kohya(tmp_path / "a.safetensors", layers, 32.0, {})
    keys = load_file(tmp_path / "a.safetensors").keys()
    assert len(keys) == 3 * (152 + 12)  # and the text encoder's output projections, of zeros
    tensors = load_file(tmp_path / "a.safetensors")
    # One rank and one alpha: some programs take them from the first layer, or refuse to merge others.
    assert {len(t) if t.ndim else t.item() for key, t in tensors.items() if "lora_up" not in key} == {2, 32.0}
    assert not any(t.any() for key, t in tensors.items() if "out_proj" in key and t.ndim)
    assert keys <= comfyui_keys()
    there = {f"diffusion_model_{name}" for name in ldm_layers().values()}
    there |= {
        f"transformer_text_model_encoder_layers_{n}_self_attn_{p}_proj" for n in range(12) for p in ("q", "v", "out")
    }
    found = {a1111_layer(key.split(".")[0]) for key in keys}
    assert found <= there
    assert len(found) == 152 + 12


def test_every_layer_name_comes_back_from_its_underscores(full_size):
    for names in all_layers(full_size).values():
        assert [kohya.dotted(name.replace(".", "_")) for name in names] == names


def test_diffusers_draws_the_same_from_both_files(tmp_path, tiny_model, pipeline):
    models, targets = models_of(pipeline), {"unet": ["to_q", "to_out.0"], "text_encoder": ["q_proj"]}
    for component, model in models.items():
        adapters.add_lora(model, 4, 3.0, targets[component])
        for pair in adapters.factors(model).values():
            for weight in pair:  # values that half precision holds
                weight.data.copy_(torch.randn_like(weight).mul(0.5).half().float())
    adapter_files.save_adapter(tmp_path, models, 4, 3.0, targets, {})
    layers = {name: adapters.factors(model) for name, model in models.items()}
    kohya.save_kohya(tmp_path / "kohya.safetensors", layers, 3.0, {})
    outputs = []
    for place in (tmp_path, tmp_path / "kohya.safetensors"):
        theirs = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
        theirs.load_lora_weights(place)
        outputs.append(probe(theirs))
    base = probe(StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None))
    for name, output in outputs[0].items():
        assert torch.equal(outputs[1][name], output), name
        assert (output - base[name]).abs().max() > 0.05 * base[name].abs().max()

    # And our own reader applies it as its own file, bit for bit.
    drawn = []
    for place in (tmp_path, tmp_path / "kohya.safetensors"):
        ours = load_pipeline(tiny_model, torch.float32, "cpu")
        adapter = adapter_files.read_adapter(place)
        assert adapter.alpha == {"unet": 3.0, "text_encoder": 3.0}
        adapters.Applied(adapter, models_of(ours))
        drawn.append(probe(ours))
    for name, output in drawn[0].items():
        assert torch.equal(drawn[1][name], output)
        assert_close(output, outputs[0][name])


# ---- what a run writes, and what is read of it ----------------------------------------------


@pytest.mark.parametrize("name", [NAME, "lora_weights_unet_only"])
def test_a_run_leaves_the_same_adapter_in_both_formats(trained, name):
    file = trained / name / f"{name}.safetensors"
    assert all(t.dtype == torch.float16 for k, t in load_file(file).items() if "alpha" not in k)
    ours, theirs = (adapter_files.read_adapter(path) for path in (trained / name, file))
    assert theirs.factors.keys() == ours.factors.keys()
    for part, rows in ours.factors.items():
        assert theirs.factors[part].keys() == rows.keys()
        for layer, pair in rows.items():
            for written, read in zip(pair, theirs.factors[part][layer], strict=True):
                assert torch.equal(written.half(), read.half())
    assert (theirs.rank, theirs.alpha) == (ours.rank, ours.alpha)
    assert theirs.metadata["caption"] == "a holographic raincoat"
    assert theirs.metadata["seed"] == "42"


def test_the_header_says_what_was_trained(trained, tiny_model):
    with safe_open(trained / NAME / f"{NAME}.safetensors", "pt") as file:
        found = file.metadata()
    record = json.loads((trained / NAME / "config.json").read_text())
    config = record["config"]
    assert found["ss_network_module"] == "networks.lora"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "4.0")
    assert found["ss_base_model_version"] == "sd_v1"
    assert found["ss_sd_model_name"] == "model"  # not where it lies
    assert json.loads(found["ss_tag_frequency"]) == {NAME: {"a holographic raincoat": 6}}
    assert json.loads(found["ss_dataset_dirs"]) == {NAME: {"n_repeats": 1, "img_count": 6}}
    assert (found["ss_num_train_images"], found["ss_num_validation_images"]) == ("6", "2")
    assert float(found["ss_unet_lr"]) == config["unet_learning_rate"]
    assert float(found["ss_text_encoder_lr"]) == config["text_encoder_learning_rate"]
    assert (found["ss_steps"], found["ss_epoch"], found["ss_num_epochs"], found["ss_seed"]) == ("6", "1", "1", "42")
    assert found["modelspec.sai_model_spec"] == "1.0.1"
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert found["modelspec.trigger_phrase"] == "a holographic raincoat"
    assert "a holographic raincoat" in found["modelspec.usage_hint"]
    assert found["modelspec.prediction_type"] == "epsilon"
    started, finished = (float(found[f"ss_training_{what}_at"]) for what in ("started", "finished"))
    assert record["started"] == started < finished < started + 600
    assert datetime.fromisoformat(found["modelspec.date"]).timestamp() == int(finished)
    assert str(tiny_model.parent) not in json.dumps(found)
    assert "image_01" not in json.dumps(found)


def test_the_hashes_are_those_of_sd_scripts(tmp_path):
    """Recomputed from the file's bytes; the older kind is of the file with the keys ss_… alone."""
    layers = {"unet": {"mid_block.attentions.0.proj_in": (torch.randn(8, 40000), torch.randn(40000, 8))}}
    path = tmp_path / "a.safetensors"
    kohya.save_kohya(path, layers, 8.0, {"ss_seed": "42", "modelspec.title": "x" * 5000})
    content = path.read_bytes()
    after = content[8 + int.from_bytes(content[:8], "little") :]
    with safe_open(path, "pt") as file:
        found = file.metadata()
    assert found["sshs_model_hash"] == hashlib.sha256(after).hexdigest()
    assert found["modelspec.hash_sha256"] == "0x" + found["sshs_model_hash"]
    alone = tmp_path / "alone.safetensors"
    save_file(load_file(path), alone, {k: v for k, v in found.items() if k.startswith("ss_")})
    part = alone.read_bytes()[0x100000:0x110000]
    assert len(part) == 0x10000
    assert found["sshs_legacy_hash"] == hashlib.sha256(part).hexdigest()[:8]


def header_of(trained, config=(), data=(), result=(), width=768, **more):
    record = json.loads((trained / NAME / "config.json").read_text())
    about = record | dict(session=1, finished=2e9, optimizer=dict(name="x")) | dict(result)
    return header.kohya_header(record["config"] | dict(config), record["data"] | dict(data), about, width, **more)


def test_the_second_version_and_several_captions_are_told(trained):
    data = dict(caption_counts={"A cat, Blue": 1, "a dog, blue ": 3}, size_counts={"512x768": 3, "576x704": 1})
    found = header_of(trained, (), data, dict(prediction_type="v_prediction"), 1024, thumbnail=picture(1))
    assert found["ss_base_model_version"] == "sd_v2"
    assert found["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert found["modelspec.prediction_type"] == "v"
    assert found["modelspec.trigger_phrase"] == "a dog, blue "
    assert found["modelspec.resolution"] == "512x768"
    assert found["ss_enable_bucket"] == "True"
    buckets = json.loads(found["ss_bucket_info"])["buckets"]
    assert buckets == {"0": dict(resolution=[512, 768], count=3), "1": dict(resolution=[576, 704], count=1)}
    assert json.loads(found["ss_tag_frequency"]) == {NAME: {"a cat": 1, "blue": 4, "a dog": 3}}
    assert found["modelspec.thumbnail"].startswith("data:image/jpeg;base64,/9j/")


def test_epochs_count_the_images_of_all_processes(trained):
    batches = dict(max_steps=10, batch_size=2, gradient_accumulation_steps=3)
    found = header_of(trained, batches, (), dict(processes=2, steps=10))
    assert found["ss_total_batch_size"] == "12"
    assert found["ss_num_epochs"] == found["ss_epoch"] == "20"  # 120 samples of 6 images


def test_a_base_model_in_one_file_is_named_with_its_hashes(trained, tmp_path):
    assert not [key for key in header_of(trained) if "sd_model_hash" in key]
    path = tmp_path / "dream.safetensors"
    path.write_bytes(bytes(range(256)) * 0x1200)
    found = header_of(trained, dict(base_model=str(path)))
    assert found["ss_sd_model_name"] == "dream.safetensors"
    assert found["ss_new_sd_model_hash"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found["ss_sd_model_hash"] == hashlib.sha256(path.read_bytes()[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize(
    ("captions", "trigger"),
    [
        ({"a sks dog": 5, "a sks cat": 1}, "a sks dog"),
        (
            {"A woman in a Holographic raincoat, smiling": 1, "a holographic raincoat on a chair": 1},
            "holographic raincoat",
        ),
        ({"b": 1, "a woman in a raincoat": 1, "a raincoat": 1}, None),
        ({"the cat on the mat": 1, "the dog on the lawn": 1}, None),
        ({"ein sks-Hund": 1, "der sks-Hund im Garten": 1}, "sks-Hund"),
        ({"art of x": 1, "a heart of gold": 1}, None),
    ],
)
def test_the_trigger_is_what_captions_share(captions, trigger):
    assert header.trigger_phrase(captions) == trigger


def test_without_a_trigger_the_header_names_none(trained):
    found = header_of(trained, (), dict(caption_counts={"one thing": 1, "another": 1}))
    assert not {"modelspec.trigger_phrase", "modelspec.usage_hint", "modelspec.tags"} & found.keys()


def test_the_thumbnail_is_the_newest_preview(tmp_path):
    assert preview_thumbnail(tmp_path) is None
    (tmp_path / "previews").mkdir()
    for step, colour in ((100, "red"), (1000, "blue")):
        strip = Image.new("RGB", (96, 32), "green")
        strip.paste(colour, (0, 0, 32, 32))
        strip.save(tmp_path / "previews" / f"step_{step:06}.webp", lossless=True)
    found = preview_thumbnail(tmp_path)
    assert found.size == (32, 32)
    assert set(found.get_flattened_data()) == {(0, 0, 255)}


# ---- files of others ------------------------------------------------------------------------


def other_file(path, models, change=None):
    """A kohya file with a rank and an alpha of its own for each layer, and 1x1 convolutions, as
    sd-scripts trains all of a transformer; returns {component: {layer: change of its weight}}."""
    tensors, deltas = {}, {}
    torch.manual_seed(0)
    for component, model in models.items():
        deltas[component] = {}
        for number, (name, module) in enumerate(model.named_modules()):
            inside = "attentions" in name if component == "unet" else "layers" in name
            if not (adapters.is_matrix(module) and inside):
                continue
            rank, alpha = 2 + number % 3, 1.0 + number % 2
            bare = name if component == "unet" or name.startswith("text_model") else f"text_model.{name}"
            key = f"{kohya.PREFIXES[component]}_{bare.replace('.', '_')}"
            out, width = module.weight.shape[:2]
            tail = module.weight.shape[2:]
            a, b = torch.randn(rank, width), torch.randn(out, rank)
            tensors[f"{key}.lora_down.weight"] = a.reshape(rank, width, *tail)
            tensors[f"{key}.lora_up.weight"] = b.reshape(out, rank, *tail)
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
            deltas[component][name] = alpha / rank * (b @ a)
    save_file(change(tensors) if change else tensors, path)
    return deltas


def test_others_files_are_read_with_an_alpha_for_each_layer(tmp_path, pipeline):
    path = tmp_path / "theirs.safetensors"
    deltas = other_file(path, models_of(pipeline))
    assert any(name.endswith("proj_in") for name in deltas["unet"])
    before = {
        part: {name: model.get_submodule(name).weight.clone() for name in deltas[part]}
        for part, model in models_of(pipeline).items()
    }
    ours = adapters.Applied(adapter_files.read_adapter(path), models_of(pipeline))
    for part, model in models_of(pipeline).items():
        for name, delta in deltas[part].items():
            weight, base = model.get_submodule(name).weight, before[part][name]
            assert_close(weight, base + delta.view_as(base), 1e-5)
    ours.set_scale(0)
    for part, model in models_of(pipeline).items():
        for name, base in before[part].items():
            assert torch.equal(model.get_submodule(name).weight, base)


def without_text_encoder(tensors):
    return {k: v for k, v in tensors.items() if not k.startswith("lora_te")}


def test_a_file_without_text_encoder_or_alphas(tmp_path, pipeline):
    path = tmp_path / "theirs.safetensors"
    other_file(path, models_of(pipeline), without_text_encoder)
    assert list(adapter_files.read_adapter(path).factors) == ["unet"]
    other_file(path, models_of(pipeline), lambda t: {k: v for k, v in t.items() if "alpha" not in k})
    adapter = adapter_files.read_adapter(path)
    assert adapter.alpha == adapter.rank  # no alpha: a scale of 1


LAYER = "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({f"{LAYER}.lora_down.weight": torch.ones(2, 32, 3, 3)}, "LoCon (a convolution)"),
        ({f"{LAYER}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "Tucker"),
        ({f"{LAYER}.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
        ({f"{LAYER}.lokr_w1": torch.ones(2, 2)}, "LoKr"),
        ({f"{LAYER}.oft_blocks": torch.ones(2, 2)}, "OFT"),
        ({f"{LAYER}.diff": torch.ones(2, 2)}, "whole weights"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}, "XL"),
        ({"bundle_emb.word.string_to_param.*": torch.ones(1, 2)}, "an embedding"),
        ({"lycoris_x.hada_w2_b": torch.ones(1, 2)}, "LoHa"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path, pipeline, more, words):
    path = tmp_path / "theirs.safetensors"
    other_file(path, models_of(pipeline), lambda tensors: tensors | more)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        adapter_files.read_adapter(path)
    assert str(path) in str(error.value)
    assert next(iter(more)) in str(error.value)


def one_factor(tensors):
    return {k: v for k, v in tensors.items() if "layers_0_self_attn_q_proj.lora_up" not in k}


def no_number(tensors):
    key = next(key for key in tensors if key.endswith(".alpha"))
    return tensors | {key: torch.tensor(float("nan"))}


def another_model(tensors):
    return {k.replace("down_blocks_0", "down_blocks_5"): v for k, v in tensors.items()}


def a_gap(tensors):
    return {k: v for k, v in tensors.items() if "layers_0_self_attn_q_proj" not in k}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (one_factor, "lack a factor"),
        (no_number, "alpha of"),
        (another_model, "are not in the model"),
        (a_gap, "1 layers of the model have no weights"),
        (lambda t: {k: v * 0 if "lora_up" in k else v for k, v in t.items()}, "does nothing"),
        (lambda t: {k: v * float("inf") if "lora_up" in k else v for k, v in t.items()}, "NaN or infinity"),
    ],
)
def test_a_wrong_file_is_refused_and_named(tmp_path, pipeline, change, words):
    path = tmp_path / "theirs.safetensors"
    other_file(path, models_of(pipeline), change)
    with pytest.raises(UserError, match=words) as error:
        adapters.Applied(adapter_files.read_adapter(path), models_of(pipeline))
    assert str(path) in str(error.value)


def test_inference_takes_a_file(tmp_path, trained, tiny_model):
    """A folder of files: tests/test_other_adapters.py."""
    config = dict(
        base_model=tiny_model,
        clip_model="none",
        similarity_model="clip",
        data_dir="none",
        resolution=64,
        steps=1,
        seeds=1,
    )
    path = shutil.copy(trained / NAME / f"{NAME}.safetensors", tmp_path / "ours.safetensors")
    done = call("inference.py", *options(**config, lora_dir=path, output_dir=tmp_path / "one"))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert record["run"] == "ours"
    assert record["adapter"]["metadata"]["caption"] == "a holographic raincoat"
    assert "was trained on" not in done.stdout  # a base model of the same name


def test_a_run_cannot_take_diffusers_name(tmp_path, tiny_model):
    data = make_processed(tmp_path / "data", 4)
    config = TINY_RUN | dict(base_model=tiny_model, data_dir=data, output_dir=tmp_path, run_name="pytorch_lora_weights")
    assert_one_line(call("train.py", *options(**config)), "pytorch_lora_weights", "take another")
