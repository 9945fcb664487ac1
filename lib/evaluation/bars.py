"""Intervals as bars of a page: where each begins and ends, in per cent of the bar's width.

A page draws them from these numbers with HTML alone, so that they follow its width and its colours.
"""

import math

from lib.evaluation.words import NAMES, interval_text

# The verdicts that rest on the similarity to the training pictures, and on which prompts.
SIMILARITY_OF = {"learned": "success", "neighbours kept": "near", "contaminated": "failure"}


def placed(rows):
    """`rows` with `style`, the places of their parts as CSS properties, on one common scale.

    A row has `mean`, `low` and `high` (not finite where there is no interval) and `band`, the values
    that count as no effect. The scale holds all of them and 0.
    """
    values = [0.0]
    for row in rows:
        values += [row["mean"], row["low"], row["high"], *row["band"]]
    values = [value for value in values if math.isfinite(value)]
    least, most = min(values), max(values)
    room = 0.04 * (most - least)
    least, most = least - room, most + room

    def at(value):
        return 100 * (value - least) / (most - least)

    def part(name, low, high):
        return f"--{name}-at: {at(low):.2f}%; --{name}-width: {at(high) - at(low):.2f}%"

    found = []
    for row in rows:
        known = math.isfinite(row["low"])
        ends = (row["low"], row["high"]) if known else (row["mean"], row["mean"])
        style = "; ".join([part("band", *row["band"]), part("range", *ends),
                           f"--zero: {at(0):.2f}%; --mean: {at(row['mean']):.2f}%"])  # fmt: skip
        found.append(row | dict(style=style))
    return found


def verdict_bars(summary):
    """{question: row}: the interval that each verdict rests on, with a label and the figures. Those of
    the three kinds of prompts share one scale, so that they show how much of the concept went where."""
    margins, totals = summary["margins"], summary["categories"]
    similarity, others = [], []
    for question, category in SIMILARITY_OF.items():
        moved = totals.get(category, {}).get("concept_similarity")
        if moved:
            margin = margins["concept_similarity"]
            label = f"{category} prompts, similarity to the training pictures, LoRA minus base"
            similarity.append(dict(question=question, label=label, band=(-margin, margin),
                                   text=interval_text(moved), **ends(moved)))  # fmt: skip
    copies = summary.get("memorised")
    if copies and copies["share"] is not None:
        others.append(dict(question="memorised", label="share of near-copies, up to its upper bound",
                           text=f"{copies['share']:.0%}, at most {copies['high']:.0%}",
                           mean=copies["share"], low=copies["share"], high=copies["high"],
                           band=(0, copies["margin"])))  # fmt: skip
    if varied := totals.get("success", {}).get("variety"):
        others.append(dict(question="collapsed", label="variety over the seeds, as a share of the base's",
                           text=interval_text(varied, sign=False), band=(1 - margins["variety"], 1),
                           **ends(varied)))  # fmt: skip
    rows = placed(similarity) + [placed([row])[0] for row in others]
    return {row["question"]: row for row in rows}


def ends(interval):
    """What a bar needs of an interval."""
    return {key: interval[key] for key in ("mean", "low", "high")}


def forest_bars(pairs):
    """[(title, rows)]: the differences of each two experiments as bars in units of their margins."""
    rows = []
    for pair in pairs:
        low, mean, high = (pair[key] / pair["margin"] for key in ("low", "mean", "high"))
        rows.append(dict(title=f"{pair['second']} minus {pair['first']}", answer=pair["answer"],
                         label=f"{NAMES[pair['metric']]}, {pair['category']} prompts",
                         text=interval_text(pair), low=low, mean=mean, high=high, band=(-1, 1)))  # fmt: skip
    found = {}
    for row in placed(rows) if rows else ():
        found.setdefault(row["title"], []).append(row)
    return list(found.items())
