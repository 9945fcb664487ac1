"""LoRA adapters: put into a model, saved, read back and fingerprinted.

An adapter in memory is an `Adapter`: for the UNet and the text encoder, the two low-rank factors of
each adapted linear layer under the layer's module name. The weight that the model then uses is
W + scale * (alpha / rank) * B A, with A of shape (rank, in) and B of shape (out, rank)
(Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Every key of a file must find its layer and every layer its key: a mismatch is an error that counts
and names them, because the libraries underneath only warn and then draw with the base model.
"""

import hashlib
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

# The only remark of bitsandbytes, which peft imports, is about a 4-bit kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import safetensors.torch
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open

from lib.errors import UserError
from lib.files import write_bytes

WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name, inside an adapter folder
COMPONENTS = ("unet", "text_encoder")
# The spellings of the two factors: PEFT's, diffusers' older ones, and kohya's.
FACTORS = {
    "lora_A": "A", "lora.down": "A", "lora_linear_layer.down": "A", "lora_down": "A",
    "lora_B": "B", "lora.up": "B", "lora_linear_layer.up": "B", "lora_up": "B",
}  # fmt: skip
KEY = re.compile(
    r"(?:(?P<component>unet|text_encoder)\.)?(?:base_model\.model\.)?(?P<layer>.+?)\."
    rf"(?P<factor>{'|'.join(re.escape(name) for name in FACTORS)})(?:\.default)?\.weight"
)


@dataclass
class Adapter:
    """One adapter as read from a file, in float32 on the CPU."""

    path: Path
    rank: dict = field(default_factory=dict)  # component -> rank
    alpha: dict = field(default_factory=dict)  # component -> alpha
    factors: dict = field(default_factory=dict)  # component -> {layer: (A, B)}
    targets: dict = field(default_factory=dict)  # component -> names that its config adapts
    metadata: dict = field(default_factory=dict)  # what train.py wrote: caption, data hash, …


# ---- into a model --------------------------------------------------------------------------


def add_lora(model, rank, alpha, targets):
    """Add trainable LoRA layers to the linear layers whose names end in `targets`.

    A starts as Kaiming-uniform noise and B as zero, so the model's output does not change yet.
    Returns {layer name: LoraLayer}. Raises UserError if a target matches nothing.
    """
    layers = [name for name, _ in target_layers(model, targets)]
    for target in targets:
        if not any(matches(name, (target,)) for name in layers):
            raise UserError(f"LoRA target {target} matches no layer of the {type(model).__name__}")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, init_lora_weights=True)
    inject_adapter_in_model(config, model)
    return lora_layers(model)


def matches(name, targets):
    return any(name == target or name.endswith("." + target) for target in targets)


def target_layers(model, targets):
    """(name, linear layer) for each linear layer of `model` whose name ends in one of `targets`."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and matches(name, targets):
            yield name, module


def lora_layers(model):
    """{layer name: peft LoraLayer} of a model to which LoRA was added."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def factors(model):
    """{layer name: (A, B)}: the LoRA parameters of `model`, in its own order."""
    return {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in lora_layers(model).items()
    }


class Applied:
    """A read adapter in the weights of `models` ({"unet": …, "text_encoder": …}), at scale 1 at first.

    A weight becomes W + scale * alpha / rank * B A, computed in float32 from a kept copy of W and
    rounded once, in place: scale 0 is the base model bit for bit, and whatever reads the weights (a
    CUDA graph) goes on reading the right ones. Raises UserError unless the adapter's keys and the
    models' layers match one to one and in shape.
    """

    def __init__(self, adapter, models):
        self.layers = []
        for component, factors in adapter.factors.items():
            model, targets = models[component], adapter.targets.get(component)
            rows = match_layers(factors, model, targets, adapter.path, component)
            scaling = adapter.alpha[component] / adapter.rank[component]
            for name, (a, b) in rows.items():
                weight = model.get_submodule(name).weight
                a, b = a.to(weight.device), b.to(weight.device) * scaling
                self.layers.append((weight, weight.detach().clone(), a, b))
        self.set_scale(1)

    @torch.no_grad()
    def set_scale(self, scale):
        """Put `scale` times the adapter into the weights; 0 takes it out."""
        for weight, base, a, b in self.layers:
            weight.copy_(base.float() + scale * (b @ a) if scale else base)


