"""Kernels compiled by other processes: the same that the models launch later, and nothing else changes."""

import os
import threading
from collections import defaultdict
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from diffusers import UNet2DConditionModel
from kernel_models import AttentionCalls, needs_triton

from lib.kernels import adamw8bit, channels_last, compile_ahead, compiling, conv_epilogues, group_norm, layer_norm_geglu
from lib.models import load_part


@pytest.fixture
def gpu(monkeypatch):
    """A GPU for Triton's compiler, which needs none; this process has compiled nothing yet."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        launcher_cls = staticmethod(lambda source, metadata: None)

    monkeypatch.setattr(driver, "_active", Driver())
    for module in (adamw8bit, conv_epilogues, group_norm, layer_norm_geglu):
        for kernel in filter(lambda value: isinstance(value, JITFunction), vars(module).values()):
            monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a GPU and an empty cache; nothing has started."""
    found = Path.glob
    with_gpu = lambda path, pattern: iter([path / "nvidia0"]) if str(path) == "/dev" else found(path, pattern)  # noqa: E731
    monkeypatch.setattr(Path, "glob", with_gpu)
    monkeypatch.setattr(compile_ahead, "KERNELS", ())  # or the processes would import torch
    monkeypatch.setattr(compile_ahead, "FEWEST_CORES", 1)
    monkeypatch.setattr(compile_ahead, "_hash_triton", lambda: None)
    monkeypatch.setattr(compile_ahead, "_Work", type("_Work", (compile_ahead._Work,), {}))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@needs_triton
