"""UNets and VAEs in channels-last layout, which tensor cores use, with the kernels of group_norm.py and
conv_epilogues.py; their transformers, and a text encoder's, with those of transformer_blocks.py."""

import functools
import itertools

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from transformers import CLIPTextConfig, CLIPTextModel

from lib.kernels import compile_ahead
from lib.kernels.compiling import compile_attention, failure, in_threads, triton
from lib.kernels.conv_epilogues import (
    AddBias,
    ConcatChannels,
    UpsampleNearest2x,
    conv_add,
    conv_without_bias,
    run_add_bias,
)
from lib.kernels.fused_projections import TimestepProjections, is_plain_block
from lib.kernels.group_norm import COMPILED_PIXELS, GroupNormSilu, group_norm
from lib.kernels.layer_norm_geglu import AddLayerNorm, Geglu, QuickGelu
from lib.kernels.transformer_blocks import transformer_jobs, use_transformer_kernels


def channels_last(*models, training=False):
    """Put UNets and VAEs on a GPU into channels-last layout with Triton kernels, and give text encoders the kernels of
    transformers. Their own weights must be frozen; `training` says whether gradients will pass through them.

    Models on other devices are left unchanged. Without Triton, which needs a C compiler and a GPU that it supports, a
    note is printed and PyTorch's kernels remain.
    """
    if next(models[0].parameters()).device.type != "cuda":
        return
    reason = compile_kernels(models, training)
    if reason:
        print(f"note: no Triton kernels, so PyTorch's slower ones are used: {reason}")
        return
    for model in models:
        rebuild(model)


def compile_kernels(models, training):
    """Compile the kernels that `models` will need, in parallel; returns why that failed, why their results are wrong,
    or None. Triton caches them on disk for the next run."""
    like = next(models[0].parameters())
    compile_ahead.wait()
    reason = missing_kernels(like.device)
    return reason or failure(lambda: in_threads(kernel_jobs(models, training, like), like.device)())


