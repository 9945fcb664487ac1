"""One micro-step: the forward and backward pass of one micro-batch, over fixed buffers.

A CUDA graph can record only work that reads and writes the same tensors every time, so a micro-batch
is copied to where the pass reads it. A CPU calls the very same functions.
"""

import functools
import itertools
from types import SimpleNamespace

import torch
from torch.utils.checkpoint import checkpoint

from lib.kernels.channels_last import channels_last
from lib.kernels.compiling import compile_attention
from lib.kernels.graphs import captured
from lib.kernels.lora import without_lora
from lib.kernels.pinned_staging import STEPS_AHEAD, Uploader, packed_size, pinned_buffers, unpack
from lib.training.losses import diffusion_loss


def recomputed(module, *inputs):
    """`module(*inputs)` that keeps its inputs alone and is computed again for the backward pass.

    Nothing in these models is random, so no random state is kept either.
    """
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)


class Buffers:
    """Where the pass reads a micro-batch whose latents have one shape, and leaves its losses.

    What it reads is one vector, so that one copy brings it.
    """

    def __init__(self, batch_size, shape, masked, device):
        numbers, pictures = ((batch_size,), torch.long), ((batch_size, *shape), torch.float32)
        self.parts = parts = dict(
            indices=numbers,
            latent_noise=pictures,
            noise=pictures,
            timesteps=numbers,
            guidance=((batch_size,), torch.float32),
            means=pictures,
            deviations=pictures,
        )
        if masked:
            parts["weights"] = (batch_size, 1, *shape[1:]), torch.float32
        vector = torch.zeros(packed_size(parts), dtype=torch.uint8, device=device)
        self.uploader = Uploader(vector, pinned_buffers(vector, STEPS_AHEAD + 1))
        self.read = SimpleNamespace(**dict(weights=None) | unpack(vector, parts))
        if masked:
            self.read.weights.fill_(1)
        self.sample_losses = torch.zeros(batch_size, device=device)
        self.train = self.measure = None  # the passes: with gradient, and without; set by `prepare`

    def fill(self, **columns):
        """Begin to copy a value for each image to each of what the pass reads."""
        to = unpack(self.uploader.buffer(), self.parts)
        for name, values in columns.items():
            torch.stack([torch.as_tensor(value) for value in values], out=to[name])
        self.uploader.upload()


