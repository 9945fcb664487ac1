"""A base model in one file, as download sites give it, turned into a folder in diffusers' layout.

Such a file holds the weights of UNet, VAE and text encoder under the names of the original code, and
nothing else: the configurations and the tokenizer's vocabulary come from lib/base_models/. The folder
is made once and kept beside the hub's models (HF_HOME), so that a file is read like any other model.
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
MERGES = BASE_MODELS / "clip_merges.txt"  # CLIP's vocabulary, of which the file has only the size
CONVERTER = "1"  # another number makes every folder anew
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
FIRST = f"{UNET}input_blocks.0.0.weight"
TEXT_KEYS = {
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": 1,
    "cond_stage_model.transformer.embeddings.position_embedding.weight": 1,  # as some tools rewrite it
    "cond_stage_model.model.positional_embedding": 2,
}
# What else comes in one file, and a key by which it is known.
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

    Raises UserError naming the file if it is damaged or no whole Stable Diffusion 1.x or 2.x for
    text to image. Several processes may ask at once: the first one converts.
    """
    path, place = Path(path), Path(constants.HF_HOME) / "single_files"
    with reading(path) as file:
        keys, header = set(file.keys()), file.metadata() or {}
        version = version_of(file, keys, path)
        check_last_noise(file, keys, header, path)
        folder = place / f"{path.stem}-{file_digest(path)}"
    if "v_pred" in keys:  # an empty tensor, as ComfyUI and others mark it
        header = {"modelspec.prediction_type": "v"} | header
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / f"{folder.name}.lock"):
            weights = list(folder.glob("*/*.safetensors"))  # of which someone may have made room
            if not (len(weights) == 3 and (folder / "model_index.json").is_file()):
                say(f"{path}: Stable Diffusion {version}.x in one file; making {folder} of it, once")
                new = folder.with_name(f".{folder.name}.unfinished")
                try:
                    convert(path, new, version, header, say)
                    shutil.rmtree(folder, ignore_errors=True)
                    new.rename(folder)
                finally:
                    shutil.rmtree(new, ignore_errors=True)
    # safetensors has an error of its own for a full disk.
    except (SafetensorError, OSError) as problem:
        there = next(parent for parent in (place, *place.parents) if parent.exists())
        raise UserError(
            f"{folder}, made of the base model {path}, cannot be written: {one_line(problem, 100)}; "
            f"{shutil.disk_usage(there).free:,} bytes free, about {path.stat().st_size:,} needed; HF_HOME names another place"
        ) from None
    return folder


def check_last_noise(file, keys, header, path):
    """UserError if a model was trained with a last timestep that is noise alone (zero terminal SNR), as a folder's
    scheduler is refused that says so."""
    marked = "ztsnr" in keys or header.get("ss_zero_terminal_snr", "").lower() == "true"
    kept = file.get_tensor("alphas_cumprod") if "alphas_cumprod" in keys else torch.ones(1)
    if marked or (kept.numel() and kept.flatten()[-1].abs() < 1e-4):  # Stable Diffusion's is 0.0047
        raise UserError(
            f"base model {path} was trained with zero terminal SNR, which the scheduler that draws does not have; "
            "supported are Stable Diffusion 1.x and 2.x with their own noise"
        )


@contextlib.contextmanager
def reading(path):
    """A safetensors file, opened; an error while it is opened or read becomes one line that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as problem:
        reason = describe_content(path) or one_line(problem, 100)
        raise UserError(f"base model {path} cannot be read as safetensors: {reason}") from None


def file_digest(path):
    """16 hex digits by which a file is known: of its content and of how it is converted."""
    return hashlib.sha256(f"{CONVERTER} {content_digest(path)}".encode()).hexdigest()[:16]


def version_of(file, keys, path):
    """1 or 2; UserError naming what the file holds instead."""
    wanted = "wanted is Stable Diffusion 1.x or 2.x for text to image, with its VAE and its text encoder"
    versions = [version for key, version in TEXT_KEYS.items() if key in keys]
    parts = {"UNet": UNET, "VAE": VAE, "text encoder": TEXT}
    missing = [name for name, start in parts.items() if not any(k.startswith(start) for k in keys)]
    other = next((kind for start, kind in OTHERS.items() if any(k.startswith(start) for k in keys)), None)
    if other and (missing or not versions):
        raise UserError(f"base model {path} is {other}; {wanted}")
    if missing or not versions or FIRST not in keys:
        what = f"no {', no '.join(missing)}" if missing else "another text encoder or UNet"
        raise UserError(f"base model {path} holds {what}; {wanted}")
    shape = file.get_slice(FIRST).get_shape()
    channels = shape[1] if len(shape) == 4 else 0
    own = json.loads((CONFIGS[versions[0]] / "unet/config.json").read_text(encoding="utf-8"))
    if channels != own["in_channels"]:
        kind = {9: "inpainting", 8: "editing", 5: "depth"}.get(channels, "something else")
        raise UserError(f"base model {path} is made for {kind} ({channels} input channels); {wanted}")
    return versions[0]


def convert(path, new, version, header, say):
    """Write the file's models, their configurations and the tokenizer into the folder `new`."""
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(CONFIGS[version], new)
    write_tokenizer(new / "tokenizer")
    for part, start in (("vae", VAE), ("text_encoder", TEXT), ("unet", UNET)):
        with reading(path) as file:
            tensors = {k: file.get_tensor(k) for k in file.keys() if k.startswith(start)}
        tensors = renamed(part, tensors, new, path)
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save_file(tensors, new / part / f"{stem}.safetensors", metadata={"format": "pt"})
    scheduler = new / "scheduler/scheduler_config.json"
    predicts, why = prediction_type(new, header)
    say(f"{path}: predicts {'velocity' if predicts == 'v_prediction' else 'noise'} ({predicts}), {why}")
    known = json.loads(scheduler.read_text(encoding="utf-8"))
    write_json(scheduler, known | dict(prediction_type=predicts))
    for place in (*new.rglob("*"), new):
        flush(place)


