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

What of an adapter is drawn with: which snapshot of it, and how much.

What an adapter gains and spoils over its training steps, its scale, or both, and which to take.
"""

from typing import NamedTuple

import numpy as np

from lib.evaluation.metrics.effects import FEWEST_SEEDS, effects, grid
from lib.evaluation.prompts import members
from lib.evaluation.report.words import interval_text
from lib.evaluation.statistics import mean_interval


class Point(NamedTuple):
    """A training step after which an adapter was kept, and the scale that it is drawn with."""

    step: int | None  # None where the snapshots are not looked at, but the adapter alone
    scale: float

    @property
    def steps(self):
        """The step as a number to compare by."""
        return self.step or 0

    @property
    def file_stem(self):
        """What the files of its images are called by, the seed left out."""
        parts = ["lora"] + ([f"step_{self.step:06}"] if self.step else [])
        if self.scale != 1 or not self.step:
            parts.append(f"scale_{self.scale:g}")
        return "_".join(parts)

    def __str__(self):
        parts = [f"step {self.step:,}"] if self.step else []
        if self.scale != 1 or not self.step:
            parts.append(f"scale {self.scale:g}")
        return ", ".join(parts)


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
    other prompts moved toward the training images: of several points that would do, none of which
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


# What is shown of each point: (score, category of prompts). Differences to the base model, but for
# change and variety, which are shares of their ceiling.
SWEPT = (
    ("concept_similarity", "success"),
    ("clip", "success"),
    ("concept_similarity", "near"),
    ("concept_similarity", "unrelated"),
    ("change", "near"),
    ("change", "unrelated"),
    ("variety", "success"),
    ("nearest_similarity", "success"),
)
CONCEPT, MATCH = "concept_similarity success", "clip success"
OTHERS = {"concept_similarity near": "near prompts", "concept_similarity unrelated": "unrelated ones"}


def swept_values(run, prompts, base_pairs):
    """{"score category": [seeds]} of a scored Run: each of SWEPT, the mean over the category's prompts."""
    found = effects([run], prompts, base_pairs)
    if run.rows[0]["nearest_similarity"] is not None:
        nearest = (grid(run, "nearest_similarity", model, prompts) for model in ("lora", "base"))
        found["nearest_similarity"] = np.subtract(*nearest)[None]
    return {
        f"{key} {category}": found[key][0, members(prompts, category)].mean(axis=0)
        for key, category in SWEPT
        if key in found and members(prompts, category)
    }


def sweep_summary(run, prompts, base_pairs, margins):
    """The trade-off over a run's points: dict(rows, choice, advice), for metrics.json.

    A row holds `step`, `scale` and, with its interval, each of SWEPT under its score and category joined
    by a blank, and `held_out`, the change of the held-out loss since before the first step, over the
    held-out images. `choice` is None where the concept or enough seeds are missing.
    """
    values = {point: swept_values(part, prompts, base_pairs) for point, part in sorted(run.sweep.items())}
    losses = run.adapter.get("held_out_losses", {})
    rows = []
    for point, found in values.items():
        rows.append(dict(step=point.step, scale=point.scale))
        rows[-1] |= {key: mean_interval(of_seeds[None]) for key, of_seeds in found.items()}
        now, before = losses.get(str(point.step)), losses.get("0")
        if now and before and point.scale == 1:
            rows[-1]["held_out"] = mean_interval([np.subtract(now, before)])
    choice = None
    if all(CONCEPT in found for found in values.values()):
        choice = choice_of(values, margins["concept_similarity"])
    return dict(rows=rows, choice=choice, advice=advice_text(choice, rows, margins))


