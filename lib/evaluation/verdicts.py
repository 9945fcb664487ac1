"""What may be claimed of one experiment: its figures, and a yes, a no or an open answer to each question.

A claim needs its interval on one side of a line. An effect is there if its 95% interval leaves out
0, and it is negligible if its 90% interval stays within the margin that CONFIG fixes for it (two
one-sided tests, Schuirmann 1987); where the interval holds both, the answer is that it cannot be
told. Claims that are tested together are corrected for their number (Holm 1979): those that make a
yes among themselves, those that make a no among themselves.

Everything is paired by prompt and seed. Prompts are the ones that are named; training runs and
sampling seeds are random and crossed (see statistics.py).
"""

from dataclasses import dataclass

import numpy as np

from lib.evaluation.metrics.effects import copy_study, effects, grid, kernel_distances
from lib.evaluation.metrics.lpips_distances import pair_mean
from lib.evaluation.metrics.memorisation import UNTOLD, memorised
from lib.evaluation.prompts import CATEGORIES, members
from lib.evaluation.report.words import interval_text
from lib.evaluation.statistics import FEWEST_RUNS, holm, mean_interval, runs_to_decide, smallest_detectable

TOO_FEW_RUNS = {
    1: "one training run cannot tell how much training runs differ; five would.",
    2: "two training runs cannot tell how much training runs differ; five would.",
}


def analyse(runs, prompts, base_pairs, margins, training=None):
    """Every figure of one experiment with its interval, and the verdicts: a dict for metrics.json.

    `runs` are the experiment's training runs; `base_pairs` as for `effects`; `margins` a dict by
    score; `training` a TrainingSet, or None.
    """
    found = effects(runs, prompts, base_pairs)
    table = []
    for index, (category, prompt) in enumerate(prompts):
        row = dict(category=category, prompt=prompt)
        if "change" in found:
            row["lpips_ceiling"] = float(pair_mean(base_pairs[index]))
        for key, values in found.items():
            row[key] = mean_interval(values[:, index])
        for key in ("clip", "concept_similarity"):
            for model in ("base", "lora"):
                if key in found:
                    means = [grid(run, key, model, prompts)[index].mean() for run in runs]
                    row[f"{model}_{key}"] = float(np.mean(means))
        table.append(row)
    totals = {}
    for category in CATEGORIES:
        if chosen := members(prompts, category):
            totals[category] = total = {
                key: mean_interval(values[:, chosen].mean(axis=1)) for key, values in found.items()
            }
            for key in table[0]:
                if key.startswith(("base_", "lora_")):
                    total[key] = float(np.mean([table[i][key] for i in chosen]))
            if training is not None and len(training.names) > 1 and "change" in found:
                total["kernel_distance"] = kernel_distances(runs, chosen, training.embeddings)
    summary = dict(
        runs=[run.name for run in runs],
        seeds=found["lpips"].shape[2],
        prompts=table,
        categories=totals,
        margins=margins,
    )
    success = members(prompts, "success")
    if training is not None and success and summary["seeds"] > 1:
        summary["memorised"] = memorised([copy_study(run, success, training) for run in runs], margins["copies"])
    summary["verdicts"] = verdicts(found, prompts, summary)
    return summary


@dataclass
class Line:
    """One quantity of a question: `yes` and `no` are (side, at), the mean's side of a value.

    An effect is tested against 0 at 5% from both sides (a 95% interval), a margin at 5% from one side
    (a 90% interval).
    """

    values: np.ndarray  # [runs, seeds]
    yes: tuple
    no: tuple
    answer: bool = None  # None: cannot be told
    tests: int = 1  # how many are decided together

    def p(self, side, at):
        """p-value of the claim that the mean lies on this side of `at`."""
        interval = mean_interval(self.values - at)
        half = interval["p"] / 2
        there = (interval["mean"] > 0) == (side == "above")
        one_sided = half if there else 1 - half
        return min(1.0, 2 * one_sided) if at == 0 else one_sided


def decide(lines):
    """Give each Line its answer, corrected for their number; `no` goes before `yes`.

    A mean may lie above 0 for certain and still within the margin: then it is negligible.
    """
    for line in lines:
        line.tests = len(lines)
    for side, answer in (("yes", True), ("no", False)):
        corrected = holm([line.p(*getattr(line, side)) for line in lines])
        for line, p in zip(lines, corrected, strict=True):
            if p < 0.05:
                line.answer = answer


