"""The LoRA parameters of one model as one flat vector.

The optimizer, the loss scaler and the all-reduce of several GPUs then see one tensor in place of some
hundred small ones: one kernel each, where launching them would take longer than they compute.
"""

from dataclasses import dataclass

import torch

from lib import adapters
from lib.kernels.fused_projections import fuse_projections
from lib.kernels.lora import DoraFactors, bind, fuse_lora, trained_weights


@dataclass
class LoraParameters:
    """What is trained of one model."""

    model: torch.nn.Module
    learning_rate: float  # at its peak
    parameters: list  # the model's own, views of `working`; see lora.trained_weights
    leaves: list  # the same values, some joined: what it computes with and is differentiated by
    copies: tuple  # (to, from): those of the leaves that lie elsewhere, and where in `working` their values are
    flat: torch.nn.Parameter  # float32, what the optimizer updates; MicroStep gives it a gradient
    working: torch.Tensor  # `flat` in the type that the model computes with
    gradient: torch.Tensor  # of `working`: where a backward pass writes it
    projected: list  # (rows of A in `flat`, a slice, their projection, where the model computes with the product)
    dora: DoraFactors | None  # what DoRA's layers scale with; LoRA has none

    def refresh(self):
        """Give the model the values that `flat` has now: before anything is computed, as A is a copy even where
        `working` and `flat` share memory."""
        if self.projected:
            self.working.copy_(self.flat.data)
            for rows, projection, to in self.projected:
                to.copy_(_rows_of_a(self.flat.data, rows, projection) @ projection)
        else:
            self.compute_with(self.flat.data)
        # From the vector itself: half precision would swallow a magnitude's small steps.
        if self.dora:
            self.dora.refresh(self.flat.data[-self.dora.factors.numel() :])

    def expect_gradients(self):
        """A backward pass begins; one before it may have failed midway."""
        for fused in self.model.fused_layers:
            if fused.gradients:
                fused.gradients.written = 0

    def add_gradients(self, found, replace):
        """Add the gradient that a backward pass has written to that of `flat`, or `replace` that by it. `found` are those
        of the leaves, None but for DoRA's magnitudes."""
        times = {fused.gradients.written for fused in self.model.fused_layers if fused.gradients}
        if times != {1}:
            raise RuntimeError(f"each layer has one gradient in a pass, not {sorted(times)}")
        magnitudes = [gradient for gradient in found if gradient is not None]
        if magnitudes:
            torch.cat(magnitudes, out=self.gradient[-sum(map(len, magnitudes)) :])
        found = self.with_projections(self.gradient)  # the chain rule of A P: P is symmetric
        if replace:
            self.flat.grad.copy_(found)
        else:
            self.flat.grad += found

    def saved(self):
        """The float32 values as a file holds them, one vector in the order of `flat`: A times its projection, where
        it has one, so that a reader needs to know nothing of that."""
        return self.with_projections(self.flat.data)

    def with_projections(self, vector):
        """A flat `vector` with its rows of A times their projections, in float32; the vector itself without any."""
        if not self.projected:
            return vector
        found = vector.to(torch.float32, copy=True)
        for rows, projection, _ in self.projected:
            part = _rows_of_a(found, rows, projection)
            part.copy_(part @ projection)
        return found

    def compute_with(self, values):
        """Let the model compute with `values`, as `saved` gives them, until the next `refresh`. Where `working` and
        `flat` share memory, as on a CPU, they replace those of `flat`."""
        self.working.copy_(values)
        if self.copies[0]:
            torch._foreach_copy_(*self.copies)


def _rows_of_a(vector, rows, projection):
    """The part `rows` of a flat vector as the matrix that `projection` [in, in] is multiplied to: [rows, in]."""
    return vector[rows].view(-1, len(projection))


def add_lora_parameters(model, rank, alpha, targets, learning_rate, device, dtype, dora=False, projections=None):
    """Freeze `model`, add LoRA or DoRA layers to it and move it to `device`: a LoraParameters.

    `dtype` is what the model computes with. Every trainable parameter of it is in the vector.
    `projections`, {layer name: float32 [in, in]} of every adapted layer or None, are what A is multiplied by before
    it computes; the layers that are computed together have the same.
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
    found = LoraParameters(
        model, learning_rate, parameters, leaves, copies, flat, working, gradient, projected, factors
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trainable != found.flat.numel():
        raise RuntimeError(f"{trainable} trainable parameters, {found.flat.numel()} in the vector")
    return found


def projected_rows(fused_layers, projection_of):
    """[(slice of the flat vector, projection, A in the layer's matrix)] of the adapted fused layers; see `bind` for the
    vector's order. `projection_of` is a function of a fused layer."""
    found, place = [], 0
    for fused in filter(lambda fused: fused.adapted, fused_layers):
        rows = slice(place, place + fused.a.numel())
        found.append((rows, projection_of(fused), fused.a.data))
        place += sum(weight.numel() for weight in fused.factors())
    return found


def flatten_parameters(parameters, dtype):
    """(flat, working): the values of `parameters` as one flat float32 parameter, and as one flat tensor of
    `dtype`, of which they become views.

    `flat` has to be copied into `working` whenever it has changed. For float32 the two share memory.

    A departure from a parameter a matrix: bitsandbytes keeps the optimizer's state of tensors of fewer
    than 4,096 elements in 32 bits, and in the vector they get 8 (bench/optimizer_state.py).
    """
    flat = torch.nn.Parameter(torch.cat([p.detach().float().flatten() for p in parameters]))
    working = flat.data.to(dtype)
    set_views(parameters, working)
    return flat, working


def set_views(parameters, flat):
    """Make `parameters` views of the tensor `flat`, one behind the other."""
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, flat.split(sizes), strict=True):
        parameter.data = part.view(parameter.shape)
