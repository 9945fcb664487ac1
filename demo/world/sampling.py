"""Random scenes, with any of their fields pinned.

The order in which values are drawn is part of what a seed means: a new one goes to the end.
"""

import dataclasses

import numpy as np

from demo.world.scenes import (
    ANIMALS,
    ATTRIBUTES,
    COLOURS,
    GARMENTS,
    HAIR_COLOURS,
    HAIR_STYLES,
    PLACES,
    POSES,
    SEATS,
    THINGS,
    WEARERS,
    Scene,
)

# Materials and colours of each thing, unless pinned
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


def sample_scene(rng: np.random.Generator, *, holographic: bool = False, **fixed) -> Scene:
    """Sample a scene. `fixed` pins fields of Scene: wearer="mannequin", or **parse(caption).

    holographic=True samples a garment of the holographic material; False never samples that material, though it can be
    pinned. Raises ValueError for an unknown field or an impossible combination.
    """
    _check_fields(fixed)
    if holographic:
        fixed.setdefault("material", "holographic")

    def pick(name, values, weights=None):
        if name in fixed:
            return fixed[name]
        weights = None if weights is None else np.asarray(weights) / np.sum(weights)
        return values[int(rng.choice(len(values), p=weights))]

    s = {"thing": pick("thing", *_possible_things(fixed))}
    s |= _sample_cloth(s["thing"], pick)
    s["place"] = pick("place", PLACES, [4, 2, 2, 2])
    sample_rest = _sample_garment if s["thing"] in GARMENTS else _sample_other
    s |= sample_rest(s, pick, fixed, rng)
    if s["second"] != "none":
        animal = s["thing"] in ANIMALS
        others = tuple(c for c in COLOURS if c != s["colour"] and (c != "black" or not animal))
        s["second_colour"] = pick("second_colour", others)
    s |= _sample_view(s, pick, rng)
    for name in set(fixed) - set(s) - {"skin", "arms", "relation"}:
        raise ValueError(f"a {s['thing']} has no {name.replace('_', ' ')}")
    return Scene(**{**s, **fixed})


def _check_fields(fixed: dict) -> None:
    """Raise ValueError for an unknown field, or an unknown value of one."""
    known = {field.name for field in dataclasses.fields(Scene)}
    for name, value in fixed.items():
        if name not in known:
            raise ValueError(f"a scene has no field {name!r}")
        if name in ATTRIBUTES and value not in ATTRIBUTES[name]:
            raise ValueError(f"{name} cannot be {value!r}; choose from {', '.join(ATTRIBUTES[name])}")


def _possible_things(fixed: dict) -> tuple[tuple[str, ...], list[int] | None]:
    """The things that can have the pinned fields, and their weights."""
    things, weights = THINGS, [5, 4, 3, 2, 2, 1, 1, 1]
    cloth = fixed.get("material") in ("holographic", "denim")
    if cloth or {"wearer", "hair", "hair_style", "hood", "closure"} & set(fixed):
        things, weights = GARMENTS, [5, 4, 3]
    if "hood" in fixed:
        things, weights = GARMENTS[:1], None
    if {"pose", "relation"} & set(fixed) or fixed.get("second") in SEATS:
        things, weights = ANIMALS, None
    return things, weights


def _sample_cloth(thing: str, pick) -> dict:
    """Material and colour."""
    material = pick("material", _MATERIALS_OF[thing])
    holo = material == "holographic"
    if material != "matte" and thing in ANIMALS or holo and thing not in GARMENTS:
        raise ValueError(f"a {thing} cannot be {material}")
    if holo:
        tints = ("white", "grey", "pink", "blue", "purple", "yellow", "green", "orange")
        colour = pick("colour", tints, [5, 4, 2, 2, 2, 1, 1, 1])
    elif material == "denim":
        dyes = ("blue", "black", "grey", "white", "pink", "brown")
        colour = pick("colour", dyes, [6, 2, 1, 1, 1, 1])
    elif material == "leather":
        colour = pick("colour", COLOURS, [3, 1, 1, 1, 1, 1, 1, 1, 4, 4, 1])
    else:
        colour = pick("colour", _COLOURS_OF.get(thing, COLOURS))
    return dict(material=material, colour=colour)


