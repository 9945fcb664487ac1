"""The model card: what a run says of itself, and what an evaluation puts into it."""

import json
import re
import shutil

import pytest
import torch
from conftest import TINY_RUN, call, make_processed, options
from huggingface_hub import ModelCard
from PIL import Image

from lib.adapter_files import model_card
from lib.evaluation.metrics.scores import Run
from lib.evaluation.report import card
from lib.files import written_files

NAME = "lora_weights_rank_32"


@pytest.fixture
def run_folder(trained, tmp_path):
    """A run of its own, not evaluated yet; other tests evaluate the shared one, which changes its card."""
    folder = shutil.copytree(trained / NAME, tmp_path / NAME)
    record = json.loads((folder / "config.json").read_text())
    config = record["config"] | dict(mixed_precision=record["mixed_precision"])
    text = model_card.card_text(config, record["data"], record["prediction_type"])
    (folder / "README.md").write_text(text)
    shutil.rmtree(folder / "samples", ignore_errors=True)
    return folder


def evaluate(model, clip, data, folder, output_dir, **more):
    config = (
        dict(
            base_model=model,
            clip_model=clip,
            similarity_model="clip",
            data_dir=data,
            resolution=64,
            steps=1,
            seeds=2,
            lora_dir=folder,
            output_dir=output_dir,
        )
        | more
    )
    done = call("inference.py", *options(**config))
    assert done.returncode == 0, done.stderr
    return done


def test_a_run_writes_its_card(trained, tiny_model):
    folder = trained / NAME
    card = ModelCard.load(folder / "README.md")
    assert card.data.instance_prompt == "a holographic raincoat"
    assert "lora" in card.data.tags
    assert card.data.library_name == "diffusers"
    assert card.data.base_model is None  # a local folder is no name on the hub
    assert "trained on `a holographic raincoat` from 6 images" in card.text
    assert "and 2 held-out images for the validation loss" in card.text
    record = json.loads((folder / "config.json").read_text())
    assert record["data"]["sha256"] in card.text
    assert "README.md" in record["files_written"]
    # A CPU computes in fp32, whatever was asked
    assert "| sizes, precision | 64x64; fp32 |" in card.text
    for private in (*record["data"]["trained_on"], str(tiny_model), record["config"]["data_dir"]):
        assert private not in str(card)


def record_of(folder, **changes):
    record = json.loads((folder / "config.json").read_text())
    return record["config"] | changes, record["data"]


def test_the_base_model_is_linked_or_told_by_name(trained):
    def text(**changes):
        config, data = record_of(trained / NAME, **changes)
        return model_card.card_text(config, data, "epsilon")

    hub = text(base_model="stable-diffusion-v1-5/stable-diffusion-v1-5", push_to_hub="me/coat")
    card = ModelCard(hub)
    assert card.data.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert 'from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", torch' in hub
    assert 'load_lora_weights("me/coat", weight' in hub
    single = text(base_model="/home/anna/models/dream.safetensors")
    assert 'from_single_file("path/to/dream.safetensors"' in single
    assert "/home/anna" not in single


def test_the_recipe_tells_what_goes_beyond_the_plain_one(trained):
    """A row for each key that differs, and none where it does not."""

    def text(**changes):
        config, data = record_of(trained / NAME, **changes)
        return model_card.card_text(config, data, "epsilon")

    def more(**changes):
        return sorted(set(text(**changes).splitlines()) - set(text().splitlines()))

    [first, kind] = more(dora=True)
    assert first.startswith("A DoRA adapter (rank 4)") and kind.startswith("| kind | DoRA")
    assert more(caption_from="description") == ["| captions | each image's own description |"]
    assert more(mask_weight=0.2) == ["| outside the masks | the loss has weight 0.2 |"]
    assert more(loss_guidance_scale=[1.0, 2.5]) == ["| loss | of the prediction at guidance uniform from 1 to 2.5 |"]
    assert more(loss_guidance_scale=[3, 3]) == ["| loss | of the prediction at guidance 3 |"]
    assert more(mask_weight=1.0, loss_guidance_scale=[1, 1]) == []


