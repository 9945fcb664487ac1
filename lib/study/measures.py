"""Measurements of the study beyond the difference of two arms: the rank correlation of change and movement, two arms
at equal concept, and equal columns of figures."""

import numpy as np
import scipy

from lib.evaluation.metrics.effects import grid
from lib.evaluation.metrics.lpips_distances import no_change_reason, pair_mean
from lib.evaluation.prompts import UNTAUGHT, members
from lib.evaluation.statistics import jackknife, mean_interval

BASELINE, PROTECTED = "rank32", "protected"
NOT_ASKED = tuple(category.name for category in UNTAUGHT)  # prompts that do not ask for the concept: near, unrelated
# (metric, category)s that are compared at equal concept.
AT_EQUAL = tuple((metric, category) for category in NOT_ASKED for metric in ("change", "concept_similarity"))


def has_movement(study):
    """Whether the study has change and concept similarity."""
    return has_score(study, "concept_similarity") and no_change_reason(study.base_pairs) is None


def has_score(study, metric):
    return study.arms[BASELINE][0].rows[0].get(metric) is not None


def concept_shares(study, runs):
    """How far an arm's images went of the way to the training images: {category: interval}; empty where the level of
    some run's training images is unknown or not above the base model's images.

    As `concept_share` of concept_scale.py, from scores alone. The interval covers training runs and sampling seeds, not
    other training images: that takes the embeddings, which metrics.json does not have.
    """
    levels = np.array([study.levels[run.name] or np.nan for run in runs])
    if not has_score(study, "concept_similarity") or not np.isfinite(levels).all():
        return {}
    lora, base = (
        np.stack([grid(run, "concept_similarity", model, study.prompts) for run in runs]) for model in ("lora", "base")
    )
    shares = {}
    for category in dict.fromkeys(category for category, _ in study.prompts):
        chosen = members(study.prompts, category)
        after, before = lora[:, chosen].mean(axis=1), base[:, chosen].mean(axis=1)  # [training seeds, sampling seeds]

        def share(kept, after=after, before=before):
            start = before[:, kept].mean(axis=1)
            return (after[:, kept].mean(axis=1) - start) / (levels - start)

        if (before.mean(axis=1) < levels).all():
            shares[category] = mean_interval(jackknife(share, after.shape[1]))
    return shares


def has_every_category(study):
    return {"success", *NOT_ASKED} <= {category for category, _ in study.prompts}


def adapters(study):
    """[(arm, [Run per training seed])]: each arm at full scale, then the lower scales."""
    lower = [(arm, runs) for arm, points in study.scaled.items() for scale, runs in points.items() if scale != 1]
    return [*study.arms.items(), *lower]


def lpips_and_movement(study, groups, chosen=slice(None)):
    """LPIPS to the base image, and movement toward the training images (cosine, LoRA minus base), of every image.

    `groups` are lists of a Run per training seed, `chosen` indices of prompts. Returns two arrays
    [training seeds, groups, prompts, sampling seeds].
    """

    def scores(key, model):  # [training seeds, groups, prompts, sampling seeds]
        every = [[grid(run, key, model, study.prompts) for run in runs] for runs in groups]
        return np.swapaxes(np.array(every), 0, 1)[:, :, chosen]

    moved = scores("concept_similarity", "lora") - scores("concept_similarity", "base")
    return scores("lpips", "lora"), moved


def change_and_movement(lpips, moved, base_pairs, kept=slice(None)):
    """Means over the sampling seeds `kept`: (change, movement), arrays [training seeds, groups, prompts].

    change = LPIPS / ceiling, where the ceiling is the LPIPS between base images of a prompt at different seeds
    (`base_pairs`, [prompts, sampling seeds, sampling seeds]).
    """
    ceiling = pair_mean(base_pairs[:, kept][:, :, kept])
    return lpips[..., kept].mean(axis=-1) / ceiling, moved[..., kept].mean(axis=-1)


def rank_correlations(lpips, moved, base_pairs):
    """Spearman's rank correlation of change and movement over all adapters and prompts, one per training seed.

    `lpips` and `moved` are [training seeds, adapters, prompts, sampling seeds]. Returns Fisher's z as jackknife
    values [training seeds, sampling seeds], for `mean_interval`.

    Points are not independent. Those of one run share its weights, those of one training seed its noise and order
    of images, and all training seeds share the sampling noise: an interval must not count points. Arms, scales and
    prompts are fixed. The random unit is the training seed, whose adapters together give one correlation. The
    correlations share the sampling seeds, and the jackknife values carry that part: these are the two crossed
    factors of statistics.py. (A bootstrap over training seeds counts the same units, but covers 77% with three of
    them, see there.)
    """

    def z(kept):
        change, movement = change_and_movement(lpips, moved, base_pairs, kept)
        ranks = (scipy.stats.rankdata(v.reshape(len(v), -1), axis=1) for v in (change, movement))
        x, y = (r - r.mean(axis=1, keepdims=True) for r in ranks)
        spread = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
        rho = (x * y).sum(axis=1) / np.where(spread > 0, spread, 1)
        return np.arctanh(np.clip(rho, -1 + 1e-9, 1 - 1e-9))

    return jackknife(z, lpips.shape[-1])


