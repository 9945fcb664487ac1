#!/usr/bin/env python3
"""Experiment: rank 8 instead of 32, for the UNet and the text encoder.

    python train_experiment_rank8.py

Hypothesis: a quarter of the parameters is enough for one concept.
Finding, on the embedded miniature, eight training seeds each (results/study/claims.md): it is not. Concept similarity of
success prompts is lower by 0.063 [0.053, 0.072], of near prompts by 0.036 [0.028, 0.044]: it learns less and spoils
near prompts less. On Stable Diffusion v1.5 nothing was measured.
"""

from lib.errors import run_script
from train import main

# The complete configuration; a line that differs from train.py's ends in "<- changed".
CONFIG = dict(
    # model
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",  # a hub id, a local folder, or one .safetensors file
    revision=None,  # a commit of the hub repository; None: its newest
    # data
    data_dir="processed_data",  # captions.jsonl and images, written by preprocess.py
    caption_from="text",  # a column of captions.jsonl: text (usually one caption for all images) or description
    truncate_captions=False,  # True: a caption of more than 77 tokens is cut off, with a note; False: an error
    resolution=512,  # pixels; Stable Diffusion v1.5 was trained at 512
    validation_count=4,  # images held out, a quarter at most, to measure their loss at fixed noise
    mask_weight=1.0,  # weight of the loss outside the masks in data_dir; 1: masks have no effect
    # output
    output_dir="lora_weights",  # the run's folder goes here
    run_name="lora_weights_rank8",  # names the run's folder and kohya's file in it <- changed
    push_to_hub=None,  # owner/name: upload the finished run to this private repository on the Hub
    # LoRA: the weights become W + alpha / rank * B A
    rank=8,  # columns of B and rows of A; the file's size grows with it <- changed
    alpha=8.0,  # equal to the rank: a scale of 1 <- changed
    dora=False,  # DoRA: the rows of W + alpha / rank * B A get trained norms (lib/LORA.md)
    unet_targets=("to_k", "to_q", "to_v", "to_out.0"),  # all attention projections
    text_encoder_targets=("q_proj", "v_proj"),  # queries and values
    train_text_encoder=True,  # False: the text encoder stays frozen, only the UNet is trained
    # optimization
    unet_learning_rate=1e-4,  # the peak, after the warm-up
    text_encoder_learning_rate=1e-5,  # a tenth: language forgets faster than images
    adam_beta1=0.9,  # decay of the running mean of gradients
    adam_beta2=0.999,  # decay of the running mean of their squares
    adam_weight_decay=1e-2,  # each step takes this times the learning rate off the LoRA weights
    max_steps=4000,  # optimizer steps: 125 times 32 images
    warmup_steps=50,  # linear from 0, then a cosine to 0
    stop_early=False,  # True: end before max_steps, once held-out images show no gain (lib/evaluation/README.md)
    batch_size=1,  # images per process and micro-step
    gradient_accumulation_steps=1,  # micro-steps per optimizer step
    # protection: a text-side adapter that leaves other prompts unchanged (lib/PROTECTION.md)
    protected_prompts=None,  # a text file, one prompt per line; None: no protection
    protected_class=None,  # replaces {class} in that file; None: the noun of the caption
    protection_ridge=1e-4,  # smaller values remove more directions
    loss_guidance_scale=(1.0, 1.0),  # guidance in the loss, sampled uniformly; 1: the ordinary loss
    # memory and precision
    gradient_checkpointing=True,  # activations of the UNet's larger maps are recomputed, not stored
    mixed_precision="fp16",  # fp16, bf16 or no; a CPU always computes in fp32
    # safety
    checkpoint_every=500,  # steps; the most that a crash can cost
    keep_checkpoints=2,  # the newest, and one before it in case the newest is damaged
    resume=True,  # continue from the last checkpoint of an interrupted run of this name
    max_overflows=20,  # consecutive fp16 overflows after which the run ends
    # seed and logging
    seed=42,  # of LoRA's initial weights, the held-out images, data order, noise and timesteps
    log_every=10,  # steps between rows of log.jsonl
    validate_every=250,  # steps between measurements of the held-out loss
    # monitoring
    preview_every=1000,  # steps between previews, also at the start and the end; 0: none
    preview_prompts=(
        "{caption}",
        "{caption} in the rain",
        "a cat sitting on a couch",
    ),  # separated by commas on the command line
    preview_guidance_scale=6.0,  # inference.py's default
    snapshot_every=500,  # steps between snapshots of the adapter (15 MB each) for inference.py --snapshots; 0: none
    report_to="wandb",  # wandb, tensorboard (files in the run's folder), both or none
    wandb_project="lora-holographic-raincoat",  # offline without an API key; WANDB_MODE=disabled: off
    wandb_pictures=False,  # True: W&B gets the previews too, but never a prompt
)

if __name__ == "__main__":
    run_script(lambda: main(CONFIG, __doc__))
