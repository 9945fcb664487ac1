"""What the study leaves: report.html, claims.md, study.json and figures, all made from metrics.json files.

The study in images: one sheet a training seed, arms across, drawn from what an evaluation left.
"""

import base64
import json
from pathlib import Path

import numpy as np

from lib.evaluation.comparison import differences
from lib.evaluation.metrics.effects import effects
from lib.evaluation.metrics.table import metric_name
from lib.evaluation.prompts import first_of_each, members
from lib.evaluation.report import pages, words
from lib.evaluation.report.charts import placed
from lib.evaluation.results import image_paths, open_image
from lib.evaluation.statistics import mean_interval
from lib.evaluation.verdicts import analyse
from lib.files import write_bytes, write_json
from lib.images import strip, webp
from lib.study import words as study_words
from lib.study.claims import NOT_TESTABLE, TELLS, can_move, equal_concept, judge_claims, judged
from lib.study.figures import change_figure, forest_figure, scales_figure, trade_off_figure
from lib.study.files import read_study
from lib.study.measures import BASELINE, HELD, curves, devices_text, raw_curves, time_ratios, time_table
from lib.study.words import arm_name

QUESTIONS = {
    ("concept_similarity", "success"): "Concept gained: similarity to the training images",
    ("clip", "success"): "Match with the prompt: CLIP score",
    ("variety", "success"): "Variety over the seeds",
    ("concept_similarity", "near"): "Near prompts: moved toward the concept",
    ("change", "near"): "Near prompts: changed at all",
    ("concept_similarity", "unrelated"): "Unrelated prompts: moved toward the concept",
    ("change", "unrelated"): "Unrelated prompts: changed at all",
}
KINDS = {True: "good", False: "bad", None: "open"}


def write_study(folder, arms, scaled):
    """Judge the study in `folder` and write its page, tables and figures there; returns the claims.

    `arms` and `scaled` as for `read_study`.
    """
    folder = Path(folder)
    study = read_study(folder, arms, scaled)
    claims, rows = judge_claims(study)
    equal = equal_intervals(study)
    for claim in claims:
        if claim["number"] == 7 and equal:
            claim["notes"].insert(0, study_words.equal_concept_text(equal))
    questions, runs = forests(study, rows), run_rows(study)
    drawn = charts(study, claims, questions, runs, equal)
    for name, figure in drawn.items():
        figure.savefig(folder / name)
    record = dict(
        what=study_words.what_was_done(study),
        limits=list(study_words.limits(study)),
        notes=study.notes,
        claims=claims,
        questions=questions,
        at_equal_concept=equal,
        times=time_ratios(study),
        devices=devices_text(study),
        runs=runs,
        margins=study.margins,
        config=study.drawn_with,
        training_seeds=study.training_seeds,
        sampling_seeds=study.sampling_seeds,
        prompts=study.prompts,
        **study.provenance,
        files=[Path(path).relative_to(folder).as_posix() for path in study.files],
    )
    page = study_page(study, claims, rows, questions, drawn, strip_uri(folder, study), record)
    write_bytes(folder / "claims.md", study_words.claims_markdown(study, claims, rows).encode())
    write_bytes(folder / "report.html", page.encode())
    write_json(folder / "study.json", record)
    return claims


def forests(study, tested):
    """A forest plot a question: dicts of `metric`, `category`, `title`, `margin` and `rows`, every arm's
    difference to rank 32, sorted, with its `answer` where a claim rests on it, else None."""
    pairs = [((BASELINE, study.arms[BASELINE]), (arm, runs)) for arm, runs in study.arms.items() if arm != BASELINE]
    found = differences(pairs, QUESTIONS, study.prompts, study.base_pairs, study.margins)
    answers = {
        (row["second"], row["metric"], row["category"]): row["answer"]
        for row in tested
        if "correlation" not in row and "share" not in row
    }
    questions = []
    for (metric, category), title in QUESTIONS.items():
        rows = [
            dict(row, arm=row["second"], answer=answers.get((row["second"], metric, category)))
            for row, _ in found
            if (row["metric"], row["category"]) == (metric, category)
        ]
        if rows:
            questions.append(
                dict(
                    metric=metric,
                    category=category,
                    title=title,
                    margin=study.margins[metric],
                    rows=sorted(rows, key=lambda row: row["mean"]),
                )
            )
    return questions


def equal_intervals(study):
    """{name: interval} of two arms at equal concept, or None; names are those of `at_equal_concept` with the
    score and category joined by a blank, and "ratio near" and so on in place of the logarithms."""
    found = equal_concept(study)
    if found is None:
        return None
    named = {}
    for key, values in found.items():
        interval = mean_interval(values)
        if isinstance(key, tuple):
            key = " ".join(key)
        if key.startswith("log change "):
            interval |= {end: float(np.exp(interval[end])) for end in ("mean", "low", "high")}
            key = key.replace("log change", "ratio")
        named[key] = interval
    return named


def run_rows(study):
    """Every run's own means: dicts of arm, training seed, file, and each score and category."""
    rows = []
    for arm, runs in study.arms.items():
        found = effects(runs, study.prompts, study.base_pairs)
        for index, (seed, run) in enumerate(zip(study.training_seeds, runs, strict=True)):
            row = dict(arm=arm, seed=seed, file=f"{run.target.parent.name}/{run.target.name}/metrics.json")
            for key, values in found.items():
                for category in dict.fromkeys(category for category, _ in study.prompts):
                    chosen = members(study.prompts, category)
                    row[f"{key} {category}"] = float(values[index][chosen].mean())
            rows.append(row)
    return rows


