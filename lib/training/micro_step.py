"""The loss, and one micro-step: the forward and backward pass of one micro-batch over fixed buffers.

A CUDA graph always reads and writes the same tensors, so each micro-batch is copied into fixed buffers. On a CPU the
same functions are called directly.
"""

import functools
import itertools
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lib.kernels import compile_ahead
from lib.kernels.channels_last import channels_last
from lib.kernels.graphs import captured
from lib.kernels.lora import without_lora
from lib.kernels.pinned_staging import STEPS_AHEAD, Uploader, packed_size, pinned_buffers, unpack


def diffusion_loss(
    unet, scheduler, latents, noise, timesteps, encoder_hidden_states, weights=None, guidance=None, no_text=None
):
    """Mean squared error of the UNet's prediction, one value per image: float32 [n].

        |unet(x_t, t, text) - target|^2, averaged over the latent

    The target is the noise (Ho et al. 2020, equation 14), or the velocity for a base model that predicts it (Salimans &
    Ho 2022). `weights` [n, 1, h, w] weight the average.

    With `guidance`, float32 [n] of at least 1, it is the loss of the guided prediction:

        |u + g (c - u) - target|^2 / g

    c is the prediction with the adapter under the caption, u the base model's without text: `no_text` holds the hidden
    states of the empty prompt [n, 77, d], or the keys and values that `unet.text_keys_values` computes from them. Classifier-free
    guidance (Ho & Salimans 2022) generates with that combination: trained on the plain loss, an adapter that leaves u
    unchanged would be amplified g times. Dividing by g keeps the gradient at its size for g = 1.
    """
    noisy_latents = scheduler.add_noise(latents, noise, timesteps).to(unet.dtype)  # [n, 4, h, w]
    noise_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample.float()
    expected = noise
    if scheduler.config.prediction_type == "v_prediction":
        expected = scheduler.get_velocity(latents, noise, timesteps)
    if guidance is None:
        return squared_errors(noise_pred, expected, weights)
    with torch.no_grad(), without_lora(unet):
        base_pred = unet(noisy_latents, timesteps, no_text).sample.float()
    g = guidance[:, None, None, None]
    return squared_errors(base_pred + g * (noise_pred - base_pred), expected, weights) / guidance


def squared_errors(predicted, expected, weights=None):
    """Mean squared error of each image, float32 [n]; `weights` [n, 1, h, w] weight the mean."""
    squared, cells = F.mse_loss(predicted, expected, reduction="none"), (1, 2, 3)
    if weights is None:
        return squared.mean(dim=cells)
    weighted = (squared.mean(dim=1, keepdim=True) * weights).sum(dim=cells)
    return weighted / weights.sum(dim=cells).clamp_min(1e-6)


def recomputed(module, *inputs):
    """`module(*inputs)` with gradient checkpointing: the backward pass recomputes its activations.

    Nothing in these models is random, so no random state is saved.
    """
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)


class Buffers:
    """The inputs and losses of the pass for latents of one `shape`; one vector holds all inputs, so one copy fills it."""

    def __init__(self, batch_size, shape, masked, device):
        per_image, latents = ((batch_size,), torch.long), ((batch_size, *shape), torch.float32)
        self.parts = parts = dict(
            indices=per_image,
            latent_noise=latents,
            noise=latents,
            timesteps=per_image,
            guidance=((batch_size,), torch.float32),
            means=latents,
            deviations=latents,
        )
        if masked:
            parts["weights"] = (batch_size, 1, *shape[1:]), torch.float32
        vector = torch.zeros(packed_size(parts), dtype=torch.uint8, device=device)
        self.uploader = Uploader(vector, pinned_buffers(vector, STEPS_AHEAD + 1))
        self.inputs = SimpleNamespace(**dict(weights=None) | unpack(vector, parts))
        if masked:
            self.inputs.weights.fill_(1)
        self.sample_losses = torch.zeros(batch_size, device=device)
        self.train = self.measure = None  # the passes with and without gradient, set by MicroStep.prepare

    def fill(self, **columns):
        """Begin to copy the inputs. Each of `columns` has a value per image."""
        to = unpack(self.uploader.buffer(), self.parts)
        for name, values in columns.items():
            torch.stack([torch.as_tensor(value) for value in values], out=to[name])
        self.uploader.upload()