def test_a_protected_adapter_says_what_it_leaves_alone(trained):
    config, data = record_of(trained / NAME)
    differences = {
        kind: dict(text_states=0.5, keys_values=value)
        for kind, value in (("listed", 0.0123), ("held_out", 0.034), ("concept", 1.5))
    }
    for noun, among in (("raincoat", ", many of them about `raincoat`"), ("", "")):
        record = dict(noun=noun, listed=1711, held_out=190, left_out=3, differences=differences)
        text = model_card.card_text(config, data, "epsilon", record)
        assert f"projected away from 1,711 listed prompts{among}. " in text
        assert "at most 1.2% for a listed prompt, by at most 3.4% for 190 similar prompts that were not listed" in text
        assert "and by 150.0% for the concept." in text
        assert "| protected | 1,711 listed prompts |" in text
    assert "listed prompt" not in model_card.card_text(config, data, "epsilon")


def test_the_card_names_the_right_file_for_each_program(trained):
    """Of a LoRA one file for all; of a DoRA only for the programs that read it rightly."""

    def files(text):
        rows = [line for line in text.splitlines() if line.startswith("- **")]
        return {
            program: re.findall(r"`([^`]+)\.safetensors`", row)
            for row in rows
            for program in re.findall(r"\*\*(.+?)\*\*", row)[0].split(", ")
        }

    config, data = record_of(trained / NAME)
    found = files(model_card.card_text(config, data, "epsilon"))
    assert found == dict.fromkeys(("ComfyUI", "A1111", "Forge", "SD.Next", "InvokeAI"), [NAME])
    plain = dict(file=f"{NAME}_lora.safetensors", rank=8, error=0.0314)
    text = model_card.card_text(config | dict(dora=True), data, "epsilon", plain=plain)
    dora, other = ("ComfyUI", "Forge"), ("A1111", "reForge", "SD.Next", "InvokeAI")
    assert files(text) == dict.fromkeys(dora, [NAME]) | dict.fromkeys(other, [f"{NAME}_lora"])
    assert f"<lora:{NAME}_lora:1>" in text
    assert "rank 8, whose change of the weights differs from the DoRA's by 3.1%" in text


def test_different_captions_prompt_with_what_they_share(trained):
    config, data = record_of(trained / NAME)
    data["caption_counts"] = {"a cat in a shiny coat": 1, "a shiny coat on a chair": 1}
    card = ModelCard(model_card.card_text(config, data, "epsilon"))
    assert card.data.instance_prompt == "shiny coat"
    assert "Use `shiny coat` in the prompt." in card.text
    data["caption_counts"] = {"a cat": 1, "two dogs": 1}
    card = ModelCard(model_card.card_text(config, data, "epsilon"))
    assert card.data.get("instance_prompt") is None
    assert "such as `a cat`" in card.text


def test_nobodys_words_break_the_card(trained):
    config, data = record_of(trained / NAME)
    caption = '`; "x": y\n---\n# head <b>'
    data |= dict(caption_counts={caption: 3, "b": 1})
    card = ModelCard(model_card.card_text(config, data, "v_prediction"))
    assert card.data.instance_prompt == caption
    assert "# head" not in [line.strip() for line in card.text.splitlines()]
    assert "and 1 other caption from 4 images" in card.text
    # The example is Python that parses.
    example = card.text.split("```python\n")[1].split("```")[0]
    compile(example, "example", "exec")


