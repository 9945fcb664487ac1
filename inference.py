#!/usr/bin/env python3
"""Draw the same prompts with and without an adapter, and measure what it learned and spoiled.

    python inference.py --lora-dir lora_weights/lora_weights_rank_32 --output-dir results/eval_rank32
    python inference.py --lora-dir lora_weights --output-dir results/all   # every run, compared
    python inference.py --demo                                             # the embedded miniature
    python inference.py --lora-scales 0,0.25,0.5,0.75,1                    # how much of it?
    python inference.py --rescore                                          # measure saved pictures
    python inference.py --score-dir BASE_FOLDER,LORA_FOLDER                # pictures drawn elsewhere

Out comes, in the output folder (one subfolder a run where there are several): report.html, to open;
images/<prompt>/{base,lora}_<seed>.png, comparison_all.png, {success,near,failure}_cases.png,
metrics.json, metrics.csv (a row a picture) and summary.md; for several runs comparison/ beside them.
Base and LoRA share one pipeline and each picture's starting noise, which comes from its seed alone.
Runs whose configurations differ in the seed alone are training seeds of one experiment.
"""

import csv
import gc
import hashlib
import json
import logging
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from lib.evaluation import figures, pages, words
from lib.evaluation.experiments import check_fingerprints, describe, group_runs
from lib.evaluation.prompts import CATEGORIES, check_prompt_lengths, members, read_prompts, slugs
from lib.evaluation.statistics import mean_interval
from lib.evaluation.verdicts import FEWEST_SEEDS, Run, analyse, compare, effects

CONFIG = dict(
    # what is evaluated
    lora_dir="lora_weights/lora_weights_rank_32",  # one adapter, or a folder of runs
    output_dir="results/eval_rank32",  # replaced whole, once the new one is complete
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",  # a hub id or a local folder
    revision=None,  # a commit of the hub repository; None: its newest
    data_dir="processed_data",  # the training pictures, for the concept similarity
    # what is drawn
    prompts=None,  # a text file, a line a prompt, `near:` or `failure:` before it; None: PROMPTS
    seeds=8,  # pictures a prompt
    seed=42,  # of the first picture; the others count up from it
    steps=28,
    guidance_scale=6.0,
    resolution=512,  # pixels
    batch_size=0,  # pictures drawn at once; 0: what the GPU's free memory holds, at most 8
    # how it is scored
    clip_model="openai/clip-vit-base-patch32",
    clip_revision="refs/pr/15",  # the same weights as safetensors; the main branch has a pickle only
    # What counts as negligible: effects within it are called equivalent, or no contamination.
    concept_margin=0.02,  # cosine; a tenth of what the concept gains on the miniature
    clip_margin=0.02,  # cosine; the match with the prompt may fall by less than this
    change_margin=0.05,  # a twentieth of the way to another picture of the same prompt
    variety_margin=0.25,  # of the base's variety over the seeds; less than the rest is collapsed
    # other ways to run
    lora_scales=(1.0,),  # others: also draw with so much of the adapter, and chart the trade-off
    rescore=False,  # measure the pictures saved in output_dir again, drawing none
    score_dir=None,  # "BASE_FOLDER,LORA_FOLDER": measure these pictures, of PUBLISHED or of `prompts`
)

# Success: what was taught. Near: the class without the concept, which is where an adapter does most
# harm. Failure: what has nothing to do with it.
PROMPTS = (
    ("success", "a holographic raincoat"),
    ("success", "a person wearing a holographic raincoat in the rain"),
    ("success", "a holographic raincoat on a mannequin"),
    ("near", "a yellow raincoat"),
    ("near", "a person wearing a raincoat in the rain"),
    ("failure", "a red leather jacket"),
    ("failure", "a cat sitting on a couch"),
)
PUBLISHED = tuple(pair for pair in PROMPTS if pair[0] != "near")  # the published study's five

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


def picture_scores(images, texts, clip, training):
    """(rows, embeddings): clip and concept_similarity of each picture in a dict, and the pictures'
    CLIP embeddings [n, d]. `texts` are the pictures' prompts. What cannot be had without a Clip or a
    TrainingSet is None."""
    rows = [dict(clip=None, concept_similarity=None) for _ in images]
    if not clip:
        return rows, None
    embeddings = metrics.image_embeddings(images, clip)
    cosines = (embeddings * metrics.text_embeddings(texts, clip)).sum(axis=1)
    for row, cosine in zip(rows, cosines, strict=True):
        row["clip"] = float(cosine)
    if training:
        concept = metrics.concept_similarity(embeddings, training.embeddings)
        for row, similarity in zip(rows, concept, strict=True):
            row["concept_similarity"] = float(similarity)
    return rows, embeddings


