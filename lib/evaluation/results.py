"""An evaluation on disk: read back, to be measured again, and written, whole or not at all."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from lib.errors import UserError
from lib.evaluation.choosing import Point
from lib.evaluation.metrics.scores import Run
from lib.evaluation.prompts import CATEGORIES, slugs
from lib.evaluation.report import charts, pages, words
from lib.evaluation.runs import MARKER, check_fingerprints
from lib.files import check_output_folder, fresh_folder, recover_folder, replace_folder, unfinished, write_marker

# What images must share to be compared.
DRAWN_WITH = ("base_model", "revision", "steps", "guidance_scale", "resolution")


def read_saved(output_dir, config):
    """The runs that an earlier evaluation saved in `output_dir` or its subfolders.

    Returns (runs, the configuration they were drawn with, prompts, seeds).
    """
    found = (
        [output_dir]
        if (output_dir / MARKER).is_file()
        else sorted(p.parent for p in output_dir.glob(f"*/{MARKER}") if p.parent.name != "comparison")
    )
    for folder in [folder for folder in found if not (folder / "images").is_dir()]:
        print(f"note: {folder} is passed over, it holds no images")
        found.remove(folder)
    if not found:
        raise UserError(f"{output_dir}: no metrics.json beside images in it or one folder down; nothing to rescore")
    runs, drawn = [], None
    for folder in found:
        try:
            saved = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            prompts = list(dict.fromkeys((r["category"], r["prompt"]) for r in saved["pictures"]))
            seeds = list(dict.fromkeys(row["seed"] for row in saved["pictures"]))
            points = saved_points(saved)
            run = Run(saved["run"], folder, saved["adapter"], [], [])
        except (ValueError, KeyError, TypeError, OSError) as problem:
            raise UserError(f"{folder / 'metrics.json'} cannot be read: {problem}") from None
        if "held_out" not in run.adapter and run.adapter:
            print(
                f"note: {folder} was written before configurations were kept with the results: it counts as "
                "an experiment of its own, and which images it held out is not known"
            )
        how = {key: saved["config"].get(key) for key in DRAWN_WITH}
        if drawn not in (None, (prompts, seeds, how)):
            raise UserError(f"{folder} has other prompts, seeds or settings than {found[0]}; rescore them apart")
        drawn = (prompts, seeds, how)
        run.base, run.lora = (
            [open_image(path) for path in image_paths(folder, prompts, seeds, [kind])] for kind in ("base", "lora")
        )
        run.points = dict.fromkeys(points)
        for point in points:
            if point.scale == 0 or run.is_own(point):
                run.points[point] = run.lora if point.scale else run.base
                continue
            paths = image_paths(folder, prompts, seeds, [point.file_stem])
            run.points[point] = [open_image(path) for path in paths]
        runs.append(run)
    check_fingerprints([(run.target, run.adapter.get("fingerprint")) for run in runs])
    # How they were generated is saved; how they are scored and judged is configured now.
    scoring = {"clip_model", "clip_revision", "data_dir", "output_dir", "rescore"}
    scoring |= {key for key in config if key.endswith("_margin")}
    return runs, config | saved["config"] | {key: config[key] for key in scoring}, prompts, seeds


def saved_points(saved):
    """The points of a metrics.json, a list; those written before snapshots could be looked at name only
    the scales."""
    scales = [float(scale) for scale in saved["config"]["lora_scales"]]
    if "points" not in saved:
        return [Point(None, scale) for scale in scales] if scales != [1.0] else []
    return [Point(step and int(step), float(scale)) for step, scale in saved["points"]]


def image_paths(folder, prompts, seeds, kinds=("base", "lora")):
    """Where the images of each kind lie, kind by kind, prompt by prompt and seed by seed."""
    return [
        folder / "images" / slug / f"{kind}_{seed}.png" for kind in kinds for slug in slugs(prompts) for seed in seeds
    ]


def natural_order(path):
    """A sort key of file names by which 2 comes before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name.lower())]


