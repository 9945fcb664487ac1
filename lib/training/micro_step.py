"""One micro-step: the forward and backward pass of one micro-batch, over fixed buffers.

A CUDA graph can record only work that reads and writes the same tensors every time, so a micro-batch
is copied to where the pass reads it. A CPU calls the very same functions.
"""

import functools
import itertools
from types import SimpleNamespace

import torch
from torch.utils.checkpoint import checkpoint

from lib.kernels.attention import compile_attention
from lib.kernels.channels_last import channels_last
from lib.kernels.graphs import captured
from lib.kernels.staging import AHEAD, Ring, divided, length, places
from lib.training.losses import diffusion_loss, preserving_losses


def recomputed(module, *inputs):
    """`module(*inputs)` that keeps its inputs alone and is computed again for the backward pass.

    Nothing in these models is random, so no random state is kept either.
    """
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)


class Buffers:
    """Where the pass reads a micro-batch whose latents have one shape, each picture with so many `captions` to be
    preserved under, and leaves its losses.

    What it reads is one vector, so that one copy brings it.
    """

    def __init__(self, batch_size, shape, captions, masked, device):
        numbers, pictures = ((batch_size,), torch.long), ((batch_size, *shape), torch.float32)
        self.parts = parts = dict(
            indices=numbers, latent_noise=pictures, noise=pictures, timesteps=numbers,
            captions=((batch_size, captions), torch.long), means=pictures, deviations=pictures,
        )  # fmt: skip
        if masked:
            parts["weights"] = (batch_size, 1, *shape[1:]), torch.float32
        vector = torch.zeros(length(parts), dtype=torch.uint8, device=device)
        self.ring = Ring(vector, places(vector, AHEAD + 1))
        self.read = SimpleNamespace(**dict(weights=None) | divided(vector, parts))
        if masked:
            self.read.weights.fill_(1)
        self.sample_losses, self.preservation_losses = torch.zeros(2, batch_size, device=device)
        self.passes = self.measure = None  # set by `prepare`

    def fill(self, **columns):
        """Begin to copy a value for each picture to each of what the pass reads."""
        to = divided(self.ring.place(), self.parts)
        for name, values in columns.items():
            torch.stack([torch.as_tensor(value) for value in values], out=to[name])
        self.ring.send()


class MicroStep:
    """The pass and the tensors that it reads: `unet`, `scheduler`, the data set's Latents, of which those of a
    micro-batch are copied to `device`, its texts and, where the loss is weighted, its masks.

    `texts` is a function of data-set indices [batch] that returns hidden states [batch, 77, d], `masks`
    None or a list of [1, h, w]. The gradient of the mean loss, divided by `accumulation` and scaled by
    `scaler` where there is one, is added to that of each LoraParameters in `trained`, or, where a step is one pass,
    replaces it: together they are the vector
    `gradient`, float32, whose last element `loss` sums up the ordinary losses, divided likewise. In `now`, the
    buffers that `fill` filled last, `sample_losses` then holds each sample's loss. With a Preservation its loss is
    added, and stands in their `preservation_losses`. For each shape of latents there is a pass of its own over
    buffers of its own.
    """

    def __init__(self, unet, scheduler, latents, texts, trained, scaler, batch_size, accumulation, device,
                 masks=None, preservation=None):  # fmt: skip
        self.unet, self.scheduler, self.texts = unet, scheduler, texts
        self.latents, self.masks = latents, masks
        self.trained, self.scaler, self.accumulation = trained, scaler, accumulation
        self.device, self.batch_size, self.preservation = device, batch_size, preservation
        sizes = [part.flat.numel() for part in trained.values()]
        self.gradient = torch.zeros(sum(sizes) + 1, device=device)
        self.loss = self.gradient[-1]
        for part, view in zip(trained.values(), self.gradient[:-1].split(sizes), strict=True):
            part.flat.grad = view
        captions = preservation.per_picture if preservation else 0
        self.buffers = {
            shape: Buffers(batch_size, shape, captions, masks is not None, device)
            for shape in latents.shapes()
        }
        self.now = None

    def values(self):
        """How many values the UNet's first map of a micro-batch has, of the largest."""
        cells = max(height * width for _, height, width in self.latents.shapes())
        captions = 1 + (self.preservation.per_picture if self.preservation else 0)
        return self.batch_size * captions * cells * self.unet.config.block_out_channels[0]

    def fill(self, pictures, draws):
        """Begin to copy a micro-batch of one shape, as Samples gives it, to where the pass reads it."""
        self.now = self.buffers[self.latents.shape(pictures[0])]
        latent_noise, noise, timesteps, captions = zip(*draws, strict=True)
        means, deviations = zip(*(self.latents[index] for index in pictures), strict=True)
        weights = {} if self.masks is None else dict(weights=[self.masks[i] for i in pictures])
        self.now.fill(indices=pictures, latent_noise=latent_noise, noise=noise, timesteps=timesteps,
                      captions=captions, means=means, deviations=deviations, **weights)  # fmt: skip

    def run(self, step):
        """The forward and backward pass, in an optimizer step counted from 0, of what `fill` filled in."""
        preserving = self.preservation is not None and step % self.preservation.every == 0
        self.now.passes[preserving]()

    def forward(self, at, preserving):
        """The mean loss of the micro-batch in the buffers `at`, and each one's in their `sample_losses`; with
        `preserving` the weighted preservation loss is added."""
        for part in self.trained.values():
            part.refresh()
        read = at.read
        latents = read.means + read.deviations * read.latent_noise
        inputs = self.unet, self.scheduler, latents, read.noise, read.timesteps
        if not preserving:
            losses = diffusion_loss(*inputs, self.texts(read.indices), read.weights)
            at.sample_losses.copy_(losses.detach())
            return losses.mean()
        others, base_states = self.preservation.texts(read.captions)
        states = self.texts(torch.cat([read.indices, others]))
        losses, preservation = preserving_losses(*inputs, states, base_states, read.weights)
        at.sample_losses.copy_(losses.detach())
        at.preservation_losses.copy_(preservation.detach())
        return losses.mean() + self.preservation.weight * preservation.mean()

    def forward_backward(self, at, preserving):
        """Add the gradient of the mean loss to that of the flat vectors, and the ordinary loss to theirs; where a step
        is one pass, write them."""
        loss, replace = self.forward(at, preserving) / self.accumulation, self.accumulation == 1
        ordinary = at.sample_losses.mean() / self.accumulation
        self.loss.copy_(ordinary if replace else self.loss + ordinary)
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        for part in self.trained.values():
            part.expect_gradients()
        leaves = [part.leaves for part in self.trained.values()]
        gradients = iter(torch.autograd.grad(loss, list(itertools.chain(*leaves)), allow_unused=True))  # fmt: skip
        for part in self.trained.values():
            part.add_gradients([next(gradients) for _ in part.leaves], replace)

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
        self.gradient.zero_()

    def begin_sum(self):
        """Set gradients and loss to zero before the passes of a step; where it is one pass, that overwrites them."""
        if self.accumulation > 1:
            self.gradient.zero_()

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
                losses = self.now.sample_losses.tolist(), self.now.preservation_losses.tolist()
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
