#!/usr/bin/env python3
"""Speed, memory and reproducibility of generation with inference.py.

    python -m demo.random_sd15 MODEL
    python bench/generation_speed.py --base-model MODEL --lora-dir MODEL/adapter --clip-model MODEL/clip
    python bench/generation_speed.py --demo                   # the miniature, on a CPU

First the whole evaluation in a process of its own, on a GPU twice: with empty kernel caches, as on a machine's first
run, and again. Then the study's way (two pipelines, one image at a time), and inference.py's generation with one
technique removed at a time. `difference` is the mean absolute difference of the pixels (0 to 255) from the row "ours, 8
at once", for the same prompts and seeds.
"""

import argparse
import contextlib
import gc
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

import inference
import train
from bench.train_speed import ATTENTION_KERNELS, apart, converted, nothing, run, with_attention
from lib import adapter_files, adapters
from lib.evaluation import generation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float16 if DEVICE.type == "cuda" else torch.float32
DEMO = inference.DEMO | dict(lora_dir="lora_weights/study/seed42/rank32_seed42")
JOBS = [(prompt, seed) for seed in (1, 2, 3, 4) for _, prompt in inference.PROMPTS[:4]]


def clock():
    """Seconds, once the GPU has finished."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def free_memory():
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def row(name, seconds, images, reference):
    memory = torch.cuda.max_memory_reserved() / 2**30 if DEVICE.type == "cuda" else float("nan")
    difference = ""
    if reference is not None:
        pairs = zip(images, reference, strict=False)
        distances = [np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean() for a, b in pairs]
        difference = f"{np.mean(distances):.2f}"
    print(f"| {name} | {seconds:.3f} | {memory:.2f} | {difference} |", flush=True)


def plain(args, settings, count):
    """The study's way: base and LoRA pipelines, one image at a time; (s per image, LoRA images)."""
    pipelines = []
    for lora in (False, True):
        pipeline = StableDiffusionPipeline.from_pretrained(ROOT / args.base_model, dtype=DTYPE, safety_checker=None)
        pipeline.to(DEVICE).set_progress_bar_config(disable=True)
        if lora:
            pipeline.load_lora_weights(ROOT / args.lora_dir)
        pipelines.append(pipeline)
    side = settings["resolution"]

    def generate(pipeline, prompt, seed, steps=settings["steps"]):
        generator = torch.Generator().manual_seed(seed)
        channels, size = pipeline.unet.config.in_channels, generation.latent_size(pipeline, side)
        noise = torch.randn(1, channels, *size, generator=generator).to(DEVICE, DTYPE)
        options = dict(num_inference_steps=steps, guidance_scale=settings["guidance_scale"])
        return pipeline(prompt, latents=noise, height=side, width=side, **options).images[0]

    generate(pipelines[1], *JOBS[0], steps=2)
    started = clock()
    images = [[generate(pipeline, *job) for job in JOBS[:count]] for pipeline in pipelines]
    return (clock() - started) / (2 * count), images[1]


def ours(args, settings, batch_size, merged=True, graph=True):
    """inference.py's way; (s per image, images)."""
    pipeline = generation.load_pipeline(ROOT / args.base_model, DTYPE, DEVICE)
    if merged:
        adapter = adapter_files.read_adapter(ROOT / args.lora_dir)
        adapters.Applied(adapter, generation.models_of(pipeline))
    else:
        pipeline.load_lora_weights(ROOT / args.lora_dir)
    if graph:
        size = generation.latent_size(pipeline, settings["resolution"])
        generation.capture_unet(pipeline, batch_size, size, settings["guidance_scale"] > 1)
    generation.generate(pipeline, JOBS[:batch_size], batch_size=batch_size, title="", **settings | dict(steps=2))
    started = clock()
    images = generation.generate(pipeline, JOBS, batch_size=batch_size, title="", **settings)
    return (clock() - started) / len(JOBS), images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="the miniature")
    parser.add_argument("--base-model", default=DEMO["base_model"])
    parser.add_argument("--lora-dir", default=DEMO["lora_dir"])
    parser.add_argument("--clip-model", default=DEMO["clip_model"])
    args = parser.parse_args()
    whole(args)
    settings = dict(steps=28, guidance_scale=6.0, resolution=train.DEMO["resolution"] if args.demo else 512)
    on_cuda = DEVICE.type == "cuda"
    print("| | s/image | GiB reserved | difference |\n|---|--:|--:|--:|", flush=True)
    free_memory()
    study = plain(args, settings, 2 if on_cuda else 4)
    row("the study's way", *study, None)
    # (name, arguments of ours(), replacements in generation.py)
    variants = [("ours, 8 at once", dict(batch_size=8), {})]
    variants += [(f"{size} at once", dict(batch_size=size), {}) for size in ((1, 4, 16) if on_cuda else (1, 4))]
    if on_cuda:
        variants += [
            ("- CUDA graph", dict(graph=False), {}),
            ("- Triton kernels (channels-last stays)", {}, dict(channels_last=converted)),
            ("- Triton kernels, channels-last", {}, dict(channels_last=nothing)),
        ]
        variants += [(name, {}, with_attention(*backends)) for name, backends in ATTENTION_KERNELS.items()]
    variants.append(("- fused projections", {}, dict(fuse_projections=apart)))
    variants.append(("- fused projections, merging (PEFT's layers)", dict(merged=False), dict(fuse_projections=apart)))
    reference = None
    for name, options, replacements in variants:
        free_memory()
        with patch.multiple(generation, **replacements) if replacements else contextlib.nullcontext():
            seconds, images = ours(args, settings, **dict(batch_size=8) | options)
        row(name, seconds, images, reference)
        if reference is None:
            reference = images
            row("(the study's way against ours)", study[0], study[1], reference)


def whole(args):
    """inference.py in a process of its own: on a GPU with empty kernel caches, then again."""
    folder = Path(tempfile.mkdtemp(prefix="generation_speed_"))
    options = ["--demo"] if args.demo else ["--base-model", args.base_model, "--clip-model", args.clip_model]
    options += ["--similarity-model", "clip"]
    options += ["--lora-dir", args.lora_dir, "--output-dir", folder / "results"]
    try:
        for name in ("first run", "second run") if DEVICE.type == "cuda" else ("inference.py",):
            output, seconds, memory = run("inference.py", *options, caches=folder / "caches")
            print("\n".join(re.findall(r"\d+ images in .*", output)) or output[-2000:])
            print(f"{name}: {seconds:.1f} s with the imports, {memory / 1024:.2f} GiB by the driver\n", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
