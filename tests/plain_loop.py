#!/usr/bin/env python3
"""The published study's training settings as a plain loop: what train.py's numbers and its speed are
compared with, by tests/test_fast_path.py and bench/train_speed.py.

    python tests/plain_loop.py --base-model FOLDER --max-steps 80
    python tests/plain_loop.py --demo --max-steps 80

Everything in float32 under autocast, the VAE at every step, PEFT's layers, an optimizer over some 300
separate tensors, gradient checkpointing. It takes train.py's options for the model, the images, LoRA,
the optimizer, the loss' guidance and precision; its batch is one image. It trains on the same images in
the same order with the same noise, prints the median time of a step, and saves nothing.
"""

import copy
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bitsandbytes
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

import train
from lib import adapters
from lib.config import parse_config
from lib.dataset import read_dataset
from lib.errors import run_script
from lib.kernels import fused_projections, lora
from lib.models import fetch_base_model, load_part
from lib.training import samples
from lib.training.setup import prompt_ids

WARM_UP = 20  # steps whose time does not count


def in_order_of_the_vector(model, dora):
    """What is trained of `model`, in the order of train.py's vector: that of a copy that is fused."""
    fused = copy.deepcopy(model)
    fused_layers = lora.fuse_lora(fused, fused_projections.fuse_projections(fused, "cpu", dora), "cpu")
    names = {id(weight): name for name, weight in fused.named_parameters()}
    weights = dict(model.named_parameters())
    return [weights[names[id(weight)]] for weight in lora.trained_weights(fused_layers)]


def projected(model, projections):
    """Let the LoRA layers of `model` compute with A P, P symmetric: `projections` are {layer: P, [in, in]}."""
    for name, layer in adapters.lora_layers(model).items():
        layer.lora_A["default"].register_forward_pre_hook(lambda module, inputs, p=projections[name]: inputs[0] @ p)