def match_layers(rows, model, targets, path, component):
    """`rows` ({layer: (A, B)}) under the model's own layer names, checked one to one.

    transformers 5.6 dropped the `text_model.` in front of a CLIP text encoder's layers, so a name
    that is only off by this prefix is the same layer. `targets` are the endings of the layers that
    the adapter claims to adapt; where a file does not say, the endings that it has.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    if component == "text_encoder":
        prefixed = any(name.startswith("text_model.") for name in linear)
        bare = {name.removeprefix("text_model."): factor for name, factor in rows.items()}
        rows = {f"text_model.{name}" if prefixed else name: f for name, f in bare.items()}
    unknown = sorted(set(rows) - set(linear))
    # `to_out.0` and the like: a number says nothing without the name before it.
    endings = targets or {re.search(r"[^.]+(\.\d+)?$", name)[0] for name in rows}
    empty = sorted({name for name, _ in target_layers(model, endings)} - set(rows))
    problems = []
    if unknown:
        problems.append(f"{len(unknown)} of {len(rows)} layers in the file are not in the model "
                        f"({some(unknown)})")  # fmt: skip
    if empty:
        problems.append(
            f"{len(empty)} layers of the model get nothing from the file ({some(empty)})"
        )
    if not problems:
        wrong = [
            name
            for name, (a, b) in rows.items()
            if (a.shape[1], b.shape[0]) != (linear[name].in_features, linear[name].out_features)
        ]
        if wrong:
            problems.append(f"{len(wrong)} layers have another shape ({some(wrong)})")
    if problems:
        raise UserError(
            f"{path} does not fit the base model's {component}: {'; '.join(problems)}. "
            "Was it trained on another base model, or is the file damaged?"
        )
    return rows


def some(names):
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


# ---- files ---------------------------------------------------------------------------------


def save_adapter(folder, models, rank, alpha, targets, metadata):
    """Write the LoRA layers of `models` to `folder` in diffusers' format.

    `models` and `targets` are dicts by component ("unet", "text_encoder"); `metadata` is a dict of
    strings for the file's header. `pipeline.load_lora_weights(folder)` loads the result, on
    versions of transformers with and without the `text_model.` level.
    """
    tensors, peft = {}, {}
    for component, model in models.items():
        for name, pair in factors(model).items():
            if component == "text_encoder" and not name.startswith("text_model."):
                name = f"text_model.{name}"
            for factor, weight in zip("AB", pair, strict=True):
                # A copy of its own: the parameters may be views of one flat vector.
                key = f"{component}.{name}.lora_{factor}.weight"
                tensors[key] = weight.detach().float().cpu().clone()
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets[component]))
        for key, value in config.to_dict().items():
            # What diffusers needs to rebuild the layers; the rest would tie the file to one PEFT.
            if key in ("r", "lora_alpha", "target_modules"):
                peft[f"{component}.{key}"] = sorted(value) if isinstance(value, set) else value
    header = {"format": "pt", "rank": str(rank), "alpha": str(alpha)} | metadata
    header["lora_adapter_metadata"] = json.dumps(peft, sort_keys=True)
    write_bytes(Path(folder) / WEIGHTS, safetensors.torch.save(tensors, metadata=header))


def find_adapters(folder):
    """The adapters in `folder`: [(name, path)], itself if it is one, else its subfolders that are.

    Raises UserError if there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; train an adapter first (python train.py)")
    if adapter_files(folder):
        return [(folder.resolve().name, folder)]
    found = [
        (child.name, child)
        for child in sorted(folder.iterdir())
        if child.is_dir() and not child.name.startswith(".") and adapter_files(child)
    ]
    if not found:
        raise UserError(
            f"{folder}: no adapter in it; looked for {WEIGHTS} and for PEFT's adapter_config.json, "
            "here, in unet/ and text_encoder/, and one folder down"
        )
    return found


def adapter_files(folder):
    """[(component or None, safetensors path, adapter_config or None)] of one adapter folder.

    The layouts are diffusers' single file, and the published study's PEFT folders: `unet/` and
    `text_encoder/`, or one at the root (then the component is None and told by its keys).
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return [(None, folder / WEIGHTS, None)]
    places = [(name, folder / name) for name in COMPONENTS] + [(None, folder)]
    return [
        (component, place / "adapter_model.safetensors", place / "adapter_config.json")
        for component, place in places
        if (place / "adapter_config.json").is_file()
    ]


def read_adapter(folder):
    """Read an adapter folder, in either layout, into an Adapter.

    Raises UserError naming the file for anything that is not a whole LoRA adapter: a damaged file,
    a key of an unknown kind, one factor without the other, ranks that disagree, values that are not
    finite, or B factors that are all zero (an adapter that does nothing).
    """
    folder = Path(folder)
    files = adapter_files(folder)
    if not files:
        raise UserError(f"{folder}: neither {WEIGHTS} nor PEFT's adapter_config.json in it")
    adapter = Adapter(path=folder)
    halves, alphas = {}, {}
    for component, path, config_path in files:
        config = read_peft_config(config_path) if config_path else {}
        tensors, header = read_tensors(path)
        adapter.metadata |= header
        for key, tensor in tensors.items():
            found = KEY.fullmatch(key)
            if found is None:
                raise UserError(
                    f"{path}: {key} is no key of a LoRA adapter; {len(tensors)} keys read"
                )
            layer = found["layer"]
            part = found["component"] or component or guess_component(layer)
            half = halves.setdefault(part, {}).setdefault(layer, {})
            if FACTORS[found["factor"]] in half:
                raise UserError(f"{path}: factor {found['factor']} of {layer} is there twice")
            half[FACTORS[found["factor"]]] = tensor.float()
        for part in halves:
            if part not in alphas:
                alphas[part], adapter.targets[part] = alpha_and_targets(config, header, part, path)
    for part, layers in halves.items():
        check_factors(layers, folder, part)
        adapter.factors[part] = {name: (half["A"], half["B"]) for name, half in layers.items()}
        adapter.rank[part] = next(iter(layers.values()))["A"].shape[0]
        # diffusers' convention where a file does not say: alpha is the rank.
        adapter.alpha[part] = alphas[part] or adapter.rank[part]
    return adapter


def read_tensors(path):
    """All tensors and the header of a safetensors file; UserError if it is damaged or empty."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            header = file.metadata() or {}
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{path} cannot be read as safetensors: {problem}") from None
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    return tensors, header


