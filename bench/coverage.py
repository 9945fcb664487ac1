#!/usr/bin/env python3
"""How often 95% intervals hold the truth: statistics.mean_interval beside the percentile bootstrap.

    python bench/coverage.py     # 7 s on one CPU core

Simulated studies of the sizes that this project runs: training runs and sampling seeds with crossed
random effects of known spread. The bootstrap resamples runs and seeds, 1,000 draws a study.
"""

import sys
from pathlib import Path

import numpy as np

from lib.evaluation import statistics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

STUDIES, DRAWS = 2000, 1000
# (training runs, sampling seeds, spread between runs, between seeds, of the rest)
SETTINGS = (
    (1, 8, 0, 0, 1),
    (1, 8, 0, 1, 1),
    (3, 8, 0, 0, 1),
    (3, 8, 0, 1, 1),
    (3, 8, 1, 0, 1),
    (3, 8, 1, 1, 1),
    (3, 8, 1, 0.3, 0.3),
    (5, 8, 1, 1, 1),
)


def bootstrap_covers(rng, values, truth):
    """Whether the percentile bootstrap's interval of each study [n, runs, seeds] holds `truth`."""
    _, runs, seeds = values.shape
    means = np.empty((DRAWS, len(values)))
    for draw in range(DRAWS):
        chosen_runs, chosen_seeds = rng.integers(runs, size=runs), rng.integers(seeds, size=seeds)
        means[draw] = values[:, chosen_runs][:, :, chosen_seeds].mean(axis=(1, 2))
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return (low <= truth) & (truth <= high)


def main():
    rng = np.random.default_rng(0)
    print("| runs | seeds | spread: runs | seeds | rest | this project | percentile bootstrap |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for runs, seeds, run_spread, seed_spread, rest in SETTINGS:
        values = (
            run_spread * rng.standard_normal((STUDIES, runs, 1))
            + seed_spread * rng.standard_normal((STUDIES, 1, seeds))
            + rest * rng.standard_normal((STUDIES, runs, seeds))
        )
        intervals = [statistics.mean_interval(study) for study in values]
        ours = np.mean([i["low"] <= 0 <= i["high"] for i in intervals])
        theirs = bootstrap_covers(rng, values, 0).mean()
        row = [runs, seeds, run_spread, seed_spread, rest, f"{ours:.1%}", f"{theirs:.1%}"]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
