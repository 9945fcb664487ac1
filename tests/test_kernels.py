"""The fast ways against the plain ones: kernels, LoRA layers, CUDA graphs, and whole runs."""

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT, TINY_RUN, assert_close, make_processed, picture, tiny_vae
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.upsampling import Upsample2D
from plain_loop import plain_loop
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

import preprocess
import train
from lib import adapter_files, adapters, dataset, files
from lib.errors import UserError
from lib.evaluation import generation
from lib.kernels import (
    attention,
    blocks,
    channels_last,
    compiling,
    conv_epilogues,
    dora,
    fused_projections,
    graphs,
    group_norm,
    guided,
    layer_norm_geglu,
    lora,
    on_cpu,
)
from lib.training import checkpoints, latents, micro_step, parameters, samples, setup, updates

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_triton = pytest.mark.skipif(group_norm.triton is None, reason="this torch came without Triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What is compared is float32; a convolution on a GPU would round it to 11 bits.
torch.backends.cudnn.allow_tf32 = False


def _no_norm_alike(model):
    """Layer norms begin with weights of 1 and biases of 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            for weight in module.parameters():
                weight.data += 0.2 * torch.randn_like(weight)


def small_unet(
    dtype=torch.float32,
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    groups=8,
    dora=False,
    rank=4,
    adapted=True,
    **changes,
):
    torch.manual_seed(0)
    shape = dict(
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=groups,
        **shape | changes,
    )
    unet.requires_grad_(False)
    _no_norm_alike(unet)
    if not adapted:
        return unet.to(DEVICE, dtype).eval()
    adapters.add_lora(unet, rank, 8.0, targets, dora)
    for _, b in adapters.factors(unet).values():
        torch.nn.init.normal_(b.data, std=0.1)
    for magnitude in adapters.magnitudes(unet).values():
        magnitude.data *= 1 + 0.2 * torch.rand(magnitude.shape)
    return unet.to(DEVICE, dtype).eval()


def output_of(unet, side=16):
    """Of fixed noise [2, 4, side, side], two timesteps and a text: (the output, the text)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, side, side, generator=generator).to(DEVICE, unet.dtype)
    text = torch.randn(2, 77, 32, generator=generator).to(DEVICE, unet.dtype).requires_grad_()
    return unet(x, torch.tensor([10, 700], device=DEVICE), text).sample, text


def output_and_gradients(unet, side=16):
    out, text = output_of(unet, side)
    loss = 1000 * out.float().square().mean()  # scaled, as training does for half precision
    return [out.detach(), *gradients(loss, unet, text)]


def small_text_encoder(dtype=torch.float32, **changes):
    """With three layers and LoRA."""
    torch.manual_seed(0)
    config = (
        dict(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            eos_token_id=98,
            bos_token_id=97,
            pad_token_id=98,
        )
        | changes
    )
    text_encoder = CLIPTextModel(CLIPTextConfig(**config))
    text_encoder.requires_grad_(False)
    _no_norm_alike(text_encoder)
    adapters.add_lora(text_encoder, 4, 8.0, ("q_proj", "v_proj"))
    for _, b in adapters.factors(text_encoder).values():
        torch.nn.init.normal_(b.data, std=0.1)
    return text_encoder.to(DEVICE, dtype).eval()


def states_and_gradients(text_encoder):
    """Hidden states [2, 11, 32], and the gradient of each LoRA weight."""
    ids = torch.arange(22, device=DEVICE).view(2, 11)
    states = text_encoder(ids)[0]
    return [states.detach(), *gradients(states.float()[..., ::3].square().sum(), text_encoder)]


def gradients(loss, unet, *others):
    """Those of `others`, then of each of PEFT's parameters in its own order, whether `fused` or not."""
    weights = adapters.trained_weights(unet)
    found = torch.autograd.grad(loss, [*others, *getattr(unet, "leaves", weights)])
    ours = torch.cat([gradient.flatten() for gradient in found[len(others) :]])
    in_order = lora.trained_weights(unet.products) if hasattr(unet, "leaves") else weights
    parts = ours.split([weight.numel() for weight in in_order])
    of = {id(weight): part for weight, part in zip(in_order, parts, strict=True)}
    return [*found[: len(others)], *(of[id(weight)].view(weight.shape) for weight in weights)]


def fused(unet):
    """`unet` as it is trained: its LoRA or DoRA layers fused, and joined where they read the same input."""
    is_dora = bool(adapters.magnitudes(unet))
    products = lora.fuse_lora(unet, fused_projections.join(unet, DEVICE, is_dora), DEVICE)
    unet.factors = dora.DoraFactors(products) if is_dora else None
    _, working = parameters.flatten_parameters(lora.trained_weights(products), unet.dtype)
    unet.leaves, unet.copies = lora.bound(products, working)
    return unet


def close(found, expected, tolerance):
    """Whether each tensor differs by less than `tolerance` of its own norm."""
    return all(
        (f.float() - e.float()).norm() <= tolerance * e.float().norm() for f, e in zip(found, expected, strict=True)
    )


def test_fused_lora_gives_pefts_outputs_and_gradients():
    expected = output_and_gradients(small_unet())
    found = output_and_gradients(fused(small_unet()))
    assert close(found, expected, 1e-4)
    assert all(gradient.abs().sum() > 0 for gradient in found)


def test_queries_of_a_text_in_pieces_are_the_same_attention(monkeypatch):
    """As a GPU's backward pass has them."""
    expected = output_and_gradients(fused(small_unet()))
    seen = []
    monkeypatch.setattr(fused_projections, "_pieces", lambda query: seen.append(query.shape) or 4)
    assert close(output_and_gradients(fused(small_unet())), expected, 1e-4)
    assert len(seen) == 4  # transformers


def test_a_models_weights_are_views_of_what_is_computed_with():
    """So whoever changes a weight in place, as when an adapter is added to it, changes that."""
    unet = fused(small_unet())
    x, text = torch.randn(1, 4, 16, 16, device=DEVICE), torch.randn(1, 77, 32, device=DEVICE)
    names = {name for name, _ in unet.named_parameters()}
    assert names == {name for name, _ in small_unet().named_parameters()}
    kinds = "to_q", "to_k", "to_v", "time_emb_proj"
    for kind in kinds:
        with torch.no_grad():
            before = unet(x, 300, text).sample
            for name, weight in unet.named_parameters():
                if f"{kind}.base_layer.weight" in name or f"{kind}.weight" in name:
                    weight.mul_(1.5)
            assert (unet(x, 300, text).sample - before).norm() > 1e-3 * before.norm(), kind
    # Self-attentions, all texts, the timestep.
    assert len([product for product in unet.products if len(product.layers) > 1]) == 4 + 1 + 1


@pytest.mark.parametrize("rank", [3, 4, 20])
def test_outputs_lie_where_attentions_kernels_can_read_them(rank, monkeypatch):
    """16 bytes at a time, in half precision, whatever the rank: their columns are part of wider rows."""
    seen, attend = [], F.scaled_dot_product_attention

    def attended(*inputs, **how):
        # Of images and of rows; how wide the heads of so small a UNet are does not count.
        seen.extend((x.storage_offset(), x.stride(0), x.stride(2)) for x in inputs)
        return attend(*inputs, **how)

    expected = output_and_gradients(small_unet(rank=rank))
    monkeypatch.setattr(F, "scaled_dot_product_attention", attended)
    unet = fused(small_unet(rank=rank))
    assert close(output_and_gradients(unet), expected, 1e-4)
    assert seen
    assert all(place % 8 == 0 for places in seen for place in places), seen
    adapted = [product for product in unet.products if product.adapted]
    assert adapted
    assert not any(p.matrix[len(p.weight) + len(p.a) :].any() for p in adapted)


