"""LoRA and DoRA adapters in a model: added to be trained, or read from a file and merged into the weights.

    LoRA   W' = W + scale * (alpha / rank) * B A       Hu et al. 2021, https://arxiv.org/abs/2106.09685
    DoRA   W' = m * W'' / ‖W''‖, W'' = LoRA's W'        Liu et al. 2024, see LORA.md

W is [out, in], A [rank, in] and B [out, rank]; norms are those of rows, and m is [out]. An `Adapter` in memory holds A and
B of each adapted linear layer under the layer's module name.

A file's keys and the model's layers must match one to one. A mismatch is an error that counts and names them. The
underlying libraries would only warn and generate with the base model.
"""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from lib.errors import UserError


@dataclass
class Adapter:
    """An adapter as read from a file, in float32 on the CPU."""

    path: Path
    rank: dict = field(default_factory=dict)  # component -> rank
    alpha: dict = field(default_factory=dict)  # component -> alpha
    factors: dict = field(default_factory=dict)  # component -> {layer: (A, B)}
    magnitudes: dict = field(default_factory=dict)  # component -> {layer: m}, DoRA only
    targets: dict = field(default_factory=dict)  # component -> names of layers that its config adapts
    metadata: dict = field(default_factory=dict)  # as train.py wrote it: caption, data hash, …


# ---- into a model --------------------------------------------------------------------------


def add_lora(model, rank, alpha, targets, dora=False):
    """Add trainable LoRA layers, or DoRA layers, to the linear layers whose names end in `targets`.

    A starts as Kaiming-uniform noise, B as zero and DoRA's magnitudes as the norms of the weights' rows, so the model's
    output does not change yet. Returns {layer name: LoraLayer}. Raises UserError if a target matches no layer.
    """
    layers = [name for name, _ in target_layers(model, targets)]
    for target in targets:
        if not any(matches(name, (target,)) for name in layers):
            raise UserError(f"LoRA target {target} matches no layer of the {type(model).__name__}")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, init_lora_weights=True, use_dora=dora)
    inject_adapter_in_model(config, model)
    for name, magnitude in magnitudes(model).items():  # PEFT rounds them to the type of the weights
        weight = lora_layers(model)[name].get_base_layer().weight.data
        magnitude.data = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    return lora_layers(model)


def matches(name, targets):
    return any(name == target or name.endswith("." + target) for target in targets)


