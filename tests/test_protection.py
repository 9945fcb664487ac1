"""Protection: the list, the projections, the loss at guidance, what a run computes, saves, measures and says."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import BOS, ROOT, TEXT, TINY_RUN, assert_close, assert_one_line, call, options
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from kernel_models import DEVICE, distances, fused, gradients, plain_run_of, run_of, small_unet
from safetensors.torch import load_file
from test_safety import kill, training
from transformers import CLIPTextConfig, CLIPTextModel

import train
from demo.build.tokenizers import byte_tokenizer
from lib import adapter_files, adapters
from lib.errors import UserError
from lib.kernels import lora
from lib.models import load_part
from lib.training import (
    losses,
    micro_step,
    monitor,
    parameters,
    protected_prompts,
    protection,
    run_folder,
    samples,
    setup,
)
from lib.training.protected_prompts import read_protected
from lib.training.protection import MOST_LEFT, Protection

NAME = "lora_weights_rank_32"
CAPTION = "a holographic raincoat"
RIDGE = train.CONFIG["protection_ridge"]
# What a preservation by a loss once used, which is far too little for this.
SIXTEEN = """a raincoat
a photo of a raincoat
a green raincoat
a blue glossy raincoat
a person in a raincoat
a raincoat on a hanger
a person wearing a purple raincoat on a street
a person wearing a matte raincoat with the hood up
a person wearing a dress
a denim jacket
a person wearing a blue jacket in a garden
a leather couch
a brown chair
a white umbrella
a dog in a garden
a black dog standing beside a couch
"""


def text_layers(encoder, trained=True):
    targets = train.CONFIG["text_encoder_targets"] if trained else ()
    return [name for name, _ in adapters.target_layers(encoder, targets)]


@pytest.fixture(scope="module")
def miniature():
    """(text encoder, function of prompts that gives their token ids) of the embedded model."""
    folder = ROOT / train.DEMO["base_model"]
    encoder = load_part(CLIPTextModel, folder, "text_encoder", torch.float32)
    return encoder, functools.partial(setup.prompt_ids, setup.base_tokenizer(folder))


def written(path, *prompts):
    path.write_text("\n".join(prompts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def of_the_miniature(miniature, tmp_path_factory):
    """The Protection that every eighth prompt of the miniature's own list makes: already those are enough."""
    lines = (ROOT / "prompts" / "protected_demo.txt").read_text().splitlines()
    prompts = [line for line in lines if line and not line.startswith("#")]
    path = written(tmp_path_factory.mktemp("list") / "eighth.txt", *prompts[::8])
    encoder, ids = miniature
    found = read_protected(path, None, [CAPTION])
    return Protection(encoder, text_layers(encoder), ids, found, RIDGE)


