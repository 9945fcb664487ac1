#!/usr/bin/env python3
"""Coverage and error rates of lib/evaluation/statistics.py, by simulation.

    python bench/coverage.py                       # 6.5 minutes on two busy CPU cores
    python bench/coverage.py --cells coverage.csv  # and a row for each of the 945 cells

Four tables: coverage and width of 95% intervals, over numbers of training runs and sampling seeds and over the spreads
of runs, seeds and rest; how often a family of null tests finds something; coverage beside the rules that were replaced;
and the power of what `smallest_detectable` and `runs_to_decide` promise. The last line and the exit status say whether
every bound is kept.

With one training run the truth is that run's own mean, to which its interval refers.

A cell at exactly 95% would sometimes fall below 94.5% by the chance of 10,000 draws. The first table therefore removes
chance where it can (Rao-Blackwell): given a study's sums of squares, which determine the width of its interval, the
mean is still normal around the truth with the true variance, because the two are independent in this model. Each study
counts with the exact probability that its interval covers the truth. The sums are drawn as a Latin hypercube, the same
for every spread. All other tables except the last draw values and count.

7.5 million intervals are read from a table. A width is proportional to the norm of the root sums of squares, so only
their direction is tabulated. The error against statistics.half_widths is measured and printed.
"""

import argparse
import csv
import functools
import itertools
import multiprocessing
import os
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # one process per core
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from scipy import interpolate, optimize, special, stats
from scipy.stats import qmc
from tqdm import tqdm

from lib.evaluation import statistics

STUDIES = 10_000
RUNS, SEEDS, SPREADS = (1, 2, 3, 5, 10), (4, 8, 16), (0, 0.3, 1, 3)
GRID = 65  # directions each way in the table of widths
LEAST_COVERAGE, MOST_FOUND = 0.945, 0.055
WIDEST = {5: 1.7, 10: 1.5}  # median width over the width with known spreads, 8 seeds or more

# Spreads of runs, seeds and rest for families of tests, and for power.
FAMILY_SPREADS = ((1, 0.3, 0.3), (1, 1, 1), (0.3, 1, 1), (0, 0, 1))
PAIRS, METRICS = ((0, 1), (0, 2), (1, 2)), 7  # `compare` with three experiments
COMPARISONS = len(PAIRS) * METRICS
POWER_STUDIES = 101  # whose median answer is tested
# (runs, seeds, spread of runs, of seeds, of the rest) at which the replaced rules are compared.
BESIDE = (
    (1, 8, 0, 1, 1),
    (2, 8, 1, 0.3, 0.3),
    (3, 8, 0, 1, 1),
    (3, 8, 1, 0.3, 0.3),
    (5, 8, 1, 0.3, 0.3),
    (5, 8, 1, 1, 1),
)
BOOTSTRAP_DRAWS = 1000


# ---- studies -------------------------------------------------------------------------------


def simulate(rng, shape, spreads):
    """Values [*shape] (…, runs, seeds) around 0 with crossed random effects."""
    runs, seeds, rest = spreads
    return (
        runs * rng.standard_normal((*shape[:-1], 1))
        + seeds * rng.standard_normal((*shape[:-2], 1, shape[-1]))
        + rest * rng.standard_normal(shape)
    )


def expected_squares(runs, seeds, spreads):
    """(expected mean squares [3], standard deviation of the mean around the truth)."""
    of_runs, of_seeds, rest = np.square(spreads)
    if runs == 1:  # the truth is that run's own mean; seeds and rest are inseparable
        return np.array([0, of_seeds + rest, 0]), np.sqrt((of_seeds + rest) / seeds)
    error = np.sqrt(of_runs / runs + of_seeds / seeds + rest / (runs * seeds))
    return np.array([seeds * of_runs + rest, runs * of_seeds + rest, rest]), error


