"""What a run tells of itself while it trains: log.jsonl, Weights & Biases, and the loss curve."""

import contextlib
import functools
import json
import netrc
import os

import matplotlib
import numpy as np
import wandb
from matplotlib.figure import Figure

from lib.errors import one_line

matplotlib.rcParams["text.parse_math"] = False  # a run's name may hold dollar signs


class Journal:
    """The log of a run: `rows`, the same in `folder`/log.jsonl, and in W&B under train/.

    `rows` are those of an interrupted run that goes on, `run_id` its W&B run. Of several processes the
    first one writes; the others have a Journal without a folder, which is silent.
    """

    def __init__(self, folder, rows=(), project=None, name=None, config=None, run_id=None):
        self.rows, self.file, self.tracker = list(rows), None, None
        if folder:
            self.tracker = start_wandb(project, name, config, run_id)
            self.file = (folder / "log.jsonl").open("w", encoding="utf-8")
            self.file.writelines(json.dumps(row) + "\n" for row in self.rows)

    @property
    def run_id(self):
        return self.tracker and self.tracker.id

    def record(self, **row):
        """Log the figures of a step."""
        if self.file:
            self.rows.append(row)
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            self.tracker.log({f"train/{key}": value for key, value in row.items()})

    def finish(self, exit_code=0):
        """Close the file and the W&B run."""
        if self.file:
            self.file.close()
            self.tracker.finish(exit_code=exit_code)


def start_wandb(project, name, config, run_id=None):
    """A W&B run: online with an API key, else offline, never asking; WANDB_MODE decides if set.

    It gets the configuration and the figures, no pictures and no captions. With `run_id` a run that
    was interrupted goes on.
    """
    key = os.environ.get("WANDB_API_KEY")
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        key = key or netrc.netrc().authenticators("api.wandb.ai")
    mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
    start = functools.partial(wandb.init, project=project, name=name, config=config, id=run_id,
                              resume="allow" if run_id else None,
                              settings=wandb.Settings(console="off", silent=True))  # fmt: skip
    try:
        return start(mode=mode)
    except (wandb.Error, ValueError) as problem:
        # No network, a wrong key, an unknown mode: not worth a training run.
        print(f"W&B cannot start ({one_line(problem, 120)}): logging offline")
        os.environ["WANDB_MODE"] = "offline"
        return start(mode="offline")


def loss_figure(log, title):
    """A matplotlib figure of a training log: loss, held-out loss and learning rate over steps.

    `log` is the list of rows of log.jsonl. The training loss depends mostly on the timesteps that
    were drawn, so its running mean is drawn over it, and the held-out loss at fixed ones beside it.
    """
    figure = Figure(figsize=(8, 5.5), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, height_ratios=[3, 1], sharex=True)
    trained = [row for row in log if "loss" in row]
    steps, losses = [r["step"] for r in trained], [r["loss"] for r in trained]
    window = max(1, len(losses) // 20)
    kernel = np.ones(window)
    running = np.convolve(losses, kernel, "same") / np.convolve(
        np.ones(len(losses)), kernel, "same"
    )
    top.plot(steps, losses, color="#b9c4d6", linewidth=0.8, label="training loss")
    top.plot(steps, running, color="#2f5ea8", linewidth=1.8, label="its running mean")
    held_out = [(r["step"], r["validation_loss"]) for r in log if "validation_loss" in r]
    if held_out:
        top.plot(*zip(*held_out, strict=True), "o-", color="#c4572e", markersize=4,
                 label="held-out pictures, fixed noise and timesteps")  # fmt: skip
    top.set(title=title, ylabel="mean squared error of the noise")
    top.legend(frameon=False)
    bottom.plot(steps, [r["learning_rate"] for r in trained], color="#555555")
    bottom.set(xlabel="step", ylabel="learning rate")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_ylim(bottom=0)
    return figure
