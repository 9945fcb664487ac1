"""Layers of a UNet or CLIP text encoder that read the same input, fused into one.

q, k, v = split(x [W_q; W_k; W_v]ᵀ)     self-attention
k₁, v₁, …, kₙ, vₙ = split(text Wᵀ)      the cross-attentions of a UNet, once per text
shift₁, …, shiftₙ = split(temb Wᵀ)      its residual blocks, once per timestep
"""

import functools

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from peft.tuners.lora import LoraLayer
from transformers.models.clip.modeling_clip import ALL_ATTENTION_FUNCTIONS, CLIPAttention

from lib.kernels.compiling import attention_kernels
from lib.kernels.lora import FusedLinear


def fuse_projections(model, device, dora=False):
    """Fuse the projections of a UNet or CLIP text encoder and move them to `device`; returns each FusedLinear, [] for
    other models. `dora` says whether the adapters are DoRA. Layers unlike Stable Diffusion's are unchanged."""
    fused_layers, cross_attentions, blocks = [], [], []

    def fuse(layers):
        fused_layers.append(FusedLinear(layers, device))
        return fused_layers[-1]

    for module in model.modules():
        if isinstance(module, Attention) and _is_plain(module):
            if module.is_cross_attention:
                cross_attentions.append(module)
            elif _can_fuse(layers := [module.to_q, module.to_k, module.to_v], dora):
                module.set_processor(SelfAttention(fuse(layers)))
        elif isinstance(module, ResnetBlock2D) and module.time_emb_proj is not None:
            blocks.append(module)
        elif isinstance(module, CLIPAttention) and module.config._attn_implementation == "sdpa":
            layers = [module.q_proj, module.k_proj, module.v_proj]
            if _can_fuse(layers, dora):
                module.forward = functools.partial(_clip_attention_forward, module, fuse(layers))
    layers = [layer for attention in cross_attentions for layer in (attention.to_k, attention.to_v)]
    if layers and _can_fuse(layers, dora):
        model.text_keys_values = functools.partial(_text_keys_values, fuse(layers), cross_attentions)
        model.forward = functools.partial(_unet_forward, model.forward, model.text_keys_values)
        for attention in cross_attentions:
            attention.set_processor(CrossAttention())
    layers = [block.time_emb_proj for block in blocks]
    plain = all(map(is_plain_block, blocks)) and getattr(model, "time_embed_act", 0) is None
    if layers and plain and _can_fuse(layers, dora):
        model.time_embed_act = TimestepProjections(fuse(layers), blocks)
        for block in blocks:
            block.forward = functools.partial(_block_forward, block)
    return fused_layers


def is_plain_block(block):
    """Whether it is a residual block with a SiLU after each norm, a sum at its end and nothing more."""
    return (
        isinstance(block, ResnetBlock2D)
        and isinstance(block.nonlinearity, torch.nn.SiLU)
        and (block.time_embedding_norm == "default" or block.time_emb_proj is None)
        and not block.skip_time_act
        and block.upsample is None
        and block.downsample is None
        and block.output_scale_factor == 1
    )


def _is_plain(attention):
    extras = "spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross"
    return (
        type(attention.processor) is AttnProcessor2_0
        and all(getattr(attention, name) is None for name in extras)
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
    )


def _can_fuse(layers, dora):
    """Whether they read the same width and all or none have a bias; for DoRA, also whether all or none are adapted."""
    alike = {(layer.in_features, layer.bias is None) for layer in layers}
    return len(alike) == 1 and not (dora and len({isinstance(layer, LoraLayer) for layer in layers}) > 1)


def _heads(x, count):
    """[n, rows, count * width] -> [n, count, rows, width]"""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _attend(attention, query, key, value):
    with attention_kernels(query, key):
        out = F.scaled_dot_product_attention(*(_heads(x, attention.heads) for x in (query, key, value)))
    out = out.transpose(1, 2).flatten(2)
    return attention.to_out[1](attention.to_out[0](out))  # linear layer, dropout


