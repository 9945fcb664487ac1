"""train.py and the two experiments, run as a user runs them, and the parts of their loop."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN, assert_close, assert_one_line, call, command, make_processed, options, picture, run
from diffusers import DDPMScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel

import train
import train_experiment_dora
import train_experiment_large_batch
import train_experiment_protected
import train_experiment_rank8
import train_experiment_unet_only
import train_experiment_varied_captions
from lib.adapter_files import WEIGHTS
from lib.errors import UserError
from lib.training import micro_step, parameters, samples, setup


def train_tiny(model, data, folder, *extra, script="train.py", check=True, **changes):
    config = TINY_RUN | dict(base_model=model, data_dir=data, output_dir=folder) | changes
    if not check:  # an error is expected
        return call(script, *options(**config), *extra)
    return run(script, *options(**config), *extra)


def weights(folder, name="lora_weights_rank_32"):
    return load_file(folder / name / WEIGHTS)


# What each experiment changes, and nothing else.
DECLARED = {
    train_experiment_rank8: dict(run_name="lora_weights_rank8", rank=8, alpha=8.0),
    train_experiment_unet_only: dict(run_name="lora_weights_unet_only", train_text_encoder=False),
    train_experiment_dora: dict(run_name="lora_weights_dora", dora=True),
    train_experiment_protected: dict(
        run_name="lora_weights_protected",
        unet_targets=("attn2.to_k", "attn2.to_v"),
        unet_learning_rate=3e-4,
        text_encoder_learning_rate=1e-3,
        protected_prompts="prompts/protected.txt",
        loss_guidance_scale=(1.0, 1.7),
    ),
    train_experiment_varied_captions: dict(run_name="lora_weights_varied_captions", caption_from="description"),
    train_experiment_large_batch: dict(
        run_name="lora_weights_large_batch",
        batch_size=8,
        max_steps=500,
        warmup_steps=6,
        unet_learning_rate=1e-4 * 8**0.5,
        text_encoder_learning_rate=1e-5 * 8**0.5,
        checkpoint_every=62,
        validate_every=31,
        preview_every=125,
        snapshot_every=62,
    ),
}


def test_experiments_differ_in_the_declared_keys_only():
    assert {script.__name__ for script in DECLARED} == {path.stem for path in ROOT.glob("train_experiment_*.py")}
    for script, expected in DECLARED.items():
        assert list(script.CONFIG) == list(train.CONFIG)
        differing = {k: v for k, v in script.CONFIG.items() if v != train.CONFIG[k]}
        assert differing == expected
        # What --demo swaps does not undo what the experiment changes.
        demo = getattr(script, "DEMO_CONFIG", train.DEMO)
        assert {k for k in train.DEMO if demo[k] != train.DEMO[k]} == expected.keys() & train.DEMO
        # The lines that differ are the marked ones.
        source = (ROOT / f"{script.__name__}.py").read_text()
        marked = {line.split("=")[0].strip() for line in source.splitlines() if "<- changed" in line and "=" in line}
        assert marked - {
            '# The complete configuration; a line that differs from train.py\'s ends in "<- changed".'
        } == set(expected)


def test_the_recipe():
    """The published recipe, key by key."""
    expected = dict(
        base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        rank=32,
        alpha=32,
        unet_targets=("to_k", "to_q", "to_v", "to_out.0"),
        text_encoder_targets=("q_proj", "v_proj"),
        unet_learning_rate=1e-4,
        text_encoder_learning_rate=1e-5,
        max_steps=4000,
        batch_size=1,
        mixed_precision="fp16",
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_weight_decay=1e-2,
        warmup_steps=50,
        gradient_checkpointing=True,
        seed=42,
        resolution=512,
        wandb_project="lora-holographic-raincoat",
    )
    assert expected == {key: train.CONFIG[key] for key in expected}


def test_a_key_too_many_or_too_few_is_named(processed_data):
    config = train.CONFIG | dict(data_dir=str(processed_data))
    train.check_config(config)
    with pytest.raises(UserError, match="CONFIG has no rank"):
        train.check_config({key: value for key, value in config.items() if key != "rank"})
    with pytest.raises(UserError, match="CONFIG has rnk"):
        train.check_config(config | dict(rnk=4))


def test_what_a_run_leaves(trained):
    folder = trained / "lora_weights_rank_32"
    # An evaluation may have put samples/ beside them.
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == [
        "README.md",
        "config.json",
        "log.jsonl",
        "lora_weights_rank_32.safetensors",
        "loss.png",
        WEIGHTS,
    ]
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [2, 4, 6]
    assert [r["step"] for r in rows if "validation_loss" in r] == [0, 3, 6]
    summary = json.loads((folder / "config.json").read_text())
    assert summary["config"]["rank"] == 4
    assert summary["parameters"] == {"unet": 9984, "text_encoder": 1024}
    assert len(summary["data"]["held_out"]) == 2
    assert not set(summary["data"]["held_out"]) & set(summary["data"]["trained_on"])
    with safe_open(folder / WEIGHTS, "pt") as file:
        header = file.metadata()
    assert header["rank"] == "4"
    assert header["caption"] == "a holographic raincoat"
    assert header["data_sha256"] == summary["data"]["sha256"]
    assert not list(trained.glob(".*"))  # nothing half-done is left beside


def test_unet_only_has_no_text_encoder_weights(trained):
    keys = weights(trained, "lora_weights_unet_only")
    assert all(key.startswith("unet.") for key in keys)
    assert any(key.startswith("text_encoder.") for key in weights(trained))


def test_same_seed_same_weights_other_seed_other_weights(tiny_model, processed_data, tmp_path, trained):
    train_tiny(tiny_model, processed_data, tmp_path / "again")
    train_tiny(tiny_model, processed_data, tmp_path / "other", seed=7)
    first, again, other = (weights(f) for f in (trained, tmp_path / "again", tmp_path / "other"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def relative_difference(a, b):
    """Norm of the difference of two adapters' B factors, which start at zero, over their norm.

    Sums are rounded in another order here and there, and the optimizer's 8-bit state turns some of
    that into a step of its own, so single elements may differ by more than the whole does.
    """
    keys = [key for key in a if "lora_B" in key]
    flat_a, flat_b = (torch.cat([w[key].flatten() for key in keys]) for w in (a, b))
    return ((flat_a - flat_b).norm() / flat_a.norm()).item()


def test_two_processes_agree_with_one_of_twice_the_batch(tiny_model, processed_data, tmp_path):
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    config = TINY_RUN | dict(base_model=tiny_model, data_dir=processed_data)
    watched = config | dict(preview_every=4, snapshot_every=4)
    done = command("train.py", *options(**watched, output_dir=tmp_path / "two"), launcher=launcher)
    # One process speaks, writes and draws.
    assert done.stdout.count("2 held out") == done.stdout.count("previews: ") == 1
    found = (tmp_path / "two" / "lora_weights_rank_32").rglob("step_*")
    assert sorted(path.stem for path in found) == ["step_000000", "step_000004", "step_000004", "step_000006"]
    train_tiny(tiny_model, processed_data, tmp_path / "one", batch_size=2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    summary = json.loads((tmp_path / "two" / "lora_weights_rank_32" / "config.json").read_text())
    assert summary["processes"] == 2
    assert relative_difference(one, two) < 0.01


def test_accumulation_agrees_with_a_larger_batch(tiny_model, processed_data, tmp_path):
    train_tiny(tiny_model, processed_data, tmp_path / "a", gradient_accumulation_steps=3)
    train_tiny(tiny_model, processed_data, tmp_path / "b", batch_size=3)
    assert relative_difference(weights(tmp_path / "a"), weights(tmp_path / "b")) < 0.01


def test_the_held_out_loss_does_not_depend_on_the_batch_size(tiny_model, processed_data, tmp_path):
    """Eight probes in batches of 1 or of 3; the last batch of 3 is not full."""
    found = []
    for size in (1, 3):
        train_tiny(tiny_model, processed_data, tmp_path / str(size), batch_size=size)
        log = (tmp_path / str(size) / "lora_weights_rank_32" / "log.jsonl").read_text()
        found.append(json.loads(log.splitlines()[0])["validation_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_held_out_loss_is_of_four_timesteps_spread_over_the_schedule(
    tiny_model, processed_data, tmp_path, monkeypatch
):
    """Of one alone it would say nothing of the rest: each image's four share their noise."""
    seen = []
    loss = micro_step.diffusion_loss

    def recording(unet, scheduler, latents, noise, timesteps, *rest):
        found = loss(unet, scheduler, latents, noise, timesteps, *rest)
        if not torch.is_grad_enabled():
            seen.append((timesteps.item(), noise.clone(), found.item()))
        return found

    monkeypatch.setattr(micro_step, "diffusion_loss", recording)
    done = train_tiny(tiny_model, processed_data, tmp_path, check=False, max_steps=2)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "lora_weights_rank_32" / "log.jsonl").read_text().splitlines()
    means = [row["validation_loss"] for row in map(json.loads, log) if "validation_loss" in row]
    assert len(means) == 2  # before the first step and after the last one
    assert len(seen) == 2 * 8
    for mean, probes in zip(means, (seen[:8], seen[8:]), strict=True):
        timesteps, noises, losses = zip(*probes, strict=True)
        assert timesteps == (125, 375, 625, 875) * 2
        assert all(torch.equal(noises[i], noises[i // 4 * 4]) for i in range(8))
        assert not torch.equal(noises[0], noises[4])
        assert all(torch.equal(a, b[1]) for a, b in zip(noises, seen, strict=False))
        assert mean == pytest.approx(np.mean(losses), rel=1e-5)


def test_learning_rate_zero_is_caught_not_saved(tiny_model, processed_data, tmp_path):
    for rates in (dict(unet_learning_rate=0, text_encoder_learning_rate=0), dict(text_encoder_learning_rate=0)):
        done = train_tiny(tiny_model, processed_data, tmp_path, check=False, **rates)
        assert_one_line(done, "did not train", "lora_B")
    assert not (tmp_path / "lora_weights_rank_32").exists()


def test_a_failed_run_leaves_the_old_one(tiny_model, processed_data, tmp_path):
    train_tiny(tiny_model, processed_data, tmp_path)
    before = (tmp_path / "lora_weights_rank_32" / WEIGHTS).read_bytes()
    train_tiny(tiny_model, processed_data, tmp_path, check=False, unet_learning_rate=0)
    assert (tmp_path / "lora_weights_rank_32" / WEIGHTS).read_bytes() == before


def test_published_layout_without_images_prefix(tiny_model, tmp_path):
    """The published study's listing names the images without their images/ folder."""
    data = make_processed(tmp_path / "data", 4)
    listing = data / "captions.jsonl"
    listing.write_text(listing.read_text().replace("images/", ""))
    train_tiny(tiny_model, data, tmp_path / "weights", max_steps=2)


def test_wandb_runs_offline_without_a_key(tiny_model, processed_data, tmp_path, monkeypatch):
    config = TINY_RUN | dict(base_model=tiny_model, data_dir=processed_data, output_dir=tmp_path)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    home = dict(HOME=str(tmp_path), NETRC=str(tmp_path / "none"), WANDB_DIR=str(tmp_path))
    run("train.py", *options(**config), env=home)
    stored = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(stored) == 1
    content = stored[0].read_bytes()
    assert b"train/loss" in content
    assert b"train/learning_rate" in content
    assert b"a holographic raincoat" not in content  # captions stay here


def test_learning_rate_schedule_is_diffusers_own():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=400)
    for step in range(400):
        ours = train.learning_rate_factor(step, 400, 50)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_of_what_the_base_model_predicts(prediction):
    """A model that predicts it exactly has none, and one that is off by one has a loss of one."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([10, 500, 950])
    signal = scheduler.alphas_cumprod[timesteps].sqrt().view(3, 1, 1, 1)
    spread = (1 - scheduler.alphas_cumprod[timesteps]).sqrt().view(3, 1, 1, 1)
    # Salimans & Ho 2022: the velocity of an image on its way to noise.
    exact = noise if prediction == "epsilon" else signal * noise - spread * latents
    texts = torch.zeros(3, 77, 32)

    class Model:
        dtype = torch.float32

        def __call__(self, noisy, steps, states):
            assert_close(noisy, signal * latents + spread * noise)
            assert steps is timesteps
            assert states is texts
            return SimpleNamespace(sample=exact + torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1))

    losses = micro_step.diffusion_loss(Model(), scheduler, latents, noise, timesteps, texts)
    np.testing.assert_allclose(losses, [0, 1, 4], rtol=1e-4, atol=1e-4)


def test_flat_parameters_are_views():
    layers = [torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)]
    model = torch.nn.Sequential(*layers)
    before = [p.detach().clone() for p in model.parameters()]
    weights = list(model.parameters())
    flat, working = parameters.flatten_parameters(weights, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    with torch.no_grad():
        flat.add_(1.0)
    assert working.data_ptr() == flat.data_ptr()
    assert torch.equal(layers[0].weight, before[0] + 1)
    flat, working = parameters.flatten_parameters(weights, torch.float16)
    assert layers[0].weight.dtype == torch.float16
    working *= 2
    assert torch.equal(layers[0].weight, 2 * (before[0] + 1).half())
    parameters.set_views(weights, flat.data)
    assert torch.equal(layers[0].weight, before[0] + 1)


def test_data_order_visits_every_picture_once_an_epoch():
    for epoch in range(3):
        assert sorted(samples.epoch_order(1, epoch, 28)) == list(range(28))
    assert list(samples.epoch_order(1, 0, 28)) != list(samples.epoch_order(1, 1, 28))


PROTECTED = dict(protected_prompts=ROOT / "prompts" / "protected_demo.txt", unet_targets="attn2.to_k,attn2.to_v")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(data_dir="/nowhere/at/all"), "preprocess.py"),
        (dict(warmup_steps=6), "warmup_steps"),
        (dict(rank=0), "rank is 0"),
        (dict(mixed_precision="fp8"), "mixed_precision"),
        (dict(resolution=60), "multiple of 8"),
        (dict(run_name="../elsewhere"), "run_name"),
        (dict(base_model="./no/such/folder"), "no such folder"),
        (dict(base_model="some-owner/no-such-model"), "some-owner/no-such-model is unavailable"),
        (dict(unet_learning_rate="fast"), "--unet-learning-rate"),
        (dict(unet_targets="to_z"), "to_z"),
        (dict(caption_from="words"), "caption_from is 'words'"),
        (dict(caption_from="description"), "has no description"),
        (dict(alpha="nan"), "alpha"),
        (dict(loss_guidance_scale="2,1"), "loss_guidance_scale is (2.0, 1.0)"),
        (dict(loss_guidance_scale="0.5,2"), "loss_guidance_scale is (0.5, 2.0)"),
        (dict(loss_guidance_scale="1,2,3"), "loss_guidance_scale is (1.0, 2.0, 3.0)"),
        (dict(loss_guidance_scale="1,nan"), "loss_guidance_scale is (1.0, nan)"),
        (dict(protection_ridge=0), "protection_ridge is 0.0"),
        (dict(protected_prompts="/nowhere/list.txt"), "/nowhere/list.txt: no such file"),
        (PROTECTED | dict(dora=True), "protected_prompts is unavailable with DoRA"),
        (PROTECTED | dict(unet_targets="attn2.to_k,to_q"), "unet_targets holds to_q, but"),
        (PROTECTED | dict(unet_targets="to_k"), "every other layer sees the image"),
        (PROTECTED | dict(protected_class="umbrella"), "no caption contains it"),
        (PROTECTED | dict(protected_prompts=ROOT / "lib" / "__init__.py"), "at least 10 are needed"),
    ],
)
def test_mistakes_get_one_line(tiny_model, processed_data, tmp_path, change, words):
    done = train_tiny(tiny_model, processed_data, tmp_path, check=False, **change)
    assert_one_line(done, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no json", "line 9"),
        ('{"file_name": "images/image_01.png"}', "line 9"),
        ('{"file_name": "images/image_01.png", "text": "again"}', "already named in line 1"),
        ('{"file_name": "images/none.png", "text": "x"}', "no images/none.png"),
        ('{"file_name": "../outside.png", "text": "x"}', "outside"),
        ('{"file_name": "images/words.png", "text": "x"}', "cannot be read as an image"),
        ('{"file_name": "images/long.png", "text": "' + "word " * 60 + '"}', "77"),
    ],
)
def test_bad_data_is_named(tiny_model, tmp_path, line, words):
    data = make_processed(tmp_path / "data", 8)
    picture(1).save(tmp_path / "outside.png")
    picture(99).save(data / "images" / "long.png")
    (data / "images" / "words.png").write_text("words")
    with (data / "captions.jsonl").open("a") as file:
        file.write(line + "\n")
    done = train_tiny(tiny_model, data, tmp_path / "weights", check=False)
    assert_one_line(done, words)


def test_noise_depends_on_seed_and_sample_alone():
    def draw(seed, sample):
        return samples.draw_noise(np.random.default_rng([seed, samples.SAMPLE, sample]), (4, 8, 8), 1000)

    for a, b in zip(draw(1, 5), draw(1, 5), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(draw(1, 5)[1], draw(1, 6)[1])
    assert not np.array_equal(draw(1, 5)[1], draw(2, 5)[1])
    many = np.concatenate([draw(1, sample)[1].ravel() for sample in range(200)])
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02


@pytest.mark.parametrize(
    ("pictures", "asked", "expected"),
    [(1, 4, 0), (2, 4, 0), (3, 4, 0), (5, 4, 1), (8, 4, 2), (16, 4, 4), (32, 4, 4), (32, 0, 0), (8, 9, 2)],
)
def test_at_most_a_quarter_is_held_out(pictures, asked, expected):
    assert samples.held_out_count(asked, pictures) == expected


@pytest.mark.parametrize(("pictures", "held_out", "words"), [(3, 0, "no validation loss"), (5, 1, "at most a quarter")])
def test_five_pictures_train_on_four(tiny_model, tmp_path, pictures, held_out, words):
    """At the default of four held out."""
    data = make_processed(tmp_path / "data", pictures)
    done = train_tiny(
        tiny_model, data, tmp_path, check=False, max_steps=2, validation_count=train.CONFIG["validation_count"]
    )
    assert done.returncode == 0, done.stderr
    assert f"{pictures - held_out} images to train on, {held_out} held out" in done.stdout
    assert "note: not 4" in done.stdout
    assert words in done.stdout
    log = (tmp_path / "lora_weights_rank_32" / "log.jsonl").read_text()
    assert ("validation_loss" in log) == bool(held_out)


def test_a_frozen_text_encoder_reads_each_caption_once_and_a_few_at_a_time(tiny_model):
    encoder = CLIPTextModel.from_pretrained(tiny_model / "text_encoder").eval()
    captions = [[510, *([number % 7 + 1] * 3), *([511] * 73)] for number in range(30)]
    input_ids = torch.tensor(captions)
    seen = []
    encoder.register_forward_pre_hook(
        lambda module, inputs, named: seen.append((named.get("input_ids", *inputs)).shape[0]), with_kwargs=True
    )
    states, which = setup.encode_captions(encoder, input_ids, at_once=3)
    assert sorted(seen) == [1, 3, 3]  # the seven different ones
    assert states.shape == (7, 77, 32)
    assert not states.requires_grad
    with torch.no_grad():
        expected = encoder(input_ids)[0]
    torch.testing.assert_close(states[which], expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_text_encoder_gives_each_picture_its_own_caption(tiny_model, tmp_path):
    """Before the first update both ways to run it give the same loss."""
    data = make_processed(tmp_path / "data", 8)
    listing = data / "captions.jsonl"
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text"] = "xyz"[number % 3] * (number // 2 + 1)
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for trained in (True, False):
        folder = tmp_path / str(trained)
        train_tiny(tiny_model, data, folder, check=False, max_steps=2, train_text_encoder=trained)
        log = (folder / "lora_weights_rank_32" / "log.jsonl").read_text()
        found.append(json.loads(log.splitlines()[0])["validation_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_captions_of_too_many_tokens_are_all_named_or_cut_off(tiny_model, tmp_path):
    data = make_processed(tmp_path / "data", 4)
    rows = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    for number in (1, 3):
        rows[number]["text"] = "a coat " + "x" * (80 + number)
    (data / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = TINY_RUN | dict(base_model=tiny_model, data_dir=data, output_dir=tmp_path, max_steps=2)
    done = call("train.py", *options(**config))
    assert_one_line(done, "2 captions, images/image_02.png (", "images/image_04.png (", "--truncate-captions")
    assert "image_01" not in done.stderr
    done = call("train.py", *options(**config, truncate_captions=True, preview_prompts="{caption}"))
    assert done.returncode == 0, done.stderr
    said = next(line for line in done.stdout.splitlines() if "only the first 77 tokens" in line)
    assert "images/image_02.png" in said
    assert "images/image_04.png" in said
