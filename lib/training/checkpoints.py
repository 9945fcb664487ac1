"""A training run's state on disk: a run killed at any step resumes bit for bit from the last checkpoint.

A checkpoint is one safetensors file: the flat parameters, the optimizer's state and, as JSON in its header, everything
else. Noise, timesteps and data order derive from (seed, sample number), so no random state is saved. Each file carries
the SHA-256 of its own content: a truncated, zero-filled or altered one is reported, and the one before it is used.
"""

import contextlib
import hashlib
import json
import re
from dataclasses import dataclass, field
from importlib.metadata import version

import safetensors.torch
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError

from lib.errors import UserError, one_line
from lib.files import write_bytes
from lib.models import base_model_digest
from lib.provenance import code_commit
from lib.run_config import WITHOUT_EFFECT, differences
from lib.training.optimizer import optimizer_record, restore_state, state_of

# These may change after non-finite numbers, which they may have caused.
LEARNING_RATES = ("unet_learning_rate", "text_encoder_learning_rate")
# Their names may change, by a move, a link or another machine; the hashes of their content may not.
PLACES = ("data_dir", "base_model", "revision", "protected_prompts")
BASE_MODEL, DATA = "the base model's files", "images and captions"  # these hashes
# Packages whose version may change the numbers.
NUMERIC = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes")
NAME = re.compile(r"checkpoint_(\d+)\.safetensors")


# ---- files -----------------------------------------------------------------------------------------


def digest(tensors, state):
    """SHA-256 over the state's JSON and the tensors' names, shapes, types and bytes."""
    sha256 = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha256.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha256.update(tensor.flatten().numpy().tobytes())
    return sha256.hexdigest()


def listed(folder):
    """The checkpoint files in `folder`, newest first."""
    files = [path for path in folder.glob("checkpoint_*.safetensors") if NAME.fullmatch(path.name)]
    return sorted(files, key=lambda path: int(NAME.fullmatch(path.name)[1]), reverse=True)


def save(folder, step, tensors, state, keep):
    """Write the checkpoint after `step` steps, then remove all but the newest `keep`.

    `tensors` is a dict of tensors, `state` one of JSON values.
    """
    write(folder / f"checkpoint_{step:07}.safetensors", tensors, state | {"step": step})
    remove(folder, keep)


def write(path, tensors, state):
    """Write one checkpoint."""
    text = json.dumps(state)
    header = {"state": text, "sha256": digest(tensors, text)}
    # Copies, because tensors may share memory (the optimizer's quantization map), files may not.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(copies, metadata=header))


def remove(folder, keep=0):
    """Remove all but the newest `keep` checkpoints, and half-written files of killed processes."""
    for path in [*listed(folder)[keep:], *folder.glob(".checkpoint_*.new")]:
        path.unlink()


