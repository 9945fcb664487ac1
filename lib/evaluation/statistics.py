"""What a study of several training runs and sampling seeds can claim: intervals, tests, power.

`values` is always an array [runs, seeds] of one figure, say the change in concept similarity. Every training run used the
same seeds, so runs and seeds are crossed random factors,

    value[i, j] = mean + run[i] + seed[j] + rest[i, j],

each of the three normal with a variance of its own, one value a cell. The sums of squares of runs, seeds and rest are
independent of one another and of the mean of all values, each its expected mean square times a chi-square variable. The
variance of that mean is

    (expected mean square of runs + of seeds - of rest) / (runs * seeds).

No exact interval exists for such a sum. The one used here is the generalised interval (Weerahandi, "Generalized
confidence intervals", JASA 88, 1993; "Exact Statistical Methods for Data Analysis", 1995): each sum of squares is divided
by a chi-square draw of its own,

    V* = max(SS_runs / chi2_runs + SS_seeds / chi2_seeds - SS_rest / chi2_rest,
             SS_rest / chi2_rest) / (runs * seeds),

with the maximum because the rest always contributes. The mean is normal around the truth with variance V*, so a true mean
beyond the distance d on one side has the generalised p-value E[Phi(-d / sqrt(V*))], the expectation over the draws of
chi2. Interval, p-value and equivalence all come from this one function of d and cannot contradict one another. If only
one factor varies (one run, or one seed) it is Student's distribution.

Simpler intervals cover too little. Where training runs differ (standard deviations of runs, seeds and rest 1, 0.3 and 0.3;
8 seeds) the 95% interval of a percentile bootstrap over runs and seeds covered the truth in 63% of simulated studies of
two runs and in 77% of three, and a two-way model that takes the larger mean square with its own degrees of freedom in 90%
and 94%: with that one, 15 comparisons corrected by Holm found an effect where there was none in 49%, 17% and 8% of
studies of two, three and five runs. The generalised interval covers the truth in 95% or more at every spread, and finds
an effect in 4% or less. Its price is width with few runs: with 8 seeds the median interval is up to 4.4 times as wide as
with known spreads at two runs, 2.0 at three, 1.55 at five and 1.35 at ten (`python bench/coverage.py`).

The expectation is taken over a fixed set of points, so that the same images give the same figures: Sobol's points,
concentrated where chi2 is small, where the long tails of few runs come from.
"""

import functools

import numpy as np
import scipy

UNCLEAR = "unclear"  # the answer that is neither yes nor no
# Two training runs differ by one number, which says nothing useful of others.
FEWEST_RUNS = 3
POINTS = 2**11  # of the expectation over chi2
MOST_RUNS = 1000  # the largest study considered


@functools.lru_cache(maxsize=64)
def chi_square_points(runs, seeds):
    """(1 / chi2 [3, points] of runs, seeds and rest, weights [points]) of the expectation over chi2."""
    places = scipy.stats.qmc.Sobol(3, scramble=False).random(POINTS).T + 0.5 / POINTS
    # A point at place x is the x^3 quantile: a third of the points lies below 4%.
    weights = np.prod(places**2, axis=0)
    freedom = [[runs - 1], [seeds - 1], [(runs - 1) * (seeds - 1)]]
    return 1 / scipy.stats.chi2.ppf(places**3, freedom), weights / weights.sum()


def sums_of_squares(values):
    """Sums of squares of runs, seeds and rest, [studies, 3], of `values` [studies, runs, seeds]."""
    _, runs, seeds = values.shape
    # Relative to the first value, so that equal values give exactly 0.
    values = values - values[:, :1, :1]
    mean = values.mean(axis=(1, 2), keepdims=True)
    by_run = values.mean(axis=2, keepdims=True) - mean
    by_seed = values.mean(axis=1, keepdims=True) - mean
    rest = values - mean - by_run - by_seed
    parts = (seeds * by_run**2, runs * by_seed**2, rest**2)
    return np.stack([part.sum(axis=(1, 2)) for part in parts], axis=1)


def inverse_errors(squares, runs, seeds):
    """(1 / sqrt(V*) [studies, points], weights [points]) for sums of squares [studies, 3]."""
    inverse, weights = chi_square_points(runs, seeds)
    by_runs, by_seeds, rest = (squares[:, [factor]] * inverse[factor] for factor in range(3))
    variance = np.maximum(by_runs + by_seeds - rest, rest) / (runs * seeds)
    return 1 / np.sqrt(variance), weights


def students_error(squares, runs, seeds):
    """(standard error [studies], degrees of freedom) if only one factor varies."""
    freedom = runs * seeds - 1
    return np.sqrt(squares.sum(axis=1) / (freedom * runs * seeds)), freedom


