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

    The frozen weights of products of one shape become views of one tensor.
    """

    def __init__(self, products):
        self.products = products = [product for product in products if product.adapted]
        sizes = [len(product.weight) for product in products]
        device = products[0].weight.device
        self.factors, self.inverses = torch.zeros(2, sum(sizes), device=device)
        alike, self.groups = {}, []
        views = zip(self.factors.split(sizes), self.inverses.split(sizes), strict=True)
        for product, (product.factor, product.inverse) in zip(products, views, strict=True):
            sides = tuple(block.shape for block in product.blocks)
            alike.setdefault((product.weight.shape, sides), []).append(product)
        for group in alike.values():
            weights = torch.stack([product.weight for product in group])
            for product, weight in zip(group, weights, strict=True):
                product.move(weight)
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
            b = torch.cat([product.blocks[number] for product in group])
            a = torch.cat([product.a[rows] for product in group]).unflatten(0, (len(b), -1))
            w = weights[:, outputs].flatten(0, 1).unflatten(0, (len(b), -1))
            inner = torch.baddbmm(w @ a.mT, b, a @ a.mT, beta=2, alpha=scale)
            parts.append((inner.float() * b).sum(dim=-1).view(len(group), -1))
        return squares + scale * torch.cat(parts, dim=-1)
