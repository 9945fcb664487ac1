"""inference.py on several adapters, saved images and images of others: what it writes, and what it refuses."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import assert_one_line, browse, call, chromium, options, picture, run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib.adapter_files import WEIGHTS
from lib.dataset import read_dataset
from lib.errors import UserError
from lib.evaluation import results
from lib.evaluation.metrics import lpips_distances
from lib.evaluation.metrics.table import measures
from lib.models import model_digest


@pytest.fixture(scope="module")
def common(tiny_evaluation):
    return tiny_evaluation | dict(seeds=2)


@pytest.fixture(scope="module")
def compared(common, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    config = common | dict(lora_dir=trained, output_dir=folder, lora_scales="0,0.5,1")
    return folder, run("inference.py", *options(**config))


def reseeded(source, target, seed, factor, **changes):
    """Copy a run as that of another training seed, its adapter scaled by `factor`; `changes` are those of its CONFIG."""
    shutil.copytree(source, target)
    record = json.loads((target / "config.json").read_text())
    record["config"] |= dict(seed=seed, **changes)
    (target / "config.json").write_text(json.dumps(record))
    for path in target.rglob(WEIGHTS):
        with safe_open(path, "pt") as file:
            header = file.metadata() | {"seed": str(seed)}
        save_file({key: factor * value for key, value in load_file(path).items()}, path, metadata=header)


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
    assert names == ["comparison.csv", "metrics.json", "overview.webp", "report.html", "summary.md"]
    with Image.open(folder / "comparison" / "overview.webp") as overview:
        assert overview.format == "WEBP"
        assert 4 * 256 < overview.width < 5 * 256 + 100  # the base model and three adapters, a seed each
    record = json.loads((folder / "comparison" / "metrics.json").read_text())
    # Two seeds are too few for change and variety.
    measured = [key for key, _ in measures("compared") if key in ("clip", "concept_similarity")]
    assert len(record["pairs"]) == 3 * len(measured)
    assert "undecided" in done.stdout


def test_an_evaluation_names_what_scored_it(compared, common):
    data = read_dataset(common["data_dir"], 64)
    for place in ("lora_weights_rank8", "comparison"):
        scorers = json.loads((compared[0] / place / "metrics.json").read_text())["scorers"]
        clip = dict(model=common["clip_model"].name, sha256=model_digest(common["clip_model"]))
        assert scorers == dict(
            clip=clip,
            similarity=clip,
            lpips=dict(model="AlexNet v0.1", sha256=lpips_distances.lpips_digest()),
            training_images=dict(folder=str(common["data_dir"]), sha256=data.sha256),
        )


def test_rescore_gives_the_same_figures(compared, tmp_path, common):
    copy = tmp_path / "copy"
    shutil.copytree(compared[0], copy)
    config = {key: common[key] for key in ("clip_model", "similarity_model", "data_dir")}
    run("inference.py", "--rescore", *options(output_dir=copy, **config))
    for name in ("lora_weights_rank8", "lora_weights_unet_only"):
        before, after = (json.loads((place / name / "metrics.json").read_text()) for place in (compared[0], copy))
        assert before["pictures"] == after["pictures"]
        assert before["summary"] == after["summary"]
        assert before["adapter"] == after["adapter"]


def test_two_training_seeds_of_one_experiment_alone(tmp_path, common, trained):
    weights = tmp_path / "weights"
    for seed, factor in ((1, 1.0), (2, 0.5)):
        reseeded(trained / "lora_weights_rank_32", weights / f"mine_seed{seed}", seed, factor)
    config = common | dict(
        lora_dir=weights, output_dir=tmp_path / "out", clip_model="none", similarity_model="clip", seeds=1
    )
    done = call("inference.py", *options(**config))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "comparison" / "metrics.json").read_text())
    assert record["pairs"] == []
    assert list(record["experiments"]) == ["mine"]
    # The published study's mistake is caught among saved images as well.
    shutil.copytree(tmp_path / "out" / "mine_seed1", tmp_path / "out" / "rank_8")
    done = call(
        "inference.py", "--rescore", *options(output_dir=tmp_path / "out", clip_model="none", similarity_model="clip")
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
        "inference.py", "--rescore", *options(output_dir=copy, clip_model=common["clip_model"], similarity_model="clip")
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
        "--similarity-model",
        "clip",
        "--output-dir",
        tmp_path / "out",
    )
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    measured = [row["lpips"] for row in record["pictures"] if row["model"] == "lora"]
    expected = lpips_distances.lpips_distances(
        [picture(n) for n in range(1, 6)], [picture(n + 50) for n in range(1, 6)]
    )
    np.testing.assert_allclose(measured, expected, atol=1e-6)
    assert record["summary"]["verdicts"] == []
    (tmp_path / "lora" / "lora_5.png").unlink()
    done = call(
        "inference.py",
        "--score-dir",
        pair,
        "--clip-model",
        "none",
        "--similarity-model",
        "clip",
        "--output-dir",
        tmp_path / "o",
    )
    assert_one_line(done, "4")


def test_pictures_are_paired_by_their_numbers(tmp_path):
    """Ten files as text would go 1, 10, 2."""
    for kind, form in (("base", "base_{}"), ("lora", "lora_{:02}")):
        (tmp_path / kind).mkdir()
        for number in range(1, 11):
            name = form.format(number) + ".png"
            picture(number).save(tmp_path / kind / name)
    pair = f"{tmp_path / 'base'},{tmp_path / 'lora'}"
    prompts = [("success", "a coat"), ("unrelated", "a cat")]
    [run], seeds = results.read_pair(pair, tmp_path / "out", prompts)
    assert seeds == [1, 2, 3, 4, 5]
    expected = [np.asarray(picture(n)).tolist() for n in range(1, 11)]
    for images in (run.base, run.lora):
        assert [np.asarray(image).tolist() for image in images] == expected
    (tmp_path / "lora" / "lora_07.png").rename(tmp_path / "lora" / "lora_70.png")
    with pytest.raises(UserError, match=r"base_7\.png would be paired with .*lora_08\.png"):
        results.read_pair(pair, tmp_path / "out", prompts)


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


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("name", "width"), [("report.html", 390), ("choose.html", 390)])
def test_the_page_opens_in_a_browser_without_errors(compared, tmp_path, name, width):
    page = compared[0] / "lora_weights_rank8" / name
    shot = tmp_path / "page.png"
    done = browse(page, tmp_path, f"--window-size={width},1600", f"--screenshot={shot}")
    assert shot.is_file(), done.stderr
    assert "CONSOLE" not in done.stderr
    assert Image.open(shot).convert("L").getextrema()[0] < 100  # something is written on it


def test_weights_file_name_is_diffusers_own():
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

    assert WEIGHTS == LORA_WEIGHT_NAME_SAFE
