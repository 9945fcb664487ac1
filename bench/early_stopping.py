#!/usr/bin/env python3
"""How often early stopping (lib/training/early_stopping.py) ends a run too early, by simulation.

    python bench/early_stopping.py                  # seconds on one CPU core
    python bench/early_stopping.py RUN/log.jsonl …  # where the rule would have ended these runs, and the spreads below

"Too early" is a stop at a look after which the held-out loss, averaged over all images that could have been held out,
would still fall by MARGIN of its fall so far, or more.

A run's loss at a look is a curve over the share of the learning rate that is behind, times the amplitude of each held-out
image, and noise: of each image, and common to all (the weights fluctuate). The spreads are those of four runs on the
miniature (seeds 43 to 46). Three families of curves:

- just at the margin: after a steep start the loss falls evenly, by exactly MARGIN of its fall so far from look k on. An
  even fall is the edge of the assumption that returns diminish: the last stretch then predicts the rest exactly. The images
  share k, and their slopes differ.
- exponential: 1 - exp(-share / tau), with a tau for each image, as in the real runs.

and two whose returns do not diminish, so nothing is promised:

- late: the rest gains half as much again as the stretch before it.
- resting: nothing is gained until 80% of the learning rate is behind, then the loss falls evenly.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from scipy.optimize import curve_fit

from lib.training.early_stopping import LOOKS, MARGIN, EarlyStopping
from train import DEMO, learning_rate_factor

RUNS, IMAGES, TAUS = 20_000, (3, 4, 8), (0.15, 0.2, 0.3, 0.5, 1.0)
ALLOWED = 0.05
AMPLITUDES, RATES = 0.4, 0.25  # relative spread between images
SLOPES = 0.7, 1.2  # the same of what the rest gains: as measured, and more
OWN, COMMON, LASTING = 0.0123, 0.0103, 0.5  # noise over an image's amplitude, its correlation from look to look


def rule(max_steps=DEMO["max_steps"], warmup_steps=50):
    return EarlyStopping(dict(stop_early=True, max_steps=max_steps, warmup_steps=warmup_steps), learning_rate_factor)


def noise(rng, runs, images, times):
    """Noise [looks, runs, images]; there is none before the first step."""
    found = np.zeros((LOOKS + 1, runs, images))
    sizes = times * np.array([OWN, COMMON])
    own, common = rng.standard_normal((runs, images)), rng.standard_normal((runs, 1))
    for look in range(1, LOOKS + 1):
        found[look] = sizes[0] * own + sizes[1] * common
        fresh = rng.standard_normal((runs, images)), rng.standard_normal((runs, 1))
        own, common = (
            LASTING * old + (1 - LASTING**2) ** 0.5 * new for old, new in zip((own, common), fresh, strict=True)
        )
    return found


def positive(rng, spread, *shape):
    """Random factors with mean 1 and this relative spread, log-normal."""
    of_log = np.log1p(spread**2) ** 0.5
    return np.exp(of_log * rng.standard_normal(shape) - of_log**2 / 2)


def at_margin(shares, look, rng, runs, images, slopes, faster=1.0):
    """Gains [looks, runs, images] of curves whose rest gains MARGIN of what is gained at `look`, with a relative spread of
    `slopes` between images; up to there the slope is 1 / `faster` of that."""
    bend = 2 * shares[look] - 1  # the stretch before `look` begins here, or earlier
    x = shares[:, None, None]
    after = MARGIN / (1 - shares[look]) * positive(rng, slopes, 1, runs, images)
    slope = np.where(x <= shares[look], after / faster, after)
    even = 1 + slope * (x - shares[look])
    start = 1 - after / faster * shares[look]  # of the even part, continued to 0
    return even - start * np.maximum(1 - x / bend, 0) ** 3


def exponential(shares, tau, rng, runs, images):
    """Gains [looks, runs, images] of curves 1 - exp(-share / tau)."""
    taus = tau * positive(rng, RATES, 1, runs, images)
    return curve(shares[:, None, None], 1, taus)


def stops(ending, steps, gains):
    """The number of the look at which each run ends, [runs]; LOOKS if it does not."""
    losses, passed = {}, np.zeros((len(steps), gains.shape[1]), bool)
    for look, step in enumerate(steps):
        losses[step] = -gains[look]
        passed[look] = ending.passes(losses, step)
    both = passed[1:] & passed[:-1]
    return np.where(both.any(axis=0), both.argmax(axis=0) + 1, LOOKS)


def too_early(ending, steps, curves, last_bad, times, rng):
    """(share of runs that end too early, mean share of the steps that a run trains) for `curves` [looks, runs, images] of
    which the look `last_bad` is the last with MARGIN ahead of it, or more."""
    amplitudes = positive(rng, AMPLITUDES, *curves.shape[1:])
    found = stops(ending, steps, amplitudes * (curves + noise(rng, *curves.shape[1:], times)))
    return np.mean(found <= last_bad), np.mean(np.array([*steps])[found]) / steps[-1]


def losses_of(path):
    """{step: losses of the held-out images} of a run's log."""
    rows = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
    return {row["step"]: np.array(row["validation_losses"]) for row in rows if "validation_losses" in row}


