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
    """Render parts of the data to work_dir/PART, of those that are not there yet.

    Other processes draw and describe the scenes while this one renders; they must be forked before
    CUDA starts. With `render_minutes` over, what is left is left out.
    """
    started, on_gpu = time.time(), config["device"] == "cuda"
    parts = parts or config["render_parts"]
    Path(config["work_dir"]).mkdir(parents=True, exist_ok=True)
    (Path(config["work_dir"]) / ".gitignore").write_text("*\n")  # nothing in it is for git
    jobs = [job for part in parts for job in jobs_of(config, part)]
    done, total = 0, sum(job[-1] for job in jobs)
    context = multiprocessing.get_context("fork")
    over = context.Event()
    pool = context.Pool(min(os.cpu_count(), len(jobs) or 1), start_worker, (over,))
    for path, scenes, numbers, described in pool.imap(prepare, jobs):
        if over.is_set():
            continue
        pictures = world.render(scenes, config["resolution"], config["device"], config["antialias"], numbers=numbers)
        if described:
            np.savez(path.with_suffix(".npz"), **described)
        # Last, and beside and renamed: with its images a shard is whole.
        beside = path.with_suffix(".partial")
        with beside.open("wb") as file:
            np.save(file, pictures.cpu().numpy())
        beside.replace(path)
        done += len(scenes)
        print(f"rendered {done}/{total}, {time.time() - started:.0f} s", flush=True)
        if time.time() - started > 60 * config["render_minutes"] and done < total:
            print(f"render_minutes are over: {total - done} images left out", flush=True)
            over.set()
    pool.close()
    pool.join()
    if on_gpu:
        torch.cuda.empty_cache()
    record_run("render", config, started, done, name="render_" + "_".join(parts))


def jobs_of(config, part):
    """(config, part, path, first, count) of each shard of a part that is missing."""
    folder, total = Path(config["work_dir"]) / part, config[f"{part}_pictures"]
    folder.mkdir(exist_ok=True)
    jobs = [
        (config, part, folder / f"{first:07d}.npy", first, min(_SHARD, total - first))
        for first in range(0, total, _SHARD)
    ]
    return [job for job in jobs if not job[2].is_file()]


_over = None  # in a worker: set when nothing more is wanted


def start_worker(over):
    """Let the process that renders go first, and end where it ends."""
    global _over
    _over = over
    os.nice(10)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def prepare(job):
    """What a shard needs besides its images: (path, scenes, numbers of them, captions and codes)."""
    config, part, path, first, count = job
    if _over.is_set():
        return path, [], None, {}
    scenes = sample_part(config, part, first, count)
    described = {} if part == "foil" else describe(config, part, first, scenes)
    return path, scenes, numbers_of(scenes), described
