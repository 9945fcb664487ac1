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
from lib.evaluation.figures import distribution_figure
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
            more = dict(name=name, kind=kind(v["question"], v["answer"]),
                        bar=bars.get(v["question"], {}).get(name),
                        sentence=sentences.plain_sentence(v, concept, summary))  # fmt: skip
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
        [f"{base['prompt']}, seed {base['seed']}",
         *(f"{base[key]:.3f} → {lora[key]:.3f}" for key in scores), f"{lora['lpips']:.3f}"]
        for base, lora in zip(rows[::2], rows[1::2], strict=True)
    ]  # fmt: skip


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
        dict(name=row["nearest_picture"], lora=image_uri(image, 192),
             training=image_uri(training.pictures[places[row["nearest_picture"]]], 192),
             caption=f"cosine {row['nearest_similarity']:.3f} · {row['prompt']}, seed {row['seed']}")
        for row, image in best
    ]  # fmt: skip


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


def arm_rows(groups, shown, seeds=2):
    """The gallery of a comparison: for each prompt and seed the base's picture and one of each
    experiment, that of its first run."""
    firsts = {name: members[0] for name, members in groups.items()}
    arms = [("base model", next(iter(firsts.values())).base)]
    arms += [(name, run.lora) for name, run in firsts.items()]
    count, rows = len(shown["seeds"]), []
    for index, (category, prompt) in enumerate(shown["prompts"]):
        lines = [
            [dict(name=name, seed=seed, uri=image_uri(images[index * count + offset]),
                  alt=f"{name}: «{prompt}», seed {seed}") for name, images in arms]
            for offset, seed in enumerate(shown["seeds"][:seeds])
        ]  # fmt: skip
        rows.append(dict(category=category, prompt=prompt, lines=lines))
    return rows


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


def comparison_page(groups, summaries, pairs, shown):
    """The report over several experiments: pictures side by side, what can be told, differences."""
    adapters = {run.name: run.adapter for members in groups.values() for run in members}
    concept = sentences.concept_name(adapters.values())
    experiments = [
        dict(name=name, spread=words.spread_text(summary), table=words.summary_table(summary))
        for name, summary in summaries.items()
    ]
    shared = [
        row | dict(kind=kind(row["question"], row["answer"]))
        for row in sentences.shared_sentences(summaries, concept)
    ]
    return TEMPLATES.get_template("comparison.html").render(
        title=comparison_title(list(groups)),
        answers=shared,
        verdicts=judged(summaries, concept),
        differences=sentences.difference_sentences(pairs),
        warnings=shown["warnings"],
        no_verdicts=words.NO_VERDICTS,
        groups=by_category(arm_rows(groups, shown)),
        table=words.comparison_table(summaries),
        experiments=experiments,
        forests=forest_bars(pairs),
        sentences=[words.pair_sentence(row) for row in pairs],
        note=words.pair_note(pairs) if pairs else "",
        details=details_text(shown, adapters),
    )
