"""What is looked at while a run trains: previews, snapshots, held-out loss, trackers."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN, assert_one_line, call, command, options, picture, run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from training_runs import kill, succeeded, training

import inference
import train
from lib import adapter_files, adapters, files
from lib.adapter_files import WEIGHTS
from lib.dataset import Row
from lib.evaluation import generation
from lib.kernels import cpu
from lib.training import checkpoints, journal, micro_step, monitor, parameters, run_folder

NAME = "lora_weights_rank_32"
OTHERS = ("README.md", f"{NAME}.safetensors")  # for people and other programs
WATCHED = TINY_RUN | dict(
    max_steps=6,
    preview_every=2,
    snapshot_every=2,
    checkpoint_every=2,
    validate_every=3,
    preview_prompts="{caption},a cat",
    report_to="none",
)


@pytest.fixture(scope="module")
def common(tiny_model, processed_data):
    return WATCHED | dict(base_model=tiny_model, data_dir=processed_data)


@pytest.fixture(scope="module")
def watched(common, tmp_path_factory):
    """A run with previews and snapshots."""
    folder = tmp_path_factory.mktemp("watched")
    done = run("train.py", *options(**common | dict(output_dir=folder)))
    assert "previews.webp, every 2 steps" in done.stdout
    return folder / NAME


def tree(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def assert_same_pictures_and_weights(one, two):
    """All previews of two runs are the same to the byte, all adapters and snapshots bit for bit."""
    assert tree(one) == tree(two)
    for name in tree(one):
        if name.endswith(".safetensors"):
            ours, theirs = load_file(one / name), load_file(two / name)
            assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs), name
        elif name.endswith(".webp"):
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


# ---- previews ----------------------------------------------------------------------------------


def test_a_run_is_the_same_bit_for_bit_with_and_without(common, watched, tmp_path):
    without = common | dict(output_dir=tmp_path, preview_every=0, snapshot_every=0)
    run("train.py", *options(**without))
    assert tree(tmp_path / NAME) == {"config.json", "log.jsonl", "loss.png", WEIGHTS, *OTHERS}
    seen, unseen = (load_file(folder / WEIGHTS) for folder in (watched, tmp_path / NAME))
    assert all(torch.equal(seen[key], unseen[key]) for key in seen | unseen)

    def losses(folder):
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [row for row in rows if "loss" in row]

    assert losses(watched) == losses(tmp_path / NAME)


@pytest.mark.parametrize("dora", [False, True])
def test_the_same_where_the_model_computes_with_a_copy(common, tmp_path, monkeypatch, dora):
    """As in half precision, where the optimizer's vector and what the model reads are not one memory: a
    preview shows the last update, a snapshot keeps the vector, and the copy is where it was afterwards.
    (No image is held out: their loss would have brought the copy up to date.)"""
    config = common | dict(validation_count=0, dora=dora)
    run("train.py", *options(**config | dict(output_dir=tmp_path / "one")))
    flatten, copies = parameters.flatten_parameters, []

    def apart(weights, dtype):
        flat, working = flatten(weights, dtype)
        working = working.clone()
        parameters.set_views(weights, working)
        copies.append((weights, working))
        return flat, working

    def snapshot(*arguments):
        write(*arguments)
        for weights, working in copies:
            assert weights[0].data_ptr() == working.data_ptr()

    write = run_folder.write_snapshot
    monkeypatch.setattr(monitor, "write_snapshot", snapshot)
    monkeypatch.setattr(parameters, "flatten_parameters", apart)
    done = call("train.py", *options(**config | dict(output_dir=tmp_path / "two")))
    assert done.returncode == 0, done.stderr
    one, two = tmp_path / "one" / NAME, tmp_path / "two" / NAME
    assert_same_pictures_and_weights(one, two)
    kept = load_file(one / "snapshots" / "step_000002" / WEIGHTS)
    types = {key.rsplit(".", 2)[1]: weight.dtype for key, weight in kept.items()}
    whole = dict(lora_magnitude_vector=torch.float32) if dora else {}
    assert types == dict(lora_A=torch.float16, lora_B=torch.float16) | whole


def test_what_is_left_to_look_at(watched):
    steps = [f"previews/step_{step:06}.webp" for step in (0, 2, 4, 6)]
    snapshots = [f"snapshots/step_{step:06}/{WEIGHTS}" for step in (2, 4)]
    found = tree(watched)
    assert found == {"config.json", "log.jsonl", "loss.png", WEIGHTS, *OTHERS, "previews.webp", *steps, *snapshots}
    record = json.loads((watched / "config.json").read_text())
    # A later run of this name may remove them, and nothing else.
    assert set(record["files_written"]) >= found
    assert record["preview_seconds"] > 0
    with Image.open(watched / "previews.webp") as strip:
        # Four columns, two prompts of 64 pixels; at least as wide as a prompt's words need.
        assert strip.size == (480, 24 + 2 * (64 + 6 + 24))
    with Image.open(watched / "previews" / "step_000002.webp") as column:
        assert column.size == (64, 128)


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_small_micro_batches_are_trained_by_one_thread(two_threads, monkeypatch):
    assert cpu.threads_for(cpu.SMALL, "cpu") == 1
    assert cpu.threads_for(cpu.SMALL + 1, "cpu") == 2
    assert cpu.threads_for(cpu.SMALL, "cuda") == 2
    miniature, stable_diffusion = 256 * 96, 256 * 320  # an image of 256 pixels, one of 128
    assert miniature < cpu.SMALL < stable_diffusion
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # as somebody wants it
    assert cpu.threads_for(cpu.SMALL, "cpu") == 2
    with cpu.computing_with(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU")
def test_previews_have_the_threads_that_training_does_without(common, two_threads, tmp_path, monkeypatch):
    step, generate = micro_step.MicroStep.run, generation.generate
    seen = dict(training=set(), generating=set())

    def counted(kind, work):
        return lambda *a, **k: seen[kind].add(torch.get_num_threads()) or work(*a, **k)

    monkeypatch.setattr(micro_step.MicroStep, "run", counted("training", step))
    monkeypatch.setattr(generation, "generate", counted("generating", generate))
    succeeded(call("train.py", *options(**common | dict(output_dir=tmp_path))))
    assert seen == dict(training={1}, generating={2})
    assert json.loads((tmp_path / NAME / "config.json").read_text())["device"] == "CPU, 1 thread"
    assert torch.get_num_threads() == 2


def test_a_preview_is_what_inference_draws(common, watched, tiny_model, tmp_path, monkeypatch):
    """The last one beside the finished adapter's images, of inference.py's defaults."""
    shown = {}
    monkeypatch.setattr(journal.Journal, "show", lambda self, step, found: shown.update({step: found}))
    rates = dict(unet_learning_rate=2e-2, text_encoder_learning_rate=2e-2)  # so that it can be seen
    done = call("train.py", *options(**common | rates | dict(output_dir=tmp_path)))
    assert done.returncode == 0, done.stderr
    how = {key: inference.CONFIG[key] for key in ("steps", "guidance_scale")}
    assert how == dict(steps=generation.PREVIEW_STEPS, guidance_scale=train.CONFIG["preview_guidance_scale"])
    assert inference.DEMO["guidance_scale"] == train.DEMO["preview_guidance_scale"]
    assert inference.CONFIG["seed"] == generation.PREVIEW_SEED
    pipeline = generation.load_pipeline(tiny_model, torch.float32, "cpu")
    jobs = [(prompt, inference.CONFIG["seed"]) for prompt in ("a holographic raincoat", "a cat")]
    how |= dict(resolution=64, batch_size=2, title="")
    base = generation.generate(pipeline, jobs, **how)
    adapter = adapter_files.read_adapter(tmp_path / NAME)
    adapters.Applied(adapter, generation.models_of(pipeline))
    drawn = generation.generate(pipeline, jobs, **how)

    def apart(some, others):
        pairs = [[np.asarray(image, np.int16) for image in pair] for pair in zip(some, others, strict=True)]
        return max(np.abs(a - b).max() for a, b in pairs)

    # W x + B A x in place of (W + B A) x: rounding alone.
    assert apart(shown[6], drawn) <= 2
    assert apart(shown[0], base) <= 2
    assert apart(base, drawn) > 20


def test_a_run_that_goes_on_goes_on_with_its_strip(common, watched, tmp_path):
    """Killed after the previews and snapshots of step 4, with no checkpoint but that of step 3: it draws
    them again, and the strip is the same to the byte."""
    config = common | dict(output_dir=tmp_path, checkpoint_every=3)
    assert training(tmp_path, config, {5: kill}).returncode == -signal.SIGKILL
    work = files.unfinished(tmp_path / NAME)
    assert (work / "snapshots" / "step_000004" / WEIGHTS).is_file()
    # One that is later still, as of another preview_every: the run that goes on has not drawn it.
    (work / "previews" / "step_000005.webp").write_bytes(b"")
    (work / "snapshots" / "step_000005").mkdir()
    done = succeeded(training(tmp_path, config))
    assert f"continuing {NAME} after step 3" in done.stdout
    assert_same_pictures_and_weights(tmp_path / NAME, watched)
    succeeded(training(tmp_path, config | dict(preview_every=0, snapshot_every=0)))
    assert not (tmp_path / NAME / "snapshots").exists()  # nothing of the run before is left


def test_a_strip_is_bounded_and_of_one_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "MOST_COLUMNS", 4)
    prompts = ["a", "b"]
    taken = monitor.Previews(tmp_path, lambda title: [picture(1, (260, 260))] * 2, prompts)
    for step in range(10):
        taken.take(step)
    with Image.open(tmp_path / "previews.webp") as strip:
        assert strip.width == 6 + monitor.MOST_COLUMNS * (monitor.LARGEST_SIDE + 6)
    assert len(taken.files()) == 10
    shown = taken.spread(taken.files())
    assert (shown[0][0], shown[-1][0], len(shown)) == (0, 9, monitor.MOST_COLUMNS)
    # Of other prompts since it was interrupted: the old files stay, the strip shows the new ones.
    (tmp_path / "previews" / "step_000008.webp").write_bytes(b"damaged")
    other = monitor.Previews(tmp_path, lambda title: [picture(2)], ["c"], first_step=9)
    other.take(10)
    with Image.open(tmp_path / "previews.webp") as strip:
        assert strip.size == (480, 24 + 64 + 6 + 24)
    assert len(other.files()) == 11


def test_the_prompts_of_a_preview():
    captions = ("a dog", "a zwx dog", "a zwx dog")
    rows = [Row(str(number), caption, None, None) for number, caption in enumerate(captions, 1)]
    found = monitor.preview_texts(["{caption}", "{caption} in the rain", "a zwx dog", "a cat"], rows)
    assert found == ["a zwx dog", "a zwx dog in the rain", "a cat"]


def test_previews_of_a_text_encoder_that_is_not_trained(common, tmp_path):
    """It was dropped when the captions were encoded, and is loaded again for the previews."""
    config = common | dict(output_dir=tmp_path, max_steps=2)
    run("train_experiment_unet_only.py", *options(**config))
    found = tree(tmp_path / "lora_weights_unet_only")
    assert {"previews/step_000000.webp", "previews/step_000002.webp"} <= found


def test_previews_need_a_prompt(common, tmp_path):
    done = call("train.py", *options(**common | dict(output_dir=tmp_path)), "--preview-prompts", ",")
    assert_one_line(done, "preview_prompts is empty", "--preview-every 0")


def test_a_preview_prompt_that_is_too_long_is_named_before_a_model_is_loaded(common, tmp_path):
    config = common | dict(output_dir=tmp_path, preview_prompts="word " * 80)
    assert_one_line(call("train.py", *options(**config)), "preview", "77", "word word")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("every", "expected"), [(0, []), (3, [0, 3, 6, 7]), (7, [0, 7]), (100, [0, 7])])
def test_what_is_due(every, expected):
    assert [step for step in range(8) if monitor.due(step, every, 7)] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_recorded_passes_survive_a_preview(common, tmp_path):
    """In fp16, with previews between the replays of the training's CUDA graphs and without."""
    found = []
    for every in (0, 4):
        config = common | dict(
            output_dir=tmp_path / str(every),
            preview_every=every,
            snapshot_every=every,
            max_steps=40,
            mixed_precision="fp16",
            log_every=1,
        )
        done = command("train.py", *options(**config))
        assert "CUDA graph capture failed" not in done.stdout
        rows = (tmp_path / str(every) / NAME / "log.jsonl").read_text().splitlines()
        found.append([row["loss"] for row in map(json.loads, rows) if "loss" in row])
    np.testing.assert_allclose(*found, rtol=1e-2)
    columns = sorted((tmp_path / "4" / NAME / "previews").iterdir())
    assert len(columns) == 11
    shown = [np.asarray(Image.open(path).convert("RGB"), np.int16) for path in columns]
    assert all(image.std() > 5 for image in shown)  # not black, as NaN is


