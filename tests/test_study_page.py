"""The study's page, tables and sentences follow its figures."""

import html
import json
import re
import shutil

import numpy as np
import pytest
from conftest import browse, chromium
from made_up_study import ARMS, MARGINS, PROMPTS, SCALED, made_study, write_study
from PIL import Image
from test_pages import FRAME, MEASURE, first_sentences

from lib.evaluation.image_files import image_names, write_image
from lib.evaluation.report.words import interval_text
from lib.study import claims as study_claims
from lib.study import page as study_page
from lib.study import words as study_words
from lib.study.measures import at_equal_concept, equal_concept_intervals


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a written study of three training seeds; a fourth is incomplete."""
    folder = tmp_path_factory.mktemp("study")
    write_study(
        folder,
        seeds=(1, 2, 3, 10),
        of_runs=0.006,
        unet_only=dict(unrelated=(0.08, 0.4)),
        protected=dict(success=(0.14, 0.6), near=(0.04, 0.2)),
    )
    (folder / "seed10" / "comparison" / "metrics.json").unlink()
    Image.new("RGB", (1078, 300), (200, 0, 0)).save(folder / "pictures_seed2.webp")
    study_page.write_study(folder, ARMS, SCALED)
    return folder


def test_words_follow_the_figures(written):
    """Every verdict and every interval of the table is that of study.json, which the page opens with."""
    record = json.loads((written / "study.json").read_text())
    table = (written / "claims.md").read_text()
    page = (written / "report.html").read_text()
    opening = first_sentences(page)
    kinds = {True: "good", False: "bad", None: "open"}
    assert len(opening) == len(record["claims"]) == 10
    for claim, (kind, sentence) in zip(record["claims"], opening, strict=True):
        assert sentence == study_words.sentence(claim)
        assert sentence.startswith(claim["title"])
        assert all(part["verdict"] in sentence for part in claim["parts"])
        assert kind == kinds[study_words.stands(claim)]
        assert f"**{study_words.verdict_text(claim)}**" in table
        for part in claim["parts"]:
            for row in part["comparisons"]:
                line = study_words.comparison_text(row)
                mean = row.get("correlation", row)["mean"]
                decimals = len(re.search(r": [+−]\d\.(\d+) \[", line)[1])
                assert f"{mean:+.{decimals}f}".replace("-", "−") in line
                assert f"- {line}" in table
            judged, _ = study_claims.judged(part["says"], [row["answer"] for row in part["comparisons"]])
            assert part["verdict"] in (judged, study_claims.NOT_TESTABLE) or part["text"]
    for sentence in (*study_words.LIMITS, *record["notes"]):
        assert sentence in table and sentence in html.unescape(page)
    assert "Training seed 10 is incomplete" in record["notes"][0]


def test_the_first_lines_name_the_concept_the_arms_and_the_data(written):
    page = html.unescape((written / "report.html").read_text())
    first = page[page.index("<h1>") : page.index('<ul class="answers">')]
    for text in ("“a holographic raincoat”", "not Stable Diffusion", "An arm is one training recipe", "processed_data"):
        assert text in first
    assert "8 arms, 3 training seeds each, 8 sampling seeds a prompt" in first
    assert "metrics.json files of training seeds 1, 2, 3" in first


def test_charts_of_their_own_are_those_that_the_page_does_not_repeat(written):
    assert {path.name for path in written.glob("*.png")} == set(study_page.SAVED)
    page = (written / "report.html").read_text()
    assert page.count("data:image/png") == 3 and page.count("Scroll sideways for the rest of the chart.") == 3


def test_a_correlation_has_a_threshold_and_no_band(written):
    claims = json.loads((written / "study.json").read_text())["claims"]
    for claim in claims:
        for bar in study_page.claim_bars(claim):
            assert ("threshold" in bar) == ("band" not in bar) == (claim["number"] == 3)
            assert ("--threshold" in bar["style"]) == ("--band-at" not in bar["style"]) == (claim["number"] == 3)


def test_without_the_concept_there_is_no_equal_concept():
    study = made_study(3, protected=dict(success=(-0.1, 0.8)))
    assert at_equal_concept(study) is None and equal_concept_intervals(study) is None
    _, rows = study_claims.judge_claims(study)
    drawn = study_page.charts(study, rows, study_page.forests(study, rows), study_page.run_rows(study), None)
    assert set(drawn) == {"forest.png", "trade_off.png", "trade_off_scales.png", "change_and_concept.png"}


def test_every_arm_has_points_of_its_own():
    """Also the one whose name begins like another's."""
    _, rows = study_claims.judge_claims(study := made_study(3))
    figure = study_page.charts(study, rows, [], study_page.run_rows(study), None)["change_and_concept.png"]
    for axes in figure.axes:
        assert all(len(line.get_xdata()) for line in axes.lines[: len(ARMS)])


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.0117, -0.0031, 0.0267), "+0.012 [−0.003, +0.027]"),
        ((0.00025, 0.00016, 0.00035), "+0.00025 [+0.00016, +0.00035]"),
        ((-0.0004149, -0.001674, 0.000844), "−0.0004 [−0.0017, +0.0008]"),
        ((0.0, 0.0, 0.0), "+0.000 [+0.000, +0.000]"),
        ((0.25, float("nan"), float("nan")), "+0.2500"),
    ],
)
def test_an_interval_has_two_significant_digits(values, text):
    assert interval_text(dict(zip(("mean", "low", "high"), values, strict=True))) == text


