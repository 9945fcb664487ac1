"""LoRA adapters in kohya's file format, which ComfyUI, A1111, Forge, InvokeAI and SD.Next read.

One safetensors file holds, for each layer, lora_down.weight (A), lora_up.weight (B) and alpha; the
layer's name is `lora_unet_` or `lora_te_` and the module's path with _ in place of the dots. The
header says ss_… (kohya's sd-scripts) and modelspec.… (https://github.com/Stability-AI/ModelSpec)
what was trained and how.
"""

import base64
import hashlib
import io
import json
import re
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image, ImageOps

from lib.errors import UserError
from lib.files import write_bytes
from lib.models import base_model_name

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
KEY = re.compile(
    r"lora_(?P<component>unet|te|te1)_(?P<layer>[^.]+)\."
    r"(?P<what>lora_down\.weight|lora_up\.weight|alpha|dora_scale)"
)
COMPONENTS = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder"}
# The names between the dots that hold an underscore themselves: those of the UNet's and the text
# encoder's layers. Where several would fit, the longest is meant.
NAMES = (
    "down_blocks",
    "up_blocks",
    "mid_block",
    "transformer_blocks",
    "proj_in",
    "proj_out",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "conv_in",
    "conv_out",
    "conv_norm_out",
    "conv_shortcut",
    "time_embedding",
    "time_emb_proj",
    "linear_1",
    "linear_2",
    "text_model",
    "self_attn",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "layer_norm1",
    "layer_norm2",
    "final_layer_norm",
    "token_embedding",
    "position_embedding",
    "group_norm",
)
PART = re.compile(rf"(?:{'|'.join(sorted(NAMES, key=len, reverse=True))}|[^_]+)(?=_|$)")
# What a key of another kind of adapter holds, and what that kind is called.
OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "lora_mid": "LoCon with Tucker decomposition",
    "a1.weight": "GLoRA",
    "on_input": "(IA)^3",
    "diff": "whole weights",
    "diff_b": "whole weights",
    "w_norm": "whole weights",
    "b_norm": "whole weights",
}


# ---- written -------------------------------------------------------------------------------


def save_kohya(path, layers, alpha, header, scales=None):
    """Write an adapter to the file `path` in half precision, whole or not at all.

    `layers` is {component: {layer name: (A, B)}}, A of shape (rank, in) and B of shape (out, rank);
    `header` a dict of strings, to which the hash of the tensors is added. `scales` is {component: {layer
    name: dora_scale}} of DoRA, [out, 1] each, as ComfyUI reads them; they stay in float32. diffusers
    means another thing by a dora_scale and refuses this shape, so nothing is done for it there.
    """
    tensors = {}
    for component, rows in layers.items():
        dora = (scales or {}).get(component, {})
        rows = rows | (idle_layers(rows) if component == "text_encoder" and not dora else {})
        for name, pair in rows.items():
            scale = dora.get(name)
            if component == "text_encoder" and not name.startswith("text_model."):
                name = f"text_model.{name}"
            key = f"{PREFIXES[component]}_{name.replace('.', '_')}"
            for factor, weight in zip(("down", "up"), pair, strict=True):
                # A copy of its own: the parameters may be views of one flat vector.
                tensors[f"{key}.lora_{factor}.weight"] = weight.detach().half().cpu().clone()
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
            if scale is not None:
                tensors[f"{key}.dora_scale"] = scale.float().cpu().clone()
    data = safetensors.torch.save(tensors)
    content = data[8 + int.from_bytes(data[:8], "little") :]
    header = header | {"modelspec.hash_sha256": "0x" + hashlib.sha256(content).hexdigest()}
    write_bytes(Path(path), safetensors.torch.save(tensors, metadata=header))


