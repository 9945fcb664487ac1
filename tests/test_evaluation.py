"""The statistics, verdicts and guards: what may be claimed, and what must stop a claim."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import assert_one_line, call, options, picture, run
from PIL import Image

import inference
import metrics
import report
from adapters import WEIGHTS

PROMPTS = [("success", "a raincoat"), ("failure", "a cat")]


# ---- verdicts on simulated scores ----------------------------------------------------------


def fake_run(name, concept=0.0, clip=0.0, cat=0.0, nearest=0.5, seed=None, noise=0.01):
    """A Run whose scores are set: what LoRA adds to concept and CLIP, and to the cat's concept."""
    rng = np.random.default_rng(abs(hash(name)) % 2**32)
    rows = []
    for category, prompt in PROMPTS:
        for s in range(8):
            base = dict(prompt=prompt, category=category, seed=s, model="base", lpips=None,
                        clip=0.3 + noise * rng.standard_normal(), nearest_similarity=0.5,
                        concept_similarity=0.4 + noise * rng.standard_normal())  # fmt: skip
            more = concept if category == "success" else cat
            lora = base | dict(
                model="lora", lpips=0.3 + noise * rng.standard_normal(),
                clip=base["clip"] + clip + noise * rng.standard_normal(),
                concept_similarity=base["concept_similarity"] + more + noise * rng.standard_normal(),
                nearest_similarity=nearest + noise * rng.standard_normal(),
            )  # fmt: skip
            rows += [base, lora]
    metadata = {} if seed is None else {"seed": str(seed)}
    return inference.Run(name, None, {"metadata": metadata}, [], [], rows=rows)


def answers(*runs, **changes):
    summary = inference.analyse(list(runs), PROMPTS, [0.6, 0.6], 0.9, 0.02)
    return {v["question"]: v["answer"] for v in summary["verdicts"]}


def test_verdicts_say_what_is_there_and_nothing_else():
    nothing = "no detectable difference"
    assert answers(fake_run("a")) == dict(learned=nothing, contaminated=nothing, memorised=nothing)
    many = [fake_run(f"m_seed{i}", seed=i) for i in range(12)]
    assert answers(*many)["memorised"] == "no"  # 96 pictures, none near
    assert answers(fake_run("b", concept=0.1))["learned"] == "yes"
    # It looks like the training pictures, but no longer like the prompt.
    assert answers(fake_run("c", concept=0.1, clip=-0.1))["learned"] == "no"
    assert answers(fake_run("d", concept=-0.1))["learned"] == "no"
    assert answers(fake_run("e", cat=0.1))["contaminated"] == "yes"
    assert answers(fake_run("f", nearest=0.95))["memorised"] == "yes"


def test_several_training_runs_are_the_outer_level():
    """Runs that disagree widely say less than one of them alone pretends."""
    runs = [fake_run(f"r_seed{i}", concept=c, seed=i) for i, c in enumerate((0.3, -0.1, 0.05))]
    assert answers(runs[0])["learned"] == "yes"
    assert answers(*runs)["learned"] == "no detectable difference"
    summary = inference.analyse(runs, PROMPTS, [0.6, 0.6], 0.9, 0.02)
    assert summary["categories"]["success"]["concept_similarity"]["runs"] == 3
    assert "3 training runs" in report.spread_text(summary)
    assert "nothing of what another training run" in report.spread_text(
        inference.analyse(runs[:1], PROMPTS, [0.6, 0.6], 0.9, 0.02)
    )


def test_experiments_are_compared_in_pairs():
    groups = {
        "one": [fake_run(f"one_seed{i}", concept=0.2, seed=i) for i in range(3)],
        "same": [fake_run(f"same_seed{i}", concept=0.2, seed=i) for i in range(3)],
        "less": [fake_run(f"less_seed{i}", concept=0.05, seed=i) for i in range(3)],
    }
    rows = {(r["first"], r["second"], r["metric"], r["category"]): r
            for r in inference.compare(groups, PROMPTS, [0.6, 0.6])}  # fmt: skip
    assert len(rows) == 3 * len(inference.COMPARED)
    assert all(row["paired_by_training_seed"] for row in rows.values())
    key = ("concept_similarity", "success")
    assert rows["one", "same", *key]["answer"] == "no detectable difference"
    assert rows["one", "less", *key]["answer"] == "lower"
    assert rows["one", "less", *key]["mean"] == pytest.approx(-0.15, abs=0.02)
    sentence = report.pair_sentence(rows["one", "same", *key])
    assert "no detectable difference" in sentence
    assert "same is" not in sentence


