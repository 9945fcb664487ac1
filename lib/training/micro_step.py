"""One micro-step: the forward and backward pass of one micro-batch, over fixed buffers.

A CUDA graph can record only work that reads and writes the same tensors every time, so a micro-batch
is copied to where the pass reads it. A CPU calls the very same functions.
"""

import functools
import itertools

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from lib.kernels.attention import compile_attention
from lib.kernels.channels_last import channels_last
from lib.kernels.graphs import captured
from lib.training.losses import diffusion_loss, preserving_losses


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
    With a Preservation its loss is added, and stands in `preservation_losses`.
    """

    def __init__(self, unet, scheduler, latents, texts, trained, scaler, batch_size, accumulation,
                 preservation=None):  # fmt: skip
        self.preservation, captions = preservation, preservation.per_picture if preservation else 0
        self.unet, self.scheduler, self.texts = unet, scheduler, texts
        self.latent_means, self.latent_deviations = latents
        self.trained, self.scaler, self.accumulation = trained, scaler, accumulation
        device, shape = self.latent_means.device, self.latent_means.shape[1:]
        self.indices = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.latent_noise, self.noise = torch.zeros(2, batch_size, *shape, device=device)
        self.timesteps = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.captions = torch.zeros(batch_size, captions, dtype=torch.long, device=device)
        self.sample_losses, self.preservation_losses = torch.zeros(2, batch_size, device=device)
        self.passes = self.measure = None  # set by `prepare`

    def fill(self, pictures, draws):
        """Copy a micro-batch, as Samples gives it, to where the pass reads it."""
        columns = [np.asarray(pictures), *(np.stack(part) for part in zip(*draws, strict=True))]
        buffers = (self.indices, self.latent_noise, self.noise, self.timesteps, self.captions)
        for tensor, values in zip(buffers, columns, strict=True):
            tensor.copy_(torch.from_numpy(values))

    def forward(self, preserving):
        """The mean loss of the micro-batch, and each one's in `sample_losses`; with `preserving` the
        weighted preservation loss is added."""
        for part in self.trained.values():
            part.refresh()
        latents = (
            self.latent_means[self.indices]
            + self.latent_deviations[self.indices] * self.latent_noise
        )
        inputs = self.unet, self.scheduler, latents, self.noise, self.timesteps
        if not preserving:
            losses = diffusion_loss(*inputs, self.texts(self.indices))
            self.sample_losses.copy_(losses.detach())
            return losses.mean()
        others, base_states = self.preservation.texts(self.captions)
        states = self.texts(torch.cat([self.indices, others]))
        losses, preservation = preserving_losses(*inputs, states, base_states)
        self.sample_losses.copy_(losses.detach())
        self.preservation_losses.copy_(preservation.detach())
        return losses.mean() + self.preservation.weight * preservation.mean()

    def forward_backward(self, preserving):
        """Add the gradient of the mean loss to that of the flat vectors."""
        loss = self.forward(preserving) / self.accumulation
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        parameters = [part.parameters for part in self.trained.values()]
        gradients = iter(torch.autograd.grad(loss, list(itertools.chain(*parameters))))
        for part in self.trained.values():
            part.flat.grad += torch.cat([next(gradients).flatten() for _ in part.parameters])

    def prepare(self, first):
        """Compile the kernels and record the passes, with `first`, a micro-batch, in the buffers.

        From then on `run(step)` is the forward and backward pass of an optimizer step, counted from 0,
        and `measure()` the forward pass alone.
        """
        self.fill(*first)
        device = self.indices.device
        kinds = [False]  # preserving or not
        if self.preservation:
            kinds = [True] if self.preservation.every == 1 else [False, True]
        wait = compile_attention(
            lambda: [self.forward(kind) for kind in kinds], device, training=True
        )
        channels_last(self.unet, training=True)  # compiles its own kernels meanwhile
        wait()
        passes = [functools.partial(self.forward_backward, kind) for kind in kinds]
        measure = torch.no_grad()(functools.partial(self.forward, kinds[-1]))
        *passes, self.measure = captured([*passes, measure], device)
        self.passes = dict(zip(kinds, passes, strict=True))
        self.zero_gradients()

    def run(self, step):
        self.passes[self.preservation is not None and step % self.preservation.every == 0]()

    def zero_gradients(self):
        for part in self.trained.values():
            part.flat.grad.zero_()

    def validation_row(self, probes):
        """What the log says of `probes`, [(data-set index, draws)] of any number: their mean loss, and
        with a Preservation its own, which begins at zero."""
        batch_size, total, preservation = len(self.indices), 0.0, 0.0
        for start in range(0, len(probes), batch_size):
            chunk = probes[start : start + batch_size]
            padded = chunk + chunk[-1:] * (batch_size - len(chunk))
            self.fill(*zip(*padded, strict=True))
            self.measure()
            total += self.sample_losses[: len(chunk)].sum().item()
            preservation += self.preservation_losses[: len(chunk)].sum().item()
        row = dict(validation_loss=total / len(probes))
        if self.preservation:
            row["validation_preservation_loss"] = preservation / len(probes)
        return row
