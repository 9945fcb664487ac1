"""What a person is told to do when training cannot go on: memory that is too small, numbers that are not finite."""

from lib.config import half_resolution
from lib.errors import UserError, memory_for


def memory_advice(config):
    """What to change in a configuration whose training needs too much GPU memory: a sentence."""
    found = []
    if config["batch_size"] > 1:
        found.append(f"--batch-size {config['batch_size'] // 2}")
    if not config["gradient_checkpointing"]:
        found.append("--gradient-checkpointing")
    if config["mixed_precision"] == "no":
        found.append("--mixed-precision fp16")
    if not found:
        smaller = half_resolution(config["resolution"])
        return f"close what else uses the GPU (nvidia-smi lists it); --resolution {smaller} needs less"
    return f"{' or '.join(found)} needs less"


def training_memory(config):
    """What to say when the GPU's memory is too small for the training."""
    return memory_for(f"training with batch_size {config['batch_size']}", memory_advice(config))


def not_finite(problem, step, pictures, advice):
    """The UserError of a step whose numbers are not finite, before whose update the run stops."""
    line = f"{problem} at step {step + 1} ({', '.join(sorted(pictures))}). Are the learning rates too high?"
    return UserError(line, advice) if advice else UserError(line)


def going_back(step, folder):
    """How such a run goes on from the checkpoint of `step` in `folder`, None if it has no good one: a sentence."""
    lower = "with lower ones (--unet-learning-rate, --text-encoder-learning-rate)"
    if step is None:
        return f"no checkpoint is from before the weights broke: the same command {lower} begins anew"
    return (
        f"the checkpoint of step {step} in {folder} is the last good one: {lower} the same command goes on from "
        "there; with --no-resume it begins anew"
    )
