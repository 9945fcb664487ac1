#!/usr/bin/env python3
"""Runs the whole study: eight experiments on several training seeds, their evaluation, and a verdict on every claim.

    python study.py --demo                                # the embedded miniature
    python study.py                                       # Stable Diffusion v1.5, on a GPU
    CUDA_VISIBLE_DEVICES=1 python study.py --seeds 45,46  # in parallel with a process on other seeds
    python study.py --demo --seeds 42 --max-steps 4       # a trial, in folders of its own

For each training seed, every arm is trained by its own script into lora_weights/study/seed42/rank32_seed42 and so on,
and all arms are evaluated on prompts/study.txt into results/study/seed42. Rank 32 is also evaluated at lower scales into
results/study/scales_seed42, because a lower scale reduces side effects and the concept alike.

An interrupted study resumes with the same command. Several processes can share the work if each takes other seeds. At the
end report.html, claims.md, study.json and charts are written into results/study, from the metrics.json files of all
complete seeds.
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
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",  # Hub name, folder or .safetensors file
    data_dir="processed_data",  # the images, with descriptions for the arm with varied captions
    prompts="prompts/study_sd15.txt",  # one prompt per line, with its category
    clip_model=None,  # that scores the images; None: the default of inference.py
    similarity_model=None,  # for similarities of images; None: the default of inference.py
    lora_dir="lora_weights/study_sd15",  # a folder per training seed
    output_dir="results/study_sd15",  # a folder per training seed, and the page
    seeds=(42, 43, 44, 45, 46),  # training seeds; with fewer than three nothing is claimed
    sampling_seeds=8,  # images per prompt
    scales=(0.2, 0.4, 0.6, 0.8, 1.0),  # of the adapter, for rank 32
    page=True,  # write report.html, claims.md, study.json and charts
    max_steps=None,  # for a trial: steps of each arm, without warm-up, in folders named after it
)

# Overrides of --demo.
DEMO = dict(
    base_model="demo/model", prompts="prompts/study.txt", lora_dir="lora_weights/study", output_dir="results/study"
)

# The arms: script and options.
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
SAMPLING_SEED = 42  # the first sampling seed of inference.py

# Measured on one NVIDIA H200 (bench/README.md): training images per second (steps times batch) of the arms timed there.
SAMPLES_A_SECOND = dict(
    rank32=71.5, rank8=71.8, unet_only=79.8, dora=54.5, large_batch=144, protected=60, protected_plain_loss=78.9
)
# Training images of a run, seconds of its set-up with cached kernels, seconds to generate and score an image.
SAMPLES, SET_UP, PICTURE = 4000, 4.9, 0.153


class Step(NamedTuple):
    """A call of another script, for one training seed."""

    kind: str  # steps of a kind take equally long
    title: str
    done: bool
    command: list


VALUES = (
    (values.TEXT, "base_model data_dir prompts lora_dir output_dir"),
    (values.or_none(values.TEXT), "clip_model similarity_model"),
    (values.several(values.whole(0, 2**62), 1), "seeds"),
    (values.several(values.number(0, 10), 1), "scales"),
    (values.whole(1), "sampling_seeds"),
    (values.FLAG, "page"),
    (values.or_none(values.whole(1)), "max_steps"),
)


def check_config(config):
    """Refuse invalid values before anything starts. Returns the (category, prompt)s."""
    values.check(config, VALUES)
    for key in ("seeds", "scales"):
        if len(set(config[key])) < len(config[key]):
            raise UserError(f"{key} is {config[key]}, but must be one or more, each once")
    if not (Path(config["data_dir"]) / "captions.jsonl").is_file():
        raise UserError(f"{config['data_dir']}: no captions.jsonl; run python preprocess.py first")
    return read_prompts(config["prompts"])


def options(**of):
    """{"run_name": "a"} as ["--run-name", "a"]."""
    return [part for key, value in of.items() for part in ("--" + key.replace("_", "-"), value)]


def steps_of(seed, config, prompts):
    """The Steps of one training seed, in order."""
    base = ["--demo"] if config["base_model"] == DEMO["base_model"] else options(base_model=config["base_model"])
    shared = [*base, *options(data_dir=config["data_dir"])]
    runs, results = (Path(config[key]) / f"seed{seed}" for key in ("lora_dir", "output_dir"))
    names = {arm: f"{arm}_seed{seed}" for arm in ARMS}
    train = options(output_dir=runs, seed=seed, preview_every=0, snapshot_every=0, report_to="none")
    if config["max_steps"]:
        train += options(max_steps=config["max_steps"], warmup_steps=0)
    training = []
    for arm, (script, *more) in ARMS.items():
        done = (runs / names[arm] / "config.json").is_file()
        command = [script, *shared, *train, *options(run_name=names[arm]), *more]
        training.append(Step(arm, f"seed {seed}: train {arm}", done, command))

    shared += options(prompts=config["prompts"], seeds=config["sampling_seeds"])
    shared += options(**{key: config[key] for key in ("clip_model", "similarity_model") if config[key]})
    asked = prompts, config["sampling_seeds"]
    done = all(is_evaluated(results / name, *asked) for name in names.values())
    done = done and (results / "comparison" / "metrics.json").is_file()
    command = ["inference.py", *shared, *options(lora_dir=runs, output_dir=results)]
    evaluation = [Step("evaluation", f"seed {seed}: evaluate {len(ARMS)} arms", done, command)]
    for arm in SCALED:
        folder = results.with_name(f"scales_seed{seed}") / names[arm]
        more = options(lora_dir=runs / names[arm], output_dir=folder, lora_scales=",".join(map(str, config["scales"])))
        done = is_evaluated(folder, *asked)
        evaluation.append(Step("scales", f"seed {seed}: {arm} at lower scales", done, ["inference.py", *shared, *more]))
    if all(step.done for step in evaluation):  # the adapters are not needed any more
        training = [step._replace(done=True) for step in training]
    return training + evaluation


def is_evaluated(folder, prompts, sampling_seeds):
    """Whether `folder` holds an evaluation of these prompts. Raises UserError if it holds another."""
    path = folder / "metrics.json"
    if not path.is_file():
        return False
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["pictures"]
        evaluated = list(dict.fromkeys((row["category"], row["prompt"]) for row in rows))
        seeds = len({row["seed"] for row in rows})
    except (ValueError, KeyError, TypeError, OSError) as problem:
        raise UserError(f"{path} cannot be read ({problem!r}); remove it to evaluate again") from None
    if (evaluated, seeds) != (prompts, sampling_seeds):
        raise UserError(
            f"{folder} was evaluated on other prompts or with {seeds} seeds, not {sampling_seeds}; choose another "
            "--output-dir, or remove it to evaluate again"
        )
    return True


def call(command):
    """Run one of the scripts next to this one. Its output goes where this one's goes.

    The terminal sends Ctrl-C to the script too. Other signals are passed on, and the script saves what it has. Raises
    UserError if it fails, SystemExit if it or this script was stopped.
    """
    stopped = []
    script, *more = map(str, command)
    child = subprocess.Popen([sys.executable, str(Path(__file__).parent / script), *more])

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
    if stopped or code - 128 in STOP_SIGNALS:
        sys.exit(stopped[0] if stopped else code)
    if code:
        raise UserError(f"{script} ended with status {code}, see above; fix the cause and run the same command again")


def duration(seconds):
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def time_left(steps, took):
    """The expected time of `steps`, in words; `took` is {kind: [seconds]} of the steps of this process."""
    known = [sum(took[step.kind]) / len(took[step.kind]) for step in steps if step.kind in took]
    untimed = len(steps) - len(known)
    if not known:
        return f"{untimed} left"
    return f"about {duration(sum(known))} left" + (f" and {untimed} not timed yet" if untimed else "")


def gpu_text(steps, config, prompts):
    """The time of `steps` on an H200 with Stable Diffusion v1.5, from measured rates."""
    images = len(prompts) * config["sampling_seeds"]
    models = dict(evaluation=1 + len(ARMS), scales=1 + len({*config["scales"], 1.0} - {0.0}))
    trained = [step.kind for step in steps if step.kind not in models]
    seconds = sum(models[step.kind] for step in steps if step.kind in models) * images * PICTURE
    seconds += sum(SAMPLES / SAMPLES_A_SECOND.get(arm, SAMPLES_A_SECOND["rank32"]) + SET_UP for arm in trained)
    text = f"on one NVIDIA H200 about {duration(seconds)}, at the rates of bench/README.md"
    if untimed := sorted(set(trained) - set(SAMPLES_A_SECOND)):
        text += f" ({', '.join(untimed)} were not timed there and count as rank32)"
    return text


def study(config, prompts):
    """Train and evaluate what is missing, seed by seed."""
    plan = [step for seed in config["seeds"] for step in steps_of(seed, config, prompts)]
    left = [step for step in plan if not step.done]
    done, took = len(plan) - len(left), {}
    print(f"{len(ARMS)} arms, {len(config['seeds'])} training seeds: {done} of {len(plan)} steps done")
    if left and config["base_model"] != DEMO["base_model"] and not config["max_steps"]:
        print(gpu_text(left, config, prompts))
    for number, step in enumerate(left):
        print(f"\n[{done + number + 1} of {len(plan)}] {step.title} ({time_left(left[number:], took)})", flush=True)
        started = time.monotonic()
        call(step.command)
        took.setdefault(step.kind, []).append(time.monotonic() - started)
    from lib.study.page import write_strips  # after the work: it imports matplotlib

    write_strips(config["output_dir"], config["seeds"], ARMS, prompts, SAMPLING_SEED)


def main():
    config = parse_config(CONFIG, __doc__, demo=DEMO)
    prompts = check_config(config)
    if config["max_steps"]:  # keeps a trial apart from the study
        for key in ("lora_dir", "output_dir"):
            config[key] += f"_{config['max_steps']}_steps"
    os.environ.setdefault("PYTHONUNBUFFERED", "1")  # the output of the scripts stays in order with this one's
    study(config, prompts)
    if config["page"]:
        from lib.study import levels, page, words

        levels.write_levels(config["output_dir"], config["data_dir"])
        claims = page.write_study(config["output_dir"], ARMS, SCALED)
        print("\n" + "\n".join(words.sentence(claim) for claim in claims))
        print(f"\nopen {Path(config['output_dir']) / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
