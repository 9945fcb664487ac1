"""How much of the adapter: the concept gained against other prompts moved, over its scale."""

from lib.evaluation.effects import effects
from lib.evaluation.prompts import members
from lib.evaluation.statistics import mean_interval

# What the sweep over the adapter's scale shows.
SWEPT = (
    ("concept_similarity", "success"),
    ("clip", "success"),
    ("change", "near"),
    ("change", "failure"),
)


def sweep_summary(sweep, prompts, base_pairs):
    """The trade-off over the adapter's scale: dict(rows, advice).

    `sweep` is {scale: Run}, scored. A row holds `scale` and, under (score, category) joined by a blank,
    each of SWEPT with its interval: differences to the base of the concept and the match, and how far
    near and failure prompts moved.
    """
    rows = []
    for scale, run in sorted(sweep.items()):
        found = effects([run], prompts, base_pairs)
        rows.append(dict(scale=scale))
        for key, category in SWEPT:
            chosen = members(prompts, category)
            if key in found and chosen:
                values = found[key][:, chosen].mean(axis=1)
                rows[-1][f"{key} {category}"] = mean_interval(values)
    return dict(rows=rows, advice=advice_text(rows))


def advice_text(rows):
    """Which scale is enough, and what it costs, as a sentence."""
    concept = "concept_similarity success"
    if not all(concept in row for row in rows):
        return "The concept was not measured, so no scale is suggested."
    gain = max(row[concept]["mean"] for row in rows)
    if gain <= 0:
        return "No scale moves the success prompts toward the training pictures."
    enough = next(row for row in rows if row[concept]["mean"] >= 0.9 * gain)
    advice = (f"Scale {enough['scale']:g} is the smallest that keeps nine tenths of the greatest gain in "
              f"concept similarity ({enough[concept]['mean']:.3f} of {gain:.3f})")  # fmt: skip
    for category, name in (("near", "prompts near the concept"), ("failure", "unrelated prompts")):
        key = f"change {category}"
        if key in enough:
            advice += (f"; {name} move {enough[key]['mean']:.0%} of the way to another picture there, "
                       f"{rows[-1][key]['mean']:.0%} at scale {rows[-1]['scale']:g}")  # fmt: skip
    return advice + "."
