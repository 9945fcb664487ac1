#!/usr/bin/env python3
"""How fast train.py is, how much memory it takes, and what each of its techniques is worth.

    python bench/random_sd15.py MODEL
    python bench/train_speed.py scripts --base-model MODEL [--diffusers-script PATH]
    python bench/train_speed.py parts --base-model MODEL
    python bench/train_speed.py whole --base-model MODEL
    python bench/train_speed.py demo                        # the miniature, on a CPU

Needs processed_data/ (python preprocess.py). `scripts` runs each script in a process of its own, and asks
the driver for its memory too. `parts` runs train.py's loop with one technique taken away at a time.
`whole` is one run of 4000 steps, from the command to the saved adapter. PATH is
examples/dreambooth/train_dreambooth_lora.py of a diffusers checkout.
"""

import argparse
import contextlib
import gc
import json
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


def driver_memory():
    """MiB of GPU memory in use, as the driver counts it; 0 without a GPU."""
    with contextlib.suppress(OSError, ValueError):
        asked = "nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -i 0".split()
        return int(subprocess.run(asked, capture_output=True, text=True).stdout)
    return 0


def run(*command):
    """Run a command; returns (its output, wall seconds, most MiB the driver saw in use by it)."""
    before, most, done = driver_memory(), [0], threading.Event()

    def watch():
        while not done.wait(0.2):
            most[0] = max(most[0], driver_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    process = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                             cwd=ROOT)  # fmt: skip
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    if process.returncode:
        print(f"{' '.join(map(str, command))} failed:\n{process.stderr[-3000:]}", file=sys.stderr)
    return process.stdout + process.stderr, seconds, most[0]


def ours(folder, script, options):
    """(config.json of a run of one of our scripts, wall seconds, driver's MiB); None if it failed."""
    output, seconds, memory = run(
        script, *options, "--output-dir", folder, "--run-name", "run", "--no-resume"
    )
    try:
        return json.loads((folder / "run" / "config.json").read_text()), seconds, memory
    except OSError:
        print(output[-2000:])
        return None, seconds, memory


def scripts(args, folder):
    base = ("--base-model", args.base_model)
    print("| | ms/step | steps/s | GiB reserved | GiB, driver | set-up s |\n|---|--:|--:|--:|--:|--:|", flush=True)  # fmt: skip

    def row(name, line):
        output, seconds, memory = line
        found = re.search(r"([\d.]+) ms/step = ([\d.]+) steps/s; ([\d.]+) GiB", output)
        if found:
            print(f"| {name} | {found[1]} | {found[2]} | {found[3]} | {memory / 1024:.2f} | |", flush=True)  # fmt: skip

    steps = ("--max-steps", args.plain_steps)
    row("the study's settings, plain loop", run("bench/plain_loop.py", *base, *steps))
    if args.diffusers_script:
        pictures = ROOT / "processed_data" / "images"
        row("diffusers' train_dreambooth_lora.py", run(
            "bench/time_script.py", args.diffusers_script, "--pretrained_model_name_or_path", args.base_model,
            "--instance_data_dir", pictures, "--instance_prompt", "a holographic raincoat", "--output_dir",
            folder / "theirs", "--train_text_encoder", "--rank", 32, "--resolution", 512, "--train_batch_size", 1,
            "--learning_rate", "1e-4", "--lr_scheduler", "cosine", "--lr_warmup_steps", 50, "--use_8bit_adam",
            "--mixed_precision", "fp16", "--gradient_checkpointing", "--max_train_steps", args.plain_steps,
            "--checkpointing_steps", 10000, "--seed", 42,
        ))  # fmt: skip
    plain = ("--no-gradient-checkpointing",)
    for name, script, options in (
        ("train.py", "train.py", ()),
        ("train_experiment_rank8.py", "train_experiment_rank8.py", ()),
        ("train_experiment_unet_only.py", "train_experiment_unet_only.py", ()),
        ("train.py without checkpointing", "train.py", plain),
        ("rank 8 without", "train_experiment_rank8.py", plain),
        ("UNet only without", "train_experiment_unet_only.py", plain),
    ):
        result, seconds, memory = ours(folder, script, (*base, "--max-steps", args.steps, *options))
        if result:
            rate = result["steps_a_second"]
            print(f"| {name} | {1e3 / rate:.1f} | {rate:.1f} | {result['peak_gib_reserved']:.2f} | "
                  f"{memory / 1024:.2f} | {result['set_up_seconds']:.1f} |", flush=True)  # fmt: skip


