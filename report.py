"""What people look at: contact sheets, figures, tables in words, and the HTML pages."""

import base64
import html
import io
import json
import math
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

matplotlib.rcParams["text.parse_math"] = False  # a prompt may hold dollar signs

INK, PAPER, QUIET = (24, 26, 31), (255, 255, 255), (110, 115, 125)


def contact_sheet(images, titles, columns=8, side=160):
    """A grid of thumbnails with a title under each; `images` PIL pictures of any size."""
    font = ImageFont.load_default(11)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    gap, line = 8, 18
    sheet = Image.new(
        "RGB", (columns * (side + gap) + gap, rows * (side + line + gap) + gap), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for index, (image, title) in enumerate(zip(images, titles, strict=True)):
        x = gap + index % columns * (side + gap)
        y = gap + index // columns * (side + line + gap)
        thumbnail = image.copy()
        thumbnail.thumbnail((side, side), Image.Resampling.LANCZOS)
        sheet.paste(thumbnail, (x, y))
        draw.text((x, y + side + 2), fit_text(title, font, side), INK, font)
    return sheet


def fit_text(text, font, width):
    """`text`, its end replaced by an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def loss_figure(log, title):
    """A matplotlib figure of a training log: loss, held-out loss and learning rate over steps.

    `log` is the list of rows of log.jsonl. The training loss depends mostly on the timesteps that
    were drawn, so its running mean is drawn over it, and the held-out loss at fixed ones beside it.
    """
    figure = Figure(figsize=(8, 5.5), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, height_ratios=[3, 1], sharex=True)
    trained = [row for row in log if "loss" in row]
    steps, losses = [r["step"] for r in trained], [r["loss"] for r in trained]
    window = max(1, len(losses) // 20)
    kernel = np.ones(window)
    running = np.convolve(losses, kernel, "same") / np.convolve(
        np.ones(len(losses)), kernel, "same"
    )
    top.plot(steps, losses, color="#b9c4d6", linewidth=0.8, label="training loss")
    top.plot(steps, running, color="#2f5ea8", linewidth=1.8, label="its running mean")
    held_out = [(r["step"], r["validation_loss"]) for r in log if "validation_loss" in r]
    if held_out:
        top.plot(*zip(*held_out, strict=True), "o-", color="#c4572e", markersize=4,
                 label="held-out pictures, fixed noise and timesteps")  # fmt: skip
    top.set(title=title, ylabel="mean squared error of the noise")
    top.legend(frameon=False)
    bottom.plot(steps, [r["learning_rate"] for r in trained], color="#555555")
    bottom.set(xlabel="step", ylabel="learning rate")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_ylim(bottom=0)
    return figure


# ---- words and tables ----------------------------------------------------------------------

NAMES = {
    "clip": "CLIP score",
    "concept_similarity": "concept similarity",
    "lpips": "LPIPS",
    "change": "change",
}


def interval_text(interval, sign=True):
    """«+0.012 [−0.003, +0.027]», or the mean alone where there is one value and so no interval."""
    form = "{:+.3f}" if sign else "{:.3f}"
    if not math.isfinite(interval["low"]):
        return form.replace("3", "4").format(interval["mean"]).replace("-", "−")
    mean, low, high = (form.format(interval[k]).replace("-", "−") for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def p_text(p):
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def spread_text(summary):
    """What the intervals of an experiment speak of."""
    runs = len(summary["runs"])
    seeds = summary["prompts"][0]["lpips"]["seeds"]
    over = "these prompts, drawn with other seeds"
    if runs == seeds == 1:
        return (
            "One picture a prompt and one training run: no interval can be given, and no verdict."
        )
    if runs > 1:
        return (f"{runs} training runs, {seeds} sampling seeds a prompt. The 95% intervals speak of "
                f"{over} and by other training runs.")  # fmt: skip
    return (f"One training run, {seeds} sampling seeds a prompt. The 95% intervals speak of {over}; "
            "they say nothing of what another training run would give.")  # fmt: skip


def summary_table(summary):
    """The published table's columns as rows of text, with intervals; the head first.

    CLIP is LoRA minus base beside the two means; change is LPIPS over its ceiling.
    """
    one = summary["prompts"][0]
    columns = [("Prompt", lambda row: row["title"])]
    if "clip" in one:
        columns += [
            ("Base CLIP", lambda row: f"{row['base_clip']:.4f}"),
            ("LoRA CLIP", lambda row: f"{row['lora_clip']:.4f}"),
            ("CLIP difference", lambda row: interval_text(row["clip"])),
        ]
    columns += [("LPIPS", lambda row: interval_text(row["lpips"], sign=False))]
    if "change" in one:
        columns += [("Change", lambda row: interval_text(row["change"], sign=False))]
    if "concept_similarity" in one:
        columns += [
            ("Base concept", lambda row: f"{row['base_concept_similarity']:.4f}"),
            ("Concept difference", lambda row: interval_text(row["concept_similarity"])),
        ]
    rows = [dict(row, title=f"{row['prompt']} ({row['category']})") for row in summary["prompts"]]
    rows += [dict(row, title=f"mean, {name}") for name, row in summary["categories"].items()]
    return [[name for name, _ in columns]] + [[cell(row) for _, cell in columns] for row in rows]


def markdown_table(rows):
    """Rows of text as a Markdown table, the first row its head."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|--:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def verdict_text(summary):
    """The verdicts of one run or experiment as a Markdown list."""
    lines = [f"- **{v['question']}: {v['answer']}.** {v['text']}" for v in summary["verdicts"]]
    return "\n".join(lines or ["No verdicts: they need a CLIP model and the training pictures."])


def summary_text(summary):
    """Verdicts and table of one run or experiment, as Markdown."""
    parts = [verdict_text(summary), spread_text(summary), markdown_table(summary_table(summary))]
    if "sweep" in summary:
        parts += [markdown_table(sweep_table(summary["sweep"]["rows"])), summary["sweep"]["advice"]]
    return "\n\n".join(parts)


def sweep_table(rows):
    head = ["Scale", "Concept difference, success", "CLIP difference, success", "Change, failure"]
    keys = ("concept_similarity", "clip", "change")
    return [head] + [
        [
            f"{row['scale']:g}",
            *(interval_text(row[k], k != "change") if k in row else "–" for k in keys),
        ]
        for row in rows
    ]


def pair_sentence(row):
    """What one comparison of two experiments found."""
    what = f"{NAMES[row['metric']]} on {row['category']} prompts"
    found = (
        "no detectable difference"
        if "no" in row["answer"]
        else f"{row['second']} is {row['answer']}"
    )
    return (f"{what}, {row['second']} minus {row['first']}: {interval_text(row)}, "
            f"{p_text(row['p_holm'])}: {found}")  # fmt: skip


def comparison_text(summaries, pairs):
    """The comparison page's content as Markdown."""
    parts = []
    for name, summary in summaries.items():
        parts.append(f"## {name}\n\n{verdict_text(summary)}\n\n{spread_text(summary)}")
    if pairs:
        lines = "\n".join(f"- {pair_sentence(row)}" for row in pairs)
        parts.append(f"## Differences\n\n{lines}\n\n{pair_note(pairs)}")
    return "\n\n".join(parts)


def pair_note(pairs):
    """How the differences were tested."""
    runs = sorted({row["runs"] for row in pairs})
    note = f"95% intervals; p after Holm's correction over these {len(pairs)} comparisons. "
    if runs == [1]:
        return note + "One training run each: training noise is not in these intervals."
    note += f"{'/'.join(map(str, runs))} training runs each, "
    if all(row["paired_by_training_seed"] for row in pairs):
        return note + "paired by their training seed."
    return note + "paired in their order where they share no training seed."


# ---- figures -------------------------------------------------------------------------------


def comparison_figure(rows, title, pairs, side=256):
    """Base and LoRA side by side: a row a prompt, `pairs` seeds in it, as one PIL picture.

    `rows` are dicts with `prompt`, `category`, and `base` and `lora`, lists of PIL pictures. Rows
    of more than four pairs are wrapped, so that a picture stays large enough to see.
    """
    big, small = ImageFont.load_default(22), ImageFont.load_default(15)
    gap, between, head = 6, 22, 54
    a_line = min(pairs, 4)
    lines = -(-pairs // a_line)
    width = a_line * (2 * side + gap + between) + between
    height = head + len(rows) * (lines * (side + gap) + 34) + between
    figure = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(figure)
    draw.text((between, 14), fit_text(title, big, width - 2 * between), INK, big)
    y = head
    for row in rows:
        label = f"«{row['prompt']}»  {row['category']}; in each pair base on the left, LoRA on the right"
        draw.text((between, y), fit_text(label, small, width - 2 * between), INK, small)
        y += 24
        for index in range(pairs):
            x = between + index % a_line * (2 * side + gap + between)
            top = y + index // a_line * (side + gap)
            for offset, image in ((0, row["base"][index]), (side + gap, row["lora"][index])):
                figure.paste(
                    image.resize((side, side), Image.Resampling.LANCZOS), (x + offset, top)
                )
        y += lines * (side + gap) + 10
    return figure


def forest_figure(pairs):
    """A matplotlib forest plot: each difference of two experiments with its interval, around 0."""
    figure = Figure(figsize=(9, 1.2 + 0.36 * max(len(pairs), 1)), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#888888", linewidth=1)
    for y, row in enumerate(pairs):
        certain = "no" not in row["answer"]
        colour = "#c4572e" if certain else "#8492a6"
        if math.isfinite(row["low"]):
            axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2)
        axes.plot(row["mean"], y, "o", color=colour, markersize=6)
    labels = [f"{NAMES[r['metric']]}, {r['category']}: {r['second']} − {r['first']}" for r in pairs]
    axes.set_yticks(range(len(pairs)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("difference with its 95% interval; coloured where it is detectable after Holm")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    return figure


def sweep_figure(rows, title):
    """The trade-off over the adapter's scale: concept gained against unrelated prompts moved."""
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    rows = [row for row in rows if "concept_similarity" in row and "change" in row]
    x = np.array([[r["change"][k] for k in ("mean", "low", "high")] for r in rows]).reshape(-1, 3)
    y = np.array([[r["concept_similarity"][k] for k in ("mean", "low", "high")] for r in rows])
    y = y.reshape(-1, 3)
    axes.errorbar(x[:, 0], y[:, 0], xerr=np.abs(x[:, 1:] - x[:, :1]).T, yerr=np.abs(y[:, 1:] - y[:, :1]).T,
                  fmt="o-", color="#2f5ea8", ecolor="#b9c4d6", capsize=2)  # fmt: skip
    for row, px, py in zip(rows, x[:, 0], y[:, 0], strict=True):
        axes.annotate(f"{row['scale']:g}", (px, py), textcoords="offset points", xytext=(6, -12))
    axes.set(title=f"{title}: how much of the adapter",
             xlabel="unrelated prompts moved: LPIPS to the base, as a share of its ceiling",
             ylabel="concept similarity gained on success prompts")  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure


def sweep_sheet(firsts, prompts, side=192):
    """A row a prompt, a column a scale: the first seed's pictures. `firsts` is {scale: pictures}."""
    font = ImageFont.load_default(15)
    gap, line = 6, 24
    scales = sorted(firsts)
    sheet = Image.new(
        "RGB",
        (gap + len(scales) * (side + gap), line + len(prompts) * (side + gap + line)),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for column, scale in enumerate(scales):
        x = gap + column * (side + gap)
        draw.text((x, 3), f"scale {scale:g}", INK, font)
        for row, prompt in enumerate(prompts):
            y = line + row * (side + gap + line)
            if column == 0:
                draw.text((x, y + 3), fit_text(prompt, font, sheet.width - 2 * gap), QUIET, font)
            image = firsts[scale][row].resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(image, (x, y + line))
    return sheet


def distribution_figure(run, prompts):
    """For each prompt the scores of every picture, base beside LoRA: one panel a score."""
    rows = run.rows
    keys = [k for k in ("concept_similarity", "clip", "lpips") if rows[1][k] is not None]
    figure = Figure(figsize=(9, 1.1 + 0.62 * len(prompts)), dpi=110, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(keys), sharey=True))
    for axes, key in zip(panels, keys, strict=True):
        for y, (_, prompt) in enumerate(prompts):
            for model, colour, shift in (("base", "#8492a6", -0.13), ("lora", "#c4572e", 0.13)):
                values = [r[key] for r in rows if r["prompt"] == prompt and r["model"] == model]
                values = [value for value in values if value is not None]
                axes.plot(
                    values, [y + shift] * len(values), "o", color=colour, alpha=0.55, markersize=5
                )
        axes.set_title({"lpips": "LPIPS, base to LoRA"}.get(key, NAMES[key]), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    labels = [prompt if len(prompt) < 40 else prompt[:38] + "…" for _, prompt in prompts]
    panels[0].set_yticks(range(len(prompts)), labels, fontsize=8)
    panels[0].invert_yaxis()
    figure.supxlabel("grey: base, red: LoRA; one dot a seed", fontsize=9)
    return figure


# ---- pages ---------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #181a1f; --paper: #fff; --quiet: #5c6370; --line: #d9dde4;
  --card: #f5f7fa; --bad: #a8401c; --good: #2a6b3f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --paper: #14161a; --quiet: #9aa3b0;
  --line: #343a44; --card: #1d2026; --bad: #f0926c; --good: #7fce9a; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 78rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem } h3 { font-size: 1rem }
.verdict { background: var(--card); border-left: 4px solid var(--quiet); padding: .6rem .9rem;
  margin: .6rem 0; border-radius: 4px }
.verdict.bad { border-color: var(--bad) } .verdict.good { border-color: var(--good) }
.warning { border-left: 4px solid #d49a00; background: var(--card); padding: .5rem .9rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .88rem }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child { text-align: left }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr));
  gap: .9rem }
figure { margin: 0 } figcaption { font-size: .78rem; color: var(--quiet) }
.pair { position: relative; display: grid; grid-template-columns: 1fr 1fr; gap: 2px }
.pair img, .plain img { width: 100%; display: block; border-radius: 3px }
.swap { position: relative; cursor: pointer; border: 0; padding: 0; background: none }
.swap img + img { position: absolute; inset: 0; opacity: 0 }
.swap:hover img + img, .swap:focus img + img { opacity: 1 }
.plain { background: #fff; padding: .4rem; border-radius: 4px; margin: .6rem 0 }
.near { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .7rem }
pre { background: var(--card); padding: .8rem; overflow-x: auto; font-size: .8rem }
.quiet { color: var(--quiet) }
"""


def image_uri(image, side=512):
    """A PIL picture, no larger than `side`, as a data: URI (WebP)."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure_tag(figure, alt):
    """A matplotlib figure as an <img> on a white card, in dark pages too."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return f'<figure class="plain"><img src="{uri}" alt="{html.escape(alt)}"></figure>'


def table_tag(rows):
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows[1:]
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def verdict_tags(summary):
    if not summary["verdicts"]:
        return (
            '<p class="verdict">No verdicts: they need a CLIP model and the training pictures.</p>'
        )
    # Green is what one wants of an adapter: the concept learned, nothing contaminated or copied.
    wanted = {"learned": "yes", "contaminated": "no", "memorised": "no"}
    tags = []
    for v in summary["verdicts"]:
        kind = "" if v["answer"] not in ("yes", "no") else "good"
        kind = "bad" if kind and v["answer"] != wanted[v["question"]] else kind
        tags.append(
            f'<p class="verdict {kind}"><strong>{html.escape(v["question"])}: '
            f"{html.escape(v['answer'])}.</strong> {html.escape(v['text'])}</p>"
        )
    return "".join(tags)


def page(title, body):
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def warning_tags(warnings):
    return "".join(f'<p class="warning">{html.escape(text)}</p>' for text in warnings)


def details_tag(shown, adapters):
    """Configuration, hashes and versions, folded away."""
    record = dict(config=shown["config"], **shown["provenance"], adapters=adapters)
    text = html.escape(json.dumps(record, indent=2, ensure_ascii=False))
    return f"<h2>How it was made</h2><details><summary>configuration, hashes, versions</summary><pre>{text}</pre></details>"


def pair_tag(base, lora, base_row, lora_row):
    """Base and LoRA of one prompt and seed; the left picture shows the other on hover or tap."""
    alt = html.escape(f"«{base_row['prompt']}», seed {base_row['seed']}")
    base_uri, lora_uri = image_uri(base), image_uri(lora)
    scores = [f"seed {base_row['seed']}"]
    for key, name in (("clip", "CLIP"), ("concept_similarity", "concept")):
        if base_row[key] is not None:
            scores.append(f"{name} {base_row[key]:.3f} → {lora_row[key]:.3f}")
    scores.append(f"LPIPS {lora_row['lpips']:.3f}")
    return (
        '<figure><div class="pair">'
        f'<button class="swap" aria-label="swap base and LoRA, {alt}"><img src="{base_uri}" alt="base: {alt}">'
        f'<img src="{lora_uri}" alt=""></button><img src="{lora_uri}" alt="LoRA: {alt}"></div>'
        f"<figcaption>{html.escape(' · '.join(scores))}</figcaption></figure>"
    )


def nearest_tag(run, training, limit=12):
    """The training pictures that have the nearest LoRA picture, each beside it."""
    by_name = dict(zip(training.names, training.pictures, strict=True))
    rows = [row for row in run.rows if row["model"] == "lora"]
    nearest = {}
    for row, image in zip(rows, run.lora, strict=True):
        known = nearest.get(row["nearest_picture"])
        if known is None or row["nearest_similarity"] > known[0]["nearest_similarity"]:
            nearest[row["nearest_picture"]] = (row, image)
    best = sorted(nearest.values(), key=lambda found: -found[0]["nearest_similarity"])[:limit]
    cards = "".join(
        f'<figure><div class="pair"><img src="{image_uri(by_name[row["nearest_picture"]], 192)}" '
        f'alt="training picture {html.escape(row["nearest_picture"])}">'
        f'<img src="{image_uri(image, 192)}" alt="nearest LoRA picture"></div><figcaption>'
        f"cosine {row['nearest_similarity']:.3f} · {html.escape(row['prompt'])}, seed {row['seed']}"
        "</figcaption></figure>"
        for row, image in best
    )
    return (
        '<h2>Training pictures and the nearest picture drawn</h2><p class="quiet">On the left a training '
        f'picture, on the right the LoRA picture nearest to it.</p><div class="near">{cards}</div>'
    )


def run_page(run, summary, shown, folder):
    """One run's report: a page that stands alone and opens offline."""
    parts = [f"<h1>{html.escape(run.name)}: what it learned, what it spoiled</h1>"]
    parts += [verdict_tags(summary), warning_tags(shown["warnings"])]
    parts += [
        f'<p class="quiet">{html.escape(spread_text(summary))}</p>',
        table_tag(summary_table(summary)),
    ]
    parts.append(
        '<p class="quiet">CLIP: cosine of picture and prompt. LPIPS: distance of the LoRA picture from the '
        "base picture of the same noise. Change: LPIPS as a share of its ceiling, the distance between base "
        "pictures of one prompt at different seeds. Concept: mean cosine to the training pictures.</p>"
    )
    count = len(shown["seeds"])
    for index, (category, prompt) in enumerate(shown["prompts"]):
        parts.append(f"<h2>«{html.escape(prompt)}»</h2>")
        parts.append(
            f'<p class="quiet">{html.escape(category)} · left base, right LoRA, the same noise; '
            "point at a base picture, or tap it, to see the LoRA picture in its place</p>"
        )
        of_prompt = slice(index * count, (index + 1) * count)
        with ThreadPoolExecutor() as pool:  # most of it is encoding pictures
            cards = pool.map(pair_tag, run.base[of_prompt], run.lora[of_prompt],
                             run.rows[::2][of_prompt], run.rows[1::2][of_prompt])  # fmt: skip
        parts.append(f'<div class="pairs">{"".join(cards)}</div>')
    parts.append("<h2>Every score</h2>")
    parts.append(figure_tag(distribution_figure(run, shown["prompts"]), "scores of every picture"))
    if "sweep" in summary:
        parts.append("<h2>How much of the adapter</h2>")
        parts.append(f"<p>{html.escape(summary['sweep']['advice'])}</p>")
        parts.append(table_tag(sweep_table(summary["sweep"]["rows"])))
        for name, alt in (
            ("sweep.png", "the trade-off"),
            ("sweep_pictures.png", "pictures by scale"),
        ):
            uri = image_uri(Image.open(folder / name).convert("RGB"), 1200)
            parts.append(f'<figure class="plain"><img src="{uri}" alt="{alt}"></figure>')
    if shown["training"]:
        parts.append(nearest_tag(run, shown["training"]))
    parts.append(details_tag(shown, {run.name: run.adapter}))
    return page(run.name, "".join(parts))


def comparison_page(groups, summaries, pairs, shown, folder):
    """The report over several experiments: verdicts, differences, and pictures side by side."""
    parts = ["<h1>Experiments compared</h1>", warning_tags(shown["warnings"])]
    for name, summary in summaries.items():
        parts += [f"<h2>{html.escape(name)}</h2>", verdict_tags(summary)]
        parts.append(f'<p class="quiet">{html.escape(spread_text(summary))}</p>')
    if pairs:
        parts.append("<h2>Differences</h2><ul>")
        parts += [f"<li>{html.escape(pair_sentence(row))}</li>" for row in pairs]
        parts.append(f'</ul><p class="quiet">{html.escape(pair_note(pairs))}</p>')
        parts.append(
            figure_tag(forest_figure(pairs), "every difference with its interval, around zero")
        )
    for name, summary in summaries.items():
        parts += [f"<h3>{html.escape(name)}</h3>", table_tag(summary_table(summary))]
    count = len(shown["seeds"])
    parts.append("<h2>The same noise, drawn by each</h2>")
    firsts = [members[0] for members in groups.values()]
    for index, (category, prompt) in enumerate(shown["prompts"]):
        parts.append(
            f"<h3>«{html.escape(prompt)}» <span class='quiet'>{html.escape(category)}</span></h3>"
        )
        images = [("base", firsts[0].base)] + [(run.name, run.lora) for run in firsts]
        for offset in range(min(count, 2)):
            cards = "".join(
                f'<figure><img src="{image_uri(found[index * count + offset], 320)}" style="width:100%;'
                f'border-radius:3px" alt="{html.escape(name)}: {html.escape(prompt)}, seed '
                f'{shown["seeds"][offset]}"><figcaption>{html.escape(name)}, seed {shown["seeds"][offset]}'
                "</figcaption></figure>"
                for name, found in images
            )
            parts.append(f'<div class="near">{cards}</div>')
    parts.append(details_tag(shown, {r.name: r.adapter for g in groups.values() for r in g}))
    return page("Experiments compared", "".join(parts))
