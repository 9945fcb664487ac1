"""What may be claimed of one experiment: its figures, and to each question yes, no or unclear.

A claim needs its interval on one side of a line. An effect exists if its 95% interval excludes 0; it is negligible if
its 90% interval lies within the margin set in CONFIG (two one-sided tests, Schuirmann 1987). If neither holds, the
answer is unclear. Holm's correction (1979) is applied to the effects and to the negligible ones separately.

Everything is paired by prompt and seed. The prompts are fixed; training runs and sampling seeds are random and crossed
(see statistics.py).
"""

import math
from dataclasses import dataclass

import numpy as np

from lib.evaluation.metrics.concept_scale import concept_share
from lib.evaluation.metrics.effects import copy_study, effects, grid, kernel_distances
from lib.evaluation.metrics.lpips_distances import FEWEST_SEEDS, pair_mean
from lib.evaluation.metrics.memorisation import memorised, similarity_to_others
from lib.evaluation.metrics.table import DIFFERENCE, METRICS
from lib.evaluation.prompts import CATEGORIES, members
from lib.evaluation.report.words import interval_text, training_name, way_text
from lib.evaluation.statistics import (
    FEWEST_RUNS,
    UNCLEAR,
    holm,
    jackknife,
    mean_interval,
    runs_to_decide,
    smallest_detectable,
)

TOO_FEW_RUNS = {
    1: "one training run does not show how much training runs differ; that takes three, better five",
    2: "two training runs do not show how much training runs differ; that takes three, better five",
}


def analyse(runs, prompts, base_pairs, margins, training=None, scale=None):
    """Every figure of one experiment with its interval, and the verdicts: a dict for metrics.json.

    `runs` are the experiment's training runs, `base_pairs` as for `effects`, `margins` a dict by metric, `training` a
    TrainingSet or None, `scale` that of the evaluation's concept (concept_scale.py) or None.
    """
    found = effects(runs, prompts, base_pairs)
    differences = [key for key in found if METRICS[key].kind == DIFFERENCE]
    table = []
    for index, (category, prompt) in enumerate(prompts):
        row = dict(category=category, prompt=prompt)
        if "change" in found:
            row["lpips_ceiling"] = float(pair_mean(base_pairs[index]))
        row |= {key: mean_interval(values[:, index]) for key, values in found.items()}
        for key in differences:
            for model in ("base", "lora"):
                row[f"{model}_{key}"] = float(np.mean([grid(run, key, model, prompts)[index].mean() for run in runs]))
        table.append(row)
    totals = {}
    for category in CATEGORIES:
        if chosen := members(prompts, category):
            totals[category] = total = {
                key: mean_interval(values[:, chosen].mean(axis=1)) for key, values in found.items()
            }
            if (share := picked_up(found, prompts, category)) is not None:
                total["picked_up"] = share
            for key in (f"{model}_{key}" for key in differences for model in ("base", "lora")):
                total[key] = float(np.mean([table[i][key] for i in chosen]))
            if training is not None and (share := concept_share(runs, chosen, training)):
                total["concept_share"] = share
            if training is not None and len(training.names) > 1 and "change" in found:
                total["kernel_distance"] = kernel_distances(runs, chosen, training.embeddings)
    summary = dict(runs=[run.name for run in runs], seeds=base_pairs.shape[-1], prompts=table, categories=totals)
    summary |= dict(margins=margins, concept_scale=scale)
    success = members(prompts, "success")
    if training is not None and success:
        reason = next(filter(None, (training.not_of(run.adapter) for run in runs)), None)
        studies = [copy_study(run, success, training) for run in runs]
        if reason:
            summary["similarity"] = similarity_to_others(studies, training.data_dir, reason)
        elif summary["seeds"] > 1:
            summary["memorised"] = memorised(studies, margins["copies"])
    summary["verdicts"] = verdicts(found, prompts, summary)
    return summary


def picked_up(found, prompts, category):
    """How far the prompts of a category moved toward the training images, as a share of how far success prompts did.

    The interval of the ratio, from the jackknife's values per seed; None where success prompts did not gain in every run
    and on every choice of seeds, and with too few seeds.
    """
    success, chosen = members(prompts, "success"), members(prompts, category)
    gains = found.get("concept_similarity")
    if category == "success" or gains is None or not success or gains.shape[2] < FEWEST_SEEDS:
        return None

    def gain(of_prompts, kept):
        return gains[:, of_prompts][:, :, kept].mean(axis=(1, 2))  # [runs]

    every = np.arange(gains.shape[2])
    if min(gain(success, np.delete(every, seed)).min() for seed in every) <= 0:
        return None
    return mean_interval(jackknife(lambda kept: gain(chosen, kept) / gain(success, kept), len(every)))


@dataclass
class Line:
    """One quantity that is tested: `claim` and `counterclaim` are (side, at), the mean's side of a value.

    Values at which nothing changed are tested at 5% from both sides (a 95% interval), those at a margin at 5% from
    one side (a 90% interval).
    """

    values: np.ndarray  # [runs, seeds]
    claim: tuple
    counterclaim: tuple
    unchanged: float = 0.0
    holds: bool = None  # the claim; False: the counterclaim does; None: unclear
    most: float = math.inf  # the largest effect that is possible
    tests: int = 1  # how many lines are tested together

    def p(self, side, at):
        """p-value of the mean lying on this side of `at`."""
        interval = mean_interval(self.values - at)
        half = interval["p"] / 2
        there = (interval["mean"] > 0) == (side == "above")
        one_sided = half if there else 1 - half
        return min(1.0, 2 * one_sided) if at == self.unchanged else one_sided

    def deciding_text(self, margin):
        return deciding_text(self.values, margin, self.tests, self.most)


