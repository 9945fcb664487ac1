#!/usr/bin/env python3
"""Speed and memory of train.py, and what each of its techniques is worth.

    python preprocess.py
    python -m demo.random_sd15 MODEL
    python bench/train_speed.py scripts --base-model MODEL [--diffusers-script PATH]
    python bench/train_speed.py parts --base-model MODEL [--others] [--only REGEX]
    python bench/train_speed.py demo                        # the miniature, on a CPU

`scripts` runs each script in a process of its own. train.py runs its whole 4000 steps with empty kernel caches, as on a
machine's first run. PATH is examples/dreambooth/train_dreambooth_lora.py of a diffusers checkout. `parts` times
variants of a training step in one process, without held-out images, then removes one technique at a time. "GiB, driver"
is what nvidia-smi counts.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["WANDB_MODE"] = "disabled"

import torch
from torch.nn.attention import SDPBackend

from lib import adapters
from lib.errors import UserError, run_script
from lib.kernels import compiling, graphs, transformer_blocks
from lib.training import micro_step, parameters, protection, updates


def driver_memory():
    """GPU memory in use in MiB, by the driver's count; 0 without a GPU."""
    with contextlib.suppress(OSError, ValueError):
        query = "nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -i 0".split()
        return int(subprocess.run(query, capture_output=True, text=True).stdout)
    return 0


@contextlib.contextmanager
def watched(before=0):
    """Yields a list of one number: the peak GPU memory in MiB by the driver's count, less `before`."""
    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(0.2):
            peak[0] = max(peak[0], driver_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def run(*command, caches=None):
    """Run a Python script; returns (its output, wall seconds, peak MiB by the driver's count).

    `caches`: a folder for the kernels that Triton and the driver compile. An empty one gives a machine's first run.
    """
    environment = dict(os.environ)
    if caches:
        for key in ("CUDA_CACHE_PATH", "TRITON_CACHE_DIR"):
            environment[key] = str(caches / key)
            (caches / key).mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with watched(driver_memory()) as memory:
        process = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, env=environment
        )
    seconds = time.monotonic() - started
    if process.returncode:
        print(f"{' '.join(map(str, command))} failed:\n{process.stderr[-3000:]}", file=sys.stderr)
    return process.stdout + process.stderr, seconds, memory[0]


def ours(folder, options, caches=None):
    """(config.json of a run of train.py or None if it failed, wall seconds, driver's MiB)."""
    output, seconds, memory = run(
        "train.py", *options, "--output-dir", folder, "--run-name", "run", "--no-resume", caches=caches
    )
    try:
        return json.loads((folder / "run" / "config.json").read_text()), seconds, memory
    except OSError:
        print(output[-2000:])
        return None, seconds, memory


DIFFUSERS_OPTIONS = """--train_text_encoder --rank 32 --resolution 512 --train_batch_size 1 --learning_rate 1e-4
    --lr_scheduler cosine --lr_warmup_steps 10 --use_8bit_adam --mixed_precision fp16 --gradient_checkpointing
    --checkpointing_steps 10000 --seed 42""".split()


def scripts(args, folder):
    """The slow loops, then train.py's whole run of 4000 steps, each in a process of its own."""
    base = ("--base-model", args.base_model)
    print("| | ms/step | steps/s | GiB reserved | GiB, driver |\n|---|--:|--:|--:|--:|", flush=True)

    def row(name, *command):
        output, _, memory = run(*command)
        if rates := re.search(r"([\d.]+) ms/step = ([\d.]+) steps/s; ([\d.]+) GiB", output):
            print(f"| {name} | {rates[1]} | {rates[2]} | {rates[3]} | {memory / 1024:.2f} |", flush=True)

    plain = ("tests/plain_loop.py", *base, "--max-steps", args.plain_steps, "--warmup-steps", 10)
    row("the study's settings, a plain loop", *plain)
    if args.diffusers_script:
        options = ["--pretrained_model_name_or_path", args.base_model, "--output_dir", folder / "theirs"]
        options += ["--instance_data_dir", ROOT / "processed_data" / "images"]
        options += ["--instance_prompt", "a holographic raincoat", "--max_train_steps", args.plain_steps]
        script = ("bench/time_script.py", args.diffusers_script)
        row("diffusers' train_dreambooth_lora.py", *script, *options, *DIFFUSERS_OPTIONS)
    caches = folder / "caches"
    result, seconds, memory = ours(folder, base, caches)
    if result:
        rate = result["steps_a_second"]
        cells = f"{1e3 / rate:.1f} | {rate:.1f} | {result['peak_gib_reserved']:.2f} | {memory / 1024:.2f}"
        print(f"| train.py, all its 4000 steps | {cells} |\n")
        set_up = result["set_up_seconds"]
        print(f"from the command to the adapter {seconds:.1f} s, set-up after the imports {set_up:.1f} s", flush=True)
        shutil.rmtree(folder / "run")
        again, *_ = ours(folder, (*base, "--max-steps", 60), caches)
        if again:
            print(f"set-up of the next run, with cached kernels, {again['set_up_seconds']:.1f} s")


# ---- replacements for functions of the project, by which a technique is removed ---------------------------


