"""The pages: what comes first, that words follow verdicts, that they fit a phone, and escape text."""

import functools
import html
import json
import math
import re
from pathlib import Path

import pytest
from conftest import browse, chromium
from PIL import Image
from test_evaluation import MARGINS, PROMPTS, SEEDS, base_pairs, fake_run

from lib.evaluation.comparison import compare
from lib.evaluation.metrics.scores import TrainingSet
from lib.evaluation.report import charts, pages, words
from lib.evaluation.statistics import UNCLEAR
from lib.evaluation.verdicts import analyse

EVIL = 'a <script>alert(1)</script> & "raincoat" onload=x'
LONG = "aNameWithoutAnyPlaceToBreakItThatIsWiderThanATelephoneRank32UnetOnlyWithVariedCaptions"


def drawn(run, caption="a raincoat"):
    """A run of test_evaluation with images: grey ones of the base, red ones with the adapter."""
    count = len(PROMPTS) * SEEDS
    run.base = [Image.new("RGB", (64, 64), (90, 90, 90))] * count
    run.lora = [Image.new("RGB", (64, 64), (200, 0, 0))] * count
    run.adapter["metadata"]["caption"] = caption
    run.target = Path("results", run.name)
    return run


def shown(prompts=PROMPTS, warnings=()):
    return dict(
        prompts=prompts,
        seeds=list(range(SEEDS)),
        warnings=list(warnings),
        provenance={},
        config={"steps": 2},
        training=None,
    )


def judged(*runs):
    return analyse(list(runs), PROMPTS, base_pairs(), MARGINS)


def run_page(run, **more):
    return pages.run_page(drawn(run), judged(run), shown(**more))


def comparison_page(groups, **more):
    for members in groups.values():
        for run in members:
            drawn(run)
    summaries = {name: judged(*members) for name, members in groups.items()}
    pairs = compare(groups, PROMPTS, base_pairs(), MARGINS)
    return pages.comparison_page(groups, summaries, pairs, shown(**more))


def two_arms(first="one", second="two"):
    return {
        name: [fake_run(f"{name}{seed}", concept=0.3, near=near, seed=seed) for seed in (1, 2, 3)]
        for name, near in ((first, 0.0), (second, 0.2))
    }


PAGES = {
    "run": functools.cache(lambda: run_page(fake_run(LONG, concept=0.3, near=0.2))),
    "comparison": functools.cache(lambda: comparison_page(two_arms(second=LONG))),
}


# ---- what comes first ----------------------------------------------------------------------


ORDERS = {
    "run": ["<h1>", '<ul class="answers">', "<img", '<section class="findings">', 'class="interval"', "<table>"],
    "comparison": [
        "<h1>",
        'class="beside"',
        "<img",
        'class="judged"',
        '<ul class="differences">',
        '<section class="findings">',
        'class="interval"',
        '<section class="forests">',
        "<table>",
    ],
}


@pytest.mark.parametrize("kind", PAGES)
def test_pictures_and_sentences_then_figures(kind):
    page = PAGES[kind]()
    places = [page.index(part) for part in ORDERS[kind]]
    assert places == sorted(places)
    told = page.index('<section class="findings">')
    for _, prompt in PROMPTS:  # every prompt is seen before any figure
        assert page.index(f">“{prompt}”</") < told


def test_prompts_are_grouped_whatever_their_order():
    rows = [dict(category=c, prompt=p) for c, p in (("unrelated", "x"), ("success", "y"), ("unrelated", "z"))]
    found = [(category, [r["prompt"] for r in members]) for _, category, members in pages.by_category(rows)]
    assert found == [("success", ["y"]), ("unrelated", ["x", "z"])]


def test_without_verdicts_the_page_says_so():
    run = fake_run("one")
    summary = judged(run) | dict(verdicts=[])
    page = pages.run_page(drawn(run), summary, shown())
    assert page.count("No verdicts: they need") == 2  # at the top and where the verdicts would stand


# ---- words follow verdicts -----------------------------------------------------------------


def first_sentences(page):
    """[(kind, sentence)] of the list that a page opens with."""
    top = page[page.index('<ul class="answers">') : page.index("</ul>")]
    found = re.findall(r'<li class="(\w+)"><span class="mark">.</span><span>(.*?)</span></li>', top, re.S)
    return [(kind, " ".join(html.unescape(re.sub(r"<.*?>", "", text)).split())) for kind, text in found]