def idle_layers(rows):
    """Layers of zeros, {name: (A, B)} of rank 1, for the output projections of a text encoder whose
    adapter has none: diffusers (0.42) takes kohya's text encoder for one by them alone, and refuses
    the whole file where they are missing. (It also mistakes alphas that differ, so these have the
    same, which scales nothing.)"""
    found = {}
    for name, (a, _) in rows.items():
        place, layer = name.rsplit(".", 1)
        if place.endswith("self_attn") and layer != "out_proj":
            width = a.shape[1]
            found[f"{place}.out_proj"] = (torch.zeros(1, width), torch.zeros(width, 1))
    return {name: pair for name, pair in found.items() if name not in rows}


def kohya_header(config, data, width, prediction_type, thumbnail=None):
    """The header of kohya's file: a dict of strings.

    `config` is train.py's, `data` what config.json says of the data set, `width` that of the text
    encoder's states (1024: version 2; any other, the miniature's too: version 1), `prediction_type`
    the scheduler's, `thumbnail` a PIL image or None. Of a base model in a local folder only the
    folder's name is told, and no image's name at all.
    """
    rates = {name: config[f"{name}_learning_rate"] for name in ("unet", "text_encoder")}
    second = width == 1024
    captions = data["caption_counts"]
    trigger = max(sorted(captions), key=captions.get)
    architecture = "stable-diffusion-v1"
    if second:
        architecture = "stable-diffusion-v2-" + ("768-v" if prediction_type == "v_prediction" else "512")
    pictures, per_step = sum(captions.values()), config["batch_size"] * config["gradient_accumulation_steps"]
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": config["rank"],
        "ss_network_alpha": config["alpha"],
        "ss_base_model_version": "sd_v2" if second else "sd_v1",
        "ss_v2": second,
        "ss_sd_model_name": base_model_name(config["base_model"]),
        "ss_output_name": config["run_name"],
        "ss_tag_frequency": json.dumps({config["run_name"]: captions}, ensure_ascii=False),
        "ss_num_train_images": pictures,
        "ss_steps": config["max_steps"],
        "ss_max_train_steps": config["max_steps"],
        "ss_num_epochs": -(-config["max_steps"] * per_step // pictures),
        "ss_batch_size_per_device": config["batch_size"],
        "ss_gradient_accumulation_steps": config["gradient_accumulation_steps"],
        "ss_gradient_checkpointing": config["gradient_checkpointing"],
        "ss_learning_rate": rates["unet"],
        "ss_unet_lr": rates["unet"],
        "ss_text_encoder_lr": rates["text_encoder"] if config["train_text_encoder"] else None,
        "ss_lr_warmup_steps": config["warmup_steps"],
        "ss_mixed_precision": config["mixed_precision"],
        "ss_resolution": f"({config['resolution']}, {config['resolution']})",
        "ss_enable_bucket": len(data["size_counts"]) > 1,
        "ss_seed": config["seed"],
        "ss_clip_skip": None,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": config["run_name"],
        "modelspec.resolution": next(iter(data["size_counts"])),  # the commonest
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        "modelspec.trigger_phrase": trigger,
        "modelspec.tags": trigger,
    }
    if thumbnail is not None:
        header["modelspec.thumbnail"] = thumbnail_uri(thumbnail)
    return {"format": "pt"} | {key: str(value) for key, value in header.items()}


def thumbnail_uri(image, side=256):
    """A PIL image as a data: URI, a JPEG of side x side pixels."""
    buffer = io.BytesIO()
    small = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---- read ----------------------------------------------------------------------------------


def is_kohya(keys):
    """Whether a file with these keys is in kohya's format, of whatever kind of adapter."""
    return any(key.startswith(("lora_unet_", "lora_te", "lycoris_", "bundle_emb.")) for key in keys)


def dotted(layer):
    """The module path of kohya's layer name: `down_blocks_0_…_to_out_0` is down_blocks.0.….to_out.0."""
    return ".".join(PART.findall(layer))


