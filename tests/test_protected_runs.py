"""Protected runs: against the plain loop, their files, what they measure and what they print."""

import functools
import json
import shutil

import pytest
import torch
from conftest import TINY_RUN, assert_close, assert_one_line, call, options
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from kernel_models import DEVICE, distances, plain_run_of, run_of
from safetensors.torch import load_file
from test_protection import CAPTION, NAME, RIDGE, named_modules, text_layers
from training_runs import kill, training
from transformers import CLIPTextModel

import train
from lib import adapter_files, adapters
from lib.training import micro_step, monitor, parameters, run_folder, setup
from lib.training.protected_prompts import read_protected
from lib.training.protection import Protection


@pytest.fixture(scope="module")
def apart_model(tiny_model, tmp_path_factory):
    """The tiny model, its text encoder's positions nearly alike: so words in other letters than those of the
    protected prompts differ from them in its first layer, as they do in a real one."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("apart") / "model")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    named_modules(encoder, "position_embedding")[0].weight.data *= 0.01
    encoder.save_pretrained(folder / "text_encoder")
    return folder


# ---- a run ------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """A list that gets the Protection of each run of this process."""
    found, make = [], setup.make_protection
    monkeypatch.setattr(setup, "make_protection", lambda *given: found.append(make(*given)) or found[-1])
    return found


def projections_of(protection, folder, config):
    """{component: {layer: P / r}} of what a run trains."""
    parts = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    if not config["train_text_encoder"]:
        del parts["text_encoder"]
    found = {}
    for name, kind in parts.items():
        model = kind.from_pretrained(folder / name)
        targets = (config | dict(unet_targets=config["unet_targets"]))[f"{name}_targets"]
        found[name] = protection.of(n for n, _ in adapters.target_layers(model, targets))
    return found


@pytest.mark.parametrize("trained", [True, False])
def test_a_protected_run_is_the_plain_loop_with_a_projected_a(
    apart_model, processed_data, tmp_path, protected, made, new_precision, trained
):
    if DEVICE.type == "cuda":
        pytest.skip("the miniature is compared there, in half precision")
    how = protected | dict(train_text_encoder=trained, text_encoder_learning_rate=3e-3)
    fast_run = run_of(apart_model, processed_data, tmp_path, **how)
    projections = projections_of(made[0], apart_model, train.CONFIG | how)
    plain = plain_run_of(apart_model, processed_data, **how, projections=projections)
    off, weights = distances(plain, fast_run)
    assert off < 1e-4
    assert weights < 0.02
    for key, weight in plain[1].items():
        if key.endswith(".A"):
            assert_close(fast_run[1][key], weight, 0.02)


def test_accumulation_and_recomputing_change_nothing(
    apart_model, processed_data, tmp_path, protected, gradients_seen, new_precision
):
    """Two micro-steps are one of two images; the base model's pass comes between the adapted one and its recomputation."""
    how = protected | dict(max_steps=1, warmup_steps=0, mixed_precision="no")
    ways = dict(
        accumulated=dict(gradient_accumulation_steps=2),
        together=dict(batch_size=2),
        recomputed=dict(batch_size=2, gradient_checkpointing=True),
    )
    for name, more in ways.items():
        run_of(apart_model, processed_data, tmp_path / name, **how | more)
    accumulated, together, recomputed = gradients_seen
    for one, other, again in zip(accumulated, together, recomputed, strict=True):
        assert other.norm() > 0
        assert_close(one, other, 1e-3)
        assert torch.equal(other, again) or DEVICE.type == "cuda"


def test_the_recipe_computes_what_it_did(tiny_model, processed_data, tmp_path, monkeypatch):
    """No second pass, no projection: the flat vector itself is what is computed with and saved."""
    calls, parts, diffusion_loss = [], [], micro_step.diffusion_loss

    def loss(*given, **named):
        calls.append(named)
        return diffusion_loss(*given, **named)

    monkeypatch.setattr(micro_step, "diffusion_loss", loss)
    finished = run_folder.finished_models
    monkeypatch.setattr(
        run_folder, "finished_models", lambda trained: parts.extend(trained.values()) or finished(trained)
    )
    config = TINY_RUN | dict(base_model=tiny_model, data_dir=processed_data, output_dir=tmp_path, max_steps=2)
    done = call("train.py", *options(**config))
    assert done.returncode == 0, done.stderr
    assert calls and all(named == {} for named in calls)
    assert len(parts) == 2
    assert all(part.projected == [] for part in parts)
    assert all(part.saved().data_ptr() == part.flat.data_ptr() for part in parts)
    assert "protected" not in done.stdout and "keys and values" not in done.stdout
    record = json.loads((tmp_path / NAME / "config.json").read_text())
    assert record["protection"] is None


