"""The claims of the published study and this project's own, and what was measured of each.

A claim has parts, and what a part rests on was laid down before anything was measured: `CLAIMS`. All the
comparisons that any part rests on are corrected together for their number (Holm 1979).
"""

from dataclasses import dataclass

import numpy as np

from lib.evaluation.comparison import answered, differences
from lib.evaluation.metrics.effects import no_change_reason
from lib.evaluation.prompts import UNTAUGHT, members
from lib.evaluation.statistics import FEWEST_RUNS, mean_interval, runs_to_tell
from lib.study.measures import (
    BASELINE,
    MINIATURE,
    at_equal_concept,
    columns_part,
    devices_text,
    most_of,
    rank_correlations,
    raw_points,
    time_part,
    time_ratios,
    time_text,
)

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"
NOT_TESTABLE = "not testable here"
EQUIVALENT, NO_DIFFERENCE = "equivalent within the margin", "refuted: equivalent within the margin"
MIXED = "supported in one score, refuted in another"
# From this rank correlation on, change tells contamination: of two images the one that changed more
# moved further toward the concept in two of three cases (in normal data, asin(0.52) / pi + 1 / 2).
TELLS = 0.5
OTHER_PROMPTS = {category.name: category.noun for category in UNTAUGHT}


@dataclass(frozen=True)
class Part:
    """Something that a claim says of an arm beside rank 32, and the (score, category)s that decide it.

    `says` is the difference that is claimed: "same", "higher", "lower", "not higher" or "not lower". `share` is how
    much of rank 32's effect the arm is compared with: 1 all, 0.1 a tenth, 0 none, so that the arm's own effect is
    tested; the margins shrink with it, but for 0.
    """

    about: str
    says: str
    arm: str
    measures: tuple
    share: float = 1.0


@dataclass(frozen=True)
class Claim:
    """A sentence that can be true or false, who says it in which words, and its image."""

    number: int
    title: str
    words: str | None  # the published study's; None: a claim of this project
    figure: str
    parts: tuple = ()
    timed: str | None = None  # the arm whose time is told with it
    not_on_miniature: str | None = None  # why the miniature cannot test it


def spoiled(says, arm, keys=("concept_similarity", "change"), share=1.0):
    """A Part for near prompts and one for unrelated ones."""
    return tuple(
        Part(about, says, arm, tuple((key, category) for key in keys), share)
        for category, about in OTHER_PROMPTS.items()
    )


# What claim 8 compares; it does not grow with the table of metrics, nor does Holm's family.
COMPARED = (
    ("concept_similarity", "success"),
    ("clip", "success"),
    ("variety", "success"),
    ("concept_similarity", "near"),
    ("change", "near"),
    ("concept_similarity", "unrelated"),
    ("change", "unrelated"),
)
TAUGHT = (("concept_similarity", "success"), ("clip", "success"))
CLAIMS = (
    Claim(
        1,
        "Rank 8 does as well as rank 32",
        "Rank 8 achieves similar quality with 4× fewer parameters",
        "forest.png",
        (
            Part("what was taught", "not lower", "rank8", TAUGHT),
            *spoiled("not higher", "rank8", ("concept_similarity",)),
        ),
    ),
    Claim(
        2,
        "Training the UNet alone contaminates more",
        "UNet-only shows higher contamination on unrelated prompts",
        "forest.png",
        spoiled("higher", "unet_only"),
        not_on_miniature="At its rate of 1e-5 the text encoder's half of rank 32 does next to nothing here: its |BA| is "
        "0.25% of |W|, the UNet's 4.0%, so the two arms are the same adapter. What higher rates of the text encoder do: "
        "results/study/README.md.",
    ),
    Claim(
        3,
        "How far images change tells how far they move toward the concept",
        "LPIPS on failure cases is informative",
        "change_and_concept.png",
    ),
    Claim(
        4,
        "Fixed captions teach better than varied ones",
        "Using a consistent caption … helps the model learn the visual concept more effectively than varied captions",
        "forest.png",
        (Part("what was taught", "lower", "varied_captions", TAUGHT),),
    ),
    Claim(
        5,
        "LoRA suffices where DoRA could be used",
        "LoRA's capacity is adequate",
        "forest.png",
        (Part("what was taught", "not higher", "dora", TAUGHT), *spoiled("not lower", "dora", ("concept_similarity",))),
        timed="dora",
    ),
    Claim(
        6,
        "Rank 32 and rank 8 have the same figures to the last digit",
        "Avg Success CLIP 0.3636, Avg Success LPIPS 0.5260, Failure LPIPS (cat) 0.1832 in both columns",
        "forest.png",
    ),
    Claim(
        7,
        "A protected adapter leaves near and unrelated prompts as they are",
        None,
        "trade_off_scales.png",
        spoiled("same", "protected", share=0.0),
        timed="protected",
    ),
    Claim(
        8,
        "Batches of 8 give an equivalent adapter in a third of the time",
        None,
        "forest.png",
        (Part("the adapter", "same", "large_batch", COMPARED),),
        timed="large_batch",
    ),
    Claim(
        9,
        "A protected adapter teaches no less than rank 32",
        None,
        "forest.png",
        (Part("what was taught", "not lower", "protected", TAUGHT),),
    ),
    Claim(
        10,
        "A protected adapter does at most a tenth of rank 32's harm",
        None,
        "forest.png",
        (
            Part("near prompts", "lower", "protected", (("change", "near"), ("concept_similarity", "near")), 0.1),
            Part("unrelated prompts", "lower", "protected", (("change", "unrelated"),), 0.1),
        ),
    ),
)