def replay(paths):
    """Where the rule would have ended finished runs, and the spreads of their held-out losses around exponential curves."""
    print("| run | ends after | of | rest, of the fall so far |")
    print("|---|--:|--:|--:|")
    amplitudes, rates, residuals, slopes = [], [], [], []
    for path in paths:
        losses = losses_of(path)
        ending = rule(max(losses))
        last = ending.last_step([dict(step=step, validation_losses=found) for step, found in losses.items()])
        rest = (losses[last] - losses[max(losses)]).mean() / (losses[0] - losses[last]).mean()
        print(f"| {path} | {last} | {ending.max_steps} | {rest:.1%} |")
        looks = [step for step in losses if ending.is_look(step)]
        x, gains = ending.shares[looks], losses[0] - np.array([losses[step] for step in looks])
        fits = [curve_fit(curve, x, gain, p0=(gain[-1], 0.3))[0] for gain in gains.T]
        amplitudes.append([amplitude for amplitude, _ in fits])
        rates.append([tau for _, tau in fits])
        late = np.array([(gain - curve(x, *fit)) / fit[0] for gain, fit in zip(gains.T, fits, strict=True)])[:, x > 0.5]
        residuals.append(late)
        rests = np.array([losses[step] - losses[max(losses)] for step in looks])[(x > 0.7) & (x < 0.9)]
        slopes.append(np.mean(rests.std(axis=1, ddof=1) / rests.mean(axis=1)))
    amplitudes, rates, residuals = map(np.array, (amplitudes, rates, residuals))  # [runs, images(, looks)]
    common = residuals.mean(axis=1, keepdims=True)
    own = residuals - common
    later, before = residuals[..., 1:].ravel(), residuals[..., :-1].ravel()
    spread = [
        np.std(np.log(values) - np.log(values).mean(axis=1, keepdims=True), ddof=len(paths))
        for values in (amplitudes, rates)
    ]
    print(
        f"\nspread of amplitudes {spread[0]:.2f}, of taus {spread[1]:.2f} around {np.exp(np.log(rates).mean()):.2f}, of the rest {np.mean(slopes):.2f}"
    )
    print(
        f"noise: own {own.std():.4f}, common {common.std():.4f}, from look to look {np.corrcoef(later, before)[0, 1]:.2f}"
    )


def curve(x, amplitude, tau):
    """The exponential family: a loss's fall after a share `x` of the learning rate."""
    return amplitude * (1 - np.exp(-x / tau)) / (1 - np.exp(-1 / tau))


def simulate():
    ending, started = rule(), time.monotonic()
    steps = [step for step in range(ending.max_steps + 1) if ending.is_look(step)]
    shares = ending.shares[steps]
    # Later looks cannot have that much ahead of them if returns diminish.
    looks = [look for look in range(LOOKS) if 0.55 < shares[look] <= 1 / (1 + MARGIN)]
    print(
        f"\nRuns that end too early, of {RUNS:,} a cell: the worst look from {looks[0]} to {looks[-1]}, the worst tau.\n"
    )
    heads = [f"just at the margin, slopes {spread}" for spread in SLOPES] + ["exponential", "late", "resting"]
    print(f"| held-out images | noise | {' | '.join(heads)} | steps trained, exponential, by tau |")
    print("|--:|--:|--:|--:|--:|--:|--:|---|")
    worst = 0
    for images, times in itertools.product(IMAGES, (1, 2)):
        rng = np.random.default_rng([images, times])
        size = rng, RUNS, images

        def of_margin(slopes, faster=1.0, size=size, times=times):
            curves = ((look, at_margin(shares, look, *size, slopes, faster)) for look in looks)
            return max(too_early(ending, steps, found, look, times, size[0])[0] for look, found in curves)

        early, late = [of_margin(slopes) for slopes in SLOPES], of_margin(SLOPES[0], 1.5)
        rest = np.maximum(shares[:, None, None] - 0.8, 0) / 0.2 * np.ones((1, RUNS, images))
        resting, _ = too_early(ending, steps, rest, np.flatnonzero(shares < 0.8).max(), times, rng)
        shrinking = []
        for tau in TAUS:
            curves = exponential(shares, tau, *size)
            means = curves.mean(axis=(1, 2))  # amplitudes have mean 1
            last_bad = max(look for look in range(LOOKS) if means[-1] - means[look] >= MARGIN * means[look])
            shrinking.append(too_early(ending, steps, curves, last_bad, times, rng))
        ends = ", ".join(f"{tau:g}: {trained:.0%}" for tau, (_, trained) in zip(TAUS, shrinking, strict=True))
        early.append(max(share for share, _ in shrinking))
        worst = max(worst, *early)
        print(f"| {images} | {times} | {' | '.join(f'{share:.1%}' for share in [*early, late, resting])} | {ends} |")
    print(
        f"\nThe worst cell of the first three families: {worst:.1%}; the whole took {(time.monotonic() - started) / 60:.1f} minutes."
    )
    sys.exit(int(worst > ALLOWED))


if __name__ == "__main__":
    replay(sys.argv[1:]) if sys.argv[1:] else simulate()
