"""The HTML pages of an evaluation: each is one file that opens offline, written from templates/."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
from PIL import Image

from lib.evaluation import sentences, words
from lib.evaluation.bars import forest_bars, verdict_bars
from lib.evaluation.figures import distribution_figure, seeds_shown
from lib.evaluation.prompts import CATEGORIES, OVERVIEW, first_of_each
from lib.pictures import webp

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,  # prompts and names are anybody's text
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
# The answers that one wants of an adapter: the concept learned, nothing else changed.
WANTED = dict(learned="yes", memorised="no", collapsed="no") | {
    question: kept for question, (_, _, kept) in sentences.OTHERS.items()
}


def image_uri(image, side=512):
    """A PIL picture, no larger than `side` pixels, as a data: URI (WebP)."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return "data:image/webp;base64," + base64.b64encode(webp(image, quality=88)).decode()


def figure_uri(figure):
    """A matplotlib figure as a data: URI (PNG)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def kind(question, answer):
    """good, bad, or open where it cannot be told: how a page marks an answer."""
    if answer not in ("yes", "no"):
        return "open"
    return "good" if answer == WANTED[question] else "bad"


def judged(summaries, concept):
    """[(question, verdicts)]: every experiment's verdict on it, with what a page adds: the experiment's
    `name`, `kind`, `sentence` and `bar`, its interval drawn or None. `summaries` is {experiment:
    summary}."""
    bars = verdict_bars(summaries)
    questions = {}
    for name, summary in summaries.items():
        for v in summary["verdicts"]:
            more = dict(
                name=name,
                kind=kind(v["question"], v["answer"]),
                bar=bars.get(v["question"], {}).get(name),
                sentence=sentences.plain_sentence(v, concept, summary),
            )
            questions.setdefault(v["question"], []).append(v | more)
    return list(questions.items())


def by_category(rows):
    """[(title, category, rows)] of rows that have a `category`: what was taught first, unrelated
    prompts last."""
    found = [
        (title, category, [row for row in rows if row["category"] == category])
        for category, title in sentences.CATEGORY_TITLES.items()
    ]
    return [group for group in found if group[2]]


def details_text(shown, adapters):
    """Configuration, hashes and versions as JSON, for the end of a page."""
    record = dict(config=shown["config"], **shown["provenance"], adapters=adapters)
    return json.dumps(record, indent=2, ensure_ascii=False)


def score_table(rows):
    """Every pair's scores as rows of text, the head first; `rows` are a run's, base and LoRA in turn."""
    scores = [key for key in ("clip", "concept_similarity") if rows[1][key] is not None]
    head = ["Prompt and seed", *(f"{words.NAMES[key]}, base → LoRA" for key in scores), "LPIPS"]
    return [head] + [
        [
            f"{base['prompt']}, seed {base['seed']}",
            *(f"{base[key]:.3f} → {lora[key]:.3f}" for key in scores),
            f"{lora['lpips']:.3f}",
        ]
        for base, lora in zip(rows[::2], rows[1::2], strict=True)
    ]


def nearest_cards(run, training, limit=12):
    """The training pictures that have the nearest LoRA picture, each beside it."""
    places = {name: place for place, name in enumerate(training.names)}  # few pictures are read
    nearest = {}
    for row, image in zip([r for r in run.rows if r["model"] == "lora"], run.lora, strict=True):
        known = nearest.get(row["nearest_picture"])
        if known is None or row["nearest_similarity"] > known[0]["nearest_similarity"]:
            nearest[row["nearest_picture"]] = (row, image)
    best = sorted(nearest.values(), key=lambda found: -found[0]["nearest_similarity"])[:limit]
    return [
        dict(
            name=row["nearest_picture"],
            lora=image_uri(image, 192),
            training=image_uri(training.pictures[places[row["nearest_picture"]]], 192),
            caption=f"cosine {row['nearest_similarity']:.3f} · {row['prompt']}, seed {row['seed']}",
        )
        for row, image in best
    ]


def pair_rows(run, shown):
    """The gallery of a run: for each prompt its pairs of base and LoRA pictures, a dict a seed."""
    jobs = [(prompt, seed) for _, prompt in shown["prompts"] for seed in shown["seeds"]]
    with ThreadPoolExecutor() as pool:  # most of it is encoding pictures
        base, lora = (list(pool.map(image_uri, images)) for images in (run.base, run.lora))
    pairs = [
        dict(seed=seed, alt=f"«{prompt}», seed {seed}", base=before, lora=after)
        for (prompt, seed), before, after in zip(jobs, base, lora, strict=True)
    ]
    count = len(shown["seeds"])
    return [
        dict(category=category, prompt=prompt, pairs=pairs[index * count : (index + 1) * count])
        for index, (category, prompt) in enumerate(shown["prompts"])
    ]


def columns_of(groups):
    """The columns of a comparison, [(title, pictures)]: the base model, then each experiment, by the pictures
    of its first run. `groups` is {experiment: [Run]}."""
    titles = words.plain_names(groups)
    firsts = {titles[name]: members[0] for name, members in groups.items()}
    base = next(iter(firsts.values())).base
    return [("Base model", base), *((title, run.lora) for title, run in firsts.items())]


def sheet_rows(columns, shown, wanted):
    """Rows of pictures side by side, a dict a prompt; `columns` as `columns_of` gives them, `wanted` is {index
    of a prompt: places of the seeds that are shown of it}."""
    count, rows = len(shown["seeds"]), []
    with ThreadPoolExecutor() as pool:  # most of it is encoding pictures
        for index, places in wanted.items():
            category, prompt = shown["prompts"][index]
            cells = [
                dict(
                    title=title,
                    cards=[
                        dict(
                            uri=pool.submit(image_uri, images[index * count + place]),
                            alt=f"{title}: «{prompt}», seed {shown['seeds'][place]}",
                        )
                        for place in places
                    ],
                )
                for title, images in columns
            ]
            seeds = [str(shown["seeds"][place]) for place in places]
            rows.append(
                dict(
                    category=category,
                    prompt=prompt,
                    seeds=seeds,
                    cells=cells,
                    kind=sentences.CATEGORY_TITLES[category],
                    wished=sentences.WISHED[category],
                )
            )
    for card in (card for row in rows for cell in row["cells"] for card in cell["cards"]):
        card["uri"] = card["uri"].result()
    return rows


def comparison_sheets(columns, shown, seeds=2):
    """(the rows that stand for all, the others) of a comparison, as `sheet_rows` gives them; no picture is in
    both. Of each prompt at least `seeds` are shown, or all that there are."""
    prompts, count = shown["prompts"], len(shown["seeds"])
    few, first = first_of_each(prompts, OVERVIEW), seeds_shown(len(columns), count)
    left = {
        index: range(first if index in few else 0, min(seeds, count))
        for index in first_of_each(prompts, dict.fromkeys(CATEGORIES, len(prompts)))
    }
    return (
        sheet_rows(columns, shown, dict.fromkeys(few, range(first))),
        sheet_rows(columns, shown, {index: places for index, places in left.items() if places}),
    )


def run_page(run, summary, shown):
    """One run's report as HTML."""
    return TEMPLATES.get_template("run.html").render(
        title=run.name,
        verdicts=judged({run.name: summary}, sentences.concept_name([run.adapter])),
        warnings=shown["warnings"],
        no_verdicts=words.NO_VERDICTS,
        groups=by_category(pair_rows(run, shown)),
        spread=words.spread_text(summary),
        table=words.summary_table(summary),
        tables=[words.kernel_table(summary), words.study_table(summary)],
        distribution=figure_uri(distribution_figure(run, shown["prompts"])),
        scores=score_table(run.rows),
        advice=summary["sweep"]["advice"] if "sweep" in summary else None,
        nearest=nearest_cards(run, shown["training"]) if shown["training"] else None,
        copies=summary.get("memorised"),
        details=details_text(shown, {run.name: run.adapter}),
    )


