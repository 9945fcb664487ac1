"""LoRA and DoRA layers as a few matrix products, and layers that read the same input as one product.

PEFT's layer launches some 14 kernels forward, and at batch 1 each takes a few microseconds whatever it
does. Here a layer is two products forward and five backward, and so are all the layers of a FusedLinear
together: their weights and then their A lie one behind the other, as one matrix.
"""

import contextlib
import itertools
import math

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from lib import adapters


class AdaptedLinear(torch.autograd.Function):
    """factor (x W^T + scale (x A^T) B^T) + bias, with W and its bias frozen; a factor of None is 1.

    Of n layers side by side: x [..., in] and `matrix`, which is W [outputs of all, in] and below it A [n rank, in],
    so that one product gives both x W^T and x A^T; what lies below that is zero, and so is what lies behind the
    [outputs] of bias, which may be None. `a` is that part of the matrix again, to be given its gradient. B is block
    diagonal; `blocks` are tensors [layers, out, rank] of neighbours that have as many outputs, together those of the
    first n. Layers behind them have no B and are W alone. All are of one type.
    With DoRA, where each layer has a B, factor and inverse, float32 [outputs], are magnitude / norm and
    1 / norm; the magnitude itself [outputs] is only there to be given its gradient.
    `into` is None or a Gradients: the backward pass then writes those of A and of the blocks there, and returns none.

    The low-rank product is added to the large one where that is written (one rounding less than adding
    two results), and the backward pass likewise adds to the gradient of x.
    """

    @staticmethod
    def forward(ctx, x, matrix, outputs, bias, scale, factor, inverse, magnitude, into, a, *blocks):
        rows = x.reshape(-1, x.shape[-1])
        both = F.linear(rows, matrix, bias if factor is None else None)
        # Views: while `low` is kept for the backward pass, so are the outputs.
        out, low = both[:, :outputs], both[:, outputs : outputs + len(a)]
        for to, of, b in _parts(out, low, blocks):
            if len(b) == 1:
                to[0].addmm_(of[0], b[0].T, alpha=scale)
            else:
                to.baddbmm_(of, b.mT, alpha=scale)
        direction = None
        if factor is not None:
            direction = out
            out = torch.mul(direction, factor, out=torch.empty_like(direction))
            if bias is not None:
                out += bias[:outputs]
        ctx.save_for_backward(rows, matrix, low, direction, factor, inverse, *blocks)
        ctx.outputs, ctx.scale, ctx.into = outputs, scale, into
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        rows, matrix, low, direction, factor, inverse, *blocks = ctx.saved_tensors
        weight, a = matrix[: ctx.outputs], matrix[ctx.outputs : ctx.outputs + low.shape[1]]
        shape, grad = grad.shape, grad.reshape(-1, grad.shape[-1])
        grad_magnitude = None
        if factor is not None:
            # In float32: a half-precision product of the two could overflow.
            grad_magnitude = ((grad.float() * direction).sum(dim=0) * inverse).to(direction.dtype)
            grad = torch.mul(grad, factor, out=torch.empty_like(grad))
        grad_low = grad.new_empty(low.shape)
        for of, to, b in _parts(grad, grad_low, blocks):
            if len(b) == 1:
                torch.mm(of[0], b[0], out=to[0])
            else:
                torch.bmm(of, b, out=to)
        # Fresh tensors, or those of `into`, written here: gathering hundreds of small ones takes longer.
        into = ctx.into or Gradients(torch.empty_like(a), [torch.empty_like(b) for b in blocks])
        into.written += 1
        for (of, with_low, b), to in zip(_parts(grad, low, blocks), into.blocks, strict=True):
            if len(b) == 1:
                torch.mm(of[0].T, with_low[0], out=to[0])
            else:
                torch.bmm(of.mT, with_low, out=to)
        if ctx.scale != 1:
            grad_low *= ctx.scale
            for to in into.blocks:
                to *= ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a).view(*shape[:-1], -1)
        torch.mm(grad_low.T, rows, out=into.a)
        given = [None] * (1 + len(blocks)) if ctx.into else [into.a, *into.blocks]
        return grad_x, *[None] * 6, grad_magnitude, None, *given


class Gradients:
    """Where the gradients of a product's A and of its blocks of B go, and how often they were `written`."""

    def __init__(self, a, blocks):
        self.a, self.blocks, self.written = a, blocks, 0


def spans(blocks):
    """For each of `blocks` of B, [layers, out, rank], where its layers' outputs and where their rows of A lie: slices."""
    column = row = 0
    for layers, out, rank in (b.shape for b in blocks):
        yield slice(column, column + layers * out), slice(row, row + layers * rank)
        column, row = column + layers * out, row + layers * rank


def _parts(outputs, low, blocks):
    """For each of `blocks` its columns of `outputs` [rows, …] and of `low` [rows, …], both as
    [layers, rows, columns of one], and itself."""
    for b, (wide, thin) in zip(blocks, spans(blocks), strict=True):
        both = (x.unflatten(1, (len(b), -1)) for x in (outputs[:, wide], low[:, thin]))
        yield *(x.transpose(0, 1) for x in both), b