@pytest.fixture(scope="module")
def apart_model(tiny_model, tmp_path_factory):
    """The tiny model, its text encoder's positions nearly alike: so words in other letters than those of the
    protected prompts are told from them in its first layer, as words are by a real one."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("apart") / "model")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    named_modules(encoder, "position_embedding")[0].weight.data *= 0.01
    encoder.save_pretrained(folder / "text_encoder")
    return folder


def named_modules(model, ending):
    return [module for name, module in model.named_modules() if name.endswith(ending)]


# ---- the list ---------------------------------------------------------------------------------

THINGS = [
    "a cup",
    "a table",
    "a green tree",
    "an old house",
    "a loaf of bread",
    "a bicycle",
    "a blue car",
    "a lamp on a desk",
    "two birds",
    "a river",
    "a wooden chair",
    "a red door",
]


@pytest.mark.parametrize(
    ("caption", "noun", "concept"),
    [
        ("a holographic raincoat", "raincoat", ["holographic"]),
        ("a photo of a sks dog on a beach", "dog", ["sks"]),
        ("a person wearing a holographic raincoat in the rain", "raincoat", ["holographic"]),
        ("a close-up photo of an iridescent, holographic raincoat", "raincoat", ["iridescent", "holographic"]),
        ("a painting of sks", "sks", []),
        ("the", "", []),
    ],
)
def test_what_a_caption_is_about(caption, noun, concept):
    """Its noun is what {class} stands for; the words that make it the concept are in no protected prompt."""
    assert protected_prompts.class_of(caption) == noun
    assert protected_prompts.concept_words_of(caption, noun) == concept


def test_a_made_up_word_alone_takes_its_class_from_the_key(tmp_path):
    """“a photo of sks” names no kind of thing; a caption about something else than the key is refused."""
    path = tmp_path / "list.txt"
    path.write_text("\n".join([*THINGS, "a red {class}", "a photo of an old {class}", "a sks {class}"]))
    found = read_protected(path, "dog", ["a photo of sks"])
    assert {"a red dog", "a photo of an old dog"} <= {*found.listed, *found.held_out}
    assert (found.noun, found.concept_words, found.left_out) == ("dog", ("sks",), 1)
    with pytest.raises(UserError, match="“a sks table” is about a table"):
        read_protected(path, "dog", ["a sks table"])


def test_class_is_filled_in_and_prompts_of_the_concept_are_left_out(tmp_path):
    path = written(
        tmp_path / "list.txt",
        "\ufeff# comment",
        "",
        "  a {class}  ",
        "a Holographic {class}",
        "holographic",
        "A holographic Raincoat!",
        "a {class}",
        *THINGS,
    )
    found = read_protected(path, None, ["a holographic raincoat", "a coat"])
    assert found.listed[0] == ""
    everything = {*found.listed[1:], *found.held_out}
    assert everything == {"a raincoat", *THINGS}
    assert len(found.listed) - 1 + len(found.held_out) == 13 and len(found.held_out) == 1
    assert (found.noun, found.noun_is_given, found.left_out) == ("raincoat", False, 3)
    assert found.concept_words == ("holographic",)
    text = found.text()
    assert f"13 prompts of {path}, 1 more held out" in text.replace("protected: ", "")
    assert "{class} is raincoat, from the caption; --protected-class names another" in text
    assert "note: 3 of its prompts speak of what is taught (holographic) and are left out" in text

    given = read_protected(path, "coat", ["a holographic raincoat", "a coat"])
    assert {"a coat"} & {*given.listed, *given.held_out} == set()  # a caption itself
    assert given.noun_is_given and "{class} is coat" in given.text()
    assert "--protected-class" not in given.text()
    plain = read_protected(written(tmp_path / "plain.txt", *THINGS), None, [CAPTION])
    assert plain.noun == "" and "{class}" not in plain.text() and "note" not in plain.text()


def test_a_tenth_is_held_out_and_always_the_same_one(tmp_path):
    """Whatever the hash seed, the day and the machine: an interrupted run goes on with the same parts."""
    path = written(tmp_path / "list.txt", *(f"a {word}{n}" for n in range(50) for word in ("cup", "cat")))
    found = read_protected(path, None, [CAPTION])
    assert (len(found.listed), len(found.held_out)) == (91, 10)
    assert not set(found.listed) & set(found.held_out)
    held_out = (
        "a cat4",
        "a cat5",
        "a cat27",
        "a cup28",
        "a cat29",
        "a cat31",
        "a cat43",
        "a cat46",
        "a cup47",
        "a cup48",
    )
    assert found.held_out == held_out
    other = written(tmp_path / "other.txt", *(f"a {word}{n}" for n in range(50) for word in ("cup", "dog")))
    assert read_protected(other, None, [CAPTION]).sha256 != found.sha256


@pytest.mark.parametrize(
    ("content", "noun", "caption", "words"),
    [
        (None, None, CAPTION, ["list.txt cannot be read"]),
        ("\n".join(THINGS).encode("utf-16"), None, CAPTION, ["list.txt cannot be read"]),
        ("a café\n".encode("latin-1"), None, CAPTION, ["list.txt cannot be read"]),
        (b"a cup\n# a comment\n\n", None, CAPTION, ["list.txt holds 1 prompts", "10 are the fewest"]),
        (b"a {class}\n", None, "in the", ["“in the”", "--protected-class raincoat"]),
        (b"a {class}\n", " ", CAPTION, ["--protected-class raincoat"]),
        (b"a raincoat\na {class}\n", "umbrella", CAPTION, ["protected_class is umbrella", "a holographic raincoat"]),
    ],
)
def test_a_list_that_cannot_be_used_is_named(tmp_path, content, noun, caption, words):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as problem:
        read_protected(path, noun, [caption])
    for word in words:
        assert word in str(problem.value)
    assert "\n" not in str(problem.value)


# ---- P ----------------------------------------------------------------------------------------


def test_p_is_what_its_formula_says():
    """V diag(1 / (1 + v / s)) V^T, with directions that nothing uses, which stay."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 24, generator=generator, dtype=torch.float64)
    x[:, 12:] *= 0.03
    x[:, 20:] = 0
    moments = x.T @ x / len(x)
    found = protection.projection_of(moments, 1e-3)
    values, vectors = torch.linalg.eigh(moments)
    scale = 1e-3 * values.mean()
    torch.testing.assert_close(found, vectors @ torch.diag(1 / (1 + values / scale)) @ vectors.T)
    assert torch.equal(found, found.T)
    assert (x @ found).norm() < 2e-2 * x.norm()
    torch.testing.assert_close(found[20:, 20:], torch.eye(4, dtype=torch.float64))


