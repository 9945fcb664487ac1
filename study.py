#!/usr/bin/env python3
"""The whole study: eight experiments on several training seeds, evaluated, and an answer to every claim.

    python study.py --demo                                # the embedded miniature
    python study.py                                       # Stable Diffusion v1.5, on a GPU
    CUDA_VISIBLE_DEVICES=1 python study.py --seeds 45,46  # beside another that takes other seeds
    python study.py --demo --seeds 42 --max-steps 4       # a trial, in folders of its own

For each training seed it trains what is not there yet and still to be evaluated, each arm by its own script into
lora_weights/study/seed42/rank32_seed42 and so on, and evaluates them together on prompts/study.txt
into results/study/seed42; rank 32 is drawn again with less of the adapter, into results/study/scales_seed42,
since that, too, spoils less and teaches less. A stop leaves whole seeds behind and one that is under
way; the same command goes on there. What one process trains and draws is no other's: several can each take
some of the seeds. At the end, and when everything is there already, results/study/ gets report.html,
claims.md, study.json and figures over all whole seeds in it, from the metrics.json files alone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from lib import values
from lib.config import parse_config
from lib.errors import STOP_SIGNALS, UserError, heeded, run_script
from lib.evaluation.prompts import read_prompts

CONFIG = dict(
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",  # as train.py and inference.py take it
    data_dir="processed_data",  # the images, with descriptions for the arm of varied captions
    prompts="prompts/study_sd15.txt",
    clip_model=None,  # None: inference.py's
    lora_dir="lora_weights/study_sd15",  # gets a folder a seed
    output_dir="results/study_sd15",  # likewise
    seeds=(42, 43, 44, 45, 46),  # training seeds; fewer than three claim nothing
    sampling_seeds=8,  # images a prompt
    scales=(0.2, 0.4, 0.6, 0.8, 1.0),  # that rank 32 is drawn with
    page=True,  # write report.html, claims.md, study.json and figures over all whole seeds in output_dir
    max_steps=None,  # for a trial: so many for each arm, without warm-up, and `lora_dir` and `output_dir` get an ending
)

# What --demo puts in their place.
DEMO = dict(
    base_model="demo/model", prompts="prompts/study.txt", lora_dir="lora_weights/study", output_dir="results/study"
)

# The arms by name, each its script and options.
ARMS = dict(
    rank32=["train.py"],
    rank8=["train_experiment_rank8.py"],
    unet_only=["train_experiment_unet_only.py"],
    dora=["train_experiment_dora.py"],
    protected=["train_experiment_protected.py"],
    protected_plain_loss=["train_experiment_protected.py", "--loss-guidance-scale", "1,1"],
    varied_captions=["train_experiment_varied_captions.py"],
    large_batch=["train_experiment_large_batch.py"],
)
SCALED = ("rank32",)
SAMPLING_SEED = 42  # of the first image of a prompt, inference.py's

# Measured on one NVIDIA H200 (bench/README.md): training images a second of the arms that were timed (steps times
# batch). Then the images of a run, the seconds of its set-up, of an H100, and of an image drawn and scored.
SAMPLES_A_SECOND = dict(rank32=71.5, rank8=71.8, unet_only=79.8, dora=54.5, large_batch=144)
SAMPLES, SET_UP, PICTURE = 4000, 15.6, 0.153


class Step(NamedTuple):
    """One thing to do for a seed: a call of another script."""

    kind: str  # what takes as long from seed to seed
    title: str
    done: bool
    command: list


# What values the keys may have.
VALUES = (
    (values.TEXT, "base_model data_dir prompts lora_dir output_dir"),
    (values.or_none(values.TEXT), "clip_model"),
    (values.several(values.whole(0, 2**62), 1), "seeds"),
    (values.several(values.number(0, 10), 1), "scales"),
    (values.whole(1), "sampling_seeds"),
    (values.FLAG, "page"),
    (values.or_none(values.whole(1)), "max_steps"),
)


def check_config(config):
    """Refuse values that make no sense, before anything is started; returns the (category, prompt)s."""
    values.check(config, VALUES)
    for key in ("seeds", "scales"):
        if len(set(config[key])) < len(config[key]):
            raise UserError(f"{key} is {config[key]}, but must be one or more, each once")
    if not (Path(config["data_dir"]) / "captions.jsonl").is_file():
        raise UserError(f"{config['data_dir']}: no captions.jsonl; run python preprocess.py first")
    return read_prompts(config["prompts"])


def steps_of(seed, config, prompts):
    """The Steps of one training seed, in order."""
    demo = config["base_model"] == DEMO["base_model"]
    shared = ["--demo"] if demo else ["--base-model", config["base_model"]]
    shared += ["--data-dir", config["data_dir"]]
    runs, results = (Path(config[key]) / f"seed{seed}" for key in ("lora_dir", "output_dir"))
    steps = []
    for arm, (script, *more) in ARMS.items():
        name = f"{arm}_seed{seed}"
        options = [
            *shared,
            "--output-dir",
            runs,
            "--run-name",
            name,
            "--seed",
            seed,
            "--preview-every",
            0,
            "--snapshot-every",
            0,
            "--report-to",
            "none",
            *more,
        ]
        if config["max_steps"]:
            options += ["--max-steps", config["max_steps"], "--warmup-steps", 0]
        done = (runs / name / "config.json").is_file()
        steps.append(Step(arm, f"seed {seed}: train {arm}", done, [script, *options]))

    drawing = [*shared, "--prompts", config["prompts"], "--seeds", config["sampling_seeds"]]
    if config["clip_model"]:
        drawing += ["--clip-model", config["clip_model"]]
    done = (
        all(is_evaluated(results / f"{arm}_seed{seed}", prompts, config["sampling_seeds"]) for arm in ARMS)
        and (results / "comparison" / "metrics.json").is_file()
    )
    command = ["inference.py", *drawing, "--lora-dir", runs, "--output-dir", results]
    steps.append(Step("evaluation", f"seed {seed}: evaluate {len(ARMS)} arms", done, command))
    for arm in SCALED:
        name = f"{arm}_seed{seed}"
        folder = results.with_name(f"scales_seed{seed}") / name
        command = [
            "inference.py",
            *drawing,
            "--lora-dir",
            runs / name,
            "--output-dir",
            folder,
            "--lora-scales",
            ",".join(map(str, config["scales"])),
        ]
        done = is_evaluated(folder, prompts, config["sampling_seeds"])
        steps.append(Step("scales", f"seed {seed}: less of {arm}", done, command))
    if all(step.done for step in steps[len(ARMS) :]):  # nothing is left to do with its adapters
        steps = [step._replace(done=True) for step in steps]
    return steps


def is_evaluated(folder, prompts, sampling_seeds):
    """Whether `folder` holds an evaluation of these prompts; UserError if it is of others."""
    path = folder / "metrics.json"
    if not path.is_file():
        return False
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["pictures"]
        found = list(dict.fromkeys((row["category"], row["prompt"]) for row in rows))
        seeds = len({row["seed"] for row in rows})
    except (ValueError, KeyError, TypeError, OSError) as problem:
        raise UserError(f"{path} cannot be read ({problem!r}); remove it to draw again") from None
    if (found, seeds) != (prompts, sampling_seeds):
        raise UserError(
            f"{folder} was drawn with other prompts or with {seeds} seeds, not {sampling_seeds}; name another "
            "--output-dir, or remove it to draw again"
        )
    return True


def call(command):
    """Run one of the scripts beside this one; its words go where this one's go.

    A Ctrl-C reaches it by itself, and any other signal is handed on; it then saves what it has. Raises UserError
    if it fails, SystemExit if it or this script was stopped.
    """
    stopped = []
    script, *options = map(str, command)
    child = subprocess.Popen([sys.executable, str(Path(__file__).parent / script), *options])

    def stop(number, frame):
        stopped.append(128 + number)
        if number != signal.SIGINT:
            child.send_signal(number)

    before = {number: signal.signal(number, stop) for number in heeded()}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        sys.exit(stopped[0])
    if code - 128 in STOP_SIGNALS:
        sys.exit(code)
    if code:
        raise UserError(
            f"{script} ended with status {code}, its own words are above; once that is mended the "
            "same command goes on here"
        )


def duration(seconds):
    """“5 min”, “2.3 h”."""
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def time_left(steps, took):
    """How long `steps` will take, in words; `took` is {kind: seconds of those that were done here}."""
    known = [sum(took[s.kind]) / len(took[s.kind]) for s in steps if s.kind in took]
    unknown = len(steps) - len(known)
    if not known:
        return f"{unknown} left"
    return f"about {duration(sum(known))} left" + (f" and {unknown} not timed yet" if unknown else "")


def gpu_text(steps, config, prompts):
    """What `steps` take on an H200 with Stable Diffusion's full size, from measured rates."""
    pictures = len(prompts) * config["sampling_seeds"]
    drawn = dict(evaluation=1 + len(ARMS), scales=1 + len({*config["scales"], 1.0} - {0.0}))
    seconds, untimed = 0, set()
    for step in steps:
        if step.kind in drawn:
            seconds += drawn[step.kind] * pictures * PICTURE
            continue
        if step.kind not in SAMPLES_A_SECOND:
            untimed.add(step.kind)
        rate = SAMPLES_A_SECOND.get(step.kind, SAMPLES_A_SECOND["rank32"])
        seconds += SAMPLES / rate + SET_UP
    text = f"on one NVIDIA H200 about {duration(seconds)}, at the rates of bench/README.md"
    if untimed:
        text += f" ({', '.join(sorted(untimed))} were not timed there and count as rank32)"
    return text


