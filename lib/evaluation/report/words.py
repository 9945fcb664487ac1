"""The results in words and tables: what the console, summary.md and the pages say.

The verdicts as plain sentences: what a page opens with, for a reader who knows no score.

They are made from the verdicts and their figures, so that words and figures cannot disagree.
"""

import math
import re

from lib.evaluation.metrics.memorisation import UNTOLD
from lib.evaluation.statistics import FEWEST_RUNS

# What the categories of prompts are to a reader.
CATEGORY_TITLES = {
    "success": "What was taught",
    "near": "Close to it, but not asked for",
    "unrelated": "Nothing to do with it",
}
# What one wishes for their images.
WISHED = {"success": "should change", "near": "should stay as it was", "unrelated": "should stay as it was"}
# The questions of the verdicts in plain words.
QUESTIONS = {
    "learned": "Does it draw what was taught?",
    "neighbours kept": "Are prompts close to it left alone?",
    "contaminated": "Do unrelated prompts take it on?",
    "memorised": "Does it copy training images?",
    "collapsed": "Are its images of one prompt all alike?",
}
# How much of the concept other prompts take on: words for shares below these.
AMOUNTS = (("a little of it", 0.25), ("some of it", 0.6), ("most of it", 0.9))
# What a yes and a no say, and what cannot be told.
SENTENCES = {
    "learned": ("It learned {concept}.", "It did not learn {concept}.", "whether it learned {concept}"),
    "memorised": (
        "Some of its images are near-copies of training images.",
        "No copies of training images were found.",
        "whether it copies training images",
    ),
    "collapsed": (
        "Its images of one prompt have become too much alike.",
        "Its images stay varied.",
        "whether its images stay varied enough",
    ),
}
# Of prompts that did not ask for the concept: their category, what they are called, and the answer
# by which they are left alone.
OTHERS = {
    "neighbours kept": ("near", "prompts close to it", "yes"),
    "contaminated": ("unrelated", "unrelated prompts", "no"),
}


def concept_name(adapters):
    """“a holographic raincoat” of the adapters' captions, or "the concept" where they have no one
    caption. `adapters` are dicts as `runs.describe` gives them."""
    metadata = [adapter.get("metadata", {}) for adapter in adapters]
    captions = {known.get("caption") for known in metadata}
    caption = captions.pop() if len(captions) == 1 else None
    # run_folder.py writes “5 captions” for several.
    return f"“{caption}”" if caption and not re.fullmatch(r"\d+ captions", caption) else "the concept"


def plain_sentence(verdict, concept, summary=None):
    """A verdict as one sentence that needs no figures to be understood.

    `concept` names what was taught. With the verdict's own `summary` it is told too how much other
    prompts take on, as a share of what those gained that asked for it, and whether their images
    change at all; without it, the answer alone.
    """
    question, answer = verdict["question"], verdict["answer"]
    if question in OTHERS:
        return others_sentence(question, answer, summary)
    yes, no, untold = SENTENCES[question]
    found = {"yes": yes, "no": no, UNTOLD: f"Cannot be told: {untold}."}[answer]
    return found.format(concept=concept)


def others_sentence(question, answer, summary):
    """`plain_sentence` of the prompts that did not ask for the concept."""
    category, who, kept = OTHERS[question]
    if answer == UNTOLD:
        return f"Cannot be told: whether {who} take it on{images_clause(category, summary)}."
    who = who[0].upper() + who[1:]
    if answer == kept:
        return f"{who} do not take it on{images_clause(category, summary)}."
    totals = summary["categories"] if summary else {}
    gained = totals.get("success", {}).get("concept_similarity", dict(low=0))
    if not gained["low"] > 0:
        return f"{who} take it on."
    share = totals[category]["concept_similarity"]["mean"] / gained["mean"]
    much = next((words for words, below in AMOUNTS if share < below), "all of it")
    return f"{who} take on {much} ({share:.0%})."


def images_clause(category, summary):
    """Whether the images of a category change, in any direction, where that is certain."""
    moved = summary and summary["categories"][category].get("change")
    if not moved:
        return ""
    margin = summary["margins"]["change"]
    if moved["low"] > margin:
        return "; their images do change"
    return "; their images stay as they were" if moved["high"] < margin else ""


def difference_sentences(pairs):
    """What the comparisons of each two experiments found, counted: a sentence for each two, or one
    for all of more than three experiments."""
    found = {}
    for row in pairs:
        found.setdefault(f"{row['second']} beside {row['first']}", []).append(row["answer"])
    if len(found) > 3:
        found = {f"{len(found)} pairs of experiments": [row["answer"] for row in pairs]}
    sentences = []
    for who, answers in found.items():
        counts = ", ".join(
            f"{answer} in {answers.count(answer)}"
            for answer in ("higher", "lower", "equivalent", "undecided")
            if answer in answers
        )
        sentences.append(f"{who}: {counts} of {len(answers)} comparisons.")
    return sentences


