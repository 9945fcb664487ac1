"""A small rendered world: garments on wearers, animals, furniture and umbrellas, and true captions.

A `Scene` determines an image. `sample_scene` samples one, `caption` describes it, `parse` reads such a caption.
`render` ray-marches signed distance fields in torch, batched over images and rays, on a CPU or with CUDA. The
holographic material is thin-film interference computed per wavelength, not a rainbow texture. Command line: `python -m
demo.world --help`.

    scenes, sampling, captions    vocabulary, random scenes, captions
    parameters, view              a scene as numbers; the camera and the light of each place
    shapes/, distances            signed distances of each thing, and of a whole scene
    materials/                    colours and finishes, painted details, the film
    backdrops                     studio, street, rain, garden
    tracing, light, shading       rays to surfaces, and the colour there
    rendering                     images of scenes
    training_images               the images in data/

Units are metres. y points up, the floor is y = 0, the camera looks along -z. Intermediate colours are linear RGB.
"""

from demo.world.captions import WORDS, caption, parse
from demo.world.rendering import render
from demo.world.sampling import sample_scene
from demo.world.scenes import ATTRIBUTES, GARMENTS, Scene, kind_of

__all__ = ["ATTRIBUTES", "GARMENTS", "WORDS", "Scene", "caption", "kind_of", "parse", "render", "sample_scene"]