def chi_squares(runs, seeds, count):
    """Chi-square draws [count, 3] of runs, seeds and rest, a Latin hypercube."""
    freedom = np.array([runs - 1, seeds - 1, (runs - 1) * (seeds - 1)])
    places = qmc.LatinHypercube(3, rng=np.random.default_rng([runs, seeds])).random(count)
    return np.where(freedom > 0, stats.chi2.ppf(places, np.maximum(freedom, 1)), 0)


def with_squares(rng, squares, runs, seeds):
    """Values [n, runs, seeds] around 0 whose sums of squares are `squares` [n, 3]."""
    noise = rng.standard_normal((len(squares), runs, seeds))
    noise -= noise.mean(axis=(1, 2), keepdims=True)
    by_run, by_seed = noise.mean(axis=2, keepdims=True), noise.mean(axis=1, keepdims=True)
    scale = np.sqrt(squares / statistics.sums_of_squares(noise))[:, :, None, None]
    rest = noise - by_run - by_seed
    return scale[:, 0] * by_run + scale[:, 1] * by_seed + scale[:, 2] * rest


@functools.cache
def width_table(runs, seeds, tail):
    """A fast stand-in for statistics.half_widths at these sizes: squares [n, 3] to widths [n]."""
    if runs == 1:
        return lambda squares: statistics.half_widths(squares, runs, seeds, tail)
    # Denser at both ends, where a small part has the long tail of few runs.
    steps = np.linspace(0, 1, GRID)
    angles = np.pi / 2 * steps**3 / (steps**3 + (1 - steps) ** 3)
    across, up = (grid.ravel() for grid in np.meshgrid(angles, angles, indexing="ij"))
    roots = np.stack([np.cos(up) * np.cos(across), np.cos(up) * np.sin(across), np.sin(up)], axis=1)
    widths = statistics.half_widths(roots**2, runs, seeds, tail).reshape(GRID, GRID)
    spline = interpolate.RectBivariateSpline(steps, steps, np.log(widths))

    def place(opposite, adjacent):
        angle = np.arctan2(opposite, adjacent)
        return angle ** (1 / 3) / (angle ** (1 / 3) + (np.pi / 2 - angle) ** (1 / 3))

    def widths_of(squares):
        of_runs, of_seeds, rest = np.sqrt(squares).T
        level = np.hypot(of_runs, of_seeds)
        widths = np.exp(spline.ev(place(of_seeds, of_runs), place(rest, level)))
        return widths * np.hypot(level, rest)

    return widths_of


# ---- replaced rules --------------------------------------------------------------


def larger_square_interval(values):
    """(standard error [n], degrees of freedom [n]) by the larger of two mean squares.

    variance of the mean = (MS_runs + MS_seeds - MS_rest) / (runs * seeds), with Satterthwaite's degrees of freedom;
    or the larger mean square alone, with its own degrees of freedom, where that is larger.
    """
    _, runs, seeds = values.shape
    squares = statistics.sums_of_squares(values)
    freedom = np.array([runs - 1, seeds - 1, (runs - 1) * (seeds - 1)])
    squares = squares / np.maximum(freedom, 1)
    larger = squares[:, :2].argmax(axis=1)
    square, freedoms = np.take_along_axis(squares, larger[:, None], 1)[:, 0], freedom[larger]
    if min(runs, seeds) > 1:
        total = squares @ [1, 1, -1]
        use = total > square
        satterthwaite = total**2 / (squares**2 / freedom).sum(axis=1)
        square, freedoms = np.where(use, total, square), np.where(use, satterthwaite, freedoms)
    return np.sqrt(square / (runs * seeds)), freedoms


def larger_square_misses(values, alpha):
    """Whether that rule's interval excludes 0, [n]."""
    error, freedom = larger_square_interval(values)
    return np.abs(values.mean(axis=(1, 2))) > stats.t.isf(alpha / 2, freedom) * error


