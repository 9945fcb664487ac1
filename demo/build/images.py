"""Images as tensors: uint8 in 0..255 as they are kept, float in [-1, 1] as models take them."""

import torch


def to_signed(pictures):
    """uint8 in 0..255 to float in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def to_bytes(pictures):
    """Float in [-1, 1] to uint8 in 0..255."""
    return ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def flip_some(pictures):
    """Mirror each image of [N, C, H, W] with probability 1/2."""
    flip = uniform(len(pictures), 1, pictures.device) < 0.5
    return torch.where(flip, pictures.flip(-1), pictures)


def uniform(count, channels, device):
    """Random values in [0, 1), one for each image and channel: [N, C, 1, 1]."""
    return torch.rand(count, channels, 1, 1, device=device)


def psnr(pictures, references):
    """Peak signal-to-noise ratio in dB of images in [-1, 1], one value each: [N]."""
    error = ((pictures.clamp(-1, 1) - references) ** 2).mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))
