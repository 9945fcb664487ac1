"""The study in sentences and Markdown tables, made from its figures."""

from lib.evaluation.metrics.table import metric_name
from lib.evaluation.prompts import CATEGORIES, members
from lib.evaluation.report.words import concept_name, interval_text, markdown_table, scale_text
from lib.study.measures import BASELINE, NOT_ASKED, PROTECTED

LIMITS = (
    "The miniature knows eight things and a few dozen words. So near and unrelated prompts are cruder than for Stable "
    "Diffusion v1.5, and sizes of effects do not carry over.",
    "The study shows that a method can work and that the evaluation detects it. It does not show how rank, text "
    "encoder, captions, DoRA or batches behave in a model that is so much larger.",
    "A verdict here is a reason to run the same study there (make study BASE_MODEL=…), and no substitute for it.",
)
OTHER_LIMITS = (
    "The verdicts hold for this concept, these training images and these prompts, over other sampling seeds and other "
    "training runs of the same recipes.",
)
ARM_TITLES = dict(
    rank32="rank 32",
    rank8="rank 8",
    unet_only="UNet only",
    dora="DoRA",
    protected_plain_loss="protected, ordinary loss",
)


def limits(study):
    """What the study does not show: sentences."""
    return LIMITS if study.on_miniature else OTHER_LIMITS


def arm_name(arm):
    """“rank 32”, “UNet only”: an arm to a reader."""
    return ARM_TITLES.get(arm, arm.replace("_", " "))


def count_text(number, noun):
    return f"{number} {noun}{'' if number == 1 else 's'}"


def study_size(study):
    """The size of the study, a sentence."""
    prompts = ", ".join(f"{len(members(study.prompts, category))} {category} prompts" for category in CATEGORIES)
    return (
        f"{len(study.arms)} arms, {count_text(len(study.training_seeds), 'training seed')} each, "
        f"{count_text(len(study.sampling_seeds), 'sampling seed')} a prompt: {prompts}."
    )


def introduction(study):
    """The concept, the arms, the prompts and the source of the data: paragraphs."""
    baseline = [run.adapter for run in study.arms[BASELINE]]
    concept = concept_name(baseline)
    taught = f"The concept is {concept}. " if concept != "the concept" else ""
    model = study.drawn_with["base_model"]
    model = f"the embedded miniature ({model}), which is not Stable Diffusion" if study.on_miniature else model
    data = (baseline[0].get("training") or {}).get("data_dir")
    seeds = ", ".join(map(str, study.training_seeds))
    return (
        f"{taught}The base model is {model}. An arm is one training recipe, trained once per training seed"
        f"{f' on the images in {data}' if data else ''}. Rank 32 is the published recipe, and every other arm is compared "
        "with it. Five arms change one thing: rank 8, UNet only (no adapter in the text encoder), DoRA, varied captions, "
        "large batch (8 in place of 1). The two protected arms train with a list of protected prompts.",
        f"{study_size(study)} Success prompts ask for the concept, near prompts for its class without it, unrelated "
        f"prompts for something else. All figures are from the metrics.json files of training seeds {seeds} beside this "
        "page.",
    )


def note_text(study, rows):
    """How the comparisons were tested."""
    scale = "" if study.scale is None or study.scale["reason"] else f"{scale_text(study.scale)} "
    return scale + (
        "Intervals are 95% intervals over training and sampling seeds. Higher or lower: the interval excludes 0. "
        "Equivalent: the 90% interval lies within the margin (two one-sided tests). Both are corrected with Holm's "
        f"method over the {len(rows)} comparisons that the claims rest on. These were fixed after two pilots of three "
        "arms and before the runs of the study. Numbers of seeds that would decide assume that the measured effect is "
        "the true one. With fewer than three training seeds nothing is claimed."
    )


def comparison_text(row):
    """“change, near prompts: −0.150 [−0.156, −0.144] (margin 0.05): lower”."""
    label, text = comparison_label(row), interval_text(row.get("correlation", row))
    margin = "" if row["margin"] is None else f" (margin {row['margin']:g})"
    return f"{label}: {text}{margin}: {answer_text(row)}"


def comparison_label(row):
    """“change, near prompts”."""
    label = f"{metric_name(row['metric'])}, {row['category']} prompts"
    if "share" in row:
        label += f", minus {row['share']:.0%} of rank 32's" if row["share"] else ", the arm alone"
    return label


