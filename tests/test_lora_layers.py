"""Fused LoRA and DoRA layers and fused projections against PEFT's layers."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from diffusers import UNet2DConditionModel
from kernel_models import DEVICE, close, fused, fused_dora, output_and_gradients, output_of, small_unet

from lib import adapters
from lib.kernels import fused_projections, lora
from lib.training import micro_step, parameters, setup


def test_fused_lora_gives_pefts_outputs_and_gradients():
    expected = output_and_gradients(small_unet())
    found = output_and_gradients(fused(small_unet()))
    assert close(found, expected, 1e-4)
    assert all(gradient.abs().sum() > 0 for gradient in found)


def test_cross_attention_in_query_chunks_is_the_same(monkeypatch):
    """A GPU splits the queries so when it trains."""
    expected = output_and_gradients(fused(small_unet()))
    seen = []
    monkeypatch.setattr(fused_projections, "_query_chunks", lambda query: seen.append(query.shape) or 4)
    assert close(output_and_gradients(fused(small_unet())), expected, 1e-4)
    assert len(seen) == 4  # transformers


def test_a_models_weights_are_views_of_the_fused_matrices():
    """So a weight changed in place, as when an adapter is merged, takes effect."""
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
    # Self-attentions, cross-attentions, timestep.
    assert len([layer for layer in unet.fused_layers if len(layer.layers) > 1]) == 4 + 1 + 1


@pytest.mark.parametrize("rank", [3, 4, 20])
def test_outputs_are_aligned_for_attention_kernels(rank, monkeypatch):
    """To 16 bytes in half precision, at any rank, although they are columns of wider rows."""
    seen, attend = [], F.scaled_dot_product_attention

    def attended(*inputs, **how):
        # The strides of images and rows; the heads of so small a UNet are too narrow.
        seen.extend((x.storage_offset(), x.stride(0), x.stride(2)) for x in inputs)
        return attend(*inputs, **how)

    expected = output_and_gradients(small_unet(rank=rank))
    monkeypatch.setattr(F, "scaled_dot_product_attention", attended)
    unet = fused(small_unet(rank=rank))
    assert close(output_and_gradients(unet), expected, 1e-4)
    assert seen
    assert all(place % 8 == 0 for places in seen for place in places), seen
    adapted = [layer for layer in unet.fused_layers if layer.adapted]
    assert adapted
    assert not any(layer.matrix[len(layer.weight) + len(layer.a) :].any() for layer in adapted)


@pytest.mark.parametrize(("sizes", "kept"), [(4, {2, 3}), (3, {2}), (2, {1}), (1, set())], ids=str)
def test_only_large_feature_maps_are_recomputed(sizes, kept):
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
def test_layers_with_and_without_an_adapter_are_fused(dora):
    """As CLIP's keys are by default; with DoRA such layers stay apart."""
    how = dict(targets=("to_q", "to_v"), dora=dora)
    expected = output_and_gradients(small_unet(**how))
    unet = fused_dora(targets=how["targets"]) if dora else fused(small_unet(**how))
    for one, other in zip(output_and_gradients(unet), expected, strict=True):
        assert_close(one, other, 1e-3)
    mixed = [layer for layer in unet.fused_layers if 0 < len(layer.adapted) < len(layer.layers)]
    assert bool(mixed) != dora


@pytest.mark.parametrize("targets", [("to_q", "to_k", "to_v", "to_out.0"), ("time_emb_proj", "to_q")])
def test_fused_dora_gives_pefts_outputs_and_gradients(targets):
    """For A, B and the magnitudes, with biases and without, for layers of one shape and of several."""
    expected = output_and_gradients(small_unet(dora=True, targets=targets))
    unet = fused_dora(targets=targets)
    found = output_and_gradients(unet)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-3)
    assert all(gradient.abs().sum() > 0 for gradient in found)
    # Magnitudes and directions both matter here: it is not LoRA's output.
    assert not close(found[:1], output_and_gradients(small_unet(targets=targets))[:1], 0.01)


def test_doras_norms_are_those_of_the_whole_product():
    """Also where B A nearly cancels the weight: the square is then a small difference."""
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
        for layers in unet.fused_layers
        for layer in layers.adapted
    ]
    assert_close(1 / factors.factors, torch.cat(expected))
    assert_close(factors.inverse_norms, factors.factors)


def predicted(unet, states):
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    return unet(noisy, torch.tensor([300], device=DEVICE), states).sample


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_without_lora_the_model_is_the_base_model(kind):
    """Only inside the `with`, also if an error ends it."""
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
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    unet = fused(small_unet()) if kind == "lora" else fused_dora()
    expected = output_and_gradients(unet)
    calls = []

    def counted(module, *inputs):
        calls.append(module)
        return micro_step.recomputed(module, *inputs)

    unet.enable_gradient_checkpointing(counted)
    # A GPU sums some gradients in any order.
    assert close(output_and_gradients(unet), expected, 1e-5 if DEVICE.type == "cuda" else 0)
    assert calls


def test_a_gradient_computed_twice_or_not_at_all_is_an_error():
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
                part.add_gradients(found, overwrite=False)
            assert torch.equal(part.flat.grad, expected)
            continue
        part.add_gradients(found, overwrite=False)
        expected = part.flat.grad.clone()
        assert expected.count_nonzero() > 0
