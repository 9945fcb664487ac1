"""Captions of scenes, and the attributes that a caption states.

`parse(caption(scene, rng))` returns fields of the scene; `sample_scene(rng, **parse(text))` samples a scene of which
`text` is true.
"""

import re

import numpy as np

from demo.world.sampling import sample_scene
from demo.world.scenes import (
    ANIMALS,
    COLOURS,
    GARMENTS,
    HAIR_COLOURS,
    HAIR_STYLES,
    MATERIALS,
    POSES,
    SEATS,
    THINGS,
    WEARERS,
    Scene,
)

_PLACE_PHRASES = {"studio": "in a studio", "street": "on a street", "rain": "in the rain", "garden": "in a garden"}


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


def _noun_phrase(*words: str) -> str:
    text = " ".join(word for word in words if word)
    return ("an " if text[0] in "aeiou" else "a ") + text


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
    sample_scene(np.random.default_rng(0), **stated)  # raises ValueError for impossible scenes
    return stated
