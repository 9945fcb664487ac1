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
        return (
            f"close what else uses the GPU (nvidia-smi lists it); --resolution {smaller} needs less"
        )
    return f"{' or '.join(found)} needs less"


def training_memory(config):
    """What to say when the GPU's memory is too small for the training."""
    return memory_for(f"training with batch_size {config['batch_size']}", memory_advice(config))


def not_finite(problem, step, pictures, folder):
    """The UserError of a step whose numbers are not finite, before whose update the run stops."""
    return UserError(
        f"{problem} at step {step + 1} ({', '.join(sorted(pictures))}); the state after step {step} is "
        f"kept in {folder}. Are the learning rates too high? With lower ones (--unet-learning-rate, "
        "--text-encoder-learning-rate) the same command goes on from there"
    )