def test_what_is_compiled_ahead_is_what_the_models_launch(gpu, monkeypatch):
    """The jobs come from configuration files, before any weights are read."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    folder, dtype = ROOT / "demo/model", torch.float16
    before = torch.get_rng_state()
    begun = []
    monkeypatch.setattr(compile_ahead, "begin", lambda device, work, jobs=list: begun.extend(jobs()))
    parts, checks = {"unet": True, "text_encoder": True, "vae": False}, [adamw8bit.missing_kernels]
    channels_last.compile_models_ahead(folder, parts, dtype, torch.device("cpu"), [(256, 256)], checks=checks)
    ahead = map(str, compile_ahead.specializations(begun))
    assert torch.equal(before, torch.get_rng_state())  # LoRA's A is sampled meanwhile
    kinds = dict(unet=UNet2DConditionModel, text_encoder=CLIPTextModel, vae=AutoencoderKL)
    models = {part: load_part(kind, folder, part, dtype) for part, kind in kinds.items()}
    for model in models.values():
        for weight in model.parameters():
            weight.data = weight.data.clone()  # aligned, as on a GPU
    like = torch.zeros((), dtype=dtype)
    jobs = channels_last.kernel_jobs([models["unet"], models["text_encoder"]], True, like)
    jobs += channels_last.kernel_jobs([models["vae"]], False, like)
    later = set(map(str, compile_ahead.specializations(jobs)))
    assert len(later) > 20
    assert later <= set(ahead)


@needs_triton
def test_what_is_there_already_is_launched_with_memory_of_its_own(gpu, monkeypatch):
    """In a process that has trained before nothing is left to compile, so the jobs launch."""
    launched, begun = [], []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *inputs, **named: launched.extend(x.device.type for x in inputs if torch.is_tensor(x))

    for module, names in (
        (group_norm, ("norm_whole", "norm_sums", "norm_apply")),
        (layer_norm_geglu, ("add_layer_norm", "add_layer_norm_backward", "geglu", "quick_gelu")),
        (conv_epilogues, ("add_bias",)),
    ):
        for name in names:
            monkeypatch.setattr(module, f"_{name}", Kernel())
    monkeypatch.setattr(compile_ahead, "begin", lambda device, work, jobs=list: begun.extend(jobs()))
    parts = {"unet": True, "text_encoder": True, "vae": False}
    channels_last.compile_models_ahead(ROOT / "demo/model", parts, torch.float16, torch.device("cpu"), [(256, 256)])
    for job in begun[1:]:  # behind the check
        job()
    assert len(launched) > 100 and set(launched) == {"cpu"}


@pytest.mark.parametrize("trained", [True, False])
def test_the_attention_of_large_maps_is_compiled_ahead(trained, monkeypatch):
    """For the layer sizes of the images that come, from configuration files."""
    work, before = [], torch.get_rng_state()
    monkeypatch.setattr(compile_ahead, "compiled_before", lambda: False)
    monkeypatch.setattr(compile_ahead, "begin", lambda device, function, jobs=None: work.append(function))
    monkeypatch.setattr(compiling, "CUDNN_PAIRS", 256 * 256)
    calls = AttentionCalls()

    def compile_attention(call, device, training):
        jobs = compiling.attention_jobs(call, device, training)
        with calls:
            for job in jobs:
                job()

    monkeypatch.setattr(channels_last, "compile_attention", compile_attention)
    folder, sizes = ROOT / "demo/model", [(256, 256), (256, 256), (320, 192)]
    channels_last.compile_models_ahead(folder, {"unet": trained}, torch.float32, torch.device("cpu"), sizes, 3)
    for function in work[1:]:
        function()
    assert torch.equal(before, torch.get_rng_state())
    config = UNet2DConditionModel.load_config(folder / "unet")
    heads = config["attention_head_dim"]
    # The largest map of 256 x 256 pixels to itself; that of 320 x 192 has fewer pairs.
    shape = (3, heads, 256, config["block_out_channels"][0] // heads)
    found = {(inputs[0][0], inputs[1][0], gradients) for inputs, _, _, gradients in calls.calls}
    assert found == {(shape, shape, gradients) for gradients in {trained, False}}


@needs_triton
def test_the_checks_of_kernels_compute_in_fp32(monkeypatch):
    """Also while another thread loads a model in half precision, which makes that the default type. Seen at the first
    launch of each check."""
    seen = []

    def launch(*inputs):
        seen.extend(x.dtype for x in inputs if torch.is_tensor(x) and x.is_floating_point())
        raise ZeroDivisionError

    monkeypatch.setattr(channels_last.GroupNormSilu, "apply", launch)
    monkeypatch.setattr(adamw8bit, "decide", launch)
    torch.set_default_dtype(torch.float16)
    try:
        for module in (channels_last, adamw8bit):
            assert "ZeroDivisionError" in module.missing_kernels.__wrapped__(torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(seen) > 6 and set(seen) == {torch.float32}


@needs_triton
def test_a_kernel_compiled_ahead_is_found_at_its_launch(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.zeros(16, 32, dtype=torch.float16)
    launch = compiling.triton and channels_last.Geglu.apply
    (kernel,) = compile_ahead.specializations([lambda: launch(x)])
    compile_ahead.compile_one(*kernel)
    there = set(tmp_path.iterdir())
    assert len(there) == 1
    with pytest.raises((AttributeError, TypeError)):  # only when it is launched, which needs the GPU
        launch(x)
    assert set(tmp_path.iterdir()) == there
    with pytest.raises((AttributeError, TypeError)):
        launch(torch.zeros(16, 32, dtype=torch.bfloat16))
    assert len(set(tmp_path.iterdir())) > 1


@needs_triton
def test_only_the_thread_that_asks_is_recorded(gpu):
    from triton import knobs

    answers = []

    def job():
        hook = knobs.runtime.jit_cache_hook
        thread = threading.Thread(target=lambda: answers.append(hook(fn=None, compile=None)))
        thread.start()
        thread.join()

    assert compile_ahead.specializations([job]) == []
    assert answers == [False] and knobs.runtime.jit_cache_hook is None


def test_processes_start_once_for_a_purpose(machine, monkeypatch):
    work = compile_ahead._Work
    compile_ahead.start("train.py", "model")
    assert not compile_ahead.compiled_before()
    assert work.pool.submit(os.getpid).result(timeout=60) != os.getpid()
    compile_ahead.finish()
    assert work.pool is None
    compile_ahead.start("train.py", "model")
    assert compile_ahead.compiled_before() and work.pool is None
    begun = []
    monkeypatch.setattr(compile_ahead, "begin", lambda *how: begun.append(how))
    parts, device = {"unet": True}, torch.device("cuda")
    channels_last.compile_models_ahead(ROOT / "demo/model", parts, torch.float16, device, [(256, 256)])
    assert len(begun) == 1  # no search for attention kernels
    monkeypatch.setenv("LOCAL_RANK", "1")
    compile_ahead.start("train.py", "another model")
    assert not compile_ahead.compiled_before() and work.pool is None


def test_what_failed_ahead_is_left_to_the_launch(machine):
    work, failed = compile_ahead._Work, Future()
    failed.set_exception(RuntimeError("no compiler"))
    work.compiling = [failed]
    compile_ahead.wait()
    compile_ahead.wait()
    assert not work.threads and not work.compiling


def test_without_a_gpu_nothing_starts(monkeypatch):
    monkeypatch.setattr(compile_ahead, "_Work", type("_Work", (compile_ahead._Work,), dict(pool=None, record=None)))
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter(()))
    monkeypatch.setattr(Path, "exists", lambda path: False)
    compile_ahead.start("train.py")
    assert compile_ahead._Work.pool is None and compile_ahead._Work.record is None
    compile_ahead.begin(torch.device("cpu"), lambda: 1 / 0, lambda: 1 / 0)
    assert compile_ahead._Work.threads == ()
