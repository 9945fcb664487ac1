"""Writes what the study leaves: report.html, claims.md, study.json, charts and the sheet of images."""

import base64
import json
from pathlib import Path

import jinja2

from lib.evaluation.comparison import differences
from lib.evaluation.image_files import image_names, open_image
from lib.evaluation.metrics.effects import effects
from lib.evaluation.prompts import first_of_each, members
from lib.evaluation.report import pages
from lib.evaluation.report.charts import difference_bar, placed
from lib.evaluation.report.words import comparison_table, interval_text
from lib.evaluation.verdicts import analyse
from lib.files import write_bytes, write_json
from lib.images import strip, webp
from lib.study import words
from lib.study.claims import CLAIMS, INFORMATIVE, NOT_TESTABLE, judge_claims, judged
from lib.study.figures import change_figure, forest_figure, scales_figure, trade_off_figure
from lib.study.files import read_study
from lib.study.measures import (
    BASELINE,
    PROTECTED,
    concept_shares,
    curves,
    equal_concept_intervals,
    has_every_category,
    has_movement,
    scale_points,
)

TEMPLATES = pages.TEMPLATES.overlay(
    loader=jinja2.FileSystemLoader([Path(__file__).parent / "templates", *pages.TEMPLATES.loader.searchpath])
)
QUESTIONS = {
    ("concept_similarity", "success"): "Concept gained: similarity to the training images",
    ("clip", "success"): "Match with the prompt: CLIP score",
    ("variety", "success"): "Variety over the sampling seeds",
    ("concept_similarity", "near"): "Near prompts: moved toward the concept",
    ("change", "near"): "Near prompts: changed at all",
    ("concept_similarity", "unrelated"): "Unrelated prompts: moved toward the concept",
    ("change", "unrelated"): "Unrelated prompts: changed at all",
}
SAVED = ("forest.png", "change_and_concept.png")
KINDS = {True: "good", False: "bad", None: "open"}
DETAILS = ("config", "margins", "concept_scale", "prompts", "versions", "commit", "device", "files")


def write_study(folder, arms, scaled):
    """Judge the study in `folder` and write its page, tables and charts there. Returns the claims.

    `arms` and `scaled` as for `read_study`.
    """
    folder = Path(folder)
    study = read_study(folder, arms, scaled)
    claims, rows = judge_claims(study)
    equal = equal_concept_intervals(study)
    for claim, judgement in zip(CLAIMS, claims, strict=True):
        if claim.at_equal_concept and equal:
            judgement["notes"].insert(0, words.equal_concept_text(equal))
    questions, runs = forests(study, rows), run_rows(study)
    figures = charts(study, rows, questions, runs, equal)
    for name in SAVED:
        if name in figures:
            figures[name].savefig(folder / name)
    record = dict(
        what=words.study_size(study),
        limits=list(words.limits(study)),
        notes=study.notes,
        claims=claims,
        questions=questions,
        at_equal_concept=equal,
        shares={arm: concept_shares(study, of_arm) for arm, of_arm in study.arms.items()},
        runs=runs,
        margins=study.margins,
        concept_scale=study.scale,
        config=study.drawn_with,
        training_seeds=study.training_seeds,
        sampling_seeds=study.sampling_seeds,
        prompts=study.prompts,
        **study.provenance,
        files=[Path(path).relative_to(folder).as_posix() for path in study.files],
    )
    page = study_page(study, claims, rows, questions, figures, strip_uri(folder, study), record)
    write_bytes(folder / "claims.md", words.claims_markdown(study, claims, rows).encode())
    write_bytes(folder / "report.html", page.encode())
    write_json(folder / "study.json", record)
    return claims


def forests(study, tested):
    """A forest plot per question: dicts of `metric`, `category`, `title`, `margin` and `rows`, every arm minus rank 32,
    sorted. `answer` is None where no claim rests on a row; `tested` are the comparisons of the claims."""
    pairs = [((BASELINE, study.arms[BASELINE]), (arm, runs)) for arm, runs in study.arms.items() if arm != BASELINE]
    compared = differences(pairs, QUESTIONS, study.prompts, study.base_pairs, study.margins)
    answers = {
        (row["second"], row["metric"], row["category"]): row["answer"]
        for row in tested
        if "correlation" not in row and "share" not in row
    }
    questions = []
    for (metric, category), title in QUESTIONS.items():
        rows = [
            dict(row, arm=row["second"], answer=answers.get((row["second"], metric, category)))
            for row, _ in compared
            if (row["metric"], row["category"]) == (metric, category)
        ]
        if rows:
            rows.sort(key=lambda row: row["mean"])
            margin = study.margins[metric]
            questions.append(dict(metric=metric, category=category, title=title, margin=margin, rows=rows))
    return questions


