"""Charts of the study (matplotlib)."""

import itertools

import numpy as np

from lib.evaluation.prompts import members
from lib.evaluation.report.charts import forest_panel
from lib.images import empty_figure
from lib.study.measures import NOT_ASKED, adapters, change_and_movement, lpips_and_movement
from lib.study.words import arm_name

# One per arm, for readers with red-green colour blindness too (Okabe and Ito's, on white).
COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#0072b2", "#7f7f7f")
MOVED = "moved toward the concept (cosine)"
CHANGE = "change (share of the way to another image)"


def colours(arms):
    return dict(zip(arms, itertools.cycle(COLOURS), strict=False))


def tidy(axes, title, x="", y=""):
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def two_panels(height):
    """A figure with a panel for near and one for unrelated prompts: (figure, [(category, axes)])."""
    figure = empty_figure(9.6, height, dpi=120)
    return figure, list(zip(NOT_ASKED, figure.subplots(1, 2), strict=True))


def legend_below(figure, axes):
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def forest_figure(questions):
    """Every arm minus rank 32: a forest plot per question, on one sheet. `questions` are from `page.forests`."""
    lines = -(-len(questions) // 2)
    figure = empty_figure(9.6, 2.1 * lines + 0.5, dpi=120)
    panels = np.atleast_1d(figure.subplots(lines, 2)).ravel()
    for axes, question in zip(panels, questions, strict=False):
        rows = question["rows"]
        forest_panel(axes, rows, [arm_name(row["arm"]) for row in rows], question["margin"])
        tidy(axes, question["title"])
    for axes in panels[len(questions) :]:
        axes.set_visible(False)
    figure.supxlabel(
        "difference to rank 32; thin 95%, thick 90% interval; shaded: the margin. green: equivalent, red: higher or "
        "lower,\ngrey: undecided; dotted: not tested, as no claim rests on it",
        fontsize=8,
    )
    return figure


def trade_off_figure(runs):
    """Concept against bleeding into other prompts, one point a run. `runs` are from `page.run_rows`."""
    figure, panels = two_panels(4.2)
    for category, axes in panels:
        for arm, colour in colours(dict.fromkeys(run["arm"] for run in runs)).items():
            own = [run for run in runs if run["arm"] == arm]
            x, y = ([run[f"concept_similarity {c}"] for run in own] for c in ("success", category))
            axes.plot(x, y, "o", color=colour, markersize=5, alpha=0.75, label=arm_name(arm))
        axes.axhline(0, color="#888888", linewidth=0.8, zorder=0)
        axes.margins(0.08)
        tidy(axes, f"{category} prompts: bleeding", f"success prompts {MOVED}", MOVED)
    legend_below(figure, axes)
    return figure


def scales_figure(lines, level):
    """Change against the concept gained, over the scales of two arms: a thin line per training seed, a thick one for
    their mean. `lines` are {arm: `curves`}; `level` is where the arms are compared, or None."""
    figure, panels = two_panels(4.0)
    for category, axes in panels:
        for (arm, curve), colour in zip(lines.items(), ("#000000", "#d55e00"), strict=True):
            x, y = curve["concept_similarity", "success"], curve["change", category]
            axes.plot(x.T, y.T, color=colour, linewidth=0.7, alpha=0.3)
            axes.plot(x.mean(0), y.mean(0), "o-", color=colour, linewidth=2, markersize=4, label=arm_name(arm))
        if level is not None:
            axes.axvline(level, color="#2a6b3f", linestyle="--", linewidth=1, label="compared here")
        tidy(axes, f"{category} prompts: change", "concept similarity gained, success prompts", CHANGE)
    legend_below(figure, axes)
    return figure


def change_figure(study, correlations):
    """Movement toward the concept against change, one point an adapter and prompt. `correlations` are {category: its
    interval as text}."""
    figure, panels = two_panels(4.4)
    arms, groups = zip(*adapters(study), strict=True)
    for category, axes in panels:
        chosen = members(study.prompts, category)
        change, movement = change_and_movement(*lpips_and_movement(study, groups, chosen), study.base_pairs[chosen])
        for arm, colour in colours(study.arms).items():
            own = [index for index, name in enumerate(arms) if name == arm]
            x, y = change[:, own].ravel(), movement[:, own].ravel()
            axes.plot(x, y, "o", color=colour, markersize=3, alpha=0.45, label=arm_name(arm))
        axes.axhline(0, color="#888888", linewidth=0.8, zorder=0)
        tidy(axes, f"{category} prompts: rank correlation {correlations[category]}", CHANGE, MOVED)
    legend_below(figure, axes)
    return figure
