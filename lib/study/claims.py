"""The claims of the published study and of this project, the comparisons that each rests on, and their verdicts.

All comparisons of all claims form one family and are corrected together (Holm 1979). They were fixed after two pilots
of three arms and before the runs of the study.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lib.evaluation.comparison import answered, differences
from lib.evaluation.prompts import members
from lib.evaluation.statistics import FEWEST_RUNS, MOST_RUNS, mean_interval, runs_to_tell
from lib.study.measures import (
    BASELINE,
    NOT_ASKED,
    adapters,
    columns,
    has_movement,
    lpips_and_movement,
    rank_correlations,
)

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"
NOT_TESTABLE = "not testable here"
EQUIVALENT, NO_DIFFERENCE = "equivalent within the margin", "refuted: equivalent within the margin"
MIXED = "supported in one score, refuted in another"
# From this rank correlation on, change is informative: of two images the one that changed more also moved
# further toward the concept in two of three cases (for normal data asin(0.52) / pi + 1 / 2).
INFORMATIVE = 0.5


@dataclass(frozen=True)
class Scores:
    """An arm minus rank 32, one comparison per (metric, category).

    `share` is the share of rank 32's effect that is subtracted: 1 all of it, 0.1 a tenth, 0 none, which tests the
    arm's own effect. The margins shrink with it, except for 0.
    """

    arm: str
    scores: tuple
    share: float = 1.0

    def __call__(self, study):
        pair = tuple((arm, study.arms[arm]) for arm in (BASELINE, self.arm))
        return differences([pair], self.scores, study.prompts, study.base_pairs, study.margins, self.share)


@dataclass(frozen=True)
class Correlation:
    """The rank correlation of change and movement toward the concept, compared with INFORMATIVE on Fisher's scale."""

    category: str

    def __call__(self, study):
        chosen = members(study.prompts, self.category)
        if not has_movement(study) or not chosen:
            return []
        points = lpips_and_movement(study, [runs for _, runs in adapters(study)], chosen)
        z = rank_correlations(*points, study.base_pairs[chosen])
        interval = mean_interval(z)
        above = z - np.arctanh(INFORMATIVE)
        row = dict(
            metric="rank correlation",
            category=self.category,
            margin=None,
            correlation={end: float(np.tanh(interval[end])) for end in ("mean", "low", "high")},
            **mean_interval(above),
            equivalence=dict(low=None, high=None, p=1.0),
        )
        return [(row, above)]


def equal_columns(study):
    """Whether two arms give the same figures to the last digit: `verdict`, `stands`, `text` and `decides` of a part,
    or None where it was not measured."""
    measured = columns(study)
    if measured is None:
        return None
    same, apart = measured["same"], measured["apart"]
    # If none of n training seeds gave equal columns, at most this share of all does, with 95% confidence.
    most = 1 - 0.05 ** (1 / len(same))
    verdict, stands = UNDECIDED, None
    if not same.any() and most < 0.5:
        verdict, stands = REFUTED, False
    elif same.all() and len(same) >= FEWEST_RUNS:
        verdict, stands = SUPPORTED, True
    text = (
        f"the three figures agree to four digits in {int(same.sum())} of {same.size} pairs of columns, each from one "
        f"image a prompt; on average they differ by {apart['clip']:.3f} (CLIP), {apart['lpips']:.3f} (LPIPS) and "
        f"{apart['cat']:.3f} (LPIPS of the cat)"
    )
    if not same.any():
        text += f"; at most {most:.0%} of training seeds give such a pair"
    seeds = same.shape[1]
    decides = dict(
        training_seeds=5, sampling_seeds=seeds, text=f"five training seeds of {seeds} sampling seeds would decide"
    )
    return dict(verdict=verdict, stands=stands, text=text, decides=None if stands is not None else decides)


@dataclass(frozen=True)
class Part:
    """A statement of a claim that has a verdict of its own.

    `says` is the difference that is claimed: "same", "higher", "lower", "not higher" or "not lower". It is decided
    by the comparisons that `measure` returns for a study, or by `judge`, which needs none.
    """

    about: str
    says: str
    measure: Callable = lambda study: []
    judge: Callable | None = None


