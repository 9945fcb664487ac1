"""Makes the embedded miniature: a Stable Diffusion of a few million parameters in demo/model and the
CLIP that scores its images in demo/clip, both trained from nothing on the world of demo/world.

    python -m demo.build all                  # one NVIDIA H100: about half an hour
    python -m demo.build all --preset cpu     # two CPU cores: a night, with the smaller settings below
    python -m demo.build unet --unet-minutes 5 --unet-resume     # one stage again, with other values

Stages, in order; each reads what the earlier ones left in --work-dir and demo/ and can be rerun:
    render    images of random scenes, with and without holographic things
    vae       AutoencoderKL, on these, on foil that is no raincoat, and on abstract fields of colour
    clip      CLIPModel, on all of them
    unet      UNet2DConditionModel and CLIPTextModel together, on the images without
    measure   figures on held-out scenes, sheets, demo/metrics.json and demo/README.md
UNet, text encoder and tokenizer never meet a holographic image nor the word. The VAE meets such
surfaces, though no raincoat of one, without captions.
The seeds fix the data, the initial weights and what is measured; training stops by the clock, so
two builds of it agree in quality and not bit by bit.
"""

import sys

import torch

from demo.build.config import CONFIG, PRESETS, STAGES
from lib.config import check_range, parse_config
from lib.errors import UserError, run_script


def main():
    config, stages = read_arguments(sys.argv[1:])
    # Here, because help and mistakes should not wait for diffusers and transformers
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

    Raises UserError for a stage or a preset that there is not, or a value out of range.
    """
    stages = []
    while arguments and not arguments[0].startswith("-"):
        stages.append(arguments.pop(0))
    config = parse_config(CONFIG, __doc__, argv=arguments)
    if config["preset"]:
        if config["preset"] not in PRESETS:
            raise UserError(f"preset {config['preset']!r} is none of {', '.join(PRESETS)}")
        config = parse_config(CONFIG | PRESETS[config["preset"]], __doc__, argv=arguments)
    if not stages or set(stages) - {*STAGES, "all"}:
        raise UserError(f"name stages out of {', '.join(STAGES)}, all; not {' '.join(stages)!r}")
    for key in [key for key in CONFIG if key.endswith(("_pictures", "_batch", "_minutes"))]:
        # The sheets have eight columns, so there are eight of every kind of image at least.
        check_range(config, key, dict(pictures=8, batch=1, minutes=0.01)[key.split("_")[-1]])
    return config, STAGES if "all" in stages else stages


if __name__ == "__main__":
    run_script(main)
