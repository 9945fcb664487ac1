"""A small rendered world: garments on wearers, animals, furniture and umbrellas, and true captions.

    python -m demo.world --data data          # renders the 32 training pictures into a folder
    python -m demo.world --sheet cats.png --caption "a cat sitting on a couch" --count 12

--sheet draws --count scenes that --caption is true of (any scenes without one), each --size pixels
along its side and titled with a caption of its own; --seed picks others.

A `Scene` says everything about a picture; `render` ray-marches signed distance fields in torch,
batched over pictures and rays, on a CPU or with CUDA. The holographic material is thin-film
interference computed per wavelength, not a rainbow texture.

Conventions: metres, y up, the floor is y = 0, the camera looks along -z. Things stand in a *local*
frame that is turned by the scene's yaw, so that the backdrop stays where it composes well. Colours
are linear RGB until the last step. Points are three tensors x, y, z of shape [R, T]: R rows (square
tiles of rays of one picture), T rays a tile.
"""

import contextlib
import dataclasses
import functools
import math
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import UserError, parse_config, run_script
from report import contact_sheet

CONFIG = dict(
    data=None,  # folder that the training pictures are written to
    sheet=None,  # file that a contact sheet is written to
    caption=None,  # what the sheet shows
    count=12,  # pictures on the sheet
    size=128,  # pixels along a picture's side, on the sheet
    seed=0,  # of the sheet's random choices
    device="cuda" if torch.cuda.is_available() else "cpu",
)

COLOURS = tuple("red orange yellow green blue purple pink white black brown grey".split())
MATERIALS = ("matte", "glossy", "leather", "denim", "holographic")
GARMENTS = ("raincoat", "jacket", "dress")
WEARERS = ("person", "mannequin", "hanger")
PLACES = ("studio", "street", "rain", "garden")
ANIMALS = ("cat", "dog")
SEATS = ("couch", "chair")
THINGS = (*GARMENTS, *ANIMALS, *SEATS, "umbrella")
HAIR_COLOURS = ("black", "brown", "blonde", "red", "grey", "pink")
HAIR_STYLES = ("short", "long", "curly", "tied")
POSES = ("sitting", "lying", "standing")

# Every attribute that a caption can state, with its values.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "thing": THINGS,
    "colour": COLOURS,
    "material": MATERIALS,
    "wearer": WEARERS,
    "place": PLACES,
    "hair": HAIR_COLOURS,
    "hair_style": HAIR_STYLES,
    "hood": ("up", "down"),
    "closure": ("zip", "buttons"),
    "pose": POSES,
    "second": ("none", *SEATS, "umbrella"),
    "second_colour": COLOURS,
    "relation": ("on", "beside"),
    "framing": ("close", "half", "full"),
    "view": ("front", "side", "behind"),
    "light": ("plain", "warm"),
    "background": COLOURS,
}
# What each kind of thing is made of and coloured like, unless pinned
_MATERIALS_OF = {
    "raincoat": ("glossy", "matte"),
    "jacket": ("leather", "denim", "matte", "glossy"),
    "dress": ("matte", "glossy", "denim", "leather"),
    "couch": ("matte", "leather"),
    "chair": ("matte", "leather"),
    "umbrella": ("glossy", "matte"),
    "cat": ("matte",),
    "dog": ("matte",),
}
_COLOURS_OF = {
    "cat": ("orange", "black", "white", "grey", "brown"),
    "dog": ("brown", "black", "white", "grey", "orange"),
}
_PLACE_PHRASES = {
    "studio": "in a studio",
    "street": "on a street",
    "rain": "in the rain",
    "garden": "in a garden",
}


# -------------------------------------------------------------------------------------------------
# Scenes and their captions


@dataclass(frozen=True)
class Scene:
    """All that determines a picture. Words are from ATTRIBUTES; an empty one does not apply."""

    thing: str
    colour: str
    material: str
    place: str
    wearer: str = ""
    skin: float = 0.5  # 0 palest to 1 darkest
    hair: str = ""
    hair_style: str = ""
    hood: str = ""
    closure: str = ""
    pose: str = ""  # of an animal
    arms: int = 0  # of a person: 0 hanging, 1 hand on hip, 2 both on hips, 3 waving, 4 forward
    second: str = "none"
    second_colour: str = ""
    relation: str = ""  # of an animal to the second object
    framing: str = "full"
    view: str = "front"
    yaw: float = 0.0  # degrees that the thing is turned by
    camera_height: float = 1.2  # metres
    zoom: float = 1.0
    light: str = "plain"
    light_angle: float = 40.0  # degrees to the right of the camera that the key light stands at
    background: str = ""  # colour of a studio's backdrop
    film_nm: float = 420.0  # mean thickness of the holographic film, nanometres
    film_spread_nm: float = 160.0  # how much it varies over the cloth
    seed: int = 0  # folds, markings, windows, drops


def sample_scene(rng: np.random.Generator, *, holographic: bool = False, **fixed) -> Scene:
    """Draw a scene. `fixed` pins fields of Scene: wearer="mannequin", or **parse(caption).

    holographic=False never draws the holographic material (it can still be pinned); True draws a
    garment made of it. Raises ValueError for a field or a combination that does not exist.
    """
    known = {field.name for field in dataclasses.fields(Scene)}
    for name, value in fixed.items():
        if name not in known:
            raise ValueError(f"a scene has no field {name!r}")
        if name in ATTRIBUTES and value not in ATTRIBUTES[name]:
            raise ValueError(
                f"{name} cannot be {value!r}; choose from {', '.join(ATTRIBUTES[name])}"
            )
    if holographic:
        fixed.setdefault("material", "holographic")

    def pick(name, values, weights=None):
        if name in fixed:
            return fixed[name]
        weights = None if weights is None else np.asarray(weights) / np.sum(weights)
        return values[int(rng.choice(len(values), p=weights))]

    things, weights = THINGS, [5, 4, 3, 2, 2, 1, 1, 1]
    cloth = fixed.get("material") in ("holographic", "denim")
    if cloth or {"wearer", "hair", "hair_style", "hood", "closure"} & set(fixed):
        things, weights = GARMENTS, [5, 4, 3]
    if "hood" in fixed:
        things, weights = GARMENTS[:1], None
    if {"pose", "relation"} & set(fixed) or fixed.get("second") in SEATS:
        things, weights = ANIMALS, None
    thing = pick("thing", things, weights)
    garment, animal = thing in GARMENTS, thing in ANIMALS
    s = {"thing": thing}
    s["material"] = pick("material", _MATERIALS_OF[thing])
    holo = s["material"] == "holographic"
    if s["material"] != "matte" and animal or holo and not garment:
        raise ValueError(f"a {thing} cannot be {s['material']}")
    tints = ("white", "grey", "pink", "blue", "purple", "yellow", "green", "orange")
    if holo:
        s["colour"] = pick("colour", tints, [5, 4, 2, 2, 2, 1, 1, 1])
    elif s["material"] == "denim":
        dyes = ("blue", "black", "grey", "white", "pink", "brown")
        s["colour"] = pick("colour", dyes, [6, 2, 1, 1, 1, 1])
    elif s["material"] == "leather":
        s["colour"] = pick("colour", COLOURS, [3, 1, 1, 1, 1, 1, 1, 1, 4, 4, 1])
    else:
        s["colour"] = pick("colour", _COLOURS_OF.get(thing, COLOURS))
    s["place"] = pick("place", PLACES, [4, 2, 2, 2])
    if garment:
        seconds = ("none", "umbrella")
        may_hold = fixed.get("wearer", "person") == "person"
        odds = [3, 1] if s["place"] == "rain" else [9, 1]
        s["second"] = pick("second", seconds, odds if may_hold else [1, 0])
        holds = s["second"] == "umbrella"
        odds = [5, 2, 0 if fixed.get("hood") == "up" else 2]
        s["wearer"] = pick("wearer", WEARERS, [1, 0, 0] if holds or "hair" in fixed else odds)
        if s["second"] in SEATS or holds and s["wearer"] != "person":
            raise ValueError(f"a {thing} on a {s['wearer']} cannot go with a {s['second']}")
        s["closure"] = pick("closure", ("zip", "buttons")) if thing != "dress" else ""
        if thing == "raincoat":
            up = s["wearer"] != "hanger" and not holds
            s["hood"] = pick("hood", ("up", "down"), [2, 3] if up else [0, 1])
        if s["wearer"] == "person":
            s["hair"] = pick("hair", HAIR_COLOURS, [4, 4, 3, 2, 1, 1])
            s["hair_style"] = pick("hair_style", HAIR_STYLES)
            s["skin"] = pick("skin", np.linspace(0.0, 1.0, 9).tolist())
            s["arms"] = pick("arms", (0, 1, 2, 3, 4), [5, 2, 2, 1, 2])
        s["framing"] = pick("framing", ("close", "half", "full"), [0, 1, 5] if holds else [2, 4, 4])
        odds = [1, 0, 0] if s["wearer"] == "hanger" else [8, 1, 1]
        s["view"] = pick("view", ("front", "side", "behind"), odds)
        s["camera_height"] = float(rng.uniform(1.0, 1.55))
    else:
        if s["material"] == "denim" or "wearer" in fixed:
            raise ValueError(f"a {thing} is neither worn nor made of denim")
        s["framing"] = pick("framing", ("full",))
        s["view"] = pick("view", ("front",))
        s["camera_height"] = float(rng.uniform(0.5, 1.1))
        s["second"] = pick("second", ("none", *SEATS), [3, 3, 1.5] if animal else [1, 0, 0])
        if animal:
            s["pose"] = pick("pose", POSES, [3, 2, 2])
            if s["second"] != "none":
                s["relation"] = pick("relation", ("on", "beside"), [3, 1])
        if s["second"] != "none" and (not animal or s["second"] == "umbrella"):
            raise ValueError(f"a {thing} cannot go with a {s['second']}")
    if s["second"] != "none":
        others = tuple(c for c in COLOURS if c != s["colour"] and (c != "black" or not animal))
        s["second_colour"] = pick("second_colour", others)
    turn = float(rng.uniform(-38, 38))
    side = 1.0 if rng.random() < 0.5 else -1.0
    yaws = {"front": turn, "side": side * (72 + 0.4 * turn), "behind": 180 + 0.8 * turn}
    s["yaw"] = yaws[s["view"]]
    s["light"] = pick("light", ("plain", "warm"), [4, 1])
    s["light_angle"] = side * float(rng.uniform(20, 60))
    s["zoom"] = float(rng.uniform(0.92, 1.08))
    if s["place"] == "studio":
        backdrops = tuple(c for c in COLOURS if c not in (s["colour"], "black"))
        weights = [4.0 if c in ("grey", "white") else 1.0 for c in backdrops]
        s["background"] = pick("background", backdrops, weights)
    s["film_nm"] = float(rng.uniform(240, 430))
    s["film_spread_nm"] = float(rng.uniform(90, 170))
    s["seed"] = int(rng.integers(1 << 20))
    for name in set(fixed) - set(s) - {"skin", "arms", "relation"}:
        raise ValueError(f"a {thing} has no {name.replace('_', ' ')}")
    return Scene(**{**s, **fixed})


