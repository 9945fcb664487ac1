"""Which of several snapshots or scales to take, and how good it is, without flattering it.

The best of many by a score is flattered by the choice: the highest of equal ones is the one that was
lucky. So the sampling seeds are divided: the choice is made on one half and its figure reported on the
other, which had no say. Seeds are independent of one another, so that figure is unbiased, whatever the
rule of the choice (`test_the_reported_figure_is_not_flattered` simulates equal snapshots).

The rule: the earliest point from which more training, or more of the adapter, gains nothing that can be
told. A point is higher than another if its concept similarity lies above by more than the margin and by more
than one standard error of the paired difference over the choosing seeds (the one-standard-error rule of
Breiman, Friedman, Olshen & Stone, "Classification and Regression Trees", 1984). A test at 5% would be the
wrong tool for a choice: with four seeds it tells hardly any difference, and takes a step at which the
concept is half there.
"""

import numpy as np

from lib.evaluation.effects import FEWEST_SEEDS
from lib.evaluation.points import Point
from lib.evaluation.statistics import mean_interval

FEWEST = 2 * FEWEST_SEEDS  # sampling seeds: either half says something
BASE = Point(0, 0.0)  # nothing of any adapter, which can be chosen too


def halves(seeds):
    """Indices of the sampling seeds that choose and of those that report: every other one."""
    return np.arange(0, seeds, 2), np.arange(1, seeds, 2)


def more(point, other):
    """Whether `point` has more of the adapter than `other`: more training, a larger scale, or both."""
    return point != other and point.steps >= other.steps and point.scale >= other.scale


def told_higher(difference, margin):
    """Whether paired differences [seeds] lie above `margin` and above their mean's standard error."""
    error = difference.std(ddof=1) / len(difference) ** 0.5
    return difference.mean() > max(error, margin)


def choose(gains, spoiled, margin):
    """(chosen, best): the Point that the rule takes, and the one with the highest gain, both by the
    choosing half of the seeds; None where there are too few seeds to divide.

    `gains` {Point: [seeds]} is what each gained in concept similarity, `spoiled` {Point: [seeds]} how far
    other prompts moved toward the training pictures: of several points that would do, none of which
    has less of the adapter than another, the one that spoiled least. BASE, with no gain, is added.
    """
    seeds = len(next(iter(gains.values())))
    if seeds < FEWEST:
        return None
    choosing, _ = halves(seeds)
    gains = {BASE: np.zeros(seeds)} | {p: v for p, v in gains.items() if p.scale > 0}
    enough = [
        point
        for point in gains
        if not any(
            more(other, point) and told_higher((gains[other] - gains[point])[choosing], margin) for other in gains
        )
    ]
    least = [point for point in enough if not any(more(point, other) for other in enough)]
    chosen = min(least, key=lambda point: (spoiled[point][choosing].mean() if point in spoiled else 0, point.steps))
    return chosen, max(gains, key=lambda point: gains[point][choosing].mean())


def both_figures(values):
    """A figure [seeds] on each half: dict(choosing: its mean, flattered where it was chosen by it;
    reported: mean and interval on the seeds that had no say)."""
    choosing, reporting = halves(len(values))
    return dict(choosing=float(values[choosing].mean()), reported=mean_interval(values[reporting][None]))
