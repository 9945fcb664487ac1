"""One micro-step: the forward and backward pass of one micro-batch, over fixed buffers.

A CUDA graph can record only work that reads and writes the same tensors every time, so a micro-batch
is copied to where the pass reads it. A CPU calls the very same functions.
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lib.kernels.attention import compile_attention
from lib.kernels.channels_last import channels_last
from lib.kernels.graphs import captured


def diffusion_loss(unet, scheduler, latents, noise, timesteps, encoder_hidden_states):
    """Mean squared error of the predicted noise, one value a picture: float32 [n].

    Ho et al. 2020, equation 14; for a base model that predicts velocity, Salimans & Ho 2022.
    """
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    noise_pred = unet(noisy_latents.to(unet.dtype), timesteps, encoder_hidden_states).sample
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    return F.mse_loss(noise_pred.float(), target, reduction="none").mean(dim=(1, 2, 3))


def recomputed(module, *inputs):
    """`module(*inputs)` that keeps its inputs alone and is computed again for the backward pass.

    Nothing in these models is random, so no random state is kept either.
    """
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)


class MicroStep:
    """The pass and the tensors that it reads: `unet`, `scheduler`, the data set's latents (mean and
    deviation, [n, 4, h, w] each) and its texts.

    `texts` is a function of data-set indices [batch] that returns hidden states [batch, 77, d]. The
    gradient of the mean loss, divided by `accumulation` and scaled by `scaler` where there is one, is
    added to that of each LoraParameters in `trained`; `sample_losses` then holds each sample's loss.
    """

    def __init__(self, unet, scheduler, latents, texts, trained, scaler, batch_size, accumulation):
        self.unet, self.scheduler, self.texts = unet, scheduler, texts
        self.latent_means, self.latent_deviations = latents
        self.trained, self.scaler, self.accumulation = trained, scaler, accumulation
        device, shape = self.latent_means.device, self.latent_means.shape[1:]
        self.indices = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.latent_noise, self.noise = torch.zeros(2, batch_size, *shape, device=device)
        self.timesteps = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.sample_losses = torch.zeros(batch_size, device=device)
        self.run = self.measure = None  # set by `prepare`

    def fill(self, pictures, draws):
        """Copy a micro-batch, as Samples gives it, to where the pass reads it."""
        columns = [np.asarray(pictures), *(np.stack(part) for part in zip(*draws, strict=True))]
        buffers = (self.indices, self.latent_noise, self.noise, self.timesteps)
        for tensor, values in zip(buffers, columns, strict=True):
            tensor.copy_(torch.from_numpy(values))

    def forward(self):
        """The mean loss of the micro-batch, and each one's in `sample_losses`."""
        for part in self.trained.values():
            part.refresh()
        latents = (
            self.latent_means[self.indices]
            + self.latent_deviations[self.indices] * self.latent_noise
        )
        states = self.texts(self.indices)
        losses = diffusion_loss(
            self.unet, self.scheduler, latents, self.noise, self.timesteps, states
        )
        self.sample_losses.copy_(losses.detach())
        return losses.mean()

    def forward_backward(self):
        """Add the gradient of the mean loss to that of the flat vectors."""
        loss = self.forward() / self.accumulation
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        parameters = [part.parameters for part in self.trained.values()]
        gradients = iter(torch.autograd.grad(loss, list(itertools.chain(*parameters))))
        for part in self.trained.values():
            part.flat.grad += torch.cat([next(gradients).flatten() for _ in part.parameters])

    def prepare(self, first):
        """Compile the kernels and record the passes, with `first`, a micro-batch, in the buffers.

        From then on `run()` is the forward and backward pass and `measure()` the forward pass alone.
        """
        self.fill(*first)
        device = self.indices.device
        wait = compile_attention(self.forward, device, training=True)
        channels_last(self.unet, training=True)  # compiles its own kernels meanwhile
        wait()
        passes = [self.forward_backward, torch.no_grad()(self.forward)]
        self.run, self.measure = captured(passes, device)
        self.zero_gradients()

    def zero_gradients(self):
        for part in self.trained.values():
            part.flat.grad.zero_()

    def validation_losses(self, probes):
        """The loss of each of `probes`, [(data-set index, draws)] of any number: a list of floats."""
        batch_size, found = len(self.indices), []
        for start in range(0, len(probes), batch_size):
            chunk = probes[start : start + batch_size]
            padded = chunk + chunk[-1:] * (batch_size - len(chunk))
            self.fill(*zip(*padded, strict=True))
            self.measure()
            found += self.sample_losses[: len(chunk)].tolist()
        return found

    def validation_row(self, probes):
        """The held-out loss for the log: its mean, and that of each picture's probes."""
        losses = {}
        for (picture, _), loss in zip(probes, self.validation_losses(probes), strict=True):
            losses.setdefault(int(picture), []).append(loss)
        each = [sum(of_one) / len(of_one) for of_one in losses.values()]
        return dict(validation_loss=sum(each) / len(each), validation_losses=each)
