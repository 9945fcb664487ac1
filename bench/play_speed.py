#!/usr/bin/env python3
"""Seconds from a change on play.py's page to its images, without a browser.

    python bench/play_speed.py --demo                                            # the miniature, on a CPU
    python -m demo.random_sd15 MODEL
    python bench/play_speed.py --base-model MODEL --lora-dir MODEL/adapter       # a GPU
    python bench/play_speed.py --base-model MODEL --lora-dir MODEL/adapter --seeds 4

Other options are those of play.py. Also checks that scale 0 gives the base model's images, and that going back to a
scale gives the same ones.
"""

import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as play.py does, before torch is imported

import torch

import play
from lib.config import parse_config
from lib.errors import run_script
from lib.play.asked import Asked
from lib.play.studio import CACHED_IMAGES, Cache, Studio

SCALES = (0.5, 0.75, 0.9, 0.6, 0.8)


def main():
    config = parse_config(play.CONFIG, play.__doc__, demo=play.DEMO)
    play.check_config(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    studio = Studio(config, device)
    print(f"loaded in {time.perf_counter() - start:.2f} s")
    adapter = next(iter(studio.choices()))
    seeds = tuple(range(config["seed"], config["seed"] + config["seeds"]))

    def generate(what, scale, **changed):
        settings = dict(
            prompt=config["prompt"], seeds=seeds, steps=config["steps"], guidance_scale=config["guidance_scale"]
        )
        asked = Asked(**settings | changed, columns=((None, 0.0), (adapter, scale)))
        start, cpu = time.perf_counter(), time.process_time()
        sheet, _ = studio.generate(asked, lambda **event: None)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(f"{what}: {seconds:.3f} s ({cpu:.3f} s of CPU time)")
        return sheet, seconds

    first, _ = generate(f"first {len(seeds)} of each side, with what is prepared once", 1.0)
    taken = [generate(f"slider to {scale}", scale)[1] for scale in SCALES]
    print(f"median of the slider: {statistics.median(taken):.3f} s for {len(seeds)} images of {config['steps']} steps")
    back, _ = generate("slider back to 1", 1.0)
    zero, _ = generate("slider to 0", 0.0)
    generate("another prompt", 1.0, prompt="a yellow raincoat")
    studio.cache = Cache(CACHED_IMAGES)
    again, _ = generate("the first again, not cached", 1.0)
    print(
        f"as before: back {back == first}, scale 0 {zero[1] == zero[0] == first[0]}, generated again {again == first}"
    )
    if device.type == "cuda":
        print(f"{torch.cuda.max_memory_reserved() / 2**30:.2f} GiB reserved at most")


if __name__ == "__main__":
    run_script(main)