def nearest_rows(embeddings, training, held_out):
    """For each picture its nearest_similarity and nearest_picture among those that were trained on:
    dicts, of None without a TrainingSet."""
    if not training:
        return [dict(nearest_similarity=None, nearest_picture=None) for _ in embeddings]
    trained = training.trained_on(held_out)
    nearest, which = metrics.nearest_training(
        embeddings, training.embeddings[trained], training.mirrored[trained]
    )
    return [
        dict(nearest_similarity=float(similarity), nearest_picture=training.names[trained[index]])
        for similarity, index in zip(nearest, which, strict=True)
    ]


def score(run, prompts, seeds, clip, training, device, base_scores):
    """Fill `run.rows` (a dict a picture, base and LoRA of each prompt and seed in turn), `run.pairs`
    and `run.embeddings`. `base_scores` is picture_scores of the base pictures, which runs share."""
    jobs = [(category, prompt, seed) for category, prompt in prompts for seed in seeds]
    distances = metrics.lpips_distances(run.base, run.lora, device)
    scored = picture_scores(run.lora, [prompt for _, prompt, _ in jobs], clip, training)
    held_out = run.adapter.get("held_out", ())
    models = []
    for rows, embeddings in (base_scores, scored):
        nearest = nearest_rows(rows if embeddings is None else embeddings, training, held_out)
        models.append([row | near for row, near in zip(rows, nearest, strict=True)])
    run.rows = []
    for i, (category, prompt, seed) in enumerate(jobs):
        job = dict(prompt=prompt, category=category, seed=seed)
        run.rows.append(job | dict(model="base", lpips=None) | models[0][i])
        run.rows.append(job | dict(model="lora", lpips=float(distances[i])) | models[1][i])
    run.pairs = prompt_pairs(run.lora, len(seeds), device)
    if training:
        shape = len(prompts), len(seeds), -1
        run.embeddings = dict(base=base_scores[1].reshape(shape), lora=scored[1].reshape(shape))


def prompt_pairs(images, count, device):
    """LPIPS between the `count` pictures of each prompt: [prompts, count, count]."""
    chunks = [images[i : i + count] for i in range(0, len(images), count)]
    return np.stack([metrics.pairwise_lpips(chunk, device) for chunk in chunks])


# What the sweep over the adapter's scale shows.
SWEPT = (
    ("concept_similarity", "success"),
    ("clip", "success"),
    ("change", "near"),
    ("change", "failure"),
)


def sweep_summary(pictures, base, prompts, seeds, base_pairs, scoring):
    """The trade-off over the adapter's scale: ([a dict a scale], a sentence of advice).

    `pictures` is {scale: list of PIL pictures}. A dict holds `scale` and, under (score, category)
    joined by a blank, each of SWEPT with its interval: differences to the base of the concept and the
    match, and how far near and failure prompts moved. `scoring` are the remaining arguments of `score`.
    """
    rows = []
    for scale, images in sorted(pictures.items()):
        run = Run(f"scale {scale:g}", None, {}, base, images)
        score(run, prompts, seeds, **scoring)
        found = effects([run], prompts, base_pairs)
        rows.append(dict(scale=scale))
        for key, category in SWEPT:
            chosen = members(prompts, category)
            if key in found and chosen:
                values = found[key][:, chosen].mean(axis=1)
                rows[-1][f"{key} {category}"] = mean_interval(values)
    concept = "concept_similarity success"
    if not all(concept in row for row in rows):
        return rows, "The concept was not measured, so no scale is suggested."
    gain = max(row[concept]["mean"] for row in rows)
    if gain <= 0:
        return rows, "No scale moves the success prompts toward the training pictures."
    enough = next(row for row in rows if row[concept]["mean"] >= 0.9 * gain)
    advice = (f"Scale {enough['scale']:g} is the smallest that keeps nine tenths of the greatest gain in "
              f"concept similarity ({enough[concept]['mean']:.3f} of {gain:.3f})")  # fmt: skip
    for category, name in (("near", "prompts near the concept"), ("failure", "unrelated prompts")):
        key = f"change {category}"
        if key in enough:
            advice += (f"; {name} move {enough[key]['mean']:.0%} of the way to another picture there, "
                       f"{rows[-1][key]['mean']:.0%} at scale {rows[-1]['scale']:g}")  # fmt: skip
    return rows, advice + "."


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
    for key in ("concept_margin", "clip_margin", "change_margin", "variety_margin"):
        check_range(config, key, 1e-6, 1)
    check_range(config, "seed", 0, 2**62)
    check_range(config, "guidance_scale", 0, 100)
    check_resolution(config)
    if config["rescore"] and config["score_dir"]:
        raise UserError("rescore and score_dir exclude one another; give one of them")
    if not config["lora_scales"] or not all(0 <= s <= 10 for s in config["lora_scales"]):
        raise UserError(f"lora_scales is {config['lora_scales']}, but must be numbers from 0 to 10")


