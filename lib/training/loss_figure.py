"""The loss curve of a run: loss.png."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

matplotlib.rcParams["text.parse_math"] = False  # a run's name may hold dollar signs

HELD_OUT, TRAINED, RAW = "#c4572e", "#2f5ea8", "#b9c4d6"


def loss_figure(log, title):
    """A matplotlib figure of a training log: held-out loss, training loss and learning rate over steps.

    `log` is the list of rows of log.jsonl. The held-out loss, at fixed noise and timesteps, is the one to
    look at, and its lowest point is marked. The training loss depends mostly on the timesteps that were
    drawn: its running mean is drawn over it.
    """
    held_out = [(r["step"], r["validation_loss"]) for r in log if "validation_loss" in r]
    trained = [row for row in log if "loss" in row]
    figure = Figure(figsize=(8, 7 if held_out else 5), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=12)
    heights = [3, 2, 1] if held_out else [3, 1]
    panels = list(figure.subplots(len(heights), height_ratios=heights, sharex=True))
    if held_out:
        draw_held_out(panels[0], held_out)
    draw_trained(panels[-2], trained)
    panels[-1].plot([r["step"] for r in trained], [r["learning_rate"] for r in trained], color="#555555")
    panels[-1].set(xlabel="step", ylabel="learning rate")
    panels[-1].set_ylim(bottom=0)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def draw_held_out(axes, held_out):
    """The held-out loss with its lowest point, over a range of its own: it may change by little."""
    steps, losses = zip(*held_out, strict=True)
    step, lowest = min(held_out, key=lambda pair: pair[1])
    axes.plot(steps, losses, "o-", color=HELD_OUT, markersize=4, linewidth=1.8)
    axes.plot(step, lowest, "o", markersize=13, markerfacecolor="none", markeredgecolor=HELD_OUT, markeredgewidth=1.6)
    # Below the curve, where nothing else is, and on the side that has room.
    right = step - steps[0] > (steps[-1] - steps[0]) / 2
    axes.annotate(
        f"lowest: {lowest:.4f} after step {step:,}",
        (step, lowest),
        (0, -16),
        textcoords="offset points",
        ha="right" if right else "left",
        va="top",
        color=HELD_OUT,
    )
    axes.margins(y=0.22)
    axes.set(ylabel="held-out loss")
    axes.set_title("loss of held-out images, at fixed noise and timesteps", fontsize=9, loc="left")


def draw_trained(axes, trained):
    """The training loss and its running mean."""
    steps, losses = [r["step"] for r in trained], [r["loss"] for r in trained]
    kernel = np.ones(max(min(5, len(losses)), len(losses) // 20))
    running = np.convolve(losses, kernel, "same") / np.convolve(np.ones(len(losses)), kernel, "same")
    axes.plot(steps, losses, color=RAW, linewidth=0.8, label="training loss")
    axes.plot(steps, running, color=TRAINED, linewidth=1.8, label="its running mean")
    axes.set(ylabel="training loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, ncols=2)