# ---- snapshots ---------------------------------------------------------------------------------


def test_a_snapshot_is_the_adapter_of_its_step_in_half_precision(common, tmp_path):
    config = common | dict(output_dir=tmp_path)
    assert training(tmp_path, config, {5: kill}).returncode == -signal.SIGKILL
    work = files.unfinished(tmp_path / NAME)
    tensors, state = checkpoints.latest(work)
    assert state["step"] == 4
    path = work / "snapshots" / "step_000004"
    with safe_open(path / WEIGHTS, "pt") as file:
        assert file.metadata()["steps"] == "4"
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}
    adapter = adapter_files.read_adapter(path)
    for part in ("unet", "text_encoder"):
        found = torch.cat([w.flatten() for pair in adapter.factors[part].values() for w in pair])
        kept = tensors[f"{part}.parameters"].half().float()
        assert torch.equal(found.sort().values, kept.sort().values)


def test_an_adapter_that_does_nothing_yet_is_no_snapshot(common, tmp_path):
    """The first step's learning rate is 0."""
    config = common | dict(output_dir=tmp_path, snapshot_every=1, max_steps=3)
    done = call("train.py", *options(**config))
    assert "no snapshot after step 1: the unet has not changed yet" in done.stdout
    assert [p.name for p in (tmp_path / NAME / "snapshots").iterdir()] == ["step_000002"]