def target_layers(model, targets):
    """(name, linear layer) for each linear layer of `model` whose name ends in one of `targets`."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and matches(name, targets):
            yield name, module


def lora_layers(model):
    """{layer name: PEFT's LoraLayer}"""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def factors(model):
    """{layer name: (A, B)}, in the model's order."""
    return {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in lora_layers(model).items()
    }


def magnitudes(model):
    """{layer name: m [out]} of the DoRA layers, in the model's order; {} for LoRA."""
    return {
        name: layer.lora_magnitude_vector["default"].weight
        for name, layer in lora_layers(model).items()
        if layer.lora_magnitude_vector
    }


@torch.no_grad()
def dora_weights(model):
    """(layer name, W, W + alpha / rank * B A, m), in float32, for each DoRA layer."""
    layers = lora_layers(model)
    for name, magnitude in magnitudes(model).items():
        layer = layers[name]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        base = layer.get_base_layer().weight.float()
        yield name, base, base + layer.scaling["default"] * (b.float() @ a.float()), magnitude.float()


@torch.no_grad()
def dora_scales(model):
    """{layer name: m ‖W‖ / ‖W + alpha / rank * B A‖ [out, 1]}: kohya's dora_scale, as ComfyUI and `with_norms` read it."""
    return {
        name: (magnitude * base.norm(dim=1) / changed.norm(dim=1))[:, None]
        for name, base, changed, magnitude in dora_weights(model)
    }


@torch.no_grad()
def closest_lora(models, most, tolerance):
    """The plain LoRA closest to the DoRA layers of `models`: ({component: {layer: (A, B)}}, rank, error).

    B A is the truncated singular value decomposition of W' - W. All layers have the same rank, the smallest of an error
    of at most `tolerance`, but not above `most`. The error is ‖B A - (W' - W)‖ / ‖W' - W‖, Frobenius norms over all
    layers together. DoRA also scales each row of W, by little, which has full rank: the error falls slowly with the
    rank. Randomised, with a fixed seed (Halko et al. 2011, https://arxiv.org/abs/0909.4061).
    """
    parts, total, kept = {}, 0.0, torch.zeros(most, dtype=torch.float64)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        for component, model in models.items():
            rows = parts[component] = {}
            for name, base, changed, magnitude in dora_weights(model):
                change = with_norms(changed, base, magnitude) - base
                left, values, right = torch.svd_lowrank(change, min(most + 16, *change.shape), niter=2)
                values = values[:most]
                half = values.sqrt()
                rows[name] = half[:, None] * right[:, :most].T, left[:, :most] * half
                total += change.double().square().sum().item()
                kept[: len(values)] += values.double().square().cpu()
    errors = (1 - kept.cumsum(0) / total).clamp(min=0).sqrt().tolist()
    rank = next((number for number, error in enumerate(errors, 1) if error <= tolerance), most)
    pairs = {
        component: {name: (resized(a, rank, 0), resized(b, rank, 1)) for name, (a, b) in rows.items()}
        for component, rows in parts.items()
    }
    return pairs, rank, errors[rank - 1]


def resized(factor, rank, dim):
    """A factor cut or filled with zeros to `rank` along `dim`: a layer may be narrower than the rank."""
    kept = factor.narrow(dim, 0, min(rank, factor.shape[dim]))
    missing = [*kept.shape]
    missing[dim] = rank - kept.shape[dim]
    return torch.cat([kept, kept.new_zeros(missing)], dim)


def trained_weights(model):
    """The trained parameters of `model`: A and B of each layer, then DoRA's magnitudes."""
    pairs = [weight for pair in factors(model).values() for weight in pair]
    return [*pairs, *magnitudes(model).values()]


class Applied:
    """An adapter merged into the weights of `models`, {"unet": …, "text_encoder": …}; at first with scale 1.

    W' = W + scale * alpha / rank * B A, computed in float32 from a copy of W and rounded once. At scale 0 the model is
    the base model bit for bit. The weights change in place, so CUDA graphs keep reading the right ones. For DoRA,
    W' = W + scale * (trained weight - W); PEFT's scale changes only B A and does not give the base model at 0.
    Raises UserError unless the adapter's keys and the models' layers match one to one and in shape.
    """

    def __init__(self, adapter, models):
        self.layers = []
        for component, factors in adapter.factors.items():
            model, targets = models[component], adapter.targets.get(component)
            norms = adapter.magnitudes.get(component, {})
            rows = {name: (*pair, norms.get(name)) for name, pair in factors.items()}
            rows = match_layers(rows, model, targets, adapter.path, component)
            scaling = adapter.alpha[component] / adapter.rank[component]
            for name, (a, b, magnitude) in rows.items():
                weight = model.get_submodule(name).weight
                a, b = a.to(weight.device), b.to(weight.device) * scaling
                if magnitude is not None:
                    magnitude = magnitude.to(weight.device)
                self.layers.append((weight, weight.detach().clone(), a, b, magnitude))
        self.set_scale(1)

    @torch.no_grad()
    def set_scale(self, scale):
        """Merge `scale` times the adapter; 0 removes it."""
        for weight, base, a, b, magnitude in self.layers:
            if scale and magnitude is not None:
                start = base.float()
                trained = with_norms(start + (b @ a).view_as(base), start, magnitude)
                weight.copy_(torch.lerp(start, trained, float(scale)))
            else:
                weight.copy_(base.float() + scale * (b @ a).view_as(base) if scale else base)


def with_norms(weight, base, magnitude):
    """DoRA's weight, from `weight` = `base` + alpha / rank * B A.

    PEFT's magnitude [out] is the new norm of each row. Kohya's dora_scale [out, 1] is divided by the row's norm in
    `base`, as in ComfyUI; dora_scale [1, in] is the new norm of each column.
    """
    rows = weight.flatten(1)
    if magnitude.ndim == 1:
        scales = (magnitude / rows.norm(dim=1))[:, None]
    elif magnitude.shape[0] == len(rows):
        scales = magnitude / base.flatten(1).norm(dim=1, keepdim=True)
    else:
        scales = magnitude / rows.norm(dim=0, keepdim=True)
    return (rows * scales).view_as(weight)


def match_layers(rows, model, targets, path, component):
    """`rows`, {layer: (A, B, …)}, under the model's layer names, matched one to one; UserError if they do not match.

    transformers 5.6 dropped the prefix `text_model.` of a CLIP text encoder's layers, so names that differ only by it
    are the same layer. `targets` are the endings of the layers that the adapter adapts; by default, those in the file.
    """
    linear = {name: m for name, m in model.named_modules() if is_matrix(m)}
    if component == "text_encoder":
        prefixed = any(name.startswith("text_model.") for name in linear)
        bare = {name.removeprefix("text_model."): factor for name, factor in rows.items()}
        rows = {f"text_model.{name}" if prefixed else name: f for name, f in bare.items()}
    unknown = sorted(set(rows) - set(linear))
    empty = sorted({name for name in linear if matches(name, targets or endings(rows))} - set(rows))
    if not targets:  # a file that does not state its layers may lack whole blocks
        empty = [name for name in empty if block(name) in set(map(block, rows))]
    problems = []
    if unknown:
        problems.append(f"{len(unknown)} of {len(rows)} layers in the file are not in the model ({some(unknown)})")
    if empty:
        problems.append(f"{len(empty)} layers of the model have no weights in the file ({some(empty)})")
    if not problems:
        wrong = [name for name, (a, b, *_) in rows.items() if (b.shape[0], a.shape[1]) != linear[name].weight.shape[:2]]
        if wrong:
            problems.append(f"{len(wrong)} layers have another shape ({some(wrong)})")
    if problems:
        raise UserError(
            f"{path} does not fit the base model's {component}: {'; '.join(problems)}. "
            "Was it trained on another base model, or is the file damaged?"
        )
    return rows


def endings(layers):
    """The kinds of layers among names. A number needs the name before it (to_out.0), and attn1 (self-attention) and
    attn2 (cross-attention) are different kinds."""
    return {re.search(r"(attn\d\.)?[^.]+(\.\d+)?$", name)[0] for name in layers}


def block(layer):
    """The block that a layer is part of: down_blocks.0.attentions.1, encoder.layers.3, or else the layer itself."""
    match = re.match(r".*?(attentions|resnets|layers|downsamplers|upsamplers)\.\d+", layer)
    return match[0] if match else layer


def adapted_parts(adapter, models):
    """A list of phrases that name the adapted parts of `models`, if these are only a part of the blocks or one kind of
    attention and the file does not state so."""
    phrases = []
    for component, rows in adapter.factors.items():
        if adapter.targets.get(component):
            continue
        rows = match_layers(rows, models[component], None, adapter.path, component)
        matrices = (name for name, module in models[component].named_modules() if is_matrix(module))
        blocks = {block(name) for name in matrices if matches(name, endings(rows))}
        adapted = sorted(set(map(block, rows)))
        if len(adapted) < len(blocks):
            phrases.append(f"{len(adapted)} of {len(blocks)} blocks of the {component} ({some(adapted)})")
        kinds = {kind for name in rows for kind in ("attn1", "attn2") if f".{kind}." in name}
        if len(kinds) == 1:
            phrases.append("cross-attention (attn2)" if "attn2" in kinds else "self-attention (attn1)")
    return phrases


def is_matrix(module):
    """Whether a layer is linear or a 1x1 convolution, such as proj_in and proj_out of Stable Diffusion 1.x."""
    return isinstance(module, torch.nn.Linear) or (isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1))


def some(names):
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def fingerprint(adapter):
    """SHA-256 of the sorted tensors and alpha: equal for equal adapters in any folder and layout, with any header."""
    digest = hashlib.sha256()
    for part in sorted(adapter.factors):
        rows = {name: [*pair] for name, pair in adapter.factors[part].items()}
        for name, magnitude in adapter.magnitudes.get(part, {}).items():
            rows[name].append(magnitude)
        rows = {name.removeprefix("text_model."): weights for name, weights in rows.items()}
        digest.update(f"{part} alpha={float(adapter.alpha[part])}".encode())
        for name in sorted(rows):
            for weight in rows[name]:
                digest.update(f"{name} {tuple(weight.shape)}".encode())
                digest.update(weight.contiguous().numpy().tobytes())
    return digest.hexdigest()