class MicroStep:
    """The forward and backward pass of a micro-batch, with a CUDA graph for each shape of latents.

    `models` are the AdaptedModels, `latents` the data set's Latents, `masks` None or [float32 [1, h, w]] by index.
    `gradient`, float32 [parameters + 1], holds the gradients of all LoraParameters and, last, the `loss`: the mean over
    the micro-batches of a step, the gradients scaled by accelerate's loss scaler, if there is one. `now` are the Buffers
    filled last; after `run` their `sample_losses` hold each image's loss.
    """

    def __init__(self, models, latents, masks, config, accelerator):
        self.unet, self.scheduler, self.texts = models.unet, models.scheduler, models.texts
        self.trained, self.no_text = models.trained, models.no_text
        self.latents, self.masks, self.scaler = latents, masks, accelerator.scaler
        self.batch_size, self.accumulation = config["batch_size"], config["gradient_accumulation_steps"]
        self.device = device = accelerator.device
        sizes = [part.flat.numel() for part in self.trained.values()]
        self.gradient = torch.zeros(sum(sizes) + 1, device=device)
        self.loss = self.gradient[-1]
        for part, view in zip(self.trained.values(), self.gradient[:-1].split(sizes), strict=True):
            part.flat.grad = view
        self.buffers = {shape: Buffers(self.batch_size, shape, masks is not None, device) for shape in latents.shapes()}
        self.now = None

    def values(self):
        """The number of values in the UNet's first feature map of the largest micro-batch."""
        cells = max(height * width for _, height, width in self.latents.shapes())
        return self.batch_size * cells * self.unet.config.block_out_channels[0]

    def fill(self, images, draws):
        """Begin to copy a micro-batch of one shape, from Samples.micro_batch, to where the pass reads it."""
        self.now = self.buffers[self.latents.shape(images[0])]
        columns = dict(zip(("latent_noise", "noise", "timesteps", "guidance"), zip(*draws, strict=True), strict=True))
        means, deviations = zip(*(self.latents[index] for index in images), strict=True)
        if self.masks is not None:
            columns["weights"] = [self.masks[index] for index in images]
        self.now.fill(indices=images, means=means, deviations=deviations, **columns)

    def run(self):
        """The forward and backward pass of the micro-batch from `fill`."""
        self.now.train()

    def forward(self, buffers):
        """The mean loss of the micro-batch in `buffers`. Each image's goes to their `sample_losses`."""
        for part in self.trained.values():
            part.refresh()
        x = buffers.inputs
        latents = x.means + x.deviations * x.latent_noise
        guided = {} if self.no_text is None else dict(guidance=x.guidance, no_text=self.no_text)
        states = self.texts(x.indices)  # [n, 77, d]
        losses = diffusion_loss(self.unet, self.scheduler, latents, x.noise, x.timesteps, states, x.weights, **guided)
        buffers.sample_losses.copy_(losses.detach())
        return losses.mean()

    def forward_backward(self, buffers):
        """Add the gradient and the loss to `gradient`, or overwrite it if there is no accumulation."""
        loss, overwrite = self.forward(buffers) / self.accumulation, self.accumulation == 1
        self.loss.copy_(loss.detach() if overwrite else self.loss + loss.detach())
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        for part in self.trained.values():
            part.expect_gradients()
        leaves = [part.leaves for part in self.trained.values()]
        gradients = iter(torch.autograd.grad(loss, list(itertools.chain(*leaves)), allow_unused=True))
        for part in self.trained.values():
            part.add_gradients([next(gradients) for _ in part.leaves], overwrite)

    def prepare(self, first):
        """Compile the kernels and capture the passes, with `first`, a micro-batch, in its buffers.

        The graphs of all shapes share one pool of memory.
        """
        self.fill(*first)
        every = list(self.buffers.values())
        if self.no_text is not None:
            self.no_text = self.no_text.expand(self.batch_size, -1, -1)
        channels_last(*[part.model for part in self.trained.values()], training=True)
        if self.no_text is not None:
            self.project_no_text()
        measure = torch.no_grad()(self.forward)
        passes = [functools.partial(self.forward_backward, at) for at in every]
        passes += [functools.partial(measure, at) for at in every]
        passes = captured(passes, self.device)
        for at, train, measured in zip(every, passes, passes[len(every) :], strict=False):
            at.train, at.measure = train, measured
        self.gradient.zero_()
        compile_ahead.finish()

    @torch.no_grad()
    def project_no_text(self):
        """Replace the empty prompt's hidden states with the base UNet's keys and values, the same in every step."""
        if hasattr(self.unet, "text_keys_values"):  # see lib/kernels/fused_projections.py
            with without_lora(self.unet):
                self.no_text = self.unet.text_keys_values(self.no_text)

    def begin_sum(self):
        """Zero the gradient and the loss before a step. Without accumulation the pass overwrites them."""
        if self.accumulation > 1:
            self.gradient.zero_()

    def validation_losses(self, probes):
        """The loss of each of `probes`, [(data-set index, draws)]: a list of floats."""

        def shape_of(place):
            return self.latents.shape(probes[place][0])

        losses = [None] * len(probes)
        for _, group in itertools.groupby(sorted(range(len(probes)), key=shape_of), shape_of):
            group = list(group)
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                padded = batch + batch[-1:] * (self.batch_size - len(batch))
                self.fill(*zip(*(probes[place] for place in padded), strict=True))
                self.now.measure()
                for place, loss in zip(batch, self.now.sample_losses.tolist(), strict=False):
                    losses[place] = loss
        return losses

    def validation_row(self, probes):
        """The held-out loss for the log: its mean, and that of each image."""
        of_image = {}
        for (image, _), loss in zip(probes, self.validation_losses(probes), strict=True):
            of_image.setdefault(int(image), []).append(loss)
        each = [sum(losses) / len(losses) for losses in of_image.values()]
        return dict(validation_loss=sum(each) / len(each), validation_losses=each)
