"""The vocabulary of the world, and Scene, which determines an image."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Scene:
    """Everything that determines an image. Words are from ATTRIBUTES; an empty one does not apply."""

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
    yaw: float = 0.0  # rotation of the thing, degrees
    camera_height: float = 1.2  # metres
    zoom: float = 1.0
    light: str = "plain"
    light_angle: float = 40.0  # of the key light, degrees to the right of the camera
    background: str = ""  # colour of a studio's backdrop
    film_nm: float = 420.0  # mean thickness of the holographic film, nanometres
    film_spread_nm: float = 160.0  # its variation over the cloth
    seed: int = 0  # folds, markings, windows, drops


def kind_of(scene: Scene) -> tuple[str, ...]:
    """The shapes of a scene: the thing or its wearer, then the second object."""
    first = scene.wearer if scene.thing in GARMENTS else scene.thing
    first = "animal" if scene.thing in ANIMALS else first
    return (first,) if scene.second == "none" else (first, scene.second)