def noting_raw(function, notes):
    """`function`, which is called with what is trained, after A and B as the optimizer has them were noted."""

    def noted(*given):
        [trained] = [x for x in given if isinstance(x, dict) and isinstance(x.get("unet"), parameters.LoraParameters)]
        found = {}
        for name, part in trained.items():
            parameters.set_views(part.parameters, part.flat.data.clone())
            pairs = adapters.factors(part.model).items()
            found[name] = {layer: [w.detach().clone() for w in pair] for layer, pair in pairs}
            parameters.set_views(part.parameters, part.working)
        notes.append(found)
        return function(*given)

    return noted


@pytest.fixture(scope="module")
def whole(apart_model, processed_data, tmp_path_factory, protected):
    """A protected run that is over: its folder, what it said, its Protection, and the A and B that the optimizer had
    at the snapshot and at the end, [{component: {layer: (A, B)}}]."""
    folder, raw, made = tmp_path_factory.mktemp("whole"), [], []
    config = (
        TINY_RUN
        | protected
        | dict(
            base_model=apart_model,
            data_dir=processed_data,
            output_dir=folder,
            max_steps=60,
            log_every=20,
            snapshot_every=30,
            validate_every=100,
            unet_learning_rate=3e-3,
            text_encoder_learning_rate=1e-2,
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        make = setup.make_protection
        patch.setattr(setup, "make_protection", lambda *given: made.append(make(*given)) or made[-1])
        for place, name in ((run_folder, "finished_models"), (monitor, "write_snapshot")):
            patch.setattr(place, name, noting_raw(getattr(place, name), raw))
        done = call("train.py", *options(**config))
    assert done.returncode == 0, done.stderr
    return folder / NAME, done.stdout, made[0], raw


def test_the_file_holds_a_times_its_projection(whole, apart_model):
    """In diffusers' format and kohya's, snapshots too: an ordinary LoRA, which needs nothing when it is drawn with."""
    folder, _, made, raw = whole
    places = {folder / "snapshots" / "step_000030": 1e-3, folder: 0}  # and their rounding
    models = {component: model_of(apart_model, component) for component in raw[0]}

    def factors_of(path):
        """{(component, layer): (A, B)} as inference.py reads them."""
        found = adapter_files.read_adapter(path)
        return {
            (component, layer): pair
            for component, layers in found.factors.items()
            for layer, pair in adapters.match_layers(
                layers, models[component], found.targets[component], path, component
            ).items()
        }

    for (place, rounding), found in zip(places.items(), raw, strict=True):
        read = factors_of(place)
        assert len(read) == sum(map(len, found.values())) == 8 + 4
        for component, layers in found.items():
            projections = made.of(layers)
            for layer, (a, b) in layers.items():
                expected = a @ projections[layer]
                assert (expected - a).norm() > 0.1 * a.norm()
                assert_close(read[component, layer][0], expected, rounding + 1e-5)
                assert_close(read[component, layer][1], b, rounding)
    kohya = factors_of(folder / f"{NAME}.safetensors")
    assert kohya.keys() == read.keys()
    for key, pair in read.items():  # kohya's is in half precision
        assert all(torch.equal(x.half().float(), y) for x, y in zip(pair, kohya[key], strict=True))

    keys = load_file(folder / adapter_files.WEIGHTS).keys()
    assert {key.rpartition(".lora_")[2] for key in keys} == {"A.weight", "B.weight"}
    assert sum(key.startswith("unet.") and ".attn2.to_" in key for key in keys) == 16
    pipeline = StableDiffusionPipeline.from_pretrained(apart_model, safety_checker=None)
    pipeline.load_lora_weights(folder, weight_name=adapter_files.WEIGHTS)
    loaded = [w for m in (pipeline.unet, pipeline.text_encoder) for name, w in m.named_parameters() if "lora_" in name]
    assert len(loaded) == len(keys) == 24 and all(w.count_nonzero() for w in loaded)


def model_of(folder, component):
    kind = dict(unet=UNet2DConditionModel, text_encoder=CLIPTextModel)[component]
    return kind.from_pretrained(folder / component)


def test_what_a_run_says_of_the_difference_is_what_the_file_makes(whole, apart_model):
    """In half precision, put into the weights of the base model: text states, keys and values."""
    folder, said, made, _ = whole
    record = json.loads((folder / "config.json").read_text())["protection"]
    differences = record["differences"]
    adapter = adapter_files.read_adapter(folder)
    for layers in adapter.factors.values():
        for layer, pair in layers.items():
            layers[layer] = [weight.half().float() for weight in pair]
    ids = functools.partial(setup.prompt_ids, setup.base_tokenizer(apart_model))
    prompts = dict(listed=made.prompts.listed, held_out=made.prompts.held_out, concept=[CAPTION])
    read = {}
    for state in ("before", "after"):
        models = {component: model_of(apart_model, component) for component in adapter.factors}
        if state == "after":
            adapters.Applied(adapter, models)
        for kind, texts in prompts.items():
            with torch.no_grad():
                states = models["text_encoder"](ids(texts))[0]
                layers = adapters.target_layers(models["unet"], ("attn2.to_k", "attn2.to_v"))
                read[state, kind] = [states, *(layer(states) for _, layer in layers)]
    for kind in prompts:
        worst = [
            ((after - before).norm(dim=(1, 2)) / before.norm(dim=(1, 2))).max().item()
            for before, after in zip(read["before", kind], read["after", kind], strict=True)
        ]
        rounding = 0.1 if DEVICE.type == "cuda" else 0.02  # a GPU computes the report in half precision
        assert differences[kind]["text_states"] == pytest.approx(worst[0], rel=rounding)
        assert differences[kind]["keys_values"] == pytest.approx(max(worst[1:]), rel=rounding)
    for key in ("text_states", "keys_values"):
        found = [differences[kind][key] for kind in ("listed", "held_out", "concept")]
        assert 0 < max(found[:2]) < 0.2 * found[2], found
    shown = "; ".join(said.splitlines()[-3:])
    listed, others, concept = (f"{differences[kind]['keys_values']:.1%}" for kind in prompts)
    line = (
        f"keys and values change by at most: listed prompts {listed}, others like them {others}, the concept {concept}"
    )
    assert line in shown
    card = (folder / "README.md").read_text()
    similar = f"by at most {others} for {record['held_out']} similar prompts that were not listed"
    assert f"by at most {listed} for a listed prompt, {similar}, and by {concept} for the concept" in card
    assert "| loss | of the prediction at guidance uniform from 1 to 3 |" in card
    # And what is left of the prompts before anything was trained.
    assert record["left"] == {reader: pytest.approx(shares) for reader, shares in made.left.items()}
    assert (record["noun"], record["listed"], record["held_out"]) == (
        "raincoat",
        len(made.prompts.listed),
        len(made.prompts.held_out),
    )
    assert record["sha256"] == made.prompts.sha256
    for text in (made.table(), made.prompts.text()):
        assert text in said


@pytest.mark.parametrize("half_holds_it", [False, True])
def test_half_precision_is_what_is_measured(apart_model, protected, half_holds_it):
    """What it cannot hold is no difference; in float32 it would be one."""
    encoder, unet = (model_of(apart_model, component) for component in ("text_encoder", "unet"))
    ids = functools.partial(setup.prompt_ids, setup.base_tokenizer(apart_model))
    prompts = read_protected(protected["protected_prompts"], None, [CAPTION])
    made = Protection(encoder, text_layers(encoder), ids, prompts, RIDGE)
    trained = {}
    for name, model in dict(unet=unet, text_encoder=encoder).items():
        targets = (train.CONFIG | protected)[f"{name}_targets"]
        projections = made.of(layer for layer, _ in adapters.target_layers(model, targets))
        trained[name] = part = parameters.add_lora_parameters(
            model, 4, 4.0, targets, 1e-3, "cpu", torch.float32, projections=projections
        )
        for a, b in adapters.factors(model).values():
            a.data *= 1e4
            b.data.fill_(2.0**-25 if not half_holds_it else 2.0**-23)
        parameters.set_views(part.parameters, part.saved())
    found = [value for of in made.differences(trained).values() for value in of.values()]
    assert min(found) > 1e-5 if half_holds_it else max(found) == 0, found


def test_a_list_of_another_content_is_not_gone_on_with(apart_model, processed_data, tmp_path, protected):
    path = shutil.copy(protected["protected_prompts"], tmp_path / "list.txt")
    config = (
        TINY_RUN
        | protected
        | dict(
            base_model=apart_model,
            data_dir=processed_data,
            output_dir=tmp_path,
            checkpoint_every=2,
            protected_prompts=path,
        )
    )
    assert training(tmp_path, config, {4: kill}).returncode == -9
    text = path.read_text()
    path.write_text(text.replace("a coat in a", "a cat near a"))
    assert_one_line(training(tmp_path, config), "protected prompts", "--no-resume")
    path.write_text("# a comment more\n" + text)
    done = training(tmp_path, config)
    assert done.returncode == 0 and f"continuing {NAME} after step 4" in done.stdout