def whole(args, folder):
    result, seconds, memory = ours(folder, "train.py", ("--base-model", args.base_model))
    if result:
        print(f"4000 steps from the command to the adapter: {seconds:.1f} s, of it set-up {result['set_up_seconds']:.1f} s "
              f"after the imports; {result['steps_a_second']:.1f} steps/s; {result['peak_gib_reserved']:.2f} GiB reserved, "
              f"{memory / 1024:.2f} GiB as the driver sees it")  # fmt: skip


def parts(args, folder):
    """train.py's loop in this process, one technique taken away at a time."""
    import torch

    import fast
    import train

    record = fast.captured

    def autocast(functions, *others):
        return record([torch.autocast("cuda", torch.float16)(f) for f in functions], *others)

    flatten = train.flatten_parameters
    half = dict(flatten_parameters=lambda weights, dtype: flatten(weights, torch.float32))
    variants = {
        "train.py": {},
        "no CUDA graph": dict(captured=lambda functions, *_: functions),
        "PEFT's LoRA layers": dict(fuse_lora=lambda model: None),
        "PEFT's layers, LoRA weights in float32 under autocast": dict(
            fuse_lora=lambda model: None, captured=autocast, train=half
        ),
        "no Triton kernels (channels-last all the same)": dict(
            channels_last=lambda model, say=None: model.to(memory_format=torch.channels_last)
        ),
        "no channels-last": dict(channels_last=lambda model, say=None: None),
        "none of them": dict(
            fuse_lora=lambda model: None, captured=lambda functions, *_: functions,
            channels_last=lambda model, say=None: None,
        ),
    }  # fmt: skip
    if args.compile:

        def compiled(model):
            if hasattr(model, "compile_repeated_blocks"):
                model.compile_repeated_blocks()

        variants["and UNet blocks compiled (diffusers' regional compilation)"] = dict(fuse_lora=compiled)  # fmt: skip
    print("| | ms/step | steps/s | GiB reserved | set-up s |\n|---|--:|--:|--:|--:|", flush=True)
    for name, changes in variants.items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        eager = "captured" in changes and changes["captured"] is not autocast
        config = train.CONFIG | dict(
            base_model=args.base_model, output_dir=str(folder), run_name="part", resume=False,
            gradient_checkpointing=False, max_steps=args.plain_steps if eager else args.steps,
            warmup_steps=10, validation_count=0,
        )  # fmt: skip
        with contextlib.ExitStack() as stack, contextlib.redirect_stdout(sys.stderr):
            changes = dict(changes)
            for key, value in changes.pop("train", {}).items():
                stack.enter_context(patch.object(train, key, value))
            for key, value in changes.items():
                stack.enter_context(patch.object(fast, key, value))
            try:
                train.train(**config)
            except Exception as problem:
                print(f"{name}: {type(problem).__name__}: {str(problem)[:300]}")
                continue
        result = json.loads((folder / "part" / "config.json").read_text())
        rate = result["steps_a_second"]
        print(f"| {name} | {1e3 / rate:.1f} | {rate:.1f} | {result['peak_gib_reserved']:.2f} | "
              f"{result['set_up_seconds']:.1f} |", flush=True)  # fmt: skip


def demo(args, folder):
    output = run("bench/plain_loop.py", "--demo", "--max-steps", args.plain_steps)[0]
    print(output.splitlines()[-1])
    result, *_ = ours(folder, "train.py", ("--demo", "--max-steps", args.steps))
    print(f"train.py --demo: {result['steps_a_second']:.1f} steps/s")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = dict(scripts=scripts, parts=parts, whole=whole, demo=demo)
    parser.add_argument("table", choices=tables)
    parser.add_argument("--base-model")
    parser.add_argument("--diffusers-script", type=lambda path: Path(path).resolve())
    parser.add_argument("--steps", type=int, default=400, help="of our scripts")
    parser.add_argument("--plain-steps", type=int, default=80, help="of the slow loops")
    parser.add_argument("--compile", action="store_true", help="also try regional compilation")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="train_speed_"))
    try:
        tables[args.table](args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
