"""Of each picture the few that are nearest to it, found in blocks of pictures.

The similarities of m pictures to one another are m x m numbers. Only those of a block of pictures are held at a time,
and of each picture those to the few that matter: memory grows with m, and only the products' time with its square.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from lib.evaluation.clip_scores import similarities

AT_ONCE = 2**22  # similarities held at a time, 16 MB; the products of smaller blocks take longer
KEPT = 8  # searches that are remembered
searched = {}  # the last of them, {what was searched: what `among_trained` found}


class Neighbours(NamedTuple):
    """The nearest others of each picture, the nearest first."""

    similarity: np.ndarray  # [pictures, count]
    which: np.ndarray  # [pictures, count], their indices


class AmongTrained(NamedTuple):
    """How near the m pictures trained on are to one another; what `among_trained` finds."""

    neighbours: Neighbours
    across: np.ndarray  # [m], similarity to the nearest in the half that a picture is not in


def rows_at_once(columns):
    """How many rows of so many numbers are held at a time."""
    return max(1, AT_ONCE // columns)


def blocks(embeddings, others, mirrored):
    """(index of its first row, similarities [rows, m]) of `embeddings` [n, d] in blocks of rows."""
    rows = rows_at_once(len(others))
    for start in range(0, len(embeddings), rows):
        yield start, similarities(embeddings[start : start + rows], others, mirrored)


def nearest_similarity(embeddings, others, mirrored):
    """Similarity of each of `embeddings` [n, d] to the nearest of `others` [m, d]: float32 [n]."""
    found = np.empty(len(embeddings), np.float32)
    for start, block in blocks(embeddings, others, mirrored):
        found[start : start + len(block)] = block.max(axis=1)
    return found


def highest(similarity, count):
    """Neighbours of the pictures whose similarities to others are the rows of [pictures, others]."""
    lower = similarity.shape[1] - count
    which = np.argpartition(similarity, max(lower - 1, 0), axis=1)[:, lower:]
    found = np.take_along_axis(similarity, which, axis=1)
    order = np.argsort(-found, axis=1)
    return Neighbours(*(np.take_along_axis(part, order, axis=1) for part in (found, which)))


def stacked(*parts):
    return Neighbours(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def among_trained(trained_on, mirrored, count, first):
    """AmongTrained of `trained_on` and `mirrored`, [m, d], with `count` neighbours of each or all others if they are fewer.

    `first` [m] says which are in the first half. Neighbours and halves are looked at in the same products: rounded
    otherwise, a similarity could lie above itself. Found once for all runs with the same pictures.
    """
    content = (hashlib.sha256(np.ascontiguousarray(a)).digest() for a in (trained_on, mirrored, first))
    key = (count, len(trained_on), *content)
    if key not in searched:
        parts, across = [], []
        for start, block in blocks(trained_on, trained_on, mirrored):
            rows = np.arange(len(block))
            block[rows, start + rows] = -np.inf  # no picture is its own neighbour
            parts.append(highest(block, min(count, len(trained_on) - 1)))
            to_half = [block[:, half].max(axis=1, initial=-np.inf) for half in (~first, first)]
            across.append(np.where(first[start + rows], *to_half))
        if len(searched) == KEPT:
            del searched[next(iter(searched))]
        searched[key] = AmongTrained(stacked(*parts), np.concatenate(across))
    return searched[key]


def among_all(known, trained, drawn, count):
    """Neighbours of m pictures trained on and n drawn, the drawn last, `count` of each among all m + n or all others.

    `known` are the Neighbours of those trained on among themselves, as many of each; `trained` and `drawn` the
    embeddings of the pictures and of the mirrored ones, two arrays each.
    """
    m, n = len(trained[0]), len(drawn[0])
    count = min(count, m + n - 1)
    to_drawn = similarities(trained[0], *drawn)
    similarity, column = highest(np.hstack([known.similarity, to_drawn]), count)
    which = np.hstack([known.which, np.broadcast_to(np.arange(m, m + n), (m, n))])
    of_trained = Neighbours(similarity, np.take_along_axis(which, column, axis=1))
    own = similarities(drawn[0], *drawn)
    np.fill_diagonal(own, -np.inf)
    return stacked(of_trained, highest(np.hstack([similarities(drawn[0], *trained), own]), count))


def nearest_of_the_rest(neighbours, chosen):
    """Similarity [sets, n] of each chosen picture to the nearest one outside its own set.

    `neighbours` are n or more of each picture of the pool, or all others: one is outside, whatever
    the set. `chosen` are the indices [sets, n] of the sets, n < pool.
    """
    found = np.empty(chosen.shape)
    pool, n = len(neighbours.which), chosen.shape[1]
    rows = rows_at_once(pool)
    for start in range(0, len(chosen), rows):
        part = chosen[start : start + rows]
        inside = np.zeros((len(part), pool), bool)
        np.put_along_axis(inside, part, True, axis=1)
        pictures, values = part.ravel(), found[start : start + rows].reshape(-1)
        left = np.arange(len(pictures))
        # The nearest, where it is inside the second nearest, and so on.
        for similarity, which in zip(neighbours.similarity.T, neighbours.which.T, strict=True):
            values[left] = similarity[pictures[left]]
            left = left[inside[left // n, which[pictures[left]]]]
            if not len(left):
                break
    return found
