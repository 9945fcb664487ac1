#!/usr/bin/env python3
"""How fast train.py is, how much memory it takes, and what each of its techniques is worth.

    python -m demo.random_sd15 MODEL
    python bench/train_speed.py scripts --base-model MODEL [--diffusers-script PATH]
    python bench/train_speed.py parts --base-model MODEL [--others]
    python bench/train_speed.py demo                        # the miniature, on a CPU

Needs processed_data/ (python preprocess.py). `scripts` runs each script in a process of its own, train.py
for its whole 4000 steps and with no kernel compiled before, as on the first run of a machine. `parts`
runs train.py's loop without held-out images, with one technique taken away at a time. The driver's
figure is what nvidia-smi counts. PATH is examples/dreambooth/train_dreambooth_lora.py of a diffusers
checkout.
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib import adapters
from lib.kernels import graphs, transformer_blocks
from lib.training import micro_step, parameters, protection, updates


def driver_memory():
    """MiB of GPU memory in use, as the driver counts it; 0 without a GPU."""
    with contextlib.suppress(OSError, ValueError):
        asked = "nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -i 0".split()
        return int(subprocess.run(asked, capture_output=True, text=True).stdout)
    return 0


@contextlib.contextmanager
def watched(before=0):
    """A list of one number: the most MiB that the driver saw in use, less those `before`."""
    most, done = [0], threading.Event()

    def watch():
        while not done.wait(0.2):
            most[0] = max(most[0], driver_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def run(*command, caches=None):
    """Run a command; returns (its output, wall seconds, most MiB the driver saw in use by it).

    `caches` is a folder for the kernels that Triton and the driver compile: a new one makes it what the
    first run on a machine is.
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
    """(config.json of a run of train.py, wall seconds, driver's MiB); None if it failed."""
    output, seconds, memory = run(
        "train.py", *options, "--output-dir", folder, "--run-name", "run", "--no-resume", caches=caches
    )
    try:
        return json.loads((folder / "run" / "config.json").read_text()), seconds, memory
    except OSError:
        print(output[-2000:])
        return None, seconds, memory


def scripts(args, folder):
    """The slow loops, then train.py's whole run of 4000 steps, each in a process of its own."""
    base = ("--base-model", args.base_model)
    print("| | ms/step | steps/s | GiB reserved | GiB, driver |\n|---|--:|--:|--:|--:|", flush=True)

    def row(name, line):
        output, seconds, memory = line
        found = re.search(r"([\d.]+) ms/step = ([\d.]+) steps/s; ([\d.]+) GiB", output)
        if found:
            print(f"| {name} | {found[1]} | {found[2]} | {found[3]} | {memory / 1024:.2f} |", flush=True)

    row(
        "the study's settings, a plain loop",
        run("tests/plain_loop.py", *base, "--max-steps", args.plain_steps, "--warmup-steps", 10),
    )
    if args.diffusers_script:
        pictures = ROOT / "processed_data" / "images"
        row(
            "diffusers' train_dreambooth_lora.py",
            run(
                "bench/time_script.py",
                args.diffusers_script,
                "--pretrained_model_name_or_path",
                args.base_model,
                "--instance_data_dir",
                pictures,
                "--instance_prompt",
                "a holographic raincoat",
                "--output_dir",
                folder / "theirs",
                "--train_text_encoder",
                "--rank",
                32,
                "--resolution",
                512,
                "--train_batch_size",
                1,
                "--learning_rate",
                "1e-4",
                "--lr_scheduler",
                "cosine",
                "--lr_warmup_steps",
                10,
                "--use_8bit_adam",
                "--mixed_precision",
                "fp16",
                "--gradient_checkpointing",
                "--max_train_steps",
                args.plain_steps,
                "--checkpointing_steps",
                10000,
                "--seed",
                42,
            ),
        )
    caches = folder / "caches"
    result, seconds, memory = ours(folder, base, caches)
    if result:
        rate = result["steps_a_second"]
        print(
            f"| train.py, all its 4000 steps | {1e3 / rate:.1f} | {rate:.1f} | {result['peak_gib_reserved']:.2f} | "
            f"{memory / 1024:.2f} |\n\nfrom the command to the adapter {seconds:.1f} s, set-up after the imports "
            f"{result['set_up_seconds']:.1f} s",
            flush=True,
        )
        shutil.rmtree(folder / "run")
        again, *_ = ours(folder, (*base, "--max-steps", 60), caches)
        if again:
            print(f"set-up of the next run, which finds its kernels compiled, {again['set_up_seconds']:.1f} s")