def bootstrap_misses(rng, values):
    """Whether the interval of the 95% percentile bootstrap over runs and seeds excludes 0, [n]."""
    _, runs, seeds = values.shape
    means = np.empty((BOOTSTRAP_DRAWS, len(values)))
    for draw in range(BOOTSTRAP_DRAWS):
        chosen_runs, chosen_seeds = rng.integers(runs, size=runs), rng.integers(seeds, size=seeds)
        means[draw] = values[:, chosen_runs][:, :, chosen_seeds].mean(axis=(1, 2))
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return (low > 0) | (high < 0)


# ---- measurements ----------------------------------------------------------------------


def measure_cells(runs, seeds):
    """A row for each of the spreads: coverage, width, and error rates of other levels."""
    draws = chi_squares(runs, seeds, STUDIES)
    tables = {tail: width_table(runs, seeds, tail) for tail in (0.025, 0.05, 0.05 / (2 * COMPARISONS))}
    # The error of the tables.
    sample = draws[:200] * np.random.default_rng(0).choice(SPREADS, (200, 3)) ** 2
    sample = sample[sample.any(axis=1)]
    off = max(
        np.abs(table(sample) / statistics.half_widths(sample, runs, seeds, tail) - 1).max()
        for tail, table in tables.items()
    )
    rows = []
    for spreads in itertools.product(SPREADS, repeat=3):
        if not any(spreads):
            continue
        expected, error = expected_squares(runs, seeds, spreads)
        row = dict(runs=runs, seeds=seeds)
        row |= dict(zip(("spread_runs", "spread_seeds", "spread_rest"), spreads, strict=True))
        row |= dict(coverage=1.0, median_width=np.nan, missed_in_first=0.0, wrongly_equivalent=0.0, table_off=off)
        if error > 0:  # otherwise every value equals the truth
            scaled = {tail: table(expected * draws) / error for tail, table in tables.items()}
            missed = {tail: special.ndtr(-width).mean() for tail, width in scaled.items()}
            row |= dict(
                coverage=1 - 2 * missed[0.025],
                median_width=np.median(scaled[0.025]) / special.ndtri(0.975),
                missed_in_first=2 * missed[0.05 / (2 * COMPARISONS)],
                # At a difference of exactly the margin; a narrow margin makes it rarer still.
                wrongly_equivalent=missed[0.05],
            )
        rows.append(row)
    return rows


def measure_family(kind, runs, spreads):
    """Share of families of null tests, 8 seeds, that find something, by the present and by the former rule.

    Holm's correction finds something if the smallest p-value is below 0.05 / tests. `kind` is the number of tests of
    one experiment, or "compare": pairs of three experiments on the same training and sampling seeds.
    """
    rng = np.random.default_rng([runs, *(int(10 * s) for s in spreads)])
    if kind == "compare":
        values = simulate(rng, (STUDIES, 3, METRICS, runs, 8), spreads)
        values = np.stack([values[:, b] - values[:, a] for a, b in PAIRS], axis=1)
    else:
        values = simulate(rng, (STUDIES, kind, runs, 8), spreads)
    tests = int(np.prod(values.shape[1:-2]))
    flat = values.reshape(-1, runs, 8)
    widths = width_table(runs, 8, 0.05 / tests / 2)(statistics.sums_of_squares(flat))
    significant = np.abs(flat.mean(axis=(1, 2))) > widths
    before = larger_square_misses(flat, 0.05 / tests)
    shares = [each.reshape(STUDIES, tests).any(axis=1).mean() for each in (significant, before)]
    return dict(kind=kind, tests=tests, runs=runs, spreads=spreads, found=shares[0], before=shares[1])


def measure_beside(runs, seeds, *spreads):
    """Coverage of three rules on simulated values."""
    rng = np.random.default_rng([runs, seeds])
    values = simulate(rng, (STUDIES, runs, seeds), spreads)
    tails = statistics.upper_tails(np.abs(values.mean(axis=(1, 2))), statistics.sums_of_squares(values), runs, seeds)
    before, bootstrap = larger_square_misses(values, 0.05), bootstrap_misses(rng, values)
    shares = dict(ours=np.mean(2 * tails >= 0.05), before=1 - before.mean(), bootstrap=1 - bootstrap.mean())
    return dict(runs=runs, seeds=seeds, spreads=spreads) | shares


