#!/usr/bin/env python3
"""Generate the same prompts with and without an adapter, and measure what it learned and what it spoiled.

    python inference.py --lora-dir lora_weights/lora_weights_rank_32
    python inference.py --lora-dir lora_weights --output-dir results/all   # every run, compared
    python inference.py --demo                                             # the embedded miniature
    python inference.py --lora-dir RUN --snapshots                         # which step to take?
    python inference.py --lora-scales 0,0.25,0.5,0.75,1                    # how much of it? (or both)
    python inference.py --resolution 512x768                               # portraits
    python inference.py --rescore                                          # measure saved images again
    python inference.py --score-dir BASE_FOLDER,LORA_FOLDER                # images from elsewhere

The output folder (with several runs, one subfolder each) gets report.html, the page to open; overview.webp;
images/<prompt>/{base,lora}_<seed>.png; metrics.json, metrics.csv (one row per image) and summary.md. With --snapshots
or --lora-scales there is also choose.html, to open first. With several runs, comparison/ holds a report.html and an
overview.webp that show the base model and each adapter in columns. Sample images and verdicts are added to the model
card in each run's own folder. An evaluation of another adapter, or of images generated with other settings, is only
replaced with --overwrite. Images are written as they are generated; after an interruption the same command generates only
the rest.

Base model and adapter share one pipeline and the same initial noise, which depends on the image's seed only. Runs that
differ only in the seed count as training seeds of one experiment.
"""

import gc
import itertools
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
from lib.kernels import compile_ahead

# Set before torch is imported: short spin-waits for its CPU threads. With the default, one other process on one of the
# cores nearly stalls the run. Without spinning (OMP_WAIT_POLICY=PASSIVE) an otherwise idle machine runs at half the
# speed.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

CONFIG = dict(
    # what is evaluated
    lora_dir="lora_weights/lora_weights_rank_32",  # one adapter (a folder, or kohya's file), or a folder of them
    output_dir="results/eval_{name}",  # {name}: the adapter's and what differs from the defaults; replaced as a whole
    overwrite=False,  # also replace an evaluation of another adapter, or of images with other settings
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",  # a hub id, a local folder, or one .safetensors file
    revision=None,  # a commit of the hub repository; None: its newest
    data_dir="processed_data",  # the training images, for the concept similarity
    # what is generated
    prompts=None,  # a text file, one prompt per line, `near:` or `unrelated:` before it; None: PROMPTS
    seeds=8,  # images per prompt
    seed=42,  # of the first image; the others count up from it
    steps=28,  # denoising steps of an image
    guidance_scale=6.0,  # classifier-free guidance: how strongly images follow the prompt; 1: none
    resolution=512,  # pixels, or "WIDTHxHEIGHT"; each a multiple of 8
    batch_size=0,  # images at once; 0: what the GPU's free memory holds, at most 8
    # how it is scored
    clip_model="openai/clip-vit-base-patch32",  # a hub id or a local folder; none: no CLIP score
    clip_revision="refs/pr/15",  # the same weights as safetensors; the main branch has a pickle only
    similarity_model="facebook/dinov2-base",  # for similarities of images; "clip": CLIP's encoder; "none": none
    similarity_revision=None,  # a commit of its hub repository; None: its newest
    # Effects within these margins are negligible, differences within them equivalent.
    concept_margin=0.1,  # of the way to the training images, by any encoder (a cosine of 0.0223 in the miniature's study)
    clip_margin=0.02,  # cosine; the match with the prompt may fall by less than this
    change_margin=0.05,  # a twentieth of the way to another image of the same prompt
    variety_margin=0.25,  # of the base's variety over the seeds; a greater loss is a collapse
    copy_margin=1 / 3,  # of success images, as near to a training image as these to one another; 8 seeds bound no fewer
    # other ways to run
    snapshots=False,  # also evaluate the snapshots of the training run, and advise a step
    lora_scales=(1.0,),  # others: also evaluate the adapter at these scales, and advise one
    rescore=False,  # measure the images saved in output_dir again, generating none
    score_dir=None,  # "BASE_FOLDER,LORA_FOLDER": measure these images, of PUBLISHED or of `prompts`
)

# Success: the concept. Near: its class without the concept, where an adapter does most harm. Unrelated: anything else.
PROMPTS = (
    ("success", "a holographic raincoat"),
    ("success", "a person wearing a holographic raincoat in the rain"),
    ("success", "a holographic raincoat on a mannequin"),
    ("near", "a yellow raincoat"),
    ("near", "a person wearing a raincoat in the rain"),
    ("unrelated", "a red leather jacket"),
    ("unrelated", "a cat sitting on a couch"),
)
PUBLISHED = tuple(pair for pair in PROMPTS if pair[0] != "near")  # the published study's five prompts

# Overrides of --demo.
DEMO = dict(
    lora_dir="lora_weights/demo_runs/lora_weights_rank_32",
    output_dir="results/demo_{name}",
    base_model="demo/model",
    clip_model="demo/clip",
    similarity_model="clip",
    guidance_scale=3.0,
    resolution=256,
    batch_size=8,
)