# What stands in the place of a function of the project where a technique is taken away.


def converted(*models, training=False):
    for model in models:
        model.to(memory_format=torch.channels_last)


def nothing(*models, training=False):
    pass


def no_transformers(model):
    """In place of transformer_blocks.plain_modules: sums, layer norms and CLIP's activation are PyTorch's."""
    return []


def apart(model, device, dora=False):
    """In place of fuse_projections: each layer is a FusedLinear of its own."""
    return []


class PeftLayers:
    """In place of lora.FusedLinear: PEFT's layers as they are."""

    def __init__(self, model):
        self.model = model

    def factors(self):
        return adapters.trained_weights(self.model)

    def magnitudes(self):
        return []


class PeftParameters(parameters.LoraParameters):
    """In place of parameters.LoraParameters: autograd gives each leaf its gradient."""

    def expect_gradients(self):
        pass

    def add_gradients(self, found, replace):
        found = torch.cat([gradient.flatten() for gradient in found])
        self.flat.grad.copy_(found if replace else self.flat.grad + found)


PEFT = dict(
    fuse_projections=apart,
    fuse_lora=lambda model, *others: [PeftLayers(model)],
    bind=lambda fused_layers, vector, gradient: (fused_layers[0].factors(), ([], [])),
    LoraParameters=PeftParameters,
    DoraFactors=nothing,
)


@contextlib.contextmanager
def replacing(replaced):
    """Inside, each function of `replaced`, {name: function}, stands in the place of the project's of that name."""
    with contextlib.ExitStack() as stack:
        for key, value in replaced.items():
            module = next(
                m for m in (micro_step, parameters, protection, updates, transformer_blocks) if hasattr(m, key)
            )
            stack.enter_context(patch.object(module, key, value))
        yield


def as_met(call, device, training=False):
    """In place of compiling.compile_attention: each kernel is compiled when it is met."""
    return lambda: None


def attending(*backends):
    """What is replaced to have scaled_dot_product_attention computed by the first of those that can."""
    record = graphs.captured

    def captured(functions, device):
        within = sdpa_kernel(list(backends), set_priority=True)
        return record([within(function) for function in functions], device)

    return dict(captured=captured, compile_attention=as_met)


