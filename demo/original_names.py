"""The tensors of a model under the names of the original Stable Diffusion code, as single files have them."""

import re

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def original_unet(tensors, layers):
    """A UNet's tensors under the names of the original code; `layers` is its layers_per_block."""
    attended = {k.split(".attentions")[0] for k in tensors if ".attentions" in k}
    found = {}
    for key, value in tensors.items():
        place, rest = key, ""
        if match := re.match(r"((down|up)_blocks\.(\d+))\.(\w+)\.(\d+)\.(.*)", key):
            block, side, level, kind, number, rest = match.groups()
            level, number = int(level), int(number)
            if kind == "downsamplers":
                place, rest = f"input_blocks.{(level + 1) * (layers + 1)}.0", rest.replace("conv", "op")
            elif kind == "upsamplers":
                place = f"output_blocks.{level * (layers + 1) + layers}.{2 if block in attended else 1}"
            else:
                first = 1 if side == "down" else 0
                place = f"{'in' if side == 'down' else 'out'}put_blocks.{level * (layers + 1) + number + first}"
                place += f".{1 if kind == 'attentions' else 0}"
        elif match := re.match(r"mid_block\.(\w+)\.(\d)\.(.*)", key):
            kind, number, rest = match.groups()
            place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
        else:
            ends = "conv_in=input_blocks.0.0 time_embedding.linear_1=time_embed.0 time_embedding.linear_2=time_embed.2"
            for pair in f"{ends} conv_norm_out=out.0 conv_out=out.2".split():
                ours, theirs = pair.split("=")
                place = place.replace(f"{ours}.", f"{theirs}.")
        if "resnets" in key:
            part, ending = rest.split(".")
            rest = f"{RESNET[part]}.{ending}"
        found["model.diffusion_model." + (f"{place}.{rest}" if rest else place)] = value
    return found


def original_vae(tensors):
    """A VAE's tensors under the names of the original code."""
    found = {}
    for key, value in tensors.items():
        name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            name = name.replace("to_out.0", "proj_out").replace("to_", "")
            value = value[:, :, None, None] if value.ndim == 2 else value
        found[f"first_stage_model.{name}"] = value
    return found
