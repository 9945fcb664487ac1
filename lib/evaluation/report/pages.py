"""The HTML pages of an evaluation, each one file that opens offline, rendered from templates/.

`run_page`: what one adapter learned and what it spoiled. `comparison_page`: several experiments side by side.
`choose_page`: which snapshot or scale of an adapter to take.
"""

import base64
import io
import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import jinja2
from PIL import Image

from lib.cache import prefetch
from lib.evaluation.choosing import chosen_point, grid_table
from lib.evaluation.metrics.table import DIFFERENCE, METRICS, questions
from lib.evaluation.prompts import CATEGORIES, first_of_each, slugs
from lib.evaluation.report import words
from lib.evaluation.report.charts import (
    all_curves,
    curve_figure,
    distribution_figure,
    forest_bars,
    seeds_shown,
    verdict_bars,
)
from lib.images import webp

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,  # prompts and names are anybody's text
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


EMBEDDED = 240  # images within a page; further ones are linked, so that a page of a thousand prompts still opens


def sources(images, links, side=512):
    """The sources of <img> elements: data: URIs of the first EMBEDDED images, relative links to the files of the rest.
    No more `images` are taken from the iterator, and few are in memory at once."""
    few = itertools.islice(images, EMBEDDED)
    # In threads: encoding takes most of a page's time.
    embedded = list(prefetch(lambda image: image_uri(image, side), few, min(16, 4 + (os.cpu_count() or 1))))
    return embedded + [quote(link) for link in links[EMBEDDED:]]


def image_uri(image, side=512):
    """A PIL image, no larger than `side` pixels, as a data: URI (WebP)."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return "data:image/webp;base64," + base64.b64encode(webp(image, quality=88)).decode()


def figure_uri(figure):
    """A matplotlib figure as a data: URI (PNG)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def kind(question, answer):
    """good, bad, or open if it is unclear: how a page marks an answer."""
    if answer not in ("yes", "no"):
        return "open"
    return "good" if answer == questions()[question].wanted else "bad"


def judged(summaries, concept):
    """[(question, each experiment's verdict)], for a page extended by the experiment's `name`, `label`, `kind`, `sentence`
    and `bar` (its interval, or None); `summaries` is {experiment: summary}."""
    bars = verdict_bars(summaries)
    by_question = {}
    for name, summary in summaries.items():
        for v in summary["verdicts"]:
            more = dict(
                name=name,
                label=words.question_label(v["question"], summary),
                kind=kind(v["question"], v["answer"]),
                bar=bars.get(v["question"], {}).get(name),
                sentence=words.plain_sentence(v, concept, summary),
            )
            by_question.setdefault(v["question"], []).append(v | more)
    return list(by_question.items())


def similarity_of(summary):
    """A summary's `similarity`, with its title, or None."""
    similarity = summary.get("similarity")
    return similarity and similarity | dict(title=words.similarity_title(similarity))


def by_category(rows):
    """[(title, category, rows)] of rows with a `category`: success prompts first, unrelated ones last."""
    groups = [
        (category.title, name, [row for row in rows if row["category"] == name])
        for name, category in CATEGORIES.items()
    ]
    return [group for group in groups if group[2]]


def details_text(shown, adapters):
    """Configuration, hashes and versions as JSON."""
    record = dict(config=shown["config"], **shown["provenance"], adapters=adapters)
    return json.dumps(record, indent=2, ensure_ascii=False)


def score_table(rows):
    """Every pair's scores as rows of text, the header first; `rows` are a run's, base and LoRA in turn."""
    measured = {k: m for k, m in METRICS.items() if m.scorer and m.shown and rows[1].get(k) is not None}
    changes = {key for key, metric in measured.items() if metric.kind == DIFFERENCE}
    head = ["Prompt and seed", *(m.name + (", base → LoRA" if k in changes else "") for k, m in measured.items())]
    return [head] + [
        [
            f"{base['prompt']}, seed {base['seed']}",
            *(f"{base[k]:.3f} → {lora[k]:.3f}" if k in changes else f"{lora[k]:.3f}" for k in measured),
        ]
        for base, lora in zip(rows[::2], rows[1::2], strict=True)
    ]


def nearest_cards(run, training, limit=12):
    """The training images with the nearest LoRA images, in pairs; only the images shown are read."""
    places = {name: place for place, name in enumerate(training.names)}
    nearest = {}
    for index, row in enumerate(r for r in run.rows if r["model"] == "lora"):
        known = nearest.get(row["nearest_picture"])
        if known is None or row["nearest_similarity"] > known[0]["nearest_similarity"]:
            nearest[row["nearest_picture"]] = (row, index)
    best = sorted(nearest.values(), key=lambda pair: -pair[0]["nearest_similarity"])[:limit]
    return [
        dict(
            name=row["nearest_picture"],
            lora=image_uri(run.lora[index], 192),
            training=image_uri(training.pictures[places[row["nearest_picture"]]], 192),
            caption=f"cosine {row['nearest_similarity']:.3f} · {row['prompt']}, seed {row['seed']}",
        )
        for row, index in best
    ]