def test_runs_without_a_training_seed_are_not_counted_twice():
    groups = {
        "one": [fake_run(f"one_{i}", concept=c) for i, c in enumerate((0.3, 0.1, 0.2))],
        "two": [fake_run(f"two_{i}", concept=c) for i, c in enumerate((0.2, 0.3, 0.1))],
    }
    row = inference.compare(groups, PROMPTS, [0.6, 0.6])[0]
    assert not row["paired_by_training_seed"]
    assert row["answer"] == "no detectable difference"
    assert row["high"] - row["low"] > 0.2  # the runs disagree, and the interval knows it
    assert "in their order" in report.pair_note([row])


def test_sweep_names_the_smallest_scale_that_is_enough(tiny_clip, monkeypatch):
    gains = {0.0: 0.0, 0.5: 0.095, 1.0: 0.1}
    fakes = {s: fake_run(f"s{s}", concept=g, noise=1e-4).rows for s, g in gains.items()}

    def score(run, *rest, **more):
        run.rows = fakes[float(run.name.removeprefix("scale "))]

    monkeypatch.setattr(inference, "score", score)
    rows, advice = inference.sweep_summary(gains, [], PROMPTS, range(8), [0.6, 0.6], {})
    assert [row["scale"] for row in rows] == [0.0, 0.5, 1.0]
    assert advice.startswith("Scale 0.5 is the smallest")


def test_warnings_for_flat_and_shared_pictures():
    prompts, seeds = [("success", "x")], [1, 2]
    good = [picture(1), picture(2)]
    one = inference.Run("one", None, {}, good, [picture(3), Image.new("RGB", (64, 64))])
    two = inference.Run("two", None, {}, good, [picture(3), picture(5)])
    found = inference.picture_warnings([one, two], prompts, seeds)
    assert len(found) == 2
    assert "flat colour" in found[0]
    assert "seed 2" in found[0]
    assert "one and two have the same picture" in found[1]


# ---- the whole way -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def common(tiny_model, tiny_clip, processed_data):
    return dict(base_model=tiny_model, clip_model=tiny_clip, data_dir=processed_data,
                resolution=64, steps=2, seeds=2)  # fmt: skip


@pytest.fixture(scope="module")
def compared(common, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    config = common | dict(lora_dir=trained, output_dir=folder, lora_scales="0,0.5,1")
    return folder, run("inference.py", *options(**config))


def test_one_adapter_under_two_names_stops_the_run(tmp_path, common, trained):
    """The published study's mistake."""
    for name in ("rank_32", "rank_8"):
        shutil.copytree(trained / "lora_weights_rank8", tmp_path / "weights" / name)
    config = common | dict(lora_dir=tmp_path / "weights", output_dir=tmp_path / "out")
    done = call("inference.py", *options(**config))
    assert_one_line(done, "rank_32 and rank_8 are the same adapter")
    assert not (tmp_path / "out").exists()


def test_comparison_files(compared):
    folder, done = compared
    names = sorted(p.name for p in (folder / "comparison").iterdir())
    assert names == ["comparison.csv", "forest.png", "metrics.json", "report.html", "summary.md"]
    record = json.loads((folder / "comparison" / "metrics.json").read_text())
    assert len(record["pairs"]) == 3 * len(inference.COMPARED)
    assert "no detectable difference" in done.stdout


def test_rescore_gives_the_same_figures(compared, tmp_path, common):
    copy = tmp_path / "copy"
    shutil.copytree(compared[0], copy)
    config = {key: common[key] for key in ("clip_model", "data_dir")}
    run("inference.py", "--rescore", *options(output_dir=copy, **config))
    for name in ("lora_weights_rank8", "lora_weights_unet_only"):
        before, after = (
            json.loads((place / name / "metrics.json").read_text()) for place in (compared[0], copy)
        )
        assert before["pictures"] == after["pictures"]
        assert before["summary"] == after["summary"]
        assert before["adapter"] == after["adapter"]


def test_two_training_seeds_of_one_experiment_alone(tmp_path, common, trained, processed_data):
    weights = tmp_path / "weights"
    for seed, source in ((1, "lora_weights_rank_32"), (2, "lora_weights_unet_only")):
        shutil.copytree(trained / source, weights / f"mine_seed{seed}")
    config = common | dict(lora_dir=weights, output_dir=tmp_path / "out", seeds=2)
    done = call("inference.py", *options(**config))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "comparison" / "metrics.json").read_text())
    assert record["pairs"] == []
    assert list(record["experiments"]) == ["mine"]
    # The published study's mistake is caught among saved pictures as well.
    shutil.copytree(tmp_path / "out" / "mine_seed1", tmp_path / "out" / "rank_8")
    done = call(
        "inference.py", "--rescore", *options(output_dir=tmp_path / "out", clip_model="none")
    )
    assert_one_line(done, "are the same adapter")


