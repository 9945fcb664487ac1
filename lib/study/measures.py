"""What the study measures beyond differences of two arms: whether change tells contamination, two arms
at equal concept, columns that are equal to the last digit, and times.

Parts of claims that are no comparison of scores: columns that are equal to the last digit, and times.
"""

import numpy as np
from scipy import stats

from lib.evaluation.metrics.effects import grid
from lib.evaluation.metrics.lpips_distances import pair_mean
from lib.evaluation.prompts import members
from lib.evaluation.statistics import FEWEST_RUNS, jackknife, mean_interval

BASELINE, HELD = "rank32", "protected"
MINIATURE = "demo/model"
# What is compared at equal concept: (score, category).
AT_EQUAL = (
    ("change", "near"),
    ("concept_similarity", "near"),
    ("change", "unrelated"),
    ("concept_similarity", "unrelated"),
)


def concept_moved(runs, prompts):
    """How far each image moved toward the training images: [runs, prompts, seeds]."""
    found = [[grid(r, "concept_similarity", model, prompts) for model in ("lora", "base")] for r in runs]
    return np.stack([lora - base for lora, base in found])


def distances(runs, prompts):
    """LPIPS of each image to the base's: [runs, prompts, seeds]."""
    return np.stack([grid(run, "lpips", "lora", prompts) for run in runs])


def ceiling(base_pairs, kept):
    """LPIPS between base images of a prompt at different seeds of `kept`: [prompts]."""
    return pair_mean(base_pairs[:, kept][:, :, kept])


def adapters(study):
    """Every adapter that was drawn: [runs of each training seed], an arm as it is or with a scale below 1."""
    less = [runs for points in study.scaled.values() for scale, runs in points.items() if scale != 1]
    return [*study.arms.values(), *less]


def change_and_movement(study, category):
    """(change, movement toward the concept) of every adapter and prompt of a category over all sampling
    seeds: two arrays [training seeds, adapters, prompts]."""
    chosen = members(study.prompts, category)
    every = np.arange(len(study.sampling_seeds))
    return points_at(*raw_points(study, chosen), study.base_pairs[chosen], every)


def raw_points(study, chosen):
    """LPIPS and movement of every image: two arrays [training seeds, adapters, prompts, seeds]."""
    found = adapters(study)
    moved = np.stack([concept_moved(runs, study.prompts)[:, chosen] for runs in found], axis=1)
    return np.stack([distances(runs, study.prompts)[:, chosen] for runs in found], axis=1), moved


def points_at(lpips, moved, base_pairs, kept):
    return lpips[..., kept].mean(axis=-1) / ceiling(base_pairs, kept), moved[..., kept].mean(axis=-1)


def rank_correlations(lpips, moved, base_pairs):
    """Spearman's rank correlation of change and movement toward the concept over all adapters and
    prompts, once a training seed, as Fisher's z: [training seeds, sampling seeds], for `mean_interval`.

    `lpips` and `moved` are [training seeds, adapters, prompts, sampling seeds].

    Points are not independent: those of one run share its weights, those of one training seed its
    noise and order of images, and all training seeds the noise that they are drawn from. So no interval
    that counts points may be used. Arms, scales and prompts are the ones that are named; a training
    seed is the unit that is drawn at random, and all its adapters together give one correlation. These
    are as many independent values as there are training seeds. They share the sampling seeds, whose part
    the jackknife's values carry, and the two crossed factors are those of statistics.py. (A bootstrap over
    training seeds counts the same units, but covers 77% with three of them, see there.)
    """

    def z(kept):
        change, movement = points_at(lpips, moved, base_pairs, kept)
        ranks = (stats.rankdata(v.reshape(len(v), -1), axis=1) for v in (change, movement))
        x, y = (r - r.mean(axis=1, keepdims=True) for r in ranks)
        spread = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
        found = (x * y).sum(axis=1) / np.where(spread > 0, spread, 1)
        return np.arctanh(np.clip(found, -1 + 1e-9, 1 - 1e-9))

    return jackknife(z, lpips.shape[-1])


def raw_curves(study, arm):
    """(scales, LPIPS, movement toward the concept) of an arm's images: [scales] and twice [training
    seeds, scales, prompts, sampling seeds]. An arm that was not drawn at several scales has scale 1."""
    points = sorted(study.scaled.get(arm, {1.0: study.arms[arm]}).items())
    moved = np.stack([concept_moved(runs, study.prompts) for _, runs in points], axis=1)
    lpips = np.stack([distances(runs, study.prompts) for _, runs in points], axis=1)
    return [scale for scale, _ in points], lpips, moved


