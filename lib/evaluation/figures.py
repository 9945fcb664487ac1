"""Figures of an evaluation: sheets of pictures (PIL) and charts (matplotlib)."""

import math

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from lib.evaluation.sentences import CATEGORY_TITLES
from lib.evaluation.words import NAMES
from lib.pictures import INK, PAPER, QUIET, fit_text, height_at, shown

matplotlib.rcParams["text.parse_math"] = False  # a prompt may hold dollar signs


def comparison_figure(rows, title, pairs, side=256):
    """Base and LoRA side by side: a row a prompt, `pairs` seeds in it, as one PIL picture.

    `rows` are dicts with `prompt`, `category`, and `base` and `lora`, lists of PIL pictures; `side` is
    the width of each in pixels. Rows of more than four pairs are wrapped, so that a picture stays large
    enough to see.
    """
    big, small = ImageFont.load_default(22), ImageFont.load_default(15)
    gap, between, head = 6, 22, 54
    a_line = min(pairs, 4)
    lines = -(-pairs // a_line)
    width = a_line * (2 * side + gap + between) + between
    tall = max(height_at(image, side) for row in rows for image in row["base"] + row["lora"])
    height = head + len(rows) * (lines * (tall + gap) + 34) + between
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
            top = y + index // a_line * (tall + gap)
            for offset, image in ((0, row["base"][index]), (side + gap, row["lora"][index])):
                figure.paste(shown(image, side), (x + offset, top))
        y += lines * (tall + gap) + 10
    return figure


# How many prompts of each category stand for a run: five in all.
OVERVIEW = {"success": 2, "near": 1, "failure": 2}


def overview_figure(rows, pairs=3, side=256):
    """What an adapter changed, to be read without a word more: on the left pictures of the base
    model, on the right those of the same noise with the adapter; a row a prompt. A PIL picture.

    `rows` are as for `comparison_figure`; the first OVERVIEW prompts of each category are shown,
    with `pairs` seeds each, `side` pixels wide. The letters stay readable at half its size, as a README
    shows it.
    """
    big, small = ImageFont.load_default(side // 7), ImageFont.load_default(side // 9)
    gap, between = side // 40, side // 6
    block = pairs * (side + gap) - gap
    head, line = 2 * between, side // 4
    chosen = [
        row
        for category, most in OVERVIEW.items()
        for row in [row for row in rows if row["category"] == category][:most]
    ]
    width = 2 * block + 3 * between
    tall = max(height_at(image, side) for row in chosen for image in row["base"] + row["lora"])
    figure = Image.new("RGB", (width, head + len(chosen) * (line + tall) + between), PAPER)
    draw = ImageDraw.Draw(figure)
    right = 2 * between + block
    for x, text in ((between, "Base model"), (right, "The same noise, with the LoRA")):
        draw.text((x, between // 2), fit_text(text, big, block), INK, big)
    for number, row in enumerate(chosen):
        y = head + number * (line + tall)
        kind = CATEGORY_TITLES[row["category"]].lower()
        end = width - between - small.getlength(kind)
        prompt = fit_text(f"“{row['prompt']}”", small, end - 2 * between)
        draw.text((between, y + line // 3), prompt, INK, small)
        draw.text((end, y + line // 3), kind, QUIET, small)
        y += line
        for left, images in ((between, row["base"]), (right, row["lora"])):
            for index, image in enumerate(images[:pairs]):
                figure.paste(shown(image, side), (left + index * (side + gap), y))
    return figure


ANSWER_COLOURS = {"equivalent": "#2a6b3f", "undecided": "#8492a6"}  # else the one of a difference


def forest_figure(pairs):
    """A matplotlib forest plot: each difference of two experiments with its 95% interval, around 0,
    in units of its margin, whose band is shaded."""
    figure = Figure(figsize=(9, 1.4 + 0.36 * max(len(pairs), 1)), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-1, 1, color="#e4ede6", zorder=0)
    axes.axvline(0, color="#888888", linewidth=1)
    for y, row in enumerate(pairs):
        colour = ANSWER_COLOURS.get(row["answer"], "#c4572e")
        mean, low, high = (row[key] / row["margin"] for key in ("mean", "low", "high"))
        if math.isfinite(low):
            axes.plot([low, high], [y, y], color=colour, linewidth=2)
        axes.plot(mean, y, "o", color=colour, markersize=6)
    labels = [
        f"{NAMES[r['metric']]} (±{r['margin']:g}), {r['category']}: {r['second']} − {r['first']}"
        for r in pairs
    ]
    axes.set_yticks(range(len(pairs)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(
        "difference in units of its margin (shaded), with its 95% interval\n"
        "red: higher or lower; green: equivalent; grey: undecided"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    return figure


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