def answer_text(row):
    """The answer of a comparison; that of a correlation names its threshold."""
    if "correlation" in row:
        return {"higher": "above 0.5", "lower": "below 0.5"}.get(row["answer"], row["answer"])
    return row["answer"]


def part_lines(part):
    """The measurements of a part: sentences without a full stop."""
    lines = [comparison_text(row) for row in part["comparisons"]]
    return lines + ([part["text"]] if part["text"] else [])


def verdict_text(claim):
    """The verdict of a claim, part by part where they differ, with what would decide an undecided one."""
    by_verdict = {}
    for part in claim["parts"]:
        decides = f" ({part['decides']['text']})" if part["decides"] else ""
        by_verdict.setdefault((part["verdict"], decides), []).append(part["about"])
    if len(by_verdict) == 1:
        return "".join(next(iter(by_verdict)))
    texts = [f"{verdict} for {' and '.join(abouts)}{decides}" for (verdict, decides), abouts in by_verdict.items()]
    return "; ".join(texts) or "not measured"


def stands(claim):
    """True if every part of a claim stands, False if none does, else None."""
    parts = {part["stands"] for part in claim["parts"]}
    return parts.pop() if len(parts) == 1 else None


def sentence(claim):
    """A claim and its verdict, a sentence."""
    return f"{claim['title']}: {verdict_text(claim)}."


def evidence(part):
    """The comparison that a part's verdict rests on, in few words: the first that differs, else the first that is
    undecided, else the first. Where all of several are equivalent, their number."""
    rows = part["comparisons"]
    if not rows:
        return f"{part['about']}: {part['text']}"
    if len(rows) > 2 and {row["answer"] for row in rows} == {"equivalent"}:
        return f"{part['about']}: all {len(rows)} comparisons equivalent"
    order = {"equivalent": 2, "undecided": 1}
    row = min(rows, key=lambda row: order.get(row["answer"], 0))
    return f"{comparison_label(row)}: {interval_text(row.get('correlation', row))}"


def claims_table(claims):
    """The claims with what each verdict rests on, as rows of text, the head first."""
    rows = [["Claim", "In whose words", "What it rests on", "Verdict"]]
    for claim in claims:
        whose = f"“{claim['words']}”" if claim["words"] else "ours"
        rests_on = "; ".join(evidence(part) for part in claim["parts"]) or " ".join(claim["notes"])
        rows.append([f"{claim['number']}. {claim['title']}", whose, rests_on, f"**{verdict_text(claim)}**"])
    return rows


def claim_section(claim):
    """Every measurement of a claim, as Markdown."""
    lines = [line for part in claim["parts"] for line in part_lines(part)]
    return "\n".join([f"## {sentence(claim)}", "", *(f"- {line}" for line in [*lines, *claim["notes"]])])


def claims_markdown(study, claims, rows):
    """claims.md."""
    paragraphs = [
        "# An answer to every claim",
        *introduction(study),
        "Differences are the arm minus rank 32, paired by training seed: means with 95% intervals. How a claim is made: "
        "lib/study/README.md. report.html has the charts, forest.png every arm beside rank 32, change_and_concept.png "
        "the points of claim 3, study.json every figure and the files that they are from.",
        markdown_table(claims_table(claims)).replace("|--:", "|---"),
        " ".join(limits(study)),
        note_text(study, rows),
        *study.notes,
        *map(claim_section, claims),
    ]
    return "\n\n".join(paragraphs) + "\n"


def equal_concept_text(equal):
    """Where the protected arm and rank 32 were compared at equal concept, and how their changes differ there: a
    sentence. `equal` is from `equal_concept_intervals`."""
    level, one, two = (equal[key] for key in ("level", f"scale {BASELINE}", f"scale {PROTECTED}"))
    differences = " and ".join(
        f"{interval_text(equal[f'change {category}'])} on {category} prompts "
        f"({interval_text(equal[f'ratio {category}'], sign=False)} times as much)"
        for category in NOT_ASKED
    )
    return (
        f"At equal concept ({interval_text(level)}: rank 32 at scale {one['mean']:.2f}, {arm_name(PROTECTED)} at scale "
        f"{two['mean']:.2f}) change differs by {differences}."
    )