@pytest.mark.parametrize(("sizes", "kept"), [(4, {2, 3}), (3, {2}), (2, {1}), (1, set())], ids=str)
def test_only_large_maps_are_computed_again(sizes, kept):
    """The larger half of the sizes, on the way down and on the way up; level 0 is the largest."""
    kinds = dict(
        down_block_types=("DownBlock2D",) * sizes,
        up_block_types=("UpBlock2D",) * sizes,
        block_out_channels=(32,) * sizes,
        norm_num_groups=8,
        mid_block_type=None,
    )
    unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=32, **kinds)
    setup.recompute_large_maps(unet)
    again = {level for level, block in enumerate(unet.down_blocks) if block.gradient_checkpointing}
    assert again == set(range(sizes)) - kept
    assert again == {sizes - 1 - place for place, block in enumerate(unet.up_blocks) if block.gradient_checkpointing}
    unet = small_unet()
    setup.recompute_large_maps(unet)
    assert {
        m.gradient_checkpointing for m in unet.down_blocks[-1].modules() if hasattr(m, "gradient_checkpointing")
    } == {False}
    assert {m.gradient_checkpointing for m in unet.up_blocks[-1].modules() if hasattr(m, "gradient_checkpointing")} == {
        True
    }


@pytest.mark.parametrize("dora", [False, True])
def test_a_layer_that_is_not_adapted_is_joined_with_those_that_are(dora):
    """CLIP's keys are as a rule; DoRA leaves such layers apart."""
    how = dict(targets=("to_q", "to_v"), dora=dora)
    expected = output_and_gradients(small_unet(**how))
    unet = fused_dora(targets=how["targets"]) if dora else fused(small_unet(**how))
    for one, other in zip(output_and_gradients(unet), expected, strict=True):
        assert_close(one, other, 1e-3)
    mixed = [p for p in unet.products if 0 < len(p.adapted) < len(p.layers)]
    assert bool(mixed) != dora


def fused_dora(**how):
    """small_unet with DoRA, fused."""
    unet = fused(small_unet(dora=True, **how))
    magnitudes = [m for product in unet.products for m in product.magnitudes()]
    unet.factors.refresh(torch.cat([m.detach().float() for m in magnitudes]))
    return unet


@pytest.mark.parametrize("targets", [("to_q", "to_k", "to_v", "to_out.0"), ("time_emb_proj", "to_q")])
def test_fused_dora_gives_pefts_outputs_and_gradients(targets):
    """Of A, B and the magnitudes, with biases and without, and of layers of one shape and of several."""
    expected = output_and_gradients(small_unet(dora=True, targets=targets))
    unet = fused_dora(targets=targets)
    found = output_and_gradients(unet)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-3)
    assert all(gradient.abs().sum() > 0 for gradient in found)
    # Magnitudes and directions both matter here: it is not LoRA's output.
    assert not close(found[:1], output_and_gradients(small_unet(targets=targets))[:1], 0.01)


def test_doras_norms_are_those_of_the_whole_product():
    """Also where B A nearly takes the weight away, whose square is then a small difference."""
    unet = fused(small_unet(dora=True))
    factors = unet.factors
    for number, layer in enumerate(adapters.lora_layers(unet).values()):
        weight, a = layer.get_base_layer().weight, layer.lora_A["default"].weight
        if number % 2:
            part = -0.9 * weight @ torch.linalg.pinv(a)
            layer.lora_B["default"].weight.data.copy_(part / layer.scaling["default"])
    ones = torch.ones_like(factors.factors)
    factors.refresh(ones)
    expected = [
        (layer.get_base_layer().weight + layer.get_delta_weight("default")).norm(dim=1)
        for product in unet.products
        for layer in product.adapted
    ]
    assert_close(1 / factors.factors, torch.cat(expected))
    assert_close(factors.inverses, factors.factors)


def predicted(unet, states):
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    return unet(noisy, torch.tensor([300], device=DEVICE), states).sample


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_without_lora_the_model_is_the_base_model(kind):
    """Inside a `with` alone, whatever ends it."""
    unet, states = (fused(small_unet()) if kind == "lora" else fused_dora(), torch.randn(1, 77, 32).to(DEVICE))
    adapted = predicted(unet, states)
    with contextlib.suppress(KeyError), lora.without_lora(unet):
        base = predicted(unet, states)
        raise KeyError
    assert (adapted - base).abs().max() > 0.01 * base.abs().max()
    assert torch.equal(predicted(unet, states), adapted)
    plain = small_unet()
    for _, b in adapters.factors(plain).values():
        b.data.zero_()
    assert_close(predicted(plain, states), base)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_recomputing_gives_the_same_gradients(kind):
    unet = fused(small_unet()) if kind == "lora" else fused_dora()
    expected = output_and_gradients(unet)
    calls = []

    def counted(module, *inputs):
        calls.append(module)
        return micro_step.recomputed(module, *inputs)

    unet.enable_gradient_checkpointing(counted)
    # A GPU adds up some gradients in any order.
    assert close(output_and_gradients(unet), expected, 1e-5 if DEVICE.type == "cuda" else 0)
    assert calls


