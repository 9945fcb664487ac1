"""Surfaces: colours and finishes, painted details, the holographic film."""
