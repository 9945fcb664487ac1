"""Preservation: what is added to the loss, which captions it uses, and what it does to a run."""

import contextlib
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN, assert_close, call, options, run
from diffusers import DDPMScheduler
from test_kernels import fused, fused_dora, gradients, small_unet
from test_train import weights

import inference
import train_experiment_preservation
from demo import world
from lib import adapters
from lib.evaluation.prompts import read_prompts
from lib.kernels import lora
from lib.training import losses, micro_step, samples

CAPTIONS = "a coat,a cat,a house"
DEVICE = next(small_unet().parameters()).device


def fused_unet():
    return fused(small_unet())


def predicted(unet, states):
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    return unet(noisy, torch.tensor([300], device=DEVICE), states).sample


@pytest.mark.parametrize("made", [fused_unet, fused_dora])
def test_without_lora_the_model_is_the_base_model(made):
    """Inside a `with` alone, whatever ends it."""
    unet, states = made(), torch.randn(1, 77, 32).to(DEVICE)
    adapted = predicted(unet, states)
    with contextlib.suppress(KeyError), lora.without_lora(unet):
        base = predicted(unet, states)
        raise KeyError
    assert (adapted - base).abs().max() > 0.01 * base.abs().max()
    assert torch.equal(predicted(unet, states), adapted)
    plain = small_unet()
    for _, b in adapters.factors(plain).values():
        b.data.zero_()
    assert_close(predicted(plain, states), base)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_losses_are_those_of_separate_passes_and_so_are_their_gradients(prediction, masked):
    """Two pictures, two captions each: against a pass a picture and caption, through two models. Masks weight
    the ordinary loss alone."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 16, 16, generator=generator).to(DEVICE)
    states = torch.randn(6, 77, 32, generator=generator).to(DEVICE)
    base_states = torch.randn(3, 77, 32, generator=generator).to(DEVICE)
    masks = torch.rand(2, 1, 16, 16, generator=generator).to(DEVICE) if masked else None
    timesteps = torch.tensor([100, 800], device=DEVICE)
    preservation = losses.Preservation(1.0, 1, 2, 10, base_states)
    captions = torch.tensor([[0, 2], [1, 0]], device=DEVICE)
    numbers, bases = preservation.texts(captions)
    assert numbers.tolist() == [10, 11, 12, 10]

    unet = fused_unet()
    inputs = scheduler, latents, noise, timesteps
    found = losses.preserving_losses(unet, *inputs, states, bases, masks)

    base = fused_unet()
    for _, b in adapters.factors(base).values():
        b.data.zero_()
    noisy = scheduler.add_noise(latents, noise, timesteps)
    ordinary = losses.diffusion_loss(unet, *inputs, states[:2], masks)
    held = torch.zeros(2, device=DEVICE)
    for picture in range(2):
        for place in range(2):
            one = noisy[picture : picture + 1], timesteps[picture : picture + 1]
            row = 2 + 2 * place + picture
            caption = captions[picture, place]
            with torch.no_grad():
                was = base(*one, base_states[caption : caption + 1]).sample
            now = unet(*one, states[row : row + 1]).sample
            held[picture] += (now - was).square().mean() / 2
    assert_close(found[0], ordinary)
    assert_close(found[1], held)
    assert held.min() > 1e-4
    pairs = found, (ordinary, held)
    both = [gradients(own.mean() + 4 * other.mean(), unet) for own, other in pairs]
    for one, other in zip(*both, strict=True):
        assert_close(one, other, 1e-3)


def test_captions_are_drawn_for_each_sample_and_shift_no_noise():
    def drawn(preservation):
        made = samples.Samples([0, 1, 2], 7, lambda _: (4, 8, 8), 1000, 2, 1, 0, preservation)
        return [made.micro_batch(number) for number in range(50)], made.probes([3, 4])

    batches, probes = drawn(losses.Preservation(1.0, 1, 2, 3, torch.zeros(5, 77, 32)))
    plain, plain_probes = drawn(None)
    for (_, with_captions), (_, without) in zip(batches, plain, strict=True):
        for one, other in zip(with_captions, without, strict=True):
            assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])
            assert one[2] == other[2]
            assert len(set(one[3])) == 2 and len(other[3]) == 0
    seen = [tuple(one[3]) for _, draws in batches for one in draws]
    assert {number for pair in seen for number in pair} == set(range(5))
    assert len(set(seen)) > 15  # of the 20 pairs
    for (_, one), (_, other) in zip(probes, plain_probes, strict=True):
        assert np.array_equal(one[1], other[1]) and one[2] == other[2]


def tiny(model, data, folder, **changes):
    config = TINY_RUN | dict(base_model=model, data_dir=data, output_dir=folder) | changes
    run("train.py", *options(**config))
    log = folder / "lora_weights_rank_32" / "log.jsonl"
    key = "validation_preservation_loss"
    return [row[key] for row in map(json.loads, log.open()) if key in row]


@pytest.mark.parametrize("train_text_encoder", [True, False])
def test_a_run_is_held_to_the_base_model(tiny_model, processed_data, tmp_path, train_text_encoder):
    """Nothing has moved at the start; a heavy weight lets it move less than a light one."""
    how = dict(
        preservation_captions=CAPTIONS, preservation_per_picture=2, max_steps=30, validate_every=30,
        train_text_encoder=train_text_encoder,
    )  # fmt: skip
    light, heavy = (
        tiny(tiny_model, processed_data, tmp_path / str(weight), preservation_weight=weight, **how)
        for weight in (1e-6, 100)
    )
    assert len(light) == len(heavy) == 2
    assert max(light[0], heavy[0]) < 1e-9
    assert 1e-6 < heavy[1] < 0.5 * light[1]


def test_in_one_step_of_so_many(tiny_model, processed_data, tmp_path, monkeypatch):
    """The first, third and fifth of six; with a weight of zero the captions change nothing."""
    training = []

    def recorded(name, loss):
        def record(*inputs):
            if torch.is_grad_enabled():
                training.append(name)
            return loss(*inputs)

        return record

    for name in ("diffusion_loss", "preserving_losses"):
        monkeypatch.setattr(micro_step, name, recorded(name, getattr(losses, name)))
    config = TINY_RUN | dict(base_model=tiny_model, data_dir=processed_data, output_dir=tmp_path,
                             preservation_captions=CAPTIONS, preservation_weight=1)  # fmt: skip
    done = call("train.py", *options(**config, preservation_every=2))
    assert done.returncode == 0, done.stderr
    assert training == ["preserving_losses", "diffusion_loss"] * 3


@pytest.mark.parametrize(
    "variant", [dict(dora=True), dict(preservation_weight=4, preservation_captions=CAPTIONS)]
)
def test_recomputing_changes_nothing(tiny_model, processed_data, tmp_path, variant):
    """The base model's pass comes between the adapted one and its recomputation."""
    for recompute in (True, False):
        folder = tmp_path / str(recompute)
        tiny(tiny_model, processed_data, folder, gradient_checkpointing=recompute, **variant)
    one, two = weights(tmp_path / "True"), weights(tmp_path / "False")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_captions_without_a_weight_change_nothing(tiny_model, processed_data, tmp_path, trained):
    assert tiny(tiny_model, processed_data, tmp_path, preservation_captions=CAPTIONS) == []
    one, two = weights(tmp_path), weights(trained)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_no_caption_is_evaluated_with():
    """Neither of inference.py's prompts nor of any list of prompts here; nor is one taught."""
    asked = {prompt for _, prompt in inference.PROMPTS}
    for path in (ROOT / "prompts").glob("*.txt"):
        asked |= {prompt for _, prompt in read_prompts(path)}
    lists = (
        train_experiment_preservation.PRESERVED,
        train_experiment_preservation.DEMO_CONFIG["preservation_captions"],
    )
    for captions in lists:
        assert len(set(captions)) == len(captions) == 16
        assert not set(captions) & asked
        assert sum("raincoat" in caption for caption in captions) == 8
        assert not any("holographic" in caption for caption in captions)
    for caption in lists[1]:
        world.parse(caption)  # in the miniature's words