# The values that each key may have.
VALUES = (
    (values.TEXT, "lora_dir output_dir base_model data_dir clip_model similarity_model"),
    (values.or_none(values.TEXT), "revision clip_revision similarity_revision prompts score_dir"),
    (values.FLAG, "overwrite snapshots rescore"),
    (values.SIZE, "resolution"),
    (values.whole(1), "seeds steps"),
    (values.whole(0), "batch_size"),
    (values.whole(0, 2**62), "seed"),
    (values.number(0, 100), "guidance_scale"),
    (values.number(1e-6, 1 - 1e-6), " ".join(key for key in CONFIG if key.endswith("_margin"))),
    (values.several(values.number(0, 10), 1), "lora_scales"),
)


def check_config(config):
    """Rejects invalid values before anything is loaded."""
    values.check(config, VALUES)
    check_resolution(config, least=32, square=False)  # LPIPS needs 32 pixels
    if config["rescore"] and config["score_dir"]:
        raise UserError("rescore and score_dir exclude each other; give one of them")
    if config["snapshots"] and config["score_dir"]:
        raise UserError("score_dir measures existing images, snapshots need new ones; give one of them")
    if not (config["rescore"] or config["score_dir"] or Path(config["lora_dir"]).exists()):
        raise UserError(f"{config['lora_dir']}: no such folder; train an adapter first (python train.py)")


def usual(config):
    """The defaults, or those of --demo if `config` has its base model."""
    return CONFIG | (DEMO if config["base_model"] == DEMO["base_model"] else {})


def evaluation_name(config):
    """The {name} of `output_dir`: the adapter's name and what differs from a usual evaluation."""
    path = Path(os.path.abspath((config["score_dir"] or config["lora_dir"]).split(",")[-1].strip()))
    if path.name == "pytorch_lora_weights.safetensors":
        path = path.parent
    parts = [path.stem if path.suffix == ".safetensors" else path.name]
    parts += [Path(config["prompts"]).stem] if config["prompts"] else []
    parts += [str(config["resolution"])] if config["resolution"] != usual(config)["resolution"] else []
    parts += ["snapshots"] if config["snapshots"] else []
    parts += ["scales"] if tuple(config["lora_scales"]) != CONFIG["lora_scales"] else []
    return "_".join(parts)


def own_revision(config):
    """A copy of `config` in which the default revision of the CLIP model belongs to the default model alone."""
    other = config["clip_model"] != CONFIG["clip_model"] and config["clip_revision"] == CONFIG["clip_revision"]
    return config | (dict(clip_revision=None) if other else {})


def evaluate(config):
    """Evaluates each adapter in `lora_dir` against the base model; returns the output folders.

    With `rescore` or `score_dir` the images are read instead of generated.
    """
    generating, times = not (config["rescore"] or config["score_dir"]), [time.monotonic()]
    # Imported here, so that --help and a wrong option are answered at once.
    with quick_imports():
        import torch

        from lib.evaluation import results
        from lib.evaluation.image_files import note_kept
        from lib.evaluation.metrics import scores
        from lib.provenance import provenance

        if generating:
            from lib.evaluation.generation import generate_runs, prepare_pipeline
            from lib.evaluation.runs import plan_runs
            from lib.models import fetch_base_model
    times.append(time.monotonic())
    device, output_dir = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Path(config["output_dir"])
    config = own_revision(config)  # a copy; completed below and by load_scorers

    # Plan: every check runs before a model is loaded, or before images are generated.
    results.recover(output_dir)
    print_notes(config)
    if config["rescore"]:
        runs, config, prompts, seeds = results.read_saved(output_dir, config)
    else:
        default = list(PUBLISHED if config["score_dir"] else PROMPTS)
        prompts = read_prompts(config["prompts"]) if config["prompts"] else default
        seeds = list(range(config["seed"], config["seed"] + config["seeds"]))
        if config["score_dir"]:
            runs, seeds = results.read_pair(config["score_dir"], output_dir, prompts)
        else:
            plan = plan_runs(config, device)
            runs = [run for run, _ in plan]
        results.check_replaceable(runs, config, prompts, seeds)
    if generating:
        half = device.type == "cuda"
        folder = fetch_base_model(config["base_model"], config["revision"], half, config["resolution"])
        pipeline, plan = prepare_pipeline(config, plan, folder, prompts, device)
        runs = [run for run, _ in plan]
    scorers = scores.load_scorers(config, prompts, runs, device)
    for note in scores.training_notes(runs, scorers.training):
        print(f"note: {note}")

    made_with, pool = provenance(device), ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2))
    try:
        # Generate.
        times.append(time.monotonic())
        if generating:
            results.begin_runs(plan, config, prompts, seeds, made_with | dict(base_folder=str(folder)))
            generate_runs(config, plan, pipeline, prompts, seeds, pool)
            del pipeline  # its memory is the scorers' now
            free_memory(device)
        times.append(time.monotonic())

        # Score, while overviews are drawn and images copied in threads.
        results.begin_images(runs, config, prompts, seeds, pool)
        base_pairs = scores.score_runs(runs, prompts, seeds, scorers)
        results.finish_images(runs)
        times.append(time.monotonic())

        # Judge and write.
        made_with |= dict(scorers=scorers.record(config))
        shown = dict(prompts=prompts, seeds=seeds, config=config, training=scorers.training, provenance=made_with)
        judge_and_write(runs, base_pairs, shown, output_dir)
    except BaseException:
        note_kept([run.target for run in runs])
        raise
    finally:
        pool.shutdown(cancel_futures=True)  # what is left after an error
    times.append(time.monotonic())
    if generating:
        print_times(times, runs, len(prompts) * len(seeds), device)
    return [run.target for run in runs]


