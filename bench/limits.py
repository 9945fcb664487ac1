#!/usr/bin/env python3
"""What no program could beat: the operations of a step and of an image over this machine's rates.

    python bench/limits.py           # Stable Diffusion v1.5 at 512x512
    python bench/limits.py --demo    # the miniature at 256x256

The operations are counted without computing them (matrix products, convolutions and attention; a
multiplication and an addition are two); the bytes are the weights' alone, read once a pass. The rates
are measured: a large matrix product, and a large copy (read and written), in fp16 on a GPU and fp32
on a CPU.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

import train
from lib import adapters
from lib.kernels import fused_projections, lora
from lib.provenance import device_name
from lib.training import micro_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rates():
    """(operations a second, bytes a second) of this machine, each the best of five."""

    def best(work, amount):
        times = []
        for _ in range(6):
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            work()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return amount / min(times[1:])

    on_gpu = DEVICE.type == "cuda"
    side = 8192 if on_gpu else 2048
    a, b = torch.randn(2, side, side, device=DEVICE, dtype=torch.float16 if on_gpu else None)
    source = torch.empty(2**30 if on_gpu else 2**28, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return best(lambda: a @ b, 2 * side**3), best(lambda: target.copy_(source), 2 * source.numel())


def architecture(demo):
    """(UNet, text encoder, VAE, side of the latents), without weights."""
    with torch.device("meta"):
        if demo:
            unet, vae = (
                kind.from_config(kind.load_config(ROOT / "demo" / "model" / part))
                for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL))
            )
            text = CLIPTextConfig.from_pretrained(ROOT / "demo" / "model" / "text_encoder")
            return unet, CLIPTextModel(text), vae, unet.config.sample_size
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        text = CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        return unet, CLIPTextModel(text), vae, 64


def operations(demo):
    """{what: (operations, bytes of weights read)}."""
    unet, text_encoder, vae, side = architecture(demo)
    with torch.device("meta"):
        channels = unet.config.in_channels
        latents = torch.randn(1, channels, side, side)
        ids = torch.zeros(1, 77, dtype=torch.long)
        pair = (torch.randn(2, channels, side, side), torch.randn(2, 77, unet.config.cross_attention_dim))
        time_step = torch.zeros(1, dtype=torch.long)

    def counted(work):
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    with torch.no_grad():
        call = counted(lambda: unet(pair[0], time_step, pair[1]))
        decoding = counted(lambda: vae.decode(latents))
    weights = []
    for model, targets in (("unet", unet), ("text_encoder", text_encoder)):
        targets.requires_grad_(False)
        adapters.add_lora(targets, 32, 32.0, train.CONFIG[f"{model}_targets"])
        targets.eval()
        fused_layers = lora.fuse_lora(targets, fused_projections.fuse_projections(targets, "meta"), "meta")
        size = sum(weight.numel() for weight in lora.trained_weights(fused_layers))
        weights += lora.bind(fused_layers, torch.zeros(size, device="meta"))[0]

    def step():
        out = unet(latents, time_step, text_encoder(ids)[0]).sample
        torch.autograd.grad(out.square().mean(), weights)

    plain = counted(step)
    unet.enable_gradient_checkpointing(micro_step.recomputed)
    recomputing = counted(step)
    each = 4 if demo else 2  # bytes a weight
    size = {
        name: each * sum(p.numel() for p in m.parameters())
        for name, m in dict(unet=unet, text=text_encoder, vae=vae.decoder).items()
    }
    once = size["unet"] + size["text"]
    return {
        "training step": (plain, 2 * once),
        "training step with checkpointing": (recomputing, 2 * once + size["unet"]),
        "image, 28 steps guided (29 calls), of 8 at once": (29 * call + decoding, 29 * size["unet"] / 8),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true")
    demo = parser.parse_args().demo
    rate, bandwidth = rates()
    print(f"{device_name(DEVICE)}: {rate / 1e12:.2f} TFLOP/s, {bandwidth / 1e12:.3f} TB/s\n")
    print("| | TFLOP | ms at that rate | GB of weights | ms at that bandwidth |\n|---|--:|--:|--:|--:|")
    for name, (count, size) in operations(demo).items():
        print(
            f"| {name} | {count / 1e12:.3f} | {1e3 * count / rate:.2f} | {size / 1e9:.2f} | "
            f"{1e3 * size / bandwidth:.2f} |"
        )


if __name__ == "__main__":
    main()
