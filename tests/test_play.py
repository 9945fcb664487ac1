"""play.py without its server: requests, images, the queue, saved images. (The page is in test_play_page.py.)"""

import contextlib
import datetime
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from conftest import TEXT, call, options
from diffusers import UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

import play
from lib import adapter_files, adapters
from lib.adapter_files import WEIGHTS
from lib.errors import UserError
from lib.evaluation import generation
from lib.evaluation.prompts import slugs
from lib.play import saved, studio
from lib.play.asked import Asked, read_request, read_seeds
from lib.play.turns import Turns

PROMPT = "a holographic raincoat"
FIRST, SECOND = "rank_4", "rank_two"
REQUEST = dict(
    prompt=PROMPT,
    seeds="42",
    steps="2",
    guidance_scale="6",
    adapter=FIRST,
    scale="1",
    second_adapter="",
    second_scale="1",
)


def request(**changed):
    return json.dumps(REQUEST | changed).encode()


def asked(*columns, seeds=(42, 43), **changed):
    return Asked(
        **dict(prompt=PROMPT, steps=2, guidance_scale=6.0) | changed, seeds=seeds, columns=((None, 0.0), *columns)
    )


def silent(**event):
    pass


# ---- what a page asks for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("42", (42,)), (" 1, 2;3 4 ", (1, 2, 3, 4)), ("7-9", (7, 8, 9)), ("5,5,5-6", (5, 6)), (str(2**62), (2**62,))],
)
def test_seeds(text, seeds):
    assert read_seeds(text) == seeds


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (dict(prompt="  \n "), "The prompt is empty"),
        (dict(prompt="x" * 5001), "The prompt has 5,001 characters"),
        (dict(seeds="4x"), "“4x” is no seed"),
        (dict(seeds=""), "“” is no seed"),
        (dict(seeds="-3"), "“-3” is no seed"),
        (dict(seeds="1.5"), "“1.5” is no seed"),
        (dict(seeds="٣"), "is no seed"),
        (dict(seeds="9-7"), "the smaller end"),
        (dict(seeds=str(2**62 + 1)), "from 0 to 2^62"),
        (dict(seeds="1-999999999"), "At most 8 seeds"),
        (dict(steps="0"), "Steps is “0”, but must be a whole number from 1 to 150"),
        (dict(steps="2.5"), "Steps is “2.5”"),
        (dict(steps=True), "Steps is “True”"),
        (dict(guidance_scale="nan"), "Guidance is “nan”"),
        (dict(guidance_scale="much"), "must be a number from 0 to 30"),
        (dict(scale="-1"), "The scale is “-1”"),
        (dict(second_scale="1e999"), "The scale is “1e999”"),
        (dict(adapter=None), "does not understand"),
        (dict(prompt=7), "does not understand"),
    ],
)
def test_what_cannot_be_used_is_named_in_a_sentence(changed, words):
    with pytest.raises(UserError, match=words.replace("^", r"\^")):
        read_request(request(**changed))


@pytest.mark.parametrize("body", [b"", b"x", b"[]", b"{}", b"3", b"\xff", b"[" * 9999])
def test_a_request_of_another_form(body):
    with pytest.raises(UserError, match="does not understand this request"):
        read_request(body)


def test_a_request():
    found = read_request(request(prompt=" a\nyellow  raincoat", second_adapter=SECOND, second_scale=0.5))
    assert found == Asked("a yellow raincoat", (42,), 2, 6.0, ((None, 0.0), (FIRST, 1.0), (SECOND, 0.5)))


# ---- images ----------------------------------------------------------------------------------------


def write_adapter(folder, models, rank):
    """An adapter with random weights for `models`, in diffusers' format; the models are changed."""
    targets = dict(unet=("to_k", "to_q"), text_encoder=("q_proj",))
    torch.manual_seed(rank)
    for part, model in models.items():
        for layer in adapters.add_lora(model, rank, rank, targets[part]).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight)
    folder.mkdir(parents=True)
    adapter_files.save_adapter(folder, models, rank, rank, targets, {})