class FusedLinear:
    """Linear layers that read the same input, computed as one: called with x [..., in] it returns their
    outputs, in the layers' order.

    `layers` are linear layers or PEFT's LoRA or DoRA layers around them, or both, of one rank and scale, all
    with a bias or all without.
    Their weights become views of one tensor on `device`. Those with LoRA compute with `a` and `blocks`, see
    AdaptedLinear, which `bound` sets, and DoRA with what DoraFactors sets before.
    """

    def __init__(self, layers, device):
        def rank_in_row(layer):
            return not isinstance(layer, LoraLayer), _base(layer).out_features

        self.layers = sorted(layers, key=rank_in_row)
        self.places = [self.layers.index(layer) for layer in layers]
        self.bases = [_base(layer) for layer in self.layers]
        self.adapted = [layer for layer in self.layers if isinstance(layer, LoraLayer)]
        self.scale = self.adapted[0].scaling["default"] if self.adapted else None
        self.without_lora = False
        self.a, self.blocks, self.magnitude, self.factor, self.inverse = None, (), None, None, None
        self.gradients = None
        self.sizes = [base.out_features for base in self.bases]
        weights = [base.weight.data for base in self.bases]
        self.ranks = sum(layer.lora_A["default"].out_features for layer in self.adapted)
        # Room for A, filled up so that rows of outputs begin where kernels can read 16 values at once.
        room = math.ceil(self.ranks / 16) * 16
        weights.append(weights[0].new_zeros(room, weights[0].shape[1]))
        self.move(torch.cat(weights).to(device))
        self.bias = None
        if self.bases[0].bias is not None:  # then none of them lacks one
            biases = [base.bias.data for base in self.bases]
            self.bias = torch.cat([*biases, biases[0].new_zeros(room)]).to(device)
            for base, part in zip(self.bases, self.bias.split([*self.sizes, room]), strict=False):
                base.bias.data = part

    def move(self, matrix):
        """Compute with `matrix`, which holds what the present one does, and make the weights views of it."""
        if self.a is not None:
            raise RuntimeError("a product is moved before it is bound, or its A would stay behind")
        self.matrix, self.weight = matrix, matrix[: sum(self.sizes)]
        for base, part in zip(self.bases, self.weight.split(self.sizes), strict=True):
            base.weight.data = part

    def factors(self):
        """PEFT's parameters in the order in which they make A and the blocks of B: a list."""
        a = [layer.lora_A["default"].weight for layer in self.adapted]
        return a + [layer.lora_B["default"].weight for layer in self.adapted]

    def magnitudes(self):
        """DoRA's, in the layers' order: a list, empty for LoRA."""
        return [layer.lora_magnitude_vector["default"].weight for layer in self.adapted if layer.lora_magnitude_vector]

    def block_shapes(self):
        """Of the blocks of B, (layers, out, rank) each."""
        rank = self.adapted[0].lora_A["default"].weight.shape[0]
        sizes = itertools.groupby(_base(layer).out_features for layer in self.adapted)
        return [(len(list(equal)), out, rank) for out, equal in sizes]

    def joint(self, x):
        """The outputs of all, side by side [..., outputs], in the order of `self.layers`."""
        if self.without_lora or not self.adapted:
            bias = None if self.bias is None else self.bias[: len(self.weight)]
            return F.linear(x, self.weight, bias)
        return AdaptedLinear.apply(
            x,
            self.matrix,
            len(self.weight),
            self.bias,
            self.scale,
            self.factor,
            self.inverse,
            self.magnitude,
            self.gradients,
            self.a,
            *self.blocks,
        )

    def __call__(self, x):
        parts = self.joint(x).split(self.sizes, dim=-1)
        return [parts[place] for place in self.places]


def _base(layer):
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def fuse_lora(model, joined, device):
    """Compute every LoRA layer of `model` with AdaptedLinear from now on; returns its Products, which
    have to be bound to parameters (`bound`).

    `joined` are the Products of layers that are computed together; each other layer becomes one alone.
    """
    elsewhere = {layer for product in joined for layer in product.layers}
    products = list(joined)
    for layer in adapters.lora_layers(model).values():
        if layer not in elsewhere:
            products.append(FusedLinear([layer], device))
            layer.forward = products[-1].joint
    model.products = products
    return products


def bound(products, vector, gradient=None):
    """Let `products` compute with a flat `vector`, of what `trained_weights` gives one behind the other: (leaves,
    copies). The leaves of autograd's graph are in that order, views of the vector but for each product's A,
    which lies below its weights. Whenever the vector has changed, `copies`, (to, from), has to be brought up to date.

    With a flat `gradient` of the vector's size the backward pass writes those of A and B there, and gives the leaves
    none, but for DoRA's magnitudes, which come last.
    """
    leaves, to, of, place = [], [], [], 0

    def take(*shape):
        """The next part of both vectors."""
        nonlocal place
        end = place + math.prod(shape)
        parts = [x if x is None else x[place:end].view(shape).detach() for x in (vector, gradient)]
        place = end
        return parts

    def leaf(part):
        leaves.append(part.detach().requires_grad_())
        return leaves[-1]

    for product in products:
        if product.adapted:
            outputs = len(product.weight)
            a = product.matrix[outputs : outputs + product.ranks]
            value, grad_a = take(*a.shape)
            to.append(a)
            of.append(value)
            product.a = leaf(a)
            blocks = [take(*shape) for shape in product.block_shapes()]
            product.blocks = [leaf(block) for block, _ in blocks]
            if gradient is not None:
                product.gradients = Gradients(grad_a, [grad for _, grad in blocks])
    for product in products:
        if product.magnitudes():
            product.magnitude = leaf(take(len(product.weight))[0])
    torch._foreach_copy_(to, of)
    return leaves, (to, of)


def trained_weights(products):
    """PEFT's parameters in the order of the flat vector: A and B of each product, then all magnitudes."""
    factors = [weight for product in products for weight in product.factors()]
    return factors + [magnitude for product in products for magnitude in product.magnitudes()]


@contextlib.contextmanager
def without_lora(model):
    """Inside, `model` computes what its base model does: the base layers alone."""
    products = model.products if adapters.lora_layers(model) else []
    for product in products:
        product.without_lora = True
    try:
        yield
    finally:
        for product in products:
            product.without_lora = False