def judged(says, answers):
    """(verdict, whether what was said stands, or None) of a Part from its comparisons' answers."""
    found = set(answers)
    wanted, *more = says.split()[::-1]
    opposite = {"higher": "lower", "lower": "higher"}.get(wanted)
    only = {"equivalent"} == found
    if says == "same":
        if found & {"higher", "lower"}:
            return REFUTED, False
        return (EQUIVALENT, True) if only else (UNDECIDED, None)
    if more:  # not higher, not lower
        if wanted in found:
            return REFUTED, False
        if only:
            return EQUIVALENT, True
        return (SUPPORTED, True) if found <= {"equivalent", opposite} else (UNDECIDED, None)
    if {wanted, opposite} <= found:
        return MIXED, None
    if wanted in found:
        return SUPPORTED, True
    if only:
        return NO_DIFFERENCE, False
    return (REFUTED, False) if opposite in found else (UNDECIDED, None)


def judge_claims(study):
    """What was measured of every claim: (claims, comparisons), lists of dicts.

    A claim has `number`, `title`, `words`, `figure`, `parts` and `notes`; a part `about`, `verdict`,
    `stands`, `comparisons` (rows of `answered`, of correlations with `correlation`) and `decides`. What
    was not measured has no parts and a note. `comparisons` are all that were corrected together.
    """
    asked = [(claim, part) for claim in CLAIMS for part in parts_of(claim)]
    found, owners = [], []
    for claim, part in asked:
        rows = measured(study, claim, part)
        found += rows
        owners += [(claim.number, part.about)] * len(rows)
    rows = answered(found, deciding)
    claims = []
    for claim in CLAIMS:
        record = dict(
            number=claim.number, title=claim.title, words=claim.words, figure=claim.figure, parts=[], notes=[]
        )
        for part in parts_of(claim):
            own = [row for row, owner in zip(rows, owners, strict=True) if owner == (claim.number, part.about)]
            if own:
                verdict, stands = judged(part.says, [row["answer"] for row in own])
                if claim.not_on_miniature and on_miniature(study):
                    verdict, stands = NOT_TESTABLE, None
                decides = [row["decides"] for row in own if "decides" in row]
                record["parts"].append(
                    dict(
                        about=part.about,
                        says=part.says,
                        verdict=verdict,
                        stands=stands,
                        comparisons=own,
                        text=None,
                        decides=most_of(decides) if stands is None and verdict != NOT_TESTABLE else None,
                    )
                )
        if claim.not_on_miniature and on_miniature(study):
            record["notes"].append(claim.not_on_miniature)
        claims.append(record)
    ratios, devices = time_ratios(study), devices_text(study)
    for claim, record in zip(CLAIMS, claims, strict=True):
        if claim.number == 6 and (part := columns_part(study)):
            record["parts"].append(part)
        if claim.number == 8 and claim.timed in ratios:
            record["parts"].append(time_part(ratios[claim.timed], devices))
        elif claim.timed in ratios:
            record["notes"].append(f"Its training steps took {time_text(ratios[claim.timed])} ({devices}).")
        if not record["parts"]:
            record["notes"].insert(
                0, "Not measured: the concept, enough sampling seeds or a kind of prompts is missing."
            )
    return claims, rows


def parts_of(claim):
    """Its Parts, and for the correlation one for each kind of prompts that was not taught."""
    if claim.number != 3:
        return claim.parts
    return tuple(Part(about, "higher", "", ((None, c),)) for c, about in OTHER_PROMPTS.items())


def equal_concept(study):
    """`at_equal_concept`, or None where it cannot be had."""
    categories = {category for category, _ in study.prompts}
    if not can_move(study) or not {"success", *OTHER_PROMPTS} <= categories:
        return None
    return at_equal_concept(study)


def can_move(study):
    """Whether change and the movement toward the concept can be had."""
    scored = study.arms[BASELINE][0].rows[0]["concept_similarity"] is not None
    return scored and no_change_reason(study.base_pairs) is None


def on_miniature(study):
    return study.drawn_with["base_model"] == MINIATURE


def measured(study, claim, part):
    """The comparisons that a Part rests on, as `difference` gives them; none where they cannot be had."""
    if claim.number == 3:
        [(_, category)] = part.measures
        if not can_move(study) or not members(study.prompts, category):
            return []
        return [correlation(study, category)]
    pair = tuple((arm, study.arms[arm]) for arm in (BASELINE, part.arm))
    return differences([pair], part.measures, study.prompts, study.base_pairs, study.margins, part.share)


def correlation(study, category):
    """A comparison of the rank correlation with TELLS, on Fisher's scale; `correlation` is the interval."""
    chosen = members(study.prompts, category)
    z = rank_correlations(*raw_points(study, chosen), study.base_pairs[chosen])
    interval = mean_interval(z)
    rho = {key: float(np.tanh(interval[key])) for key in ("mean", "low", "high")}
    above = z - np.arctanh(TELLS)
    row = dict(
        metric="rank correlation",
        category=category,
        margin=None,
        correlation=rho,
        **mean_interval(above),
        equivalence=dict(low=None, high=None, p=1.0),
    )
    return row, above


def deciding(row, values, tests):
    """What would decide an undecided comparison: dict(training_seeds, text); the number is None where no
    number of training seeds would."""
    runs, seeds = values.shape
    if runs < FEWEST_RUNS:
        return dict(training_seeds=5, text="five training seeds would tell how much runs differ")
    for more in (seeds, 2 * seeds, 4 * seeds, 8 * seeds):
        needed = runs_to_tell(values, row["margin"], 0.05 / tests, seeds=more)
        if needed is not None:
            needed = max(needed, runs + 1)
            drawn = f" of {more} sampling seeds" if more != seeds else ""
            return dict(training_seeds=needed, text=f"about {needed} training seeds{drawn} would decide")
    return dict(training_seeds=None, text="no study of this kind would decide")