def choice_of(values, margin):
    """What `choose` takes, with its figures on both halves of the seeds, and what going on from there to the
    greatest point costs and gains, on the half that had no say: a dict, or None.

    `values` is {Point: {measure: [seeds]}}.
    """
    gains = {point: found[CONCEPT] for point, found in values.items()}
    spoiled = {
        point: np.mean([found[key] for key in OTHERS if key in found] or [0 * found[CONCEPT]], axis=0)
        for point, found in values.items()
    }
    picked = choose(gains, spoiled, margin)
    if picked is None:
        return None
    seeds = len(next(iter(gains.values())))
    nothing = {key: np.zeros(seeds) for found in values.values() for key in found}
    last = max(values, key=lambda point: (point.steps, point.scale))
    found = dict(seeds=[len(half) for half in halves(seeds)], greatest=last._asdict())
    for name, point in zip(("chosen", "best"), picked, strict=True):
        figures = both_figures(values.get(point, nothing)[CONCEPT])
        found[name] = dict(step=point.step, scale=point.scale, **figures)
    _, reporting = halves(seeds)
    if picked[0] != last:
        here = values.get(picked[0], nothing)
        found["going_on"] = {
            key: mean_interval((values[last][key] - here[key])[reporting][None])
            for key in (CONCEPT, MATCH, *OTHERS)
            if key in here and key in values[last]
        }
    return found


def named(point):
    """A point of `choice` in words."""
    return str(Point(point["step"], point["scale"]))


def advice_text(choice, rows, margins):
    """Which point to take, what is known of it, and what going on would cost: sentences."""
    if choice is None:
        if not all(CONCEPT in row for row in rows):
            return "None is advised. The concept was not measured."
        return f"None is advised. Fewer than {FEWEST} sampling seeds are too few to choose on one half and report on the other."
    chosen, best, last = choice["chosen"], choice["best"], named(choice["greatest"])
    (choosing, reporting), margin = choice["seeds"], margins["concept_similarity"]
    if (chosen["step"], chosen["scale"]) == BASE:
        return (
            f"None is advised. On the {choosing} seeds that choose, no step or scale brings success prompts nearer "
            f"to the training images by more than one standard error and the margin of {margin:g}."
        )
    text = [
        f"Take {named(chosen)}. It is the earliest of those drawn from which no more of the adapter gains "
        f"concept similarity by more than one standard error and the margin of {margin:g}. It gained "
        f"{chosen['choosing']:+.3f} on the {choosing} seeds that chose, and {interval_text(chosen['reported'])} on the "
        f"{reporting} others, which had no say."
    ]
    if "going_on" in choice:
        text.append(going_on_text(choice["going_on"], last))
        if choice["going_on"][CONCEPT]["high"] > margin:
            text.append(f"More sampling seeds (--seeds {2 * (choosing + reporting)}) would tell that better.")
    if (best["step"], best["scale"]) != (chosen["step"], chosen["scale"]):
        text.append(
            f"The highest score on the choosing seeds had {named(best)}: {best['choosing']:+.3f} there, "
            f"{interval_text(best['reported'])} on the others."
        )
    losses = [row for row in rows if "held_out" in row]
    if losses:
        lowest = min(losses, key=lambda row: row["held_out"]["mean"])
        text.append(f"The held-out loss was lowest after {named(lowest)}.")
    return " ".join(text)


def going_on_text(further, last):
    """What more of the adapter than the chosen point brings and costs."""
    text = f"Going on to {last} changed that by {interval_text(further[CONCEPT])}"
    if further[CONCEPT]["low"] > 0:
        text += ", a gain that the seeds that chose could not tell"
    if MATCH in further:
        text += f", the match with the prompt by {interval_text(further[MATCH])}"
    moved = [f"{name} {interval_text(further[key])}" for key, name in OTHERS.items() if key in further]
    if moved:
        text += f", and moved {' and '.join(moved)} further toward the training images"
    return text + ", on those others too."


def grid_table(rows):
    """Steps down, scales across: what success prompts gained and, behind a stroke, near and unrelated ones
    moved, as rows of text; None where there is only one step or one scale."""
    steps, scales = ({row[key]: None for row in rows} for key in ("step", "scale"))
    if min(len(steps), len(scales)) < 2 or CONCEPT not in rows[0]:
        return None
    cells = {
        (row["step"], row["scale"]): " / ".join(
            f"{row[key]['mean']:+.3f}".replace("-", "−") for key in (CONCEPT, *OTHERS) if key in row
        )
        for row in rows
    }
    head = ["Step", *(f"scale {scale:g}" for scale in scales)]
    return [head] + [[f"{step:,}", *(cells[step, scale] for scale in scales)] for step in steps]
