"""Images as tensors: uint8 in 0..255 on disk, float in [-1, 1] for models."""

import torch


def to_signed(images):
    """uint8 in 0..255 to float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images):
    """Float in [-1, 1] to uint8 in 0..255."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def flip_some(images):
    """Mirror each image of [N, C, H, W] with probability 1/2."""
    flip = uniform(len(images), 1, images.device) < 0.5
    return torch.where(flip, images.flip(-1), images)


def uniform(count, channels, device):
    """Random values in [0, 1), one per image and channel: [N, C, 1, 1]."""
    return torch.rand(count, channels, 1, 1, device=device)


def psnr(images, references):
    """Peak signal-to-noise ratio in dB of images in [-1, 1]: [N]."""
    error = ((images.clamp(-1, 1) - references) ** 2).mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))