def pair_rows(run, shown):
    """The gallery of a run: a dict a prompt, in it a dict a seed with the pair of base and LoRA images."""
    prompts, seeds = shown["prompts"], shown["seeds"]
    links = [
        f"images/{slug}/{kind}_{seed}.png" for slug in slugs(prompts) for seed in seeds for kind in ("base", "lora")
    ]
    uris = iter(sources((image for pair in zip(run.base, run.lora, strict=True) for image in pair), links))
    return [
        dict(
            category=category,
            prompt=prompt,
            pairs=[dict(seed=seed, alt=f"“{prompt}”, seed {seed}", base=next(uris), lora=next(uris)) for seed in seeds],
        )
        for category, prompt in prompts
    ]


class Column(NamedTuple):
    """A column of a comparison: one model's images, prompt by prompt and seed by seed."""

    title: str
    images: list
    folder: str = ""  # of the image files, relative to the page
    kind: str = "lora"  # base or lora: how the files' names begin


def columns_of(groups):
    """The Columns of a comparison: the base model, then the first run of each experiment; `groups` is
    {experiment: [Run]}."""
    titles = words.plain_names(groups)
    firsts = {titles[name]: members[0] for name, members in groups.items()}
    folders = {title: f"../{run.target.name}/images" for title, run in firsts.items()}
    title, run = next(iter(firsts.items()))
    base = Column("Base model", run.base, folders[title], "base")
    return [base, *(Column(title, run.lora, folders[title]) for title, run in firsts.items())]


def sheet_rows(columns, shown, wanted):
    """Rows of images side by side, a dict a prompt; `wanted` is {index of a prompt: indices of its seeds}."""
    prompts, seeds, names = shown["prompts"], shown["seeds"], slugs(shown["prompts"])
    jobs = [(column, index, place) for index, places in wanted.items() for column in columns for place in places]
    uris = iter(
        sources(
            (column.images[index * len(seeds) + place] for column, index, place in jobs),
            [f"{c.folder}/{names[index]}/{c.kind}_{seeds[place]}.png" for c, index, place in jobs],
        )
    )
    return [
        dict(
            category=prompts[index][0],
            prompt=prompts[index][1],
            seeds=[str(seeds[place]) for place in places],
            cells=[
                dict(
                    title=column.title,
                    cards=[
                        dict(uri=next(uris), alt=f"{column.title}: “{prompts[index][1]}”, seed {seeds[place]}")
                        for place in places
                    ],
                )
                for column in columns
            ],
            kind=CATEGORIES[prompts[index][0]].title,
            wished=CATEGORIES[prompts[index][0]].wish,
        )
        for index, places in wanted.items()
    ]


def comparison_sheets(columns, shown, seeds=2):
    """(the rows of an overview, all other rows) of a comparison, as `sheet_rows` gives them; no image is in both. Each
    prompt is shown with at least `seeds` images, or all that there are."""
    prompts, count = shown["prompts"], len(shown["seeds"])
    few, first = first_of_each(prompts), seeds_shown(len(columns), count)
    left = {
        index: range(first if index in few else 0, min(seeds, count)) for index in first_of_each(prompts, len(prompts))
    }
    return (
        sheet_rows(columns, shown, dict.fromkeys(few, range(first))),
        sheet_rows(columns, shown, {index: places for index, places in left.items() if places}),
    )


def run_page(run, summary, shown):
    """The report of one run as HTML; `shown` has what all pages share: prompts, seeds, config, warnings, provenance,
    training (the TrainingSet or None)."""
    verdicts = judged({run.name: summary}, words.concept_name([run.adapter]))
    opening = [rows[0] for _, rows in verdicts]
    if similarity := similarity_of(summary):
        opening = opening or [dict(kind="open", sentence=words.NO_VERDICTS)]
        text = similarity["text"]
        opening.append(dict(kind="none", sentence=f"{similarity['title']}: {text[0].lower()}{text[1:]}"))
    return TEMPLATES.get_template("run.html").render(
        title=run.name,
        verdicts=verdicts,
        opening=opening,
        similarity=similarity,
        training=words.training_name(summary),
        shares=any("%])" in row["sentence"] for row in opening),
        warnings=shown["warnings"],
        no_verdicts=words.NO_VERDICTS,
        groups=by_category(pair_rows(run, shown)),
        spread=words.spread_text(summary),
        table=words.summary_table(summary),
        explained=words.explained([key for key in METRICS if key in summary["prompts"][0]]),
        scale=words.scale_text(summary.get("concept_scale")),
        scale_table=words.scale_table(summary),
        tables=[words.kernel_table(summary), words.study_table(summary)],
        distribution=figure_uri(distribution_figure(run, shown["prompts"])),
        scores=score_table(run.rows),
        advice=summary["sweep"]["advice"] if "sweep" in summary else None,
        nearest=nearest_cards(run, shown["training"]) if shown["training"] else None,
        copies=words.copies_table(summary),
        details=details_text(shown, {run.name: run.adapter}),
    )


