"""LoRA and DoRA adapters in files: found, read into an `Adapter`, written in diffusers' format.

diffusers' single file, PEFT's folders, as the published study wrote them, and kohya's files
(lib/adapter_files/kohya.py) are read.
"""

import json
import re
from pathlib import Path

import safetensors.torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from lib.adapter_files.kohya import adapter_header, is_kohya, read_kohya
from lib.adapters import Adapter, factors, magnitudes, some
from lib.errors import UserError, one_line
from lib.files import describe_content, write_bytes

WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name, inside an adapter folder
COMPONENTS = ("unet", "text_encoder")
# The spellings of the two factors: PEFT's, diffusers' older ones, and kohya's.
FACTORS = {
    "lora_A": "A",
    "lora.down": "A",
    "lora_linear_layer.down": "A",
    "lora_down": "A",
    "lora_B": "B",
    "lora.up": "B",
    "lora_linear_layer.up": "B",
    "lora_up": "B",
}
MAGNITUDE = "lora_magnitude_vector"  # DoRA's
KEY = re.compile(
    r"(?:(?P<component>unet|text_encoder)\.)?(?:base_model\.model\.)?(?P<layer>.+?)\."
    rf"(?:(?P<factor>{'|'.join(re.escape(name) for name in FACTORS)})(?:\.default)?\.weight"
    rf"|{MAGNITUDE}(?:\.default)?(?:\.weight)?)"
)


def save_adapter(folder, models, rank, alpha, targets, metadata, half=False):
    """Write the LoRA layers of `models` to `folder` in diffusers' format, in float32 or in half precision.

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
                weight = weight.detach().cpu().clone()
                tensors[key] = weight.half() if half else weight.float()
        dora = magnitudes(model)
        for name, magnitude in dora.items():
            if component == "text_encoder" and not name.startswith("text_model."):
                name = f"text_model.{name}"
            key = f"{component}.{name}.{MAGNITUDE}.weight"
            # In full precision always: they are few, and one's rounding would scale a whole row.
            tensors[key] = magnitude.detach().float().cpu().clone()
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets[component]), use_dora=bool(dora))
        for key, value in config.to_dict().items():
            # What diffusers needs to rebuild the layers; the rest would tie the file to one PEFT.
            if key in ("r", "lora_alpha", "target_modules") or (key == "use_dora" and value):
                peft[f"{component}.{key}"] = sorted(value) if isinstance(value, set) else value
    header = {"format": "pt", "rank": str(rank), "alpha": str(alpha)} | metadata
    header["lora_adapter_metadata"] = json.dumps(peft, sort_keys=True)
    write_bytes(Path(folder) / WEIGHTS, safetensors.torch.save(tensors, metadata=header))


def find_adapters(folder):
    """The adapters in `folder`: [(name, path)], itself if it is one (a folder, or a safetensors file),
    else its subfolders that are, else the safetensors files in it.

    Raises UserError if there is none.
    """
    folder = Path(folder)
    if folder.is_file():
        return [(folder.stem, folder)]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; train an adapter first (python train.py)")
    if adapter_files(folder):
        return [(folder.resolve().name, folder)]
    found = [
        (child.name, child)
        for child in sorted(folder.iterdir())
        if child.is_dir() and not child.name.startswith(".") and adapter_files(child)
    ]
    found = found or [(path.stem, path) for path in sorted(folder.glob("[!.]*.safetensors"))]
    if not found:
        raise UserError(
            f"{folder}: no adapter in it; looked for {WEIGHTS} and for PEFT's adapter_config.json, "
            "here, in unet/ and text_encoder/, and one folder down, and for safetensors files here"
        )
    return found


def adapter_files(folder):
    """[(component or None, safetensors path, adapter_config or None)] of one adapter.

    The layouts are a single file, diffusers' or kohya's, and the published study's PEFT folders:
    `unet/` and `text_encoder/`, or one at the root (then the component is None and told by its keys).
    """
    folder = Path(folder)
    if folder.is_file():
        return [(None, folder, None)]
    if (folder / WEIGHTS).is_file():
        return [(None, folder / WEIGHTS, None)]
    places = [(name, folder / name) for name in COMPONENTS] + [(None, folder)]
    return [
        (component, place / "adapter_model.safetensors", place / "adapter_config.json")
        for component, place in places
        if (place / "adapter_config.json").is_file()
    ]


def read_adapter(folder):
    """Read an adapter, a folder or a file in any of the layouts, into an Adapter.

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
        if is_kohya(tensors):
            adapter.metadata |= adapter_header(header)
            add_kohya(adapter, read_kohya(tensors, path))
            return adapter
        adapter.metadata |= header
        for key, tensor in tensors.items():
            found = KEY.fullmatch(key)
            if found is None:
                raise UserError(f"{path}: {key} is no key of a LoRA adapter; {len(tensors)} keys read")
            layer = found["layer"]
            part = found["component"] or component or guess_component(layer)
            half = halves.setdefault(part, {}).setdefault(layer, {})
            factor = FACTORS.get(found["factor"], "m")
            if factor in half:
                raise UserError(f"{path}: factor {found['factor']} of {layer} is there twice")
            half[factor] = tensor.float()
        for part in halves:
            if part not in alphas:
                alphas[part], adapter.targets[part] = alpha_and_targets(config, header, part, path)
    for part, layers in halves.items():
        check_factors(layers, folder, part)
        adapter.factors[part] = {name: (half["A"], half["B"]) for name, half in layers.items()}
        if any("m" in half for half in layers.values()):
            adapter.magnitudes[part] = {name: half["m"] for name, half in layers.items()}
        adapter.rank[part] = next(iter(layers.values()))["A"].shape[0]
        # diffusers' convention where a file does not say: alpha is the rank.
        adapter.alpha[part] = alphas[part] or adapter.rank[part]
    return adapter


