"""Stage vae: AutoencoderKL, on the pictures without holographic things and on colour fields."""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from demo.build.config import EVALUATION_BATCH
from demo.build.data import load_part
from demo.build.loop import save_half, train
from demo.build.pictures import flip_some, psnr, to_signed, uniform
from lib.errors import UserError
from lib.evaluation.lpips_distances import lpips_model


def train_vae(config):
    """AutoencoderKL on base pictures and colour fields: L1 + LPIPS + a little KL.

    Its scaling_factor is one over the deviation of the latents, as in Rombach et al. 2022.
    """
    started = time.time()
    torch.manual_seed(config["seed"])
    device = config["device"]
    pictures = load_part(config, "base", device)
    heldout = to_signed(load_part(config, "heldout", device)[:EVALUATION_BATCH])
    levels = len(config["vae_channels"])
    vae = AutoencoderKL(
        sample_size=config["resolution"],
        block_out_channels=config["vae_channels"],
        layers_per_block=config["vae_layers"],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        norm_num_groups=16,
        latent_channels=4,
    ).to(device)
    lpips = lpips_model(config["device"])

    def batch_loss():
        chosen = torch.randint(len(pictures), (config["vae_batch"],), device=device)
        target = flip_some(to_signed(pictures[chosen]))
        target = with_colour_fields(target, config["vae_field_share"])
        posterior = vae.encode(target.to(vae.dtype)).latent_dist
        decoded = vae.decode(posterior.sample()).sample.float()
        loss = F.l1_loss(decoded, target)
        loss = loss + config["vae_lpips_weight"] * lpips(decoded, target).mean()
        return loss + config["vae_kl_weight"] * posterior.kl().mean() / posterior.mean[0].numel()

    @torch.no_grad()
    def validate():
        decoded = vae.decode(vae.encode(heldout.to(vae.dtype)).latent_dist.mean).sample.float()
        return dict(heldout_psnr=round(float(psnr(decoded, heldout).mean()), 2))

    (vae,) = train("vae", config, [vae], batch_loss, started, validate)
    vae.eval().requires_grad_(False)
    mean, std = encode_all(vae, pictures[:4096], device)
    deviation = float((mean + std * torch.randn_like(std)).std())
    vae.register_to_config(scaling_factor=round(1 / deviation, 5))
    save_half(vae, Path(config["model_dir"]) / "vae")


def with_colour_fields(pictures, share):
    """Blend abstract saturated colour, bands of a cosine palette over smooth noise, into soft
    patches of a share of the pictures in [-1, 1]; the pictures' light and shade stays visible."""
    count, _, size, _ = pictures.shape
    device = pictures.device
    bands = 0.3 + 1.7 * uniform(count, 1, device)
    field = smooth_noise((count, 1, size, size), 5, device) * bands
    tint = smooth_noise((count, 3, size, size), 4, device) * 0.3 + uniform(count, 3, device)
    colour = 0.5 + 0.5 * torch.cos(2 * torch.pi * (field + tint))
    light = (pictures.mean(1, keepdim=True) + 1) / 2
    field_picture = 2 * colour * (0.3 + 0.9 * light).clamp(max=1) - 1
    shape = smooth_noise((count, 1, size, size), 4, device) + uniform(count, 1, device) - 0.5
    amount = torch.sigmoid(12 * shape) * uniform(count, 1, device).sqrt()
    return torch.lerp(pictures, field_picture, amount * (uniform(count, 1, device) < share))


def smooth_noise(shape, cells, device):
    """Random values of [N, C, S, S], smooth over a grid of `cells` squared, about unit variance."""
    coarse = torch.randn(*shape[:2], cells, cells, device=device)
    return F.interpolate(coarse, shape[2:], mode="bicubic", align_corners=False)


@torch.no_grad()
def encode_all(vae, pictures, device):
    """Mean and deviation of the latents of uint8 pictures, unscaled: two [N, 4, H/8, W/8]."""
    means, stds = [], []
    for chunk in pictures.split(4 * EVALUATION_BATCH):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            posterior = vae.encode(to_signed(chunk.to(device))).latent_dist
        means.append(posterior.mean.float())
        stds.append(posterior.std.float())
    return torch.cat(means), torch.cat(stds)


def load_vae(config):
    """The trained VAE in float32, frozen, on the device."""
    folder = Path(config["model_dir"]) / "vae"
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; run `python -m demo.build vae` first")
    vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float32)
    return vae.eval().requires_grad_(False).to(config["device"])
