"""Shared fixtures: a tiny pipeline of SD1.5's classes, a tiny CLIP, images; and three ways to run a script: `command` in
a new process, `run` in a fork of this one, `call` in this one."""

import contextlib
import ctypes
import functools
import gc
import importlib
import io
import itertools
import json
import multiprocessing.forkserver
import os
import pkgutil
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import unittest.mock
from pathlib import Path

# As in the scripts, before torch is imported: its threads spin only briefly.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
from PIL import Image

import lib
from lib.imports import quick_imports

with quick_imports():
    import bitsandbytes
    import torch
    from accelerate.state import AcceleratorState
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPTextModel

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["HF_HUB_OFFLINE"] = "1"
HOME = tempfile.TemporaryDirectory()  # for caches of models
os.environ["HF_HOME"] = HOME.name
# Models this small are slower with several threads.
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))
torch.set_num_threads(THREADS)

from demo.build.tokenizers import byte_tokenizer
from lib.errors import STOP_SIGNALS, run_script
from lib.training import updates

BOS, EOS = 510, 511


TEXT = dict(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=77,
    bos_token_id=BOS,
    eos_token_id=EOS,
    pad_token_id=EOS,
)


def tiny_vae(blocks=4, channels=4):
    """A VAE with random weights that by default downsamples by 8 to 4 latent channels, as Stable Diffusion's."""
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(8,) * blocks,
        norm_num_groups=4,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A Stable Diffusion folder with random weights whose images are a few pixels wide."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = tiny_vae()
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        skip_prk_steps=True,
        set_alpha_to_one=False,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
        unet=unet,
        tokenizer=byte_tokenizer(folder / "tokenizer", BOS),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A CLIP folder with random weights."""
    folder = tmp_path_factory.mktemp("tiny") / "clip"
    torch.manual_seed(1)
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, byte_tokenizer(folder, BOS)).save_pretrained(folder)
    return folder


def picture(seed, size=(64, 64), mode="RGB"):
    """A smooth random image, different for each seed."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture(scope="session")
def processed_data(tmp_path_factory):
    """Eight small images as preprocess.py writes them."""
    folder = tmp_path_factory.mktemp("processed")
    return make_processed(folder, 8)


def make_processed(folder, count, caption="a holographic raincoat"):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(1, count + 1):
        name = f"images/image_{number:02}.png"
        picture(number).save(folder / name)
        rows.append(json.dumps(dict(file_name=name, text=caption)))
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def few_prompts(tmp_path_factory):
    """A prompts file with one prompt of each category."""
    path = tmp_path_factory.mktemp("few") / "prompts.txt"
    path.write_text("a holographic raincoat\nnear: a yellow raincoat\nunrelated: a red leather jacket\n")
    return path


@pytest.fixture(scope="session")
def tiny_evaluation(tiny_model, tiny_clip, processed_data, few_prompts):
    """Options of a small evaluation, without its adapter, seeds and output folder."""
    return dict(
        base_model=tiny_model,
        clip_model=tiny_clip,
        similarity_model="clip",
        data_dir=processed_data,
        prompts=few_prompts,
        resolution=64,
        steps=2,
    )