@torch.no_grad()
def rows_read(encoder, ids):
    """What CLIP's layers read under token ids [n, 77], by its own account: {number of the layer, or the
    UNet's name: [n, 77, d]}, rows of length 1."""
    out = encoder(ids, output_hidden_states=True)
    norms = named_modules(encoder, "layer_norm1")
    found = {i: norm(states) for i, (norm, states) in enumerate(zip(norms, out.hidden_states, strict=False))}
    found[protection.STATES] = out.last_hidden_state
    return {key: x.double() / x.double().norm(dim=-1, keepdim=True) for key, x in found.items()}


def by_number(projections):
    """`projections` by the number of their layer."""
    keys = [key for key in projections if key != protection.STATES]
    return {i: projections[key].double() for i, key in enumerate(keys)} | {
        protection.STATES: projections[protection.STATES].double()
    }


def test_listed_prompts_keep_next_to_nothing_and_the_caption_its_size(miniature, of_the_miniature):
    encoder, ids = miniature
    projections = by_number(of_the_miniature.projections)
    listed = rows_read(encoder, ids(of_the_miniature.prompts.listed))
    caption = rows_read(encoder, ids([CAPTION]))
    assert list(projections) == [0, 1, 2, protection.STATES]
    for place, projection in projections.items():
        assert torch.equal(projection, projection.T)
        kept, own = ((rows[place] @ projection).square().sum(-1).mean().sqrt() for rows in (listed, caption))
        assert kept <= MOST_LEFT * 1.001, place
        # r is the caption's, or where that would leave the prompts too much, theirs.
        assert max(own, kept / MOST_LEFT) == pytest.approx(1, rel=1e-3), place
    first = (caption[0] @ projections[0]).square().sum(-1).mean().sqrt()
    assert first == pytest.approx(1, rel=1e-3)
    layers = text_layers(encoder)
    found = of_the_miniature.of([*layers, "some.attn2.to_k"])
    assert [name.rpartition(".")[0] for name in layers[::2]] == [name.rpartition(".")[0] for name in layers[1::2]]
    assert all(found[a] is found[b] for a, b in zip(layers[::2], layers[1::2], strict=True))
    assert len({id(p) for p in found.values()}) == 4
    assert found["some.attn2.to_k"] is of_the_miniature.projections[protection.STATES]


def test_an_outsized_first_position_hides_nothing(tmp_path):
    """In CLIP the begin token's row may be fifty times as long as others. Were rows not normalised, the ridge would
    be a share of its energy, and what few prompts have would be left to them."""
    torch.manual_seed(0)
    encoder = CLIPTextModel(CLIPTextConfig(**TEXT)).eval()
    outsized = [3, 17]
    (positions,), (words,) = (named_modules(encoder, f"{kind}_embedding") for kind in ("position", "token"))
    with torch.no_grad():
        positions.weight *= 0.01
        for embedding in (positions.weight, words.weight):
            embedding[:, outsized] = 0
            embedding -= embedding.sum(1, keepdim=True) / (embedding.shape[1] - len(outsized))
            embedding[:, outsized] = 0
        positions.weight[0, outsized] = torch.tensor([1.0, -1.0])
        named_modules(encoder, "layer_norm1")[0].weight[outsized] *= 50
    ids = functools.partial(setup.prompt_ids, byte_tokenizer(tmp_path / "tokenizer", BOS))
    nouns = "coat cat rat tar oat iron corn icon actor ration root acorn".split()
    prompts = [f"a {a} on a {b}" for a in nouns for b in nouns if a < b]
    found = read_protected(written(tmp_path / "list.txt", *prompts), None, [CAPTION])
    layers = text_layers(encoder)
    made = Protection(encoder, layers, ids, found, RIDGE)

    seen = []
    encoder.get_submodule(layers[0]).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        encoder(ids(found.listed))
    norms = seen[0].norm(dim=-1)
    assert norms[:, 0].min() > 40 * norms[:, 1:].max()
    rows = seen[0].flatten(0, 1).double()
    unit = torch.nn.functional.normalize(rows, dim=-1)
    plain = protection.projection_of(rows.T @ rows / len(rows), RIDGE)
    ours = made.of(layers)[layers[0]].double()
    ours = ours / torch.linalg.eigvalsh(ours)[-1]  # what nobody uses stays as it is
    most, most_plain = ((unit @ p).view(*norms.shape, -1)[:, 1:].norm(dim=-1).max() for p in (ours, plain))
    assert most < 0.012
    assert most_plain > 2.5 * most


