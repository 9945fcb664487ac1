"""What adapters changed, paired by prompt and seed: arrays [runs, prompts, seeds]."""

import numpy as np

from lib.evaluation.metrics.lpips_distances import no_change_reason
from lib.evaluation.metrics.memorisation import CopyStudy
from lib.evaluation.metrics.similarity import kernel_distance
from lib.evaluation.metrics.table import DIFFERENCE, METRICS, SHARE
from lib.evaluation.statistics import jackknife, mean_interval


def grid(run, key, model, prompts):
    """The scores `key` of a run's base or LoRA images: [prompts, seeds], or None if they were not measured."""
    values = [row.get(key) for row in run.rows if row["model"] == model]
    return None if None in values else np.array(values, np.float64).reshape(len(prompts), -1)


def scored_effect(runs, key, prompts):
    """What the adapters of `runs` changed in a metric of single images: [runs, prompts, seeds], or None."""
    lora, base = ([grid(run, key, model, prompts) for run in runs] for model in ("lora", "base"))
    if METRICS[key].kind != DIFFERENCE:
        base = [0] * len(runs)
    if any(values is None for values in (*lora, *base)):
        return None
    return np.stack([after - before for after, before in zip(lora, base, strict=True)])


def effects(runs, prompts, base_pairs, hidden=False):
    """What the adapters of one experiment changed, by every metric that was measured: {metric: [runs, prompts, seeds]}.

    `base_pairs` [prompts, seeds, seeds] are the LPIPS between base images of a prompt. `hidden` includes the metrics
    that no table shows.
    """
    found, no_ceiling = {}, no_change_reason(base_pairs)
    for key, metric in METRICS.items():
        if metric.kind == SHARE and no_ceiling:
            continue
        values = scored_effect(runs, key, prompts) if metric.scorer else metric.effect(runs, found, base_pairs)
        if values is not None:
            found[key] = values
    return {key: values for key, values in found.items() if hidden or METRICS[key].shown}


def kernel_distances(runs, chosen, training):
    """Kernel distances to the training images over the prompts `chosen`: dict(base, lora, difference).

    `base` and `lora` are means over the runs, `difference` the interval of LoRA minus base.
    """
    seeds = runs[0].embeddings["lora"].shape[1]

    def distance(run, model, kept):
        embeddings = run.embeddings[model][chosen][:, kept]
        return kernel_distance(embeddings.reshape(-1, embeddings.shape[-1]), training)

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
    """The CopyStudy of a run: its images of the prompts `chosen` and its own training set."""
    trained = training.trained_on(run.adapter)
    held_out = np.setdiff1d(np.arange(len(training.names)), trained)
    return CopyStudy(
        trained_on=training.embeddings[trained],
        trained_on_mirrored=training.mirrored[trained],
        held_out=training.embeddings[held_out],
        drawn=run.embeddings["lora"][chosen],
        drawn_mirrored=run.embeddings["lora_mirrored"][chosen],
    )
