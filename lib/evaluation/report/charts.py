"""Charts of an evaluation: a sheet of images (PIL), forest plots, distributions and curves (matplotlib), bars.

A bar is an interval on a page, drawn with HTML alone so that it follows the page's width and colours. Its positions are
per cent of its width.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lib.evaluation.choosing import chosen_point
from lib.evaluation.metrics.table import DIFFERENCE, MEMORISED, METRICS, metric_name
from lib.evaluation.prompts import CATEGORIES, bounded, first_of_each
from lib.evaluation.report.words import interval_text, training_name
from lib.images import INK, PAPER, QUIET, empty_figure, fit_lines, fit_text, height_at, shown

# ---- a sheet of images ---------------------------------------------------------------------

ACROSS = 6  # at most this many images of a prompt side by side in an overview
WIDEST = 16_000  # pixels of a sheet; WebP allows 16,383


def seeds_shown(columns, seeds):
    """How many of a prompt's `seeds` images each of an overview's `columns` shows."""
    return max(1, min(seeds, ACROSS // columns))


def overview_figure(columns, prompts, side=256):
    """What adapters changed at a glance, a row a prompt: the base model's images on the left, beside them those of each
    adapter from the same noise. A PIL image.

    `columns` are (title, images), the base model's first; images are prompt by prompt and seed by seed. `prompts` are
    (category, prompt); the first of each category are shown. Images are `side` pixels wide, or fewer with very many
    columns. Text stays readable at half size, as in a README.
    """
    count = len(columns[0][1]) // len(prompts)
    seeds = seeds_shown(len(columns), count)
    side = min(side, int(WIDEST / (1.2 * seeds * len(columns) + 0.2)))
    big, small = ImageFont.load_default(side // 7), ImageFont.load_default(side // 9)
    gap, between = side // 40, side // 6
    block = seeds * (side + gap) - gap
    line = side // 4
    titles = [fit_lines(title, big, block) for title, _ in columns]
    head = between + max(map(len, titles)) * between
    chosen = first_of_each(prompts)
    width = len(columns) * (block + between) + between
    tall = max(
        height_at(image, side) for _, images in columns for index in chosen for image in images[index * count :][:seeds]
    )
    figure = Image.new("RGB", (width, head + len(chosen) * (line + tall) + between), PAPER)
    draw = ImageDraw.Draw(figure)
    for number, lines in enumerate(titles):
        x = between + number * (block + between)
        draw.text((x, between // 2), "\n".join(lines), INK, big)
    for number, index in enumerate(chosen):
        category, prompt = prompts[index]
        y = head + number * (line + tall)
        kind = f"{CATEGORIES[category].title.lower()}: {CATEGORIES[category].wish}"
        end = width - between - small.getlength(kind)
        prompt = fit_text(f"“{prompt}”", small, end - 2 * between)
        draw.text((between, y + line // 3), prompt, INK, small)
        draw.text((end, y + line // 3), kind, QUIET, small)
        for column, (_, images) in enumerate(columns):
            left = between + column * (block + between)
            for offset, image in enumerate(images[index * count :][:seeds]):
                figure.paste(shown(image, side), (left + offset * (side + gap), y + line))
    return figure


# ---- matplotlib ----------------------------------------------------------------------------


ANSWER_COLOURS = {"equivalent": "#2a6b3f", "undecided": "#8492a6"}
DIFFERENT, UNTESTED = "#c4572e", "#8492a6"
ENDS = ("mean", "low", "high")


def forest_panel(axes, rows, labels, margin=1):
    """Draw comparisons as a forest plot: the 95% interval of a row thin, its 90% interval thick, ±`margin` shaded.

    Rows are from `comparison.answered`; one whose answer is None was not tested and is dotted.
    """
    axes.axvspan(-margin, margin, color="#e4ede6", zorder=0)
    axes.axvline(0, color="#888888", linewidth=1)
    for y, row in enumerate(rows):
        colour = ANSWER_COLOURS.get(row["answer"], DIFFERENT) if row["answer"] else UNTESTED
        if math.isfinite(row["low"]):
            style = "-" if row["answer"] else ":"
            axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.2, linestyle=style)
            if row["answer"]:
                inner = row["equivalence"]
                axes.plot([inner["low"], inner["high"]], [y, y], color=colour, linewidth=3.5)
        axes.plot(row["mean"], y, "o", color=colour, markersize=5)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.locator_params(axis="x", nbins=6)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)


def distribution_figure(run, prompts):
    """The scores of every image, base and LoRA, a row a prompt and a panel a metric; of very many prompts only those of
    `bounded`."""
    rows, all_prompts, prompts = run.rows, prompts, [prompts[index] for index in bounded(prompts)]
    keys = [key for key, metric in METRICS.items() if metric.scorer and metric.shown and rows[1].get(key) is not None]
    figure = empty_figure(9, 1.1 + 0.62 * len(prompts), dpi=110)
    panels = np.atleast_1d(figure.subplots(1, len(keys), sharey=True))
    for axes, key in zip(panels, keys, strict=True):
        for y, (_, prompt) in enumerate(prompts):
            for model, colour, shift in (("base", "#8492a6", -0.13), ("lora", "#c4572e", 0.13)):
                values = [r[key] for r in rows if r["prompt"] == prompt and r["model"] == model]
                values = [value for value in values if value is not None]
                axes.plot(values, [y + shift] * len(values), "o", color=colour, alpha=0.55, markersize=5)
        axes.set_title(METRICS[key].name + ("" if METRICS[key].kind == DIFFERENCE else ", base to LoRA"), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    labels = [prompt if len(prompt) < 40 else prompt[:38] + "…" for _, prompt in prompts]
    panels[0].set_yticks(range(len(prompts)), labels, fontsize=8)
    panels[0].invert_yaxis()
    left_out = f"; {len(prompts)} of {len(all_prompts)} prompts" if len(prompts) < len(all_prompts) else ""
    figure.supxlabel(f"grey: base, red: LoRA; one dot a seed{left_out}", fontsize=9)
    return figure


COLOURS = ("#2f5ea8", "#c4572e", "#2a6b3f", "#8a4fae", "#b8860b", "#4a4f59")
ADVISED = "#2a6b3f"


@dataclass
class Curve:
    """A chart of swept measures over steps or scales."""

    title: str
    measures: dict  # {measure: its name in the legend}
    base: float = 0.0  # their value at the base model


def all_curves():
    """A Curve of each measure that is swept, and of the held-out loss."""
    curves = [
        Curve(title, {f"{key} {category}": CATEGORIES[category].noun for category in categories}, metric.unchanged)
        for key, metric in METRICS.items()
        for categories, title in metric.swept.items()
    ]
    held_out = Curve("Held-out loss minus its value before training, interval over the images", {"held_out": "images"})
    return [*curves, held_out]


def curve_lines(curve, rows, over):
    """The lines of a Curve over "step" or "scale", one for each measure and each value of the other: [(label,
    [(place, interval)])]."""
    other = {"step": "scale", "scale": "step"}[over]
    groups = list(dict.fromkeys(row[other] for row in rows if row["scale"]))
    lines = []
    for group in groups:
        for key, name in curve.measures.items():
            parts = [name] if len(groups) == 1 or len(curve.measures) > 1 else []
            parts += [f"{other} {group:g}"] if len(groups) > 1 else []
            line = [(row[over], row[key]) for row in rows if row[other] == group and key in row and row["scale"]]
            lines.append((", ".join(parts), line))
    return [(label, line) for label, line in lines if line]


def curve_figure(curve, sweep):
    """A Curve over the steps, a line a scale, or over the scales if there is one step; None if nothing was measured.

    Each line starts at the base model's value at 0; a dashed line marks the advised point.
    """
    over = "step" if len({row["step"] for row in sweep["rows"]}) > 1 else "scale"
    lines = curve_lines(curve, sweep["rows"], over)
    if not lines:
        return None
    figure = empty_figure(4.6, 3.1, dpi=130)
    axes = figure.subplots()
    width = max(place for _, line in lines for place, _ in line)
    for number, (label, line) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        shift = 0.012 * width * (number - (len(lines) - 1) / 2)  # intervals beside one another
        places = [place + shift for place, _ in line]
        means, lows, highs = ([interval[end] for _, interval in line] for end in ENDS)
        axes.plot([0, *places], [curve.base, *means], color=colour, linewidth=1.5, label=label)
        axes.plot(places, means, "o", color=colour, markersize=4)
        axes.vlines(places, lows, highs, color=colour, linewidth=1.2, alpha=0.6)
    axes.axhline(curve.base, color="#888888", linewidth=0.8, zorder=0)
    if chosen := chosen_point(sweep):
        axes.axvline(getattr(chosen, over), color=ADVISED, linewidth=1.2, linestyle="--", zorder=0)
    axes.set_title(curve.title, fontsize=8.5, loc="left")
    axes.set_xlabel({"step": "training steps", "scale": "scale of the adapter"}[over], fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if len(lines) > 1:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.3 * (high - low))  # room for the legend above the lines
        axes.legend(framealpha=1, edgecolor="none", fontsize=7.5, loc="upper left", ncols=2)
    return figure


# ---- bars: rows of a page with their places ------------------------------------------------


def placed(rows):
    """`rows` with `style`, the positions of their parts as CSS properties, on one common scale.

    A row has `mean`, `low` and `high` (not finite without an interval), and `band`, the values that count as no effect,
    or `threshold`. The scale includes all of them and 0.
    """
    values = [0.0]
    for row in rows:
        values += [*(row[end] for end in ENDS), *row.get("band", ()), row.get("threshold", 0.0)]
    values = [value for value in values if math.isfinite(value)]
    least, most = min(values), max(values)
    room = 0.04 * (most - least)
    least, most = least - room, most + room

    def at(value):
        return 100 * (value - least) / (most - least)

    def part(name, low, high):
        return f"--{name}-at: {at(low):.2f}%; --{name}-width: {at(high) - at(low):.2f}%"

    with_style = []
    for row in rows:
        known = math.isfinite(row["low"])
        ends = (row["low"], row["high"]) if known else (row["mean"], row["mean"])
        style = [part("range", *ends), f"--zero: {at(0):.2f}%", f"--mean: {at(row['mean']):.2f}%"]
        if "band" in row:
            style.append(part("band", *row["band"]))
        if "threshold" in row:
            style.append(f"--threshold: {at(row['threshold']):.2f}%")
        with_style.append(row | dict(style="; ".join(style)))
    return with_style


def verdict_bars(summaries):
    """{question: {experiment: row}}: the interval that each verdict rests on, with a label and its figures.

    `summaries` is {experiment: summary}. All experiments and all questions of one metric share a scale, so that the
    bars show how much of the concept went where.
    """
    rows = [dict(row, name=name) for name, summary in summaries.items() for row in rows_of(summary)]
    bars = {}
    for scale in dict.fromkeys(row["scale"] for row in rows):
        for row in placed([row for row in rows if row["scale"] == scale]):
            bars.setdefault(row["question"], {})[row["name"]] = row
    return bars


def rows_of(summary):
    """The rows of `verdict_bars` for one summary, before they are placed; rows with the same `scale` share a scale."""
    margins, totals = summary["margins"], summary["categories"]
    rows = []
    for key, metric in METRICS.items():
        for question in metric.questions:
            interval = totals.get(question.category, {}).get(key)
            if interval and key in margins:
                above = margins[key] if metric.kind == DIFFERENCE else 0
                rows.append(
                    dict(
                        question=question.name,
                        scale=key,
                        band=(metric.unchanged - margins[key], metric.unchanged + above),
                        label=question.bar.format(training=training_name(summary)),
                        text=interval_text(interval, metric.signed),
                        **ends(interval),
                    )
                )
    copies = summary.get("memorised")
    if copies and copies["share"] is not None:
        share, high = copies["share"], copies["high"]
        rows.append(
            dict(
                question=MEMORISED.name,
                scale=MEMORISED.name,
                band=(0, copies["margin"]),
                label=MEMORISED.bar,
                text=f"{share:.0%}, at most {high:.0%}",
                mean=share,
                low=share,
                high=high,
            )
        )
    return rows


def ends(interval):
    """The mean and bounds of an interval."""
    return {end: interval[end] for end in ENDS}


def difference_bar(row, label, relative=True):
    """A comparison as a row for `placed`: its margin is the band, and the unit if `relative`."""
    margin, unit = row["margin"], row["margin"] if relative else 1
    return {end: row[end] / unit for end in ENDS} | dict(
        label=label, answer=row["answer"] or "", text=interval_text(row), band=(-margin / unit, margin / unit)
    )


def forest_bars(pairs):
    """[(title, rows)]: the differences of each two experiments as bars in units of their margins."""
    rows = []
    for pair in pairs:
        title, answer = f"{pair['second']} minus {pair['first']}", pair["answer"]
        if "level" in pair:
            title += ", these adapters as they are"
        if "files" in pair:
            answer += f" (as they are: {pair['files']['answer']})"
        row = difference_bar(pair, f"{metric_name(pair['metric'])}, {pair['category']} prompts")
        rows.append(row | dict(title=title, answer=answer, kind=pair["answer"]))
    groups = {}
    for row in placed(rows) if rows else ():
        groups.setdefault(row["title"], []).append(row)
    return list(groups.items())
