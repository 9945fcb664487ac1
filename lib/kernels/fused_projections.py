"""Layers that read the same input as one product: queries, keys and values of an attention to itself and,
once for all of a UNet, the keys and values of what attends to the text, and what its residual blocks
make of the timestep."""

import functools

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from peft.tuners.lora import LoraLayer
from transformers.models.clip.modeling_clip import ALL_ATTENTION_FUNCTIONS, CLIPAttention

from lib.kernels.lora import FusedLinear


def join(model, device, dora=False):
    """Join the layers of a UNet or CLIP text encoder that read the same input, and move them to `device`; returns
    the Products, [] for other models. `dora` says whether their adapters are of that kind.

    What does more than Stable Diffusion's layers is left as it is.
    """
    products, to_text, blocks = [], [], []
    for module in model.modules():
        if isinstance(module, Attention) and _is_plain(module):
            if module.is_cross_attention:
                to_text.append(module)
            elif _can_join(layers := [module.to_q, module.to_k, module.to_v], dora):
                products.append(FusedLinear(layers, device))
                module.set_processor(SelfAttention(products[-1]))
        elif isinstance(module, ResnetBlock2D) and module.time_emb_proj is not None:
            blocks.append(module)
        elif isinstance(module, CLIPAttention) and module.config._attn_implementation == "sdpa":
            layers = [module.q_proj, module.k_proj, module.v_proj]
            if _can_join(layers, dora):
                products.append(FusedLinear(layers, device))
                module.forward = functools.partial(_clip_forward, module, products[-1])
    layers = [layer for module in to_text for layer in (module.to_k, module.to_v)]
    if layers and _can_join(layers, dora):
        products.append(FusedLinear(layers, device))
        model.texts = functools.partial(_texts, products[-1], to_text)
        model.forward = functools.partial(_with_texts, model.forward, model.texts)
        for module in to_text:
            module.set_processor(TextAttention())
    layers = [block.time_emb_proj for block in blocks]
    plain = all(map(is_plain_block, blocks)) and getattr(model, "time_embed_act", 0) is None
    if layers and plain and _can_join(layers, dora):
        products.append(FusedLinear(layers, device))
        model.time_embed_act = TimestepProjections(products[-1], blocks)
        for block in blocks:
            block.forward = functools.partial(_block_forward, block)
    return products


def is_plain_block(block):
    """Whether it is a residual block whose norms are followed by a SiLU, with a sum at the end and no more."""
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


def _can_join(layers, dora):
    """Whether they read the same width, and all or none have a bias. DoRA's norms are taken of whole products, so
    of those it has all layers or none."""
    alike = {(layer.in_features, layer.bias is None) for layer in layers}
    return len(alike) == 1 and not (dora and len({isinstance(layer, LoraLayer) for layer in layers}) > 1)


def _heads(x, count):
    """[n, rows, count * width] as [n, count, rows, width]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _attend(attention, query, key, value):
    heads = (_heads(x, attention.heads) for x in (query, key, value))
    out = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    return attention.to_out[1](attention.to_out[0](out))  # its layer, then its dropout


class SelfAttention:
    """What diffusers calls a processor: attention of `hidden_states` [n, rows, width] to themselves."""

    def __init__(self, product):
        self.product = product

    def __call__(self, attention, hidden_states, encoder_hidden_states=None, attention_mask=None):
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("this attention takes no text and no mask")
        return _attend(attention, *self.product(hidden_states))


class TextAttention:
    """Attention to a text, whose keys and values come as {attention: (key, value)}, [n, 77, width] each."""

    def __call__(self, attention, hidden_states, encoder_hidden_states, attention_mask=None):
        if attention_mask is not None:
            raise ValueError("this attention takes no mask")
        query, (key, value) = attention.to_q(hidden_states), encoder_hidden_states[attention]
        n, rows, _ = query.shape
        pieces = _pieces(query)
        if pieces == 1:
            return _attend(attention, query, key, value)
        query = query.reshape(n * pieces, rows // pieces, -1)
        key, value = (x[:, None].expand(-1, pieces, -1, -1).flatten(0, 1) for x in (key, value))
        return _attend(attention, query, key, value).reshape(n, rows, -1)


def _pieces(query):
    """Into how many pieces the queries [n, rows, width] of an attention to a text are divided, as if they were a
    larger batch; 1 where there is no gradient or no GPU.

    cuDNN's backward pass has a program for each 64 keys, of which a text has 77, that goes through all
    queries: with more pieces there are more programs, and their gradients of a key are added afterwards.
    """
    n, rows, pieces = *query.shape[:2], 1
    if not (query.is_cuda and torch.is_grad_enabled()):
        return pieces
    while n * pieces < 16 and rows % (pieces * 2) == 0 and rows // (pieces * 2) >= 128:
        pieces *= 2
    return pieces if pieces >= 4 else 1


def _texts(product, attentions, states):
    """The keys and values that all `attentions` make of a text's hidden states [n, 77, d]: {attention: (key, value)}."""
    parts = iter(product(states))
    return {attention: (next(parts), next(parts)) for attention in attentions}


def _with_texts(forward, texts, sample, timestep, encoder_hidden_states, *rest, **others):
    """A UNet's forward pass that makes all keys and values of a text first, if they are not given in its place.

    They are handed down in place of the text, as what a block is called with, so a block that is computed
    again for the backward pass finds them too.
    """
    given = isinstance(encoder_hidden_states, dict)
    pairs = encoder_hidden_states if given else texts(encoder_hidden_states)
    return forward(sample, timestep, pairs, *rest, **others)


class TimestepProjections(torch.nn.Module):
    """What all residual `blocks` make of the timestep's embedding [n, width]: {block: [n, channels]}.

    It stands in the place of an activation behind the embedding, which Stable Diffusion does not have, so
    the blocks are called with that in place of the embedding.
    """

    def __init__(self, product, blocks):
        super().__init__()
        self.product = product
        self.blocks = tuple(map(id, blocks))  # not they themselves, which would become a part of it

    def forward(self, embedding):
        return dict(zip(self.blocks, self.product(F.silu(embedding)), strict=True))


def _block_forward(block, x, timestep):
    """A residual block's, less its division by a scale of 1, a pass over the whole tensor."""
    hidden = block.conv1(block.nonlinearity(block.norm1(x)))
    hidden = hidden + timestep[id(block)][:, :, None, None]
    hidden = block.conv2(block.dropout(block.nonlinearity(block.norm2(hidden))))
    return hidden + (x if block.conv_shortcut is None else block.conv_shortcut(x))


def _clip_forward(attention, product, hidden_states, attention_mask=None, **others):
    heads = (_heads(x, attention.num_heads) for x in product(hidden_states))
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    out, weights = attend(attention, *heads, attention_mask, scaling=attention.scale, dropout=0.0, **others)
    return attention.out_proj(out.flatten(2)), weights
