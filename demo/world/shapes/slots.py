"""The parts of a picture that have a colour and a finish of their own: rows of its palette."""

SLOT_COUNT = 12
MAIN, TRIM, SKIN, HAIR, LEGS, SHOES, STAND, METAL, SECOND, SHIRT, DARK, EYES = range(SLOT_COUNT)
