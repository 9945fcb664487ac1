#!/usr/bin/env python3
"""Experiment: the same number of samples in batches of 8.

    python train_experiment_large_batch.py

500 steps of 8 images in place of 4,000 of one. A gradient averaged over 8 samples has an eighth of the
variance, so AdamW's learning rates are multiplied by the square root of 8 (Malladi et al. 2022,
https://arxiv.org/abs/2205.10287, who also change its betas; here they stay). The warm-up has as many
samples as before.
Hypothesis: it is the same adapter within the margins, in a fraction of the time, since one image
at a time leaves most of a large GPU idle.
Finding, on the embedded miniature, eight training seeds each (results/study/claims.md): it is not the same adapter.
Concept similarity of success prompts is lower by 0.054 [0.037, 0.071]: it teaches less. At Stable Diffusion v1.5's size the
same samples take 0.50 of the time (bench/README.md); what it teaches there was not measured.
"""

from lib.errors import run_script
from train import DEMO, main

# The complete configuration; a line that differs from train.py's ends in "<- changed".
CONFIG = dict(
    # model
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",  # a hub id, a local folder, or one .safetensors file
    revision=None,  # a commit of the hub repository; None: its newest
    # data
    data_dir="processed_data",  # what preprocess.py wrote: captions.jsonl and images
    caption_from="text",  # its column that is trained on: text (as a rule one caption), description
    truncate_captions=False,  # True: read the first 77 tokens of a longer caption, which is said
    resolution=512,  # pixels; what Stable Diffusion v1.5 was trained at
    validation_count=4,  # images held out, a quarter at most, to see their loss at fixed noise
    mask_weight=1.0,  # of the loss outside the masks that preprocess.py found; 1: as if there were none
    # output
    output_dir="lora_weights",
    run_name="lora_weights_large_batch",  # <- changed
    push_to_hub=None,  # owner/name: upload the finished run there, into a private repository
    # LoRA: the weights become W + alpha / rank * B A
    rank=32,
    alpha=32.0,  # equal to the rank: a scale of 1
    dora=False,  # DoRA: the rows of W + alpha / rank * B A get trained norms (lib/LORA.md)
    unet_targets=("to_k", "to_q", "to_v", "to_out.0"),  # all attention projections
    text_encoder_targets=("q_proj", "v_proj"),
    train_text_encoder=True,
    # optimisation
    unet_learning_rate=1e-4 * 8**0.5,  # <- changed
    text_encoder_learning_rate=1e-5 * 8**0.5,  # a tenth: language forgets faster <- changed
    adam_beta1=0.9,
    adam_beta2=0.999,
    adam_weight_decay=1e-2,
    max_steps=4000 // 8,  # optimizer steps: 125 times 32 images <- changed
    warmup_steps=50 // 8,  # linear from 0, then a cosine to 0 <- changed
    batch_size=8,  # images a process and micro-step <- changed
    gradient_accumulation_steps=1,  # micro-steps an optimizer step
    # protection: a text-side adapter that leaves other prompts as they are (lib/PROTECTION.md)
    protected_prompts=None,  # a text file, a prompt a line; None: none
    protected_class=None,  # what {class} in it stands for; None: what the caption is about
    protection_ridge=1e-4,  # how strictly: less takes more directions away
    loss_guidance_scale=(1.0, 1.0),  # of the loss, drawn evenly; 1: the ordinary one
    # memory and precision
    gradient_checkpointing=True,  # activations of the UNet's larger maps are computed twice, not kept
    mixed_precision="fp16",  # fp16, bf16 or no; a CPU always computes in fp32
    # safety
    checkpoint_every=500 // 8,  # steps; what a crash can cost at most <- changed
    keep_checkpoints=2,  # the newest, and one before it in case that one is damaged
    resume=True,  # go on from the last checkpoint of an interrupted run of this name
    max_overflows=20,  # fp16 steps skipped in a row before the run is given up
    # the rest
    seed=42,  # LoRA's start, the held-out images, data order, noise and timesteps
    log_every=10,  # steps
    validate_every=250 // 8,  # steps <- changed
    # what to watch, and to choose from
    preview_every=1000 // 8,  # steps, and at start and end: draw the prompts; 0: never <- changed
    preview_prompts=(
        "{caption}",
        "{caption} in the rain",
        "a cat sitting on a couch",
    ),  # on the command line a comma ends one
    preview_guidance_scale=6.0,  # as inference.py draws by default
    snapshot_every=500 // 8,  # steps: keep the adapter for inference.py; 0: the last <- changed
    report_to="wandb",  # wandb, tensorboard (files in the run's folder), both or none
    wandb_project="lora-holographic-raincoat",  # offline without an API key; WANDB_MODE=disabled: off
    wandb_pictures=False,  # whether W&B gets the previews too; no prompt ever leaves this machine
)

# What --demo puts in their place: train.py's, with an eighth of the steps.
DEMO_CONFIG = DEMO | {key: DEMO[key] // 8 for key in DEMO if key.endswith(("_steps", "_every"))}

if __name__ == "__main__":
    run_script(lambda: main(CONFIG, __doc__, DEMO_CONFIG))