class SelfAttention:
    """A diffusers attention processor: `hidden_states` [n, rows, width] attend to themselves."""

    def __init__(self, fused):
        self.fused = fused

    def __call__(self, attention, hidden_states, encoder_hidden_states=None, attention_mask=None):
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("this attention takes no text and no mask")
        return _attend(attention, *self.fused(hidden_states))


class CrossAttention:
    """Attention to a text, given by its keys and values: {attention: (key, value)}, [n, 77, width] each."""

    def __call__(self, attention, hidden_states, encoder_hidden_states, attention_mask=None):
        if attention_mask is not None:
            raise ValueError("this attention takes no mask")
        query, (key, value) = attention.to_q(hidden_states), encoder_hidden_states[attention]
        n, rows, _ = query.shape
        chunks = _query_chunks(query)
        if chunks == 1:
            return _attend(attention, query, key, value)
        query = query.reshape(n * chunks, rows // chunks, -1)
        key, value = (x[:, None].expand(-1, chunks, -1, -1).flatten(0, 1) for x in (key, value))
        return _attend(attention, query, key, value).reshape(n, rows, -1)


def _query_chunks(query):
    """Number of chunks into which a cross-attention's queries [n, rows, width] are split, as if they were a larger
    batch; 1 without gradients or without a GPU.

    The backward pass launches one program per block of keys (64 in cuDNN), and each iterates over all queries. A text has
    only 77 keys, so chunks give more programs. The chunks' gradients of a key are summed afterwards. What chunks save was
    measured with cuDNN; the flash kernel, which is used now, takes as long in the same chunks (bench/LOG.md).
    """
    n, rows, chunks = *query.shape[:2], 1
    if not (query.is_cuda and torch.is_grad_enabled()):
        return chunks
    while n * chunks < 16 and rows % (chunks * 2) == 0 and rows // (chunks * 2) >= 128:
        chunks *= 2
    return chunks if chunks >= 4 else 1


def _text_keys_values(fused, attentions, hidden_states):
    """A text's [n, 77, d] keys and values for all cross-attentions: {attention: (key, value)}."""
    parts = iter(fused(hidden_states))
    return {attention: (next(parts), next(parts)) for attention in attentions}


def _unet_forward(forward, text_keys_values, sample, timestep, encoder_hidden_states, *rest, **others):
    """A UNet's forward pass; `encoder_hidden_states` are a text's hidden states or its keys and values.

    The blocks receive the keys and values in place of the hidden states, so gradient checkpointing keeps them too.
    """
    ready = isinstance(encoder_hidden_states, dict)
    pairs = encoder_hidden_states if ready else text_keys_values(encoder_hidden_states)
    return forward(sample, timestep, pairs, *rest, **others)


class TimestepProjections(torch.nn.Module):
    """Projects the timestep's embedding [n, width] for all residual `blocks`: {id(block): [n, channels]}.

    It is installed as the activation after the embedding, which Stable Diffusion does not have. The blocks then receive
    this dict instead of the embedding.
    """

    def __init__(self, fused, blocks):
        super().__init__()
        self.fused = fused
        self.blocks = tuple(map(id, blocks))  # the blocks themselves would become submodules

    def forward(self, embedding):
        return dict(zip(self.blocks, self.fused(F.silu(embedding)), strict=True))


def _block_forward(block, x, timestep):
    """A residual block's forward pass without its division by a scale of 1, a pass over the whole tensor."""
    hidden = block.conv1(block.nonlinearity(block.norm1(x)))
    hidden = hidden + timestep[id(block)][:, :, None, None]
    hidden = block.conv2(block.dropout(block.nonlinearity(block.norm2(hidden))))
    return hidden + (x if block.conv_shortcut is None else block.conv_shortcut(x))


def _clip_attention_forward(attention, fused, hidden_states, attention_mask=None, **others):
    heads = (_heads(x, attention.num_heads) for x in fused(hidden_states))
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with attention_kernels(hidden_states, hidden_states):
        out, weights = attend(attention, *heads, attention_mask, scaling=attention.scale, dropout=0.0, **others)
    return attention.out_proj(out.flatten(2)), weights