def curves(study, raw, kept):
    """Over the scales of an arm, the base model first: {"scale": [scales], (score, category): [training
    seeds, scales]}, over the sampling seeds `kept`; `raw` is from `raw_curves`."""
    scales, lpips, moved = raw
    change, movement = points_at(lpips, moved, study.base_pairs, kept)
    values = dict(concept_similarity=movement, change=change)
    found = {"scale": np.array([0.0, *scales])}
    for key, category in (("concept_similarity", "success"), *AT_EQUAL):
        line = values[key][..., members(study.prompts, category)].mean(axis=-1)
        found[key, category] = np.pad(line, ((0, 0), (1, 0)))  # the base model has moved nowhere
    return found


def reached(level, concept, others):
    """`others` [k, scales] where `concept` [scales] first reaches `level`, between two scales on a
    straight line: [k]."""
    after = int(np.argmax(concept >= level))
    if after == 0:
        return others[:, 0]
    low, high = concept[after - 1], concept[after]
    share = (level - low) / (high - low)
    return others[:, after - 1] + share * (others[:, after] - others[:, after - 1])


def at_equal_concept(study):
    """BASELINE and HELD where both have the same concept similarity on success prompts: a dict of arrays [training seeds, sampling seeds] for `mean_interval`, or None.

    Lowering an adapter's scale also trades the concept for what is kept, so two arms are compared at equal
    concept: for each training seed at the greatest that both reach, each interpolated over its scales. Where
    HELD, drawn at full scale alone, teaches less, that is all of it beside less of BASELINE; where it teaches
    more, a straight line from the base model to it.
    (score, category) are HELD minus BASELINE there; "log change near" and so on the logarithm of the ratio
    of their changes; "level" that concept similarity; "scale rank32" and so on how much of each adapter that
    is. Everything is computed again without each sampling seed (jackknife), so that the interval
    holds the error of the interpolation too. None where an arm moves its success prompts nowhere.
    """
    keys = [*AT_EQUAL, "scale"]
    names = [
        *AT_EQUAL,
        *(f"log change {c}" for c in ("near", "unrelated")),
        "level",
        *(f"scale {arm}" for arm in (BASELINE, HELD)),
    ]
    raw = [raw_curves(study, arm) for arm in (BASELINE, HELD)]

    def measured(kept):
        arms = [curves(study, points, kept) for points in raw]
        taught = [arm["concept_similarity", "success"] for arm in arms]
        levels = np.minimum(*(line.max(axis=1) for line in taught))
        rows = []
        for seed, level in enumerate(levels):
            ends = []
            for arm, line in zip(arms, taught, strict=True):
                others = np.stack([arm[k] if k == "scale" else arm[k][seed] for k in keys])
                ends.append(dict(zip(keys, reached(level, line[seed], others), strict=True)))
            one, two = ends
            ratios = [np.log(max(two["change", c], 1e-9) / max(one["change", c], 1e-9)) for c in ("near", "unrelated")]
            rows.append([*(two[k] - one[k] for k in AT_EQUAL), *ratios, level, one["scale"], two["scale"]])
        return np.array(rows).T

    every = np.arange(len(study.sampling_seeds))
    if not (measured(every)[names.index("level")] > 0).all():
        return None
    return dict(zip(names, jackknife(measured, len(every)), strict=True))


def columns(study, one=BASELINE, other="rank8"):
    """The published study's three figures of two arms, made as it made them, of one image a prompt:
    a dict, or None where its prompts are not all there.

    For each training seed and sampling seed CLIP and LPIPS of the three success prompts that it names first
    and LPIPS of the cat: `same` [training seeds, sampling seeds], whether all agree to four digits, and
    `apart`, the mean distance of each.
    """
    success, cat = members(study.prompts, "success")[:3], "a cat sitting on a couch"
    found = [i for i, (_, prompt) in enumerate(study.prompts) if prompt == cat]
    if len(success) < 3 or not found:
        return None
    figures = []
    for arm in (one, other):
        clip = np.stack([grid(run, "clip", "lora", study.prompts) for run in study.arms[arm]])
        lpips = distances(study.arms[arm], study.prompts)
        figures.append(np.stack([clip[:, success].mean(1), lpips[:, success].mean(1), lpips[:, found[0]]]))
    apart = np.abs(figures[1] - figures[0])
    same = (np.round(figures[0], 4) == np.round(figures[1], 4)).all(axis=0)
    return dict(same=same, apart=dict(zip(("clip", "lpips", "cat"), apart.mean(axis=(1, 2)), strict=True)))


