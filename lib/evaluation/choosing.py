"""Which snapshot or scale of an adapter to take: what each gains and spoils, and a choice that is not biased.

The best of many scores is biased upward by the choice: of equal snapshots the lucky one wins. So the sampling seeds are
split: one half chooses, and the figure reported is that of the other half. Seeds are independent, so that figure is
unbiased whatever the rule (`test_the_reported_figure_is_not_flattered` simulates equal snapshots).

The rule: the earliest point beyond which more training, or more of the adapter, gains nothing measurable. A point is
higher than another if its concept similarity exceeds the other's by more than the margin and by more than one standard
error of the paired difference over the choosing seeds (the one-standard-error rule of Breiman, Friedman, Olshen & Stone,
"Classification and Regression Trees", 1984). A test at 5% would be wrong for a choice: with four seeds it detects hardly
any difference, and takes a step at which the concept is half learned.
"""

from typing import NamedTuple

import numpy as np

from lib.evaluation.metrics.effects import effects
from lib.evaluation.metrics.lpips_distances import FEWEST_SEEDS
from lib.evaluation.metrics.table import measures
from lib.evaluation.prompts import CATEGORIES, UNTAUGHT, members
from lib.evaluation.report.words import interval_text
from lib.evaluation.statistics import mean_interval

FEWEST = 2 * FEWEST_SEEDS  # sampling seeds: enough in either half


class Point(NamedTuple):
    """A snapshot's training step and the scale of the adapter."""

    step: int | None  # None for the final adapter where no snapshots are evaluated
    scale: float

    @property
    def steps(self):
        """The step as a number to compare by."""
        return self.step or 0

    @property
    def file_stem(self):
        """What its images are called before the seed."""
        step = f"_step_{self.step:06}" if self.step else ""
        return f"lora{step}" + (f"_scale_{self.scale:g}" if self.scale != 1 or not self.step else "")

    def __str__(self):
        parts = [f"step {self.step:,}"] if self.step else []
        if self.scale != 1 or not self.step:
            parts.append(f"scale {self.scale:g}")
        return ", ".join(parts)


BASE = Point(0, 0.0)  # the base model, which can be chosen too
CONCEPT, MATCH = "concept_similarity success", "clip success"
BLEEDING = {f"concept_similarity {category.name}": category.noun for category in UNTAUGHT}


# ---- the choice ----------------------------------------------------------------------------


def halves(seeds):
    """Indices of the sampling seeds that choose and of those that report: every other one."""
    return np.arange(0, seeds, 2), np.arange(1, seeds, 2)


def more(point, other):
    """Whether `point` has more of the adapter than `other`: more training, a larger scale, or both."""
    return point != other and point.steps >= other.steps and point.scale >= other.scale


def is_higher(difference, margin):
    """Whether the mean of paired differences [seeds] exceeds `margin` and its standard error."""
    error = difference.std(ddof=1) / len(difference) ** 0.5
    return difference.mean() > max(error, margin)


def choose(gains, spoiled, margin):
    """(the Point that the rule takes, the Point with the highest gain), both by the choosing half of the seeds; None
    with too few seeds to split.

    `gains` {Point: [seeds]} are gains in concept similarity, `spoiled` {Point: [seeds]} how far other prompts moved
    toward the training images. Of several candidates, none with less of the adapter than another, the one that spoiled
    least is taken. BASE, without any gain, is added.
    """
    seeds = len(next(iter(gains.values())))
    if seeds < FEWEST:
        return None
    choosing, _ = halves(seeds)
    gains = {BASE: np.zeros(seeds)} | {p: v for p, v in gains.items() if p.scale > 0}
    enough = [
        point
        for point in gains
        if not any(more(other, point) and is_higher((gains[other] - gains[point])[choosing], margin) for other in gains)
    ]
    least = [point for point in enough if not any(more(point, other) for other in enough)]
    chosen = min(least, key=lambda point: (spoiled[point][choosing].mean() if point in spoiled else 0, point.steps))
    return chosen, max(gains, key=lambda point: gains[point][choosing].mean())


def both_figures(values):
    """A figure [seeds] on each half: dict(choosing=its mean, biased if it was chosen by it; reported=mean and interval
    on the other half)."""
    choosing, reporting = halves(len(values))
    return dict(choosing=float(values[choosing].mean()), reported=mean_interval(values[reporting][None]))


# ---- a run's sweep -------------------------------------------------------------------------


def swept_values(run, prompts, base_pairs):
    """{"metric category": [seeds]} of a scored Run: each swept measure, the mean over the category's prompts."""
    found = effects([run], prompts, base_pairs, hidden=True)
    return {
        f"{key} {category}": found[key][0, members(prompts, category)].mean(axis=0)
        for key, category in measures("swept")
        if key in found and members(prompts, category)
    }


def sweep_summary(run, prompts, base_pairs, margins):
    """The trade-off over a run's points: dict(rows, choice, advice), for metrics.json.

    A row has `step`, `scale` and the interval of each swept measure under "metric category", and `held_out`, the
    change of the held-out loss since before the first step, over the held-out images. `choice` is None if the concept
    was not measured or there are too few seeds.
    """
    values = {point: swept_values(part, prompts, base_pairs) for point, part in sorted(run.sweep.items())}
    losses = run.adapter.get("held_out_losses", {})
    rows = []
    for point, of_point in values.items():
        rows.append(dict(step=point.step, scale=point.scale))
        rows[-1] |= {key: mean_interval(of_seeds[None]) for key, of_seeds in of_point.items()}
        now, before = losses.get(str(point.step)), losses.get("0")
        if now and before and point.scale == 1:
            rows[-1]["held_out"] = mean_interval([np.subtract(now, before)])
    choice = None
    if "concept_similarity" in margins and all(CONCEPT in of_point for of_point in values.values()):
        choice = choice_of(values, margins["concept_similarity"])
    return dict(rows=rows, choice=choice, advice=advice_text(choice, rows, margins))


