"""LoRA and DoRA layers as a few matrix products, and layers with the same input as one layer.

PEFT's layer launches about 14 kernels forward. At batch 1 each takes a few microseconds, whatever its size. Here an
adapted layer takes two matrix products forward and five backward. A FusedLinear takes no more for all its layers.
"""

import contextlib
import itertools
import math

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from lib import adapters


class AdaptedLinear(torch.autograd.Function):
    """LoRA or DoRA around a frozen linear layer, or around n of them that read the same input.

        y = c * (x Wᵀ + scale * (x Aᵀ) Bᵀ) + bias, where c = 1 for LoRA and c = magnitude / ‖W + scale * B A‖ for DoRA

    For LoRA and one layer it equals F.linear(x, W, bias) + scale * F.linear(F.linear(x, A), B).

    `matrix` stacks W, A and zero padding, so one product gives x Wᵀ and x Aᵀ. B is block diagonal: each of `blocks`
    holds B of adjacent layers with the same number of outputs. The first n layers are adapted, the others are not (with
    DoRA all are). Tensors have one dtype, except those marked float32. `magnitude` and `a`, a part of `matrix`, are
    arguments only to receive gradients. With `gradients` the backward pass writes those of A and B there and returns
    none.

    The low-rank product is accumulated into the output of the large one, which saves a rounding. The backward pass
    accumulates into the gradient of x likewise.
    """

    @staticmethod
    def forward(
        ctx,
        x,  # [..., in]
        matrix,  # [out + n * rank + pad, in]
        out_features,
        bias,  # [out + n * rank + pad], zero behind the outputs; or None
        scale,
        dora_factor,  # c, float32 [out]; None for LoRA
        inverse_norm,  # 1 / ‖W + scale * B A‖, float32 [out]; None for LoRA
        magnitude,  # [out]; None for LoRA
        gradients,  # Gradients or None
        a,  # [n * rank, in]
        *blocks,  # of B, [layers, out of one, rank] each
    ):
        rows = x.reshape(-1, x.shape[-1])
        both = F.linear(rows, matrix, bias if dora_factor is None else None)
        # Views: as long as `low` is kept for the backward pass, the outputs are too.
        out, low = both[:, :out_features], both[:, out_features : out_features + len(a)]
        for block_out, block_low, b in _parts(out, low, blocks):
            if len(b) == 1:
                block_out[0].addmm_(block_low[0], b[0].T, alpha=scale)
            else:
                block_out.baddbmm_(block_low, b.mT, alpha=scale)
        direction = None
        if dora_factor is not None:
            direction = out
            out = torch.mul(direction, dora_factor, out=torch.empty_like(direction))
            if bias is not None:
                out += bias[:out_features]
        ctx.save_for_backward(rows, matrix, low, direction, dora_factor, inverse_norm, *blocks)
        ctx.out_features, ctx.scale, ctx.gradients = out_features, scale, gradients
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        rows, matrix, low, direction, dora_factor, inverse_norm, *blocks = ctx.saved_tensors
        weight, a = matrix[: ctx.out_features], matrix[ctx.out_features : ctx.out_features + low.shape[1]]
        shape, grad = grad.shape, grad.reshape(-1, grad.shape[-1])
        grad_magnitude = None
        if dora_factor is not None:
            # In float32: the product of two half-precision numbers could overflow.
            grad_magnitude = ((grad.float() * direction).sum(dim=0) * inverse_norm).to(direction.dtype)
            grad = torch.mul(grad, dora_factor, out=torch.empty_like(grad))
        grad_low = grad.new_empty(low.shape)
        for block_grad, block_low, b in _parts(grad, grad_low, blocks):
            if len(b) == 1:
                torch.mm(block_grad[0], b[0], out=block_low[0])
            else:
                torch.bmm(block_grad, b, out=block_low)
        # Written in place: gathering hundreds of small tensors takes longer.
        gradients = ctx.gradients or Gradients(torch.empty_like(a), [torch.empty_like(b) for b in blocks])
        gradients.written += 1
        for (block_grad, block_low, b), grad_b in zip(_parts(grad, low, blocks), gradients.blocks, strict=True):
            if len(b) == 1:
                torch.mm(block_grad[0].T, block_low[0], out=grad_b[0])
            else:
                torch.bmm(block_grad.mT, block_low, out=grad_b)
        if ctx.scale != 1:
            grad_low *= ctx.scale
            for grad_b in gradients.blocks:
                grad_b *= ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a).view(*shape[:-1], -1)
        torch.mm(grad_low.T, rows, out=gradients.a)
        returned = [None] * (1 + len(blocks)) if ctx.gradients else [gradients.a, *gradients.blocks]
        return grad_x, *[None] * 6, grad_magnitude, None, *returned