def read(path):
    """(tensors, state) of a checkpoint; ValueError with the reason if it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # Copies: the file's own memory would keep it open, and Windows cannot remove an open file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        state = json.loads(header["state"])
        intact = digest(tensors, header["state"]) == header["sha256"]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as problem:
        raise ValueError(f"it cannot be read ({one_line(problem, 80)})") from None
    if not intact:
        raise ValueError("its content does not match its checksum")
    return tensors, state


def latest(folder, say=print):
    """(tensors, state) of the newest intact checkpoint in `folder`, or None; damaged ones are named."""
    for path in listed(folder):
        try:
            return read(path)
        except ValueError as problem:
            say(f"warning: {path} is skipped: {problem}")
    return None


def go_back(folder, updates):
    """Make a checkpoint with good weights the newest one in `folder`; returns its step, or None if there is none.

    After non-finite numbers, the last of `updates` broke the weights: a checkpoint with fewer updates is good.
    That checkpoint is marked, so that learning rates may change from there on. If it is already marked, the run broke
    again after it, perhaps because its weights were slowly diverging; an older one replaces it, if there is one.
    """
    good = []
    for path in listed(folder):
        with contextlib.suppress(ValueError):  # a damaged one stays, to be named on resuming
            tensors, state = read(path)
            if state["updates"] < updates:
                good.append((path, tensors, state))
            else:
                path.unlink()
    if len(good) > 1 and good[0][2]["gave_up"]:
        good.pop(0)[0].unlink()
    if not good:
        return None
    path, tensors, state = good[0]
    write(path, tensors, state | dict(gave_up=True))
    return state["step"]


# ---- the same run ----------------------------------------------------------------------------------


def identity(config, data, base_folder, accelerator, protected=None):
    """What must be equal for a checkpoint to be resumed bit for bit: a dict of JSON values."""
    same = {key: value for key, value in config.items() if key not in WITHOUT_EFFECT}
    same["optimizer"] = optimizer_record(config)["name"]
    same[DATA] = data.sha256
    if config["mask_weight"] != 1.0:
        same["masks"] = data.masks_sha256()
    if protected:
        same["protected prompts"] = protected.sha256
    same[BASE_MODEL] = base_model_digest(base_folder, accelerator.mixed_precision == "fp16")
    same |= {package: version(package) for package in NUMERIC}
    same["processes"] = accelerator.num_processes
    same["device"] = accelerator.device.type
    return json.loads(json.dumps(same))


def check_same_run(state, now, folder):
    """UserError with all differences unless the checkpoint `state` in `folder` belongs to the run `now`, an `identity`.

    Returns the differences that are allowed, {key: (then, now)}: learning rates, after non-finite numbers.
    """
    saved = state["identity"]
    may = LEARNING_RATES if state.get("gave_up") else ()
    differing = differences(saved, now, PLACES)
    of = {BASE_MODEL: "base_model", DATA: "data_dir"}
    refused = []
    for key, (then, new) in differing.items():
        if key in of:
            places = [f"{run.get(of[key])} {when}" for run, when in ((saved, "then"), (now, "now"))]
            refused.append(f"{key} ({of[key]}: {', '.join(places)})")
        elif key not in may:
            refused.append(f"{key}: {then} then, {new} now")
    if refused:
        raise UserError(
            f"{folder} holds an interrupted run that differs from this one in {'; '.join(refused)}. "
            "Change that back to continue it, or add --no-resume to drop it and start over"
        )
    return differing


def check_same_everywhere(this_run, saved, accelerator):
    """Raises UserError in every process unless all are about to train `this_run` from the same checkpoint.

    `this_run` is from `identity`, `saved` from `latest`. All processes have read it when this returns.
    """
    step = f"step {saved[1]['step']}" if saved else "none"
    mine = {"checkpoint": step} | {k: v for k, v in this_run.items() if k not in PLACES}
    every = gather_object([mine])
    for process, other in enumerate(every):
        differing = [
            f"{key} ({every[0].get(key)} in process 0, {other.get(key)} there)"
            for key in mine
            if other.get(key) != every[0].get(key)
        ]
        if differing:
            raise UserError(
                f"process {process} trains something else than process 0: {'; '.join(differing)}. All machines "
                "need the same command, packages and base model, and data_dir and output_dir in a shared folder"
            )


def continued(state, now, folder, say):
    """The changes of learning rates of the run that resumes from `state`, oldest first: a list of dicts.

    A new change and another commit of the code are printed.
    """
    changes, changed = state.get("changes", []), check_same_run(state, now, folder)
    if changed:
        changes = [*changes, dict(after_step=state["step"], **changed)]
    for key, (then, new) in changed.items():
        say(f"{key}: {new} from now on, {then} before")
    commit = code_commit()
    if state.get("commit") and commit and state["commit"] != commit:
        say(f"note: the code's commit was {state['commit']} when this run was interrupted, it is {commit} now")
    return changes


# ---- the state of a run ----------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run has come, apart from its tensors."""

    step: int  # optimizer steps done
    loss_sum: torch.Tensor  # of the steps since the last row of the log
    loss_count: int = 0  # the number of those steps
    skipped: int = 0  # steps whose gradient overflowed in fp16
    updates: int = 0  # the other steps
    changes: list = field(default_factory=list)  # of learning rates (see `continued`)

    def add(self, loss):
        """Count a finished step and its loss."""
        self.step += 1
        self.loss_sum += loss
        self.loss_count += 1

    def mean_loss(self, accelerator):
        """The mean loss over processes and over the steps since the last call: a float."""
        mean = accelerator.reduce(self.loss_sum, "mean").item() / self.loss_count
        self.loss_sum.zero_()
        self.loss_count = 0
        return mean


class Saver:
    """Saves and restores a run: its parameters, optimizer, loss scaler, log and progress.

    `trained` is {component: LoraParameters}, `scaler` accelerate's or None, `journal` the run's. It keeps the newest
    `keep` checkpoints, at least two: only the step after a checkpoint shows whether it is good.
    """

    def __init__(self, folder, this_run, trained, optimizer, scaler, journal, progress, keep):
        self.folder, self.this_run, self.keep = folder, this_run, max(2, keep)
        self.trained, self.optimizer, self.scaler = trained, optimizer, scaler
        self.journal, self.progress = journal, progress
        self.commit = code_commit()  # of the code that was loaded, whatever is checked out later

    def go_back(self):
        """See the function `go_back`."""
        return go_back(self.folder, self.progress.updates)

    def save(self):
        """Write a checkpoint."""
        progress, (tensors, values) = self.progress, state_of(self.optimizer, self.trained)
        for name, part in self.trained.items():
            tensors[f"{name}.parameters"] = part.flat.data
            tensors |= {f"{name}.projection.{i}": p for i, (_, p, _) in enumerate(part.projected)}
        tensors["loss_sum"] = progress.loss_sum
        state = dict(
            identity=self.this_run,
            optimizer=values,
            log=self.journal.rows,
            loss_count=progress.loss_count,
            skipped=progress.skipped,
            scaler=self.scaler.state_dict() if self.scaler else None,
            run_id=self.journal.run_id,
            gave_up=False,
            updates=progress.updates,
            changes=progress.changes,
            commit=self.commit,
        )
        save(self.folder, progress.step, tensors, state, self.keep)

    def restore(self, saved):
        """Restore a checkpoint from `latest`."""
        (tensors, state), progress = saved, self.progress
        progress.step, progress.skipped, progress.updates = state["step"], state["skipped"], state["updates"]
        progress.loss_count = state["loss_count"]
        progress.loss_sum.copy_(tensors["loss_sum"])
        for name, part in self.trained.items():
            part.flat.data.copy_(tensors[f"{name}.parameters"])
            for i, (_, projection, _) in enumerate(part.projected):
                projection.copy_(tensors[f"{name}.projection.{i}"])
        restore_state(self.optimizer, self.trained, tensors, state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
