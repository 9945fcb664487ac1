"""What of an adapter is drawn with: which snapshot of it, and how much."""

from typing import NamedTuple


class Point(NamedTuple):
    """A training step after which an adapter was kept, and the scale that it is drawn with."""

    step: int | None  # None where the snapshots are not looked at, but the adapter alone
    scale: float

    @property
    def steps(self):
        """The step as a number to compare by."""
        return self.step or 0

    @property
    def file_stem(self):
        """What the files of its pictures are called by, the seed left out."""
        parts = ["lora"] + ([f"step_{self.step:06}"] if self.step else [])
        if self.scale != 1 or not self.step:
            parts.append(f"scale_{self.scale:g}")
        return "_".join(parts)

    def __str__(self):
        parts = [f"step {self.step:,}"] if self.step else []
        if self.scale != 1 or not self.step:
            parts.append(f"scale {self.scale:g}")
        return ", ".join(parts)
