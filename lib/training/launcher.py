"""What `accelerate launch` passes on of its configuration, which another project may have left."""

import os

from lib.cache import first_process

# Variables of its environment that Accelerator() obeys and this training has no use for: every process holds a whole
# model, whose adapter's few gradients it averages.
NOT_USED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "its parallelism_config",
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile",
}
# What train.py's own keys say: (what accelerate says where nobody chose, the key).
OWN = {
    "ACCELERATE_MIXED_PRECISION": ("no", "mixed_precision"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "gradient_accumulation_steps"),
}


def only_processes(config):
    """Let the launcher decide on the processes alone, and say what else it asked for that is not done; `config` is
    train.py's. Before torch is imported."""
    asked = [
        name
        for variable, name in NOT_USED.items()
        if os.environ.pop(variable, "no").lower() not in ("no", "false", "0", "")
    ]
    for variable, (default, key) in OWN.items():
        said = os.environ.pop(variable, default)
        if said not in (default, str(config[key])):
            asked.append(f"{key} {said} (--{key.replace('_', '-')} says it here: {config[key]})")
    if asked and first_process():
        print(f"note: accelerate's configuration asks for {', '.join(asked)}, which is not used")
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or half of the training would see a GPU
