"""Triton kernels for the rows of transformers: a sum with the layer norm that follows it, and CLIP's activation.

A transformer adds each layer's output to the residual stream and hands the next layer a norm of the
sum. PyTorch takes a kernel for the sum and one for the norm, and backward one for the norm's gradient
and one to add the residual stream's. Here it is one each way.
"""

import functools
import itertools

import torch
from diffusers.models.attention import BasicTransformerBlock
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from lib.kernels.compiling import tl, triton

if triton:

    @triton.jit
    def _sum_norm(x, y, STRIDE, weight, bias, total, statistics, out, eps,
                  WIDTH: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
        """total = x + y, rounded as it is stored, and its layer norm; without ADD that of x; of one row.

        Rows of y are STRIDE apart."""
        column = tl.arange(0, TILE)
        inside = column < WIDTH
        row = tl.program_id(0).to(tl.int64)
        place = row * WIDTH + column
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            other = tl.load(y + row * STRIDE + column, mask=inside, other=0.0).to(tl.float32)
            rounded = (value + other).to(total.dtype.element_ty)
            tl.store(total + place, rounded, mask=inside)
            value = rounded.to(tl.float32)
        mean = tl.sum(value, 0) / WIDTH
        apart = tl.where(inside, value - mean, 0.0)
        rstd = 1 / tl.sqrt(tl.sum(apart * apart, 0) / WIDTH + eps)
        tl.store(statistics + row * 2, mean)
        tl.store(statistics + row * 2 + 1, rstd)
        tl.store(out + place, (apart * rstd * w + b).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _sum_norm_backward(total, grad_total, grad_norm, weight, statistics, out,
                           WIDTH: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
        """The gradient of x and of y alike, of one row: grad_total and what comes through the norm."""
        column = tl.arange(0, TILE)
        inside = column < WIDTH
        row = tl.program_id(0).to(tl.int64)
        place = row * WIDTH + column
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(statistics + row * 2)
        rstd = tl.load(statistics + row * 2 + 1)
        hat = (tl.load(total + place, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        dz = tl.load(grad_norm + place, mask=inside, other=0.0).to(tl.float32) * w
        first = tl.sum(dz, 0) / WIDTH
        second = tl.sum(dz * hat, 0) / WIDTH
        result = tl.load(grad_total + place, mask=inside, other=0.0).to(tl.float32)
        result += rstd * (dz - first - hat * second)
        tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _quick_gelu(
        x, STRIDE, grad, out, COUNT, WIDTH, BLOCK: tl.constexpr, BACKWARD: tl.constexpr
    ):
        """out = x sigmoid(1.702 x), or backward the gradient of x, whose rows are STRIDE apart."""
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < COUNT
        own = place // WIDTH * STRIDE + place % WIDTH
        value = tl.load(x + own, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(1.702 * value)
        result = value * sigmoid
        if BACKWARD:
            dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
            result = dy * sigmoid * (1 + 1.702 * value * (1 - sigmoid))
        tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


class SumNorm(torch.autograd.Function):
    """(x + y, layer_norm(x + y)) of rows x and y [..., width]; without y, None, (x, layer_norm(x)).

    weight and bias [width] are frozen. Sums over a row are float32. Of the forward pass x + y is kept,
    which the residual stream keeps anyway, and of each row its mean and deviation.
    """

    @staticmethod
    def forward(ctx, x, y, weight, bias, eps):
        x = x.contiguous()
        total, norm, statistics = run_sum_norm(x, y, weight, bias, eps)
        ctx.save_for_backward(total, weight, statistics)
        ctx.added = y is not None
        return total, norm

    @staticmethod
    def backward(ctx, grad_total, grad_norm):
        total, weight, statistics = ctx.saved_tensors
        grad = run_sum_norm_backward(total, grad_total, grad_norm, weight, statistics)
        return grad, grad if ctx.added else None, None, None, None


def rows_of(x):
    """x [..., width] as rows [n, width], whose values lie side by side: a view also of some columns of wider rows, as
    an adapted layer's outputs are."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _sizes(width):
    """What the kernels of rows are compiled for: a thread has eight values, 16 bytes in half precision."""
    tile = triton.next_power_of_2(width)
    return dict(WIDTH=width, TILE=tile, num_warps=max(1, tile // 256))


def run_sum_norm(x, y, weight, bias, eps):
    """(x + y or, with a y of None, x itself; its layer norm; mean and 1 / deviation of each row [rows, 2])."""
    width, add = x.shape[-1], y is not None
    total, out = torch.empty_like(x) if add else x, torch.empty_like(x)
    statistics = x.new_empty(x.numel() // width, 2, dtype=torch.float32)
    rows = rows_of(y if add else x)
    inputs = x, rows, rows.stride(0), weight, bias
    _sum_norm[len(statistics),](*inputs, total, statistics, out, eps, ADD=add, **_sizes(width))
    return total, out, statistics


def run_sum_norm_backward(total, grad_total, grad_norm, weight, statistics):
    """The gradient of x and of y, from those of what `run_sum_norm` gave."""
    out, gradients = torch.empty_like(total), (grad_total.contiguous(), grad_norm.contiguous())
    grid, sizes = (len(statistics),), _sizes(total.shape[-1])
    _sum_norm_backward[grid](total, *gradients, weight, statistics, out, **sizes)
    return out


class QuickGelu(torch.autograd.Function):
    """CLIP's x sigmoid(1.702 x), keeping x alone for the backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return run_quick_gelu(x, None)

    @staticmethod
    def backward(ctx, grad):
        return run_quick_gelu(*ctx.saved_tensors, grad.contiguous())


def run_quick_gelu(x, grad):
    out, rows, backward = x.new_empty(x.shape), rows_of(x), grad is not None
    _quick_gelu[triton.cdiv(x.numel(), 1024),](
        rows, rows.stride(0), grad if backward else rows, out, x.numel(), x.shape[-1], BLOCK=1024, BACKWARD=backward
    )  # fmt: skip
    return out


def row_modules(model):
    """The modules of a UNet or CLIP text encoder whose forward pass these kernels compute: transformer
    blocks and activations. What does more than Stable Diffusion's is left as it is."""
    return [module for module in model.modules() if _is_plain(module)]


def _is_plain(module):
    if type(module) is BasicTransformerBlock:
        return (
            module.norm_type == "layer_norm"
            and module.attn2 is not None
            and module.pos_embed is None
            and module._chunk_size is None
            and not module.only_cross_attention
            and not hasattr(module, "fuser")
            and all(map(_is_plain_norm, _norms(module)))
        )
    if type(module) is CLIPEncoderLayer:
        return all(map(_is_plain_norm, _norms(module)))
    return type(module) is QuickGELUActivation


def _norms(block):
    if isinstance(block, CLIPEncoderLayer):
        return block.layer_norm1, block.layer_norm2
    return block.norm1, block.norm2, block.norm3


def _is_plain_norm(norm):
    return type(norm) is torch.nn.LayerNorm and norm.weight is not None and norm.bias is not None


def use_row_kernels(model):
    """Let `row_modules` be computed by these kernels from now on."""
    forward = {
        BasicTransformerBlock: _block_forward,
        CLIPEncoderLayer: _clip_layer_forward,
        QuickGELUActivation: lambda _, x: QuickGelu.apply(x),
    }
    for module in row_modules(model):
        module.forward = functools.partial(forward[type(module)], module)


def row_jobs(model, training):
    """Functions that launch each kernel that `model` will need, to have it compiled: {what it is: function}."""
    place, jobs = next(model.parameters()), {}
    passes = (False, True) if training else (False,)  # backward or not

    def launch(norm, backward, add):
        x = place.new_zeros(1, *norm.normalized_shape)
        if backward:
            run_sum_norm_backward(x, x, x, norm.weight, x.new_zeros(1, 2, dtype=torch.float32))
        else:
            run_sum_norm(x, x if add else None, norm.weight, norm.bias, norm.eps)

    def launch_activation(backward):
        x = place.new_zeros(16, 32)
        run_quick_gelu(x, x if backward else None)

    for module in row_modules(model):
        if isinstance(module, QuickGELUActivation):
            for backward in passes:
                jobs["activation", backward] = functools.partial(launch_activation, backward)
        else:
            for norm, backward, add in itertools.product(_norms(module), passes, (False, True)):
                kind = norm.normalized_shape, backward, add and not backward
                jobs[kind] = functools.partial(launch, norm, backward, add)
    return jobs


def _sum_and_norm(norm, x, y=None):
    return SumNorm.apply(x, y, norm.weight, norm.bias, norm.eps)


def _block_forward(block, hidden_states, attention_mask=None, encoder_hidden_states=None,
                   encoder_attention_mask=None, timestep=None, cross_attention_kwargs=None,
                   class_labels=None, added_cond_kwargs=None):  # fmt: skip
    """A UNet's transformer block: attention to the picture, to the text, and a feed-forward layer."""
    others = cross_attention_kwargs or {}
    stream, normed = _sum_and_norm(block.norm1, hidden_states)
    attended = block.attn1(normed, attention_mask=attention_mask, **others)
    stream, normed = _sum_and_norm(block.norm2, stream, attended)
    attended = block.attn2(
        normed, encoder_hidden_states, attention_mask=encoder_attention_mask, **others
    )
    stream, normed = _sum_and_norm(block.norm3, stream, attended)
    return block.ff(normed) + stream


def _clip_layer_forward(layer, hidden_states, attention_mask=None, **others):
    stream, normed = _sum_and_norm(layer.layer_norm1, hidden_states)
    attended, _ = layer.self_attn(hidden_states=normed, attention_mask=attention_mask, **others)
    stream, normed = _sum_and_norm(layer.layer_norm2, stream, attended)
    return stream + layer.mlp(normed)
