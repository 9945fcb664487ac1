#!/usr/bin/env python3
"""Draw the same prompts with and without an adapter, and measure what it learned and spoiled.

    python inference.py --lora-dir lora_weights/lora_weights_rank_32 --output-dir results/eval_rank32
    python inference.py --lora-dir lora_weights --output-dir results   # every run in the folder
    python inference.py --demo                                         # the embedded miniature

Out comes, in the output folder (one subfolder a run where there are several): images/<prompt>/
{base,lora}_<seed>.png, comparison_all.png, success_cases.png, failure_cases.png, metrics.json,
metrics.csv (a row a picture) and summary.md. Base and LoRA share one pipeline and each picture's
starting noise, which comes from its seed alone.
"""

import csv
import logging
import re
import time
from pathlib import Path

# Its only remark at import is about a 4-bit kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

import adapters
import metrics
import report
from common import (
    UserError,
    check_output_folder,
    check_range,
    data_hash,
    fetch_base_model,
    fresh_folder,
    load_part,
    parse_config,
    provenance,
    read_dataset,
    replace_folder,
    run_script,
    write_json,
)

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
    batch_size=4,  # pictures drawn at once; memory grows with it
    # how it is scored
    clip_model="openai/clip-vit-base-patch32",
    clip_revision="refs/pr/15",  # the same weights as safetensors; the main branch has a pickle only
)

# The published study's prompts. Success: what was taught. Failure: what must not change.
PROMPTS = (
    ("success", "a holographic raincoat"),
    ("success", "a person wearing a holographic raincoat in the rain"),
    ("success", "a holographic raincoat on a mannequin"),
    ("failure", "a red leather jacket"),
    ("failure", "a cat sitting on a couch"),
)

