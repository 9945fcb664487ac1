"""The parts of an image with their own colour and finish: rows of its palette."""

SLOT_COUNT = 12
MAIN, TRIM, SKIN, HAIR, LEGS, SHOES, STAND, METAL, SECOND, SHIRT, DARK, EYES = range(SLOT_COUNT)
