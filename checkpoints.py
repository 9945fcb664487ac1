"""A training run's state on disk, so that a run killed at any step goes on from the last one saved.

A checkpoint is one safetensors file: the flat parameters, the optimizer's state, and in its header,
as JSON, everything else. Noise, timesteps and data order derive from (seed, sample number), so
nothing random is saved. Each file carries the SHA-256 of its own content: one that is truncated,
zero-filled or altered is named and passed over for the one before it.
"""

import hashlib
import json
import re

import safetensors.torch
from safetensors import SafetensorError

from common import one_line, write_bytes

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
    text = json.dumps(state | {"step": step})
    header = {"state": text, "sha256": digest(tensors, text)}
    # Copies, because tensors may share memory (the optimizer's quantization map), files may not.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path = folder / f"checkpoint_{step:07}.safetensors"
    write_bytes(path, safetensors.torch.save(copies, metadata=header))
    remove(folder, keep)


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


def latest(folder, say=print):
    """(tensors, state) of the newest whole checkpoint in `folder`, or None; the damaged are named."""
    for path in listed(folder):
        try:
            return read(path)
        except ValueError as problem:
            say(f"warning: {path} is passed over: {problem}")
    return None
