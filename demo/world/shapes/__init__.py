"""The things of the world as signed distances: one file a kind of thing.

Each has up to two functions. `<thing>_parameters(scene, rng)` gives the numbers that a scene sets it
by. `<thing>_surfaces(x, y, z, p, slot)` gives a list of (distance, slot), the distances in metres,
negative inside, at the points x, y, z [R, T] for the numbers p [R, 1]; the slot is the surface's
place in the palette. Things stand on y = 0 in a local frame, their front towards +z; x and z of two
limbs that mirror each other are those of the right one.
"""