class Gradients:
    """Buffers for a FusedLinear's gradients of A and of the blocks of B; `written` counts the writes."""

    def __init__(self, a, blocks):
        self.a, self.blocks, self.written = a, blocks, 0


def _spans(blocks):
    """For each of `blocks` of B, [layers, out, rank], the slices of its outputs and of its rows of A."""
    column = row = 0
    for layers, out, rank in (b.shape for b in blocks):
        yield slice(column, column + layers * out), slice(row, row + layers * rank)
        column, row = column + layers * out, row + layers * rank


def _parts(outputs, low, blocks):
    """For each block b of B: its outputs [layers, rows, out] and its part of `low` [layers, rows, rank], both views of
    [rows, …], and b."""
    for b, (wide, thin) in zip(blocks, _spans(blocks), strict=True):
        both = (x.unflatten(1, (len(b), -1)) for x in (outputs[:, wide], low[:, thin]))
        yield *(x.transpose(0, 1) for x in both), b


class FusedLinear:
    """Linear layers that read the same input, computed as one: x [..., in] -> their outputs, in the layers' order.

    `layers` are linear layers, PEFT's LoRA or DoRA layers around them, or both. They share one rank and scale, and all
    or none have a bias. Their weights become views of `matrix` on `device`; see AdaptedLinear. Adapted layers also need
    `bind`, and for DoRA a DoraFactors before it.
    """

    def __init__(self, layers, device):
        def adapted_first(layer):
            return not isinstance(layer, LoraLayer), _base(layer).out_features

        self.layers = sorted(layers, key=adapted_first)
        self.order = [self.layers.index(layer) for layer in layers]
        self.bases = [_base(layer) for layer in self.layers]
        self.adapted = [layer for layer in self.layers if isinstance(layer, LoraLayer)]
        self.scale = self.adapted[0].scaling["default"] if self.adapted else None
        self.without_lora = False
        self.a, self.blocks, self.magnitude, self.dora_factor, self.inverse_norm = None, (), None, None, None
        self.gradients = None
        self.sizes = [base.out_features for base in self.bases]
        self.total_rank = sum(layer.lora_A["default"].out_features for layer in self.adapted)
        # Padded so that rows of outputs begin where kernels can read 16 values at once.
        room = math.ceil(self.total_rank / 16) * 16
        weights = [base.weight.data for base in self.bases]
        weights.append(weights[0].new_zeros(room, weights[0].shape[1]))
        self.set_matrix(torch.cat(weights).to(device))
        self.bias = None
        if self.bases[0].bias is not None:  # then every layer has one
            biases = [base.bias.data for base in self.bases]
            self.bias = torch.cat([*biases, biases[0].new_zeros(room)]).to(device)
            for base, part in zip(self.bases, self.bias.split([*self.sizes, room]), strict=False):
                base.bias.data = part

    def set_matrix(self, matrix):
        """Compute with `matrix`, a copy of the present one, and make the weights views of it. Only before `bind`."""
        if self.a is not None:
            raise RuntimeError("the matrix of a bound FusedLinear cannot be replaced: A would stay in the old one")
        self.matrix, self.weight = matrix, matrix[: sum(self.sizes)]
        for base, part in zip(self.bases, self.weight.split(self.sizes), strict=True):
            base.weight.data = part

    def factors(self):
        """PEFT's parameters in the order of A and of the blocks of B: a list."""
        a = [layer.lora_A["default"].weight for layer in self.adapted]
        return a + [layer.lora_B["default"].weight for layer in self.adapted]

    def magnitudes(self):
        """DoRA's magnitudes in the layers' order: a list, empty for LoRA."""
        return [layer.lora_magnitude_vector["default"].weight for layer in self.adapted if layer.lora_magnitude_vector]

    def block_shapes(self):
        """(layers, out, rank) of each block of B."""
        rank = self.adapted[0].lora_A["default"].weight.shape[0]
        sizes = itertools.groupby(_base(layer).out_features for layer in self.adapted)
        return [(len(list(equal)), out, rank) for out, equal in sizes]

    def concatenated(self, x):
        """The outputs side by side, [..., sum of outputs], in the order of `self.layers`."""
        if self.without_lora or not self.adapted:
            bias = None if self.bias is None else self.bias[: len(self.weight)]
            return F.linear(x, self.weight, bias)
        dora = self.dora_factor, self.inverse_norm, self.magnitude
        inputs = x, self.matrix, len(self.weight), self.bias, self.scale
        return AdaptedLinear.apply(*inputs, *dora, self.gradients, self.a, *self.blocks)

    def __call__(self, x):
        parts = self.concatenated(x).split(self.sizes, dim=-1)
        return [parts[place] for place in self.order]