def _sample_garment(s: dict, pick, fixed: dict, rng: np.random.Generator) -> dict:
    """The fields of garments: a wearer with hair and arms, a hood, an umbrella, a framing."""
    thing, garment = s["thing"], {}
    may_hold = fixed.get("wearer", "person") == "person"
    odds = [3, 1] if s["place"] == "rain" else [9, 1]
    garment["second"] = second = pick("second", ("none", "umbrella"), odds if may_hold else [1, 0])
    holds = second == "umbrella"
    odds = [5, 2, 0 if fixed.get("hood") == "up" else 2]
    wearer = pick("wearer", WEARERS, [1, 0, 0] if holds or "hair" in fixed else odds)
    garment["wearer"] = wearer
    if second in SEATS or holds and wearer != "person":
        raise ValueError(f"a {thing} on a {wearer} cannot go with a {second}")
    garment["closure"] = pick("closure", ("zip", "buttons")) if thing != "dress" else ""
    if thing == "raincoat":
        up = wearer != "hanger" and not holds
        garment["hood"] = pick("hood", ("up", "down"), [2, 3] if up else [0, 1])
    if wearer == "person":
        garment["hair"] = pick("hair", HAIR_COLOURS, [4, 4, 3, 2, 1, 1])
        garment["hair_style"] = pick("hair_style", HAIR_STYLES)
        garment["skin"] = pick("skin", np.linspace(0.0, 1.0, 9).tolist())
        garment["arms"] = pick("arms", (0, 1, 2, 3, 4), [5, 2, 2, 1, 2])
    odds = [0, 1, 5] if holds else [2, 4, 4]
    garment["framing"] = pick("framing", ("close", "half", "full"), odds)
    odds = [1, 0, 0] if wearer == "hanger" else [8, 1, 1]
    garment["view"] = pick("view", ("front", "side", "behind"), odds)
    garment["camera_height"] = float(rng.uniform(1.0, 1.55))
    return garment


def _sample_other(s: dict, pick, fixed: dict, rng: np.random.Generator) -> dict:
    """The fields of animals, seats and umbrellas: a camera near the floor, a pose, a seat."""
    thing, animal, other = s["thing"], s["thing"] in ANIMALS, {}
    if s["material"] == "denim" or "wearer" in fixed:
        raise ValueError(f"a {thing} is neither worn nor made of denim")
    other["framing"] = pick("framing", ("full",))
    other["view"] = pick("view", ("front",))
    other["camera_height"] = float(rng.uniform(0.5, 1.1))
    odds = [3, 3, 1.5] if animal else [1, 0, 0]
    other["second"] = second = pick("second", ("none", *SEATS), odds)
    if animal:
        other["pose"] = pick("pose", POSES, [3, 2, 2])
        if second != "none":
            other["relation"] = pick("relation", ("on", "beside"), [3, 1])
    if second != "none" and (not animal or second == "umbrella"):
        raise ValueError(f"a {thing} cannot go with a {second}")
    return other


def _sample_view(s: dict, pick, rng: np.random.Generator) -> dict:
    """Rotation, light, background, and the random numbers of the surface."""
    view = {}
    turn = float(rng.uniform(-38, 38))
    side = 1.0 if rng.random() < 0.5 else -1.0
    yaws = {"front": turn, "side": side * (72 + 0.4 * turn), "behind": 180 + 0.8 * turn}
    view["yaw"] = yaws[s["view"]]
    view["light"] = pick("light", ("plain", "warm"), [4, 1])
    view["light_angle"] = side * float(rng.uniform(20, 60))
    view["zoom"] = float(rng.uniform(0.92, 1.08))
    if s["place"] == "studio":
        backdrops = tuple(c for c in COLOURS if c not in (s["colour"], "black"))
        weights = [4.0 if c in ("grey", "white") else 1.0 for c in backdrops]
        view["background"] = pick("background", backdrops, weights)
    view["film_nm"] = float(rng.uniform(240, 430))
    view["film_spread_nm"] = float(rng.uniform(90, 170))
    view["seed"] = int(rng.integers(1 << 20))
    return view
