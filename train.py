#!/usr/bin/env python3
"""Teach Stable Diffusion v1.5 one concept with LoRA: processed_data/ -> lora_weights/.

    python train.py                                    # the recipe below, on a CUDA GPU
    python train.py --demo                             # the embedded miniature, on any CPU
    python train.py --max-steps 100 --warmup-steps 10  # any key of CONFIG can be overridden
    accelerate launch --num_processes 2 train.py       # several GPUs

Out comes lora_weights/<run_name>/: pytorch_lora_weights.safetensors (diffusers' format),
config.json (configuration, versions, commit, device), log.jsonl and loss.png. An earlier run of
that name is replaced only once the new one is complete. A run that was interrupted, by Ctrl-C, a
signal, a crash or a power cut, goes on from its last checkpoint when the same command is run again.

Latents are computed once, noise and timesteps derive from (seed, sample number), and the LoRA
parameters of a group are one flat vector: one optimizer kernel, one check for overflow and, on
several GPUs, one all-reduce of one tensor. On a GPU a micro-step, forward and backward, is recorded
once as a CUDA graph and replayed; a CPU calls the same function (fast.py, bench/README.md).
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import netrc
import os
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

# Before torch is imported: its CPU threads then spin only briefly while they wait for one another.
# Left alone they spin so long that another process on one of the cores stops nearly everything; not
# spinning at all (OMP_WAIT_POLICY=PASSIVE) halves the speed on a quiet machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Its only remark at import is about a 4-bit kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import bitsandbytes
import numpy as np
import torch
import torch.nn.functional as F
import wandb
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

import adapters
import checkpoints
import fast
from common import (
    UserError,
    check_output_folder,
    check_range,
    check_resolution,
    code_commit,
    data_hash,
    disk_for,
    fetch_base_model,
    fresh_folder,
    half_resolution,
    load_part,
    loading,
    locked,
    memory_for,
    one_line,
    parse_config,
    provenance,
    read_dataset,
    recover_folder,
    replace_folder,
    run_script,
    unfinished,
    write_marker,
)
from report import loss_figure

CONFIG = dict(
    # model
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",  # a hub id or a local folder
    revision=None,  # a commit of the hub repository; None: its newest
    # data
    data_dir="processed_data",  # what preprocess.py wrote: captions.jsonl and pictures
    resolution=512,  # pixels; what Stable Diffusion v1.5 was trained at
    validation_count=4,  # pictures held out, a quarter at most, to see their loss at fixed noise
    # output
    output_dir="lora_weights",
    run_name="lora_weights_rank_32",
    # LoRA: the weights become W + alpha / rank * B A
    rank=32,
    alpha=32.0,  # equal to the rank: a scale of 1
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
    # memory and precision
    gradient_checkpointing=True,  # UNet activations are computed twice instead of kept
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
    wandb_project="lora-holographic-raincoat",  # offline without an API key; WANDB_MODE=disabled: off
)

# What --demo puts in their place: the embedded miniature is 128 pixels wide and learns faster.
DEMO = dict(
    base_model="demo/model",
    output_dir="lora_weights/demo_runs",  # beside the runs on Stable Diffusion, not over them
    resolution=128,
    unet_learning_rate=5e-4,
    text_encoder_learning_rate=5e-5,
    max_steps=800,
    gradient_checkpointing=False,
    validate_every=100,
    checkpoint_every=200,
)

# Keys that may differ between an interrupted run and the one that continues it.
FREE = ("log_every", "validate_every", "checkpoint_every", "keep_checkpoints", "resume",
        "max_overflows", "wandb_project", "output_dir", "run_name")  # fmt: skip
# Those of a run that stopped at numbers that are not finite: they may be the reason.
LEARNING_RATES = ("unet_learning_rate", "text_encoder_learning_rate")
# Packages whose version may change the numbers.
NUMERIC = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes")

SAME_SIGNAL = 2.0  # seconds within which a second signal is the first one again
MAX_TOKENS = 77  # CLIP's text length, begin and end token included
# Separate streams of random numbers, so that none shifts another.
ORDER, SAMPLE, HELD_OUT = 1, 2, 3


# ---- data ----------------------------------------------------------------------------------


def tokenize(tokenizer, rows):
    """Token ids of the captions, int64 [n, 77]; UserError naming a caption that does not fit."""
    for name, caption, _ in rows:
        length = len(tokenizer(caption, verbose=False).input_ids)
        if length > MAX_TOKENS:
            raise UserError(
                f"the caption of {name} has {length} tokens, {MAX_TOKENS} is the most "
                f"(begin and end included); shorten «{caption[:60]}…»"
            )
    return tokenizer(
        [caption for _, caption, _ in rows],
        padding="max_length",
        max_length=MAX_TOKENS,
        return_tensors="pt",
    ).input_ids


@torch.no_grad()
def encode_latents(vae, rows, device):
    """Mean and standard deviation of each picture's latent distribution, float32 [n, 4, h, w] each,
    scaled as the UNet expects them. The VAE runs once a picture; training samples from these."""
    means, deviations = [], []
    for name, _, pixels in tqdm(rows, desc="latents", unit="picture", leave=False):
        batch = pixels[None].to(device, vae.dtype) / 127.5 - 1.0  # [-1, 1]
        latent = vae.encode(batch).latent_dist
        if not latent.mean.isfinite().all():
            raise UserError(f"the VAE gives NaN for {name}; try --mixed-precision no")
        means.append(latent.mean.float() * vae.config.scaling_factor)
        deviations.append(latent.std.float() * vae.config.scaling_factor)
    return torch.cat(means), torch.cat(deviations)


@torch.no_grad()
def encode_captions(text_encoder, input_ids, at_once=64):
    """(states, which): the text encoder's output for each different row of the token ids [n, 77], of its
    type [different ones, 77, width], and the number of each row's in it, int64 [n]; both on its device.

    So many run at once: all captions of a large data set together would need more memory than training.
    """
    different, which = input_ids.to(text_encoder.device).unique(dim=0, return_inverse=True)
    states = [text_encoder(ids)[0] for ids in different.split(at_once)]
    return torch.cat(states), which


def held_out_count(asked, pictures):
    """How many of so many pictures to hold out: as many as asked for, at most a quarter of them."""
    return min(asked, pictures // 4)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    """The order in which an epoch goes through its `count` pictures."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)


