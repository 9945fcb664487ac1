"""The study as study.py leaves it on disk, read back: scores alone, no images.

results/study/seed42/<arm>_seed42/metrics.json            every arm, as training left it
results/study/seed42/comparison/metrics.json              written last
results/study/scales_seed42/<arm>_seed42/metrics.json     some arms at several scales
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib.errors import UserError
from lib.evaluation.metrics.scores import Run
from lib.evaluation.results import GENERATED_WITH
from lib.evaluation.runs import check_fingerprints, group_runs


@dataclass
class Study:
    """What was measured, for the training seeds that are whole: of each every arm and every scale."""

    training_seeds: list
    sampling_seeds: list
    prompts: list  # (category, prompt)
    base_pairs: np.ndarray  # as for `effects`
    arms: dict  # {arm: [Run of each training seed]}
    scaled: dict  # {arm: {scale: [Run of each training seed]}}, without the scale 0
    margins: dict
    drawn_with: dict  # the settings of drawing
    provenance: dict  # of the first evaluation
    files: list = field(default_factory=list)  # every metrics.json that was read
    notes: list = field(default_factory=list)  # what was passed over: sentences


def read_study(folder, arms, scaled):
    """The Study in `folder`; `arms` are the names of all, `scaled` of those drawn at several scales.

    A training seed that is not whole is passed over with a note, and where no seed has scales they are not asked for.
    Raises UserError naming the file for what cannot be read, was drawn in another way than the rest, or is one adapter under two names.
    """
    folder, notes, records = Path(folder), [], {}
    if scaled and not any(folder.glob("scales_seed*/*/metrics.json")):
        notes.append(
            "No arm was drawn with less of its adapter, so between the base model and an arm a straight line "
            "stands in for its scales."
        )
        scaled = ()
    for place in sorted(folder.glob("seed*"), key=lambda place: (len(place.name), place.name)):
        if not place.name.removeprefix("seed").isdecimal():
            continue
        seed = int(place.name.removeprefix("seed"))
        paths = {(arm, "own"): place / f"{arm}_seed{seed}" for arm in arms}
        paths |= {(a, "scales"): folder / f"scales_{place.name}" / f"{a}_seed{seed}" for a in scaled}
        missing = [p for p in (*paths.values(), place / "comparison") if not (p / "metrics.json").is_file()]
        if missing:
            notes.append(
                f"Training seed {seed} is passed over: it is not whole ({missing[0]} and "
                f"{len(missing) - 1} more are missing)."
            )
            continue
        records[seed] = {key: (path, read_record(path)) for key, path in paths.items()}
    if not records:
        raise UserError(f"{folder}: no whole training seed in it; run python study.py")
    return study_of(records, arms, scaled, notes)


def read_record(folder):
    """One metrics.json; UserError naming it if it is damaged or lacks what this needs."""
    path = folder / "metrics.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for key in ("run", "config", "adapter", "summary", "pictures", "pairs", "swept"):
            record[key]
        return record
    except (ValueError, KeyError, TypeError, OSError) as problem:
        raise UserError(
            f"{path} is not what inference.py writes now ({problem!r}); draw it again, or "
            "measure its images again with --rescore"
        ) from None


def study_of(records, arms, scaled, notes):
    """A Study of {training seed: {(arm, "own" or "scales"): (folder, record)}}."""
    every = [pair for found in records.values() for pair in found.values()]
    first_place, first = every[0]
    prompts, seeds = asked(first)
    drawn = {key: first["config"].get(key) for key in GENERATED_WITH}
    for place, record in every:
        how = {key: record["config"].get(key) for key in GENERATED_WITH}
        if (asked(record), how) != ((prompts, seeds), drawn):
            raise UserError(f"{place} has other prompts, sampling seeds or settings than {first_place}; draw it again")
    shape = len(prompts), len(seeds)
    runs = {
        key: [run_of(found[key][1], found[key][0], shape) for found in records.values()] for key in every_key(records)
    }
    by_arm = {arm: runs[arm, "own"] for arm in arms}
    own = [run for members in by_arm.values() for run in members]
    check_fingerprints([(run.target, run.adapter.get("fingerprint")) for run in own])
    group_runs(own)  # raises where two runs of one arm differ in more than their seed
    by_scale = {}
    for arm in scaled:
        same = zip(by_arm[arm], runs[arm, "scales"], strict=True)
        for run, other in same:
            if run.adapter.get("fingerprint") != other.adapter.get("fingerprint"):
                raise UserError(f"{other.target} was drawn with another adapter than {run.target}; draw it again")
        points = [points_of(found[arm, "scales"], shape) for found in records.values()]
        common = sorted(set.intersection(*(set(p) for p in points)))
        by_scale[arm] = {scale: [p[scale] for p in points] for scale in common}
    return Study(
        list(records),
        seeds,
        prompts,
        full_pairs(first["pairs"]["base"], shape),
        by_arm,
        by_scale,
        first["summary"]["margins"],
        drawn,
        {key: first.get(key) for key in ("versions", "commit", "device")},
        [str(place / "metrics.json") for place, _ in every],
        notes,
    )


def every_key(records):
    return next(iter(records.values())).keys()


def asked(record):
    """([(category, prompt)], [sampling seed]) of a metrics.json."""
    rows = record["pictures"]
    prompts = list(dict.fromkeys((row["category"], row["prompt"]) for row in rows))
    return prompts, list(dict.fromkeys(row["seed"] for row in rows))


def full_pairs(listed, shape):
    """Distances between the images of each prompt, [prompts, seeds, seeds], from those of its pairs."""
    prompts, seeds = shape
    found = np.zeros((prompts, seeds, seeds))
    first, second = np.triu_indices(seeds, 1)
    found[:, first, second] = found[:, second, first] = np.asarray(listed).reshape(prompts, -1)
    return found


def run_of(record, folder, shape):
    """A Run without images, of an adapter as training left it."""
    pairs = full_pairs(record["pairs"]["lora"], shape)
    return Run(record["run"], folder, record["adapter"], [], [], rows=record["pictures"], pairs=pairs)


def points_of(found, shape):
    """{scale: Run} of an evaluation at several scales."""
    folder, record = found
    base = [row for row in record["pictures"] if row["model"] == "base"]
    points = {1.0: run_of(record, folder, shape)}
    for part in record["swept"]:
        name, pairs = f"{record['run']}, scale {part['scale']:g}", full_pairs(part["pairs"], shape)
        rows = base + part["pictures"]
        points[part["scale"]] = Run(name, folder, record["adapter"], [], [], rows=rows, pairs=pairs)
    return points
