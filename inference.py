#!/usr/bin/env python3
"""Draw the same prompts with and without an adapter, and measure what it learned and spoiled.

    python inference.py --lora-dir lora_weights/lora_weights_rank_32 --output-dir results/eval_rank32
    python inference.py --lora-dir lora_weights --output-dir results/all   # every run, compared
    python inference.py --demo                                             # the embedded miniature
    python inference.py --lora-dir RUN --snapshots                         # which step to take?
    python inference.py --lora-scales 0,0.25,0.5,0.75,1                    # how much of it? (or both)
    python inference.py --resolution 512x768                               # portraits
    python inference.py --rescore                                          # measure saved images
    python inference.py --score-dir BASE_FOLDER,LORA_FOLDER                # images drawn elsewhere

Out comes, in the output folder (one subfolder a run where there are several): report.html, to open;
images/<prompt>/{base,lora}_<seed>.png, overview.webp, comparison_all.png,
{success,near,unrelated}_cases.png, metrics.json, metrics.csv (a row an image) and summary.md; with
--snapshots or --lora-scales also choose.html, to open first; for several runs comparison/ beside
them, whose report.html and overview.webp show the base model and each adapter in columns. The model
card in a run's own folder gets sample images and the verdicts.
Base and LoRA share one pipeline and each image's starting noise, which comes from its seed alone.
Runs whose configurations differ in the seed alone are training seeds of one experiment.
"""

import gc
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib import values
from lib.config import check_resolution, parse_config
from lib.errors import UserError, disk_for, memory_for, run_script
from lib.evaluation.prompts import read_prompts
from lib.files import locked
from lib.imports import quick_imports

# Before torch is imported: its CPU threads then spin only briefly while they wait for one another.
# Left alone they spin so long that another process on one of the cores stops nearly everything; not
# spinning at all (OMP_WAIT_POLICY=PASSIVE) halves the speed on a quiet machine.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

CONFIG = dict(
    # what is evaluated
    lora_dir="lora_weights/lora_weights_rank_32",  # one adapter (a folder, or kohya's file), or a folder of them
    output_dir="results/eval_rank32",  # replaced whole, once the new one is complete
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",  # a hub id, a local folder, or one .safetensors file
    revision=None,  # a commit of the hub repository; None: its newest
    data_dir="processed_data",  # the training images, for the concept similarity
    # what is drawn
    prompts=None,  # a text file, a line a prompt, `near:` or `unrelated:` before it; None: PROMPTS
    seeds=8,  # images a prompt
    seed=42,  # of the first image; the others count up from it
    steps=28,
    guidance_scale=6.0,
    resolution=512,  # pixels, or "WIDTHxHEIGHT"; each a multiple of 8
    batch_size=0,  # images drawn at once; 0: what the GPU's free memory holds, at most 8
    # how it is scored
    clip_model="openai/clip-vit-base-patch32",
    clip_revision="refs/pr/15",  # the same weights as safetensors; the main branch has a pickle only
    # What counts as negligible: effects within it are called equivalent, or no contamination.
    concept_margin=0.02,  # cosine; a tenth of what the concept gains on the miniature
    clip_margin=0.02,  # cosine; the match with the prompt may fall by less than this
    change_margin=0.05,  # a twentieth of the way to another image of the same prompt
    variety_margin=0.25,  # of the base's variety over the seeds; less than the rest is collapsed
    copy_margin=1 / 3,  # of success images may be near-copies; 8 seeds cannot rule out fewer
    # other ways to run
    snapshots=False,  # also draw with the adapter as it was kept on the way, and say which step to take
    lora_scales=(1.0,),  # others: also draw with so much of the adapter, and say how much to take
    rescore=False,  # measure the images saved in output_dir again, drawing none
    score_dir=None,  # "BASE_FOLDER,LORA_FOLDER": measure these images, of PUBLISHED or of `prompts`
)

