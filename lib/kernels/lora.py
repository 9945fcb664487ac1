"""A LoRA layer as one autograd function: three matrix products forward and five backward, in place of
the some 14 kernels that PEFT's layer launches."""

import contextlib
import functools

import torch
import torch.nn.functional as F

from lib import adapters


class LoraLinear(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T, with W and its bias frozen.

    x [..., in], W [out, in], bias [out] or None, A [rank, in], B [out, rank], all of one type.
    The low-rank product is added to the large one where that is written (one rounding less than
    adding two results), and the backward pass likewise adds to the gradient of x.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.T
        out = F.linear(rows, weight, bias).addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, a, b, low = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(-1, grad.shape[-1])
        grad_low = grad @ b
        grad_b = grad.T @ low
        if ctx.scale != 1:
            grad_low, grad_b = grad_low * ctx.scale, grad_b * ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a).view(*shape[:-1], -1)
        return grad_x, None, None, grad_low.T @ rows, grad_b, None


def fuse_lora(model):
    """Compute every LoRA layer of `model` with LoraLinear from now on."""
    for layer in adapters.lora_layers(model).values():
        layer.forward = functools.partial(_lora_forward, layer)


@contextlib.contextmanager
def without_lora(model):
    """Inside, `model` computes what its base model does: its LoRA layers launch their base layer alone."""
    layers = adapters.lora_layers(model).values()
    adapted = [layer.forward for layer in layers]
    for layer in layers:
        layer.forward = layer.get_base_layer().forward
    try:
        yield
    finally:
        for layer, forward in zip(layers, adapted, strict=True):
            layer.forward = forward


def _lora_forward(layer, x):
    base, a, b = layer.get_base_layer(), layer.lora_A["default"], layer.lora_B["default"]
    return LoraLinear.apply(x, base.weight, base.bias, a.weight, b.weight, layer.scaling["default"])
