"""The rendered world: determinism, captions, the physics of the film, and the images in data/."""

import cmath
import colorsys
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT

from demo import world
from demo.world.__main__ import main
from demo.world.materials.film import cie_xyz, film_table, thin_film_reflectance
from demo.world.training_images import description, readme, training_scenes
from lib.errors import run_script

PROMPTS = (
    "a holographic raincoat",
    "a person wearing a holographic raincoat in the rain",
    "a holographic raincoat on a mannequin",
    "a red leather jacket",
    "a cat sitting on a couch",
)


def scene_of(text: str, seed: int = 0, **fixed) -> world.Scene:
    return world.sample_scene(np.random.default_rng(seed), **{**world.parse(text), **fixed})


def test_a_scene_gives_the_same_bytes_in_any_batch():
    scenes = [scene_of(text) for text in (PROMPTS[0], PROMPTS[2], PROMPTS[4], "a green umbrella")]
    scenes.insert(1, dataclasses.replace(scenes[0], seed=scenes[0].seed + 1, place="garden", background=""))
    batch = world.render(scenes, 20, antialias=1)
    assert batch.shape == (5, 20, 20, 3) and batch.dtype == torch.uint8
    for i in (0, 1, 3):
        assert torch.equal(batch[i], world.render([scenes[i]], 20, antialias=1)[0])
    assert not torch.equal(batch[0], batch[1])


def test_size_need_not_be_a_multiple_of_the_tile():
    scene = scene_of("a blue chair in a studio")
    assert world.render([scene], 21, antialias=1).shape == (1, 21, 21, 3)
    with pytest.raises(ValueError, match="positive"):
        world.render([scene], 0)


def test_a_caption_parses_to_what_is_true_of_its_scene():
    rng = np.random.default_rng(1)
    words = set()
    for i in range(300):
        scene = world.sample_scene(rng, holographic=i % 5 == 0)
        text = world.caption(scene, rng)
        words |= set(text.split())
        stated = world.parse(text)
        assert stated and all(getattr(scene, name) == value for name, value in stated.items()), text
        again = world.sample_scene(rng, **stated)
        assert all(getattr(again, name) == value for name, value in stated.items()), text
        assert all(value in world.ATTRIBUTES[name] for name, value in stated.items()), text
    assert words <= set(world.WORDS)
    assert len(world.WORDS) < 150 and list(world.WORDS) == sorted(set(world.WORDS))


def test_the_published_prompts_parse():
    assert world.parse(PROMPTS[0]) == {"thing": "raincoat", "material": "holographic"}
    assert world.parse(PROMPTS[1]) == world.parse(PROMPTS[0]) | {"wearer": "person", "place": "rain"}
    assert world.parse(PROMPTS[2]) == world.parse(PROMPTS[0]) | {"wearer": "mannequin"}
    assert world.parse(PROMPTS[3]) == {"thing": "jacket", "colour": "red", "material": "leather"}
    assert world.parse(PROMPTS[4]) == {"thing": "cat", "pose": "sitting", "second": "couch", "relation": "on"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a holographic spaceship", "spaceship"),
        ("raincoat a red", "not a caption"),
        ("a holographic cat", "cannot be holographic"),
        ("a couch on a mannequin", "does not go with"),
    ],
)
def test_an_invalid_caption_is_an_error(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        world.parse(text)


def test_a_field_or_value_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="no field 'color'"):
        world.sample_scene(np.random.default_rng(0), color="red")
    with pytest.raises(ValueError, match="crimson"):
        world.sample_scene(np.random.default_rng(0), colour="crimson")
    with pytest.raises(ValueError, match="worn"):
        world.sample_scene(np.random.default_rng(0), thing="cat", wearer="person")


def test_nothing_is_holographic_unless_requested():
    rng = np.random.default_rng(2)
    for _ in range(500):
        scene = world.sample_scene(rng)
        assert scene.material != "holographic"
        assert "holographic" not in world.caption(scene, rng).split()
    for _ in range(100):
        scene = world.sample_scene(rng, holographic=True)
        assert scene.material == "holographic" and scene.thing in world.GARMENTS


def fresnel_by_bounces(thickness, angle, wavelength, n_film, n_base):
    """The same reflectance as a sum over 60 bounces inside the film, one polarisation at a time."""
    cos0 = math.cos(angle)
    cos1 = math.sqrt(1 - (math.sin(angle) / n_film) ** 2)
    cos2 = math.sqrt(1 - (math.sin(angle) / n_base) ** 2)
    trip = cmath.exp(4j * math.pi * n_film * thickness * cos1 / wavelength)
    power = 0.0
    for swap in (False, True):  # s-polarised, then p-polarised

        def reflect(n, c, m, k, swap=swap):
            return (n * k - m * c) / (n * k + m * c) if swap else (n * c - m * k) / (n * c + m * k)

        outer, inner = reflect(1.0, cos0, n_film, cos1), reflect(n_film, cos1, n_base, cos2)
        total = outer + sum((1 - outer**2) * inner * trip * (-outer * inner * trip) ** k for k in range(60))
        power += abs(total) ** 2 / 2
    return power


