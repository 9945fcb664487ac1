"""Finds LoRA and DoRA adapters, reads them into an `Adapter` and writes them in diffusers' format.

Three layouts are read: diffusers' single file, PEFT's folders (as in the published study) and kohya's file
(lib/adapter_files/kohya.py).
"""

import json
import re
from pathlib import Path

import safetensors.torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from lib.adapter_files.kohya import adapter_header, as_matrix, is_kohya, prefixed, read_kohya
from lib.adapters import Adapter, factors, magnitudes, some
from lib.errors import UserError, one_line
from lib.files import describe_content, write_bytes

WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name, inside an adapter folder
COMPONENTS = ("unet", "text_encoder")
FACTORS = {"A": "A", "down": "A", "B": "B", "up": "B"}  # PEFT's lora_A, diffusers' older lora.down, kohya's lora_down
MAGNITUDE = "lora_magnitude_vector"  # DoRA's
KEY = re.compile(
    r"(?:(?P<component>unet|text_encoder)\.)?(?:base_model\.model\.)?(?P<layer>.+?)\."
    r"(?:(?:lora_|lora\.|lora_linear_layer\.)(?P<factor>A|B|down|up)(?:\.default)?\.weight"
    rf"|{MAGNITUDE}(?:\.default)?(?:\.weight)?)"
)
OLD_KEY = re.compile(r"\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
# PEFT's settings under which the trained weight is not W + scale * B A with the base model's W.
UNSUPPORTED = ("modules_to_save", "layer_replication", "use_qalora")
BASE_CHANGING = ("pissa", "olora", "corda", "loftq")  # initialisations that also change W


def save_adapter(folder, models, rank, alpha, targets, metadata, half=False):
    """Write the LoRA layers of `models` to `folder` in diffusers' format, in float32 or in half precision.

    `models` and `targets` are dicts by component ("unet", "text_encoder"), `metadata` a dict of strings for the file's
    header. `pipeline.load_lora_weights(folder)` loads the result, whether or not the installed transformers has the
    `text_model.` level.
    """
    tensors, peft = {}, {}
    for component, model in models.items():
        for layer, pair in factors(model).items():
            for factor, weight in zip("AB", pair, strict=True):
                weight = weight.detach().cpu().clone()  # cloned: the parameters may be views of one flat vector
                tensors[f"{component}.{prefixed(component, layer)}.lora_{factor}.weight"] = (
                    weight.half() if half else weight.float()
                )
        dora = magnitudes(model)
        for layer, magnitude in dora.items():
            # Always float32: they are few, and a rounded one would scale a whole row.
            key = f"{component}.{prefixed(component, layer)}.{MAGNITUDE}.weight"
            tensors[key] = magnitude.detach().float().cpu().clone()
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets[component]), use_dora=bool(dora))
        for name, value in config.to_dict().items():
            # What diffusers needs to rebuild the layers; more would tie the file to one version of PEFT.
            if name in ("r", "lora_alpha", "target_modules") or (name == "use_dora" and value):
                peft[f"{component}.{name}"] = sorted(value) if isinstance(value, set) else value
    header = {"format": "pt", "rank": str(rank), "alpha": str(alpha)} | metadata
    header["lora_adapter_metadata"] = json.dumps(peft, sort_keys=True)
    write_bytes(Path(folder) / WEIGHTS, safetensors.torch.save(tensors, metadata=header))


def find_adapters(folder):
    """The adapters in `folder`: [(name, path)]. Itself if it is one (a folder or a safetensors file), else its
    subfolders that are, else its safetensors files. Raises UserError if there are none."""
    folder = Path(folder)
    if folder.is_file():
        return [(folder.stem, folder)]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; train an adapter first (python train.py)")
    if adapter_files(folder):
        return [(folder.resolve().name, folder)]
    places = [
        (child.name, child)
        for child in sorted(folder.iterdir())
        if child.is_dir() and not child.name.startswith(".") and adapter_files(child)
    ]
    places = places or [(path.stem, path) for path in sorted(folder.glob("[!.]*.safetensors"))]
    if not places:
        raise UserError(
            f"{folder}: no adapter in it; looked for {WEIGHTS} and PEFT's adapter_config.json in it, in unet/ and "
            "text_encoder/ and in its subfolders, and for safetensors files in it"
        )
    return places