def upper_tails(distances, squares, runs, seeds):
    """Generalised one-sided p-value [studies] of a truth at `distances` [studies]; `squares` [studies, 3] from
    `sums_of_squares`, not all 0."""
    if min(runs, seeds) == 1:
        error, freedom = students_error(squares, runs, seeds)
        return scipy.stats.t.sf(distances / error, freedom)
    inverse, weights = inverse_errors(squares, runs, seeds)
    return scipy.special.ndtr(-distances[:, None] * inverse) @ weights


def half_widths(squares, runs, seeds, tail):
    """The distance [studies] whose one-sided p-value is `tail` < 0.5: the inverse of `upper_tails`."""
    if min(runs, seeds) == 1:
        error, freedom = students_error(squares, runs, seeds)
        return scipy.stats.t.isf(tail, freedom) * error
    inverse, weights = inverse_errors(squares, runs, seeds)
    distances = scipy.special.ndtri(1 - tail) / (inverse @ weights)
    for _ in range(100):  # Newton's method in log-log coordinates; five or six steps
        scaled = distances[:, None] * inverse
        p = scipy.special.ndtr(-scaled) @ weights
        slope = (scaled * np.exp(-(scaled**2) / 2)) @ weights / np.sqrt(2 * np.pi)
        step = np.clip(np.log(p / tail) * p / slope, -1, 1)
        distances = distances * np.exp(step)
        if np.abs(step).max() < 1e-7:  # convergence is quadratic
            return distances
    raise RuntimeError(f"no interval converged for sums of squares {squares[np.abs(step).argmax()]}")