def add_kohya(adapter, layers):
    """Put the layers of a kohya file ({component: {layer: (A, B, alpha / rank, dora_scale)}}) into an Adapter.

    The adapter's rank is the largest. Where alpha / rank differs from layer to layer, B takes the
    layer's, and the adapter's alpha is its rank.
    """
    for part, rows in layers.items():
        halves = {name: dict(A=a, B=b) for name, (a, b, *_) in rows.items()}
        norms = {name: dora for name, (*_, dora) in rows.items() if dora is not None}
        if not all(dora.isfinite().all() for dora in norms.values()):
            raise UserError(f"{adapter.path}: a dora_scale of the {part} holds NaN or infinity")
        if norms:  # a layer without one is plain LoRA
            adapter.magnitudes[part] = norms
        check_factors(halves, adapter.path, part, one_rank=False)
        rank = adapter.rank[part] = max(a.shape[0] for a, *_ in rows.values())
        scales = {scale for _, _, scale, _ in rows.values()}
        alike = len(scales) == 1
        adapter.alpha[part] = rank * scales.pop() if alike else float(rank)
        adapter.targets[part] = None
        adapter.factors[part] = {name: (a, b if alike else b * scale) for name, (a, b, scale, _) in rows.items()}


def read_tensors(path):
    """All tensors and the header of a safetensors file; UserError if it is damaged or empty."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            header = file.metadata() or {}
    except (SafetensorError, OSError) as problem:
        reason = describe_content(path) or one_line(problem, 100)
        raise UserError(f"{path} cannot be read as safetensors: {reason}") from None
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
    extras = [key for key in ("use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(key)]
    if kind != "LORA" or extras:
        raise UserError(f"{path}: only plain LoRA and DoRA are read, this is {' '.join([str(kind)[:40], *extras])}")
    return config


def alpha_and_targets(config, header, part, path):
    """(alpha or None, target endings or None) as a PEFT config or a diffusers header states them.

    Raises UserError naming the file `path` if it states them in a form that means nothing.
    """
    if not config:
        try:
            stated = json.loads(header.get("lora_adapter_metadata", "{}"))
            config = {k.removeprefix(f"{part}."): v for k, v in stated.items() if k.startswith(part)}
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


def check_factors(layers, path, part, one_rank=True):
    """UserError unless every layer has both factors, of one rank (all of them, if `one_rank`), finite,
    and some B is not zero."""
    single = sorted(name for name, half in layers.items() if not half.keys() >= {"A", "B"})
    if single:
        raise UserError(
            f"{path}: {len(single)} layers of the {part} have one factor only ({some(single)}); the file is damaged"
        )
    bad = sorted(
        name
        for name, half in layers.items()
        if half["A"].ndim != 2 or half["B"].ndim != 2 or half["A"].shape[0] != half["B"].shape[1]
    )
    if bad or (one_rank and len({half["A"].shape[0] for half in layers.values()}) != 1):
        raise UserError(f"{path}: the factors of the {part} disagree in rank ({some(bad or list(layers))})")
    scaled = [name for name, half in layers.items() if "m" in half]
    if scaled and not all("m" in h and h["m"].shape == h["B"].shape[:1] for h in layers.values()):
        raise UserError(
            f"{path}: DoRA's magnitudes of the {part} do not fit its factors, one for each output "
            f"of each of {len(layers)} layers; the file is damaged"
        )
    infinite = sorted(n for n, half in layers.items() if not all(w.isfinite().all() for w in half.values()))
    if infinite:
        raise UserError(f"{path}: {len(infinite)} layers of the {part} hold NaN or infinity ({some(infinite)})")
    if all(not half["B"].any() for half in layers.values()):
        raise UserError(f"{path}: every lora_B of the {part} is zero; this adapter does nothing")
