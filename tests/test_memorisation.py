"""Copies of training images: found where they are, not found where they are not, never guessed; neighbours found in
blocks are those of the whole matrix of similarities."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest
from scipy import special, stats

from lib.evaluation.metrics import memorisation
from lib.evaluation.metrics.memorisation import CopyStudy, memorised
from lib.evaluation.metrics.similarity import nearest_training, similarities
from lib.evaluation.statistics import UNCLEAR

DIMENSIONS, SEEDS, PROMPTS = 32, 8, 3
CENTRE = np.tile([1.0, 0.0, 0.0, 0.0], DIMENSIONS // 4) * 2


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def mirror(embeddings):
    """What mirroring an image does to its embedding here: a turn that undoes itself."""
    return np.roll(embeddings, DIMENSIONS // 2, axis=-1)


def pictures(rng, *shape, centre=CENTRE, spread=1.0):
    return unit(centre + spread * rng.standard_normal((*shape, DIMENSIONS)))


def study(trained_on, drawn, held_out=()):
    return CopyStudy(trained_on, mirror(trained_on), held_out, drawn, mirror(drawn))


def copies(rng, trained_on, shape=(PROMPTS, SEEDS)):
    noise = 0.03 * rng.standard_normal((*shape, DIMENSIONS))
    return unit(trained_on[rng.integers(len(trained_on), size=shape)] + noise)


def far(rng, *shape):
    return pictures(rng, *shape, centre=-CENTRE)


def to_others(embeddings):
    """The similarity of each image to each other one [n, n], -inf to itself, all at once."""
    similarity = similarities(embeddings, embeddings, mirror(embeddings))
    np.fill_diagonal(similarity, -np.inf)
    return similarity


def reference_own(found):
    """Similarity of each image trained on to the nearest other one; none for a single image."""
    m = len(found.trained_on)
    return to_others(found.trained_on).max(axis=1) if m > 1 else np.empty(0)


def test_a_study_measures_nearness_as_the_scores_do():
    rng = np.random.default_rng(1)
    found = study(pictures(rng, 12), pictures(rng, 2, 4), pictures(rng, 3))
    drawn, held_out, own = found.nearest()
    reference = found.trained_on, found.trained_on_mirrored
    for values, embeddings in ((drawn[1], found.drawn[1]), (held_out, found.held_out)):
        expected, _ = nearest_training(embeddings, *reference)
        np.testing.assert_allclose(values, expected, atol=1e-5)
    np.testing.assert_allclose(own, reference_own(found), atol=1e-5)


def test_no_picture_is_its_own_neighbour_and_a_mirrored_one_is_another_ones():
    rng = np.random.default_rng(0)
    trained_on = pictures(rng, 5)
    trained_on[3] = mirror(trained_on[1])
    _, _, own = study(trained_on, pictures(rng, 1, 2)).nearest()
    np.testing.assert_allclose(own[[1, 3]], 1, atol=1e-5)
    assert own[[0, 2, 4]].max() < 0.9

    symmetric = np.eye(3, dtype=np.float32)  # each equals its mirror image, none resembles another
    drawn = symmetric[None]
    _, _, own = CopyStudy(symmetric, symmetric, (), drawn, drawn).nearest()
    np.testing.assert_array_equal(own, [0, 0, 0])


# ---- the test ------------------------------------------------------------------------------


def test_every_relabelling_is_as_likely_as_any_other():
    chosen = np.sort(memorisation.relabellings(6, 3, 20000, 1)[1:], axis=1)
    _, counts = np.unique(chosen, axis=0, return_counts=True)
    assert len(counts) == 20
    assert stats.chisquare(counts).pvalue > 1e-3


def test_the_p_value_is_what_counting_all_relabellings_gives():
    """Three copies, two of one image: of the 56 ways to call 3 of 8 images drawn, 3 * 2 leave
    one image of each group of copies among the training images."""
    rng = np.random.default_rng(3)
    trained_on = pictures(rng, 5)
    drawn = unit(trained_on[[0, 0, 1]] + 1e-4 * rng.standard_normal((3, DIMENSIONS)))
    pool = np.concatenate([trained_on, drawn])
    similarity = (pool @ pool.T).round(3)  # copies tie
    np.fill_diagonal(similarity, -np.inf)
    nearest = memorisation.highest(similarity, 3)
    p = memorisation.copy_p_value(nearest, 3, draws=9999)
    assert p == pytest.approx(6 / 56, abs=0.015)

    usual = memorisation.usual_similarity(nearest)
    totals = []
    for members in itertools.combinations(range(8), 3):
        rest = [i for i in range(8) if i not in members]
        totals.append(sum(max(similarity[i, rest].max() - usual, 0) for i in members))
    assert p == pytest.approx(np.mean(np.array(totals) >= totals[-1] - 1e-5), abs=0.015)


@pytest.mark.parametrize("m", [5, 8, 16, 40])
@pytest.mark.parametrize("kind", ["plain", "near-duplicates", "some near to all"])
def test_nothing_copied_is_called_copied_in_5_percent_at_most(m, kind):
    """The drawn images are of the training images' own kind, the hardest case."""
    rng = np.random.default_rng([4, m, len(kind)])
    small = 0
    for trial in range(300):
        spread = rng.choice([0.4, 1.6], (m + SEEDS, 1)) if kind == "some near to all" else 1.0
        pool = pictures(rng, m + SEEDS, spread=spread)
        if kind == "near-duplicates":
            pool = unit(pool[rng.integers(m // 2, size=len(pool))] + 0.02 * pool)
        nearest = memorisation.highest(to_others(pool), SEEDS)
        small += memorisation.copy_p_value(nearest, SEEDS, 199, trial) <= 0.05
    assert stats.binomtest(small, 300, 0.05, "greater").pvalue > 1e-3, small


def test_pictures_that_prompts_share_count_once():
    """Dependent images are no further evidence: three prompts with the same images."""
    rng = np.random.default_rng(6)
    trained_on = pictures(rng, 28)
    drawn = np.concatenate([copies(rng, trained_on, (1, 3)), pictures(rng, 1, 5)], axis=1)
    one = memorised([study(trained_on, drawn)])
    three = memorised([study(trained_on, drawn.repeat(3, axis=0))])
    six = memorised([study(trained_on, drawn.repeat(3, axis=0))] * 2)
    assert 0.02 < one["p"] < 0.05
    assert three["p"] == pytest.approx(3 * one["p"])
    assert six["p"] == pytest.approx(6 * one["p"])
    assert [one["answer"], three["answer"]] == ["yes", UNCLEAR]
    assert np.shape(six["p_values"]) == (2, 3)


# ---- the answers ---------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("m", [8, 28, 100])
def test_copies_are_found_mirrored_or_not(m, mirrored):
    rng = np.random.default_rng([6, m])
    trained_on = pictures(rng, m)
    drawn = copies(rng, trained_on)
    found = memorised([study(trained_on, mirror(drawn) if mirrored else drawn)])
    assert found["answer"] == "yes"
    assert found["p"] < 0.05
    assert found["share"] == found["high"] == 1
    assert "more similar to single training images than chance allows" in found["text"]


def test_mirroring_the_drawn_pictures_changes_nothing():
    """In a relabelling the drawn images are what others are near to, mirrored or not."""
    rng = np.random.default_rng(21)
    trained_on, drawn = pictures(rng, 16), pictures(rng, PROMPTS, SEEDS)
    drawn[:, :4] = mirror(drawn[:, 4:])
    turned = memorisation.copy_p_values(study(trained_on, mirror(drawn)))
    np.testing.assert_allclose(memorisation.copy_p_values(study(trained_on, drawn)), turned, atol=2e-3)
    drawn[:, :4] = mirror(drawn[:, :4])
    same = memorisation.copy_p_values(study(trained_on, drawn))
    np.testing.assert_allclose(same, turned, atol=2e-3)


def test_a_copy_whose_mirror_image_was_trained_on_too_is_no_further_picture():
    """Mirrored training images are near-duplicates of one another: copies of them are not nearer
    to the training images than these are to one another."""
    rng = np.random.default_rng(7)
    half = pictures(rng, 14)
    trained_on = np.concatenate([half, mirror(half)])
    single = memorised([study(np.concatenate([half, pictures(rng, 14)]), copies(rng, half))])
    twins = memorised([study(trained_on, copies(rng, half))])
    assert single["p"] < 0.01
    assert twins["p"] > 5 * single["p"]
    assert single["trained_on"]["median"] < 0.9 < twins["trained_on"]["median"]


def test_copies_are_found_among_pictures_that_are_far():
    rng = np.random.default_rng(8)
    trained_on = pictures(rng, 28)
    drawn = np.concatenate([copies(rng, trained_on, (3, 5)), far(rng, 3, 3)], axis=1)
    assert memorised([study(trained_on, drawn)])["answer"] == "yes"


@pytest.mark.parametrize("kind", ["one image for all seeds", "typical"])
def test_pictures_near_to_one_another_are_not_taken_for_copies(kind):
    rng = np.random.default_rng(9)
    trained_on = pictures(rng, 28)
    if kind == "typical":  # nearer to each training image than these are to one another
        drawn = pictures(rng, PROMPTS, SEEDS, spread=0.3)
        nearest, _, own = study(trained_on, drawn).nearest()
        assert nearest.min() > own.max()
    else:
        drawn = unit(pictures(rng, PROMPTS, 1) + 0.03 * pictures(rng, PROMPTS, SEEDS))
    found = memorised([study(trained_on, drawn)])
    assert found["answer"] != "yes"
    assert found["p"] > 0.5


def test_far_pictures_are_no_copies_and_too_few_of_them_cannot_be_told():
    rng = np.random.default_rng(10)
    trained_on, drawn = pictures(rng, 28), far(rng, PROMPTS, SEEDS)
    found = memorised([study(trained_on, drawn)])
    assert found["answer"] == "no"
    assert found["share"] == 0
    assert found["high"] == pytest.approx(1 - 0.04 ** (1 / 8))
    assert "fewer than 33% of such images are as near to a training image as these are to one another" in found["text"]
    assert memorised([study(trained_on, drawn)], margin=0.3)["answer"] == UNCLEAR
    found = memorised([study(trained_on, drawn[:, :5])])
    assert found["answer"] == UNCLEAR
    assert "at least 8 seeds" in found["text"]


def test_pictures_like_the_training_pictures_cannot_be_told():
    rng = np.random.default_rng(11)
    found = memorised([study(pictures(rng, 28), pictures(rng, PROMPTS, SEEDS))])
    assert found["answer"] == UNCLEAR
    assert found["p"] > 0.05
    assert found["high"] > 1 / 3


def test_held_out_pictures_are_a_control_and_not_training_pictures():
    rng = np.random.default_rng(12)
    trained_on, held_out = pictures(rng, 28), far(rng, 4)
    drawn = copies(rng, held_out)  # near to what was held out, far from what was trained on
    found = memorised([study(trained_on, drawn, held_out)])
    assert found["answer"] == "no"
    assert found["training_pictures"] == 28
    assert found["held_out"]["pictures"] == 4
    assert found["held_out"]["above"] == 0
    assert found["held_out"]["median"] < found["trained_on"]["median"]
    without = memorised([study(trained_on, drawn)])
    assert without["held_out"] == dict(pictures=0, above=0, median=None)
    same = set(found) - {"held_out", "text"}
    assert all(found[key] == without[key] for key in same)

    held_out = np.concatenate([copies(rng, trained_on, (1,)), held_out])
    assert memorised([study(trained_on, drawn, held_out)])["held_out"]["above"] == 1


@pytest.mark.parametrize(("m", "level"), [(1, False), (2, False), (3, True), (5, True)])
def test_a_few_pictures_are_refused_in_words_with_every_figure(m, level):
    rng = np.random.default_rng([13, m])
    found = memorised([study(pictures(rng, m), far(rng, PROMPTS, SEEDS), far(rng, 1))])
    assert found["answer"] == UNCLEAR
    assert found["too_few"].startswith(f"Too few training images: {m}, needs at least 7 with 8 seeds.")
    assert found["too_few"] in found["text"]
    assert found["p"] > 0.05
    assert (found["level"] is not None) == (found["high"] is not None) == level
    assert found["drawn"]["pictures"] == 24
    assert found["trained_on"]["pictures"] == (m if m > 1 else 0)
    assert json.loads(json.dumps(found)) == found


def test_what_would_do_is_derived_from_seeds_and_tests():
    say = memorisation.too_few
    assert "needs at least 119 with 1 seed, or 2 seeds." in say(30, 1, 3)
    assert "needs at least 39 with 1 seed, or 2 seeds." in say(38, 1, 1)
    assert "seeds." in say(5, 8, 15)
    assert "or" not in say(5, 8, 15).split(".")[0]  # no number of seeds makes up for it
    rng = np.random.default_rng(14)
    drawn = far(rng, PROMPTS, SEEDS)
    for m, enough in ((6, False), (7, True)):  # 7 are enough for 8 seeds and 3 prompts …
        assert (memorised([study(pictures(rng, m), drawn)])["too_few"] is None) == enough
    five = [study(pictures(rng, 9), drawn)] * 5  # … but not for five runs
    assert "needs at least 10" in memorised(five, draws=199)["too_few"]


def test_a_typical_study_of_copies_reaches_what_typical_p_says():
    """One seed: the copy and its original may change places, 2 / (m + 1). Several: the geometric
    mean over which images are copied."""
    assert memorisation.typical_p(39, 1) == pytest.approx(2 / 40)
    rng = np.random.default_rng(15)
    counts = np.stack([np.bincount(rng.integers(10, size=8), minlength=10) for _ in range(4000)])
    logs = np.log1p(counts).sum(axis=1) - np.log(special.comb(18, 8))
    assert np.log(memorisation.typical_p(10, 8)) == pytest.approx(logs.mean(), abs=0.05)


# ---- the bound -----------------------------------------------------------------------------


def test_the_level_lies_near_the_top_and_carries_its_own_error():
    """For 100 images it is the 8th largest of 50: 8 or more of 50 lie above what 5% exceed with
    a chance of 0.3%, 7 or more with 1.2%."""
    rng = np.random.default_rng(16)
    values = rng.permutation(100) / 100
    level = memorisation.reference_level(values)
    assert 7 <= (values > level).sum() <= 14
    first = memorisation.first_half(100)
    assert level == max(np.sort(values[half])[-8] for half in (first, ~first))


@pytest.mark.parametrize("m", [8, 28])
def test_training_like_pictures_exceed_the_level_with_a_chance_of_5_percent_or_more(m):
    rng = np.random.default_rng([17, m])
    too_high, shares = 0, []
    for _ in range(100):
        trained_on, fresh = pictures(rng, m), pictures(rng, 1000)
        level = memorisation.reference_level(study(trained_on, fresh[None, :3]).own.across)
        nearest, _ = nearest_training(fresh, trained_on, mirror(trained_on))
        shares.append((nearest > level).mean())
        too_high += shares[-1] < 0.05
    assert too_high <= 4  # of 100; 1 is allowed
    assert np.mean(shares) < {8: 0.8, 28: 0.45}[m]  # and not needlessly many


def test_more_runs_need_a_lower_level():
    rng = np.random.default_rng(18)
    trained_on = pictures(rng, 28)
    drawn = pictures(rng, PROMPTS, SEEDS)
    one, five = (memorised([study(trained_on, drawn)] * n, draws=199) for n in (1, 5))
    assert five["level"] < one["level"]
    assert five["levels"] == [five["level"]] * 5


@pytest.mark.parametrize("seeds", [1, 4, 8, 16])
@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.6])
def test_the_bound_of_a_share_holds_in_96_percent_at_least(seeds, share):
    """Seeds with all images above the level or none, which is the worst case."""
    hits = np.arange(seeds + 1)
    bounds = [memorisation.highest_share(np.repeat([1.0, 0.0], [hit, seeds - hit])) for hit in hits]
    missed = stats.binom.pmf(hits, seeds, share)[np.array(bounds) < share].sum()
    assert missed <= 0.04
    assert np.all(np.diff(bounds) > 0)
    assert bounds[0] == pytest.approx(1 - 0.04 ** (1 / seeds))
    assert bounds[-1] == 1


# ---- what it refuses -----------------------------------------------------------------------


def test_the_same_pictures_give_the_same_answer():
    rng = np.random.default_rng(19)
    made = study(pictures(rng, 28), pictures(rng, PROMPTS, SEEDS))
    first = memorised([made])
    memorisation.relabellings.cache_clear()
    assert memorised([made]) == first


def test_arrays_that_do_not_belong_together_are_refused():
    rng = np.random.default_rng(20)
    trained_on, drawn = pictures(rng, 6), pictures(rng, 2, 3)
    with pytest.raises(ValueError, match="drawn has shape"):
        study(trained_on, drawn[0])
    with pytest.raises(ValueError, match="differ in shape"):
        CopyStudy(trained_on, trained_on[1:], (), drawn, drawn)
    with pytest.raises(ValueError, match="trained_on is empty"):
        study(trained_on[:0], drawn)
    with pytest.raises(ValueError, match="not finite"):
        study(trained_on, drawn * np.nan)
    with pytest.raises(ValueError, match="differ in prompts or seeds"):
        memorised([study(trained_on, drawn), study(trained_on, drawn[:, 1:])])


# ---- nearest images, in blocks -------------------------------------------------------------


def made(m, kind, prompts=2, seeds=4, held_out=3):
    rng = np.random.default_rng([m, seeds, len(kind)])
    trained_on = unit(rng.standard_normal((m, DIMENSIONS)) + 1)
    drawn = unit(rng.standard_normal((prompts, seeds, DIMENSIONS)) + 1)
    if kind == "ties":  # products of whole numbers are exact, and many are equal
        trained_on = rng.integers(-1, 2, (m, DIMENSIONS)).astype(np.float32) / 4
        drawn = trained_on[rng.integers(m, size=(prompts, seeds))]
    if kind == "mirrored copies":
        trained_on[m // 2 :] = mirror(trained_on)[: m - m // 2]
        drawn = mirror(trained_on)[rng.integers(m, size=(prompts, seeds))]
    apart = unit(rng.standard_normal((held_out, DIMENSIONS)))
    return CopyStudy(trained_on, mirror(trained_on), apart, drawn, mirror(drawn))


def whole_p_value(study, prompt, draws):
    """copy_p_value from the similarities of all images of the pool to one another, in loops."""
    pool = np.concatenate([study.trained_on, study.drawn[prompt]])
    similarity = to_others(pool)
    ranked = -np.sort(-similarity, axis=1)[:, :-1]
    usual = np.quantile(ranked[:, :3][:, -1], 0.9)
    totals = []
    for chosen in memorisation.relabellings(len(pool), study.drawn.shape[1], draws, 0):
        rest = np.setdiff1d(np.arange(len(pool)), chosen)
        nearest = similarity[np.ix_(chosen, rest)].max(axis=1)
        totals.append(np.maximum(nearest - usual, 0).sum())
    return np.mean(np.array(totals) >= totals[0] - memorisation.TIE)


@pytest.fixture(params=[1, 60, 2**22], ids=["a row at a time", "a few rows", "all rows"])
def at_once(request, monkeypatch):
    """How many similarities are held; nothing is remembered of searches in other blocks."""
    monkeypatch.setattr(memorisation, "AT_ONCE", request.param)
    monkeypatch.setattr(memorisation, "searched", {})
    memorisation.relabellings.cache_clear()


@pytest.mark.parametrize("kind", ["plain", "ties", "mirrored copies"])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 30])
def test_blocks_find_what_the_whole_matrix_holds(m, kind, at_once):
    study = made(m, kind)
    similarity = to_others(study.trained_on)
    found, across = study.own
    count = min(4, m - 1)
    ranked = -np.sort(-similarity, axis=1)[:, :count]
    assert found.similarity.shape == found.which.shape == (m, count)
    np.testing.assert_allclose(found.similarity, ranked, atol=1e-6)
    listed = np.take_along_axis(similarity, found.which, axis=1)
    np.testing.assert_allclose(found.similarity, listed, atol=1e-6)
    assert all(len(set(row)) == count for row in found.which)

    first = memorisation.first_half(m)
    assert first.sum() == (m + 1) // 2
    for half in (first, ~first):
        expected = similarity[np.ix_(half, ~half)].max(axis=1, initial=-np.inf)
        np.testing.assert_allclose(across[half], expected, atol=1e-6)

    drawn, held_out, own = study.nearest()
    np.testing.assert_allclose(own, ranked[:, :1].ravel(), atol=1e-6)
    for values, embeddings in ((held_out, study.held_out), (drawn[1], study.drawn[1])):
        expected = similarities(embeddings, *study.trained).max(axis=1)
        np.testing.assert_allclose(values, expected, atol=1e-6)

    p_values = memorisation.copy_p_values(study, draws=199)
    expected = [whole_p_value(study, prompt, 199) for prompt in range(2)]
    np.testing.assert_allclose(p_values, expected, atol=1e-12)


