"""What a training step draws from: captions as tokens, pictures as latents, samples by their number."""

import functools

import numpy as np
import torch
from tqdm import tqdm

from lib.errors import UserError

MAX_TOKENS = 77  # CLIP's text length, begin and end token included
# Separate streams of random numbers, so that none shifts another.
ORDER, SAMPLE, HELD_OUT = 1, 2, 3


def tokenize(tokenizer, rows):
    """Token ids of the captions, int64 [n, 77]; UserError naming a caption that does not fit."""
    for name, caption, _ in rows:
        length = len(tokenizer(caption, verbose=False).input_ids)
        if length > MAX_TOKENS:
            raise UserError(
                f"the caption of {name} has {length} tokens, {MAX_TOKENS} is the most "
                f"(begin and end included); shorten «{caption[:60]}…»"
            )
    return tokenizer(
        [caption for _, caption, _ in rows],
        padding="max_length",
        max_length=MAX_TOKENS,
        return_tensors="pt",
    ).input_ids


@torch.no_grad()
def encode_latents(vae, rows, device):
    """Mean and standard deviation of each picture's latent distribution, float32 [n, 4, h, w] each,
    scaled as the UNet expects them. The VAE runs once a picture; training samples from these."""
    means, deviations = [], []
    for name, _, pixels in tqdm(rows, desc="latents", unit="picture", leave=False):
        batch = pixels[None].to(device, vae.dtype) / 127.5 - 1.0  # [-1, 1]
        latent = vae.encode(batch).latent_dist
        if not latent.mean.isfinite().all():
            raise UserError(f"the VAE gives NaN for {name}; try --mixed-precision no")
        means.append(latent.mean.float() * vae.config.scaling_factor)
        deviations.append(latent.std.float() * vae.config.scaling_factor)
    return torch.cat(means), torch.cat(deviations)


@torch.no_grad()
def encode_captions(text_encoder, input_ids, at_once=64):
    """(states, which): the text encoder's output for each different row of the token ids [n, 77], of its
    type [different ones, 77, width], and the number of each row's in it, int64 [n]; both on its device.

    So many run at once: all captions of a large data set together would need more memory than training.
    """
    different, which = input_ids.to(text_encoder.device).unique(dim=0, return_inverse=True)
    states = [text_encoder(ids)[0] for ids in different.split(at_once)]
    return torch.cat(states), which


def held_out_count(asked, pictures):
    """How many of so many pictures to hold out: as many as asked for, at most a quarter of them."""
    return min(asked, pictures // 4)


def split(pictures, asked, seed):
    """(train_indices, held_out): the numbers of the pictures to train on, and of those held out."""
    shuffled = np.random.default_rng([seed, HELD_OUT]).permutation(pictures)
    held_out = shuffled[: held_out_count(asked, pictures)]
    return np.setdiff1d(np.arange(pictures), held_out), held_out


def draw_noise(rng, shape, timesteps_count):
    """(latent noise, added noise, timestep) of one sample; the first two float32 of `shape`."""
    latent_noise, noise = rng.standard_normal((2, *shape), dtype=np.float32)
    return latent_noise, noise, rng.integers(timesteps_count)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    """The order in which an epoch goes through its `count` pictures."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)


class Samples:
    """The training samples by their number: which picture, and its noise and timestep.

    Sample number s is picture s mod n of epoch s div n, and its draws derive from (seed, s): noise and
    timestep as `draw_noise` gives them, and which captions of a Preservation it is preserved under.
    Processes and micro-steps take consecutive samples, so two processes see what one with twice the
    batch size sees, and a run that goes on after an interruption needs no random state.
    """

    def __init__(
        self, pictures, seed, latent_shape, timesteps_count, batch_size, processes, process,
        preservation=None,
    ):  # fmt: skip
        self.pictures, self.seed = pictures, seed  # indices into the data set
        self.latent_shape, self.timesteps_count = latent_shape, timesteps_count
        self.batch_size, self.processes, self.process = batch_size, processes, process
        self.preservation = preservation

    def draw_captions(self, rng):
        """The numbers of the captions that one picture is preserved under, int64: none without."""
        if self.preservation is None:
            return np.zeros(0, np.int64)
        captions = len(self.preservation.base_states)
        return rng.choice(captions, self.preservation.per_picture, replace=False)

    def micro_batch(self, number):
        """(data-set indices, draws) of this process's samples of micro-step `number`."""
        first = (number * self.processes + self.process) * self.batch_size
        pictures, draws = [], []
        for sample in range(first, first + self.batch_size):
            epoch, place = divmod(sample, len(self.pictures))
            order = epoch_order(self.seed, epoch, len(self.pictures))
            pictures.append(self.pictures[order[place]])
            rng = np.random.default_rng([self.seed, SAMPLE, sample])
            drawn = draw_noise(rng, self.latent_shape, self.timesteps_count)
            draws.append((*drawn, self.draw_captions(rng)))
        return pictures, draws

    def probes(self, held_out):
        """[(data-set index, draws)] for the held-out loss: of each picture four timesteps spread over
        the schedule, with the same noise every time."""
        found = []
        for picture in held_out:
            rng = np.random.default_rng([self.seed, HELD_OUT, picture])
            noise = draw_noise(rng, self.latent_shape, self.timesteps_count)[:2]
            found += [
                (
                    picture,
                    (*noise, (self.timesteps_count * (2 * k + 1)) // 8, self.draw_captions(rng)),
                )
                for k in range(4)
            ]
        return found
