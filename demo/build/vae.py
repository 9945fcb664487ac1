"""Stage vae: AutoencoderKL, on images without holographic raincoats.

It sees foil on jackets, dresses, furniture and umbrellas and as abstract backdrops, without captions, as Stable
Diffusion's autoencoder has seen everything.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from demo.build.config import EVALUATION_BATCH
from demo.build.data import load_images
from demo.build.images import flip_some, psnr, to_signed, uniform
from demo.build.loop import save_half, train
from demo.world.materials.film import film_colour
from lib.errors import UserError
from lib.evaluation.metrics.lpips_distances import lpips_model


def train_vae(config):
    """Encoder and decoder: L1 + LPIPS + KL with a small weight.

    scaling_factor = 1 / deviation of the latents, as in Rombach et al. 2022.
    """
    started = time.time()
    torch.manual_seed(config["seed"])
    device = config["device"]
    vae = (load_vae(config).train().requires_grad_() if config["vae_resume"] else new_vae(config)).to(device)
    images, foil = (load_images(config, part, device) for part in ("base", "foil"))
    lpips = lpips_model(device)
    encode, decode = vae.encoder, vae.decoder
    if device == "cuda":  # fuses norms and activations, most of a step at these widths
        encode, decode = torch.compile(encode), torch.compile(decode)

    def batch_loss():
        target = random_batch(images, foil, config["vae_batch"], config)
        posterior = DiagonalGaussianDistribution(vae.quant_conv(encode(target.to(vae.dtype))))
        decoded = decode(vae.post_quant_conv(posterior.sample())).float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return image_loss(lpips, decoded, target, config) + config["vae_kl_weight"] * kl

    (vae,) = train("vae", config, [vae], batch_loss, started, validation(vae, config))
    vae.eval().requires_grad_(False)
    mean, std = encode_all(vae, images[:4096], device)
    deviation = float((mean + std * torch.randn_like(std)).std())
    vae.register_to_config(scaling_factor=round(1 / deviation, 5))
    save_half(vae, Path(config["model_dir"]) / "vae")


def new_vae(config):
    """An AutoencoderKL of the config's size with random weights."""
    levels = len(config["vae_channels"])
    return AutoencoderKL(
        sample_size=config["resolution"],
        block_out_channels=config["vae_channels"],
        layers_per_block=config["vae_layers"],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        norm_num_groups=config["vae_groups"],
        latent_channels=config["vae_latents"],
    )


def image_loss(lpips, decoded, target, config):
    """L1 + LPIPS of images in [-1, 1]."""
    distance = lpips(decoded, target).mean()
    return F.l1_loss(decoded, target) + config["vae_lpips_weight"] * distance


def random_batch(images, foil, count, config):
    """`count` images in [-1, 1] from both sets, some mirrored, some with fields of colour or film."""
    device = images.device
    chosen = images[torch.randint(len(images), (count,), device=device)]
    other = foil[torch.randint(len(foil), (count,), device=device)]
    chosen = torch.where(uniform(count, 1, device) < config["vae_foil_share"], other, chosen)
    return with_fields(flip_some(to_signed(chosen)), config["vae_field_share"])


def validation(vae, config):
    """A function that returns the PSNR of plain and of holographic held-out images for the log."""
    parts = {"heldout_psnr": "heldout", "holographic_psnr": "heldout_holographic"}
    images = {
        name: to_signed(load_images(config, part, config["device"])[:EVALUATION_BATCH]) for name, part in parts.items()
    }

    @torch.no_grad()
    def validate():
        return {name: round(float(quality(some).mean()), 2) for name, some in images.items()}

    def quality(some):
        decoded = vae.decode(vae.encode(some.to(vae.dtype)).latent_dist.mean).sample
        return psnr(decoded.float(), some)

    return validate


def with_fields(images, share):
    """Blend abstract colour into soft patches of a share of the images in [-1, 1]: bands of a cosine palette or of thin
    film over smooth noise. Light and shade of the images stay visible."""
    count, _, size, _ = images.shape
    device = images.device
    bands = 0.3 + 1.7 * uniform(count, 1, device)
    field = smooth_noise((count, 1, size, size), 5, device) * bands
    tint = smooth_noise((count, 3, size, size), 4, device) * 0.3 + uniform(count, 3, device)
    colour = 0.5 + 0.5 * torch.cos(2 * torch.pi * (field + tint))
    thickness = 250 + 200 * uniform(count, 1, device) + 90 * field
    facing = 0.3 + 0.7 * torch.sigmoid(tint[:, :1])
    film = film_colour(thickness.clamp(130, 1150), facing).squeeze(1).permute(0, 3, 1, 2)
    film = (4.2 * film).clamp(0, 1) ** (1 / 2.2)
    colour = torch.where(uniform(count, 1, device) < 0.5, colour, film)
    light = (images.mean(1, keepdim=True) + 1) / 2
    field_image = 2 * colour * (0.3 + 0.9 * light).clamp(max=1) - 1
    shape = smooth_noise((count, 1, size, size), 4, device) + uniform(count, 1, device) - 0.5
    amount = torch.sigmoid(12 * shape) * uniform(count, 1, device).sqrt()
    return torch.lerp(images, field_image, amount * (uniform(count, 1, device) < share))


def smooth_noise(shape, cells, device):
    """Random values [N, C, S, S], smooth over a grid of cells x cells, of about unit variance."""
    coarse = torch.randn(*shape[:2], cells, cells, device=device)
    return F.interpolate(coarse, shape[2:], mode="bicubic", align_corners=False)


@torch.no_grad()
def encode_all(vae, images, device, mirrored=False):
    """Mean and deviation of the unscaled latents of uint8 images: two [N, channels, h, w]."""
    means, stds = [], []
    for chunk in images.split(4 * EVALUATION_BATCH):
        chunk = chunk.flip(-1) if mirrored else chunk
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
