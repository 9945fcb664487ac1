"""Parts of claims that are no comparison of scores: columns that are equal to the last digit, and times."""

import numpy as np

from lib.evaluation.statistics import FEWEST_RUNS, mean_interval
from lib.evaluation.study_measures import BASELINE, columns, training_seconds

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
        f"in {int(same.sum())} of {same.size} pairs of columns, each of one picture a prompt, the three figures are "
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
    """«1.24 [1.20, 1.28] times»; without an interval where one run gave none."""
    text = f"{ratio['mean']:.2f}"
    if np.isfinite(ratio["low"]):
        text += f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return f"{text} times"


def time_text(ratio):
    """«1.24 [1.20, 1.28] times as long as those of rank 32»."""
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
