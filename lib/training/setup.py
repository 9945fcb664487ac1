"""From a base-model folder to what the loop needs: tokens, latents and the adapted models."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from lib import adapters
from lib.cache import first_process
from lib.config import half_resolution
from lib.dataset import Row
from lib.errors import UserError, memory_for
from lib.kernels import adamw8bit
from lib.kernels.channels_last import compile_models_ahead
from lib.models import load_part, loading
from lib.training.early_stopping import FEWEST_IMAGES
from lib.training.latents import Latents, encode_latents, kept_folder
from lib.training.micro_step import recomputed
from lib.training.parameters import add_lora_parameters
from lib.training.protected_prompts import read_protected
from lib.training.protection import Protection
from lib.training.samples import split

MAX_TOKENS = 77  # CLIP's text length, begin and end token included
CLOSE_OTHERS = "close what else uses the GPU (nvidia-smi lists it)"


# ---- captions --------------------------------------------------------------------------------------


def base_tokenizer(base_folder):
    with loading(base_folder / "tokenizer"):
        return CLIPTokenizer.from_pretrained(base_folder / "tokenizer")


def caption_tokens(base_folder, data, prompts, truncate=False):
    """(token ids of the captions, int64 [n, 77]; those of the empty prompt, [1, 77]).

    Raises UserError for a caption or preview prompt of more than 77 tokens, unless `truncate` cuts it off.
    """
    tokenizer = base_tokenizer(base_folder)
    if prompts:
        tokenize(tokenizer, [Row("a preview", prompt, None, None) for prompt in prompts], truncate)
    return tokenize(tokenizer, data, truncate), prompt_ids(tokenizer, [""])


def tokenize(tokenizer, data, truncate=False):
    """Token ids of the captions, int64 [n, 77]; UserError naming all that are too long, or, with `truncate`, a note."""
    lengths = {}  # each caption once, however many images have it
    for caption in dict.fromkeys(row.caption for row in data):
        lengths[caption] = len(tokenizer(caption, verbose=False).input_ids)
    long = [row for row in data if lengths[row.caption] > MAX_TOKENS]
    names = ", ".join(f"{row.name} ({lengths[row.caption]})" for row in long)
    if long and not truncate:
        what = f"the caption of {names} is" if len(long) == 1 else f"{len(long)} captions, {names}, are"
        raise UserError(
            f"{what} too long: CLIP reads {MAX_TOKENS} tokens, begin and end included; shorten "
            f"“{long[0].caption[:60]}…”{' and the others' if long[1:] else ''}, or add --truncate-captions"
        )
    if long and first_process():
        print(f"note: of {len(long)} captions only the first {MAX_TOKENS} tokens are read: {names}")
    return prompt_ids(tokenizer, [row.caption for row in data])


def prompt_ids(tokenizer, prompts):
    """Token ids of prompts, int64 [n, 77], truncated there, as programs that generate images do."""
    return tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def encode_captions(text_encoder, input_ids, at_once=64):
    """(states, which): the text encoder's output for each distinct row of token ids [n, 77], [distinct, 77, d], and
    each row's index into it, int64 [n]. Both are on its device.

    Captions are encoded `at_once` at a time: all those of a large data set would need more memory than training.
    """
    distinct, which = input_ids.to(text_encoder.device).unique(dim=0, return_inverse=True)
    states = [text_encoder(ids)[0] for ids in distinct.split(at_once)]
    return torch.cat(states), which


def text_states(text_encoder, input_ids, trained, say):
    """A function from data-set indices [batch] to hidden states [batch, 77, d].

    A text encoder in training computes them each time. The output of a frozen one is cached, and the model freed.
    """
    if trained:
        input_ids = input_ids.to(text_encoder.device)
        return lambda indices: text_encoder(input_ids[indices])[0]
    with memory_for("encoding the captions", f"{CLOSE_OTHERS}, or give the images fewer different captions"):
        states, caption_of = encode_captions(text_encoder, input_ids)
    say("text_encoder: frozen; its output is cached and the model freed")
    return lambda indices: states[caption_of[indices]]


# ---- images ----------------------------------------------------------------------------------------


def divided(config, images, say):
    """(train_indices, held_out) of `images` images, with a line on the console (see `split`); `config` is train.py's."""
    validation_count = config["validation_count"]
    train_indices, held_out = split(images, validation_count, config["seed"])
    if config["stop_early"] and len(held_out) < FEWEST_IMAGES:
        raise UserError(
            f"stop_early needs {FEWEST_IMAGES} held-out images, but of {images} images {len(held_out)} are held out "
            f"(validation_count is {validation_count}, a quarter at most); add --no-stop-early, more images, or a larger "
            "--validation-count"
        )
    say(f"{config['data_dir']}: {len(train_indices)} images to train on, {len(held_out)} held out")
    if len(held_out) < validation_count:
        rest = "" if len(held_out) else "; there will be no validation loss"
        say(f"note: not {validation_count}, because at most a quarter of the images is held out{rest}")
    return train_indices, held_out


def image_latents(base_folder, data, dtype, accelerator):
    """The Latents of a Dataset: those in its cache, and the others encoded by the VAE, which is loaded for that alone.

    The first process encodes and writes. The others wait and read.
    """
    device, first = accelerator.device, accelerator.is_main_process
    if not first:
        accelerator.wait_for_everyone()
    latents = Latents(data, kept_folder(data, base_folder / "vae", dtype, device))
    if missing := latents.missing:
        vae = load_part(AutoencoderKL, base_folder, "vae", dtype).to(device)
        advice = f"--resolution {half_resolution(data.resolution)} needs a quarter"
        with memory_for("encoding the images", advice):
            latents.add(encode_latents(vae, data, missing, device), write=first)
    if first:
        accelerator.wait_for_everyone()
    return latents