def measure_power(runs, spreads):
    """The differences that studies of 8 seeds call detectable, and the true power at them: a dict.

    The margin is the one at which ten runs have a true power of 80%.
    """

    def repeated(number, tail):
        """(half-widths of 2,000 studies over the standard error, standard error)."""
        expected, error = expected_squares(number, 8, spreads)
        squares = expected * chi_squares(number, 8, 2000)
        return statistics.half_widths(squares, number, 8, tail) / error, error

    def decided(margin, width, error):
        return np.maximum(2 * special.ndtr(margin / error - width) - 1, 0).mean()

    squares = expected_squares(runs, 8, spreads)[0] * chi_squares(runs, 8, POWER_STUDIES)
    values = with_squares(np.random.default_rng(runs), squares, runs, 8)
    width, error = repeated(runs, 0.025)
    differences = np.array([statistics.smallest_detectable(study) for study in values])
    scaled = np.array([np.median(differences), *differences])[:, None] / error
    power = (special.ndtr(scaled - width) + special.ndtr(-scaled - width)).mean(axis=1)
    width, error = repeated(10, 0.05)
    most = 10 * width.max() * error
    margin = optimize.brentq(lambda margin: decided(margin, width, error) - 0.8, 0, most)
    numbers = [statistics.runs_to_decide(study, margin) for study in values]
    none = np.mean([number is None for number in numbers])
    number = int(np.median([number or statistics.MOST_RUNS for number in numbers]))
    detectable = dict(difference=np.median(differences), found=power[0], found_mean=power[1:].mean())
    decides = dict(margin=margin, number=number, none=none, decided=decided(margin, *repeated(number, 0.05)))
    return dict(runs=runs, spreads=spreads) | detectable | decides


# ---- tables --------------------------------------------------------------------------------


def print_table(title, columns, rows):
    """Print a Markdown table; `rows` are lists of strings."""
    print(f"\n{title}\n")
    for row in (columns, ["--:"] * len(columns), *rows):
        print("| " + " | ".join(row) + " |")


def spread_text(spreads):
    """runs / seeds / rest"""
    return " / ".join(f"{spread:g}" for spread in spreads)


def of_row(row):
    return spread_text((row["spread_runs"], row["spread_seeds"], row["spread_rest"]))


def print_cells(cells):
    """The first table, one line per number of runs and seeds; returns the violated bounds."""
    lines, wrong = [], []
    for (runs, seeds), group in itertools.groupby(cells, lambda row: (row["runs"], row["seeds"])):
        group = list(group)
        least = min(group, key=lambda row: row["coverage"])
        widest = max(group, key=lambda row: np.nan_to_num(row["median_width"]))
        bound = WIDEST.get(runs) if seeds >= 8 else None
        equivalent = max(row["wrongly_equivalent"] for row in group)
        most, first = (max(row[key] for row in group) for key in ("coverage", "missed_in_first"))
        line = f"{runs}|{seeds}|{least['coverage']:.2%}|{most:.1%}|{widest['median_width']:.2f}|{of_row(widest)}"
        lines.append(f"{line}|{bound or ''}|{first:.3%}|{equivalent:.2%}".split("|"))
        where = f"{runs} runs x {seeds} seeds"
        if least["coverage"] < LEAST_COVERAGE:
            wrong.append(f"{where}: covers {least['coverage']:.2%} at {of_row(least)}")
        if bound and widest["median_width"] > bound:
            wrong.append(f"{where}: median width {widest['median_width']:.2f} at {of_row(widest)}")
        if equivalent > MOST_FOUND:
            wrong.append(f"{where}: wrongly equivalent in {equivalent:.2%}")
    print_table(
        f"95% intervals, the worst of {len(SPREADS) ** 3 - 1} spreads ({STUDIES:,} studies each): lowest and "
        "highest coverage; median width over the width with known spreads; misses of the interval at the "
        f"first step of Holm over {COMPARISONS} tests; equivalence claimed at a difference of exactly the margin.",
        "runs|seeds|coverage at least|at most|width at most|at spreads (runs / seeds / rest)|bound|"
        "Holm's first interval misses at most|wrongly equivalent at most".split("|"),
        lines,
    )
    off = max(row["table_off"] for row in cells)
    print(f"\n(The widths were read from tables; their error is {off:.2%} at most.)")
    return wrong