def write_strips(config, prompts):
    """Write images_seed42.webp and so on beside the seeds' results, where they are missing."""
    from lib.study.page import write_strip

    for seed in config["seeds"]:
        path = Path(config["output_dir"]) / f"pictures_seed{seed}.webp"
        results = path.with_name(f"seed{seed}")
        folders = {arm: results / f"{arm}_seed{seed}" for arm in ARMS}
        if not (path.is_file() or write_strip(path, folders, prompts, SAMPLING_SEED)):
            print(f"note: {results} holds no images (any more), so there is no {path.name}")


def study(config, prompts):
    """Train and evaluate what is missing, seed by seed."""
    plan = [step for seed in config["seeds"] for step in steps_of(seed, config, prompts)]
    left = [step for step in plan if not step.done]
    print(
        f"{len(config['seeds'])} training seeds, {len(ARMS)} arms: {len(plan) - len(left)} of {len(plan)} "
        f"steps are done, {len(left)} left"
    )
    if left and config["base_model"] != DEMO["base_model"] and not config["max_steps"]:
        print(gpu_text(left, config, prompts))
    took = {}
    for number, step in enumerate(left):
        place = len(plan) - len(left) + number + 1
        print(f"\n[{place} of {len(plan)}] {step.title} ({time_left(left[number:], took)})", flush=True)
        started = time.monotonic()
        call(step.command)
        took.setdefault(step.kind, []).append(time.monotonic() - started)
    write_strips(config, prompts)


def write_page(config):
    """Judge all whole seeds and write the page; say what was found."""
    from lib.study.page import write_study
    from lib.study.words import sentence

    claims = write_study(config["output_dir"], ARMS, SCALED)
    print("\n" + "\n".join(sentence(claim) for claim in claims))
    print(f"\nopen {Path(config['output_dir']) / 'report.html'}")


def main():
    config = parse_config(CONFIG, __doc__, demo=DEMO)
    prompts = check_config(config)
    if config["max_steps"]:  # never to be taken for the study
        for key in ("lora_dir", "output_dir"):
            config[key] += f"_{config['max_steps']}_steps"
    os.environ.setdefault("PYTHONUNBUFFERED", "1")  # the scripts' words in order with these
    study(config, prompts)
    if config["page"]:
        write_page(config)


if __name__ == "__main__":
    run_script(main)