NO_VERDICTS = "No verdicts: they need a CLIP model, the training images and several seeds."
NAMES = {
    "clip": "CLIP score",
    "concept_similarity": "concept similarity",
    "lpips": "LPIPS",
    "change": "change",
    "variety": "variety",
}


def plain_names(names):
    """{name: title}: run names as a reader is shown them, “rank 32” for lora_weights_rank_32; as they are where
    two would be called the same."""
    titles = {name: name.removeprefix("lora_weights_").replace("_", " ").strip() or name for name in names}
    return titles if len(set(titles.values())) == len(titles) else {name: name for name in names}


def interval_text(interval, sign=True):
    """“+0.012 [−0.003, +0.027]”: three decimals, more where the largest of the three would have fewer than two
    significant digits. The mean alone, with four decimals, where one value gives no interval."""
    flag = "+" if sign else ""
    values = [interval[key] for key in ("mean", "low", "high")]
    if not math.isfinite(interval["low"]):
        return f"{values[0]:{flag}.4f}".replace("-", "−")
    largest = max(map(abs, values))
    decimals = min(max(3, 1 - math.floor(math.log10(largest))), 6) if largest else 3
    mean, low, high = (f"{value:{flag}.{decimals}f}".replace("-", "−") for value in values)
    return f"{mean} [{low}, {high}]"


def number_text(value):
    """“−0.0596”: a score by itself, with a true minus sign as the intervals have."""
    return f"{value:.4f}".replace("-", "−")


def spread_text(summary):
    """What the intervals of an experiment speak of."""
    runs, seeds = len(summary["runs"]), summary["seeds"]
    over = "these prompts, drawn with other seeds"
    if runs == seeds == 1:
        return "One image a prompt and one training run: no interval can be given, and no verdict."
    if runs > 1:
        return (
            f"{runs} training runs, {seeds} sampling seeds a prompt. The 95% intervals speak of "
            f"{over} and by other training runs."
        )
    return (
        f"One training run, {seeds} sampling seeds a prompt. The 95% intervals speak of {over}; "
        "they say nothing of what another training run would give."
    )


def summary_table(summary):
    """Every prompt's and category's figures as rows of text, with intervals; the head first.

    CLIP and concept are LoRA minus base beside the base's mean; change is LPIPS over its ceiling.
    """
    one = summary["prompts"][0]
    columns = [("Prompt", lambda row: row["title"])]
    if "clip" in one:
        columns += [
            ("Base CLIP", lambda row: number_text(row["base_clip"])),
            ("LoRA CLIP", lambda row: number_text(row["lora_clip"])),
            ("CLIP difference", lambda row: interval_text(row["clip"])),
        ]
    columns += [("LPIPS", lambda row: interval_text(row["lpips"], sign=False))]
    if "change" in one:
        columns += [
            ("Change", lambda row: interval_text(row["change"], sign=False)),
            ("Variety", lambda row: interval_text(row["variety"], sign=False)),
        ]
    if "concept_similarity" in one:
        columns += [
            ("Base concept", lambda row: number_text(row["base_concept_similarity"])),
            ("Concept difference", lambda row: interval_text(row["concept_similarity"])),
        ]
    rows = []
    for name, total in summary["categories"].items():
        rows += [dict(row, title=f"{row['prompt']} ({name})") for row in summary["prompts"] if row["category"] == name]
        rows.append(dict(total, title=f"mean, {name}"))
    return [[name for name, _ in columns]] + [[cell(row) for _, cell in columns] for row in rows]


def study_table(summary):
    """Success and unrelated prompts in the published study's own columns, or None without a CLIP score."""
    rows = [row for row in summary["prompts"] if row["category"] != "near"]
    if not rows or "clip" not in rows[0]:
        return None
    return [["Prompt", "Base CLIP", "LoRA CLIP", "LPIPS"]] + [
        [
            f"{row['prompt']} ({row['category']})",
            f"{row['base_clip']:.4f}",
            f"{row['lora_clip']:.4f}",
            f"{row['lpips']['mean']:.4f}",
        ]
        for row in rows
    ]


def kernel_table(summary):
    """Kernel distances to the training images as rows of text, or None where they are missing."""
    found = {k: t["kernel_distance"] for k, t in summary["categories"].items() if "kernel_distance" in t}
    if not found:
        return None
    head = ["Kernel distance to the training images", "base", "LoRA", "difference"]
    return [head] + [
        [f"{name} prompts", f"{d['base']:.3f}", f"{d['lora']:.3f}", interval_text(d["difference"])]
        for name, d in found.items()
    ]


