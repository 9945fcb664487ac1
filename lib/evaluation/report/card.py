"""What an evaluation puts into an adapter's model card: images with their prompts, and verdicts."""

from concurrent.futures import ThreadPoolExecutor

from lib.adapter_files.model_card import code, update_card
from lib.evaluation.report import words
from lib.images import webp
from lib.models import base_model_name


def update_model_card(run, summary, shown):
    """Write the evaluation of `run`, whose verdicts are in `summary`, into the card in its adapter's
    folder; nothing where its images were not drawn now.

    `shown` is what all pages say. Of each prompt the first seed's images are shown.
    """
    if run.folder is None:
        return
    prompts, seeds, config = shown["prompts"], shown["seeds"], shown["config"]
    files, widget, rows = {}, [], ["| prompt | base model | with the adapter |", "|---|---|---|"]
    for index, (category, prompt) in enumerate(prompts):
        names = [f"samples/{index + 1:02}_{kind}.webp" for kind in ("base", "lora")]
        for name, images in zip(names, (run.base, run.lora), strict=True):
            files[name] = images[index * len(seeds)]
        widget.append(dict(text=prompt, output=dict(url=names[1])))
        pictures = " | ".join(f"![{kind}]({name})" for kind, name in zip(("base", "adapter"), names, strict=True))
        rows.append(f"| {code(prompt).replace('|', '/')} ({category}) | {pictures} |")
    with ThreadPoolExecutor() as pool:
        files = dict(zip(files, pool.map(webp, files.values()), strict=True))
    how = (
        f"Seed {seeds[0]} of each prompt, from the same noise in both columns: {config['steps']} steps, guidance "
        f"{config['guidance_scale']:g}, {config['resolution']} pixels, {base_model_name(config['base_model'])}."
    )
    section = "\n".join(
        [
            "## Samples",
            "",
            how,
            "",
            *rows,
            "",
            "## What it learned and what it spoiled",
            "",
            words.verdict_text(summary),
            "",
            words.spread_text(summary),
        ]
    )
    update_card(run.folder, section, widget, files)
