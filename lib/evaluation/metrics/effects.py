"""What adapters changed, paired by prompt and seed: arrays over training runs, prompts and seeds."""

import numpy as np

from lib.evaluation.metrics.clip_scores import kernel_distance
from lib.evaluation.metrics.lpips_distances import pair_mean
from lib.evaluation.metrics.memorisation import CopyStudy
from lib.evaluation.statistics import jackknife, mean_interval

# Fewer seeds a prompt say too little of what chance alone varies: 4 are 6 pairs of images.
FEWEST_SEEDS = 4


def grid(run, key, model, prompts):
    """The scores `key` of a run's base or LoRA images as an array [prompts, seeds]."""
    values = [row[key] for row in run.rows if row["model"] == model]
    return np.array(values, np.float64).reshape(len(prompts), -1)


def no_change_reason(base_pairs):
    """Why change and variety cannot be had from `base_pairs`, a sentence, or None if they can."""
    seeds = base_pairs.shape[-1]
    if seeds < FEWEST_SEEDS:
        few = f"{seeds} seed{'s' if seeds > 1 else ''} a prompt"
        return f"{few} give no LPIPS ceiling to speak of: change and variety need {FEWEST_SEEDS}"
    without = [np.delete(np.arange(seeds), seed) for seed in range(seeds)]
    if min(pair_mean(base_pairs[:, kept][:, :, kept]).min() for kept in without) <= 0:
        return "base images of one prompt are all the same, so change and variety have no scale"
    return None


def effects(runs, prompts, base_pairs):
    """What the adapters of one experiment changed, arrays [runs, prompts, seeds].

    clip and concept_similarity: LoRA minus base. lpips: base to LoRA. change: lpips as a share of its
    ceiling, the LPIPS between base images of that prompt at different seeds (`base_pairs`,
    [prompts, seeds, seeds]). variety: the LPIPS between LoRA images at different seeds as a share
    of the same ceiling. Those two are ratios of means over the seeds, so their values are the
    jackknife's, which carry the ceiling's own error. What was not computed, or cannot be
    (`no_change_reason`), is left out.
    """
    found = {"lpips": np.stack([grid(run, "lpips", "lora", prompts) for run in runs])}
    for key in ("clip", "concept_similarity"):
        if runs[0].rows[0][key] is not None:
            found[key] = np.stack([grid(run, key, "lora", prompts) - grid(run, key, "base", prompts) for run in runs])
    seeds = found["lpips"].shape[2]
    if no_change_reason(base_pairs) is None:

        def ceiling(kept):
            return pair_mean(base_pairs[:, kept][:, :, kept])

        def change(kept):
            return found["lpips"][:, :, kept].mean(axis=2) / ceiling(kept)

        def variety(kept):
            return pair_mean(lora_pairs[:, :, kept][:, :, :, kept]) / ceiling(kept)

        found["change"] = jackknife(change, seeds)
        if all(run.pairs is not None for run in runs):
            lora_pairs = np.stack([run.pairs for run in runs])
            found["variety"] = jackknife(variety, seeds)
    return found


def kernel_distances(runs, chosen, training):
    """Kernel distances to the training images over the prompts `chosen`: a dict.

    base and lora, means over the runs, and difference, LoRA minus base with its interval.
    """
    seeds = runs[0].embeddings["lora"].shape[1]

    def distance(run, model, kept):
        found = run.embeddings[model][chosen][:, kept]
        return kernel_distance(found.reshape(-1, found.shape[-1]), training)

    def difference(kept):
        base = distance(runs[0], "base", kept)
        return np.array([distance(run, "lora", kept) - base for run in runs])

    every = np.arange(seeds)
    return dict(
        base=distance(runs[0], "base", every),
        lora=float(np.mean([distance(run, "lora", every) for run in runs])),
        difference=mean_interval(jackknife(difference, seeds)),
    )


def copy_study(run, chosen, training):
    """What memorisation.py judges a run by: its success images, `chosen`, and its own training set."""
    trained = training.trained_on(run.adapter)
    held_out = np.setdiff1d(np.arange(len(training.names)), trained)
    return CopyStudy(
        trained_on=training.embeddings[trained],
        trained_on_mirrored=training.mirrored[trained],
        held_out=training.embeddings[held_out],
        drawn=run.embeddings["lora"][chosen],
        drawn_mirrored=run.embeddings["lora_mirrored"][chosen],
    )