def comparison_title(names):
    """What a comparison is of: a few experiments by their names, more by their number."""
    if len(names) > 4:
        return f"{len(names)} experiments compared"
    return f"{', '.join(names[:-1])} and {names[-1]} compared" if len(names) > 1 else names[0]


def verdict_rows(verdicts, names):
    """What `judged` gives as a table: a row a question, a verdict or None for each of the experiments
    `names`."""
    rows = []
    for question, found in verdicts:
        by_name = {verdict["name"]: verdict for verdict in found}
        cells = [by_name.get(name) for name in names]
        rows.append(dict(question=question, plain=sentences.QUESTIONS[question], cells=cells))
    return rows


def comparison_page(groups, summaries, pairs, shown):
    """The report over several experiments: pictures side by side, the verdicts, differences."""
    adapters = {run.name: run.adapter for members in groups.values() for run in members}
    concept = sentences.concept_name(adapters.values())
    columns, titles = columns_of(groups), words.plain_names(groups)
    summaries = {titles[name]: summary for name, summary in summaries.items()}
    pairs = [r | dict(first=titles[r["first"]], second=titles[r["second"]]) for r in pairs]
    experiments = [
        dict(name=name, spread=words.spread_text(summary), table=words.summary_table(summary), runs=summary["runs"])
        for name, summary in summaries.items()
    ]
    verdicts = judged(summaries, concept)
    sheet, others = comparison_sheets(columns, shown)
    return TEMPLATES.get_template("comparison.html").render(
        title=comparison_title(list(summaries)),
        columns=[title for title, _ in columns],
        sheet=sheet,
        others=others,
        judged=verdict_rows(verdicts, summaries),
        verdicts=verdicts,
        differences=sentences.difference_sentences(pairs),
        warnings=shown["warnings"],
        no_verdicts=words.NO_VERDICTS,
        table=words.comparison_table(summaries),
        experiments=experiments,
        forests=forest_bars(pairs),
        sentences=[words.pair_sentence(row) for row in pairs],
        note=words.pair_note(pairs) if pairs else "",
        details=details_text(shown, adapters),
    )
