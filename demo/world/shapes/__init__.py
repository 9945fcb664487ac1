"""The things of the world as signed distances, one file per kind of thing.

Each has up to two functions. `<thing>_parameters(scene, rng)` returns its parameters. `<thing>_surfaces(x, y, z, p,
slot)` returns [(distance, slot)] at the points x, y, z [R, T] for the parameters p [R, 1]; distances are in metres,
negative inside, and the slot is the surface's row of the palette. Things stand on y = 0 in a local frame and face +z.
Of two mirrored limbs, x and z are those of the right one.
"""
