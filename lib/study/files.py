"""Reads back the study that study.py left on disk: scores alone, no images.

results/study/seed42/<arm>_seed42/metrics.json            each arm at full scale
results/study/seed42/comparison/metrics.json              written last
results/study/scales_seed42/<arm>_seed42/metrics.json     some arms at several scales
results/study/training_level.json                         for evaluations without the scale of the concept
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib.errors import UserError
from lib.evaluation.metrics.concept_scale import base_similarity, scale_of
from lib.evaluation.metrics.scores import Run
from lib.evaluation.report.words import scale_text
from lib.evaluation.results import GENERATED_WITH
from lib.evaluation.runs import check_fingerprints, group_runs

MINIATURE = "demo/model"
LEVELS = "training_level.json"
LATER = "The margin of concept similarity, {now:g}, was set after these evaluations, which had one of {before:g}."


@dataclass
class Study:
    """The scores of every arm and scale, for the complete training seeds."""

    training_seeds: list
    sampling_seeds: list
    prompts: list  # (category, prompt)
    base_pairs: np.ndarray  # [prompts, seeds, seeds], as for `effects`
    arms: dict  # {arm: [Run per training seed]}
    scaled: dict  # {arm: {scale: [Run per training seed]}}, without the scale 0
    margins: dict
    scale: dict  # of the concept, see concept_scale.py; None where it is unknown
    levels: dict  # {run: similarity of its training images among themselves}; None where it is unknown
    drawn_with: dict  # the settings of generation
    provenance: dict  # of the first evaluation
    files: list = field(default_factory=list)  # every metrics.json that was read
    notes: list = field(default_factory=list)  # sentences on what was skipped

    @property
    def on_miniature(self):
        return self.drawn_with["base_model"] == MINIATURE


def read_study(folder, arms, scaled):
    """The Study in `folder`. `arms` are the names of all arms, `scaled` of those with several scales.

    Skips incomplete training seeds with a note. Scales are optional where no seed has any. UserError names the file
    that cannot be read, has other settings than the rest, or holds the adapter of another name.
    """
    folder, notes, records = Path(folder), [], {}
    if scaled and not any(folder.glob("scales_seed*/*/metrics.json")):
        notes.append(
            "No arm has images at lower scales: its scores are interpolated between base model and full scale."
        )
        scaled = ()
    for place in sorted(folder.glob("seed*"), key=lambda place: (len(place.name), place.name)):
        if not place.name.removeprefix("seed").isdecimal():
            continue
        seed = int(place.name.removeprefix("seed"))
        paths = {(arm, "own"): place / f"{arm}_seed{seed}" for arm in arms}
        paths |= {(arm, "scales"): folder / f"scales_{place.name}" / f"{arm}_seed{seed}" for arm in scaled}
        missing = [p for p in (*paths.values(), place / "comparison") if not (p / "metrics.json").is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            notes.append(f"Training seed {seed} is incomplete and was skipped: no metrics.json in {missing[0]}{more}.")
            continue
        records[seed] = {key: (path, read_record(path)) for key, path in paths.items()}
    if not records:
        raise UserError(f"{folder}: no whole training seed in it; run python study.py")
    levels = read_levels(folder / LEVELS) if (folder / LEVELS).is_file() else {}
    return study_of(records, arms, scaled, notes, levels)


def read_levels(path):
    """{run: level of its training images, with the margin's share} of `write_levels`; UserError if it cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: level | dict(share=record["share"]) for name, level in record["runs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path} cannot be read ({problem!r}); remove it and run study.py again") from None


def read_record(folder):
    """One metrics.json. UserError names it if it is damaged or incomplete."""
    path = folder / "metrics.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for key in ("run", "config", "adapter", "summary", "pictures", "pairs", "swept"):
            record[key]
        return record
    except (ValueError, KeyError, TypeError, OSError) as problem:
        raise UserError(
            f"{path} is damaged or from another version ({problem!r}); measure its images again with inference.py "
            "--rescore, or remove its folder and run study.py again"
        ) from None


def study_of(records, arms, scaled, notes, levels=None):
    """A Study from {training seed: {(arm, "own" or "scales"): (folder, record)}}; `levels` from `read_levels`."""
    every = [pair for of_seed in records.values() for pair in of_seed.values()]
    first_place, first = every[0]
    prompts, seeds = prompts_and_seeds(first)
    drawn_with = {key: first["config"].get(key) for key in GENERATED_WITH}
    for place, record in every:
        settings = {key: record["config"].get(key) for key in GENERATED_WITH}
        if (prompts_and_seeds(record), settings) != ((prompts, seeds), drawn_with):
            raise UserError(
                f"{place} has other prompts, sampling seeds or settings than {first_place}; remove it and run study.py "
                "again"
            )
    notes = notes + check_judged_alike(every)
    scale = study_scale([record for _, record in every], prompts, levels or {})
    margins = dict(first["summary"]["margins"])
    before = margins.pop("concept_similarity", None)
    if scale and scale["margin"]:
        margins["concept_similarity"] = scale["margin"]
        if before and "concept_scale" not in first["summary"]:
            notes = [*notes, LATER.format(now=scale["margin"], before=before)]
    elif scale:
        notes = [*notes, scale_text(scale)]
    shape = len(prompts), len(seeds)
    runs = {
        key: [run_of(of_seed[key][1], of_seed[key][0], shape) for of_seed in records.values()]
        for key in next(iter(records.values()))
    }
    by_arm = {arm: runs[arm, "own"] for arm in arms}
    own = [run for members in by_arm.values() for run in members]
    check_fingerprints([(run.target, run.adapter.get("fingerprint")) for run in own])
    group_runs(own)  # raises if two runs of an arm differ in more than their seed
    by_scale = {}
    for arm in scaled:
        for run, other in zip(by_arm[arm], runs[arm, "scales"], strict=True):
            if run.adapter.get("fingerprint") != other.adapter.get("fingerprint"):
                raise UserError(
                    f"{other.target} is of another adapter than {run.target}; remove it and run study.py again"
                )
        points = [runs_by_scale(*of_seed[arm, "scales"], shape) for of_seed in records.values()]
        common = sorted(set.intersection(*map(set, points)))
        by_scale[arm] = {scale: [of_seed[scale] for of_seed in points] for scale in common}
    return Study(
        training_seeds=list(records),
        sampling_seeds=seeds,
        prompts=prompts,
        base_pairs=full_pairs(first["pairs"]["base"], shape),
        arms=by_arm,
        scaled=by_scale,
        margins=margins,
        scale=scale,
        levels={record["run"]: scale_in(record, levels or {})["level"] for _, record in every},
        drawn_with=drawn_with,
        provenance={key: first.get(key) for key in ("versions", "commit", "device")},
        files=[str(place / "metrics.json") for place, _ in every],
        notes=notes,
    )


def check_judged_alike(every):
    """UserError, naming the file, if one of [(folder, record)] was scored by other models, compared with other training
    images or judged by other margins than another. Returns notes.

    A record without digests is accepted: earlier evaluations have none. A note says so where others have them.
    """
    known, unknown = {}, set()
    for place, record in every:
        scorers = {key: (entry or {}).get("sha256") for key, entry in (record.get("scorers") or {}).items()}
        if not scorers:
            unknown.add(place)
        facts = {f"scorers ({key.replace('_', ' ')})": digest for key, digest in scorers.items()}
        # The margin of concept similarity follows from each evaluation's own scale; the share of it is what was chosen.
        margins = {key: value for key, value in record["summary"]["margins"].items() if key != "concept_similarity"}
        if scale := record["summary"].get("concept_scale"):
            margins["share of the concept's scale"] = scale["share"]
        for what, fact in (facts | dict(margins=margins)).items():
            first_place, first = known.setdefault(what, (place, fact))
            if fact != first:
                raise UserError(
                    f"{place / 'metrics.json'} was judged with other {what} than {first_place / 'metrics.json'}; "
                    "measure the images of both again with inference.py --rescore, or remove one and run study.py again"
                )
    if unknown and len(unknown) < len(every):
        return [
            f"{len(unknown)} of {len(every)} evaluations do not name the models that scored them and the training images; "
            "they are taken to be the same."
        ]
    return []


def study_scale(records, prompts, levels):
    """The scale of the concept from each evaluation's own or, where that lacks one, from `levels`; None where concept
    similarity was not measured."""
    base, category = base_similarity(records[0]["pictures"], prompts)
    if base is None:
        return None
    scales = [scale_in(record, levels) for record in records]
    return scale_of(scales, base, category, scales[0]["share"])


def scale_in(record, levels):
    """The scale of one evaluation, or its entry of `levels`; both have the level of its training images."""
    unknown = dict(level=None, held_out=None, images=0, share=None)
    return record["summary"].get("concept_scale") or levels.get(record["run"], unknown)


def prompts_and_seeds(record):
    """([(category, prompt)], [sampling seed]) of a metrics.json."""
    rows = record["pictures"]
    prompts = list(dict.fromkeys((row["category"], row["prompt"]) for row in rows))
    return prompts, list(dict.fromkeys(row["seed"] for row in rows))


def full_pairs(listed, shape):
    """Distances between the images of each prompt as a symmetric array [prompts, seeds, seeds], from the upper
    triangles that metrics.json lists."""
    prompts, seeds = shape
    pairs = np.zeros((prompts, seeds, seeds))
    first, second = np.triu_indices(seeds, 1)
    pairs[:, first, second] = pairs[:, second, first] = np.asarray(listed).reshape(prompts, -1)
    return pairs


def run_of(record, folder, shape):
    """A Run without images, of an adapter at full scale."""
    pairs = full_pairs(record["pairs"]["lora"], shape)
    return Run(record["run"], folder, record["adapter"], [], [], rows=record["pictures"], pairs=pairs)


def runs_by_scale(folder, record, shape):
    """{scale: Run} of an evaluation at several scales."""
    base = [row for row in record["pictures"] if row["model"] == "base"]
    points = {1.0: run_of(record, folder, shape)}
    for part in record["swept"]:
        name, pairs = f"{record['run']}, scale {part['scale']:g}", full_pairs(part["pairs"], shape)
        rows = base + part["pictures"]
        points[part["scale"]] = Run(name, folder, record["adapter"], [], [], rows=rows, pairs=pairs)
    return points