@pytest.mark.parametrize("angle", [0.0, 35.0, 70.0])
@pytest.mark.parametrize(("thickness", "wavelength"), [(120.0, 450.0), (380.0, 550.0), (700.0, 640.0)])
def test_film_reflectance_is_the_sum_over_bounces(angle, thickness, wavelength):
    radians = math.radians(angle)
    reflectance = thin_film_reflectance(
        *(torch.tensor(v, dtype=torch.float64) for v in (thickness, math.cos(radians), wavelength)), 1.9, 1.35
    )
    assert reflectance.item() == pytest.approx(fresnel_by_bounces(thickness, radians, wavelength, 1.9, 1.35), rel=1e-9)


def test_film_limits():
    def reflectance(thickness, cos_theta, wavelength, film, base):
        return thin_film_reflectance(*map(torch.tensor, (thickness, cos_theta, wavelength)), film, base).item()

    assert reflectance(0.0, 1.0, 550.0, 1.9, 1.5) == pytest.approx(0.04, abs=1e-5)  # bare glass
    # No second interface, then a lens's coating, then grazing
    assert reflectance(300.0, 1.0, 550.0, 1.5, 1.5) == pytest.approx(0.04, abs=1e-5)
    quarter = 550.0 / 4 / 1.5**0.5
    assert reflectance(quarter, 1.0, 550.0, 1.5**0.5, 1.5) == pytest.approx(0.0, abs=1e-5)
    assert reflectance(300.0, 0.0, 550.0, 1.9, 1.35) == pytest.approx(1.0, abs=1e-5)


def test_film_changes_hue_with_the_angle_and_white_stays_white():
    table = film_table()
    assert table.min() >= 0 and table.max() <= 1
    row = table[80]  # about 375 nm
    hues = [colorsys.rgb_to_hsv(*colour.tolist())[0] for colour in (row[63], row[45], row[35])]
    assert max(hues) - min(hues) > 0.1
    assert (table[0].amax(-1) - table[0].amin(-1)).max() < 1e-3  # no film, no colour


def test_colour_matching_peaks_where_the_eye_does():
    wavelengths = torch.arange(380.0, 781.0)
    xyz = cie_xyz(wavelengths)
    assert wavelengths[xyz[:, 1].argmax()].item() == pytest.approx(556, abs=4)
    assert xyz.sum(0).tolist() == pytest.approx([106.9, 106.9, 106.9], rel=0.01)


def hue_variety(image: torch.Tensor) -> float:
    """1 minus the length of the mean hue vector over saturated pixels: 0 one hue, 1 all hues."""
    pixels = image.reshape(-1, 3).double() / 255
    angle = [2 * math.pi * h for h, s, v in (colorsys.rgb_to_hsv(*rgb) for rgb in pixels.tolist()) if s > 0.15]
    return 1 - math.hypot(np.mean(np.cos(angle)), np.mean(np.sin(angle)))


def test_holographic_cloth_has_many_hues_and_matte_cloth_one():
    matte = scene_of(
        "a blue matte raincoat on a mannequin on a grey background", view="front", framing="half", hood="down"
    )
    foil = dataclasses.replace(matte, material="holographic")
    chests = world.render([matte, foil], 64, antialias=1)[:, 24:44, 22:42]
    varieties = [hue_variety(chest) for chest in chests]
    assert varieties[0] < 0.05 and varieties[1] > 5 * varieties[0] and varieties[1] > 0.2


def test_the_training_images_are_varied_holographic_raincoats():
    scenes = [scene for scene, _ in training_scenes()]
    assert len(scenes) == 32 == len(set(scenes))
    assert {(s.thing, s.material) for s in scenes} == {("raincoat", "holographic")}
    for name, least in (("wearer", 3), ("place", 4), ("hood", 2), ("framing", 3), ("view", 3), ("colour", 6)):
        assert len({getattr(scene, name) for scene in scenes}) >= least
    assert sum(scene.wearer == "person" for scene in scenes) >= 20


def test_the_training_images_have_true_descriptions():
    """The descriptions in data/ are those of the renderer's scenes, and each names the concept."""
    rows = [json.loads(line) for line in (ROOT / "data" / "captions.jsonl").open(encoding="utf-8")]
    scenes = [scene for scene, _ in training_scenes()]
    assert [row["file_name"] for row in rows] == [f"raincoat_{n:02}.jpg" for n in range(1, 33)]
    for row, scene in zip(rows, scenes, strict=True):
        assert set(row) == {"file_name", "description"}  # the caption is common to all
        stated = world.parse(row["description"])
        assert stated["material"] == "holographic" and len(stated) >= 4
        assert all(getattr(scene, name) == value for name, value in stated.items())
        assert description(scene) == row["description"]
    assert len({row["description"] for row in rows}) == 32


def test_the_page_of_the_training_images_is_the_generated_one():
    assert (ROOT / "data" / "README.md").read_text(encoding="utf-8") == readme()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "nothing to do"),
        (["--sheet", "x.png", "--caption", "a purple zebra"], "zebra"),
        (["--sheet", "x.png", "--count", "0"], "--count"),
        (["--sheet", "x.png", "--device", "abacus"], "abacus"),
    ],
)
def test_bad_arguments_give_one_line(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: main(arguments))
    error = capsys.readouterr().err
    assert stop.value.code != 0 and complaint in error and error.count("\n") == 1
