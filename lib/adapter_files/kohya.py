"""LoRA adapters in kohya's file format, which ComfyUI, A1111, Forge, InvokeAI and SD.Next read.

A safetensors file with three tensors per layer: lora_down.weight (A), lora_up.weight (B) and alpha. A layer's name is
`lora_unet_` or `lora_te_` and the module's path with _ for each dot.
"""

import re
from pathlib import Path

import safetensors.torch
import torch

from lib.adapter_files.header import hashes
from lib.errors import UserError
from lib.files import write_bytes

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
KEY = re.compile(
    r"lora_(?P<component>unet|te|te1)_(?P<layer>[^.]+)\."
    r"(?P<what>lora_down\.weight|lora_up\.weight|alpha|dora_scale)"
)
COMPONENTS = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder"}
FACTORS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha", "dora_scale": "m"}
# Path elements of UNet and text encoder layers that contain an underscore. The longest match wins.
NAMES = """down_blocks up_blocks mid_block transformer_blocks proj_in proj_out to_q to_k to_v to_out conv_in conv_out
conv_norm_out conv_shortcut time_embedding time_emb_proj linear_1 linear_2 text_model self_attn q_proj k_proj v_proj
out_proj layer_norm1 layer_norm2 final_layer_norm token_embedding position_embedding group_norm""".split()
PART = re.compile(rf"(?:{'|'.join(sorted(NAMES, key=len, reverse=True))}|[^_]+)(?=_|$)")
# How the keys of other kinds of adapters begin, after the layer's name, and the name of that kind.
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


# ---- writing -------------------------------------------------------------------------------


def save_kohya(path, layers, alpha, header, scales=None):
    """Write an adapter to the file `path` in half precision, atomically.

    `layers` is {component: {layer name: (A [rank, in], B [out, rank])}}, `header` a dict of strings, to which hashes
    of the tensors are added. `scales` is {component: {layer name: dora_scale [out, 1]}} of DoRA as ComfyUI reads it, in
    float32. diffusers expects another shape and refuses such a file.
    """
    tensors = {}
    for component, rows in layers.items():
        dora = (scales or {}).get(component, {})
        rows = rows | (idle_layers(rows) if component == "text_encoder" and not dora else {})
        for name, pair in rows.items():
            scale = dora.get(name)
            key = f"{PREFIXES[component]}_{prefixed(component, name).replace('.', '_')}"
            for factor, weight in zip(("down", "up"), pair, strict=True):
                # Cloned: the parameters may be views of one flat vector.
                tensors[f"{key}.lora_{factor}.weight"] = weight.detach().half().cpu().clone()
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
            if scale is not None:
                tensors[f"{key}.dora_scale"] = scale.float().cpu().clone()
    write_bytes(Path(path), safetensors.torch.save(tensors, metadata=header | hashes(tensors, header)))


def prefixed(component, layer):
    """A layer's name in a file. A text encoder's layers get the prefix `text_model.` even if transformers omits it."""
    return f"text_model.{layer.removeprefix('text_model.')}" if component == "text_encoder" else layer


def idle_layers(rows):
    """Layers of zeros for the output projections that a text encoder's adapter lacks: {name: (A, B)}.

    diffusers (0.42) recognises kohya's text encoder by them alone and refuses the whole file without them. It also
    mishandles differing alphas, and kohya's merge_lora.py differing ranks, so these layers have those of the others.
    """
    idle = {}
    for name, (a, _) in rows.items():
        place, layer = name.rsplit(".", 1)
        if place.endswith("self_attn") and layer != "out_proj":
            rank, width = a.shape
            idle[f"{place}.out_proj"] = (torch.zeros(rank, width), torch.zeros(width, rank))
    return {name: pair for name, pair in idle.items() if name not in rows}


# ---- reading -------------------------------------------------------------------------------


def is_kohya(keys):
    """Whether a file with these keys is in kohya's format, whatever the kind of adapter."""
    return any(key.startswith(("lora_unet_", "lora_te", "lycoris_", "bundle_emb.")) for key in keys)


