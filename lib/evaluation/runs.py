"""The adapters under evaluation: what to generate, which runs form one experiment, which are identical.

Runs form one experiment if their configurations (train.py's config.json beside the adapter) differ in the training
seed alone, whatever their names.
"""

import json
import re
from pathlib import Path

from lib import adapter_files, adapters
from lib.errors import UserError
from lib.evaluation.metrics.scores import Run
from lib.files import check_output_folder
from lib.kernels.cpu import cpu_note
from lib.models import base_model_name
from lib.run_config import WITHOUT_EFFECT, differences, with_added

MARKER = "metrics.json"  # written last into a results folder
# Seeds of one experiment may differ in these too. The data count by their hash, not by their folder.
OF_ONE_EXPERIMENT = (*WITHOUT_EFFECT, "seed", "data_dir")

# The keys of config.json for a run's duration, memory and device.
SPEED = ("steps_a_second", "set_up_seconds", "peak_gib_reserved", "device")


def plan_runs(config, device):
    """What to generate: [(Run without images, {step: Adapter})], everything checked.

    The adapters of a run are its snapshots and, last, its own. Without `snapshots` its own is alone, under None.
    """
    places = adapter_files.find_adapters(config["lora_dir"])
    names, output_dir = [name for name, _ in places], Path(config["output_dir"])
    targets = {name: output_dir / name if len(places) > 1 else output_dir for name in names}
    for target in [*targets.values(), *([output_dir / "comparison"] if len(places) > 1 else [])]:
        check_output_folder(target, MARKER)
    for path in sorted(Path(config["lora_dir"]).glob("*/config.json")) if len(places) > 1 else ():
        if path.parent.name not in names:
            print(f"note: {path.parent} is a run without weights and is skipped")
    plan = []
    for name, adapter in read_adapters(places):
        run = Run(name, targets[name], describe(adapter), [], [], folder=adapter.path)
        plan.append((run, with_snapshots(run, adapter) if config["snapshots"] else {None: adapter}))
        for note in adapter_notes(name, adapter, config["base_model"]):
            print(f"note: {note}")
    check_fingerprints(
        [
            (f"{run.name}, step {step}" if step else run.name, adapters.fingerprint(adapter))
            for run, steps in plan
            for step, adapter in steps.items()
        ]
    )
    group_runs([run for run, _ in plan])
    if device.type == "cpu":
        print(cpu_note("generating"))
    return plan


def adapter_notes(name, adapter, base_model):
    """Sentences on what may make an adapter's images differ from its author's: another base model or clip skip."""
    notes = []
    trained_on = adapter.metadata.get("base_model")
    if trained_on and base_model_name(trained_on) != base_model_name(base_model):
        notes.append(f"{name} was trained on {trained_on}; its images are generated with {base_model}")
    clip_skip = adapter.metadata.get("clip_skip", "1")
    if clip_skip not in ("0", "1"):
        notes.append(
            f"{name} was trained with clip skip {clip_skip}; here the text encoder's last layer is used, so its "
            "effect may differ from that in programs with this setting"
        )
    return notes


def read_adapters(places):
    """[(name, Adapter)] of `places`, [(name, path)]. Of several, those that are refused are skipped with a note;
    UserError if none is left."""
    read = []
    for name, path in places:
        try:
            read.append((name, adapter_files.read_adapter(path)))
        except UserError as problem:
            if len(places) == 1:
                raise
            print(f"note: {name} is skipped: {problem}")
    if not read:
        raise UserError(f"{places[0][1].parent}: none of its {len(places)} adapters can be read; see the notes above")
    return read


def with_snapshots(run, adapter):
    """{step: Adapter} of a run's snapshots and, last, its own adapter; UserError if there are none.

    Puts the held-out losses of these steps and of step 0, as far as the log has them, into `run.adapter`.
    """
    folder, steps = Path(adapter.path), {}
    for place in sorted((folder / "snapshots").glob("step_*")):
        number = place.name.removeprefix("step_")
        if number.isdecimal() and adapter_files.adapter_files(place):
            steps[int(number)] = adapter_files.read_adapter(place)
    last = run.adapter.get("steps")
    if not steps or last is None:
        missing = "config.json" if steps else "snapshots"
        raise UserError(
            f"{folder}: --snapshots needs {missing}, which this run lacks; train.py --snapshot-every N writes them"
        )
    late = [step for step in steps if step >= last]
    if late:
        raise UserError(f"{folder}: a snapshot of step {late[0]}, but the run ended after {last}; remove the snapshot")
    run.adapter["held_out_losses"] = held_out_losses(folder / "log.jsonl", (0, *steps, last))
    return steps | {last: adapter}


