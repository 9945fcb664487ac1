"""The HTML pages of an evaluation: each is one file that opens offline, written from templates/."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
from PIL import Image

from lib.evaluation import words
from lib.evaluation.figures import distribution_figure, forest_figure

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,  # prompts and names are anybody's text
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
# The answers that one wants of an adapter: the concept learned, nothing else changed.
WANTED = {
    "learned": "yes", "neighbours kept": "yes", "contaminated": "no", "memorised": "no",
    "collapsed": "no",
}  # fmt: skip


def image_uri(image, side=512):
    """A PIL picture, no larger than `side` pixels, as a data: URI (WebP)."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure_uri(figure):
    """A matplotlib figure as a data: URI (PNG)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def coloured(verdicts):
    """The verdicts with their `kind`: good, bad, or nothing where the answer is open."""
    kinds = {True: "good", False: "bad"}
    return [
        v | dict(kind=kinds[v["answer"] == WANTED[v["question"]]] if v["answer"] in ("yes", "no") else "")
        for v in verdicts
    ]  # fmt: skip


def details_text(shown, adapters):
    """Configuration, hashes and versions as JSON, for the end of a page."""
    record = dict(config=shown["config"], **shown["provenance"], adapters=adapters)
    return json.dumps(record, indent=2, ensure_ascii=False)


def pair_card(base, lora, base_row, lora_row):
    """What the page shows of one prompt and seed: both pictures and their scores."""
    scores = [f"seed {base_row['seed']}"]
    for key, name in (("clip", "CLIP"), ("concept_similarity", "concept")):
        if base_row[key] is not None:
            scores.append(f"{name} {base_row[key]:.3f} → {lora_row[key]:.3f}")
    scores.append(f"LPIPS {lora_row['lpips']:.3f}")
    return dict(base=image_uri(base), lora=image_uri(lora), caption=" · ".join(scores),
                alt=f"«{base_row['prompt']}», seed {base_row['seed']}")  # fmt: skip


def nearest_cards(run, training, limit=12):
    """The training pictures that have the nearest LoRA picture, each beside it."""
    by_name = dict(zip(training.names, training.pictures, strict=True))
    nearest = {}
    for row, image in zip([r for r in run.rows if r["model"] == "lora"], run.lora, strict=True):
        known = nearest.get(row["nearest_picture"])
        if known is None or row["nearest_similarity"] > known[0]["nearest_similarity"]:
            nearest[row["nearest_picture"]] = (row, image)
    best = sorted(nearest.values(), key=lambda found: -found[0]["nearest_similarity"])[:limit]
    return [
        dict(name=row["nearest_picture"], lora=image_uri(image, 192),
             training=image_uri(by_name[row["nearest_picture"]], 192),
             caption=f"cosine {row['nearest_similarity']:.3f} · {row['prompt']}, seed {row['seed']}")
        for row, image in best
    ]  # fmt: skip


def run_page(run, summary, shown):
    """One run's report as HTML."""
    count, prompts = len(shown["seeds"]), []
    for index, (category, prompt) in enumerate(shown["prompts"]):
        part = slice(index * count, (index + 1) * count)
        with ThreadPoolExecutor() as pool:  # most of it is encoding pictures
            cards = pool.map(
                pair_card, run.base[part], run.lora[part], run.rows[::2][part], run.rows[1::2][part]
            )
        prompts.append(dict(category=category, prompt=prompt, pairs=list(cards)))
    return TEMPLATES.get_template("run.html").render(
        title=run.name,
        verdicts=coloured(summary["verdicts"]),
        warnings=shown["warnings"],
        no_verdicts=words.NO_VERDICTS,
        spread=words.spread_text(summary),
        table=words.summary_table(summary),
        tables=[words.kernel_table(summary), words.study_table(summary)],
        prompts=prompts,
        distribution=figure_uri(distribution_figure(run, shown["prompts"])),
        advice=summary["sweep"]["advice"] if "sweep" in summary else None,
        nearest=nearest_cards(run, shown["training"]) if shown["training"] else None,
        copies=summary.get("memorised"),
        details=details_text(shown, {run.name: run.adapter}),
    )


def comparison_page(groups, summaries, pairs, shown):
    """The report over several experiments: verdicts, differences, and pictures side by side."""
    experiments = [
        dict(name=name, verdicts=coloured(summary["verdicts"]), spread=words.spread_text(summary),
             table=words.summary_table(summary))
        for name, summary in summaries.items()
    ]  # fmt: skip
    firsts = [members[0] for members in groups.values()]
    images = [("base", firsts[0].base)] + [(run.name, run.lora) for run in firsts]
    count, prompts = len(shown["seeds"]), []
    for index, (category, prompt) in enumerate(shown["prompts"]):
        rows = []
        for offset, seed in enumerate(shown["seeds"][:2]):
            rows.append([
                dict(uri=image_uri(found[index * count + offset], 320), caption=f"{name}, seed {seed}",
                     alt=f"{name}: {prompt}, seed {seed}")
                for name, found in images
            ])  # fmt: skip
        prompts.append(dict(category=category, prompt=prompt, rows=rows))
    return TEMPLATES.get_template("comparison.html").render(
        title="Experiments compared",
        warnings=shown["warnings"],
        no_verdicts=words.NO_VERDICTS,
        table=words.comparison_table(summaries),
        experiments=experiments,
        sentences=[words.pair_sentence(row) for row in pairs],
        note=words.pair_note(pairs) if pairs else "",
        forest=figure_uri(forest_figure(pairs)) if pairs else "",
        prompts=prompts,
        details=details_text(shown, {r.name: r.adapter for g in groups.values() for r in g}),
    )
