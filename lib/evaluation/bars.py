"""Intervals as bars of a page: where each begins and ends, in per cent of the bar's width.

A page draws them from these numbers with HTML alone, so that they follow its width and its colours.
"""

import math

from lib.evaluation.sentences import OTHERS
from lib.evaluation.words import NAMES, interval_text

# The verdicts that rest on the similarity to the training pictures, and on which prompts.
SIMILARITY_OF = {"learned": ("success", "prompts that ask for it")} | {
    question: (category, who) for question, (category, who, _) in OTHERS.items()
}


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
        style = "; ".join(
            [part("band", *row["band"]), part("range", *ends), f"--zero: {at(0):.2f}%; --mean: {at(row['mean']):.2f}%"]
        )
        found.append(row | dict(style=style))
    return found


def verdict_bars(summaries):
    """{question: {experiment: row}}: the interval that each verdict rests on, with a label and the
    figures. `summaries` is {experiment: summary}.

    A question has one scale for all experiments, and the three that rest on the similarity share
    one, so that it shows how much of the concept went where.
    """
    rows = [dict(row, name=name) for name, summary in summaries.items() for row in rows_of(summary)]
    found = {}
    for scale in dict.fromkeys(row["scale"] for row in rows):
        for row in placed([row for row in rows if row["scale"] == scale]):
            found.setdefault(row["question"], {})[row["name"]] = row
    return found


def rows_of(summary):
    """The rows of `verdict_bars` for one summary, not yet placed; equal `scale`s share a scale."""
    margins, totals = summary["margins"], summary["categories"]
    rows = []
    for question, (category, who) in SIMILARITY_OF.items():
        moved = totals.get(category, {}).get("concept_similarity")
        if moved:
            margin = margins["concept_similarity"]
            rows.append(
                dict(
                    question=question,
                    scale="similarity",
                    band=(-margin, margin),
                    label=f"similarity to the training pictures gained, {who}",
                    text=interval_text(moved),
                    **ends(moved),
                )
            )
    copies = summary.get("memorised")
    if copies and copies["share"] is not None:
        share, high = copies["share"], copies["high"]
        rows.append(
            dict(
                question="memorised",
                scale="copies",
                band=(0, copies["margin"]),
                label="share of near-copies, up to its upper bound",
                text=f"{share:.0%}, at most {high:.0%}",
                mean=share,
                low=share,
                high=high,
            )
        )
    if varied := totals.get("success", {}).get("variety"):
        rows.append(
            dict(
                question="collapsed",
                scale="variety",
                band=(1 - margins["variety"], 1),
                label="variety over the seeds, as a share of the base model's",
                text=interval_text(varied, sign=False),
                **ends(varied),
            )
        )
    return rows


def ends(interval):
    """What a bar needs of an interval."""
    return {key: interval[key] for key in ("mean", "low", "high")}


def forest_bars(pairs):
    """[(title, rows)]: the differences of each two experiments as bars in units of their margins."""
    rows = []
    for pair in pairs:
        low, mean, high = (pair[key] / pair["margin"] for key in ("low", "mean", "high"))
        rows.append(
            dict(
                title=f"{pair['second']} minus {pair['first']}",
                answer=pair["answer"],
                label=f"{NAMES[pair['metric']]}, {pair['category']} prompts",
                text=interval_text(pair),
                low=low,
                mean=mean,
                high=high,
                band=(-1, 1),
            )
        )
    found = {}
    for row in placed(rows) if rows else ():
        found.setdefault(row["title"], []).append(row)
    return list(found.items())
