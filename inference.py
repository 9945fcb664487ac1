#!/usr/bin/env python3
"""Draw the same prompts with and without an adapter, and measure what it learned and spoiled.

    python inference.py --lora-dir lora_weights/lora_weights_rank_32 --output-dir results/eval_rank32
    python inference.py --lora-dir lora_weights --output-dir results/all   # every run, compared
    python inference.py --demo                                             # the embedded miniature
    python inference.py --lora-scales 0,0.25,0.5,0.75,1                    # how much of it?
    python inference.py --rescore                                          # measure saved pictures
    python inference.py --score-dir BASE_FOLDER,LORA_FOLDER                # pictures drawn elsewhere

Out comes, in the output folder (one subfolder a run where there are several): report.html, to open;
images/<prompt>/{base,lora}_<seed>.png, comparison_all.png, success_cases.png, failure_cases.png,
metrics.json, metrics.csv (a row a picture) and summary.md; for several runs comparison/ beside them.
Base and LoRA share one pipeline and each picture's starting noise, which comes from its seed alone.
Runs whose names differ in their ending _seed<N> only are training seeds of one experiment.
"""

import csv
import gc
import hashlib
import itertools
import json
import logging
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

# Before torch is imported: its CPU threads then spin only briefly while they wait for one another.
# Left alone they spin so long that another process on one of the cores stops nearly everything; not
# spinning at all (OMP_WAIT_POLICY=PASSIVE) halves the speed on a quiet machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Its only remark at import is about a 4-bit kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

import adapters
import fast
import metrics
import report
from common import (
    UserError,
    check_output_folder,
    check_range,
    check_resolution,
    data_hash,
    disk_for,
    fetch_base_model,
    fresh_folder,
    load_part,
    loading,
    locked,
    memory_for,
    parse_config,
    provenance,
    read_dataset,
    recover_folder,
    replace_folder,
    run_script,
    write_json,
)
from lib.evaluation import statistics

CONFIG = dict(
    # what is evaluated
    lora_dir="lora_weights/lora_weights_rank_32",  # one adapter, or a folder of runs
    output_dir="results/eval_rank32",  # replaced whole, once the new one is complete
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",  # a hub id or a local folder
    revision=None,  # a commit of the hub repository; None: its newest
    data_dir="processed_data",  # the training pictures, for the concept similarity
    # what is drawn
    prompts=None,  # a text file, a line a prompt, `failure:` before an unrelated one; None: PROMPTS
    seeds=8,  # pictures a prompt
    seed=42,  # of the first picture; the others count up from it
    steps=28,
    guidance_scale=6.0,
    resolution=512,  # pixels
    batch_size=0,  # pictures drawn at once; 0: what the GPU's free memory holds, at most 8
    # how it is scored
    clip_model="openai/clip-vit-base-patch32",
    clip_revision="refs/pr/15",  # the same weights as safetensors; the main branch has a pickle only
    clip_margin=0.02,  # "learned" allows the CLIP score of success prompts to fall by less than this
    # other ways to run
    lora_scales=(1.0,),  # others: also draw with so much of the adapter, and chart the trade-off
    rescore=False,  # measure the pictures saved in output_dir again, drawing none
    score_dir=None,  # "BASE_FOLDER,LORA_FOLDER": measure these pictures, paired in the files' order
)

# The published study's prompts. Success: what was taught. Failure: what must not change.
PROMPTS = (
    ("success", "a holographic raincoat"),
    ("success", "a person wearing a holographic raincoat in the rain"),
    ("success", "a holographic raincoat on a mannequin"),
    ("failure", "a red leather jacket"),
    ("failure", "a cat sitting on a couch"),
)

MARKER = "metrics.json"  # the file of a results folder that is written last
# What pictures must share to be compared.
DRAWN_WITH = ("base_model", "revision", "steps", "guidance_scale", "resolution")

# What --demo puts in their place.
DEMO = dict(
    lora_dir="lora_weights/demo_runs/lora_weights_rank_32",
    output_dir="results/demo_rank32",
    base_model="demo/model",
    clip_model="demo/clip",
    resolution=128,
    batch_size=8,
)


# ---- what is drawn -------------------------------------------------------------------------


def read_prompts(path):
    """[(category, prompt)] of a prompts file; UserError naming the line that is wrong."""
    if path is None:
        return list(PROMPTS)
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"prompts file {path} cannot be read: {problem}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        category, prompt = re.fullmatch(r"(?:(success|failure):)?\s*(.*?)\s*", line).groups()
        if not prompt:
            raise UserError(f"{path}, line {number}: no prompt behind «{category}:»")
        if prompt in [known for _, known in prompts]:
            raise UserError(f"{path}, line {number}: «{prompt}» is there twice")
        prompts.append((category or "success", prompt))
    if not prompts:
        raise UserError(f"prompts file {path} holds no prompts")
    return prompts


def check_prompt_lengths(prompts, tokenizer, limit, reader):
    """UserError naming a prompt that `reader` would have to cut off."""
    for _, prompt in prompts:
        length = len(tokenizer(prompt, verbose=False).input_ids)
        if length > limit:
            raise UserError(
                f"the prompt «{prompt[:60]}…» has {length} tokens; {reader} reads {limit}"
            )


def slugs(prompts):
    """A folder name for each prompt: its letters and digits, numbered where two would be equal."""
    names = []
    for number, (_, prompt) in enumerate(prompts, 1):
        name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
        names.append(name if name and name not in names else f"{name or 'prompt'}-{number}")
    return names


