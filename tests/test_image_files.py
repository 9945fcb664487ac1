"""An evaluation's images are on disk as soon as they are generated: memory does not grow with the prompts, and an
interrupted evaluation is completed."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_one_line, call, options, picture

from lib.evaluation import generation, image_files
from lib.evaluation.image_files import STARTED, SavedImages, image_names, write_images
from lib.evaluation.metrics import scores
from lib.evaluation.prompts import bounded
from lib.evaluation.report import charts
from lib.files import unfinished

PROMPTS = [("success", f"coat {number}") for number in range(10)]
SEEDS = [1, 2]


class Interrupted:
    """`generated` in which image number `after` of the whole evaluation is never made; counts the others."""

    def __init__(self, monkeypatch, after=10**9):
        self.count, self.after, self.generated = 0, after, generation.generated
        monkeypatch.setattr(generation, "generated", self)

    def __call__(self, *arguments, **settings):
        for image in self.generated(*arguments, **settings):
            if self.count == self.after:
                raise KeyboardInterrupt
            self.count += 1
            yield image


@pytest.fixture
def config(tiny_evaluation, trained, tmp_path):
    lora_dir, output_dir = trained / "lora_weights_rank8", tmp_path / "out"
    return tiny_evaluation | dict(lora_dir=lora_dir, output_dir=output_dir, seeds=2, batch_size=1)


def test_an_interrupted_evaluation_is_completed(config, tmp_path, monkeypatch):
    """Six images of each model, of which the first four of the adapter's are there before the interruption."""
    whole = call("inference.py", *options(**config | dict(output_dir=tmp_path / "whole")))
    assert whole.returncode == 0, whole.stderr
    folder = unfinished(config["output_dir"])
    with monkeypatch.context() as patch:
        Interrupted(patch, after=10)
        done = call("inference.py", *options(**config))
    assert done.returncode == 130
    assert f"note: 10 images are kept in {folder}; the same command generates only the rest" in done.stdout
    assert not config["output_dir"].exists()
    [damaged] = [path for path in (folder / "images").rglob("base_43.png") if "leather" in str(path)]
    damaged.write_bytes(damaged.read_bytes()[:99])  # as a power cut may leave it

    def fail(*rest):
        raise MemoryError

    with monkeypatch.context() as patch:  # scoring fails: no image is lost
        again = Interrupted(patch)
        patch.setattr(scores, "score_runs", fail)
        done = call("inference.py", *options(**config))
    assert_one_line(done, "memory ran out")
    assert f"note: 10 images in {folder}, of an interrupted evaluation, are used again" in done.stdout
    assert f"note: 12 images are kept in {folder}" in done.stdout
    assert again.count == 3

    again = Interrupted(monkeypatch)
    done = call("inference.py", *options(**config))
    assert done.returncode == 0, done.stderr
    assert again.count == 0
    assert not folder.exists()
    assert not (config["output_dir"] / STARTED).exists()
    records = [json.loads((place / "metrics.json").read_text()) for place in (tmp_path / "whole", config["output_dir"])]
    assert records[0]["pictures"] == records[1]["pictures"]
    assert records[0]["summary"] == records[1]["summary"]


def test_images_of_other_settings_are_not_mixed(config, monkeypatch):
    stop = Interrupted(monkeypatch, after=5)
    call("inference.py", *options(**config))
    folder, other = unfinished(config["output_dir"]), config | dict(steps=3)
    before = sorted(folder.rglob("*.png"))
    done = call("inference.py", *options(**other))
    assert_one_line(done, folder, "5 images of an interrupted evaluation that differs in steps", "--overwrite")
    assert sorted(folder.rglob("*.png")) == before
    stop.count, stop.after = 0, 2
    done = call("inference.py", *options(**other), "--overwrite")
    assert "note: 2 images are kept" in done.stdout


@pytest.fixture
def alive(monkeypatch):
    """{"now", "most"}: how many images are in memory of those that are read or given to the function that comes with it."""
    seen = dict(now=0, most=0)

    def change(by):
        seen["now"] += by
        seen["most"] = max(seen.values())

    def counted(image):
        change(1)
        weakref.finalize(image, change, -1)
        return image

    read = image_files.open_image
    monkeypatch.setattr(image_files, "open_image", lambda path: counted(read(path)))
    return seen, counted


def test_few_images_are_in_memory(tmp_path, alive, monkeypatch):
    seen, counted = alive
    kinds = [SavedImages(tmp_path, image_names(PROMPTS, SEEDS, kind)) for kind in ("base", "lora")]
    monkeypatch.setattr(image_files, "THREADS", 1)
    for number, images in enumerate(kinds):
        write_images(images, images.missing(), (counted(picture(100 * number + seed)) for seed in range(20)))
        assert images.missing() == []
    assert seen["most"] <= 6
    seen["most"] = 0
    monkeypatch.setattr(scores, "AT_ONCE", 4)
    run = scores.Run("one", Path(tmp_path), {}, *kinds)
    base_pairs = scores.score_runs([run], PROMPTS, SEEDS, scores.Scorers("cpu"))
    assert seen["most"] <= 16  # 4 of each model, and as many of the prompts before
    together = scores.Run("one", None, {}, *map(list, kinds))
    monkeypatch.setattr(scores, "AT_ONCE", 100)
    np.testing.assert_allclose(
        scores.score_runs([together], PROMPTS, SEEDS, scores.Scorers("cpu")), base_pairs, atol=1e-5
    )
    np.testing.assert_allclose(run.pairs, together.pairs, atol=1e-5)
    assert [row["prompt"] for row in run.rows] == [row["prompt"] for row in together.rows]
    assert run.looks == together.looks


def test_charts_of_a_thousand_prompts_are_bounded():
    """Agg, matplotlib's renderer, refuses images of 65,536 pixels and more."""
    prompts = [(category, f"{category} {n}") for n in range(334) for category in ("success", "near", "unrelated")]
    rows = [
        dict(prompt=prompt, category=category, seed=1, model=model, lpips=0.1)
        for category, prompt in prompts
        for model in ("base", "lora")
    ]
    figure = charts.distribution_figure(scores.Run("one", None, {}, [], [], rows=rows), prompts)
    assert figure.get_size_inches()[1] * figure.dpi < 5000
    assert "60 of 1002 prompts" in figure.get_supxlabel()
    chosen = [prompts[index] for index in bounded(prompts)]
    assert len(chosen) == 60 and chosen[:3] == prompts[:3]
    assert bounded(prompts[:60]) == list(range(60))
