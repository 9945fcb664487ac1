"""What training minimises: the ordinary loss of diffusion, and what holds an adapter to its task."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lib.kernels.lora import without_lora


def diffusion_loss(unet, scheduler, latents, noise, timesteps, encoder_hidden_states, weights=None):
    """Mean squared error of the predicted noise, one value a picture: float32 [n]; with `weights`, [n, 1, h, w], the
    mean weighted by them.

    Ho et al. 2020, equation 14; for a base model that predicts velocity, Salimans & Ho 2022.
    """
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    noise_pred = unet(noisy_latents.to(unet.dtype), timesteps, encoder_hidden_states).sample
    return errors(noise_pred, target(scheduler, latents, noise, timesteps), weights)


def target(scheduler, latents, noise, timesteps):
    """What the base model was trained to predict: the noise or the velocity, float32 [n, c, h, w]."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return noise


def errors(predicted, expected, weights=None):
    """Mean squared error of each picture, float32 [n]; with `weights`, [n, 1, h, w], the mean weighted by them."""
    squared, cells = F.mse_loss(predicted.float(), expected, reduction="none"), (1, 2, 3)
    if weights is None:
        return squared.mean(dim=cells)
    weighted = (squared.mean(dim=1, keepdim=True) * weights).sum(dim=cells)
    return weighted / weights.sum(dim=cells).clamp_min(1e-6)


@dataclass
class Preservation:
    """Captions under which the adapted model is held to what the base model predicts.

    The idea is that of prior preservation (Ruiz et al. 2023, https://arxiv.org/abs/2208.12242) without
    its pictures: the base model's prediction stands in for them, as in learning without forgetting (Li &
    Hoiem 2016, https://arxiv.org/abs/1606.09282).
    """

    weight: float  # of its loss, the ordinary one having 1
    every: int  # steps: in one of so many it is there
    per_picture: int  # captions drawn for each picture
    first: int  # the number of its first caption among the texts
    base_states: torch.Tensor  # of the base model's text encoder, [captions, 77, d]

    def texts(self, captions):
        """(numbers among the texts [k n], base states [k n, 77, d]) of caption numbers [n, k]: those
        of the n pictures' first caption, then of their second one."""
        rows = captions.T.flatten()
        return self.first + rows, self.base_states[rows]


def preserving_losses(
    unet, scheduler, latents, noise, timesteps, states, base_states, weights=None
):
    """(losses, preservation losses), float32 [n] each: `diffusion_loss`, and how far the adapted
    prediction is from the base model's under other captions, for the same noisy latents. The latter is
    not weighted: what lies outside a mask is to be preserved too.

    `states` [(1 + k) n, 77, d] are the adapted text encoder's: of the pictures' own captions, then of k
    others for each as Preservation.texts has them; `base_states` [k n, 77, d] the base one's of these.
    The adapted predictions are one batch. The base model's is the same UNet without its LoRA layers'
    contribution, and without a gradient, so that nothing of it is kept.
    """
    n, others = len(latents), len(base_states)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps).to(unet.dtype)
    inputs, steps = (
        noisy_latents.repeat(1 + others // n, 1, 1, 1),
        timesteps.repeat(1 + others // n),
    )
    predicted = unet(inputs, steps, states).sample
    with torch.no_grad(), without_lora(unet):
        base = unet(inputs[n:], steps[n:], base_states).sample.float()
    preservation = errors(predicted[n:], base).view(-1, n).mean(dim=0)
    expected = target(scheduler, latents, noise, timesteps)
    return errors(predicted[:n], expected, weights), preservation
