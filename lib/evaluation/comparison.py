"""Two experiments on the same prompts and seeds: higher, lower, equivalent or undecided."""

import itertools

from lib.evaluation.effects import effects
from lib.evaluation.prompts import members
from lib.evaluation.statistics import FEWEST_RUNS, equivalence, holm, mean_interval
from lib.evaluation.verdicts import TOO_FEW_RUNS, deciding_text

# What two experiments are compared by, and where.
COMPARED = (
    ("concept_similarity", "success"),
    ("clip", "success"),
    ("variety", "success"),
    ("concept_similarity", "near"),
    ("change", "near"),
    ("concept_similarity", "failure"),
    ("change", "failure"),
)


def paired(a, b):
    """The runs of two experiments in pairs: by their training seed, where both have it, else in
    their order; whether they are paired by seed; and the names of those that found no partner."""
    every = {run.name for run in (*a, *b)}
    seeds = [{run.training_seed for run in group} - {None} for group in (a, b)]
    shared = sorted(seeds[0] & seeds[1])
    if shared:
        a, b = ([next(r for r in g if r.training_seed == s) for s in shared] for g in (a, b))
    else:
        a, b = a[: len(b)], b[: len(a)]
    return a, b, bool(shared), sorted(every - {run.name for run in (*a, *b)})


def compare(groups, prompts, base_pairs, margins):
    """Every pair of experiments on the same prompts and seeds: a list of dicts.

    `groups` is {experiment: [Run]}. A difference is second minus first, with its 95% interval, that
    interval's p after Holm over all of them, and its 90% interval with the p-value of equivalence
    within the margin, likewise corrected. The answer is higher, lower, equivalent (also where a
    difference within the margin is certain) or undecided, then with `decides`, what would decide it.
    With fewer than FEWEST_RUNS training runs nothing is claimed.
    """
    rows, arrays = [], []
    for (first, a), (second, b) in itertools.combinations(groups.items(), 2):
        a, b, by_seed, left_out = paired(a, b)
        one, two = (effects(group, prompts, base_pairs) for group in (a, b))
        for key, category in COMPARED:
            chosen = members(prompts, category)
            if key in one and chosen:
                values = (two[key] - one[key])[:, chosen].mean(axis=1)
                margin = margins[key]
                arrays.append(values)
                rows.append(dict(first=first, second=second, metric=key, category=category,
                                 paired_by_training_seed=by_seed, left_out=left_out, margin=margin,
                                 **mean_interval(values), equivalence=equivalence(values, margin)))  # fmt: skip
    for row, values, p, same in zip(rows, arrays, holm([row["p"] for row in rows]),
                                    holm([row["equivalence"]["p"] for row in rows]), strict=True):  # fmt: skip
        row["p_holm"], row["equivalence"]["p_holm"] = float(p), float(same)
        row["answer"] = "undecided"
        if row["runs"] >= FEWEST_RUNS:
            if p < 0.05:
                row["answer"] = "higher" if row["mean"] > 0 else "lower"
            if same < 0.05:
                row["answer"] = "equivalent"
        if row["answer"] == "undecided":
            few = TOO_FEW_RUNS.get(row["runs"])
            text = few[0].upper() + few[1:] if few else ""
            row["decides"] = text or deciding_text(values, row["margin"], len(rows))
    return rows
