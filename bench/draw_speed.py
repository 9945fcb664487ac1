#!/usr/bin/env python3
"""How fast inference.py draws, how much memory it takes, and whether its images stay the same.

    python -m demo.random_sd15 MODEL
    python bench/draw_speed.py --base-model MODEL --lora-dir MODEL/adapter --clip-model MODEL/clip
    python bench/draw_speed.py --demo                   # the miniature, on a CPU

First the whole evaluation in a process of its own, on a GPU twice: with no kernel compiled before, as on
the first run of a machine, and again. Then the study's way, two pipelines and one image at a time,
and inference.py's own drawing with one technique taken away at a time. `difference` is the mean
difference of the pixels (0 to 255) from the first row of ours, for the same prompts and seeds.
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
from bench.train_speed import ATTENTION_KERNELS, apart, attending, converted, nothing, run
from lib import adapter_files, adapters
from lib.evaluation import generation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float16 if DEVICE.type == "cuda" else torch.float32
DEMO = inference.DEMO | dict(lora_dir="lora_weights/study/seed42/rank32_seed42")
JOBS = [(prompt, seed) for seed in (1, 2, 3, 4) for _, prompt in inference.PROMPTS[:4]]


def waited():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def fresh():
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def row(name, seconds, images, reference):
    memory = torch.cuda.max_memory_reserved() / 2**30 if DEVICE.type == "cuda" else float("nan")
    difference = ""
    if reference is not None:
        pairs = zip(images, reference, strict=False)
        apart = [np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean() for a, b in pairs]
        difference = f"{np.mean(apart):.2f}"
    print(f"| {name} | {seconds:.3f} | {memory:.2f} | {difference} |", flush=True)


def plain(args, how, count):
    """The study's way: base and LoRA pipelines, one image at a time; (s an image, LoRA images)."""
    pipelines = []
    for lora in (False, True):
        pipeline = StableDiffusionPipeline.from_pretrained(
            ROOT / args.base_model, torch_dtype=DTYPE, safety_checker=None
        ).to(DEVICE)
        pipeline.set_progress_bar_config(disable=True)
        if lora:
            pipeline.load_lora_weights(ROOT / args.lora_dir)
        pipelines.append(pipeline)

    def draw(pipeline, prompt, seed, steps=how["steps"]):
        size = generation.latent_size(pipeline, how["resolution"])
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, pipeline.unet.config.in_channels, *size, generator=generator)
        return pipeline(
            prompt,
            latents=noise.to(DEVICE, DTYPE),
            num_inference_steps=steps,
            height=how["resolution"],
            width=how["resolution"],
            guidance_scale=how["guidance_scale"],
        ).images[0]

    draw(pipelines[1], *JOBS[0], steps=2)
    started = waited()
    images = [[draw(pipeline, *job) for job in JOBS[:count]] for pipeline in pipelines]
    return (waited() - started) / (2 * count), images[1]


def ours(args, how, batch_size, merged=True, graph=True):
    """inference.py's way; (s an image, images)."""
    pipeline = generation.load_pipeline(ROOT / args.base_model, DTYPE, DEVICE)
    if merged:
        adapter = adapter_files.read_adapter(ROOT / args.lora_dir)
        adapters.Applied(adapter, generation.models_of(pipeline))
    else:
        pipeline.load_lora_weights(ROOT / args.lora_dir)
    if graph:
        size = generation.latent_size(pipeline, how["resolution"])
        generation.record_unet(pipeline, batch_size, size, how["guidance_scale"] > 1)
    generation.generate(pipeline, JOBS[:batch_size], batch_size=batch_size, title="", **how | dict(steps=2))
    started = waited()
    images = generation.generate(pipeline, JOBS, batch_size=batch_size, title="", **how)
    return (waited() - started) / len(JOBS), images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--base-model", default=DEMO["base_model"])
    parser.add_argument("--lora-dir", default=DEMO["lora_dir"])
    parser.add_argument("--clip-model", default=DEMO["clip_model"])
    args = parser.parse_args()
    whole(args)
    how = dict(steps=28, guidance_scale=6.0, resolution=train.DEMO["resolution"] if args.demo else 512)
    on_cuda = DEVICE.type == "cuda"
    print("| | s/image | GiB reserved | difference |\n|---|--:|--:|--:|", flush=True)
    fresh()
    study = plain(args, how, 2 if on_cuda else 4)
    row("the study's way", *study, None)
    # (name, how ours() is called, what is replaced in generation.py)
    variants = [("ours, 8 at once", dict(batch_size=8), {})]
    variants += [(f"{size} at once", dict(batch_size=size), {}) for size in ((1, 4, 16) if on_cuda else (1, 4))]
    if on_cuda:
        variants += [
            ("- CUDA graph", dict(batch_size=8, graph=False), {}),
            ("- Triton kernels (channels-last stays)", dict(batch_size=8), dict(channels_last=converted)),
            ("- Triton kernels, channels-last", dict(batch_size=8), dict(channels_last=nothing)),
        ]
        variants += [(name, dict(batch_size=8), attending(*backends)) for name, backends in ATTENTION_KERNELS.items()]
    variants.append(("- joined layers", dict(batch_size=8), dict(fuse_projections=apart)))
    variants.append(
        ("- joined layers, merging (PEFT's layers)", dict(batch_size=8, merged=False), dict(fuse_projections=apart))
    )
    reference = None
    for name, options, replaced in variants:
        fresh()
        with patch.multiple(generation, **replaced) if replaced else contextlib.nullcontext():
            seconds, images = ours(args, how, **options)
        row(name, seconds, images, reference)
        if reference is None:
            reference = images
            row("(the study's way against ours)", study[0], study[1], reference)


def whole(args):
    """inference.py in a process of its own: on a GPU with no kernel compiled before, then again."""
    folder = Path(tempfile.mkdtemp(prefix="draw_speed_"))
    options = ["--demo"] if args.demo else ["--base-model", args.base_model, "--clip-model", args.clip_model]
    options += ["--lora-dir", args.lora_dir, "--output-dir", folder / "results"]
    try:
        for name in ("first run", "second run") if DEVICE.type == "cuda" else ("inference.py",):
            output, seconds, memory = run("inference.py", *options, caches=folder / "caches")
            print("\n".join(re.findall(r"\d+ images in .*", output)) or output[-2000:])
            print(
                f"{name}: {seconds:.1f} s with the imports, {memory / 1024:.2f} GiB as the driver sees it\n", flush=True
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
