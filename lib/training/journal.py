"""The log of a run while it trains: log.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import importlib.util
import json
import netrc
import os
import sys
import urllib.parse

from lib.errors import UserError, one_line

REPORT_TO = {"wandb": ("wandb",), "tensorboard": ("tensorboard",), "none": ()}
REPORT_TO["both"] = REPORT_TO["wandb"] + REPORT_TO["tensorboard"]


def check_trackers(report_to):
    """Raise UserError for an unknown report_to or one whose package is not installed."""
    if report_to not in REPORT_TO:
        raise UserError(f"report_to is {report_to}, but must be one of {', '.join(REPORT_TO)}")
    for package in REPORT_TO[report_to]:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a plain folder of that name, such as W&B's
            other = "--report-to none" if package == "wandb" else "--report-to wandb"
            raise UserError(
                f"report_to is {report_to}, but {package} is not installed: pip install {package}, or add {other}"
            )


class Journal:
    """The log of a run: `rows`, which are also the lines of `folder`/log.jsonl, and their numbers as train/... in the
    trackers that train.py's `config` names in report_to.

    `past` is the checkpoint's state when a run resumes: its `log` and its W&B `run_id`. Only the first process writes;
    the Journal of the others has no folder and is silent.
    """

    def __init__(self, folder, config, past):
        self.rows, self.file, self.trackers = list(past.get("log", ())), None, []
        if folder:
            for name in REPORT_TO[config["report_to"]]:
                start = {"wandb": start_wandb, "tensorboard": start_tensorboard}[name]
                self.trackers.append(start(folder, config, self.rows, past.get("run_id")))
            self.wandb_pictures = config["wandb_pictures"]
            self.file = (folder / "log.jsonl").open("w", encoding="utf-8")
            self.file.writelines(json.dumps(row) + "\n" for row in self.rows)

    @property
    def run_id(self):
        """The id of the W&B run, or None."""
        return next((t.tracker.id for t in self.trackers if t.name == "wandb"), None)

    def record(self, **row):
        """Log the numbers of a step."""
        if self.file:
            self.rows.append(row)
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            numbers = {f"train/{k}": v for k, v in row.items() if isinstance(v, (int, float))}
            for tracker in self.trackers:
                # W&B counts its own calls; a step may have two.
                tracker.log(numbers, step=None if tracker.name == "wandb" else row["step"])

    def show(self, step, images):
        """Log the PIL images of a preview: to TensorBoard, whose files stay here, and to W&B if `config` allows it."""
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                import numpy as np

                tracker.log_images({"preview": np.stack(images)}, step=step, dataformats="NHWC")
            elif self.wandb_pictures:
                from wandb import Image

                tracker.log({"preview": [Image(image) for image in images], "train/step": step})

    def finish(self, exit_code=0):
        """Close the file and the trackers."""
        if self.file:
            self.file.close()
            for tracker in self.trackers:
                if tracker.name == "wandb":
                    tracker.tracker.finish(exit_code=exit_code)
                else:
                    tracker.finish()


def start_tensorboard(folder, config, rows, run_id):
    """accelerate's TensorBoard tracker, writing to `folder`/tensorboard. Rows after the last checkpoint are purged."""
    from accelerate.tracking import TensorBoardTracker

    done = rows[-1]["step"] if rows else -1
    tracker = TensorBoardTracker("tensorboard", folder, purge_step=done + 1)
    tracker.start()
    return tracker


def has_key():
    """Whether W&B has an API key, in the environment or from `wandb login`, and so will not ask for one."""
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname or "api.wandb.ai"
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(os.environ.get("NETRC")).authenticators(host):
            return True
    return bool(os.environ.get("WANDB_API_KEY"))


def start_wandb(folder, config, rows, run_id):
    """accelerate's tracker with a W&B run: online with an API key, otherwise offline; WANDB_MODE overrides. Never asks.

    It receives the configuration and the numbers, no code, no captions, no prompts, and images only with
    `config`["wandb_pictures"]. `run_id` continues an interrupted run.
    """
    import wandb
    from accelerate.tracking import WandBTracker

    mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    if mode in ("online", "run", "shared") and not has_key():
        print(f"note: WANDB_MODE is {mode}, but there is no API key (wandb login): W&B logs offline")
        mode = "offline"
    texts = [name for name in config if name.endswith(("prompts", "captions", "class"))]
    shown = {name: value for name, value in config.items() if name not in texts}
    # W&B's metadata of the machine include the command line.
    options = tuple("--" + name.replace("_", "-") for name in texts)
    typed = any(argument.startswith(options) for argument in sys.argv)

    def start(mode):
        tracker = WandBTracker(
            config["wandb_project"],
            name=config["run_name"],
            config=shown,
            id=run_id,
            mode=mode,
            resume="allow" if run_id else None,
            settings=wandb.Settings(
                console="off",
                silent=True,
                x_disable_meta=typed,
                # Whatever WANDB_SAVE_CODE and the account say: scripts contain prompts too.
                save_code=False,
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
            ),
        )
        tracker.start()
        return tracker

    try:
        return start(mode)
    except Exception as problem:
        # No network, a wrong key, an unknown mode: no reason to end a training run.
        print(f"W&B cannot start ({one_line(problem, 120)}): logging offline")
        os.environ["WANDB_MODE"] = "offline"
        return start("offline")
