"""A UNet or VAE in channels-last layout, the tensor cores' own, with the kernels of norms.py and large_maps.py;
its transformers, and a text encoder's, with those of rows.py."""

import functools
import itertools

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from lib.kernels.compiling import failure, in_threads, triton
from lib.kernels.joined import TimestepProjections, is_plain_block
from lib.kernels.large_maps import norm_of_large_maps
from lib.kernels.norms import WHOLE, Geglu, GroupNormSilu, group_norm, run_geglu
from lib.kernels.rows import QuickGelu, SumNorm, row_jobs, use_row_kernels


def channels_last(*models, training=False):
    """Put UNets and VAEs on a GPU into channels-last layout, with the kernels of norms.py and rows.py, and
    give text encoders those of rows.py; any other device is left as it is. Their own weights must be
    frozen; `training` says whether gradients will pass through them.

    Where Triton cannot be had (it needs a C compiler, and a GPU that it knows) that is said, and
    PyTorch's kernels remain.
    """
    if next(models[0].parameters()).device.type != "cuda":
        return
    reason = compile_kernels(models, training)
    if reason:
        print(f"note: no Triton kernels, so this is slower than it could be: {reason}")
        return
    for model in models:
        rebuild(model)


def compile_kernels(models, training):
    """Compile what `models` will need, all at once; returns why that failed or gave wrong results, or
    None.

    At their first use, one after the other, the kernels would take longer than all else before the
    first step. Triton keeps them on disk for the next run.
    """
    place = next(models[0].parameters())
    modules = [module for model in models for module in model.modules()]
    norms = [module for module in modules if isinstance(module, torch.nn.GroupNorm)]
    of_each_size = {norm.num_channels // norm.num_groups: norm for norm in norms}.values()

    def launch(norm, backward, large):
        # Of pixels so many that one program takes a group, or that it does not; a multiple of 16 as in
        # Stable Diffusion, which Triton compiles other code for.
        height = WHOLE * norm.num_groups // norm.num_channels // 16 + 1 if large else 1
        x = place.new_zeros(1, norm.num_channels, height, 16).to(memory_format=torch.channels_last)
        statistics = x.new_zeros(norm.num_groups, 2, dtype=torch.float32)
        grad = x if backward else None
        group_norm(x, None, grad, None, statistics, norm.weight, norm.bias, norm.num_groups, norm.eps, True)  # fmt: skip

    def launch_large(norm):
        x = place.new_zeros(1, norm.num_channels, 4, 4).to(memory_format=torch.channels_last)
        statistics = x.new_empty(norm.num_groups, 2, dtype=torch.float32)
        norm_of_large_maps(x, None, statistics, norm.weight, norm.bias, norm.num_groups, norm.eps, True)  # fmt: skip

    def launch_geglu(backward):
        x = place.new_zeros(16, 32)
        run_geglu(x, x[:, :16].contiguous() if backward else None)

    passes = (False, True) if training else (False,)
    each = itertools.product(of_each_size, passes, (False, True))
    jobs = [functools.partial(launch, *how) for how in each]
    jobs += [functools.partial(launch_large, norm) for norm in of_each_size]
    if any(isinstance(module, GEGLU) for module in modules):
        jobs += [functools.partial(launch_geglu, backward) for backward in passes]
    of_rows = {}
    for model in models:
        of_rows |= row_jobs(model, training)
    jobs += of_rows.values()

    begun = failure(lambda: in_threads(jobs, place.device))
    reason = missing_kernels(place.device)  # meanwhile
    problem = begun if isinstance(begun, str) else failure(begun)
    return reason or problem


@functools.cache
def missing_kernels(device):
    """Why the Triton kernels cannot be used on `device`, or None: they are tried on small input."""
    if triton is None:
        return "this torch came without Triton"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32, 5, 5, generator=generator).to(device)
    weight, bias = torch.randn(2, 32, generator=generator).to(device)

    def compare():
        close = functools.partial(torch.allclose, rtol=1e-3, atol=1e-4)
        norm = F.silu(F.group_norm(x, 8, weight, bias))
        rows, shift = x.permute(0, 2, 3, 1), x[..., 0, 0].contiguous()
        total, normed = SumNorm.apply(rows, rows, weight, bias, 1e-5)
        less = (x - shift[..., None, None]).contiguous(memory_format=torch.channels_last)
        how = weight, bias, 8, 1e-5, True
        large = norm_of_large_maps(less, shift, x.new_empty(2 * 8, 2), *how)
        right = (
            close(GroupNormSilu.apply(x, None, *how)[1], norm)
            and close(GroupNormSilu.apply(less, shift, *how)[1], norm)
            and close(large, norm)
            and close(Geglu.apply(x[..., :4]), x[..., :2] * F.gelu(x[..., 2:4]))
            and close(total, 2 * rows)
            and close(normed, F.layer_norm(2 * rows, (32,), weight, bias))
            and close(QuickGelu.apply(x), x * torch.sigmoid(1.702 * x))
        )
        return None if right else "their results are wrong here"

    return failure(compare)


