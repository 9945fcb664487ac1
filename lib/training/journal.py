"""What a run tells of itself while it trains: log.jsonl, and the trackers that were asked for."""

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
    """Raise UserError for a report_to that is unknown or whose package is not installed."""
    if report_to not in REPORT_TO:
        raise UserError(f"report_to is {report_to}, but must be one of {', '.join(REPORT_TO)}")
    for package in REPORT_TO[report_to]:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:  # a mere folder of that name, as W&B leaves one
            other = "--report-to none" if package == "wandb" else "--report-to wandb"
            raise UserError(
                f"report_to is {report_to}, but {package} is not installed: pip install {package}, or add {other}"
            )


class Journal:
    """The log of a run: `rows`, the same in `folder`/log.jsonl, and their numbers under train/ in the
    trackers that `config`, train.py's, names in report_to.

    Of an interrupted run that goes on, `past` is the checkpoint's state: its `log` and its W&B `run_id`.
    Of several processes the first one writes; the others have a Journal without a folder, which is silent.
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
        """The W&B run's, or None."""
        return next((t.tracker.id for t in self.trackers if t.name == "wandb"), None)

    def record(self, **row):
        """Log the figures of a step."""
        if self.file:
            self.rows.append(row)
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            numbers = {f"train/{k}": v for k, v in row.items() if isinstance(v, (int, float))}
            for tracker in self.trackers:
                # W&B counts its own calls, of which a step may have two.
                tracker.log(numbers, step=None if tracker.name == "wandb" else row["step"])

    def show(self, step, pictures):
        """Give the trackers the PIL images of a preview: TensorBoard, whose files stay here, and W&B
        where that was asked for."""
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                import numpy as np

                tracker.log_images({"preview": np.stack(pictures)}, step=step, dataformats="NHWC")
            elif self.wandb_pictures:
                from wandb import Image

                tracker.log({"preview": [Image(p) for p in pictures], "train/step": step})

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
    """accelerate's tracker for TensorBoard, writing to `folder`/tensorboard.

    Of an interrupted run that goes on, what was logged after its last checkpoint is to be passed over.
    """
    from accelerate.tracking import TensorBoardTracker

    done = rows[-1]["step"] if rows else -1
    tracker = TensorBoardTracker("tensorboard", folder, purge_step=done + 1)
    tracker.start()
    return tracker


def has_key():
    """Whether W&B finds an API key without asking for one: in the environment, or where `wandb login` put it."""
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname or "api.wandb.ai"
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(os.environ.get("NETRC")).authenticators(host):
            return True
    return bool(os.environ.get("WANDB_API_KEY"))


def start_wandb(folder, config, rows, run_id):
    """accelerate's tracker with a W&B run: online with an API key, else offline, never asking;
    WANDB_MODE decides if set.

    It gets the configuration and the figures, no code, no captions, no prompts, and no images unless
    `config`["wandb_pictures"]. With `run_id` a run that was interrupted goes on.
    """
    import wandb
    from accelerate.tracking import WandBTracker

    mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    if mode in ("online", "run", "shared") and not has_key():
        print(f"note: WANDB_MODE is {mode}, but there is no API key (wandb login): W&B logs offline")
        mode = "offline"
    texts = [name for name in config if name.endswith(("prompts", "captions", "class"))]
    shown = {name: value for name, value in config.items() if name not in texts}
    # What W&B notes of the machine includes the command line.
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
                # Whatever WANDB_SAVE_CODE and the account say: prompts stand in the script too.
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
        # No network, a wrong key, an unknown mode: not worth a training run.
        print(f"W&B cannot start ({one_line(problem, 120)}): logging offline")
        os.environ["WANDB_MODE"] = "offline"
        return start("offline")