def verdicts(found, prompts, summary):
    """[dict(question, answer, text)]: answer is yes, no or UNTOLD. Empty where one image a prompt
    leaves no interval."""
    if found["lpips"].shape[0] == found["lpips"].shape[2] == 1:
        return []
    margins, totals = summary["margins"], summary["categories"]

    def values(key, category):
        return found[key][:, members(prompts, category)].mean(axis=1)

    lines = {}
    if "concept_similarity" in found:
        margin = margins["concept_similarity"]
        for category in totals:
            moved = values("concept_similarity", category)
            lines[category] = Line(moved, yes=("above", 0), no=("below", margin))
        if "success" in totals:
            kept = ("above", -margins["clip"]), ("below", -margins["clip"])
            lines["clip"] = Line(values("clip", "success"), *kept)
    if "variety" in found and "success" in totals:
        at = 1 - margins["variety"]
        lines["variety"] = Line(values("variety", "success"), yes=("below", at), no=("above", at))
    decide(list(lines.values()))

    answers = []
    if "clip" in lines:
        answers.append(learned(lines, totals["success"], margins))
    for category, question in (("near", "neighbours kept"), ("unrelated", "contaminated")):
        if category in lines:
            answers.append(moved_toward(lines[category], totals[category], margins, question))
    if "memorised" in summary:
        answers.append(
            dict(question="memorised", answer=summary["memorised"]["answer"], text=summary["memorised"]["text"])
        )
    if "variety" in lines:
        answers.append(collapsed(lines["variety"], totals["success"]["variety"], margins))
    return answers


def answer_word(answer):
    """yes, no or UNTOLD for True, False or None."""
    return {True: "yes", False: "no", None: UNTOLD}[answer]


def deciding_text(values, margin, tests=1):
    """What would decide about the mean of `values`, one of `tests`: a sentence or two."""
    runs, seeds = values.shape
    if values.size == 1:
        return "One image a prompt and one training run decide nothing."
    least = smallest_detectable(values, 0.05 / tests)
    text = f"A change by about {least:.3f} would have been found in four of five repetitions"
    if runs == 1:
        return f"{text}; more sampling seeds than {seeds} decide about this run."
    if runs < FEWEST_RUNS:
        return f"{text}; {TOO_FEW_RUNS[runs]}"
    needed = runs_to_decide(values, margin, 0.05 / tests)
    if needed is None:
        return f"{text}; a margin of {margin:g} takes more sampling seeds than {seeds}."
    if needed <= runs:
        return f"{text}; the mean lies too near the margin of {margin:g} for {runs} training runs."
    return f"{text}; with about {needed} training runs the margin of {margin:g} could be decided."


def learned(lines, success, margins):
    """Concept similarity rose on success prompts, and CLIP did not fall by the margin."""
    concept, clip = lines["success"], lines["clip"]
    text = (
        f"On success prompts the images' similarity to the training images changed by "
        f"{interval_text(success['concept_similarity'])} (negligible below {margins['concept_similarity']:g}), "
        f"the CLIP score by {interval_text(success['clip'])} (it may fall by less than {margins['clip']:g}). "
    )
    if False in (concept.answer, clip.answer):
        answer = False
        if concept.answer is False:
            moved = success["concept_similarity"]
            end = "It did not come nearer to them."
            if moved["high"] < 0:
                end = "It moved away from them."
            elif moved["low"] > 0:
                end = "It came nearer to them, but by less than the margin."
        else:
            end = "It looks more like them, but the match with the prompt fell by more than the margin."
            if not concept.answer:
                end = "The match with the prompt fell by more than the margin."
    elif concept.answer and clip.answer:
        answer, end = True, "The concept was learned."
    else:
        answer = None
        if concept.answer is None:
            end = deciding_text(concept.values, margins["concept_similarity"], concept.tests)
        else:
            end = (
                "It looks more like them; whether the match with the prompt fell by the margin cannot be told. "
                + deciding_text(clip.values, margins["clip"], clip.tests)
            )
    return dict(question="learned", answer=answer_word(answer), text=text + end)


def moved_toward(line, total, margins, question):
    """Whether prompts that were not taught moved toward the training images."""
    kept = question == "neighbours kept"
    prompts = "prompts near the concept" if kept else "unrelated prompts"
    margin = margins["concept_similarity"]
    text = (
        f"On {prompts} the similarity to the training images changed by {interval_text(total['concept_similarity'])} "
        f"(negligible below {margin:g})"
    )
    if "change" in total:
        text += (
            f"; the images moved, in any direction, {interval_text(total['change'], sign=False)} of the "
            "way to another image of the same prompt"
        )
    end = {
        True: "The concept bleeds into them." if kept else "The adapter contaminates them.",
        False: "They do not move toward the training images by the margin.",
    }.get(line.answer) or deciding_text(line.values, margin, line.tests)
    answer = line.answer if not kept or line.answer is None else not line.answer
    return dict(question=question, answer=answer_word(answer), text=f"{text}. {end}")


def collapsed(line, variety, margins):
    """Whether the LoRA images of one prompt are less varied over the seeds than the base's."""
    text = (
        f"The images of one success prompt differ from seed to seed {interval_text(variety, sign=False)} times "
        f"as much as the base model's (collapsed below {1 - margins['variety']:g}). "
    )
    end = {True: "They lost more of their variety than the margin.", False: "They stay varied."}
    return dict(
        question="collapsed",
        answer=answer_word(line.answer),
        text=text + (end.get(line.answer) or deciding_text(line.values, margins["variety"], line.tests)),
    )