def plain_loop(config, one_vector=False, projections=None):
    """Train; returns (losses, {name: weight}, seconds of each step).

    `projections` are {component: {layer: P}} of what is protected; the weights then are A P and B.
    With `one_vector` the optimizer works on one vector a model as train.py's does, because the
    blocks of an 8-bit state, and so its rounding, depend on where tensors begin.
    """
    rows = read_dataset(config["data_dir"], config["resolution"])
    folder = fetch_base_model(config["base_model"])
    on_cuda = torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision=config["mixed_precision"] if on_cuda else "no", cpu=not on_cuda)
    device = accelerator.device
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    input_ids = samples.tokenize(tokenizer, rows).to(device)
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    vae = load_part(AutoencoderKL, folder, "vae", torch.float32).to(device)
    unet = load_part(UNet2DConditionModel, folder, "unet", torch.float32)
    text_encoder = load_part(CLIPTextModel, folder, "text_encoder", torch.float32).to(device)
    base, guidance_range = None, tuple(config["loss_guidance_scale"])
    if guidance_range != (1, 1):
        base = copy.deepcopy(unet).to(device)
        with torch.no_grad():
            no_text = text_encoder(prompt_ids(tokenizer, [""]).to(device))[0]
    torch.manual_seed(config["seed"])
    models = {"unet": unet}
    if config["train_text_encoder"]:
        models["text_encoder"] = text_encoder
    vae.requires_grad_(False)
    text_encoder.requires_grad_(False)
    groups, sources = [], []
    for name, model in models.items():
        model.requires_grad_(False)
        adapters.add_lora(model, config["rank"], config["alpha"], config[f"{name}_targets"], config["dora"])
        model.to(device).train()
        if projections:
            projected(model, projections[name])
        weights = [p for p in model.parameters() if p.requires_grad]
        if one_vector:  # in the order of train.py's vector
            sources.append(in_order_of_the_vector(model, config["dora"]))
            vector = torch.cat([w.detach().flatten() for w in sources[-1]])
            weights = [torch.nn.Parameter(vector)]
        groups.append(dict(params=weights, lr=config[f"{name}_learning_rate"]))
    if config["gradient_checkpointing"]:
        unet.enable_gradient_checkpointing()
    optimizer = accelerator.prepare(
        bitsandbytes.optim.AdamW8bit(
            groups, betas=(config["adam_beta1"], config["adam_beta2"]), weight_decay=config["adam_weight_decay"]
        )
    )
    rates = [group["lr"] for group in groups]

    held_out = np.random.default_rng([config["seed"], samples.HELD_OUT]).permutation(len(rows))
    pictures = np.setdiff1d(np.arange(len(rows)), held_out[: config["validation_count"]])
    losses, seconds = [], []
    for step in tqdm(range(config["max_steps"]), desc="plain loop", unit="step"):
        started = time.perf_counter()
        factor = train.learning_rate_factor(step, config["max_steps"], config["warmup_steps"])
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        epoch, place = divmod(step, len(pictures))
        picture = pictures[samples.epoch_order(config["seed"], epoch, len(pictures))[place]]
        pixels = rows.pixels(picture)[None].to(device).float() / 127.5 - 1.0
        rng = np.random.default_rng([config["seed"], samples.SAMPLE, step])
        side = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels of one latent
        shape = (vae.config.latent_channels, *(size // side for size in pixels.shape[2:]))
        latent_noise, noise, timestep = samples.draw_noise(rng, shape, scheduler.config.num_train_timesteps)
        latent_noise, noise = (torch.from_numpy(n)[None].to(device) for n in (latent_noise, noise))
        timesteps = torch.tensor([timestep], device=device)
        with accelerator.autocast():
            with torch.no_grad():
                latent = vae.encode(pixels).latent_dist
                latents = latent.mean.float() + latent.std.float() * latent_noise
                latents *= vae.config.scaling_factor
            states = text_encoder(input_ids[picture][None])[0]
            noisy_latents = scheduler.add_noise(latents, noise, timesteps)
            noise_pred = unet(noisy_latents, timesteps, states).sample
            if base:
                with torch.no_grad():
                    base_pred = base(noisy_latents, timesteps, no_text).sample
        expected = noise
        if scheduler.config.prediction_type == "v_prediction":
            expected = scheduler.get_velocity(latents, noise, timesteps)
        if base:  # the loss of what guidance makes of both
            guidance = rng.uniform(*guidance_range)
            guided = base_pred.float() + guidance * (noise_pred.float() - base_pred.float())
            loss = torch.nn.functional.mse_loss(guided, expected) / guidance
        else:
            loss = torch.nn.functional.mse_loss(noise_pred.float(), expected)
        accelerator.backward(loss)
        for group, weights in zip(groups, sources, strict=False):
            group["params"][0].grad = torch.cat([weight.grad.flatten() for weight in weights])
        optimizer.step()
        optimizer.zero_grad()
        for group, weights in zip(groups, sources, strict=False):
            sizes = [weight.numel() for weight in weights]
            for weight, part in zip(weights, group["params"][0].data.split(sizes), strict=True):
                weight.data.copy_(part.view_as(weight))
                weight.grad = None
        losses.append(loss.item())  # the study logs it, which also waits for the GPU
        seconds.append(time.perf_counter() - started)
    weights = {
        f"{component}.{name}.{factor}": weight.detach().float().cpu()
        for component, model in models.items()
        for name, pair in adapters.factors(model).items()
        for factor, weight in zip("AB", pair, strict=True)
    }
    if projections:
        for component, of in projections.items():
            weights |= {f"{component}.{n}.A": weights[f"{component}.{n}.A"] @ p.cpu() for n, p in of.items()}
    weights |= {
        f"{component}.{name}.magnitude_vector": weight.detach().float().cpu()
        for component, model in models.items()
        for name, weight in adapters.magnitudes(model).items()
    }
    return losses, weights, seconds


def main():
    config = parse_config(train.CONFIG, __doc__, demo=train.DEMO)
    _, _, seconds = plain_loop(config)
    median = statistics.median(seconds[WARM_UP:])
    line = f"plain loop: {1e3 * median:.1f} ms/step = {1 / median:.2f} steps/s"
    if torch.cuda.is_available():
        gib = torch.cuda.max_memory_reserved() / 2**30
        line += f"; {gib:.2f} GiB reserved at most"
    print(line)


if __name__ == "__main__":
    run_script(main)
