#!/usr/bin/env python3
"""Fine-tune Stable Diffusion v1.5 on one concept with LoRA: processed_data/ -> lora_weights/.

    python train.py                                           # the recipe below, on a CUDA GPU
    python train.py --demo                                    # the embedded miniature, on any CPU
    python train.py --max-steps 100 --warmup-steps 10         # any key of CONFIG can be overridden
    accelerate launch --multi_gpu --num_processes 2 train.py  # several GPUs

It writes lora_weights/<run_name>/: pytorch_lora_weights.safetensors (diffusers' format), <run_name>.safetensors
(kohya's: ComfyUI, A1111 and others; of a DoRA also <run_name>_lora.safetensors, a plain LoRA), README.md (a model
card), config.json (configuration, versions, commit, device), log.jsonl, loss.png, previews/ and previews.webp (steps
across, prompts down), and snapshots/ (the adapter at intervals). An earlier run with that name is replaced only once
the new one is complete. A run stopped by Ctrl-C, a signal, a crash or a power cut resumes from its last checkpoint with
the same command.

tests/plain_loop.py is the same training without any optimization: read it first. Here latents are encoded once and
cached in processed_data/latents/, noise and timesteps derive from (seed, sample number), and the LoRA parameters of a
model are one flat vector: one optimizer kernel, one overflow check and, on several GPUs, one all-reduce of one tensor.
On a GPU the forward and backward pass is a CUDA graph, captured once and replayed. So is the update: it decides on the
GPU while Python prepares the next steps. On a CPU both are plain function calls (lib/kernels/,
lib/training/updates.py, bench/README.md).
"""

import contextlib
import math
import os
import sys
import time
from pathlib import Path

from lib import values
from lib.cache import first_process, hash_ahead
from lib.config import check_resolution, parse_config
from lib.errors import UserError, disk_for, memory_for, run_script
from lib.files import check_output_folder, fresh_folder, locked, recover_folder, replace_folder, unfinished
from lib.imports import quick_imports
from lib.kernels import compile_ahead
from lib.training.journal import check_trackers
from lib.training.processes import StopSignals, agreed, not_finite, only_processes, rollback_advice, training_memory
from lib.training.protected_prompts import check_protection

# Set before torch is imported: short spin-waits for its CPU threads. With the default, one other process on one of the
# cores nearly stalls the run. Without spinning (OMP_WAIT_POLICY=PASSIVE) an otherwise idle machine runs at half the
# speed.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Expandable segments of GPU memory (Linux only): without them, loading the models leaves 80 MB of fragments. The
# variable has two names; the older one takes precedence.
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

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
    run_name="lora_weights_rank_32",  # names the run's folder and kohya's file in it
    push_to_hub=None,  # owner/name: upload the finished run to this private repository on the Hub
    # LoRA: the weights become W + alpha / rank * B A
    rank=32,  # columns of B and rows of A; the file's size grows with it
    alpha=32.0,  # equal to the rank: a scale of 1
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

# The values of --demo: the embedded miniature is 256 pixels wide and learns in fewer steps, at the same rates.
DEMO = dict(
    base_model="demo/model",
    output_dir="lora_weights/demo_runs",  # next to the runs on Stable Diffusion, not over them
    resolution=256,
    max_steps=800,
    gradient_checkpointing=False,
    validate_every=100,
    checkpoint_every=200,
    preview_every=200,
    preview_guidance_scale=3.0,  # inference.py --demo's
    snapshot_every=100,
    report_to="none",  # a toy's figures do not belong beside those of real runs
)


LR_SCHEDULER = "cosine"  # the name of `learning_rate_factor` in files


