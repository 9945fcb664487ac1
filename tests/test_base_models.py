"""Which base models are supported: each kind is trained, drawn and resumed, any other is named."""

import json
import shutil
import signal

import huggingface_hub
import pytest
import torch
from conftest import BOS, TEXT, TINY_RUN, assert_one_line, call, make_processed, options, tiny_vae
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from training_runs import assert_equal_runs, kill, succeeded, training
from transformers import CLIPTextConfig, CLIPTextModel

from demo.random_sd15 import byte_tokenizer
from lib import adapter_files, models
from lib.errors import UserError
from lib.evaluation import generation

NAME = "lora_weights_rank_32"


def second_version(folder, prediction_type):
    """A Stable Diffusion 2.x of random weights: a wider text encoder with another activation, heads
    listed block by block, linear projections, no padding token of its own."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=48,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        upcast_attention=True,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = tiny_vae()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        prediction_type=prediction_type,
    )
    text = TEXT | dict(hidden_size=48, num_attention_heads=3, hidden_act="gelu", projection_dim=24)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        unet=unet,
        tokenizer=byte_tokenizer(folder / "tokenizer", BOS),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def first_version(folder, prediction_type, tiny_model):
    shutil.copytree(tiny_model, folder)
    edit(folder, "scheduler/scheduler_config.json", prediction_type=prediction_type)
    return folder


def wide_latents(folder, prediction_type, tiny_model):
    """A first version whose VAE halves four times, into 16 channels."""
    first_version(folder, prediction_type, tiny_model)
    torch.manual_seed(0)
    tiny_vae(blocks=5, channels=16).save_pretrained(folder / "vae")
    sizes = UNet2DConditionModel.load_config(folder / "unet")
    unet = UNet2DConditionModel.from_config(sizes | dict(in_channels=16, out_channels=16))
    unet.save_pretrained(folder / "unet")
    return folder


def edit(folder, path, **changes):
    config = json.loads((folder / path).read_text())
    (folder / path).write_text(json.dumps(config | changes))


# A first version that predicts noise is what all other tests use. Each case trains with the other prediction type too.
@pytest.mark.parametrize(
    ("version", "prediction_type"), [(1, "v_prediction"), (2, "v_prediction"), ("1 of wide latents", "epsilon")]
)
def test_a_supported_model_is_trained_resumed_and_evaluated(tiny_model, tmp_path, version, prediction_type):
    if version == 1:
        model = first_version(tmp_path / "model", prediction_type, tiny_model)
    elif version == 2:
        model = second_version(tmp_path / "model", prediction_type)
    else:
        model = wide_latents(tmp_path / "model", prediction_type, tiny_model)
    data = make_processed(tmp_path / "data", 4)
    config = TINY_RUN | dict(base_model=model, data_dir=data, max_steps=4, checkpoint_every=2, validation_count=1)
    whole, cut = (config | dict(output_dir=tmp_path / name) for name in ("whole", "cut"))
    succeeded(training(tmp_path, whole))
    assert training(tmp_path, cut, {3: kill}).returncode == -signal.SIGKILL
    assert "after step 2" in succeeded(training(tmp_path, cut)).stdout
    assert_equal_runs(tmp_path / "cut" / NAME, tmp_path / "whole" / NAME)

    # What was trained is the loss of this prediction type.
    row = json.loads((tmp_path / "whole" / NAME / "log.jsonl").read_text().splitlines()[0])
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[prediction_type]
    edit(model, "scheduler/scheduler_config.json", prediction_type=other)
    succeeded(training(tmp_path, config | dict(output_dir=tmp_path / "other", max_steps=2)))
    changed = json.loads((tmp_path / "other" / NAME / "log.jsonl").read_text().splitlines()[0])
    assert row["validation_loss"] != pytest.approx(changed["validation_loss"], rel=1e-3)
    edit(model, "scheduler/scheduler_config.json", prediction_type=prediction_type)

    drawing = dict(
        base_model=model,
        lora_dir=tmp_path / "whole" / NAME,
        output_dir=tmp_path / "results",
        clip_model="none",
        similarity_model="clip",
        data_dir="none",
        resolution=64,
        steps=2,
        seeds=1,
    )
    done = succeeded(call("inference.py", *options(**drawing)))
    assert "NaN" not in done.stdout
    rows = json.loads((tmp_path / "results" / "metrics.json").read_text())["pictures"]
    assert all(row["lpips"] > 0 for row in rows if row["model"] == "lora")
    # diffusers finds a place for every layer of the adapter.
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "whole" / NAME)
    layers = [key for key in load_file(tmp_path / "whole" / NAME / adapter_files.WEIGHTS) if "lora_A" in key]
    found = [n for part in (pipeline.unet, pipeline.text_encoder) for n, _ in part.named_parameters() if "lora_A" in n]
    assert len(found) == len(layers)


@pytest.mark.parametrize(
    ("path", "changes", "words"),
    [
        ("model_index.json", dict(text_encoder_2=["transformers", "CLIPTextModel"]), "text_encoder_2"),
        ("unet/config.json", dict(in_channels=9), "in_channels is 9"),
        ("unet/config.json", dict(addition_embed_type="text_time"), 'addition_embed_type is "text_time"'),
        ("unet/config.json", dict(time_cond_proj_dim=256), "time_cond_proj_dim is 256"),
        ("unet/config.json", dict(class_embed_type="projection"), "class_embed_type"),
        ("unet/config.json", dict(cross_attention_dim=768), "hidden_size is 32"),
        ("unet/config.json", dict(_class_name="SD3Transformer2DModel"), "_class_name"),
        ("unet/config.json", dict(out_channels=8), "out_channels is 8"),
        ("vae/config.json", dict(block_out_channels=[8, 8]), "block_out_channels"),
        ("text_encoder/config.json", dict(model_type="t5"), 'model_type is "t5"'),
        ("scheduler/scheduler_config.json", dict(prediction_type="sample"), 'prediction_type is "sample"'),
        ("scheduler/scheduler_config.json", dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
    ],
)
def test_any_other_model_is_named_before_its_weights_are_read(
    tiny_model, processed_data, tmp_path, monkeypatch, path, changes, words
):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    edit(model, path, **changes)
    for weights in model.glob("*/*.safetensors"):
        weights.write_bytes(b"not to be read")
    config = options(**TINY_RUN, base_model=model, data_dir=processed_data, output_dir=tmp_path)
    assert_one_line(call("train.py", *config), model / path, words, "supported are")
    with pytest.raises(UserError, match="supported are"):
        models.fetch_base_model(str(model))


@pytest.mark.parametrize("script", ["train.py", "inference.py"])
def test_a_resolution_that_the_vae_cannot_tile_is_named(script, tiny_model, trained, tmp_path):
    model = wide_latents(tmp_path / "model", "epsilon", tiny_model)
    config = dict(base_model=model, output_dir=tmp_path / "out", resolution=72)
    if script == "train.py":
        config |= dict(data_dir=make_processed(tmp_path / "data", 2))
        for path in (tmp_path / "data" / "images").iterdir():
            Image.open(path).resize((72, 72)).save(path)
        config = TINY_RUN | config
    else:
        config |= dict(lora_dir=trained / NAME)
    assert_one_line(call(script, *options(**config)), "is 72", "multiple of 16", model / "vae")


def test_no_weights_of_another_model_are_fetched(tiny_model, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    edit(model, "unet/config.json", in_channels=9)
    asked = []

    def snapshot_download(name, allow_patterns=None, **named):
        asked.extend(allow_patterns)
        return str(model)

    class Info:
        siblings = ()

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *rest, **named: Info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="in_channels is 9"):
        models.fetch_base_model("owner/inpainting")
    assert asked
    assert not any("safetensors" in pattern for pattern in asked)


def test_the_embedded_model_is_supported():
    models.check_base_model(models.ROOT / "demo" / "model")


def test_what_a_recorded_unet_does_not_know_goes_to_the_plain_one(tiny_model):
    """On a CPU nothing is recorded, but the same function decides."""
    pipeline = generation.load_pipeline(tiny_model, torch.float32, "cpu")
    unet, seen = pipeline.unet, []
    plain = unet.forward

    def watched(*inputs, **named):
        seen.append((inputs, named))
        known = {name: named[name] for name in ("return_dict",) if name in named}
        return plain(*inputs, **known)

    unet.forward = watched
    generation.capture_unet(pipeline, 2, (8, 8), False)
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    when = torch.tensor(500)
    expected = plain(latents, when, text, return_dict=False)[0]
    seen.clear()
    nothing = dict(timestep_cond=None, cross_attention_kwargs=None, added_cond_kwargs=None)
    found = unet(latents, when, encoder_hidden_states=text, return_dict=False, **nothing)[0]
    assert torch.equal(found, expected)
    assert seen[-1][0][0] is not latents  # copied to where the recorded one reads
    for named in (
        dict(timestep_cond=torch.zeros(2, 8)),
        dict(cross_attention_kwargs={}),
        dict(encoder_attention_mask=torch.ones(2, 77)),
        dict(down_intrablock_additional_residuals=()),
    ):
        seen.clear()
        unet(latents, when, encoder_hidden_states=text, return_dict=False, **named)
        inputs, given = seen[-1]
        assert inputs[0] is latents
        assert all(given[name] is value for name, value in named.items())
    for change in (
        dict(timestep=torch.tensor([500, 400])),
        dict(timestep=500),
        dict(sample=torch.randn(3, 4, 8, 8), encoder_hidden_states=torch.randn(3, 77, 32)),
    ):
        inputs = dict(sample=latents, timestep=when, encoder_hidden_states=text) | change
        seen.clear()
        found = unet(**inputs, return_dict=False)[0]
        assert torch.equal(found, plain(**inputs).sample)
        assert seen[0][0][0] is inputs["sample"]
