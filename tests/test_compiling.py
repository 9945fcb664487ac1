"""Attention kernels compiled ahead of time, jobs in threads, and CUDA graphs without a GPU."""

import contextlib
import functools
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from kernel_models import DEVICE, AttentionCalls, fused, needs_gpu, small_text_encoder, small_unet

from lib.kernels import compiling, fused_projections, graphs


@pytest.mark.parametrize("training", [False, True])
def test_the_attention_compiled_ahead_is_that_used(training, monkeypatch):
    monkeypatch.setattr(compiling, "CUDNN_PAIRS", 0)
    unet = small_unet()
    for x in unet.parameters():
        x.requires_grad_(training)
    x, text = torch.randn(1, 4, 16, 16, device=DEVICE), torch.randn(1, 77, 32, device=DEVICE)

    def call():
        return unet(x, torch.tensor([10], device=DEVICE), text).sample

    with AttentionCalls() as real:
        call()
        with torch.no_grad():
            call()
    jobs = compiling.attention_jobs(call, DEVICE, training)
    with AttentionCalls() as ahead:
        for job in jobs:
            job()
    assert ahead.calls == real.calls
    # Transformers at two resolutions, each attending to the image and to the text.
    assert len(jobs) == len(real.calls) == (8 if training else 4)
    assert all(weight.grad is None for weight in unet.parameters())
    with AttentionCalls() as ahead:
        compiling.attention_jobs(call, DEVICE, training)
    assert not ahead.calls  # the jobs are found without computing any


def test_only_attention_of_many_pairs_is_compiled_ahead(monkeypatch):
    """Here that of the larger map to itself."""
    monkeypatch.setattr(compiling, "CUDNN_PAIRS", 256 * 256)
    unet = small_unet()
    x, text = torch.randn(1, 4, 16, 16, device=DEVICE), torch.randn(1, 77, 32, device=DEVICE)
    jobs = compiling.attention_jobs(lambda: unet(x, torch.tensor([10], device=DEVICE), text), DEVICE, training=True)
    with AttentionCalls() as ahead:
        for job in jobs:
            job()
    assert len(jobs) == 2 and {inputs[0][0][2] for inputs, *_ in ahead.calls} == {256}


def test_few_pairs_on_a_gpu_get_no_cudnn_and_many_do():
    class OnGpu:
        is_cuda = True

        def __init__(self, rows):
            self.shape = (1, rows, 8)

    for query, key, cudnn in ((4096, 4096, True), (1024, 1024, True), (4096, 77, False), (256, 256, False)):
        with compiling.attention_kernels(OnGpu(query), OnGpu(key)):
            assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn, (query, key)
        assert torch.backends.cuda.cudnn_sdp_enabled()


def test_attention_of_one_layout_is_compiled_once_with_its_masks(monkeypatch):
    monkeypatch.setattr(compiling, "CUDNN_PAIRS", 0)
    q = torch.randn(1, 2, 5, 8)
    masks = [torch.rand(5, 5) > 0.5 for _ in range(2)]

    def call():
        for mask in masks:
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        F.scaled_dot_product_attention(q, q, q, is_causal=True)

    jobs = compiling.attention_jobs(call, torch.device("cpu"), training=True)
    assert len(jobs) == 4  # forward with gradients and without, masked and causal
    for job in jobs:
        job()
    assert q.grad is None


def test_jobs_in_threads_are_awaited_and_their_errors_raised(monkeypatch, capsys):
    done, begun = [], threading.Barrier(3, timeout=60)

    def job(number):
        begun.wait()  # passes only when all run at the same time
        done.append(number)

    jobs = [functools.partial(job, number) for number in range(3)]
    compiling.in_threads(jobs, torch.device("cpu"))()
    assert sorted(done) == [0, 1, 2]

    def slow():
        time.sleep(0.3)
        done.append("slow")

    with pytest.raises(ZeroDivisionError):
        compiling.in_threads([lambda: 1 / 0, slow], torch.device("cpu"))()
    assert done[-1] == "slow"  # nothing runs on behind it

    monkeypatch.setattr(compiling, "attention_jobs", lambda *how: [lambda: 1 / 0])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    compiling.compile_attention(None, torch.device("cuda"))
    assert "not compiled ahead of time: ZeroDivisionError" in capsys.readouterr().out
    monkeypatch.setattr(compiling, "attention_jobs", lambda *how: 1 / 0)
    compiling.compile_attention(None, torch.device("cuda"))
    assert "not compiled ahead of time: ZeroDivisionError" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_compiled_or_captured():
    called = []
    work = functools.partial(called.append, 1)
    assert graphs.captured([work], torch.device("cpu")) == [work]
    compiling.compile_attention(work, torch.device("cpu"))
    assert not called


def test_fused_layers_ask_which_kernels_to_use(monkeypatch):
    """A UNet's attentions to its maps and to the text, and a text encoder's."""
    asked = set()

    def attention_kernels(query, key):
        asked.add((query.shape[-2], key.shape[-2]))
        return contextlib.nullcontext()

    monkeypatch.setattr(fused_projections, "attention_kernels", attention_kernels)
    unet, text_encoder = fused(small_unet()), fused(small_text_encoder())
    with torch.no_grad(), DEVICE:
        unet(torch.randn(1, 4, 16, 16), torch.tensor([10]), torch.randn(1, 77, 32))
        assert asked == {(256, 256), (256, 77), (64, 64), (64, 77)}
        text_encoder(torch.zeros(1, 9, dtype=torch.long))
    assert (9, 9) in asked


@needs_gpu
def test_attention_compiles_in_threads_on_a_gpu(capsys, monkeypatch):
    started, start = [], compiling.in_threads
    monkeypatch.setattr(compiling, "in_threads", lambda jobs, device: started.extend(jobs) or start(jobs, device))
    monkeypatch.setattr(compiling, "CUDNN_PAIRS", 0)
    unet = small_unet(torch.float16)
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 32)
    x, text = x.to(DEVICE, torch.float16), text.to(DEVICE, torch.float16)
    steps = torch.tensor([10], device=DEVICE)
    compiling.compile_attention(lambda: unet(x, steps, text), DEVICE, training=True)
    assert len(started) == 8 and not capsys.readouterr().out