def learning_rate_factor(step, max_steps, warmup_steps):
    """Linear from 0 over the warm-up, then a half cosine to 0; `step` counts from 0.

    The same numbers as diffusers' `get_cosine_schedule_with_warmup`.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


# The values that each key may have.
VALUES = (
    (values.TEXT, "base_model data_dir output_dir wandb_project report_to"),
    (values.NAME, "run_name"),
    (values.or_none(values.TEXT), "revision push_to_hub protected_prompts protected_class"),
    (values.several(values.TEXT, 1), "unet_targets text_encoder_targets"),
    (values.several(values.TEXT), "preview_prompts"),
    (values.FLAG, "truncate_captions dora train_text_encoder stop_early gradient_checkpointing resume wandb_pictures"),
    (values.choice("text", "description"), "caption_from"),
    (values.choice("fp16", "bf16", "no"), "mixed_precision"),
    (values.SIZE, "resolution"),
    (values.whole(1, 4096), "rank"),
    (values.whole(1), "max_steps batch_size gradient_accumulation_steps"),
    (values.whole(1), "log_every validate_every checkpoint_every keep_checkpoints max_overflows"),
    (values.whole(0), "validation_count warmup_steps preview_every snapshot_every"),
    (values.whole(0, 2**62), "seed"),
    (values.number(0, 1e30), "unet_learning_rate text_encoder_learning_rate adam_weight_decay"),
    (values.number(0, 1 - 1e-9), "adam_beta1 adam_beta2"),
    (values.number(1e-6, 1e6), "alpha"),
    (values.number(0, 1), "mask_weight"),
    (values.number(0, 100), "preview_guidance_scale"),
    (values.number(1e-7, 1), "protection_ridge"),
    (values.several(values.number(1, 20), 2), "loss_guidance_scale"),
)


def check_config(config):
    """Raise UserError for invalid values, before anything is loaded."""
    values.check(config, VALUES)
    check_resolution(config)
    listing = Path(config["data_dir"]) / "captions.jsonl"
    if not listing.is_file():
        raise UserError(f"{listing}: no such file; run python preprocess.py first")
    if config["warmup_steps"] >= config["max_steps"]:
        raise UserError(
            f"warmup_steps is {config['warmup_steps']}, but must be below max_steps "
            f"({config['max_steps']}); for a short run add --warmup-steps 0"
        )
    name = config["run_name"]  # the name of kohya's file; diffusers must find one file of its own ending
    if name.endswith("pytorch_lora_weights"):
        raise UserError(f"run_name is {name!r}, the name of diffusers' file; take another")
    if config["preview_every"] and not config["preview_prompts"]:
        raise UserError("preview_prompts is empty; for no previews add --preview-every 0")
    check_protection(config)
    check_trackers(config["report_to"])
    check_output_folder(Path(config["output_dir"]) / config["run_name"], "config.json")


def train(config):
    """Train one adapter with the given configuration (the keys of CONFIG); return its folder."""
    # Imported here, so that --help and a wrong option are answered at once.
    with quick_imports():
        import torch
        from accelerate import Accelerator
        from tqdm import tqdm

        from lib.dataset import read_dataset
        from lib.evaluation.generation import preview_generator
        from lib.kernels.cpu import computing_with, cpu_note, threads_for
        from lib.models import fetch_base_model
        from lib.training import checkpoints, run_folder, setup
        from lib.training.early_stopping import EarlyStopping
        from lib.training.journal import Journal
        from lib.training.latents import latent_masks
        from lib.training.micro_step import MicroStep
        from lib.training.monitor import Monitor, looks, preview_texts
        from lib.training.optimizer import make_optimizer, optimizer_record
        from lib.training.samples import Samples
        from lib.training.updates import make_updates

    started = time.monotonic()
    max_steps, accumulation = config["max_steps"], config["gradient_accumulation_steps"]
    # Everything that can be wrong is checked before a model is loaded.
    rows = read_dataset(config["data_dir"], config["resolution"], config["caption_from"])
    on_cuda = torch.cuda.is_available()
    half = on_cuda and config["mixed_precision"] == "fp16"
    base_folder = fetch_base_model(config["base_model"], config["revision"], half, config["resolution"])
    prompts = preview_texts(config["preview_prompts"], rows) if config["preview_every"] else []
    tokens = setup.caption_tokens(base_folder, rows, prompts, config["truncate_captions"])
    protected = setup.protected_prompts(rows, config)

    accelerator = Accelerator(mixed_precision=config["mixed_precision"] if on_cuda else "no", cpu=not on_cuda)
    device, is_main, say = accelerator.device, accelerator.is_main_process, accelerator.print
    if not on_cuda:
        say(cpu_note("training"))
    dtype = dict(fp16=torch.float16, bf16=torch.bfloat16, no=torch.float32)[accelerator.mixed_precision]
    setup.begin_kernels(base_folder, rows, config, dtype, device)

    # The last checkpoint of an interrupted run, if this is the same run.
    target_folder = Path(config["output_dir"]) / config["run_name"]
    work_folder = unfinished(target_folder)
    this_run = checkpoints.identity(config, rows, base_folder, accelerator, protected)
    saved = checkpoints.latest(work_folder, say) if config["resume"] else None
    checkpoints.check_same_everywhere(this_run, saved, accelerator)  # now all processes have read it
    changes = checkpoints.continued(saved[1], this_run, work_folder, say) if saved else []
    if not saved:
        run_folder.note_replaced(target_folder, config, say)

    # Data, models, optimizer.
    train_indices, held_out = setup.divided(config, len(rows), say)
    latents = setup.image_latents(base_folder, rows, dtype, accelerator)
    masks = latent_masks(rows, latents, config["mask_weight"])
    models = setup.adapted_models(base_folder, tokens, protected, config, dtype, device, say)
    trained, timesteps_count = models.trained, models.scheduler.config.num_train_timesteps
    groups = [dict(params=[part.flat], lr=part.learning_rate) for part in trained.values()]
    optimizer = accelerator.prepare(make_optimizer(groups, config))
    batches = config["batch_size"], accelerator.num_processes, accelerator.process_index
    guidance = config["loss_guidance_scale"]
    samples = Samples(train_indices, config["seed"], latents.shape, timesteps_count, *batches, guidance)
    for note in [*rows.notes(), *samples.notes()]:
        say(note)
    micro = MicroStep(models, latents, masks, config, accelerator)

    # The state of the run: at the start, or of the last checkpoint.
    if is_main and not saved:
        fresh_folder(target_folder)
    journal = Journal(work_folder if is_main else None, config, saved[1] if saved else {})
    progress = checkpoints.Progress(0, torch.zeros((), device=device), changes=changes)
    state = trained, optimizer, accelerator.scaler, journal, progress
    saver = checkpoints.Saver(work_folder, this_run, *state, config["keep_checkpoints"])
    if saved:
        saver.restore(saved)
        say(f"continuing {config['run_name']} after step {progress.step}")
    ending = EarlyStopping(config, learning_rate_factor)
    first_step, last_step = progress.step, ending.last_step(journal.rows)

    def give_up(problem, step, images):
        advice = rollback_advice(saver.go_back(), work_folder) if is_main else ""
        raise not_finite(problem, step, {rows[i].name for i in images}, advice)

    data = run_folder.data_record(rows, train_indices, held_out)
    monitor = None
    with training_memory(config):
        upcoming = samples.micro_batch(first_step * accumulation)
        micro.prepare(upcoming)
        updates = make_updates(micro, optimizer, accelerator, progress, config["max_overflows"], give_up)
        if is_main:
            scale, probes = config["preview_guidance_scale"], samples.probes(held_out)
            generate = preview_generator(base_folder, models.unet, trained, prompts, scale, rows.sizes, dtype, device)
            monitor = Monitor(work_folder, config, micro, probes, data, journal, ending, first_step, prompts, generate)
            if not saved:
                monitor.look(0)
    threads = threads_for(micro.values(), device)
    bar = tqdm(total=max_steps, initial=first_step, desc=config["run_name"], unit="step", disable=not is_main)
    loop_started = time.monotonic()

    with StopSignals() as stop, training_memory(config), computing_with(threads), bar:
        while (step := progress.step) < last_step:
            factor, step_images = learning_rate_factor(step, max_steps, config["warmup_steps"]), []
            for number in range(step * accumulation, (step + 1) * accumulation):
                micro.fill(*upcoming)
                micro.run()  # forward and backward
                step_images += upcoming[0]
                upcoming = samples.micro_batch(number + 1)  # sampled while the GPU works
            # From here on the GPU may lag behind; `settle` waits for it.
            updates.step(factor, step_images)
            done = progress.step
            bar.update()
            if looks(config, done) or ending.is_look(done):
                updates.settle()
                if monitor:
                    monitor.look(done)
                last_step = ending.agreed(journal.rows, accelerator)
            if done % config["log_every"] == 0 or done == last_step:
                updates.settle()
                mean_loss, rate = progress.mean_loss(accelerator), config["unet_learning_rate"] * factor
                journal.record(step=done, loss=mean_loss, learning_rate=rate)
                bar.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{rate:.1e}")

            stopping = agreed(stop.received, done, config["log_every"], accelerator)
            if stopping or (done % config["checkpoint_every"] == 0 and done < last_step):
                updates.settle()
                progress.loss_sum.copy_(accelerator.reduce(progress.loss_sum, "mean"))
                if is_main:
                    saver.save()
            if stopping:
                say(f"\nstopped after step {done}, which is saved; the same command continues")
                journal.finish(exit_code=128 + stopping)
                sys.exit(128 + stopping)
    seconds = time.monotonic() - loop_started - (monitor.seconds if monitor else 0)

    accelerator.wait_for_everyone()
    finished = run_folder.finished_models(trained)
    if is_main:
        journal.finish()
        with computing_with(threads):  # config.json names them with the device
            result = dict(
                processes=accelerator.num_processes,
                started=round(time.time() - (time.monotonic() - started), 3),  # seconds since 1970
                protection=models.protection and models.protection.record(trained),
                prediction_type=models.scheduler.config.prediction_type,
                optimizer=optimizer_record(config),
                lr_scheduler=LR_SCHEDULER,
                skipped_steps=progress.skipped,
                mixed_precision=accelerator.mixed_precision,
                learning_rate_changes=progress.changes,
                steps=last_step,
                ended="max_steps" if last_step == max_steps else "stop_early",
                set_up_seconds=round(loop_started - started, 2),
                preview_seconds=round(monitor.preview_seconds, 2),
                steps_a_second=round((last_step - first_step) / seconds, 3),
            )
            run_folder.write_run(work_folder, config, finished, journal.rows, data, device, result)
        replace_folder(target_folder, "config.json")
        checkpoints.remove(target_folder)  # only now is the run safe without them
        print(run_folder.outcome_text(target_folder))
    accelerator.end_training()
    return target_folder


def main(config, description, demo=DEMO):
    """Run `train` with a script's CONFIG, the values of --demo and the overrides of the command line."""
    config = parse_config(config, description, demo=demo)
    check_config(config)
    only_processes(config)
    # Beside the imports: the hash of the base model and, for a machine's first run, the kernels.
    hash_ahead(config["base_model"])
    deciding = "base_model mixed_precision resolution batch_size train_text_encoder dora".split()
    compile_ahead.start("train.py", *(config[key] for key in deciding))
    target = Path(config["output_dir"]) / config["run_name"]
    holder = first_process()  # it writes, and holds the folder's lock
    advice = "close what else uses the GPU (nvidia-smi lists it)"
    with (
        disk_for(target),
        locked(target) if holder else contextlib.nullcontext(),
        memory_for("loading the models", advice),
    ):
        with quick_imports():
            from lib.adapter_files import hub
            from lib.training import checkpoints
        if holder:
            recover_folder(target, "config.json")
            checkpoints.remove(target)  # of a run that was killed when it was complete
            if config["push_to_hub"]:
                hub.check_push(config["push_to_hub"])
        train(config)
        if holder and config["push_to_hub"]:
            print(f"uploaded to {hub.push(target, config['push_to_hub'])}")


if __name__ == "__main__":
    run_script(lambda: main(CONFIG, __doc__))