# ---- models ----------------------------------------------------------------------------------------


@dataclass
class AdaptedModels:
    """The base model with an adapter in it."""

    unet: UNet2DConditionModel
    scheduler: DDPMScheduler  # adds noise as in the base model's training
    texts: Callable  # data-set indices [batch] -> hidden states [batch, 77, d]
    no_text: (
        torch.Tensor | None
    )  # the base model's hidden states of the empty prompt [1, 77, d], if the loss needs them
    trained: dict  # {component: LoraParameters}
    protection: Protection | None


def begin_kernels(base_folder, data, config, dtype, device):
    """Begin to compile the kernels that train.py's `config` needs for the Dataset (lib/kernels/compile_ahead.py)."""
    parts = {"unet": True} | ({"text_encoder": True} if config["train_text_encoder"] else {})
    parts |= {"vae": False} if config["preview_every"] else {}
    checks = [adamw8bit.missing_kernels]
    compile_models_ahead(base_folder, parts, dtype, device, data.sizes, config["batch_size"], checks)


def noise_scheduler(base_folder):
    with loading(base_folder / "scheduler"):
        return DDPMScheduler.from_pretrained(base_folder / "scheduler")


def recompute_large_maps(unet):
    """Gradient checkpointing for the blocks of `unet` that work on its larger feature maps.

    Small maps are excluded. Their activations need little memory, and recomputing them takes nearly as long as for
    large maps, because the time of a kernel hardly depends on the size of a small map.
    """
    unet.enable_gradient_checkpointing(recomputed)
    sizes = len(unet.down_blocks)
    large = (sizes + 1) // 2
    small = *unet.down_blocks[large:], unet.mid_block, *unet.up_blocks[: sizes - large]
    for block in filter(None, small):  # a small Stable Diffusion has none in the middle
        for module in block.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


def adapted_models(base_folder, tokens, protected, config, dtype, device, say):
    """The AdaptedModels that train.py's `config` trains.

    `tokens` are from `caption_tokens`, `protected` is ProtectedPrompts or None; `dtype` is what the models compute in.
    """
    input_ids, no_text_ids = tokens
    scheduler = noise_scheduler(base_folder)
    unet = load_part(UNet2DConditionModel, base_folder, "unet", dtype)
    text_encoder = load_part(CLIPTextModel, base_folder, "text_encoder", dtype).to(device)
    text_encoder.requires_grad_(False)
    if config["gradient_checkpointing"]:
        recompute_large_maps(unet)
    guided = tuple(config["loss_guidance_scale"]) != (1, 1)
    no_text = encode_captions(text_encoder, no_text_ids)[0] if guided else None
    protection = None
    if protected:
        say(protected.text())
        protection = make_protection(text_encoder, base_folder, protected, config)
        say(protection.table())
        protection.check()
    torch.manual_seed(config["seed"])  # LoRA's A starts as noise, sampled on the CPU: the same everywhere
    models = {"unet": unet} | ({"text_encoder": text_encoder} if config["train_text_encoder"] else {})
    trained = {name: add_adapter(name, model, protection, config, dtype, device) for name, model in models.items()}
    for name, part in trained.items():
        frozen = sum(p.numel() for p in part.model.parameters()) - part.flat.numel()
        kind, rate = "DoRA" if config["dora"] else "LoRA", part.learning_rate
        say(f"{name}: {part.flat.numel():,} trainable {kind} parameters, {frozen:,} frozen, learning rate {rate:g}")
    texts = text_states(text_encoder, input_ids, "text_encoder" in trained, say)
    return AdaptedModels(unet, scheduler, texts, no_text, trained, protection)


def add_adapter(name, model, protection, config, dtype, device):
    """The LoraParameters of the component `name`, "unet" or "text_encoder", with `config`'s rank, alpha and layers."""
    rate, targets = config[f"{name}_learning_rate"], config[f"{name}_targets"]
    projections = protection and protection.of([layer for layer, _ in adapters.target_layers(model, targets)])
    rank, alpha, dora = config["rank"], config["alpha"], config["dora"]
    return add_lora_parameters(model, rank, alpha, targets, rate, device, dtype, dora, projections)


# ---- protection ------------------------------------------------------------------------------------


def protected_prompts(data, config):
    """The ProtectedPrompts that train.py's `config` names, or None."""
    if config["protected_prompts"] is None:
        return None
    captions = [caption for caption, _ in Counter(row.caption for row in data).most_common()]
    return read_protected(config["protected_prompts"], config["protected_class"], captions)


def make_protection(text_encoder, base_folder, protected, config):
    """The Protection of the layers that train.py's `config` adapts, computed from the unadapted `text_encoder`."""
    targets = config["text_encoder_targets"] if config["train_text_encoder"] else ()
    layers = [name for name, _ in adapters.target_layers(text_encoder, targets)]
    ids = functools.partial(prompt_ids, base_tokenizer(base_folder))
    with memory_for("encoding the protected prompts", CLOSE_OTHERS):
        return Protection(text_encoder, layers, ids, protected, config["protection_ridge"])
