"""The process of a training run: what its launcher asks for, the signals that stop it, and the advice if it fails."""

import os
import signal
import time

from lib.cache import first_process
from lib.config import half_resolution
from lib.errors import UserError, heeded, memory_for

# ---- accelerate launch -----------------------------------------------------------------------------

# Variables of `accelerate launch` that Accelerator() would obey but that do not apply here: every process holds a whole
# model, and only the adapter's gradients are averaged. The configuration may be that of another project.
UNUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "its parallelism_config",
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile",
}
# Variables for which CONFIG has a key: (accelerate's default, the key).
IN_CONFIG = {
    "ACCELERATE_MIXED_PRECISION": ("no", "mixed_precision"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "gradient_accumulation_steps"),
}


def only_processes(config):
    """Keep only the process settings of the launcher's environment, and print a note about the rest. Call this before
    torch is imported."""
    unused = [
        name
        for variable, name in UNUSED.items()
        if os.environ.pop(variable, "no").lower() not in ("no", "false", "0", "")
    ]
    for variable, (default, key) in IN_CONFIG.items():
        value = os.environ.pop(variable, default)
        if value not in (default, str(config[key])):
            unused.append(f"{key} {value} (--{key.replace('_', '-')} sets it here: {config[key]})")
    if unused and first_process():
        print(f"note: accelerate's configuration asks for {', '.join(unused)}, which is not used")
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # otherwise part of the training would see a GPU


# ---- signals ---------------------------------------------------------------------------------------

SAME_SIGNAL = 2.0  # seconds within which a repeated signal counts as one


class StopSignals:
    """Keeps STOP_SIGNALS in `received` until the current step is done.

    A second signal ends the process at once, unless it comes within SAME_SIGNAL seconds: a batch system signals a
    launcher and its workers alike, and the launcher passes it on, so that a worker receives it twice.
    """

    def __enter__(self):
        self.received, self.since = 0, None
        self.before = {s: signal.signal(s, self.note) for s in heeded()}
        return self

    def note(self, number, frame):
        if not self.received:
            self.received, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > SAME_SIGNAL:
            os._exit(128 + number)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def agreed(stopping, step, every, accelerator):
    """The signal after which all processes stop at `step`, or 0.

    A signal may reach the processes in different steps, so several processes agree only every `every` steps.
    """
    if accelerator.num_processes == 1:
        return stopping
    if step % every:
        return 0
    import torch

    mine = torch.tensor([stopping], device=accelerator.device)
    return int(accelerator.gather(mine).max())


# ---- advice ----------------------------------------------------------------------------------------


def memory_advice(config):
    """The options that make a training need less GPU memory: a sentence."""
    options = []
    if config["batch_size"] > 1:
        options.append(f"--batch-size {config['batch_size'] // 2}")
    if not config["gradient_checkpointing"]:
        options.append("--gradient-checkpointing")
    if config["mixed_precision"] == "no":
        options.append("--mixed-precision fp16")
    if not options:
        smaller = half_resolution(config["resolution"])
        return f"close what else uses the GPU (nvidia-smi lists it); --resolution {smaller} needs less"
    return f"{' or '.join(options)} needs less"


def training_memory(config):
    """Turns running out of memory in training into an error with advice."""
    return memory_for(f"training with batch_size {config['batch_size']}", memory_advice(config))


def not_finite(problem, step, names, advice):
    """The UserError for a step (counted from 0) with non-finite numbers; `names` are its images."""
    line = f"{problem} at step {step + 1} ({', '.join(sorted(names))}). Are the learning rates too high?"
    return UserError(line, advice) if advice else UserError(line)


def rollback_advice(step, folder):
    """How to continue from the checkpoint of `step` in `folder`; `step` is None if no good one is left."""
    lower = "with lower ones (--unet-learning-rate, --text-encoder-learning-rate)"
    if step is None:
        return f"no checkpoint is from before the weights broke: the same command {lower} starts over"
    return (
        f"the checkpoint of step {step} in {folder} is the last good one: {lower} the same command continues from it; "
        "with --no-resume it starts over"
    )