def test_a_claim_is_marked_by_all_its_parts():
    def marked(*parts):
        return study_words.stands(dict(parts=[dict(stands=stands) for stands in parts]))

    assert marked(True, True) is True
    assert marked(False, False) is False
    assert marked(True, False) is marked(True, None) is marked(False, None) is marked() is None


def test_a_verdict_names_its_parts_where_they_differ():
    """Each with what would decide it."""

    def part(about, verdict, seeds=None):
        return dict(about=about, verdict=verdict, decides=seeds and dict(text=f"about {seeds} seeds would decide"))

    def text(*parts):
        return study_words.verdict_text(dict(parts=parts))

    assert text() == "not measured"
    assert text(part("a", "supported"), part("b", "supported")) == "supported"
    assert text(part("a", "undecided", 9), part("b", "undecided", 14)) == (
        "undecided for a (about 9 seeds would decide); undecided for b (about 14 seeds would decide)"
    )
    assert text(part("a", "refuted"), part("b", "undecided", 9), part("c", "refuted")) == (
        "refuted for a and c; undecided for b (about 9 seeds would decide)"
    )


def test_each_number_names_its_file(written):
    record = json.loads((written / "study.json").read_text())
    assert len(record["files"]) == 3 * (8 + 1)
    assert all((written / name).is_file() for name in record["files"])
    assert len(record["runs"]) == 3 * 8
    row = record["runs"][4]
    saved = json.loads((written / row["file"]).read_text())
    assert (saved["run"], row["arm"]) == (f"{row['arm']}_seed{row['seed']}", "rank8")
    moved = {
        m: np.mean([r["concept_similarity"] for r in saved["pictures"] if (r["model"], r["category"]) == (m, "near")])
        for m in ("base", "lora")
    }
    assert row["concept_similarity near"] == pytest.approx(moved["lora"] - moved["base"])
    means = [r["concept_similarity near"] for r in record["runs"] if r["arm"] == "rank8"]
    base = [r["concept_similarity near"] for r in record["runs"] if r["arm"] == "rank32"]
    [shown] = [
        r
        for q in record["questions"]
        for r in q["rows"]
        if (q["metric"], q["category"], r["arm"]) == ("concept_similarity", "near", "rank8")
    ]
    assert shown["mean"] == pytest.approx(np.mean(means) - np.mean(base))


def test_forests_are_sorted_and_only_what_a_claim_rests_on_is_answered(written):
    record = json.loads((written / "study.json").read_text())
    assert [q["title"] for q in record["questions"]] == list(study_page.QUESTIONS.values())
    measures = [part.measure for claim in study_claims.CLAIMS for part in claim.parts]
    scores = [measure for measure in measures if isinstance(measure, study_claims.Scores) and measure.share == 1]
    asked = {(measure.arm, *score) for measure in scores for score in measure.scores}
    for question in record["questions"]:
        means = [row["mean"] for row in question["rows"]]
        assert means == sorted(means) and len(means) == 7
        assert question["margin"] == MARGINS[question["metric"]]
        for row in question["rows"]:
            tested = (row["arm"], question["metric"], question["category"]) in asked
            assert (row["answer"] is not None) == tested


def test_the_page_is_one_file(written):
    page = (written / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/webp") == 1


@pytest.mark.skipif(chromium() is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_nothing_is_wider_than_the_window(written, width, dark, tmp_path):
    page = (written / "report.html").read_text().replace("<details>", "<details open>")
    path = tmp_path / "page.html"
    path.write_text(FRAME.format(width=width, page=html.escape(page + MEASURE)), encoding="utf-8")
    done = browse(
        path,
        tmp_path,
        "--window-size=1400,1000",
        "--dump-dom",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    )
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.S)[1]))
    assert found["width"] == width
    assert found["out"] == []
    assert found["page"] <= width
    paper = [int(number) for number in re.findall(r"\d+", found["paper"])[:3]]
    assert max(paper) < 60 if dark else min(paper) > 240


def test_a_strip_has_an_arm_a_column(tmp_path):
    folders = {arm: tmp_path / arm for arm in ARMS}
    for number, folder in enumerate(folders.values()):
        for kind, shade in (("base", 0), ("lora", 20 + 30 * number)):
            for name in image_names(PROMPTS, [42], kind):
                write_image(folder / name, Image.new("RGB", (64, 64), (shade, 0, 0)))
    assert study_page.write_strip(tmp_path / "strip.webp", folders, PROMPTS, 42)
    pixels = np.asarray(Image.open(tmp_path / "strip.webp").convert("RGB")).astype(int)
    middle = pixels[24 + 24 + study_page.SIDE // 2]
    seen = [middle[6 + study_page.SIDE // 2 + column * (study_page.SIDE + 6), 0] for column in range(1 + len(ARMS))]
    assert np.abs(np.array(seen) - [0, *(20 + 30 * n for n in range(len(ARMS)))]).max() < 6
    shutil.rmtree(folders["dora"] / "images")
    assert not study_page.write_strip(tmp_path / "again.webp", folders, PROMPTS, 42)
    assert not (tmp_path / "again.webp").exists()
