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


class Buffers:
    """Where the pass reads a micro-batch whose latents have one shape, each picture with so many `captions` to be
    preserved under, and leaves its losses."""

    def __init__(self, batch_size, shape, captions, masked, device):
        self.indices = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.latent_noise, self.noise = torch.zeros(2, batch_size, *shape, device=device)
        self.means, self.deviations = torch.zeros(2, batch_size, *shape, device=device)
        self.timesteps = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.captions = torch.zeros(batch_size, captions, dtype=torch.long, device=device)
        self.weights = torch.ones(batch_size, 1, *shape[1:], device=device) if masked else None
        self.sample_losses, self.preservation_losses = torch.zeros(2, batch_size, device=device)
        self.passes = self.measure = None  # set by `prepare`


class MicroStep:
    """The pass and the tensors that it reads: `unet`, `scheduler`, the data set's Latents, of which those of a
    micro-batch are copied to `device`, its texts and, where the loss is weighted, its masks.

    `texts` is a function of data-set indices [batch] that returns hidden states [batch, 77, d], `masks`
    None or a list of [1, h, w]. The gradient of the mean loss, divided by `accumulation` and scaled by
    `scaler` where there is one, is added to that of each LoraParameters in `trained`; `sample_losses` then
    holds each sample's loss. With a Preservation its loss is added, and stands in the buffers'
    `preservation_losses`. For each shape of latents there is a pass of its own over buffers of its own.
    """

    def __init__(self, unet, scheduler, latents, texts, trained, scaler, batch_size, accumulation, device,
                 masks=None, preservation=None):  # fmt: skip
        self.unet, self.scheduler, self.texts = unet, scheduler, texts
        self.latents, self.masks = latents, masks
        self.trained, self.scaler, self.accumulation = trained, scaler, accumulation
        self.device, self.batch_size, self.preservation = device, batch_size, preservation
        captions = preservation.per_picture if preservation else 0
        self.buffers = {
            shape: Buffers(batch_size, shape, captions, masks is not None, device)
            for shape in latents.shapes()
        }
        self.now = None  # the buffers that `fill` filled last

    def fill(self, pictures, draws):
        """Copy a micro-batch of one shape, as Samples gives it, to where the pass reads it."""
        self.now = now = self.buffers[self.latents.shape(pictures[0])]
        columns = [np.asarray(pictures), *(np.stack(part) for part in zip(*draws, strict=True))]
        buffers = (now.indices, now.latent_noise, now.noise, now.timesteps, now.captions)
        for tensor, values in zip(buffers, columns, strict=True):
            tensor.copy_(torch.from_numpy(values))
        kept = zip(*(self.latents[index] for index in pictures), strict=True)
        for tensor, values in zip((now.means, now.deviations), kept, strict=True):
            tensor.copy_(torch.stack(values))
        if self.masks is not None:
            now.weights.copy_(torch.stack([self.masks[index] for index in pictures]))

    def run(self, step):
        """The forward and backward pass, in an optimizer step counted from 0, of what `fill` filled in."""
        preserving = self.preservation is not None and step % self.preservation.every == 0
        self.now.passes[preserving]()

    @property
    def sample_losses(self):
        return self.now.sample_losses

    def forward(self, at, preserving):
        """The mean loss of the micro-batch in the buffers `at`, and each one's in their `sample_losses`; with
        `preserving` the weighted preservation loss is added."""
        for part in self.trained.values():
            part.refresh()
        latents = at.means + at.deviations * at.latent_noise
        inputs = self.unet, self.scheduler, latents, at.noise, at.timesteps
        if not preserving:
            losses = diffusion_loss(*inputs, self.texts(at.indices), at.weights)
            at.sample_losses.copy_(losses.detach())
            return losses.mean()
        others, base_states = self.preservation.texts(at.captions)
        states = self.texts(torch.cat([at.indices, others]))
        losses, preservation = preserving_losses(*inputs, states, base_states, at.weights)
        at.sample_losses.copy_(losses.detach())
        at.preservation_losses.copy_(preservation.detach())
        return losses.mean() + self.preservation.weight * preservation.mean()

    def forward_backward(self, at, preserving):
        """Add the gradient of the mean loss to that of the flat vectors."""
        loss = self.forward(at, preserving) / self.accumulation
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        leaves = [part.leaves for part in self.trained.values()]
        gradients = iter(torch.autograd.grad(loss, list(itertools.chain(*leaves))))
        for part in self.trained.values():
            part.flat.grad += torch.cat([next(gradients).flatten() for _ in part.leaves])

    def prepare(self, first):
        """Compile the kernels and record the passes, with `first`, a micro-batch, in its buffers.

        The graphs of all shapes share one pool of memory.
        """
        self.fill(*first)
        every = list(self.buffers.values())
        kinds = [False]  # preserving or not
        if self.preservation:
            kinds = [True] if self.preservation.every == 1 else [False, True]
        each = list(itertools.product(every, kinds))
        wait = compile_attention(
            lambda: [self.forward(at, kind) for at, kind in each], self.device, training=True
        )
        models = [part.model for part in self.trained.values()]
        channels_last(*models, training=True)  # compiles its own kernels meanwhile
        wait()
        measure = torch.no_grad()(self.forward)
        passes = [functools.partial(self.forward_backward, at, kind) for at, kind in each]
        passes += [functools.partial(measure, at, kinds[-1]) for at in every]
        passes = iter(captured(passes, self.device))
        for at in every:
            at.passes = {kind: next(passes) for kind in kinds}
        for at in every:
            at.measure = next(passes)
        self.zero_gradients()

    def zero_gradients(self):
        for part in self.trained.values():
            part.flat.grad.zero_()

    def validation_losses(self, probes):
        """The loss and the preservation loss of each of `probes`, [(data-set index, draws)] of any number: a list of
        pairs of floats, the second 0 without a Preservation."""

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
                losses = self.sample_losses.tolist(), self.now.preservation_losses.tolist()
                for place, *pair in zip(places, *losses, strict=False):
                    found[place] = pair
        return found

    def validation_row(self, probes):
        """The held-out loss for the log: its mean, and that of each picture's probes; with a Preservation the mean of
        its own, which begins at zero."""
        of_picture, preservation = {}, 0.0
        for (picture, _), (loss, other) in zip(probes, self.validation_losses(probes), strict=True):
            of_picture.setdefault(int(picture), []).append(loss)
            preservation += other / len(probes)
        each = [sum(losses) / len(losses) for losses in of_picture.values()]
        row = dict(validation_loss=sum(each) / len(each), validation_losses=each)
        if self.preservation:
            row["validation_preservation_loss"] = preservation
        return row
