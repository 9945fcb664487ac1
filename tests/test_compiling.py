"""Attention kernels compiled ahead of time, jobs in threads, and CUDA graphs without a GPU."""

import contextlib
import functools
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from kernel_models import DEVICE, needs_gpu, small_unet
from torch.overrides import TorchFunctionMode

from lib.kernels import compiling, graphs


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


@pytest.mark.parametrize("training", [False, True])
def test_the_attention_compiled_ahead_is_that_used(training):
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
    jobs = compiling.attention_jobs(call, training)
    with AttentionCalls() as ahead:
        for job in jobs:
            job()
    assert ahead.calls == real.calls
    # Transformers at two resolutions, each attending to the image and to the text.
    assert len(jobs) == len(real.calls) == (8 if training else 4)
    assert all(weight.grad is None for weight in unet.parameters())
    with AttentionCalls() as ahead:
        compiling.attention_jobs(call, training)
    assert not ahead.calls  # the jobs are found without computing any


def test_attention_of_one_layout_is_compiled_once_with_its_masks():
    q = torch.randn(1, 2, 5, 8)
    masks = [torch.rand(5, 5) > 0.5 for _ in range(2)]

    def call():
        for mask in masks:
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        F.scaled_dot_product_attention(q, q, q, is_causal=True)

    jobs = compiling.attention_jobs(call, training=True)
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

    monkeypatch.setattr(compiling, "attention_jobs", lambda call, training: [lambda: 1 / 0])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    compiling.compile_attention(None, torch.device("cuda"))()
    assert "not compiled ahead of time: ZeroDivisionError" in capsys.readouterr().out
    monkeypatch.setattr(compiling, "attention_jobs", lambda call, training: 1 / 0)
    compiling.compile_attention(None, torch.device("cuda"))()
    assert "not compiled ahead of time: ZeroDivisionError" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_compiled_or_captured():
    def work():
        raise AssertionError("it was called")

    assert graphs.captured([work], torch.device("cpu")) == [work]
    compiling.compile_attention(work, torch.device("cpu"))()


@needs_gpu
def test_attention_compiles_in_threads_on_a_gpu(capsys, monkeypatch):
    started, start = [], compiling.in_threads
    monkeypatch.setattr(compiling, "in_threads", lambda jobs, device: started.extend(jobs) or start(jobs, device))
    unet = small_unet(torch.float16)
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 32)
    x, text = x.to(DEVICE, torch.float16), text.to(DEVICE, torch.float16)
    steps = torch.tensor([10], device=DEVICE)
    compiling.compile_attention(lambda: unet(x, steps, text), DEVICE, training=True)()
    assert len(started) == 8 and not capsys.readouterr().out