def markdown_table(rows):
    """Rows of text as a Markdown table, the first row its head."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|--:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def verdict_text(summary):
    """The verdicts of one run or experiment as a Markdown list."""
    lines = [f"- **{v['question']}: {v['answer']}.** {v['text']}" for v in summary["verdicts"]]
    return "\n".join(lines or [NO_VERDICTS])


def summary_text(summary):
    """Verdicts and tables of one run or experiment, as Markdown."""
    parts = [verdict_text(summary), spread_text(summary), markdown_table(summary_table(summary))]
    for table in (kernel_table(summary), study_table(summary)):
        if table:
            parts.append(markdown_table(table))
    if "sweep" in summary:
        parts += [summary["sweep"]["advice"], markdown_table(sweep_table(summary["sweep"]["rows"]))]
    return "\n\n".join(parts)


SWEEP_COLUMNS = {
    "concept_similarity success": "Concept gained",
    "clip success": "Match (CLIP)",
    "concept_similarity near": "Near prompts toward the training images",
    "concept_similarity unrelated": "Unrelated ones",
    "change near": "Change, near",
    "change unrelated": "Change, unrelated",
    "variety success": "Variety",
    "nearest_similarity success": "Nearest copy",
    "held_out": "Held-out loss",
}


SWEEP_EXPLAINED = (
    "Concept gained and near and unrelated prompts: mean cosine to the training images, LoRA minus base. Change: "
    "LPIPS to the base image as a share of its ceiling. Variety: LPIPS between images at different seeds over "
    "the same ceiling. Nearest copy: the highest cosine to an image trained on, LoRA minus base. Held-out loss: of "
    "images not trained on, less what it was before training; its interval is over these few images."
)


def sweep_table(rows):
    """Every point's figures with intervals as rows of text; the head first."""
    keys = [key for key in SWEEP_COLUMNS if any(key in row for row in rows)]
    places = [key for key in ("step", "scale") if len({row[key] for row in rows}) > 1] or ["scale"]
    table = [[*(place.capitalize() for place in places), *(SWEEP_COLUMNS[key] for key in keys)]]
    for row in rows:
        shares = ("change", "variety")
        cells = [interval_text(row[k], not k.startswith(shares)) if k in row else "–" for k in keys]
        table.append([*(f"{row[place]:,g}" for place in places), *cells])
    return table


def comparison_table(summaries):
    """Experiments side by side as rows of text: their means by category with intervals, then the
    answers. The head comes first."""
    first = next(iter(summaries.values()))
    rows = []
    for category in first["categories"]:
        for key, sign in (("concept_similarity", True), ("clip", True), ("change", False), ("variety", False)):
            if all(key in s["categories"].get(category, {}) for s in summaries.values()) and (
                key != "variety" or category == "success"
            ):
                cells = [interval_text(s["categories"][category][key], sign) for s in summaries.values()]
                rows.append([f"{NAMES[key]}, {category} prompts", *cells])
    answers = [{v["question"]: v["answer"] for v in s["verdicts"]} for s in summaries.values()]
    for question in dict.fromkeys(question for found in answers for question in found):
        rows.append([f"{question}?", *(found.get(question, "–") for found in answers)])
    return [["", *summaries], *rows]


def pair_sentence(row):
    """What one comparison of two experiments found, and where nothing did, what would decide it."""
    found = {
        "equivalent": f"equivalent within {row['margin']:g}",
        "undecided": f"undecided. {row.get('decides', '')}",
    }.get(row["answer"], f"{row['second']} is {row['answer']}")
    return (
        f"{NAMES[row['metric']]} on {row['category']} prompts, {row['second']} minus {row['first']}: "
        f"{interval_text(row)}: {found}"
    )


def comparison_text(summaries, pairs):
    """The comparison page's content as Markdown."""
    parts = [markdown_table(comparison_table(summaries))]
    for name, summary in summaries.items():
        parts.append(f"## {name}\n\n{verdict_text(summary)}\n\n{spread_text(summary)}")
    if pairs:
        lines = "\n".join(f"- {pair_sentence(row)}" for row in pairs)
        parts.append(f"## Differences\n\n{lines}\n\n{pair_note(pairs)}")
    return "\n\n".join(parts)


def pair_note(pairs):
    """How the differences were tested."""
    note = (
        f"95% intervals. Higher or lower: the interval leaves out 0; equivalent: the 90% interval lies "
        f"within the margin (two one-sided tests); both after Holm's correction over these {len(pairs)} "
        "comparisons. "
    )
    counts = sorted({row["runs"] for row in pairs})
    note += f"{'/'.join(map(str, counts))} training run{'s' if counts[-1] > 1 else ''} each, "
    if all(row["paired_by_training_seed"] for row in pairs):
        note += "paired by their training seed."
    else:
        note += "paired in their order where they share no training seed."
    if counts[0] < FEWEST_RUNS:
        note += (
            " With fewer than three training runs nothing is claimed: they do not show how much training runs differ."
        )
    left_out = sorted({name for row in pairs for name in row["left_out"]})
    if left_out:
        note += f" Not compared, without a partner of their training seed: {', '.join(left_out)}."
    return note