def _base(layer):
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


class DoraFactors:
    """magnitude / ‖W + s B A‖ of every DoRA layer, in tensors at fixed addresses that AdaptedLinear reads.

        ‖W + s B A‖² = ‖W‖² + s rowsum((2 W Aᵀ + s B A Aᵀ) ∘ B)

    These are row norms, and constants in the gradient (Liu et al. 2024, section 4.3, https://arxiv.org/abs/2402.09353).
    For them PEFT computes the full product B A in every layer at every call. The formula needs thin products only,
    batched over all layers of one shape, once per pass.

    The matrices of `fused_layers` of one shape become views of one tensor, so `bind` comes afterwards.
    """

    def __init__(self, fused_layers):
        self.layers = layers = [layer for layer in fused_layers if layer.adapted]
        sizes = [len(layer.weight) for layer in layers]
        device = layers[0].weight.device
        self.factors, self.inverse_norms = torch.zeros(2, sum(sizes), device=device)
        by_shape, self.groups = {}, []
        views = zip(self.factors.split(sizes), self.inverse_norms.split(sizes), strict=True)
        for layer, (layer.dora_factor, layer.inverse_norm) in zip(layers, views, strict=True):
            by_shape.setdefault((layer.matrix.shape, *layer.block_shapes()), []).append(layer)
        for group in by_shape.values():
            matrices = torch.stack([layer.matrix for layer in group])
            for layer, matrix in zip(group, matrices, strict=True):
                layer.set_matrix(matrix)
            weights = matrices[:, : len(group[0].weight)]
            squares = torch.linalg.vector_norm(weights, dim=-1, dtype=torch.float32).square()
            self.groups.append((group, weights, squares))

    @torch.no_grad()
    def refresh(self, magnitudes):
        """Recompute from the layers' A and B, and from `magnitudes`, float32 [outputs of all layers]."""
        inverse_norms = {}
        for group, weights, squares in self.groups:
            of_group = self.squared_norms(group, weights, squares).rsqrt()
            inverse_norms |= zip(group, of_group, strict=True)
        torch.cat([inverse_norms[layer] for layer in self.layers], out=self.inverse_norms)
        torch.mul(magnitudes, self.inverse_norms, out=self.factors)

    @staticmethod
    def squared_norms(group, weights, squares):
        """‖W + s B A‖² of fused layers of one shape, [fused layers, outputs], from W and ‖W‖²."""
        scale, parts = group[0].scale, []
        for number, (outputs, rows) in enumerate(_spans(group[0].blocks)):
            b = torch.stack([fused.blocks[number] for fused in group], dim=1)  # [layers, fused layers, out, rank]
            a = torch.stack([fused.a[rows].unflatten(0, (len(b), -1)) for fused in group], dim=1)
            w = weights[:, outputs].unflatten(1, (len(b), -1)).transpose(0, 1)
            if 1 in b.shape[:2]:  # then all of w is one batch, still a view
                w, a, b = (x.flatten(0, 1)[None] for x in (w, a, b))
            inner = [
                torch.baddbmm(w_ @ a_.mT, b_, a_ @ a_.mT, beta=2, alpha=scale).float() * b_
                for w_, a_, b_ in zip(w, a, b, strict=True)
            ]
            sums = torch.stack(inner).sum(dim=-1).view(-1, len(group), b.shape[2])
            parts.append(sums.transpose(0, 1).flatten(1))
        return squares + scale * torch.cat(parts, dim=-1)


