"""From a base-model folder to what the loop needs: latents, the adapted models, texts."""

import functools
from collections import Counter

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from lib import adapters
from lib.config import half_resolution
from lib.dataset import Row
from lib.errors import memory_for
from lib.models import load_part, loading
from lib.training.latents import Latents, encode_latents, kept_folder
from lib.training.micro_step import recomputed
from lib.training.parameters import add_lora_parameters
from lib.training.protected_prompts import read_protected
from lib.training.protection import Protection
from lib.training.samples import MAX_TOKENS, encode_captions, split, tokenize


def caption_tokens(base_folder, data, prompts, truncate=False):
    """(token ids of the images' captions, int64 [n, 77], and those of no text [1, 77]).

    UserError if a caption, or one of the `prompts` of the previews, is too long, unless `truncate` cuts it off.
    """
    tokenizer = base_tokenizer(base_folder)
    if prompts:
        rows = [Row("a preview", prompt, None, None) for prompt in prompts]
        tokenize(tokenizer, rows, truncate)
    return tokenize(tokenizer, data, truncate), prompt_ids(tokenizer, [""])


def base_tokenizer(base_folder):
    with loading(base_folder / "tokenizer"):
        return CLIPTokenizer.from_pretrained(base_folder / "tokenizer")


def prompt_ids(tokenizer, prompts):
    """Token ids of prompts, int64 [n, 77], cut at that length, as programs that draw do."""
    return tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids


def protected_prompts(data, config):
    """The ProtectedPrompts that `config`, train.py's, names, or None."""
    if config["protected_prompts"] is None:
        return None
    captions = [caption for caption, _ in Counter(row.caption for row in data).most_common()]
    return read_protected(config["protected_prompts"], config["protected_class"], captions)


def divided(data_dir, pictures, validation_count, seed, say):
    """(train_indices, held_out) of so many images, and says how many that are; see `split`."""
    train_indices, held_out = split(pictures, validation_count, seed)
    say(f"{data_dir}: {len(train_indices)} images to train on, {len(held_out)} held out")
    if len(held_out) < validation_count:
        say(
            f"note: not {validation_count}, as at most a quarter of the images is held out"
            + ("" if len(held_out) else "; there will be no validation loss")
        )
    return train_indices, held_out


def noise_scheduler(base_folder):
    """The scheduler that adds noise as the base model was trained with."""
    with loading(base_folder / "scheduler"):
        return DDPMScheduler.from_pretrained(base_folder / "scheduler")


def image_latents(base_folder, data, dtype, accelerator):
    """The Latents of a Dataset's images: those that were kept, and of the others what the VAE, which is needed
    for this alone and not kept, makes of them. Of several processes the first encodes and writes."""
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


def recompute_large_maps(unet):
    """Compute the larger half of a UNet's sizes of maps again for the backward pass. The smaller ones take little
    memory and much time: what a kernel takes hardly depends on the size of small maps."""
    unet.enable_gradient_checkpointing(recomputed)
    sizes = len(unet.down_blocks)
    large = (sizes + 1) // 2
    small = *unet.down_blocks[large:], unet.mid_block, *unet.up_blocks[: sizes - large]
    for block in filter(None, small):  # a small Stable Diffusion has none in the middle
        for module in block.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


def adapted_models(base_folder, input_ids, no_text, protected, config, dtype, device, say):
    """(unet, texts, no_text_states, trained, protection): the UNet; a function from data-set indices [batch] to hidden
    states [batch, 77, d]; the base model's hidden states of no text [1, 77, d], None if the loss does not need them;
    {component: LoraParameters} of what `config`, train.py's, trains; and its Protection, None without `protected`.

    `dtype` is what the models compute with, `input_ids` [n, 77] are the captions, `no_text` [1, 77] the empty one.
    """
    unet = load_part(UNet2DConditionModel, base_folder, "unet", dtype)
    text_encoder = load_part(CLIPTextModel, base_folder, "text_encoder", dtype).to(device)
    text_encoder.requires_grad_(False)
    if config["gradient_checkpointing"]:
        recompute_large_maps(unet)
    no_text_states = None
    if tuple(config["loss_guidance_scale"]) != (1, 1):
        no_text_states = encode_captions(text_encoder, no_text)[0]
    protection = None
    if protected:
        protection = make_protection(text_encoder, base_folder, protected, config)
        say(protection.table())
        protection.check()
    torch.manual_seed(config["seed"])  # LoRA's A starts as noise, on the CPU, the same everywhere
    trained = {}
    for name, model in {"unet": unet, "text_encoder": text_encoder}.items():
        if name == "text_encoder" and not config["train_text_encoder"]:
            continue
        rate, targets = config[f"{name}_learning_rate"], config[f"{name}_targets"]
        names = [layer for layer, _ in adapters.target_layers(model, targets)]
        projections = protection and protection.of(names)
        trained[name] = part = add_lora_parameters(
            model, config["rank"], config["alpha"], targets, rate, device, dtype, config["dora"], projections
        )
        frozen = sum(p.numel() for p in model.parameters()) - part.flat.numel()
        say(
            f"{name}: {part.flat.numel():,} trainable {'DoRA' if config['dora'] else 'LoRA'} parameters, {frozen:,} frozen, "
            f"learning rate {rate:g}"
        )
    texts = encoded_captions(text_encoder, input_ids, "text_encoder" in trained, say)
    return unet, texts, no_text_states, trained, protection


def encoded_captions(text_encoder, input_ids, trained, say):
    """The `texts` of `adapted_models`: of a text encoder that is trained computed each time, else once."""
    if trained:
        input_ids = input_ids.to(text_encoder.device)
        return lambda indices: text_encoder(input_ids[indices])[0]
    advice = "close what else uses the GPU (nvidia-smi lists it), or give the images fewer different captions"
    with memory_for("encoding the captions", advice):
        states, caption_of = encode_captions(text_encoder, input_ids)
    say("text_encoder: frozen; its output is kept and the model dropped")
    return lambda indices: states[caption_of[indices]]


def make_protection(text_encoder, base_folder, protected, config):
    """The Protection of what `config`, train.py's, adapts, from `text_encoder` as it is before."""
    targets = config["text_encoder_targets"] if config["train_text_encoder"] else ()
    layers = [name for name, _ in adapters.target_layers(text_encoder, targets)]
    ids = functools.partial(prompt_ids, base_tokenizer(base_folder))
    advice = "close what else uses the GPU (nvidia-smi lists it)"
    with memory_for("encoding the protected prompts", advice):
        return Protection(text_encoder, layers, ids, protected, config["protection_ridge"])
