"""Memory that runs out: what was being done, and what to change."""

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_one_line
from training_runs import training

import train
from lib import errors
from lib.errors import UserError
from lib.evaluation import generation
from lib.kernels import compiling, graphs
from lib.training import processes


@pytest.mark.parametrize(
    ("place", "doing", "advice"),
    [
        ("setup.encode_latents", "encoding the images", "--resolution 32"),
        ("micro_step.diffusion_loss", "training with batch_size 4", "--batch-size 2"),
        ("samples.draw_noise", "training with batch_size 4", "--gradient-checkpointing"),
        ("setup.load_part", "loading the models", "nvidia-smi"),
        ("setup.encode_captions", "encoding the captions", "fewer different captions"),
    ],
)
def test_out_of_memory_says_what_was_done_and_what_to_change(exact, tmp_path, monkeypatch, place, doing, advice):
    def full(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(f"lib.training.{place}", full)
    if place == "setup.encode_latents":  # as if none were kept
        monkeypatch.setattr("lib.training.setup.kept_folder", lambda *kept: tmp_path / "none")
    config = exact | dict(
        output_dir=tmp_path,
        batch_size=4,
        validation_count=0 if place == "samples.draw_noise" else 2,
        train_text_encoder=place != "setup.encode_captions",
        gradient_checkpointing=False,
    )
    done = training(tmp_path, config)
    assert_one_line(done, doing)
    after = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert advice in after[1]


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"), "the GPU's memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "the GPU's memory",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "the GPU's memory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "the GPU's memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
            "the computer's memory",
        ),
        (MemoryError(), "the computer's memory"),
    ],
)
def test_memory_that_ran_out_is_known_by_any_of_its_names(monkeypatch, problem, words):
    def full():
        raise problem

    with pytest.raises(UserError, match=words), errors.memory_for("training", "less"):
        full()
    # It is no reason to go on without kernels or graphs.
    with pytest.raises(type(problem)):
        compiling.failure(full)
    if isinstance(problem, RuntimeError):
        nothing = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in dict(
            Stream=lambda device: nothing,
            current_stream=lambda device: nothing,
            empty_cache=lambda: None,
            stream=lambda stream: contextlib.nullcontext(),
            graph_pool_handle=lambda: None,
        ).items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(graphs, "_capture", lambda *arguments: full())
        with pytest.raises(RuntimeError, match=re.escape(str(problem))):
            graphs.captured([lambda: None], torch.device("cuda"))


def test_another_error_is_no_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), errors.memory_for("training", "less"):
        raise RuntimeError("shapes cannot be multiplied")


def test_out_of_memory_while_drawing_advises_a_smaller_batch():
    class Full:
        vae_scale_factor = 8
        unet = SimpleNamespace(config=SimpleNamespace(in_channels=4), dtype=torch.float32)
        device = torch.device("cpu")

        def encode_prompt(self, prompts, *others):
            return 2 * [torch.zeros(len(prompts), 77, 8)]

        def __call__(self, *arguments, **named):
            raise torch.OutOfMemoryError

    with pytest.raises(UserError) as error:
        generation.generate(
            Full(), [("a coat", 1)] * 8, steps=1, guidance_scale=1, resolution=64, batch_size=8, title="base"
        )
    first, second = str(error.value).splitlines()
    assert "generating 8 images at once" in first
    assert "--batch-size 4" in second


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(batch_size=4, gradient_checkpointing=False), ["--batch-size 2", "--gradient-checkpointing"]),
        (dict(batch_size=4), ["--batch-size 2"]),
        (dict(gradient_checkpointing=False), ["--gradient-checkpointing"]),
        (dict(mixed_precision="no"), ["--mixed-precision"]),
        (dict(), ["nvidia-smi", "--resolution 256"]),
        (dict(resolution=520), ["--resolution 256"]),
    ],
)
def test_memory_advice_names_only_what_would_help(change, named):
    text = processes.memory_advice(train.CONFIG | dict(batch_size=1) | change)
    assert all(option in text for option in named)
    assert sorted(re.findall("--[a-z-]+", text)) == sorted(word.split()[0] for word in named if word.startswith("--"))


def test_drawing_one_picture_at_once_advises_a_smaller_one():
    for batch_size, option in ((2, "--batch-size 1"), (1, "--resolution 256")):
        with pytest.raises(UserError) as error, generation.generation_memory(batch_size, 512):
            raise torch.OutOfMemoryError
        assert re.findall("--[a-z-]+ [0-9]+", str(error.value)) == [option]
