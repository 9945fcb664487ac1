"""The study: its prompts, the order of its steps, and how it resumes and stops."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_line, call, options
from made_up_study import ARMS, PROMPTS, SCALED, SEEDS, write_study

import inference
import study
from demo import world
from lib.errors import UserError
from lib.evaluation.prompts import members, read_prompts
from lib.study import page
from lib.study.files import read_study

# ---- prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["study", "study_sd15"])
def test_the_lists_of_prompts(name):
    """The published five and 38 more, none of which any arm trained on."""
    prompts = read_prompts(ROOT / "prompts" / f"{name}.txt")
    assert {c: len(members(prompts, c)) for c in ("success", "near", "unrelated")} == {
        "success": 3 + 6,
        "near": 8 + 8,
        "unrelated": 2 + 8 + 8,
    }
    assert set(inference.PUBLISHED) < set(prompts)
    assert len(set(prompts)) == len(prompts)
    taught = [json.loads(line) for line in (ROOT / "data" / "captions.jsonl").read_text().splitlines()]
    assert not {row["description"] for row in taught} & {prompt for _, prompt in prompts}
    for category, prompt in prompts:
        assert ("holographic" in prompt) == (category == "success"), prompt
        if name == "study":  # in the miniature's words, and a scene that it can draw
            world.parse(prompt)


# ---- the steps and their order -------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("made"), seeds=(1, 2))


@pytest.fixture
def plan(tmp_path, monkeypatch, made):
    """A study in `tmp_path` whose scripts are replaced. `calls` are the commands, and each leaves the last file of the
    real script; `stop_at` is the number of calls after which one fails. The page is study.json alone."""
    listed = "\n".join(f"{category}: {prompt}" for category, prompt in PROMPTS)
    (tmp_path / "prompts.txt").write_text(listed)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "captions.jsonl").write_text("{}\n")
    plan = types.SimpleNamespace(calls=[], stop_at=None, results=tmp_path / "results", folder=tmp_path)

    def called(command):
        if len(plan.calls) == plan.stop_at:
            raise UserError(f"{command[0]} ended with status 1")
        plan.calls.append([str(part) for part in command])
        value = dict(zip(plan.calls[-1], plan.calls[-1][1:], strict=False))
        if command[0] != "inference.py":
            target = Path(value["--output-dir"]) / value["--run-name"]
            target.mkdir(parents=True)
            (target / "config.json").write_text("{}")
        else:
            place = Path(value["--output-dir"])
            last = 2 if place.parent.name.startswith("scales_") else 1
            shutil.copytree(made.joinpath(*place.parts[-last:]), place, dirs_exist_ok=True)

    def write_page(folder, arms, scaled):
        seeds = read_study(folder, arms, scaled).training_seeds
        (Path(folder) / "study.json").write_text(json.dumps(dict(training_seeds=seeds)))
        return [dict(title="A claim", parts=[])]

    monkeypatch.setattr(study, "call", called)
    monkeypatch.setattr(page, "write_study", write_page)

    def start(*more):
        config = dict(
            data_dir=tmp_path / "data",
            prompts=tmp_path / "prompts.txt",
            lora_dir=tmp_path / "lora",
            output_dir=plan.results,
            seeds="1,2",
            sampling_seeds=SEEDS,
        )
        return call("study.py", "--demo", *options(**config), *more)

    plan.start = start
    return plan


def arms_of(calls):
    """The run name of each training, the output folder of each evaluation."""
    names = []
    for command in calls:
        value = dict(zip(command, command[1:], strict=False))
        name = value.get("--run-name") or Path(value["--output-dir"]).as_posix().partition("results/")[2]
        names.append(name)
    return names


def seed_plan(seed):
    return (
        [f"{arm}_seed{seed}" for arm in ARMS]
        + [f"seed{seed}"]
        + [f"scales_seed{seed}/{arm}_seed{seed}" for arm in SCALED]
    )


def test_seed_by_seed_every_arm_and_then_its_evaluation(plan):
    done = plan.start()
    assert done.returncode == 0, done.stderr
    assert arms_of(plan.calls) == seed_plan(1) + seed_plan(2)
    assert set(study.ARMS) == set(ARMS) and tuple(study.SCALED) == SCALED
    for arm, command in zip(study.ARMS, plan.calls, strict=False):
        script, *more = study.ARMS[arm]
        assert command[0] == script and "--demo" in command and command[len(command) - len(more) :] == more
        assert (ROOT / command[0]).is_file()
        assert command[command.index("--seed") + 1] == "1"
    assert "0 of 20 steps done" in done.stdout and "[20 of 20] seed 2" in done.stdout
    assert done.stdout.endswith(f"A claim: not measured.\n\nopen {plan.results / 'report.html'}\n")


def test_what_is_there_is_not_done_again(plan):
    plan.stop_at = 12  # in the middle of the second seed
    assert_one_line(plan.start(), "ended with status 1")
    assert arms_of(plan.calls) == seed_plan(1) + seed_plan(2)[:2]
    assert not (plan.results / "study.json").exists()
    plan.stop_at, before = None, len(plan.calls)
    done = plan.start()
    assert arms_of(plan.calls[before:]) == seed_plan(2)[2:]
    assert "12 of 20 steps done" in done.stdout
    before = len(plan.calls)
    (plan.results / "study.json").unlink()
    assert "20 of 20 steps done" in plan.start().stdout
    assert len(plan.calls) == before
    assert (plan.results / "study.json").is_file()


def test_adapters_that_were_evaluated_may_be_gone(plan):
    """As in a checkout, which holds the figures of all seeds and the adapters of one."""
    plan.start()
    before = len(plan.calls)
    shutil.rmtree(plan.folder / "lora" / "seed1")
    assert "20 of 20 steps done" in plan.start().stdout
    assert len(plan.calls) == before
    (plan.results / "seed1" / "comparison" / "metrics.json").unlink()
    plan.start()
    assert arms_of(plan.calls[before:]) == seed_plan(1)[:-1]


def test_an_evaluation_that_was_cut_short_is_done_again(plan):
    plan.start()
    before = len(plan.calls)
    (plan.results / "seed2" / "comparison" / "metrics.json").unlink()
    plan.start()
    assert arms_of(plan.calls[before:]) == ["seed2"]


def test_processes_that_share_the_seeds_share_nothing_else(plan):
    plan.start("--seeds", "1")
    assert arms_of(plan.calls) == seed_plan(1)
    plan.start("--seeds", "2", "--no-page")
    assert arms_of(plan.calls) == seed_plan(1) + seed_plan(2)
    assert json.loads((plan.results / "study.json").read_text())["training_seeds"] == [1]
    plan.start("--seeds", "2")  # the page is over all that is whole
    assert json.loads((plan.results / "study.json").read_text())["training_seeds"] == [1, 2]
    places = [
        {part for part in command if part.startswith(str(plan.folder)) and "seed" in part} for command in plan.calls
    ]
    assert all("seed1" not in place for folders in places[10:] for place in folders)


def test_a_trial_lies_in_folders_of_its_own(plan):
    plan.start("--max-steps", "4", "--no-page", "--seeds", "1")
    assert plan.calls
    assert all("lora_4_steps" in " ".join(command) for command in plan.calls)
    assert all("results_4_steps" in " ".join(c) for c in plan.calls if c[0] == "inference.py")
    assert all("--max-steps 4 --warmup-steps 0" in " ".join(c) for c in plan.calls[:8])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seeds", "1,1"], ["seeds", "each once"]),
        (["--sampling-seeds", "4"], ["seed1/rank32_seed1", "with 8 seeds, not 4", "--output-dir"]),
        (["--prompts", "other.txt"], ["other prompts"]),
        (["--data-dir", "nowhere"], ["nowhere", "preprocess.py"]),
    ],
)
def test_what_does_not_fit_is_named(plan, more, words, monkeypatch, tmp_path):
    plan.start("--no-page")
    before = len(plan.calls)
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_text("a coat\n")
    assert_one_line(plan.start(*more), *words)
    assert len(plan.calls) == before


def test_a_script_that_fails_stops_the_study():
    with pytest.raises(UserError, match="train.py ended with status 1"):
        study.call(["train.py", "--no-such-option"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_study_lets_its_script_save(number, tmp_path):
    """Ctrl-C reaches every process of a terminal, SIGTERM the study alone; either way the script ends by
    itself, and the study after it."""
    script, saved = tmp_path / "script.py", tmp_path / "saved"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(number, frame):\n"
        f"    time.sleep(1)\n    pathlib.Path({str(saved)!r}).touch()\n    sys.exit(128 + number)\n"
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n    signal.signal(number, stop)\n"
        f"pathlib.Path({str(tmp_path / 'started')!r}).touch()\ntime.sleep(60)\n"
    )
    code = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # ignored if the tests run under nohup
    code += f"import study\nfrom lib.errors import run_script\nrun_script(lambda: study.call([{str(script)!r}]))"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
        assert parent.poll() is None
    send = os.killpg if number == signal.SIGINT else os.kill
    send(parent.pid, number)
    assert parent.wait(timeout=30) == 128 + number
    assert saved.exists()


def test_hours_come_from_the_rates_in_the_bench():
    """The arms that were timed are those whose steps a second bench/README.md names."""
    bench = (ROOT / "bench" / "README.md").read_text()
    for rate in (*study.SAMPLES_A_SECOND.values(), study.SET_UP, study.PICTURE):
        assert re.search(rf"\b{rate:g}", bench), rate
    config = study.CONFIG | dict(prompts=ROOT / "prompts/study_sd15.txt", output_dir="/nowhere", lora_dir="/nowhere")
    prompts = read_prompts(config["prompts"])
    steps = study.steps_of(42, config, prompts)
    text = study.gpu_text(steps, config, prompts)
    pictures = 43 * 8 * (1 + 8 + 1 + 5)
    known = {arm: study.SAMPLES_A_SECOND.get(arm, 71.5) for arm in study.ARMS}
    seconds = pictures * 0.153 + sum(4000 / rate + study.SET_UP for rate in known.values())
    assert f"about {seconds / 60:.0f} min" in text or f"about {seconds / 3600:.1f} h" in text
    for arm in set(study.ARMS) - set(study.SAMPLES_A_SECOND):
        assert arm in text


def test_models_that_score_are_passed_on():
    config = study.CONFIG | dict(output_dir="/nowhere", lora_dir="/nowhere")
    more = ["--clip-model", "mine", "--similarity-model", "a folder"]
    for changes, expected in ((dict(), []), (dict(clip_model="mine", similarity_model="a folder"), more)):
        steps = study.steps_of(42, config | changes, [])
        commands = [step.command for step in steps if step.command[0] == "inference.py"]
        assert len(commands) == 2
        for command in commands:
            passed = [place for place, part in enumerate(command) if part in ("--clip-model", "--similarity-model")]
            assert [command[place + more] for place in passed for more in (0, 1)] == expected


# ---- evaluations that are not comparable ---------------------------------------------------


def changed(folder, places, **changes):
    """Change keys of the metrics.json in `places` of a study."""
    for place in places:
        path = folder / place / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def scorers(**digests):
    alike = dict(clip="a", similarity="s", lpips="b", training_images="c") | digests
    return {key: dict(sha256=digest) for key, digest in alike.items()}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (dict(scorers=scorers(clip="z")), r"scorers \(clip\)"),
        (dict(scorers=scorers(similarity="z")), r"scorers \(similarity\)"),
        (dict(scorers=scorers(lpips="z")), r"scorers \(lpips\)"),
        (dict(scorers=scorers(training_images="z")), r"scorers \(training images\)"),
        (dict(summary=dict(margins=dict(concept_similarity=0.1))), "margins"),
    ],
)
def test_evaluations_that_were_judged_otherwise_are_refused(tmp_path, changes, what):
    folder = write_study(tmp_path, seeds=(1, 2))
    every = [path.parent.relative_to(folder) for path in folder.rglob("*_seed*/metrics.json")]
    changed(folder, every, scorers=scorers())
    assert read_study(folder, ARMS, SCALED).notes == []
    changed(folder, ["seed2/dora_seed2"], **changes)
    with pytest.raises(UserError, match=rf"seed2/dora_seed2/metrics.json was judged with other {what} than .*seed1/"):
        read_study(folder, ARMS, SCALED)


def test_evaluations_without_digests_are_accepted(tmp_path):
    """The committed ones have none: unknown, and all alike."""
    committed = read_study(ROOT / "results" / "study", study.ARMS, study.SCALED)
    assert not [note for note in committed.notes if "scored" in note]
    folder = write_study(tmp_path, seeds=(1, 2))
    changed(folder, ["seed2/dora_seed2"], scorers=scorers())
    [note] = read_study(folder, ARMS, SCALED).notes
    assert note.startswith("17 of 18 evaluations do not name the models that scored them")
