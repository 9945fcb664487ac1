"""Small models with adapters for the tests of the kernels, and whole runs of train.py and of the plain loop."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_RUN
from diffusers import UNet2DConditionModel
from plain_loop import plain_loop
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel

import train
from lib import adapter_files, adapters
from lib.kernels import fused_projections, group_norm, lora
from lib.training import parameters

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_triton = pytest.mark.skipif(group_norm.triton is None, reason="this build of torch has no Triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The comparisons are in float32; a convolution on a GPU would round it to 11 bits.
torch.backends.cudnn.allow_tf32 = False


class AttentionCalls(TorchFunctionMode):
    """Notes every attention computed: the layout of its inputs, and whether with gradients."""

    def __init__(self):
        super().__init__()
        self.calls = set()

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is F.scaled_dot_product_attention:
            inputs = tuple((tuple(x.shape), x.stride(), x.dtype) for x in arguments[:3])
            gradients = torch.is_grad_enabled() and arguments[0].requires_grad
            self.calls.add((inputs, str(arguments[3:]), str(named), gradients))
        return function(*arguments, **(named or {}))


def _perturb_norms(model):
    """Layer norms start with weights of 1 and biases of 0."""
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
    _perturb_norms(unet)
    if not adapted:
        return unet.to(DEVICE, dtype).eval()
    adapters.add_lora(unet, rank, 8.0, targets, dora)
    for _, b in adapters.factors(unet).values():
        torch.nn.init.normal_(b.data, std=0.1)
    for magnitude in adapters.magnitudes(unet).values():
        magnitude.data *= 1 + 0.2 * torch.rand(magnitude.shape)
    return unet.to(DEVICE, dtype).eval()


def output_of(unet, side=16):
    """(the output for fixed noise [2, 4, side, side], two timesteps and a text, the text)"""
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
    config = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
    config |= dict(eos_token_id=98, bos_token_id=97, pad_token_id=98)
    text_encoder = CLIPTextModel(CLIPTextConfig(**config | changes))
    text_encoder.requires_grad_(False)
    _perturb_norms(text_encoder)
    adapters.add_lora(text_encoder, 4, 8.0, ("q_proj", "v_proj"))
    for _, b in adapters.factors(text_encoder).values():
        torch.nn.init.normal_(b.data, std=0.1)
    return text_encoder.to(DEVICE, dtype).eval()


def states_and_gradients(text_encoder):
    """Hidden states [2, 11, 32], and the gradient of each LoRA weight."""
    ids = torch.arange(22, device=DEVICE).view(2, 11)
    states = text_encoder(ids)[0]
    return [states.detach(), *gradients(states.float()[..., ::3].square().sum(), text_encoder)]


def gradients(loss, model, *others):
    """Those of `others`, then of each of PEFT's parameters in its own order, whether `model` is `fused` or not."""
    weights = adapters.trained_weights(model)
    grads = torch.autograd.grad(loss, [*others, *getattr(model, "leaves", weights)])
    flat = torch.cat([grad.flatten() for grad in grads[len(others) :]])
    in_order = lora.trained_weights(model.fused_layers) if hasattr(model, "leaves") else weights
    parts = flat.split([weight.numel() for weight in in_order])
    of = {id(weight): part for weight, part in zip(in_order, parts, strict=True)}
    return [*grads[: len(others)], *(of[id(weight)].view(weight.shape) for weight in weights)]


def fused(model):
    """`model` as it is trained: its projections and its LoRA or DoRA layers fused."""
    is_dora = bool(adapters.magnitudes(model))
    layers = lora.fuse_lora(model, fused_projections.fuse_projections(model, DEVICE, is_dora), DEVICE)
    model.factors = lora.DoraFactors(layers) if is_dora else None
    _, working = parameters.flatten_parameters(lora.trained_weights(layers), model.dtype)
    model.leaves, model.copies = lora.bind(layers, working)
    return model


def fused_dora(**how):
    """small_unet with DoRA, fused."""
    unet = fused(small_unet(dora=True, **how))
    magnitudes = [m for layer in unet.fused_layers for m in layer.magnitudes()]
    unet.factors.refresh(torch.cat([m.detach().float() for m in magnitudes]))
    return unet


def close(found, expected, tolerance):
    """Whether each tensor differs by less than `tolerance` of its own norm."""
    return all(
        (f.float() - e.float()).norm() <= tolerance * e.float().norm() for f, e in zip(found, expected, strict=True)
    )


# ---- whole runs ----------------------------------------------------------------------------

STEPS = 50


def run_of(model, data, folder, **changes):
    """(losses, weights) of a run of train.py."""
    config = train.CONFIG | TINY_RUN | dict(base_model=str(model), data_dir=str(data), output_dir=str(folder))
    config |= dict(max_steps=STEPS, log_every=1, warmup_steps=5, validate_every=1000, gradient_checkpointing=False)
    config |= changes
    train.train(config)
    folder = folder / config["run_name"]
    rows = [json.loads(line) for line in (folder / "log.jsonl").open()]
    weights = load_file(folder / adapter_files.WEIGHTS)
    weights = {
        k.replace(".lora_", ".").removesuffix(".weight").replace("text_model.", ""): w for k, w in weights.items()
    }
    return [row["loss"] for row in rows if "loss" in row], weights


def one_vector(model, config):
    """The trainable parameters of `model` as one vector in train.py's order, of which they and their gradients are views:
    the blocks of an 8-bit state, and so its rounding, depend on where tensors begin."""
    copied = copy.deepcopy(model)
    layers = lora.fuse_lora(copied, fused_projections.fuse_projections(copied, "cpu", config["dora"]), "cpu")
    names = {id(weight): name for name, weight in copied.named_parameters()}
    weights = dict(model.named_parameters())
    weights = [weights[names[id(weight)]] for weight in lora.trained_weights(layers)]
    vector = torch.nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights]))
    vector.grad = torch.zeros_like(vector)
    sizes = [weight.numel() for weight in weights]
    for weight, data, grad in zip(weights, vector.data.split(sizes), vector.grad.split(sizes), strict=True):
        weight.data, weight.grad = data.view_as(weight), grad.view_as(weight)
    return [vector]


def plain_run_of(model, data, projections=None, **changes):
    """The same by the plain loop."""
    config = train.CONFIG | TINY_RUN | dict(base_model=str(model), data_dir=str(data))
    config |= dict(max_steps=STEPS, warmup_steps=5, gradient_checkpointing=False) | changes
    losses, weights, _ = plain_loop(config, one_vector, projections)
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
