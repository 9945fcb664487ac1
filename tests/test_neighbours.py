"""Neighbours found in blocks are those of the whole matrix of similarities, and take memory linear in the images."""

import tracemalloc

import numpy as np
import pytest

from lib.evaluation.metrics import memorisation
from lib.evaluation.metrics.clip_scores import similarities

DIMENSIONS, SEEDS = 16, 4


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def mirror(embeddings):
    """What mirroring an image does to its embedding here: a turn that undoes itself."""
    return np.roll(embeddings, DIMENSIONS // 2, axis=-1)


def made(m, kind, prompts=2, seeds=SEEDS, held_out=3):
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
    return memorisation.CopyStudy(trained_on, mirror(trained_on), apart, drawn, mirror(drawn))


def to_others(embeddings, mirrored):
    similarity = similarities(embeddings, embeddings, mirrored).astype(np.float64)
    np.fill_diagonal(similarity, -np.inf)
    return similarity


def whole_p_value(study, prompt, draws):
    """copy_p_value from the similarities of all images of the pool to one another, in loops."""
    pool = np.concatenate([study.trained_on, study.drawn[prompt]])
    similarity = to_others(pool, mirror(pool))
    ranked = -np.sort(-similarity, axis=1)[:, :-1]
    usual = np.quantile(ranked[:, :3][:, -1], 0.9)
    totals = []
    for chosen in memorisation.relabellings(len(pool), SEEDS, draws, 0):
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
    similarity = to_others(*study.trained)
    found, across = study.own
    count = min(SEEDS, m - 1)
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
    assert made(30, "plain", seeds=SEEDS + 1).own.neighbours.which.shape == (30, SEEDS + 1)
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
