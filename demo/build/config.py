"""Every value that the miniature was made with; each is an option of `python -m demo.build`."""

import os

# Asks the driver without starting CUDA, so that the processes that render can be forked.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch

CONFIG = dict(
    # what and where
    preset="",  # "cpu" puts the values of PRESETS under the ones typed
    seed=0,
    work_dir="demo/work",  # pictures and logs between the stages, about 3 GB; may be deleted after
    model_dir="demo/model",
    clip_dir="demo/clip",
    report_dir="demo",  # README.md, metrics.json, curves and sheets
    device="cuda" if torch.cuda.is_available() else "cpu",
    cuda_graph=True,  # a training step in one launch; small models wait for launches otherwise
    log_seconds=10.0,
    # world
    resolution=128,  # pixels; 16x16 latents
    antialias=2,  # samples per pixel and axis
    render_processes=14,  # that share a GPU; a CPU renders in one
    train_pictures=40_000,
    holographic_pictures=8_000,  # seen by the scorer alone
    heldout_pictures=256,  # of scenes whose combination of attributes is never trained ...
    heldout_every=20,  # ... which is one combination in so many
    captions_per_picture=6,  # drawn once for each picture, with more and less detail
    # VAE
    vae_channels=(32, 64, 96, 96),  # 8x downsampling like Stable Diffusion's
    vae_layers=1,
    vae_minutes=2.8,  # every *_minutes is wall time, loading and compiling included
    vae_batch=64,
    vae_learning_rate=8e-4,
    vae_lpips_weight=0.5,  # beside an L1 of pixels in [-1, 1]
    vae_kl_weight=1e-4,  # per latent value: keeps them bounded, costs no visible detail
    vae_field_share=0.3,  # of the pictures get a colour field, so that vivid cloth survives the VAE
    # text encoder and tokenizers
    text_width=160,
    text_layers=4,
    text_heads=4,
    made_up_share=0.15,  # of captions get an unknown word, so that unknown words are ignored
    # UNet
    unet_channels=(96, 128, 160),  # 16x16 and 8x8 with cross-attention, 4x4 with it in the middle
    unet_layers=1,
    unet_heads=4,
    unet_minutes=4.5,  # longer fits the trained combinations and loses colours on the others
    unet_batch=512,
    unet_learning_rate=8e-4,
    unet_empty_share=0.1,  # empty prompts, for classifier-free guidance
    unet_snr_cap=5.0,  # min-SNR weighting (Hang et al. 2023): nearly clean latents count less
    unet_resume=False,  # start from the weights in model_dir
    checkpoint_minutes=2.0,
    # CLIP
    clip_width=192,
    clip_layers=4,
    clip_text_width=128,
    clip_text_layers=2,
    clip_patch=16,  # pixels
    clip_embedding=128,
    clip_minutes=1.5,
    clip_batch=1024,
    clip_learning_rate=1e-3,
    clip_vae_share=0.5,  # of the pictures are seen through the VAE, as the pictures it scores are
    # optimiser, for all three
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
    seeds=8,  # pictures a prompt on the sheet
    steps=28,  # PNDM
    guidance_scale=6.0,
    unknown_pictures=64,  # of "a holographic raincoat", drawn by the base and rendered
)

PRESETS = dict(
    cpu=dict(
        train_pictures=8_000,
        holographic_pictures=2_000,
        captions_per_picture=4,
        vae_minutes=120.0,
        vae_batch=16,
        clip_minutes=60.0,
        clip_batch=256,
        unet_minutes=300.0,
        unet_batch=64,
        checkpoint_minutes=15.0,
        log_seconds=60.0,
    )
)

STAGES = ("render", "vae", "clip", "unet", "measure")
CONCEPT = "holographic"  # what the base must never meet
EVALUATION_BATCH = 64  # pictures at a time outside training
