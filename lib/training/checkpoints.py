"""A training run's state on disk, so that a run killed at any step goes on from the last one saved.

A checkpoint is one safetensors file: the flat parameters, the optimizer's state, and in its header,
as JSON, everything else. Noise, timesteps and data order derive from (seed, sample number), so
nothing random is saved. Each file carries the SHA-256 of its own content: one that is truncated,
zero-filled or altered is named and passed over for the one before it.
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

# These may change after numbers that were not finite: they may be the reason.
LEARNING_RATES = ("unet_learning_rate", "text_encoder_learning_rate")
# Those that may be called otherwise after a move, through a link or on another machine: their hashes count.
PLACES = ("data_dir", "base_model", "revision", "protected_prompts")
BASE_MODEL, DATA = "the base model's files", "images and captions"  # these hashes
# Packages whose version may change the numbers.
NUMERIC = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes")
NAME = re.compile(r"checkpoint_(\d+)\.safetensors")


def digest(tensors, state):
    """SHA-256 over the state's JSON and the tensors' names, shapes, types and bytes."""
    found = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.flatten().numpy().tobytes())
    return found.hexdigest()


def listed(folder):
    """The checkpoint files in `folder`, newest first."""
    files = [path for path in folder.glob("checkpoint_*.safetensors") if NAME.fullmatch(path.name)]
    return sorted(files, key=lambda path: int(NAME.fullmatch(path.name)[1]), reverse=True)


def save(folder, step, tensors, state, keep):
    """Write the checkpoint of `step` (steps done), then remove all but the newest `keep`.

    `tensors` is a dict of tensors, `state` of what JSON can hold. Older files go only once the new
    one is in its place.
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
    """Remove all but the newest `keep` checkpoints, and what a save that was killed left half."""
    for path in [*listed(folder)[keep:], *folder.glob(".checkpoint_*.new")]:
        path.unlink()


def read(path):
    """(tensors, state) of one checkpoint; ValueError saying what is wrong with it."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # Copies: the file's own memory would keep it open, and on Windows from being removed.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        state = json.loads(header["state"])
        intact = digest(tensors, header["state"]) == header["sha256"]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as problem:
        raise ValueError(f"it cannot be read ({one_line(problem, 80)})") from None
    if not intact:
        raise ValueError("its content does not match its checksum")
    return tensors, state


def go_back(folder, updates):
    """Leave, as the newest checkpoint in `folder`, one whose weights are known to be good, and mark it, so that
    learning rates may differ from there on; return its step, or None if there is none.

    A run that stops at NaN after so many `updates` was broken by the last of them: a checkpoint is good if an
    update followed it. One that is marked already, because a run that went on from it ended so again, may have been
    broken more slowly: it gives way to an older one, where there is one.
    """
    found = []
    for path in listed(folder):
        with contextlib.suppress(ValueError):  # damaged: it stays, to be named when the run goes on
            tensors, state = read(path)
            if state["updates"] < updates:
                found.append((path, tensors, state))
            else:
                path.unlink()
    if len(found) > 1 and found[0][2]["gave_up"]:
        found.pop(0)[0].unlink()
    if not found:
        return None
    path, tensors, state = found[0]
    write(path, tensors, state | dict(gave_up=True))
    return state["step"]


def latest(folder, say=print):
    """(tensors, state) of the newest whole checkpoint in `folder`, or None; the damaged are named."""
    for path in listed(folder):
        try:
            return read(path)
        except ValueError as problem:
            say(f"warning: {path} is passed over: {problem}")
    return None


# ---- the state of a run -----------------------------------------------------------------------


def identity(config, data, base_folder, accelerator, protected=None):
    """What must be equal for a checkpoint to be continued bit for bit: a dict of JSON values."""
    found = {key: value for key, value in config.items() if key not in WITHOUT_EFFECT}
    found[DATA] = data.sha256
    if config["mask_weight"] != 1.0:
        found["masks"] = data.masks_sha256()
    if protected:
        found["protected prompts"] = protected.sha256
    half = accelerator.mixed_precision == "fp16"
    found[BASE_MODEL] = base_model_digest(base_folder, half)
    found |= {package: version(package) for package in NUMERIC}
    found["processes"] = accelerator.num_processes
    found["device"] = accelerator.device.type
    return json.loads(json.dumps(found))


def check_same_run(state, now, folder):
    """{key: (then, now)} of what the interrupted run in `folder`, whose checkpoint holds `state`, did
    otherwise and may: its learning rates, if it stopped at numbers that are not finite.

    UserError listing the differences if it was another run.
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
            "Change that back to continue it, or add --no-resume to drop it and start anew"
        )
    return differing