def adapter_files(folder):
    """The files of one adapter: [(component or None, safetensors path, adapter_config.json or None)].

    Either a single file, diffusers' or kohya's, or PEFT folders: `unet/` and `text_encoder/`, or the folder itself,
    whose keys then show the component.
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

    If the UNet is adapted, a text encoder whose B are all zero is left out with a note. Raises UserError naming
    the file for anything that is not a whole LoRA adapter: a damaged file, an unknown key or kind of adapter, a missing
    factor, ranks that disagree, values that are not finite, or B that are all zero.
    """
    folder = Path(folder)
    files = adapter_files(folder)
    if not files:
        raise UserError(f"{folder}: neither {WEIGHTS} nor PEFT's adapter_config.json in it")
    adapter, layers, configs = Adapter(path=folder), {}, {}
    for component, path, config_path in files:
        config = read_peft_config(config_path) if config_path else None
        tensors, header = read_tensors(path)
        if is_kohya(tensors):
            adapter.metadata |= adapter_header(header)
            parts, header = read_kohya(tensors, path), {}
        else:
            adapter.metadata |= header
            parts = read_diffusers(tensors, path, component)
        for part, rows in parts.items():
            layers.setdefault(part, {}).update(rows)
            if part not in configs:
                configs[part] = checked(header_config(header, part, path) if config is None else config, path)
    for part, rows in layers.items():
        check_factors(rows, folder, part)
    idle = [part for part, rows in layers.items() if not any(row["B"].any() for row in rows.values())]
    if "unet" in idle or len(idle) == len(layers):
        raise UserError(f"{folder}: every lora_B of the {idle[0]} is zero; this adapter does nothing")
    for part in idle:
        print(
            f"note: every lora_B of the {part} in {folder} is zero, as if trained at rate 0; only the unet is adapted"
        )
        del layers[part]
    for part, rows in layers.items():
        add_component(adapter, part, rows, configs[part])
    return adapter


def add_component(adapter, part, rows, config):
    """Put the layers of a component ({layer: {"A", "B", and if stated "alpha", "m"}}) into an Adapter.

    The adapter's rank is the largest. If all layers have the same scale, its alpha is scale * rank; otherwise each B
    is multiplied by its layer's scale and alpha is the rank. UserError if a rank is not the one that `config` states.
    """
    ranks, alphas = {name: len(row["A"]) for name, row in rows.items()}, {}
    for name, row in rows.items():
        stated = setting(config, "r", "rank_pattern", name)
        if isinstance(stated, int) and stated != ranks[name]:
            raise UserError(
                f"{adapter.path}: the factors of {name} have rank {ranks[name]}, but the file's settings state "
                f"{str(stated)[:20]}; the file is damaged"
            )
        alphas[name] = row.get("alpha") or setting(config, "lora_alpha", "alpha_pattern", name) or ranks[name]
        if config.get("use_rslora"):  # scale = alpha / sqrt(rank), Kalajdzievski 2023, https://arxiv.org/abs/2312.03732
            alphas[name] *= ranks[name] ** 0.5
    scales = {name: alphas[name] / ranks[name] for name in rows}
    largest = max(ranks, key=ranks.get)
    alike = len(set(scales.values())) == 1
    adapter.rank[part] = ranks[largest]
    adapter.alpha[part] = alphas[largest] if alike else float(ranks[largest])
    adapter.targets[part] = targets(config)
    adapter.factors[part] = {
        name: (row["A"], row["B"] if alike else row["B"] * scales[name]) for name, row in rows.items()
    }
    if norms := {name: row["m"] for name, row in rows.items() if "m" in row}:
        adapter.magnitudes[part] = norms


# ---- diffusers' and PEFT's files -----------------------------------------------------------


def read_diffusers(tensors, path, component):
    """The layers of a file in diffusers' or PEFT's format: {component: {layer: {"A", "B", and of DoRA "m"}}}, in float32.

    `component` is that of keys without a prefix; None if their names show it. The factors of a 1x1 convolution become
    matrices. Raises UserError naming the file `path` and the key for anything else.
    """
    layers = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(modern(key))
        if match is None:
            raise UserError(f"{path}: {key} is not a key of a LoRA adapter; the file has {len(tensors)} keys")
        layer = match["layer"]
        part = match["component"] or component or guess_component(layer)
        row = layers.setdefault(part, {}).setdefault(layer, {})
        factor = FACTORS.get(match["factor"], "m")
        if factor in row:
            raise UserError(f"{path}: factor {match['factor']} of {layer} is in the file twice; save it again")
        if factor == "m":  # of a convolution: [1, out, 1, 1]
            row[factor] = tensor.float().flatten() if tensor.ndim == 4 else tensor.float()
        else:
            row[factor] = as_matrix(key, tensor, path)
    for part, rows in layers.items():
        scaled = [row for row in rows.values() if "m" in row]
        if scaled and not all("m" in r and "B" in r and r["m"].shape == r["B"].shape[:1] for r in rows.values()):
            raise UserError(
                f"{path}: DoRA's magnitudes of the {part} do not fit its factors: each of {len(rows)} layers needs one "
                "magnitude for each output; the file is damaged"
            )
    return layers