def test_the_page_opens_with_what_the_verdicts_say():
    page = run_page(fake_run("one", concept=0.3, near=0.24, cat=0.03, noise=0.001))
    assert first_sentences(page)[:3] == [
        ("good", "It learned “a raincoat”."),
        ("bad", "Prompts close to it pick up most of it (80% [79%, 80%])."),
        ("bad", "Unrelated prompts pick up a little of it (10% [10%, 10%])."),
    ]
    page = run_page(fake_run("two"))
    assert first_sentences(page)[:3] == [
        ("bad", "It did not learn “a raincoat”."),
        ("good", "Prompts close to it do not pick it up; their images do change."),
        ("good", "Unrelated prompts do not pick it up; their images do change."),
    ]
    page = run_page(fake_run("three", concept=0.3, clip_noise=0.3))
    assert first_sentences(page)[0] == ("open", "Unclear: did it learn “a raincoat”?")


def test_pictures_that_hardly_changed_are_said_to_stay():
    quiet = judged(fake_run("quiet", lpips=0.0, noise=0.001))
    verdicts = {v["question"]: v for v in quiet["verdicts"]}
    sentence = words.plain_sentence(verdicts["unrelated kept"], "it", quiet)
    assert sentence == "Unrelated prompts do not pick it up; their images stay as they were."