def test_one_picture_a_prompt_gets_no_verdict(tmp_path, common, trained):
    config = common | dict(lora_dir=trained / "lora_weights_rank8", output_dir=tmp_path / "out")
    done = call("inference.py", *options(**config | dict(seeds=1)), "--lora-scales", "0.5")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["summary"]["verdicts"] == []
    # A single scale is drawn and charted, not dropped.
    assert [row["scale"] for row in record["summary"]["sweep"]["rows"]] == [0.5]


def test_rescore_names_a_missing_picture(compared, tmp_path, common):
    copy = tmp_path / "copy"
    shutil.copytree(compared[0] / "lora_weights_rank8", copy)
    (copy / "images" / "a-red-leather-jacket" / "base_42.png").unlink()
    done = call(
        "inference.py", "--rescore", *options(output_dir=copy, clip_model=common["clip_model"])
    )
    assert_one_line(done, "base_42.png")
    assert (copy / "report.html").is_file()


def test_score_dir_measures_pictures_drawn_elsewhere(tmp_path, tiny_clip):
    for kind, shift in (("base", 0), ("lora", 50)):
        (tmp_path / kind).mkdir()
        for number in range(1, 6):
            picture(number + shift).save(tmp_path / kind / f"{kind}_{number}.png")
    pair = f"{tmp_path / 'base'},{tmp_path / 'lora'}"
    run(
        "inference.py",
        "--score-dir",
        pair,
        "--clip-model",
        "none",
        "--output-dir",
        tmp_path / "out",
    )
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    measured = [row["lpips"] for row in record["pictures"] if row["model"] == "lora"]
    expected = metrics.lpips_distances(
        [picture(n) for n in range(1, 6)], [picture(n + 50) for n in range(1, 6)]
    )
    np.testing.assert_allclose(measured, expected, atol=1e-6)
    assert record["summary"]["verdicts"] == []
    (tmp_path / "lora" / "lora_5.png").unlink()
    done = call(
        "inference.py", "--score-dir", pair, "--clip-model", "none", "--output-dir", tmp_path / "o"
    )
    assert_one_line(done, "4")


def test_the_page_stands_alone_and_escapes_text(tmp_path, common, trained):
    prompts = tmp_path / "prompts.txt"
    evil = 'a <script>alert(1)</script> & "raincoat"'
    prompts.write_text(evil)
    config = common | dict(lora_dir=trained / "lora_weights_rank8", prompts=prompts, seeds=1)
    run("inference.py", *options(**config, output_dir=tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert all(' alt="' in tag for tag in re.findall(r"<img[^>]*>", page))


def chromium():
    return (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_opens_in_a_browser_without_errors(compared, tmp_path, width):
    page = compared[0] / "lora_weights_rank8" / "report.html"
    shot = tmp_path / "page.png"
    done = subprocess.run(
        [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0",
         f"--window-size={width},1600", f"--screenshot={shot}", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shot.is_file(), done.stderr
    assert "CONSOLE" not in done.stderr
    assert Image.open(shot).convert("L").getextrema()[0] < 100  # something is written on it


def test_weights_file_name_is_diffusers_own():
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

    assert WEIGHTS == LORA_WEIGHT_NAME_SAFE