def rebuild(model):
    """Do what `channels_last` says, whatever the device."""
    model.to(memory_format=torch.channels_last)
    use_row_kernels(model)
    silent = set()  # norms that are followed by a SiLU, which they now do themselves
    projected = getattr(model, "time_embed_act", None)
    projected = projected.blocks if isinstance(projected, TimestepProjections) else ()
    for module in model.modules():
        if is_plain_block(module):
            silent |= {module.norm1, module.norm2}
            module.nonlinearity = torch.nn.Identity()
            _join_biases(module)
            if _is_pointwise(module.conv_shortcut):
                module.conv_shortcut.forward = functools.partial(_pointwise, module.conv_shortcut)
            if id(module) in projected:
                module.forward = functools.partial(_block_forward, module)
        elif isinstance(module, Transformer2DModel) and module.is_input_continuous:
            _project_rows(module)
        elif isinstance(getattr(module, "conv_act", None), torch.nn.SiLU):
            silent.add(module.conv_norm_out)
            module.conv_act = torch.nn.Identity()
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = functools.partial(_norm_forward, module, module in silent)
        elif isinstance(module, GEGLU):
            module.forward = functools.partial(_geglu_forward, module)


@torch.no_grad()
def _join_biases(block):
    """Add two biases of a residual block that meet anyway beforehand: each is a pass over the
    whole tensor. Its SiLU has moved into the norms; for the timestep it is put here."""
    projection, shortcut = block.time_emb_proj, block.conv_shortcut
    if projection is not None:
        inner = getattr(projection, "base_layer", projection)  # LoRA may be around it
        inner.bias += block.conv1.bias  # hidden = conv1(…) + time_emb_proj(…)
        block.conv1.bias = None
        projection.register_forward_pre_hook(lambda _, inputs: (F.silu(inputs[0]),))
    if shortcut is not None and shortcut.bias is not None:
        shortcut.bias += block.conv2.bias  # out = conv_shortcut(…) + conv2(…)
        block.conv2.bias = None


@torch.no_grad()
def _project_rows(transformer):
    """Make the 1x1 convolutions around a transformer the linear layers that they are, and leave out
    the copies to another layout before and after."""
    for name in ("proj_in", "proj_out"):
        convolution = getattr(transformer, name)
        if isinstance(convolution, torch.nn.Conv2d):
            sizes = convolution.in_channels, convolution.out_channels
            linear = torch.nn.Linear(*sizes, device="meta")
            linear.weight = torch.nn.Parameter(convolution.weight.flatten(1), requires_grad=False)
            linear.bias = convolution.bias
            setattr(transformer, name, linear)
    transformer.use_linear_projection = True
    transformer._get_output_for_continuous_inputs = functools.partial(_output_of_rows, transformer)


def _output_of_rows(transformer, hidden_states, residual, batch_size, height, width, inner_dim):
    rows = transformer.proj_out(hidden_states)
    return rows.view(batch_size, height, width, inner_dim).permute(0, 3, 1, 2) + residual


def _norm_forward(norm, silu, x):
    pixels = x if x.ndim == 4 else x[..., None]  # the VAE's attention has them in a row
    out = _normed(norm, pixels, silu)[1]
    # A view of a batch of one, even of the same shape, may have other strides, which a convolution's backward
    # pass takes for another layout: it would copy its gradient there and back.
    return out if x.ndim == 4 else out[..., 0]


def _normed(norm, x, silu, shift=None):
    """See GroupNormSilu."""
    return GroupNormSilu.apply(x, shift, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)


def _block_forward(block, x, timestep):
    """A residual block's, with the timestep's shift added where its second norm reads it: a pass over the whole
    tensor less."""
    x, hidden = _normed(block.norm1, x, True)
    hidden, shift = block.conv1(hidden), timestep[id(block)]
    if shift.requires_grad:  # of an adapter on its projection
        hidden, shift = hidden + shift[:, :, None, None], None
    hidden = block.conv2(block.dropout(_normed(block.norm2, hidden, True, shift)[1]))
    return hidden + (x if block.conv_shortcut is None else block.conv_shortcut(x))


def _is_pointwise(layer):
    return (
        isinstance(layer, torch.nn.Conv2d)
        and layer.kernel_size == layer.stride == (1, 1)
        and layer.padding == (0, 0)
    )


def _pointwise(convolution, x):
    """A convolution of single pixels as the matrix product that it is, whose kernels add the bias too."""
    rows = x.permute(0, 2, 3, 1)
    return F.linear(rows, convolution.weight.flatten(1), convolution.bias).permute(0, 3, 1, 2)


def _geglu_forward(geglu, x):
    return Geglu.apply(geglu.proj(x))
