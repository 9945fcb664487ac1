"""demo/README.md with the measured figures, and sheets of images."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

README = """# The embedded miniature

(`python -m demo.build measure` writes this page from [metrics.json](metrics.json).)

`demo/model` is a Stable Diffusion of a few million parameters, `demo/clip` the CLIP that scores its images. Both were
trained from scratch on images that [world](world/) renders. `--demo` runs on them: the same classes and the same code
as with Stable Diffusion v1.5, on a CPU, in minutes. They know only this small world. No figure below says anything
about Stable Diffusion v1.5.

UNet, text encoder and tokenizer have never seen a holographic image or the word "holographic". The tokenizer splits the
word into groups of letters. Like Stable Diffusion's VAE, which has seen everything, the VAE has seen holographic
surfaces: foil jackets, dresses, furniture, umbrellas and abstract fields of foil, but no captions and no raincoat. The
scorer has seen both the images and the word.

![five prompts, eight seeds](base.webp)

Rows: the five prompts. Columns: {config[seeds]} seeds, the same in each row. PNDM, {config[steps]} steps, guidance
{config[guidance_scale]}.

## Rebuild it

    python -m demo.build all                # a CUDA GPU
    python -m demo.build all --preset cpu   # hours, smaller settings
    python -m demo.build --help             # every value; each can be overridden

A number after a stage's name marks further training, from the weights of the previous run.

| stage | minutes | steps or images | device | versions |
|---|---|---|---|---|
{runs}

Rendered images of {config[resolution]} pixels: {config[base_pictures]:,} and {config[fresh_pictures]:,} more without
holographic things, all of which the scorer saw; {config[foil_pictures]:,} of foil for the VAE;
{config[holographic_pictures]:,} of holographic garments for the scorer. Parameters: {parameters}.
{sizes[mebibytes]} MiB together on disk.

![training curves](curves.png)

The log is [training.jsonl](training.jsonl).

## Chosen by measurement

