#!/usr/bin/env python3
"""Experiment: DoRA in place of LoRA, of the same rank, for the UNet and the text encoder.

    python train_experiment_dora.py

Hypothesis: LoRA is enough for one concept. DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353) trains
the norms of a weight's rows apart from their directions, which costs a norm of each weight at every step
and one parameter more for each output (lib/LORA.md).
Finding, on the embedded miniature, eight training seeds each (results/study/claims.md): the two are equivalent. DoRA
minus rank 32, concept similarity of success prompts: +0.000 [−0.001, +0.002], within the margin of 0.02. At Stable Diffusion v1.5's
size a step takes 31% longer than LoRA's (bench/README.md); what it teaches there was not measured.
"""

from lib.errors import run_script
from train import main

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
    run_name="lora_weights_dora",  # <- changed
    push_to_hub=None,  # owner/name: upload the finished run there, into a private repository
    # LoRA: the weights become W + alpha / rank * B A
    rank=32,
    alpha=32.0,  # equal to the rank: a scale of 1
    dora=True,  # the rows of W + alpha / rank * B A get trained norms (lib/LORA.md) <- changed
    unet_targets=("to_k", "to_q", "to_v", "to_out.0"),  # all attention projections
    text_encoder_targets=("q_proj", "v_proj"),
    train_text_encoder=True,
    # optimisation
    unet_learning_rate=1e-4,
    text_encoder_learning_rate=1e-5,  # a tenth: language forgets faster than images
    adam_beta1=0.9,
    adam_beta2=0.999,
    adam_weight_decay=1e-2,
    max_steps=4000,  # optimizer steps: 125 times 32 images
    warmup_steps=50,  # linear from 0, then a cosine to 0
    batch_size=1,  # images a process and micro-step
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
    checkpoint_every=500,  # steps; what a crash can cost at most
    keep_checkpoints=2,  # the newest, and one before it in case that one is damaged
    resume=True,  # go on from the last checkpoint of an interrupted run of this name
    max_overflows=20,  # fp16 steps skipped in a row before the run is given up
    # the rest
    seed=42,  # LoRA's start, the held-out images, data order, noise and timesteps
    log_every=10,  # steps
    validate_every=250,  # steps
    # what to watch, and to choose from
    preview_every=1000,  # steps, and at the start and the end: draw preview_prompts; 0: never
    preview_prompts=(
        "{caption}",
        "{caption} in the rain",
        "a cat sitting on a couch",
    ),  # on the command line a comma ends one
    preview_guidance_scale=6.0,  # as inference.py draws by default
    snapshot_every=500,  # steps: keep the adapter (15 MB) for inference.py --snapshots; 0: the last alone
    report_to="wandb",  # wandb, tensorboard (files in the run's folder), both or none
    wandb_project="lora-holographic-raincoat",  # offline without an API key; WANDB_MODE=disabled: off
    wandb_pictures=False,  # whether W&B gets the previews too; no prompt ever leaves this machine
)

if __name__ == "__main__":
    run_script(lambda: main(CONFIG, __doc__))
