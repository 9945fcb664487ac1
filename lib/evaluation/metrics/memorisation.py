"""Does an adapter draw copies of its training images? Yes, no, or cannot be told.

**The null.** "Nothing copied" says: a drawn image could as well be a training image. The
images of one prompt and one training run, drawn from n seeds, and the m images trained on are
exchangeable. Seeds are independent of one another; images of one seed (other prompts, other
runs) may depend on one another in any way.

**The test** (`copy_p_values`). The ranks of exchangeable images are known, whatever their
distribution: each of the C(m + n, n) ways to call n of the m + n images "drawn" is as likely as
the true one. The statistic T is the drawn images' total similarity to their nearest training
image, as far as it exceeds what two different images reach (`usual_similarity`), and

    p = (1 + number of random relabellings with T not below the true one's) / (1 + relabellings)

is exact for any m and n (Phipson & Smyth 2010; the conformal p-value of Vovk, Gammerman & Shafer
2005 with n images in place of one). A drawn and a training image are compared on equal terms:
in every relabelling each "drawn" image has the same m "training" images to be near to.

Why not count the images above the k-th largest of the training images' own nearest
similarities, and call that number beta-binomial(n, k, m - k + 1)? It is for reference values that
are independent and of the same kind as the drawn ones. Here a training image is compared with
m - 1 others and a drawn one with m, and the nearest two training images share one value:
`python bench/memorisation.py` prints what that rule finds where nothing is copied. Nor does it
tell copies from images that are merely typical, or from a model that draws one image for every
seed, both of which are near to one another as well; a relabelling does.

The p-values of the prompts and runs depend on one another, also because they share training
images (Bates et al. 2023), so they are combined by what holds under any dependence: Bonferroni's
rule. Twice their mean and e times their geometric mean (Vovk & Wang 2020) find more copies where
all images of a seed are nearly the same, and far fewer elsewhere.

**The bound** (`reference_level`, `highest_share`). A "no" needs more than a p-value that is not
small: the share of near-copies must be bounded. The level above which an image counts as a
near-copy is one that a training-like image exceeds with a chance of at least 5%, with 99%
confidence: an order statistic low enough to carry its own error, so that too many images count
rather than too few. The share above it is bounded over the seeds, with 96% confidence, by the
inequality of Chernoff and Hoeffding (1963, theorem 1); both hold at once with 95%.

Of each image the few that are nearest to it, found in blocks of images.

The similarities of m images to one another are m x m numbers. Only those of a block of images are held at a time,
and of each image those to the few that matter: memory grows with m, and only the products' time with its square.
"""

import functools
import hashlib
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

from lib.evaluation.metrics.clip_scores import similarities
from lib.evaluation.statistics import UNCLEAR

AT_ONCE = 2**22  # similarities held at a time, 16 MB; the products of smaller blocks take longer
KEPT = 8  # searches that are remembered
searched = {}  # the last of them, {what was searched: what `among_trained` found}


class Neighbours(NamedTuple):
    """The nearest others of each image, the nearest first."""

    similarity: np.ndarray  # [images, count]
    which: np.ndarray  # [images, count], their indices


