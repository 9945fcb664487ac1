"""What guidance would compute twice with the same result, computed once.

With classifier-free guidance (Ho & Salimans 2022) a UNet predicts the same latents with the prompt and without, side by
side in one batch. Until the first attention to the text both halves are equal: the first residual block and, at the
largest map, the first attention to itself, of which a UNet has five.
"""

import contextlib
import functools

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from lib.kernels.blocks import block_forward, is_plain_transformer
from lib.kernels.layer_norm_geglu import sum_and_norm


@contextlib.contextmanager
def shared_start(unet):
    """Inside, `unet` takes samples whose second half equals the first. One that begins in another way than Stable
    Diffusion's computes both."""
    block = unet.down_blocks[0]
    residual, transformer = block.resnets[0], next(iter(getattr(block, "attentions", ())), None)
    plain = (
        isinstance(residual, ResnetBlock2D)
        and isinstance(transformer, Transformer2DModel)
        and transformer.is_input_continuous
        and all(map(is_plain_transformer, transformer.transformer_blocks))
    )
    if not plain:
        yield
        return
    of_half = functools.partial(_first_half, residual, residual.forward)
    to_both = functools.partial(_transformer_forward, transformer)
    with _with_forward(residual, of_half), _with_forward(transformer, to_both):
        yield


@contextlib.contextmanager
def _with_forward(module, forward):
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _first_half(residual, forward, x, timestep):
    half = len(x) // 2
    is_projected = isinstance(timestep, dict)  # see TimestepProjections
    timestep = {id(residual): timestep[id(residual)][:half]} if is_projected else timestep[:half]
    return forward(x[:half], timestep)


def _transformer_forward(transformer, x, encoder_hidden_states=None, **others):
    """A transformer's, of x [n, c, h, w] and the texts of 2n: [2n, c, h, w]."""
    rows, width = transformer._operate_on_continuous_inputs(x)
    first, *rest = transformer.transformer_blocks
    fused = "forward" in vars(first)  # by blocks.use_row_kernels
    rows = block_forward(
        first,
        rows,
        encoder_hidden_states=encoder_hidden_states,
        sum_and_norm=sum_and_norm if fused else _sum_and_norm,
        copies=2,
    )
    for block in rest:
        rows = block(rows, encoder_hidden_states=encoder_hidden_states)
    both = torch.cat([x, x])
    return (transformer._get_output_for_continuous_inputs(rows, both, len(both), *x.shape[2:], width),)


def _sum_and_norm(norm, x, y=None):
    total = x if y is None else x + y
    return total, norm(total)
