#!/usr/bin/env python3
"""Try an adapter on a page in the browser: the base model and the adapter side by side, from the same noise.

    python play.py                                           # the adapters in lora_weights/
    python play.py --lora-dir lora_weights/lora_weights_rank_32
    python play.py --lora-dir RUN --second-lora-dir OTHER    # two adapters beside the base model
    python play.py --demo                                    # the embedded miniature, on a CPU

The page has a prompt, seeds, steps and guidance, and for each adapter a slider of its scale. Base images are cached:
moving the slider generates the adapter's images only. “Save” writes the images and their settings to a new folder
in results/play/.

Images are those of inference.py with the same settings; on a CPU bit for bit with `inference.py --batch-size 1`.

The page comes from this process alone, which listens on 127.0.0.1 unless --host says otherwise. Neither the page nor
the server asks any other machine, except that a base model from the hub is fetched at its first use.
"""

import contextlib
import os
from pathlib import Path

from lib import values
from lib.config import check_resolution, parse_config
from lib.errors import UserError, memory_for, run_script
from lib.imports import quick_imports
from lib.kernels import compile_ahead
from lib.play.asked import MOST_GUIDANCE, MOST_SEEDS, MOST_STEPS

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # see inference.py

CONFIG = dict(
    # what is compared
    lora_dir="lora_weights",  # one adapter (a folder, or kohya's file), or a folder of them to choose from
    second_lora_dir=None,  # more adapters; the first of them is shown beside the first of lora_dir
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",  # a hub id, a local folder, or one .safetensors file
    revision=None,  # a commit of the hub repository; None: its newest
    # what the page shows at first
    prompt="a holographic raincoat",  # what the images show
    seed=42,  # of the first image; the others count up from it
    seeds=1,  # images of each model
    steps=28,  # denoising steps of an image
    guidance_scale=6.0,  # classifier-free guidance: how strongly images follow the prompt; 1: none
    # what the page cannot change
    resolution=512,  # pixels, or "WIDTHxHEIGHT"; each a multiple of 8
    batch_size=0,  # images at once; 0: on a GPU what its free memory holds, at most 8, on a CPU 1
    output_dir="results/play",  # saved images go to new folders in it
    host="127.0.0.1",  # the address to listen on; 0.0.0.0: any, for whoever reaches this machine, without a password
    port=7860,  # 0: any free one
)

# Overrides of --demo.
DEMO = dict(lora_dir="lora_weights/study/seed42", base_model="demo/model", guidance_scale=3.0, resolution=256)

# The values that each key may have.
VALUES = (
    (values.TEXT, "lora_dir base_model prompt output_dir host"),
    (values.or_none(values.TEXT), "second_lora_dir revision"),
    (values.SIZE, "resolution"),
    (values.whole(1, MOST_SEEDS), "seeds"),
    (values.whole(1, MOST_STEPS), "steps"),
    (values.number(0, MOST_GUIDANCE), "guidance_scale"),
    (values.whole(0, 2**62), "seed"),
    (values.whole(0), "batch_size"),
    (values.whole(0, 65535), "port"),
)


def check_config(config):
    """Rejects invalid values before anything is loaded."""
    values.check(config, VALUES)
    check_resolution(config, square=False)
    for key in ("lora_dir", "second_lora_dir"):
        if config[key] and not Path(config[key]).exists():
            raise UserError(f"{config[key]}: no such folder; train an adapter first (python train.py)")


def main():
    config = parse_config(CONFIG, __doc__, demo=DEMO)
    check_config(config)
    compile_ahead.start("play.py", config["base_model"], config["resolution"])  # for a machine's first run
    # Imported here, so that --help and a wrong option are answered at once.
    with quick_imports():
        import diffusers
        import torch
        import transformers

        from lib.play.server import Server
        from lib.play.studio import Studio
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()  # the page itself says what is cut off a prompt
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    advice = "close what else uses the GPU (nvidia-smi lists it)"
    with Server(config) as server:  # before the model is loaded: the port may be in use
        with memory_for("loading the model", advice):
            studio = Studio(config, device)
        print(f"{server.url}  (open it in a browser; Ctrl-C stops)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve(studio)
    print("stopped")


if __name__ == "__main__":
    run_script(main)