def read_pair(score_dir, output_dir, prompts):
    """One run from two folders of images that this script did not draw, and numbers for seeds.

    The images of each folder, in the natural order of their names, are those of the prompts in
    order, the same number for each prompt. Where both names of a pair hold numbers, the last ones
    must agree. Raises UserError naming the files that do not.
    """
    check_output_folder(output_dir, MARKER)
    places = [Path(part.strip()) for part in str(score_dir).split(",")]
    if len(places) != 2 or not all(place.is_dir() for place in places):
        raise UserError(f"score_dir {score_dir!r} must be two folders, BASE_FOLDER,LORA_FOLDER")
    endings = (".png", ".jpg", ".jpeg", ".webp")
    files = [sorted((p for p in place.iterdir() if p.suffix.lower() in endings), key=natural_order) for place in places]
    if len(files[0]) != len(files[1]) or not files[0] or len(files[0]) % len(prompts):
        raise UserError(
            f"{places[0]} has {len(files[0])} images and {places[1]} {len(files[1])}; both must "
            f"have the same number, and a multiple of the {len(prompts)} prompts"
        )
    for pair in zip(*files, strict=True):
        numbers = [re.findall(r"\d+", path.stem)[-1:] for path in pair]
        if all(numbers) and int(numbers[0][0]) != int(numbers[1][0]):
            raise UserError(
                f"{pair[0]} would be paired with {pair[1]}, but their numbers differ; name the images "
                "of both folders by the same numbers"
            )
    base, lora = ([open_image(path) for path in paths] for paths in files)
    count = len(base) // len(prompts)
    for index, (a, b, path) in enumerate(zip(base, lora, files[1], strict=True)):
        if a.size != b.size:
            raise UserError(f"{path} is {b.size}, its base image {a.size}; nothing is resized")
        first = index - index % count  # each is compared with the others of its prompt
        if b.size != lora[first].size:
            raise UserError(
                f"{path} is {b.size}, {files[1][first]} of the same prompt {lora[first].size}; nothing is resized"
            )
        if min(b.size) < 32:
            raise UserError(f"{path} is {b.size}, too small for LPIPS, which needs 32 pixels a side")
    run = Run(places[1].name, output_dir, {}, base, lora)
    return [run], list(range(1, count + 1))