KERNELS = """
import itertools, sys; sys.path[:0] = sys.argv[1:]
import torch, torch.nn.functional as F
from conftest import assert_close, tiny_vae
from lib.kernels import adamw8bit, blocks as transformer_blocks, channels_last, conv_epilogues, group_norm, layer_norm_geglu
from lib.training.micro_step import recomputed
from test_kernels import close, fused, output_and_gradients, small_text_encoder, small_unet, states_and_gradients
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
if device.type == "cpu":  # the interpreter is slow
    group_norm.PARTS = (2**10, 2, 4), (2**14, 4, 8)
for shape, groups, silu in [((1, 80, 8, 8), 8, True), ((2, 32, 5, 7), 16, False), ((2, 120, 3, 3), 4, True),
                            ((1, 40, 25, 42), 4, True), ((2, 32, 300, 1), 8, False), ((1, 16, 33, 32), 2, True)]:
    x = (torch.randn(shape, device=device) + 100).requires_grad_()
    weight, bias = torch.randn(2, shape[1], device=device)
    shifts = None, torch.randn(shape[0], 2 * shape[1], device=device)[:, shape[1]:]
    for shift, group_norm.WHOLE in itertools.product(shifts, (0, 2**14)):  # what one program takes
        same, found = group_norm.GroupNormSilu.apply(x, shift, weight, bias, groups, 1e-5, silu)
        assert torch.equal(same, x)
        expected = F.group_norm(x if shift is None else x + shift[..., None, None], groups, weight, bias, 1e-5)
        expected = F.silu(expected) if silu else expected
        assert_close(found, expected)
        grads = torch.randn(2, *shape, device=device)
        assert_close(*(torch.autograd.grad(y, x, grads[0], retain_graph=True)[0] for y in (found, expected)))
        assert_close(*(torch.autograd.grad(pair, x, [*grads])[0] for pair in ((same, found), (x * 1, expected))))
x = (2 * torch.randn(3, 7, 66, device=device)).requires_grad_()[..., :50]  # columns of wider rows
value, gate = x.chunk(2, dim=-1)
found, expected = layer_norm_geglu.Geglu.apply(x), value * F.gelu(gate)
assert_close(found, expected, 1e-5)
grad = torch.randn_like(found)
assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (found, expected)), 1e-5)

pixel = torch.randn(1, 8, 1, 1, device=device).as_strided((1, 8, 1, 1), (8, 1, 1, 1))  # as a convolution gives it
assert torch.equal(conv_epilogues.Beside.apply(pixel, pixel), torch.cat([pixel, pixel], 1))
assert torch.equal(conv_epilogues.Twice.apply(pixel), pixel.expand(1, 8, 2, 2))
for shape in ((2, 8, 5, 6), (1, 70, 7, 3), (1, 6, 40, 1)):
    x, y = torch.randn(2, *shape, device=device).requires_grad_()
    bias, grad = torch.randn(shape[1], device=device), torch.randn(*shape[:2], 2 * shape[2], 2 * shape[3], device=device)
    for added in (None, y):
        found, expected = conv_epilogues.SumBias.apply(x, added, bias), x + bias[:, None, None] + (0 if added is None else y)
        assert_close(found, expected, 1e-6)
        given = [x] if added is None else [x, y]
        for one in torch.autograd.grad(found, given, grad[..., ::2, ::2]):
            assert torch.equal(one, grad[..., ::2, ::2])
    for one, other in ((x, y), (x, y[:, :3])):  # channels of 16 bytes, and others
        assert torch.equal(conv_epilogues.Beside.apply(one, other), torch.cat([one, other], 1))
    found, expected = conv_epilogues.Twice.apply(x), F.interpolate(x, scale_factor=2.0, mode="nearest")
    assert torch.equal(found, expected) and found.is_contiguous(memory_format=torch.channels_last)
    assert_close(*(torch.autograd.grad(twice, x, grad)[0] for twice in (found, expected)), 1e-6)

for shape in ((3, 5, 40), (2, 320), (3, 1280), (1, 5, 768)):
    for dtype, add in itertools.product((torch.float32, torch.float16), (True, False)):
        # Of a size at which it matters that the norm is taken of the rounded sum.
        x, y = (torch.randn(2, *shape, device=device) + 100).to(dtype)
        weight, bias = torch.randn(2, shape[-1], device=device).to(dtype)
        x.requires_grad_(); y.requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            found = layer_norm_geglu.SumNorm.apply(x, y if add else None, weight, bias, 1e-5)
        assert sorted(t.numel() for t in kept) == sorted((x.numel(), len(weight), 2 * x[..., 0].numel()))
        assert any(t.data_ptr() == found[0].data_ptr() for t in kept)  # the sum, which is there anyway
        total = x + y if add else x * 1
        # In float32, as a GPU does it; a CPU keeps mean and deviation in half precision.
        normed = F.layer_norm(total.float(), shape[-1:], weight.float(), bias.float())
        expected = total, normed.to(dtype)
        assert torch.equal(found[0], expected[0])
        tolerance = 1e-4 if dtype == torch.float32 else 2e-3
        assert_close(found[1], expected[1], tolerance)
        grads = [*torch.randn(2, *shape, device=device).to(dtype)]
        both = [torch.autograd.grad(pair, (x, y) if add else (x,), grads) for pair in (found, expected)]
        for pair in zip(*both, strict=True):
            assert_close(*pair, tolerance)
x = (2 * torch.randn(3, 7, 66, device=device)).requires_grad_()[..., :50]
found, expected = layer_norm_geglu.QuickGelu.apply(x), x * torch.sigmoid(1.702 * x)
assert_close(found, expected, 1e-5)
grad = torch.randn_like(found)
assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (found, expected)), 1e-5)

expected, text_encoder = states_and_gradients(small_text_encoder()), small_text_encoder()
channels_last.rebuild(text_encoder)
assert len([m for m in text_encoder.modules() if "forward" in vars(m)]) == 2 * 3  # layers, activations
assert close(states_and_gradients(text_encoder), expected, 1e-4)

for how in ({}, dict(targets=("time_emb_proj", "to_q")), dict(resnet_time_scale_shift="scale_shift"),
            dict(use_linear_projection=True)):
    how |= dict(groups=2)  # the interpreter is slow, and goes through one after another
    expected, unet, as_trained = output_and_gradients(small_unet(**how), side=4), small_unet(**how), fused(small_unet(**how))
    channels_last.rebuild(unet)
    channels_last.rebuild(as_trained)
    assert close(output_and_gradients(unet, side=4), expected, 1e-4), how
    assert close(output_and_gradients(as_trained, side=4), expected, 1e-4), how
    blocks = [m for m in as_trained.modules() if type(m).__name__ == "ResnetBlock2D"]
    whole = {getattr(vars(block).get("forward"), "func", None) is channels_last._block_forward for block in blocks}
    assert whole == {"resnet_time_scale_shift" not in how}
    layers = [m for m in unet.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert layers and all("forward" in vars(layer) for layer in layers)
    assert list(unet.state_dict()) and not any("time_emb_proj.1" in name for name in unet.state_dict())
    assert transformer_blocks.row_modules(unet) and all("forward" in vars(block) for block in transformer_blocks.row_modules(unet))
vae, latents = tiny_vae().requires_grad_(False), torch.randn(1, 4, 4, 4, device=device)
for weight in vae.to(device).parameters():
    weight += 0.1 * torch.randn_like(weight) if weight.ndim == 1 else 0  # biases begin as zeros
expected = vae.decode(latents).sample
channels_last.rebuild(vae)
assert_close(vae.decode(latents).sample, expected, 1e-4)
assert not [m for m in vae.decoder.modules() if isinstance(m, torch.nn.SiLU)]  # they are in the norms' kernels

expected = output_and_gradients(unet, side=4)
unet.enable_gradient_checkpointing(recomputed)
assert close(output_and_gradients(unet, side=4), expected, 1e-5)
assert adamw8bit.agrees(device)
assert channels_last.missing_kernels(device) is None
print("all equal")
"""


COMPILED = """
import sys; sys.path[:0] = sys.argv[1:]
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lib.kernels import adamw8bit, conv_epilogues, group_norm, layer_norm_geglu
kinds = dict(HW="i32", EACH="i32", C="i32", SILU="i32", ROWS="i32", HALF="i32", STRIDE="i32", ADD="i32", WIDTH="i32",
             BEHIND="i32", eps="fp32", statistics="*fp32", sums="*fp32")
for architecture, dtype in ((75, "fp16"), (75, "fp32"), (80, "bf16"), (90, "fp16")):  # T4, A100, H100
    of_norms = group_norm._norm_whole, group_norm._norm_sums, group_norm._norm_apply
    of_rows, activations = (layer_norm_geglu._sum_norm, layer_norm_geglu._sum_norm_backward), (layer_norm_geglu._geglu, layer_norm_geglu._quick_gelu)
    for kernel in (*of_norms, *of_rows, *activations, conv_epilogues._sum_bias):
        for backward, large in ((False, False), (False, True), (True, False), (True, True)):
            sizes = dict(TALL=4, WIDE=64, BACKWARD=backward)
            if kernel in of_norms:
                sizes |= dict(GROUP=40 if large else 10, SPAN=40, WIDTH=64, ROWS=256 if large else 64,
                              PARTS=32 if large else 8)
            if kernel in of_rows:
                sizes |= dict(WIDTH=320, TILE=512)
            if kernel in (layer_norm_geglu._sum_norm, conv_epilogues._sum_bias):
                sizes |= dict(ADD=backward)
            names = [parameter.name for parameter in kernel.params]
            known = {name: sizes[name] for name in names if name in sizes}
            signature = {name: "constexpr" if name in known else kinds.get(name, f"*{dtype}") for name in names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=known)
            triton.compile(source, target=GPUTarget("cuda", architecture, 32))
kinds = dict(outcome="*i32", tracker="*i32", state1="*u8", state2="*u8", interval="i32", most="i32", COUNT="i32",
             **dict.fromkeys(("growth", "backoff", "beta1", "beta2", "eps", "decay"), "fp32"))
for architecture in (75, 80, 90):
    for kernel, scaled in ((adamw8bit._decide, True), (adamw8bit._decide, False), (adamw8bit._adamw, None)):
        sizes = dict(LOG1=-0.15, LOG2=-0.0014, SCALED=scaled, BLOCK=adamw8bit.BLOCK)
        names = [parameter.name for parameter in kernel.params]
        known = {name: sizes[name] for name in names if name in sizes}
        signature = {name: "constexpr" if name in known else kinds.get(name, "*fp32") for name in names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=known)
        triton.compile(source, target=GPUTarget("cuda", architecture, 32))
print("all compiled")
"""


