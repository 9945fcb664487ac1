#!/usr/bin/env python3
"""Coverage of the share of the way to the training images (lib/evaluation/metrics/concept_scale.py), by simulation.

    python bench/concept_scale.py  # a minute on two CPU cores

Images are unit vectors of 64 components around the base model's mean and around the concept's, at about the cosines of
the miniature. Training images, sampling seeds and training runs are random; seeds and runs are crossed, and base and
adapter share the seeds' noise. The true share is that of the means over all of them. The table has the coverage of the
95% interval, of one that takes the training images for all that there are, and the median width of the former.
"""

import functools
import itertools
import multiprocessing
import os
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # one process per core
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from lib.evaluation.metrics.concept_scale import level_without, share_interval
from lib.evaluation.statistics import jackknife, mean_interval

STUDIES, SEEDS, WIDTH, PROMPTS = 2000, 8, 64, 3
RUNS, IMAGES, SHARES = (1, 3, 5), (8, 28, 100), (0.2, 0.8)
LEAST_COVERAGE = 0.94
CONCEPT = np.eye(WIDTH)[0]
BASE = 0.6 * np.eye(WIDTH)[0] + 0.8 * np.eye(WIDTH)[1]


def unit(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def training(rng, count):
    """Embeddings of training images, [count, WIDTH]."""
    return unit(CONCEPT + 0.11 * rng.standard_normal((count, WIDTH)))


def generated(rng, weight, runs, seeds, shared, of_run):
    """Embeddings [runs, seeds, PROMPTS, WIDTH] of images that lie `weight` of the way from BASE to CONCEPT, where runs
    differ by `of_run` of it. `shared` [seeds, PROMPTS, WIDTH] is the noise that a seed has in every model."""
    places = weight + of_run * rng.standard_normal((runs, 1, 1, 1))
    own = 0.08 * rng.standard_normal((runs, seeds, PROMPTS, WIDTH))
    return unit(BASE + places * (CONCEPT - BASE) + shared + own)


def noise(rng, seeds):
    """The noise of seeds [seeds, PROMPTS, WIDTH], part of it common to the prompts of a seed."""
    return 0.06 * (rng.standard_normal((seeds, 1, WIDTH)) + rng.standard_normal((seeds, PROMPTS, WIDTH)))


@functools.cache
def true_share(weight, of_run):
    """The share of infinitely many runs, seeds and training images."""
    rng, count = np.random.default_rng(0), 40_000
    concept = training(rng, 5 * count).mean(axis=0)
    lora, base = (
        generated(rng, weight, count, 1, noise(rng, count)[:, None], of_run).mean(axis=(0, 1, 2)) @ concept
        for weight, of_run in ((weight, of_run), (0, 0))
    )
    return (lora - base) / (concept @ concept - base)


def measure(cell):
    """A row of the table."""
    runs, images, weight = cell
    rng = np.random.default_rng([runs, images, int(100 * weight)])
    # The interval of a single run is about that run, here one without a deviation of its own.
    of_run = 0.05 if runs > 1 else 0.0
    truth = true_share(weight, of_run)
    hits, exact, widths = 0, 0, []
    for _ in range(STUDIES):
        embeddings, shared = training(rng, images), noise(rng, SEEDS)
        level, without = level_without(embeddings, np.ones(images, bool))
        lora = generated(rng, weight, runs, SEEDS, shared, of_run).mean(axis=2) @ embeddings.T
        base = np.broadcast_to(generated(rng, 0, 1, SEEDS, shared, 0).mean(axis=2) @ embeddings.T, lora.shape)
        levels = np.full(runs, level)
        found = share_interval(lora, base, levels, np.tile(without, (runs, 1)))
        hits += found["low"] <= truth <= found["high"]
        widths.append(found["high"] - found["low"])
        fixed = mean_interval(seeds_alone(lora.mean(axis=2), base.mean(axis=2), levels))
        exact += fixed["low"] <= truth <= fixed["high"]
    return runs, images, truth, hits / STUDIES, exact / STUDIES, float(np.median(widths))


def seeds_alone(lora, base, levels):
    """Jackknife values of the share over the seeds, the training images taken as given."""

    def share(kept):
        low = base[:, kept].mean(axis=1)
        return (lora[:, kept].mean(axis=1) - low) / (levels - low)

    return jackknife(share, SEEDS)


def main():
    started = time.monotonic()
    cells = list(itertools.product(RUNS, IMAGES, SHARES))
    with multiprocessing.Pool(os.cpu_count()) as pool:
        rows = pool.map(measure, cells, chunksize=1)
    print(f"\nCoverage of the 95% interval of the share, {STUDIES:,} studies a cell, {SEEDS} seeds.\n")
    heads = ("runs", "training images", "true share", "covers", "training images taken as given", "median width")
    for row in (heads, ["--:"] * len(heads)):
        print("| " + " | ".join(row) + " |")
    for runs, images, truth, hits, exact, width in rows:
        print(f"| {runs} | {images} | {truth:.0%} | {hits:.1%} | {exact:.1%} | {width:.0%} |")
    least = min(row[3] for row in rows)
    print(f"\nThe least cell covers {least:.1%}; the whole took {(time.monotonic() - started) / 60:.1f} minutes.")
    sys.exit(int(least < LEAST_COVERAGE))


if __name__ == "__main__":
    main()
