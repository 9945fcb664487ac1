"""The transformer blocks of UNets and CLIP text encoders, computed with the kernels of rows.py."""

import functools
import itertools

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from lib.kernels.layer_norm_geglu import (
    MANY,
    Geglu,
    QuickGelu,
    run_geglu,
    run_quick_gelu,
    run_sum_norm,
    run_sum_norm_backward,
    sum_and_norm,
)

ACTIVATIONS = {QuickGELUActivation: run_quick_gelu, GEGLU: run_geglu}


def row_modules(model):
    """The modules of a UNet or CLIP text encoder whose forward pass these kernels compute: transformer
    blocks and activations. What does more than Stable Diffusion's is left as it is."""
    return [module for module in model.modules() if _is_plain(module)]


def _is_plain(module):
    if type(module) is CLIPEncoderLayer:
        return all(map(_is_plain_norm, _norms(module)))
    return is_plain_transformer(module) or type(module) in ACTIVATIONS


def is_plain_transformer(module):
    """Whether it is a UNet's transformer block that does no more than `block_forward`."""
    return (
        type(module) is BasicTransformerBlock
        and module.norm_type == "layer_norm"
        and module.attn2 is not None
        and module.pos_embed is None
        and module._chunk_size is None
        and not module.only_cross_attention
        and not hasattr(module, "fuser")
        and all(map(_is_plain_norm, _norms(module)))
    )


def _norms(block):
    if isinstance(block, CLIPEncoderLayer):
        return block.layer_norm1, block.layer_norm2
    return block.norm1, block.norm2, block.norm3


def _is_plain_norm(norm):
    return type(norm) is torch.nn.LayerNorm and norm.weight is not None and norm.bias is not None


def use_row_kernels(model):
    """Let `row_modules` be computed by these kernels from now on."""
    forward = {
        BasicTransformerBlock: block_forward,
        CLIPEncoderLayer: _clip_layer_forward,
        QuickGELUActivation: lambda _, x: QuickGelu.apply(x),
        GEGLU: lambda geglu, x: Geglu.apply(geglu.proj(x)),
    }
    for module in row_modules(model):
        module.forward = functools.partial(forward[type(module)], module)


def row_jobs(model, training):
    """Functions that launch each kernel that `model` will need, to have it compiled: {what it is: function}."""
    place, jobs = next(model.parameters()), {}
    passes = (False, True) if training else (False,)  # backward or not

    def launch(norm, backward, add):
        x = place.new_zeros(MANY, *norm.normalized_shape)
        if backward:
            run_sum_norm_backward(x, x, x, norm.weight, x.new_zeros(MANY, 2, dtype=torch.float32))
        else:
            for rows in (x[:1], x):
                run_sum_norm(rows, rows if add else None, norm.weight, norm.bias, norm.eps)

    def launch_activation(run, backward):
        x = place.new_zeros(16, 32)
        run(x, x if backward else None)

    for module in row_modules(model):
        if run := ACTIVATIONS.get(type(module)):
            for backward in passes:
                jobs[run, backward] = functools.partial(launch_activation, run, backward)
        else:
            for norm, backward, add in itertools.product(_norms(module), passes, (False, True)):
                kind = norm.normalized_shape, backward, add and not backward
                jobs[kind] = functools.partial(launch, norm, backward, add)
    return jobs


def block_forward(
    block,
    hidden_states,
    attention_mask=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    timestep=None,
    cross_attention_kwargs=None,
    class_labels=None,
    added_cond_kwargs=None,
    *,
    sum_and_norm=sum_and_norm,
    copies=1,
):
    """A UNet's transformer block: attention to the image, to so many `copies` of the texts, and a feed-forward
    layer."""
    others = cross_attention_kwargs or {}
    stream, normed = sum_and_norm(block.norm1, hidden_states)
    attended = block.attn1(normed, attention_mask=attention_mask, **others)
    stream, normed = sum_and_norm(block.norm2, stream, attended)
    if copies > 1:
        stream, normed = (torch.cat([x] * copies) for x in (stream, normed))
    attended = block.attn2(normed, encoder_hidden_states, attention_mask=encoder_attention_mask, **others)
    stream, normed = sum_and_norm(block.norm3, stream, attended)
    return block.ff(normed) + stream


def _clip_layer_forward(layer, hidden_states, attention_mask=None, **others):
    stream, normed = sum_and_norm(layer.layer_norm1, hidden_states)
    attended, _ = layer.self_attn(hidden_states=normed, attention_mask=attention_mask, **others)
    stream, normed = sum_and_norm(layer.layer_norm2, stream, attended)
    return stream + layer.mlp(normed)