def converted(*models, training=False):
    """Replaces channels_last: the layout without the kernels."""
    for model in models:
        model.to(memory_format=torch.channels_last)


def nothing(*models, training=False):
    pass


def no_transformers(model):
    """Replaces transformer_blocks.plain_modules: PyTorch computes sums, layer norms and CLIP's activation."""
    return []


def apart(model, device, dora=False):
    """Replaces fuse_projections: each layer is a FusedLinear of its own."""
    return []


class PeftLayers:
    """Replaces lora.FusedLinear: PEFT's layers as they are."""

    def __init__(self, model):
        self.model = model

    def factors(self):
        return adapters.trained_weights(self.model)

    def magnitudes(self):
        return []


class PeftParameters(parameters.LoraParameters):
    """Replaces LoraParameters: autograd gives each leaf its gradient."""

    def expect_gradients(self):
        pass

    def add_gradients(self, gradients, replace):
        gradient = torch.cat([gradient.flatten() for gradient in gradients])
        self.flat.grad.copy_(gradient if replace else self.flat.grad + gradient)


PEFT = dict(
    fuse_projections=apart,
    fuse_lora=lambda model, *others: [PeftLayers(model)],
    bind=lambda fused_layers, vector, gradient: (fused_layers[0].factors(), ([], [])),
    LoraParameters=PeftParameters,
    DoraFactors=nothing,
)


def with_peft_blocks_compiled(model, *others):
    """Replaces fuse_lora: PEFT's layers in blocks that torch.compile compiles."""
    if hasattr(model, "compile_repeated_blocks"):
        model.compile_repeated_blocks()
    return [PeftLayers(model)]


def eager(functions, *others):
    """Replaces graphs.captured: no CUDA graph."""
    return functions


def autocast(functions, *others):
    """Replaces graphs.captured: float32 weights, cast to fp16 at each use."""
    return CAPTURED([torch.autocast("cuda", torch.float16)(function) for function in functions], *others)


def benchmarked(functions, *others):
    """Replaces graphs.captured: cuDNN searches for the fastest convolutions."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        return CAPTURED(functions, *others)


CAPTURED, FLATTEN = graphs.captured, parameters.flatten_parameters
ATTENTION_KERNELS = {
    "attention: PyTorch's choice everywhere (cuDNN)": dict(CUDNN_PAIRS=0),
    "attention: flash kernel everywhere": dict(CUDNN_PAIRS=math.inf),
    "attention: memory-efficient kernel": dict(CUDNN_PAIRS=math.inf, NO_CUDNN=[SDPBackend.EFFICIENT_ATTENTION]),
}
MODULES = (micro_step, parameters, protection, updates, transformer_blocks, compiling)  # whose names are replaced


def module_of(name):
    """The module whose function or constant `name` is replaced."""
    for module in MODULES:
        if hasattr(module, name):
            return module
    raise UserError(f"no module of train.py has {name} any more; update the variants in bench/train_speed.py")


@contextlib.contextmanager
def replacing(replacements):
    """Within the context, `replacements` {name: function or constant} stand in for the project's."""
    with contextlib.ExitStack() as stack:
        for name, function in replacements.items():
            stack.enter_context(patch.object(module_of(name), name, function))
        yield


# ---- parts -----------------------------------------------------------------------------------------------


def variants(others):
    """[(name, changes of CONFIG, replacements)]; `others` adds what was tried and dropped."""
    checkpointing, rank_8 = dict(gradient_checkpointing=True), dict(rank=8, alpha=8.0)
    unet_only, dora, batches = dict(train_text_encoder=False), dict(dora=True), dict(batch_size=8)
    plain_loss = dict(unet_targets=("attn2.to_k", "attn2.to_v"), protected_prompts="prompts/protected.txt")
    protected = plain_loss | dict(loss_guidance_scale=(1.0, 2.0))
    random_text = dict(SET_APART=math.inf)  # a text encoder of random weights need not separate prompts
    bitsandbytes_adamw = dict(missing_kernels=lambda device: "removed")
    fp32_copy = dict(flatten_parameters=lambda weights, dtype: FLATTEN(weights, torch.float32))
    rows = [
        ("train.py, with checkpointing", checkpointing, {}),
        ("rank 8, with checkpointing", checkpointing | rank_8, {}),
        ("UNet only, with checkpointing", checkpointing | unet_only, {}),
        ("train.py without checkpointing", {}, {}),
        ("rank 8 without", rank_8, {}),
        ("UNet only without", unet_only, {}),
        ("DoRA, with checkpointing", checkpointing | dora, {}),
        ("protected, ordinary loss, with checkpointing", checkpointing | plain_loss, random_text),
        ("protected, with checkpointing", checkpointing | protected, random_text),
        ("batches of 8, with checkpointing", checkpointing | batches, {}),
        ("DoRA without", dora, {}),
        ("protected, ordinary loss, without", plain_loss, random_text),
        ("protected without", protected, random_text),
        ("batches of 8 without", batches, {}),
        ("DoRA in PEFT's layers", dora, PEFT),
        ("- CUDA graph", {}, dict(captured=eager)),
        ("- updates without a wait (bitsandbytes' AdamW)", {}, bitsandbytes_adamw),
        ("- fused projections", {}, dict(fuse_projections=apart)),
        ("- fused projections, fused LoRA layers (PEFT's)", {}, PEFT),
        ("- these, fp16 copy (autocast)", {}, PEFT | dict(captured=autocast) | fp32_copy),
        ("- sums with layer norms, CLIP's activation", {}, dict(plain_modules=no_transformers)),
        ("- Triton kernels (channels-last stays)", {}, dict(channels_last=converted)),
        ("- Triton kernels, channels-last", {}, dict(channels_last=nothing)),
        ("- all of these", {}, PEFT | bitsandbytes_adamw | dict(channels_last=nothing, captured=eager)),
    ]
    if others:
        compiled = PEFT | dict(fuse_lora=with_peft_blocks_compiled, channels_last=converted)
        rows += [(name, {}, replacements) for name, replacements in ATTENTION_KERNELS.items()]
        rows.append(("cuDNN's search for the fastest convolutions", {}, dict(captured=benchmarked)))
        rows.append(("torch.compile of the blocks in place of fused layers and Triton kernels", {}, compiled))
    return rows


