"""The scores against stored figures and against torchmetrics, which implements them anew."""

import numpy as np
import pytest
import torch
from conftest import COSINE, assert_close, picture
from PIL import Image
from torchmetrics.functional.image.lpips import _LPIPS
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import CLIPModel, CLIPProcessor

from lib.evaluation import verdicts
from lib.evaluation.metrics import clip_scores, lpips_distances, scores
from lib.evaluation.metrics.similarity import concept_similarity, kernel_distance, nearest_training
from lib.evaluation.statistics import UNCLEAR


@pytest.fixture(scope="module")
def clip(tiny_clip):
    return clip_scores.load_clip(tiny_clip)


def test_lpips_of_pictures_made_from_seeds():
    # Stored from lpips 0.1.4 with the shipped AlexNet layers; the test below checks the same
    # layers under an independent implementation.
    images = [picture(seed, (96, 96)) for seed in range(4)]
    distances = lpips_distances.lpips_distances(images[:2], images[2:])
    np.testing.assert_allclose(distances, [0.4978, 0.4416], atol=1e-3)
    assert lpips_distances.lpips_distances(images[:1], images[:1]) == 0


def test_lpips_agrees_with_torchmetrics():
    theirs = _LPIPS(pretrained=True, net="alex", pnet_rand=True, eval_mode=True)
    theirs.net.load_state_dict(lpips_distances.lpips_model().net.state_dict())
    images = [picture(seed, (80, 112)) for seed in range(6)]
    tensors = [torch.from_numpy(np.array(i)).permute(2, 0, 1)[None] / 127.5 - 1 for i in images]
    expected = [theirs(a, b).item() for a, b in zip(tensors[:3], tensors[3:], strict=True)]
    ours = lpips_distances.lpips_distances(images[:3], images[3:])
    assert_close(ours, expected)


def test_lpips_refuses_what_it_would_have_to_resize():
    with pytest.raises(ValueError, match="does not resize"):
        lpips_distances.lpips_distances([picture(1, (64, 64))], [picture(1, (64, 72))])
    with pytest.raises(ValueError, match="does not resize"):
        lpips_distances.pairwise_lpips([picture(1, (64, 64)), picture(1, (64, 72))])
    with pytest.raises(ValueError, match="against"):
        lpips_distances.lpips_distances([picture(1)], [])


def test_clip_score_is_the_cosine_of_the_models_own_embeddings(clip, tiny_clip):
    model, processor = (CLIPModel.from_pretrained(tiny_clip), CLIPProcessor.from_pretrained(tiny_clip))
    images = [picture(seed, size) for seed, size in enumerate([(64, 64), (90, 90), (40, 40)])]
    prompts = ["a raincoat", "a cat sitting on a couch", "a dress"]
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**inputs)
    expected = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    scores = clip_scores.clip_scores(images, prompts, clip)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=COSINE)
    assert np.abs(scores).max() <= 1


def test_clip_score_does_not_depend_on_its_neighbours(clip):
    images = [picture(seed) for seed in range(3)]
    together = clip_scores.clip_scores(images, ["one", "a much longer prompt", "x"], clip)
    alone = clip_scores.clip_scores(images[1:2], ["a much longer prompt"], clip)
    np.testing.assert_allclose(together[1], alone[0], rtol=0, atol=COSINE)


def test_a_prompt_too_long_is_refused_not_cut(clip):
    with pytest.raises(ValueError, match="tokens"):
        clip_scores.clip_scores([picture(1)], ["word " * 80], clip)


def test_concept_similarity_and_nearest():
    training = np.eye(3, dtype=np.float32)
    mirrored = np.roll(training, 1, axis=0)
    embeddings = np.array([[1, 0, 0], [0.6, 0.8, 0]], np.float32)
    assert_close(concept_similarity(embeddings, training), [1 / 3, 1.4 / 3], 1e-6)
    similarity, index = nearest_training(embeddings[1:], training, np.zeros((3, 3)))
    assert (similarity[0], index[0]) == (np.float32(0.8), 1)
    similarity, index = nearest_training(embeddings[1:], np.zeros((3, 3)), mirrored)
    assert (similarity[0], index[0]) == (np.float32(0.8), 2)


def test_nothing_is_unpickled(monkeypatch, clip):
    def refuse(*arguments, **options):
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(torch, "load", refuse)
    lpips_distances.lpips_model.cache_clear()
    assert lpips_distances.lpips_distances([picture(1)], [picture(2)]) > 0
    clip_scores.clip_scores([picture(1)], ["a raincoat"], clip)


