"""A base model in one file: the same model as the folder's, and what is refused by name."""

import contextlib
import errno
import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, TINY_RUN, assert_one_line, call, options
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_base_models import second_version
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo.original_names import original_unet, original_vae
from lib import models, single_file
from lib.errors import UserError
from lib.evaluation.generation import generate, load_pipeline

NAME = "lora_weights_rank_32"


def original_clip(tensors):
    return {f"cond_stage_model.transformer.{key}": value for key, value in tensors.items()}


def original_open_clip(tensors):
    """A text encoder as OpenCLIP names it: query, key and value are one matrix."""
    found, stacked = {}, {}
    for key, value in tensors.items():
        name = key.removeprefix("text_model.")
        if match := re.match(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)", name):
            stacked.setdefault((match[1], match[3]), {})[match[2]] = value
            continue
        for ours, theirs in {
            "encoder.layers": "transformer.resblocks",
            "layer_norm1": "ln_1",
            "layer_norm2": "ln_2",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
            "self_attn": "attn",
            "final_layer_norm": "ln_final",
            "embeddings.token_embedding": "token_embedding",
            "embeddings.position_embedding.weight": "positional_embedding",
        }.items():
            name = name.replace(ours, theirs)
        found[name] = value
    for (layer, ending), parts in stacked.items():
        found[f"transformer.resblocks.{layer}.attn.in_proj_{ending}"] = torch.cat([parts[p] for p in "qkv"])
    width = found["ln_final.weight"].shape[0]
    found["text_projection"] = torch.zeros(width, width, device=found["ln_final.weight"].device)
    return {f"cond_stage_model.model.{name}": value for name, value in found.items()}


def original(folder, version):
    """All tensors of a folder in diffusers' layout as one file of the original code has them."""
    unet, vae = (load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in ("unet", "vae"))
    text = load_file(folder / "text_encoder" / "model.safetensors")
    text = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
    tensors = original_unet(unet, 1) | original_vae(vae)
    tensors |= original_clip(text) if version == 1 else original_open_clip(text)
    tensors["alphas_cumprod"] = torch.ones(1000)  # such files hold more than is used
    return tensors | {"model_ema.decay": torch.ones(())}


@pytest.fixture
def one_file(tmp_path, tiny_model, monkeypatch):
    """A function that writes the tiny model of a version as one file; the folder stands for that
    version's configurations. Returns (file, folder)."""
    monkeypatch.setattr(single_file.constants, "HF_HOME", str(tmp_path / "cache"))

    def write(version=1, prediction_type="epsilon", change=lambda tensors: tensors, header=None):
        folder = tmp_path / f"folder{version}"
        if version == 1:
            shutil.copytree(tiny_model, folder)
        else:
            second_version(folder, prediction_type)
        monkeypatch.setitem(single_file.CONFIGS, version, configs(folder))
        monkeypatch.setattr(single_file, "write_tokenizer", lambda place: None)  # a tiny vocabulary
        file = tmp_path / f"my model {version}.safetensors"
        stated = {"epsilon": "epsilon", "v_prediction": "v"}[prediction_type]
        header = {"modelspec.prediction_type": stated} if header is None else header
        save_file({k: v.contiguous() for k, v in change(original(folder, version)).items()}, file, header)
        return file, folder

    return write


def configs(folder):
    """A copy of a base-model folder without its weights, and which says nothing of v-prediction."""
    target = folder.with_name(f"{folder.name}_configs")
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    path = target / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(prediction_type="epsilon")))
    return target


