"""Triton kernels: against PyTorch's results, compiled for other GPUs, compiled ahead of time, and when they must not be used."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from kernel_models import (
    DEVICE,
    close,
    fused,
    fused_dora,
    needs_gpu,
    needs_triton,
    output_and_gradients,
    output_of,
    run_of,
    small_text_encoder,
    small_unet,
    states_and_gradients,
)
from transformers import CLIPTextModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from lib.kernels import adamw8bit, channels_last, conv_epilogues, group_norm, layer_norm_geglu, transformer_blocks
from lib.training import micro_step


@pytest.fixture
def untried():
    """missing_kernels remembers its answer."""
    channels_last.missing_kernels.cache_clear()
    yield
    channels_last.missing_kernels.cache_clear()


@needs_triton
def test_kernels_give_pytorchs_results():
    """On the GPU, or without one in Triton's interpreter."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(ROOT / "tests" / "triton_checks.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | interpret)
    assert "all equal" in done.stdout, done.stderr


def compiled(kernel, architecture, constants, kinds, other):
    """Compile a kernel for an NVIDIA architecture; `kinds` are the types of parameters, by name, `other` of the rest."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in kernel.params]
    constants = {name: constants[name] for name in names if name in constants}
    signature = {name: "constexpr" if name in constants else kinds.get(name, other) for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return group_norm.triton.compile(source, target=GPUTarget("cuda", architecture, 32))


@needs_triton
@pytest.mark.parametrize(("architecture", "dtype"), [(75, "fp16"), (75, "fp32"), (80, "bf16"), (90, "fp16")])
def test_kernels_compile_for_every_supported_gpu(architecture, dtype):
    """T4, A100, H100. Triton's compiler runs without a GPU, and refuses what its interpreter accepts."""
    integers = "HW EACH C SILU ROWS HALF STRIDE ADD WIDTH BEHIND".split()
    kinds = dict.fromkeys(integers, "i32") | dict(eps="fp32", statistics="*fp32", sums="*fp32")
    norms = group_norm._norm_whole, group_norm._norm_sums, group_norm._norm_apply
    layer_norms = layer_norm_geglu._add_layer_norm, layer_norm_geglu._add_layer_norm_backward
    others = layer_norm_geglu._geglu, layer_norm_geglu._quick_gelu, conv_epilogues._add_bias
    for backward in (False, True):
        for large in (False, True):
            sizes = dict(GROUP=40, ROWS=256, PARTS=32) if large else dict(GROUP=10, ROWS=64, PARTS=8)
            for kernel in norms:
                constants = dict(BACKWARD=backward, SPAN=40, WIDTH=64, **sizes)
                assert compiled(kernel, architecture, constants, kinds, f"*{dtype}").asm["ptx"]
        for kernel in layer_norms:
            constants = dict(TALL=4, WIDTH=320, TILE=512, ADD=backward)
            assert compiled(kernel, architecture, constants, kinds, f"*{dtype}").asm["ptx"]
        for kernel in others:
            constants = dict(TALL=4, WIDE=64, BACKWARD=backward)
            constants |= dict(ADD=backward) if kernel is conv_epilogues._add_bias else {}
            assert compiled(kernel, architecture, constants, kinds, f"*{dtype}").asm["ptx"]


@needs_triton
@pytest.mark.parametrize("architecture", [75, 80, 90])
def test_adamw_compiles_for_every_supported_gpu(architecture):
    kinds = dict(outcome="*i32", tracker="*i32", state1="*u8", state2="*u8", interval="i32", most="i32", COUNT="i32")
    kinds |= dict.fromkeys(("growth", "backoff", "beta1", "beta2", "eps", "decay"), "fp32")
    for kernel, scaled in ((adamw8bit._decide, True), (adamw8bit._decide, False), (adamw8bit._adamw, None)):
        constants = dict(LOG1=-0.15, LOG2=-0.0014, SCALED=scaled, BLOCK=adamw8bit.BLOCK)
        assert compiled(kernel, architecture, constants, kinds, "*fp32").asm["ptx"]


def test_everything_can_be_imported_without_triton():
    code = "import sys; sys.modules['triton'] = None; import lib.kernels.channels_last, lib.evaluation.generation, lib.training.setup"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_without_triton_a_note_is_printed_and_pytorch_remains(untried, monkeypatch, capsys):
    monkeypatch.setattr(channels_last, "triton", None)
    assert "no Triton" in channels_last.missing_kernels(DEVICE)
    channels_last.missing_kernels.cache_clear()
    unet = small_unet()
    channels_last.channels_last(unet)
    assert ("no Triton kernels" in capsys.readouterr().out) == (DEVICE.type == "cuda")
    output_and_gradients(unet)


def fails(*arguments, **named):
    raise OSError("no C compiler")


def plain_group_norm(x, shift, weight, bias, groups, eps, silu):
    shifted = x if shift is None else x + shift[..., None, None]
    norm = F.group_norm(shifted, groups, weight, bias, eps)
    return x, F.silu(norm) if silu else norm


def plain_add_layer_norm(x, y, weight, bias, eps):
    total = x if y is None else x + y
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