# The flash kernel alone was refused: "No available kernel".
ATTENTION_KERNELS = {
    "attention: flash kernel wherever it can": (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
    "attention: memory-efficient kernel": (SDPBackend.EFFICIENT_ATTENTION,),
}


def optimizer_times():
    """Milliseconds of a step of the loss scaler and the optimizer, over 304 tensors and over 2."""
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
    """train.py's loop in this process: its variants, then with one technique taken away at a time."""
    import train
    from bench.limits import rates

    print(
        "{:.0f} TFLOP/s in a large fp16 matrix product, {:.2f} TB/s in a large copy".format(
            *(r / 1e12 for r in rates())
        )
    )
    optimizer_times()
    record, flatten = graphs.captured, parameters.flatten_parameters

    def autocast(functions, *others):
        return record([torch.autocast("cuda", torch.float16)(f) for f in functions], *others)

    def called(functions, *others):
        return functions

    def taken_away(device):
        return "taken away"

    def searched(functions, *others):
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            return record(functions, *others)

    def compiled(model, *others):
        if hasattr(model, "compile_repeated_blocks"):
            model.compile_repeated_blocks()
        return [PeftLayers(model)]

    recomputing, small = dict(gradient_checkpointing=True), dict(rank=8, alpha=8.0)
    unet_only, dora, eight = dict(train_text_encoder=False), dict(dora=True), dict(batch_size=8)
    plain_loss = dict(unet_targets=("attn2.to_k", "attn2.to_v"), protected_prompts="prompts/protected.txt")
    protected = plain_loss | dict(loss_guidance_scale=(1.0, 2.0))
    random_text = dict(SET_APART=math.inf)  # a text encoder of random weights need not tell prompts apart
    # (name, what differs in the configuration, what is replaced: see `replacing`)
    variants = [
        ("train.py, with checkpointing", recomputing, {}),
        ("rank 8, with checkpointing", recomputing | small, {}),
        ("UNet only, with checkpointing", recomputing | unet_only, {}),
        ("train.py without checkpointing", {}, {}),
        ("rank 8 without", small, {}),
        ("UNet only without", unet_only, {}),
        ("DoRA, with checkpointing", recomputing | dora, {}),
        ("protected, ordinary loss, with checkpointing", recomputing | plain_loss, random_text),
        ("protected, with checkpointing", recomputing | protected, random_text),
        ("batches of 8, with checkpointing", recomputing | eight, {}),
        ("DoRA without", dora, {}),
        ("protected, ordinary loss, without", plain_loss, random_text),
        ("protected without", protected, random_text),
        ("batches of 8 without", eight, {}),
        ("DoRA in PEFT's layers", dora, PEFT),
        ("- CUDA graph", {}, dict(captured=called)),
        ("- updates without a wait (bitsandbytes' AdamW)", {}, dict(missing_kernels=taken_away)),
        ("- joined layers", {}, dict(fuse_projections=apart)),
        ("- joined layers, fused LoRA layers (PEFT's)", {}, PEFT),
        (
            "- these, fp16 copy (autocast)",
            {},
            PEFT | dict(captured=autocast, flatten_parameters=lambda weights, dtype: flatten(weights, torch.float32)),
        ),
        ("- sums with layer norms, CLIP's activation", {}, dict(plain_modules=no_transformers)),
        ("- Triton kernels (channels-last stays)", {}, dict(channels_last=converted)),
        ("- Triton kernels, channels-last", {}, dict(channels_last=nothing)),
        ("- all of these", {}, PEFT | dict(channels_last=nothing, captured=called, missing_kernels=taken_away)),
    ]
    if args.others:
        variants += [(name, {}, attending(*backends)) for name, backends in ATTENTION_KERNELS.items()]
        variants.append(("cuDNN's search for the fastest convolutions", {}, dict(captured=searched)))
        variants.append(
            (
                "torch.compile of the blocks in place of fused layers and Triton kernels",
                {},
                PEFT | dict(fuse_lora=compiled, channels_last=converted, compile_attention=as_met),
            )
        )
    print("| | ms/step | steps/s | GiB reserved | GiB, driver | set-up s |\n|---|--:|--:|--:|--:|--:|", flush=True)
    for name, differs, replaced in variants:
        if not re.search(args.only, name):
            continue
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        steps = args.plain_steps if replaced.get("captured") is called else args.steps
        config = (
            train.CONFIG
            | dict(
                base_model=args.base_model,
                output_dir=str(folder),
                run_name="part",
                resume=False,
                gradient_checkpointing=False,
                max_steps=steps,
                warmup_steps=10,
                validation_count=0,
                preview_every=0,
                snapshot_every=0,
            )
            | differs
        )
        with replacing(replaced), contextlib.redirect_stdout(sys.stderr), watched() as memory:
            try:
                train.train(config)
            except Exception as problem:
                print(f"{name}: {type(problem).__name__}: {str(problem)[:300]}")
                continue
        result = json.loads((folder / "part" / "config.json").read_text())
        rate = result["steps_a_second"]
        print(
            f"| {name} | {1e3 / rate:.1f} | {rate:.1f} | {result['peak_gib_reserved']:.2f} | "
            f"{memory[0] / 1024:.2f} | {result['set_up_seconds']:.1f} |",
            flush=True,
        )


def demo(args, folder):
    output = run("tests/plain_loop.py", "--demo", "--max-steps", args.plain_steps)[0]
    print(re.search(r"plain loop: [\d.]+ ms.*", output)[0])
    result, *_ = ours(folder, ("--demo", "--max-steps", args.steps))
    print(f"train.py --demo: {result['steps_a_second']:.1f} steps/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = dict(scripts=scripts, parts=parts, demo=demo)
    parser.add_argument("table", choices=tables)
    parser.add_argument("--base-model")
    parser.add_argument("--diffusers-script", type=lambda path: Path(path).resolve())
    parser.add_argument("--steps", type=int, default=400, help="of our scripts")
    parser.add_argument("--plain-steps", type=int, default=80, help="of the slow loops")
    parser.add_argument("--only", default="", help="parts: variants whose name matches this")
    parser.add_argument("--others", action="store_true", help="parts: also what was not taken")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="train_speed_"))
    try:
        tables[args.table](args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