def held_out_losses(path, steps):
    """{step: losses of the held-out images} from a run's log, for those of `steps` that it has."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {
            str(row["step"]): list(map(float, row["validation_losses"]))
            for row in rows
            if row["step"] in steps and "validation_losses" in row
        }
    except OSError:
        print(f"note: {path} is missing, so there is no held-out loss")
        return {}
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path} is not what train.py writes ({problem!r}); remove it to go without") from None


def describe(adapter):
    """A read adapter's entry in metrics.json: a dict.

    `training` holds the settings that define its experiment, None without a config.json; `speed` the run's time and
    memory.
    """
    metadata = {k: v for k, v in adapter.metadata.items() if k not in ("lora_adapter_metadata", "format")}
    entry = dict(
        fingerprint=adapters.fingerprint(adapter),
        rank=adapter.rank,
        alpha=adapter.alpha,
        metadata=metadata,
        training=None,
        held_out=[],
    )
    path = Path(adapter.path) / "config.json"
    if not path.is_file():
        return entry
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if "config" not in record:
            print(f"note: {path} was not written by train.py and is ignored")
            return entry
        # Precision, number of processes and learning rates changed on the way belong to the experiment too.
        entry["training"] = dict(
            record["config"],
            data_sha256=record["data"]["sha256"],
            processes=record.get("processes"),
            mixed_precision=record.get("mixed_precision"),
            learning_rate_changes=record.get("learning_rate_changes") or [],
        )
        entry["steps"] = record.get("steps", record["config"].get("max_steps"))
        if "optimizer" in record:
            entry["training"]["optimizer"] = record["optimizer"]
        entry["held_out"] = list(record["data"]["held_out"])
        entry["speed"] = {key: record[key] for key in SPEED if key in record}
        entry["metadata"] = {"seed": str(record["config"]["seed"])} | metadata
    except (ValueError, KeyError, TypeError, OSError) as problem:
        raise UserError(
            f"{path} is not what train.py writes ({problem!r}); restore it, or remove it to evaluate without"
        ) from None
    return entry


def group_runs(runs):
    """{experiment: [Run]}: runs whose configurations differ in the seed alone form one experiment.

    An experiment has the name of its first run, without a final _seed<N>. A run without config.json is an experiment
    of its own. Experiments are ordered by the number of settings that are switched on: a recipe comes before the same
    recipe with an addition, wherever the two are shown or subtracted. Raises UserError, naming the keys, for two runs
    of the same seed and configuration, and for runs of one experiment's name whose configurations differ.
    """
    groups, first_of_name = {}, {}
    for run in runs:
        name = re.sub(r"_seed\d+$", "", run.name)
        settings = experiment_settings(run)
        if settings is None:
            groups[run.name] = [run]
            continue
        other = first_of_name.setdefault(name, run)
        differing = differences(experiment_settings(other), settings, ignored=())
        if differing:
            raise UserError(
                f"{other.name} and {run.name} have the names of runs of one experiment, but differ in "
                f"{', '.join(differing)}; rename one of them"
            )
        same = [group for group in groups.values() if experiment_settings(group[0]) == settings]
        group = same[0] if same else groups.setdefault(name if name not in groups else run.name, [])
        twin = next((other for other in group if other.training_seed == run.training_seed), None)
        if twin:
            raise UserError(
                f"{twin.name} and {run.name} have the same configuration and the same seed "
                f"({run.training_seed}): one run counted twice; remove one"
            )
        group.append(run)

    def switched_on(item):
        return sum(map(bool, (experiment_settings(item[1][0]) or {}).values()))

    return dict(sorted(groups.items(), key=switched_on))


def experiment_settings(run):
    """The settings that all seeds of an experiment share, or None for a run without config.json."""
    training = run.adapter.get("training")
    return training and {k: v for k, v in with_added(training).items() if k not in OF_ONE_EXPERIMENT}


def check_fingerprints(named):
    """Raises UserError, naming both, if two adapters under comparison are the same: the published study scored one
    adapter under two names and called the equality a finding. `named` is [(name, fingerprint)], the fingerprint None
    for images from elsewhere."""
    owners = {}
    for name, key in named:
        if key is not None and key in owners:
            raise UserError(
                f"{owners[key]} and {name} are the same adapter (fingerprint {key[:12]}…); a comparison "
                "of the two would compare it with itself. Remove one"
            )
        owners[key] = name