def line_of(values, metric, category, margin):
    """The Line of a Metric's test on one category; `values` [runs, seeds]."""
    sides = [(side, metric.unchanged + margins * margin) for side, margins in metric.tested[category]]
    return Line(values, *sides, metric.unchanged, most=metric.most)


def decide(lines):
    """Decide each Line, with Holm's correction over all claims and over all counterclaims.

    A mean may lie above 0 for certain and still within the margin; then it is negligible, so counterclaims win.
    """
    for line in lines:
        line.tests = len(lines)
    for side, holds in (("claim", True), ("counterclaim", False)):
        corrected = holm([line.p(*getattr(line, side)) for line in lines])
        for line, p in zip(lines, corrected, strict=True):
            if p < 0.05:
                line.holds = holds


def verdicts(found, prompts, summary):
    """[dict(question, answer, text)] of `effects`; empty where one image a prompt leaves no interval."""
    margins, totals, training = summary["margins"], summary["categories"], training_name(summary)
    if len(summary["runs"]) == summary["seeds"] == 1:
        return []
    lines = {
        (key, category): line_of(
            found[key][:, members(prompts, category)].mean(axis=1), METRICS[key], category, margins[key]
        )
        for key in found
        if key in margins
        for category in METRICS[key].tested
        if category in totals
    }
    decide(list(lines.values()))
    answers = []
    for key, metric in METRICS.items():
        for question in metric.questions:
            line = lines.get((key, question.category))
            if question.name == "learned":
                if line and ("clip", "success") in lines:
                    answers.append(learned(line, lines["clip", "success"], totals["success"], margins, training))
            elif line:
                answers.append(verdict(question, line, key, totals[question.category], margins[key], training))
    if "memorised" in summary:
        copies = summary["memorised"]
        answers.append(dict(question="memorised", answer=copies["answer"], text=copies["text"]))
    return answers


def answer_word(holds):
    """yes, no or UNCLEAR for True, False or None."""
    return {True: "yes", False: "no", None: UNCLEAR}[holds]


def verdict(question, line, key, total, margin, training):
    """The answer to a Question that rests on one Line, in words with figures; `training` names the training images."""
    answer = answer_word(line.holds if line.holds is None or not question.inverted else not line.holds)
    change = ""
    if question.category != "success" and "change" in total:
        change = f"; they moved, in any direction, {interval_text(total['change'], sign=False)} of the way to another "
        change += "image of the same prompt"
    text = question.text.format(
        interval=interval_text(total[key], METRICS[key].signed),
        way=way_text(total),
        margin=margin,
        bound=line.counterclaim[1],
        change=change,
        training=training,
    )
    end = question.ends.get(answer, "").format(training=training) or line.deciding_text(margin)
    return dict(question=question.name, answer=answer, text=text + end)


def learned(concept, clip, success, margins, training):
    """Whether concept similarity rose on success prompts and the CLIP score did not fall by the margin; `training` names
    the training images."""
    moved = success["concept_similarity"]
    text = (
        f"On success prompts the similarity to {training} changed by {interval_text(moved)}{way_text(success)} "
        f"(negligible below {margins['concept_similarity']:g}), the CLIP score by {interval_text(success['clip'])} (it may fall by less "
        f"than {margins['clip']:g}). "
    )
    if concept.holds is False:
        holds, end = False, "The images did not become more similar to them."
        if moved["high"] < 0:
            end = "The images became less similar to them."
        elif moved["low"] > 0:
            end = "The images became more similar to them, but by less than the margin."
    elif clip.holds is False:
        holds, end = False, "The match with the prompt fell by more than the margin."
        if concept.holds:
            end = "The images became more similar to them, but the match with the prompt fell by more than the margin."
    elif concept.holds and clip.holds:
        holds, end = True, "The images became more similar to them."
    elif concept.holds:
        holds, end = None, "The images became more similar to them. Unclear: did the match with the prompt fall? "
        end += clip.deciding_text(margins["clip"])
    else:
        holds, end = None, concept.deciding_text(margins["concept_similarity"])
    return dict(question="learned", answer=answer_word(holds), text=text + end)


def deciding_text(values, margin, tests=1, most=math.inf):
    """What a study like `values` [runs, seeds], one of `tests`, notices in 80% of repetitions, and what would decide.

    `most` is the largest effect that is possible; what only a larger one would show is not printed as a number.
    """
    runs, seeds = values.shape
    if values.size == 1:
        return "One image a prompt and one training run decide nothing."
    more_seeds = f"try --seeds {max(16, 2 * seeds)}."
    if seeds == 2:
        return f"Two sampling seeds do not show how much images differ by chance; {more_seeds}"
    least = smallest_detectable(values, 0.05 / tests)
    size = f"{runs} training runs of {seeds} seeds" if runs > 1 else f"{seeds} seed{'s' if seeds > 1 else ''}"
    text = f"With {size} only changes above about {least:.3f} are noticed reliably; "
    if not least < most:
        text = f"With {size} not even the largest possible change would be noticed reliably; "
    if runs == 1:
        return text + more_seeds
    if runs < FEWEST_RUNS:
        return text + TOO_FEW_RUNS[runs] + "."
    needed = runs_to_decide(values, margin, 0.05 / tests)
    if needed is None:
        return text + f"a margin of {margin:g} needs more than {seeds} sampling seeds."
    if needed <= runs:
        return text + f"the mean is too close to the margin of {margin:g} for {runs} training runs."
    return text + f"about {needed} training runs would decide about a margin of {margin:g}."
