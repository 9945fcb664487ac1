"""An evaluation's part of the adapter's model card: images with their prompts, and verdicts."""

import re
from concurrent.futures import ThreadPoolExecutor

from lib.adapter_files.model_card import CARD, code, update_card
from lib.evaluation.prompts import bounded
from lib.evaluation.report import words
from lib.images import webp
from lib.models import base_model_name

EXTENT = "<!-- {} prompts, {} sampling seeds -->"  # in the card: the extent of its evaluation


def update_model_card(run, summary, shown):
    """Writes the evaluation of `run` into the model card in its adapter's folder, with each prompt's first image (of very
    many prompts, those of `bounded`).

    Nothing is written if the images were not generated now. A card with an evaluation of more prompts or sampling
    seeds stays as it is, with a note, unless `overwrite` is set. `shown` as for `run_page`.
    """
    if run.folder is None:
        return
    prompts, seeds, config = shown["prompts"], shown["seeds"], shown["config"]
    earlier, extent = card_extent(run.folder), (len(prompts), len(seeds))
    if any(before > now for before, now in zip(earlier, extent, strict=True)) and not config["overwrite"]:
        print(
            f"note: the model card of {run.name} keeps its evaluation of {earlier[0]} prompts and {earlier[1]} sampling "
            f"seeds; this one has {extent[0]} and {extent[1]} (--overwrite replaces it)"
        )
        return
    files, widget, rows = {}, [], ["| prompt | base model | with the adapter |", "|---|---|---|"]
    chosen = bounded(prompts)
    for index in chosen:
        category, prompt = prompts[index]
        names = [f"samples/{index + 1:02}_{kind}.webp" for kind in ("base", "lora")]
        for name, images in zip(names, (run.base, run.lora), strict=True):
            files[name] = images[index * len(seeds)]
        widget.append(dict(text=prompt, output=dict(url=names[1])))
        cells = " | ".join(f"![{kind}]({name})" for kind, name in zip(("base", "adapter"), names, strict=True))
        rows.append(f"| {code(prompt).replace('|', '/')} ({category}) | {cells} |")
    with ThreadPoolExecutor() as pool:
        files = dict(zip(files, pool.map(webp, files.values()), strict=True))
    few = f" {len(chosen)} of {len(prompts)} prompts are shown." if len(chosen) < len(prompts) else ""
    settings = (
        f"Seed {seeds[0]} of each prompt, from the same noise in both columns: {config['steps']} steps, guidance "
        f"{config['guidance_scale']:g}, {config['resolution']} pixels, {base_model_name(config['base_model'])}.{few}"
    )
    parts = [
        EXTENT.format(*extent),
        "## Samples",
        settings,
        "\n".join(rows),
        "## What it learned and what it spoiled",
        words.verdict_text(summary),
        words.spread_text(summary),
    ]
    update_card(run.folder, "\n\n".join(parts), widget, files)


def card_extent(folder):
    """(prompts, sampling seeds) of the evaluation in the model card of an adapter's folder; (0, 0) if there is none."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return 0, 0
    match = re.search(EXTENT.format(r"(\d+)", r"(\d+)"), text)
    return tuple(map(int, match.groups())) if match else (0, 0)
