"""The scale of the concept: 0 is the base model's images, 1 the training images among themselves.

    share = (S(adapter) - S(base model)) / (S(training images) - S(base model))

S is concept similarity, the mean cosine to the training images: for the images of one category of prompts, and for the
training images themselves the mean cosine to the others (leave-one-out), over the images that a run did not hold out.
(Scores count the few held-out images as training images too, which shifts S by chance alone.)
Cosines of different encoders do not compare. Shares do, and so does a margin that is a share.

The interval of a share carries the error of both ends. Sampling seeds and training images are independent samples, so the
ratio is jackknifed over each (as Arvesen 1969 did for U-statistics; the level is one), and the half-widths of
both intervals add in squares (Zou & Donner 2008). A delta method would need every covariance of the three means, which
the jackknife includes without a formula. `python bench/concept_scale.py` simulates the coverage.
"""

import numpy as np

from lib.evaluation.prompts import CATEGORIES, members
from lib.evaluation.statistics import jackknife, mean_interval, pseudo_values

FEWEST_IMAGES = 2  # trained on; one is similar to no other
MARGIN = 0.1  # share of the way within which an effect is negligible


# ---- the training images among themselves --------------------------------------------------


def level_without(embeddings, trained):
    """(similarity of the images `trained` among themselves, the same without each of all m images [m]).

    `embeddings` [m, d] have unit length, `trained` [m] is bool. The level without an image that is not in `trained` is
    the level itself; with two images there is none without one of them (NaN).
    """
    chosen = embeddings[trained].astype(np.float64)
    n = len(chosen)
    to_others = chosen @ chosen.sum(axis=0) - (chosen**2).sum(axis=1)  # [n], sums over n - 1 images
    level = to_others.sum() / (n * (n - 1))
    without = np.full(len(embeddings), level)
    without[trained] = (to_others.sum() - 2 * to_others) / ((n - 1) * (n - 2)) if n > 2 else np.nan
    return level, without


def training_level(training, adapter):
    """The level of the images that an adapter was trained on: dict(level, held_out, images). `held_out` is the
    similarity of held-out images to them, a control, None without any; `level` is None for fewer than FEWEST_IMAGES."""
    trained = trained_mask(training, adapter)
    images, level, held_out = int(trained.sum()), None, None
    if images >= FEWEST_IMAGES:
        level = float(level_without(training.embeddings, trained)[0])
        if not trained.all():
            held_out = float((training.embeddings[~trained] @ training.embeddings[trained].T).mean(dtype=np.float64))
    return dict(level=level, held_out=held_out, images=images)


def subject_level(training, adapter):
    """How similar whole training images are to the subjects alone of the other ones, over those that an adapter was
    trained on: dict(level, held_out, images); None without two masked ones.

    This is what an image that shows the subject on a background of its own can reach, as a generated one does; subjects
    among themselves share their background. `held_out` as for `training_level`, `images` those with a mask.
    """
    trained, masked = trained_mask(training, adapter), np.array(training.masked, int)
    of_trained = trained[masked]
    if of_trained.sum() < FEWEST_IMAGES:
        return None
    cosines = training.embeddings.astype(np.float64) @ training.subjects[of_trained].T
    others = np.arange(len(trained))[:, None] != masked[of_trained]  # no image is compared with its own subject
    held_out = float(cosines[~trained].mean()) if not trained.all() else None
    return dict(level=float(cosines[trained][others[trained]].mean()), held_out=held_out, images=int(of_trained.sum()))


def trained_mask(training, adapter):
    """Which images of a TrainingSet an adapter was trained on: bool [m]."""
    mask = np.zeros(len(training.names), bool)
    mask[training.trained_on(adapter)] = True
    return mask


# ---- the scale of an evaluation ------------------------------------------------------------


def scale_of(levels, base, category, share):
    """The scale of an evaluation and its margin: a dict for metrics.json.

    `levels` are from `training_level`, one a run; `base` is S of the base model's images of `category` prompts. `margin`
    is `share` of the way from there to the level, a cosine with three digits; None, with the `reason`, where the level
    is unknown or not above `base`. One margin serves all categories: the success prompts' way is usually the
    shortest, so it is the strictest, and what other prompts pick up is judged in the unit of what success prompts gain.
    """
    scale = dict(level=None, held_out=None, images=min(row["images"] for row in levels), base=base, category=category)
    scale |= dict(share=share, margin=None, reason=None)
    if scale["images"] < FEWEST_IMAGES:
        few = {0: "no training image is", 1: "only one training image is"}[scale["images"]]
        return scale | dict(reason=f"{few} known, so their similarity to one another is not")
    scale["level"] = float(np.mean([row["level"] for row in levels]))
    held_out = [row["held_out"] for row in levels if row["held_out"] is not None]
    scale["held_out"] = float(np.mean(held_out)) if held_out else None
    if scale["level"] <= base:
        return scale | dict(
            reason=f"the base model's images of {category} prompts are as similar to the training images ({base:.3f}) as "
            f"these are to one another ({scale['level']:.3f})"
        )
    return scale | dict(margin=float(f"{share * (scale['level'] - base):.3g}"))