def weights(folder):
    found = {}
    for part in ("unet", "vae", "text_encoder"):
        for path in (folder / part).glob("*.safetensors"):
            found |= {f"{part}.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}
    return found


def pictures(folder):
    pipeline = load_pipeline(folder, torch.float32, "cpu")
    jobs = [("a raincoat", 1), ("a cat", 2)]
    return [
        image.tobytes()
        for image in generate(pipeline, jobs, batch_size=2, steps=2, guidance_scale=6.0, resolution=64, title="")
    ]


@pytest.mark.parametrize(("version", "prediction_type"), [(1, "epsilon"), (2, "epsilon"), (2, "v_prediction")])
def test_the_file_is_the_folder(one_file, version, prediction_type, capsys):
    file, folder = one_file(version, prediction_type)
    found = models.fetch_base_model(str(file))
    told = capsys.readouterr().out
    assert f"Stable Diffusion {version}.x in one file" in told
    assert f"({prediction_type}), as the file's header says" in told
    expected = weights(folder)
    assert weights(found).keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in weights(found).items())
    scheduler = json.loads((found / "scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == prediction_type
    assert pictures(found) == pictures(folder)
    # It is made once.
    stamp = (found / "model_index.json").stat().st_mtime_ns
    assert models.fetch_base_model(str(file)) == found
    assert (found / "model_index.json").stat().st_mtime_ns == stamp
    assert capsys.readouterr().out == ""
    # But again where a part of it was removed.
    (found / "vae/diffusion_pytorch_model.safetensors").unlink()
    assert models.fetch_base_model(str(file)) == found
    assert weights(found).keys() == expected.keys()


def test_a_file_that_is_replaced_under_its_name_is_read_anew(one_file):
    def padded(tensors):  # the ends of large files, which are alike
        return tensors | {"a": torch.zeros(2**19), "model_ema.z": torch.zeros(2**19)}

    file, _ = one_file(change=padded)
    first = weights(models.fetch_base_model(str(file)))
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    tensors["model.diffusion_model.out.2.bias"] += 1
    save_file(tensors, file, header)
    again = weights(models.fetch_base_model(str(file)))
    differing = [key for key, value in first.items() if not torch.equal(value, again[key])]
    assert differing == ["unet.conv_out.bias"]


def test_old_names_of_the_text_encoder_and_half_precision(one_file):
    def change(tensors):
        tensors = {k.replace("transformer.text_model.", "transformer."): v.half() for k, v in tensors.items()}
        return tensors | {"cond_stage_model.transformer.embeddings.position_ids": torch.arange(77)}

    file, folder = one_file(change=change)
    found = weights(models.fetch_base_model(str(file)))
    assert all(torch.equal(found[key], value.half()) for key, value in weights(folder).items())


def test_train_and_inference_take_the_file(one_file, processed_data, tmp_path):
    file, _ = one_file()
    config = TINY_RUN | dict(base_model=file, data_dir=processed_data, output_dir=tmp_path / "runs", max_steps=3)
    done = call("train.py", *options(**config))
    assert done.returncode == 0, done.stderr
    drawing = dict(
        base_model=file,
        lora_dir=tmp_path / "runs" / NAME,
        output_dir=tmp_path / "out",
        clip_model="none",
        similarity_model="clip",
        data_dir="none",
        resolution=64,
        steps=1,
        seeds=1,
    )
    done = call("inference.py", *options(**drawing))
    assert done.returncode == 0, done.stderr
    assert "was trained on" not in done.stdout


# ---- full size, without weights --------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_the_configurations_are_those_of_the_full_size_models(version, tmp_path):
    """Every weight of the real models' names and shapes finds its place."""
    with torch.device("meta"):
        second = dict(attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
        width, shape = (768, dict(attention_head_dim=8)) if version == 1 else (1024, second)
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=width, **shape)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=12 if version == 1 else 24,
                num_attention_heads=width // 64,
            )
        )
    states = [model.state_dict() for model in (unet, vae, text)]
    texts = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in states[2].items()}
    parts = dict(
        unet=(original_unet(states[0], 2), states[0]),
        vae=(original_vae(states[1]), states[1]),
        text_encoder=(original_clip(texts) if version == 1 else original_open_clip(texts), texts),
    )
    for part, (tensors, expected) in parts.items():
        found = single_file.renamed(part, tensors, single_file.CONFIGS[version], "x")
        # The last layer of OpenCLIP's text encoder is not used: the states are those before it.
        wanted = {k for k in expected if version == 1 or not k.startswith("text_model.encoder.layers.23.")}
        assert found.keys() == wanted
    models.check_base_model(single_file.CONFIGS[version])


