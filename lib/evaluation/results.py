"""An evaluation on disk: read to be measured again, protected against replacement, written whole or not at all."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np

from lib import adapters
from lib.errors import UserError
from lib.evaluation.choosing import Point
from lib.evaluation.image_files import STARTED, SavedImages, begin_folder, copy_image, image_names
from lib.evaluation.metrics.scores import Run
from lib.evaluation.report import charts, pages, words
from lib.evaluation.runs import MARKER, check_fingerprints
from lib.files import check_output_folder, fresh_folder, recover_folder, replace_folder, unfinished, write_marker

# The settings that images must share to be compared.
GENERATED_WITH = ("base_model", "revision", "steps", "guidance_scale", "resolution")


def read_record(folder):
    """(metrics.json of an evaluation, its prompts, its seeds); UserError naming the file if it cannot be read."""
    try:
        record = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        prompts = list(dict.fromkeys((row["category"], row["prompt"]) for row in record["pictures"]))
        seeds = list(dict.fromkeys(row["seed"] for row in record["pictures"]))
        record["run"], record["adapter"], record["config"]["lora_scales"]  # a KeyError if one is missing
        return record, prompts, seeds
    except (ValueError, KeyError, TypeError, OSError) as problem:
        raise UserError(f"{folder / MARKER} cannot be read as an evaluation: {problem!r}") from None


def read_saved(output_dir, config):
    """The runs that an earlier evaluation saved in `output_dir` or its subfolders.

    Returns (runs, the configuration that they were generated with, prompts, seeds).
    """
    folders = (
        [output_dir]
        if (output_dir / MARKER).is_file()
        else sorted(p.parent for p in output_dir.glob(f"*/{MARKER}") if p.parent.name != "comparison")
    )
    for folder in [folder for folder in folders if not (folder / "images").is_dir()]:
        print(f"note: {folder} holds no images and is skipped")
        folders.remove(folder)
    if not folders:
        raise UserError(
            f"{output_dir}: no metrics.json with images beside it, here or one folder down; nothing to rescore"
        )
    runs, first = [], None
    for folder in folders:
        record, prompts, seeds = read_record(folder)
        settings = prompts, seeds, {key: record["config"].get(key) for key in GENERATED_WITH}
        if first not in (None, settings):
            raise UserError(f"{folder} has other prompts, seeds or settings than {folders[0]}; rescore them separately")
        first = settings
        base, lora = (saved_images(folder, prompts, seeds, kind) for kind in ("base", "lora"))
        run = Run(record["run"], folder, record["adapter"], base, lora)
        points = [Point(step and int(step), float(scale)) for step, scale in record["points"]]
        run.points = dict.fromkeys(points)  # all of them: `is_own` compares with the others
        for point in points:
            if point.scale == 0 or run.is_own(point):
                run.points[point] = run.lora if point.scale else run.base
                continue
            run.points[point] = saved_images(folder, prompts, seeds, point.file_stem)
        runs.append(run)
    check_fingerprints([(run.target, run.adapter.get("fingerprint")) for run in runs])
    # How images were generated is saved; how they are scored and judged is configured now.
    scoring = {"clip_model", "clip_revision", "similarity_model", "similarity_revision", "data_dir"}
    scoring |= {"output_dir", "overwrite", "rescore"}
    scoring |= {key for key in config if key.endswith("_margin")}
    return runs, config | record["config"] | {key: config[key] for key in scoring}, prompts, seeds


def saved_images(folder, prompts, seeds, kind):
    """The SavedImages of one kind in an evaluation's folder; UserError naming a file that is missing."""
    images = SavedImages(folder, image_names(prompts, seeds, kind))
    if missing := next((path for path in map(images.path, range(len(images))) if not path.is_file()), None):
        raise UserError(f"{missing} is missing; restore it, or evaluate again without --rescore")
    return images