def run_rows(study):
    """The means of every run: dicts of arm, training seed, file, and each metric and category."""
    rows = []
    for arm, runs in study.arms.items():
        scores = effects(runs, study.prompts, study.base_pairs)
        for index, (seed, run) in enumerate(zip(study.training_seeds, runs, strict=True)):
            row = dict(arm=arm, seed=seed, file=f"{run.target.parent.name}/{run.target.name}/metrics.json")
            for metric, values in scores.items():
                for category in dict.fromkeys(category for category, _ in study.prompts):
                    chosen = members(study.prompts, category)
                    row[f"{metric} {category}"] = float(values[index][chosen].mean())
            rows.append(row)
    return rows


def charts(study, tested, questions, runs, equal):
    """{file name: matplotlib figure}, without those whose scores are missing."""
    figures = {"forest.png": forest_figure(questions)} if questions else {}
    if not (has_movement(study) and has_every_category(study)):
        return figures
    correlations = {row["category"]: interval_text(row["correlation"]) for row in tested if "correlation" in row}
    lines = {arm: curves(study, scale_points(study, arm)) for arm in (BASELINE, PROTECTED)}
    return figures | {
        "trade_off.png": trade_off_figure(runs),
        "trade_off_scales.png": scales_figure(lines, equal and equal["level"]["mean"]),
        "change_and_concept.png": change_figure(study, correlations),
    }


def claim_bars(claim):
    """The comparisons of a claim as bars: differences in units of their margins, correlations as they are."""
    bars = []
    for part in claim["parts"]:
        for row in part["comparisons"]:
            stands = judged(part["says"], [row["answer"]])[1] if part["verdict"] != NOT_TESTABLE else None
            label = words.comparison_label(row)
            if "correlation" in row:
                text = interval_text(row["correlation"])
                bar = row["correlation"] | dict(label=label, text=text, threshold=INFORMATIVE)
            else:
                bar = difference_bar(row, label)
            bars.append(bar | dict(answer=words.answer_text(row), kind=KINDS[stands]))
    return placed(bars) if bars else []


def study_page(study, claims, rows, questions, figures, sheet, record):
    """report.html."""
    summaries = {
        words.arm_name(arm): analyse(runs, study.prompts, study.base_pairs, study.margins)
        for arm, runs in study.arms.items()
    }
    for summary, shares in zip(summaries.values(), record["shares"].values(), strict=True):
        for category, share in shares.items():
            summary["categories"][category]["concept_share"] = share
    cards = [
        claim | dict(kind=KINDS[words.stands(claim)], verdict=words.verdict_text(claim), bars=claim_bars(claim))
        for claim in claims
    ]
    forest_bars = [
        question | dict(bars=placed([difference_bar(r, words.arm_name(r["arm"]), False) for r in question["rows"]]))
        for question in questions
    ]
    return TEMPLATES.get_template("study.html").render(
        title="An answer to every claim",
        introduction=words.introduction(study),
        answers=[dict(kind=card["kind"], sentence=words.sentence(card)) for card in cards],
        cards=cards,
        limits=words.limits(study),
        warnings=study.notes,
        note=words.note_text(study, rows),
        strip=sheet,
        questions=forest_bars,
        charts={name: pages.figure_uri(figure) for name, figure in figures.items() if name != "forest.png"},
        figures=comparison_table(summaries),
        shares=any(record["shares"].values()),
        details=json.dumps({key: record[key] for key in DETAILS}, indent=2, ensure_ascii=False),
    )


SHOWN = 3  # prompts of each category on the sheet
SIDE = 128  # pixels of an image


def write_strip(path, folders, prompts, sampling_seed):
    """Write the WebP sheet `path`: a row per prompt, the base model and every arm as columns, one sampling seed.

    `folders` is {arm: folder of its evaluation}. Returns False, and writes nothing, if images are missing.
    """
    chosen = first_of_each(prompts, SHOWN)
    columns = {"base model": (next(iter(folders.values())), "base")}
    columns |= {words.arm_name(arm): (folder, "lora") for arm, folder in folders.items()}
    paths = {}
    for title, (folder, model) in columns.items():
        names = image_names(prompts, [sampling_seed], model)
        paths[title] = [folder / names[index] for index in chosen]
    if not all(place.is_file() for column in paths.values() for place in column):
        return False
    images = {title: [open_image(place) for place in column] for title, column in paths.items()}
    titles = [prompts[index][1] for index in chosen]
    write_bytes(path, webp(strip(images, titles, SIDE), quality=80))
    return True


def write_strips(folder, seeds, arms, prompts, sampling_seed):
    """Write the sheet pictures_seed42.webp and so on into `folder`, where missing."""
    for seed in seeds:
        path, results = Path(folder) / f"pictures_seed{seed}.webp", Path(folder) / f"seed{seed}"
        folders = {arm: results / f"{arm}_seed{seed}" for arm in arms}
        if not (path.is_file() or write_strip(path, folders, prompts, sampling_seed)):
            print(f"note: {path.name} was not written: {results} has no images")


def strip_uri(folder, study):
    """The sheet of images of the first training seed that has one, as a data: URI, or None."""
    for seed in study.training_seeds:
        path = folder / f"pictures_seed{seed}.webp"
        if path.is_file():
            return "data:image/webp;base64," + base64.b64encode(path.read_bytes()).decode()
    return None
