#!/usr/bin/env python3
"""Experiment: the concept is taught, and every other prompt is left alone.

    python train_experiment_protected.py

The adapter has layers that see text alone, and each is projected away from what 2,000 listed prompts give it; the loss
is that of the guided prediction, which is what is drawn (lib/PROTECTION.md). The file is an ordinary LoRA.
Hypothesis: it teaches what train.py teaches and does at most a tenth of the harm to near and unrelated prompts.
Finding, on the embedded miniature, seven training seeds each (results/study/claims.md): near prompts changed 0.003 [0.000, 0.007]
of the way to another image (train.py: 0.339), unrelated ones 0.003 [0.001, 0.005] (0.202). The concept gained is
+0.174 [+0.149, +0.198] (+0.172 [+0.153, +0.191]); whether it teaches no less is undecided at the margin of 0.02.
On Stable Diffusion v1.5 nothing was measured. The guidance of the loss was chosen for drawing at guidance 3.
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
    run_name="lora_weights_protected",  # <- changed
    push_to_hub=None,  # owner/name: upload the finished run there, into a private repository
    # LoRA: the weights become W + alpha / rank * B A
    rank=32,
    alpha=32.0,  # equal to the rank: a scale of 1
    dora=False,  # DoRA: the rows of W + alpha / rank * B A get trained norms (lib/LORA.md)
    unet_targets=("attn2.to_k", "attn2.to_v"),  # what reads the text <- changed
    text_encoder_targets=("q_proj", "v_proj"),
    train_text_encoder=True,
    # optimisation
    unet_learning_rate=3e-4,  # <- changed
    text_encoder_learning_rate=1e-3,  # it has to tell the concept from all else <- changed
    adam_beta1=0.9,
    adam_beta2=0.999,
    adam_weight_decay=1e-2,
    max_steps=4000,  # optimizer steps: 125 times 32 images
    warmup_steps=50,  # linear from 0, then a cosine to 0
    batch_size=1,  # images a process and micro-step
    gradient_accumulation_steps=1,  # micro-steps an optimizer step
    # protection: a text-side adapter that leaves other prompts as they are (lib/PROTECTION.md)
    protected_prompts="prompts/protected.txt",  # a text file, a prompt a line; None: none <- changed
    protected_class=None,  # what {class} in it stands for; None: what the caption is about
    protection_ridge=1e-4,  # how strictly: less takes more directions away
    loss_guidance_scale=(1.0, 1.7),  # of the loss, drawn evenly; 1: the ordinary one <- changed
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

# What --demo puts in their place: train.py's, and prompts in the miniature's words.
DEMO_CONFIG = DEMO | dict(protected_prompts="prompts/protected_demo.txt")

if __name__ == "__main__":
    run_script(lambda: main(CONFIG, __doc__, DEMO_CONFIG))
