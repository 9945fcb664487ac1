"""DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353) as LoRA with one factor for each output.

The weight is m (W + scale B A) / ‖W + scale B A‖, the norms being those of the rows, and by section 4.3
of the paper they are constants to the gradient. PEFT builds the whole product B A to take them, in each
layer at each call. Here they come from thin products alone,

    ‖W + s B A‖² = ‖W‖² + s rowsum((2 W Aᵀ + s B A Aᵀ) ∘ B),

for all layers of one shape at once and once a pass.
"""

import functools

import torch
import torch.nn.functional as F

from lib import adapters


class DoraLinear(torch.autograd.Function):
    """factor (x W^T + scale (x A^T) B^T) + bias, with W and its bias frozen.

    x [..., in], W [out, in], bias [out] or None, A [rank, in], B [out, rank], magnitude [out], all of one
    type; factor and inverse, float32 [out], are magnitude / norm and 1 / norm. The magnitude itself is
    only there to be given its gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, magnitude, factor, inverse, scale):
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.T
        direction = F.linear(rows, weight).addmm_(low, b.T, alpha=scale)
        out = torch.mul(direction, factor, out=torch.empty_like(direction))
        if bias is not None:
            out += bias
        ctx.save_for_backward(rows, weight, a, b, magnitude, low, direction, factor, inverse)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, a, b, magnitude, low, direction, factor, inverse = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(-1, grad.shape[-1])
        # In float32: a half-precision product of the two could overflow.
        grad_magnitude = ((grad.float() * direction).sum(dim=0) * inverse).to(magnitude.dtype)
        grad = torch.mul(grad, factor, out=torch.empty_like(grad))
        grad_low = grad @ b
        grad_b = grad.T @ low
        if ctx.scale != 1:
            grad_low, grad_b = grad_low * ctx.scale, grad_b * ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a).view(*shape[:-1], -1)
        return grad_x, None, None, grad_low.T @ rows, grad_b, grad_magnitude, None, None, None


class DoraFactors:
    """magnitude / norm of every DoRA layer of a model, at a fixed place, where its layers read it.

    The layers compute with DoraLinear from now on. Their frozen weights of one shape become views of
    one tensor, so that one product is that of all of them.
    """

    def __init__(self, model):
        layers = adapters.lora_layers(model)
        sizes = [layer.get_base_layer().out_features for layer in layers.values()]
        device = next(model.parameters()).device
        self.factors, self.inverses = torch.zeros(2, sum(sizes), device=device)
        by_shape = {}
        views = zip(self.factors.split(sizes), self.inverses.split(sizes), strict=True)
        for (name, layer), (factor, inverse) in zip(layers.items(), views, strict=True):
            layer.forward = functools.partial(_dora_forward, layer, factor, inverse)
            key = layer.get_base_layer().weight.shape, layer.scaling["default"]
            by_shape.setdefault(key, {})[name] = layer
        self.names, self.groups = list(layers), []
        for (_, scale), group in by_shape.items():
            bases = [layer.get_base_layer() for layer in group.values()]
            weights = torch.stack([base.weight.data for base in bases])
            for base, weight in zip(bases, weights, strict=True):
                base.weight.data = weight
            squares = torch.linalg.vector_norm(weights, dim=-1, dtype=torch.float32).square()
            self.groups.append((group, weights, squares, scale))

    @torch.no_grad()
    def refresh(self, magnitudes):
        """Follow the layers' A and B, and `magnitudes`, float32 [all outputs], in the layers' order."""
        norms = {}
        for group, weights, squares, scale in self.groups:
            a = torch.stack([layer.lora_A["default"].weight for layer in group.values()])
            b = torch.stack([layer.lora_B["default"].weight for layer in group.values()])
            inner = torch.baddbmm(weights @ a.mT, b, a @ a.mT, beta=2, alpha=scale)
            of_group = squares + scale * (inner.float() * b).sum(dim=-1)
            norms |= zip(group, of_group.rsqrt(), strict=True)
        torch.cat([norms[name] for name in self.names], out=self.inverses)
        torch.mul(magnitudes, self.inverses, out=self.factors)


def _dora_forward(layer, factor, inverse, x):
    base, a, b = layer.get_base_layer(), layer.lora_A["default"], layer.lora_B["default"]
    magnitude = layer.lora_magnitude_vector["default"].weight
    scale = layer.scaling["default"]
    return DoraLinear.apply(
        x, base.weight, base.bias, a.weight, b.weight, magnitude, factor, inverse, scale
    )