def test_nearest_of_the_rest_needs_no_more_neighbours_than_there_are_in_a_set(at_once):
    rng = np.random.default_rng(2)
    similarity = rng.integers(3, size=(9, 9)).astype(float)  # many ties
    np.fill_diagonal(similarity, -np.inf)
    chosen = memorisation.relabellings(9, 4, 50, 0)
    assert chosen.shape == (51, 4)
    assert chosen[0].tolist() == [5, 6, 7, 8]
    found = memorisation.nearest_of_the_rest(memorisation.highest(similarity, 4), chosen)
    for row, members in zip(found, chosen, strict=True):
        rest = np.setdiff1d(np.arange(9), members)
        np.testing.assert_array_equal(row, similarity[np.ix_(members, rest)].max(axis=1))


def test_relabellings_do_not_depend_on_the_blocks(monkeypatch):
    whole = memorisation.relabellings.__wrapped__(11, 3, 100, 5)
    monkeypatch.setattr(memorisation, "AT_ONCE", 7 * 11)
    np.testing.assert_array_equal(memorisation.relabellings.__wrapped__(11, 3, 100, 5), whole)


def test_runs_with_the_same_pictures_are_searched_once(monkeypatch):
    calls = []
    blocks = memorisation.blocks
    monkeypatch.setattr(memorisation, "searched", {})
    monkeypatch.setattr(memorisation, "blocks", lambda *given: calls.append(len(given[0])) or blocks(*given))
    one, same, other = made(30, "plain"), made(30, "plain"), made(30, "ties")
    assert same.own is one.own
    assert calls == [30]
    assert other.own is not one.own
    assert made(30, "plain", seeds=5).own.neighbours.which.shape == (30, 5)
    for m in range(2, 2 + 2 * memorisation.KEPT):
        assert len(made(m, "plain").own.across) == m
    assert len(memorisation.searched) == memorisation.KEPT


def test_a_picture_is_not_above_the_level_that_it_gives():
    """Level and nearest similarities are taken from the same products: rounded otherwise, the image whose
    similarity is the level could lie above it."""
    for m in (97, 98, 99):
        study = made(m, "plain")
        level = memorisation.reference_level(study.own.across)
        assert level in study.own.across.tolist()
        assert (study.nearest()[2] >= level).sum() > (study.nearest()[2] > level).sum()


def test_memory_grows_with_the_pictures_and_not_with_their_square(monkeypatch):
    monkeypatch.setattr(memorisation, "AT_ONCE", 2**14)

    def most(m):
        study = made(m, "plain", held_out=m // 10)
        tracemalloc.start()
        try:
            memorisation.memorised([study], draws=200)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    most(10)  # what is imported and remembered at the first call
    assert most(4000) < 5 * most(1000)