QUESTIONS = ["learned", "near kept", "unrelated kept", "memorised", "collapsed"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_each_answer_has_a_sentence_of_its_own(question):
    summary = judged(fake_run("one", concept=0.3, near=0.2, cat=0.1))
    for more in (None, summary):
        found = {
            answer: words.plain_sentence(dict(question=question, answer=answer), "it", more)
            for answer in ("yes", "no", UNCLEAR)
        }
        assert len(set(found.values())) == 3
        assert [a for a, s in found.items() if s.startswith("Unclear: ")] == [UNCLEAR]
        assert all(s.endswith((".", "?")) and "{" not in s for s in found.values())
    with pytest.raises(KeyError):  # no answer passes for another
        words.plain_sentence(dict(question="learned", answer="perhaps"), "it", summary)


def test_no_share_is_told_of_a_concept_that_was_not_gained():
    summary = judged(fake_run("one", near=0.2))
    verdict = dict(question="near kept", answer="no")
    assert words.plain_sentence(verdict, "it", summary) == "Prompts close to it pick it up."


def test_the_concept_is_called_by_its_caption_where_it_has_one():
    def name(*captions):
        return words.concept_name([dict(metadata=dict(caption=c) if c else {}) for c in captions])

    assert name("a {braced} coat", "a {braced} coat") == "“a {braced} coat”"
    assert name("a coat", "a hat") == name("32 captions") == name(None) == name() == "the concept"
    learned = dict(question="learned", answer="yes")
    assert words.plain_sentence(learned, "“{x}”") == "It learned “{x}”."


def rows_of(page, kind=""):
    """The rows of the sheet that a comparison opens with, or of those of a class: [[cell as text]]."""
    sheet = page[page.index('<div class="beside"') : page.index('<ul class="differences">')]
    rows = re.split(r'<div role="row"', sheet)[1:]
    cells = [
        re.findall(r'<div class="[^"]*" role="\w+".*?>(.*?)</div>', row, re.S) for row in rows if row.startswith(kind)
    ]
    return [[" ".join(html.unescape(re.sub(r"<(?!img).*?>", " ", cell)).split()) for cell in row] for row in cells]


def test_a_comparison_has_a_column_for_the_base_and_each_adapter():
    page = comparison_page(two_arms("lora_weights_rank_32", "lora_weights_protected"))
    head, *rows = rows_of(page)
    assert head == ["", "Base model", "rank 32", "protected"]
    pictures = rows[: len(PROMPTS)]
    labels = [
        "“a raincoat” The concept: should change. seeds 0, 1",
        "“a yellow coat” Close to the concept: should stay as it was. seeds 0, 1",
        "“a cat” Unrelated to it: should stay as it was. seeds 0, 1",
    ]
    assert [row[0] for row in pictures] == labels
    for row, (_, prompt) in zip(pictures, PROMPTS, strict=True):
        for cell, name in zip(row[1:], head[1:], strict=True):
            alts = re.findall('alt="(.*?)"', cell)
            assert alts == [f"{name}: “{prompt}”, seed {seed}" for seed in (0, 1)]
    uris = [re.findall('src="(.*?)"', cell) for cell in pictures[0][1:]]
    assert uris[0] != uris[1] == uris[2]  # the base's are grey, all adapters' red


def test_verdicts_stand_under_their_adapters():
    groups = two_arms()
    groups["one"] = [  # of which unrelated prompts cannot be judged
        fake_run(f"one{seed}", concept=0.3, cat=0.1 * (seed == 1), seed=seed) for seed in (1, 2, 3)
    ]
    page = comparison_page(groups)
    rows = rows_of(page, ' class="judged"')
    assert [row[0].split("?")[0] for row in rows] == ["Learned", "Near kept", "Unrelated kept", "Collapsed"]
    assert [row[1] for row in rows] == [""] * 4  # nothing is judged of the base model
    assert rows[0][2:] == ["✓ yes It learned “a raincoat”."] * 2
    assert rows[1][2].startswith("✓ yes Prompts close to it do not pick it up")
    assert rows[1][3].startswith("✗ no Prompts close to it pick it up (66% [59%, 74%]).")
    assert rows[2][2].startswith("? unclear Do unrelated prompts pick it up?")
    colours = re.findall(r'<div class="(good|bad|open)" role', page)
    marks = ["✓✗?".index(cell[0]) for row in rows for cell in row[2:]]
    assert colours == [("good", "bad", "open")[mark] for mark in marks]


def test_experiments_without_a_verdict_keep_their_column():
    found = dict(question="learned", answer="yes", name="two")
    assert pages.verdict_rows([("learned", [found])], ["one", "two"])[0]["cells"] == [None, found]
    groups = two_arms()
    drawn(groups["one"][0]), drawn(groups["two"][0])
    summaries = {name: judged(*members) | dict(verdicts=[]) for name, members in groups.items()}
    page = pages.comparison_page(groups, summaries, [], shown())
    assert "No verdicts: they need" in page[: page.index('<ul class="differences">')]


@pytest.mark.parametrize("adapters", [1, 2, 3, 6])
def test_no_picture_of_a_comparison_is_shown_twice(adapters):
    prompts = [(category, f"{category} {n}") for n in range(3) for category in ("unrelated", "success", "near")]
    pictures = [Image.new("RGB", (8, 8))] * len(prompts) * 4
    columns = [pages.Column(str(number), pictures) for number in range(1 + adapters)]
    few, others = pages.comparison_sheets(columns, dict(prompts=prompts, seeds=[5, 6, 7, 8]))
    assert [row["prompt"] for row in few] == ["success 0", "success 1", "near 0", "unrelated 0", "unrelated 1"]
    each = [(row["prompt"], seed) for row in few + others for seed in row["seeds"]]
    assert len(set(each)) == len(each)
    seen = [seed for prompt, seed in each if prompt == "success 0"]
    assert seen == {1: ["5", "6", "7"], 2: ["5", "6"]}.get(adapters, ["5", "6"])
    assert {prompt for prompt, _ in each} == {prompt for _, prompt in prompts}
    assert [row["category"] for row in others] == sorted(
        [row["category"] for row in others], reverse=True, key=["unrelated", "near", "success"].index
    )


def test_names_are_shown_plainly():
    assert words.plain_names(["lora_weights_rank_32", "my_coat"]) == {
        "lora_weights_rank_32": "rank 32",
        "my_coat": "my coat",
    }
    alike = ["lora_weights_coat", "coat", "lora_weights_"]
    assert words.plain_names(alike) == {name: name for name in alike}
    assert words.plain_names(["lora_weights_"]) == {"lora_weights_": "lora_weights_"}


def test_a_comparison_counts_its_differences():
    page = comparison_page(two_arms())
    pairs = compare(two_arms(), PROMPTS, base_pairs(), MARGINS)
    [sentence] = words.difference_sentences(pairs)
    assert sentence in page
    for row in pairs:
        same = [other for other in pairs if other["answer"] == row["answer"]]
        assert f"{row['answer']} in {len(same)}" in sentence
    many = [row | dict(second=f"arm {number}") for number in range(4) for row in pairs]
    [sentence] = words.difference_sentences(many)  # no list before the images
    assert sentence.startswith("4 pairs of experiments: ")
    assert sentence.endswith(f" of {len(many)} comparisons.")


# ---- intervals as bars ---------------------------------------------------------------------


def places(row):
    return {k: float(v) for k, v in re.findall(r"--([\w-]+): (-?[\d.]+)%", row["style"])}


def test_bars_stand_where_their_intervals_do():
    rows = [
        dict(mean=0.2, low=0.1, high=0.3, band=(-0.1, 0.1)),
        dict(mean=0.0, low=math.nan, high=math.nan, band=(-0.1, 0.1)),
    ]
    first, second = (places(row) for row in charts.placed(rows))
    assert first["zero"] == second["zero"]
    unit = first["range-width"] / 2  # of 0.1
    assert first["mean"] - first["zero"] == pytest.approx(2 * unit, abs=0.02)
    assert first["range-at"] - first["zero"] == pytest.approx(unit, abs=0.02)
    assert first["band-width"] == pytest.approx(2 * unit, abs=0.02)
    assert second["range-width"] == 0  # no interval, no bar
    for found in (first, second):
        assert all(0 <= value <= 100 for value in found.values())


def test_questions_about_the_similarity_share_a_scale():
    found = charts.verdict_bars({"one": judged(fake_run("one", concept=0.3, near=0.2, cat=0.0))})
    zeros = {places(found[q]["one"])["zero"] for q in ("learned", "near kept", "unrelated kept")}
    assert len(zeros) == 1
    means = [places(found[q]["one"])["mean"] for q in ("learned", "near kept", "unrelated kept")]
    assert means == sorted(means, reverse=True)


# ---- escapes -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_text_from_anybody_is_escaped(kind):
    prompts = [(category, f"{EVIL} {prompt}") for category, prompt in PROMPTS]
    groups = two_arms(EVIL, "two")
    for members in groups.values():
        for run in members:
            drawn(run, caption=EVIL)
    summaries = {name: judged(*members) for name, members in groups.items()}
    run = groups[EVIL][0]
    for summary in summaries.values():
        for row, (_, prompt) in zip(summary["prompts"], prompts, strict=True):
            row["prompt"] = prompt
    if kind == "run":
        page = pages.run_page(run, summaries[EVIL], shown(prompts, [EVIL]))
    else:
        pairs = compare(groups, PROMPTS, base_pairs(), MARGINS)
        page = pages.comparison_page(groups, summaries, pairs, shown(prompts, [EVIL]))
    assert "<script" not in page
    assert '& "raincoat"' not in page  # neither in text nor as the end of an attribute
    assert page.count("&lt;script&gt;") > 10
    assert not re.search(r'(src|href)="(?!data:)', page)


# ---- on a phone and on a desk, light and dark ----------------------------------------------


# Chromium's own window is never narrower than 500 pixels, so the page lies in a frame.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><title>not measured</title>
<iframe style="border: 0" width="{width}" height="900" srcdoc="{page}"></iframe>"""
# What the page reports in the title of the outer one: elements that stick out of the window, or are
# wider than it. What scrolls by itself may be wide inside.
MEASURE = """<script>
const out = [], wide = innerWidth;
for (const e of document.querySelectorAll("body *")) {
  const scroller = e.parentElement.closest(".pairs, .scroll, .chart, pre");
  const box = e.getBoundingClientRect();
  if (!scroller && (box.width > wide || box.right > wide + 1 || box.left < -1)) out.push(e.outerHTML.slice(0, 80));
}
parent.document.title = JSON.stringify({out, width: wide, page: document.documentElement.scrollWidth,
  paper: getComputedStyle(document.body).backgroundColor});
</script>"""


OUTER = """<!doctype html><meta name="color-scheme" content="light dark"><title></title><script>
var reports = []; addEventListener("load", () => { document.title = JSON.stringify(reports) })
</script>"""


def measured(framed, script, tmp_path, *more):
    """What `script` reports of each (page, width) of `framed`, all in one browser; `more` are its options."""
    frames = [
        FRAME.partition("\n")[2].format(
            width=width, page=html.escape(page + script.replace("parent.document.title", f"parent.reports[{number}]"))
        )
        for number, (page, width) in enumerate(framed)
    ]
    path = tmp_path / "page.html"
    path.write_text(OUTER + "".join(frames), encoding="utf-8")
    done = browse(path, tmp_path, "--window-size=1400,1000", "--dump-dom", *more)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)[1]
    return [json.loads(report) for report in json.loads(html.unescape(title))]


@pytest.mark.skipif(chromium() is None, reason="no Chromium here: the style sheet's rules are tested instead")
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_nothing_is_wider_than_the_window(width, dark, tmp_path):
    framed = [(page().replace("<details>", "<details open>"), width) for page in PAGES.values()]
    reports = measured(framed, MEASURE, tmp_path, f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    assert len(reports) == len(PAGES)
    for report in reports:
        assert report["width"] == width
        assert report["out"] == []
        assert report["page"] <= width
        paper = [int(number) for number in re.findall(r"\d+", report["paper"])[:3]]
        assert max(paper) < 60 if dark else min(paper) > 240


# Where the first row's images stand, where the first verdicts do, and whether they can be seen without scrolling.
PLACES = """<script>
const left = e => Math.round(e.getBoundingClientRect().left), found = s => [...document.querySelector(s).children];
const scroller = document.querySelector(".scroll"), images = () => found(".beside .heads + [role=row]").map(left);
const first = images(), verdicts = found(".beside .judged").map(left);
scroller.scrollLeft = 150;
parent.document.title = JSON.stringify({fits: scroller.scrollWidth <= scroller.clientWidth, images: first, verdicts,
  scrolled: images(), side: document.querySelector(".beside img").width});
</script>"""


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")
def test_adapters_stand_side_by_side(tmp_path):
    cases = [
        (1280, 2, True, 160),
        (1280, 4, True, 180),
        (1280, 9, False, 130),
        (390, 2, True, 110),
        (390, 4, False, 100),
    ]
    groups = {f"adapter {n}": [fake_run(f"adapter {n}", concept=0.3, seed=n)] for n in range(9)}
    of = {n: comparison_page(dict(list(groups.items())[:n])) for n in (2, 4, 9)}
    reports = measured([(of[adapters], width) for width, adapters, *_ in cases], PLACES, tmp_path)
    for (_, _, fits, side), report in zip(cases, reports, strict=True):
        assert report["fits"] == fits
        assert report["verdicts"] == report["images"]
        assert report["images"] == sorted(report["images"])
        assert report["side"] >= side  # large enough to see
        assert report["scrolled"][:2] == report["images"][:2]  # label and base model stay in sight
        assert (report["scrolled"][2:] == report["images"][2:]) == fits


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("kind", PAGES)
def test_a_page_opens_without_errors(kind, tmp_path):
    shot = tmp_path / "page.png"
    path = tmp_path / "page.html"
    path.write_text(PAGES[kind](), encoding="utf-8")
    done = browse(path, tmp_path, "--window-size=390,1600", f"--screenshot={shot}")
    assert shot.is_file(), done.stderr
    assert "CONSOLE" not in done.stderr
    colours = {colour for _, colour in Image.open(shot).convert("RGB").getcolors(2**24)}
    assert {(90, 90, 90), (200, 0, 0)} <= {tuple(round(v, -1) for v in c) for c in colours}


def test_the_style_sheet_folds_what_is_wide():
    """What keeps a page within a phone's window, for machines without a browser."""
    sheet = (Path(pages.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    wide, narrow = re.split(r"@media \(max-width: \d+px\) \{", sheet)
    for selector in (".scroll", ".chart", "pre"):
        assert re.search(rf"^{re.escape(selector)} {{[^}}]*overflow-x: auto", wide, re.M), selector
    assert re.search(r"\.pairs \{ display: flex; overflow-x: auto", narrow)
    assert re.search(r"\.beside \{[^}]*grid-template-columns: repeat\(var\(--columns\), minmax", narrow)
    assert re.search(r"^  table, [^}]*display: block", narrow, re.M)
    assert re.search(r"\.forests \.interval \{ grid-template-columns: 1fr;", narrow)
    assert re.search(r"^body \{[^}]*overflow-wrap: anywhere", wide, re.M)
    assert 'name="viewport" content="width=device-width' in PAGES["run"]()


def test_images_beyond_the_first_are_links_to_their_files(monkeypatch):
    monkeypatch.setattr(pages, "EMBEDDED", 3)
    sources = re.findall('<img[^>]* src="(.*?)"', run_page(fake_run("one")).partition('<section class="findings">')[0])
    assert all(source.startswith("data:") for source in sources[:3])
    assert sources[3] == "images/a-raincoat/lora_1.png"
    assert sources[-1] == f"images/a-cat/lora_{SEEDS - 1}.png"
    sources = re.findall('<img[^>]* src="(.*?)"', comparison_page(two_arms()))
    assert "../one1/images/a-cat/base_0.png" in sources
    assert "../two1/images/a-cat/lora_1.png" in sources


# ---- the nearest training images ---------------------------------------------------------


def test_of_the_training_pictures_only_those_shown_are_read():
    """There may be thousands, and reading each takes time."""

    class Recorded:
        read = []

        def __len__(self):
            return 5

        def __getitem__(self, place):
            self.read.append(place)
            return Image.new("RGB", (64, 64), (0, 50 * place, 0))

    training = TrainingSet(list("abcde"), Recorded(), (), None, None)
    run = drawn(fake_run("one"))
    for number, row in enumerate(run.rows):
        row.update(nearest_picture="bd"[number // 2 % 2], nearest_similarity=number / 1000)
    cards = pages.nearest_cards(run, training)
    assert [card["name"] for card in cards] == ["d", "b"]
    assert sorted(Recorded.read) == [1, 3]
    greens = [pages.image_uri(training.pictures[place], 192) for place in (3, 1)]
    assert [card["training"] for card in cards] == greens