def play_config(tiny_model, folder):
    """play.py's configuration with the tiny model and two adapters, which are written into `folder`."""
    for name, rank in ((FIRST, 4), (SECOND, 2)):
        unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
        write_adapter(folder / "adapters" / name, dict(unet=unet, text_encoder=text_encoder()), rank)
    changed = dict(base_model=str(tiny_model), lora_dir=str(folder / "adapters"), output_dir=str(folder / "saved"))
    return play.CONFIG | changed | dict(resolution=64, steps=2, port=0)


def text_encoder(**changed):
    return CLIPTextModel(CLIPTextConfig(**TEXT | changed))


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    return play_config(tiny_model, tmp_path_factory.mktemp("play"))


@pytest.fixture(scope="module")
def at_work(config):
    return studio.Studio(config, torch.device("cpu"))


@pytest.fixture
def generated(at_work, monkeypatch):
    """A list that receives the jobs of each generation; nothing is cached before."""
    seen = []

    def recording(pipeline, jobs, **how):
        seen.append(jobs)
        return generation.generate(pipeline, jobs, **how)

    monkeypatch.setattr(studio, "generate", recording)
    monkeypatch.setattr(at_work, "cache", studio.Cache(studio.CACHED_IMAGES))
    at_work.pipeline.unet.forward, at_work.captured = at_work.uncaptured, None
    yield seen
    at_work.pipeline.unet.forward, at_work.captured = at_work.uncaptured, None
    now = generation.probe(at_work.pipeline)  # whatever a test did, the weights are the base model's again
    assert all(torch.equal(now[part], at_work.base_probe[part]) for part in now)


def pixels(png):
    return np.asarray(Image.open(png).convert("RGB"))


def test_images_are_those_of_inference_bit_for_bit(at_work, config, tiny_evaluation, tmp_path, generated):
    if torch.cuda.is_available():
        pytest.skip("bit for bit only on a CPU")
    how = dict(lora_dir=f"{config['lora_dir']}/{FIRST}", output_dir=tmp_path / "out", lora_scales=(0.5,))
    more = dict(seeds=2, batch_size=1, clip_model="none", similarity_model="none")
    done = call("inference.py", *options(**tiny_evaluation | more | how))
    assert done.returncode == 0, done.stderr
    sheet, _ = at_work.generate(asked((FIRST, 1.0), (FIRST, 0.5)), silent)
    folder = tmp_path / "out" / "images" / slugs([("success", PROMPT)])[0]
    names = "base", "lora", "lora_scale_0.5"
    for name, column in zip(names, sheet, strict=True):
        for seed, png in zip((42, 43), column, strict=True):
            (tmp_path / "image.png").write_bytes(png)
            assert np.array_equal(pixels(tmp_path / "image.png"), pixels(folder / f"{name}_{seed}.png")), (name, seed)
    assert sheet[0] != sheet[1] != sheet[2]


def test_another_scale_generates_the_adapters_side_alone(at_work, generated):
    first, _ = at_work.generate(asked((FIRST, 1.0)), silent)
    assert generated == [[(PROMPT, 42)], [(PROMPT, 43)]] * 2  # the base model's, then the adapter's
    generated.clear()
    half, _ = at_work.generate(asked((FIRST, 0.5)), silent)
    assert len(generated) == 2
    assert half[0] == first[0] and half[1] != first[1]
    generated.clear()
    more, _ = at_work.generate(asked((FIRST, 0.0), (FIRST, 1.0), seeds=(42,)), silent)
    assert generated == []  # scale 0 is the base model, scale 1 is cached
    assert more == [first[0][:1], first[0][:1], first[1][:1]]