def load_pipeline(folder, dtype, device):
    """The base model of a folder as one pipeline: no safety checker, safetensors only."""
    device = torch.device(device)
    with loading(folder / "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    with loading(folder / "scheduler"):
        scheduler = PNDMScheduler.from_pretrained(folder / "scheduler")
    # Timesteps stay on the CPU: read from the GPU, each would wait until it has finished its work.
    scheduler.set_timesteps = lambda steps, device=None: PNDMScheduler.set_timesteps(
        scheduler, steps
    )
    pipeline = StableDiffusionPipeline(
        vae=load_part(AutoencoderKL, folder, "vae", dtype),
        text_encoder=load_part(CLIPTextModel, folder, "text_encoder", dtype),
        tokenizer=tokenizer,
        unet=load_part(UNet2DConditionModel, folder, "unet", dtype),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for model in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        model.eval().requires_grad_(False)
    for model in (pipeline.vae, pipeline.unet):
        fast.channels_last(model)
    if device.type == "cuda":
        # One picture fills a GPU there, and a batch would need more memory than the UNet does.
        pipeline.vae.enable_slicing()
    return pipeline


# GiB that drawing one picture of 512x512 takes, guided; measured, see bench/README.md.
PICTURE_GIB = 0.2
SPARE_GIB = 1.5  # for the VAE and the scores


def pictures_at_once(jobs, asked, resolution, device):
    """How many pictures to draw at once: `asked`, or for 0 what the free memory holds, at most 8
    (more draw no faster), or 4 on a CPU; evened out over as many batches as `jobs` pictures need.
    """
    if asked:
        most = asked
    elif device.type == "cpu":
        most = 4
    else:
        free = torch.cuda.mem_get_info(device)[0] / 2**30 - SPARE_GIB
        most = int(free / (PICTURE_GIB * (resolution / 512) ** 2))
        most = min(8, max(1, most))
    return math.ceil(jobs / math.ceil(jobs / most))


@torch.no_grad()
def record_unet(pipeline, samples, size):
    """Let the UNet predict up to `samples` latents of size x size at once by a CUDA graph, which
    always computes that many; others as before."""
    unet, tokens = pipeline.unet, pipeline.tokenizer.model_max_length
    plain, device = unet.forward, unet.device
    latents = torch.zeros(
        samples, unet.config.in_channels, size, size, device=device, dtype=unet.dtype
    )
    states = torch.zeros(
        samples, tokens, unet.config.cross_attention_dim, device=device, dtype=unet.dtype
    )
    timestep = torch.zeros((), dtype=torch.long, device=device)
    (predict,) = fast.captured([lambda: plain(latents, timestep, states).sample], device)

    def forward(sample, t, encoder_hidden_states, return_dict=True, **others):
        count = len(sample)
        shapes = sample.shape[1:], encoder_hidden_states.shape[1:]
        if return_dict or count > samples or shapes != (latents.shape[1:], states.shape[1:]):
            return plain(sample, t, encoder_hidden_states, return_dict=return_dict, **others)
        latents[:count].copy_(sample)
        states[:count].copy_(encoder_hidden_states)
        timestep.copy_(t)
        return (predict()[:count].clone(),)  # the next replay writes over it

    unet.forward = forward


def drawing_memory(batch_size):
    """What to say when the GPU's memory is too small for so many pictures."""
    advice = f"--batch-size {max(1, batch_size // 2)} needs less"
    return memory_for(f"drawing {batch_size} pictures at once", advice)


@torch.no_grad()
def draw(pipeline, jobs, *, steps, guidance_scale, resolution, batch_size, title):
    """A picture for each (prompt, seed) of `jobs`, as PIL images in that order.

    The starting noise is drawn on the CPU from the picture's own seed, so it depends neither on
    the device nor on the batch.
    """
    images = []
    size = resolution // pipeline.vae_scale_factor
    shape = (pipeline.unet.config.in_channels, size, size)
    with (
        drawing_memory(batch_size),
        tqdm(total=len(jobs) * steps, desc=title, unit="step", leave=False) as bar,
    ):
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            noise = [
                torch.randn(shape, generator=torch.Generator().manual_seed(s)) for _, s in batch
            ]
            finished = min(start + batch_size, len(jobs)) * steps

            def progress(pipeline, step, timestep, tensors, finished=finished):
                # PNDM makes one call more than it has steps.
                bar.update(min(batch_size, finished - bar.n))
                return {}

            pictures = pipeline(
                [prompt for prompt, _ in batch],
                latents=torch.stack(noise).to(pipeline.device, pipeline.unet.dtype),
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=resolution,
                width=resolution,
                callback_on_step_end=progress,
                output_type="pt",
            ).images
            # To bytes while they are on the GPU, which is idle while the CPU does it.
            pixels = (pictures.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
            images += [Image.fromarray(picture) for picture in pixels.cpu().numpy()]
    return images


@torch.no_grad()
def probe(pipeline, size=16):
    """Outputs of the text encoder and of the UNet at one fixed input (for the UNet, latents of size
    x size), to tell models apart."""
    text_encoder, unet = pipeline.text_encoder, pipeline.unet
    ids = torch.arange(77, device=pipeline.device)[None] % text_encoder.config.vocab_size
    states = text_encoder(ids)[0]
    generator = torch.Generator().manual_seed(0)
    shape = (1, unet.config.in_channels, size, size)
    latents = torch.randn(shape, generator=generator).to(pipeline.device, unet.dtype)
    # A fixed text for the UNet, so that it is not moved by the text encoder's adapter.
    text = torch.randn(states.shape, generator=generator).to(pipeline.device, unet.dtype)
    return {"text_encoder": states.float(), "unet": unet(latents, 500, text).sample.float()}


def check_switch(pipeline, applied, adapter, base_probe):
    """UserError unless the adapter at scale 0 gives the base's outputs, and at 1 other ones."""
    applied.set_scale(0)
    off = probe(pipeline)
    applied.set_scale(1)
    on = probe(pipeline)
    for component in adapter.factors:
        base = base_probe[component]
        if not torch.allclose(off[component], base, rtol=1e-3, atol=1e-3 * base.abs().max().item()):
            raise UserError(
                f"{adapter.path}: switched off, the {component} is not the base model's"
            )
        if torch.equal(on[component], base):
            raise UserError(f"{adapter.path}: switched on, the {component} gives what the base gives; "
                            "the adapter does nothing")  # fmt: skip


# ---- what is measured ----------------------------------------------------------------------


@dataclass
class Run:
    """One adapter's pictures beside the base model's, and their scores."""

    name: str
    target: Path  # where its results go
    adapter: dict  # fingerprint, rank, alpha, metadata: what metrics.json says of it
    base: list  # PIL pictures, prompt by prompt and seed by seed
    lora: list  # likewise
    scaled: dict = field(default_factory=dict)  # {scale: pictures}, where a sweep was asked for
    rows: list = None  # a dict a picture; see `score`
    sweep: tuple = None  # see `sweep_summary`

    @property
    def experiment(self):
        return re.sub(r"_seed\d+$", "", self.name)

    @property
    def training_seed(self):
        return self.adapter.get("metadata", {}).get("seed")


def picture_scores(images, texts, clip, training):
    """A dict for each picture: clip, concept_similarity, nearest_similarity, nearest_picture.

    `texts` are the pictures' prompts. What cannot be had without a Clip or a TrainingSet is None.
    """
    rows = [
        dict(clip=None, concept_similarity=None, nearest_similarity=None, nearest_picture=None)
        for _ in images
    ]
    if clip:
        embeddings = metrics.image_embeddings(images, clip)
        cosines = (embeddings * metrics.text_embeddings(texts, clip)).sum(axis=1)
        for row, cosine in zip(rows, cosines, strict=True):
            row["clip"] = float(cosine)
    if clip and training:
        concept = metrics.concept_similarity(embeddings, training.embeddings)
        nearest, which = metrics.nearest_training(
            embeddings, training.embeddings, training.mirrored
        )
        for i, row in enumerate(rows):
            row["concept_similarity"] = float(concept[i])
            row["nearest_similarity"] = float(nearest[i])
            row["nearest_picture"] = training.names[which[i]]
    return rows


def score(run, prompts, seeds, clip, training, device, base_scores):
    """Fill `run.rows`: a row (dict) a picture, base and LoRA of each prompt and seed in turn.

    `base_scores` is picture_scores of the base pictures, which runs share.
    """
    jobs = [(category, prompt, seed) for category, prompt in prompts for seed in seeds]
    distances = metrics.lpips_distances(run.base, run.lora, device)
    lora_scores = picture_scores(run.lora, [prompt for _, prompt, _ in jobs], clip, training)
    run.rows = []
    for i, (category, prompt, seed) in enumerate(jobs):
        job = dict(prompt=prompt, category=category, seed=seed)
        run.rows.append(job | dict(model="base", lpips=None) | base_scores[i])
        run.rows.append(job | dict(model="lora", lpips=float(distances[i])) | lora_scores[i])


def grid(run, key, model, prompts):
    """The scores `key` of a run's base or LoRA pictures as an array [prompts, seeds]."""
    values = [row[key] for row in run.rows if row["model"] == model]
    return np.array(values, np.float64).reshape(len(prompts), -1)


def effects(runs, prompts, ceilings):
    """What the adapters of one experiment changed, arrays [runs, prompts, seeds]:

    clip and concept_similarity, LoRA minus base; lpips, base to LoRA; change, lpips as a share of
    its ceiling. Scores that were not computed are left out.
    """
    found = {"lpips": np.stack([grid(run, "lpips", "lora", prompts) for run in runs])}
    if np.isfinite(ceilings).all():
        found["change"] = found["lpips"] / np.asarray(ceilings)[:, None]
    for key in ("clip", "concept_similarity"):
        if runs[0].rows[0][key] is not None:
            found[key] = np.stack(
                [grid(run, key, "lora", prompts) - grid(run, key, "base", prompts) for run in runs]
            )
    return found


def analyse(runs, prompts, ceilings, threshold, clip_margin):
    """Every figure of one experiment with its interval, and the verdicts: a dict for metrics.json.

    `runs` are the experiment's training runs; `ceilings` the LPIPS ceiling of each prompt;
    `threshold` the nearest-picture similarity above which a picture counts as a copy, or None.
    """
    found = effects(runs, prompts, ceilings)
    categories = list(dict.fromkeys(category for category, _ in prompts))
    table = []
    for index, (category, prompt) in enumerate(prompts):
        row = dict(category=category, prompt=prompt, lpips_ceiling=float(ceilings[index]))
        for key, values in found.items():
            row[key] = statistics.mean_interval(values[:, index])
        for key in ("clip", "concept_similarity"):
            for model in ("base", "lora"):
                if key in found:
                    means = [grid(run, key, model, prompts)[index].mean() for run in runs]
                    row[f"{model}_{key}"] = float(np.mean(means))
        table.append(row)
    totals = {}
    for category in categories:
        members = [i for i, (name, _) in enumerate(prompts) if name == category]
        totals[category] = {
            key: statistics.mean_interval(values[:, members].mean(axis=1))
            for key, values in found.items()
        }
        for name in (
            "base_clip",
            "lora_clip",
            "base_concept_similarity",
            "lora_concept_similarity",
        ):
            if name in table[0]:
                totals[category][name] = float(np.mean([table[i][name] for i in members]))
    # Differences are tested against 0, all of one experiment's at once. (LPIPS is above 0 for any
    # adapter that does anything: it is reported, not tested.)
    tested = [
        totals[c][k] for c in categories for k in ("concept_similarity", "clip") if k in found
    ]
    for interval, p in zip(tested, statistics.holm([t["p"] for t in tested]), strict=True):
        interval["p_holm"] = float(p)

    summary = dict(runs=[run.name for run in runs], prompts=table, categories=totals)
    if threshold is not None and "success" in totals:
        nearest = np.stack([grid(run, "nearest_similarity", "lora", prompts) for run in runs])
        nearest = nearest[:, [i for i, (name, _) in enumerate(prompts) if name == "success"]]
        copies = statistics.share_interval(nearest > threshold)
        summary["memorised"] = dict(share=copies, threshold=float(threshold), pictures=nearest.size)
    summary["verdicts"] = verdicts(summary, clip_margin)
    return summary


def difference(interval, p=None):
    """True or False where the mean differs from 0 upwards or downwards, None where no difference is
    detectable: the interval must leave out 0, and so must the corrected p-value."""
    p = interval.get("p_holm", interval["p"]) if p is None else p
    if not (interval["low"] > 0 or interval["high"] < 0) or p >= 0.05:
        return None
    return interval["mean"] > 0


def verdicts(summary, clip_margin):
    """[dict(question, answer, text)]: answer is yes, no, or no detectable difference."""
    found = []
    totals = summary["categories"]
    one = summary["prompts"][0]["lpips"]
    if one["runs"] == one["seeds"] == 1:
        return []  # one picture a prompt: no interval, and so no claim
    success, failure = totals.get("success", {}), totals.get("failure", {})
    say = report.interval_text
    if "concept_similarity" in success:
        concept, clip = success["concept_similarity"], success["clip"]
        rose = difference(concept)
        text = (f"On success prompts the pictures' similarity to the training pictures changed by "
                f"{say(concept)}, the CLIP score by {say(clip)} (margin {clip_margin:g}). ")  # fmt: skip
        if rose and clip["low"] > -clip_margin:
            answer, end = "yes", "The concept was learned."
        elif rose:
            answer, end = "no", ("It looks more like the training pictures, but it cannot be ruled "
                                 "out that the match with the prompt fell by more than the margin.")  # fmt: skip
        elif rose is None:
            answer, end = "no detectable difference", "No detectable difference."
        else:
            answer, end = "no", "It moved away from the training pictures."
        found.append(dict(question="learned", answer=answer, text=text + end))
    if "concept_similarity" in failure:
        concept = failure["concept_similarity"]
        moved = difference(concept)
        text = f"On unrelated prompts that similarity changed by {say(concept)}"
        if "change" in failure:
            text += (f"; the pictures moved, in any direction, {say(failure['change'], sign=False)} of the way to "
                     "an unrelated picture of the same prompt")  # fmt: skip
        answer, end = {
            True: ("yes", "The adapter contaminates them."),
            False: ("no", "They moved away from the training pictures."),
            None: ("no detectable difference", "No detectable contamination."),
        }[moved]
        found.append(dict(question="contaminated", answer=answer, text=f"{text}. {end}"))
    if "memorised" in summary:
        share, threshold = summary["memorised"]["share"], summary["memorised"]["threshold"]
        text = (f"{share['mean']:.0%} [{share['low']:.0%}, {share['high']:.0%}] of the success pictures "
                f"are nearer to a training picture than {threshold:.3f}, as only 5% of the training pictures "
                "are to one another. ")  # fmt: skip
        answer, end = "no detectable difference", "No detectable copying."
        if share["low"] > 0.05:
            answer, end = "yes", "More than 5%: some are near-copies."
        elif share["high"] <= 0.05:
            answer, end = "no", "Not more than 5%."
        found.append(dict(question="memorised", answer=answer, text=text + end))
    return found


# What two experiments are compared by, and where.
COMPARED = (
    ("concept_similarity", "success"),
    ("clip", "success"),
    ("concept_similarity", "failure"),
    ("clip", "failure"),
    ("change", "failure"),
)


def compare(groups, prompts, ceilings):
    """Every pair of experiments on the same prompts and seeds: a list of dicts.

    `groups` is {experiment: [Run]}. Runs are paired by their training seed where both experiments
    have it. Each difference is second minus first, with its interval and Holm's p over all of them.
    """
    rows = []
    for (first, a), (second, b) in itertools.combinations(groups.items(), 2):
        seeds = [{run.training_seed for run in group} - {None} for group in (a, b)]
        shared = sorted(seeds[0] & seeds[1])
        if shared:
            a, b = ([next(r for r in g if r.training_seed == s) for s in shared] for g in (a, b))
        else:
            a, b = a[: len(b)], b[: len(a)]
        one, two = effects(a, prompts, ceilings), effects(b, prompts, ceilings)
        for key, category in COMPARED:
            members = [i for i, (name, _) in enumerate(prompts) if name == category]
            if key in one and members:
                values = (two[key] - one[key])[:, members].mean(axis=1)
                rows.append(dict(first=first, second=second, metric=key, category=category,
                                 paired_by_training_seed=bool(shared),
                                 **statistics.mean_interval(values)))  # fmt: skip
    for row, p in zip(rows, statistics.holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = float(p)
        row["answer"] = {True: "higher", False: "lower", None: "no detectable difference"}[
            difference(row)
        ]
    return rows


def sweep_summary(pictures, base, prompts, seeds, ceilings, scoring):
    """The trade-off over the adapter's scale: [dict(scale, concept, clip, change)], and a sentence.

    `pictures` is {scale: list of PIL pictures}. concept and clip are the differences to the base on
    success prompts, change how far failure prompts moved, each with its interval. `scoring` are
    the remaining arguments of `score`.
    """
    rows = []
    for scale, images in sorted(pictures.items()):
        run = Run(f"scale {scale:g}", None, {}, base, images)
        score(run, prompts, seeds, **scoring)
        found = effects([run], prompts, ceilings)
        row = dict(scale=scale)
        for key, category in (
            ("concept_similarity", "success"),
            ("clip", "success"),
            ("change", "failure"),
        ):
            members = [i for i, (name, _) in enumerate(prompts) if name == category]
            if key in found and members:
                row[key] = statistics.mean_interval(found[key][:, members].mean(axis=1))
        rows.append(row)
    if not all("concept_similarity" in row and "change" in row for row in rows):
        return rows, "Concept or preservation was not measured, so no scale is suggested."
    best = max(rows, key=lambda row: row["concept_similarity"]["mean"])
    gain = best["concept_similarity"]["mean"]
    if gain <= 0:
        return rows, "No scale moves the success prompts toward the training pictures."
    enough = next(row for row in rows if row["concept_similarity"]["mean"] >= 0.9 * gain)
    return rows, (
        f"Scale {enough['scale']:g} is the smallest that keeps nine tenths of the greatest gain in concept "
        f"similarity ({enough['concept_similarity']['mean']:.3f} of {gain:.3f}); there unrelated "
        f"prompts move {enough['change']['mean']:.0%} of the way to another picture, at scale "
        f"{rows[-1]['scale']:g} {rows[-1]['change']['mean']:.0%}."
    )


def picture_warnings(runs, prompts, seeds):
    """Pictures that are one flat colour, and LoRA pictures that two runs share: sentences."""
    jobs = [(prompt, seed) for _, prompt in prompts for seed in seeds]
    found, owners = [], {}
    for index, run in enumerate(runs):
        kinds = [("LoRA", run.lora)] + ([("base", run.base)] if index == 0 else [])
        for kind, images in kinds:
            for (prompt, seed), image in zip(jobs, images, strict=True):
                if all(low == high for low, high in image.convert("RGB").getextrema()):
                    found.append(f"{run.name}: the {kind} picture of «{prompt}», seed {seed}, is one flat "
                                 "colour: NaN in half precision, or a broken model")  # fmt: skip
        for (prompt, seed), image in zip(jobs, run.lora, strict=True):
            key = (prompt, seed, hashlib.sha256(image.tobytes()).hexdigest())
            if key in owners:
                found.append(f"{owners[key]} and {run.name} have the same picture of «{prompt}», seed "
                             f"{seed}: were both scored on one adapter?")  # fmt: skip
            owners.setdefault(key, run.name)
    return found


def check_config(config):
    """Refuse values that make no sense, before anything is loaded."""
    for key in ("seeds", "steps"):
        check_range(config, key, 1)
    check_range(config, "batch_size", 0)
    check_range(config, "clip_margin", 0)
    check_range(config, "seed", 0, 2**62)
    check_range(config, "guidance_scale", 0, 100)
    check_resolution(config)
    if config["rescore"] and config["score_dir"]:
        raise UserError("rescore and score_dir exclude one another; give one of them")
    if not config["lora_scales"] or not all(0 <= s <= 10 for s in config["lora_scales"]):
        raise UserError(f"lora_scales is {config['lora_scales']}, but must be numbers from 0 to 10")


# ---- the evaluation ------------------------------------------------------------------------


def evaluate(*, lora_dir, output_dir, base_model, revision, data_dir, prompts, seeds, seed, steps,
             guidance_scale, resolution, batch_size, clip_model, clip_revision, clip_margin,
             lora_scales, rescore, score_dir):  # fmt: skip
    """Evaluate each adapter in `lora_dir` against the base model; return the output folders.

    With `rescore` or `score_dir` the pictures are read, not drawn.
    """
    config = dict(locals())
    started = time.monotonic()
    check_config(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    drawing = not rescore and not score_dir

    # Everything that can be wrong is looked at before a model is loaded, the scorer before the
    # pictures are drawn.
    if rescore:
        runs, config, prompts, seeds = read_saved(Path(output_dir), config)
    else:
        prompts, seeds = read_prompts(prompts), list(range(seed, seed + seeds))
    if score_dir:
        runs, seeds = read_pair(score_dir, Path(output_dir), prompts)
    if drawing:
        plan = plan_runs(config, device)
    clip, training = load_scorer(config, prompts, device)
    if drawing:
        pipeline = ready_pipeline(config, plan, prompts, training, device)
        loaded = time.monotonic()
        runs = draw_runs(config, plan, pipeline, prompts, seeds)
        drawn = time.monotonic()
        del pipeline  # its memory is the scorers' now
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    chunks = [runs[0].base[i : i + len(seeds)] for i in range(0, len(runs[0].base), len(seeds))]
    ceilings = [metrics.lpips_ceiling(chunk, device) for chunk in chunks]
    texts = [prompt for _, prompt in prompts for _ in seeds]
    for run in tqdm(runs, desc="scores", unit="run", leave=False, disable=len(runs) == 1):
        if run.base is not runs[0].base or run is runs[0]:  # drawn once, they are scored once
            base_scores = picture_scores(run.base, texts, clip, training)
        scoring = dict(clip=clip, training=training, device=device, base_scores=base_scores)
        score(run, prompts, seeds, **scoring)
        if run.scaled:
            run.sweep = sweep_summary(run.scaled, run.base, prompts, seeds, ceilings, scoring)
    scored = time.monotonic()
    warnings = picture_warnings(runs, prompts, seeds)
    for warning in warnings:
        print(f"warning: {warning}")

    shown = dict(prompts=prompts, seeds=seeds, warnings=warnings, provenance=provenance(device),
                 config=config, training=training)  # fmt: skip
    threshold = training and training.copy_threshold
    for run in runs:
        summary = analyse([run], prompts, ceilings, threshold, clip_margin)
        if run.sweep:
            summary["sweep"] = dict(zip(("rows", "advice"), run.sweep, strict=True))
        write_run(run, summary, shown)
        print(f"\n{run.name}\n{report.summary_text(summary)}\n\nopen {run.target / 'report.html'}")
    if len(runs) > 1:
        groups = {}
        for run in runs:
            groups.setdefault(run.experiment, []).append(run)
        summaries = {
            name: analyse(members, prompts, ceilings, threshold, clip_margin)
            for name, members in groups.items()
        }
        pairs = compare(groups, prompts, ceilings)
        target = Path(output_dir) / "comparison"
        write_comparison(target, groups, summaries, pairs, shown)
        text = report.comparison_text(summaries, pairs)
        print(f"\ncomparison\n{text}\n\nopen {target / 'report.html'}")
    if drawing:
        count = len(texts) * (1 + sum(len({1.0, *run.scaled} - {0.0}) for run in runs))
        done = time.monotonic()
        memory = ""
        if device.type == "cuda":
            memory = f"; {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB reserved at most"
        print(f"{count} pictures in {done - started:.1f} s: loading {loaded - started:.1f} s, drawing "
              f"{drawn - loaded:.1f}, scores {scored - drawn:.1f}, files {done - scored:.1f}; "
              f"{(scored - loaded) / count:.3f} s a picture drawn and scored{memory}")  # fmt: skip
    return [run.target for run in runs]


def plan_runs(config, device):
    """What will be drawn: ([(name, Adapter, target folder)], base-model folder), all checked."""
    found = adapters.find_adapters(config["lora_dir"])
    output_dir, base_model = Path(config["output_dir"]), config["base_model"]
    targets = [output_dir / name if len(found) > 1 else output_dir for name, _ in found]
    for target in [*targets, *([output_dir / "comparison"] if len(found) > 1 else [])]:
        check_output_folder(target, MARKER)
    for left in sorted(Path(config["lora_dir"]).glob("*/config.json")):
        if len(found) > 1 and left.parent.name not in [name for name, _ in found]:
            print(f"note: {left.parent} is a run without its weights, and is passed over")
    read = [(name, adapters.read_adapter(path)) for name, path in found]
    check_fingerprints([(name, adapters.fingerprint(adapter)) for name, adapter in read])
    if device.type == "cpu":
        print("no CUDA GPU found: drawing on the CPU, in fp32")
    for name, adapter in read:
        known = adapter.metadata.get("base_model")
        if known and known != base_model:
            print(f"note: {name} was trained on {known}, here it is drawn with {base_model}")
    folder = fetch_base_model(base_model, config["revision"], half=device.type == "cuda")
    return [(*pair, target) for pair, target in zip(read, targets, strict=True)], folder


@dataclass
class TrainingSet:
    """The training pictures as the scores need them."""

    names: list
    pictures: list  # PIL
    sha256: str
    embeddings: np.ndarray  # [m, d]
    mirrored: np.ndarray  # of the mirrored pictures

    @property
    def copy_threshold(self):
        """95% of the training pictures are less similar than this to their nearest other one."""
        if len(self.names) < 2:
            return None
        return float(np.percentile(metrics.leave_one_out(self.embeddings, self.mirrored), 95))


def load_scorer(config, prompts, device):
    """(Clip, TrainingSet), each None, and said aloud, where it is not asked for or not there."""
    if config["clip_model"] == "none":
        print("note: without a CLIP model only LPIPS is computed")
        return None, None
    revision = config["clip_revision"]
    if config["clip_model"] != CONFIG["clip_model"] and revision == CONFIG["clip_revision"]:
        revision = None  # the default revision is one of the default model
    folder = metrics.fetch_clip(config["clip_model"], revision)
    data_dir, rows = config["data_dir"], None
    if (Path(data_dir) / "captions.jsonl").is_file():
        rows = read_dataset(data_dir, config["resolution"])
    else:
        print(f"note: {data_dir} holds no captions.jsonl; the concept similarity is not computed")
    clip = metrics.load_clip(folder, device)
    check_prompt_lengths(prompts, clip.processor.tokenizer, clip.max_tokens, config["clip_model"])
    if not rows:
        return clip, None
    pictures = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for *_, pixels in rows]
    embeddings = metrics.training_embeddings(pictures, clip)
    return clip, TrainingSet([name for name, *_ in rows], pictures, data_hash(rows), *embeddings)


def ready_pipeline(config, plan, prompts, training, device):
    """The base model, ready to draw; every adapter was tried on it and taken out again."""
    planned, folder = plan
    for name, adapter, _ in planned:
        known = adapter.metadata.get("data_sha256")
        if training and known and known != training.sha256:
            print(
                f"note: {name} was trained on other pictures (or sizes) than {config['data_dir']}"
            )
    pipeline = load_pipeline(
        folder, torch.float16 if device.type == "cuda" else torch.float32, device
    )
    limit = pipeline.tokenizer.model_max_length
    check_prompt_lengths(prompts, pipeline.tokenizer, limit, config["base_model"])
    # For the probes and for drawing; what is compiled for one sample serves for more.
    sizes = 16, config["resolution"] // pipeline.vae_scale_factor
    fast.compile_attention(lambda: [probe(pipeline, size) for size in sizes], device)()
    base_probe = probe(pipeline)
    for _, adapter, _ in planned:  # before the long part: does each fit, and does it do anything?
        applied = adapters.Applied(adapter, models_of(pipeline))
        check_switch(pipeline, applied, adapter, base_probe)
        applied.set_scale(0)
        del applied  # with its copies of the weights
    return pipeline


def models_of(pipeline):
    """What an adapter may change."""
    return {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}


def draw_runs(config, plan, pipeline, prompts, seeds):
    """Draw the base model's pictures once and every adapter's: a list of Run."""
    jobs = [(prompt, s) for _, prompt in prompts for s in seeds]
    how = {k: config[k] for k in ("steps", "guidance_scale", "resolution")}
    how["batch_size"] = pictures_at_once(
        len(jobs), config["batch_size"], config["resolution"], pipeline.device
    )
    if pipeline.device.type == "cuda":
        samples = how["batch_size"] * (2 if config["guidance_scale"] > 1 else 1)
        with drawing_memory(how["batch_size"]):
            record_unet(pipeline, samples, config["resolution"] // pipeline.vae_scale_factor)
    base = draw(pipeline, jobs, **how, title="base")
    runs, scales = [], config["lora_scales"]
    for name, adapter, target in plan[0]:
        applied = adapters.Applied(adapter, models_of(pipeline))
        drawn = {0.0: base}
        for scale in sorted({1.0, *scales} - {0.0}):
            applied.set_scale(scale)
            title = name if scale == 1 else f"{name} at {scale:g}"
            drawn[scale] = draw(pipeline, jobs, **how, title=title)
        applied.set_scale(0)
        del applied  # with its copies of the weights
        scaled = {scale: drawn[scale] for scale in scales} if set(scales) != {1.0} else {}
        runs.append(Run(name, target, describe(adapter), base, drawn[1.0], scaled))
    return runs


def describe(adapter):
    """What the results say of an adapter."""
    metadata = {
        k: v for k, v in adapter.metadata.items() if k not in ("lora_adapter_metadata", "format")
    }
    return dict(fingerprint=adapters.fingerprint(adapter), rank=adapter.rank, alpha=adapter.alpha,
                metadata=metadata)  # fmt: skip


def check_fingerprints(found):
    """UserError naming both if two adapters under comparison are the same: the published study
    scored one adapter under two names and called the equality a finding. `found` is a list of
    (name, fingerprint), which is None for pictures that were drawn elsewhere."""
    owners = {}
    for name, key in found:
        if key is not None and key in owners:
            raise UserError(
                f"{owners[key]} and {name} are the same adapter (fingerprint {key[:12]}…); a comparison "
                "of the two would compare it with itself. Remove one"
            )
        owners[key] = name


def read_saved(output_dir, config):
    """The runs that an earlier evaluation saved in `output_dir` or its subfolders.

    Returns (runs, the configuration they were drawn with, prompts, seeds).
    """
    found = [output_dir] if (output_dir / MARKER).is_file() else sorted(
        p.parent for p in output_dir.glob(f"*/{MARKER}") if p.parent.name != "comparison"
    )  # fmt: skip
    for folder in [folder for folder in found if not (folder / "images").is_dir()]:
        print(f"note: {folder} is passed over, it holds no pictures")
        found.remove(folder)
    if not found:
        raise UserError(
            f"{output_dir}: no metrics.json beside pictures in it or one folder down; nothing to rescore"
        )
    runs, drawn = [], None
    for folder in found:
        try:
            saved = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            prompts = list(dict.fromkeys((r["category"], r["prompt"]) for r in saved["pictures"]))
            seeds = list(dict.fromkeys(row["seed"] for row in saved["pictures"]))
            scales = [float(scale) for scale in saved["config"]["lora_scales"]]
            run = Run(saved["run"], folder, saved["adapter"], [], [])
        except (ValueError, KeyError, TypeError, OSError) as problem:
            raise UserError(f"{folder / 'metrics.json'} cannot be read: {problem}") from None
        how = {key: saved["config"].get(key) for key in DRAWN_WITH}
        if drawn not in (None, (prompts, seeds, how)):
            raise UserError(
                f"{folder} has other prompts, seeds or settings than {found[0]}; rescore them apart"
            )
        drawn = (prompts, seeds, how)
        run.base, run.lora = (
            [open_picture(path) for path in picture_paths(folder, prompts, seeds, [kind])]
            for kind in ("base", "lora")
        )
        for scale in scales if scales != [1.0] else ():
            paths = picture_paths(folder, prompts, seeds, [f"lora_scale_{scale:g}"])
            known = {0.0: run.base, 1.0: run.lora}
            run.scaled[scale] = known.get(scale) or [open_picture(path) for path in paths]
        runs.append(run)
    check_fingerprints([(run.target, run.adapter.get("fingerprint")) for run in runs])
    # How they were drawn is theirs, how they are scored is asked for now.
    scoring = ("clip_model", "clip_revision", "clip_margin", "data_dir", "output_dir", "rescore")
    return runs, config | saved["config"] | {k: config[k] for k in scoring}, prompts, seeds


def picture_paths(folder, prompts, seeds, kinds=("base", "lora")):
    """Where the pictures of each kind lie, kind by kind, prompt by prompt and seed by seed."""
    return [
        folder / "images" / slug / f"{kind}_{seed}.png"
        for kind in kinds
        for slug in slugs(prompts)
        for seed in seeds
    ]


def read_pair(score_dir, output_dir, prompts):
    """One run from two folders of pictures that this script did not draw, and numbers for seeds.

    The pictures of each folder, in the order of their names, are those of the prompts in order,
    the same number for each prompt.
    """
    check_output_folder(output_dir, MARKER)
    places = [Path(part.strip()) for part in str(score_dir).split(",")]
    if len(places) != 2 or not all(place.is_dir() for place in places):
        raise UserError(f"score_dir {score_dir!r} must be two folders, BASE_FOLDER,LORA_FOLDER")
    endings = (".png", ".jpg", ".jpeg", ".webp")
    files = [sorted(p for p in place.iterdir() if p.suffix.lower() in endings) for place in places]
    if len(files[0]) != len(files[1]) or not files[0] or len(files[0]) % len(prompts):
        raise UserError(
            f"{places[0]} has {len(files[0])} pictures and {places[1]} {len(files[1])}; both must "
            f"have the same number, and a multiple of the {len(prompts)} prompts"
        )
    base, lora = ([open_picture(path) for path in paths] for paths in files)
    for a, b, path in zip(base, lora, files[1], strict=True):
        if a.size != b.size:
            raise UserError(f"{path} is {b.size}, its base picture {a.size}; nothing is resized")
    run = Run(places[1].name, output_dir, {}, base, lora)
    return [run], list(range(1, len(base) // len(prompts) + 1))


def open_picture(path):
    """An RGB picture; UserError naming the file if it is missing or damaged."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            return image.convert("RGB")
    # A decoder may raise almost anything on a damaged file.
    except Exception as problem:
        raise UserError(f"{path} cannot be read as a picture: {problem}") from None


def write_run(run, summary, shown):
    """Write one run's pictures, figures, tables and page to its folder, whole or not at all."""
    new = fresh_folder(run.target)
    prompts, seeds, count = shown["prompts"], shown["seeds"], len(shown["seeds"])
    by_prompt = [
        dict(category=category, prompt=prompt, base=run.base[i * count : (i + 1) * count],
             lora=run.lora[i * count : (i + 1) * count])
        for i, (category, prompt) in enumerate(prompts)
    ]  # fmt: skip
    paths, images = picture_paths(new, prompts, seeds), run.base + run.lora
    for scale in set(run.scaled) - {0.0, 1.0}:  # those two are there already
        paths += picture_paths(new, prompts, seeds, [f"lora_scale_{scale:g}"])
        images += run.scaled[scale]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:  # encoding a picture keeps a core busy, and no lock
        list(pool.map(lambda pair: pair[0].save(pair[1]), zip(images, paths, strict=True)))
    report.comparison_figure(by_prompt, run.name, min(3, count)).save(new / "comparison_all.png")
    for category in ("success", "failure"):
        chosen = [row for row in by_prompt if row["category"] == category]
        if chosen:
            figure = report.comparison_figure(chosen, f"{run.name}: {category}", count)
            figure.save(new / f"{category}_cases.png")
    if run.scaled:
        report.sweep_figure(summary["sweep"]["rows"], run.name).savefig(new / "sweep.png")
        firsts = {scale: images[::count] for scale, images in run.scaled.items()}
        report.sweep_sheet(firsts, [prompt for _, prompt in prompts]).save(
            new / "sweep_pictures.png"
        )
    record = dict(run=run.name, config=shown["config"], **shown["provenance"], adapter=run.adapter,
                  warnings=shown["warnings"], summary=summary, pictures=run.rows)  # fmt: skip
    write_csv(new / "metrics.csv", run.rows)
    (new / "summary.md").write_text(
        f"# {run.name}\n\n{report.summary_text(summary)}\n", encoding="utf-8"
    )
    page = report.run_page(run, summary, shown, new)
    (new / "report.html").write_text(page, encoding="utf-8")
    write_json(new / MARKER, record)  # last: with it the folder is whole
    replace_folder(run.target)


def write_comparison(target, groups, summaries, pairs, shown):
    """Write what several experiments have in common and where they differ."""
    new = fresh_folder(target)
    if pairs:  # several experiments; several runs of one have nothing to compare
        report.forest_figure(pairs).savefig(new / "forest.png")
        write_csv(new / "comparison.csv", pairs)
    record = dict(experiments=summaries, pairs=pairs, config=shown["config"], **shown["provenance"],
                  warnings=shown["warnings"])  # fmt: skip
    text = report.comparison_text(summaries, pairs)
    (new / "summary.md").write_text(f"# Comparison\n\n{text}\n", encoding="utf-8")
    page = report.comparison_page(groups, summaries, pairs, shown, new)
    (new / "report.html").write_text(page, encoding="utf-8")
    write_json(new / MARKER, record)
    replace_folder(target)


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def recover(output_dir):
    """Mend what a killed run left, in `output_dir` itself and in the folders of its runs."""
    recover_folder(output_dir, MARKER)
    for ending in (".old", ".unfinished"):
        for left in sorted(output_dir.glob(f".*{ending}/{MARKER}")):
            name = left.parent.name.removeprefix(".").removesuffix(ending)
            recover_folder(output_dir / name, MARKER)


def main():
    config = parse_config(CONFIG, __doc__, demo=DEMO)
    output_dir = Path(config["output_dir"])
    advice = "close what else uses the GPU (nvidia-smi lists it)"
    with (
        disk_for(output_dir),
        locked(output_dir),
        memory_for("loading the models or scoring", advice),
    ):
        recover(output_dir)
        evaluate(**config)


if __name__ == "__main__":
    run_script(main)