# ---- the evaluation ------------------------------------------------------------------------


def evaluate(*, lora_dir, output_dir, base_model, revision, data_dir, prompts, seeds, seed, steps,
             guidance_scale, resolution, batch_size, clip_model, clip_revision, concept_margin,
             clip_margin, change_margin, variety_margin, lora_scales, rescore, score_dir):  # fmt: skip
    """Evaluate each adapter in `lora_dir` against the base model; return the output folders.

    With `rescore` or `score_dir` the pictures are read, not drawn.
    """
    config = dict(locals())
    started = time.monotonic()
    check_config(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    drawing = not rescore and not score_dir
    margins = dict(concept_similarity=concept_margin, clip=clip_margin, change=change_margin,
                   variety=variety_margin)  # fmt: skip

    # Everything that can be wrong is looked at before a model is loaded, the scorer before the
    # pictures are drawn.
    if rescore:
        runs, config, prompts, seeds = read_saved(Path(output_dir), config)
    else:
        usual = PUBLISHED if score_dir else PROMPTS
        prompts = read_prompts(prompts) if prompts else list(usual)
        seeds = list(range(seed, seed + seeds))
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
    if len(seeds) < FEWEST_SEEDS:
        print(
            f"note: {len(seeds)} seeds a prompt are too few for the LPIPS ceiling, so change and variety "
            f"are not computed; they need {FEWEST_SEEDS}"
        )

    base_pairs = prompt_pairs(runs[0].base, len(seeds), device)
    texts = [prompt for _, prompt in prompts for _ in seeds]
    for run in tqdm(runs, desc="scores", unit="run", leave=False, disable=len(runs) == 1):
        if run.base is not runs[0].base or run is runs[0]:  # drawn once, they are scored once
            base_scores = picture_scores(run.base, texts, clip, training)
        scoring = dict(clip=clip, training=training, device=device, base_scores=base_scores)
        score(run, prompts, seeds, **scoring)
        if run.scaled:
            run.sweep = sweep_summary(run.scaled, run.base, prompts, seeds, base_pairs, scoring)
    scored = time.monotonic()
    warnings = picture_warnings(runs, prompts, seeds)
    for warning in warnings:
        print(f"warning: {warning}")

    shown = dict(prompts=prompts, seeds=seeds, warnings=warnings, provenance=provenance(device),
                 config=config, training=training)  # fmt: skip

    def judge(members):
        return analyse(members, prompts, base_pairs, margins, training and training.embeddings,
                       copies_of(members, prompts, training))  # fmt: skip

    for run in runs:
        summary = judge([run])
        if run.sweep:
            summary["sweep"] = dict(zip(("rows", "advice"), run.sweep, strict=True))
        write_run(run, summary, shown)
        print(f"\n{run.name}\n{words.summary_text(summary)}\n\nopen {run.target / 'report.html'}")
    if len(runs) > 1:
        groups = group_runs(runs)
        summaries = {name: judge(group) for name, group in groups.items()}
        pairs = compare(groups, prompts, base_pairs, margins)
        target = Path(output_dir) / "comparison"
        write_comparison(target, groups, summaries, pairs, shown)
        text = words.comparison_text(summaries, pairs)
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
    described = [Run(name, None, describe(adapter), [], []) for name, adapter in read]
    check_fingerprints([(run.name, run.adapter["fingerprint"]) for run in described])
    group_runs(described)
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

    def trained_on(self, held_out):
        """Indices of the pictures less those named in `held_out`, a run's own."""
        return [i for i, name in enumerate(self.names) if name not in set(held_out)]


def copies_of(runs, prompts, training):
    return None


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
    scoring = ("clip_model", "clip_revision", "concept_margin", "clip_margin", "change_margin",
               "variety_margin", "data_dir", "output_dir", "rescore")  # fmt: skip
    return runs, config | saved["config"] | {k: config[k] for k in scoring}, prompts, seeds


def picture_paths(folder, prompts, seeds, kinds=("base", "lora")):
    """Where the pictures of each kind lie, kind by kind, prompt by prompt and seed by seed."""
    return [
        folder / "images" / slug / f"{kind}_{seed}.png"
        for kind in kinds
        for slug in slugs(prompts)
        for seed in seeds
    ]


def natural_order(path):
    """A sort key of file names by which 2 comes before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name.lower())]


def read_pair(score_dir, output_dir, prompts):
    """One run from two folders of pictures that this script did not draw, and numbers for seeds.

    The pictures of each folder, in the natural order of their names, are those of the prompts in
    order, the same number for each prompt. Where both names of a pair hold numbers, the last ones
    must agree. Raises UserError naming the files that do not.
    """
    check_output_folder(output_dir, MARKER)
    places = [Path(part.strip()) for part in str(score_dir).split(",")]
    if len(places) != 2 or not all(place.is_dir() for place in places):
        raise UserError(f"score_dir {score_dir!r} must be two folders, BASE_FOLDER,LORA_FOLDER")
    endings = (".png", ".jpg", ".jpeg", ".webp")
    files = [
        sorted((p for p in place.iterdir() if p.suffix.lower() in endings), key=natural_order)
        for place in places
    ]
    if len(files[0]) != len(files[1]) or not files[0] or len(files[0]) % len(prompts):
        raise UserError(
            f"{places[0]} has {len(files[0])} pictures and {places[1]} {len(files[1])}; both must "
            f"have the same number, and a multiple of the {len(prompts)} prompts"
        )
    for pair in zip(*files, strict=True):
        numbers = [re.findall(r"\d+", path.stem)[-1:] for path in pair]
        if all(numbers) and int(numbers[0][0]) != int(numbers[1][0]):
            raise UserError(
                f"{pair[0]} would be paired with {pair[1]}, but their numbers differ; name the pictures "
                "of both folders by the same numbers"
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
    figures.comparison_figure(by_prompt, run.name, min(3, count)).save(new / "comparison_all.png")
    for category in CATEGORIES:
        chosen = [row for row in by_prompt if row["category"] == category]
        if chosen:
            figure = figures.comparison_figure(chosen, f"{run.name}: {category}", count)
            figure.save(new / f"{category}_cases.png")
    if run.scaled:
        figures.sweep_figure(summary["sweep"]["rows"], run.name).savefig(new / "sweep.png")
        firsts = {scale: images[::count] for scale, images in run.scaled.items()}
        figures.sweep_sheet(firsts, [prompt for _, prompt in prompts]).save(
            new / "sweep_pictures.png"
        )
    record = dict(run=run.name, config=shown["config"], **shown["provenance"], adapter=run.adapter,
                  warnings=shown["warnings"], summary=summary, pictures=run.rows)  # fmt: skip
    write_csv(new / "metrics.csv", run.rows)
    (new / "summary.md").write_text(
        f"# {run.name}\n\n{words.summary_text(summary)}\n", encoding="utf-8"
    )
    page = pages.run_page(run, summary, shown, new)
    (new / "report.html").write_text(page, encoding="utf-8")
    write_json(new / MARKER, record)  # last: with it the folder is whole
    replace_folder(run.target)


def write_comparison(target, groups, summaries, pairs, shown):
    """Write what several experiments have in common and where they differ."""
    new = fresh_folder(target)
    if pairs:  # several experiments; several runs of one have nothing to compare
        figures.forest_figure(pairs).savefig(new / "forest.png")
        write_csv(new / "comparison.csv", pairs)
    record = dict(experiments=summaries, pairs=pairs, config=shown["config"], **shown["provenance"],
                  warnings=shown["warnings"])  # fmt: skip
    text = words.comparison_text(summaries, pairs)
    (new / "summary.md").write_text(f"# Comparison\n\n{text}\n", encoding="utf-8")
    page = pages.comparison_page(groups, summaries, pairs, shown)
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
