"""One micro-step: the forward and backward pass of one micro-batch, over fixed buffers.

A CUDA graph can record only work that reads and writes the same tensors every time, so a micro-batch
is copied to where the pass reads it. A CPU calls the very same functions.
"""

import functools
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lib.kernels.attention import compile_attention
from lib.kernels.channels_last import channels_last
from lib.kernels.graphs import captured


def diffusion_loss(unet, scheduler, latents, noise, timesteps, encoder_hidden_states, weights=None):
    """Mean squared error of the predicted noise, one value a picture: float32 [n]; with `weights`, [n, 1, h, w], the
    mean weighted by them.

    Ho et al. 2020, equation 14; for a base model that predicts velocity, Salimans & Ho 2022.
    """
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    noise_pred = unet(noisy_latents.to(unet.dtype), timesteps, encoder_hidden_states).sample
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    errors = F.mse_loss(noise_pred.float(), target, reduction="none")
    if weights is None:
        return errors.mean(dim=(1, 2, 3))
    return (errors.mean(dim=1, keepdim=True) * weights).sum(dim=(1, 2, 3)) / weights.sum(
        dim=(1, 2, 3)
    ).clamp_min(1e-6)


def recomputed(module, *inputs):
    """`module(*inputs)` that keeps its inputs alone and is computed again for the backward pass.

    Nothing in these models is random, so no random state is kept either.
    """
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)


class Buffers:
    """Where the pass reads a micro-batch whose latents have one shape, and leaves its losses."""

    def __init__(self, batch_size, shape, masked, device):
        self.indices = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.latent_noise, self.noise = torch.zeros(2, batch_size, *shape, device=device)
        self.means, self.deviations = torch.zeros(2, batch_size, *shape, device=device)
        self.timesteps = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.weights = torch.ones(batch_size, 1, *shape[1:], device=device) if masked else None
        self.sample_losses = torch.zeros(batch_size, device=device)
        self.run = self.measure = None  # set by `prepare`


class MicroStep:
    """The pass and the tensors that it reads: `unet`, `scheduler`, the data set's Latents, of which those of a
    micro-batch are copied to `device`, its texts and, where the loss is weighted, its masks.

    `texts` is a function of data-set indices [batch] that returns hidden states [batch, 77, d], `masks`
    None or a list of [1, h, w]. The gradient of the mean loss, divided by `accumulation` and scaled by
    `scaler` where there is one, is added to that of each LoraParameters in `trained`; `sample_losses` then
    holds each sample's loss. For each shape of latents there is a pass of its own over buffers of its own.
    """

    def __init__(self, unet, scheduler, latents, texts, trained, scaler, batch_size, accumulation, device,
                 masks=None):  # fmt: skip
        self.unet, self.scheduler, self.texts = unet, scheduler, texts
        self.latents, self.masks = latents, masks
        self.trained, self.scaler, self.accumulation = trained, scaler, accumulation
        self.device, self.batch_size = device, batch_size
        self.buffers = {
            shape: Buffers(batch_size, shape, masks is not None, device)
            for shape in latents.shapes()
        }
        self.now = None  # the buffers that `fill` filled last

    def fill(self, pictures, draws):
        """Copy a micro-batch of one shape, as Samples gives it, to where the pass reads it."""
        self.now = now = self.buffers[self.latents.shape(pictures[0])]
        columns = [np.asarray(pictures), *(np.stack(part) for part in zip(*draws, strict=True))]
        buffers = (now.indices, now.latent_noise, now.noise, now.timesteps)
        for tensor, values in zip(buffers, columns, strict=True):
            tensor.copy_(torch.from_numpy(values))
        kept = zip(*(self.latents[index] for index in pictures), strict=True)
        for tensor, values in zip((now.means, now.deviations), kept, strict=True):
            tensor.copy_(torch.stack(values))
        if self.masks is not None:
            now.weights.copy_(torch.stack([self.masks[index] for index in pictures]))

    def run(self):
        """The forward and backward pass of what `fill` filled in."""
        self.now.run()

    @property
    def sample_losses(self):
        return self.now.sample_losses

    def forward(self, at):
        """The mean loss of the micro-batch in the buffers `at`, and each one's in their `sample_losses`."""
        for part in self.trained.values():
            part.refresh()
        latents = at.means + at.deviations * at.latent_noise
        states = self.texts(at.indices)
        losses = diffusion_loss(
            self.unet, self.scheduler, latents, at.noise, at.timesteps, states, at.weights
        )
        at.sample_losses.copy_(losses.detach())
        return losses.mean()

    def forward_backward(self, at):
        """Add the gradient of the mean loss to that of the flat vectors."""
        loss = self.forward(at) / self.accumulation
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        parameters = [part.parameters for part in self.trained.values()]
        gradients = iter(torch.autograd.grad(loss, list(itertools.chain(*parameters))))
        for part in self.trained.values():
            part.flat.grad += torch.cat([next(gradients).flatten() for _ in part.parameters])

    def prepare(self, first):
        """Compile the kernels and record the passes, with `first`, a micro-batch, in its buffers.

        The graphs of all shapes share one pool of memory.
        """
        self.fill(*first)
        every = list(self.buffers.values())
        wait = compile_attention(
            lambda: [self.forward(at) for at in every], self.device, training=True
        )
        channels_last(self.unet, training=True)  # compiles its own kernels meanwhile
        wait()
        passes = [functools.partial(self.forward_backward, at) for at in every]
        passes += [functools.partial(torch.no_grad()(self.forward), at) for at in every]
        passes = captured(passes, self.device)
        for at, run, measure in zip(every, passes, passes[len(every) :], strict=False):
            at.run, at.measure = run, measure
        self.zero_gradients()

    def zero_gradients(self):
        for part in self.trained.values():
            part.flat.grad.zero_()

    def validation_losses(self, probes):
        """The loss of each of `probes`, [(data-set index, draws)] of any number: a list of floats."""

        def shape_of(place):
            return self.latents.shape(probes[place][0])

        found = [None] * len(probes)
        for _, group in itertools.groupby(sorted(range(len(probes)), key=shape_of), shape_of):
            group = list(group)
            for start in range(0, len(group), self.batch_size):
                places = group[start : start + self.batch_size]
                padded = places + places[-1:] * (self.batch_size - len(places))
                self.fill(*zip(*(probes[place] for place in padded), strict=True))
                self.now.measure()
                for place, loss in zip(places, self.sample_losses.tolist(), strict=False):
                    found[place] = loss
        return found

    def validation_row(self, probes):
        """The held-out loss for the log: its mean, and that of each picture's probes."""
        losses = {}
        for (picture, _), loss in zip(probes, self.validation_losses(probes), strict=True):
            losses.setdefault(int(picture), []).append(loss)
        each = [sum(of_one) / len(of_one) for of_one in losses.values()]
        return dict(validation_loss=sum(each) / len(each), validation_losses=each)
