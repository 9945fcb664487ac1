"""The statistics on simulated studies: they keep their promises, and agree with one another."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lib.evaluation import statistics


def simulate(rng, trials, runs, seeds, run_noise, seed_noise, noise, effect=0.0):
    """Values [trials, runs, seeds] with a known mean and crossed random effects."""
    return (
        effect
        + run_noise * rng.standard_normal((trials, runs, 1))
        + seed_noise * rng.standard_normal((trials, 1, seeds))
        + noise * rng.standard_normal((trials, runs, seeds))
    )


def one_sided(values, distances):
    """One-sided p-value of each study [trials, runs, seeds] of a truth `distances` [trials] away."""
    squares = statistics.sums_of_squares(values)
    return statistics.upper_tails(distances, squares, *values.shape[1:])


def covered(values, truth, level=0.95):
    """Whether the interval of each study [trials, runs, seeds] holds `truth`: bool [trials]."""
    distances = np.abs(values.mean(axis=(1, 2)) - truth)
    return 2 * one_sided(values, distances) >= 1 - level


@pytest.mark.parametrize(
    ("runs", "seeds", "run_noise", "seed_noise", "noise"),
    [
        (1, 8, 0, 0, 1),  # one training run, 8 seeds: the default evaluation
        (1, 8, 0, 1, 1),
        (2, 8, 1, 0.3, 0.3),  # training runs that differ
        (3, 8, 1, 0.3, 0.3),
        (3, 8, 1, 0, 1),
        (5, 8, 1, 1, 1),
        (3, 1, 1, 0, 1),  # three training runs, one image a prompt
    ],
)
def test_95_percent_intervals_hold_a_known_difference(runs, seeds, run_noise, seed_noise, noise):
    rng = np.random.default_rng(0)
    trials = simulate(rng, 2500, runs, seeds, run_noise, seed_noise, noise, effect=0.7)
    # 95%, less what chance allows over 2,500; much wider intervals would fail as well.
    assert 0.95 - 1.65 * np.sqrt(0.05 * 0.95 / 2500) <= covered(trials, 0.7).mean() <= 0.98


@pytest.mark.parametrize("level", [0.9, 0.997])
def test_other_levels_hold_as_well(level):
    """The correction for 15 tests asks for 99.7%, equivalence for 90%."""
    trials = simulate(np.random.default_rng(4), 2000, 3, 8, 1, 0.3, 0.3)
    missed = 1 - covered(trials, 0, level).mean()
    assert missed <= (1 - level) + 1.65 * np.sqrt(level * (1 - level) / 2000)


@pytest.mark.parametrize(("runs", "bound"), [(5, 1.7), (10, 1.5)])
@pytest.mark.parametrize("noises", [(1, 0.3, 0.3), (0, 0, 1), (0.3, 1, 1)])
def test_intervals_are_not_much_wider_than_if_the_spreads_were_known(runs, bound, noises):
    values = simulate(np.random.default_rng(14), 300, runs, 8, *noises)
    half = statistics.half_widths(statistics.sums_of_squares(values), runs, 8, 0.025)
    error = np.sqrt(noises[0] ** 2 / runs + noises[1] ** 2 / 8 + noises[2] ** 2 / (8 * runs))
    assert 1 <= np.median(half) / (1.96 * error) <= bound


@pytest.mark.parametrize("squares", [(5, 1, 1), (0.5, 6, 8), (0.1, 0.1, 20), (8, 30, 10)])
def test_the_p_value_is_the_formulas(squares):
    """V* of the module's first page, over a million draws in place of the fixed points."""
    draws = np.random.default_rng(15).chisquare([2, 7, 14], (1_000_000, 3))
    by_runs, by_seeds, rest = (np.array(squares) / draws).T
    variance = np.maximum(by_runs + by_seeds - rest, rest) / (3 * 8)
    squares = np.array([squares], float)
    for tail in (0.025, 0.0017):
        distance = statistics.half_widths(squares, 3, 8, tail)
        assert stats.norm.sf(distance / np.sqrt(variance)).mean() == pytest.approx(tail, rel=0.03)