def training_seconds(study):
    """{arm: [seconds of training steps of each run]}, of those arms whose runs all say it."""
    found = {}
    for arm, runs in study.arms.items():
        speeds = [run.adapter.get("speed", {}).get("steps_a_second") for run in runs]
        steps = [(run.adapter.get("training") or {}).get("max_steps") for run in runs]
        if all(speeds) and all(steps):
            found[arm] = np.array(steps) / np.array(speeds)
    return found


A_THIRD = 5 / 12  # a time below is a third rather than a half
FIVE = dict(training_seeds=5, text="five training seeds would decide")
QUIET = dict(training_seeds=None, text="more training seeds on a machine that does nothing else would decide")


def most_of(decides):
    """Of what would decide several comparisons, that which takes most, or None; what no number of training
    seeds decides takes more than any."""
    ranked = sorted(decides, key=lambda found: found["training_seeds"] or np.inf)
    return ranked[-1] if ranked else None


def columns_part(study):
    """Claim 6: whether two adapters give the same figures to the last digit; a part, or None."""
    found = columns(study)
    if found is None:
        return None
    same, apart = found["same"], found["apart"]
    seeds = len(same)
    # No training seed of so many gave equal columns: of all, at most this share does, with 95% confidence.
    most = 1 - 0.05 ** (1 / seeds)
    verdict, stands = "undecided", None
    if not same.any() and most < 0.5:
        verdict, stands = "refuted", False
    elif same.all() and seeds >= FEWEST_RUNS:
        verdict, stands = "supported", True
    text = (
        f"in {int(same.sum())} of {same.size} pairs of columns, each of one image a prompt, the three figures are "
        f"the same to four digits; they lie {apart['clip']:.3f} (CLIP), {apart['lpips']:.3f} (LPIPS) and "
        f"{apart['cat']:.3f} (LPIPS of the cat) apart on average"
    )
    if not same.any():
        text += f"; at most {most:.0%} of training seeds give such a pair"
    return dict(
        about="the columns",
        says="same",
        verdict=verdict,
        stands=stands,
        comparisons=[],
        text=text,
        decides=None if stands is not None else FIVE,
    )


def time_ratios(study):
    """{arm: interval of how many times rank 32's time its training steps take}, paired by training seed."""
    seconds = training_seconds(study)
    if BASELINE not in seconds:
        return {}
    found = {}
    for arm, took in seconds.items():
        interval = mean_interval(np.log(took / seconds[BASELINE])[:, None])
        found[arm] = interval | {k: float(np.exp(interval[k])) for k in ("mean", "low", "high")}
    return found


def ratio_text(ratio):
    """“1.24 [1.20, 1.28] times”; without an interval where one run gave none."""
    text = f"{ratio['mean']:.2f}"
    if np.isfinite(ratio["low"]):
        text += f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return f"{text} times"


def time_text(ratio):
    """“1.24 [1.20, 1.28] times as long as those of rank 32”."""
    return f"{ratio_text(ratio)} as long as those of rank 32"


def time_part(ratio, devices):
    """Claim 8: whether training takes a third of the time; a part."""
    verdict, stands, few = "undecided", None, ratio["runs"] < FEWEST_RUNS
    if not few:
        if ratio["high"] < A_THIRD:
            verdict, stands = "supported", True
        elif ratio["low"] > A_THIRD:
            verdict, stands = "refuted", False
    text = f"its training steps took {time_text(ratio)} ({devices})"
    return dict(
        about="the time",
        says="lower",
        verdict=verdict,
        stands=stands,
        comparisons=[],
        text=text,
        decides=None if stands is not None else FIVE if few else QUIET,
    )


def devices_text(study):
    """The devices that the runs were trained on."""
    found = [run.adapter.get("speed", {}).get("device") for runs in study.arms.values() for run in runs]
    return ", ".join(dict.fromkeys(name for name in found if name)) or "on a device that is not known"


def time_table(study, arm_name):
    """What each arm, called as `arm_name` calls it, costs: rows of text, the head first; None where no run says how long it took."""
    seconds, ratios = training_seconds(study), time_ratios(study)
    if not seconds:
        return None
    rows = [["", "training steps, s", "beside rank 32", "GiB reserved"]]
    for arm, took in seconds.items():
        memory = [run.adapter["speed"].get("peak_gib_reserved") for run in study.arms[arm]]
        ratio = ratios.get(arm)
        beside = ratio_text(ratio) if ratio and arm != BASELINE else "–"
        rows.append([arm_name(arm), f"{took.mean():.1f}", beside, f"{np.mean(memory):.2f}" if all(memory) else "–"])
    return rows
