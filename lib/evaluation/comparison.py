"""Two experiments on the same prompts and seeds: higher, lower, equivalent or undecided.

With fewer than FEWEST_RUNS training runs nothing is claimed of experiments, but something of the adapters as they are:
over other sampling seeds, not over other training runs. An adapter from elsewhere (without train.py's config.json) has
no experiment that could be repeated; there this is the only answer.
"""

import itertools

from lib.evaluation.metrics.effects import effects
from lib.evaluation.metrics.table import METRICS, measures
from lib.evaluation.prompts import members
from lib.evaluation.statistics import FEWEST_RUNS, equivalence, holm, mean_interval
from lib.evaluation.verdicts import TOO_FEW_RUNS, deciding_text

FILES = "files"  # `level` of a comparison that is about these adapters as they are, not about experiments


def paired(a, b):
    """(runs of `a`, runs of `b`, whether they are paired by training seed, names of unpaired runs).

    Runs without a shared training seed are paired in their order.
    """
    every = {run.name for run in (*a, *b)}
    seeds = [{run.training_seed for run in group} - {None} for group in (a, b)]
    shared = sorted(seeds[0] & seeds[1])
    if shared:
        a, b = ([next(r for r in g if r.training_seed == s) for s in shared] for g in (a, b))
    else:
        a, b = a[: len(b)], b[: len(a)]
    return a, b, bool(shared), sorted(every - {run.name for run in (*a, *b)})


def cannot_be_repeated(a, b):
    """Whether two groups of paired runs are too few, and one of them is from elsewhere, so that no more can be trained."""
    return len(a) < FEWEST_RUNS and any(not run.adapter.get("training") for run in (*a, *b))


def difference(values, margin, **names):
    """One comparison before its answer: (`names` with the figures, `values`); `values` [runs, seeds] are second minus
    first, paired."""
    same = equivalence(values, margin)
    return dict(names, margin=margin, **mean_interval(values), equivalence=same), values


def differences(pairs, compared, prompts, base_pairs, margins, share=1.0):
    """Comparisons as `difference` returns them: a list.

    `pairs` are ((name, runs), (name, runs)), `compared` (metric, category)s; what was not measured or has no margin is
    left out. A `share` other than 1 subtracts that share of the first one's effect, and each row names it. The margins
    shrink with it, except for 0, which leaves the second one's own effect.
    """
    found, named = [], {} if share == 1 else dict(share=share)
    for (first, a), (second, b) in pairs:
        a, b, by_seed, left_out = paired(a, b)
        one, two = (effects(group, prompts, base_pairs) for group in (a, b))
        about = dict(level=FILES) if cannot_be_repeated(a, b) else {}
        for key, category in compared:
            chosen = members(prompts, category)
            if key in one and key in two and key in margins and chosen:
                values = (two[key] - share * one[key])[:, chosen].mean(axis=1)
                if about:
                    values = values.mean(axis=0, keepdims=True)
                found.append(
                    difference(
                        values,
                        margins[key] * (share or 1),
                        first=first,
                        second=second,
                        metric=key,
                        category=category,
                        paired_by_training_seed=by_seed,
                        **about,
                        left_out=left_out,
                        **named,
                    )
                )
    return found


def decided_by(row, values, tests):
    """What would decide a comparison, one of `tests`: a sentence."""
    if row["runs"] in TOO_FEW_RUNS and "level" not in row:
        return TOO_FEW_RUNS[row["runs"]].capitalize() + "."
    return deciding_text(values, row["margin"], tests, METRICS[row["metric"]].most)


def answered(found, decided_by=decided_by):
    """The rows of comparisons (a list from `difference`) with their answers, after Holm's correction over all of them;
    an undecided row gets `decides` from `decided_by`."""
    rows = [row for row, _ in found]
    for (row, values), p, same in zip(
        found, holm([row["p"] for row in rows]), holm([row["equivalence"]["p"] for row in rows]), strict=True
    ):
        row["p_holm"], row["equivalence"]["p_holm"] = float(p), float(same)
        row["answer"] = "undecided"
        if row["runs"] >= FEWEST_RUNS or "level" in row:
            if p < 0.05:
                row["answer"] = "higher" if row["mean"] > 0 else "lower"
            if same < 0.05:
                row["answer"] = "equivalent"
        if row["answer"] == "undecided":
            row["decides"] = decided_by(row, values, len(rows))
    return rows


def add_files_answers(found):
    """Put `files` into the rows of comparisons (a list from `difference`) of too few training runs: the comparison of
    these runs as they are, over the sampling seeds alone, corrected for all of them. Their mean is the row's."""
    few = [
        (row, values) for row, values in found if row["runs"] < FEWEST_RUNS and "level" not in row and row["seeds"] > 1
    ]
    as_they_are = [
        difference(values.mean(axis=0, keepdims=True), row["margin"], level=FILES, metric=row["metric"])
        for row, values in few
    ]
    if as_they_are:
        for (row, _), files in zip(few, answered(as_they_are), strict=True):
            row["files"] = files


def compare(groups, prompts, base_pairs, margins):
    """Compare every pair of experiments on the same prompts and seeds: a list of dicts.

    `groups` is {experiment: [Run]}. A difference is second minus first, with its 95% interval and that interval's p
    after Holm's correction, and its 90% interval with the p-value of equivalence within the margin, likewise corrected.
    The answer is higher, lower, equivalent (also for a certain difference within the margin) or undecided, then with
    `decides`: what would decide it. With fewer than FEWEST_RUNS training runs nothing is claimed of experiments;
    `files` is then the same comparison of the adapters as they are. With an adapter from elsewhere the row itself is
    about the adapters as they are: its `level` is FILES.
    """
    pairs = itertools.combinations(groups.items(), 2)
    found = differences(pairs, measures("compared"), prompts, base_pairs, margins)
    rows = answered(found)
    add_files_answers(found)
    return rows