class MicroStep:
    """The pass and the tensors that it reads: `unet`, `scheduler`, the data set's Latents, of which those of a
    micro-batch are copied to `device`, its texts and, where the loss is weighted, its masks.

    `texts` is a function of data-set indices [batch] that returns hidden states [batch, 77, d], `masks`
    None or a list of [1, h, w]. The gradient of the mean loss, divided by `accumulation` and scaled by
    `scaler` where there is one, is added to that of each LoraParameters in `trained`, or, where a step is one pass,
    replaces it: together they are the vector
    `gradient`, float32, whose last element `loss` sums up the losses, divided likewise. In `now`, the
    buffers that `fill` filled last, `sample_losses` then holds each sample's loss. For each shape of latents there is
    a pass of its own over buffers of its own.
    With `no_text`, the base model's hidden states of the empty prompt [1, 77, d], the loss is that of the guided
    prediction, see `diffusion_loss`.
    """

    def __init__(
        self,
        unet,
        scheduler,
        latents,
        texts,
        trained,
        scaler,
        batch_size,
        accumulation,
        device,
        masks=None,
        no_text=None,
    ):
        self.unet, self.scheduler, self.texts = unet, scheduler, texts
        self.latents, self.masks = latents, masks
        self.trained, self.scaler, self.accumulation = trained, scaler, accumulation
        self.device, self.batch_size, self.no_text = device, batch_size, no_text
        sizes = [part.flat.numel() for part in trained.values()]
        self.gradient = torch.zeros(sum(sizes) + 1, device=device)
        self.loss = self.gradient[-1]
        for part, view in zip(trained.values(), self.gradient[:-1].split(sizes), strict=True):
            part.flat.grad = view
        self.buffers = {shape: Buffers(batch_size, shape, masks is not None, device) for shape in latents.shapes()}
        self.now = None

    def values(self):
        """How many values the UNet's first map of a micro-batch has, of the largest."""
        cells = max(height * width for _, height, width in self.latents.shapes())
        return self.batch_size * cells * self.unet.config.block_out_channels[0]

    def fill(self, pictures, draws):
        """Begin to copy a micro-batch of one shape, as Samples gives it, to where the pass reads it."""
        self.now = self.buffers[self.latents.shape(pictures[0])]
        latent_noise, noise, timesteps, guidance = zip(*draws, strict=True)
        means, deviations = zip(*(self.latents[index] for index in pictures), strict=True)
        weights = {} if self.masks is None else dict(weights=[self.masks[i] for i in pictures])
        self.now.fill(
            indices=pictures,
            latent_noise=latent_noise,
            noise=noise,
            timesteps=timesteps,
            guidance=guidance,
            means=means,
            deviations=deviations,
            **weights,
        )

    def run(self):
        """The forward and backward pass of what `fill` filled in."""
        self.now.train()

    def forward(self, at):
        """The mean loss of the micro-batch in the buffers `at`, and each one's in their `sample_losses`."""
        for part in self.trained.values():
            part.refresh()
        read = at.read
        latents = read.means + read.deviations * read.latent_noise
        guided = {} if self.no_text is None else dict(guidance=read.guidance, no_text=self.no_text)
        losses = diffusion_loss(
            self.unet,
            self.scheduler,
            latents,
            read.noise,
            read.timesteps,
            self.texts(read.indices),
            read.weights,
            **guided,
        )
        at.sample_losses.copy_(losses.detach())
        return losses.mean()

    def forward_backward(self, at):
        """Add the gradient of the mean loss to that of the flat vectors, and the loss to theirs; where a step is one
        pass, write them."""
        loss, replace = self.forward(at) / self.accumulation, self.accumulation == 1
        self.loss.copy_(loss.detach() if replace else self.loss + loss.detach())
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        for part in self.trained.values():
            part.expect_gradients()
        leaves = [part.leaves for part in self.trained.values()]
        gradients = iter(torch.autograd.grad(loss, list(itertools.chain(*leaves)), allow_unused=True))
        for part in self.trained.values():
            part.add_gradients([next(gradients) for _ in part.leaves], replace)

    def prepare(self, first):
        """Compile the kernels and record the passes, with `first`, a micro-batch, in its buffers.

        The graphs of all shapes share one pool of memory.
        """
        self.fill(*first)
        every = list(self.buffers.values())
        if self.no_text is not None:
            self.no_text = self.no_text.expand(self.batch_size, -1, -1)
        wait = compile_attention(lambda: [self.forward(at) for at in every], self.device, training=True)
        models = [part.model for part in self.trained.values()]
        channels_last(*models, training=True)  # compiles its own kernels meanwhile
        wait()
        if self.no_text is not None:
            self.make_no_text()
        measure = torch.no_grad()(self.forward)
        passes = [functools.partial(self.forward_backward, at) for at in every]
        passes += [functools.partial(measure, at) for at in every]
        passes = captured(passes, self.device)
        for at, train, measured in zip(every, passes, passes[len(every) :], strict=False):
            at.train, at.measure = train, measured
        self.gradient.zero_()

    @torch.no_grad()
    def make_no_text(self):
        """Keep the keys and values that the base UNet makes of no text: they are the same in every step."""
        if hasattr(self.unet, "text_keys_values"):  # see lib/kernels/fused_projections.py
            with without_lora(self.unet):
                self.no_text = self.unet.text_keys_values(self.no_text)

    def begin_sum(self):
        """Set gradients and loss to zero before the passes of a step; where it is one pass, that overwrites them."""
        if self.accumulation > 1:
            self.gradient.zero_()

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
                for place, loss in zip(places, self.now.sample_losses.tolist(), strict=False):
                    found[place] = loss
        return found

    def validation_row(self, probes):
        """The held-out loss for the log: its mean, and that of each image's probes."""
        of_image = {}
        for (picture, _), loss in zip(probes, self.validation_losses(probes), strict=True):
            of_image.setdefault(int(picture), []).append(loss)
        each = [sum(losses) / len(losses) for losses in of_image.values()]
        return dict(validation_loss=sum(each) / len(each), validation_losses=each)
