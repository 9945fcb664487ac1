"""Does an adapter reproduce its training images? Yes, no or unclear.

**The null.** "Nothing copied": a generated image could as well be a training image. The images of one prompt and one
training run from n seeds, and the m images trained on, are exchangeable. Seeds are independent; images of one seed
(other prompts, other runs) may depend on one another in any way.

**The test** (`copy_p_values`). The ranks of exchangeable images are known, whatever their distribution: each of the
C(m + n, n) ways to label n of the m + n images "generated" is as likely as the true one. The statistic T is the total
similarity of the generated images to their nearest training image, as far as it exceeds what two different images reach
(`usual_similarity`), and

    p = (1 + number of random relabellings with T not below the true one) / (1 + relabellings)

is exact for any m and n (Phipson & Smyth 2010; the conformal p-value of Vovk, Gammerman & Shafer 2005 with n images in
place of one). Generated and training images are compared on equal terms: in every relabelling each "generated" image has
the same m "training" images to be near to.

Counting the images above the k-th largest of the training images' own nearest similarities, a number called
beta-binomial(n, k, m - k + 1), is not used: it needs reference values that are independent and of the same kind as the
generated ones. Here a training image is compared with m - 1 others and a generated one with m, and the nearest two
training images share one value. `python bench/memorisation.py` prints what that rule finds where nothing is copied. Nor
does it separate copies from images that are merely typical, or from a model that generates one image for every seed;
both are near to one another as well. A relabelling does.

The p-values of prompts and runs depend on one another, also because they share training images (Bates et al. 2023), so
they are combined by a rule that holds under any dependence: Bonferroni's. Twice their mean and e times their geometric
mean (Vovk & Wang 2020) find more copies where all images of a seed are nearly the same, and far fewer elsewhere.

**The bound** (`reference_level`, `highest_share`). A "no" needs more than a p-value that is not small: the share of
images that are as near to a training image as these are to one another must be bounded. An image counts above a level that
a training-like image exceeds with a chance of at least 5%, with 99% confidence: an order statistic low enough to carry its
own error, so that too many images count rather than too few. Many training images exceed it too: an image above the level
is no copy for that. The share above it is bounded over the seeds, with 96% confidence, by the inequality of Chernoff
and Hoeffding (1963, theorem 1); both hold at once with 95%.

**Memory.** The m x m similarities of training images are computed in blocks, and only the few highest of each image are
held: memory grows with m, time with its square.
"""

import functools
import hashlib
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy

from lib.evaluation.metrics.similarity import similarities
from lib.evaluation.statistics import UNCLEAR

ALPHA = 0.05  # chance of "yes" where nothing is copied, and of a bound that does not hold
RARE = 0.05  # a training-like image exceeds the reference level with at least this chance
LEVEL_ALPHA = 0.01  # the part of ALPHA for the reference level; the share gets the rest
# Fewer images above the level than one in three are a "no". The default of 8 seeds could never show less: without a single
# one, 8 seeds still allow a share of 1 - 0.04^(1/8) = 33.1%.
MARGIN = 1 / 3
DRAWS = 9999  # random relabellings
TIE = 1e-5  # cosines are float32; sums that differ by less than their rounding are equal

AS_NEAR = "as near to a training image as these are to one another"  # above the level

AT_ONCE = 2**22  # similarities held at a time, 16 MB; the products of smaller blocks take longer
KEPT = 8  # results of `among_trained` in the cache
searched = {}  # the cache


# ---- nearest images, in blocks of similarities ---------------------------------------------


class Neighbours(NamedTuple):
    """The nearest others of each image, nearest first."""

    similarity: np.ndarray  # [images, count]
    which: np.ndarray  # [images, count], their indices


class AmongTrained(NamedTuple):
    """How similar the m images trained on are to one another."""

    neighbours: Neighbours
    across: np.ndarray  # [m], similarity to the nearest image of the other half