def charts(study, claims, questions, runs, equal):
    """{file name: matplotlib figure}: those that can be drawn of what was measured."""
    found = {}
    if questions:
        found["forest.png"] = forest_figure(questions)
    if not can_move(study) or {"success", "near", "unrelated"} - {c for c, _ in study.prompts}:
        return found
    found["trade_off.png"] = trade_off_figure(runs)
    correlations = {
        row["category"]: words.interval_text(row["correlation"])
        for claim in claims
        for part in claim["parts"]
        for row in part["comparisons"]
        if "correlation" in row
    }
    found["change_and_concept.png"] = change_figure(study, correlations)
    every = np.arange(len(study.sampling_seeds))
    lines = {arm: curves(study, raw_curves(study, arm), every) for arm in (BASELINE, HELD)}
    found["trade_off_scales.png"] = scales_figure(lines, equal and equal["level"]["mean"])
    return found


def strip_uri(folder, study):
    """The sheet of images of the first training seed that has one, as a data: URI, or None."""
    for seed in study.training_seeds:
        path = folder / f"pictures_seed{seed}.webp"
        if path.is_file():
            return "data:image/webp;base64," + base64.b64encode(path.read_bytes()).decode()
    return None


def claim_bars(claim):
    """The comparisons of a claim as bars: differences in units of their margins, correlations as they are."""
    rows = []
    for part in claim["parts"]:
        for row in part["comparisons"]:
            label = f"{metric_name(row['metric'])}, {study_words.CATEGORY_NAMES[row['category']]}"
            stands = judged(part["says"], [row["answer"]])[1] if part["verdict"] != NOT_TESTABLE else None
            shared = dict(label=label, answer=row["answer"], kind=KINDS[stands])
            if "correlation" in row:
                found = row["correlation"]
                answer = study_words.comparison_text(row).rpartition(": ")[2]
                rows.append(shared | dict(found, band=(-TELLS, TELLS), text=words.interval_text(found), answer=answer))
            else:
                scaled = {key: row[key] / row["margin"] for key in ("mean", "low", "high")}
                rows.append(shared | dict(scaled, band=(-1, 1), text=words.interval_text(row)))
    return placed(rows) if rows else []


def question_bars(question):
    """A forest plot of the page: the arms' bars on one scale."""
    band = (-question["margin"], question["margin"])
    rows = [
        dict(
            label=study_words.arm_name(row["arm"]),
            answer=row["answer"] or "",
            band=band,
            text=words.interval_text(row),
            **{key: row[key] for key in ("mean", "low", "high")},
        )
        for row in question["rows"]
    ]
    return dict(title=question["title"], margin=question["margin"], rows=placed(rows))


def study_page(study, claims, rows, questions, drawn, strip, record):
    """report.html."""
    how = (study.prompts, study.base_pairs, study.margins)
    summaries = {study_words.arm_name(arm): analyse(runs, *how) for arm, runs in study.arms.items()}
    cards = [
        claim
        | dict(kind=KINDS[study_words.stands(claim)], verdict=study_words.verdict_text(claim), bars=claim_bars(claim))
        for claim in claims
    ]
    return pages.TEMPLATES.get_template("study.html").render(
        title="An answer to every claim",
        what=study_words.what_was_done(study),
        answers=[dict(kind=card["kind"], sentence=study_words.sentence(card)) for card in cards],
        cards=cards,
        limits=study_words.limits(study),
        warnings=study.notes,
        note=study_words.note_text(rows),
        strip=strip,
        questions=[question_bars(question) for question in questions],
        charts={name: pages.figure_uri(figure) for name, figure in drawn.items()},
        figures=words.comparison_table(summaries),
        times=time_table(study, study_words.arm_name),
        details=json.dumps(
            {
                key: record[key]
                for key in ("config", "margins", "prompts", "versions", "commit", "device", "devices", "files")
            },
            indent=2,
            ensure_ascii=False,
        ),
    )


SHOWN = 3  # prompts of each category
SIDE = 128  # pixels of an image


def write_strip(path, folders, prompts, sampling_seed):
    """Write the WebP `path`: the base model's images and each arm's of the first prompts of each
    category, of one sampling seed. `folders` is {arm: folder of its evaluation}.

    Returns False, and writes nothing, where some of the images are gone.
    """
    chosen = first_of_each(prompts, SHOWN)
    columns = {"base model": (next(iter(folders.values())), "base")}
    columns |= {arm_name(arm): (folder, "lora") for arm, folder in folders.items()}
    paths = {}
    for title, (folder, kind) in columns.items():
        every = image_paths(folder, prompts, [sampling_seed], [kind])
        paths[title] = [every[index] for index in chosen]
    if not all(place.is_file() for column in paths.values() for place in column):
        return False
    pictures = {title: [open_image(place) for place in found] for title, found in paths.items()}
    titles = [prompts[index][1] for index in chosen]
    write_bytes(path, webp(strip(pictures, titles, SIDE), quality=80))
    return True