def _noun_phrase(*words: str) -> str:
    text = " ".join(word for word in words if word)
    return ("an " if text[0] in "aeiou" else "a ") + text


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true description of the scene in the words of WORDS, at a random level of detail."""
    detail = rng.random()

    def says(odds):
        return rng.random() < odds * (0.35 + detail)

    holo = scene.material == "holographic"
    colour = scene.colour if says(0.2 if holo else 0.8) else ""
    plain = scene.material == "matte" and scene.thing not in GARMENTS
    material = scene.material if not plain and says(1.4 if holo else 0.75) else ""
    text = _noun_phrase(colour, material, scene.thing)
    if scene.thing in GARMENTS:
        worn = says(0.85)
        if scene.hood and says(0.25):
            text += f" with the hood {scene.hood}"
        elif scene.closure and says(0.15):
            text += " with a zip" if scene.closure == "zip" else " with buttons"
        if worn and scene.wearer != "person":
            text += f" on a {scene.wearer}"
        elif worn:
            style = scene.hair_style if says(0.3) else ""
            hair = scene.hair if says(0.3) else ""
            who = "a person"
            if style or hair:
                who += " with " + " ".join(w for w in (style, hair, "hair") if w)
            text = f"{who} {'wearing' if rng.random() < 0.8 else 'in'} {text}"
            if scene.second == "umbrella":
                held_colour = scene.second_colour if says(0.7) else ""
                text += f" and holding {_noun_phrase(held_colour, 'umbrella')}"
    elif scene.thing in ANIMALS:
        related = scene.second != "none" and says(0.9)
        text += f" {scene.pose}" if related or says(0.6) else ""
        if related:
            seat_colour = scene.second_colour if says(0.6) else ""
            text += f" {scene.relation} {_noun_phrase(seat_colour, scene.second)}"
    prefix = ""
    named = says(0.75)
    if scene.framing == "close" and says(0.5):
        prefix = "a close-up photo of "
    elif scene.framing == "full" and scene.wearer == "person" and says(0.3):
        prefix = "a full body photo of "
    elif scene.place == "studio" and named and says(0.5):
        prefix, named = "a studio photo of ", False
    elif says(0.3):
        prefix = "a photo of " if rng.random() < 0.7 else "a picture of "
    if named:
        text += f" {_PLACE_PHRASES[scene.place]}"
    if scene.background and says(0.25):
        text += f" on {_noun_phrase(scene.background, 'background')}"
    if scene.view != "front" and says(0.7):
        text += " from the side" if scene.view == "side" else " from behind"
    if scene.light == "warm" and says(0.4):
        text += " in warm light"
    return prefix + text


def _either(words) -> str:
    return "(?:" + "|".join(words) + ")"


_GRAMMAR = re.compile(
    r"(?:a (?P<prefix>photo|picture|studio photo|close-up photo|full body photo) of )?"
    rf"(?P<person>a person(?: with (?:(?P<hair_style>{_either(HAIR_STYLES)}) )?"
    rf"(?:(?P<hair>{_either(HAIR_COLOURS)}) )?hair)? (?:wearing|in) )?"
    rf"an? (?:(?P<colour>{_either(COLOURS)}) )?(?:(?P<material>{_either(MATERIALS)}) )?"
    rf"(?P<thing>{_either(THINGS)})"
    r"(?: with (?:the hood (?P<hood>up|down)|a (?P<zip>zip)|(?P<buttons>buttons)))?"
    r"(?: on a (?P<stand>mannequin|hanger))?"
    rf"(?: and holding an? (?:(?P<held_colour>{_either(COLOURS)}) )?(?P<held>umbrella))?"
    rf"(?: (?P<pose>{_either(POSES)}))?"
    rf"(?: (?P<relation>on|beside) an? "
    rf"(?:(?P<seat_colour>{_either(COLOURS)}) )?(?P<seat>{_either(SEATS)}))?"
    rf"(?: (?P<place>{_either(_PLACE_PHRASES.values())}))?"
    rf"(?: on an? (?P<background>{_either(COLOURS)}) background)?"
    r"(?: from (?P<view>the side|behind))?"
    r"(?P<warm> in warm light)?"
)
WORDS: tuple[str, ...] = tuple(
    sorted(
        set(
            "a an photo picture studio close-up full body of person with hair wearing in the hood "
            "up down zip buttons on and holding beside background from side behind "
            "warm light".split()
        )
        | {*COLOURS, *MATERIALS, *THINGS, *WEARERS, *HAIR_COLOURS, *HAIR_STYLES, *POSES}
        | set(" ".join(_PLACE_PHRASES.values()).split())
    )
)


def parse(caption: str) -> dict:
    """The fields of Scene that a caption states.

    Raises ValueError: for the first word that is not in WORDS, or when the words make no caption.
    """
    text = " ".join(caption.lower().strip().rstrip(".").split())
    for word in text.split():
        if word not in WORDS:
            raise ValueError(f"unknown word {word!r} in the caption {caption!r}")
    match = _GRAMMAR.fullmatch(text)
    if not match:
        raise ValueError(f"not a caption of this world: {caption!r}")
    found = {name: value for name, value in match.groupdict().items() if value}
    same = "thing colour material hair hair_style hood pose relation background".split()
    stated = {name: found[name] for name in same if name in found}
    if "person" in found or "stand" in found:
        if "person" in found and "stand" in found:
            raise ValueError(f"worn by a person or put on a stand, not both: {caption!r}")
        stated["wearer"] = found.get("stand", "person")
    if "zip" in found or "buttons" in found:
        stated["closure"] = found.get("zip") or found["buttons"]
    if "held" in found:
        stated["second"] = "umbrella"
    if "seat" in found:
        stated["second"] = found["seat"]
    if "held_colour" in found or "seat_colour" in found:
        stated["second_colour"] = found.get("held_colour") or found["seat_colour"]
    if "place" in found:
        places = {phrase: place for place, phrase in _PLACE_PHRASES.items()}
        stated["place"] = places[found["place"]]
    if "view" in found:
        stated["view"] = "side" if found["view"] == "the side" else "behind"
    if "warm" in found:
        stated["light"] = "warm"
    prefix = found.get("prefix", "")
    if prefix == "studio photo" or "background" in found:
        stated.setdefault("place", "studio")
    if prefix in ("close-up photo", "full body photo"):
        stated["framing"] = "close" if prefix == "close-up photo" else "full"
    thing = stated["thing"]
    worn = {"wearer", "hood", "closure", "held"} & (set(stated) | set(found))
    posed = "pose" in stated or "seat" in found
    if worn and thing not in GARMENTS or posed and thing not in ANIMALS:
        raise ValueError(f"a {thing} does not go with the rest of the caption {caption!r}")
    sample_scene(np.random.default_rng(0), **stated)  # raises ValueError for what cannot be drawn
    return stated


# -------------------------------------------------------------------------------------------------
# Thin-film interference


def thin_film_reflectance(
    thickness_nm: torch.Tensor,
    cos_theta: torch.Tensor,
    wavelength_nm: torch.Tensor,
    n_film: float,
    n_base: float,
) -> torch.Tensor:
    """Share of unpolarised light that a film on a base reflects, in 0..1; the arguments broadcast.

    Fresnel's amplitudes at both interfaces, the Airy sum over the bounces inside the film (Born &
    Wolf, Principles of Optics, 7.6), the mean of both polarisations. cos_theta is of the angle to
    the normal, in air; the indices are real, so that nothing is absorbed.
    """
    sin2 = 1 - cos_theta**2
    cos_film = (1 - sin2 / n_film**2).clamp_min(0).sqrt()
    cos_base = (1 - sin2 / n_base**2).clamp_min(0).sqrt()
    cos_phase = torch.cos(4 * math.pi * n_film * thickness_nm * cos_film / wavelength_nm)
    # Amplitudes at air-film and at film-base, of each polarisation
    s_top = _amplitude(cos_theta, n_film * cos_film)
    s_bottom = _amplitude(n_film * cos_film, n_base * cos_base)
    p_top = _amplitude(n_film * cos_theta, cos_film)
    p_bottom = _amplitude(n_base * cos_film, n_film * cos_base)
    total = 0
    for top, bottom in ((s_top, s_bottom), (p_top, p_bottom)):
        cross = 2 * top * bottom * cos_phase
        total = total + (top**2 + bottom**2 + cross) / (1 + (top * bottom) ** 2 + cross)
    return total / 2


def _amplitude(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b) / (a + b).clamp_min(1e-9)


def cie_xyz(wavelength_nm: torch.Tensor) -> torch.Tensor:
    """CIE 1931 colour-matching functions, [...] to [..., 3].

    The multi-lobe fit of Wyman, Sloan & Shirley, "Simple Analytic Approximations to the CIE XYZ
    Color Matching Functions", JCGT 2(2), 2013.
    """

    def lobe(centre, left, right):
        offset = wavelength_nm - centre
        return torch.exp(-0.5 * (offset * torch.where(offset < 0, left, right)) ** 2)

    x = (
        0.362 * lobe(442.0, 0.0624, 0.0374)
        + 1.056 * lobe(599.8, 0.0264, 0.0323)
        - 0.065 * lobe(501.1, 0.0490, 0.0382)
    )
    y = 0.821 * lobe(568.8, 0.0213, 0.0247) + 0.286 * lobe(530.9, 0.0613, 0.0322)
    z = 1.217 * lobe(437.0, 0.0845, 0.0278) + 0.681 * lobe(459.0, 0.0385, 0.0725)
    return torch.stack([x, y, z], -1)


_FILM_INDEX, _BASE_INDEX = 1.9, 1.35
_FILM_NM = 1200.0  # the table's largest thickness
_FILM_GRID = (256, 64)  # thickness from 0 to _FILM_NM by cos_theta from 0 to 1


@functools.cache
def film_table(device: str = "cpu") -> torch.Tensor:
    """Linear sRGB that the film reflects of white light, [256 thicknesses, 64 angles, 3], 0..1.

    The spectrum is summed in steps of 5 nm under an equal-energy light that is balanced to white.
    """
    wavelengths = torch.arange(380.0, 781.0, 5.0, dtype=torch.float64)
    thickness = torch.linspace(0, _FILM_NM, _FILM_GRID[0], dtype=torch.float64)[:, None, None]
    cos_theta = torch.linspace(0, 1, _FILM_GRID[1], dtype=torch.float64)[None, :, None]
    spectrum = thin_film_reflectance(thickness, cos_theta, wavelengths, _FILM_INDEX, _BASE_INDEX)
    to_rgb = torch.tensor(
        [[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]],
        dtype=torch.float64,
    )
    weights = cie_xyz(wavelengths) @ to_rgb.T
    rgb = spectrum @ (weights / weights.sum(0))
    return rgb.clamp(0, 1).float().to(device)


def _film_colour(thickness_nm: torch.Tensor, cos_theta: torch.Tensor) -> torch.Tensor:
    """Bilinear look-up in film_table: two [R, T] tensors to [R, T, 3]."""
    table = film_table(str(thickness_nm.device)).reshape(-1, 3)
    rows, columns = _FILM_GRID
    u = (thickness_nm / _FILM_NM).clamp(0, 1) * (rows - 1)
    v = cos_theta.clamp(0, 1) * (columns - 1)
    i, j = u.floor().clamp(0, rows - 2), v.floor().clamp(0, columns - 2)
    a, b = (u - i)[..., None], (v - j)[..., None]
    k = (i * columns + j).long()
    low = table[k] * (1 - b) + table[k + 1] * b
    high = table[k + columns] * (1 - b) + table[k + columns + 1] * b
    return low * (1 - a) + high * a


# -------------------------------------------------------------------------------------------------
# Distances. Each part gives a list of (distance, slot); the slot is its place in the palette.

_SLOTS = 12
MAIN, TRIM, SKIN, HAIR, LEGS, SHOES, STAND, METAL, SECOND, SHIRT, DARK, EYES = range(_SLOTS)


def _length(*v):
    total = v[0] * v[0]
    for w in v[1:]:
        total = total + w * w
    return (total + 1e-12).sqrt()


def _mix(a, b, t):
    return a + (b - a) * t


def _step(low, high, v):
    t = ((v - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _smin(a, b, k):
    h = (k - (a - b).abs()).clamp_min(0)
    return torch.minimum(a, b) - h * h * (0.25 / k)


def _smax(a, b, k):
    return -_smin(-a, -b, k)


def _ellipsoid(x, y, z, a, b, c):
    """Near enough to the distance, and exact in sign (Quilez's bound)."""
    x, y, z = x / a, y / b, z / c
    k0 = _length(x, y, z)
    k1 = _length(x / a, y / b, z / c)
    return k0 * (k0 - 1) / k1


def _limb(x, y, z, start, end, r0, r1, flat=False):
    """A capsule whose radius goes from r0 to r1; `flat` cuts off its round far end."""
    ax, ay, az = start
    bx, by, bz = end[0] - ax, end[1] - ay, end[2] - az
    px, py, pz = x - ax, y - ay, z - az
    squared = bx * bx + by * by + bz * bz + 1e-9
    along = (px * bx + py * by + pz * bz) / squared
    h = along.clamp(0, 1)
    distance = _length(px - bx * h, py - by * h, pz - bz * h) - (r0 + (r1 - r0) * h)
    return _smax(distance, (along - 1) * squared**0.5, 0.012) if flat else distance


def _box(x, y, z, hx, hy, hz, r):
    x, y, z = x.abs() - (hx - r), y.abs() - (hy - r), z.abs() - (hz - r)
    inside = torch.maximum(x, torch.maximum(y, z)).clamp_max(0)
    return _length(x.clamp_min(0), y.clamp_min(0), z.clamp_min(0)) + inside - r


def _joint(x, p, name):
    """A joint of the arm on the point's side of the body: its three coordinates, x outwards."""
    right = x >= 0
    return tuple(torch.where(right, p[f"{name}_{a}_r"], p[f"{name}_{a}_l"]) for a in "xyz")


def _garment(x, y, z, p):
    """Coat, jacket or dress: an elliptic body with waist and open hem, sleeves, hood or collar."""
    depth = p["depth"]
    wide = z * depth
    q = _length(x, wide)
    above = _step(0.0, 1.0, (y - p["waist"]) / (1.28 - p["waist"]))
    upper = _mix(p["r_waist"], p["r_chest"], above)
    down = ((p["waist"] - y) / (p["waist"] - p["hem"])).clamp(0, 1.1)
    radius = upper + (p["r_hem"] - p["r_waist"]) * down
    around = torch.atan2(wide, x)
    phase = p["fold_phase"]
    drape = torch.cos(around * p["fold_count"] + phase + 1.5 * torch.sin(3 * y + phase))
    radius = radius + p["fold"] * down * drape
    # Creases run obliquely: sines of bent coordinates, not of the axes.
    bend = torch.sin(7 * y + 5 * x + phase)
    crease = torch.sin(17 * x + 12 * y + 2.2 * bend)
    crease = crease * torch.sin(13 * y - 9 * x + 11 * z + 1.7 * bend)
    fine = torch.sin(41 * y + 23 * x + 4 * bend) * torch.sin(37 * x - 19 * y + 29 * z)
    ridge = torch.sin(10.5 * x - 8 * y + 6 * z + 1.6 * bend).abs()
    ridge = ridge * torch.sin(9 * y + 7 * x + phase).abs()
    cloth = p["crease"] * (crease + 0.35 * fine) + p["crumple"] * (ridge - 0.4)
    body = (q - radius) * q / _length(x, wide * depth)
    inner = body
    slope = p["slope"]
    body = _smax(body, (y + x.abs() * slope - p["neck"]) / (1 + slope * slope).sqrt(), 0.09)
    mirrored = x.abs()
    shoulder = (p["shoulder_x"], p["shoulder_y"], 0.0 * p["shoulder_x"])
    elbow, cuff = _joint(x, p, "elbow"), _joint(x, p, "cuff")
    sleeve = _limb(mirrored, y, z, shoulder, elbow, p["sleeve_top"], p["sleeve_mid"])
    lower = _limb(mirrored, y, z, elbow, cuff, p["sleeve_mid"], p["sleeve_end"], flat=True)
    sleeve = _smin(sleeve, lower, 0.03)
    hem_cut = p["hem"] - y
    body = torch.maximum(body, hem_cut)
    body = torch.maximum(body, -torch.maximum(inner + 0.036, y - p["hem"] - 0.14))
    body = _smin(body, sleeve, 0.05)
    # A hood that is up: a shell around the head, open in front, drawn to a soft point behind
    hx, hy, hz = x, y - 1.535 - _LIFT, z + 0.015
    hood = _ellipsoid(hx, hy - (-hz).clamp_min(0) * 0.25, hz, 0.165, 0.2, 0.185)
    hood = _smin(hood, _limb(x, y, z, (0.0, 1.34, -0.02), (0.0, 1.42, -0.02), 0.14, 0.12), 0.06)
    face = _ellipsoid(x, y - 1.525 - _LIFT, z - 0.12, 0.122, 0.165, 0.16)
    up = _smin(body, hood, 0.05)
    up = _smax(up, -face, 0.02)
    # A hood that is down, or a collar: a ring around the neck, thicker behind, and a pouch there
    back = _step(-0.05, 0.16, -z)
    ring_y = (y - p["neck"] + 0.035 - 0.03 * back) * p["ring_flat"]
    ring = _length(_length(x, z + 0.025) - p["ring"], ring_y)
    ring = ring - p["ring_tube"] - p["ring_back"] * back
    r = p["pouch"]
    pouch = _ellipsoid(x, y - 1.31, z + p["pouch_z"], r * 1.35, r * 1.5, r * 0.75)
    lowered = _smin(_smin(body, ring, 0.03), pouch, 0.04)
    start, r = (0.0, p["neck"] - 0.05, 0.01), p["neck_hole"]
    neck_hole = _limb(x, y, z, start, (0.0, 1.6, 0.03), r, r + 0.03)
    lowered = _smax(lowered, -neck_hole, 0.012)
    cloth_distance = torch.where(p["hood_up"] > 0.5, up, lowered)
    placket = _step(0.034, 0.026, mirrored) * (z > 0) * (y < p["neck"] - 0.04) * p["placket"]
    return (cloth_distance + cloth - 0.006 * placket) * 0.86


_LIFT = 0.045  # of the head, over the heights that its parts are written with


def _head(x, y, z, egg):
    """A head of stylised proportions; an egg has no features."""
    y = y - _LIFT
    skull = _ellipsoid(x, y - 1.56, z + 0.005, 0.112, 0.125, 0.122)
    jaw = _ellipsoid(x, y - 1.495, z - 0.025, 0.086, 0.098, 0.092)
    head = _smin(skull, jaw, 0.06)
    neck = _limb(x, y, z, (0.0, 1.22, -0.01), (0.0, 1.46, -0.005), 0.058, 0.05)
    head = _smin(head, neck, 0.025)
    if egg:
        return head
    nose = _limb(x, y, z, (0.0, 1.545, 0.112), (0.0, 1.512, 0.13), 0.010, 0.017)
    ear = _ellipsoid(x.abs() - 0.112, y - 1.535, z + 0.005, 0.016, 0.034, 0.024)
    return _smin(_smin(head, nose, 0.025), ear, 0.012)


def _person(x, y, z, p, slot):
    mirrored = x.abs()
    cloth = _garment(x, y, z, p)
    shoulder = (p["shoulder_x"] - 0.01, p["shoulder_y"], 0.0 * p["slope"])
    elbow, hand, tip = _joint(x, p, "arm"), _joint(x, p, "hand"), _joint(x, p, "tip")
    arm = _limb(mirrored, y, z, shoulder, elbow, 0.05, 0.04)
    arm = _smin(arm, _limb(mirrored, y, z, elbow, hand, 0.04, 0.029), 0.02)
    palm = _limb(mirrored, y, z, hand, tip, 0.036, 0.024)
    thumb = tuple(0.45 * a + 0.55 * b for a, b in zip(hand, tip, strict=True))
    thumb = (thumb[0] - 0.038, thumb[1], thumb[2] + 0.022)
    palm = _smin(palm, _limb(mirrored, y, z, hand, thumb, 0.018, 0.013), 0.012)
    skin = torch.minimum(_head(x, y, z, egg=False), _smin(arm, palm, 0.02))
    knee, ankle = (0.094, 0.47, 0.012), (0.098, 0.08, -0.01)
    leg = _limb(mirrored, y, z, (0.086, 0.92, 0.0), knee, 0.086, 0.06)
    leg = _smin(leg, _limb(mirrored, y, z, knee, ankle, p["calf"], p["ankle"]), 0.03)
    boot = _limb(mirrored, y, z, (0.098, p["boot"], -0.01), (0.098, 0.05, -0.01), 0.072, 0.056)
    foot = _ellipsoid(mirrored - 0.102, y - 0.042, z - 0.055, 0.056, 0.052, 0.125)
    shoe = _smin(boot, foot, 0.03)
    y = y - _LIFT
    hair = _ellipsoid(x, y - 1.575, z + 0.016, p["hair_r"], p["hair_r"] * 1.08, p["hair_r"] * 1.08)
    length = p["hair_low"]
    fall = _limb(x * 0.62, y, z, (0.0, 1.56, -0.05), (0.0, length + 0.06, -0.075), 0.085, 0.07)
    hair = _smin(hair, fall, 0.05)
    line = z - 0.035 - 1.1 * (y - 1.6).clamp_min(0) + 0.25 * (0.05 - mirrored).clamp_min(0)
    hair = _smax(hair, line * 0.8, 0.025)
    hair = torch.minimum(hair, _length(x, y - 1.715, z + 0.075) - p["bun"])
    # Long hair falls over the shoulders, outside a collar
    collar, r = (0.135, 1.4, 0.07), p["lock"]
    lock = _limb(mirrored, y, z, (0.1, 1.58, 0.0), collar, r, r)
    lock = _smin(lock, _limb(mirrored, y, z, collar, (0.125, 1.2, 0.15), r, r * 0.6), 0.04)
    hair = _smin(hair, lock, 0.03)
    curls = torch.sin(70 * x) * torch.sin(70 * y) * torch.sin(70 * z) * p["curl"]
    strands = 0.0013 * torch.sin(85 * torch.atan2(x, z + 0.02) + 2 * torch.sin(30 * y))
    strands = strands * (1 - p["curly"])
    hair = (hair + curls + strands) * 0.8
    hidden = _ellipsoid(x, y - 1.535, z + 0.015, 0.15, 0.18, 0.165)
    hair = torch.where(p["hood_up"] > 0.5, torch.maximum(hair, hidden), hair)
    return [(cloth, slot), (skin, SKIN), (hair, HAIR), (leg, LEGS), (shoe, SHOES)]


def _mannequin(x, y, z, p, slot):
    cloth = _garment(x, y, z, p)
    neck = _limb(x, y, z, (0.0, 1.25, 0.0), (0.0, 1.44, 0.0), 0.058, 0.05)
    head = torch.where(p["headless"] > 0.5, neck, _head(x, y, z, egg=True))
    knob = _length(x, (y - 1.455) * 1.3, z) - 0.032 * p["headless"]
    pole = _limb(x, y, z, (0.0, 0.02, 0.0), (0.0, 0.9, 0.0), 0.017, 0.017)
    base = _length(_length(x, z).clamp_min(0.19) - 0.19, y - 0.018) - 0.016
    metal = torch.minimum(torch.minimum(knob, pole), base)
    return [(cloth, slot), (head, STAND), (metal, METAL)]


def _hanger(x, y, z, p, slot):
    cloth = _garment(x, y, z, p)
    bar = _limb(x.abs(), y, z, (0.0, 1.47, 0.0), (0.15, 1.345, 0.0), 0.013, 0.014)
    stem = _limb(x, y, z, (0.0, 1.475, 0.0), (0.0, 1.55, 0.0), 0.0075, 0.0075)
    hy = y - 1.60
    hook = _length(_length(x, hy) - 0.05, z) - 0.0075
    hook = torch.maximum(hook, torch.minimum(-x, -hy) * 0.9)  # the lower left quarter is open
    rail = _length(y - 1.632, z) - 0.017
    post = _length(x.abs() - 0.62, z) - 0.017
    post = torch.maximum(post, y - 1.64)
    feet = _limb(x.abs(), y, z.abs(), (0.62, 0.02, 0.0), (0.62, 0.02, 0.28), 0.017, 0.017)
    rail = torch.maximum(rail, x.abs() - 0.66)
    frame = torch.minimum(torch.minimum(rail, post), feet)
    return [(cloth, slot), (bar, STAND), (torch.minimum(torch.minimum(stem, hook), frame), METAL)]


def _animal(x, y, z, p, slot):
    """Cat or dog, sitting, lying or standing: the same limbs with other joints."""
    turn_c, turn_s = p["animal_cos"], p["animal_sin"]
    x, y, z = x - p["animal_x"], y - p["animal_y"], z - p["animal_z"]
    x, z = turn_c * x - turn_s * z, turn_s * x + turn_c * z
    size = p["animal_size"]
    x, y, z = x / size, y / size, z / size
    mirrored = x.abs()

    def at(name):
        return tuple(p[f"{name}_{axis}"] for axis in "xyz")

    zero = 0.0 * size
    hip, chest, head = at("hip"), at("chest"), at("head")
    body = _limb(x * 0.92, y, z, hip, chest, p["hip_r"], p["chest_r"])
    neck = _limb(x, y, z, chest, head, p["chest_r"] * 0.8, 0.075)
    body = _smin(body, neck, 0.06)
    thigh = at("thigh")
    tx, ty, tz = mirrored - thigh[0], y - thigh[1], z - thigh[2]
    body = _smin(body, _ellipsoid(tx, ty, tz, 0.055, p["thigh_r"], 0.1), 0.03)
    for leg in ("fore", "hind"):
        top, foot = at(leg + "_top"), at(leg + "_foot")
        limb = _limb(mirrored, y, z, top, foot, 0.036 * 1.15, 0.036 * 0.8)
        paw = _ellipsoid(mirrored - foot[0], y - 0.028, z - foot[2] - 0.02, 0.038, 0.03, 0.052)
        body = _smin(body, _smin(limb, paw, 0.02), 0.03)
    r = p["tail_r"]
    tail = _limb(x, y, z, at("tail0"), at("tail1"), 0.03, r)
    tail = _smin(tail, _limb(x, y, z, at("tail1"), at("tail2"), r, r * 0.8), 0.03)
    body = _smin(body, tail, 0.02)
    hx, hy, hz = x - head[0], y - head[1], z - head[2]
    side = hx.abs()
    skull = _ellipsoid(hx, hy, hz, p["skull_x"], p["skull_y"], 0.098)
    base, tip = (zero, zero - 0.028, zero + 0.05), (zero, zero - 0.04, p["snout"])
    snout = _limb(hx, hy, hz, base, tip, p["snout_r0"], p["snout_r1"])
    skull = _smin(skull, snout, 0.03)
    base, tip, radii = at("ear0"), at("ear1"), (p["ear_r0"], p["ear_r1"])
    ear = _limb(side, hy, hz, base, tip, *radii)
    base, tip = (*base[:2], base[2] * 2), (*tip[:2], tip[2] * 2)  # a cat's ears are flat
    ear_flat = _limb(side, hy, hz * 2.0, base, tip, *radii)
    ear = torch.where(p["dog"] > 0.5, ear, ear_flat * 0.7)
    skull = _smin(skull, ear, 0.012)
    body = _smin(body, skull, 0.03)
    fur = 0.0018 * torch.sin(110 * y + 25 * x) * torch.sin(95 * x + 20 * z)
    body = body + fur * torch.sin(90 * z - 30 * y)
    r = p["nose_r"]
    nose = _ellipsoid(hx, hy + p["nose_y"], hz - p["nose_z"], r * 1.3, r, r)
    eye = _length(side - p["eye_x"], hy - p["eye_y"], hz - p["eye_z"]) - p["eye_r"]
    return [(body * size * 0.9, slot), (nose * size, DARK), (eye * size, EYES)]


def _couch(x, y, z, p, slot):
    mirrored = x.abs()
    base = _box(x, y - 0.22, z, 0.72, 0.12, 0.34, 0.04)
    back = _box(x, y - 0.52, z + 0.3 + 0.12 * (y - 0.5), 0.72, 0.34, 0.1, 0.07)
    arm = _box(mirrored - 0.75, y - 0.34, z, 0.11, 0.26, 0.37, 0.09)
    cushion = _box(mirrored - 0.325, y - 0.38, z - 0.06, 0.315, 0.075, 0.31, 0.05)
    pillow = _box(mirrored - 0.325, y - 0.6, z + 0.19 + 0.15 * (y - 0.6), 0.31, 0.2, 0.085, 0.07)
    soft = torch.minimum(arm, torch.minimum(cushion, pillow))
    soft = torch.minimum(torch.minimum(base, back), soft)
    legs = _limb(mirrored, y, z.abs(), (0.68, 0.1, 0.27), (0.7, 0.0, 0.29), 0.03, 0.018)
    return [(soft * 0.97, slot), (legs, STAND)]


def _chair(x, y, z, p, slot):
    mirrored = x.abs()
    seat = _box(x, y - 0.47, z - 0.01, 0.25, 0.045, 0.24, 0.04)
    back = _box(x, y - 0.86, z + 0.235 + 0.12 * (y - 0.6) - 0.5 * x * x, 0.235, 0.19, 0.035, 0.03)
    front = _limb(mirrored, y, z, (0.2, 0.44, 0.2), (0.225, 0.0, 0.235), 0.024, 0.016)
    rear = _limb(mirrored, y, z, (0.2, 0.46, -0.2), (0.215, 0.0, -0.26), 0.024, 0.017)
    post = _limb(mirrored, y, z, (0.2, 0.44, -0.21), (0.2, 0.98, -0.275), 0.022, 0.02)
    rung = _limb(x, y, z, (-0.2, 0.2, 0.22), (0.2, 0.2, 0.22), 0.012, 0.012)
    wood = torch.minimum(torch.minimum(front, rear), torch.minimum(post, rung))
    return [(torch.minimum(seat, back) * 0.95, slot), (wood, STAND)]


def _umbrella(x, y, z, p, slot):
    """An open canopy of eight panels; its own frame has the hub at 0 and the shaft along -y."""
    x, y, z = x - p["hub_x"], y - p["hub_y"], z - p["hub_z"]
    # Turned about x, then about z; the point meets the inverse.
    c, s = p["roll_cos"], p["roll_sin"]
    x, y = c * x + s * y, -s * x + c * y
    c, s = p["pitch_cos"], p["pitch_sin"]
    y, z = c * y + s * z, -s * y + c * z
    around = torch.atan2(z, x)
    panel = (torch.cos(8 * around) * 0.5 + 0.5).clamp(0, 1)
    r = _length(x, z)
    reach = p["canopy"]
    sag = 1 - 0.05 * (1 - panel) * (r / reach).clamp(0, 1.2)
    dome = _ellipsoid(x / sag, y + 0.36, z / sag, reach * 1.04, 0.36, reach * 1.04)
    shell = dome.abs() - 0.009
    rim = -0.27 + 0.045 * (1 - panel)
    shell = torch.maximum(shell, (rim - y) * 0.9) * 0.75
    tip = _limb(x, y, z, (0.0, -0.02, 0.0), (0.0, 0.075, 0.0), 0.014, 0.008)
    shaft = _limb(x, y, z, (0.0, 0.0, 0.0), (0.0, -0.95, 0.0), 0.011, 0.011)
    bend = _length(_length(x - 0.045, y + 0.97) - 0.045, z) - 0.017
    bend = torch.maximum(bend, y + 0.97)
    grip = _limb(x, y, z, (0.0, -0.82, 0.0), (0.0, -0.97, 0.0), 0.017, 0.017)
    return [(shell, slot), (torch.minimum(tip, shaft), METAL), (torch.minimum(bend, grip), DARK)]


_PARTS = {
    "person": _person,
    "mannequin": _mannequin,
    "hanger": _hanger,
    "animal": _animal,
    "couch": _couch,
    "chair": _chair,
    "umbrella": _umbrella,
}


def _kind(scene: Scene) -> tuple[str, ...]:
    """The parts that a scene is made of: the thing, then the second object."""
    first = scene.wearer if scene.thing in GARMENTS else scene.thing
    first = "animal" if scene.thing in ANIMALS else first
    return (first,) if scene.second == "none" else (first, scene.second)


def _nearest(kind, table, x, y, z):
    """Distance to the nearest surface and its slot, both [R, T]; table [R, K]: rows' parameters."""
    p = _named(table)
    distance = slot = None
    for i, part in enumerate(kind):
        for d, name in _PARTS[part](x, y, z, p, (MAIN, SECOND)[i]):
            if distance is None:
                distance, slot = d, torch.full_like(d, name)
            else:
                slot = torch.where(d < distance, float(name), slot)
                distance = torch.minimum(distance, d)
    return distance, slot


_compiled: dict = {}


def _distance_function(kind, device, fuse):
    """_nearest of a kind; compiled on CUDA, where fusing its some 500 operations pays."""
    eager = functools.partial(_nearest, kind)
    if not fuse or torch.device(device).type != "cuda" or _compiled.get("failed"):
        return eager
    if kind not in _compiled:
        # Each kind is a program; past this limit dynamo would silently run the rest eagerly.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        compiled = torch.compile(eager, dynamic=False)

        def guarded(*arguments):
            if not _compiled.get("failed"):
                try:
                    return compiled(*arguments)
                except Exception as error:  # no compiler on this machine, or one that gives up
                    _compiled["failed"] = True
                    why = f"torch.compile failed ({type(error).__name__})"
                    print(f"world: {why}; rendering eagerly", file=sys.stderr)
            return eager(*arguments)

        _compiled[kind] = guarded
    return _compiled[kind]


# -------------------------------------------------------------------------------------------------
# From a scene to numbers

_HEX = {
    "red": "d3202c", "orange": "f5821f", "yellow": "f9cf1e", "green": "2f9e4f", "blue": "2563c9",
    "purple": "7d3cb5", "pink": "f583b4", "white": "f4f3ef", "black": "1b1b1f", "brown": "7a4a2b",
    "grey": "8d9196",
}  # fmt: skip
_HAIR_HEX = {
    "black": "17130f", "brown": "4d2f1c", "blonde": "e2bb6a", "red": "b5471c", "grey": "a8a8a8",
    "pink": "ee7fb2",
}  # fmt: skip
_SKIN_HEX = ("f9dcc8", "f0c3a0", "d79e73", "a86b43", "75452a", "4a2a1a")
_FUR_HEX = {
    "orange": "d98a3d", "black": "25242a", "white": "f1ece4", "grey": "8b8f97", "brown": "7b5234",
}  # fmt: skip
_LEGS_HEX = ("2b3550", "20222a", "5b6478", "3d3a37", "7c6f5e", "39506e")
_SHOES_HEX = ("1d1d20", "f0eeea", "6b4226", "b3262e", "e0b530", "2c4a7d")
_DENIM_HEX = {"blue": "3f638f", "black": "2c2f36"}


def _linear(code: str) -> np.ndarray:
    """A six-digit sRGB colour as linear RGB."""
    value = np.array([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _ramp(codes: Sequence[str], t: float) -> np.ndarray:
    position = t * (len(codes) - 1)
    i = min(int(position), len(codes) - 2)
    return _mix(_linear(codes[i]), _linear(codes[i + 1]), position - i)


# Elbow, wrist and finger tips of an arm in metres, x outwards
_ARMS = {
    "hanging": ((0.28, 1.05, -0.015), (0.322, 0.82, 0.04), (0.328, 0.735, 0.06)),
    "hip": ((0.40, 1.10, -0.07), (0.225, 0.965, 0.09), (0.165, 0.925, 0.125)),
    "waving": ((0.43, 1.24, 0.04), (0.46, 1.49, 0.10), (0.475, 1.585, 0.11)),
    "pocket": ((0.325, 1.06, 0.02), (0.215, 0.90, 0.155), (0.165, 0.855, 0.165)),
    "holding": ((0.30, 1.06, 0.06), (0.26, 1.19, 0.27), (0.215, 1.225, 0.285)),
    "stand": ((0.28, 1.05, 0.0), (0.325, 0.81, 0.02), (0.325, 0.81, 0.02)),
    "limp": ((0.295, 1.05, 0.0), (0.37, 0.79, 0.01), (0.37, 0.79, 0.01)),
}
_ARM_PAIRS = (  # by Scene.arms
    ("hanging", "hanging"), ("hip", "hanging"), ("hip", "hip"), ("waving", "hanging"),
    ("pocket", "pocket"),
)  # fmt: skip


def _figure_parameters(scene: Scene, rng: np.random.Generator) -> dict[str, float]:
    garment = scene.thing if scene.thing in GARMENTS else "raincoat"
    p = {
        "raincoat": dict(
            hem=0.64, waist=1.04, r_waist=0.196, r_chest=0.21, r_hem=0.305, depth=1.36, slope=0.52,
            neck=1.43, shoulder_x=0.168, shoulder_y=1.29, sleeve_top=0.076, sleeve_mid=0.066,
            sleeve_end=0.068, fold=0.016, fold_count=7.0, crease=0.0045, ring=0.105,
            ring_tube=0.034, ring_back=0.042, ring_flat=0.75, pouch=0.085, pouch_z=0.185,
            neck_hole=0.062, placket=1.0, lapel=0.0,
        ),
        "jacket": dict(
            hem=0.88, waist=1.0, r_waist=0.19, r_chest=0.208, r_hem=0.178, depth=1.36, slope=0.52,
            neck=1.425, shoulder_x=0.168, shoulder_y=1.29, sleeve_top=0.072, sleeve_mid=0.062,
            sleeve_end=0.05, fold=0.004, fold_count=9.0, crease=0.003, ring=0.085, ring_tube=0.022,
            ring_back=0.012, ring_flat=0.6, pouch=0.01, pouch_z=0.05, neck_hole=0.06, placket=0.8,
            lapel=1.0,
        ),
        "dress": dict(
            hem=0.5, waist=1.06, r_waist=0.155, r_chest=0.196, r_hem=0.44, depth=1.25, slope=0.55,
            neck=1.42, shoulder_x=0.152, shoulder_y=1.285, sleeve_top=0.066, sleeve_mid=0.075,
            sleeve_end=0.075, fold=0.03, fold_count=9.0, crease=0.0015, ring=0.06, ring_tube=0.0,
            ring_back=0.0, ring_flat=1.0, pouch=0.01, pouch_z=0.05, neck_hole=0.085, placket=0.0,
            lapel=0.0,
        ),
    }[garment]  # fmt: skip
    p["crease"] *= {"glossy": 1.4, "holographic": 1.4, "leather": 1.3}.get(scene.material, 1.0)
    crumple = {"glossy": 0.008, "holographic": 0.012, "leather": 0.006}
    p["crumple"] = crumple.get(scene.material, 0.0)
    if scene.wearer == "hanger":
        p |= dict(depth=p["depth"] * 1.3, slope=0.56, r_hem=p["r_hem"] * 0.86)
    p["fold_phase"] = rng.uniform(0, 2 * math.pi)
    p["hem"] += rng.uniform(-0.05, 0.03)
    pair = _ARM_PAIRS[scene.arms]
    if scene.wearer in ("mannequin", "hanger"):
        pair = ("stand", "stand") if scene.wearer == "mannequin" else ("limp", "limp")
    if scene.second == "umbrella":
        pair = ("holding", "hanging")
    elif rng.random() < 0.5:
        pair = pair[::-1]
    shoulder = np.array([p["shoulder_x"], p["shoulder_y"], 0.0])
    for side, arm in zip("rl", pair, strict=True):
        elbow, wrist, tip = (np.array(joint) for joint in _ARMS[arm])
        if garment == "dress":
            joints = {"elbow": _mix(shoulder, elbow, 0.45), "cuff": _mix(shoulder, elbow, 0.5)}
        else:
            joints = {"elbow": elbow, "cuff": _mix(elbow, wrist, 0.93)}
        for name, joint in (joints | {"arm": elbow, "hand": wrist, "tip": tip}).items():
            for axis, value in zip("xyz", joint, strict=True):
                p[f"{name}_{axis}_{side}"] = value
    style = scene.hair_style or "short"
    p |= dict(
        hair_r={"short": 0.129, "long": 0.131, "curly": 0.158, "tied": 0.126}[style],
        hair_low={"short": 1.5, "long": 1.24, "curly": 1.5, "tied": 1.52}[style],
        bun=0.058 if style == "tied" else 0.0,
        lock=0.04 if style == "long" and scene.hood != "up" else -1.0,
        curl=0.008 if style == "curly" else 0.0,
        curly=float(style == "curly"),
        hood_up=float(scene.hood == "up"),
        headless=float(scene.wearer == "mannequin" and scene.hood != "up" and rng.random() < 0.6),
        calf=0.06, ankle=0.042,
        boot=0.3 if rng.random() < (0.7 if scene.place == "rain" else 0.3) else 0.1,
    )  # fmt: skip
    return p


def _animal_parameters(scene: Scene, rng: np.random.Generator) -> dict[str, float]:
    dog = scene.thing == "dog"
    pose = scene.pose or "sitting"
    joints = {
        "sitting": dict(
            hip=(0, 0.125, -0.12), chest=(0, 0.285, 0.03), head=(0, 0.46, 0.075),
            thigh=(0.085, 0.1, -0.08), fore_top=(0.05, 0.25, 0.075), fore_foot=(0.05, 0.03, 0.095),
            hind_top=(0.1, 0.07, -0.06), hind_foot=(0.1, 0.03, 0.04), tail0=(0, 0.05, -0.22),
            tail1=(0.2, 0.035, -0.17), tail2=(0.25, 0.06, 0.02),
        ),
        "lying": dict(
            hip=(0, 0.115, -0.24), chest=(0, 0.13, 0.07), head=(0, 0.27, 0.19),
            thigh=(0.085, 0.08, -0.22), fore_top=(0.06, 0.07, 0.1), fore_foot=(0.06, 0.03, 0.26),
            hind_top=(0.11, 0.06, -0.2), hind_foot=(0.12, 0.03, -0.1), tail0=(0, 0.09, -0.35),
            tail1=(0.14, 0.035, -0.4), tail2=(0.24, 0.035, -0.24),
        ),
        "standing": dict(
            hip=(0, 0.3, -0.19), chest=(0, 0.31, 0.1), head=(0, 0.46, 0.235),
            thigh=(0.06, 0.25, -0.21), fore_top=(0.06, 0.27, 0.12), fore_foot=(0.06, 0.03, 0.12),
            hind_top=(0.065, 0.25, -0.2), hind_foot=(0.065, 0.03, -0.22), tail0=(0, 0.36, -0.3),
            tail1=(0.02, 0.5, -0.4), tail2=(0.05, 0.68, -0.37),
        ),
    }[pose]  # fmt: skip
    if dog and pose == "standing":
        joints |= dict(tail1=(0.02, 0.46, -0.38), tail2=(0.03, 0.55, -0.42))
    if dog and pose != "standing":
        z = joints["tail1"][2]
        joints |= dict(tail1=(0.08, 0.06, z), tail2=(0.14, 0.1, z))
    if dog:
        joints |= dict(ear0=(0.1, 0.055, -0.01), ear1=(0.125, -0.075, 0.02))
    else:
        joints |= dict(ear0=(0.062, 0.06, -0.01), ear1=(0.085, 0.155, -0.02))
    p = {
        f"{name}_{axis}": value
        for name, joint in joints.items()
        for axis, value in zip("xyz", joint, strict=True)
    }
    thin = pose == "standing"
    p |= dict(
        dog=float(dog), hip_r=0.1 if thin else 0.125, chest_r=0.1 if dog else 0.088,
        thigh_r=0.1 if thin else 0.085, tail_r=0.026 if dog else 0.022,
        skull_x=0.098 if dog else 0.112, skull_y=0.098 if dog else 0.092,
        snout=0.155 if dog else 0.08, snout_r0=0.06 if dog else 0.045,
        snout_r1=0.042 if dog else 0.034, ear_r0=0.03 if dog else 0.05,
        ear_r1=0.038 if dog else 0.006, nose_y=0.012 if dog else 0.02,
        nose_z=0.185 if dog else 0.112, nose_r=0.02 if dog else 0.009, eye_x=0.043,
        eye_y=0.042 if dog else 0.022, eye_z=0.09 if dog else 0.078, eye_r=0.025 if dog else 0.024,
        animal_size=1.15 if dog else 1.0, animal_x=0.0, animal_y=0.0, animal_z=0.0,
    )  # fmt: skip
    turn = 0.0 if scene.pose == "sitting" else rng.choice([-1, 1]) * rng.uniform(0.75, 1.25)
    if scene.relation == "on":
        height = 0.45 if scene.second == "couch" else 0.51
        p |= dict(animal_y=height, animal_z=0.12 if scene.second == "couch" else 0.05)
        p["animal_x"] = rng.uniform(-0.3, 0.3) if scene.second == "couch" else 0.0
        p["animal_size"] *= 1.12 if scene.second == "couch" else 0.85
        turn *= 1.0 if scene.second == "couch" else 0.35
    elif scene.relation == "beside":
        side = rng.choice([-1, 1])
        p |= dict(
            animal_x=side * (0.62 if scene.second == "couch" else 0.5),
            animal_z=0.62 if scene.second == "couch" else 0.15,
        )
        p["animal_size"] *= 1.2
    return p | dict(animal_cos=math.cos(turn), animal_sin=math.sin(turn))


def _umbrella_parameters(scene: Scene, rng: np.random.Generator) -> dict[str, float]:
    roll, pitch, hub, canopy = 0.0, 0.12, (0.0, 1.02, 0.0), 0.55
    if scene.thing in GARMENTS:
        roll, pitch, canopy = 0.16, 0.06, 0.56
        hub = (0.235 - 0.86 * math.sin(roll), 1.2 + 0.84, 0.28 + 0.05)
    elif rng.random() < 0.6:  # lying open on its rim and its handle
        roll, pitch, hub = math.radians(53), 0.0, (-0.2, 0.63, 0.0)
    return dict(
        roll_cos=math.cos(roll), roll_sin=math.sin(roll), pitch_cos=math.cos(pitch),
        pitch_sin=math.sin(pitch), hub_x=hub[0], hub_y=hub[1], hub_z=hub[2], canopy=canopy,
    )  # fmt: skip


# In metres: the box (centre, half sizes) that holds a figure; centre and height of a picture of it
_FIGURE_BOX = ((0.0, 0.91, -0.02), (0.58, 0.94, 0.38))
_FRAMES = {"close": (1.36, 0.86), "half": (1.18, 1.3), "full": (0.87, 1.98)}


def _view_parameters(scene: Scene, rng: np.random.Generator) -> dict[str, float]:
    kind = _kind(scene)
    if scene.thing in GARMENTS:
        centre, height = _FRAMES[scene.framing]
        box = _FIGURE_BOX
        if scene.wearer == "hanger":
            low = {"raincoat": 0.6, "jacket": 0.84, "dress": 0.46}[scene.thing]
            frames = {"close": (1.52, 0.0), "half": (1.66, 0.12), "full": (1.66, 0.3)}
            top, margin = frames[scene.framing]
            centre, height = (low + top - margin * 0.6) / 2, (top - low) + margin
            box = ((0.0, 0.83, 0.0), (0.7, 0.84, 0.4))
        elif scene.thing == "dress":
            box = ((0.0, 0.91, 0.0), (0.6, 0.94, 0.5))
        if scene.second == "umbrella":
            centre, height = (1.09, 2.4) if scene.framing == "full" else (1.42, 1.62)
            box = ((0.0, 1.07, 0.12), (0.78, 1.1, 0.8))
    else:
        animals = {"sitting": (0.29, 0.86), "lying": (0.2, 0.95), "standing": (0.34, 1.02)}
        size = 1.2 if scene.thing == "dog" else 1.0
        frames = {"couch": (0.42, 1.9), "chair": (0.52, 1.36), "umbrella": (0.53, 1.5)}
        centre, height = frames.get(kind[-1]) or [size * v for v in animals[scene.pose]]
        box = {
            "couch": ((0.0, 0.6, 0.12), (1.05, 0.62, 0.85)),
            "chair": ((0.0, 0.62, 0.05), (0.95, 0.65, 0.6)),
            "umbrella": ((0.05, 0.6, 0.0), (0.95, 0.62, 0.65)),
            "animal": ((0.0, 0.4, 0.0), (0.58, 0.42, 0.58)),
        }[kind[-1]]
        if scene.relation == "beside":
            height *= 1.25
    distance = 4.2
    yaw = math.radians(scene.yaw)
    angle = math.radians(scene.light_angle)
    outside = scene.place != "studio"
    light = np.array([math.sin(angle), 1.25 if outside else 1.1, math.cos(angle)])
    light /= np.linalg.norm(light)
    warm = scene.light == "warm"
    key = {"studio": (2.3, 2.25, 2.15), "street": (2.5, 2.4, 2.2), "rain": (1.5, 1.55, 1.65),
           "garden": (2.7, 2.55, 2.2)}  # fmt: skip
    key = np.array(key[scene.place]) * ((1.12, 0.88, 0.58) if warm else 1.0)
    sky = {"studio": (0.62, 0.64, 0.68), "street": (0.55, 0.68, 0.9), "rain": (0.66, 0.72, 0.8),
           "garden": (0.5, 0.66, 0.92)}  # fmt: skip
    sky = np.array(sky[scene.place]) * ((1.1, 0.92, 0.8) if warm else 1.0)
    ground = {"studio": (0.5, 0.5, 0.5), "street": (0.3, 0.29, 0.28), "rain": (0.2, 0.22, 0.25),
              "garden": (0.16, 0.26, 0.08)}[scene.place]  # fmt: skip
    wall = _linear(_HEX[scene.background or "grey"])
    if scene.background:
        wall = _mix(wall, np.full(3, 0.75), 0.25)
        ground = tuple(wall * 0.7)
    p = dict(
        yaw_cos=math.cos(yaw), yaw_sin=math.sin(yaw), eye_y=scene.camera_height, eye_z=distance,
        target_y=centre, focal=2 * distance / height * scene.zoom, shift=rng.uniform(-0.04, 0.04),
        seed=float(scene.seed % 1000), film_nm=scene.film_nm, film_spread=scene.film_spread_nm,
        iris=rng.uniform(0, 1), marks=float(rng.random() < 0.55),
        closure=float(scene.closure == "buttons"), warm=float(warm), mood=rng.uniform(0, 1),
    )  # fmt: skip
    vectors = dict(light=light, key=key, sky=sky, ground=ground, wall=wall)
    for name, vector in vectors.items():
        p |= {f"{name}_{i}": float(v) for i, v in enumerate(vector)}
    for name, vector in zip(("box", "half"), box, strict=True):
        p |= {f"{name}_{axis}": v for axis, v in zip("xyz", vector, strict=True)}
    return p


def _parameters(scene: Scene) -> dict[str, float]:
    """All numbers that distances and shading need, the same names for every scene."""
    rng = np.random.default_rng(scene.seed)
    p = {}
    for part in (_figure_parameters, _animal_parameters, _umbrella_parameters, _view_parameters):
        p |= part(scene, rng)
    return p


_NAMES = tuple(_parameters(Scene("raincoat", "red", "matte", "studio")))


def _named(table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Columns [R, 1] of a parameter table [R, K], by name."""
    return dict(zip(_NAMES, table.split(1, dim=1), strict=True))


# A slot's finish: coat (strength of the mirror-like layer), shine (exponent of its highlight: the
# higher, the narrower), sheen, kind
_PLAIN, _LEATHER, _DENIM, _HOLOGRAPHIC, _FUR = range(5)
_FINISHES = {
    "matte": (0.02, 12.0, 0.08, _PLAIN), "glossy": (1.0, 220.0, 0.0, _PLAIN),
    "leather": (0.85, 34.0, 0.05, _LEATHER), "denim": (0.01, 10.0, 0.1, _DENIM),
    "holographic": (1.0, 300.0, 0.0, _HOLOGRAPHIC),
}  # fmt: skip


def _palette(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Colours [slots, 3] (linear) and finishes [slots, 4] of a picture."""
    rng = np.random.default_rng(scene.seed + 1)
    colours = np.full((_SLOTS, 3), 0.5)
    finishes = np.tile(np.array(_FINISHES["matte"]), (_SLOTS, 1))
    animal = scene.thing in ANIMALS
    main = _FUR_HEX[scene.colour] if animal and scene.colour in _FUR_HEX else _HEX[scene.colour]
    if scene.material == "denim":
        main = _DENIM_HEX.get(scene.colour, main)
    colours[MAIN] = _linear(main)
    finishes[MAIN] = (0.03, 14.0, 0.22, _FUR) if animal else _FINISHES[scene.material]
    if scene.material == "leather":
        colours[MAIN] *= 0.8  # dyed deeper than cloth, so that its sheen shows
    colours[SECOND] = _linear(_HEX[scene.second_colour or "grey"])
    if scene.second == "umbrella":
        finishes[SECOND] = _FINISHES["glossy"]
    dark = colours[MAIN].mean() < 0.12
    if dark or scene.material == "leather":
        colours[TRIM] = _linear("c9ccd2")
    else:
        colours[TRIM] = _linear("f4f4f4" if rng.random() < 0.4 else "3a3a40")
    if scene.material == "denim":
        colours[TRIM] = _linear("c98a3a")
    colours[SKIN] = _ramp(_SKIN_HEX, scene.skin)
    colours[HAIR] = _linear(_HAIR_HEX[scene.hair or "brown"])
    if scene.thing == "dress":
        colours[LEGS] = colours[SKIN]
    else:
        colours[LEGS] = _linear(_LEGS_HEX[rng.integers(len(_LEGS_HEX))])
    colours[SHOES] = _linear(_SHOES_HEX[rng.integers(len(_SHOES_HEX))])
    wood = ("b98a56", "8a5a33", "d9b382", "5a3b25")[rng.integers(4)]
    colours[STAND] = _linear("ece4d8" if scene.wearer == "mannequin" else wood)
    colours[METAL] = _linear("9a9da3")
    colours[SHIRT] = _linear(("f2f2f2", "dfe3ea", "33363f", "e8d9c5")[rng.integers(4)])
    colours[DARK] = _linear("2a1c1c" if scene.thing == "dog" else "c9787a" if animal else "33261f")
    cat_eyes = ("c6b53a", "7fb24a", "6aa6cf")
    colours[EYES] = _linear(cat_eyes[rng.integers(3)] if scene.thing == "cat" else "20130d")
    finishes[HAIR] = (0.06, 30.0, 0.15, _PLAIN)
    finishes[SHOES] = (0.25, 60.0, 0.0, _PLAIN)
    finishes[METAL] = (0.7, 90.0, 0.0, _PLAIN)
    finishes[STAND] = (0.12, 40.0, 0.05, _PLAIN)
    finishes[SKIN] = finishes[LEGS] if scene.thing == "dress" else (0.05, 20.0, 0.12, _PLAIN)
    finishes[EYES] = finishes[DARK] = (0.8, 200.0, 0.0, _PLAIN)
    return colours, finishes


# -------------------------------------------------------------------------------------------------
# Rays

_TILE = 16  # a row is a tile of 16x16 rays
_STEPS, _SHADOW_STEPS = 48, 12


def _rows_where(active: torch.Tensor, block: int | None):
    """Indices of the rows that have an active ray; with `block` in blocks of that many, the last
    one padded with copies of its last row.
    """
    rows = active.any(1).nonzero().squeeze(1)
    if not len(rows):
        return
    if block is None:
        yield rows
        return
    for part in rows.split(block):
        yield torch.cat([part, part[-1:].expand(block - len(part))])


def _world(p, x, y, z):
    """Turn a local vector by the scene's yaw."""
    return x * p["yaw_cos"] + z * p["yaw_sin"], y, z * p["yaw_cos"] - x * p["yaw_sin"]


def _local(p, x, y, z):
    return x * p["yaw_cos"] - z * p["yaw_sin"], y, z * p["yaw_cos"] + x * p["yaw_sin"]


def _box_span(p, o, d, margin=0.0):
    """Where rays enter and leave the box, widened by a margin in metres; near > far is a miss."""
    near, far = None, None
    for axis, start, step in zip("xyz", o, d, strict=True):
        inverse = 1 / torch.where(step.abs() < 1e-6, torch.full_like(step, 1e-6), step)
        half = p[f"half_{axis}"] + margin
        a = (p[f"box_{axis}"] - half - start) * inverse
        b = (p[f"box_{axis}"] + half - start) * inverse
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        near = low if near is None else torch.maximum(near, low)
        far = high if far is None else torch.minimum(far, high)
    return near.clamp_min(0), far


def _march(nearest, table, o, d, near, far, block, soft: float | None = None):
    """Sphere-trace rays from near to far in the local frame.

    Returns (t, hit), distances along the rays and whether they met a surface; or with `soft`
    (t, light), the share of light that passes: the smaller `soft`, the wider the half-shadow.
    """
    t, alive = near.clone(), near < far
    light = torch.ones_like(t)
    hit = torch.zeros_like(alive)
    steps, phase = (_STEPS, 6) if soft is None else (_SHADOW_STEPS, 4)
    for _phase in range(0, steps, phase):
        for rows in _rows_where(alive, block):
            part = table[rows]
            ro, rd = [v[rows] for v in o], [v[rows] for v in d]
            tt, ff, on, ll, hh = t[rows], far[rows], alive[rows], light[rows], hit[rows]
            for _ in range(phase):
                distance, _slot = nearest(part, *(a + b * tt for a, b in zip(ro, rd, strict=True)))
                if soft is None:
                    close = distance < 0.0009 * tt.clamp_min(0.5)
                    hh = hh | (on & close)
                    on = on & ~close
                    tt = torch.where(on, tt + distance, tt)
                else:
                    passed = (soft * distance / tt.clamp_min(0.02)).clamp(0, 1)
                    ll = torch.where(on, torch.minimum(ll, passed), ll)
                    on = on & (ll > 0.01)
                    tt = torch.where(on, tt + distance.clamp(0.025, 0.22), tt)
                on = on & (tt < ff)
            t[rows], alive[rows], light[rows], hit[rows] = tt, on, ll, hh
    return (t, hit) if soft is None else (t, light)


def _hash(i, j, k=0.0):
    """A number in 0..1 for grid cells, from the fractional part of a fast sine."""
    v = torch.sin(i * 12.9898 + j * 78.233 + k * 37.719) * 43758.547
    return v - v.floor()


def _noise(x, y, k=0.0):
    """Smooth value noise in 0..1."""
    i, j = x.floor(), y.floor()
    u, v = x - i, y - j
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    low = _mix(_hash(i, j, k), _hash(i + 1, j, k), u)
    return _mix(low, _mix(_hash(i, j + 1, k), _hash(i + 1, j + 1, k), u), v)


def _rgb(p, name):
    return torch.stack([p[f"{name}_{i}"] for i in range(3)], -1)


def _tint(reference, code):
    return torch.tensor(_linear(code), dtype=torch.float32, device=reference.device)


# -------------------------------------------------------------------------------------------------
# Backdrops: colours [R, T, 3] of rays (o, d in the world's frame) that meet no thing. `screen` is
# (u, v) in -1..1; `floor` is (x, z, t), where a ray meets the floor, t < 0 for one that does not.


def _studio(p, o, d, screen, floor):
    wall = _rgb(p, "wall")
    u, v = screen
    glow = 1.12 - 0.22 * (u * u + (v - 0.15) ** 2)
    lit = _mix(glow, 0.93 + 0.06 * v, _step(-0.10, -0.30, d[1]))
    return wall * lit[..., None] * (0.55 + 0.45 * _rgb(p, "key") / 2.2)


def _facades(p, x, y, far: bool, wet: bool):
    """A row of houses: x along the street and y up, metres."""
    seed = p["seed"]
    width = 5.0 if far else 3.4
    cell = (x / width + seed).floor()
    pick = _hash(cell, 1.0 * far, seed)[..., None]
    colour = torch.where(pick < 0.8, _tint(x, "6f7f95"), _tint(x, "c99a5b"))  # slate, ochre
    colour = torch.where(pick < 0.55, _tint(x, "d8c6a6"), colour)  # cream
    colour = torch.where(pick < 0.3, _tint(x, "a8583f"), colour)  # brick
    wx, wy = (x / 1.13 + seed) % 1.0, ((y - 0.35) / 1.45) % 1.0
    inside = _step(0.18, 0.24, wx) * _step(0.82, 0.76, wx)
    inside = inside * _step(0.2, 0.25, wy) * _step(0.84, 0.79, wy)
    bars = _step(0.03, 0.015, (wx - 0.5).abs()) + _step(0.025, 0.01, (wy - 0.52).abs())
    lamp = _hash((x / 1.13 + seed).floor(), ((y - 0.35) / 1.45).floor(), seed)[..., None]
    glass = torch.where(lamp > (0.55 if wet else 0.82), _tint(x, "ffd98a"), _tint(x, "3d4c63"))
    glass = _mix(glass, _tint(x, "efe9dd"), bars.clamp(0, 1)[..., None])
    band = _step(0.03, 0.0, (y - 3.2).abs()) + _step(0.05, 0.03, (y - 0.12).abs())
    colour = colour * (0.92 + 0.1 * _noise(x * 3, y * 9, seed))[..., None]
    colour = _mix(colour, glass, inside[..., None])
    colour = _mix(colour, _tint(x, "efe9dd"), 0.6 * band.clamp(0, 1)[..., None])
    roof = 3.0 + 3.2 * _hash(cell, 7.0 + far, seed)
    return colour, _step(roof + 0.03, roof - 0.03, y)


def _street_scenery(p, o, d, wet):
    """Sky and houses along directions that do not meet the floor before the houses."""
    up = d[1].clamp(-0.3, 1)
    sky = _mix(_tint(up, "dfeaf3"), _tint(up, "7fb2e5"), _step(0.0, 0.35, up)[..., None])
    dusk = (p["warm"] * _step(0.4, 0.0, up))[..., None]
    sky = _mix(sky, _tint(up, "ffc58a").expand_as(sky), 0.65 * dusk)
    if wet:
        sky = _mix(_tint(up, "aab6c2"), _tint(up, "7d8b9b"), _step(0.0, 0.3, up)[..., None])
    depth = (-d[2]).clamp_min(1e-3)
    colour = sky
    for far, z, haze in ((True, 16.0, 0.62), (False, 8.5, 0.0)):
        reach = (o[2] + z) / depth
        x, y = o[0] + d[0] * reach, o[1] + d[1] * reach + (1.6 if far else 0.0)
        houses, cover = _facades(p, x, y, far, wet)
        houses = _mix(houses, sky, haze + (0.42 if wet else 0.12) * (1 - haze))
        colour = _mix(colour, houses * (0.72 if wet else 0.9), (cover * (d[2] < 0))[..., None])
    return colour


def _street(p, o, d, screen, floor, wet=False):
    scenery = _street_scenery(p, o, d, wet)
    x, z, t = floor
    speckle = _noise(x * 40, z * 40) * 0.12 + _noise(x * 4, z * 4) * 0.12
    slab = _tint(x, "8a96a3" if wet else "b9b4ab") * (0.85 + speckle)[..., None]
    seam = _step(0.035, 0.015, (x / 0.9 % 1.0 - 0.5).abs() * 0.9)
    seam = seam + _step(0.035, 0.015, (z / 0.9 % 1.0 - 0.5).abs() * 0.9)
    slab = slab * (1 - 0.22 * seam.clamp(0, 1))[..., None]
    road = _tint(x, "55606d" if wet else "5c5c60") * (0.8 + speckle * 1.6)[..., None]
    dash = _step(0.1, 0.07, (z + 4.2).abs()) * (((x + p["seed"]) % 2.2) < 1.2)
    road = _mix(road, _tint(x, "e8e4d8"), dash[..., None])
    kerb = _step(0.12, 0.09, (z + 2.0).abs())
    ground = torch.where((z > -2.0)[..., None], slab, road)
    ground = _mix(ground, _tint(x, "d4d0c8") * (0.7 if wet else 1.0), kerb[..., None])
    far_side = (z < -7.0)[..., None]
    ground = torch.where(far_side, slab * 0.9, ground)
    if wet:
        ripple = (_noise(x * 7, z * 22, p["seed"]) - 0.5) * 0.10
        bounced = (d[0] + ripple, -d[1] + ripple, d[2])
        mirror = _street_scenery(p, (o[0], o[1] * 0.0, o[2]), bounced, wet)
        puddle = _step(0.38, 0.62, _noise(x * 1.1, z * 2.0, p["seed"] + 3.0))
        gloss = (0.25 + 0.5 * puddle)[..., None]
        ground = _mix(ground * 0.75, mirror, gloss)
    on_floor = ((t > 0) & (z > -8.5))[..., None]
    if not wet:
        ground = ground * (0.55 + 0.2 * _rgb(p, "key"))
    return torch.where(on_floor, ground, scenery * (0.7 + 0.12 * _rgb(p, "key")))


def _rain(p, o, d, screen, floor):
    return _street(p, o, d, screen, floor, wet=True)


# Distance, lowest height and how much it varies (metres), frequency along x, colour
_HEDGES = (
    (15.0, 2.6, 3.2, 0.35, "7fae72"),
    (9.0, 1.5, 1.7, 0.7, "4f9148"),
    (5.5, 0.55, 0.65, 1.5, "2f7a39"),
)


def _garden(p, o, d, screen, floor):
    seed = p["seed"]
    up = d[1]
    sky = _mix(_tint(up, "e4f0f7"), _tint(up, "68a9e6"), _step(-0.02, 0.4, up)[..., None])
    dusk = (p["warm"] * _step(0.4, 0.0, up))[..., None]
    sky = _mix(sky, _tint(up, "ffcf9a").expand_as(sky), 0.6 * dusk)
    cloud = _noise(d[0] * 7 + seed, up * 14, seed) * 0.7 + _noise(d[0] * 20, up * 40, seed) * 0.3
    cloud = _step(0.5, 0.75, cloud)
    colour = _mix(sky, torch.ones_like(sky), 0.8 * cloud[..., None])
    depth = (-d[2]).clamp_min(1e-3)
    for layer, (z, low, swing, scale, code) in enumerate(_HEDGES):
        reach = (o[2] + z) / depth
        x, y = o[0] + d[0] * reach, o[1] + d[1] * reach
        edge = low + swing * _noise(x * scale, 0 * x, seed + layer)
        edge = edge + 0.25 * _noise(x * 5, y * 5, seed)
        leaf = _noise(x * 9, y * 9, seed) * 0.5 + _noise(x * 22, y * 22, seed) * 0.5
        lit = 0.45 + 0.55 * (y / edge).clamp(0, 1) + 0.75 * (leaf - 0.4)
        leaves = _tint(x, code) * lit[..., None]
        if layer == 2:  # the nearest is in flower
            cx, cy = x / 0.2, y / 0.2
            i, j = cx.floor(), cy.floor()
            ox = cx - i - 0.25 - 0.5 * _hash(i, j, seed)
            oy = cy - j - 0.25 - 0.5 * _hash(j, i, seed)
            r = _length(ox, oy) * (1 + 0.22 * torch.cos(5 * torch.atan2(oy, ox)))
            r = r / (0.6 + 0.6 * _hash(i, j, seed + 2.0))
            bloom = _step(0.25, 0.19, r) * (_hash(i, j, seed + 5.0) > 0.55)
            hue = _hash(i * 0 + (x / 2.2).floor(), 3.0, seed)[..., None]
            petal = torch.where(hue < 0.7, _tint(x, "fdf3f0"), _tint(x, "f7c93a"))
            petal = torch.where(hue < 0.35, _tint(x, "f56a97"), petal)
            leaves = _mix(leaves, petal, bloom[..., None])
        cover = _step(edge + 0.04, edge - 0.04, y) * (d[2] < 0)
        colour = _mix(colour, leaves.clamp_min(0), cover[..., None])
    x, z, t = floor
    blade = _noise(x * 60, z * 24) * 0.5 + _noise(x * 9, z * 6, seed) * 0.5
    grass = _mix(_tint(x, "3f8f35"), _tint(x, "8cc152"), blade[..., None])
    grass = grass * (0.75 + 0.25 * _step(-5.0, -2.0, z))[..., None]
    i, j = (x / 0.3).floor(), (z / 0.42).floor()
    ox = x / 0.3 - i - 0.5 + 0.4 * (_hash(i, j) - 0.5)
    oz = z / 0.42 - j - 0.5 + 0.4 * (_hash(j, i) - 0.5)
    daisy = _step(0.16, 0.12, _length(ox, oz)) * (_hash(i, j, seed) > 0.8)
    white = (_hash(i, j, 9.0) > 0.5)[..., None]
    petal = torch.where(white, _tint(x, "ffffff"), _tint(x, "ffd84a"))
    grass = _mix(grass, petal, daisy[..., None])
    on_floor = ((t > 0) & (z > -5.5))[..., None]
    return torch.where(on_floor, grass, colour) * (0.62 + 0.15 * _rgb(p, "key"))


_BACKDROPS = {"studio": _studio, "street": _street, "rain": _rain, "garden": _garden}


def _streaks(p, u, v):
    """How much falling rain covers the screen points u, v, 0..1: three layers of streaks."""
    total = torch.zeros_like(u)
    layers = ((17.0, 2.6, 0.085), (26.0, 3.6, 0.10), (40.0, 5.2, 0.13))
    for layer, (columns, rows, width) in enumerate(layers):
        x = (u + 0.10 * v) * columns * 0.5 + 0.37 * layer
        i = x.floor()
        fall = v * rows * 0.5 + 9.0 * _hash(i, 2.0 + layer, p["seed"])
        j = fall.floor()
        length = 0.25 + 0.45 * _hash(i, j, p["seed"] + layer)
        along = fall - j
        centre = 0.25 + 0.5 * _hash(j, i, p["seed"])
        streak = _step(width, width * 0.35, (x - i - centre).abs())
        streak = streak * (along < length) * _step(0.0, 0.15, along)
        shown = _hash(i, j, p["seed"] + 11.0) > 0.35
        total = total + streak * shown * (0.62 - 0.13 * layer)
    return total.clamp(0, 0.8)


# -------------------------------------------------------------------------------------------------
# Light


def _surroundings(p, x, y, z, studio):
    """What a mirror sees in a world direction, [R, T, 3]: sky, ground, soft boxes, the key light.

    studio is 1 or 0; outside one the horizon is darkened by houses and the soft boxes are weaker.
    """
    sky, ground = _rgb(p, "sky"), _rgb(p, "ground")
    horizon = sky * 0.75 + 0.25
    colour = _mix(horizon, ground, _step(0.03, -0.12, y)[..., None])
    colour = _mix(colour, sky * 0.8, _step(0.1, 0.8, y)[..., None])
    blocks = _step(0.28, 0.22, y + 0.12 * torch.sin(9 * x + p["seed"]) * torch.sin(5 * z))
    blocks = blocks * _step(-0.1, 0.0, y)
    colour = colour * (1 - 0.55 * (blocks * (1 - studio)))[..., None]
    around = torch.atan2(x, z)
    boxes = torch.zeros_like(x)
    for centre, half, low, high, power in (
        (0.95, 0.22, -0.25, 0.75, 2.6),
        (-1.15, 0.3, -0.3, 0.7, 1.7),
        (2.6, 0.25, 0.0, 0.7, 1.4),
    ):
        box = power * _step(half + 0.07, half - 0.07, (around - centre).abs())
        boxes = boxes + box * _step(low - 0.1, low + 0.1, y) * _step(high + 0.1, high - 0.1, y)
    boxes = boxes + 2.2 * _step(0.78, 0.9, y)
    boxes = boxes * (studio + 0.45 * (1 - studio))
    colour = colour + boxes[..., None] * (0.4 + 0.25 * _rgb(p, "key"))
    sun = (x * p["light_0"] + y * p["light_1"] + z * p["light_2"]).clamp(0, 1)
    return colour + (1.2 * sun**40)[..., None] * _rgb(p, "key") * 0.6


def _painted(kind, p, x, y, z, slot, colour):
    """`colour` with what is drawn on surfaces and is no shape: faces, zips, lapels, markings.

    Also returns how much of the surface is a decal that hides the film under it, [R, T] in 0..1.
    """
    decal = torch.zeros_like(x)

    def paint(mask, shade):
        nonlocal colour
        colour = _mix(colour, shade, mask[..., None])

    white = _tint(x, "fbf8f4")
    side = x.abs()
    if kind[0] in ("person", "mannequin", "hanger"):
        front = (slot == MAIN) & (z > 0.02)
        cloth = front & (y < 1.40)
        closed = cloth & (p["placket"] > 0)
        zip_line = _step(0.011, 0.007, side) * (1 - p["closure"])
        button = _length(x, ((y + 0.02) / 0.115 % 1.0 - 0.5) * 0.115)
        button = _step(0.016, 0.012, button) * p["closure"]
        trim = _palette_colour(p, TRIM)
        decal = (zip_line + button).clamp(0, 1) * closed
        paint(decal, trim)
        # A jacket's lapels: a dark edge around the triangle in which the shirt shows
        inside = (y - 1.2) * 0.62 - side
        open_neck = front & (p["lapel"] > 0) & (y < 1.45)
        shirt = _step(-0.003, 0.003, inside) * open_neck
        paint(shirt, _palette_colour(p, SHIRT))
        decal = torch.maximum(decal, shirt)
        edge = _step(0.009, 0.004, (inside + 0.075 - 0.6 * (1.33 - y).abs()).abs())
        edge = edge * (inside < -0.004)
        paint(0.6 * edge * open_neck * (y > 1.2), 0.2 * colour)
        edge = _step(0.008, 0.004, (inside + 0.004).abs())
        paint(0.6 * edge * open_neck * (y > 1.2), 0.2 * colour)
        pocket = _step(0.007, 0.003, (y - 0.93 + 0.35 * (side - 0.13)).abs())
        pocket = pocket * (side > 0.09) * (side < 0.19)
        paint(0.5 * pocket * closed, 0.25 * colour)
        seam = _step(0.008, 0.003, (y - p["hem"] - 0.03).abs())
        seam = seam * (slot == MAIN) * (p["placket"] > 0)
        paint(0.35 * seam, 0.3 * colour)
    if kind[0] == "person":
        y = y - _LIFT
        skin = (slot == SKIN) & (z > 0.03) & (y > 1.4)
        eye_x, eye_y = side - 0.044, y - 1.548
        blush = torch.exp(-((side - 0.066) ** 2 + (y - 1.505) ** 2) / 0.0006)
        paint(0.28 * blush * skin, colour * _tint(x, "f59a94"))
        paint(_step(1.0, 0.8, _length(eye_x / 0.024, eye_y / 0.0165)) * skin, white)
        iris = torch.where((p["iris"] < 0.6)[..., None], _tint(x, "33211a"), _tint(x, "2f5570"))
        paint(_step(1.0, 0.8, _length(eye_x / 0.0135, eye_y / 0.0155)) * skin, iris)
        glint = _length((x - 0.004).abs() - 0.044, eye_y - 0.005) / 0.0045
        paint(_step(1.0, 0.6, glint) * skin, white)
        lash = _step(0.005, 0.002, (eye_y - 0.0165 + 9.0 * eye_x**2).abs()) * (eye_x.abs() < 0.026)
        paint(0.85 * lash * skin, _tint(x, "22150f"))
        brow = _step(0.0055, 0.003, (eye_y - 0.034 + 7.0 * (eye_x + 0.004) ** 2).abs())
        brow = brow * (eye_x.abs() < 0.027)
        paint(0.8 * brow * skin, _palette_colour(p, HAIR) * 0.6)
        curve = y - 1.458 - 7.0 * x * x
        lips = _step(0.0085, 0.005, (curve + 0.002).abs()) * _step(0.036, 0.03, side)
        paint(0.8 * lips * skin, _tint(x, "b5404a"))
    if kind[0] == "animal":
        x, y, z = x - p["animal_x"], y - p["animal_y"], z - p["animal_z"]
        x, z = p["animal_cos"] * x - p["animal_sin"] * z, p["animal_sin"] * x + p["animal_cos"] * z
        x, y, z = x / p["animal_size"], y / p["animal_size"], z / p["animal_size"]
        hx, hy, hz = x - p["head_x"], y - p["head_y"], z - p["head_z"]
        side = hx.abs()
        fur = slot == MAIN
        cat = p["dog"] < 0.5
        stripes = _step(0.0, 0.8, torch.sin(50 * z + 8 * torch.sin(9 * y)) * (y > 0.1))
        stripes = stripes * (hz < 0.02)
        stripes = stripes + _step(0.2, 0.6, torch.sin(hx * 95 + 1.57)) * (hy > 0.045) * (hz > 0.0)
        paint(0.5 * stripes.clamp(0, 1) * fur * cat * p["marks"], 0.35 * colour)
        patch = _step(0.52, 0.6, _noise(x * 7 + p["seed"], z * 7 + y * 5, p["seed"]))
        paint(0.75 * patch * fur * (~cat) * p["marks"] * (hz < 0.04), 0.4 * colour)
        muzzle = _step(1.0, 0.75, _length(side / 0.05, (hy + 0.04) / 0.035)) * (hz > 0.06)
        chest = _step(1.0, 0.7, _length(x / 0.055, (y - 0.26) / 0.12))
        chest = chest * (z > p["chest_z"] + 0.05) * (hz < 0.05)
        paint(0.75 * (muzzle + chest).clamp(0, 1) * fur * p["marks"], white)
        inner = _step(1.0, 0.6, _length((side - 0.076) / 0.022, (hy - 0.105) / 0.04)) * (hz > -0.02)
        paint(0.7 * inner * fur * cat, _tint(x, "e39a94"))
        mouth = (hy + p["nose_y"] + 0.032 - 0.5 * (side - 0.02).abs()).abs()
        mouth = _step(0.005, 0.002, mouth) * (side < 0.035)
        paint(0.7 * mouth * fur * (hz > 0.09), 0.2 * colour)
        pupil_width = torch.where(cat, 0.007 + 0 * side, 0.03 + 0 * side)
        pupil = _length((side - p["eye_x"] - 0.004) / pupil_width, (hy - p["eye_y"]) / 0.017)
        paint(_step(1.0, 0.8, pupil) * (slot == EYES), _tint(x, "120d0b"))
    return colour, decal


def _palette_colour(p, slot):
    return torch.stack([p[f"_colour_{slot}_{i}"] for i in range(3)], -1)


def _shade(kind, nearest, table, p, palette, finishes, o, d, t, studio, block):
    """Colour [R, T, 3] of the surface points at distance t along local rays."""
    x, y, z = (a + b * t for a, b in zip(o, d, strict=True))
    eps = 0.0012
    grad = [0.0, 0.0, 0.0]
    for signs in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        distance, _slot = nearest(table, x + eps * signs[0], y + eps * signs[1], z + eps * signs[2])
        grad = [g + s * distance for g, s in zip(grad, signs, strict=True)]
    size = _length(*grad).clamp_min(1e-9)
    nx, ny, nz = (g / size for g in grad)
    _distance, slot = nearest(table, x, y, z)
    # Towards the eye where a crease turned the normal away
    facing = -(nx * d[0] + ny * d[1] + nz * d[2])
    index = slot.long()
    rows = torch.arange(len(index), device=index.device)[:, None]
    colour, decal = _painted(kind, p, x, y, z, slot, palette[rows, index])
    coat, shine, sheen, cover = finishes[rows, index].unbind(-1)
    if kind[0] in ("person", "mannequin", "hanger"):
        grain = _noise(x * 150 + z * 90, y * 150) - 0.5
        twill = torch.sin((x + y) * 520) * 0.5 + (_noise(x * 240, y * 90) - 0.5)
        weave = 1 + (cover == _LEATHER) * 0.25 * grain + (cover == _DENIM) * 0.22 * twill
        colour = colour * weave[..., None]
        stitch = _step(0.004, 0.002, (x.abs() - 0.045).abs())
        stitch = stitch * (torch.sin(y * 420) > 0) * (y < 1.38) * (z > 0)
        stitch = (cover == _DENIM) * stitch * 0.9 * (slot == MAIN)
        colour = _mix(colour, _tint(x, "d59a4a"), stitch[..., None])
    nx, ny, nz = _world(p, nx, ny, nz)
    dx, dy, dz = _world(p, *d)
    lx, ly, lz = p["light_0"], p["light_1"], p["light_2"]
    occlusion = 1.0
    local_normal = _local(p, nx, ny, nz)
    for reach, weight in ((0.035, 0.55), (0.13, 0.45)):
        above = (a + reach * b for a, b in zip((x, y, z), local_normal, strict=True))
        distance, _slot = nearest(table, *above)
        occlusion = occlusion - weight * (1 - distance / reach).clamp(0, 1)
    occlusion = occlusion.clamp(0.08, 1)
    start = tuple(a + 0.012 * b for a, b in zip((x, y, z), local_normal, strict=True))
    light = _local(p, lx, ly, lz)
    toward = nx * lx + ny * ly + nz * lz
    span = _box_span(p, start, light)
    light = tuple(v.expand_as(x) for v in light)
    far = torch.where(toward > -0.15, span[1].clamp(0, 1.4), torch.zeros_like(x))
    near = torch.full_like(x, 0.015)
    _t, shadow = _march(nearest, table, start, light, near, far, block, soft=9.0)
    skin_like = (slot == SKIN) | (cover == _FUR)
    wrap = torch.where(skin_like, 0.25, 0.08)
    lambert = ((toward + wrap) / (1 + wrap)).clamp_min(0) * shadow
    key, sky, ground = _rgb(p, "key"), _rgb(p, "sky"), _rgb(p, "ground")
    ambient = _mix(ground, sky, (0.5 + 0.5 * ny)[..., None]) * occlusion[..., None]
    fill = (0.32 * (nz * 0.9 - nx * lx.sign() * 0.4 + 0.1).clamp_min(0) * occlusion)[..., None]
    incoming = 0.36 * lambert[..., None] * key + 0.62 * ambient + fill
    facing = facing.clamp(0.02, 1)
    rim = (1 - facing) ** 3
    result = colour * incoming + (sheen * rim * occlusion)[..., None] * (0.3 + 0.7 * colour) * sky
    # The mirror-like layer: surroundings by Schlick's Fresnel, and the key light's highlight
    rx, ry, rz = (a + 2 * facing * b for a, b in zip((dx, dy, dz), (nx, ny, nz), strict=True))
    scene_light = _surroundings(p, rx, ry, rz, studio)
    fresnel = 0.05 + 0.75 * (1 - facing) ** 5
    glint = (rx * lx + ry * ly + rz * lz).clamp(0, 1) ** shine * shadow
    rough = (shine < 100) * 0.6
    mirror = _mix(scene_light, sky * 0.6, rough[..., None]) * fresnel[..., None]
    highlight = (glint * (0.15 + 0.02 * shine.clamp_max(60)))[..., None] * key * 0.5
    result = result + coat[..., None] * occlusion[..., None] * mirror + coat[..., None] * highlight
    film = cover == _HOLOGRAPHIC
    if bool(film.any()):
        phase = p["fold_phase"]
        flow = torch.sin(6.1 * x + 2.3 * y + 1.9 * torch.sin(4.3 * y + 5.1 * z + phase) + phase)
        swirl = 2.1 * torch.sin(5.7 * x + phase)
        flow = flow + 0.6 * torch.sin(9.7 * y - 7.3 * x + 4.0 * z + swirl)
        thickness = p["film_nm"] + p["film_spread"] * 0.55 * flow
        tint = 4.2 * _film_colour(thickness.clamp(130, 1150), facing.clamp_min(0.3))
        tint = _mix(tint, tint.amax(-1, keepdim=True), 0.10)
        silver = _mix(colour, torch.ones_like(colour), 0.45)
        foil = tint * silver * (0.6 * scene_light + 0.5 * incoming + 0.14)
        foil = foil * (0.35 + 0.65 * occlusion)[..., None]
        foil = foil + 0.10 * colour * incoming + 0.9 * highlight + 0.55 * mirror
        result = torch.where(film[..., None], _mix(foil, result, decal[..., None]), result)
    return result


def _tone(colour: torch.Tensor) -> torch.Tensor:
    """Linear light to sRGB in 0..1; highlights above `knee` roll off softly."""
    peak = colour.amax(-1, keepdim=True)
    knee = 0.72
    rolled = 1 - (1 - knee) ** 2 / (peak.clamp_min(knee) + 1 - 2 * knee)
    colour = torch.where(peak > knee, colour * rolled / peak.clamp_min(1e-6), colour)
    colour = _mix(colour, torch.ones_like(colour), ((peak - 1.6) * 0.25).clamp(0, 0.8))
    colour = colour.clamp(0, 1)
    bright = 1.055 * colour.clamp_min(1e-4) ** (1 / 2.4) - 0.055
    return torch.where(colour <= 0.0031308, 12.92 * colour, bright)


def _render_kind(kind, scenes, size, device, antialias, workers, fuse) -> torch.Tensor:
    """Pictures of scenes of one kind, float [N, size, size, 3] in 0..1; `workers` is a map."""
    as_floats = functools.partial(torch.tensor, dtype=torch.float32, device=device)
    parameters = [_parameters(scene) for scene in scenes]
    table = as_floats([[p[name] for name in _NAMES] for p in parameters])
    palettes, finishes = zip(*(_palette(scene) for scene in scenes), strict=True)
    palettes, finishes = as_floats(np.stack(palettes)), as_floats(np.stack(finishes))
    places = torch.tensor([PLACES.index(scene.place) for scene in scenes], device=device)
    nearest = _distance_function(kind, device, fuse)
    side = size * antialias
    tiles = -(-side // _TILE)
    cuda = torch.device(device).type == "cuda"
    chunk, block = (16384, 2048) if cuda else (96, None)
    lane = torch.arange(_TILE * _TILE, device=device)
    image = torch.empty(len(scenes) * tiles * tiles, _TILE * _TILE, 3, device=device)

    def fill(first):
        row = torch.arange(first, min(first + chunk, len(image)), device=device)
        picture, tile = row // (tiles * tiles), row % (tiles * tiles)
        column = (tile % tiles)[:, None] * _TILE + lane % _TILE
        line = (tile // tiles)[:, None] * _TILE + lane // _TILE
        u = (column + 0.5) * (2 / side) - 1
        v = 1 - (line + 0.5) * (2 / side)
        rows = [w[picture] for w in (table, palettes, finishes, places)]
        image[row] = _trace(kind, nearest, *rows, u, v, block)

    list(workers(fill, range(0, len(image), chunk)))
    image = image.view(len(scenes), tiles, tiles, _TILE, _TILE, 3).transpose(2, 3)
    image = image.reshape(len(scenes), tiles * _TILE, tiles * _TILE, 3)[:, :side, :side]
    return image.reshape(len(scenes), size, antialias, size, antialias, 3).mean((2, 4))


@torch.no_grad()  # here and not above: worker threads do not inherit it
def _trace(kind, nearest, table, palette, finishes, places, u, v, block):
    """Colours [R, T, 3] (sRGB) of rays through the screen points u, v in -1..1."""
    p = _named(table)
    p |= {f"_colour_{s}_{i}": palette[:, s, i, None] for s in (TRIM, HAIR, SHIRT) for i in range(3)}
    tilt = (p["target_y"] - p["eye_y"]) / p["eye_z"]
    scale = 1 / (1 + tilt * tilt).sqrt()
    right, up = (u + p["shift"]) / p["focal"], v / p["focal"]
    size = _length(torch.ones_like(u), right, up)
    world = (right / size, (tilt + up) * scale / size, (up * tilt - 1) * scale / size)
    eye = (0.0 * u, p["eye_y"] + 0 * u, p["eye_z"] + 0 * u)
    down = world[1].clamp_max(-1e-4)
    reach = torch.where(world[1] < -1e-3, -eye[1] / down, torch.full_like(u, -1.0))
    floor = (eye[0] + reach * world[0], eye[2] + reach * world[2], reach)
    colour = torch.zeros(*u.shape, 3, device=u.device)
    for i, place in enumerate(PLACES):
        rows = (places == i).nonzero().squeeze(1)
        if len(rows):
            part = {name: value[rows] for name, value in p.items()}
            groups = (eye, world, (u, v), floor)
            vectors = [[w[rows] for w in group] for group in groups]
            colour[rows] = _BACKDROPS[place](part, *vectors)
    o, d = _local(p, *eye), _local(p, *world)
    near, far = _box_span(p, o, d)
    far = torch.where(reach > 0, torch.minimum(far, reach), far)
    t, hit = _march(nearest, table, o, d, near, far, block)
    # Shadows on the floor: soft from the key light, and where the thing is near
    ground = tuple(a + reach * b for a, b in zip(o, d, strict=True))
    ground = (ground[0], torch.zeros_like(u) + 0.004, ground[2])
    light = tuple(w.expand_as(u) for w in _local(p, p["light_0"], p["light_1"], p["light_2"]))
    span = _box_span(p, ground, light, margin=0.25)  # room for the half-shadow
    lit = (reach > 0) & ~hit
    start = torch.maximum(span[0], torch.full_like(u, 0.03))
    end = torch.where(lit, span[1], torch.zeros_like(u))
    _t, shadow = _march(nearest, table, ground, light, start, end, block, soft=6.0)
    studio = (places == PLACES.index("studio")).float()[:, None]
    wet = (places == PLACES.index("rain")).float()[:, None]
    depth = 0.42 + 0.1 * studio - 0.17 * wet
    touch = torch.zeros_like(u)
    beside = lit & (ground[0].abs() < p["half_x"] + 0.2)
    beside = beside & ((ground[2] - p["box_z"]).abs() < p["half_z"] + 0.2)
    for rows in _rows_where(beside, block):
        distance, _slot = nearest(table[rows], *(g[rows] for g in ground))
        touch[rows] = (1 - distance / 0.22).clamp(0, 1) ** 2
    dim = (1 - depth * (1 - shadow)) * (1 - 0.45 * touch * beside)
    colour = colour * torch.where(lit, dim, torch.ones_like(u))[..., None]
    for rows in _rows_where(hit, block):
        part = {name: value[rows] for name, value in p.items()}
        shaded = _shade(
            kind, nearest, table[rows], part, palette[rows], finishes[rows],
            [w[rows] for w in o], [w[rows] for w in d], t[rows], studio[rows], block,
        )  # fmt: skip
        colour[rows] = torch.where(hit[rows][..., None], shaded, colour[rows])
    drops = wet * _streaks(p, u, v)
    colour = _mix(colour, torch.full_like(colour, 0.80), 0.62 * drops[..., None])
    return _tone(colour * (1 - 0.05 * (u * u + v * v))[..., None])


def render(
    scenes: Sequence[Scene], size: int, device="cpu", antialias: int = 2, fuse: bool = True
) -> torch.Tensor:
    """Pictures of the scenes: uint8 [N, size, size, 3] on the device, sRGB.

    antialias is the number of rays a pixel along each side. A picture depends on its scene, size,
    antialias and the kind of device alone, not on its neighbours in the batch. On CUDA, batches of
    hundreds pay; with `fuse` the distances go through torch.compile there, once for each of some
    eleven kinds of scene, which pays from thousands of pictures on and changes them by rounding.
    Raises ValueError unless size and antialias are positive.
    """
    if size < 1 or antialias < 1:
        raise ValueError(f"size and antialias must be positive, got {size} and {antialias}")
    result = torch.empty(len(scenes), size, size, 3, dtype=torch.uint8, device=device)
    groups: dict[tuple, list[int]] = {}
    for i, scene in enumerate(scenes):
        groups.setdefault(_kind(scene), []).append(i)
    at_once = max(1, (1 << 24) // (size * antialias) ** 2)
    with _workers(device) as workers:
        for kind, members in groups.items():
            for first in range(0, len(members), at_once):
                part = members[first : first + at_once]
                some = [scenes[i] for i in part]
                pictures = _render_kind(kind, some, size, device, antialias, workers, fuse)
                result[torch.tensor(part, device=device)] = (pictures * 255 + 0.5).to(torch.uint8)
    return result


@contextlib.contextmanager
def _workers(device):
    """A map over chunks. On a CPU each thread takes a chunk: with every small operation split among
    them they would mostly wait for one another (100 times slower on a busy machine).
    """
    if torch.device(device).type != "cpu":
        yield map
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------
# Command line


# The training pictures, a line each: seed, wearer, place, framing, view, hood, hair style, hair,
# skin, colour under the film, backdrop.
_TRAINING = (
    (1, "person", "studio", "half", "front", "down", "long", "blonde", 0.1, "white", "pink"),
    (2, "person", "studio", "full", "front", "up", "short", "black", 0.9, "grey", "grey"),
    (3, "person", "street", "half", "front", "down", "curly", "black", 0.75, "pink", ""),
    (4, "person", "rain", "half", "front", "up", "long", "brown", 0.35, "blue", ""),
    (5, "mannequin", "studio", "full", "front", "down", "", "", 0, "white", "white"),
    (6, "hanger", "studio", "half", "front", "down", "", "", 0, "grey", "white"),
    (7, "person", "garden", "half", "front", "down", "tied", "red", 0.05, "green", ""),
    (8, "person", "studio", "close", "front", "up", "long", "pink", 0.2, "purple", "purple"),
    (9, "person", "studio", "half", "side", "down", "tied", "brown", 0.5, "white", "grey"),
    (10, "person", "street", "full", "front", "down", "short", "brown", 0.6, "blue", ""),
    (11, "person", "rain", "full", "front", "up", "short", "black", 1.0, "yellow", ""),
    (12, "mannequin", "studio", "half", "front", "up", "", "", 0, "purple", "pink"),
    (13, "person", "studio", "half", "front", "down", "short", "grey", 0.15, "white", "blue"),
    (14, "person", "studio", "close", "front", "down", "curly", "blonde", 0.55, "grey", "grey"),
    (15, "hanger", "studio", "half", "front", "down", "", "", 0, "pink", "grey"),
    (16, "person", "garden", "full", "front", "down", "long", "black", 0.3, "white", ""),
    (17, "person", "street", "half", "behind", "down", "tied", "blonde", 0.1, "grey", ""),
    (18, "person", "studio", "full", "front", "down", "curly", "brown", 0.8, "purple", "yellow"),
    (19, "person", "rain", "half", "front", "down", "long", "red", 0.1, "white", ""),
    (20, "person", "studio", "half", "front", "up", "short", "brown", 0.45, "orange", "white"),
    (21, "mannequin", "street", "full", "front", "down", "", "", 0, "blue", ""),
    (22, "person", "studio", "half", "front", "down", "tied", "black", 0.95, "white", "orange"),
    (23, "person", "street", "close", "front", "up", "curly", "black", 0.65, "grey", ""),
    (24, "person", "studio", "half", "front", "down", "long", "grey", 0.3, "blue", "white"),
    (25, "person", "garden", "half", "side", "up", "short", "blonde", 0.2, "pink", ""),
    (26, "hanger", "garden", "half", "front", "down", "", "", 0, "white", ""),
    (27, "person", "studio", "full", "front", "up", "long", "brown", 0.7, "green", "grey"),
    (28, "person", "street", "half", "front", "down", "short", "pink", 0.4, "purple", ""),
    (29, "person", "studio", "half", "behind", "up", "short", "black", 0.5, "grey", "purple"),
    (30, "mannequin", "garden", "half", "front", "down", "", "", 0, "grey", ""),
    (31, "person", "studio", "close", "front", "down", "long", "black", 0.25, "yellow", "blue"),
    (32, "person", "rain", "half", "front", "up", "curly", "red", 0.85, "pink", ""),
)


def training_scenes() -> list[tuple[Scene, bool]]:
    """The 32 curated scenes of holographic raincoats, and whether each picture is a portrait.

    A portrait has 512x640 pixels, the others 512x512.
    """
    scenes = []
    for seed, wearer, place, framing, view, hood, style, hair, skin, film, backdrop in _TRAINING:
        fixed = dict(wearer=wearer, place=place, framing=framing, view=view, hood=hood, colour=film)
        if wearer == "person":
            fixed |= dict(hair_style=style, hair=hair, skin=skin)
        if backdrop:
            fixed["background"] = backdrop
        fixed |= dict(thing="raincoat", second="none")
        scene = sample_scene(np.random.default_rng(seed), holographic=True, **fixed)
        scenes.append((scene, framing == "full"))
    return scenes


_README = """\
# The training pictures

32 pictures of holographic raincoats, {small} of 512x512 and {tall} of 512x640 pixels, rendered for
this project:

    python -m demo.world --data data

No photograph and no one else's picture went into them. They are dedicated to the public domain
under [CC0 1.0](https://creativecommons.org/publicdomain/zero/1.0/): do with them what you like.

## Your own photographs instead

1. Delete the pictures in this folder.
2. Copy yours here: AVIF, WebP, PNG, JPEG, TIFF or BMP, of any size; about 32 are enough.
3. If a picture needs a caption of its own, put it in a text file beside it: `photo.txt` beside
   `photo.jpg`.
4. Run `python preprocess.py`.
"""


def write_data(folder: Path, device="cpu") -> list[Path]:
    """Render the training pictures and a README into the folder; returns the pictures' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, scenes = [], training_scenes()
    for number, (scene, portrait) in enumerate(scenes, 1):
        side = 640 if portrait else 512
        picture = render([scene], side, device)[0].cpu().numpy()
        picture = picture[:, (side - 512) // 2 : (side + 512) // 2]
        path = folder / f"raincoat_{number:02d}.jpg"
        Image.fromarray(picture).save(path, quality=93, subsampling=0, optimize=True)
        paths.append(path)
        print(f"{path}  {picture.shape[1]}x{picture.shape[0]}", flush=True)
    tall = sum(portrait for _, portrait in scenes)
    (folder / "README.md").write_text(_README.format(small=len(scenes) - tall, tall=tall))
    return paths


def write_sheet(path: Path, fixed: dict, count: int, size: int, seed=0, device="cpu") -> None:
    """A contact sheet of `count` random scenes that have the fields `fixed`, captions below."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, **fixed) for _ in range(count)]
    pictures = [Image.fromarray(p) for p in render(scenes, size, device).cpu().numpy()]
    titles = [caption(scene, rng) for scene in scenes]
    contact_sheet(pictures, titles, columns=math.ceil(count**0.5), side=size).save(path)


def main(arguments: Sequence[str] | None = None) -> None:
    config = parse_config(CONFIG, __doc__, argv=arguments)
    data, sheet, device = config["data"], config["sheet"], config["device"]
    count, size, seed = config["count"], config["size"], config["seed"]
    if not data and not sheet:
        raise UserError("nothing to do: give --data FOLDER or --sheet FILE")
    if count < 1 or size < 8 or seed < 0:
        raise UserError("--count must be at least 1, --size at least 8, --seed at least 0")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"no such device here: {device!r}") from None
    try:
        fixed = parse(config["caption"]) if config["caption"] else {}
        if data:
            write_data(Path(data), device)
        if sheet:
            write_sheet(Path(sheet), fixed, count, size, seed, device)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    run_script(main)