def test_one_study_is_measured_as_a_batch_is():
    trials = simulate(np.random.default_rng(5), 5, 3, 8, 1, 0.3, 0.3, effect=2)
    for study, inside in zip(trials, covered(trials, 0), strict=True):
        interval = statistics.mean_interval(study)
        assert inside == (interval["low"] <= 0 <= interval["high"])


@pytest.mark.parametrize(("runs", "noises"), [(1, (0, 1, 1)), (2, (1, 0.3, 0.3)), (3, (1, 0.3, 0.3)), (3, (0, 1, 1))])
def test_a_study_of_nothing_finds_nothing(runs, noises):
    """At least 95% of whole studies, four tests each corrected by Holm, find nothing."""
    rng = np.random.default_rng(1)
    trials = simulate(rng, 4 * 600, runs, 8, *noises)
    p_values = 2 * one_sided(trials, np.abs(trials.mean(axis=(1, 2)))).reshape(600, 4)
    found = sum((statistics.holm(p) < 0.05).any() for p in p_values)
    assert found <= 30 + 1.65 * np.sqrt(600 * 0.05 * 0.95)  # 5%, and what chance allows over 600


def test_one_run_is_students_interval():
    values = np.random.default_rng(2).standard_normal((1, 8)) + 0.3
    theirs = stats.ttest_1samp(values[0], 0)
    low, high = theirs.confidence_interval(0.95)
    for ours in (statistics.mean_interval(values), statistics.mean_interval(values.T)):
        assert ours["low"] == pytest.approx(low)
        assert ours["high"] == pytest.approx(high)
        assert ours["p"] == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize("runs", [2, 3, 5])
@pytest.mark.parametrize("level", [0.95, 0.997])
def test_where_only_runs_differ_it_is_students_interval_over_them(runs, level):
    """The tails of few runs are long: the points of the expectation must reach them."""
    values = np.repeat(np.random.default_rng(6).standard_normal((runs, 1)), 8, axis=1)
    ours = statistics.mean_interval(values, level)
    low, high = stats.ttest_1samp(values[:, 0], 0).confidence_interval(level)
    assert ours["high"] - ours["low"] == pytest.approx(high - low, rel=0.005)


sizes = st.tuples(st.integers(1, 6), st.integers(1, 9)).filter(lambda size: size != (1, 1))


@st.composite
def studies(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spreads = [draw(st.sampled_from([0.0, 1e-6, 0.3, 1.0, 30.0])) for _ in range(3)]
    spreads[draw(st.integers(0, 2))] = 1.0
    effect = draw(st.floats(-4, 4))
    return simulate(rng, 1, *draw(sizes), *spreads, effect)[0]


@settings(max_examples=150, deadline=None, database=None)
@given(values=studies(), level=st.sampled_from([0.9, 0.95, 0.997]))
def test_interval_and_p_agree(values, level):
    interval = statistics.mean_interval(values, level)
    assert (interval["p"] < 1 - level) == (interval["low"] > 0 or interval["high"] < 0)
    # At the interval's ends p is 1 - level.
    if interval["high"] > interval["low"]:
        shifted = statistics.mean_interval(values - interval["high"])
        assert shifted["p"] == pytest.approx(1 - level, rel=1e-6)


@settings(max_examples=150, deadline=None, database=None)
@given(values=studies(), margin=st.floats(0.01, 5))
def test_equivalence_and_its_interval_agree(values, margin):
    found = statistics.equivalence(values, margin)
    assert (found["p"] < 0.05) == (-margin < found["low"] and found["high"] < margin)
    interval = statistics.mean_interval(values, 0.9)
    assert found["low"] == interval["low"] and found["high"] == interval["high"]


def test_equivalence_is_schuirmanns_for_one_run():
    values = 0.1 + 0.2 * np.random.default_rng(3).standard_normal((1, 8))
    found = statistics.equivalence(values, 0.25)
    sides = (
        stats.ttest_1samp(values[0], -0.25, alternative="greater").pvalue,
        stats.ttest_1samp(values[0], 0.25, alternative="less").pvalue,
    )
    assert found["p"] == pytest.approx(max(sides))


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_a_difference_of_the_margin_is_rarely_called_equivalent(runs):
    trials = simulate(np.random.default_rng(7), 2000, runs, 8, 1, 0.3, 0.3, effect=3.0)
    wrong = (one_sided(trials, 3.0 - np.abs(trials.mean(axis=(1, 2)))) < 0.05).mean()
    assert wrong <= 0.05 + 1.65 * np.sqrt(0.05 * 0.95 / 2000)


@settings(max_examples=50, deadline=None, database=None)
@given(values=studies(), scale=st.sampled_from([1e-3, 1.0, 7.0, 1e4]), order=st.randoms(use_true_random=False))
def test_interval_follows_scale_shift_sign_and_order(values, scale, order):
    before = statistics.mean_interval(values)
    width = before["high"] - before["low"]
    runs, seeds = (order.sample(range(size), size) for size in values.shape)
    after = statistics.mean_interval(-scale * (values[runs][:, seeds] - 2.0))
    assert after["low"] == pytest.approx(-scale * (before["high"] - 2), abs=1e-6 * scale * width)
    assert after["high"] == pytest.approx(-scale * (before["low"] - 2), abs=1e-6 * scale * width)
    again = statistics.mean_interval(-scale * values)
    assert again["p"] == pytest.approx(before["p"], rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 8), (3, 1), (3, 8)])