def draw_noise(rng, shape, timesteps_count):
    """(latent noise, added noise, timestep) of one sample; the first two float32 of `shape`."""
    latent_noise, noise = rng.standard_normal((2, *shape), dtype=np.float32)
    return latent_noise, noise, rng.integers(timesteps_count)


# ---- the optimisation's parts --------------------------------------------------------------


def flatten_parameters(parameters, dtype):
    """(flat, working): the values of `parameters` as one flat float32 parameter, with a gradient of
    zeros, and as one flat tensor of `dtype`, of which they become views.

    An optimizer, a loss scaler and an all-reduce see one tensor, `flat`; the model computes with
    `working`, into which `flat` has to be copied whenever it has changed. For float32 the two share
    memory.

    A departure from a parameter a matrix: bitsandbytes keeps the optimizer's state of tensors of fewer
    than 4,096 elements in 32 bits, and in the vector they get 8 (bench/optimizer_state.py).
    """
    flat = torch.nn.Parameter(torch.cat([p.detach().float().flatten() for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    working = flat.data.to(dtype)
    set_views(parameters, working)
    return flat, working


def set_views(parameters, flat):
    """Make `parameters` views of the tensor `flat`, one behind the other."""
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, flat.split(sizes), strict=True):
        parameter.data = part.view(parameter.shape)


def recomputed(module, *inputs):
    """`module(*inputs)` that keeps its inputs alone and is computed again for the backward pass.

    Nothing in these models is random, so no random state is kept either.
    """
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)


def learning_rate_factor(step, max_steps, warmup_steps):
    """Linear from 0 over the warm-up, then a half cosine to 0; `step` counts from 0.

    The same numbers as diffusers' `get_cosine_schedule_with_warmup`.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def diffusion_loss(unet, scheduler, latents, noise, timesteps, encoder_hidden_states):
    """Mean squared error of the predicted noise, one value a picture: float32 [n].

    Ho et al. 2020, equation 14; for a base model that predicts velocity, Salimans & Ho 2022.
    """
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    noise_pred = unet(noisy_latents.to(unet.dtype), timesteps, encoder_hidden_states).sample
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    return F.mse_loss(noise_pred.float(), target, reduction="none").mean(dim=(1, 2, 3))


def check_trained(models):
    """UserError unless every lora_B is finite and has moved away from its start at zero."""
    for component, model in models.items():
        rows = adapters.factors(model)
        dead = [name for name, (_, b) in rows.items() if not (b.any() and b.isfinite().all())]
        if dead:
            raise UserError(
                f"the adapter did not train: {len(dead)} of {len(rows)} lora_B of the {component} are "
                f"zero or not finite ({adapters.some(dead)}); nothing was saved. Is the learning rate "
                "0 or far too high?"
            )


def memory_advice(config):
    """What to change in a configuration whose training needs too much GPU memory: a sentence."""
    found = []
    if config["batch_size"] > 1:
        found.append(f"--batch-size {config['batch_size'] // 2}")
    if not config["gradient_checkpointing"]:
        found.append("--gradient-checkpointing")
    if config["mixed_precision"] == "no":
        found.append("--mixed-precision fp16")
    if not found:
        smaller = half_resolution(config["resolution"])
        return (
            f"close what else uses the GPU (nvidia-smi lists it); --resolution {smaller} needs less"
        )
    return f"{' or '.join(found)} needs less"


def check_config(config):
    """Refuse values that make no sense, before anything is loaded."""
    for key in "rank max_steps batch_size gradient_accumulation_steps log_every validate_every checkpoint_every keep_checkpoints max_overflows".split():  # fmt: skip
        check_range(config, key, 1)
    for key in "validation_count warmup_steps seed adam_weight_decay unet_learning_rate text_encoder_learning_rate".split():  # fmt: skip
        check_range(config, key, 0)
    check_range(config, "alpha", 1e-6)
    check_range(config, "seed", 0, 2**62)
    for key in ("adam_beta1", "adam_beta2"):
        check_range(config, key, 0, 1 - 1e-9)
    check_resolution(config)
    if config["warmup_steps"] >= config["max_steps"]:
        raise UserError(
            f"warmup_steps is {config['warmup_steps']}, but must be below max_steps "
            f"({config['max_steps']}); for a short run add --warmup-steps 0"
        )
    if config["mixed_precision"] not in ("fp16", "bf16", "no"):
        raise UserError(
            f"mixed_precision is {config['mixed_precision']}, but must be fp16, bf16 or no"
        )
    if Path(config["run_name"]).name != config["run_name"] or config["run_name"].startswith("."):
        raise UserError(f"run_name {config['run_name']!r} must be a plain folder name")
    check_output_folder(Path(config["output_dir"]) / config["run_name"], "config.json")


def start_wandb(project, name, config, run_id=None):
    """A W&B run: online with an API key, else offline, never asking; WANDB_MODE decides if set.

    It gets the configuration and the figures, no pictures and no captions. With `run_id` a run that
    was interrupted goes on.
    """
    key = os.environ.get("WANDB_API_KEY")
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        key = key or netrc.netrc().authenticators("api.wandb.ai")
    mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
    start = functools.partial(wandb.init, project=project, name=name, config=config, id=run_id,
                              resume="allow" if run_id else None,
                              settings=wandb.Settings(console="off", silent=True))  # fmt: skip
    try:
        return start(mode=mode)
    except (wandb.Error, ValueError) as problem:
        # No network, a wrong key, an unknown mode: not worth a training run.
        print(f"W&B cannot start ({one_line(problem, 120)}): logging offline")
        os.environ["WANDB_MODE"] = "offline"
        return start(mode="offline")


# ---- going on after an interruption ---------------------------------------------------------


def weights_digest(folder):
    """SHA-256 over the names, sizes and first and last MiB of a base model's weight files."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*/*.safetensors")):
        size = path.stat().st_size
        found.update(f"{path.relative_to(folder)} {size}".encode())
        with path.open("rb") as file:
            found.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            found.update(file.read())
    return found.hexdigest()


def identity(config, rows, base_folder, accelerator):
    """What must be equal for a checkpoint to be continued bit for bit: a dict of JSON values."""
    found = {key: value for key, value in config.items() if key not in FREE}
    found["pictures and captions"] = data_hash(rows)
    found["weights of the base model"] = weights_digest(base_folder)
    found |= {package: version(package) for package in NUMERIC}
    found["processes"] = accelerator.num_processes
    found["device"] = accelerator.device.type
    return json.loads(json.dumps(found))


def check_same_run(state, now, folder):
    """{key: (then, now)} of what the interrupted run in `folder`, whose checkpoint holds `state`, did
    otherwise and may: its learning rates, if it stopped at numbers that are not finite.

    UserError listing the differences if it was another run.
    """
    saved = state["identity"]
    may = LEARNING_RATES if state.get("gave_up") else ()
    differing = {
        key: (saved.get(key), now.get(key))
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    }
    refused = [
        key if key == "pictures and captions" else f"{key}: {then} then, {new} now"
        for key, (then, new) in differing.items()
        if key not in may
    ]
    if refused:
        raise UserError(
            f"{folder} holds an interrupted run that differs from this one in {'; '.join(refused)}. "
            "Change that back to continue it, or add --no-resume to drop it and start anew"
        )
    return differing


def optimizer_state(optimizer, flats, names):
    """(tensors, numbers) of the optimizer's state, keyed «group.name»."""
    tensors, numbers = {}, {}
    for name, flat in zip(names, flats, strict=True):
        for key, value in optimizer.state[flat].items():
            (tensors if torch.is_tensor(value) else numbers)[f"{name}.{key}"] = value
    return tensors, numbers


class StopSignals:
    """SIGINT and SIGTERM while a step is under way: remembered in `received` until it is done.

    A second one ends the process at once, unless it comes within SAME_SIGNAL seconds: what signals a
    launcher and its workers alike reaches a worker twice, as the launcher hands it on.
    """

    def __enter__(self):
        self.received, self.since = 0, None
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        if not self.received:
            self.received, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > SAME_SIGNAL:
            os._exit(128 + number)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- the run -------------------------------------------------------------------------------


def train(*, base_model, revision, data_dir, resolution, validation_count, output_dir, run_name,
          rank, alpha, unet_targets, text_encoder_targets, train_text_encoder,
          unet_learning_rate, text_encoder_learning_rate, adam_beta1, adam_beta2,
          adam_weight_decay, max_steps, warmup_steps, batch_size, gradient_accumulation_steps,
          gradient_checkpointing, mixed_precision, checkpoint_every, keep_checkpoints, resume,
          max_overflows, seed, log_every, validate_every, wandb_project):  # fmt: skip
    """Train one adapter with the given configuration (the keys of CONFIG); return its folder."""
    config = dict(locals())
    started = time.monotonic()

    # Everything that can be wrong is looked at before a model is loaded.
    rows = read_dataset(data_dir, resolution)
    on_cuda = torch.cuda.is_available()
    base_folder = fetch_base_model(base_model, revision, half=on_cuda and mixed_precision == "fp16")
    with loading(base_folder / "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(base_folder / "tokenizer")
    input_ids = tokenize(tokenizer, rows)

    accelerator = Accelerator(mixed_precision=mixed_precision if on_cuda else "no", cpu=not on_cuda)
    device, is_main = accelerator.device, accelerator.is_main_process
    say = accelerator.print
    if not on_cuda:
        say("no CUDA GPU found: training on the CPU, in fp32")
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}[
        accelerator.mixed_precision
    ]

    target_folder = Path(output_dir) / run_name
    work_folder = unfinished(target_folder)
    this_run = identity(config, rows, base_folder, accelerator)
    saved = checkpoints.latest(work_folder, say) if resume else None
    commit = code_commit()
    changes = []  # of the learning rates, after numbers that were not finite
    if saved:
        state = saved[1]
        changes = state.get("changes", [])
        changed = check_same_run(state, this_run, work_folder)
        if changed:
            changes = [*changes, dict(after_step=state["step"], **changed)]
            say(
                "\n".join(
                    f"{key}: {new} from now on, {then} before"
                    for key, (then, new) in changed.items()
                )
            )
        if state.get("commit") and commit and state["commit"] != commit:
            say(
                f"note: the code's commit was {state['commit']} when this run was interrupted, it is {commit} now"
            )
    accelerator.wait_for_everyone()  # all have read before one writes

    held_out = np.random.default_rng([seed, HELD_OUT]).permutation(len(rows))
    held_out = held_out[: held_out_count(validation_count, len(rows))]
    train_indices = np.setdiff1d(np.arange(len(rows)), held_out)
    say(f"{data_dir}: {len(train_indices)} pictures to train on, {len(held_out)} held out")
    if len(held_out) < validation_count:
        say(f"note: not {validation_count}, as at most a quarter of the pictures is held out"
            + ("" if len(held_out) else "; there will be no validation loss"))  # fmt: skip

    # The VAE is needed once: its latents stay, it goes.
    with loading(base_folder / "scheduler"):
        scheduler = DDPMScheduler.from_pretrained(base_folder / "scheduler")
    vae = load_part(AutoencoderKL, base_folder, "vae", weight_dtype).to(device)
    advice = f"--resolution {half_resolution(resolution)} needs a quarter"
    with memory_for("encoding the pictures", advice):
        latent_means, latent_deviations = encode_latents(vae, rows, device)
    del vae

    unet = load_part(UNet2DConditionModel, base_folder, "unet", weight_dtype)
    text_encoder = load_part(CLIPTextModel, base_folder, "text_encoder", weight_dtype)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing(recomputed)
    torch.manual_seed(seed)  # LoRA's A starts as noise, on the CPU, the same on every machine
    models = {"unet": unet}
    targets = {"unet": unet_targets}
    learning_rates = {"unet": unet_learning_rate}
    if train_text_encoder:
        models["text_encoder"] = text_encoder
        targets["text_encoder"] = text_encoder_targets
        learning_rates["text_encoder"] = text_encoder_learning_rate
    text_encoder.requires_grad_(False)
    groups, parameters, working = [], [], []  # a flat vector a component, and what it is made of
    for component, model in models.items():
        model.requires_grad_(False)
        adapters.add_lora(model, rank, alpha, targets[component])
        # Not .train(): SD1.5 has no dropout, and diffusers' blocks would copy to another layout.
        model.to(device).eval()
        fast.fuse_lora(model)
        parameters.append([w for pair in adapters.factors(model).values() for w in pair])
        flat, copy = flatten_parameters(parameters[-1], weight_dtype)
        working.append(copy)
        groups.append(dict(params=[flat], lr=learning_rates[component], name=component))
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if trainable != flat.numel():
            raise RuntimeError(
                f"{component}: {trainable} trainable parameters, {flat.numel()} in its group"
            )
        frozen = sum(p.numel() for p in model.parameters()) - trainable
        say(f"{component}: {trainable:,} trainable LoRA parameters, {frozen:,} frozen, "
            f"learning rate {learning_rates[component]:g}")  # fmt: skip
    if not train_text_encoder:
        text_encoder.to(device)
        advice = "close what else uses the GPU (nvidia-smi lists it), or give the pictures fewer different captions"
        with memory_for("encoding the captions", advice):
            cached_states, caption_of = encode_captions(text_encoder, input_ids)
        say("text_encoder: frozen; its output is kept and the model dropped")
        del text_encoder

    peak_rates = [group["lr"] for group in groups]
    optimizer = accelerator.prepare(
        bitsandbytes.optim.AdamW8bit(
            groups, betas=(adam_beta1, adam_beta2), weight_decay=adam_weight_decay
        )
    )
    flats = [group["params"][0] for group in groups]
    input_ids = input_ids.to(device)
    timesteps_count = scheduler.config.num_train_timesteps
    latent_shape = latent_means.shape[1:]

    # Sample number s is picture s mod n of epoch s div n. Processes and micro-steps take
    # consecutive samples, so two processes see what one with twice the batch sees.
    def micro_batch(number):
        """Dataset indices and draws of this process's samples of a micro-step."""
        first = (number * accelerator.num_processes + accelerator.process_index) * batch_size
        pictures, draws = [], []
        for sample in range(first, first + batch_size):
            epoch, place = divmod(sample, len(train_indices))
            pictures.append(train_indices[epoch_order(seed, epoch, len(train_indices))[place]])
            rng = np.random.default_rng([seed, SAMPLE, sample])
            draws.append(draw_noise(rng, latent_shape, timesteps_count))
        return pictures, draws

    # A micro-step reads and writes the same tensors every time: that is what a CUDA graph needs.
    indices = torch.zeros(batch_size, dtype=torch.long, device=device)
    latent_noise, noise = torch.zeros(2, batch_size, *latent_shape, device=device)
    timesteps = torch.zeros(batch_size, dtype=torch.long, device=device)
    sample_losses = torch.zeros(batch_size, device=device)

    def fill(pictures, draws):
        """Copy a micro-batch to where the functions below read it."""
        columns = [np.asarray(pictures), *(np.stack(part) for part in zip(*draws, strict=True))]
        for tensor, values in zip((indices, latent_noise, noise, timesteps), columns, strict=True):
            tensor.copy_(torch.from_numpy(values))

    def forward():
        """The mean loss of the micro-batch, and each one's in `sample_losses`."""
        for flat, copy in zip(flats, working, strict=True):
            copy.copy_(flat.data)
        latents = latent_means[indices] + latent_deviations[indices] * latent_noise
        if train_text_encoder:
            states = text_encoder(input_ids[indices])[0]
        else:
            states = cached_states[caption_of[indices]]
        losses = diffusion_loss(unet, scheduler, latents, noise, timesteps, states)
        sample_losses.copy_(losses.detach())
        return losses.mean()

    def forward_backward():
        """Add the gradient of the mean loss to that of the flat vectors."""
        loss = forward() / gradient_accumulation_steps
        if accelerator.scaler is not None:
            loss = accelerator.scaler.scale(loss)
        gradients = iter(torch.autograd.grad(loss, list(itertools.chain(*parameters))))
        for flat, mine in zip(flats, parameters, strict=True):
            flat.grad += torch.cat([next(gradients).flatten() for _ in mine])

    # The held-out loss: four timesteps spread over the schedule, the same noise every time.
    probes = []
    for picture in held_out:
        rng = np.random.default_rng([seed, HELD_OUT, picture])
        drawn = draw_noise(rng, latent_shape, timesteps_count)[:2]
        probes += [(picture, (*drawn, (timesteps_count * (2 * k + 1)) // 8)) for k in range(4)]

    def validation_loss():
        total = 0.0
        for start in range(0, len(probes), batch_size):
            chunk = probes[start : start + batch_size]
            fill(*zip(*(chunk + chunk[-1:] * (batch_size - len(chunk))), strict=True))
            measure()
            total += sample_losses[: len(chunk)].sum().item()
        return total / len(probes)

    # Where the run stands: at the start, or where the last checkpoint left it.
    first_step, log, skipped, run_id = 0, [], 0, None
    loss_sum, loss_count = torch.zeros((), device=device), 0
    if saved:
        tensors, state = saved
        first_step, skipped, run_id = state["step"], state["skipped"], state["run_id"]
        loss_count = state["loss_count"]
        loss_sum.copy_(tensors["loss_sum"])
        for name, flat in zip(models, flats, strict=True):
            flat.data.copy_(tensors[f"{name}.parameters"])
            mine = f"{name}.optimizer."
            kept = {k.removeprefix(mine): v for k, v in tensors.items() if k.startswith(mine)}
            kept = {key: value.to(device) for key, value in kept.items()}
            kept |= {
                k.removeprefix(mine): v for k, v in state["optimizer"].items() if k.startswith(mine)
            }
            optimizer.state[flat].update(kept)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        log = state["log"]
        say(f"continuing {run_name} after step {first_step}")
    if is_main:
        if not saved:
            fresh_folder(target_folder)
        tracker = start_wandb(wandb_project, run_name, config, run_id)
        log_file = (work_folder / "log.jsonl").open("w", encoding="utf-8")
        log_file.writelines(json.dumps(row) + "\n" for row in log)

    def record(**row):
        if is_main:
            log.append(row)
            log_file.write(json.dumps(row) + "\n")
            log_file.flush()
            tracker.log({f"train/{key}": value for key, value in row.items()})

    def save_checkpoint(done, gave_up=False):
        names = [f"{name}.optimizer" for name in models]
        tensors, numbers = optimizer_state(optimizer, flats, names)
        tensors |= {f"{name}.parameters": f.data for name, f in zip(models, flats, strict=True)}
        scaler = accelerator.scaler
        state = dict(
            identity=this_run, optimizer=numbers, log=log, loss_count=loss_count, skipped=skipped,
            scaler=scaler.state_dict() if scaler else None, run_id=tracker.id, gave_up=gave_up,
            changes=changes, commit=commit,
        )  # fmt: skip
        tensors["loss_sum"] = loss_sum
        checkpoints.save(work_folder, done, tensors, state, keep_checkpoints)

    def give_up(step, pictures, what):
        """Stop before the update of a step whose numbers are not finite, its predecessor kept."""
        if is_main:
            save_checkpoint(step, gave_up=True)
        raise UserError(
            f"{what} at step {step + 1} ({', '.join(sorted({rows[i][0] for i in pictures}))}); the state "
            f"after step {step} is kept in {work_folder}. Are the learning rates too high? With lower ones "
            "(--unet-learning-rate, --text-encoder-learning-rate) the same command goes on from there"
        )

    first_micro = first_step * gradient_accumulation_steps
    training_memory = functools.partial(
        memory_for, f"training with batch_size {batch_size}", memory_advice(config)
    )
    with training_memory():
        upcoming = micro_batch(first_micro)
        fill(*upcoming)
        wait = fast.compile_attention(forward, device, training=True)
        fast.channels_last(unet, training=True)  # compiles its own kernels meanwhile
        wait()
        micro_step, measure = fast.captured([forward_backward, torch.no_grad()(forward)], device)
        for flat in flats:
            flat.grad.zero_()
        if len(held_out) and is_main and not saved:
            record(step=0, validation_loss=validation_loss())
    set_up_seconds = time.monotonic() - started
    overflows = 0  # fp16 steps skipped in a row
    loop_started = time.monotonic()

    with (
        StopSignals() as stop,
        training_memory(),
        tqdm(total=max_steps, initial=first_step, desc=run_name, unit="step",
             disable=not is_main) as bar,
    ):  # fmt: skip
        for step in range(first_step, max_steps):
            factor = learning_rate_factor(step, max_steps, warmup_steps)
            for group, peak_rate in zip(optimizer.param_groups, peak_rates, strict=True):
                group["lr"] = peak_rate * factor

            step_loss, step_pictures = torch.zeros((), device=device), []
            for micro in range(gradient_accumulation_steps):
                fill(*upcoming)
                micro_step()
                step_loss += sample_losses.mean() / gradient_accumulation_steps
                step_pictures += upcoming[0]
                # Drawn while the GPU is at work.
                upcoming = micro_batch(step * gradient_accumulation_steps + micro + 1)
            if accelerator.num_processes > 1:
                for flat in flats:
                    flat.grad.copy_(accelerator.reduce(flat.grad, "mean"))

            # The fp16 loss scaler skips an update whose gradient overflowed, which is ordinary and
            # counted; without it nothing may be wrong. A loss that is not finite is never ordinary.
            if accelerator.scaler is None and not (
                step_loss.isfinite() and all(flat.grad.isfinite().all() for flat in flats)
            ):
                give_up(step, step_pictures, "the loss or its gradient is NaN or infinite")
            optimizer.step()
            overflows = overflows + 1 if optimizer.step_was_skipped else 0
            if overflows:
                skipped += 1
                if not accelerator.reduce(step_loss, "sum").isfinite():  # of any process
                    give_up(step, step_pictures, "the loss is NaN or infinite")
                if overflows > max_overflows:
                    give_up(step, step_pictures, f"fp16 overflowed {overflows} times in a row")
            for flat in flats:
                flat.grad.zero_()

            done = step + 1
            loss_sum += step_loss
            loss_count += 1
            bar.update()
            if done % log_every == 0 or done == max_steps:
                mean_loss = accelerator.reduce(loss_sum, "mean").item() / loss_count
                loss_sum.zero_()
                loss_count = 0
                record(step=done, loss=mean_loss, learning_rate=peak_rates[0] * factor)
                bar.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{peak_rates[0] * factor:.1e}")
            if len(held_out) and is_main and (done % validate_every == 0 or done == max_steps):
                record(step=done, validation_loss=validation_loss())

            stopping = stop.received
            if accelerator.num_processes > 1 and done % log_every == 0:
                # A signal may reach the processes in different steps: they agree now and then.
                agreed = torch.tensor(stopping, device=device)
                stopping = int(accelerator.gather(agreed.reshape(1)).max())
            elif accelerator.num_processes > 1:
                stopping = 0
            if stopping or (done % checkpoint_every == 0 and done < max_steps):
                loss_sum.copy_(accelerator.reduce(loss_sum, "mean"))
                if is_main:
                    save_checkpoint(done)
            if stopping:
                say(f"\nstopped after step {done}, which is saved; the same command continues")
                if is_main:
                    tracker.finish(exit_code=128 + stopping)
                sys.exit(128 + stopping)
    seconds = time.monotonic() - loop_started
    steps_a_second = (max_steps - first_step) / seconds

    accelerator.wait_for_everyone()
    for flat, mine in zip(flats, parameters, strict=True):
        set_views(mine, flat.data)  # what is saved is float32
    check_trained(models)
    if is_main:
        log_file.close()
        tracker.finish()
        captions = sorted({caption for _, caption, _ in rows})
        summary = dict(
            config=config,
            **provenance(device),
            processes=accelerator.num_processes,
            mixed_precision=accelerator.mixed_precision,
            data=dict(
                sha256=data_hash(rows),
                captions=captions,
                trained_on=[rows[i][0] for i in train_indices],
                held_out=[rows[i][0] for i in sorted(held_out)],
            ),
            parameters={g["name"]: flat.numel() for g, flat in zip(groups, flats, strict=True)},
            skipped_steps=skipped,
            learning_rate_changes=changes,
            set_up_seconds=round(set_up_seconds, 2),
            steps_a_second=round(steps_a_second, 3),
        )
        if on_cuda:
            summary["peak_gib_reserved"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
        adapters.save_adapter(work_folder, models, rank, alpha, targets, dict(
            base_model=str(base_model), caption=captions[0] if len(captions) == 1 else f"{len(captions)} captions",
            data_sha256=summary["data"]["sha256"], steps=str(max_steps), seed=str(seed),
        ))  # fmt: skip
        loss_figure(log, run_name).savefig(work_folder / "loss.png")
        write_marker(work_folder / "config.json", summary)  # last: with it the folder is whole
        replace_folder(target_folder, "config.json")
        checkpoints.remove(target_folder)  # only now is the run safe without them
        notes = f", {skipped} skipped for fp16 overflow" if skipped else ""
        memory = f", {summary['peak_gib_reserved']} GiB reserved at most" if on_cuda else ""
        print(f"{target_folder}: {max_steps} steps{notes}, {steps_a_second:.2f} steps/s after "
              f"{set_up_seconds:.1f} s of set-up{memory}")  # fmt: skip
        print(f"  python inference.py --lora-dir {target_folder}")
    accelerator.end_training()
    return target_folder


def main(config, description):
    """Run `train` with a script's CONFIG and the command line's overrides."""
    config = parse_config(config, description, demo=DEMO)
    check_config(config)
    target = Path(config["output_dir"]) / config["run_name"]
    # Of several processes the first one writes, and holds the folder.
    holder = os.environ.get("RANK", "0") == "0"
    advice = "close what else uses the GPU (nvidia-smi lists it)"
    with (
        disk_for(target),
        locked(target) if holder else contextlib.nullcontext(),
        memory_for("loading the models", advice),
    ):
        if holder:
            recover_folder(target, "config.json")
            checkpoints.remove(target)  # those of a run that was killed when it was complete
        train(**config)


if __name__ == "__main__":
    run_script(lambda: main(CONFIG, __doc__))