PLAIN = {
    group_norm.GroupNormSilu: plain_group_norm,
    layer_norm_geglu.AddLayerNorm: plain_add_layer_norm,
    layer_norm_geglu.Geglu: lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]),
    layer_norm_geglu.QuickGelu: lambda x: x * torch.sigmoid(1.702 * x),
    conv_epilogues.AddBias: lambda x, y, bias: x + bias[:, None, None] + (0 if y is None else y),
}
WRONG = [
    (group_norm.GroupNormSilu, lambda x, *_: (x, x)),
    (group_norm.GroupNormSilu, lambda x, shift, *others: plain_group_norm(x, None, *others)),
    (conv_epilogues.AddBias, lambda x, y, bias: x + y),
    (layer_norm_geglu.Geglu, lambda x: x[..., :2]),
    (layer_norm_geglu.AddLayerNorm, lambda x, *others: (x, plain_add_layer_norm(x, *others)[1])),
    (layer_norm_geglu.AddLayerNorm, lambda x, y, *_: (x + y, x + y)),
    (layer_norm_geglu.QuickGelu, F.gelu),
]


@needs_triton
def test_kernels_that_do_not_compile_or_are_wrong_are_not_used(untried, monkeypatch):
    cases = [(None, None, None)]
    cases += [(function, fails, "no C compiler") for function in PLAIN]
    cases += [(function, broken, "wrong") for function, broken in WRONG]
    for function, broken, words in cases:
        for each, plain in PLAIN.items():
            monkeypatch.setattr(each, "apply", broken if each is function else plain)
        channels_last.missing_kernels.cache_clear()
        reason = channels_last.missing_kernels(DEVICE)
        assert words in reason if words else reason is None


class Launches(list):
    """(kernel's name, type of its first argument, constants) of each launch."""

    def kernel(self, name):
        """Stands in for a kernel."""
        positional = name in ("geglu", "quick_gelu", "add_bias")

        class Kernel:
            def __getitem__(_, grid):
                def launch(*arguments, **sizes):
                    constants = arguments[6:] if positional else tuple(sorted(sizes.items()))
                    self.append((name, arguments[0].dtype, constants))

                return launch

        return Kernel()


@needs_triton
def test_the_kernels_compiled_ahead_are_those_used(monkeypatch):
    """Compared by their constants, for a forward and a backward pass."""
    launches = Launches()
    norms, transformers = {"norm_whole", "norm_sums", "norm_apply"}, {"add_layer_norm", "geglu", "quick_gelu"}
    for module, names in (
        (group_norm, norms),
        (layer_norm_geglu, transformers | {"add_layer_norm_backward"}),
        (conv_epilogues, {"add_bias"}),
    ):
        for name in names:
            monkeypatch.setattr(module, f"_{name}", launches.kernel(name))
    monkeypatch.setattr(channels_last, "missing_kernels", lambda device: None)
    unet, text_encoder = small_unet(), small_text_encoder(hidden_size=48)
    assert channels_last.compile_kernels([unet, text_encoder], training=True) is None
    before = set(launches)
    launches.clear()
    for model in (unet, text_encoder):
        channels_last.rebuild(model)
    output_and_gradients(unet)
    states_and_gradients(text_encoder)
    # For small feature maps and for large ones, which this UNet does not have.
    assert set(launches) <= before
    assert 8 < len(before) <= 4 * len(set(launches))
    assert {name for name, *_ in before} == norms | transformers | {"add_layer_norm_backward", "add_bias"}
    launches.clear()
    monkeypatch.setattr(group_norm, "WHOLE", 0)  # as if its feature maps were large
    channels_last.compile_kernels([unet, text_encoder], training=False)
    forward_only = set(launches)
    launches.clear()
    with torch.no_grad():
        output_of(unet)
        text_encoder(torch.arange(22, device=DEVICE).view(2, 11))
    assert set(launches) <= forward_only
    assert {name for name, *_ in forward_only} == {name for name, *_ in launches}

    monkeypatch.setattr(channels_last, "missing_kernels", lambda device: "wrong here")
    assert channels_last.compile_kernels([unet], training=False) == "wrong here"
    monkeypatch.setattr(channels_last, "missing_kernels", lambda device: None)
    monkeypatch.setattr(channels_last, "group_norm", fails)
    assert "no C compiler" in channels_last.compile_kernels([unet], training=False)


@needs_triton
def test_transformers_unlike_stable_diffusions_are_left_alone():
    plain = dict(dim=32, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32)
    block = BasicTransformerBlock(**plain)
    assert transformer_blocks.plain_modules(block) == [block, block.ff.net[0]]  # and its activation
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
        assert {type(module) for module in transformer_blocks.plain_modules(other)} == {GEGLU}, how
    block.set_chunk_feed_forward(2)
    assert transformer_blocks.plain_modules(block) == [block.ff.net[0]]
    # Stable Diffusion 2's text encoder has the same layers with another activation.
    layers = transformer_blocks.plain_modules(small_text_encoder(hidden_act="gelu"))
    assert [type(layer) for layer in layers] == 3 * [CLIPEncoderLayer]


@pytest.mark.parametrize("both", [True, False])
def test_every_trained_model_gets_the_kernels(tiny_model, processed_data, tmp_path, monkeypatch, new_precision, both):
    calls = []
    monkeypatch.setattr(micro_step, "channels_last", lambda *models, training: calls.append((models, training)))
    run_of(tiny_model, processed_data, tmp_path, max_steps=1, warmup_steps=0, train_text_encoder=both)
    ((models, training),) = calls
    assert training
    assert [type(model) for model in models] == [UNet2DConditionModel, CLIPTextModel][: 1 + both]


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