def check_same_everywhere(this_run, saved, accelerator):
    """UserError in every process unless all, perhaps on several machines, are about to train the same run from the
    same checkpoint: `this_run` is `identity`'s, `saved` what `latest` gave. All have read it when this returns."""
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
    """The learning rates that were changed on the way, oldest first, of the run that goes on from
    `state`: a list of dicts. What differs from when it was interrupted is said."""
    changes, changed = state.get("changes", []), check_same_run(state, now, folder)
    if changed:
        changes = [*changes, dict(after_step=state["step"], **changed)]
    for key, (then, new) in changed.items():
        say(f"{key}: {new} from now on, {then} before")
    commit = code_commit()
    if state.get("commit") and commit and state["commit"] != commit:
        say(f"note: the code's commit was {state['commit']} when this run was interrupted, it is {commit} now")
    return changes


def optimizer_state(optimizer, flats, names):
    """(tensors, numbers) of the optimizer's state, keyed “group.name”."""
    tensors, numbers = {}, {}
    for name, flat in zip(names, flats, strict=True):
        for key, value in optimizer.state[flat].items():
            (tensors if torch.is_tensor(value) else numbers)[f"{name}.{key}"] = value
    return tensors, numbers


@dataclass
class Progress:
    """How far a run has come, beside its tensors."""

    step: int  # optimizer steps done
    loss_sum: torch.Tensor  # of the steps since the last row of the log
    loss_count: int = 0  # how many these are
    skipped: int = 0  # steps whose gradient overflowed in fp16
    changes: list = field(default_factory=list)  # of learning rates; see `continued`

    def add(self, loss):
        """Count a step that is done and its loss."""
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

    `trained` is {component: LoraParameters}, `scaler` accelerate's or None, `journal` the run's. Of the checkpoints
    the newest `keep` stay, two at least: whether the newest is any good shows in the step after it.
    """

    def __init__(self, folder, this_run, trained, optimizer, scaler, journal, keep):
        self.folder, self.this_run, self.keep = folder, this_run, max(2, keep)
        self.trained, self.optimizer, self.scaler = trained, optimizer, scaler
        self.journal = journal
        self.commit = code_commit()  # of the code that was loaded, whatever is checked out later

    def optimizer_state(self):
        """See the function of that name."""
        flats = [part.flat for part in self.trained.values()]
        return optimizer_state(self.optimizer, flats, [f"{name}.optimizer" for name in self.trained])

    def updates(self):
        """How many updates were made: one a step, less those that were skipped for fp16."""
        numbers = self.optimizer_state()[1]
        return max((n for key, n in numbers.items() if key.endswith(".step")), default=0)

    def go_back(self):
        """See the function of that name, of this run."""
        return go_back(self.folder, self.updates())

    def save(self, progress):
        """Write the checkpoint of `progress`."""
        tensors, numbers = self.optimizer_state()
        for name, part in self.trained.items():
            tensors[f"{name}.parameters"] = part.flat.data
            tensors |= {f"{name}.projection.{i}": p for i, (_, p, _) in enumerate(part.projected)}
        tensors["loss_sum"] = progress.loss_sum
        state = dict(
            identity=self.this_run,
            optimizer=numbers,
            log=self.journal.rows,
            loss_count=progress.loss_count,
            skipped=progress.skipped,
            scaler=self.scaler.state_dict() if self.scaler else None,
            run_id=self.journal.run_id,
            gave_up=False,
            updates=self.updates(),
            changes=progress.changes,
            commit=self.commit,
        )
        save(self.folder, progress.step, tensors, state, self.keep)

    def restore(self, saved, progress):
        """Put a checkpoint, as `latest` gives it, into the run's tensors and into `progress`."""
        tensors, state = saved
        progress.step, progress.skipped = state["step"], state["skipped"]
        progress.loss_count = state["loss_count"]
        progress.loss_sum.copy_(tensors["loss_sum"])
        for name, part in self.trained.items():
            part.flat.data.copy_(tensors[f"{name}.parameters"])
            for i, (_, projection, _) in enumerate(part.projected):
                projection.copy_(tensors[f"{name}.projection.{i}"])
            mine = f"{name}.optimizer."
            kept = {k.removeprefix(mine): v for k, v in tensors.items() if k.startswith(mine)}
            kept = {key: value.to(part.flat.device) for key, value in kept.items()}
            kept |= {k.removeprefix(mine): v for k, v in state["optimizer"].items() if k.startswith(mine)}
            self.optimizer.state[part.flat].update(kept)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
