"""The LoRA parameters of one model as one flat vector.

The optimizer, the loss scaler and the all-reduce of several GPUs then work on one tensor with one kernel each, instead
of hundreds of small ones, whose launches would take longer than their work.
"""

from dataclasses import dataclass

import torch

from lib import adapters
from lib.kernels.fused_projections import fuse_projections
from lib.kernels.lora import DoraFactors, bind, fuse_lora, trained_weights


@dataclass
class LoraParameters:
    """The trained parameters of one model."""

    model: torch.nn.Module
    learning_rate: float  # at its peak
    parameters: list  # the model's own, views of `working` (see lora.trained_weights)
    leaves: list  # the same values, partly fused: the model computes with them and is differentiated by them
    copies: tuple  # (to, from): leaves outside `working`, and their values in it
    flat: torch.nn.Parameter  # float32 [n], what the optimizer updates; MicroStep sets its gradient
    working: torch.Tensor  # `flat` in the model's dtype
    gradient: torch.Tensor  # of `working`; the backward pass writes it
    projected: list  # (slice of `flat` with the rows of an A, their projection, where the model reads the product)
    dora: DoraFactors | None  # the scales of DoRA's layers; None for LoRA

    def refresh(self):
        """Copy the current values of `flat` to the model, before every computation: A is a copy even where `working` and
        `flat` share memory."""
        if self.projected:
            self.working.copy_(self.flat.data)
            for rows, projection, to in self.projected:
                to.copy_(_rows_of_a(self.flat.data, rows, projection) @ projection)
        else:
            self.compute_with(self.flat.data)
        # From `flat` itself: half precision would round away small updates of a magnitude.
        if self.dora:
            self.dora.refresh(self.flat.data[-self.dora.factors.numel() :])

    def expect_gradients(self):
        """Called before a backward pass; an earlier one may have failed midway."""
        for fused in self.model.fused_layers:
            if fused.gradients:
                fused.gradients.written = 0

    def add_gradients(self, of_leaves, overwrite):
        """Add the gradient that the backward pass wrote to that of `flat`, or `overwrite` it.

        `of_leaves` are autograd's, None except for DoRA's magnitudes.
        """
        times = {fused.gradients.written for fused in self.model.fused_layers if fused.gradients}
        if times != {1}:
            raise RuntimeError(f"each layer has one gradient per pass, not {sorted(times)}")
        magnitudes = [gradient for gradient in of_leaves if gradient is not None]
        if magnitudes:
            torch.cat(magnitudes, out=self.gradient[-sum(map(len, magnitudes)) :])
        gradient = self.with_projections(self.gradient)  # the chain rule of A P: P is symmetric
        if overwrite:
            self.flat.grad.copy_(gradient)
        else:
            self.flat.grad += gradient

    def saved(self):
        """The float32 values to save, in the order of `flat`. A is multiplied by its projection, so that readers need
        not know it."""
        return self.with_projections(self.flat.data)

    def with_projections(self, vector):
        """A flat `vector` with each A multiplied by its projection, in float32. Without any, the vector itself."""
        if not self.projected:
            return vector
        product = vector.to(torch.float32, copy=True)
        for rows, projection, _ in self.projected:
            part = _rows_of_a(product, rows, projection)
            part.copy_(part @ projection)
        return product

    def compute_with(self, values):
        """Load `values`, as from `saved`, into the model until the next `refresh`. If `working` and `flat` share
        memory, as on a CPU, `flat` changes too."""
        self.working.copy_(values)
        if self.copies[0]:
            torch._foreach_copy_(*self.copies)


def _rows_of_a(vector, rows, projection):
    """The slice `rows` of a flat vector as a matrix to multiply by `projection` [in, in]: [rows, in]."""
    return vector[rows].view(-1, len(projection))


def add_lora_parameters(model, rank, alpha, targets, learning_rate, device, dtype, dora=False, projections=None):
    """Freeze `model`, add LoRA or DoRA layers and move it to `device`, computing in `dtype`: its LoraParameters.

    `projections`, {adapted layer: float32 [in, in]} or None, multiply each A; fused layers share theirs.
    """
    model.requires_grad_(False)
    names = {layer: name for name, layer in adapters.add_lora(model, rank, alpha, targets, dora).items()}
    fused_layers = fuse_lora(model, fuse_projections(model, device, dora), device)
    # Not .train(): SD1.5 has no dropout, and diffusers' blocks would copy to another layout.
    model.to(device).eval()
    parameters = trained_weights(fused_layers)
    flat, working = flatten_parameters(parameters, dtype)
    factors = DoraFactors(fused_layers) if dora else None
    gradient = torch.zeros_like(working)
    leaves, copies = bind(fused_layers, working, gradient)
    projected = []
    if projections:
        projected = projected_rows(fused_layers, lambda fused: projections[names[fused.adapted[0]]])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trainable != flat.numel():
        raise RuntimeError(f"{trainable} trainable parameters, but {flat.numel()} in the vector")
    return LoraParameters(model, learning_rate, parameters, leaves, copies, flat, working, gradient, projected, factors)


def projected_rows(fused_layers, projection_of):
    """[(slice of the flat vector, projection, A in the layer's matrix)] of the adapted fused layers.

    `projection_of` is a function of a fused layer; see `bind` for the order of the vector.
    """
    projected, place = [], 0
    for fused in filter(lambda fused: fused.adapted, fused_layers):
        rows = slice(place, place + fused.a.numel())
        projected.append((rows, projection_of(fused), fused.a.data))
        place += sum(weight.numel() for weight in fused.factors())
    return projected


def flatten_parameters(parameters, dtype):
    """(flat, working): `parameters` as one vector, in float32 and in `dtype`. `parameters` become views of `working`.

    Whenever `flat` changes, copy it into `working`; in float32 the two share memory. One vector changes the numerics:
    bitsandbytes stores the state of tensors with fewer than 4,096 elements in 32 bits, but that of this vector in 8
    (bench/optimizer_state.py).
    """
    flat = torch.nn.Parameter(torch.cat([p.detach().float().flatten() for p in parameters]))
    working = flat.data.to(dtype)
    set_views(parameters, working)
    return flat, working


def set_views(parameters, flat):
    """Make `parameters` consecutive views of the tensor `flat`."""
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, flat.split(sizes), strict=True):
        parameter.data = part.view(parameter.shape)