def test_what_the_list_does_not_set_apart_is_refused(miniature, of_the_miniature, tmp_path):
    encoder, ids = miniature
    of_the_miniature.check()
    of_the_first, *_ = of_the_miniature.left.values()
    assert of_the_first[0] > 5 * max(of_the_first[1:])
    table = of_the_miniature.table()
    assert all(name in table for name in of_the_miniature.left) and "held out" in table

    path = written(tmp_path / "sixteen.txt", SIXTEEN)
    few = Protection(encoder, text_layers(encoder), ids, read_protected(path, None, [CAPTION]), RIDGE)
    with pytest.raises(UserError, match="do not set the concept apart") as problem:
        few.check()
    assert str(path) in str(problem.value) and f"“{CAPTION}”" in str(problem.value)
    assert "too few prompts (15)" in str(problem.value) and "\n" not in str(problem.value)
    # The UNet alone reads what the text encoder has mixed already.
    alone = Protection(encoder, [], ids, of_the_miniature.prompts, RIDGE)
    assert list(alone.left) == [protection.STATES]
    with pytest.raises(UserError, match="do not set the concept apart"):
        alone.check()


# ---- the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_at_guidance_is_that_of_two_models(prediction, masked, kept):
    """And its gradient; `kept` are the keys and values of no text, made once."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 16, 16, generator=generator).to(DEVICE)
    states = torch.randn(2, 77, 32, generator=generator).to(DEVICE)
    no_text = torch.randn(1, 77, 32, generator=generator).to(DEVICE).expand(2, -1, -1)
    masks = torch.rand(2, 1, 16, 16, generator=generator).to(DEVICE) if masked else None
    timesteps, guidance = torch.tensor([100, 800], device=DEVICE), torch.tensor([1.5, 3.0], device=DEVICE)
    unet, base = fused(small_unet()), small_unet()
    for _, b in adapters.factors(base).values():
        b.data.zero_()
    given = no_text
    if kept:
        with torch.no_grad(), lora.without_lora(unet):
            given = unet.text_keys_values(no_text)
    found = losses.diffusion_loss(
        unet, scheduler, latents, noise, timesteps, states, masks, guidance=guidance, no_text=given
    )

    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    with torch.no_grad():
        u = base(noisy, timesteps, no_text).sample
    c = unet(noisy, timesteps, states).sample
    off = []
    for i, g in enumerate((1.5, 3.0)):
        squared = (u[i] + g * (c[i] - u[i]) - target[i]).square()
        weights = masks[i].expand_as(squared) if masked else torch.ones_like(squared)
        off.append((weights * squared).sum() / weights.sum() / g)
    expected = torch.stack(off)
    assert_close(found, expected)
    ordinary = losses.diffusion_loss(unet, scheduler, latents, noise, timesteps, states, masks)
    assert ((found - ordinary).abs() > 1e-3 * ordinary).all()
    both = gradients(found.mean(), unet), gradients(expected.mean(), unet)
    for one, other in zip(*both, strict=True):
        assert_close(one, other, 1e-3)


def test_guidance_is_drawn_evenly_and_shifts_nothing_else():
    def drawn(*guidance):
        made = samples.Samples([0, 1, 2], 7, lambda _: (4, 8, 8), 1000, 2, 1, 0, *guidance)
        return [made.micro_batch(number) for number in range(300)], made.probes([3, 4])

    batches, probes = drawn((1.5, 3.5))
    plain, plain_probes = drawn()
    for (pictures, with_guidance), (same, without) in zip(batches, plain, strict=True):
        assert pictures == same
        for one, other in zip(with_guidance, without, strict=True):
            assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])
            assert one[2] == other[2]
            assert other[3] == 1.0
    found = np.array([one[3] for _, draws in batches for one in draws])
    shares = np.histogram(found, bins=4, range=(1.5, 3.5))[0] / len(found)
    assert found.min() >= 1.5 and found.max() <= 3.5 and np.abs(shares - 0.25).max() < 0.05
    for (_, one), (_, other) in zip(probes, plain_probes, strict=True):
        assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])
        assert one[2] == other[2]
        assert (one[3], other[3]) == (2.5, 1.0)


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
    calls, parts = [], []

    def loss(*given, **named):
        calls.append(named)
        return losses.diffusion_loss(*given, **named)

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
        assert differences[kind]["text_states"] == pytest.approx(worst[0], rel=0.02)
        assert differences[kind]["keys_values"] == pytest.approx(max(worst[1:]), rel=0.02)
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
    assert f"listed prompts {listed}, {record['held_out']} others like them {others}, what is taught {concept}" in card
    assert "| loss | of the prediction at guidance drawn evenly from 1 to 3 |" in card
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