def choice_of(values, margin):
    """What `choose` takes with its figures on both halves of the seeds, and what the greatest point gains and costs
    beyond it on the reporting half: a dict, or None.

    `values` is {Point: {measure: [seeds]}}.
    """
    gains = {point: of_point[CONCEPT] for point, of_point in values.items()}
    spoiled = {
        point: np.mean([of_point[key] for key in BLEEDING if key in of_point] or [0 * of_point[CONCEPT]], axis=0)
        for point, of_point in values.items()
    }
    picked = choose(gains, spoiled, margin)
    if picked is None:
        return None
    seeds = len(next(iter(gains.values())))
    nothing = {key: np.zeros(seeds) for of_point in values.values() for key in of_point}
    last = max(values, key=lambda point: (point.steps, point.scale))
    choice = dict(seeds=[len(half) for half in halves(seeds)], greatest=last._asdict())
    for name, point in zip(("chosen", "best"), picked, strict=True):
        figures = both_figures(values.get(point, nothing)[CONCEPT])
        choice[name] = dict(step=point.step, scale=point.scale, **figures)
    _, reporting = halves(seeds)
    if picked[0] != last:
        here = values.get(picked[0], nothing)
        choice["going_on"] = {
            key: mean_interval((values[last][key] - here[key])[reporting][None])
            for key in (CONCEPT, MATCH, *BLEEDING)
            if key in here and key in values[last]
        }
    return choice


# ---- in words ------------------------------------------------------------------------------


def named(point):
    """A point of `choice` in words."""
    return str(Point(point["step"], point["scale"]))


def advice_text(choice, rows, margins):
    """Which point to take, how good it is, and what going on would cost: sentences."""
    if choice is None:
        if not all(CONCEPT in row for row in rows):
            return "None is advised. The concept was not measured."
        if "concept_similarity" not in margins:
            return "None is advised. The scale of concept similarity is unknown, and with it the margin."
        return f"None is advised. Choosing on one half of the sampling seeds and reporting on the other needs {FEWEST}."
    chosen, best, last = choice["chosen"], choice["best"], named(choice["greatest"])
    (choosing, reporting), margin = choice["seeds"], margins["concept_similarity"]
    if (chosen["step"], chosen["scale"]) == BASE:
        return (
            f"None is advised. On the {choosing} choosing seeds no step or scale makes success prompts more similar to "
            f"the training images by more than one standard error and the margin of {margin:g}."
        )
    text = [
        f"Take {named(chosen)}. It is the earliest after which none has a concept similarity higher by more than one "
        f"standard error and more than the margin of {margin:g}. It gained {chosen['choosing']:+.3f} on the "
        f"{choosing} choosing seeds, and {interval_text(chosen['reported'])} on the {reporting} others, which had no "
        "say."
    ]
    if "going_on" in choice:
        text.append(going_on_text(choice["going_on"], last))
        if choice["going_on"][CONCEPT]["high"] > margin:
            text.append(f"More sampling seeds (--seeds {2 * (choosing + reporting)}) would narrow that down.")
    if (best["step"], best["scale"]) != (chosen["step"], chosen["scale"]):
        text.append(
            f"The highest score on the choosing seeds is that of {named(best)}: {best['choosing']:+.3f} there, "
            f"{interval_text(best['reported'])} on the others."
        )
    losses = [row for row in rows if "held_out" in row]
    if losses:
        lowest = min(losses, key=lambda row: row["held_out"]["mean"])
        text.append(f"The held-out loss was lowest at {named(lowest)}.")
    return " ".join(text)


def going_on_text(further, last):
    """What more of the adapter than the chosen point gains and costs."""
    text = f"On those others, going on to {last} changed it by {interval_text(further[CONCEPT])}"
    if further[CONCEPT]["low"] > 0:
        text += ", a gain that the rule does not count: by the choosing seeds it is too small"
    if MATCH in further:
        text += f", changed the match with the prompt by {interval_text(further[MATCH])}"
    moved = [f"{name} {interval_text(further[key])}" for key, name in BLEEDING.items() if key in further]
    if moved:
        text += f", and moved {' and '.join(moved)} further toward the training images"
    return text + "."


def chosen_point(sweep):
    """The Point that a sweep's summary advises, or None."""
    chosen = sweep["choice"] and sweep["choice"]["chosen"]
    return Point(chosen["step"], chosen["scale"]) if chosen and chosen["scale"] else None


def grid_table(rows):
    """Rows of text, steps down and scales across: the gain of success prompts / movement of near and unrelated ones;
    None if there is only one step or one scale."""
    steps, scales = ({row[key]: None for row in rows} for key in ("step", "scale"))
    if min(len(steps), len(scales)) < 2 or CONCEPT not in rows[0]:
        return None
    keys = [f"concept_similarity {category}" for category in CATEGORIES]
    cells = {
        (row["step"], row["scale"]): " / ".join(
            f"{row[key]['mean']:+.3f}".replace("-", "−") for key in keys if key in row
        )
        for row in rows
    }
    head = ["Step", *(f"scale {scale:g}" for scale in scales)]
    return [head] + [[f"{step:,}", *(cells[step, scale] for scale in scales)] for step in steps]