def training_set(count):
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((count, 8)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    names = [f"images/image_{number:02}.png" for number in range(count)]
    return scores.TrainingSet(names, [], ("x", "described"), embeddings, embeddings[:, ::-1].copy())


def test_held_out_pictures_are_those_of_the_runs_own_data():
    """Every data set names its images alike: another set's held-out names say nothing here."""
    training = training_set(4)
    adapter = dict(held_out=["images/image_01.png"], metadata=dict(data_sha256="x"))
    assert training.trained_on(adapter) == [0, 2, 3]
    assert training.trained_on(adapter | dict(metadata=dict(data_sha256="described"))) == [0, 2, 3]
    assert training.trained_on(adapter | dict(metadata=dict(data_sha256="other"))) == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_few_training_pictures_are_no_traceback(count):
    prompts = [("success", "a coat"), ("unrelated", "a cat")]
    rng = np.random.default_rng(1)
    drawn = rng.standard_normal((2, 4, 8)).astype(np.float32)
    drawn /= np.linalg.norm(drawn, axis=2, keepdims=True)
    rows = [
        dict(
            prompt=prompt,
            category=category,
            seed=seed,
            model=model,
            clip=0.3 + 0.01 * seed,
            lpips=0.3,
            concept_similarity=0.4 + 0.01 * seed,
        )
        for category, prompt in prompts
        for seed in range(4)
        for model in ("base", "lora")
    ]
    pairs = np.ones((2, 4, 4)) - np.eye(4)
    run = scores.Run("run", None, dict(metadata=dict(data_sha256="x")), [], [], rows=rows, pairs=pairs)
    run.embeddings = dict(base=drawn, lora=drawn[:, ::-1], lora_mirrored=drawn)
    margins = dict(concept_similarity=0.02, clip=0.02, change=0.05, variety=0.25, copies=1 / 3)
    summary = verdicts.analyse([run], prompts, pairs, margins, training_set(count))
    answers = {v["question"]: v["answer"] for v in summary["verdicts"]}
    assert answers["memorised"] == UNCLEAR
    assert ("kernel_distance" in summary["categories"]["success"]) == (count > 1)


@pytest.mark.parametrize("at_once", [8, 3])
def test_the_lpips_ceiling_is_the_mean_of_all_pairs(at_once, monkeypatch):
    monkeypatch.setattr(lpips_distances, "AT_ONCE", at_once)
    images = [picture(seed) for seed in range(4)]
    pairs = lpips_distances.pairwise_lpips(images)
    np.testing.assert_array_equal(pairs, pairs.T)
    for i in range(4):
        for j in range(4):
            expected = lpips_distances.lpips_distances([images[i]], [images[j]])[0]
            assert pairs[i, j] == pytest.approx(expected, abs=1e-5)
    every = [pairs[i, j] for i in range(4) for j in range(i)]
    assert lpips_distances.pair_mean(pairs) == pytest.approx(np.mean(every))
    assert np.isnan(lpips_distances.pair_mean(lpips_distances.pairwise_lpips(images[:1])))


def unit(rng, count, shift):
    points = rng.standard_normal((count, 32)).astype(np.float32) + shift
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def test_kernel_distance_is_the_unbiased_one():
    rng = np.random.default_rng(5)
    a, b = unit(rng, 20, 0.3), unit(rng, 20, 0.6)

    def kernel(x, y):
        return (x @ y.T + 1) ** 3

    def within(x):
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    expected = within(a) + within(b) - 2 * kernel(a, b).mean()
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-3)
    same = [kernel_distance(unit(rng, 16, 0.3), unit(rng, 24, 0.3)) for _ in range(30)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 30**0.5  # 0 on average for equal sets
    torch.manual_seed(1)
    before = torch.rand(1)
    torch.manual_seed(1)
    kernel_distance(a, b)
    assert torch.rand(1) == before  # it disturbs nobody's random numbers


def test_kernel_distance_agrees_with_torchmetrics():
    rng = np.random.default_rng(6)
    a, b = unit(rng, 12, 0.3), unit(rng, 9, 0.6)
    theirs = KernelInceptionDistance(torch.nn.Identity(), subsets=50, subset_size=9)
    for real, features in ((True, b), (False, a)):
        theirs.update(torch.from_numpy(features * 32**0.5), real=real)
    torch.manual_seed(0)
    assert kernel_distance(a, b) == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_warnings_for_flat_and_shared_pictures():
    prompts, seeds = [("success", "x")], [1, 2]
    good = [picture(1), picture(2)]
    one = scores.Run("one", None, {}, good, [picture(3), Image.new("RGB", (64, 64))])
    two = scores.Run("two", None, {}, good, [picture(3), picture(5)])
    scores.score_runs([one, two], prompts, seeds, scores.Scorers("cpu"))
    found = scores.image_warnings([one, two], prompts, seeds)
    assert len(found) == 2
    assert "flat colour" in found[0]
    assert "seed 2" in found[0]
    assert "one and two have the same image" in found[1]
