"""No evaluation of another adapter, or of other settings, is replaced unasked."""

import json

import pytest

import inference
from lib.errors import UserError
from lib.evaluation import results
from lib.evaluation.metrics.scores import Run

PROMPTS = [("success", "a coat"), ("unrelated", "a cat")]


@pytest.fixture
def saved(tmp_path):
    """A function that saves the evaluation of an adapter as far as it is looked at, and one that evaluates it again."""
    config = inference.CONFIG | dict(score_dir=None)

    def save(name="one", fingerprint="abc", prompts=PROMPTS, seeds=(42, 43), **changes):
        rows = [dict(category=category, prompt=prompt, seed=seed) for category, prompt in prompts for seed in seeds]
        adapter = dict(fingerprint=fingerprint)
        record = dict(run=name, config=config | changes, adapter=adapter, pictures=rows)
        (tmp_path / "metrics.json").write_text(json.dumps(record))

    def again(name="one", fingerprint="abc", prompts=PROMPTS, seeds=(42, 43), **changes):
        run = Run(name, tmp_path, dict(fingerprint=fingerprint), [], [])
        results.check_replaceable([run], config | changes, prompts, list(seeds))

    return save, again


def test_the_same_evaluation_is_replaced(saved):
    save, again = saved
    again()  # nothing is there
    save(lora_scales=[1, 0.5])  # as JSON has a tuple
    again(lora_scales=(0.5, 1.0), batch_size=2, clip_model="other", change_margin=0.1, overwrite=False)
    # Of images from elsewhere, how images are generated decides nothing.
    save(fingerprint=None, score_dir="a,b")
    again(fingerprint=None, score_dir="a,b", steps=3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(name="two", fingerprint="def"), "the evaluation of another adapter, “one”"),
        (dict(fingerprint="def"), "the evaluation of an earlier “one”"),
        (dict(prompts=PROMPTS[:1]), "other prompts"),
        (dict(seeds=(42,)), "seeds 42 to 43 -> 42 to 42"),
        (dict(steps=3), "steps 28 -> 3"),
        (dict(guidance_scale=1.0), "guidance_scale 6.0 -> 1.0"),
        (dict(resolution="512x768"), "resolution 512 -> 512x768"),
        (dict(base_model="other"), "base_model"),
        (dict(snapshots=True), "snapshots False -> True"),
        (dict(lora_scales=(0.5, 1.0)), "lora_scales 1 -> 0.5, 1"),
        (dict(fingerprint=None, score_dir="a,b"), "an earlier “one”"),
    ],
)
def test_any_other_is_kept_and_named(saved, tmp_path, changes, words):
    save, again = saved
    save()
    with pytest.raises(UserError) as error:
        again(**changes)
    message = str(error.value)
    assert words in message and str(tmp_path) in message
    assert "--output-dir" in message and "--overwrite" in message
    again(**changes, overwrite=True)


def name_of(**changes):
    return inference.evaluation_name(inference.CONFIG | changes)


def test_folders_are_named_after_what_is_evaluated(tmp_path):
    """Each of README's ways to evaluate has a folder of its own."""
    names = [
        name_of(),
        name_of(lora_dir="downloads/coat.safetensors"),
        name_of(prompts="my/prompts.txt"),
        name_of(resolution="512x768"),
        name_of(snapshots=True),
        name_of(lora_scales=(0.5, 1.0)),
        name_of(score_dir="images/base, images/lora"),
    ]
    assert names == [
        "lora_weights_rank_32",
        "coat",
        "lora_weights_rank_32_prompts",
        "lora_weights_rank_32_512x768",
        "lora_weights_rank_32_snapshots",
        "lora_weights_rank_32_scales",
        "lora",
    ]
    assert name_of(lora_dir="runs/coat/pytorch_lora_weights.safetensors") == "coat"
    assert name_of(**inference.DEMO) == "lora_weights_rank_32"  # at the size that --demo generates
    assert {values["output_dir"] for values in (inference.CONFIG, inference.DEMO)} == {
        "results/eval_{name}",
        "results/demo_{name}",
    }


def test_a_rescore_says_what_it_ignores(capsys):
    inference.print_notes(inference.CONFIG | dict(rescore=True))
    assert capsys.readouterr().out == ""
    inference.print_notes(inference.CONFIG | dict(rescore=True, prompts="mine.txt", seeds=4))
    note = capsys.readouterr().out
    assert "--prompts, --seeds" in note and "saved images" in note


@pytest.mark.parametrize(
    ("changes", "said"), [(dict(snapshots=True), True), (dict(lora_scales=(0.5,)), True), ({}, False)]
)
def test_what_advice_lacks_is_reported_at_once(changes, said, capsys, tmp_path, processed_data):
    def notes(**more):
        inference.print_notes(inference.CONFIG | changes | more)
        return capsys.readouterr().out

    assert ("advised; that takes 8 sampling seeds" in notes(seeds=4, data_dir=processed_data)) == said
    assert ("advised; that takes training images" in notes(seeds=8, data_dir=tmp_path)) == said
    assert notes(seeds=8, data_dir=processed_data) == ""