def empty_model(part, folder):
    """The model of one part of a base-model folder, without weights."""
    config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        if part == "text_encoder":
            return CLIPTextModel(CLIPTextConfig(**config)), config
        cls = UNet2DConditionModel if part == "unet" else AutoencoderKL
        return cls.from_config(config), config


def with_new_names(part, tensors, model, config):
    """(the tensors of one part under diffusers' names, what has no place there)."""
    if part == "unet":
        found = convert_ldm_unet_checkpoint(tensors, config)
        # Each has one place; diffusers passes over those that it does not know.
        used = {id(value) for value in found.values()}
        return found, sorted(name for name, value in tensors.items() if id(value) not in used)
    if part == "vae":
        return convert_ldm_vae_checkpoint(tensors, config), []
    if any(key.startswith("cond_stage_model.model.") for key in tensors):
        found = convert_open_clip_checkpoint(model, tensors)
        found.pop("text_projection.weight", None)
        return found, []
    return convert_ldm_clip_checkpoint(tensors), []


def renamed(part, tensors, folder, path):
    """The tensors of one part under diffusers' names, each of the shape that the model in `folder` has.

    Raises UserError naming the file `path` if any is missing, left over or of another shape.
    """
    model, config = empty_model(part, folder)
    try:
        found, unused = with_new_names(part, tensors, model, config)
    except Exception as problem:  # whatever diffusers meets in a file that is not what it seems
        raise UserError(
            f"base model {path}: its {part} cannot be converted: {type(problem).__name__}: {one_line(problem, 120)}"
        ) from None
    found = {k: v for k, v in found.items() if not k.endswith("position_ids")}
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    if part == "text_encoder":
        # As the hub's folders have it; transformers takes it with this level and without.
        found = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in found.items()}
        wanted = {f"text_model.{k.removeprefix('text_model.')}": s for k, s in wanted.items()}
    wrong = {
        "missing": sorted(wanted.keys() - found.keys()),
        "left over": sorted(found.keys() - wanted.keys()) + unused,
        "of another shape": sorted(k for k in wanted.keys() & found.keys() if found[k].shape != wanted[k]),
    }
    told = [f"{len(names)} weights are {what} ({some(names)})" for what, names in wrong.items() if names]
    if told:
        raise UserError(f"base model {path} has not the {part} of a Stable Diffusion 1.x or 2.x: {'; '.join(told)}")
    return {name: value.contiguous() for name, value in found.items()}


# ---- the tokenizer -------------------------------------------------------------------------


def write_tokenizer(folder):
    """CLIP's vocabulary into `folder`: vocab.json and merges.txt.

    The numbers of CLIP's tokens follow from the order of its merges: 256 bytes, the same at the end
    of a word, a token for each merge, and the two that begin and end a text.
    """
    text = MERGES.read_text(encoding="utf-8")
    letters = [chr(b) for b in range(256) if chr(b).isprintable() and chr(b) not in " \xad"]
    letters += [chr(256 + n) for n in range(256 - len(letters))]
    words = letters + [f"{letter}</w>" for letter in letters]
    words += ["".join(line.split()) for line in text.splitlines()[1:]]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    folder.mkdir(exist_ok=True)
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    write_json(folder / "vocab.json", vocabulary)


# ---- noise or velocity ---------------------------------------------------------------------


def prediction_type(folder, header):
    """("epsilon" or "v_prediction", how it is known) of the base model in `folder`.

    A file says nothing of it, unless its header holds modelspec.prediction_type. It shows in the
    answer to noise at the last timestep, where next to nothing else is in the input: a model that
    predicts the noise gives the input back, one that predicts velocity gives minus the image that
    it expects, which the noise does not resemble.
    """
    stated = header.get("modelspec.prediction_type", "").lower()
    if re.fullmatch(r"v|v[-_]?pred(iction)?", stated):
        return "v_prediction", "as the file's header says"
    if stated in ("epsilon", "eps"):
        return "epsilon", "as the file's header says"
    cosine = answer_to_noise(folder)
    kind = "epsilon" if cosine > 0.5 else "v_prediction"
    return kind, f"as its answer to pure noise shows, whose cosine with the noise is {cosine:.3f}"


@torch.no_grad()
def answer_to_noise(folder):
    """The cosine between noise and what the UNet in `folder` makes of it at the last timestep."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    last = DDPMScheduler.from_pretrained(folder / "scheduler").config.num_train_timesteps - 1
    noise = torch.randn(1, unet.config.in_channels, 32, 32, generator=torch.Generator().manual_seed(0))
    text = torch.zeros(1, 77, unet.config.cross_attention_dim)
    answer = unet(noise, last, text).sample
    return torch.nn.functional.cosine_similarity(answer.flatten(), noise.flatten(), dim=0).item()