# ---- held-out loss -----------------------------------------------------------------------------


def test_a_snapshot_has_its_held_out_loss(watched):
    rows = [json.loads(line) for line in (watched / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 3, 4, 6]
    for row in rows:
        assert len(row["validation_losses"]) == 2  # an image
        assert row["validation_loss"] == pytest.approx(np.mean(row["validation_losses"]))


def test_the_loss_curve_is_led_by_the_held_out_loss():
    log = [dict(step=step, loss=1.0, learning_rate=0.1) for step in range(10, 50, 10)]
    assert len(run_folder.loss_figure(log, "x").axes) == 2
    log += [dict(step=step, validation_loss=loss) for step, loss in ((0, 0.3), (20, 0.1), (40, 0.2))]
    figure = run_folder.loss_figure(log, "x")
    first = figure.axes[0]
    assert list(first.lines[0].get_ydata()) == [0.3, 0.1, 0.2]
    assert first.lines[1].get_xydata().tolist() == [[20, 0.1]]
    assert [text.get_text() for text in first.texts] == ["lowest: 0.1000 after step 20"]


# ---- trackers ----------------------------------------------------------------------------------


def test_a_tracker_that_is_not_asked_for_is_not_imported(common, tmp_path):
    arguments = ["train.py", *options(**common | dict(output_dir=tmp_path, preview_every=0, max_steps=2))]
    code = (
        f"import sys, runpy\nsys.argv = {arguments}\nrunpy.run_path('train.py', run_name='__main__')\n"
        "print('imported:', *[n for n in ('wandb', 'tensorboard') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.splitlines()[-1] == "imported:", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("report_to", "missing", "words"),
    [
        ("wandb", "wandb", ("wandb is not installed", "--report-to none")),
        ("both", "tensorboard", ("tensorboard is not installed", "--report-to wandb")),
        ("mlflow", None, ("report_to is mlflow", "tensorboard, none, both")),
    ],
)
def test_a_tracker_that_cannot_be_had_is_named_at_once(common, tmp_path, monkeypatch, report_to, missing, words):
    there = importlib.util.find_spec

    def find_spec(name):
        if name == missing:
            return None
        return there("json") if name in ("wandb", "tensorboard") else there(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    done = call("train.py", *options(**common | dict(output_dir=tmp_path, report_to=report_to)))
    assert_one_line(done, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_mere_folder_is_no_package(tmp_path, monkeypatch):
    """W&B leaves a folder of its name beside the scripts."""
    (tmp_path / "tensorboard").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(journal.UserError, match="tensorboard is not installed"):
        journal.check_trackers("tensorboard")


@pytest.mark.parametrize("pictures", [False, True])
def test_pictures_leave_the_machine_only_when_asked(common, tmp_path, protected, pictures):
    """And no prompt ever, of the previews or of those that are protected."""
    home = dict(
        HOME=str(tmp_path),
        NETRC=str(tmp_path / "none"),
        WANDB_DIR=str(tmp_path),
        WANDB_MODE="offline",
        WANDB_SAVE_CODE="true",
    )
    config = common | dict(
        output_dir=tmp_path,
        report_to="wandb",
        wandb_pictures=pictures,
        max_steps=2,
        preview_prompts="{caption},my secret garden",
        **protected,
    )
    assert "acorn" in Path(protected["protected_prompts"]).read_text()
    # W&B saves the code of the script that Python was started with: one of the two is started so.
    (command if pictures else run)("train.py", *options(**config), env=home)
    media = list(tmp_path.glob("wandb/offline-run-*/files/media/images/*"))
    assert len(media) == (4 if pictures else 0)  # at the start and the end, of two prompts
    content = next(tmp_path.glob("wandb/offline-run-*/*.wandb")).read_bytes()
    for key in (b"train/loss", b"train/learning_rate", b"train/step", b"train/validation_loss"):
        assert key in content
    assert b"secret garden" not in content and b"acorn" not in content
    # Nor any code, in which a CONFIG has prompts.
    names = {path.name for path in tmp_path.glob("wandb/offline-run-*/**/*") if path.is_file()}
    assert not [name for name in names if name.endswith((".py", ".patch"))], names
    assert b"validation_losses" not in content


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        (dict(), "offline"),
        (dict(WANDB_MODE="online"), "offline"),
        (dict(WANDB_MODE="shared"), "offline"),
        (dict(WANDB_MODE="disabled"), "disabled"),
        (dict(WANDB_API_KEY="x" * 40), "online"),
        (dict(WANDB_MODE="online", WANDB_API_KEY="x" * 40), "online"),
        (dict(WANDB_BASE_URL="https://wandb.example.org", NETRC="own"), "online"),
        (dict(NETRC="own"), "offline"),
    ],
)
def test_wandb_is_online_only_with_a_key_and_never_asks(tmp_path, monkeypatch, capsys, environment, mode):
    (tmp_path / "own").write_text("machine wandb.example.org login user password " + "x" * 40)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SAVE_CODE", "true")
    for name, value in environment.items():
        monkeypatch.setenv(name, str(tmp_path / value) if name == "NETRC" else value)
    asked = []

    class Tracker:
        def __init__(self, project, **named):
            asked.append(named)

        def start(self):
            pass

    monkeypatch.setattr("accelerate.tracking.WandBTracker", Tracker)
    journal.start_wandb(tmp_path, train.CONFIG | dict(protected_prompts=("mine",)), [], None)
    assert asked[0]["mode"] == mode
    assert ("no API key" in capsys.readouterr().out) == (environment.get("WANDB_MODE") not in (None, mode))
    settings = asked[0]["settings"]
    assert (settings.save_code, settings.disable_git) == (False, True)
    assert not [key for key in asked[0]["config"] if "prompts" in key or "captions" in key]


def test_tensorboard(common, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = common | dict(output_dir=tmp_path, report_to="tensorboard")
    assert training(tmp_path, config, {5: kill}).returncode == -signal.SIGKILL
    succeeded(training(tmp_path, config))
    found = EventAccumulator(str(tmp_path / NAME / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [2, 4, 6]
    assert [event.step for event in found.Scalars("train/validation_loss")] == [0, 2, 3, 4, 6]
    assert "preview" in found.Tags()["images"]
    record = json.loads((tmp_path / NAME / "config.json").read_text())
    assert any(name.startswith("tensorboard/") for name in record["files_written"])


def test_defaults_are_of_use():
    """A strip and a choice of several columns, in the recipe and in the miniature's."""
    for config in (train.CONFIG, train.CONFIG | train.DEMO):
        for key, fewest in (("preview_every", 4), ("snapshot_every", 7)):
            assert config["max_steps"] / config[key] >= fewest
    assert train.CONFIG["report_to"] == "wandb"
    assert train.CONFIG["wandb_pictures"] is False
