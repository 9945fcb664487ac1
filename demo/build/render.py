"""Stage render: pictures of random scenes, with and without holographic things."""

import contextlib
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np

from demo import world
from demo.build.data import PARTS, describe
from demo.build.journal import record_run


def render(config, parts=PARTS):
    """Render parts of the data to work_dir/PART.npy, uint8 [N, size, size, 3].

    On a GPU several processes share it: the renderer compiles a program for every kind of scene,
    which takes a core some seconds, so that each process gets whole kinds.
    """
    started = time.time()
    size, on_gpu = config["resolution"], config["device"] == "cuda"
    described = describe(config, parts)
    kinds = {}
    for part, scenes in described.items():
        path = Path(config["work_dir"]) / f"{part}.npy"
        np.lib.format.open_memmap(path, "w+", np.uint8, (len(scenes), size, size, 3)).flush()
        for i, scene in enumerate(scenes):
            kinds.setdefault(world.kind_of(scene), []).append((part, i, scene))
    total = sum(len(scenes) for scenes in described.values())
    print(f"{total} scenes of {len(kinds)} kinds, {time.time() - started:.0f} s", flush=True)
    most = max(total // 10, 1000)  # the commonest kind is worth several programs
    jobs = [
        (config, members[i : i + most])
        for members in sorted(kinds.values(), key=len, reverse=True)
        for i in range(0, len(members), most)
    ]
    done = 0
    with contextlib.ExitStack() as stack:
        if on_gpu:
            processes = multiprocessing.get_context("fork").Pool(config["render_processes"])
            counts = stack.enter_context(processes).imap_unordered(render_kind, jobs)
        else:
            counts = map(render_kind, jobs)
        for count in counts:
            done += count
            print(f"rendered {done}/{total}, {time.time() - started:.0f} s", flush=True)
    if parts == PARTS:
        record_run("render", config, started)


def render_kind(job):
    """Render (part, index, scene) triples into the files of their parts; returns their number."""
    config, members = job
    # A compiler process for each core would be made in every one of these processes.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    files = {
        part: np.lib.format.open_memmap(Path(config["work_dir"]) / f"{part}.npy", "r+")
        for part in {part for part, _, _ in members}
    }
    size, chunk = config["resolution"], 1024 if config["device"] == "cuda" else 32
    for i in range(0, len(members), chunk):
        some = members[i : i + chunk]
        scenes = [scene for _, _, scene in some]
        pictures = world.render(scenes, size, config["device"], config["antialias"]).cpu().numpy()
        for (part, index, _), picture in zip(some, pictures, strict=True):
            files[part][index] = picture
    return len(members)
