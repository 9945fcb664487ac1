"""Transformer blocks of UNets and CLIP text encoders with the kernels of layer_norm_geglu.py, and the start of a UNet
computed once for both halves of guidance."""

import contextlib
import functools
import itertools

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from lib.kernels.layer_norm_geglu import (
    MANY_ROWS,
    Geglu,
    QuickGelu,
    add_layer_norm,
    run_add_layer_norm,
    run_add_layer_norm_backward,
    run_geglu,
    run_quick_gelu,
)

ACTIVATIONS = {QuickGELUActivation: run_quick_gelu, GEGLU: run_geglu}


def plain_modules(model):
    """The transformer blocks and activations of a UNet or CLIP text encoder that these kernels can compute: those that
    do no more than Stable Diffusion's."""
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


def use_transformer_kernels(model):
    """Compute the `plain_modules` with these kernels from now on."""
    forward = {
        BasicTransformerBlock: block_forward,
        CLIPEncoderLayer: _clip_layer_forward,
        QuickGELUActivation: lambda _, x: QuickGelu.apply(x),
        GEGLU: lambda geglu, x: Geglu.apply(geglu.proj(x)),
    }
    for module in plain_modules(model):
        module.forward = functools.partial(forward[type(module)], module)


def transformer_jobs(model, training, like):
    """Functions that launch each kernel that `model` will need for tensors like `like`, to compile it: {kernel and sizes:
    function}."""
    jobs = {}
    passes = (False, True) if training else (False,)  # backward or not

    def launch(norm, backward, add):
        x = like.new_zeros(MANY_ROWS, *norm.normalized_shape)
        if backward:
            run_add_layer_norm_backward(x, x, x, norm.weight, x.new_zeros(MANY_ROWS, 2, dtype=torch.float32))
        else:
            for rows in (x[:1], x):
                run_add_layer_norm(rows, rows if add else None, norm.weight, norm.bias, norm.eps)

    def launch_activation(run, backward):
        x = like.new_zeros(16, 32)
        run(x, x if backward else None)

    for module in plain_modules(model):
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
    hidden_states,  # [n, rows, width]
    attention_mask=None,
    encoder_hidden_states=None,  # [copies * n, 77, d]
    encoder_attention_mask=None,
    timestep=None,
    cross_attention_kwargs=None,
    class_labels=None,
    added_cond_kwargs=None,
    *,
    add_layer_norm=add_layer_norm,
    copies=1,
):
    """A UNet's transformer block: [copies * n, rows, width]. The batch is repeated `copies` times before the
    cross-attention, where it meets as many texts."""
    others = cross_attention_kwargs or {}
    stream, normed = add_layer_norm(block.norm1, hidden_states)
    attended = block.attn1(normed, attention_mask=attention_mask, **others)
    stream, normed = add_layer_norm(block.norm2, stream, attended)
    if copies > 1:
        stream, normed = (torch.cat([x] * copies) for x in (stream, normed))
    attended = block.attn2(normed, encoder_hidden_states, attention_mask=encoder_attention_mask, **others)
    stream, normed = add_layer_norm(block.norm3, stream, attended)
    return block.ff(normed) + stream


def _clip_layer_forward(layer, hidden_states, attention_mask=None, **others):
    stream, normed = add_layer_norm(layer.layer_norm1, hidden_states)
    attended, _ = layer.self_attn(hidden_states=normed, attention_mask=attention_mask, **others)
    stream, normed = add_layer_norm(layer.layer_norm2, stream, attended)
    return stream + layer.mlp(normed)


# ---- guidance ------------------------------------------------------------------------------


@contextlib.contextmanager
def shared_start(unet):
    """Context in which `unet` computes the common start of both halves of a batch once. The halves must be equal.

    With classifier-free guidance (Ho & Salimans 2022) a UNet predicts the same latents with the prompt and without, in
    one batch. The halves differ only from the first cross-attention on. Before it come the first residual block and, at
    the largest feature map, the first of five self-attentions. A UNet that starts differently from Stable Diffusion's
    computes both halves.
    """
    block = unet.down_blocks[0]
    residual, transformer = block.resnets[0], next(iter(getattr(block, "attentions", ())), None)
    plain = (
        isinstance(residual, ResnetBlock2D)
        and isinstance(transformer, Transformer2DModel)
        and transformer.is_input_continuous
        and all(map(is_plain_transformer, transformer.transformer_blocks))
    )
    if not plain:
        yield
        return
    on_half = functools.partial(_first_half, residual, residual.forward)
    to_both = functools.partial(_transformer_forward, transformer)
    with _with_forward(residual, on_half), _with_forward(transformer, to_both):
        yield


@contextlib.contextmanager
def _with_forward(module, forward):
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _first_half(residual, forward, x, timestep):
    half = len(x) // 2
    is_projected = isinstance(timestep, dict)  # see TimestepProjections
    timestep = {id(residual): timestep[id(residual)][:half]} if is_projected else timestep[:half]
    return forward(x[:half], timestep)


def _transformer_forward(transformer, x, encoder_hidden_states=None, **others):
    """A transformer's forward pass of x [n, c, h, w] and 2n texts: [2n, c, h, w]."""
    rows, width = transformer._operate_on_continuous_inputs(x)
    first, *rest = transformer.transformer_blocks
    fused = "forward" in vars(first)  # set by use_transformer_kernels
    norm = add_layer_norm if fused else _plain_add_layer_norm
    rows = block_forward(first, rows, encoder_hidden_states=encoder_hidden_states, add_layer_norm=norm, copies=2)
    for block in rest:
        rows = block(rows, encoder_hidden_states=encoder_hidden_states)
    both = torch.cat([x, x])
    return (transformer._get_output_for_continuous_inputs(rows, both, len(both), *x.shape[2:], width),)


def _plain_add_layer_norm(norm, x, y=None):
    total = x if y is None else x + y
    return total, norm(total)
