#!/usr/bin/env python3
"""Error rates of lib/evaluation/metrics/memorisation.py, by simulation.

    python bench/memorisation.py                  # 4 minutes of one CPU core
    python bench/memorisation.py --studies 2000   # smaller simulation error, five times as long

How often the test finds copies where nothing is copied, and where something is. Simulated studies have 8 seeds, 3
prompts and 1, 3 or 5 training runs; each run holds out 4 of m + 4 images at random. Embeddings are random directions
around a common one in 32 dimensions. A copy has a cosine of about 0.98 to its original. Images of one seed are
independent ("weak") or nearly the same in all prompts and runs ("strong").
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # products this small lose by being shared

import numpy as np
from scipy import stats
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.evaluation.metrics import memorisation
from lib.evaluation.metrics.memorisation import nearest_similarity

SIZES = 5, 8, 10, 16, 32, 64, 100
SEEDS, PROMPTS, RUNS, HELD_OUT, DIMENSIONS = 8, 3, (1, 3, 5), 4, 32
DRAWS = 999  # enough for 15 tests; the evaluation uses ten times as many
POPULATIONS = {
    "weak": "images of one seed independent",
    "strong": "images of one seed nearly the same",
    "near-duplicates": "strong; half of the images belong to 5 motifs of almost identical images",
    "uneven": "strong; some images are near all others, some far from all",
    "typical": "weak; generated images lie in the middle of the training images, no copies",
    "one image": "all seeds of a prompt and run give almost the same image, no copies",
    "far": "strong; generated images lie far from the training images",
}


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def population(rng, kind):
    """Two functions of normal draws [..., DIMENSIONS] and uniform draws [...]: one returns training images, the other
    generated images that are no copies."""
    centre = np.zeros(DIMENSIONS)
    centre[0] = np.sqrt(DIMENSIONS)
    motifs = rng.standard_normal((5, DIMENSIONS))

    def usual(normal, uniform):
        spread = np.ones_like(uniform)
        if kind == "uneven":
            spread = np.where(uniform < 0.5, 0.4, 1.6)
        if kind == "near-duplicates":
            motif = motifs[(uniform * 10).astype(int) % 5]
            normal = np.where(uniform[..., None] < 0.5, motif + 0.1 * normal, normal)
        return unit(centre + spread[..., None] * normal)

    def generated(normal, uniform):
        if kind == "typical":
            return unit(centre + 0.3 * normal)
        if kind == "one image":
            image = rng.standard_normal((len(normal), 1, DIMENSIONS))  # one per prompt
            return unit(centre + image + 0.1 * normal)
        if kind == "far":
            return unit(0.3 * centre + normal)
        return usual(normal, uniform)

    return usual, generated


def simulate(rng, m, kind, copied, runs=RUNS[-1], seeds=SEEDS):
    """A study: a list of CopyStudy, one per run. `copied`: the probability that an image is a copy."""
    usual, generated = population(rng, kind)
    count = m + HELD_OUT
    training = usual(rng.standard_normal((count, DIMENSIONS)), rng.random(count))
    shared = 0.0 if kind in ("weak", "typical") else 0.95  # correlation within a seed
    of_seed = rng.standard_normal((seeds, DIMENSIONS)), rng.random((3, seeds))
    studies = []
    for _ in range(runs):
        order = rng.permutation(count)
        trained_on, held_out = training[order[:m]], training[order[m:]]
        shape = PROMPTS, seeds
        normal = rng.standard_normal((*shape, DIMENSIONS)) * np.sqrt(1 - shared)
        normal += np.sqrt(shared) * of_seed[0]
        same = rng.random(shape) < shared
        uniform, chance, original = np.where(same, of_seed[1][:, None], rng.random((3, *shape)))
        copies = trained_on[(original * m).astype(int)]
        copies = copies + 0.2 * rng.standard_normal(copies.shape) / np.sqrt(DIMENSIONS)
        pick = (chance < copied)[..., None]
        made = np.where(pick, unit(copies), generated(normal, uniform))
        # Mirrored images equal the images here; mirroring is tested elsewhere.
        studies.append(memorisation.CopyStudy(trained_on, trained_on, held_out, made, made))
    return studies


def percentile_rule(study_nearest):
    """Whether the former rule says yes.

    It counts images above the 95th percentile of the training images' nearest similarities, takes the percentile as
    exact, and says yes if the share is above 5% by the wider of Wilson's interval and Student's over seeds.
    """
    hits = np.stack([generated > np.percentile(own, 95) for generated, _, own in study_nearest])
    wilson = stats.binomtest(int(hits.sum()), hits.size).proportion_ci(0.95, "wilson").low
    by_seed = hits.mean(axis=(0, 1))
    half = stats.t.ppf(0.975, len(by_seed) - 1) * by_seed.std(ddof=1) / np.sqrt(len(by_seed))
    return min(wilson, by_seed.mean() - half) > 0.05


def rank_p_values(nearest):
    """Beta-binomial p-value of each prompt for its number of images above the k-th largest of the training images'
    nearest similarities; k / (m + 1) is about 5%."""
    generated, _, own = nearest
    m, n = len(own), generated.shape[1]
    k = max(1, int(0.05 * (m + 1)))
    hits = (generated > np.sort(own)[-k]).sum(axis=1)
    return stats.betabinom.sf(hits - 1, n, k, m - k + 1)


# Corrected p-values, valid under any dependence of the tests (Vovk & Wang 2020).
COMBINED = {
    "this project": lambda p: p.size * p.min(),
    "twice the mean p": lambda p: 2 * p.mean(),
    "e times the geometric mean p": lambda p: np.e * np.exp(np.log(p).mean()),
}
RULES = [*COMBINED, "order statistics", "95th percentile"]


def shares_of_yes(m, kind, copied, count, seed):
    """Share of `count` studies in which each rule says yes: {rule: [share for each of RUNS]}."""
    yes = {rule: [] for rule in RULES}
    for number in tqdm(range(count), f"m = {m}, {kind}", leave=False):
        rng = np.random.default_rng([seed, m, number])
        studies = simulate(rng, m, kind, copied)
        nearest = [study.nearest() for study in studies]
        p = np.stack([memorisation.copy_p_values(s, DRAWS, number) for s in studies])
        ranks = np.stack([rank_p_values(values) for values in nearest])
        for rule, corrected in COMBINED.items():
            yes[rule].append([corrected(p[:runs]) <= memorisation.ALPHA for runs in RUNS])
        lowest = [ranks[:runs].size * ranks[:runs].min() for runs in RUNS]
        yes["order statistics"].append([value <= memorisation.ALPHA for value in lowest])
        yes["95th percentile"].append([percentile_rule(nearest[:runs]) for runs in RUNS])
    return {rule: np.mean(answers, axis=0) for rule, answers in yes.items()}


def print_header(*columns):
    print("\n| " + " | ".join(columns) + " |\n|" + "--|" * len(columns), flush=True)


def print_row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def percent(shares):
    return " / ".join(f"{100 * share:.1f}" for share in shares)


def print_yes(kinds, sizes, copied, count):
    for kind in kinds:
        for m in sizes:
            shares = shares_of_yes(m, kind, copied, count, list(POPULATIONS).index(kind))
            print_row(kind, m, f"{copied:.0%}", *map(percent, shares.values()))


def print_no(count):
    """How often the answer is "no" with a share of copies at the margin (must be at most 5%) and with none, and how
    often
    the reference level is too high (must be at most 1%)."""
    print_header("m", "seeds", "share copied", "% no", "% level too high")
    margin = memorisation.MARGIN
    for m, seeds, copied in [(m, n, c) for m in (10, 32) for n in (8, 16) for c in (margin, 0)]:
        answers, too_high = [], []
        for number in tqdm(range(count), f"m = {m}, no", leave=False):
            rng = np.random.default_rng([99, m, number])
            (study,) = simulate(rng, m, "far", copied, runs=1, seeds=seeds)
            result = memorisation.memorised([study], draws=DRAWS, seed=number)
            # The bound must hold even if "yes" takes precedence.
            answers.append(result["high"] < margin)
            usual, _ = population(rng, "far")
            fresh = usual(rng.standard_normal((4000, DIMENSIONS)), rng.random(4000))
            near = nearest_similarity(fresh, study.trained_on, study.trained_on)
            too_high.append((near > result["level"]).mean() < memorisation.RARE)
        print_row(m, seeds, f"{copied:.0%}", f"{100 * np.mean(answers):.1f}", f"{100 * np.mean(too_high):.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=400, help="simulated studies per row (default 400)")
    count = parser.parse_args().studies
    rules = [f"% yes, {rule}" for rule in RULES]
    print("\n".join(f"{kind}: {text}" for kind, text in POPULATIONS.items()))
    print(f"1 / 3 / 5 training runs; {count} studies per row")
    print_header("population", "m", "copies", *rules)
    print_yes(list(POPULATIONS)[:4], SIZES, 0, count)
    print_yes(list(POPULATIONS)[4:6], (10, 32, 100), 0, count // 2)
    for copied in (0.05, 0.2, 0.5, 1):
        print_yes(["weak", "strong", "far"], (8, 10, 32, 100), copied, count // 4)
    print_no(count)


if __name__ == "__main__":
    main()