def one_study(values):
    """(mean, sums of squares [1, 3], runs, seeds) of `values` [runs, seeds]."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"values must be finite and [runs, seeds], not {values.shape}: {values}")
    first = values[0, 0]  # the mean of equal values is then exactly that value
    return first + (values - first).mean(), sums_of_squares(values[None]), *values.shape


def mean_interval(values, level=0.95):
    """Mean of `values` [runs, seeds] with its confidence interval and two-sided p-value against 0.

    The generalised interval of the two-way random model, see above. With one run it is Student's interval over the seeds
    (and covers that run alone), with one seed over the runs. p < 1 - level exactly if the interval excludes 0.

    Returns a dict: mean, low, high, p, runs, seeds. A single value has no interval (NaN), and p is 1; equal values have
    an interval of width 0, and p is 0 or 1.
    """
    mean, squares, runs, seeds = one_study(values)
    if runs * seeds == 1:
        half, p = np.nan, 1.0
    elif not squares.any():
        half, p = 0.0, float(mean == 0)
    else:
        half = half_widths(squares, runs, seeds, (1 - level) / 2)[0]
        p = 2 * upper_tails(np.abs([mean]), squares, runs, seeds)[0]
    return dict(mean=float(mean), low=float(mean - half), high=float(mean + half), p=float(p), runs=runs, seeds=seeds)


def equivalence(values, margin):
    """Whether the mean of `values` [runs, seeds] lies within ±`margin`: dict(low, high, p).

    Two one-sided tests (Schuirmann 1987, https://doi.org/10.1007/BF01068419) under the distribution of `mean_interval`: p
    is the larger of their p-values, below 0.05 exactly if the 90% interval [low, high] lies inside the margin. With a
    single value the interval is NaN and p is 1.
    """
    if not margin > 0:
        raise ValueError(f"a margin above 0 is needed, not {margin}")
    interval = mean_interval(values, level=0.9)
    mean, squares, runs, seeds = one_study(values)
    if runs * seeds == 1:
        p = 1.0
    elif not squares.any():
        p = float(abs(mean) >= margin)
    else:
        p = upper_tails(np.array([margin - abs(mean)]), squares, runs, seeds)[0]
    return dict(low=interval["low"], high=interval["high"], p=float(p))


def holm(p_values):
    """`p_values` corrected for multiple tests (Holm 1979), in the same order."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values)
    scaled = p_values[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return corrected


def estimated_variances(squares, runs, seeds):
    """Variances [3] of runs, seeds and rest, estimated from the sums of squares [3] of one study; none is below 0.

    Each sum is divided by the median of its chi-square, not by the mean: half of all studies then underestimate and half
    overestimate. The mean underestimates in 68% (two runs) or 63% (three), which would overstate the power.
    """
    if min(runs, seeds) == 1:  # the sum of the factor that varies includes the rest
        return squares / scipy.stats.chi2.median(runs * seeds - 1)
    freedom = np.array([runs - 1, seeds - 1, (runs - 1) * (seeds - 1)])
    of_runs, of_seeds, rest = squares / scipy.stats.chi2.median(freedom)
    return np.array([max(of_runs - rest, 0) / seeds, max(of_seeds - rest, 0) / runs, rest])


def repetitions(variances, runs, seeds):
    """Repetitions of a study of this size: (sums of squares [32, 3], standard deviation of its mean).

    The sums are the expected mean squares times points that cover the range of their chi-squares.
    """
    of_runs, of_seeds, rest = variances
    expected = np.array([seeds * of_runs + rest, runs * of_seeds + rest, rest])
    places = scipy.stats.qmc.Sobol(3, scramble=False).random(32) + 0.5 / 32
    freedom = np.array([runs - 1, seeds - 1, (runs - 1) * (seeds - 1)])
    # A factor with a single level has no degrees of freedom, and its sum is 0.
    draws = np.where(freedom > 0, scipy.stats.chi2.ppf(places, np.maximum(freedom, 1)), 0)
    return expected * draws, np.sqrt(of_runs / runs + of_seeds / seeds + rest / (runs * seeds))


def smallest_detectable(values, alpha=0.05, power=0.8):
    """The true difference that a study like `values` [runs, seeds] finds in `power` of repetitions.

    For a study of this size and apparent variances, tested on two sides at `alpha` (0.05 over the number of tests for the
    first step of Holm's correction). The variances are estimates: with few runs the result may be off by half. NaN with a
    single value, 0 if all values are equal.
    """
    _, squares, runs, seeds = one_study(values)
    if runs * seeds == 1:
        return float("nan")
    if not squares.any():
        return 0.0
    again, error = repetitions(estimated_variances(squares[0], runs, seeds), runs, seeds)
    half = half_widths(again, runs, seeds, alpha / 2)

    def lacking(difference):
        detected = scipy.special.ndtr((difference - half) / error) + scipy.special.ndtr((-difference - half) / error)
        return power - detected.mean()

    return float(scipy.optimize.brentq(lacking, 0, half.max() + 10 * error, rtol=1e-6))


def runs_to_decide(values, margin, alpha=0.05, power=0.8):
    """The fewest training runs that find "equivalent within ±`margin`" in `power` of studies, or None.

    From 2 to 1,000 (possibly fewer than there are), for the number of seeds and the apparent variances of `values`
    [runs, seeds], a true difference of 0 and a test at `alpha`. None if 1,000 runs are not enough, because the seeds alone
    vary too much for the margin, and with fewer than two runs, which leave the variance between runs unknown.
    """
    if not margin > 0:
        raise ValueError(f"a margin above 0 is needed, not {margin}")
    _, squares, runs, seeds = one_study(values)
    if runs < 2:
        return None
    if not squares.any():
        return 2
    variances = estimated_variances(squares[0], runs, seeds)

    def enough(number):
        again, error = repetitions(variances, number, seeds)
        room = margin - half_widths(again, number, seeds, alpha)
        return np.maximum(2 * scipy.special.ndtr(room / error) - 1, 0).mean() >= power

    return fewest(enough)


def runs_to_tell(values, margin=None, alpha=0.05, power=0.8, seeds=None):
    """The fewest training runs with which `power` of studies show that the mean is not 0 or, with a `margin`, that it
    lies within ±`margin`, if the true mean is that of `values` [runs, seeds].

    Both are tested at `alpha`, with `seeds` sampling seeds (None: those of `values`). None if 1,000 runs are not enough,
    and with fewer than two runs.
    """
    mean, squares, runs, drawn = one_study(values)
    seeds = seeds or drawn
    if runs < 2:
        return None
    if not squares.any():
        return 2
    variances = estimated_variances(squares[0], runs, drawn)

    def enough(number):
        again, error = repetitions(variances, number, seeds)
        half = half_widths(again, number, seeds, alpha / 2)
        decided = scipy.special.ndtr((abs(mean) - half) / error).mean()
        if margin is not None:
            room = margin - half_widths(again, number, seeds, alpha)
            within = scipy.special.ndtr((room - mean) / error) - scipy.special.ndtr((-room - mean) / error)
            decided = max(decided, np.maximum(within, 0).mean())
        return decided >= power

    return fewest(enough)


def fewest(enough):
    """The smallest number from 2 to MOST_RUNS for which the monotone `enough` is true, or None."""
    few, many = 1, MOST_RUNS  # too few, enough
    if not enough(many):
        return None
    while many - few > 1:
        middle = max(few + 1, int(np.sqrt(few * many)))
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


def jackknife(statistic, seeds):
    """A statistic over the seeds as one value per seed, [..., seeds], with the statistic as their mean.

    `statistic` takes an array of seed indices and returns an array of any shape. The values are Tukey's pseudo-values
    (Miller 1974, https://doi.org/10.1093/biomet/61.1.1), shifted so that their mean is the statistic over all seeds. Their
    spread is that of the statistic, so an interval over them includes the error of a denominator, or of pairs that share
    a seed.
    """
    every = np.arange(seeds)
    whole = np.asarray(statistic(every), np.float64)
    return pseudo_values(whole, np.stack([statistic(np.delete(every, seed)) for seed in every], axis=-1))


def pseudo_values(whole, without):
    """`jackknife` from the statistic over all of n samples, `whole` [...], and without each, `without` [..., n]."""
    whole, n = np.asarray(whole), without.shape[-1]
    return whole[..., None] - (n - 1) * (without - without.mean(axis=-1, keepdims=True))
