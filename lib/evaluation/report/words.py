"""The results in words and tables, made from the summaries so that words and figures cannot disagree.

First numbers and names, then the plain sentences that a page opens with, then tables, then whole Markdown reports.
"""

import math
import re

from lib.evaluation.metrics.table import DIFFERENCE, METRICS, measures, metric_name, questions
from lib.evaluation.statistics import FEWEST_RUNS

NO_VERDICTS = "No verdicts: they need a CLIP model, the training images and several seeds."
AS_THEY_ARE, MAY_DIFFER = "these adapters as they are", "another training run may differ"
# How much of the concept other prompts pick up: words for shares below these.
AMOUNTS = (("a little of it", 0.25), ("some of it", 0.6), ("most of it", 0.9))


# ---- numbers and names ---------------------------------------------------------------------


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


def share_text(interval):
    """“71% [60%, 82%]”."""
    # + 0.0, as the rounded value may be a negative zero
    mean, low, high = (f"{round(interval[key], 2) + 0.0:.0%}".replace("-", "−") for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def way_text(total):
    """How far a category's images went to the training images, behind their gain in similarity: “, 71% [60%, 82%] of
    the way to them”; empty where it is unknown."""
    return f", {share_text(total['concept_share'])} of the way to them" if "concept_share" in total else ""


def number_text(value):
    """“−0.0596”: a score by itself, with a true minus sign as the intervals have."""
    return f"{value:.4f}".replace("-", "−")


def plain_names(names):
    """{run name: title}, “rank 32” for lora_weights_rank_32; the names themselves if two titles would agree."""
    titles = {name: name.removeprefix("lora_weights_").replace("_", " ").strip() or name for name in names}
    return titles if len(set(titles.values())) == len(titles) else {name: name for name in names}


def concept_name(adapters):
    """“a holographic raincoat”: the adapters' caption, or "the concept" if they have several.

    `adapters` are dicts as `runs.describe` returns them.
    """
    metadata = [adapter.get("metadata", {}) for adapter in adapters]
    captions = {known.get("caption") for known in metadata}
    caption = captions.pop() if len(captions) == 1 else None
    # run_folder.py writes “5 captions” for several.
    return f"“{caption}”" if caption and not re.fullmatch(r"\d+ captions", caption) else "the concept"


# ---- sentences without figures -------------------------------------------------------------


def plain_sentence(verdict, concept, summary=None):
    """A verdict as one sentence that needs no figures to be understood.

    `concept` names the concept. With the verdict's `summary` the sentence also says how far success prompts went to the
    training images, how much of the concept other prompts pick up, as a share of the gain of success prompts with its
    interval, whether their images change at all, and which share of images too near to training images cannot be ruled out.
    """
    question, others = questions()[verdict["question"]], (summary or {}).get("similarity")
    says = question.of_others[1] if others and question.of_others[1] else question.says
    share = summary["categories"].get(question.category, {}).get("concept_share") if summary else None
    goal = "them" if others else "the training images"
    way = f": its images went {share_text(share)} of the way to {goal}" if share else ""
    return says[verdict["answer"]].format(
        concept=concept,
        data_dir=others and others["data_dir"],
        way=way,
        pick_up=pick_up_text(question.category, summary),
        images=images_text(question.category, summary, verdict["answer"] == question.wanted),
        bound=bound_text(summary, verdict["answer"] == question.wanted),
    )


def training_name(summary):
    """“the training images”, or what they are called where those of the adapter are unknown."""
    return f"the images in {summary['similarity']['data_dir']}" if "similarity" in summary else "the training images"


def question_label(name, summary):
    """What a question is called in a report on one experiment: its name, unless the training images are unknown."""
    others = summary.get("similarity")
    return (others and questions()[name].of_others[0].format(**others)) or name


def pick_up_text(category, summary):
    """How much of the concept the prompts of a category pick up: “pick up most of it (80% [77%, 84%])”. No word for
    the amount where the ends of the interval have two, no figures where success prompts did not gain for certain."""
    totals = summary["categories"] if summary else {}
    share = totals.get(category, {}).get("picked_up")
    if not share or not totals["success"]["concept_similarity"]["low"] > 0:
        return "pick it up"
    low, high = (next((text for text, below in AMOUNTS if share[end] < below), "all of it") for end in ("low", "high"))
    figures = f"({share['mean']:.0%} [{share['low']:.0%}, {share['high']:.0%}])".replace("-", "−")
    return f"pick up {low} {figures}" if low == high else f"pick it up {figures}"


def bound_text(summary, within):
    """Which share of images as near to a training image as these are to one another cannot be ruled out: the end
    `within` a sentence, or a sentence of its own."""
    high = ((summary or {}).get("memorised") or {}).get("high")
    if high is None:
        return ""
    text = f"up to {high:.0%} of its images may be as near to one as these are to one another"
    return f"; {text}" if within else f" {text.capitalize()}."


def similarity_title(similarity):
    """What stands in place of a verdict on copies where the training images are not known."""
    return f"Similarity to the images in {similarity['data_dir']}"


def images_text(category, summary, within):
    """Whether the images of a category change in any direction, if that is certain: the end `within` a sentence, or
    a sentence of its own."""
    moved = summary and summary["categories"].get(category, {}).get("change")
    margin = summary and summary["margins"].get("change")
    if not moved or not margin or moved["low"] <= margin <= moved["high"]:
        return ""
    text = "their images do change" if moved["low"] > margin else "their images stay as they were"
    return f"; {text}" if within else f" {text.capitalize()}."


def difference_sentences(pairs):
    """What the comparisons of each two experiments found, counted; one sentence for all if there are more than three
    pairs of experiments."""
    by_pair = {}
    for row in pairs:
        by_pair.setdefault(f"{row['second']} against {row['first']}", []).append(row)
    if len(by_pair) > 3:
        return [f"{len(by_pair)} pairs of experiments: {pair_counts(pairs, 'comparisons')}."]
    return [f"{who}: {pair_counts(rows)}." for who, rows in by_pair.items()]


def pair_counts(rows, noun="measures"):
    """The answers of comparisons, counted: of experiments, of adapters as they are, or of both."""
    text = answer_counts([row["answer"] for row in rows], noun)
    if all("level" in row for row in rows):
        return f"{text}, for {AS_THEY_ARE}; {MAY_DIFFER}"
    if files_rows := sum("level" in row for row in rows):
        text += f", {files_rows} of them for {AS_THEY_ARE}"
    if files := [row["files"]["answer"] for row in rows if "files" in row]:
        text = text.replace("no difference could", "no difference between the experiments could")
        text += f"; {AS_THEY_ARE}: {answer_counts(files, noun)} ({MAY_DIFFER})"
    return text


def answer_counts(answers, noun="measures"):
    """“higher in 2, undecided in 5 of 7 measures”."""
    if set(answers) == {"undecided"}:
        return f"no difference could be shown in any of {len(answers)} {noun}"
    order = ("higher", "lower", "equivalent", "undecided")
    counts = [f"{answer} in {answers.count(answer)}" for answer in order if answer in answers]
    return f"{', '.join(counts)} of {len(answers)} {noun}"


def spread_text(summary):
    """What the intervals of an experiment cover."""
    runs, seeds = len(summary["runs"]), summary["seeds"]
    if runs == seeds == 1:
        return "One image a prompt and one training run: no intervals, no verdicts."
    if runs > 1:
        return (
            f"{runs} training runs, {seeds} sampling seeds a prompt. The 95% intervals cover other sampling seeds of "
            "these prompts and other training runs."
        )
    return (
        f"One training run, {seeds} sampling seeds a prompt. The 95% intervals cover other sampling seeds of these "
        "prompts; they say nothing of what another training run would give."
    )


def pair_sentence(row):
    """What one comparison of two experiments found; if nothing, what would decide it."""
    text = (
        f"{metric_name(row['metric'])} on {row['category']} prompts, {row['second']} minus {row['first']}: "
        f"{interval_text(row)}: {pair_answer(row, row)}"
    )
    if "level" in row:
        return f"{text} (for {AS_THEY_ARE}; {MAY_DIFFER})"
    if "files" in row:
        files = row["files"]
        interval = f", {interval_text(files)}" if row["runs"] > 1 else ""  # otherwise that of the row
        text += f" {AS_THEY_ARE.capitalize()}: {pair_answer(row, files)}{interval}; {MAY_DIFFER}."
    return text


def pair_answer(row, found):
    """The answer of a comparison in words; `found` is the row or its `files`."""
    return {
        "equivalent": f"equivalent within {row['margin']:g}",
        "undecided": f"undecided. {row.get('decides', '')}" if found is row else "undecided",
    }.get(found["answer"], f"{row['second']} is {found['answer']}")


def pair_note(pairs):
    """How the differences were tested."""
    note = (
        f"95% intervals. Higher or lower: the interval excludes 0; equivalent: the 90% interval lies within the margin "
        f"(two one-sided tests); both after Holm's correction over these {len(pairs)} comparisons. "
    )
    experiments = [row for row in pairs if "level" not in row]
    if counts := sorted({row["runs"] for row in experiments}):
        note += f"{'/'.join(map(str, counts))} training run{'s' if counts[-1] > 1 else ''} each, "
        if all(row["paired_by_training_seed"] for row in experiments):
            note += "paired by training seed."
        else:
            note += "paired in their order if they share no training seed."
        if counts[0] < FEWEST_RUNS:
            note += (
                " With fewer than three training runs nothing is claimed of the experiments: they do not show how much "
                "training runs differ."
            )
    if len(experiments) < len(pairs) or any("files" in row for row in pairs):
        note = f"{note.rstrip()} What is said of {AS_THEY_ARE} holds over other sampling seeds; {MAY_DIFFER}."
    left_out = sorted({name for row in pairs for name in row["left_out"]})
    if left_out:
        note += f" Not compared, because no run shares their training seed: {', '.join(left_out)}."
    return note


# ---- tables: rows of text, the head first --------------------------------------------------


def summary_table(summary):
    """Every prompt's and category's figures with intervals."""
    columns = [("Prompt", lambda row: row["title"])]
    for key, metric in METRICS.items():
        if key not in summary["prompts"][0]:
            continue
        head = metric.short
        if metric.kind == DIFFERENCE:
            head = f"{metric.short} difference"
            columns.append((f"{metric.short}, base → LoRA", lambda row, key=key: before_after(row, key)))
        columns.append((head, lambda row, key=key, sign=metric.signed: interval_text(row[key], sign)))
    rows = []
    for name, total in summary["categories"].items():
        rows += [dict(row, title=f"{row['prompt']} ({name})") for row in summary["prompts"] if row["category"] == name]
        rows.append(dict(total, title=f"mean, {name}"))
    return [[name for name, _ in columns]] + [[cell(row) for _, cell in columns] for row in rows]


def before_after(row, key):
    """“0.3012 → 0.3636”: a metric's mean before and after."""
    return " → ".join(number_text(row[f"{model}_{key}"]) for model in ("base", "lora"))


def explained(keys):
    """What metrics mean: sentences."""
    differences = [METRICS[key].short for key in keys if METRICS[key].kind == DIFFERENCE]
    text = " ".join(METRICS[key].explained for key in keys)
    return f"{text} {', '.join(differences)}: differences are LoRA minus base." if differences else text


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
    """Kernel distances to the training images, or None without them."""
    distances = {k: t["kernel_distance"] for k, t in summary["categories"].items() if "kernel_distance" in t}
    if not distances:
        return None
    head = ["Kernel distance to the training images", "base", "LoRA", "difference"]
    return [head] + [
        [f"{name} prompts", f"{d['base']:.3f}", f"{d['lora']:.3f}", interval_text(d["difference"])]
        for name, d in distances.items()
    ]


def copies_table(summary):
    """Similarities to the nearest training image: generated images beside the control, or None without them."""
    if similarity := summary.get("similarity"):
        groups, level = dict(drawn="success images", images="these images, to another one"), None
        title, measured = similarity_title(similarity), similarity
    elif measured := summary.get("memorised"):
        groups, level = dict(drawn="success images", held_out="held-out images (control)"), measured["level"]
        groups["trained_on"] = "training images, to another one"
        title = "Similarity to the nearest training image"
    else:
        return None
    head = [title, "images", "median"]
    head += [] if level is None else [f"above {level:.3f}: as near as training images to one another"]
    rows = []
    for key, name in groups.items():
        group = measured[key]
        median = "–" if group["median"] is None else f"{group['median']:.3f}"
        rows.append([name, str(group["pictures"]), median, *([] if level is None else [str(group["above"])])])
    return [head, *rows]


def scale_table(summary):
    """How far each category's images went from the base model's to the training images, or None where it is unknown."""
    shares = {name: t["concept_share"] for name, t in summary["categories"].items() if "concept_share" in t}
    if not shares:
        return None
    rows = [["Concept similarity", "base", "LoRA", "training images", "of the way to them"]]
    for name, share in shares.items():
        total = summary["categories"][name]
        ends = total["base_concept_similarity"], total["lora_concept_similarity"], share["level"]
        rows.append([f"{name} prompts", *(f"{value:.3f}".replace("-", "−") for value in ends), share_text(share)])
    return rows


def scale_text(scale):
    """What the scale of the concept and its margin are: sentences, or why there is none. `scale` is from
    concept_scale.py; empty for None."""
    if scale is None:
        return ""
    if scale["reason"]:
        return f"No verdict rests on concept similarity: {scale['reason']}.{subjects_text(scale)}"
    text = f"Training images have a mean similarity of {scale['level']:.3f} to one another"
    if scale["held_out"] is not None:
        text += f", held-out images one of {scale['held_out']:.3f} to them"
    return (
        f"{text}. The base model's images of {scale['category']} prompts have {scale['base']:.3f}. The margin of concept "
        f"similarity, {scale['margin']:g}, is {100 * scale['share']:.3g}% of the way from these to the training images."
        f"{subjects_text(scale)}"
    )


def subjects_text(scale):
    """How similar training images are to the subjects alone of the others: a sentence after a blank; empty where no
    masks are known."""
    subjects = scale.get("subjects")
    if not subjects:
        return ""
    text = f" Training images have a subject similarity of {subjects['level']:.3f} to one another"
    if subjects["held_out"] is not None:
        text += f", held-out images one of {subjects['held_out']:.3f} to them"
    return f"{text} ({subjects['images']} have a mask)."


def sweep_table(rows):
    """Every point's figures with intervals."""
    heads = {
        f"{key} {category}": (f"{METRICS[key].short}, {category}", METRICS[key].signed)
        for key, category in measures("swept")
    }
    heads["held_out"] = "Held-out loss", True
    heads = {key: head for key, head in heads.items() if any(key in row for row in rows)}
    places = [key for key in ("step", "scale") if len({row[key] for row in rows}) > 1] or ["scale"]
    table = [[*(place.capitalize() for place in places), *(head for head, _ in heads.values())]]
    for row in rows:
        cells = [interval_text(row[key], sign) if key in row else "–" for key, (_, sign) in heads.items()]
        table.append([*(f"{row[place]:,g}" for place in places), *cells])
    return table


def sweep_explained():
    """What the columns of `sweep_table` mean."""
    keys = [key for key, metric in METRICS.items() if metric.swept]
    return (
        f"{explained(keys)} Held-out loss: of images not trained on, minus its value before training; its interval is "
        "over these few images."
    )


def comparison_table(summaries):
    """Experiments side by side: their means by category with intervals, then the answers."""
    rows = []
    for category in next(iter(summaries.values()))["categories"]:
        totals = [summary["categories"].get(category, {}) for summary in summaries.values()]
        for key, metric in METRICS.items():
            if metric.margin and category in metric.shown and all(key in total for total in totals):
                cells = [interval_text(total[key], metric.signed) for total in totals]
                rows.append([f"{metric.name}, {category} prompts", *cells])
            if key == "concept_similarity" and all("concept_share" in total for total in totals):
                cells = [share_text(total["concept_share"]) for total in totals]
                rows.append([f"way to the training images, {category} prompts", *cells])
    answers = [{v["question"]: v["answer"] for v in s["verdicts"]} for s in summaries.values()]
    for question in dict.fromkeys(question for found in answers for question in found):
        rows.append([f"{question}?", *(found.get(question, "–") for found in answers)])
    return [["", *summaries], *rows]


# ---- Markdown ------------------------------------------------------------------------------


def markdown_table(rows):
    """Rows of text as a Markdown table, the first row its head."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|--:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def verdict_text(summary):
    """The verdicts of one run or experiment as a Markdown list."""
    lines = [
        f"- **{question_label(v['question'], summary)}: {v['answer']}.** {v['text']}" for v in summary["verdicts"]
    ] or [NO_VERDICTS]
    if similarity := summary.get("similarity"):
        lines += [""] * (lines == [NO_VERDICTS]) + [f"- **{similarity_title(similarity)}.** {similarity['text']}"]
    return "\n".join(lines)


def summary_text(summary):
    """Verdicts and tables of one run or experiment."""
    parts = [verdict_text(summary), spread_text(summary), scale_text(summary.get("concept_scale"))]
    parts = [part for part in parts if part] + [markdown_table(summary_table(summary))]
    for table in (scale_table(summary), kernel_table(summary), study_table(summary)):
        if table:
            parts.append(markdown_table(table))
    if "sweep" in summary:
        parts += [summary["sweep"]["advice"], markdown_table(sweep_table(summary["sweep"]["rows"]))]
    return "\n\n".join(parts)


def comparison_text(summaries, pairs):
    """The comparison page's content."""
    parts = [markdown_table(comparison_table(summaries))]
    if scale := scale_text(next(iter(summaries.values())).get("concept_scale")):
        parts.append(scale)
    for name, summary in summaries.items():
        parts.append(f"## {name}\n\n{verdict_text(summary)}\n\n{spread_text(summary)}")
    if pairs:
        lines = "\n".join(f"- {pair_sentence(row)}" for row in pairs)
        parts.append(f"## Differences\n\n{lines}\n\n{pair_note(pairs)}")
    return "\n\n".join(parts)
