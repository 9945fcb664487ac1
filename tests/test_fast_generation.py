"""Faster generation gives the same images: fused projections, CUDA graphs, batches, a CPU's forms, shared guidance."""

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_close, tiny_vae
from diffusers import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from kernel_models import DEVICE, needs_gpu, needs_triton, small_unet
from test_triton_kernels import PLAIN
from transformers import CLIPTextModel

import train
from lib import adapter_files, adapters
from lib.evaluation import generation
from lib.kernels import channels_last, cpu, fused_projections, transformer_blocks


@needs_gpu
@pytest.mark.parametrize("times", [2, 3])
def test_graphs_and_batches_generate_the_same_images(times):
    side = train.DEMO["resolution"]
    resolution = f"{side}x{side * times // 2}"  # a square, and a portrait
    pipeline = generation.load_pipeline(ROOT / "demo" / "model", torch.float16, "cuda")
    jobs = [("a red leather jacket", seed) for seed in range(8)]
    how = dict(steps=8, guidance_scale=6.0, resolution=resolution, title="")
    single, batched = (generation.generate(pipeline, jobs, batch_size=size, **how) for size in (1, 8))
    generation.record_unet(pipeline, 8, generation.latent_size(pipeline, resolution), True)
    graph = generation.generate(pipeline, jobs, batch_size=8, **how)
    base, batched, graph = (
        np.stack([np.asarray(i, np.float32) for i in images]) for images in (single, batched, graph)
    )
    assert np.abs(batched - base).mean() < 1
    assert np.abs(graph - batched).mean() < 0.5
    assert np.abs(base[0] - base[1]).mean() > 5


def test_the_batch_size_of_generation(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert generation.images_at_once(40, 0, 512, cpu) == 4
    assert generation.images_at_once(40, 7, 512, cpu) == 7
    assert generation.images_at_once(11, 8, 512, cpu) == 6  # two batches, evened out
    for free, resolution, expected in (
        (0.5, 512, 1),
        (3.0, 512, 7),
        (5.0, 512, 8),
        (5.0, 1024, 4),
        (70.0, 512, 8),
        (70.0, 1024, 8),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * 2**30, 80 * 2**30))
        assert generation.images_at_once(40 if expected != 7 else 42, 0, resolution, gpu) == expected


def test_a_captured_unet_generates_the_same_images(tiny_model, monkeypatch):
    """Also in a smaller last batch, and in calls that the graph does not fit. (Without a GPU the same function is called
    in place of a graph.)"""
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
    generation.record_unet(pipeline, 4, (8, 8), True)
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
def test_a_cpus_forms_give_the_same():
    """GEGLU as two products, upsampling inside its convolution: for feature maps that are not square, in both layouts.
    Other upsamplers stay as they are."""
    unet, vae = small_unet(adapted=False).cpu(), tiny_vae().eval()
    x, text = torch.randn(2, 4, 8, 12), torch.randn(2, 7, 32)
    odd = torch.randn(2, 4, 6, 9)  # whose size upsampling must know
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
        cpu.use_cpu_forms(model)
    for layout in (torch.contiguous_format, torch.channels_last):
        unet.to(memory_format=layout), vae.to(memory_format=layout)
        for call, expected in zip(calls, plain, strict=True):
            assert_close(call(), expected)
    assert len(shapes) == 2 and shapes[0][2:] == (6, 9)  # in each layout only that of the odd size
    before = upsamplers[0].conv
    upsamplers[0].conv = torch.nn.Conv2d(64, 64, 5, padding=2)
    del upsamplers[0].forward
    cpu.use_cpu_forms(unet)
    assert "forward" not in vars(upsamplers[0]) and before.kernel_size == (3, 3)


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_triton)])
def test_the_start_of_both_halves_of_guidance_is_computed_once(kernels, monkeypatch):
    """The first residual block, and the first of two self-attentions."""
    unet = small_unet(layers_per_block=2, adapted=False)
    fused_projections.fuse_projections(unet, DEVICE)
    if kernels:
        channels_last.rebuild(unet)
        for function, plain in PLAIN.items():
            monkeypatch.setattr(function, "apply", plain)
    first, second = (unet.down_blocks[0].attentions[number].transformer_blocks[0].attn1 for number in (0, 1))
    seen = []
    for attention in (first, second):
        attention.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    torch.manual_seed(1)
    sample, text = torch.randn(3, 4, 16, 16, device=DEVICE), torch.randn(6, 77, 32, device=DEVICE)
    inputs = torch.cat([sample, sample]), torch.tensor(500, device=DEVICE), text
    with torch.no_grad():
        expected = unet(*inputs).sample
        with transformer_blocks.shared_start(unet):
            found = unet(*inputs).sample
        again = unet(*inputs).sample
    assert_close(found, expected, 1e-5)
    assert torch.equal(again, expected)
    assert seen == [6, 6, 3, 6, 6, 6]


def test_a_unet_that_starts_differently_computes_both_halves():
    unet = small_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        adapted=False,
    )
    sample, text = torch.randn(2, 4, 16, 16, device=DEVICE), torch.randn(4, 77, 32, device=DEVICE)
    inputs = torch.cat([sample, sample]), torch.tensor(500, device=DEVICE), text
    with torch.no_grad(), transformer_blocks.shared_start(unet):
        found = unet(*inputs).sample
    with torch.no_grad():
        assert torch.equal(found, unet(*inputs).sample)


def test_a_prompt_is_encoded_once_for_all_its_images(tiny_model):
    pipeline = generation.load_pipeline(tiny_model, torch.float32, "cpu")
    encoded = []
    pipeline.text_encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    jobs = [(prompt, seed) for prompt in ("a raincoat", "a cat") for seed in (1, 2, 3)]
    generation.generate(pipeline, jobs, steps=1, resolution=64, batch_size=3, guidance_scale=6.0, title="")
    assert encoded == [2, 2]  # the prompts, and nothing in their place


def test_fused_models_generate_the_same_images_with_and_without_an_adapter(tiny_model, tmp_path, monkeypatch):
    """An adapter is merged into the same weights."""
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
    for is_fused in (False, True):
        with monkeypatch.context() as patched:
            if not is_fused:
                patched.setattr(generation, "fuse_projections", lambda model, device: [])
            pipeline = generation.load_pipeline(tiny_model, torch.float32, "cpu")
        assert hasattr(pipeline.unet, "text_keys_values") == is_fused
        applied = adapters.Applied(adapter, generation.models_of(pipeline))
        for scale in (1, 0):
            applied.set_scale(scale)
            images = generation.generate(pipeline, [("a raincoat", 1), ("a cat", 2)], **how)
            found[is_fused, scale] = np.stack([np.asarray(image, np.int16) for image in images])
    for scale in (1, 0):
        assert np.abs(found[True, scale] - found[False, scale]).max() <= 1
    assert np.abs(found[True, 1] - found[True, 0]).mean() > 1