def command(script, *options, env=None, launcher=(sys.executable,), check=True):
    """Run a script at the root as a user would, in a new process with one thread, which spends seconds on imports.
    Returns the finished process (text output)."""
    done = subprocess.run(
        [*map(str, launcher), str(ROOT / script), *map(str, options)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def one_thread():
    """Compute with one thread in a fork, where the threads of its parent do not exist."""
    torch.set_num_threads(1)
    with open("/proc/self/maps") as maps:  # torch and bitsandbytes each have an OpenMP of their own
        for path in {line.split()[-1] for line in maps if "libgomp" in line}:
            ctypes.CDLL(path).omp_set_num_threads(1)


@functools.cache
def preload():
    """Import what the scripts import while they run, so that no fork has to. With all test files imported, a tiny
    training in a fork takes 0.9 s of CPU time, without this 1.5."""
    for module in pkgutil.walk_packages(lib.__path__, "lib."):
        importlib.import_module(module.name)
    for name in ("preprocess", "train", "inference", "play", "study", "matplotlib.pyplot", "wandb"):
        importlib.import_module(name)
    gc.freeze()  # a collection in a fork would copy all that it looks through


def forked(work, folder):
    """Start `work` in a fork of this process, which has imported everything. Returns its process id.

    It computes on the CPU, as a fork of a process that has used a GPU cannot use it, with one thread. Its output goes to
    `folder`/out and err.
    """
    if torch.cuda.is_initialized():
        pytest.skip("an earlier test used the GPU in this process, so that no fork of it can train")
    preload()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70  # exit status after an exception
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Now, while there is one thread: a fork creates torch's pool at its first use, and several threads
        # that load a model at once may find none ("Invalid thread pool").
        torch.set_num_threads(THREADS)
        if THREADS > 1:
            one_thread()
        torch.cuda.is_available = lambda: False
        AcceleratorState._reset_state(reset_partial_state=True)
        # A fork server that this process may have started is not a child of the fork.
        multiprocessing.forkserver._forkserver.__init__()
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(child, folder):
    """Wait for a fork. Returns a CompletedProcess; for a signal the return code is negative."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return subprocess.CompletedProcess([], code, (folder / "out").read_text(), (folder / "err").read_text())


def run(script, *options, env=None, check=True):
    """Like `command`, on the CPU and in a fork of this process, which has imported what the script imports. Variables
    that a library reads when it is imported need a `command`."""
    if torch.cuda.is_initialized():  # then a fork of it fails
        return command(script, *options, env=(env or {}) | dict(CUDA_VISIBLE_DEVICES=""), check=check)

    def work():
        os.chdir(ROOT)
        os.environ.update(env or {})
        sys.argv = [script, *map(str, options)]
        runpy.run_path(str(ROOT / script), run_name="__main__")

    with tempfile.TemporaryDirectory() as folder:
        done = finish(forked(work, Path(folder)), Path(folder))
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def call(script, *options):
    """Like `run`, but in this process, where a test may have patched parts of a script."""
    main = importlib.import_module(script.removesuffix(".py")).main
    module = sys.modules[script.removesuffix(".py")]
    out, err, code = io.StringIO(), io.StringIO(), 0
    arguments = () if main.__code__.co_argcount == 0 else (module.CONFIG, module.__doc__)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    AcceleratorState._reset_state(reset_partial_state=True)
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        unittest.mock.patch.object(sys, "argv", [script, *map(str, options)]),
        unittest.mock.patch.dict(os.environ),
    ):
        try:
            run_script(lambda: main(*arguments))
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            AcceleratorState._reset_state(reset_partial_state=True)
    return subprocess.CompletedProcess([script], code, out.getvalue(), err.getvalue())


@pytest.fixture
def gradients_seen(monkeypatch):
    """A list that receives the gradients of all parameter groups at each step of a training in this process. AdamW is
    invariant to the scale of gradients, so bitsandbytes' step is observed, and used on a GPU too."""
    seen = []

    class Recording(bitsandbytes.optim.AdamW8bit):
        def step(self, closure=None):
            seen.append([group["params"][0].grad.clone() for group in self.param_groups])
            return super().step(closure)

    monkeypatch.setattr(bitsandbytes.optim, "AdamW8bit", Recording)
    monkeypatch.setattr(updates, "missing_kernels", lambda device: "bitsandbytes' step is looked at")
    return seen


@pytest.fixture
def new_precision():
    """Reset accelerate, which otherwise keeps a process's first precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


COSINE = 1e-5  # absolute rounding error of a cosine


def assert_close(actual, expected, relative=1e-4):
    """No value differs by more than `relative` times the largest expected magnitude.

    For two computations that sum in different order: the relative error of a value near zero then depends on the CPU.
    """
    actual, expected = (torch.as_tensor(x).detach().cpu().double() for x in (actual, expected))
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= relative, f"off by {error:.2g} of the largest magnitude, {relative:g} is allowed"


def assert_one_line(done, *words):
    """A user error: exit status not 0, one line on stderr that contains `words`, no traceback."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]


TINY_RUN = dict(
    resolution=64,
    rank=4,
    alpha=4,
    max_steps=6,
    warmup_steps=1,
    log_every=2,
    validate_every=3,
    validation_count=2,
    unet_learning_rate=1e-3,
    text_encoder_learning_rate=1e-3,
    preview_every=0,
)


def options(**config):
    """Command-line options for config keys."""
    flat = []
    for key, value in config.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flat.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            flat += [f"--{name}", ",".join(map(str, value))]
        else:
            flat += [f"--{name}", str(value)]
    return flat


@pytest.fixture(scope="session")
def protected(tmp_path_factory):
    """train.py's keys for a protected adapter on a tiny model.

    A text encoder of 32 dimensions with random weights distinguishes little: the list uses only seven of the letters of
    “a holographic raincoat”.
    """
    words = "coat cat rat tar oat iron corn icon actor ration root acorn".split()
    prompts = ["{class}", "a {class}", *(f"a {word} in a {{class}}" for word in words)]
    prompts += [f"a {a} on a {b}" for a, b in list(itertools.combinations(words, 2))[::2]]
    path = tmp_path_factory.mktemp("protected") / "list.txt"
    path.write_text("# A few prompts\n" + "\n".join(prompts) + "\n")
    return dict(protected_prompts=str(path), unet_targets=("attn2.to_k", "attn2.to_v"), loss_guidance_scale=(1.0, 3.0))


@pytest.fixture(scope="session")
def trained(tiny_model, processed_data, tmp_path_factory):
    """A folder of three tiny runs by train.py and the two experiments."""
    folder = tmp_path_factory.mktemp("weights")
    common = options(base_model=tiny_model, data_dir=processed_data, output_dir=folder, **TINY_RUN)
    run("train.py", *common)
    run("train_experiment_rank8.py", *common, "--rank", 2, "--alpha", 2)
    run("train_experiment_unet_only.py", *common)
    return folder


# Rank 16 gives both groups the 4,096 parameters from which on bitsandbytes keeps its state in 8 bits;
# the 5 samples of a step do not divide the 7 of an epoch.
EXACT = TINY_RUN | dict(
    rank=16,
    alpha=16,
    max_steps=9,
    log_every=2,
    validate_every=4,
    checkpoint_every=3,
    gradient_accumulation_steps=5,
    validation_count=1,
)


@pytest.fixture(scope="session")
def exact(tiny_model, processed_data):
    """The configuration of the runs that must agree bit for bit."""
    return EXACT | dict(base_model=tiny_model, data_dir=processed_data)


@pytest.fixture(scope="session")
def uninterrupted(exact, tmp_path_factory):
    """The finished folder of that configuration."""
    from training_runs import NAME, succeeded, training

    folder = tmp_path_factory.mktemp("uninterrupted")
    succeeded(training(folder, exact | dict(output_dir=folder)))
    return folder / NAME


@pytest.fixture(scope="session")
def killed(exact, tmp_path_factory):
    """The folder of a run of that configuration that was killed in its fifth step, with a checkpoint of the third."""
    from training_runs import kill, training

    folder = tmp_path_factory.mktemp("killed")
    assert training(folder, exact | dict(output_dir=folder), {4: kill}).returncode == -signal.SIGKILL
    return folder


@pytest.fixture
def interrupted(exact, killed, tmp_path):
    """The configuration of such a run in `tmp_path`."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    return exact | dict(output_dir=tmp_path)


def chromium():
    """The path of a Chromium, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(path, tmp_path, *more):
    """Open a page in headless Chromium; `more` are its options."""
    return subprocess.run(
        [
            chromium(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--v=0",
            *more,
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