def scale_points(study, arm):
    """(scales, LPIPS, movement) of an arm's images: [scales] and twice [training seeds, scales, prompts, sampling
    seeds]. An arm without lower scales has scale 1 alone."""
    scales, groups = zip(*sorted(study.scaled.get(arm, {1.0: study.arms[arm]}).items()), strict=True)
    return scales, *lpips_and_movement(study, groups)


def curves(study, points, kept=slice(None)):
    """The scores of an arm over its scales, the base model (scale 0) first, from its `scale_points`.

    Returns {"scale": [scales], (metric, category): [training seeds, scales]} over the sampling seeds `kept`.
    """
    scales, lpips, moved = points
    change, movement = change_and_movement(lpips, moved, study.base_pairs, kept)
    values = dict(concept_similarity=movement, change=change)
    lines = {"scale": np.array([0.0, *scales])}
    for metric, category in (("concept_similarity", "success"), *AT_EQUAL):
        line = values[metric][..., members(study.prompts, category)].mean(axis=-1)
        lines[metric, category] = np.pad(line, ((0, 0), (1, 0)))  # the base model has changed nothing
    return lines


def interpolated(level, concept, others):
    """`others` [k, scales] where `concept` [scales] first reaches `level`, linear between two scales: [k]."""
    after = int(np.argmax(concept >= level))
    if after == 0:
        return others[:, 0]
    low, high = concept[after - 1], concept[after]
    share = (level - low) / (high - low)
    return others[:, after - 1] + share * (others[:, after] - others[:, after - 1])


def at_equal_concept(study):
    """PROTECTED and BASELINE at the same concept similarity of success prompts, or None if an arm gains none.

    A lower scale also trades the concept for what is preserved. So each training seed compares the two arms at the
    greatest concept similarity that both reach, each interpolated over its scales. An arm without lower scales is
    interpolated between the base model and full scale.

    Returns jackknife values [training seeds, sampling seeds] for `mean_interval`, which carry the error of the
    interpolation too: (metric, category) is PROTECTED minus BASELINE, "log change near" the logarithm of the ratio
    of their changes, "level" the concept similarity, "scale rank32" and "scale protected" the scales.
    """
    arms = (BASELINE, PROTECTED)
    keys = [*AT_EQUAL, "scale"]
    names = [*AT_EQUAL, *(f"log change {c}" for c in NOT_ASKED), "level", *(f"scale {arm}" for arm in arms)]
    points = [scale_points(study, arm) for arm in arms]

    def measured(kept):
        lines = [curves(study, found, kept) for found in points]
        concepts = [line["concept_similarity", "success"] for line in lines]
        levels = np.minimum(*(concept.max(axis=1) for concept in concepts))
        rows = []
        for seed, level in enumerate(levels):
            ends = []
            for line, concept in zip(lines, concepts, strict=True):
                others = np.stack([line[key] if key == "scale" else line[key][seed] for key in keys])
                ends.append(dict(zip(keys, interpolated(level, concept[seed], others), strict=True)))
            one, two = ends
            ratios = [np.log(max(two["change", c], 1e-9) / max(one["change", c], 1e-9)) for c in NOT_ASKED]
            rows.append([*(two[key] - one[key] for key in AT_EQUAL), *ratios, level, one["scale"], two["scale"]])
        return np.array(rows).T

    every = np.arange(len(study.sampling_seeds))
    if not (measured(every)[names.index("level")] > 0).all():
        return None
    return dict(zip(names, jackknife(measured, len(every)), strict=True))


def equal_concept_intervals(study):
    """{name: interval} of `at_equal_concept`, or None where it is unavailable.

    Metric and category are joined by a blank. "ratio near" and "ratio unrelated" replace the logarithms.
    """
    if not (has_movement(study) and has_every_category(study) and (values_of := at_equal_concept(study))):
        return None
    intervals = {}
    for name, values in values_of.items():
        interval = mean_interval(values)
        name = " ".join(name) if isinstance(name, tuple) else name
        if name.startswith("log change "):
            interval |= {end: float(np.exp(interval[end])) for end in ("mean", "low", "high")}
            name = name.replace("log change", "ratio")
        intervals[name] = interval
    return intervals


def columns(study, one=BASELINE, other="rank8"):
    """The published study's three figures for two arms, from one image a prompt, or None without its prompts or CLIP.

    The figures are the mean CLIP score and LPIPS of the first three success prompts, and the LPIPS of the cat.
    Returns a dict: `same` [training seeds, sampling seeds], whether all three agree to four digits, and `apart`,
    the mean distance of each.
    """
    success, cat = members(study.prompts, "success")[:3], ("unrelated", "a cat sitting on a couch")
    if len(success) < 3 or cat not in study.prompts or not has_score(study, "clip"):
        return None
    figures = []
    for arm in (one, other):  # [training seeds, prompts, sampling seeds]
        clip, lpips = (
            np.stack([grid(run, key, "lora", study.prompts) for run in study.arms[arm]]) for key in ("clip", "lpips")
        )
        lpips_of_cat = lpips[:, study.prompts.index(cat)]
        figures.append(np.stack([clip[:, success].mean(1), lpips[:, success].mean(1), lpips_of_cat]))
    apart = np.abs(figures[1] - figures[0]).mean(axis=(1, 2))
    same = (np.round(figures[0], 4) == np.round(figures[1], 4)).all(axis=0)
    return dict(same=same, apart=dict(zip(("clip", "lpips", "cat"), apart, strict=True)))