def test_equal_values_are_certain(shape):
    something = statistics.mean_interval(np.full(shape, 0.1))
    assert something["low"] == something["mean"] == something["high"] == 0.1
    assert something["p"] == 0
    assert statistics.mean_interval(np.zeros(shape))["p"] == 1
    assert statistics.equivalence(np.full(shape, 0.1), 0.2)["p"] == 0
    assert statistics.equivalence(np.full(shape, 0.1), 0.1)["p"] == 1


def test_a_single_value_has_no_interval():
    interval = statistics.mean_interval([[0.5]])
    assert np.isnan(interval["low"]) and np.isnan(interval["high"])
    assert interval["p"] == 1
    assert statistics.equivalence([[0.5]], 100.0)["p"] == 1


@pytest.mark.parametrize("values", [[[1.0, np.nan]], [[]], [1.0, 2.0]])
def test_values_that_are_no_study_are_refused(values):
    with pytest.raises(ValueError, match="must be finite"):
        statistics.mean_interval(values)


def test_holm():
    np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.5]), [0.04, 0.09, 0.09, 0.5])


# ---- what a study could have found ---------------------------------------------------------


def imagined(variances, shape, effect=0.0, trials=2000):
    """Drawn studies [trials, runs, seeds] with these variances of runs, seeds and rest."""
    return simulate(np.random.default_rng(8), trials, *shape, *np.sqrt(variances), effect)


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 15])
def test_the_smallest_detectable_difference_of_one_run_is_students(alpha):
    values = np.random.default_rng(9).standard_normal((1, 8))
    difference = statistics.smallest_detectable(values, alpha)
    # The spread with which half of all studies come out as widely spread as this one.
    spread = np.sqrt(values.var() * 8 / stats.chi2.median(7))
    beyond = stats.t.isf(alpha / 2, 7)
    power = stats.nct.sf(beyond, 7, difference * np.sqrt(8) / spread)
    assert power == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_the_smallest_detectable_difference_is_found_in_80_percent(runs):
    values = simulate(np.random.default_rng(10), 1, runs, 8, 1, 0.5, 0.5)[0]
    difference = statistics.smallest_detectable(values)
    variances = statistics.estimated_variances(statistics.sums_of_squares(values[None])[0], runs, 8)
    trials = imagined(variances, values.shape, difference)
    assert (~covered(trials, 0)).mean() == pytest.approx(0.8, abs=0.03)
    assert statistics.smallest_detectable(7 * values + 3) == pytest.approx(7 * difference)