def base_similarity(rows, prompts):
    """(S of the base model's images, the category): of success prompts, or of the first category that there is; `rows` are
    a run's."""
    category = next(category for category in CATEGORIES if members(prompts, category))
    chosen = [r["concept_similarity"] for r in rows if r["model"] == "base" and r["category"] == category]
    return (None if None in chosen else float(np.mean(chosen))), category


def concept_scale(runs, prompts, training, share):
    """`scale_of` an evaluation of scored runs; None where concept similarity was not measured."""
    base, category = base_similarity(runs[0].rows, prompts)
    if training is None or base is None:
        return None
    scale = scale_of([training_level(training, run.adapter) for run in runs], base, category, share)
    if training.subjects is not None and all(subjects := [subject_level(training, run.adapter) for run in runs]):
        held_out = [row["held_out"] for row in subjects if row["held_out"] is not None]
        scale["subjects"] = dict(
            level=float(np.mean([row["level"] for row in subjects])),
            held_out=float(np.mean(held_out)) if held_out else None,
            images=min(row["images"] for row in subjects),
        )
    return scale


# ---- shares --------------------------------------------------------------------------------


def both_errors(by_seed, by_image):
    """Interval of a mean from its jackknife values over runs and seeds [runs, seeds] and over training images [m], both
    of this mean: dict(mean, low, high)."""
    seeds, images = mean_interval(by_seed), mean_interval(by_image[None])
    half = np.hypot(seeds["high"] - seeds["mean"], images["high"] - images["mean"])
    return dict(mean=seeds["mean"], low=float(seeds["mean"] - half), high=float(seeds["mean"] + half))


def share_interval(lora, base, levels, without):
    """The share of the way to the training images: dict(mean, low, high), or None.

    `lora` and `base` [runs, seeds, m] are the mean cosines of a category's images to each training image, `levels`
    [runs] and `without` [runs, m] those of `level_without`. None where the scale itself, the level minus the base, has an
    interval that holds 0, or there is no interval.
    """
    _, seeds, m = lora.shape
    if seeds < 2 or m < 3 or not np.isfinite(without).all():
        return None

    def leave_one_out(values):  # [runs, m] -> [runs, m]
        return (values.sum(axis=1, keepdims=True) - values) / (m - 1)

    of_lora, of_base = lora.mean(axis=2), base.mean(axis=2)  # [runs, seeds]
    lora_without, base_without = (leave_one_out(values.mean(axis=1)) for values in (lora, base))

    def share(lora, base, level):
        return (lora - base) / (level - base)

    # The runs share the base model's images, so the scale's own error has no part of the runs.
    scale = levels.mean() - of_base.mean(axis=0, keepdims=True)
    scales_without = (without - base_without).mean(axis=0)
    if not both_errors(scale, pseudo_values(scale.mean(), scales_without))["low"] > 0:
        return None
    by_seed = jackknife(lambda kept: share(of_lora[:, kept].mean(axis=1), of_base[:, kept].mean(axis=1), levels), seeds)
    shares_without = share(lora_without, base_without, without).mean(axis=0)
    return both_errors(by_seed, pseudo_values(by_seed.mean(), shares_without))


def concept_share(runs, chosen, training):
    """`share_interval` of an experiment on the prompts `chosen`, with the `level` of its training images; None where it
    is unknown."""
    masks = [trained_mask(training, run.adapter) for run in runs]
    if any(run.embeddings is None for run in runs) or min(mask.sum() for mask in masks) < FEWEST_IMAGES:
        return None
    levels, without = map(np.array, zip(*(level_without(training.embeddings, mask) for mask in masks), strict=True))

    def to_each(model):  # [runs, seeds, m]
        means = np.stack([run.embeddings[model][chosen].mean(axis=0, dtype=np.float64) for run in runs])
        return means @ training.embeddings.T

    interval = share_interval(to_each("lora"), to_each("base"), levels, without)
    return interval and interval | dict(level=float(levels.mean()))