@needs_triton
def test_triton_kernels_compile_for_every_gpu_meant():
    """Triton's compiler runs without a GPU, and refuses what its interpreter lets pass."""
    done = subprocess.run([sys.executable, "-c", COMPILED, str(ROOT)], capture_output=True, text=True)
    assert "all compiled" in done.stdout, done.stderr


@needs_triton
def test_triton_kernels_give_pytorchs_results():
    """On the GPU, or without one in Triton's interpreter."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KERNELS, str(ROOT), str(ROOT / "tests")],
        capture_output=True,
        text=True,
        env=os.environ | interpret,
    )
    assert "all equal" in done.stdout, done.stderr


def test_everything_can_be_imported_without_triton():
    code = "import sys; sys.modules['triton'] = None; import lib.kernels.channels_last, lib.evaluation.generation, lib.training.setup"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_without_triton_it_is_said_and_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(channels_last, "triton", None)
    channels_last.missing_kernels.cache_clear()
    assert "without Triton" in channels_last.missing_kernels(DEVICE)
    channels_last.missing_kernels.cache_clear()
    unet = small_unet()
    channels_last.channels_last(unet)
    assert ("no Triton kernels" in capsys.readouterr().out) == (DEVICE.type == "cuda")
    output_and_gradients(unet)
    channels_last.missing_kernels.cache_clear()


@needs_triton
def test_kernels_that_do_not_compile_or_are_wrong_are_not_used(monkeypatch):
    def norm(x, shift, weight, bias, groups, eps, silu):
        shifted = x if shift is None else x + shift[..., None, None]
        return x, F.silu(F.group_norm(shifted, groups, weight, bias, eps))

    def sum_norm(x, y, weight, bias, eps):
        return x + y, F.layer_norm(x + y, weight.shape, weight, bias, eps)

    def fails(*arguments):
        raise OSError("no C compiler")

    norm_silu, sums = (group_norm.GroupNormSilu, "apply"), (layer_norm_geglu.SumNorm, "apply")
    quick_gelu, sum_bias = (layer_norm_geglu.QuickGelu, "apply"), (conv_epilogues.SumBias, "apply")
    right = {
        norm_silu: norm,
        (layer_norm_geglu.Geglu, "apply"): lambda x: x[..., :2] * F.gelu(x[..., 2:]),
        sums: sum_norm,
        quick_gelu: lambda x: x * torch.sigmoid(1.702 * x),
        sum_bias: lambda x, y, bias: x + y + bias[:, None, None],
    }
    wrong = [
        (norm_silu, lambda x, *_: (x, x)),
        (norm_silu, lambda x, shift, *others: norm(x, None, *others)),
        (sum_bias, lambda x, y, bias: x + y),
        ((layer_norm_geglu.Geglu, "apply"), lambda x: x[..., :2]),
        (sums, lambda x, *others: (x, sum_norm(x, *others)[1])),
        (sums, lambda x, y, *_: (x + y, x + y)),
        (quick_gelu, F.gelu),
    ]
    cases = [(None, None, None)]
    cases += [(function, fails, "no C compiler") for function in right]
    cases += [(function, broken, "wrong") for function, broken in wrong]
    for function, broken, words in cases:
        for each, plain in right.items():
            monkeypatch.setattr(*each, broken if each == function else plain)
        channels_last.missing_kernels.cache_clear()
        reason = channels_last.missing_kernels(DEVICE)
        assert words in reason if words else reason is None
    channels_last.missing_kernels.cache_clear()


@needs_triton
def test_what_is_compiled_beforehand_is_what_is_used(monkeypatch):
    """Each kernel's fixed sizes: those launched beforehand, and those of a forward and backward pass."""
    launched = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            def launch(*arguments, **sizes):
                fixed = (*arguments[6:],) if self.name in positional else tuple(sorted(sizes.items()))
                launched.append((self.name, arguments[0].dtype, fixed))

            return launch

    positional = {"geglu", "quick_gelu", "sum_bias"}
    of_norms, of_rows = ({"norm_whole", "norm_sums", "norm_apply"}, {"sum_norm", "geglu", "quick_gelu"})
    for module, names in (
        (group_norm, of_norms),
        (layer_norm_geglu, of_rows | {"sum_norm_backward"}),
        (conv_epilogues, {"sum_bias"}),
    ):
        for name in names:
            monkeypatch.setattr(module, f"_{name}", Recorder(name))
    monkeypatch.setattr(channels_last, "missing_kernels", lambda device: None)
    unet, text_encoder = small_unet(), small_text_encoder(hidden_size=48)
    assert channels_last.compile_kernels([unet, text_encoder], training=True) is None
    before = set(launched)
    launched.clear()
    for model in (unet, text_encoder):
        channels_last.rebuild(model)
    output_and_gradients(unet)
    states_and_gradients(text_encoder)
    # Of each size for small maps and for large ones, of which this UNet has no large ones.
    assert set(launched) <= before
    assert 8 < len(before) <= 4 * len(set(launched))
    assert {name for name, *_ in before} == of_norms | of_rows | {"sum_norm_backward", "sum_bias"}
    launched.clear()
    monkeypatch.setattr(group_norm, "WHOLE", 0)  # as if its maps were large
    channels_last.compile_kernels([unet, text_encoder], training=False)
    forward_alone = set(launched)
    launched.clear()
    with torch.no_grad():
        output_of(unet)
        text_encoder(torch.arange(22, device=DEVICE).view(2, 11))
    assert set(launched) <= forward_alone
    assert {name for name, *_ in forward_alone} == {name for name, *_ in launched}

    def fails(*arguments, **sizes):
        raise OSError("no C compiler")

    monkeypatch.setattr(channels_last, "missing_kernels", lambda device: "wrong here")
    assert channels_last.compile_kernels([unet], training=False) == "wrong here"
    monkeypatch.setattr(channels_last, "missing_kernels", lambda device: None)
    monkeypatch.setattr(channels_last, "group_norm", fails)
    assert "no C compiler" in channels_last.compile_kernels([unet], training=False)


@needs_triton
def test_what_does_more_than_stable_diffusions_transformers_is_left_as_it_is():
    plain = dict(dim=32, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32)
    block = BasicTransformerBlock(**plain)
    assert blocks.row_modules(block) == [block, block.ff.net[0]]  # and its activation
    for how in (
        dict(norm_type="ada_norm", num_embeds_ada_norm=5),
        dict(norm_type="ada_norm_single"),
        dict(positional_embeddings="sinusoidal", num_positional_embeddings=5),
        dict(only_cross_attention=True),
        dict(cross_attention_dim=None),
        dict(norm_elementwise_affine=False),
        dict(attention_type="gated"),
    ):
        other = BasicTransformerBlock(**plain | how)
        assert {type(module) for module in blocks.row_modules(other)} == {GEGLU}, how
    block.set_chunk_feed_forward(2)
    assert blocks.row_modules(block) == [block.ff.net[0]]
    # Of Stable Diffusion 2's text encoder the layers, whose activation is another.
    layers = blocks.row_modules(small_text_encoder(hidden_act="gelu"))
    assert [type(layer) for layer in layers] == 3 * [CLIPEncoderLayer]


@pytest.mark.parametrize("both", [True, False])
def test_every_model_that_is_trained_gets_the_kernels(
    tiny_model, processed_data, tmp_path, monkeypatch, new_precision, both
):
    given = []
    monkeypatch.setattr(micro_step, "channels_last", lambda *models, training: given.append((models, training)))
    run_of(tiny_model, processed_data, tmp_path, max_steps=1, warmup_steps=0, train_text_encoder=both)
    ((models, training),) = given
    assert training
    assert [type(model) for model in models] == [UNet2DConditionModel, CLIPTextModel][: 1 + both]