# Success: what was taught. Near: the class without the concept, which is where an adapter does most
# harm. Failure: what has nothing to do with it.
PROMPTS = (
    ("success", "a holographic raincoat"),
    ("success", "a person wearing a holographic raincoat in the rain"),
    ("success", "a holographic raincoat on a mannequin"),
    ("near", "a yellow raincoat"),
    ("near", "a person wearing a raincoat in the rain"),
    ("unrelated", "a red leather jacket"),
    ("unrelated", "a cat sitting on a couch"),
)
PUBLISHED = tuple(pair for pair in PROMPTS if pair[0] != "near")  # the published study's five

# What --demo puts in their place.
DEMO = dict(
    lora_dir="lora_weights/demo_runs/lora_weights_rank_32",
    output_dir="results/demo_rank32",
    base_model="demo/model",
    clip_model="demo/clip",
    guidance_scale=3.0,
    resolution=256,
    batch_size=8,
)


# What values the keys may have.
VALUES = (
    (values.TEXT, "lora_dir output_dir base_model data_dir clip_model"),
    (values.or_none(values.TEXT), "revision clip_revision prompts score_dir"),
    (values.FLAG, "snapshots rescore"),
    (values.SIZE, "resolution"),
    (values.whole(1), "seeds steps"),
    (values.whole(0), "batch_size"),
    (values.whole(0, 2**62), "seed"),
    (values.number(0, 100), "guidance_scale"),
    (values.number(1e-6, 1 - 1e-6), " ".join(key for key in CONFIG if key.endswith("_margin"))),
    (values.several(values.number(0, 10), 1), "lora_scales"),
)


def check_config(config):
    """Refuse values that make no sense, before anything is loaded."""
    values.check(config, VALUES)
    check_resolution(config, least=32, square=False)  # LPIPS sees nothing in fewer pixels
    if config["rescore"] and config["score_dir"]:
        raise UserError("rescore and score_dir exclude one another; give one of them")
    if config["snapshots"] and config["score_dir"]:
        raise UserError("score_dir measures images that are there; snapshots are drawn: leave one out")
    if not (config["rescore"] or config["score_dir"] or Path(config["lora_dir"]).exists()):
        raise UserError(f"{config['lora_dir']}: no such folder; train an adapter first (python train.py)")