@dataclass(frozen=True)
class Claim:
    """A sentence that is true or false."""

    number: int
    title: str
    words: str | None  # of the published study; None: a claim of this project
    parts: tuple
    at_equal_concept: bool = False  # shown with the comparison at equal concept
    not_on_miniature: str | None = None  # why the miniature cannot test it


def side_effects(says, arm, metrics=("concept_similarity", "change"), share=1.0):
    """A Part for near prompts and one for unrelated prompts."""
    return tuple(
        Part(f"{category} prompts", says, Scores(arm, tuple((metric, category) for metric in metrics), share))
        for category in NOT_ASKED
    )


def learning(says, arm):
    """A Part for what an arm learned of the concept."""
    return Part("the concept", says, Scores(arm, (("concept_similarity", "success"), ("clip", "success"))))


# Every score that a whole adapter is compared by. Named here, so that a new metric never joins the family of tests.
EVERY_SCORE = (
    ("concept_similarity", "success"),
    ("clip", "success"),
    ("variety", "success"),
    ("concept_similarity", "near"),
    ("change", "near"),
    ("concept_similarity", "unrelated"),
    ("change", "unrelated"),
)
CLAIMS = (
    Claim(
        1,
        "Rank 8 does as well as rank 32",
        "Rank 8 achieves similar quality with 4× fewer parameters",
        (learning("not lower", "rank8"), *side_effects("not higher", "rank8", ("concept_similarity",))),
    ),
    Claim(
        2,
        "Training the UNet alone contaminates more",
        "UNet-only shows higher contamination on unrelated prompts",
        side_effects("higher", "unet_only"),
        not_on_miniature="At its rate of 1e-5 the text encoder's half of rank 32 has almost no effect here: its |BA| is "
        "0.25% of |W|, the UNet's is 4.0%. The two arms are the same adapter. For higher rates of the text encoder see "
        "results/study/README.md.",
    ),
    Claim(
        3,
        "The more an image changes, the further it moves toward the concept",
        "LPIPS on failure cases is informative",
        tuple(Part(f"{category} prompts", "higher", Correlation(category)) for category in NOT_ASKED),
    ),
    Claim(
        4,
        "Fixed captions teach better than varied ones",
        "Using a consistent caption … helps the model learn the visual concept more effectively than varied captions",
        (learning("lower", "varied_captions"),),
    ),
    Claim(
        5,
        "DoRA has no advantage over LoRA",
        "LoRA's capacity is adequate",
        (learning("not higher", "dora"), *side_effects("not lower", "dora", ("concept_similarity",))),
    ),
    Claim(
        6,
        "Rank 32 and rank 8 have the same figures to the last digit",
        "Avg Success CLIP 0.3636, Avg Success LPIPS 0.5260, Failure LPIPS (cat) 0.1832 in both columns",
        (Part("the columns", "same", judge=equal_columns),),
    ),
    Claim(
        7,
        "A protected adapter leaves near and unrelated prompts as they are",
        None,
        side_effects("same", "protected", share=0.0),
        at_equal_concept=True,
    ),
    Claim(
        8,
        "Batches of 8 give an equivalent adapter",
        None,
        (Part("the adapter", "same", Scores("large_batch", EVERY_SCORE)),),
    ),
    Claim(
        9, "A protected adapter learns the concept no less than rank 32", None, (learning("not lower", "protected"),)
    ),
    Claim(
        10,
        "A protected adapter does at most a tenth of rank 32's harm",
        None,
        (
            Part(
                "near prompts",
                "lower",
                Scores("protected", (("change", "near"), ("concept_similarity", "near")), share=0.1),
            ),
            Part("unrelated prompts", "lower", Scores("protected", (("change", "unrelated"),), share=0.1)),
        ),
    ),
)