class Attended(TorchFunctionMode):
    """Notes every attention that is computed: the layout of its inputs, and whether with gradients."""

    def __init__(self):
        super().__init__()
        self.calls = set()

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is F.scaled_dot_product_attention:
            inputs = tuple((tuple(x.shape), x.stride(), x.dtype) for x in arguments[:3])
            gradients = torch.is_grad_enabled() and arguments[0].requires_grad
            self.calls.add((inputs, str(arguments[3:]), str(named), gradients))
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("training", [False, True])
def test_the_attention_compiled_beforehand_is_what_is_computed(training):
    unet = small_unet()
    for x in unet.parameters():
        x.requires_grad_(training)
    x, text = torch.randn(1, 4, 16, 16, device=DEVICE), torch.randn(1, 77, 32, device=DEVICE)

    def call():
        return unet(x, torch.tensor([10], device=DEVICE), text).sample

    with Attended() as real:
        call()
        with torch.no_grad():
            call()
    jobs = attention.attention_jobs(call, training)
    with Attended() as beforehand:
        for job in jobs:
            job()
    assert beforehand.calls == real.calls
    # Transformers at two resolutions, each attending to the image and to the text.
    assert len(jobs) == len(real.calls) == (8 if training else 4)
    assert all(weight.grad is None for weight in unet.parameters())
    with Attended() as beforehand:
        attention.attention_jobs(call, training)
    assert not beforehand.calls  # found out without computing any


def test_attention_of_one_layout_is_compiled_once_and_masks_are_kept():
    q = torch.randn(1, 2, 5, 8)
    masks = [torch.rand(5, 5) > 0.5 for _ in range(2)]

    def call():
        for mask in masks:
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        F.scaled_dot_product_attention(q, q, q, is_causal=True)

    jobs = attention.attention_jobs(call, training=True)
    assert len(jobs) == 4  # forward with gradients and without, masked and causal
    for job in jobs:
        job()
    assert q.grad is None


def test_jobs_in_threads_are_waited_for_and_their_errors_raised(monkeypatch, capsys):
    done, begun = [], threading.Barrier(3, timeout=60)

    def job(number):
        begun.wait()  # passes only when all of them run at the same time
        done.append(number)

    jobs = [functools.partial(job, number) for number in range(3)]
    compiling.in_threads(jobs, torch.device("cpu"))()
    assert sorted(done) == [0, 1, 2]

    def slow():
        time.sleep(0.3)
        done.append("slow")

    with pytest.raises(ZeroDivisionError):
        compiling.in_threads([lambda: 1 / 0, slow], torch.device("cpu"))()
    assert done[-1] == "slow"  # nothing goes on beside what comes next

    monkeypatch.setattr(attention, "attention_jobs", lambda call, training: [lambda: 1 / 0])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    attention.compile_attention(None, torch.device("cuda"))()
    assert "not compiled beforehand: ZeroDivisionError" in capsys.readouterr().out
    monkeypatch.setattr(attention, "attention_jobs", lambda call, training: 1 / 0)
    attention.compile_attention(None, torch.device("cuda"))()
    assert "not compiled beforehand: ZeroDivisionError" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_compiled_or_recorded():
    def work():
        raise AssertionError("it was called")

    assert graphs.captured([work], torch.device("cpu")) == [work]
    attention.compile_attention(work, torch.device("cpu"))()


@needs_gpu
def test_attention_compiles_in_threads_on_a_gpu(capsys, monkeypatch):
    started, start = [], compiling.in_threads
    monkeypatch.setattr(attention, "in_threads", lambda jobs, device: started.extend(jobs) or start(jobs, device))
    unet = small_unet(torch.float16)
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 32)
    x, text = x.to(DEVICE, torch.float16), text.to(DEVICE, torch.float16)
    steps = torch.tensor([10], device=DEVICE)
    attention.compile_attention(lambda: unet(x, steps, text), DEVICE, training=True)()
    assert len(started) == 8 and not capsys.readouterr().out


# ---- whole runs ----------------------------------------------------------------------------

STEPS = 50


def run_of(model, data, folder, **changes):
    """(losses, weights) of a run of train.py."""
    config = (
        train.CONFIG
        | TINY_RUN
        | dict(
            base_model=str(model),
            data_dir=str(data),
            output_dir=str(folder),
            max_steps=STEPS,
            log_every=1,
            warmup_steps=5,
            validate_every=1000,
            gradient_checkpointing=False,
        )
        | changes
    )
    train.train(config)
    folder = folder / config["run_name"]
    rows = [json.loads(line) for line in (folder / "log.jsonl").open()]
    weights = load_file(folder / adapter_files.WEIGHTS)
    weights = {
        k.replace(".lora_", ".").removesuffix(".weight").replace("text_model.", ""): w for k, w in weights.items()
    }
    return [row["loss"] for row in rows if "loss" in row], weights


def plain_run_of(model, data, projections=None, **changes):
    """The same by the plain loop."""
    config = (
        train.CONFIG
        | TINY_RUN
        | dict(base_model=str(model), data_dir=str(data), max_steps=STEPS, warmup_steps=5, gradient_checkpointing=False)
        | changes
    )
    losses, weights, _ = plain_loop(config, one_vector=True, projections=projections)
    return losses, {k.replace("text_model.", ""): w for k, w in weights.items()}


def distances(one, two):
    """How far two runs are apart: (losses, weights), each as a share of the first one's.

    Of the weights B is compared, which starts at zero.
    """
    names = [name for name in one[1] if name.endswith(".B")]
    assert names
    assert sorted(one[1]) == sorted(two[1])
    a, b = (torch.cat([run[1][name].flatten() for name in names]) for run in (one, two))
    losses = np.array(one[0]), np.array(two[0])
    assert len(losses[0]) == len(losses[1]) == STEPS
    relative = np.linalg.norm(losses[0] - losses[1]) / np.linalg.norm(losses[0])
    return float(relative), ((a - b).norm() / a.norm()).item()


def test_train_is_the_plain_loop(tiny_model, processed_data, tmp_path, new_precision):
    """On a CPU both compute in float32: flat vectors, cached latents and fused layers change
    nothing but the order of a few sums. The recipe's decay and betas are the optimizer's own
    defaults; with others it matters that they are handed on."""
    if DEVICE.type == "cuda":
        pytest.skip("compared in half precision below")
    how = dict(adam_weight_decay=10.0, adam_beta1=0.8, adam_beta2=0.95)
    fast_run = run_of(tiny_model, processed_data, tmp_path, **how)
    plain = plain_run_of(tiny_model, processed_data, **how)
    losses, weights = distances(plain, fast_run)
    assert losses < 1e-4
    assert weights < 0.02
    # The bound would see a recipe that is a tenth off.
    other = run_of(tiny_model, processed_data, tmp_path / "other", **how, unet_learning_rate=1.1e-3)
    assert distances(plain, other)[1] > 0.05


def test_train_with_dora_is_the_plain_loop_with_pefts_dora(tiny_model, processed_data, tmp_path, new_precision):
    """Losses, B and how far the magnitudes have gone, after 50 steps."""
    if DEVICE.type == "cuda":
        pytest.skip("compared in half precision below")
    fast_run = run_of(tiny_model, processed_data, tmp_path, dora=True, alpha=8.0)
    plain = plain_run_of(tiny_model, processed_data, dora=True, alpha=8.0)
    losses, weights = distances(plain, fast_run)
    assert losses < 1e-4
    assert weights < 0.02
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    adapters.add_lora(unet, 4, 8.0, train.CONFIG["unet_targets"], dora=True)
    for name, start in adapters.magnitudes(unet).items():
        key = f"unet.{name}.magnitude_vector"
        moved = plain[1][key] - start.detach()
        assert (fast_run[1][key] - plain[1][key]).norm() < 0.05 * moved.norm()
    of_lora = run_of(tiny_model, processed_data, tmp_path / "lora", alpha=8.0)
    assert of_lora[1].keys() < fast_run[1].keys()


