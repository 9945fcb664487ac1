"""A small rendered world: garments on wearers, animals, furniture and umbrellas, and true captions.

A `Scene` says everything about a picture. `sample_scene` draws one, `caption` says what it shows and
`parse` reads such a caption; `render` ray-marches signed distance fields in torch, batched over
pictures and rays, on a CPU or with CUDA. The holographic material is thin-film interference computed
per wavelength, not a rainbow texture. `python -m demo.world --help` says what the command line does.

    scenes, sampling, captions    what there is, random scenes, words
    parameters, view              a scene as numbers; the camera and the light of each place
    shapes/, distances            signed distances of each thing, and of a whole scene
    materials/                    colours and finishes, painted details, the film
    backdrops                     studio, street, rain, garden
    tracing, light, shading       rays to surfaces, and the colour there
    rendering                     pictures of scenes
    training_pictures             the pictures in data/

Metres, y up, the floor is y = 0, the camera looks along -z. Colours are linear RGB in between.
"""

from demo.world.captions import WORDS, caption, parse
from demo.world.rendering import render
from demo.world.sampling import sample_scene
from demo.world.scenes import ATTRIBUTES, GARMENTS, Scene, kind_of

__all__ = ["ATTRIBUTES", "GARMENTS", "WORDS", "Scene", "caption", "kind_of", "parse", "render", "sample_scene"]
