"""What a training step draws from: captions as tokens, samples by their number."""

import functools

import numpy as np
import torch

from lib.cache import first_process
from lib.errors import UserError

MAX_TOKENS = 77  # CLIP's text length, begin and end token included
# Separate streams of random numbers, so that none shifts another.
ORDER, SAMPLE, HELD_OUT = 1, 2, 3


def tokenize(tokenizer, data, truncate=False):
    """Token ids of the captions, int64 [n, 77]; UserError naming all that do not fit or, with `truncate`, a note that
    does, and they end where the others must."""
    lengths = {}  # each caption is read once, however many images have it
    for caption in dict.fromkeys(row.caption for row in data):
        lengths[caption] = len(tokenizer(caption, verbose=False).input_ids)
    long = [row for row in data if lengths[row.caption] > MAX_TOKENS]
    names = ", ".join(f"{row.name} ({lengths[row.caption]})" for row in long)
    if long and not truncate:
        what = f"the caption of {names}" if len(long) == 1 else f"{len(long)} captions, {names},"
        raise UserError(
            f"more than {MAX_TOKENS} tokens (begin and end included): {what} cannot be read whole; shorten "
            f"“{long[0].caption[:60]}…”{' and the others' if long[1:] else ''}, or add --truncate-captions"
        )
    if long and first_process():
        print(f"note: of {len(long)} captions only the first {MAX_TOKENS} tokens are read: {names}")
    return tokenizer(
        [row.caption for row in data],
        padding="max_length",
        truncation=truncate,
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
    """How many of so many images to hold out: as many as asked for, at most a quarter of them."""
    return min(asked, pictures // 4)


def split(pictures, asked, seed):
    """(train_indices, held_out): the numbers of the images to train on, and of those held out."""
    shuffled = np.random.default_rng([seed, HELD_OUT]).permutation(pictures)
    held_out = shuffled[: held_out_count(asked, pictures)]
    return np.setdiff1d(np.arange(pictures), held_out), held_out


def draw_noise(rng, shape, timesteps_count):
    """(latent noise, added noise, timestep) of one sample; the first two float32 of `shape`."""
    latent_noise, noise = rng.standard_normal((2, *shape), dtype=np.float32)
    return latent_noise, noise, rng.integers(timesteps_count)


def epoch_order(seed, epoch, count):
    """The order in which an epoch goes through its `count` images."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)


def cycle_chunks(seed, cycle, shapes, size):
    """The images of `size` epochs, the `cycle`-th of such, in chunks of `size` images of one shape: int64 [n, size]
    for n images, numbers of them. `shapes` [n] are the images' as whole numbers.

    What an epoch leaves over of a shape waits for the next, so that nothing is filled up: after `size` epochs of n
    images each of k of a shape was drawn `size` times, in k whole chunks. A chunk stands where its middle image
    does in the epochs; with chunks of one image, or images of one shape, this is the order of the epochs.
    """
    epochs = range(cycle * size, (cycle + 1) * size)
    order = np.concatenate([epoch_order(seed, epoch, len(shapes)) for epoch in epochs])
    places = [np.flatnonzero(shapes[order] == shape) for shape in np.unique(shapes)]
    places = np.concatenate([mine.reshape(-1, size) for mine in places])
    return order[places[places[:, size // 2].argsort()]]


class Samples:
    """The training samples by their number: which image, and its noise and timestep.

    Epochs follow one another, each in an order of its own, and a sample's draws derive from (seed, number): noise and
    timestep as `draw_noise` gives them, and the guidance of its loss, evenly from the range `guidance`.
    Processes and micro-steps take consecutive samples, so two processes see what one with twice the
    batch size sees, and a run that goes on after an interruption needs no random state. Where images
    have several shapes, the micro-batches of all processes together hold one, see `cycle_chunks`.
    """

    def __init__(self, pictures, seed, shape_of, timesteps_count, batch_size, processes, process, guidance=(1.0, 1.0)):
        self.pictures, self.seed = pictures, seed  # indices into the data set
        self.shape_of, self.timesteps_count = shape_of, timesteps_count  # of an index: [c, h, w]
        self.batch_size, self.processes, self.process = batch_size, processes, process
        self.guidance = guidance
        numbers = {}
        shapes = np.array([numbers.setdefault(shape_of(i), len(numbers)) for i in pictures])
        self.shape_counts = np.bincount(shapes).tolist()
        self.chunks = functools.lru_cache(maxsize=2)(
            lambda cycle: cycle_chunks(seed, cycle, shapes, batch_size * processes)
        )

    def notes(self):
        """What a person should know of the batches, a list of lines."""
        size = self.batch_size * self.processes
        few = [count for count in self.shape_counts if count < size]
        if not few or len(self.shape_counts) == 1:
            return []
        return [
            f"note: {sum(few)} of {len(self.pictures)} images have a shape that fewer than {size} have: a batch of "
            "theirs repeats them, and comes so rarely that every image is seen equally often"
        ]

    def picture(self, sample):
        """The data-set index of a sample."""
        chunk, place = divmod(sample, self.batch_size * self.processes)
        cycle, chunk = divmod(chunk, len(self.pictures))
        return self.pictures[self.chunks(cycle)[chunk, place]]

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
        """[(data-set index, draws)] for the held-out loss: of each image four timesteps spread over
        the schedule, with the same noise every time and the guidance in the middle of its range."""
        found, guidance = [], sum(self.guidance) / 2
        for picture in held_out:
            rng = np.random.default_rng([self.seed, HELD_OUT, picture])
            noise = draw_noise(rng, self.shape_of(picture), self.timesteps_count)[:2]
            found += [(picture, (*noise, (self.timesteps_count * (2 * k + 1)) // 8, guidance)) for k in range(4)]
        return found