def comparison_title(names):
    """The title of a comparison: a few experiments by name, more by their number."""
    if len(names) > 4:
        return f"{len(names)} experiments compared"
    return f"{', '.join(names[:-1])} and {names[-1]} compared" if len(names) > 1 else names[0]


def verdict_rows(verdicts, names):
    """The output of `judged` as a table: a row a question, with a verdict or None for each of the experiments `names`."""
    rows = []
    for question, of_question in verdicts:
        by_name = {verdict["name"]: verdict for verdict in of_question}
        cells = [by_name.get(name) for name in names]
        rows.append(dict(question=question, plain=questions()[question].asks, cells=cells))
    return rows


def comparison_page(groups, summaries, pairs, shown):
    """The report on several experiments as HTML: images side by side, verdicts, differences."""
    adapters = {run.name: run.adapter for members in groups.values() for run in members}
    concept = words.concept_name(adapters.values())
    columns, titles = columns_of(groups), words.plain_names(groups)
    summaries = {titles[name]: summary for name, summary in summaries.items()}
    pairs = [r | dict(first=titles[r["first"]], second=titles[r["second"]]) for r in pairs]
    experiments = [
        dict(
            name=name,
            spread=words.spread_text(summary),
            table=words.summary_table(summary),
            scale_table=words.scale_table(summary),
            runs=summary["runs"],
        )
        for name, summary in summaries.items()
    ]
    verdicts = judged(summaries, concept)
    sheet, others = comparison_sheets(columns, shown)
    return TEMPLATES.get_template("comparison.html").render(
        title=comparison_title(list(summaries)),
        columns=[column.title for column in columns],
        sheet=sheet,
        others=others,
        judged=verdict_rows(verdicts, summaries),
        verdicts=verdicts,
        similarities=[(name, found) for name, summary in summaries.items() if (found := similarity_of(summary))],
        differences=words.difference_sentences(pairs),
        warnings=shown["warnings"],
        no_verdicts=words.NO_VERDICTS,
        table=words.comparison_table(summaries),
        scale=words.scale_text(next(iter(summaries.values())).get("concept_scale")),
        experiments=experiments,
        forests=forest_bars(pairs),
        sentences=[words.pair_sentence(row) for row in pairs],
        note=words.pair_note(pairs) if pairs else "",
        details=details_text(shown, adapters),
    )


def strips(run, shown, chosen):
    """A dict a prompt: its first seed's images of the base model and of each point, the one at `chosen` marked."""
    prompts, seeds = shown["prompts"], shown["seeds"]
    columns = [(None, "base", "base", run.base)]  # point, label, how the files' names begin, images
    for point, images in sorted(run.points.items()):
        if point.scale:
            columns.append((point, str(point), "lora" if run.is_own(point) else point.file_stem, images))
    uris = iter(
        sources(
            (images[index * len(seeds)] for index in range(len(prompts)) for *_, images in columns),
            [f"images/{slug}/{stem}_{seeds[0]}.png" for slug in slugs(prompts) for _, _, stem, _ in columns],
            side=256,
        )
    )
    return [
        dict(
            category=category,
            prompt=prompt,
            seed=seeds[0],
            cards=[
                dict(uri=next(uris), label=label, taken=point is not None and point == chosen)
                for point, label, *_ in columns
            ],
        )
        for category, prompt in prompts
    ]


def choose_page(run, sweep, shown):
    """The choice among a run's snapshots and scales as HTML: advice, images, curves, tables."""
    chosen, count = chosen_point(sweep), len(shown["seeds"])
    curves = [(curve.title, curve_figure(curve, sweep)) for curve in all_curves()]
    return TEMPLATES.get_template("choose.html").render(
        title=run.name,
        strips=strips(run, shown, chosen),
        advice=sweep["advice"].partition(". ")[::2],
        speaks_of=words.spread_text(dict(runs=[run.name], seeds=count)),
        warnings=shown["warnings"],
        marked=chosen is not None,
        curves=[dict(uri=figure_uri(figure), alt=title) for title, figure in curves if figure],
        grid=grid_table(sweep["rows"]),
        table=words.sweep_table(sweep["rows"]),
        explained=words.sweep_explained(),
        details=details_text(shown, {run.name: run.adapter}),
    )