# What --demo puts in their place.
DEMO = dict(
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
        length = len(tokenizer(prompt).input_ids)
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
    pipeline = StableDiffusionPipeline(
        vae=load_part(AutoencoderKL, folder, "vae", dtype),
        text_encoder=load_part(CLIPTextModel, folder, "text_encoder", dtype),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=load_part(UNet2DConditionModel, folder, "unet", dtype),
        scheduler=PNDMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for model in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        model.eval().requires_grad_(False)
    return pipeline


@torch.no_grad()
def draw(pipeline, jobs, *, steps, guidance_scale, resolution, batch_size, title):
    """A picture for each (prompt, seed) of `jobs`, as PIL images in that order.

    The starting noise is drawn on the CPU from the picture's own seed, so it depends neither on
    the device nor on the batch.
    """
    images = []
    size = resolution // pipeline.vae_scale_factor
    shape = (pipeline.unet.config.in_channels, size, size)
    with tqdm(total=len(jobs) * steps, desc=title, unit="step", leave=False) as bar:
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

            images += pipeline(
                [prompt for prompt, _ in batch],
                latents=torch.stack(noise).to(pipeline.device, pipeline.unet.dtype),
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=resolution,
                width=resolution,
                callback_on_step_end=progress,
            ).images
    return images


@torch.no_grad()
def probe(pipeline):
    """Outputs of the text encoder and of the UNet at one fixed input, to tell models apart."""
    text_encoder, unet = pipeline.text_encoder, pipeline.unet
    ids = torch.arange(77, device=pipeline.device)[None] % text_encoder.config.vocab_size
    states = text_encoder(ids)[0]
    generator = torch.Generator().manual_seed(0)
    shape = (1, unet.config.in_channels, 16, 16)
    latents = torch.randn(shape, generator=generator).to(pipeline.device, unet.dtype)
    # A fixed text for the UNet, so that it is not moved by the text encoder's adapter.
    text = torch.randn(states.shape, generator=generator).to(pipeline.device, unet.dtype)
    return {"text_encoder": states.float(), "unet": unet(latents, 500, text).sample.float()}


def check_switch(pipeline, models, adapter, base_probe):
    """UserError unless the adapter at scale 0 gives the base's outputs, and at 1 other ones."""
    adapters.set_scale(models, 0)
    off = probe(pipeline)
    adapters.set_scale(models, 1)
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


def measure(prompts, seeds, base, lora, clip, training, device):
    """A row (dict) a picture, base and LoRA of each (prompt, seed), in that order.

    `base` and `lora` are lists of PIL pictures, prompt by prompt and seed by seed; `training` is
    (names, embeddings, embeddings of the mirrored) of the training pictures, or None.
    """
    jobs = [(category, prompt, seed) for category, prompt in prompts for seed in seeds]
    texts = [prompt for _, prompt, _ in jobs]
    distances = metrics.lpips_distances(base, lora, device)
    rows = []
    for kind, images in (("base", base), ("lora", lora)):
        embeddings = metrics.image_embeddings(images, clip)
        scores = (embeddings * metrics.text_embeddings(texts, clip)).sum(axis=1)
        for index, (category, prompt, seed) in enumerate(jobs):
            row = dict(prompt=prompt, category=category, seed=seed, model=kind,
                       clip=float(scores[index]),
                       lpips=float(distances[index]) if kind == "lora" else None)  # fmt: skip
            if training:
                names, plain, mirrored = training
                one = embeddings[index : index + 1]
                nearest, which = metrics.nearest_training(one, plain, mirrored)
                row["concept_similarity"] = float(metrics.concept_similarity(one, plain)[0])
                row["nearest_similarity"] = float(nearest[0])
                row["nearest_picture"] = names[which[0]]
            rows.append(row)
    return sorted(rows, key=lambda row: (texts.index(row["prompt"]), row["seed"], row["model"]))


def summarise(rows, prompts):
    """Means over the seeds for each prompt, then over the prompts of each category."""

    def mean(key, model, **where):
        values = [
            row[key]
            for row in rows
            if row["model"] == model and row.get(key) is not None
            and all(row[name] == value for name, value in where.items())
        ]  # fmt: skip
        return float(np.mean(values)) if values else None

    def line(**where):
        figures = dict(base_clip=mean("clip", "base", **where), lora_clip=mean("clip", "lora", **where),
                       lpips=mean("lpips", "lora", **where))  # fmt: skip
        for model in ("base", "lora"):
            figures[f"{model}_concept_similarity"] = mean("concept_similarity", model, **where)
        return figures

    table = [
        dict(category=category, prompt=prompt, **line(prompt=prompt))
        for category, prompt in prompts
    ]
    categories = dict.fromkeys(category for category, _ in prompts)
    return dict(prompts=table, categories={name: line(category=name) for name in categories})


def check_config(config):
    """Refuse values that make no sense, before anything is loaded."""
    for key in ("seeds", "steps", "batch_size"):
        check_range(config, key, 1)
    check_range(config, "seed", 0)
    check_range(config, "guidance_scale", 0, 100)
    check_range(config, "resolution", 8, 4096)
    if config["resolution"] % 8:
        raise UserError(f"resolution is {config['resolution']}, but must be a multiple of 8")


# ---- the evaluation ------------------------------------------------------------------------


def evaluate(*, lora_dir, output_dir, base_model, revision, data_dir, prompts, seeds, seed, steps,
             guidance_scale, resolution, batch_size, clip_model, clip_revision):  # fmt: skip
    """Evaluate each adapter in `lora_dir` against the base model; return the output folders."""
    config = dict(locals())

    # Everything that can be wrong is looked at before a model is loaded.
    check_config(config)
    found = adapters.find_adapters(lora_dir)
    targets = [Path(output_dir) / name if len(found) > 1 else Path(output_dir) for name, _ in found]
    for target in targets:
        check_output_folder(target, "metrics.json")
    prompts = read_prompts(prompts)
    read = [(name, adapters.read_adapter(path)) for name, path in found]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    if device.type == "cpu":
        print("no CUDA GPU found: drawing on the CPU, in fp32")
    for name, adapter in read:
        trained_on = adapter.metadata.get("base_model")
        if trained_on and trained_on != base_model:
            print(f"note: {name} was trained on {trained_on}, here it is drawn with {base_model}")
    base_folder = fetch_base_model(base_model, revision, half=dtype == torch.float16)
    clip_folder = metrics.fetch_clip(clip_model, clip_revision)
    training_rows = None
    if (Path(data_dir) / "captions.jsonl").is_file():
        training_rows = read_dataset(data_dir, resolution)
        for name, adapter in read:
            trained_on = adapter.metadata.get("data_sha256")
            if trained_on and trained_on != data_hash(training_rows):
                print(
                    f"note: {name} was trained on other pictures (or sizes) than those in {data_dir}"
                )
    else:
        print(f"note: {data_dir} holds no captions.jsonl; the concept similarity is not computed")

    clip = metrics.load_clip(clip_folder, device)
    pipeline = load_pipeline(base_folder, dtype, device)
    models = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    check_prompt_lengths(
        prompts, pipeline.tokenizer, pipeline.tokenizer.model_max_length, base_model
    )
    check_prompt_lengths(prompts, clip.processor.tokenizer, clip.max_tokens, clip_model)
    base_probe = probe(pipeline)
    for _, adapter in read:  # before the long part: does each fit, and does it do anything?
        adapters.apply_adapter(adapter, models)
        check_switch(pipeline, models, adapter, base_probe)
        adapters.remove_adapter(models)
    training = None
    if training_rows:
        pictures = [
            Image.fromarray(pixels.permute(1, 2, 0).numpy()) for *_, pixels in training_rows
        ]
        names = [name for name, *_ in training_rows]
        training = (names, *metrics.training_embeddings(pictures, clip))

    picture_seeds = list(range(seed, seed + seeds))
    jobs = [(prompt, s) for _, prompt in prompts for s in picture_seeds]
    how = dict(
        steps=steps, guidance_scale=guidance_scale, resolution=resolution, batch_size=batch_size
    )
    started = time.monotonic()
    base = draw(pipeline, jobs, **how, title="base")
    for (name, adapter), target in zip(read, targets, strict=True):
        adapters.apply_adapter(adapter, models)
        lora = draw(pipeline, jobs, **how, title=name)
        adapters.remove_adapter(models)
        rows = measure(prompts, picture_seeds, base, lora, clip, training, device)
        new = fresh_folder(target)
        write_results(new, name, adapter, config, prompts, picture_seeds, base, lora, rows, device)
        replace_folder(new, target)
        print(f"\n{name}\n{report.summary_table(summarise(rows, prompts))}\n\nin {target}")
    drawn = len(jobs) * (1 + len(read))
    seconds = time.monotonic() - started
    print(
        f"{drawn} pictures in {seconds:.1f} s, {seconds / drawn:.2f} s a picture, scores included"
    )
    return targets


def write_results(folder, name, adapter, config, prompts, seeds, base, lora, rows, device):
    """Fill `folder` with one adapter's pictures, figures and tables."""
    count = len(seeds)
    for index, slug in enumerate(slugs(prompts)):
        place = folder / "images" / slug
        place.mkdir(parents=True)
        for kind, images in (("base", base), ("lora", lora)):
            for s, image in zip(seeds, images[index * count : (index + 1) * count], strict=True):
                image.save(place / f"{kind}_{s}.png")
    by_prompt = [
        dict(category=category, prompt=prompt, base=base[i * count : (i + 1) * count],
             lora=lora[i * count : (i + 1) * count])
        for i, (category, prompt) in enumerate(prompts)
    ]  # fmt: skip
    report.comparison_figure(by_prompt, name, pairs=min(3, count)).save(
        folder / "comparison_all.png"
    )
    for category in ("success", "failure"):
        chosen = [row for row in by_prompt if row["category"] == category]
        if chosen:
            figure = report.comparison_figure(chosen, f"{name}: {category}", pairs=count)
            figure.save(folder / f"{category}_cases.png")
    summary = summarise(rows, prompts)
    write_json(folder / "metrics.json", dict(
        run=name,
        config=config,
        **provenance(device),
        adapter=dict(
            fingerprint=adapters.fingerprint(adapter), rank=adapter.rank, alpha=adapter.alpha,
            metadata={k: v for k, v in adapter.metadata.items() if k != "lora_adapter_metadata"},
        ),
        summary=summary,
        pictures=rows,
    ))  # fmt: skip
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "summary.md").write_text(
        f"# {name}\n\nMeans over {count} seeds a prompt, base and LoRA from the same noise.\n\n"
        f"{report.summary_table(summary)}\n",
        encoding="utf-8",
    )


def main():
    evaluate(**parse_config(CONFIG, __doc__, demo=DEMO))


if __name__ == "__main__":
    run_script(main)