def read_kohya(tensors, path):
    """{component: {layer: (A, B, scale, dora_scale or None)}} of the tensors of a file in kohya's format, in float32.

    `scale` is alpha / rank, 1 where a layer has no alpha. A 1x1 convolution's factors come as
    matrices, and a kind of layer (to_q, out_proj) that is zero everywhere is left out, unless all
    are. Raises UserError naming the file `path` for what is no plain LoRA, by its name, and for
    a layer that lacks a factor.
    """
    found = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None or (tensor.ndim == 4 and tuple(tensor.shape[2:]) != (1, 1)):
            raise UserError(
                f"{path}: only plain LoRA and DoRA of Stable Diffusion 1.x and 2.x are read, {key} is "
                f"{kind_of(key, tensor)}"
            )
        rows = found.setdefault(COMPONENTS[match["component"]], {})
        row, what = rows.setdefault(dotted(match["layer"]), {}), match["what"]
        if what in row:
            raise UserError(f"{path}: {what} of {dotted(match['layer'])} is there twice")
        row[what] = tensor.float()
    layers = {}
    for component, rows in found.items():
        layers[component] = {}
        for name, row in rows.items():
            if not {"lora_down.weight", "lora_up.weight"} <= row.keys():
                raise UserError(f"{path}: {name} of the {component} lacks a factor; the file is damaged")
            a, b = (row[f"lora_{half}.weight"] for half in ("down", "up"))
            a, b = (w[:, :, 0, 0] if w.ndim == 4 else w for w in (a, b))
            if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] > 0:
                raise UserError(
                    f"{path}: the factors of {name} have shapes {tuple(a.shape)} and {tuple(b.shape)}, "
                    "which do not fit one another"
                )
            dora = row.get("dora_scale")
            if dora is not None:
                dora = dora[:, :, 0, 0] if dora.ndim == 4 else dora
                if dora.shape not in ((len(b), 1), (1, a.shape[1])):
                    raise UserError(
                        f"{path}: dora_scale of {name} has shape {tuple(dora.shape)}, which is neither "
                        "one for each output nor one for each input"
                    )
            scale = scale_of(row.get("alpha"), a, name, path)
            layers[component][name] = (a, b, scale, dora)
    return {component: without_idle(rows) for component, rows in layers.items()}


def without_idle(rows):
    """`rows` ({layer: (A, B, …)}) without the kinds of layers whose B are all zero."""
    active = {name.rsplit(".", 1)[-1] for name, (_, b, *_) in rows.items() if b.any()}
    return {n: row for n, row in rows.items() if n.rsplit(".", 1)[-1] in active} or rows


def scale_of(alpha, a, name, path):
    """alpha / rank of a layer, 1 without an alpha; UserError if the alpha is no number above zero."""
    if alpha is None:
        return 1.0
    if alpha.numel() != 1 or not 1e-6 <= alpha.item() <= 1e6:
        raise UserError(f"{path}: alpha of {name} is {alpha.flatten()[:3].tolist()}, but must be a positive number")
    return alpha.item() / a.shape[0]


def kind_of(key, tensor):
    """What a key belongs to that is no plain LoRA's, in words."""
    ending = key.split(".", 1)[-1]
    for part, kind in OTHER_KINDS.items():
        if ending.startswith(part):
            return f"of {kind}"
    if key.startswith(("lora_te2_", "lora_te3_")):
        return "of Stable Diffusion XL or later (a second text encoder)"
    if key.startswith("bundle_emb."):
        return "an embedding that the file carries beside its LoRA"
    if tensor.ndim == 4:
        return "of LoCon (a convolution)"
    return "of no kind that is known"


def adapter_header(header):
    """What the results keep of a kohya header, under this project's names: a dict of strings."""
    names = {
        "base_model": "ss_sd_model_name",
        "caption": "modelspec.trigger_phrase",
        "steps": "ss_steps",
        "seed": "ss_seed",
        "rank": "ss_network_dim",
        "alpha": "ss_network_alpha",
        "title": "modelspec.title",
    }
    known = {name: str(header.get(key, "None"))[:300] for name, key in names.items()}
    return {name: value for name, value in known.items() if value not in ("", "None")}