def open_image(path):
    """An RGB image; UserError naming the file if it is missing or damaged."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            return image.convert("RGB")
    # A decoder may raise almost anything on a damaged file.
    except Exception as problem:
        raise UserError(f"{path} cannot be read as an image: {problem}") from None


def raw_scores(run, base_pairs):
    """What `effects` needs beside the rows of a run's images, so that metrics.json alone can be judged
    again: {"pairs", "swept"}.

    `pairs` are the LPIPS between images of one prompt at different seeds, {"base", "lora"}: for each
    prompt those of the seeds (0, 1), (0, 2), …, (1, 2), …. `swept` has, of each other point that was
    drawn, its step and scale, its LoRA images' rows and their pairs.
    """
    first, second = np.triu_indices(base_pairs.shape[-1], 1)

    def listed(pairs):
        return pairs[:, first, second].astype(float).round(6).tolist()

    swept = [
        dict(point._asdict(), pictures=[row for row in part.rows if row["model"] == "lora"], pairs=listed(part.pairs))
        for point, part in run.sweep.items()
        if point.scale and not run.is_own(point)
    ]
    return dict(pairs=dict(base=listed(base_pairs), lora=listed(run.pairs)), swept=swept)


def begin_images(runs, prompts, seeds, pool):
    """Begin to write each run's images and sheets into the unfinished folder that `write_run` completes, in the
    threads of `pool`: encoding keeps a core busy, and no lock, so it goes on beside the scoring."""
    count = len(seeds)
    few = min(3, count)

    def write_sheet(place, rows):
        charts.comparison_figure(*rows).save(place)

    def write_overview(place, run):
        columns = [("Base model", run.base), ("The same noise, with the LoRA", run.lora)]
        charts.overview_figure(columns, prompts).save(place, quality=90)

    for run in runs:
        new = fresh_folder(run.target)
        by_prompt = [
            dict(
                category=category,
                prompt=prompt,
                base=run.base[i * count : (i + 1) * count],
                lora=run.lora[i * count : (i + 1) * count],
            )
            for i, (category, prompt) in enumerate(prompts)
        ]
        paths, images = image_paths(new, prompts, seeds), run.base + run.lora
        for point, drawn in run.points.items():
            if point.scale and not run.is_own(point):  # those two are there already
                paths += image_paths(new, prompts, seeds, [point.file_stem])
                images += drawn
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        sheets = {"comparison_all.png": (by_prompt, run.name, few)}
        for category in CATEGORIES:
            chosen = [row for row in by_prompt if row["category"] == category]
            if chosen:
                sheets[f"{category}_cases.png"] = chosen, f"{run.name}: {category}", count

        # The large ones first, so that none is left at the end.
        run.saving = [pool.submit(write_sheet, new / name, rows) for name, rows in sheets.items()]
        run.saving.append(pool.submit(write_overview, new / "overview.webp", run))
        run.saving += [pool.submit(image.save, path) for image, path in zip(images, paths, strict=True)]


def write_run(run, summary, shown, base_pairs):
    """Write one run's tables and page beside the images that `begin_images` began, which are waited for, so
    that its folder appears whole or not at all; `base_pairs` as for `effects`."""
    new = unfinished(run.target)
    page = pages.run_page(run, summary, shown)
    for saved in run.saving:
        saved.result()
    if run.points:
        pages.write_choose_page(run, summary["sweep"], shown, new)
    record = dict(
        run=run.name,
        config=shown["config"],
        **shown["provenance"],
        adapter=run.adapter,
        points=list(run.points),
        warnings=shown["warnings"],
        summary=summary,
        pictures=run.rows,
        **raw_scores(run, base_pairs),
    )
    write_csv(new / "metrics.csv", run.rows)
    text = words.summary_text(summary)
    (new / "summary.md").write_text(f"# {run.name}\n\n{text}\n", encoding="utf-8")
    (new / "report.html").write_text(page, encoding="utf-8")
    write_marker(new / MARKER, record)  # last: with it the folder is whole
    replace_folder(run.target, MARKER)
    print(f"\n{run.name}\n{text}\n\nopen {run.target / 'report.html'}")
    if run.points:
        print(f"  and {run.target / 'choose.html'}")


def write_comparison(target, groups, summaries, pairs, shown):
    """Write what several experiments have in common and where they differ, and their images side by side."""
    new = fresh_folder(target)
    overview = charts.overview_figure(pages.columns_of(groups), shown["prompts"])
    overview.save(new / "overview.webp", quality=90)
    if pairs:  # several experiments; several runs of one have nothing to compare
        charts.forest_figure(pairs).savefig(new / "forest.png")
        write_csv(new / "comparison.csv", [flattened(row) for row in pairs])
    record = dict(
        experiments=summaries, pairs=pairs, config=shown["config"], **shown["provenance"], warnings=shown["warnings"]
    )
    text = words.comparison_text(summaries, pairs)
    (new / "summary.md").write_text(f"# Comparison\n\n{text}\n", encoding="utf-8")
    page = pages.comparison_page(groups, summaries, pairs, shown)
    (new / "report.html").write_text(page, encoding="utf-8")
    write_marker(new / MARKER, record)
    replace_folder(target, MARKER)
    print(f"\ncomparison\n{text}\n\nopen {target / 'report.html'}")


def flattened(pair):
    """A comparison as one row of a table: its equivalence in columns of its own."""
    row = pair | {f"equivalence_{key}": value for key, value in pair["equivalence"].items()}
    row |= dict(left_out=", ".join(pair["left_out"]), decides=pair.get("decides", ""))
    return {key: value for key, value in row.items() if key != "equivalence"}


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def recover(output_dir):
    """Mend what a killed run left, in `output_dir` itself and in the folders of its runs."""
    recover_folder(output_dir, MARKER)
    links = [path for path in output_dir.glob("*") if path.is_symlink()]
    for ending in (".old", ".unfinished"):
        for left in sorted(output_dir.glob(f".*{ending}/{MARKER}")):
            name = left.parent.name.removeprefix(".").removesuffix(ending)
            recover_folder(output_dir / name, MARKER)
        for real in map(Path, sorted(map(os.path.realpath, links))):
            if (real.with_name(f".{real.name}{ending}") / MARKER).is_file():
                recover_folder(real, MARKER)