def modern(key):
    """A key in today's spelling: diffusers of early 2023 wrote attn1.processor.to_q_lora.down for attn1.to_q.lora_A."""

    def spelled(match):
        name, factor = match.groups()
        layer = f"{name}_proj" if ".self_attn." in key else {"out": "to_out.0"}.get(name, f"to_{name}")
        return f".{layer}.lora.{factor}.weight"

    return OLD_KEY.sub(spelled, key.replace(".processor.", "."))


def guess_component(layer):
    """The component of a layer name without a prefix: CLIP's layers are named as no UNet's are."""
    return "text_encoder" if ".self_attn." in layer or ".mlp.fc" in layer else "unet"


def read_tensors(path):
    """All tensors and the header of a safetensors file. Raises UserError if it is damaged or empty."""
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
    """A PEFT adapter_config.json. Raises UserError if it is damaged or not of LoRA."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        raise UserError(f"{path} is not a PEFT adapter configuration") from None
    if kind != "LORA":
        raise UserError(f"{path}: only plain LoRA and DoRA can be read, this is {str(kind)[:40]}")
    return config


def header_config(header, part, path):
    """PEFT's settings of a component as diffusers writes them into a file's header; {} if there are none."""
    try:
        stated = json.loads(header.get("lora_adapter_metadata", "{}"))
        return {name.removeprefix(f"{part}."): v for name, v in stated.items() if name.startswith(f"{part}.")}
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{path}: lora_adapter_metadata is not a JSON object; the file is damaged") from None


def checked(config, path):
    """`config`, PEFT's settings of a component; UserError naming the file `path` for unsupported or invalid settings."""
    extras = [name for name in UNSUPPORTED if config.get(name)]
    if str(config.get("init_lora_weights")).startswith(BASE_CHANGING):
        extras.append(f"init_lora_weights {config['init_lora_weights'][:20]}")
    if extras:
        raise UserError(f"{path}: only plain LoRA and DoRA can be read, this is LORA with {', '.join(extras)}")
    alphas, names = {"lora_alpha": config.get("lora_alpha")}, config.get("target_modules")
    if isinstance(names, list) and not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: target_modules is not a list of names; the file is damaged")
    for name in ("rank_pattern", "alpha_pattern"):
        try:
            patterns = dict(config.get(name) or {})
            for pattern in patterns:
                re.compile(pattern)
        except (TypeError, ValueError, re.error, RecursionError, OverflowError):
            raise UserError(f"{path}: {name} is not a table by layer names; the file is damaged") from None
        alphas |= patterns if name == "alpha_pattern" else {}
    for name, alpha in alphas.items():
        if alpha is not None and not (isinstance(alpha, (int, float)) and 1e-6 <= alpha <= 1e6):
            raise UserError(f"{path}: {name} is {repr(alpha)[:40]}, but must be a positive number")
    return config


def setting(config, name, pattern, layer):
    """PEFT's setting `name` for a layer: from the table `pattern` {regular expression: value}, else its default."""
    bare = layer.removeprefix("text_model.")
    for key, value in dict(config.get(pattern) or {}).items():
        if any(re.match(rf"(.*\.)?({key})$", spelling) for spelling in (layer, bare, f"text_model.{bare}")):
            return value
    return config.get(name)


def targets(config):
    """The endings of the layers that an adapter must have by its settings, or None if these do not say."""
    partial = config.get("exclude_modules") or config.get("layers_to_transform") is not None
    names = config.get("target_modules")
    return names if isinstance(names, list) and not partial else None


def check_factors(rows, path, part):
    """Raises UserError unless each layer has both factors, [rank, in] and [out, rank], with finite values."""
    single = sorted(name for name, row in rows.items() if not row.keys() >= {"A", "B"})
    if single:
        raise UserError(
            f"{path}: {len(single)} layers of the {part} lack a factor ({some(single)}); the file is damaged"
        )
    for name, row in rows.items():
        a, b = row["A"], row["B"]
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] > 0:
            raise UserError(
                f"{path}: the factors of {name} have shapes {tuple(a.shape)} and {tuple(b.shape)}, which do not fit; "
                "the file is damaged"
            )
    tensors = {name: [row[key] for key in ("A", "B", "m") if key in row] for name, row in rows.items()}
    infinite = sorted(name for name, weights in tensors.items() if not all(w.isfinite().all() for w in weights))
    if infinite:
        raise UserError(f"{path}: {len(infinite)} layers of the {part} hold NaN or infinity ({some(infinite)})")
