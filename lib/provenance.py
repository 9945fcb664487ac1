"""The provenance of a run: package versions, git commit and device."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = "torch diffusers transformers peft accelerate bitsandbytes lpips pillow".split()


def provenance(device):
    """Package versions, git commit and device for config.json and metrics.json."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions["python"] = sys.version.split()[0]
    return {"versions": versions, "commit": code_commit(), "device": device_name(device)}


def code_commit():
    """The git commit of this code, with "-dirty" if files differ from it, or None."""
    try:
        commit = subprocess.run(
            ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True
        ).stdout.strip()
    except OSError:  # no git here
        return None
    return commit or None


def device_name(device):
    """The name of the GPU, or "CPU" and its number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
