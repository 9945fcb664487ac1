"""Protection: the list, the projections, the loss at guidance, what a run computes, saves, measures and says."""

import functools

import numpy as np
import pytest
import torch
from conftest import BOS, ROOT, TEXT, assert_close
from diffusers import DDPMScheduler
from kernel_models import DEVICE, fused, gradients, small_unet
from transformers import CLIPTextConfig, CLIPTextModel

import train
from demo.build.tokenizers import byte_tokenizer
from lib import adapters
from lib.errors import UserError
from lib.kernels import lora
from lib.models import load_part
from lib.training import micro_step, protection, samples, setup
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


def named_modules(model, ending):
    return [module for name, module in model.named_modules() if name.endswith(ending)]


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
    found = micro_step.diffusion_loss(
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
    ordinary = micro_step.diffusion_loss(unet, scheduler, latents, noise, timesteps, states, masks)
    assert ((found - ordinary).abs() > 1e-3 * ordinary).all()
    both = gradients(found.mean(), unet), gradients(expected.mean(), unet)
    for one, other in zip(*both, strict=True):
        assert_close(one, other, 1e-3)


def test_guidance_is_drawn_evenly_and_shifts_nothing_else():
    def drawn(guidance):
        made = samples.Samples([0, 1, 2], 7, lambda _: (4, 8, 8), 1000, 2, guidance=guidance)
        return [made.micro_batch(number) for number in range(300)], made.probes([3, 4])

    batches, probes = drawn((1.5, 3.5))
    plain, plain_probes = drawn((1.0, 1.0))
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
