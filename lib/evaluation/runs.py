"""Which adapters are evaluated: what will be drawn, which are training runs of one experiment, and
which are one and the same.

Runs belong together if their configurations (config.json, which train.py writes beside an adapter)
differ in the training seed alone, whatever they are called.
"""

import json
import re
from pathlib import Path

from lib import adapter_files, adapters
from lib.errors import UserError
from lib.evaluation.metrics.scores import Run
from lib.files import check_output_folder
from lib.models import base_model_name, fetch_base_model
from lib.run_config import WITHOUT_EFFECT, differences, with_added

MARKER = "metrics.json"  # the file of a results folder that is written last
# Seeds of one experiment may differ in these too. Of the data its hash counts, not its place.
OF_ONE_EXPERIMENT = (*WITHOUT_EFFECT, "seed", "data_dir")

# What config.json says of how long a run took, where.
SPEED = ("steps_a_second", "set_up_seconds", "peak_gib_reserved", "device")


def plan_runs(config, device):
    """What will be drawn: ([(Run, {step: Adapter})], base-model folder), all checked; the runs have no
    images. Of several adapters of a run, its snapshots, its own comes last; where they are not asked for it
    is alone, under None."""
    found = adapter_files.find_adapters(config["lora_dir"])
    output_dir, base_model = Path(config["output_dir"]), config["base_model"]
    targets = [output_dir / name if len(found) > 1 else output_dir for name, _ in found]
    for target in [*targets, *([output_dir / "comparison"] if len(found) > 1 else [])]:
        check_output_folder(target, MARKER)
    for left in sorted(Path(config["lora_dir"]).glob("*/config.json")):
        if len(found) > 1 and left.parent.name not in [name for name, _ in found]:
            print(f"note: {left.parent} is a run without its weights, and is passed over")
    read = [(name, adapter_files.read_adapter(path)) for name, path in found]
    runs = [
        Run(name, target, describe(adapter), [], [], folder=adapter.path)
        for (name, adapter), target in zip(read, targets, strict=True)
    ]
    steps = [
        with_snapshots(run, adapter) if config["snapshots"] else {None: adapter}
        for run, (_, adapter) in zip(runs, read, strict=True)
    ]
    check_fingerprints(
        [
            (f"{run.name}, step {step}" if step else run.name, adapters.fingerprint(adapter))
            for run, kept in zip(runs, steps, strict=True)
            for step, adapter in kept.items()
        ]
    )
    group_runs(runs)
    if device.type == "cpu":
        print("no CUDA GPU found: drawing on the CPU, in fp32")
    for name, adapter in read:
        known = adapter.metadata.get("base_model")
        if known and base_model_name(known) != base_model_name(base_model):
            print(f"note: {name} was trained on {known}, here it is drawn with {base_model}")
    half = device.type == "cuda"
    folder = fetch_base_model(base_model, config["revision"], half, config["resolution"])
    return list(zip(runs, steps, strict=True)), folder


def with_snapshots(run, adapter):
    """{step: Adapter} of a run's snapshots and, last, its own adapter; UserError if there are none.

    Notes in `run.adapter` the held-out losses of these steps and of step 0, where the log has them.
    """
    folder = Path(adapter.path)
    found = {}
    for place in sorted((folder / "snapshots").glob("step_*")):
        number = place.name.removeprefix("step_")
        if number.isdecimal() and adapter_files.adapter_files(place):
            found[int(number)] = adapter_files.read_adapter(place)
    last = (run.adapter["training"] or {}).get("max_steps")
    if not found or last is None:
        what = "its config.json" if found else "snapshots"
        raise UserError(
            f"{folder}: --snapshots needs {what}, and there is none; train.py keeps them with --snapshot-every N"
        )
    late = [step for step in found if step >= last]
    if late:
        raise UserError(f"{folder}: a snapshot of step {late[0]}, but the run ended after {last}")
    run.adapter["held_out_losses"] = held_out_losses(folder / "log.jsonl", (0, *found, last))
    return found | {last: adapter}


def held_out_losses(path, steps):
    """{step: losses of the held-out images} as a run's log holds them, of those of `steps` that it has."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {
            str(row["step"]): list(map(float, row["validation_losses"]))
            for row in rows
            if row["step"] in steps and "validation_losses" in row
        }
    except OSError:
        print(f"note: there is no {path}, so no held-out loss")
        return {}
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path} is not what train.py writes ({problem!r}); remove it to go without") from None


def describe(adapter):
    """What the results say of a read adapter: a dict for metrics.json.

    `training` is what decides its experiment, or None where it has no config.json; `speed` what that
    says of the time and memory that the run took.
    """
    metadata = {k: v for k, v in adapter.metadata.items() if k not in ("lora_adapter_metadata", "format")}
    found = dict(
        fingerprint=adapters.fingerprint(adapter),
        rank=adapter.rank,
        alpha=adapter.alpha,
        metadata=metadata,
        training=None,
        held_out=[],
    )
    record = Path(adapter.path) / "config.json"
    if record.is_file():
        try:
            written = json.loads(record.read_text(encoding="utf-8"))
            if "config" not in written:
                print(f"note: {record} is not train.py's, and is passed over")
                return found
            config, data = written["config"], written["data"]
            # What was computed in, over how many processes, and rates changed on the way count too.
            found["training"] = dict(
                config,
                data_sha256=data["sha256"],
                processes=written.get("processes"),
                mixed_precision=written.get("mixed_precision"),
                learning_rate_changes=written.get("learning_rate_changes") or [],
            )
            if "optimizer" in written:
                found["training"]["optimizer"] = written["optimizer"]
            found["held_out"] = list(data["held_out"])
            found["speed"] = {key: written[key] for key in SPEED if key in written}
            found["metadata"] = {"seed": str(config["seed"])} | metadata
        except (ValueError, KeyError, TypeError, OSError) as problem:
            raise UserError(
                f"{record} is not what train.py writes ({problem!r}); restore it, or remove it to "
                "evaluate the adapter without"
            ) from None
    return found


def group_runs(runs):
    """{experiment: [Run]}: runs whose configurations differ in the seed alone are one experiment.

    It is called as its first run is, less an ending _seed<N>. A run without config.json is an
    experiment of its own. They are in the order of how many settings are switched on, so that what adds
    something to a recipe stands behind it, wherever the two are shown or subtracted. Raises UserError, naming the keys, for two runs of one seed and
    configuration, and for runs of one experiment's name whose configurations differ.
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
                f"{other.name} and {run.name} are named as runs of one experiment, but differ in "
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
    """What the seeds of one experiment have in common, or None for a run without config.json."""
    training = run.adapter.get("training")
    return training and {k: v for k, v in with_added(training).items() if k not in OF_ONE_EXPERIMENT}


def check_fingerprints(found):
    """Raise UserError naming both if two adapters under comparison are the same: the published study
    scored one adapter under two names and called the equality a finding. `found` is a list of
    (name, fingerprint), which is None for images that were drawn elsewhere."""
    owners = {}
    for name, key in found:
        if key is not None and key in owners:
            raise UserError(
                f"{owners[key]} and {name} are the same adapter (fingerprint {key[:12]}…); a comparison "
                "of the two would compare it with itself. Remove one"
            )
        owners[key] = name