def compile_models_ahead(folder, parts, dtype, device, sizes, batch_size=1, checks=()):
    """Begin to compile, in other processes and threads, what parts of the base model in `folder` will need, computing in
    `dtype`; see compile_ahead. `parts` says of each of "unet", "text_encoder" and "vae" whether it is trained. `sizes`
    are those of the images, (width, height), and `batch_size` the UNet's. No weights are read. `checks` are other
    modules' `missing_kernels`.
    """

    def model(part):
        """The part, without memory for its weights."""
        with torch.device("meta"):
            if part == "text_encoder":
                described = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / part))
            else:
                kind = UNet2DConditionModel if part == "unet" else AutoencoderKL
                described = kind.from_config(kind.load_config(folder / part))
        return torch.nn.Module.to(described, dtype)  # diffusers' own .to would warn

    def jobs():
        like = torch.zeros((), dtype=dtype, device=device)
        # The functions behind their caches: while kernels are only recorded, the answers are wrong.
        found = [functools.partial(check.__wrapped__, device) for check in (missing_kernels, *checks)]
        for part, trained in parts.items():
            described = model(part)
            for module in described.modules():
                if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                    module.to_empty(device=device)  # a kernel that is there already is launched, and reads them
            found += kernel_jobs([described], trained, like)
        return found

    def attention():
        unet, vae = model("unet"), AutoencoderKL.load_config(folder / "vae")
        pixels = 2 ** (len(vae["block_out_channels"]) - 1)  # per latent
        like = torch.empty(0, dtype=dtype, device="meta")
        for width, height in set(sizes):
            latents = like.new_empty(batch_size, unet.config.in_channels, height // pixels, width // pixels)
            unet(latents, 0, like.new_empty(batch_size, 77, unet.config.cross_attention_dim))

    # The check loads its kernels. Its answer is dropped: another thread may be loading a model meanwhile.
    compile_ahead.begin(device, lambda: missing_kernels.__wrapped__(device), jobs)
    # On later runs the driver has them in its cache, except for images of new sizes, whose kernels compile at first use.
    if not compile_ahead.compiled_before():
        compile_ahead.begin(device, lambda: compile_attention(attention, device, parts["unet"]))


def kernel_jobs(models, training, like):
    """Functions that launch each kernel that `models` will need for tensors like `like`, of its dtype and device. Of the
    models' weights only those of norms are read."""
    modules = [module for model in models for module in model.modules()]
    norms = [module for module in modules if isinstance(module, torch.nn.GroupNorm)]
    of_each_size = {norm.num_channels // norm.num_groups: norm for norm in norms}.values()

    def launch_add_bias(add):
        x = like.new_zeros(1, 64, 4, 4).to(memory_format=torch.channels_last)
        run_add_bias(x, x if add else None, x[0, :, 0, 0].contiguous())

    def launch(norm, backward, pixels):
        # A multiple of 16, as in Stable Diffusion: Triton compiles other code for other sizes.
        x = like.new_zeros(1, norm.num_channels, pixels // 16, 16)
        x = x.to(memory_format=torch.channels_last)
        statistics = x.new_zeros(norm.num_groups, 2, dtype=torch.float32)
        grad = x if backward else None
        group_norm(x, None, grad, None, statistics, norm.weight, norm.bias, norm.num_groups, norm.eps, True)

    passes = (False, True) if training else (False,)
    kinds = itertools.product(of_each_size, passes, COMPILED_PIXELS)
    jobs = [
        functools.partial(launch, norm, backward, pixels)
        for norm, backward, pixels in kinds
        if pixels <= 2**12 or norm.num_channels <= 512  # larger maps of UNets and decoders have no more channels
    ]
    jobs += [functools.partial(launch_add_bias, add) for add in (False, True)]
    of_transformers = {}
    for model in models:
        of_transformers |= transformer_jobs(model, training, like)
    return [*jobs, *of_transformers.values()]


@functools.cache
def missing_kernels(device):
    """Why the Triton kernels cannot be used on `device`, or None. They are compared with PyTorch on a small input."""
    if triton is None:
        return "this build of torch has no Triton"
    # With their type: a library that loads a model in half precision meanwhile makes that the default.
    fp32 = dict(generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    large = torch.randn(2, 32, 24, 24, **fp32).to(device)
    weight, bias = torch.randn(2, 32, **fp32).to(device)

    def compare():
        close = functools.partial(torch.allclose, rtol=1e-3, atol=1e-4)
        agree = True
        for x, groups in ((large[..., :5, :5], 8), (large, 1)):  # by one kernel, and by two
            norm, shift = F.silu(F.group_norm(x, groups, weight, bias)), x[..., 0, 0].contiguous()
            shifted = (x - shift[..., None, None]).contiguous(memory_format=torch.channels_last)
            for maps, added in ((x, None), (shifted, shift)):
                result = GroupNormSilu.apply(maps, added, weight, bias, groups, 1e-5, True)[1]
                agree = agree and close(result, norm)
        rows = x.permute(0, 2, 3, 1)
        total, normed = AddLayerNorm.apply(rows, rows, weight, bias, 1e-5)
        agree = (
            agree
            and close(Geglu.apply(x[..., :4]), x[..., :2] * F.gelu(x[..., 2:4]))
            and close(total, 2 * rows)
            and close(normed, F.layer_norm(2 * rows, (32,), weight, bias))
            and close(QuickGelu.apply(x), x * torch.sigmoid(1.702 * x))
            and close(AddBias.apply(x, shifted, bias), x + shifted + bias[:, None, None])
        )
        return None if agree else "their results are wrong on this device"

    return failure(compare)


def rebuild(model):
    """Change `model` as `channels_last` describes, on any device."""
    model.to(memory_format=torch.channels_last)
    use_transformer_kernels(model)
    with_silu = set()  # norms followed by a SiLU, which their kernel now includes
    projected = getattr(model, "time_embed_act", None)
    projected = projected.blocks if isinstance(projected, TimestepProjections) else ()
    for module in model.modules():
        if is_plain_block(module):
            with_silu |= {module.norm1, module.norm2}
            module.nonlinearity = torch.nn.Identity()
            _merge_biases(module)
            if _is_pointwise(module.conv_shortcut):
                module.conv_shortcut.forward = functools.partial(_pointwise_forward, module.conv_shortcut)
            if module.time_emb_proj is None or id(module) in projected:
                module.forward = functools.partial(_block_forward, module)
        elif isinstance(module, Transformer2DModel) and module.is_input_continuous:
            _use_linear_projections(module)
        elif isinstance(getattr(module, "conv_act", None), torch.nn.SiLU):
            with_silu.add(module.conv_norm_out)
            module.conv_act = torch.nn.Identity()
        elif isinstance(module, (Upsample2D, Downsample2D)) and type(module.conv) is torch.nn.Conv2d:
            module.conv.forward = functools.partial(conv_add, module.conv)
            if isinstance(module, Upsample2D) and module.interpolate and module.norm is None:
                module.forward = functools.partial(_upsample_forward, module, module.forward)
        elif type(module) in (UpBlock2D, CrossAttnUpBlock2D):
            module.forward = functools.partial(_up_forward, module, module.forward)
    if type(getattr(model, "conv_in", None)) is torch.nn.Conv2d:
        model.conv_in.forward = functools.partial(conv_add, model.conv_in)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = functools.partial(_norm_forward, module, module in with_silu)


@torch.no_grad()
def _merge_biases(block):
    """Merge the biases of a residual block that are added to the same sum: each saves a pass over the whole tensor. The
    block's SiLU is now in the norms' kernel. The timestep's moves into a hook."""
    projection, shortcut = block.time_emb_proj, block.conv_shortcut
    if projection is not None:
        inner = getattr(projection, "base_layer", projection)  # inside LoRA
        inner.bias += block.conv1.bias  # hidden = conv1(…) + time_emb_proj(…)
        block.conv1.bias = None
        projection.register_forward_pre_hook(lambda _, inputs: (F.silu(inputs[0]),))
    if shortcut is not None and shortcut.bias is not None:
        shortcut.bias += block.conv2.bias  # out = conv_shortcut(…) + conv2(…)
        block.conv2.bias = None


@torch.no_grad()
def _use_linear_projections(transformer):
    """Replace the 1x1 convolutions around a transformer with linear layers, without copies to another layout."""
    for name in ("proj_in", "proj_out"):
        convolution = getattr(transformer, name)
        if isinstance(convolution, torch.nn.Conv2d):
            sizes = convolution.in_channels, convolution.out_channels
            linear = torch.nn.Linear(*sizes, device="meta")
            linear.weight = torch.nn.Parameter(convolution.weight.flatten(1), requires_grad=False)
            linear.bias = convolution.bias
            setattr(transformer, name, linear)
    transformer.use_linear_projection = True
    transformer._get_output_for_continuous_inputs = functools.partial(_transformer_output, transformer)


def _transformer_output(transformer, hidden_states, residual, batch_size, height, width, inner_dim):
    rows = transformer.proj_out(hidden_states)
    return rows.view(batch_size, height, width, inner_dim).permute(0, 3, 1, 2) + residual


def _norm_forward(norm, silu, x):
    pixels = x if x.ndim == 4 else x[..., None]  # the VAE's attention passes [n, c, pixels]
    out = _normed(norm, pixels, silu)[1]
    # A view of a batch of one may have other strides, even with the same shape. A convolution's backward pass would
    # take them for another layout and copy its gradient there and back.
    return out if x.ndim == 4 else out[..., 0]


def _normed(norm, x, silu, shift=None):
    """See GroupNormSilu."""
    return GroupNormSilu.apply(x, shift, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)


def _block_forward(block, x, temb=None):
    """A residual block's forward pass. The shift between its convolutions, from the timestep or the first one's bias,
    is added inside the second norm's kernel, and the last bias together with the residual: this saves two passes."""
    x, hidden = _normed(block.norm1, x, True)
    if temb is None:
        hidden, shift = conv_without_bias(block.conv1, hidden), block.conv1.bias.expand(len(x), -1)
    else:
        hidden, shift = block.conv1(hidden), temb[id(block)]
    if shift.requires_grad:  # its projection has an adapter
        hidden, shift = hidden + shift[:, :, None, None], None
    hidden = block.dropout(_normed(block.norm2, hidden, True, shift)[1])
    if block.conv_shortcut is None:
        return conv_add(block.conv2, hidden, x)
    return block.conv2(hidden) + block.conv_shortcut(x)


def _up_forward(
    block,
    forward,
    hidden_states,
    res_hidden_states_tuple,
    temb=None,
    upsample_size=None,
    encoder_hidden_states=None,
    **others,
):
    """The forward pass of a UNet's up block with ConcatChannels. Arguments that Stable Diffusion does not use go to its
    own `forward`."""
    freeu = getattr(block, "s1", None) is not None
    if freeu or any(value is not None for value in others.values()):
        if hasattr(block, "attentions"):
            others["encoder_hidden_states"] = encoder_hidden_states
        return forward(hidden_states, res_hidden_states_tuple, temb, upsample_size=upsample_size, **others)
    checkpointing = block.gradient_checkpointing and torch.is_grad_enabled()
    recompute = block._gradient_checkpointing_func if checkpointing else None
    x, attentions = hidden_states, getattr(block, "attentions", [None] * len(block.resnets))
    layers = zip(block.resnets, attentions, reversed(res_hidden_states_tuple), strict=True)
    for residual, attention, skip in layers:
        x = ConcatChannels.apply(x, skip)
        x = recompute(residual, x, temb) if recompute else residual(x, temb)
        if attention is not None:
            x = attention(x, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
    for upsampler in block.upsamplers or ():
        x = upsampler(x, upsample_size)
    return x


def _upsample_forward(module, forward, x, output_size=None):
    """An upsampler's forward pass to twice the size. Other sizes go to its own `forward`."""
    return forward(x, output_size) if output_size is not None else module.conv(UpsampleNearest2x.apply(x))


def _is_pointwise(layer):
    return (
        isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)
    )


def _pointwise_forward(convolution, x):
    """A 1x1 convolution as a matrix product, whose kernels add the bias too."""
    rows = x.permute(0, 2, 3, 1)
    return F.linear(rows, convolution.weight.flatten(1), convolution.bias).permute(0, 3, 1, 2)
