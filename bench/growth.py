#!/usr/bin/env python3
"""Seconds and memory of each script over the number of images.

    python bench/growth.py WORK                           # 32, 300 and 3,000 made-up images, the miniature
    python bench/growth.py WORK --counts 32,300,3000,10000 --chart bench/growth.png

For each number of images of 900x1200: preprocess.py; train.py twice (it encodes the images, then finds cached latents);
inference.py twice (it embeds them, then finds cached embeddings). Training takes a few steps and evaluation generates a
few images, so what grows is the cost of the images. Memory is that of a script and its processes together, shared pages
counted once (PSS), sampled five times a second. Prints the table row by row. WORK is a folder for the images and
everything made from them, about a megabyte per image; delete it afterwards.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SIZE = (900, 1200)
COLUMNS = ("preprocess.py", "train.py, first", "train.py, again", "inference.py, first", "inference.py, again")


def make_images(folder, count):
    """Write `count` different JPEG files: smooth colours under a finer pattern, as noisy as photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{number:05}.jpg"
        if path.exists():
            continue
        rng = np.random.default_rng(number)
        layers = []
        for cells, strength in (((9, 12), 1.0), ((225, 300), 0.15)):
            small = rng.integers(0, 256, (cells[1], cells[0], 3), dtype=np.uint8)
            large = Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC)
            layers.append((np.asarray(large, np.float32) - 128) * strength)
        pixels = (sum(layers) + 128).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=90)


def tree_megabytes(process):
    """PSS of a process and its children, MB."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except psutil.Error:  # it has just exited
            continue
    return total / 1e6


def measured(script, *options):
    """(seconds, peak MB) of a script of the repository; exits if it fails."""
    started, peak = time.perf_counter(), 0.0
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    environment = os.environ | {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as child:
        process = psutil.Process(child.pid)
        while True:
            try:
                child.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, tree_megabytes(process))
        if child.returncode:
            sys.exit(f"{' '.join(command)} failed with exit status {child.returncode}")
    return time.perf_counter() - started, peak


def measure(work, count, resolution):
    """[(seconds, MB)] of COLUMNS for `count` images."""
    folder = work / str(count)
    make_images(folder / "data", count)
    data, runs = folder / "processed", folder / "runs"
    demo = ("--demo", "--data-dir", data)
    training = [*demo, "--output-dir", runs, *"--max-steps 10 --warmup-steps 1 --validate-every 10".split()]
    evaluation = [*demo, "--lora-dir", runs, "--output-dir", folder / "results", *"--seeds 2 --steps 2".split()]
    costs = [measured("preprocess.py", "--data-dir", folder / "data", "--output-dir", data, "--resolution", resolution)]
    for script, options in (("train.py", training), ("inference.py", evaluation)):
        costs += [measured(script, *options) for _ in range(2)]
    return costs


def draw_chart(rows, path):
    """Two panels, seconds and memory over the number of images, one line per script."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, place, title in zip(figure.subplots(1, 2), (0, 1), ("seconds", "MB"), strict=True):
        for number, name in enumerate(COLUMNS):
            values = [costs[number][place] for _, costs in rows]
            axes.plot([count for count, _ in rows], values, "o-", label=name)
        axes.set(xlabel="images", title=title, xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for images and results")
    parser.add_argument("--counts", default="32,300,3000", help="numbers of images, separated by commas")
    parser.add_argument("--chart", type=Path, help="PNG file for the chart")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from train import DEMO

    print("| images | " + " | ".join(f"{name}: s | MB" for name in COLUMNS) + " |")
    print("|--:|" + "--:|" * 2 * len(COLUMNS))
    rows = []
    for count in map(int, arguments.counts.split(",")):
        costs = measure(arguments.work.resolve(), count, DEMO["resolution"])
        rows.append((count, costs))
        print(f"| {count:,} | " + " | ".join(f"{s:.1f} | {mb:.0f}" for s, mb in costs) + " |", flush=True)
    if arguments.chart:
        draw_chart(rows, arguments.chart)


if __name__ == "__main__":
    main()