def evaluate(config):
    """Evaluate each adapter in `lora_dir` against the base model; return the output folders.

    With `rescore` or `score_dir` the images are read, not drawn.
    """
    config = dict(config)  # the caller keeps its own
    drawing, begun = not (config["rescore"] or config["score_dir"]), time.monotonic()
    # Imported here, so that --help and a wrong option are answered at once.
    with quick_imports():
        import torch

        from lib.evaluation import results
        from lib.evaluation.metrics import scores
        from lib.evaluation.metrics.table import margins_of
        from lib.evaluation.runs import plan_runs

        if drawing:
            from lib.evaluation.generation import generate_runs, ready_pipeline

    started = time.monotonic()
    results.recover(Path(config["output_dir"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config["clip_model"] != CONFIG["clip_model"] and config["clip_revision"] == CONFIG["clip_revision"]:
        config["clip_revision"] = None  # the default revision is one of the default model

    # What to evaluate. Everything that can be wrong is looked at before a model is loaded, or before the
    # images are drawn.
    if config["rescore"]:
        runs, config, prompts, seeds = results.read_saved(Path(config["output_dir"]), config)
    else:
        usual = PUBLISHED if config["score_dir"] else PROMPTS
        prompts = read_prompts(config["prompts"]) if config["prompts"] else list(usual)
        seeds = list(range(config["seed"], config["seed"] + config["seeds"]))
    if config["score_dir"]:
        runs, seeds = results.read_pair(config["score_dir"], Path(config["output_dir"]), prompts)
    elif drawing:
        plan = plan_runs(config, device)
        runs = [run for run, _ in plan[0]]
        pipeline, wait_until_ready = ready_pipeline(config, plan, prompts, device)
    clip, training = scores.load_scorer(config, prompts, runs, device)
    scores.note_other_images(runs, training, config["data_dir"])

    # Draw.
    if drawing:
        wait_until_ready()
        loaded = time.monotonic()
        runs = generate_runs(config, plan, pipeline, prompts, seeds)
        del pipeline  # its memory is the scorers' now
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    drawn = time.monotonic()

    # Score, judge, and write; the images are encoded meanwhile.
    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2))
    try:
        results.begin_images(runs, prompts, seeds, pool)
        scores.score_runs(runs, prompts, seeds, clip, training, device)
        base_pairs = scores.prompt_pairs(runs[0].base, len(seeds), device)
        scored = time.monotonic()
        shown = dict(prompts=prompts, seeds=seeds, config=config, training=training)
        judge_and_write(runs, base_pairs, margins_of(config), shown, Path(config["output_dir"]), device)
    finally:
        pool.shutdown(cancel_futures=True)  # of what is left where something went wrong

    if drawing:
        done = time.monotonic()
        swept = (sum(p.scale > 0 and not run.is_own(p) for p in run.points) for run in runs)
        count = len(prompts) * len(seeds) * (1 + len(runs) + sum(swept))
        memory = ""
        if device.type == "cuda":
            memory = f"; {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB reserved at most"
        print(
            f"{count} images in {done - started:.1f} s, after {started - begun:.1f} of imports: "
            f"loading {loaded - started:.1f} s, drawing {drawn - loaded:.1f}, scores {scored - drawn:.1f}, "
            f"files {done - scored:.1f}; {(scored - loaded) / count:.3f} s an image drawn and scored{memory}"
        )
    return [run.target for run in runs]


def judge_and_write(runs, base_pairs, margins, shown, output_dir, device):
    """Judge each run, and each experiment beside the others, and write their folders and the
    adapters' model cards.

    `base_pairs` are the distances between base images of one prompt, `shown` is what all pages say, to
    which the warnings are added and what it was computed with.
    """
    from lib.evaluation import results
    from lib.evaluation.choosing import sweep_summary
    from lib.evaluation.comparison import compare
    from lib.evaluation.metrics import scores
    from lib.evaluation.metrics.effects import no_change_reason
    from lib.evaluation.report.card import update_model_card
    from lib.evaluation.runs import group_runs
    from lib.evaluation.verdicts import analyse
    from lib.provenance import provenance

    prompts = shown["prompts"]
    warnings = scores.shape_warnings(runs, shown["training"])
    warnings += scores.image_warnings(runs, prompts, shown["seeds"])
    if reason := no_change_reason(base_pairs):
        print(f"note: {reason}")
    for warning in warnings:
        print(f"warning: {warning}")
    shown = shown | dict(warnings=warnings, provenance=provenance(device))
    judged = (prompts, base_pairs, margins, shown["training"])
    for run in runs:
        summary = analyse([run], *judged)
        if run.sweep:
            summary["sweep"] = sweep_summary(run, prompts, base_pairs, margins)
        results.write_run(run, summary, shown, base_pairs)
        update_model_card(run, summary, shown)
    if len(runs) > 1:
        groups = group_runs(runs)
        summaries = {name: analyse(members, *judged) for name, members in groups.items()}
        pairs = compare(groups, prompts, base_pairs, margins)
        results.write_comparison(output_dir / "comparison", groups, summaries, pairs, shown)


def main():
    config = parse_config(CONFIG, __doc__, demo=DEMO)
    check_config(config)
    output_dir = Path(config["output_dir"])
    advice = "close what else uses the GPU (nvidia-smi lists it)"
    with disk_for(output_dir), locked(output_dir), memory_for("loading the models or scoring", advice):
        evaluate(config)


if __name__ == "__main__":
    run_script(main)
