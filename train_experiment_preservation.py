#!/usr/bin/env python3
"""Experiment: beside what it is taught, the model is held to what it was.

    python train_experiment_preservation.py

At every step the UNet also predicts under a caption that it was not asked to change, for the same noisy
latents, and the loss grows with the distance to the base model's own prediction there: the same UNet
without its LoRA. Half of the captions are neighbours (raincoats), since a concept bleeds into those first.
No picture of them is needed, and no caption is one that inference.py evaluates with.
Hypothesis: it moves neighbours and unrelated prompts less. A smaller scale of any adapter does that too
and teaches less, so the two are to be compared at equal concept, the plain one drawn at several scales
(python inference.py --lora-scales 0.4,0.6,0.8,1).
Finding, on the embedded miniature, eight training seeds each (results/study/claims.md): at equal concept it changed
unrelated prompts 0.58 times [0.45, 0.74] as much as less of rank 32 does, near prompts 0.96 times [0.76, 1.22]; corrected for
all comparisons of the study that is undecided. The weight was chosen by a sweep (results/study/README.md). At Stable
Diffusion v1.5's size a step takes 63% longer (bench/README.md); what it keeps there was not measured.
"""

from lib.errors import run_script
from train import DEMO, main

PRESERVED = (
    "a raincoat",
    "a photo of a raincoat",
    "a green raincoat",
    "a blue plastic raincoat",
    "a person in a raincoat",
    "a child in a raincoat and rubber boots",
    "a shiny raincoat",
    "a waxed cotton raincoat",
    "a coat",
    "a denim jacket",
    "a dress on a mannequin",
    "a person",
    "a portrait of a woman",
    "a street in the rain",
    "an umbrella",
    "a dog in a garden",
)

# The complete configuration; a line that differs from train.py's ends in "<- changed".
CONFIG = dict(
    # model
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",  # a hub id, a local folder, or one .safetensors file
    revision=None,  # a commit of the hub repository; None: its newest
    # data
    data_dir="processed_data",  # what preprocess.py wrote: captions.jsonl and pictures
    caption_from="text",  # its column that is trained on: text (as a rule one caption), description
    truncate_captions=False,  # True: read the first 77 tokens of a longer caption, which is said
    resolution=512,  # pixels; what Stable Diffusion v1.5 was trained at
    validation_count=4,  # pictures held out, a quarter at most, to see their loss at fixed noise
    mask_weight=1.0,  # of the loss outside the masks that preprocess.py found; 1: as if there were none
    # output
    output_dir="lora_weights",
    run_name="lora_weights_preservation",  # <- changed
    push_to_hub=None,  # owner/name: upload the finished run there, into a private repository
    # LoRA: the weights become W + alpha / rank * B A
    rank=32,
    alpha=32.0,  # equal to the rank: a scale of 1
    dora=False,  # DoRA: the rows of W + alpha / rank * B A get trained norms (lib/LORA.md)
    unet_targets=("to_k", "to_q", "to_v", "to_out.0"),  # all attention projections
    text_encoder_targets=("q_proj", "v_proj"),
    train_text_encoder=True,
    # optimisation
    unet_learning_rate=1e-4,
    text_encoder_learning_rate=1e-5,  # a tenth: language forgets faster than pictures
    adam_beta1=0.9,
    adam_beta2=0.999,
    adam_weight_decay=1e-2,
    max_steps=4000,  # optimizer steps: 125 times 32 pictures
    warmup_steps=50,  # linear from 0, then a cosine to 0
    batch_size=1,  # pictures a process and micro-step
    gradient_accumulation_steps=1,  # micro-steps an optimizer step
    # preservation: beside the ordinary loss, hold predictions under other captions to the base model's
    preservation_weight=1.0,  # of that loss; 0: none <- changed
    preservation_every=1,  # steps: in one of so many
    preservation_per_picture=1,  # captions drawn for each picture, from the list below
    preservation_captions=PRESERVED,  # what the adapter is not to change <- changed
    # memory and precision
    gradient_checkpointing=True,  # activations of the UNet's larger maps are computed twice, not kept
    mixed_precision="fp16",  # fp16, bf16 or no; a CPU always computes in fp32
    # safety
    checkpoint_every=500,  # steps; what a crash can cost at most
    keep_checkpoints=2,  # the newest, and one before it in case that one is damaged
    resume=True,  # go on from the last checkpoint of an interrupted run of this name
    max_overflows=20,  # fp16 steps skipped in a row before the run is given up
    # the rest
    seed=42,  # LoRA's start, the held-out pictures, data order, noise and timesteps
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

# What --demo puts in their place: train.py's, and captions in the miniature's words.
DEMO_CONFIG = DEMO | dict(
    preservation_captions=(
        "a raincoat",
        "a photo of a raincoat",
        "a green raincoat",
        "a blue glossy raincoat",
        "a person in a raincoat",
        "a raincoat on a hanger",
        "a person wearing a purple raincoat on a street",
        "a person wearing a matte raincoat with the hood up",
        "a person wearing a dress",
        "a denim jacket",
        "a person wearing a blue jacket in a garden",
        "a leather couch",
        "a brown chair",
        "a white umbrella",
        "a dog in a garden",
        "a black dog standing beside a couch",
    ),
)

if __name__ == "__main__":
    run_script(lambda: main(CONFIG, __doc__, DEMO_CONFIG))
