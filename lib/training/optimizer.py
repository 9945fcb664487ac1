"""The optimizer of train.py. To train with another one, change `make_optimizer` and nothing else.

Checkpoints, config.json, the model card and kohya's header follow from what it returns.
"""

import bitsandbytes
import torch


def make_optimizer(groups, config):
    """The optimizer of `groups`, one for each trained model: [dict(params=[flat float32 vector], lr=peak rate)]."""
    return bitsandbytes.optim.AdamW8bit(
        groups, betas=(config["adam_beta1"], config["adam_beta2"]), weight_decay=config["adam_weight_decay"]
    )


def optimizer_record(config):
    """What config.json says about the optimizer: dict(name=its class, settings=in words)."""
    optimizer = make_optimizer([dict(params=[torch.nn.Parameter(torch.zeros(1))], lr=0.0)], config)
    kind, group = type(optimizer), optimizer.param_groups[0]
    words = ["8-bit AdamW" if kind.__name__ == "AdamW8bit" else kind.__name__]
    if "betas" in group:
        words.append(f"betas {' and '.join(f'{beta:g}' for beta in group['betas'])}")
    if "weight_decay" in group:
        words.append(f"weight decay {group['weight_decay']:g}")
    return dict(name=f"{kind.__module__}.{kind.__qualname__}", settings=", ".join(words))


def eight_bit_states(optimizer, trained):
    """bitsandbytes' 8-bit state of each flat vector, initialised where it is missing, for lib/kernels/adamw8bit.py.

    None for any other optimizer, for groups with different settings, and for vectors so short that bitsandbytes keeps
    their state in 32 bits.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
    if type(optimizer) is not bitsandbytes.optim.AdamW8bit:
        return None
    settings = {(*group["betas"], group["eps"], group["weight_decay"]) for group in optimizer.param_groups}
    if len(settings) > 1 or any(part.flat.numel() < optimizer.args.min_8bit_size for part in trained.values()):
        return None
    for number, part in enumerate(trained.values()):
        if not optimizer.state[part.flat]:
            optimizer.init_state(optimizer.param_groups[number], part.flat, number, 0)
    return [optimizer.state[part.flat] for part in trained.values()]


def state_of(optimizer, trained):
    """(tensors, values) of an optimizer for a checkpoint, keyed "component.optimizer.name".

    They are the state of each flat vector, and the other entries of its group, in which Prodigy for one keeps its
    estimate of the learning rate ("component.group.name").
    """
    tensors, values = {}, {}
    for (name, part), group in zip(trained.items(), optimizer.param_groups, strict=True):
        entries = {f"{name}.optimizer.{key}": value for key, value in optimizer.state[part.flat].items()}
        # Every step sets lr.
        entries |= {f"{name}.group.{key}": value for key, value in group.items() if key not in ("params", "lr")}
        for key, value in entries.items():
            (tensors if torch.is_tensor(value) else values)[key] = value
    return tensors, values


def restore_state(optimizer, trained, tensors, values):
    """Give an optimizer the state that `state_of` returned, read back from a file."""
    entries = {**tensors, **values}
    for (name, part), group in zip(trained.items(), optimizer.param_groups, strict=True):
        for key, value in with_prefix(f"{name}.group.", entries):
            group[key] = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        for key, value in with_prefix(f"{name}.optimizer.", entries):
            # PyTorch's own optimizers count their steps on the CPU, except for CUDA graphs.
            stays = key == "step" and not (group.get("capturable") or group.get("fused"))
            moves = torch.is_tensor(value) and not stays
            optimizer.state[part.flat][key] = value.to(part.flat.device) if moves else value


def with_prefix(prefix, entries):
    """[(key without `prefix`, value)] of the entries that have it."""
    return [(key.removeprefix(prefix), value) for key, value in entries.items() if key.startswith(prefix)]