def print_families(families):
    """The table of null tests; returns the violated bounds."""
    kinds = {
        4: "4 tests of one experiment",
        6: "6 tests of one experiment",
        "compare": f"{COMPARISONS} comparisons of three experiments",
    }
    lines = []
    for (kind, runs), group in itertools.groupby(families, lambda f: (f["kind"], f["runs"])):
        shares = [f"{f['found']:.1%} ({f['before']:.1%})" for f in group]
        lines.append([kinds[kind], str(runs), *shares])
    print_table(
        f"Share of {STUDIES:,} families of null tests (Holm, 5%) that find something, by the spreads of runs / "
        "seeds / rest, 8 seeds; in brackets by the larger mean square.",
        ["tests", "runs", *map(spread_text, FAMILY_SPREADS)],
        lines,
    )
    return [
        f"{kinds[f['kind']]}, {f['runs']} runs, {spread_text(f['spreads'])}: {f['found']:.2%} find something"
        for f in families
        if f["found"] > MOST_FOUND
    ]


def print_beside(rows):
    print_table(
        f"Coverage of 95% intervals and of those that they replaced, {STUDIES:,} simulated studies.",
        ["runs", "seeds", "spreads (runs / seeds / rest)", "generalised", "larger mean square", "percentile bootstrap"],
        [
            [str(r["runs"]), str(r["seeds"]), spread_text(r["spreads"])]
            + [f"{r[rule]:.1%}" for rule in ("ours", "before", "bootstrap")]
            for r in rows
        ],
    )


def print_power(rows):
    print_table(
        f"Promised power 80%: the median answer of {POWER_STUDIES} studies (8 seeds), and the true power at it.",
        "runs|spreads (runs / seeds / rest)|smallest detectable|power|mean over studies|margin|runs to decide|power|"
        "no number".split("|"),
        [
            (
                f"{r['runs']}|{spread_text(r['spreads'])}|{r['difference']:.2f}|{r['found']:.0%}|{r['found_mean']:.0%}|"
                f"{r['margin']:.2f}|{r['number']}|{r['decided']:.0%}|{r['none']:.0%}"
            ).split("|")
            for r in rows
        ],
    )


def work(job):
    measure, arguments = job
    return measure, measure(*arguments)


def write_cells(path, cells):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(cells[0]))
        writer.writeheader()
        writer.writerows(cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", metavar="FILE", help="CSV file for a row per cell")
    path = parser.parse_args().cells
    started = time.perf_counter()
    families = itertools.product((4, 6, "compare"), (2, 3, 5), FAMILY_SPREADS)
    jobs = [(measure_cells, size) for size in itertools.product(RUNS, SEEDS)]
    jobs += [(measure_family, family) for family in families]
    jobs += [(measure_beside, setting) for setting in BESIDE]
    jobs += [(measure_power, p) for p in itertools.product((3, 5), FAMILY_SPREADS[:3])]
    results = {}
    with multiprocessing.get_context("spawn").Pool() as pool:
        for measure, result in tqdm(pool.imap(work, jobs), total=len(jobs), desc="simulating"):
            results.setdefault(measure.__name__, []).append(result)
    cells = [row for rows in results["measure_cells"] for row in rows]
    if path:
        write_cells(path, cells)
    wrong = print_cells(cells) + print_families(results["measure_family"])
    print_beside(results["measure_beside"])
    print_power(results["measure_power"])
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{len(cells)} cells, {minutes:.1f} minutes on {os.cpu_count()} CPU cores.")
    print("\n".join(["Violated bounds:", *wrong]) if wrong else "Every bound is kept.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
