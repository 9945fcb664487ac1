"""What people look at beside an evaluation: contact sheets and the loss curve."""

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
