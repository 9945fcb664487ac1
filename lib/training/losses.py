"""What training minimises: the loss of diffusion, as the model predicts or as guidance will combine its predictions."""

import torch
import torch.nn.functional as F

from lib.kernels.lora import without_lora


def diffusion_loss(
    unet, scheduler, latents, noise, timesteps, encoder_hidden_states, weights=None, guidance=None, no_text=None
):
    """Mean squared error of the prediction, one value an image: float32 [n].

    `weights` [n, 1, h, w], where given, weight the mean over the pixels. Ho et al. 2020, equation 14; for a base
    model that predicts velocity, Salimans & Ho 2022.

    With `guidance`, float32 [n] from 1 up, the loss is that of the guided prediction:

        |u + g (c - u) - target|^2 / g

    c is the adapted prediction under the caption, u the base model's for no text: `no_text` are its hidden states
    [n, 77, d], or their keys and values from `unet.text_keys_values`. Classifier-free guidance (Ho & Salimans 2022)
    draws with that combination. An adapter that leaves u alone would otherwise be overdrawn g times. Divided by g,
    the gradient keeps the size that it has at g = 1.
    """
    noisy_latents = scheduler.add_noise(latents, noise, timesteps).to(unet.dtype)
    noise_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample.float()
    expected = target(scheduler, latents, noise, timesteps)
    if guidance is None:
        return errors(noise_pred, expected, weights)
    with torch.no_grad(), without_lora(unet):
        base_pred = unet(noisy_latents, timesteps, no_text).sample.float()
    g = guidance[:, None, None, None]
    return errors(base_pred + g * (noise_pred - base_pred), expected, weights) / guidance


def target(scheduler, latents, noise, timesteps):
    """What the base model was trained to predict: the noise or the velocity, float32 [n, c, h, w]."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return noise


def errors(predicted, expected, weights=None):
    """Mean squared error of each image, float32 [n]; with `weights`, [n, 1, h, w], the mean weighted by them."""
    squared, cells = F.mse_loss(predicted.float(), expected, reduction="none"), (1, 2, 3)
    if weights is None:
        return squared.mean(dim=cells)
    weighted = (squared.mean(dim=1, keepdim=True) * weights).sum(dim=cells)
    return weighted / weights.sum(dim=cells).clamp_min(1e-6)