def test_variances_are_estimated_too_low_as_often_as_too_high():
    variances = np.square((1.0, 1.0, 0.3))
    trials = imagined(variances, (3, 8))
    found = [statistics.estimated_variances(squares, 3, 8) for squares in statistics.sums_of_squares(trials)]
    np.testing.assert_allclose((found > variances).mean(axis=0), 0.5, atol=0.05)


@pytest.mark.parametrize(("effect", "margin"), [(0.0, 0.7), (0.7, 0.7), (1.5, None), (1.5, 0.7), (0.2, 0.9)])
def test_runs_to_tell_is_about_the_number_that_tells_in_80_percent(effect, margin):
    """Difference or equivalence, whichever comes first, at the truth that the study appears to show."""
    rng = np.random.default_rng(1)
    numbers = []
    for values in simulate(rng, 15, 12, 8, 1, 0.3, 0.3):
        values = values - values.mean() + effect  # as spread as studies are, its mean the truth
        numbers.append(statistics.runs_to_tell(values, margin) or np.inf)
    trials = simulate(rng, 1000, int(np.median(numbers)), 8, 1, 0.3, 0.3, effect=effect)
    means = np.abs(trials.mean(axis=(1, 2)))
    told = 2 * one_sided(trials, means) < 0.05
    if margin is not None:
        told |= one_sided(trials, margin - means) < 0.05
    assert 0.7 <= told.mean() <= 0.93


def test_runs_to_tell_where_no_number_of_runs_does():
    values = simulate(np.random.default_rng(3), 1, 5, 4, 0.1, 5, 0.1, effect=0.5)[0]
    assert statistics.runs_to_tell(values, 0.1) is None  # the sampling seeds alone vary too much
    assert statistics.runs_to_tell(values, 0.1, seeds=8000) is not None
    assert statistics.runs_to_tell(values[:1], 0.1) is None
    assert statistics.runs_to_tell(np.ones((3, 8)), 0.1) == 2


def test_runs_to_decide_is_the_smallest_number_that_decides_in_80_percent():
    values = simulate(np.random.default_rng(11), 1, 5, 8, 1, 0.3, 0.3)[0]
    variances = statistics.estimated_variances(statistics.sums_of_squares(values[None])[0], 5, 8)
    number = statistics.runs_to_decide(values, 0.7)
    shares = []
    for runs in (number - 1, number):
        trials = imagined(variances, (runs, 8))
        distances = 0.7 - np.abs(trials.mean(axis=(1, 2)))
        shares.append((one_sided(trials, distances) < 0.05).mean())
    assert 10 <= number <= 100
    assert shares[0] < 0.81 and shares[1] > 0.78
    assert statistics.runs_to_decide(values, 0.7, alpha=0.01) > number
    assert statistics.runs_to_decide(values, 1.4) < number
    assert statistics.runs_to_decide(values, 1e3) == 2


def test_no_number_of_runs_makes_up_for_seeds_that_vary():
    values = simulate(np.random.default_rng(12), 1, 5, 8, 0.1, 1, 0.1)[0]
    assert statistics.runs_to_decide(values, 0.3) is None
    assert statistics.runs_to_decide(values, 3.0) is not None


def test_what_cannot_be_known_is_not_promised():
    one_run = np.random.default_rng(13).standard_normal((1, 8))
    assert statistics.runs_to_decide(one_run, 1e3) is None
    assert statistics.runs_to_decide([[0.5]], 1e3) is None
    assert np.isnan(statistics.smallest_detectable([[0.5]]))
    assert statistics.smallest_detectable(np.ones((3, 8))) == 0
    assert statistics.runs_to_decide(np.ones((3, 8)), 0.1) == 2


@pytest.mark.parametrize("margin", [0, -1, np.nan])
def test_a_margin_that_is_none_is_refused(margin):
    for question in (statistics.equivalence, statistics.runs_to_decide):
        with pytest.raises(ValueError, match="margin above 0"):
            question(np.zeros((3, 8)), margin)