def fuse_lora(model, fused_layers, device):
    """Compute every LoRA layer of `model` with AdaptedLinear from now on; returns all of its FusedLinear, to `bind`.

    `fused_layers` are from `fuse_projections`. Each remaining LoRA layer becomes a FusedLinear of its own.
    """
    in_groups = {layer for fused in fused_layers for layer in fused.layers}
    model.fused_layers = list(fused_layers)
    for layer in adapters.lora_layers(model).values():
        if layer not in in_groups:
            model.fused_layers.append(FusedLinear([layer], device))
            layer.forward = model.fused_layers[-1].concatenated
    return model.fused_layers


def bind(fused_layers, vector, gradient=None):
    """Bind each fused layer to its slice of the flat parameter `vector`, in the order of `trained_weights`.

    Returns (leaves, copies). The leaves of autograd's graph are views of the vector, except for A, which is part of
    each layer's `matrix`: whenever the vector has changed, `copies`, (to, from), must be copied.
    With a flat `gradient` of the vector's size the backward pass writes the gradients of A and B there, and only DoRA's
    magnitudes, the last leaves, get one from autograd.
    """
    leaves, to, of, begin = [], [], [], 0

    def take(*shape):
        """The next slice of the vector and of the gradient."""
        nonlocal begin
        end = begin + math.prod(shape)
        parts = [x if x is None else x[begin:end].view(shape).detach() for x in (vector, gradient)]
        begin = end
        return parts

    def leaf(part):
        leaves.append(part.detach().requires_grad_())
        return leaves[-1]

    for fused in fused_layers:
        if fused.adapted:
            outputs = len(fused.weight)
            a = fused.matrix[outputs : outputs + fused.total_rank]
            value, grad_a = take(*a.shape)
            to.append(a)
            of.append(value)
            fused.a = leaf(a)
            blocks = [take(*shape) for shape in fused.block_shapes()]
            fused.blocks = [leaf(block) for block, _ in blocks]
            if gradient is not None:
                fused.gradients = Gradients(grad_a, [grad for _, grad in blocks])
    for fused in fused_layers:
        if fused.magnitudes():
            fused.magnitude = leaf(take(len(fused.weight))[0])
    torch._foreach_copy_(to, of)
    return leaves, (to, of)


def trained_weights(fused_layers):
    """PEFT's parameters in the order of the flat vector: A and B of each fused layer, then all magnitudes."""
    factors = [weight for fused in fused_layers for weight in fused.factors()]
    return factors + [magnitude for fused in fused_layers for magnitude in fused.magnitudes()]


@contextlib.contextmanager
def without_lora(model):
    """Context in which `model` computes without its adapter."""
    fused_layers = model.fused_layers if adapters.lora_layers(model) else []
    for fused in fused_layers:
        fused.without_lora = True
    try:
        yield
    finally:
        for fused in fused_layers:
            fused.without_lora = False
