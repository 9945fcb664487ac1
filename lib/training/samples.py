"""The training samples by their number: which image, and its noise, timestep and guidance.

Each epoch has its own order, and everything random about a sample derives from (seed, number). Processes and
micro-steps take consecutive samples, so two processes see the same samples as one with twice the batch size. Resuming
needs no random state.
"""

import functools

import numpy as np

# Separate streams of random numbers, so that none shifts another.
ORDER, SAMPLE, HELD_OUT = 1, 2, 3


def held_out_count(asked, images):
    """The number of images to hold out of `images`: as many as asked for, at most a quarter."""
    return min(asked, images // 4)


def split(images, asked, seed):
    """(train_indices, held_out): the numbers of the images to train on and of those held out."""
    shuffled = np.random.default_rng([seed, HELD_OUT]).permutation(images)
    held_out = shuffled[: held_out_count(asked, images)]
    return np.setdiff1d(np.arange(images), held_out), held_out


def draw_noise(rng, shape, timesteps_count):
    """(latent noise, added noise, timestep) of one sample. The noise is float32 of `shape`."""
    latent_noise, noise = rng.standard_normal((2, *shape), dtype=np.float32)
    return latent_noise, noise, rng.integers(timesteps_count)


def epoch_order(seed, epoch, count):
    """The order of `count` images in an epoch."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)


def cycle_chunks(seed, cycle, shapes, size):
    """The images of cycle number `cycle` (`size` epochs) in chunks of `size` images of one shape: int64 [n, size].

    `shapes` [n] holds a shape number per image. Images left over in one epoch carry over to the next, so no chunk is
    padded: in `size` epochs, k images of a shape fill exactly k chunks. A chunk takes the position of its middle image
    in the epochs. If `size` is 1 or all images have one shape, this is the order of the epochs.
    """
    epochs = range(cycle * size, (cycle + 1) * size)
    order = np.concatenate([epoch_order(seed, epoch, len(shapes)) for epoch in epochs])
    places = [np.flatnonzero(shapes[order] == shape) for shape in np.unique(shapes)]
    places = np.concatenate([mine.reshape(-1, size) for mine in places])
    return order[places[places[:, size // 2].argsort()]]


class Samples:
    """The samples of the training `images`, which are indices into the data set.

    `shape_of` returns the latent shape (c, h, w) of an index. Where shapes differ, the micro-batches of all processes
    together have one (see `cycle_chunks`). Each sample's guidance is sampled uniformly from the range `guidance`.
    """

    def __init__(
        self, images, seed, shape_of, timesteps_count, batch_size, processes=1, process=0, guidance=(1.0, 1.0)
    ):
        self.images, self.seed, self.shape_of, self.timesteps_count = images, seed, shape_of, timesteps_count
        self.batch_size, self.processes, self.process, self.guidance = batch_size, processes, process, guidance
        numbers = {}
        shapes = np.array([numbers.setdefault(shape_of(i), len(numbers)) for i in images])
        self.shape_counts, size = np.bincount(shapes).tolist(), self.batch_size * processes
        self.chunks = functools.lru_cache(maxsize=2)(lambda cycle: cycle_chunks(self.seed, cycle, shapes, size))

    def notes(self):
        """Notes about the batches for the console: a list of lines."""
        size = self.batch_size * self.processes
        few = [count for count in self.shape_counts if count < size]
        if not few or len(self.shape_counts) == 1:
            return []
        return [
            f"note: {sum(few)} of {len(self.images)} images have a shape with fewer than {size} images. "
            "Their batches repeat images but are rarer, so every image is seen equally often"
        ]

    def image(self, sample):
        """The data-set index of a sample."""
        chunk, place = divmod(sample, self.batch_size * self.processes)
        cycle, chunk = divmod(chunk, len(self.images))
        return self.images[self.chunks(cycle)[chunk, place]]

    def micro_batch(self, number):
        """(data-set indices, draws) of this process in micro-step `number`; a draw is what `draw_noise` returns, and
        the guidance."""
        first = (number * self.processes + self.process) * self.batch_size
        images, draws = [], []
        for sample in range(first, first + self.batch_size):
            images.append(self.image(sample))
            rng = np.random.default_rng([self.seed, SAMPLE, sample])
            noise = draw_noise(rng, self.shape_of(images[-1]), self.timesteps_count)
            draws.append((*noise, rng.uniform(*self.guidance)))
        return images, draws

    def probes(self, held_out):
        """[(data-set index, draws)] for the held-out loss: four timesteps per image, spread over the schedule, with
        the same noise every time and the middle of the guidance range."""
        probes, guidance = [], sum(self.guidance) / 2
        for image in held_out:
            rng = np.random.default_rng([self.seed, HELD_OUT, image])
            noise = draw_noise(rng, self.shape_of(image), self.timesteps_count)[:2]
            probes += [(image, (*noise, (self.timesteps_count * (2 * k + 1)) // 8, guidance)) for k in range(4)]
        return probes