def read_peft_config(path):
    """A PEFT adapter_config.json; UserError if it is damaged or of a kind that is not plain LoRA."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        raise UserError(f"{path} is not a PEFT adapter configuration") from None
    extras = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern",
                              "modules_to_save") if config.get(key)]  # fmt: skip
    if kind != "LORA" or extras:
        raise UserError(
            f"{path}: only plain LoRA is read, this is {' '.join([str(kind)[:40], *extras])}"
        )
    return config


def alpha_and_targets(config, header, part, path):
    """(alpha or None, target endings or None) as a PEFT config or a diffusers header states them.

    Raises UserError naming the file `path` if it states them in a form that means nothing.
    """
    if not config:
        try:
            stated = json.loads(header.get("lora_adapter_metadata", "{}"))
            config = {
                k.removeprefix(f"{part}."): v for k, v in stated.items() if k.startswith(part)
            }
        except (ValueError, AttributeError, RecursionError):
            raise UserError(f"{path}: lora_adapter_metadata is no JSON object: damaged?") from None
    alpha, targets = config.get("lora_alpha"), config.get("target_modules")
    if alpha is not None and not (isinstance(alpha, (int, float)) and 1e-6 <= alpha <= 1e6):
        raise UserError(f"{path}: lora_alpha is {repr(alpha)[:40]}, but must be a positive number")
    targets = targets if isinstance(targets, list) else None
    if not all(isinstance(target, str) for target in targets or []):
        raise UserError(f"{path}: target_modules is not a list of names")
    return alpha, targets


def guess_component(layer):
    """The component of a layer name without a prefix: CLIP's layers are named as no UNet's are."""
    return "text_encoder" if ".self_attn." in layer or ".mlp.fc" in layer else "unet"


def check_factors(layers, path, part):
    """UserError unless every layer has both factors, of one rank, finite, and some B is not zero."""
    single = sorted(name for name, half in layers.items() if len(half) != 2)
    if single:
        raise UserError(f"{path}: {len(single)} layers of the {part} have one factor only "
                        f"({some(single)}); the file is damaged")  # fmt: skip
    bad = sorted(
        name
        for name, half in layers.items()
        if half["A"].ndim != 2 or half["B"].ndim != 2 or half["A"].shape[0] != half["B"].shape[1]
    )
    if bad or len({half["A"].shape[0] for half in layers.values()}) != 1:
        raise UserError(
            f"{path}: the factors of the {part} disagree in rank ({some(bad or list(layers))})"
        )
    infinite = sorted(n for n, h in layers.items() if not (h["A"].isfinite().all() and h["B"].isfinite().all()))  # fmt: skip
    if infinite:
        raise UserError(
            f"{path}: {len(infinite)} layers of the {part} hold NaN or infinity ({some(infinite)})"
        )
    if all(not half["B"].any() for half in layers.values()):
        raise UserError(f"{path}: every lora_B of the {part} is zero; this adapter does nothing")


def fingerprint(adapter):
    """SHA-256 over the sorted tensors as loaded, with alpha: equal for equal adapters, whatever
    their folder, layout or header."""
    digest = hashlib.sha256()
    for part in sorted(adapter.factors):
        rows = {name.removeprefix("text_model."): f for name, f in adapter.factors[part].items()}
        digest.update(f"{part} alpha={float(adapter.alpha[part])}".encode())
        for name in sorted(rows):
            for weight in rows[name]:
                digest.update(f"{name} {tuple(weight.shape)}".encode())
                digest.update(weight.contiguous().numpy().tobytes())
    return digest.hexdigest()
