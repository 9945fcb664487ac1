"""What a training step draws from: captions as tokens, samples by their number."""

import functools

import numpy as np
import torch

from lib.errors import UserError

MAX_TOKENS = 77  # CLIP's text length, begin and end token included
# Separate streams of random numbers, so that none shifts another.
ORDER, SAMPLE, HELD_OUT = 1, 2, 3


def tokenize(tokenizer, data):
    """Token ids of the captions, int64 [n, 77]; UserError naming a caption that does not fit."""
    lengths = {}  # each caption is read once, however many pictures have it
    for row in data:
        caption = row.caption
        if caption not in lengths:
            lengths[caption] = len(tokenizer(caption, verbose=False).input_ids)
        length = lengths[caption]
        if length > MAX_TOKENS:
            raise UserError(
                f"the caption of {row.name} has {length} tokens, {MAX_TOKENS} is the most "
                f"(begin and end included); shorten «{caption[:60]}…»"
            )
    return tokenizer(
        [row.caption for row in data],
        padding="max_length",
        max_length=MAX_TOKENS,
        return_tensors="pt",
    ).input_ids


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


def epoch_chunks(seed, epoch, shapes, size):
    """The epoch's order in chunks of `size` pictures of one shape each, in the order of their first pictures: a list of
    lists of numbers. `shapes` are those of the pictures; a chunk that lacks some begins again with its shape."""
    chunks, groups = [], {}
    for rank, number in enumerate(epoch_order(seed, epoch, len(shapes))):
        groups.setdefault(shapes[number], []).append((rank, number))
    for group in groups.values():
        for start in range(0, len(group), size):
            chunk = group[start : start + size]
            chunks.append(chunk + [group[i % len(group)] for i in range(size - len(chunk))])
    return [[number for _, number in chunk] for chunk in sorted(chunks, key=lambda c: c[0])]


class Samples:
    """The training samples by their number: which picture, and its noise and timestep.

    Sample number s is picture s mod n of epoch s div n, and its draws derive from (seed, s): noise and
    timestep as `draw_noise` gives them, and the guidance of its loss, evenly from the range `guidance`.
    Processes and micro-steps take consecutive samples, so two processes see what one with twice the
    batch size sees, and a run that goes on after an interruption needs no random state. Where pictures
    have several shapes, the micro-batches of all processes together hold one, see `epoch_chunks`.
    """

    def __init__(
        self, pictures, seed, shape_of, timesteps_count, batch_size, processes, process,
        guidance=(1.0, 1.0),
    ):  # fmt: skip
        self.pictures, self.seed = pictures, seed  # indices into the data set
        self.shape_of, self.timesteps_count = shape_of, timesteps_count  # of an index: [c, h, w]
        self.batch_size, self.processes, self.process = batch_size, processes, process
        self.guidance = guidance
        shapes = list(map(shape_of, pictures))
        self.one_shape = len(set(shapes)) == 1
        self.chunks = functools.lru_cache(maxsize=2)(
            lambda epoch: epoch_chunks(seed, epoch, shapes, batch_size * processes)
        )

    def picture(self, sample):
        """The data-set index of a sample."""
        if self.one_shape:
            epoch, place = divmod(sample, len(self.pictures))
            return self.pictures[epoch_order(self.seed, epoch, len(self.pictures))[place]]
        chunk, place = divmod(sample, self.batch_size * self.processes)
        epoch, chunk = divmod(chunk, len(self.chunks(0)))  # as many in every epoch
        return self.pictures[self.chunks(epoch)[chunk][place]]

    def micro_batch(self, number):
        """(data-set indices, draws) of this process's samples of micro-step `number`."""
        first = (number * self.processes + self.process) * self.batch_size
        pictures, draws = [], []
        for sample in range(first, first + self.batch_size):
            pictures.append(self.picture(sample))
            rng = np.random.default_rng([self.seed, SAMPLE, sample])
            drawn = draw_noise(rng, self.shape_of(pictures[-1]), self.timesteps_count)
            draws.append((*drawn, rng.uniform(*self.guidance)))
        return pictures, draws

    def probes(self, held_out):
        """[(data-set index, draws)] for the held-out loss: of each picture four timesteps spread over
        the schedule, with the same noise every time and the guidance in the middle of its range."""
        found, guidance = [], sum(self.guidance) / 2
        for picture in held_out:
            rng = np.random.default_rng([self.seed, HELD_OUT, picture])
            noise = draw_noise(rng, self.shape_of(picture), self.timesteps_count)[:2]
            found += [
                (picture, (*noise, (self.timesteps_count * (2 * k + 1)) // 8, guidance))
                for k in range(4)
            ]
        return found