@pytest.mark.parametrize(("version", "padding"), [(1, 49407), (2, 0)])
def test_the_tokenizer_is_clips(version, padding, tmp_path):
    shutil.copytree(single_file.CONFIGS[version] / "tokenizer", tmp_path / "tokenizer")
    single_file.write_tokenizer(tmp_path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == 49408
    ids = tokenizer("A photo of a cat", padding="max_length").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + [padding] * 70


# ---- noise or velocity ----------------------------------------------------------------------


def test_what_the_miniature_predicts_is_told_from_its_answer():
    """Of a model that was really trained, whichever of the two it was trained for."""
    folder = ROOT / "demo/model"
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    expected = config.get("prediction_type", "epsilon")
    assert single_file.prediction_type(folder, {})[0] == expected


def test_velocity_is_told_from_its_answer(monkeypatch, tiny_model):
    """What a model answers to noise that predicts velocity well: minus the mean image."""

    def forward(self, sample, *rest):
        mean = torch.linspace(-1, 1, 32).expand_as(sample)
        return type("Answer", (), {"sample": 0.068 * sample - mean})

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    kind, why = single_file.prediction_type(tiny_model, {})
    assert kind == "v_prediction"
    assert "cosine" in why


# ---- what is refused ------------------------------------------------------------------------


def without(start):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(start)}


def other_shape(tensors):
    key = "model.diffusion_model.out.2.bias"
    return tensors | {key: torch.ones(7)}


def nine_channels(tensors):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    return tensors | {key: tensors[key].repeat(1, 3, 1, 1)[:, :9]}


def flat(tensors):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    return tensors | {key: tensors[key].flatten()}


def distilled(tensors):
    return tensors | {"model.diffusion_model.time_embed.cond_proj.weight": torch.ones(4, 4)}


def sdxl(tensors):
    tensors = without("cond_stage_model")(tensors)
    return tensors | {"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": torch.ones(4)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("first_stage_model"), "holds no VAE"),
        (without("cond_stage_model"), "holds no text encoder"),
        (without("model.diffusion_model.middle_block.1"), "weights are missing (mid_block.attentions.0"),
        (without("cond_stage_model.transformer.text_model.encoder.layers.1"), "missing (text_model.encoder.layers.1"),
        (other_shape, "1 weights are of another shape (conv_out.bias)"),
        (nine_channels, "is for inpainting (9 input channels)"),
        (distilled, "1 weights are left over (model.diffusion_model.time_embed.cond_proj.weight)"),
        (flat, "0 input channels"),
        (without("first_stage_model.decoder.up.3.upsample.conv.bias"), "its vae cannot be converted"),
        (sdxl, "is Stable Diffusion XL"),
        (lambda t: {"lora_unet_mid_block_x.alpha": torch.ones(())}, "is a LoRA adapter"),
        (lambda t: {"unet.x.lora_A.weight": torch.ones(2)}, "is a LoRA adapter"),
        (lambda t: {"x": torch.ones(2)}, "holds no UNet, no VAE, no text encoder"),
    ],
)
def test_any_other_file_is_named(one_file, processed_data, tmp_path, change, words):
    file, _ = one_file(change=change)
    config = options(**TINY_RUN, base_model=file, data_dir=processed_data, output_dir=tmp_path)
    assert_one_line(call("train.py", *config), file, words)
    # Nothing that is half there is taken for a model at the next start.
    assert not list((tmp_path / "cache").rglob("model_index.json")) or all(
        path.parent.name.startswith(".") for path in (tmp_path / "cache").rglob("model_index.json")
    )
    assert_one_line(call("train.py", *config), file, words)


@pytest.mark.parametrize(
    ("change", "header"),
    [
        (lambda tensors: tensors | {"ztsnr": torch.zeros(0)}, {}),
        (lambda tensors: tensors | {"alphas_cumprod": torch.linspace(0.99, 0, 1000)}, {}),
        (lambda tensors: tensors | {"alphas_cumprod": torch.linspace(0.99, 4e-8, 1000).half()}, {}),
        (lambda tensors: tensors, {"ss_zero_terminal_snr": "True"}),
    ],
)
def test_zero_terminal_snr_is_refused_as_it_is_in_a_folder(one_file, change, header):
    file, _ = one_file(change=change, header=header)
    with pytest.raises(UserError, match="zero terminal SNR") as error:
        models.fetch_base_model(str(file))
    assert str(file) in str(error.value)


