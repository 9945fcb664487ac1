"""The overview, one image that stands for an evaluation: the base model on the left, adapters beside it."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from lib.evaluation.report import charts
from lib.images import fit_lines, fit_text

LONG = "aNameWithoutAnyPlaceToBreakItThatIsWiderThanATelephoneRank32UnetOnlyWithVariedCaptions"


@pytest.mark.parametrize(("adapters", "seeds"), [(1, 3), (2, 2), (3, 1), (7, 1)])
def test_the_overview_has_the_base_left_and_the_adapters_beside_it(adapters, seeds):
    categories = ["unrelated", "success", "success", "success", "near", "near", "unrelated"]
    prompts = [
        (category, f"a prompt that is too long for its row {number}" * 9) for number, category in enumerate(categories)
    ]

    def pictures(red):
        return [Image.new("RGB", (32, 32), (red, 0, 40 * n)) for n in range(len(prompts)) for _ in range(4)]

    columns = [("Base model", pictures(0))]
    columns += [(f"{LONG} of {n}", pictures(20 * n)) for n in range(1, adapters + 1)]
    pixels = np.asarray(charts.overview_figure(columns, prompts, side=64)).astype(int)
    seen = []
    for line in pixels:
        places = np.flatnonzero((line[:, 1] == 0) & (line[:, 0] % 20 == 0) & (line[:, 2] % 40 == 0))
        if len(places) == len(columns) * seeds * 64:
            # From left to right the base model's, then each adapter's, in their order.
            assert (line[places, 0] == np.repeat(20 * np.arange(1 + adapters), seeds * 64)).all()
            assert len(set(line[places, 2])) == 1
            seen.append(line[places[0], 2] // 40)
    # Two that were taught, one near them, two unrelated, each as high as an image.
    assert [seen[i] for i in range(0, len(seen), 64)] == [1, 2, 4, 0, 6]
    assert len(seen) == 5 * 64


def test_an_overview_of_very_many_adapters_fits_into_webp():
    columns = [(str(number), [Image.new("RGB", (256, 256))]) for number in range(90)]
    sheet = charts.overview_figure(columns, [("success", "a coat")])
    assert 12_000 < sheet.width <= 16_383


def test_titles_are_broken_between_words():
    font = ImageFont.load_default(20)
    for text in ("rank 32", "no text encoder and captions that vary", "x" * 50, f"short {'x' * 50} words"):
        lines = fit_lines(text, font, 120)
        assert len(lines) <= 2
        assert all(font.getlength(line) <= 120 for line in lines)
        kept = " ".join(lines)
        assert kept == text or "…" in kept and text.startswith(kept.split("…")[0])


def test_a_text_is_cut_as_little_as_needed():
    font = ImageFont.load_default(20)
    assert fit_text("rank 32", font, 120) == "rank 32"
    cut = fit_text("a raincoat in the rain", font, 120)
    assert cut.endswith("…") and font.getlength(cut) <= 120
    assert font.getlength("a raincoat in the rain"[: len(cut)] + "…") > 120
    assert fit_text("wide", font, 5) == "…"