def free_memory(device):
    """Gives unused memory of a GPU back."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def print_notes(config):
    """Prints what the user should know before waiting."""
    from lib.evaluation.choosing import FEWEST

    if config["rescore"]:
        keys = ("prompts", "seeds", "seed", "steps", "guidance_scale", "resolution")
        ignored = [f"--{key.replace('_', '-')}" for key in keys if config[key] != usual(config)[key]]
        if ignored:
            print(f"note: --rescore measures the saved images; {', '.join(ignored)} is ignored")
    elif config["snapshots"] or tuple(config["lora_scales"]) != CONFIG["lora_scales"]:
        if config["seeds"] < FEWEST:
            print(f"note: no step or scale will be advised; that takes {FEWEST} sampling seeds (--seeds {FEWEST})")
        if not (Path(config["data_dir"]) / "captions.jsonl").is_file():
            print(f"note: no step or scale will be advised; that takes training images, {config['data_dir']} has none")


def judge_and_write(runs, base_pairs, shown, output_dir):
    """Judges each run, compares the experiments, and writes their folders and the adapters' model cards.

    `base_pairs` are the distances between base images of one prompt, `shown` is what all pages show, without the
    warnings.
    """
    from lib.evaluation import results
    from lib.evaluation.choosing import sweep_summary
    from lib.evaluation.comparison import compare
    from lib.evaluation.metrics import scores
    from lib.evaluation.metrics.concept_scale import concept_scale
    from lib.evaluation.metrics.effects import no_change_reason
    from lib.evaluation.metrics.table import margins_of
    from lib.evaluation.report.card import update_model_card
    from lib.evaluation.report.words import scale_text
    from lib.evaluation.runs import group_runs
    from lib.evaluation.verdicts import analyse

    prompts, training, config = shown["prompts"], shown["training"], shown["config"]
    scale = concept_scale(runs, prompts, training, config["concept_margin"])
    margins = margins_of(config, scale)
    warnings = scores.shape_warnings(runs, training) + scores.image_warnings(runs, prompts, shown["seeds"])
    if scale and scale["reason"]:
        warnings.append(scale_text(scale))
    if reason := no_change_reason(base_pairs):
        print(f"note: {reason}")
    for warning in warnings:
        print(f"warning: {warning}")
    shown = shown | dict(warnings=warnings + scores.training_notes(runs, training))
    for run in runs:
        summary = analyse([run], prompts, base_pairs, margins, training, scale)
        if run.sweep:
            summary["sweep"] = sweep_summary(run, prompts, base_pairs, margins)
        results.write_run(run, summary, shown, base_pairs)
        update_model_card(run, summary, shown)
    if len(runs) > 1:
        groups = group_runs(runs)
        given = prompts, base_pairs, margins, training, scale
        summaries = {name: analyse(members, *given) for name, members in groups.items()}
        pairs = compare(groups, prompts, base_pairs, margins)
        results.write_comparison(output_dir / "comparison", groups, summaries, pairs, shown)


def print_times(times, runs, count, device):
    """Prints the duration of each part; `times` begin the imports and each part, and end the last, `count` is the
    number of images of one adapter."""
    imports, loading, generation, scoring, files = (b - a for a, b in itertools.pairwise(times))
    points = (sum(point.scale > 0 and not run.is_own(point) for point in run.points) for run in runs)
    count *= 1 + len(runs) + sum(points)
    memory = ""
    if device.type == "cuda":
        import torch

        memory = f"; {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB reserved at most"
    print(
        f"{count} images in {times[-1] - times[1]:.1f} s, after {imports:.1f} of imports: loading {loading:.1f} s, "
        f"generation {generation:.1f}, scores {scoring:.1f}, files {files:.1f}; "
        f"{(generation + scoring) / count:.3f} s per image generated and scored{memory}"
    )


def main():
    config = parse_config(CONFIG, __doc__, demo=DEMO)
    check_config(config)
    config["output_dir"] = config["output_dir"].replace("{name}", evaluation_name(config))
    output_dir = Path(config["output_dir"])
    if not (config["rescore"] or config["score_dir"]):  # for a machine's first run; beside the imports
        compile_ahead.start("inference.py", config["base_model"], config["resolution"], config["batch_size"])
    advice = "close what else uses the GPU (nvidia-smi lists it)"
    with disk_for(output_dir), locked(output_dir), memory_for("loading the models or scoring", advice):
        evaluate(config)


if __name__ == "__main__":
    run_script(main)