class AmongTrained(NamedTuple):
    """How near the m images trained on are to one another; what `among_trained` finds."""

    neighbours: Neighbours
    across: np.ndarray  # [m], similarity to the nearest in the half that an image is not in


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
    """Neighbours of the images whose similarities to others are the rows of [images, others]."""
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
    otherwise, a similarity could lie above itself. Found once for all runs with the same images.
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
    """Neighbours of m images trained on and n drawn, the drawn last, `count` of each among all m + n or all others.

    `known` are the Neighbours of those trained on among themselves, as many of each; `trained` and `drawn` the
    embeddings of the images and of the mirrored ones, two arrays each.
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

    `neighbours` are n or more of each image of the pool, or all others: one is outside, whatever
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


ALPHA = 0.05  # chance of "yes" where nothing is copied, and of a bound that does not hold
RARE = 0.05  # a training-like image lies above the reference level with at least this chance
LEVEL_ALPHA = 0.01  # the part of ALPHA that the reference level may use; the share gets the rest
# Fewer near-copies than one image in three is a "no". Below that the default of 8 seeds could
# never give one: 8 seeds without a near-copy still allow a share of 1 - 0.04^(1/8) = 33.1%.
MARGIN = 1 / 3
DRAWS = 9999
TIE = 1e-5  # cosines are float32; sums that differ by less than their rounding are equal


@dataclass
class CopyStudy:
    """CLIP image embeddings of one training run, float32 of unit length, d numbers an image.

    `*_mirrored` are the embeddings of the same images mirrored: a mirrored copy is a copy.
    """

    trained_on: np.ndarray  # [m, d], without the held-out images
    trained_on_mirrored: np.ndarray
    held_out: np.ndarray  # [h, d], h may be 0
    drawn: np.ndarray  # [prompts, seeds, d], the LoRA images of the success prompts
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
                raise ValueError(f"{name} holds embeddings that are not finite")

    @property
    def trained(self):
        """What an image is compared with: two arrays [m, d]."""
        return self.trained_on, self.trained_on_mirrored

    @property
    def count(self):
        """How many nearest others of each image are looked for: n, so that one is not among the
        n - 1 that a relabelling calls drawn with it, and three for `usual_similarity`."""
        return max(self.drawn.shape[1], 3)

    @functools.cached_property
    def own(self):
        """How near the images trained on are to one another: an AmongTrained."""
        return among_trained(*self.trained, self.count, first_half(len(self.trained_on)))

    def nearest(self):
        """Similarity to the nearest image trained on, other than itself: of the images drawn
        [prompts, seeds], held out [h] and trained on [m], the last empty for a single image."""
        flat = self.drawn.reshape(-1, self.drawn.shape[-1])
        drawn = nearest_similarity(flat, *self.trained).reshape(self.drawn.shape[:2])
        held_out = nearest_similarity(self.held_out, *self.trained)
        return drawn, held_out, self.own.neighbours.similarity[:, :1].ravel()


# ---- the test ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def relabellings(pool, n, draws, seed):
    """Random sets of n out of `pool` images, indices [1 + draws, n]; the first holds the last n,
    which is how `copy_p_values` puts the images that were truly drawn."""
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
    """What two different images of the pool reach: a similarity.

    The 90th percentile of each image's third nearest: a copy makes an image's nearest one very
    near, and perhaps its second nearest, but hardly its third, so that copies do not hide
    themselves by moving this. It does not depend on which images are called drawn, as the test
    requires. Sums of similarities as such let a copy disappear behind seven images that lie far.
    """
    third = neighbours.similarity[:, :3][:, -1]  # or the last, where there are fewer others
    return np.quantile(third.astype(np.float64), 0.9)


def copy_p_value(neighbours, n, draws=DRAWS, seed=0):
    """p-value of "nothing copied" for the last n of a pool of images, the others trained on.

    `neighbours` are of each image of the pool its nearest n or more, and three or more; or all
    others. The null, the formula and its sources stand at the top of this file. `seed` draws the
    relabellings.
    """
    nearest = nearest_of_the_rest(neighbours, relabellings(len(neighbours.which), n, draws, seed))
    excess = np.maximum(nearest - usual_similarity(neighbours), 0).sum(axis=1)
    return float((excess >= excess[0] - TIE).mean())  # the first is the true one, which counts


def copy_p_values(study, draws=DRAWS, seed=0):
    """p-value of "nothing copied" for each prompt of a CopyStudy: float64 [prompts]."""
    found = []
    for drawn in zip(study.drawn, study.drawn_mirrored, strict=True):
        neighbours = among_all(study.own.neighbours, study.trained, drawn, study.count)
        found.append(copy_p_value(neighbours, len(drawn[0]), draws, seed))
    return np.array(found)


def typical_p(m, n):
    """What p comes to if each of n drawn images copies one of m training images at random.

    c_j copies of training image j make c_j + 1 images that are near to one another, and T is
    the same whichever of them is the one that was trained on: p = product of (c_j + 1) / C(m + n, n).
    This is its geometric mean, each c_j being binomial(n, 1/m).
    """
    copies = np.arange(n + 1)
    ties = m * (stats.binom.pmf(copies, n, 1 / m) * np.log1p(copies)).sum()
    log_ways = -np.log(m + n + 1) - special.betaln(m + 1, n + 1)  # log C(m + n, n)
    return float(np.exp(ties - log_ways))


def enough(m, n, tests):
    """Whether `tests` prompts and runs of n seeds each could tell: whether a study in which every
    image is a copy would typically come to a corrected p of 5% or less."""
    return tests * typical_p(m, n) <= ALPHA


# ---- the bound -----------------------------------------------------------------------------


def first_half(m):
    """Which of m images are in the first of two halves: bool [m], random, the same every time."""
    first = np.zeros(m, bool)
    first[np.random.default_rng(0).permutation(m)[: (m + 1) // 2]] = True
    return first


def reference_level(across, alpha=LEVEL_ALPHA):
    """Level that a training-like image exceeds with a chance of RARE or more, at 1 - alpha.

    `across` [m] are the similarities of the training images to their nearest in the other half,
    `first_half` being one. Given one half, those of the other half's images are independent, so
    the k-th largest of c exceeds what is exceeded with the chance RARE with probability
    P(binomial(c, RARE) >= k) at most (a distribution-free tolerance limit, Wilks 1941); k is the
    smallest for which that is alpha / 2. Near the whole set there are only more images to be near
    to, so each half's level is low enough for the whole set too, and the higher is returned; None
    if both have too few.
    """
    first, levels = first_half(len(across)), []
    for half in (first, ~first):
        c = half.sum()
        ranks = np.arange(1, c + 1)
        ranks = ranks[stats.binom.sf(ranks - 1, c, RARE) <= alpha / 2]
        if len(ranks) and c < len(across):
            levels.append(float(-np.sort(-across[half])[ranks[0] - 1]))
    return max(levels, default=None)


def highest_share(shares, alpha=ALPHA - LEVEL_ALPHA):
    """Upper confidence bound of the mean of independent values in [0, 1] of any distribution.

    `shares` [seeds]: of each seed, the share of its images above the level. The bound is the
    largest mean q with seeds * KL(observed mean, q) <= log(1 / alpha) (Hoeffding 1963, theorem 1);
    with no image above it is 1 - alpha^(1 / seeds), as Clopper and Pearson's.
    """
    mean, room = float(np.mean(shares)), np.log(1 / alpha) / len(shares)
    if mean >= 1:
        return 1.0

    def beyond(q):
        return special.rel_entr(mean, q) + special.rel_entr(1 - mean, 1 - q) - room

    return float(optimize.brentq(beyond, max(mean, 1e-12), 1 - 1e-12))


def seeds_for(margin):
    """The number of seeds from which a share below `margin` can be claimed if none lies above."""
    return int(np.ceil(np.log(ALPHA - LEVEL_ALPHA) / np.log1p(-margin)))


# ---- the answer ----------------------------------------------------------------------------


def group(nearest, above):
    """What the page shows of the images drawn, held out or trained on."""
    known = np.concatenate([np.ravel(values) for values in nearest])
    hits = None if above is None else int(sum(values.sum() for values in above))
    median = float(np.median(known)) if known.size else None
    return dict(pictures=int(known.size), above=hits, median=median)


def memorised(studies, margin=MARGIN, draws=DRAWS, seed=0):
    """The answer for one experiment: a dict for metrics.json.

    `studies` is a list of CopyStudy, one a training run, with the same prompts and seeds. `margin`
    is the share of near-copies below which the answer is no. ValueError where shapes disagree.

    - answer: "yes" (p is 5% or less), "no" (p is not, and `high` is below the margin) or "cannot
      be told"; text: the same in sentences.
    - p: Bonferroni's over all prompts and runs; p_values [runs][prompts]: each on its own.
    - share: of the drawn images above the level; high: its upper bound, or None where no level
      can be given; levels: the reference level of each run; level: their mean.
    - drawn, trained_on, held_out: how many images, how many of them above the level, and the
      median similarity to the nearest image trained on. The held-out images are a control and
      no part of the test: a run has too few.
    - training_pictures: the fewest that a run was trained on; seeds, prompts, runs; margin.
    - too_few: None, or in words why even a study of nothing but copies would not be found.
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
    found = dict(
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
    if found["p"] <= ALPHA:
        found["answer"] = "yes"
    elif not enough(m, seeds, tests):
        found["too_few"] = too_few(m, seeds, tests)
    elif high is not None and high < margin:
        found["answer"] = "no"
    return found | dict(text=words(found))


def too_few(m, seeds, tests):
    """Why nothing can be told from m training images and what would do: a sentence."""
    needed = next(more for more in itertools.count(m + 1) if enough(more, seeds, tests))
    more_seeds = next((n for n in range(seeds + 1, 101) if enough(m, n, tests)), None)
    instead = f", or {more_seeds} seeds" if more_seeds else ""
    return (
        f"Too few training images to tell: {m}, needs at least {needed} with {count(seeds, 'seed')}"
        f"{instead}. Even if every image were a copy, the test would hardly find it."
    )


def count(number, noun):
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def words(found):
    """The answer in sentences, from what `memorised` returns."""
    drawn, trained_on, held_out = found["drawn"], found["trained_on"], found["held_out"]
    if found["share"] is None:
        text = "No level for near-copies can be given from so few training images. "
    else:
        text = (
            f"{drawn['above']} of {drawn['pictures']} success images ({found['share']:.0%}, at most "
            f"{found['high']:.0%}) are nearer to a training image than {found['level']:.3f}; so are "
            f"{trained_on['above']} of {trained_on['pictures']} training images to another one"
        )
        if held_out["pictures"]:
            text += f" and {held_out['above']} of {held_out['pictures']} held-out ones"
        text += ". "
    tests = found["runs"] * found["prompts"]
    p = f"p = {found['p']:.2g}" + (f", corrected for {tests} tests" if tests > 1 else "")
    if found["answer"] == "yes":
        return text + f"They lie nearer to single training images than chance allows ({p}): some are near-copies."
    if found["too_few"]:
        return text + found["too_few"]
    text += f"Copying was not found ({p})"
    if found["answer"] == "no":
        return text + f", and fewer than {found['margin']:.0%} of such images are near-copies."
    text += f", but more than {found['margin']:.0%} near-copies cannot be ruled out."
    if found["seeds"] < (needed := seeds_for(found["margin"])):
        text += f" That takes at least {needed} seeds."
    return text