def test_the_model_computes_with_a_copy_and_the_vector_is_saved(
    tiny_model, processed_data, tmp_path, monkeypatch, new_precision
):
    """As in half precision, where the two do not share memory: the copy follows the vector."""
    if DEVICE.type == "cuda":
        pytest.skip("there it is a copy anyway")
    flatten = parameters.flatten_parameters

    def apart(weights, dtype):
        flat, working = flatten(weights, dtype)
        working = working.clone()
        parameters.set_views(weights, working)
        return flat, working

    how = dict(max_steps=6, warmup_steps=1, validate_every=2)
    shared = run_of(tiny_model, processed_data, tmp_path / "shared", **how)
    monkeypatch.setattr(parameters, "flatten_parameters", apart)
    _, weights = run_of(tiny_model, processed_data, tmp_path / "apart", **how)
    assert all(torch.equal(weights[name], weight) for name, weight in shared[1].items())
    # The losses too, those of the held-out images after an update included.
    logs = [(tmp_path / name / train.CONFIG["run_name"] / "log.jsonl").read_text() for name in ("shared", "apart")]
    assert logs[0] == logs[1]
    assert logs[0].count('"validation_loss"') == 4


def test_accumulated_gradients_are_those_of_the_larger_batch(
    tiny_model, processed_data, tmp_path, gradients_seen, new_precision
):
    """Their size too, to which AdamW is blind."""
    how = dict(max_steps=1, warmup_steps=0, mixed_precision="no")
    run_of(tiny_model, processed_data, tmp_path, gradient_accumulation_steps=3, **how)
    run_of(tiny_model, processed_data, tmp_path, batch_size=3, **how)
    assert close(*gradients_seen, 1e-4)
    assert all(gradient.norm() > 0 for gradient in gradients_seen[0])


# What the experiments change of the pass itself, each recorded and called.
VARIANTS = dict(
    dora=dict(dora=True),
    protected=dict(
        protected_prompts=str(ROOT / "prompts" / "protected_demo.txt"),
        unet_targets=("attn2.to_k", "attn2.to_v"),
        loss_guidance_scale=(1.0, 2.5),
    ),
)
HALF = dict(base_model=ROOT / "demo" / "model", rank=8, alpha=8.0)


@pytest.fixture(scope="module")
def half_runs(tmp_path_factory):
    """{name: (losses, weights)} of train.py on the miniature in fp16, and of the plain loop."""
    data = make_processed(tmp_path_factory.mktemp("data"), 8)
    folder = tmp_path_factory.mktemp("runs")
    runs = {}
    kinds = ("fast", "checkpointing", "eager", "waiting", "plain", "float32")
    for name in (*kinds, *(f"dora {kind}" for kind in kinds), "protected fast", "protected eager", "protected waiting"):
        variant, _, kind = name.rpartition(" ")
        AcceleratorState._reset_state(reset_partial_state=True)
        how = HALF | dict(data=data, gradient_checkpointing=kind == "checkpointing")
        how["model"] = how.pop("base_model")
        how |= VARIANTS.get(variant, {})
        with pytest.MonkeyPatch.context() as patch:
            if kind == "eager":
                patch.setattr(micro_step, "captured", lambda functions, *_: functions)
            if kind == "waiting":
                patch.setattr(updates, "missing_kernels", lambda device: "the GPU is asked")
            if kind in ("plain", "float32"):
                precision = "fp16" if kind == "plain" else "no"
                runs[name] = plain_run_of(**how, mixed_precision=precision)
            else:
                runs[name] = run_of(**how, folder=folder / name.replace(" ", "_"))
    AcceleratorState._reset_state(reset_partial_state=True)
    return runs


@needs_gpu
@pytest.mark.parametrize("variant", ["", "dora "])
@pytest.mark.parametrize("name", ["fast", "checkpointing"])
def test_the_fast_path_is_the_plain_loop_in_half_precision(half_runs, name, variant):
    """Over 50 steps its losses stay within half a unit of fp16's last place of the plain loop's, in
    float32 and in fp16, and its weights as near to float32's as those of the plain loop in fp16 do."""
    exact, plain, fast = (half_runs[f"{variant}{kind}"] for kind in ("float32", "plain", name))
    rounding, found, between = (distances(*pair) for pair in ((exact, plain), (exact, fast), (plain, fast)))
    print(f"apart from float32: plain {rounding}, {name} {found}; of each other {between}")
    assert max(found[0], between[0]) <= 2**-11
    assert found[1] <= 1.5 * rounding[1]
    assert between[1] <= 1.5 * rounding[1]


@needs_gpu
@pytest.mark.parametrize("variant", ["", "protected ", "dora "])
def test_the_graph_is_the_eager_loop(half_runs, variant):
    """The same function, recorded or called: the same numbers but for the order of some sums, of which 8-bit states
    make up to a twentieth of a run so short (of DoRA 5.4% on an H200)."""
    found = distances(half_runs[f"{variant}eager"], half_runs[f"{variant}fast"])
    print(f"graph apart from eager: {found}")
    assert found[0] < 2e-3
    assert found[1] < 0.1


@needs_gpu
@pytest.mark.parametrize("variant", ["", "protected ", "dora "])
def test_updates_that_do_not_ask_the_gpu_are_those_that_do(half_runs, variant):
    """bitsandbytes' AdamW and PyTorch's loss scaler after the same recorded pass: as near as that to itself."""
    found = distances(half_runs[f"{variant}waiting"], half_runs[f"{variant}fast"])
    print(f"recorded updates apart from those of bitsandbytes: {found}")
    assert found[0] < 2e-3
    assert found[1] < 0.1


def test_nan_that_is_noticed_late_is_named_rightly_and_spoils_nothing(
    processed_data, tmp_path, monkeypatch, new_precision
):
    """On a GPU steps have begun by then; the same command goes on from the checkpoint before it."""
    draw = samples.Samples.micro_batch
    how = dict(max_steps=12, log_every=100, rank=8, alpha=8.0, checkpoint_every=5)
    pictures = {}

    def poisoned(self, number):
        found, draws = draw(self, number)
        pictures[number] = found
        if number == 7:
            draws = [(latent_noise, noise * np.float32("nan"), *rest) for latent_noise, noise, *rest in draws]
        return found, draws

    model = HALF["base_model"]
    with monkeypatch.context() as patch:
        patch.setattr(samples.Samples, "micro_batch", poisoned)
        rows = dataset.read_dataset(processed_data, 64)
        with pytest.raises(UserError, match="at step 8 ") as raised:
            run_of(model, processed_data, tmp_path, **how)
    assert {rows[index].name for index in pictures[7]} == set(re.findall(r"images/\w+\.png", str(raised.value)))
    folder = files.unfinished(tmp_path / train.CONFIG["run_name"])
    tensors, state = checkpoints.latest(folder)
    assert (state["step"], state["loss_count"], state["gave_up"]) == (5, 5, True)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert {n for key, n in state["optimizer"].items() if key.endswith("step")} == {5 - state["skipped"]}
    continued = run_of(model, processed_data, tmp_path, **how)
    whole = run_of(model, processed_data, tmp_path / "whole", **how)
    assert len(continued[0]) == len(whole[0]) == 1
    assert np.allclose(continued[0], whole[0], rtol=2e-3 if DEVICE.type == "cuda" else 1e-6)


@pytest.fixture
def several_sizes(tmp_path):
    """Portraits, landscapes and squares as preprocess.py --buckets makes them."""
    (tmp_path / "data").mkdir()
    for number, size in enumerate([(120, 160)] * 4 + [(160, 120)] * 4 + [(100, 100)] * 4):
        picture(number, size).save(tmp_path / "data" / f"{number:02}.png")
    config = preprocess.CONFIG | dict(data_dir=tmp_path / "data", output_dir=tmp_path / "processed")
    preprocess.preprocess(config | dict(resolution=64, buckets=True))
    return tmp_path / "processed"


