"""The Triton kernels against plain PyTorch. Run by test_triton_kernels.py in a process of its own: on the GPU, or without
one in Triton's interpreter, which is slow and must be chosen before the kernels are imported."""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from conftest import assert_close, tiny_vae
from kernel_models import (
    DEVICE,
    close,
    fused,
    output_and_gradients,
    small_text_encoder,
    small_unet,
    states_and_gradients,
)

from lib.kernels import adamw8bit, channels_last, conv_epilogues, group_norm, layer_norm_geglu, transformer_blocks
from lib.training.micro_step import recomputed


def normal(*shape):
    return torch.randn(*shape, device=DEVICE)


def check_group_norm():
    for shape, groups, silu in [
        ((1, 80, 8, 8), 8, True),
        ((2, 32, 5, 7), 16, False),
        ((2, 120, 3, 3), 4, True),
        ((1, 40, 25, 42), 4, True),
        ((2, 32, 300, 1), 8, False),
        ((1, 16, 33, 32), 2, True),
    ]:
        x = (normal(*shape) + 100).requires_grad_()
        weight, bias = normal(2, shape[1])
        shifts = None, normal(shape[0], 2 * shape[1])[:, shape[1] :]
        for shift, group_norm.WHOLE in itertools.product(shifts, (0, 2**14)):  # by two kernels, and by one
            same, found = group_norm.GroupNormSilu.apply(x, shift, weight, bias, groups, 1e-5, silu)
            assert torch.equal(same, x)
            shifted = x if shift is None else x + shift[..., None, None]
            expected = F.group_norm(shifted, groups, weight, bias, 1e-5)
            expected = F.silu(expected) if silu else expected
            assert_close(found, expected)
            grads = normal(2, *shape)
            assert_close(*(torch.autograd.grad(y, x, grads[0], retain_graph=True)[0] for y in (found, expected)))
            assert_close(*(torch.autograd.grad(pair, x, [*grads])[0] for pair in ((same, found), (x * 1, expected))))


def check_activations():
    x = (2 * normal(3, 7, 66)).requires_grad_()[..., :50]  # columns of wider rows
    value, gate = x.chunk(2, dim=-1)
    for found, expected in (
        (layer_norm_geglu.Geglu.apply(x), value * F.gelu(gate)),
        (layer_norm_geglu.QuickGelu.apply(x), x * torch.sigmoid(1.702 * x)),
    ):
        assert_close(found, expected, 1e-5)
        grad = torch.randn_like(found)
        assert_close(*(torch.autograd.grad(y, x, grad, retain_graph=True)[0] for y in (found, expected)), 1e-5)


def check_conv_epilogues():
    pixel = normal(1, 8, 1, 1).as_strided((1, 8, 1, 1), (8, 1, 1, 1))  # with the strides of a convolution's output
    assert torch.equal(conv_epilogues.ConcatChannels.apply(pixel, pixel), torch.cat([pixel, pixel], 1))
    assert torch.equal(conv_epilogues.UpsampleNearest2x.apply(pixel), pixel.expand(1, 8, 2, 2))
    for shape in ((2, 8, 5, 6), (1, 70, 7, 3), (1, 6, 40, 1)):
        x, y = normal(2, *shape).requires_grad_()
        bias, grad = normal(shape[1]), normal(*shape[:2], 2 * shape[2], 2 * shape[3])
        for added in (None, y):
            found = conv_epilogues.AddBias.apply(x, added, bias)
            assert_close(found, x + bias[:, None, None] + (0 if added is None else y), 1e-6)
            inputs = [x] if added is None else [x, y]
            for one in torch.autograd.grad(found, inputs, grad[..., ::2, ::2]):
                assert torch.equal(one, grad[..., ::2, ::2])
        for one, other in ((x, y), (x, y[:, :3])):  # channels of 16 bytes, and others
            assert torch.equal(conv_epilogues.ConcatChannels.apply(one, other), torch.cat([one, other], 1))
        found, expected = conv_epilogues.UpsampleNearest2x.apply(x), F.interpolate(x, scale_factor=2.0, mode="nearest")
        assert torch.equal(found, expected) and found.is_contiguous(memory_format=torch.channels_last)
        assert_close(*(torch.autograd.grad(twice, x, grad)[0] for twice in (found, expected)), 1e-6)


