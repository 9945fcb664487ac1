"""Charts of the study (matplotlib)."""

import itertools

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lib.evaluation.report.charts import ANSWER_COLOURS
from lib.study.measures import adapters, change_and_movement
from lib.study.words import CATEGORY_NAMES, arm_name

matplotlib.rcParams["text.parse_math"] = False

# One an arm, told apart by people who see red and green alike too (Okabe and Ito's, on white).
COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#0072b2", "#7f7f7f")
DIFFERENT, NOT_ASKED = "#c4572e", "#8492a6"
TOWARD = "moved toward the concept (cosine)"


def colours(arms):
    return dict(zip(arms, itertools.cycle(COLOURS), strict=False))


def tidy(axes, title, x, y=None):
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def forest_figure(questions):
    """A forest plot a question, all on one sheet: every arm's difference to rank 32 with its 95% interval (a
    thin line) and its 90% interval (thick), sorted, the margin a band."""
    lines = -(-len(questions) // 2)
    figure = Figure(figsize=(9.6, 2.1 * lines + 0.5), dpi=120, layout="constrained")
    panels = np.atleast_1d(figure.subplots(lines, 2)).ravel()
    for axes, question in zip(panels, questions, strict=False):
        margin, rows = question["margin"], question["rows"]
        axes.axvspan(-margin, margin, color="#e4ede6", zorder=0)
        axes.axvline(0, color="#888888", linewidth=1)
        for y, row in enumerate(rows):
            colour = ANSWER_COLOURS.get(row["answer"], DIFFERENT if row["answer"] else NOT_ASKED)
            inner, line = row["equivalence"], "-" if row["answer"] else ":"
            axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.2, linestyle=line)
            if row["answer"]:
                axes.plot([inner["low"], inner["high"]], [y, y], color=colour, linewidth=3.5)
            axes.plot(row["mean"], y, "o", color=colour, markersize=5)
        axes.set_yticks(range(len(rows)), [arm_name(row["arm"]) for row in rows], fontsize=8)
        axes.invert_yaxis()
        tidy(axes, question["title"], "")
        axes.spines["left"].set_visible(False)
    for axes in panels[len(questions) :]:
        axes.set_visible(False)
    figure.supxlabel(
        "difference to rank 32; thin 95%, thick 90% interval; shaded: the margin. green: equivalent, red: higher or "
        "lower,\ngrey: undecided; dotted: no claim rests on it, so it was not tested",
        fontsize=8,
    )
    return figure


def trade_off_figure(runs):
    """Concept against contamination: one point a run, one colour an arm; a panel for near and for unrelated
    prompts. `runs` are dicts with arm, and the score of each kind of prompts."""
    figure = Figure(figsize=(9.6, 4.2), dpi=120, layout="constrained")
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    panels = figure.subplots(1, 2)
    for axes, category in zip(panels, ("near", "unrelated"), strict=True):
        for arm, colour in colours(arms).items():
            own = [run for run in runs if run["arm"] == arm]
            x, y = ([run[f"concept_similarity {c}"] for run in own] for c in ("success", category))
            axes.plot(x, y, "o", color=colour, markersize=5, alpha=0.75, label=arm_name(arm))
        axes.axhline(0, color="#888888", linewidth=0.8, zorder=0)
        axes.margins(0.08)
        tidy(axes, f"{CATEGORY_NAMES[category]}: contamination", f"success prompts {TOWARD}", TOWARD)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    return figure


def scales_figure(lines, level):
    """Two arms drawn with more and more of the adapter: what other prompts change against the concept gained,
    a thin line a training seed and a thick one their mean. `lines` are {arm: `curves`}, `level` where they
    are compared, or None."""
    figure = Figure(figsize=(9.6, 4.0), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, category in zip(panels, ("near", "unrelated"), strict=True):
        for (arm, found), colour in zip(lines.items(), ("#000000", "#d55e00"), strict=True):
            x, y = found["concept_similarity", "success"], found["change", category]
            axes.plot(x.T, y.T, color=colour, linewidth=0.7, alpha=0.3)
            axes.plot(x.mean(0), y.mean(0), "o-", color=colour, linewidth=2, markersize=4, label=arm_name(arm))
        if level is not None:
            axes.axvline(level, color="#2a6b3f", linestyle="--", linewidth=1, label="compared here")
        tidy(
            axes,
            f"{CATEGORY_NAMES[category]}: change",
            "concept similarity gained, success prompts",
            "change (share of the way to another image)",
        )
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def change_figure(study, correlations):
    """Change against movement toward the concept: a point an adapter and prompt, its colour the arm's; a panel
    for near and for unrelated prompts. `correlations` are {category: interval in words}."""
    figure = Figure(figsize=(9.6, 4.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    arms = [run.name.rpartition("_seed")[0] for run in (runs[0] for runs in adapters(study))]
    names = [next(arm for arm in study.arms if name.startswith(arm)) for name in arms]
    for axes, category in zip(panels, ("near", "unrelated"), strict=True):
        change, movement = change_and_movement(study, category)
        for arm, colour in colours(study.arms).items():
            own = [index for index, name in enumerate(names) if name == arm]
            axes.plot(
                change[:, own].ravel(),
                movement[:, own].ravel(),
                "o",
                color=colour,
                markersize=3,
                alpha=0.45,
                label=arm_name(arm),
            )
        axes.axhline(0, color="#888888", linewidth=0.8, zorder=0)
        title = f"{CATEGORY_NAMES[category]}: rank correlation {correlations[category]}"
        tidy(axes, title, "change (share of the way to another image)", TOWARD)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    return figure