@needs_gpu
def test_graphs_of_several_sizes_are_the_eager_loop(several_sizes, tmp_path, monkeypatch):
    """A graph for each size, all in one pool of memory: the same numbers, and no second pool's worth of it."""
    found, reserved = {}, {}
    for name in ("graphs", "eager"):
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if name == "eager":
            monkeypatch.setattr(micro_step, "captured", lambda functions, *_: functions)
        found[name] = run_of(HALF["base_model"], several_sizes, tmp_path / name, rank=8, alpha=8.0, batch_size=2)
        reserved[name] = torch.cuda.max_memory_reserved() / 2**20
    AcceleratorState._reset_state(reset_partial_state=True)
    apart = distances(found["eager"], found["graphs"])
    print(f"graphs of three sizes apart from eager: {apart}; MiB reserved at most: {reserved}")
    assert apart[0] < 2e-3
    assert apart[1] < 0.05


@needs_gpu
def test_latents_encoded_together_are_those_of_each_alone_and_stay_off_the_gpu(
    several_sizes, monkeypatch, new_precision
):
    """Several at once on a GPU, in float32, differ by rounding."""
    found, folder = [], HALF["base_model"]
    for at_once in (1, latents.AT_ONCE):
        monkeypatch.setattr(latents, "AT_ONCE", at_once)
        shutil.rmtree(several_sizes / dataset.KEPT, ignore_errors=True)
        rows = dataset.read_dataset(several_sizes, 64)
        kept = setup.image_latents(folder, rows, torch.float32, Accelerator())
        assert all(part.device.type == "cpu" for i in range(len(kept)) for part in kept[i])
        assert len(kept.shapes()) == 3
        found.append(torch.cat([part.flatten() for i in range(len(kept)) for part in kept[i]]))
    assert close(found[:1], found[1:], 1e-3)


@needs_gpu
def test_what_cannot_be_recorded_is_called_and_said(processed_data, tmp_path, monkeypatch, capsys, new_precision):
    loss = micro_step.diffusion_loss

    def waits(*arguments):
        found = loss(*arguments)
        found.sum().item()  # not allowed while recording
        return found

    monkeypatch.setattr(micro_step, "diffusion_loss", waits)
    run_of(HALF["base_model"], processed_data, tmp_path, max_steps=6)
    assert "cannot be recorded as a CUDA graph" in capsys.readouterr().out


@needs_gpu
def test_channels_last_gives_the_same_models():
    expected = output_and_gradients(small_unet())
    unet = small_unet()
    assert channels_last.missing_kernels(DEVICE) is None
    channels_last.channels_last(unet)
    assert close(output_and_gradients(unet), expected, 1e-3)
    half = fused(small_unet(torch.float16))
    channels_last.channels_last(half)
    assert close(output_and_gradients(half), expected, 2e-2)
    expected = output_and_gradients(fused_dora())
    half = fused_dora(dtype=torch.float16)
    channels_last.channels_last(half)
    assert close(output_and_gradients(half), expected, 2e-2)
    expected, text_encoder = states_and_gradients(small_text_encoder()), small_text_encoder()
    channels_last.channels_last(text_encoder, training=True)
    assert close(states_and_gradients(text_encoder), expected, 1e-3)
    half = small_text_encoder(torch.float16)
    channels_last.channels_last(half, training=True)
    assert close(states_and_gradients(half), expected, 2e-2)


@needs_gpu
@pytest.mark.parametrize("times", [2, 3])
def test_drawing_by_graph_and_in_any_batch_gives_the_same_pictures(times):
    side = train.DEMO["resolution"]
    resolution = f"{side}x{side * times // 2}"  # a square, and a portrait
    pipeline = generation.load_pipeline(ROOT / "demo" / "model", torch.float16, "cuda")
    jobs = [("a red leather jacket", seed) for seed in range(8)]
    how = dict(steps=8, guidance_scale=6.0, resolution=resolution, title="")
    plain = [generation.generate(pipeline, jobs, batch_size=size, **how) for size in (1, 8)]
    generation.capture_unet(pipeline, 8, generation.latent_size(pipeline, resolution), True)
    recorded = generation.generate(pipeline, jobs, batch_size=8, **how)
    base, batched, graph = (np.stack([np.asarray(i, np.float32) for i in images]) for images in (*plain, recorded))
    assert np.abs(batched - base).mean() < 1
    assert np.abs(graph - batched).mean() < 0.5
    assert np.abs(base[0] - base[1]).mean() > 5


def test_how_many_pictures_are_drawn_at_once(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert generation.choose_batch_size(40, 0, 512, cpu) == 4
    assert generation.choose_batch_size(40, 7, 512, cpu) == 7
    assert generation.choose_batch_size(11, 8, 512, cpu) == 6  # two batches, evened out
    for free, resolution, expected in (
        (0.5, 512, 1),
        (3.0, 512, 7),
        (5.0, 512, 8),
        (5.0, 1024, 4),
        (70.0, 512, 8),
        (70.0, 1024, 8),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * 2**30, 80 * 2**30))
        assert generation.choose_batch_size(40 if expected != 7 else 42, 0, resolution, gpu) == expected


def test_a_recorded_unet_draws_the_same_pictures(tiny_model, monkeypatch):
    """Also a last batch that is smaller, and what it was not recorded for. (Without a GPU the same
    function is called instead of a graph.)"""
    pipeline = generation.load_pipeline(tiny_model, torch.float32, "cpu")
    jobs = [(prompt, seed) for prompt in ("a raincoat", "a cat") for seed in (1, 2, 3)]
    how = dict(steps=3, resolution=64, batch_size=4, title="")
    expected = generation.generate(pipeline, jobs, guidance_scale=6.0, **how)
    before = generation.probe(pipeline)
    calls, made = [], []

    def counted(functions, device):
        texts, prediction = functions
        return [lambda: made.append(1) or texts(), lambda: calls.append(1) or prediction()]

    monkeypatch.setattr(generation, "captured", counted)
    generation.capture_unet(pipeline, 4, (8, 8), True)
    found = generation.generate(pipeline, jobs, guidance_scale=6.0, **how)
    assert len(calls) == 2 * 4  # two batches, each of a call more than steps
    assert len(made) == 2  # keys and values, once a batch
    for a, b in zip(expected, found, strict=True):
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 1
    generation.generate(pipeline, jobs[:5], guidance_scale=6.0, **how | dict(batch_size=5))  # too many
    after = generation.probe(pipeline)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(calls) == 8


