#!/usr/bin/env python3
"""How seconds and memory of each script grow with the number of images.

    python bench/growth.py WORK                           # 32, 300 and 3,000 made-up images, on the miniature
    python bench/growth.py WORK --counts 32,300,3000,10000 --chart bench/growth.png

For each number of images of 900x1200: preprocess.py; train.py, which encodes the images, and again, which finds
their latents kept; inference.py, which embeds them, and again. Training takes a few steps and evaluation draws a few
images, so that what grows is what the images cost. Memory is that of a script and its processes together, shared
pages counted once (PSS), sampled while it runs. Prints a table as it goes; WORK is a folder for the images and all
that is made of them, a megabyte an image, and may be removed afterwards.
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


def make_pictures(folder, count):
    """So many different JPEG files in `folder`: smooth colours under a finer pattern, as noisy as photographs."""
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
    """PSS of a process and all that it started, MB."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total / 1e6


def measured(script, *options):
    """(seconds, MB at most) of a script at the root; stops the bench if it fails."""
    started, most = time.perf_counter(), 0.0
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
                most = max(most, tree_megabytes(process))
        if child.returncode:
            sys.exit(f"{' '.join(command)} ended with {child.returncode}")
    return time.perf_counter() - started, most


def measure(work, count, resolution):
    """[(seconds, MB)] of COLUMNS for so many images."""
    folder = work / str(count)
    make_pictures(folder / "data", count)
    data, runs = folder / "processed", folder / "runs"
    data_options = ("--data-dir", data)
    found = [measured("preprocess.py", "--data-dir", folder / "data", "--output-dir", data, "--resolution", resolution)]
    training = (
        "--demo",
        *data_options,
        "--output-dir",
        runs,
        "--max-steps",
        10,
        "--warmup-steps",
        1,
        "--validate-every",
        10,
    )
    evaluating = (
        "--demo",
        *data_options,
        "--lora-dir",
        runs,
        "--output-dir",
        folder / "results",
        "--seeds",
        2,
        "--steps",
        2,
    )
    for script, options in (("train.py", training), ("inference.py", evaluating)):
        found += [measured(script, *options) for _ in range(2)]
    return found


def draw_chart(rows, path):
    """Two panels, seconds and memory over the number of images, a line a script."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, place, title in zip(figure.subplots(1, 2), (0, 1), ("seconds", "MB"), strict=True):
        for number, name in enumerate(COLUMNS):
            values = [found[number][place] for _, found in rows]
            axes.plot([count for count, _ in rows], values, "o-", label=name)
        axes.set(xlabel="pictures", title=title, xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--counts", default="32,300,3000", help="numbers of images, with commas")
    parser.add_argument("--chart", type=Path, help="where the chart goes, a PNG file")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from train import DEMO

    print("| images | " + " | ".join(f"{name}: s | MB" for name in COLUMNS) + " |")
    print("|--:|" + "--:|" * 2 * len(COLUMNS))
    rows = []
    for count in map(int, arguments.counts.split(",")):
        found = measure(arguments.work.resolve(), count, DEMO["resolution"])
        rows.append((count, found))
        print(f"| {count:,} | " + " | ".join(f"{s:.1f} | {mb:.0f}" for s, mb in found) + " |", flush=True)
    if arguments.chart:
        draw_chart(rows, arguments.chart)


if __name__ == "__main__":
    main()