def judged(says, answers):
    """(verdict, whether the statement stands, or None) of a Part from the answers of its comparisons."""
    answers = set(answers)
    wanted, *negated = says.split()[::-1]
    opposite = {"higher": "lower", "lower": "higher"}.get(wanted)
    all_equivalent = answers == {"equivalent"}
    if says == "same":
        if answers & {"higher", "lower"}:
            return REFUTED, False
        return (EQUIVALENT, True) if all_equivalent else (UNDECIDED, None)
    if negated:  # not higher, not lower
        if wanted in answers:
            return REFUTED, False
        if all_equivalent:
            return EQUIVALENT, True
        return (SUPPORTED, True) if answers <= {"equivalent", opposite} else (UNDECIDED, None)
    if {wanted, opposite} <= answers:
        return MIXED, None
    if wanted in answers:
        return SUPPORTED, True
    if all_equivalent:
        return NO_DIFFERENCE, False
    return (REFUTED, False) if opposite in answers else (UNDECIDED, None)


def judge_claims(study):
    """The verdict of every claim: (claims, comparisons), lists of dicts.

    A claim has `number`, `title`, `words`, `parts` and `notes`. A part has `about`, `says`, `verdict`, `stands`,
    `comparisons` (rows of `answered`; those of correlations have `correlation`), `text` and `decides`. A claim that
    was not measured has no parts and a note. `comparisons` are all rows of the family.
    """
    measured = {(claim.number, part.about): part.measure(study) for claim in CLAIMS for part in claim.parts}
    rows = answered([comparison for own in measured.values() for comparison in own], deciding)
    claims = []
    for claim in CLAIMS:
        untestable = claim.not_on_miniature if study.on_miniature else None
        parts = []
        for part in claim.parts:
            own = [row for row, _ in measured[claim.number, part.about]]
            if verdict := part.judge(study) if part.judge else own and compared_verdict(part, own, untestable):
                parts.append(dict(about=part.about, says=part.says, comparisons=own) | verdict)
        notes = [untestable] if untestable else []
        if not parts:
            notes.insert(0, "Not measured: the concept, a kind of prompts or enough sampling seeds are missing.")
        claims.append(dict(number=claim.number, title=claim.title, words=claim.words, parts=parts, notes=notes))
    return claims, rows


def compared_verdict(part, rows, untestable):
    """What `equal_columns` returns, for a part with comparisons."""
    verdict, stands = judged(part.says, [row["answer"] for row in rows])
    decides = most_of([row["decides"] for row in rows if "decides" in row]) if stands is None else None
    if untestable:
        verdict, stands, decides = NOT_TESTABLE, None, None
    return dict(verdict=verdict, stands=stands, text=None, decides=decides)


def deciding(row, values, tests):
    """What would decide an undecided comparison: dict(training_seeds, sampling_seeds, text).

    `training_seeds` is None where no number of training seeds would, up to eight times as many sampling seeds.
    """
    runs, seeds = values.shape
    if runs < FEWEST_RUNS:
        text = f"five training seeds of {seeds} sampling seeds would show how much runs differ"
        return dict(training_seeds=5, sampling_seeds=seeds, text=text)
    for more in (seeds, 2 * seeds, 4 * seeds, 8 * seeds):
        needed = runs_to_tell(values, row["margin"], 0.05 / tests, seeds=more)
        if needed is not None:
            needed = max(needed, runs + 1)
            text = f"about {needed} training seeds of {more} sampling seeds would decide"
            if more > seeds:
                text += f"; of {seeds}, not even {MOST_RUNS:,} would"
            return dict(training_seeds=needed, sampling_seeds=more, text=text)
    text = f"not even {MOST_RUNS:,} training seeds of {more} sampling seeds would decide"
    return dict(training_seeds=None, sampling_seeds=more, text=text)


def most_of(decides):
    """Of what would decide several comparisons, that which takes most, or None."""
    ranked = sorted(decides, key=lambda found: (found["training_seeds"] or np.inf, found["sampling_seeds"]))
    return ranked[-1] if ranked else None