def check_add_layer_norm():
    shapes, dtypes = ((3, 5, 40), (2, 320), (3, 1280), (1, 5, 768)), (torch.float32, torch.float16)
    for shape, dtype, add in itertools.product(shapes, dtypes, (True, False)):
        # So large that it matters that the norm is taken of the rounded sum.
        x, y = (normal(2, *shape) + 100).to(dtype)
        weight, bias = normal(2, shape[-1]).to(dtype)
        x.requires_grad_()
        y.requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            found = layer_norm_geglu.AddLayerNorm.apply(x, y if add else None, weight, bias, 1e-5)
        assert sorted(t.numel() for t in saved) == sorted((x.numel(), len(weight), 2 * x[..., 0].numel()))
        assert any(t.data_ptr() == found[0].data_ptr() for t in saved)  # the sum, which exists anyway
        total = x + y if add else x * 1
        # In float32, as on a GPU; a CPU keeps mean and deviation in half precision.
        normed = F.layer_norm(total.float(), shape[-1:], weight.float(), bias.float())
        expected = total, normed.to(dtype)
        assert torch.equal(found[0], expected[0])
        tolerance = 1e-4 if dtype == torch.float32 else 2e-3
        assert_close(found[1], expected[1], tolerance)
        grads = [*normal(2, *shape).to(dtype)]
        both = [torch.autograd.grad(pair, (x, y) if add else (x,), grads) for pair in (found, expected)]
        for pair in zip(*both, strict=True):
            assert_close(*pair, tolerance)


def check_text_encoder():
    expected, text_encoder = states_and_gradients(small_text_encoder()), small_text_encoder()
    channels_last.rebuild(text_encoder)
    assert len([m for m in text_encoder.modules() if "forward" in vars(m)]) == 2 * 3  # layers, activations
    assert close(states_and_gradients(text_encoder), expected, 1e-4)


def check_unets():
    for how in (
        {},
        dict(targets=("time_emb_proj", "to_q")),
        dict(resnet_time_scale_shift="scale_shift"),
        dict(use_linear_projection=True),
    ):
        how |= dict(groups=2)  # the interpreter goes through them one after another
        expected = output_and_gradients(small_unet(**how), side=4)
        unet, as_trained = small_unet(**how), fused(small_unet(**how))
        for model in (unet, as_trained):
            channels_last.rebuild(model)
            assert close(output_and_gradients(model, side=4), expected, 1e-4), how
        blocks = [m for m in as_trained.modules() if type(m).__name__ == "ResnetBlock2D"]
        whole = {getattr(vars(block).get("forward"), "func", None) is channels_last._block_forward for block in blocks}
        assert whole == {"resnet_time_scale_shift" not in how}
        layers = [m for m in unet.modules() if isinstance(m, torch.nn.GroupNorm)]
        assert layers and all("forward" in vars(layer) for layer in layers)
        assert list(unet.state_dict()) and not any("time_emb_proj.1" in name for name in unet.state_dict())
        transformers = transformer_blocks.plain_modules(unet)
        assert transformers and all("forward" in vars(block) for block in transformers)
    expected = output_and_gradients(unet, side=4)
    unet.enable_gradient_checkpointing(recomputed)
    assert close(output_and_gradients(unet, side=4), expected, 1e-5)


def check_vae():
    vae, latents = tiny_vae().requires_grad_(False), normal(1, 4, 4, 4)
    for weight in vae.to(DEVICE).parameters():
        weight += 0.1 * torch.randn_like(weight) if weight.ndim == 1 else 0  # biases start as zeros
    expected = vae.decode(latents).sample
    channels_last.rebuild(vae)
    assert_close(vae.decode(latents).sample, expected, 1e-4)
    assert not [m for m in vae.decoder.modules() if isinstance(m, torch.nn.SiLU)]  # they are in the norms' kernels


def check_missing_kernels():
    assert adamw8bit.agrees(DEVICE)
    assert channels_last.missing_kernels(DEVICE) is None


CHECKS = [
    check_group_norm,
    check_activations,
    check_conv_epilogues,
    check_add_layer_norm,
    check_text_encoder,
    check_unets,
    check_vae,
    check_missing_kernels,
]

if __name__ == "__main__":
    if DEVICE.type == "cpu":
        group_norm.PARTS = (2**10, 2, 4), (2**14, 4, 8)
    for check in CHECKS:
        torch.manual_seed(0)
        check()
    print("all equal")
