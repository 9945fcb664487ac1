"""Stage render: images of random scenes, with and without holographic things."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch

from demo import world
from demo.build.data import describe, sample_part
from demo.build.journal import record_run
from demo.world.rendering import numbers_of

_SHARD = 1024  # images


def render(config, parts=None):
    """Render the missing shards of parts to work_dir/PART.

    Other processes sample and describe the scenes meanwhile; they must be forked before CUDA starts. Images that are
    not rendered within `render_minutes` are left out.
    """
    started, on_gpu = time.time(), config["device"] == "cuda"
    parts = parts or config["render_parts"]
    Path(config["work_dir"]).mkdir(parents=True, exist_ok=True)
    (Path(config["work_dir"]) / ".gitignore").write_text("*\n")  # git ignores the folder
    jobs = [job for part in parts for job in jobs_of(config, part)]
    done, total = 0, sum(job[-1] for job in jobs)
    context = multiprocessing.get_context("fork")
    over = context.Event()
    pool = context.Pool(min(os.cpu_count(), len(jobs) or 1), start_worker, (over,))
    for path, scenes, numbers, described in pool.imap(prepare, jobs):
        if over.is_set():
            continue
        images = world.render(scenes, config["resolution"], config["device"], config["antialias"], numbers=numbers)
        if described:
            np.savez(path.with_suffix(".npz"), **described)
        # Last, and renamed: a shard with images is complete.
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, images.cpu().numpy())
        partial.replace(path)
        done += len(scenes)
        print(f"rendered {done}/{total}, {time.time() - started:.0f} s", flush=True)
        if time.time() - started > 60 * config["render_minutes"] and done < total:
            print(f"render_minutes exceeded: {total - done} images left out", flush=True)
            over.set()
    pool.close()
    pool.join()
    if on_gpu:
        torch.cuda.empty_cache()
    record_run("render", config, started, done, name="render_" + "_".join(parts))


def jobs_of(config, part):
    """(config, part, path, first, count) of each missing shard of a part."""
    folder, total = Path(config["work_dir"]) / part, config[f"{part}_pictures"]
    folder.mkdir(exist_ok=True)
    jobs = [
        (config, part, folder / f"{first:07d}.npy", first, min(_SHARD, total - first))
        for first in range(0, total, _SHARD)
    ]
    return [job for job in jobs if not job[2].is_file()]


_over = None  # in a worker: set when the time is up


def start_worker(over):
    """Give the rendering process priority, and end when it ends."""
    global _over
    _over = over
    os.nice(10)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def prepare(job):
    """(path, scenes, their parameters, captions and codes) of a shard."""
    config, part, path, first, count = job
    if _over.is_set():
        return path, [], None, {}
    scenes = sample_part(config, part, first, count)
    described = {} if part == "foil" else describe(config, part, first, scenes)
    return path, scenes, numbers_of(scenes), described