def test_the_example_loads_the_adapter(run_folder, tiny_model):
    text = (run_folder / "README.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    example = example.replace("path/to/model", str(tiny_model)).replace(f"path/to/{NAME}", str(run_folder))
    example = example.replace("float16", "float32").replace('.to("cuda")', "")
    known = {}
    exec(example[: example.index("pipeline(")], known)
    assert known["pipeline"].get_active_adapters() == ["default_0"]
    assert torch.is_tensor(next(known["pipeline"].unet.parameters()))


def test_an_evaluation_puts_pictures_and_verdicts_into_the_card(
    run_folder, tiny_model, tiny_clip, processed_data, tmp_path
):
    before = (run_folder / "README.md").read_text()
    assert "Not evaluated yet" in before
    edited = before.replace("## How to use it", "My own words.\n\n## How to use it")
    (run_folder / "README.md").write_text(edited.replace("library_name", "license: mit\nlibrary_name"))
    evaluate(tiny_model, tiny_clip, processed_data, run_folder, tmp_path / "out")
    card = ModelCard.load(run_folder / "README.md")
    assert card.data.license == "mit"
    assert "My own words." in card.text
    assert "Not evaluated yet" not in card.text
    summary = json.loads((tmp_path / "out" / "metrics.json").read_text())["summary"]
    assert summary["verdicts"]
    for verdict in summary["verdicts"]:
        assert f"**{verdict['question']}: {verdict['answer']}.** {verdict['text']}" in card.text
    assert "One training run, 2 sampling seeds a prompt." in card.text
    shown = [row["output"]["url"] for row in card.data.widget]
    assert [row["text"] for row in card.data.widget][0] == "a holographic raincoat"
    assert len(shown) == 7
    for name in shown:
        other = name.replace("lora", "base")
        assert f"![adapter]({name})" in card.text
        assert f"![base]({other})" in card.text
        with Image.open(run_folder / name) as lora, Image.open(run_folder / other) as base:
            assert lora.size == base.size == (64, 64)
            assert lora.tobytes() != base.tobytes()

    # Again: what was there is replaced, and all of it is known as this project's.
    evaluate(tiny_model, tiny_clip, processed_data, run_folder, tmp_path / "out2", seed=7)
    again = (run_folder / "README.md").read_text()
    assert again.count("## Samples") == 1
    assert "Seed 7 of each prompt" in again
    known = written_files(run_folder, "config.json")
    there = {p.relative_to(run_folder).as_posix() for p in run_folder.rglob("*") if p.is_file()}
    assert there == known


@pytest.mark.parametrize(("prompts", "seeds"), [(7, 1), (3, 8)])
def test_a_trial_leaves_a_larger_evaluation_in_the_card(run_folder, prompts, seeds, capsys):
    model_card.update_card(run_folder, card.EXTENT.format(7, 8), [], {})
    before = (run_folder / "README.md").read_bytes()
    run = Run(NAME, None, {}, [], [], folder=run_folder)
    shown = dict(prompts=[("success", "a coat")] * prompts, seeds=range(seeds), config=dict(overwrite=False))
    card.update_model_card(run, None, shown)
    assert (run_folder / "README.md").read_bytes() == before
    note = capsys.readouterr().out
    assert "keeps its evaluation of 7 prompts and 8 sampling seeds" in note
    assert f"this one has {prompts} and {seeds}" in note


def test_a_new_run_takes_the_samples_away(run_folder, tiny_model, tmp_path):
    model_card.update_card(run_folder, "section", [], {"samples/01_lora.webp": b"x"})
    assert "section" in (run_folder / "README.md").read_text()
    assert list((run_folder / "samples").iterdir())
    data = make_processed(tmp_path / "data", 4)
    config = TINY_RUN | dict(base_model=tiny_model, data_dir=data, output_dir=tmp_path, max_steps=3)
    assert call("train.py", *options(**config)).returncode == 0
    assert not (run_folder / "samples").exists()
    assert "Not evaluated yet" in (run_folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "README.md").write_text("# mine"), "marks"),
        (lambda folder: (folder / "config.json").write_text("{"), "README.md was not updated"),
        (lambda folder: (folder / "config.json").write_text("{}"), "README.md was not updated"),
        (lambda folder: (folder / "README.md").unlink(), None),
    ],
)
def test_a_card_that_is_not_ours_is_left_alone(run_folder, damage, words, capsys):
    damage(run_folder)
    before = {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()}
    model_card.update_card(run_folder, "section", [], {"samples/01_lora.webp": b"x"})
    assert {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()} == before
    told = capsys.readouterr().out
    assert (words in told) if words else told == ""
