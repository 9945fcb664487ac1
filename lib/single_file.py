"""Converts a base model in one file, as download sites offer it, to a folder in diffusers' layout.

Such a file holds only the weights of UNet, VAE and text encoder, under the names of the original code. The configurations
and the tokenizer's vocabulary come from lib/base_models/. The folder is cached next to the hub's models (HF_HOME).
"""

import contextlib
import hashlib
import json
import re
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from filelock import FileLock
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from lib.adapters import some
from lib.cache import content_digest
from lib.errors import UserError, one_line
from lib.files import describe_content, flush, write_json

BASE_MODELS = Path(__file__).parent / "base_models"
CONFIGS = {version: BASE_MODELS / f"stable_diffusion_{version}" for version in (1, 2)}
MERGES = BASE_MODELS / "clip_merges.txt"  # CLIP's vocabulary, which the file does not hold
CONVERTER = "1"  # another number converts every file again
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
FIRST = f"{UNET}input_blocks.0.0.weight"
TEXT_KEYS = {
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": 1,
    "cond_stage_model.transformer.embeddings.position_embedding.weight": 1,  # as some tools rename it
    "cond_stage_model.model.positional_embedding": 2,
}
# Other kinds of models in one file, by the beginning of a key.
OTHERS = {
    "conditioner.embedders.": "Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "lora_": "a LoRA adapter",
    "unet.": "a LoRA adapter or a part of a model",
    "down_blocks.": "a UNet alone, in diffusers' layout",
    "control_model.": "a ControlNet",
}


def converted(path, say=print):
    """The folder in diffusers' layout of the base model in the safetensors file `path`.

    Raises UserError naming the file if it is damaged or not a whole Stable Diffusion 1.x or 2.x for text to image. If
    several processes start at once, the first one converts.
    """
    path = Path(path)
    with reading(path) as file:
        keys, header = set(file.keys()), file.metadata() or {}
        version = version_of(file, keys, path)
        check_last_noise(file, keys, header, path)
        digest = hashlib.sha256(f"{CONVERTER} {content_digest(path)}".encode()).hexdigest()[:16]
    if "v_pred" in keys:  # an empty tensor, the mark of ComfyUI and others
        header = {"modelspec.prediction_type": "v"} | header
    place = Path(constants.HF_HOME) / "single_files"
    folder = place / f"{path.stem}-{digest}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / f"{folder.name}.lock"):
            weights = list(folder.glob("*/*.safetensors"))  # some of which may have been deleted to free space
            if not (len(weights) == 3 and (folder / "model_index.json").is_file()):
                say(f"{path}: Stable Diffusion {version}.x in one file; converting it to {folder}, once")
                new = folder.with_name(f".{folder.name}.unfinished")
                try:
                    convert(path, new, version, header, say)
                    shutil.rmtree(folder, ignore_errors=True)
                    new.rename(folder)
                finally:
                    shutil.rmtree(new, ignore_errors=True)
    # safetensors raises its own error for a full disk.
    except (SafetensorError, OSError) as problem:
        there = next(parent for parent in (place, *place.parents) if parent.exists())
        raise UserError(
            f"{folder}, converted from base model {path}, cannot be written: {one_line(problem, 100)}; "
            f"{shutil.disk_usage(there).free:,} bytes free, about {path.stat().st_size:,} needed; set HF_HOME to another place"
        ) from None
    return folder


def check_last_noise(file, keys, header, path):
    """UserError if the model was trained with zero terminal SNR: a last timestep of noise alone. `check_base_model`
    refuses a folder whose scheduler states so."""
    marked = "ztsnr" in keys or header.get("ss_zero_terminal_snr", "").lower() == "true"
    signal = file.get_tensor("alphas_cumprod") if "alphas_cumprod" in keys else torch.ones(1)
    if marked or (signal.numel() and signal.flatten()[-1].abs() < 1e-4):  # Stable Diffusion's last value is 0.0047
        raise UserError(
            f"base model {path} was trained with zero terminal SNR, which the sampler does not have; supported are Stable "
            "Diffusion 1.x and 2.x with their own noise schedule"
        )


@contextlib.contextmanager
def reading(path):
    """An open safetensors file. Raises UserError naming it if it cannot be opened or, in the block, read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as problem:
        reason = describe_content(path) or one_line(problem, 100)
        raise UserError(f"base model {path} cannot be read as safetensors: {reason}") from None


def version_of(file, keys, path):
    """1 or 2. Raises UserError naming any other kind of model."""
    wanted = "supported are Stable Diffusion 1.x and 2.x for text to image, with VAE and text encoder"
    versions = [version for key, version in TEXT_KEYS.items() if key in keys]
    parts = {"UNet": UNET, "VAE": VAE, "text encoder": TEXT}
    missing = [name for name, start in parts.items() if not any(k.startswith(start) for k in keys)]
    other = next((kind for start, kind in OTHERS.items() if any(k.startswith(start) for k in keys)), None)
    if other and (missing or not versions):
        raise UserError(f"base model {path} is {other}; {wanted}")
    if missing or not versions or FIRST not in keys:
        content = f"no {', no '.join(missing)}" if missing else "another text encoder or UNet"
        raise UserError(f"base model {path} holds {content}; {wanted}")
    shape = file.get_slice(FIRST).get_shape()
    channels = shape[1] if len(shape) == 4 else 0
    own = json.loads((CONFIGS[versions[0]] / "unet/config.json").read_text(encoding="utf-8"))
    if channels != own["in_channels"]:
        kind = {9: "inpainting", 8: "editing", 5: "depth"}.get(channels, "something else")
        raise UserError(f"base model {path} is for {kind} ({channels} input channels); {wanted}")
    return versions[0]


def convert(path, new, version, header, say):
    """Writes the file's models, their configurations and the tokenizer into the folder `new`."""
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(CONFIGS[version], new)
    write_tokenizer(new / "tokenizer")
    for part, start in (("vae", VAE), ("text_encoder", TEXT), ("unet", UNET)):
        with reading(path) as file:  # and written outside: a failure to write is another error
            tensors = {k: file.get_tensor(k) for k in file.keys() if k.startswith(start)}
        tensors = renamed(part, tensors, new, path)
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save_file(tensors, new / part / f"{stem}.safetensors", metadata={"format": "pt"})
    scheduler = new / "scheduler/scheduler_config.json"
    predicts, evidence = prediction_type(new, header)
    say(f"{path}: predicts {'velocity' if predicts == 'v_prediction' else 'noise'} ({predicts}), {evidence}")
    write_json(scheduler, json.loads(scheduler.read_text(encoding="utf-8")) | dict(prediction_type=predicts))
    for place in (*new.rglob("*"), new):
        flush(place)