**The autoencoder** downsamples four times and has 16 latent channels. The UNet therefore keeps the 16x16 positions that
an image of 128 pixels had after Stable Diffusion's three downsamplings with 4 channels, and an image of four times the
area costs little more. PSNR on held-out images was 30.7 dB after 5.6 minutes and 33.3 after 16.6, on holographic
raincoats 27.3 and 29.5 ([training.jsonl](training.jsonl)). The autoencoder for 128 pixels had 27.6 and 23.4. Its
decoder was also trained further against a patch discriminator (1,617 steps, its gradient a fifth of the other losses').
That changed 33.3 dB to 33.1, 29.54 to 29.37 and LPIPS from 0.0364 to 0.0366, without visible gain. It is not used.

**The UNet** predicts velocity. The previous miniature predicted noise, and 77 % of its images had the requested colour.
The UNet was trained in two runs: 9,287 steps on the latents of the autoencoder's first run, 8,996 on those of the
second. Rendering had a time limit, so the second run had 51,200 images without holographic things. Two thirds of them
were already in the first run.

**The scorer** is trained on batches with hard negatives: three quarters of a batch are groups of 32 images that differ
only in one attribute and in details that no attribute names. Among 1,024 random images hardly two are so similar.
Trained on random batches (4.8 minutes, 63,200 images), the scorer named the thing in 90 % of held-out images and the
material in 77 %, and retrieved 79 % of captions and 86 % of images. Of its 25 wrong things, 24 were cats and dogs. The
run with groups also had 109,008 images and lasted a minute longer, so the effect of each change is unknown. It misses
its targets for the material (90 %) and for retrieval (92 %).

**The settings of `--demo`** were chosen with `python train.py --demo --seed 7 --unet-learning-rate R
--text-encoder-learning-rate R/10`, 800 steps, then `python inference.py --demo --seeds 4 --guidance-scale G`, on the
UNet's first run, with the scorer for 128 pixels:

| R | G | concept, success prompts | concept, near prompts | change, near | change, unrelated |
|---|--:|--:|--:|--:|--:|
| 1e-4 | 3 | +0.208 [+0.170, +0.246] | +0.104 [+0.021, +0.187] | 0.361 [0.222, 0.499] | 0.157 [0.138, 0.176] |
| 1e-4 | 5 | +0.206 [+0.151, +0.261] | +0.129 [+0.050, +0.207] | 0.531 [−0.006, 1.068] | 0.272 [0.117, 0.428] |
| 2e-4 | 3 | +0.229 [+0.198, +0.259] | +0.154 [+0.068, +0.240] | 0.545 [0.349, 0.741] | 0.211 [0.147, 0.276] |
| 2e-4 | 5 | +0.215 [+0.178, +0.252] | +0.173 [+0.090, +0.257] | 0.659 [0.190, 1.127] | 0.293 [0.178, 0.409] |
| 4e-4 | 3 | +0.234 [+0.215, +0.252] | +0.183 [+0.137, +0.229] | 0.759 [0.581, 0.937] | 0.287 [0.212, 0.361] |
| 4e-4 | 5 | +0.223 [+0.192, +0.255] | +0.168 [+0.108, +0.228] | 0.734 [0.482, 0.986] | 0.396 [0.240, 0.551] |

The lowest rate is the recipe's own. It teaches nearly as much and changes other prompts least, and its coats keep zip,
hem and hood. On the finished model it gave +0.201 [+0.139, +0.264] (4 sampling seeds), twice the rate +0.218 [+0.196,
+0.240] (8).

## Measured

On scenes whose combination of thing, colour, material, wearer and place was left out of all training (one combination
in {config[heldout_every]}).

**VAE.** {vae[pictures]} rendered images: PSNR {vae[psnr_db]} dB, LPIPS {vae[lpips]}. {holo[pictures]} rendered
holographic raincoats, a garment that it never saw in foil: PSNR {holo[psnr_db]} dB, LPIPS {holo[lpips]}.

**Scorer.** Among {among} images and captions, an image finds its caption in {first} of cases, a caption its image in
{second}.

**Base model.** How often the scorer names what the caption states, in rendered images and in images that the base model
generates from the same captions:

| attribute | images | rendered | generated | generated / rendered |
|---|---|---|---|---|
{named}

**The unknown word.** "{config[prompts][0]}" generated by the base model, compared with rendered images:

| images | number | named raincoat | named holographic (against matte and glossy) |
|---|---|---|---|
{unknown}

![held-out scenes](heldout.webp)

The first eight held-out scenes. Their captions are in metrics.json.
"""


def readme(figures):
    """The text of README.md with the measured figures."""
    training = figures["training"]
    named = "\n".join(
        f"| {name} | {row['pictures']} | {percent(row['rendered'])} | {percent(row['drawn'])} "
        f"| {row.get('ratio', '-')} |"
        for name, row in figures["named"].items()
    )
    unknown = "\n".join(
        f"| {name.replace('_', ' ').replace('drawn', 'generated')} | {row['pictures']} | {percent(row['named_raincoat'])} "
        f"| {percent(row['named_holographic'])} |"
        for name, row in figures["holographic_raincoat"].items()
    )
    runs = "\n".join(
        f"| {stage} | {run['minutes']} | {run['steps'] or '-'} | {run['device']} "
        f"| {', '.join(f'{k} {v}' for k, v in run['versions'].items())} |"
        for stage, run in training.items()
    )
    sizes, retrieved = figures["sizes"], figures["retrieval"]
    parameters = ", ".join(
        f"{name.removesuffix('_parameters')} {count / 1e6:.2f} million"
        for name, count in sizes.items()
        if name.endswith("_parameters")
    )
    config = figures["config"]
    return README.format(
        **dict(config=config, vae=figures["vae"], holo=figures["vae_holographic"]),
        **dict(named=named, unknown=unknown, runs=runs, sizes=sizes, parameters=parameters),
        among=retrieved["among"],
        first=percent(retrieved["picture_to_text"]),
        second=percent(retrieved["text_to_picture"]),
    )


def percent(value):
    """A share as a percentage, such as 96 %."""
    return "-" if value is None else f"{100 * value:.0f} %"


def write_sheet(path, rows):
    """Write a sheet: rows {title: uint8 [N, 3, H, W]}, each under its title."""
    strips = []
    for title, images in rows.items():
        strip = torch.cat(list(images), dim=2).permute(1, 2, 0).numpy()
        label = Image.new("RGB", (strip.shape[1], 20), "white")
        ImageDraw.Draw(label).text((4, 3), title, fill="black", font=ImageFont.load_default(13))
        strips += [np.asarray(label), strip]
    Image.fromarray(np.concatenate(strips)).save(path, quality=90)