def test_guidance_is_switched_on_and_off(at_work, generated, monkeypatch):
    """A graph of guided images would take two unguided ones for the halves of one. Without a GPU, functions stand for
    the graphs, which also take fewer images than they were captured for."""
    monkeypatch.setattr(generation, "captured", lambda functions, device: [lambda f=f: f() for f in functions])
    monkeypatch.setitem(at_work.config, "batch_size", 2)
    monkeypatch.setattr(at_work, "batch_sizes", {})
    for guidance in (6.0, 1.0, 6.0):
        sheet, _ = at_work.generate(asked(guidance_scale=guidance, seeds=(1, 2)), silent)
        at_work.pipeline.unet.forward, at_work.captured = at_work.uncaptured, None
        how = dict(steps=2, guidance_scale=guidance, resolution=64, batch_size=2, title=None)
        plain = generation.generate(at_work.pipeline, [(PROMPT, 1), (PROMPT, 2)], **how)
        for png, image in zip(sheet[0], plain, strict=True):
            shown = np.asarray(Image.open(studio.io.BytesIO(png)), np.int16)
            assert np.abs(shown - np.asarray(image, np.int16)).max() <= 1
        at_work.generate(asked(guidance_scale=guidance, seeds=(3, 4)), silent)  # leaves its own capture behind


def test_what_the_text_encoder_does_not_read_is_quoted(at_work, generated):
    events = []
    prompt = " ".join(["coat"] * 40 + ["umbrella"])  # a token a letter
    at_work.generate(asked(prompt=prompt, seeds=(1,)), lambda **event: events.append(event))
    (note,) = next(event["notes"] for event in events if "notes" in event)
    assert "of which the text encoder reads 77. Cut off: “" in note
    assert note.endswith("umbrella”")
    events.clear()
    at_work.generate(asked(seeds=(1,)), lambda **event: events.append(event))
    assert next(event["notes"] for event in events if "notes" in event) == []


def test_an_adapter_that_vanishes_changes_or_does_not_fit(at_work, config, generated, tmp_path, monkeypatch):
    folder = tmp_path / "adapters"
    shutil.copytree(config["lora_dir"], folder)
    monkeypatch.setitem(at_work.config, "lora_dir", str(folder))
    before, _ = at_work.generate(asked((SECOND, 1.0)), silent)
    shutil.copy(folder / FIRST / WEIGHTS, folder / SECOND / WEIGHTS)  # trained again, under the same name
    after, _ = at_work.generate(asked((SECOND, 1.0)), silent)
    assert before[0] == after[0] and before[1] != after[1]
    shutil.rmtree(folder / SECOND)
    for place in (folder / SECOND, folder):
        shutil.rmtree(place, ignore_errors=True)
        with pytest.raises(UserError, match=f"{SECOND} is no longer in {folder}. Choose another adapter."):
            at_work.generate(asked((SECOND, 1.0)), silent)


def test_an_adapter_of_another_base_model(at_work, config, generated, tmp_path, monkeypatch):
    folder = tmp_path / "adapters" / "other"
    write_adapter(folder, dict(text_encoder=text_encoder(hidden_size=64)), 2)
    shutil.copytree(f"{config['lora_dir']}/{FIRST}", folder.parent / FIRST)
    monkeypatch.setitem(at_work.config, "lora_dir", str(folder.parent))
    with pytest.raises(UserError, match="does not fit the base model's text_encoder"):
        at_work.generate(asked((FIRST, 1.0), ("other", 1.0)), silent)


def test_a_second_folder_of_adapters(at_work, config, tmp_path, monkeypatch):
    shutil.copytree(f"{config['lora_dir']}/{FIRST}", tmp_path / FIRST)  # the same name elsewhere
    monkeypatch.setitem(at_work.config, "second_lora_dir", str(tmp_path / FIRST))
    assert at_work.second() == str(tmp_path / FIRST)
    assert set(at_work.choices()) == {FIRST, SECOND, str(tmp_path / FIRST)}
    monkeypatch.setitem(at_work.config, "second_lora_dir", f"{config['lora_dir']}/{SECOND}")  # one of the first folder
    assert at_work.second() == SECOND
    assert len(at_work.choices()) == 2


def test_the_cache_forgets_the_images_used_longest_ago():
    cache = studio.Cache(2)
    digest = cache.put("a", b"1")
    cache.put("b", b"2")
    cache.put("a", b"1")
    cache.put("c", b"3")
    assert (cache.get("a"), cache.get("b"), cache.find(digest), cache.find("")) == (b"1", None, b"1", None)


# ---- the queue ---------------------------------------------------------------------------------------


def events_of(job):
    found = []
    while not found or not {"done", "error"} & set(found[-1]):
        found.append(job.events.get(timeout=20))
    return found