def test_a_mark_of_velocity_is_heeded(one_file):
    def change(tensors):
        own = torch.tensor(0.0047)  # the last of Stable Diffusion's own
        return tensors | {"v_pred": torch.zeros(0), "alphas_cumprod": own}

    folder = models.fetch_base_model(str(one_file(change=change, header={})[0]))
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"


def test_pickles_damaged_and_missing_files(processed_data, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02cposix\nsystem\n")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "pointer.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "page.safetensors").write_bytes(b"\n<!DOCTYPE html><html><body>Log in</body></html>")
    (tmp_path / "text.safetensors").write_bytes(b"Not found\r\n")
    (tmp_path / "renamed.safetensors").write_bytes(b"PK\x03\x04" + bytes(99))
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name, words in (
        ("pointer.safetensors", "git lfs pull"),
        ("page.safetensors", "is a web page"),
        ("text.safetensors", "is a text"),
        ("renamed.safetensors", "is a pickle or"),
        ("empty.safetensors", "is empty"),
        ("model.ckpt", "is a pickle"),
        ("gone.ckpt", "is a pickle"),
        ("cut.safetensors", "cannot be read as safetensors"),
        ("none.safetensors", "no such file"),
    ):
        config = TINY_RUN | dict(base_model=tmp_path / name, data_dir=processed_data, output_dir=tmp_path)
        assert_one_line(call("train.py", *options(**config)), tmp_path / name, words)


@pytest.mark.parametrize(
    "raised",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
    ],
    ids=lambda raised: type(raised).__name__,
)
def test_a_full_disk_while_it_is_made_leaves_nothing(one_file, monkeypatch, tmp_path, raised):
    file, folder = one_file()
    written, whole = [], single_file.save_file

    def full(tensors, path, **named):
        if written:
            path.write_bytes(b"half")
            raise raised
        written.append(path)
        whole(tensors, path, **named)

    with monkeypatch.context() as patch:
        patch.setattr(single_file, "save_file", full)
        with pytest.raises((UserError, KeyboardInterrupt)) as error:
            models.fetch_base_model(str(file))
    if isinstance(error.value, UserError):
        assert "No space left on device" in str(error.value)
        assert "needed; set HF_HOME to another place" in str(error.value)
        assert "\n" not in str(error.value)
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []
    assert weights(models.fetch_base_model(str(file))).keys() == weights(folder).keys()


@pytest.mark.parametrize("reads", [0, 1, 2])
def test_a_file_that_cannot_be_read_to_its_end_is_named(one_file, monkeypatch, tmp_path, reads):
    """Whenever that happens: while its content is hashed, or while the first or second model is read."""
    file, _ = one_file()
    opened, digest = single_file.safe_open, single_file.content_digest
    failure = OSError(errno.EIO, "Input/output error")

    class Failing:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            if name == "get_tensor" and reads == len(saved) + 1:
                raise failure
            return getattr(self.file, name)

    @contextlib.contextmanager
    def failing_open(path, framework):
        with opened(path, framework) as whole:
            yield Failing(whole)

    def failing_digest(path):
        if reads == 0:
            raise failure
        return digest(path)

    saved, save = [], single_file.save_file
    monkeypatch.setattr(single_file, "safe_open", failing_open)
    monkeypatch.setattr(single_file, "content_digest", failing_digest)
    monkeypatch.setattr(single_file, "save_file", lambda *args, **named: saved.append(save(*args, **named)))
    with pytest.raises(UserError, match=r"base model .* cannot be read as safetensors: .*Input/output error"):
        models.fetch_base_model(str(file))


def test_a_place_that_cannot_be_written_is_named(one_file, tmp_path):
    file, _ = one_file()
    (tmp_path / "cache").write_text("a file where the folder would be")
    with pytest.raises(UserError, match=r"cannot be written: .* bytes free, .* HF_HOME"):
        models.fetch_base_model(str(file))