@torch.no_grad()
def test_a_cpu_draws_the_same_in_other_forms():
    """GEGLU as two products, upsampling inside its convolution: of maps that are not square, in both layouts; what it
    is not for goes the old way."""
    unet, vae = small_unet(adapted=False).cpu(), tiny_vae().eval()
    x, text = torch.randn(2, 4, 8, 12), torch.randn(2, 7, 32)
    odd = torch.randn(2, 4, 6, 9)  # which upsampling has to be told
    z = torch.randn(1, vae.config.latent_channels, 4, 6)
    calls = [lambda: unet(x, 5, text).sample, lambda: unet(odd, 5, text).sample, lambda: vae.decode(z).sample]
    upsamplers = [m for model in (unet, vae) for m in model.modules() if isinstance(m, Upsample2D)]
    assert len(upsamplers) > 1
    upsamplers[0].conv.bias.normal_()
    plain = [call() for call in calls]
    shapes = []
    for module in upsamplers:
        module.conv.register_forward_hook(lambda m, i, out: shapes.append(out.shape))
    for model in (unet, vae):
        on_cpu.use_cpu_forms(model)
    for layout in (torch.contiguous_format, torch.channels_last):
        unet.to(memory_format=layout), vae.to(memory_format=layout)
        for call, expected in zip(calls, plain, strict=True):
            assert_close(call(), expected)
    assert len(shapes) == 2 and shapes[0][2:] == (6, 9)  # in each layout that of the odd size alone
    before = upsamplers[0].conv
    upsamplers[0].conv = torch.nn.Conv2d(64, 64, 5, padding=2)
    del upsamplers[0].forward
    on_cpu.use_cpu_forms(unet)
    assert "forward" not in vars(upsamplers[0]) and before.kernel_size == (3, 3)


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_triton)])
def test_what_guidance_computes_twice_is_computed_once(kernels, monkeypatch):
    """The first residual block, and the first attention to the image, of which there are two."""
    unet = small_unet(layers_per_block=2, adapted=False)
    fused_projections.join(unet, DEVICE)
    if kernels:
        channels_last.rebuild(unet)
        monkeypatch.setattr(layer_norm_geglu.SumNorm, "apply", plain_sum_norm)
        monkeypatch.setattr(group_norm.GroupNormSilu, "apply", plain_group_norm)
        monkeypatch.setattr(layer_norm_geglu.Geglu, "apply", lambda x: F.gelu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0])
        monkeypatch.setattr(
            conv_epilogues.SumBias, "apply", lambda x, y, bias: x + bias[:, None, None] + (0 if y is None else y)
        )
    first, second = (unet.down_blocks[0].attentions[number].transformer_blocks[0].attn1 for number in (0, 1))
    seen = []
    for attention_to_picture in (first, second):
        attention_to_picture.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    torch.manual_seed(1)
    sample, text = torch.randn(3, 4, 16, 16, device=DEVICE), torch.randn(6, 77, 32, device=DEVICE)
    inputs = torch.cat([sample, sample]), torch.tensor(500, device=DEVICE), text
    with torch.no_grad():
        expected = unet(*inputs).sample
        with guided.shared_start(unet):
            found = unet(*inputs).sample
        again = unet(*inputs).sample
    assert_close(found, expected, 1e-5)
    assert torch.equal(again, expected)
    assert seen == [6, 6, 3, 6, 6, 6]


def test_a_unet_that_begins_in_another_way_computes_both_halves():
    unet = small_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        adapted=False,
    )
    sample, text = torch.randn(2, 4, 16, 16, device=DEVICE), torch.randn(4, 77, 32, device=DEVICE)
    inputs = torch.cat([sample, sample]), torch.tensor(500, device=DEVICE), text
    with torch.no_grad(), guided.shared_start(unet):
        found = unet(*inputs).sample
    with torch.no_grad():
        assert torch.equal(found, unet(*inputs).sample)


def test_a_prompt_is_encoded_once_for_all_its_pictures(tiny_model):
    pipeline = generation.load_pipeline(tiny_model, torch.float32, "cpu")
    encoded = []
    pipeline.text_encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    jobs = [(prompt, seed) for prompt in ("a raincoat", "a cat") for seed in (1, 2, 3)]
    generation.generate(pipeline, jobs, steps=1, resolution=64, batch_size=3, guidance_scale=6.0, title="")
    assert encoded == [2, 2]  # the prompts, and nothing in their place


def test_a_gradient_that_a_pass_gives_twice_or_not_at_all_is_an_error():
    unet = small_unet(adapted=False)
    part = parameters.add_lora_parameters(unet, 4, 4.0, ("to_q", "to_v"), 1e-3, DEVICE, torch.float32)
    part.flat.grad = torch.zeros_like(part.flat)
    part.refresh()
    expected = None
    for times in (1, 2, 0):
        part.expect_gradients()
        loss = sum(output_of(unet)[0].square().sum() for _ in range(times))
        found = torch.autograd.grad(loss, part.leaves, allow_unused=True) if times else []
        if times != 1:
            with pytest.raises(RuntimeError, match="one gradient"):
                part.add_gradients(found, replace=False)
            assert torch.equal(part.flat.grad, expected)
            continue
        part.add_gradients(found, replace=False)
        expected = part.flat.grad.clone()
        assert expected.count_nonzero() > 0


@needs_gpu
def test_memsets_of_a_graph_become_kernels(capsys, monkeypatch):
    """Also one behind the other, and of other values and widths."""
    from cuda.bindings import driver

    memory = torch.arange(4096, dtype=torch.int32, device=DEVICE)
    query, key, value = (
        torch.randn(1, 4, 512, 64, device=DEVICE, dtype=torch.float16, requires_grad=True) for _ in range(3)
    )

    def work():
        stream, address = torch.cuda.current_stream().cuda_stream, memory.data_ptr()
        for setting in (
            (driver.cuMemsetD32Async, address, 0xFFFFFFF0, 1000),
            (driver.cuMemsetD8Async, address + 4000, 255, 13),
            (driver.cuMemsetD16Async, address + 400, 0x8001, 21),
        ):
            assert setting[0](*setting[1:], stream)[0] == driver.CUresult.CUDA_SUCCESS
        out = F.scaled_dot_product_attention(query, key, value)  # cuDNN's, which sets memory for its backward pass
        return [memory * 2, *torch.autograd.grad(out.square().sum(), (query, key, value))]

    replaced, replace = [], graphs.memsets_as_kernels
    monkeypatch.setattr(graphs, "memsets_as_kernels", lambda *given: replaced.append(replace(*given)))
    memory.copy_(torch.arange(4096, device=DEVICE))
    expected = [tensor.clone() for tensor in work()]
    (replay,) = graphs.captured([work], DEVICE)
    for _ in range(3):
        memory.copy_(torch.arange(4096, device=DEVICE))
        doubled, *gradients = replay()
        assert torch.equal(doubled, expected[0])
        assert close(gradients, expected[1:], 1e-2)
    assert replaced[0] > 3 and not capsys.readouterr().out
    monkeypatch.setattr(graphs, "memsets_as_kernels", lambda *given: 1 / 0)
    (replay,) = graphs.captured([work], DEVICE)
    assert close(replay()[1:], expected[1:], 1e-2)
    assert "memsets in CUDA graphs stay" in capsys.readouterr().out


def plain_sum_norm(x, y, weight, bias, eps):
    total = x if y is None else x + y
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def plain_group_norm(x, shift, weight, bias, groups, eps, silu):
    shifted = x if shift is None else x + shift[..., None, None]
    norm = F.group_norm(shifted, groups, weight, bias, eps)
    return x, F.silu(norm) if silu else norm


def test_joined_models_draw_the_same_pictures_with_and_without_an_adapter(tiny_model, tmp_path, monkeypatch):
    """An adapter is put into the same weights."""
    torch.manual_seed(0)
    models = {
        "unet": UNet2DConditionModel.from_pretrained(tiny_model / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_model / "text_encoder"),
    }
    targets = {name: train.CONFIG[f"{name}_targets"] for name in models}
    for name, model in models.items():
        adapters.add_lora(model, 4, 4.0, targets[name])
        for _, b in adapters.factors(model).values():
            torch.nn.init.normal_(b.data, std=0.3)
    adapter_files.save_adapter(tmp_path, models, 4, 4.0, targets, {})
    adapter, found = adapter_files.read_adapter(tmp_path), {}
    how = dict(steps=3, resolution=64, batch_size=2, guidance_scale=6.0, title="")
    for is_joined in (False, True):
        with monkeypatch.context() as patched:
            if not is_joined:
                patched.setattr(generation, "join", lambda model, device: [])
            pipeline = generation.load_pipeline(tiny_model, torch.float32, "cpu")
        assert hasattr(pipeline.unet, "texts") == is_joined
        applied = adapters.Applied(adapter, generation.models_of(pipeline))
        for scale in (1, 0):
            applied.set_scale(scale)
            images = generation.generate(pipeline, [("a raincoat", 1), ("a cat", 2)], **how)
            found[is_joined, scale] = np.stack([np.asarray(image, np.int16) for image in images])
    for scale in (1, 0):
        assert np.abs(found[True, scale] - found[False, scale]).max() <= 1
    assert np.abs(found[True, 1] - found[True, 0]).mean() > 1