def empty_model(part, folder):
    """(a part of a base model's folder as a model without weights, its configuration)."""
    config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        if part == "text_encoder":
            return CLIPTextModel(CLIPTextConfig(**config)), config
        cls = UNet2DConditionModel if part == "unet" else AutoencoderKL
        return cls.from_config(config), config


def with_new_names(part, tensors, model, config):
    """(the tensors of one part under diffusers' names, the names that have no place there)."""
    if part == "unet":
        converted = convert_ldm_unet_checkpoint(tensors, config)
        # Each tensor has one place; diffusers ignores those that it does not know.
        used = {id(value) for value in converted.values()}
        return converted, sorted(name for name, value in tensors.items() if id(value) not in used)
    if part == "vae":
        return convert_ldm_vae_checkpoint(tensors, config), []
    if any(key.startswith("cond_stage_model.model.") for key in tensors):
        converted = convert_open_clip_checkpoint(model, tensors)
        converted.pop("text_projection.weight", None)
        return converted, []
    return convert_ldm_clip_checkpoint(tensors), []


def renamed(part, tensors, folder, path):
    """The tensors of one part under diffusers' names, with the shapes of the model in `folder`.

    Raises UserError naming the file `path` if any is missing, left over or has another shape.
    """
    model, config = empty_model(part, folder)
    try:
        tensors, unused = with_new_names(part, tensors, model, config)
    except Exception as problem:  # any error of diffusers in an unexpected file
        raise UserError(
            f"base model {path}: its {part} cannot be converted: {type(problem).__name__}: {one_line(problem, 120)}"
        ) from None
    tensors = {k: v for k, v in tensors.items() if not k.endswith("position_ids")}
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    if part == "text_encoder":
        # As in the hub's folders; transformers reads names with and without this level.
        tensors = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in tensors.items()}
        wanted = {f"text_model.{k.removeprefix('text_model.')}": s for k, s in wanted.items()}
    wrong = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "left over": sorted(tensors.keys() - wanted.keys()) + unused,
        "of another shape": sorted(k for k in wanted.keys() & tensors.keys() if tensors[k].shape != wanted[k]),
    }
    problems = [f"{len(names)} weights are {how} ({some(names)})" for how, names in wrong.items() if names]
    if problems:
        raise UserError(
            f"base model {path} does not have the {part} of a Stable Diffusion 1.x or 2.x: {'; '.join(problems)}"
        )
    return {name: value.contiguous() for name, value in tensors.items()}


# ---- the tokenizer -------------------------------------------------------------------------


def write_tokenizer(folder):
    """Writes CLIP's vocabulary into `folder`: vocab.json and merges.txt.

    The order of CLIP's merges gives its token ids: 256 bytes, the same bytes at the end of a word, a token for each merge,
    and the tokens for the start and the end of a text.
    """
    text = MERGES.read_text(encoding="utf-8")
    letters = [chr(b) for b in range(256) if chr(b).isprintable() and chr(b) not in " \xad"]
    letters += [chr(256 + n) for n in range(256 - len(letters))]
    words = letters + [f"{letter}</w>" for letter in letters]
    words += ["".join(line.split()) for line in text.splitlines()[1:]]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    write_json(folder / "vocab.json", {word: number for number, word in enumerate(words)})


# ---- noise or velocity ---------------------------------------------------------------------


def prediction_type(folder, header):
    """("epsilon" or "v_prediction", the evidence) for the base model in `folder`.

    Without modelspec.prediction_type in the file's header, the UNet's output for noise at the last timestep decides. The
    input is almost pure noise there. A model that predicts noise returns its input; one that predicts velocity returns
    minus the expected image, which does not resemble the noise.
    """
    stated = header.get("modelspec.prediction_type", "").lower()
    if re.fullmatch(r"v|v[-_]?pred(iction)?", stated):
        return "v_prediction", "as the file's header says"
    if stated in ("epsilon", "eps"):
        return "epsilon", "as the file's header says"
    cosine = cosine_with_noise(folder)
    kind = "epsilon" if cosine > 0.5 else "v_prediction"
    return kind, f"as its output for pure noise shows (cosine with the noise: {cosine:.3f})"


@torch.no_grad()
def cosine_with_noise(folder):
    """cos(noise, unet(noise)) at the last timestep, for the UNet in `folder`."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    last = DDPMScheduler.from_pretrained(folder / "scheduler").config.num_train_timesteps - 1
    noise = torch.randn(1, unet.config.in_channels, 32, 32, generator=torch.Generator().manual_seed(0))
    text = torch.zeros(1, 77, unet.config.cross_attention_dim)
    output = unet(noise, last, text).sample
    return torch.nn.functional.cosine_similarity(output.flatten(), noise.flatten(), dim=0).item()