@contextlib.contextmanager
def turning(turns):
    worker = threading.Thread(target=turns.run, daemon=True)
    worker.start()
    yield
    turns.stop()
    worker.join(20)
    assert not worker.is_alive()


def test_the_second_waits_for_the_first_and_is_told_so():
    turns, held = Turns(), threading.Event()

    def long(say):
        say(status="base model, seed 42: step 3 of 28")
        assert held.wait(20)

    first, second, third = turns.submit(long), turns.submit(lambda say: None), turns.submit(lambda say: None)
    with turning(turns):
        assert first.events.get(timeout=20) == dict(status="base model, seed 42: step 3 of 28")
        assert turns.waits_for(first) is None
        assert turns.waits_for(second) == "Waiting for another page’s images (base model, seed 42: step 3 of 28)"
        assert turns.waits_for(third).endswith("28), then 1 more")
        held.set()
        assert [events_of(job)[-1] for job in (first, second, third)] == [dict(done=True)] * 3
    assert turns.jobs == [] and turns.waits_for(third) is None


def test_errors_become_sentences_and_the_next_one_gets_its_turn(capsys):
    def fail(problem):
        def work(say):
            raise problem

        return work

    turns = Turns()
    wrong, bug = turns.submit(fail(UserError("no such adapter", "choose one"))), turns.submit(fail(KeyError("x")))
    cancelled, last = turns.submit(fail(AssertionError("it ran"))), turns.submit(lambda say: say(image=1))
    cancelled.cancelled.set()
    with turning(turns):
        assert events_of(last) == [dict(image=1), dict(done=True)]
    assert events_of(wrong) == [dict(error="no such adapter choose one")]
    assert events_of(bug) == [dict(error="play.py failed (KeyError: 'x'). Its terminal shows where.")]
    assert cancelled.events.empty()
    assert "Traceback" in capsys.readouterr().err


def test_a_page_that_leaves_stops_its_images_between_two_steps(at_work, generated):
    turns, steps = Turns(), []

    def work(say):
        def leaving(**event):
            if "step" in event.get("status", ""):
                steps.append(event)
                job.cancelled.set()
            say(**event)

        at_work.generate(asked((FIRST, 1.0), steps=9), leaving)

    job = turns.submit(work)
    with turning(turns):
        pass
    assert len(steps) == 1 and len(generated) == 1


# ---- saved images ------------------------------------------------------------------------------------


def test_saved_images_are_complete_and_never_replace_others(at_work, config, generated, tmp_path, monkeypatch):
    wanted = asked((FIRST, 0.5), (FIRST, 0.5))
    sheet, loaded = at_work.generate(wanted, silent)
    now, config = datetime.datetime(2030, 1, 2, 3, 4, 5), config | dict(output_dir=str(tmp_path / "new" / "play"))
    first, again = (saved.save(wanted, sheet, loaded, config, at_work.device, now) for _ in range(2))
    assert [first.name, again.name] == [f"2030-01-02_030405_a-holographic-raincoat{end}" for end in ("", "-2")]
    names = [f"{stem}_{seed}.png" for stem in ("base", "lora", "second") for seed in (42, 43)]
    assert sorted(p.name for p in first.iterdir()) == sorted([*names, "pair.png", "settings.json"])
    assert (first / "lora_43.png").read_bytes() == sheet[1][1]
    settings = json.loads((first / "settings.json").read_text())
    assert [row["file"] for row in settings["images"]] == names
    assert settings["images"][2]["scale"] == 0.5 and settings["images"][2]["adapter"].endswith(FIRST)
    assert (settings["prompt"], settings["steps"], settings["seeds"]) == (PROMPT, 2, [42, 43])
    with Image.open(first / "pair.png") as pair:
        assert pair.width >= 3 * 64

    def full(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(saved, "write_json", full)
    with pytest.raises(UserError, match="No space left on device"):
        saved.save(wanted, sheet, loaded, config, at_work.device, now)
    assert sorted(p.name for p in first.parent.iterdir()) == [first.name, again.name]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written"):
        saved.save(wanted, sheet, loaded, config | dict(output_dir=str(tmp_path / "file")), at_work.device, now)
