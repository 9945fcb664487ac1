"""Build the embedded miniature: a Stable Diffusion of a few million parameters in demo/model and the CLIP that scores
its images in demo/clip, both trained from scratch on the world of demo/world.

    python -m demo.build all                  # one NVIDIA H100: about half an hour
    python -m demo.build all --preset cpu     # two CPU cores: a night, with smaller settings
    python -m demo.build unet --unet-minutes 5 --unet-resume     # one stage again, with other values

Stages, in order. Each reads the output of the earlier ones from --work-dir and demo/ and can be rerun:
    render    images of random scenes, with and without holographic things
    vae       AutoencoderKL, on images without holographic things, on foil that is no raincoat, on abstract colours
    clip      CLIPModel, on all images
    unet      UNet2DConditionModel and CLIPTextModel together, on images without holographic things
    measure   figures on held-out scenes, sheets, demo/metrics.json and demo/README.md
UNet, text encoder and tokenizer never see a holographic image or the word. The VAE sees such surfaces without captions,
but no raincoat of one. The seeds fix the data, the initial weights and the measurements. Training stops by the clock,
so two builds agree in quality, not bit by bit.
"""

import sys

import torch

from demo.build.config import CONFIG, PRESETS, STAGES
from lib.config import check_range, parse_config
from lib.errors import UserError, run_script


def main():
    config, stages = read_arguments(sys.argv[1:])
    # Imported here: help and errors need not wait for diffusers and transformers
    from demo.build.clip import train_clip
    from demo.build.measure import measure
    from demo.build.render import render
    from demo.build.unet import train_unet
    from demo.build.vae import train_vae

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    run = dict(render=render, vae=train_vae, clip=train_clip, unet=train_unet, measure=measure)
    for name in stages:
        print(f"---- {name}", flush=True)
        run[name](config)


def read_arguments(arguments):
    """(config, stages in the order in which they run) of the command line's arguments.

    Raises UserError for an unknown stage or preset, or a value out of range.
    """
    stages = []
    while arguments and not arguments[0].startswith("-"):
        stages.append(arguments.pop(0))
    config = parse_config(CONFIG, __doc__, argv=arguments)
    if config["preset"]:
        if config["preset"] not in PRESETS:
            raise UserError(f"preset {config['preset']!r} is unknown; choose from {', '.join(PRESETS)}")
        config = parse_config(CONFIG | PRESETS[config["preset"]], __doc__, argv=arguments)
    if not stages or set(stages) - {*STAGES, "all"}:
        raise UserError(f"unknown or missing stage {' '.join(stages)!r}; choose from {', '.join(STAGES)}, all")
    for key in [key for key in CONFIG if key.endswith(("_pictures", "_batch", "_minutes"))]:
        # The sheets have eight columns, so each kind needs at least eight images.
        check_range(config, key, dict(pictures=8, batch=1, minutes=0.01)[key.split("_")[-1]])
    return config, STAGES if "all" in stages else stages


if __name__ == "__main__":
    run_script(main)