def optimizer_times():
    """Print the milliseconds of a step of loss scaler and optimizer, over 304 tensors and over 2."""
    import bitsandbytes

    for count in (304, 2):
        weights = [torch.nn.Parameter(torch.zeros(7_557_120 // count, device="cuda")) for _ in range(count)]
        optimizer = bitsandbytes.optim.AdamW8bit(weights)
        scaler = torch.amp.GradScaler()
        scaler.scale(torch.zeros((), device="cuda"))
        times = []
        for _ in range(20):
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            torch.cuda.synchronize()
            started = time.perf_counter()
            scaler.step(optimizer)
            scaler.update()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        print(f"scaler and 8-bit AdamW over {count} tensors: {1e3 * sorted(times)[10]:.2f} ms", flush=True)


def parts(args, folder):
    """Variants of train.py's loop in this process, then one technique removed at a time."""
    import train
    from bench.limits import rates

    rows = variants(args.others)
    for name in dict.fromkeys(name for *_, replacements in rows for name in replacements):
        module_of(name)  # before anything is timed
    operations, bandwidth = rates()
    print(
        f"{operations / 1e12:.0f} TFLOP/s in a large fp16 matrix product, {bandwidth / 1e12:.2f} TB/s in a large copy"
    )
    if torch.cuda.is_available():
        optimizer_times()
    short = dict(warmup_steps=10, validation_count=0, preview_every=0, snapshot_every=0, gradient_checkpointing=False)
    short |= dict(base_model=args.base_model, output_dir=str(folder), run_name="part", resume=False)
    print("| | ms/step | steps/s | GiB reserved | GiB, driver | set-up s |\n|---|--:|--:|--:|--:|--:|", flush=True)
    for name, changes, replacements in rows:
        if not re.search(args.only, name):
            continue
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        steps = args.plain_steps if replacements.get("captured") is eager else args.steps
        with replacing(replacements), contextlib.redirect_stdout(sys.stderr), watched() as memory:
            try:
                train.train(train.CONFIG | short | dict(max_steps=steps) | changes)
            except Exception as problem:
                print(f"{name}: {type(problem).__name__}: {str(problem)[:300]}")
                continue
        result = json.loads((folder / "part" / "config.json").read_text())
        rate = result["steps_a_second"]
        cells = f"{1e3 / rate:.1f} | {rate:.1f} | {result['peak_gib_reserved']:.2f} | {memory[0] / 1024:.2f}"
        print(f"| {name} | {cells} | {result['set_up_seconds']:.1f} |", flush=True)


def demo(args, folder):
    """The miniature: a plain loop, then train.py."""
    output = run("tests/plain_loop.py", "--demo", "--max-steps", args.plain_steps)[0]
    print(re.search(r"plain loop: [\d.]+ ms.*", output)[0])
    result, *_ = ours(folder, ("--demo", "--max-steps", args.steps))
    print(f"train.py --demo: {result['steps_a_second']:.1f} steps/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = dict(scripts=scripts, parts=parts, demo=demo)
    parser.add_argument("table", choices=tables)
    parser.add_argument("--base-model", help="scripts, parts: a full-size model; required")
    parser.add_argument(
        "--diffusers-script", type=lambda path: Path(path).resolve(), help="scripts: also time this one"
    )
    parser.add_argument("--steps", type=int, default=400, help="of train.py (default 400)")
    parser.add_argument("--plain-steps", type=int, default=80, help="of the slow loops (default 80)")
    parser.add_argument("--only", default="", help="parts: variants whose name matches this regular expression")
    parser.add_argument("--others", action="store_true", help="parts: also techniques that were tried and dropped")
    args = parser.parse_args()
    if args.table != "demo" and not args.base_model:
        parser.error(f"{args.table} needs --base-model; python -m demo.random_sd15 MODEL writes one")
    folder = Path(tempfile.mkdtemp(prefix="train_speed_"))
    try:
        tables[args.table](args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run_script(main)