def check_replaceable(runs, config, prompts, seeds):
    """UserError if this evaluation would replace one of another adapter, or of images generated with other settings;
    nothing is checked with `overwrite`."""
    for run in runs:
        if config["overwrite"] or not (run.target / MARKER).is_file():
            continue
        record, *saved = read_record(run.target)
        before, now = image_settings(record["config"], *saved), image_settings(config, prompts, seeds)
        changes = [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
        if record["adapter"].get("fingerprint") != run.adapter.get("fingerprint"):
            earlier = "an earlier" if record["run"] == run.name else "another adapter,"
            content = f"the evaluation of {earlier} “{record['run']}”"
        elif saved[0] != prompts or changes:
            changes += ["other prompts"] if saved[0] != prompts else []
            content = f"an evaluation of “{run.name}” with other settings ({', '.join(changes)})"
        else:
            continue
        raise UserError(f"{run.target} holds {content}; choose another --output-dir, or replace it with --overwrite")


def image_settings(config, prompts, seeds):
    """The settings that decide an evaluation's images, besides the prompts, as text: {setting: value}."""
    keys = ("score_dir",) if config.get("score_dir") else (*GENERATED_WITH, "snapshots")
    scales = ", ".join(f"{scale:g}" for scale in sorted({*map(float, config["lora_scales"])}))
    return {key: str(config.get(key)) for key in keys} | {
        "lora_scales": scales,
        "seeds": f"{min(seeds)} to {max(seeds)}",
    }


def natural_order(path):
    """A sort key for file names that puts 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name.lower())]


def read_pair(score_dir, output_dir, prompts):
    """([one Run], seeds 1, 2, …) of two folders of images that this script did not generate.

    Each folder holds, in natural order of the names, the same number of images for each prompt in turn. Where both
    names of a pair contain numbers, the last ones must agree. Raises UserError naming the files that do not.
    """
    check_output_folder(output_dir, MARKER)
    folders = [Path(part.strip()) for part in str(score_dir).split(",")]
    if len(folders) != 2 or not all(folder.is_dir() for folder in folders):
        raise UserError(f"score_dir {score_dir!r} must be two folders, BASE_FOLDER,LORA_FOLDER")
    endings = (".png", ".jpg", ".jpeg", ".webp")
    files = [
        sorted((p for p in folder.iterdir() if p.suffix.lower() in endings), key=natural_order) for folder in folders
    ]
    if len(files[0]) != len(files[1]) or not files[0] or len(files[0]) % len(prompts):
        raise UserError(
            f"{folders[0]} has {len(files[0])} images and {folders[1]} {len(files[1])}; both must "
            f"have the same number, and a multiple of the {len(prompts)} prompts"
        )
    for pair in zip(*files, strict=True):
        numbers = [re.findall(r"\d+", path.stem)[-1:] for path in pair]
        if all(numbers) and int(numbers[0][0]) != int(numbers[1][0]):
            raise UserError(
                f"{pair[0]} would be paired with {pair[1]}, but their numbers differ; name the images "
                "of both folders by the same numbers"
            )
    base, lora = (
        SavedImages(folder, [path.name for path in paths]) for folder, paths in zip(folders, files, strict=True)
    )
    count, (sizes, lora_sizes) = len(base) // len(prompts), ([image.size for image in kind] for kind in (base, lora))
    for index, (a, b, path) in enumerate(zip(sizes, lora_sizes, files[1], strict=True)):
        if a != b:
            raise UserError(f"{path} is {b}, its base image {a}; nothing is resized")
        first = index - index % count  # the first image of the same prompt
        if b != lora_sizes[first]:
            raise UserError(
                f"{path} is {b}, {files[1][first]} of the same prompt {lora_sizes[first]}; nothing is resized"
            )
        if min(b) < 32:
            raise UserError(f"{path} is {b}, too small for LPIPS, which needs 32 pixels a side")
    run = Run(folders[1].name, output_dir, {}, base, lora)
    return [run], list(range(1, count + 1))


def raw_scores(run, base_pairs):
    """What judging from metrics.json alone needs beside the images' rows: {"pairs", "swept"}.

    `pairs`, {"base", "lora"}, are the LPIPS between the images of each prompt at seeds (0, 1), (0, 2), …, (1, 2), ….
    `swept` lists, for each other point that was generated, its step, scale, LoRA images' rows and pairs.
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


def begin_runs(plan, config, prompts, seeds, made_with):
    """Prepares the unfinished folder of each run of `plan` (see `plan_runs`), as `begin_folder` does. `made_with` has the
    base model's folder, the versions and the device, which decide the images too."""
    for run, steps in plan:
        settings = image_settings(config, prompts, seeds) | made_with
        settings["adapters"] = {str(step): adapters.fingerprint(adapter) for step, adapter in steps.items()}
        settings["prompts"] = [f"{category}: {prompt}" for category, prompt in prompts]
        begin_folder(run.target, settings, config["overwrite"])


def begin_images(runs, config, prompts, seeds, pool):
    """Starts writing each run's overview, and copying the images that lie elsewhere, into the unfinished folder that
    `write_run` completes. This runs in the threads of `pool`, beside the scoring."""

    def write_overview(path, run):
        columns = [("Base model", run.base), ("The same noise, with the LoRA", run.lora)]
        charts.overview_figure(columns, prompts).save(path, quality=90)

    for run in runs:
        folder = unfinished(run.target)
        if run.folder is None:  # its images were not generated now
            begin_folder(run.target, None, config["overwrite"])
        run.saving = [pool.submit(write_overview, folder / "overview.webp", run)]  # the longest job first
        for kind, images in run.kinds().items():
            if images.folder != folder:
                names = image_names(prompts, seeds, kind)
                run.saving += [
                    pool.submit(copy_image, images.path(place), folder / name) for place, name in enumerate(names)
                ]


def finish_images(runs):
    """Waits for what `begin_images` started: before a folder is moved, as runs share base images."""
    for saved in (saved for run in runs for saved in run.saving):
        saved.result()


def write_run(run, summary, shown, base_pairs):
    """Completes the folder that `begin_images` started with tables and pages, so that it appears whole or not at all;
    `base_pairs` as for `effects`."""
    folder = unfinished(run.target)
    (folder / "report.html").write_text(pages.run_page(run, summary, shown), encoding="utf-8")
    if run.points:
        (folder / "choose.html").write_text(pages.choose_page(run, summary["sweep"], shown), encoding="utf-8")
    write_csv(folder / "metrics.csv", run.rows)
    text = words.summary_text(summary)
    (folder / "summary.md").write_text(f"# {run.name}\n\n{text}\n", encoding="utf-8")
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
    write_marker(folder / MARKER, record)  # last: it marks the folder as whole
    (folder / STARTED).unlink(missing_ok=True)  # until here an interruption loses no image
    replace_folder(run.target, MARKER)
    for images in run.kinds().values():
        if images.folder == folder:
            images.folder = run.target
    print(f"\n{run.name}\n{text}\n\nopen {run.target / 'report.html'}")
    if run.points:
        print(f"  and {run.target / 'choose.html'}")


def write_comparison(target, groups, summaries, pairs, shown):
    """Writes the comparison of several experiments: verdicts, differences, and images side by side."""
    folder = fresh_folder(target)
    columns = [(column.title, column.images) for column in pages.columns_of(groups)]
    overview = charts.overview_figure(columns, shown["prompts"])
    overview.save(folder / "overview.webp", quality=90)
    if pairs:  # several experiments; the runs of a single one are not compared
        write_csv(folder / "comparison.csv", [flattened(row) for row in pairs])
    text = words.comparison_text(summaries, pairs)
    (folder / "summary.md").write_text(f"# Comparison\n\n{text}\n", encoding="utf-8")
    page = pages.comparison_page(groups, summaries, pairs, shown)
    (folder / "report.html").write_text(page, encoding="utf-8")
    record = dict(
        experiments=summaries, pairs=pairs, config=shown["config"], **shown["provenance"], warnings=shown["warnings"]
    )
    write_marker(folder / MARKER, record)
    replace_folder(target, MARKER)
    print(f"\ncomparison\n{text}\n\nopen {target / 'report.html'}")


def flattened(pair):
    """A comparison as one row of a table, its equivalence and that of the adapters as they are in columns of their own."""
    row = pair | {f"equivalence_{key}": value for key, value in pair["equivalence"].items()}
    files = pair.get("files", {})
    row |= dict(left_out=", ".join(pair["left_out"]), decides=pair.get("decides", ""), level=pair.get("level", ""))
    row |= {f"files_{key}": files.get(key, "") for key in ("answer", "mean", "low", "high", "p_holm")}
    return {key: value for key, value in row.items() if key not in ("equivalence", "files")}


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def recover(output_dir):
    """Completes or undoes the replacements of a killed run, of `output_dir` itself and of the folders in it."""
    recover_folder(output_dir, MARKER)
    links = [path for path in output_dir.glob("*") if path.is_symlink()]
    for ending in (".old", ".unfinished"):
        for left in sorted(output_dir.glob(f".*{ending}/{MARKER}")):
            name = left.parent.name.removeprefix(".").removesuffix(ending)
            recover_folder(output_dir / name, MARKER)
        for real in map(Path, sorted(map(os.path.realpath, links))):
            if (real.with_name(f".{real.name}{ending}") / MARKER).is_file():
                recover_folder(real, MARKER)
