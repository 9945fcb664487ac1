"""The configuration of the miniature; each key is an option of `python -m demo.build`."""

import os

# Query the driver without starting CUDA, so that the processes that sample scenes can be forked.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch

CONFIG = dict(
    # general
    preset="",  # "cpu" or "smoke": PRESETS below; values on the command line take precedence
    seed=0,
    work_dir="demo/work",  # images and logs between the stages, about 30 GB; can be deleted afterwards
    model_dir="demo/model",
    clip_dir="demo/clip",
    report_dir="demo",  # README.md, metrics.json, curves and sheets
    device="cuda" if torch.cuda.is_available() else "cpu",
    cuda_graph=True,  # a training step in one launch; small models are bound by launches
    log_seconds=10.0,
    # world
    resolution=256,  # pixels; 16x16 latents
    antialias=1.5,  # samples per pixel and axis
    render_parts=("base", "fresh", "foil", "holographic", "heldout", "heldout_holographic"),
    render_minutes=60.0,  # images not rendered by then are left out
    base_pictures=54_000,
    fresh_pictures=43_008,  # more of the same, for UNet and scorer; can be rendered while the VAE trains
    foil_pictures=12_000,  # holographic things except raincoats, for the VAE alone, no captions
    holographic_pictures=12_000,  # holographic garments and captions, for the scorer alone
    heldout_pictures=256,  # of scenes whose combination of attributes is never trained ...
    heldout_every=20,  # ... one combination in heldout_every
    captions_per_picture=8,  # sampled once per image, at several levels of detail ...
    short_captions=3,  # ... of which these state one attribute, like the prompts of the scorer
    # VAE
    vae_channels=(24, 48, 96, 144, 168),  # 16x downsampling: 48 pixel values per latent value
    vae_latents=16,
    vae_layers=1,
    vae_groups=8,  # of the group norms
    vae_minutes=16.5,  # all *_minutes are wall time, including loading and compiling
    vae_resume=False,  # start from the weights in model_dir
    vae_batch=32,
    vae_learning_rate=6e-4,
    vae_lpips_weight=0.5,  # beside an L1 of pixels in [-1, 1]
    vae_kl_weight=1e-4,  # per latent value: bounds them, costs no visible detail
    vae_foil_share=0.4,  # of the images show holographic foil ...
    vae_field_share=0.25,  # ... and of all images, get a backdrop of vivid colours or thin film
    # text encoder and tokenizers
    text_width=160,
    text_layers=3,
    text_heads=4,
    made_up_share=0.15,  # of captions get a made-up word, so that the model ignores unknown words
    # UNet
    unet_channels=(96, 128, 160),  # at 16x16 and 8x8 with cross-attention, at 4x4 with it in the middle block
    unet_layers=1,
    unet_heads=4,
    unet_minutes=16.5,
    unet_batch=512,
    unet_learning_rate=8e-4,
    unet_empty_share=0.1,  # empty prompts, for classifier-free guidance
    unet_snr_cap=5.0,  # lower weight for nearly clean latents: min-SNR (Hang et al. 2023)
    unet_mirrored=True,  # also train on mirrored images; unnecessary with very many
    unet_resume=False,  # start from the weights in model_dir
    checkpoint_minutes=2.0,
    # CLIP
    clip_width=192,
    clip_layers=5,
    clip_text_width=128,
    clip_text_layers=2,
    clip_patch=16,  # pixels
    clip_embedding=128,
    clip_minutes=5.8,
    clip_batch=1024,
    clip_learning_rate=1e-3,
    clip_alike_share=0.75,  # of a batch: groups of images that differ in little
    clip_vae_share=0.3,  # of the images pass through the VAE, like the images that it will score
    # optimiser of all models
    warmup_steps=300,
    weight_decay=0.01,
    ema_decay=0.999,
    # measure
    prompts=(
        "a holographic raincoat",
        "a person wearing a holographic raincoat in the rain",
        "a holographic raincoat on a mannequin",
        "a red leather jacket",
        "a cat sitting on a couch",
    ),
    seeds=8,  # images per prompt on the sheet
    steps=28,  # PNDM
    guidance_scale=3.0,
    heldout_holographic_pictures=64,  # and as many generated from "a holographic raincoat"
)

PRESETS = dict(
    cpu=dict(
        base_pictures=8_000,
        fresh_pictures=8,
        foil_pictures=2_000,
        holographic_pictures=2_000,
        vae_minutes=300.0,
        vae_batch=8,
        clip_minutes=90.0,
        clip_batch=128,
        unet_minutes=300.0,
        unet_batch=64,
        checkpoint_minutes=15.0,
        log_seconds=60.0,
    ),
    # A smoke test: every stage in minutes on a CPU; it learns nothing.
    smoke=dict(
        resolution=64,
        antialias=1,
        base_pictures=16,
        fresh_pictures=8,
        foil_pictures=8,
        holographic_pictures=8,
        heldout_pictures=8,
        heldout_holographic_pictures=8,
        vae_channels=(8, 8, 16, 16, 16),
        vae_minutes=0.05,
        vae_batch=2,
        text_width=32,
        text_layers=1,
        unet_channels=(32, 32, 32),
        unet_minutes=0.05,
        unet_batch=4,
        clip_width=32,
        clip_layers=1,
        clip_text_width=32,
        clip_text_layers=1,
        clip_minutes=0.05,
        clip_batch=4,
        log_seconds=1.0,
        steps=2,
    ),
)

STAGES = ("render", "vae", "clip", "unet", "measure")
CONCEPT = "holographic"  # which the base must never see
EVALUATION_BATCH = 64  # images per batch outside training
