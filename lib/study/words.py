"""The study in words and tables, made from its figures, so that the two cannot disagree."""

from lib.evaluation.metrics.table import metric_name
from lib.evaluation.prompts import CATEGORIES
from lib.evaluation.report.words import interval_text, markdown_table
from lib.study.measures import BASELINE, HELD, MINIATURE, most_of, time_table

CATEGORY_NAMES = {name: category.noun for name, category in CATEGORIES.items()}
# What stands beside every verdict on the miniature.
LIMITS = (
    "The miniature knows eight things and a few dozen words, so what is near the concept or unrelated to it is "
    "cruder than in Stable Diffusion v1.5, and sizes of effects do not carry over.",
    "It can show that a method does what it says somewhere, and that the measuring would find it; how rank, text "
    "encoder, captions, DoRA or batches behave in a model that much larger it cannot say.",
    "A verdict here is a reason to run the same study there (make study BASE_MODEL=…), and no substitute for it.",
)
OTHER_LIMITS = (
    "The verdicts speak of this concept, these images and these prompts, drawn with other sampling seeds and by "
    "other training runs of the same recipes.",
)


def limits(study):
    """What the study cannot say: sentences."""
    return LIMITS if study.drawn_with["base_model"] == MINIATURE else OTHER_LIMITS


def arm_name(arm):
    """“rank 32”, “UNet only”: an arm to a reader."""
    named = dict(
        rank32="rank 32",
        rank8="rank 8",
        unet_only="UNet only",
        dora="DoRA",
        protected_plain_loss="protected, ordinary loss",
    )
    return named.get(arm, arm.replace("_", " "))


def what_was_done(study):
    """The size of the study, a sentence."""
    counts = {c: sum(category == c for category, _ in study.prompts) for c in CATEGORY_NAMES}
    named = ", ".join(f"{counts[c]} {name}" for c, name in CATEGORY_NAMES.items())
    return (
        f"{len(study.arms)} arms, {count_text(len(study.training_seeds), 'training seed')} each, "
        f"{count_text(len(study.sampling_seeds), 'sampling seed')} a prompt: {named}."
    )


def count_text(number, what):
    return f"{number} {what}{'' if number == 1 else 's'}"


def note_text(rows):
    """How the comparisons were tested."""
    return (
        f"95% intervals over training and sampling seeds. Higher or lower: the interval leaves out 0; equivalent: the "
        f"90% interval lies within the margin (two one-sided tests); both after Holm's correction over the {len(rows)} "
        "comparisons that the claims rest on, which were laid down before anything was drawn. What would decide is told "
        "for the case that the truth is what was measured. With fewer than three training seeds nothing is claimed."
    )


def comparison_text(row):
    """“change, near prompts: −0.150 [−0.156, −0.144] (margin 0.05): lower”."""
    prompts = CATEGORY_NAMES[row["category"]]
    if "correlation" in row:
        answer = {"higher": "at least 0.5", "lower": "below 0.5"}.get(row["answer"], row["answer"])
        return f"rank correlation, {prompts}: {interval_text(row['correlation'])}: {answer}"
    if "share" in row:
        prompts += f", beside {row['share']:.0%} of rank 32's" if row["share"] else ", the arm alone"
    return f"{metric_name(row['metric'])}, {prompts}: {interval_text(row)} (margin {row['margin']:g}): {row['answer']}"


def part_lines(part):
    """What was measured of a part: sentences without a full stop."""
    lines = [comparison_text(row) for row in part["comparisons"]]
    return lines + ([part["text"]] if part["text"] else [])


def verdict_text(claim):
    """A claim's verdict: that of its parts, told apart where they differ; of what is undecided with what
    would decide it."""
    told = {}
    for part in claim["parts"]:
        told.setdefault(part["verdict"], []).append(part)
    found = []
    for verdict, parts in told.items():
        decides = most_of([part["decides"] for part in parts if part["decides"]])
        verdict += f" ({decides['text']})" if decides else ""
        if len(told) > 1:
            verdict = f"{' and '.join(part['about'] for part in parts)}: {verdict}"
        found.append(verdict)
    return "; ".join(found) or "not measured"


def stands(claim):
    """Whether a claim stands in all its parts (True), falls in one (False), or neither (None)."""
    found = [part["stands"] for part in claim["parts"]]
    if found and all(found):
        return True
    return False if False in found and True not in found and None not in found else None


def sentence(claim):
    """A claim and its verdict, a sentence."""
    return f"{claim['title']}: {verdict_text(claim)}."


def telling(part):
    """What a part's verdict rests on, in few words: its first comparison that differs, else the first that is
    undecided, else the first; of many that agree their number."""
    rows = part["comparisons"]
    if not rows:
        return f"{part['about']}: {part['text']}"
    answers = [row["answer"] for row in rows]
    if len(rows) > 2 and set(answers) == {"equivalent"}:
        return f"{part['about']}: all {len(rows)} comparisons equivalent"
    order = {"equivalent": 2, "undecided": 1}
    row = min(rows, key=lambda row: order.get(row["answer"], 0))
    return f"{part['about']}: {metric_name(row['metric'])} {interval_text(row.get('correlation', row))}"


def claims_table(claims):
    """The claims as rows of text, the head first: what each verdict rests on."""
    rows = [["Claim", "In whose words", "What it rests on", "Verdict", "Figure"]]
    for claim in claims:
        whose = f"“{claim['words']}”" if claim["words"] else "ours"
        rests_on = "; ".join(telling(part) for part in claim["parts"]) or " ".join(claim["notes"])
        figure = f"[picture]({claim['figure']})" if claim["parts"] else "–"
        rows.append([f"{claim['number']}. {claim['title']}", whose, rests_on, f"**{verdict_text(claim)}**", figure])
    return rows


def claim_section(claim):
    """All that was measured of a claim, as Markdown."""
    lines = [line for part in claim["parts"] for line in part_lines(part)]
    return "\n".join([f"## {sentence(claim)}", "", *(f"- {line}" for line in [*lines, *claim["notes"]])])


def claims_markdown(study, claims, rows):
    """claims.md."""
    parts = [
        "# An answer to every claim",
        f"{what_was_done(study)} Arms minus rank 32, paired by training seed, means with 95% intervals; how a "
        "claim is made: lib/evaluation/README.md. report.html shows it all, study.json has every figure and the "
        "files that they came from.",
        markdown_table(claims_table(claims)).replace("|--:", "|---"),
        " ".join(limits(study)),
        note_text(rows),
        *study.notes,
        *map(claim_section, claims),
    ]
    if times := time_table(study, arm_name):
        parts += ["## What the arms cost", markdown_table(times)]
    return "\n\n".join(parts) + "\n"


def equal_concept_text(equal):
    """Where two arms were compared at equal concept, and how much less one changed there: a sentence.

    `equal` is {name: interval} of what `at_equal_concept` gives.
    """
    level, less, held = (equal[key] for key in ("level", f"scale {BASELINE}", f"scale {HELD}"))
    ratios = " and ".join(
        f"{CATEGORY_NAMES[category]} {interval_text(equal[f'ratio {category}'], sign=False)} times"
        for category in ("near", "unrelated")
    )
    return (
        f"At equal concept ({interval_text(level)}, where rank 32 is drawn with {less['mean']:.2f} of the adapter and "
        f"{arm_name(HELD)} with {held['mean']:.2f}) {arm_name(HELD)} changed {ratios} as much."
    )
