"""The page that says which snapshot or scale of an adapter to take: pictures, advice, curves, tables."""

from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lib.evaluation import pages, words
from lib.evaluation.points import Point
from lib.evaluation.sweep import grid_table
from lib.pictures import strip

matplotlib.rcParams["text.parse_math"] = False  # a run's name may hold dollar signs

COLOURS = ("#2f5ea8", "#c4572e", "#2a6b3f", "#8a4fae", "#b8860b", "#4a4f59")
GREEN = "#2a6b3f"


@dataclass
class Curve:
    """One panel: measures of `sweep.SWEPT` over steps or scales, and their value at the base model."""

    title: str
    measures: dict  # {measure: its name in the legend}
    base: float = 0.0


CURVES = (
    Curve("Concept gained: similarity to the training pictures", {"concept_similarity success": "success prompts"}),
    Curve("Match with the prompt: CLIP score against the base's", {"clip success": "success prompts"}),
    Curve(
        "Contamination: others moved toward the training pictures",
        {"concept_similarity near": "near prompts", "concept_similarity failure": "unrelated prompts"},
    ),
    Curve(
        "Change: others moved in any direction", {"change near": "near prompts", "change failure": "unrelated prompts"}
    ),
    Curve("Diversity: variety over the seeds, the base's is 1", {"variety success": "success prompts"}, 1.0),
    Curve(
        "Nearest copy: similarity to one training picture against the base's",
        {"nearest_similarity success": "success prompts"},
    ),
    Curve("Held-out loss against before training, interval over the pictures", {"held_out": "held-out pictures"}),
)


def write(run, sweep, shown, folder):
    """Write a run's sweep into `folder`: sweep_pictures.png, curves.png and choose.html."""
    labels = strip_labels(run)
    count = len(shown["seeds"])
    firsts = {label: images[::count] for label, images in labels.values()}
    strip(firsts, [prompt for _, prompt in shown["prompts"]]).save(folder / "sweep_pictures.png")
    curves_figure(sweep, run.name).savefig(folder / "curves.png")
    page = choose_page(run, sweep, shown, labels)
    (folder / "choose.html").write_text(page, encoding="utf-8")


def strip_labels(run):
    """{Point or None for the base: (label, pictures)} of a run, in order."""
    found = {None: ("base", run.base)}
    found |= {point: (str(point), images) for point, images in sorted(run.points.items()) if point.scale}
    return found


def chosen_point(sweep):
    """The Point that is advised, or None."""
    chosen = sweep["choice"] and sweep["choice"]["chosen"]
    return Point(chosen["step"], chosen["scale"]) if chosen and chosen["scale"] else None


def choose_page(run, sweep, shown, labels):
    """The page as HTML."""
    chosen, count = chosen_point(sweep), len(shown["seeds"])
    strips = [
        dict(
            category=category,
            prompt=prompt,
            seed=shown["seeds"][0],
            cards=[
                dict(
                    uri=pages.image_uri(images[index * count], 256),
                    label=label,
                    taken=point == chosen and point is not None,
                )
                for point, (label, images) in labels.items()
            ],
        )
        for index, (category, prompt) in enumerate(shown["prompts"])
    ]
    found = [(curve, curve_figure(curve, sweep)) for curve in CURVES]
    return pages.TEMPLATES.get_template("choose.html").render(
        title=run.name,
        strips=strips,
        advice=sweep["advice"].partition(". ")[::2],
        speaks_of=words.spread_text(dict(runs=[run.name], seeds=count)),
        warnings=shown["warnings"],
        marked=chosen is not None,
        curves=[dict(uri=pages.figure_uri(figure), alt=curve.title) for curve, figure in found if figure],
        grid=grid_table(sweep["rows"]),
        table=words.sweep_table(sweep["rows"]),
        explained=words.SWEEP_EXPLAINED,
        details=pages.details_text(shown, {run.name: run.adapter}),
    )


def curve_figure(curve, sweep):
    """One Curve as a figure of its own, or None where nothing of it was measured."""
    figure = Figure(figsize=(4.6, 3.1), dpi=130, layout="constrained")
    return figure if draw_curve(figure.subplots(), curve, sweep) else None


def curves_figure(sweep, title):
    """All curves on one sheet."""
    known = [c for c in CURVES if any(key in row for row in sweep["rows"] for key in c.measures)]
    lines = -(-len(known) // 2)
    figure = Figure(figsize=(9.4, 0.4 + 3 * lines), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = np.atleast_1d(figure.subplots(lines, 2)).ravel()
    for axes, curve in zip(panels, known, strict=False):
        draw_curve(axes, curve, sweep)
    for axes in panels[len(known) :]:
        axes.set_visible(False)
    return figure


def lines_of(curve, rows, over):
    """[(label, rows)] of a Curve over "step" or "scale": a line for each measure and value of the other."""
    other = {"step": "scale", "scale": "step"}[over]
    groups = list(dict.fromkeys(row[other] for row in rows if row["scale"]))
    found = []
    for group in groups:
        for key, name in curve.measures.items():
            parts = [name] if len(groups) == 1 or len(curve.measures) > 1 else []
            parts += [f"{other} {group:g}"] if len(groups) > 1 else []
            line = [row for row in rows if row[other] == group and key in row and row["scale"]]
            found.append((", ".join(parts), [(row[over], row[key]) for row in line]))
    return [(label, line) for label, line in found if line]


def draw_curve(axes, curve, sweep):
    """Draw a Curve over the steps, a line a scale, or over the scales where there is one step; returns
    whether any of it was measured."""
    over = "step" if len({row["step"] for row in sweep["rows"]}) > 1 else "scale"
    lines = lines_of(curve, sweep["rows"], over)
    if not lines:
        return False
    width = max(place for _, line in lines for place, _ in line)
    for number, (label, line) in enumerate(lines):
        # Beside one another, so that each interval is seen.
        shift = 0.012 * width * (number - (len(lines) - 1) / 2)
        draw_line(axes, line, shift, curve.base, COLOURS[number % len(COLOURS)], label)
    axes.axhline(curve.base, color="#888888", linewidth=0.8, zorder=0)
    chosen = chosen_point(sweep)
    if chosen:
        axes.axvline(getattr(chosen, over), color=GREEN, linewidth=1.2, linestyle="--", zorder=0)
    axes.set_title(curve.title, fontsize=8.5, loc="left")
    axes.set_xlabel({"step": "training steps", "scale": "scale of the adapter"}[over], fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.3 * (high - low))  # room for the legend above the lines
        # Over the line of the chosen step, which may run through it.
        axes.legend(framealpha=1, edgecolor="none", fontsize=7.5, loc="upper left", ncols=2)
    return True


def draw_line(axes, line, shift, base, colour, label):
    """A line through means with their intervals, [(place, interval)], from the base model at 0."""
    places = [place + shift for place, _ in line]
    means, lows, highs = ([interval[k] for _, interval in line] for k in ("mean", "low", "high"))
    axes.plot(
        [0, *places],
        [base, *means],
        color=colour,
        linewidth=1.5,
        marker="o",
        markersize=4,
        markevery=slice(1, None),
        label=label,
    )
    axes.vlines(places, lows, highs, color=colour, linewidth=1.2, alpha=0.6)
