"""The record of each stage, and the training logs, merged and plotted."""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from demo.build.config import STAGES
from lib.files import write_json

TRAINED = ("vae", "clip", "unet")


def run_name(stage, config):
    """The name of a stage's run: the stage, or STAGE_2, STAGE_3 for further training."""
    work, number = Path(config["work_dir"]), 1
    while config.get(f"{stage}_resume") and (work / f"{numbered(stage, number)}.json").is_file():
        number += 1
    return numbered(stage, number)


def numbered(stage, number):
    """The name of a stage's run by its number."""
    return stage if number == 1 else f"{stage}_{number}"


def record_run(stage, config, started, steps=None, name=None):
    """Record a stage for metrics.json: minutes, steps, settings, device, versions.

    `name` identifies the record of a stage that ran in several parts.
    """
    on_gpu = config["device"] == "cuda"
    threads = torch.get_num_threads()
    device = f"one {torch.cuda.get_device_name()}" if on_gpu else f"CPU, {threads} threads"
    packages = "torch diffusers transformers lpips".split()
    run = dict(
        minutes=round((time.time() - started) / 60, 2),
        steps=steps,
        settings={key: value for key, value in config.items() if key.startswith(f"{stage}_")},
        device=device,
        versions=dict(python=sys.version.split()[0]) | {name: version(name) for name in packages},
    )
    write_json(Path(config["work_dir"]) / f"{name or stage}.json", run)


def write_log(config):
    """Merge the stages' logs into training.jsonl, about 60 lines each, and plot them in curves.png.

    Returns the records of the stages.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    work, report = Path(config["work_dir"]), Path(config["report_dir"])
    figure, axes = plt.subplots(1, len(TRAINED), figsize=(4 * len(TRAINED), 3.2), layout="constrained")
    lines = []
    for axis, stage in zip(axes, TRAINED, strict=True):
        entries, done = [], 0
        for path in sorted(work.glob(f"{stage}*.jsonl")):  # in order, if trained further
            more = [json.loads(line) for line in path.open()]
            entries += [entry | dict(step=entry["step"] + done) for entry in more]
            done = entries[-1]["step"]
        entries = entries[:: max(len(entries) // 60, 1)]
        lines += [json.dumps(dict(stage=stage) | entry) for entry in entries]
        steps = [entry["step"] for entry in entries]
        for key in [key for key in (entries[-1] if entries else {}) if key.startswith("heldout")]:
            twin = axis.twinx()
            twin.plot(steps, [entry[key] for entry in entries], color="tab:orange", linewidth=1)
            twin.set_ylabel(key.replace("_", " "), color="tab:orange")
        axis.plot(steps, [entry["loss"] for entry in entries], linewidth=1)
        axis.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
    figure.savefig(report / "curves.png", dpi=110)
    (report / "training.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("*.json"))}
    stages = {name: next(s for s in STAGES if name.startswith(s)) for name in runs}
    return {name: runs[name] for name in sorted(runs, key=lambda n: STAGES.index(stages[n]))}
