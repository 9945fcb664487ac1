"""From a base-model folder to what the loop needs: latents, the adapted models, texts."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from lib.config import half_resolution
from lib.dataset import Row
from lib.errors import UserError, memory_for
from lib.kernels.lora import without_lora
from lib.models import load_part, loading
from lib.training.latents import Latents, encode_latents, kept_folder
from lib.training.losses import Preservation
from lib.training.micro_step import recomputed
from lib.training.parameters import add_lora_parameters
from lib.training.samples import encode_captions, split, tokenize


def caption_tokens(base_folder, data, config, prompts):
    """Token ids of the pictures' captions, then of those that `config`, train.py's, says are to be
    preserved: int64 [n + m, 77].

    UserError if one of them, or of the `prompts` of the previews, is too long, or one both taught and preserved.
    """
    with loading(base_folder / "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(base_folder / "tokenizer")
    if prompts:
        rows = [Row("a preview", prompt, None, None) for prompt in prompts]
        tokenize(tokenizer, rows, config["truncate_captions"])
    preserved = config["preservation_captions"] if config["preservation_weight"] else ()
    for row in data:
        if row.caption in preserved:
            raise UserError(f"«{row.caption}», the caption of {row.name}, is one of the preservation_captions too; "
                            "a caption cannot be both taught and preserved: remove it there")  # fmt: skip
    others = [Row("preservation_captions", caption, None, None) for caption in preserved]
    return tokenize(tokenizer, [*data, *others], config["truncate_captions"])


def divided(data_dir, pictures, validation_count, seed, say):
    """(train_indices, held_out) of so many pictures, and says how many that are; see `split`."""
    train_indices, held_out = split(pictures, validation_count, seed)
    say(f"{data_dir}: {len(train_indices)} pictures to train on, {len(held_out)} held out")
    if len(held_out) < validation_count:
        say(f"note: not {validation_count}, as at most a quarter of the pictures is held out"
            + ("" if len(held_out) else "; there will be no validation loss"))  # fmt: skip
    return train_indices, held_out


def noise_scheduler(base_folder):
    """The scheduler that adds noise as the base model was trained with."""
    with loading(base_folder / "scheduler"):
        return DDPMScheduler.from_pretrained(base_folder / "scheduler")


def picture_latents(base_folder, data, dtype, accelerator):
    """The Latents of a Dataset's pictures: those that were kept, and of the others what the VAE, which is needed
    for this alone and not kept, makes of them. Of several processes the first encodes and writes."""
    device, first = accelerator.device, accelerator.is_main_process
    if not first:
        accelerator.wait_for_everyone()
    latents = Latents(data, kept_folder(data, base_folder / "vae", dtype, device))
    if missing := latents.missing:
        vae = load_part(AutoencoderKL, base_folder, "vae", dtype).to(device)
        advice = f"--resolution {half_resolution(data.resolution)} needs a quarter"
        with memory_for("encoding the pictures", advice):
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


def adapted_models(base_folder, input_ids, config, dtype, device, say):
    """(unet, texts, trained, preservation): the UNet; a function from data-set indices [batch] to hidden
    states [batch, 77, d]; {component: LoraParameters} of what `config`, train.py's, trains; and its
    Preservation, or None.

    `dtype` is what the models compute with, `input_ids` [n + m, 77] are the captions of the pictures and
    of the preservation.
    """
    unet = load_part(UNet2DConditionModel, base_folder, "unet", dtype)
    text_encoder = load_part(CLIPTextModel, base_folder, "text_encoder", dtype)
    text_encoder.requires_grad_(False)
    if config["gradient_checkpointing"]:
        recompute_large_maps(unet)
    torch.manual_seed(config["seed"])  # LoRA's A starts as noise, on the CPU, the same everywhere
    trained = {}
    for name, model in {"unet": unet, "text_encoder": text_encoder}.items():
        if name == "text_encoder" and not config["train_text_encoder"]:
            continue
        rate = config[f"{name}_learning_rate"]
        trained[name] = part = add_lora_parameters(
            model,
            config["rank"],
            config["alpha"],
            config[f"{name}_targets"],
            rate,
            device,
            dtype,
            config["dora"],
        )
        frozen = sum(p.numel() for p in model.parameters()) - part.flat.numel()
        say(f"{name}: {part.flat.numel():,} trainable {'DoRA' if config['dora'] else 'LoRA'} parameters, {frozen:,} frozen, "
            f"learning rate {rate:g}")  # fmt: skip
    preservation = None
    if config["preservation_weight"]:
        count, text_encoder = len(config["preservation_captions"]), text_encoder.to(device)
        with without_lora(text_encoder):
            states, caption_of = encode_captions(text_encoder, input_ids[-count:])
        preservation = Preservation(
            config["preservation_weight"], config["preservation_every"],
            config["preservation_per_picture"], len(input_ids) - count, states[caption_of],
        )  # fmt: skip
    if "text_encoder" in trained:
        input_ids = input_ids.to(device)
        return unet, lambda indices: text_encoder(input_ids[indices])[0], trained, preservation
    advice = "close what else uses the GPU (nvidia-smi lists it), or give the pictures fewer different captions"
    with memory_for("encoding the captions", advice):
        states, caption_of = encode_captions(text_encoder.to(device), input_ids)
    say("text_encoder: frozen; its output is kept and the model dropped")
    return unet, lambda indices: states[caption_of[indices]], trained, preservation
