"""The norms of DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353), which AdaptedLinear scales with.

The weight is m (W + scale B A) / ‖W + scale B A‖, the norms being those of the rows, and by section 4.3
of the paper they are constants to the gradient. PEFT builds the whole product B A to take them, in each
layer at each call. Here they come from thin products alone,

    ‖W + s B A‖² = ‖W‖² + s rowsum((2 W Aᵀ + s B A Aᵀ) ∘ B),

for all layers of one shape at once and once a pass.
"""

import torch

from lib.kernels.lora import spans


class DoraFactors:
    """magnitude / norm of every DoRA layer of `products`, at a fixed place, where these read it.

    The matrices of products of one shape become views of one tensor, so they are bound afterwards.
    """

    def __init__(self, products):
        self.products = products = [product for product in products if product.adapted]
        sizes = [len(product.weight) for product in products]
        device = products[0].weight.device
        self.factors, self.inverses = torch.zeros(2, sum(sizes), device=device)
        alike, self.groups = {}, []
        views = zip(self.factors.split(sizes), self.inverses.split(sizes), strict=True)
        for product, (product.factor, product.inverse) in zip(products, views, strict=True):
            alike.setdefault((product.matrix.shape, *product.block_shapes()), []).append(product)
        for group in alike.values():
            matrices = torch.stack([product.matrix for product in group])
            for product, matrix in zip(group, matrices, strict=True):
                product.move(matrix)
            weights = matrices[:, : len(group[0].weight)]
            squares = torch.linalg.vector_norm(weights, dim=-1, dtype=torch.float32).square()
            self.groups.append((group, weights, squares))

    @torch.no_grad()
    def refresh(self, magnitudes):
        """Follow the layers' A and B, and `magnitudes`, float32 [all outputs], in the order of the products."""
        inverses = {}
        for group, weights, squares in self.groups:
            of_group = self.squared_norms(group, weights, squares).rsqrt()
            inverses |= zip(group, of_group, strict=True)
        torch.cat([inverses[product] for product in self.products], out=self.inverses)
        torch.mul(magnitudes, self.inverses, out=self.factors)

    @staticmethod
    def squared_norms(group, weights, squares):
        """‖W + s B A‖² of each output of products of one shape, [products, outputs]."""
        scale, parts = group[0].scale, []
        for number, (outputs, rows) in enumerate(spans(group[0].blocks)):
            # [layers, products, out, rank]
            b = torch.stack([product.blocks[number] for product in group], dim=1)
            a = torch.stack([product.a[rows].unflatten(0, (len(b), -1)) for product in group], dim=1)
            w = weights[:, outputs].unflatten(1, (len(b), -1)).transpose(0, 1)
            if 1 in b.shape[:2]:  # then all of w is a view as one batch too
                w, a, b = (x.flatten(0, 1)[None] for x in (w, a, b))
            inner = [
                torch.baddbmm(w_ @ a_.mT, b_, a_ @ a_.mT, beta=2, alpha=scale).float() * b_
                for w_, a_, b_ in zip(w, a, b, strict=True)
            ]
            sums = torch.stack(inner).sum(dim=-1).view(-1, len(group), b.shape[2])
            parts.append(sums.transpose(0, 1).flatten(1))
        return squares + scale * torch.cat(parts, dim=-1)