def dotted(layer):
    """The module path of kohya's layer name: `down_blocks_0_…_to_out_0` is down_blocks.0.….to_out.0."""
    return ".".join(PART.findall(layer))


def as_matrix(key, tensor, path):
    """A factor in float32, a 1x1 convolution's as a matrix. Raises UserError if the kernel is larger (LoCon)."""
    if tensor.ndim == 4:
        if tuple(tensor.shape[2:]) != (1, 1):
            refuse(key, tensor, path)
        tensor = tensor[:, :, 0, 0]
    return tensor.float()


def read_kohya(tensors, path):
    """The layers of a file in kohya's format: {component: {layer: {"A", "B", and if stated "alpha", "m"}}}, in float32.

    "m" is the dora_scale. The factors of a 1x1 convolution become matrices. A kind of layer (to_q, out_proj) whose B
    are all zero is left out, unless all kinds are. Raises UserError naming the file `path` for other kinds of adapters,
    by their name, for an invalid alpha and for a dora_scale of the wrong shape.
    """
    layers = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            refuse(key, tensor, path)
        layer, factor = dotted(match["layer"]), FACTORS[match["what"]]
        row = layers.setdefault(COMPONENTS[match["component"]], {}).setdefault(layer, {})
        if factor in row:
            raise UserError(f"{path}: {match['what']} of {layer} is in the file twice; save it again")
        row[factor] = alpha_value(tensor, layer, path) if factor == "alpha" else as_matrix(key, tensor, path)
    for rows in layers.values():
        for name, row in rows.items():
            if not {"A", "B", "m"} <= row.keys():
                continue
            if tuple(row["m"].shape) not in ((*row["B"].shape[:1], 1), (1, *row["A"].shape[1:])):
                raise UserError(
                    f"{path}: dora_scale of {name} has shape {tuple(row['m'].shape)}, but must have one value for each "
                    "output or for each input; the file is damaged"
                )
    return {component: without_idle(rows) for component, rows in layers.items()}


def without_idle(rows):
    """`rows` ({layer: factors}) without the kinds of layers whose B are all zero."""
    active = {name.rsplit(".", 1)[-1] for name, row in rows.items() if "B" not in row or row["B"].any()}
    return {name: row for name, row in rows.items() if name.rsplit(".", 1)[-1] in active} or rows


def alpha_value(tensor, layer, path):
    """The alpha of a layer. Raises UserError if it is not one positive number."""
    if tensor.numel() != 1 or not 1e-6 <= tensor.item() <= 1e6:
        raise UserError(f"{path}: alpha of {layer} is {tensor.flatten()[:3].tolist()}, but must be a positive number")
    return tensor.item()


def refuse(key, tensor, path):
    """Raises UserError naming the kind of adapter that a key of the file `path` belongs to."""
    ending = key.split(".", 1)[-1]
    kind = next((f"of {kind}" for part, kind in OTHER_KINDS.items() if ending.startswith(part)), None)
    if kind is None and key.startswith(("lora_te2_", "lora_te3_")):
        kind = "of Stable Diffusion XL or later (a second text encoder)"
    elif kind is None and key.startswith("bundle_emb."):
        kind = "an embedding in addition to the LoRA"
    elif kind is None:
        kind = "of LoCon (a convolution)" if tensor.ndim == 4 else "of an unknown kind"
    raise UserError(
        f"{path}: only plain LoRA and DoRA of Stable Diffusion 1.x and 2.x can be read, but {key} is {kind}"
    )


def adapter_header(header):
    """The entries of a kohya header that the results show, under this project's names: a dict of strings."""
    names = {
        "base_model": "ss_sd_model_name",
        "caption": "modelspec.trigger_phrase",
        "steps": "ss_steps",
        "seed": "ss_seed",
        "rank": "ss_network_dim",
        "alpha": "ss_network_alpha",
        "clip_skip": "ss_clip_skip",
        "title": "modelspec.title",
    }
    values = {name: str(header.get(key, "None"))[:300] for name, key in names.items()}
    return {name: value for name, value in values.items() if value not in ("", "None")}