def rows_at_once(columns):
    """Rows of a block with this many columns."""
    return max(1, AT_ONCE // columns)


def blocks(embeddings, others, mirrored):
    """Yields (index of the first row, similarities [rows, m]) of `embeddings` [n, d] in blocks of rows."""
    rows = rows_at_once(len(others))
    for start in range(0, len(embeddings), rows):
        yield start, similarities(embeddings[start : start + rows], others, mirrored)


def nearest_similarity(embeddings, others, mirrored):
    """Similarity of each of `embeddings` [n, d] to the nearest of `others` [m, d]: float32 [n]."""
    nearest = np.empty(len(embeddings), np.float32)
    for start, block in blocks(embeddings, others, mirrored):
        nearest[start : start + len(block)] = block.max(axis=1)
    return nearest


def highest(similarity, count):
    """The `count` Neighbours of each image in `similarity` [images, others]."""
    lower = similarity.shape[1] - count
    which = np.argpartition(similarity, max(lower - 1, 0), axis=1)[:, lower:]
    values = np.take_along_axis(similarity, which, axis=1)
    order = np.argsort(-values, axis=1)
    return Neighbours(*(np.take_along_axis(part, order, axis=1) for part in (values, which)))


def stacked(*parts):
    return Neighbours(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def among_trained(trained_on, mirrored, count, first):
    """AmongTrained of `trained_on` and `mirrored` [m, d], with at most `count` neighbours of each image.

    `first` [m] marks the first half. Neighbours and halves come from the same products: with other rounding a
    similarity could exceed itself. Cached for runs with the same images.
    """
    content = (hashlib.sha256(np.ascontiguousarray(a)).digest() for a in (trained_on, mirrored, first))
    key = (count, len(trained_on), *content)
    if key not in searched:
        parts, across = [], []
        for start, block in blocks(trained_on, trained_on, mirrored):
            rows = np.arange(len(block))
            block[rows, start + rows] = -np.inf  # no image is its own neighbour
            parts.append(highest(block, min(count, len(trained_on) - 1)))
            to_half = [block[:, half].max(axis=1, initial=-np.inf) for half in (~first, first)]
            across.append(np.where(first[start + rows], *to_half))
        if len(searched) == KEPT:
            del searched[next(iter(searched))]
        searched[key] = AmongTrained(stacked(*parts), np.concatenate(across))
    return searched[key]


def among_all(known, trained, drawn, count):
    """At most `count` Neighbours of each of m images trained on and n generated ones, the generated last, among all.

    `known` are `count` Neighbours of those trained on among themselves; `trained` and `drawn` are the embeddings of
    images and of mirrored images, two arrays each.
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
    """Similarity [sets, n] of each chosen image to the nearest one outside its own set.

    `chosen` [sets, n] are indices into the pool, n < pool. `neighbours` are at least n of each image, or all others,
    so that one lies outside any set.
    """
    nearest = np.empty(chosen.shape)
    pool, n = len(neighbours.which), chosen.shape[1]
    rows = rows_at_once(pool)
    for start in range(0, len(chosen), rows):
        part = chosen[start : start + rows]
        inside = np.zeros((len(part), pool), bool)
        np.put_along_axis(inside, part, True, axis=1)
        images, values = part.ravel(), nearest[start : start + rows].reshape(-1)
        left = np.arange(len(images))
        # The nearest; where it is inside the set, the second nearest, and so on.
        for similarity, which in zip(neighbours.similarity.T, neighbours.which.T, strict=True):
            values[left] = similarity[images[left]]
            left = left[inside[left // n, which[images[left]]]]
            if not len(left):
                break
    return nearest


@dataclass
class CopyStudy:
    """Image embeddings of one training run, float32 of unit length.

    `*_mirrored` are the embeddings of the same images mirrored: a mirrored copy is a copy.
    """

    trained_on: np.ndarray  # [m, d], without the held-out images
    trained_on_mirrored: np.ndarray
    held_out: np.ndarray  # [h, d], h may be 0
    drawn: np.ndarray  # [prompts, seeds, d], LoRA images of the success prompts
    drawn_mirrored: np.ndarray

    def __post_init__(self):
        d = self.trained_on.shape[-1]
        self.held_out = np.asarray(self.held_out, np.float32).reshape(-1, d)
        for name in ("trained_on", "held_out", "drawn"):
            values = getattr(self, name)
            if values.ndim != (3 if name == "drawn" else 2) or values.shape[-1] != d:
                raise ValueError(f"{name} has shape {values.shape}")
            if name != "held_out" and getattr(self, f"{name}_mirrored").shape != values.shape:
                raise ValueError(f"{name} and {name}_mirrored differ in shape")
            if name != "held_out" and not values.size:
                raise ValueError(f"{name} is empty")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} has embeddings that are not finite")

    @property
    def trained(self):
        """The images trained on and the mirrored ones: two arrays [m, d]."""
        return self.trained_on, self.trained_on_mirrored

    @property
    def count(self):
        """Neighbours searched of each image: n, so that one is not among the n - 1 others of its relabelled set, and
        three for `usual_similarity`."""
        return max(self.drawn.shape[1], 3)

    @functools.cached_property
    def own(self):
        """The AmongTrained of the images trained on."""
        return among_trained(*self.trained, self.count, first_half(len(self.trained_on)))

    def nearest(self):
        """Similarity to the nearest other image trained on: of the generated images [prompts, seeds], the held-out
        ones [h] and those trained on [m], the last empty for a single image."""
        flat = self.drawn.reshape(-1, self.drawn.shape[-1])
        drawn = nearest_similarity(flat, *self.trained).reshape(self.drawn.shape[:2])
        held_out = nearest_similarity(self.held_out, *self.trained)
        return drawn, held_out, self.own.neighbours.similarity[:, :1].ravel()


# ---- the test ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def relabellings(pool, n, draws, seed):
    """Random sets of n out of `pool` images: indices [1 + draws, n]. The first set is the last n images, the truly
    generated ones."""
    rng = np.random.default_rng([seed, pool, n])
    chosen = np.empty((1 + draws, n), np.intp)
    chosen[0] = np.arange(pool - n, pool)
    rows = rows_at_once(pool)
    for start in range(1, 1 + draws, rows):
        part = chosen[start : start + rows]
        keys = rng.random((len(part), pool), np.float32)
        part[:] = np.argpartition(keys, n - 1, axis=1)[:, :n]
    return chosen


def usual_similarity(neighbours):
    """The similarity that two different images of the pool reach.

    The 90th percentile of each image's third-nearest similarity. A copy raises an image's nearest similarity, perhaps
    its second, hardly its third, so copies do not hide themselves by raising this. It does not depend on which images
    are labelled generated, as the test requires. Plain sums of similarities let one copy vanish behind seven
    dissimilar images.
    """
    third = neighbours.similarity[:, :3][:, -1]  # or the last, with fewer others
    return np.quantile(third.astype(np.float64), 0.9)


def copy_p_value(neighbours, n, draws=DRAWS, seed=0):
    """p-value of "nothing copied" for the last n images of a pool, the others trained on.

    `neighbours` are at least n and at least three of each image of the pool, or all others. See the formula at the top
    of this file. `seed` is that of the relabellings.
    """
    nearest = nearest_of_the_rest(neighbours, relabellings(len(neighbours.which), n, draws, seed))
    excess = np.maximum(nearest - usual_similarity(neighbours), 0).sum(axis=1)
    return float((excess >= excess[0] - TIE).mean())  # includes the true one, the first


def copy_p_values(study, draws=DRAWS, seed=0):
    """p-value of "nothing copied" for each prompt of a CopyStudy: float64 [prompts]."""
    p_values = []
    for drawn in zip(study.drawn, study.drawn_mirrored, strict=True):
        neighbours = among_all(study.own.neighbours, study.trained, drawn, study.count)
        p_values.append(copy_p_value(neighbours, len(drawn[0]), draws, seed))
    return np.array(p_values)


def typical_p(m, n):
    """The geometric mean of p if each of n generated images copies one of m training images at random:

        p = product of (c_j + 1) / C(m + n, n),    c_j ~ binomial(n, 1/m)

    c_j copies of training image j are c_j + 1 images near to one another, and T is the same whichever of them was
    trained on.
    """
    copies = np.arange(n + 1)
    ties = m * (scipy.stats.binom.pmf(copies, n, 1 / m) * np.log1p(copies)).sum()
    log_ways = -np.log(m + n + 1) - scipy.special.betaln(m + 1, n + 1)  # log C(m + n, n)
    return float(np.exp(ties - log_ways))


def enough(m, n, tests):
    """Whether a study in which every image is a copy would typically reach p <= 5%, corrected for `tests` prompts and
    runs of n seeds each."""
    return tests * typical_p(m, n) <= ALPHA


# ---- the bound -----------------------------------------------------------------------------


def first_half(m):
    """Marks a random half of m images, the same every time: bool [m]."""
    first = np.zeros(m, bool)
    first[np.random.default_rng(0).permutation(m)[: (m + 1) // 2]] = True
    return first


def reference_level(across, alpha=LEVEL_ALPHA):
    """The level that a training-like image exceeds with a chance of RARE or more, at confidence 1 - alpha.

    `across` [m] are the similarities of the training images to the nearest one in the other half (`first_half`). Given
    one half, those of the other half's c images are independent, so that

        P(k-th largest of c lies above the RARE quantile) <= P(binomial(c, RARE) >= k)

    (a distribution-free tolerance limit, Wilks 1941); k is the smallest for which that is at most alpha / 2. The whole
    set only offers more images to be near to, so each half's level is low enough for it, and the higher is returned;
    None if both halves have too few images.
    """
    first, levels = first_half(len(across)), []
    for half in (first, ~first):
        c = half.sum()
        ranks = np.arange(1, c + 1)
        ranks = ranks[scipy.stats.binom.sf(ranks - 1, c, RARE) <= alpha / 2]
        if len(ranks) and c < len(across):
            levels.append(float(-np.sort(-across[half])[ranks[0] - 1]))
    return max(levels, default=None)


def highest_share(shares, alpha=ALPHA - LEVEL_ALPHA):
    """Upper confidence bound of the mean of independent values in [0, 1] of any distribution.

    `shares` [seeds] are each seed's share of images above the level. The bound is the largest mean q with

        seeds * KL(observed mean, q) <= log(1 / alpha)

    (Hoeffding 1963, theorem 1); with no image above the level it is 1 - alpha^(1 / seeds), as Clopper and Pearson's.
    """
    mean, room = float(np.mean(shares)), np.log(1 / alpha) / len(shares)
    if mean >= 1:
        return 1.0

    def beyond(q):
        return scipy.special.rel_entr(mean, q) + scipy.special.rel_entr(1 - mean, 1 - q) - room

    return float(scipy.optimize.brentq(beyond, max(mean, 1e-12), 1 - 1e-12))


def seeds_for(margin):
    """The fewest seeds that can show a share below `margin`, with no image above the level."""
    return int(np.ceil(np.log(ALPHA - LEVEL_ALPHA) / np.log1p(-margin)))


# ---- without training images that are known ------------------------------------------------


def similarity_to_others(studies, data_dir, reason):
    """What is known of adapters whose training images are not those of the CopyStudies: a dict for metrics.json.

    `reason` says why they are not. Success images are compared with the images in `data_dir`, and nothing follows about
    copies. drawn and images: number of images and their median similarity to the nearest of these images; text: the same
    in sentences.
    """
    nearest, _, own = zip(*(study.nearest() for study in studies), strict=True)
    drawn, images = group(nearest, None), group(own[:1], None)
    text = f"Success images reach a median of {drawn['median']:.3f} to the nearest of these images"
    if images["median"] is not None:
        text += f"; these reach {images['median']:.3f} to one another"
    text += f". Copying is not judged: {reason}."
    return dict(data_dir=data_dir, reason=reason, drawn=drawn, images=images, text=text)


# ---- the answer ----------------------------------------------------------------------------


def group(nearest, above):
    """A group of images on the page: how many, how many above the level, and the median similarity."""
    similarity = np.concatenate([np.ravel(values) for values in nearest])
    hits = None if above is None else int(sum(values.sum() for values in above))
    median = float(np.median(similarity)) if similarity.size else None
    return dict(pictures=int(similarity.size), above=hits, median=median)


def memorised(studies, margin=MARGIN, draws=DRAWS, seed=0):
    """The answer for one experiment: a dict for metrics.json.

    `studies` are CopyStudy objects, one a training run, with the same prompts and seeds. `margin` is the share of
    images above the level below which the answer is no. ValueError if shapes disagree.

    - answer: "yes" (p <= 5%), "no" (p > 5% and `high` below the margin) or "unclear"; text: the same in sentences.
    - p: Bonferroni's over all prompts and runs; p_values [runs][prompts]: each on its own.
    - share: of the generated images above the level; high: its upper bound, None without a level; levels: the
      reference level of each run; level: their mean.
    - drawn, trained_on, held_out: number of images, of those above the level, and the median similarity to the nearest
      image trained on. The held-out images are a control and not part of the test: a run has too few.
    - training_pictures: the fewest that a run was trained on; seeds, prompts, runs; margin.
    - too_few: None, or why not even a study of nothing but copies would be found.
    """
    _, seeds, _ = studies[0].drawn.shape
    if any(study.drawn.shape != studies[0].drawn.shape for study in studies):
        raise ValueError("the runs differ in prompts or seeds")
    m = min(len(study.trained_on) for study in studies)
    tests = len(studies) * len(studies[0].drawn)
    p_values = np.stack([copy_p_values(s, max(draws, 100 * tests), seed) for s in studies])

    nearest = [study.nearest() for study in studies]
    levels = [reference_level(study.own.across, LEVEL_ALPHA / len(studies)) for study in studies]
    above = [None] * 3
    share = high = None
    if None not in levels:
        above = [[v[kind] > level for v, level in zip(nearest, levels, strict=True)] for kind in range(3)]
        by_seed = np.mean(above[0], axis=(0, 1))
        share, high = float(by_seed.mean()), highest_share(by_seed)

    kinds = zip(*nearest, strict=True)
    drawn, held_out, trained_on = (group(*pair) for pair in zip(kinds, above, strict=True))
    answer = dict(
        answer=UNCLEAR,
        p=float(min(1, tests * p_values.min())),
        p_values=p_values.tolist(),
        share=share,
        high=high,
        margin=margin,
        levels=levels,
        level=None if share is None else float(np.mean(levels)),
        drawn=drawn,
        trained_on=trained_on,
        held_out=held_out,
        training_pictures=m,
        seeds=seeds,
        prompts=len(studies[0].drawn),
        runs=len(studies),
        too_few=None,
    )
    if answer["p"] <= ALPHA:
        answer["answer"] = "yes"
    elif not enough(m, seeds, tests):
        answer["too_few"] = too_few(m, seeds, tests)
    elif high is not None and high < margin:
        answer["answer"] = "no"
    return answer | dict(text=words(answer))


def too_few(m, seeds, tests):
    """Why m training images are too few, and how many are enough: a sentence."""
    needed = next(more for more in itertools.count(m + 1) if enough(more, seeds, tests))
    more_seeds = next((n for n in range(seeds + 1, 101) if enough(m, n, tests)), None)
    instead = f", or {more_seeds} seeds" if more_seeds else ""
    return (
        f"Too few training images: {m}, needs at least {needed} with {seeds} seed{'s' if seeds > 1 else ''}"
        f"{instead}. Even if every image were a copy, the test would hardly find it."
    )


def words(answer):
    """The answer of `memorised` in sentences."""
    drawn, trained_on, held_out = answer["drawn"], answer["trained_on"], answer["held_out"]
    if answer["share"] is None:
        text = "Too few training images to know how near they are to one another. "
    else:
        text = (
            f"{drawn['above']} of {drawn['pictures']} success images ({answer['share']:.0%}, at most "
            f"{answer['high']:.0%}) have a similarity above {answer['level']:.3f} to a training image; so do "
            f"{trained_on['above']} of {trained_on['pictures']} training images to another one"
        )
        if held_out["pictures"]:
            text += f" and {held_out['above']} of {held_out['pictures']} held-out images"
        text += ". "
    tests = answer["runs"] * answer["prompts"]
    p = f"p = {answer['p']:.2g}" + (f", corrected for {tests} tests" if tests > 1 else "")
    if answer["answer"] == "yes":
        return text + f"They are more similar to single training images than chance allows ({p})."
    if answer["too_few"]:
        return text + answer["too_few"]
    text += f"Copying was not found ({p})"
    if answer["answer"] == "no":
        return text + f"; fewer than {answer['margin']:.0%} of such images are {AS_NEAR}."
    text += f", but it cannot be ruled out that more than {answer['margin']:.0%} of such images are {AS_NEAR}."
    if answer["seeds"] < (needed := seeds_for(answer["margin"])):
        text += f" That takes at least {needed} seeds."
    return text
