#!/usr/bin/env python3
"""The training of train.py as a plain loop: the same images, noise and learning rates, and nothing that makes it fast.

    python tests/plain_loop.py --base-model FOLDER --max-steps 80
    python tests/plain_loop.py --demo --max-steps 80

Read it before train.py. It has the published study's settings: float32 weights under autocast, the VAE in every step,
PEFT's layers, an optimizer over some 300 separate tensors, gradient checkpointing. It takes train.py's options for the
model, images, LoRA, optimizer, guidance of the loss and precision, with a batch of one, and prints the time of a step.
Tests compare train.py's weights with its, bench/train_speed.py the speed.
"""

import copy
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

import train
from lib import adapters
from lib.config import parse_config
from lib.dataset import read_dataset
from lib.errors import run_script
from lib.models import fetch_base_model, load_part
from lib.training.optimizer import make_optimizer
from lib.training.samples import Samples, split
from lib.training.setup import prompt_ids


def plain_loop(config, flatten=None, projections=None):
    """(losses, {name: weight}, seconds) of the steps. For tests: `flatten`(model, config) returns the optimizer's
    parameters, and the layers compute with A P for `projections`, {component: {layer: P}}."""
    rows = read_dataset(config["data_dir"], config["resolution"])
    folder = fetch_base_model(config["base_model"])
    on_cuda = torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision=config["mixed_precision"] if on_cuda else "no", cpu=not on_cuda)
    device = accelerator.device

    # The base model, frozen.
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    vae = load_part(AutoencoderKL, folder, "vae", torch.float32).to(device).requires_grad_(False)
    unet = load_part(UNet2DConditionModel, folder, "unet", torch.float32).requires_grad_(False)
    text_encoder = load_part(CLIPTextModel, folder, "text_encoder", torch.float32).to(device).requires_grad_(False)
    input_ids = prompt_ids(tokenizer, [row.caption for row in rows]).to(device)  # [images, 77]
    guided = tuple(config["loss_guidance_scale"]) != (1, 1)
    if guided:  # the loss needs the base model's prediction without text
        base_unet = copy.deepcopy(unet).to(device)
        no_text = text_encoder(prompt_ids(tokenizer, [""]).to(device))[0]  # [1, 77, d]

    # LoRA: W becomes W + alpha / rank * B A
    torch.manual_seed(config["seed"])
    models = {"unet": unet} | ({"text_encoder": text_encoder} if config["train_text_encoder"] else {})
    groups = []
    for name, model in models.items():
        adapters.add_lora(model, config["rank"], config["alpha"], config[f"{name}_targets"], config["dora"])
        model.to(device).train()
        for layer, p in (projections[name] if projections else {}).items():
            a = adapters.lora_layers(model)[layer].lora_A["default"]
            a.register_forward_pre_hook(lambda module, inputs, p=p: inputs[0] @ p)  # A (P x): P is symmetric
        weights = flatten(model, config) if flatten else [p for p in model.parameters() if p.requires_grad]
        groups.append(dict(params=weights, peak=config[f"{name}_learning_rate"]))
    if config["gradient_checkpointing"]:
        unet.enable_gradient_checkpointing()
    optimizer = accelerator.prepare(make_optimizer(groups, config))

    images, _ = split(len(rows), config["validation_count"], config["seed"])
    side = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent
    shape = vae.config.latent_channels, config["resolution"] // side, config["resolution"] // side
    timesteps_count, guidance = scheduler.config.num_train_timesteps, config["loss_guidance_scale"]
    samples = Samples(images, config["seed"], lambda image: shape, timesteps_count, 1, guidance=guidance)
    losses, seconds = [], []
    for step in tqdm(range(config["max_steps"]), desc="plain loop", unit="step"):
        started = time.perf_counter()
        factor = train.learning_rate_factor(step, config["max_steps"], config["warmup_steps"])
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        [image], [(latent_noise, noise, timestep, guidance)] = samples.micro_batch(step)
        latent_noise, noise = (torch.from_numpy(n)[None].to(device) for n in (latent_noise, noise))  # [1, 4, h, w]
        timesteps = torch.tensor([timestep], device=device)  # [1]
        pixels = rows.pixels(image)[None].to(device).float() / 127.5 - 1.0  # [1, 3, 8 h, 8 w] in [-1, 1]

        with accelerator.autocast():
            with torch.no_grad():
                latent = vae.encode(pixels).latent_dist
                latents = (latent.mean.float() + latent.std.float() * latent_noise) * vae.config.scaling_factor
            encoder_hidden_states = text_encoder(input_ids[image][None])[0]  # [1, 77, d]
            noisy_latents = scheduler.add_noise(latents, noise, timesteps)  # [1, 4, h, w]
            noise_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample.float()
            if guided:
                with torch.no_grad():
                    base_pred = base_unet(noisy_latents, timesteps, no_text).sample.float()
                noise_pred = base_pred + guidance * (noise_pred - base_pred)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        loss = F.mse_loss(noise_pred, target) / (guidance if guided else 1)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(loss.item())  # waits for the GPU, as the study did to log it
        seconds.append(time.perf_counter() - started)

    weights = {}
    for component, model in models.items():
        for layer, (a, b) in adapters.factors(model).items():
            a = a @ projections[component][layer].to(a) if projections else a
            weights |= {f"{component}.{layer}.A": a, f"{component}.{layer}.B": b}
        magnitudes = adapters.magnitudes(model)  # DoRA's
        weights |= {f"{component}.{layer}.magnitude_vector": weight for layer, weight in magnitudes.items()}
    return losses, {name: weight.detach().float().cpu() for name, weight in weights.items()}, seconds


def main():
    config = parse_config(train.CONFIG, __doc__, demo=train.DEMO)
    median = statistics.median(plain_loop(config)[2][20:])
    gib = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0
    memory = f"; {gib:.2f} GiB reserved at most" if gib else ""
    print(f"plain loop: {1e3 * median:.1f} ms/step = {1 / median:.2f} steps/s{memory}")


if __name__ == "__main__":
    run_script(main)
