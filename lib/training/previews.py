"""Images of what an adapter draws while it is trained: a file a preview, and one strip of them all."""

import json
from collections import Counter

import numpy as np
from PIL import Image

from lib.files import write_bytes
from lib.images import shown, strip, webp

# The widest strip, which is read into memory as a whole: of more previews as many are shown, the first
# and the last among them, evenly spread. Each has a file of its own all the same.
MOST_COLUMNS = 16
LARGEST_SIDE = 256  # pixels that an image in the strip is wide
# The EXIF tag ImageDescription, where a preview's file says what its prompts are.
DESCRIPTION = 0x010E


def preview_texts(prompts, rows):
    """The prompts to draw, no two equal: `prompts` with the captions' most frequent one for {caption}.

    `rows` are those of `read_dataset`.
    """
    caption = Counter(row.caption for row in rows).most_common(1)[0][0]
    return list(dict.fromkeys(prompt.replace("{caption}", caption) for prompt in prompts))


class Previews:
    """The previews of one run in `folder`: previews/step_001000.webp, the prompts' images one under the
    other, and previews.webp, steps across and prompts down.

    `draw` is a function of a title that returns a PIL image for each of `prompts`, all of one size. A run
    that goes on after `first_step` keeps the previews up to there and drops later ones, which its checkpoint
    does not know. Nothing is kept in memory: the strip is made from the files.
    """

    def __init__(self, folder, draw, prompts, first_step=0):
        self.folder, self.draw, self.prompts = folder, draw, list(prompts)
        (folder / "previews").mkdir(exist_ok=True)
        for step, path in self.files():
            if step > first_step:
                path.unlink()

    def files(self):
        """[(step, path)] of the previews on disk, by step."""
        found = (self.folder / "previews").glob("step_*.webp")
        return sorted((int(path.stem.removeprefix("step_")), path) for path in found)

    def take(self, step):
        """Draw the preview of `step` (steps done), write it and the strip; returns the images."""
        pictures = self.draw(f"preview {step}")
        column = np.concatenate([np.asarray(picture) for picture in pictures])
        path = self.folder / "previews" / f"step_{step:06}.webp"
        exif = Image.Exif()
        exif[DESCRIPTION] = json.dumps(self.prompts)
        write_bytes(path, webp(Image.fromarray(column), exif=exif))
        write_bytes(self.folder / "previews.webp", webp(self.strip()))
        return pictures

    def strip(self):
        """The strip of the previews that were drawn of these prompts, as a PIL image."""
        columns = {}
        for step, path in self.spread([pair for pair in self.files() if self.is_ours(pair[1])]):
            with Image.open(path) as column:
                width, height = column.width, column.height // len(self.prompts)
                side = min(width, LARGEST_SIDE)
                boxes = [(0, i * height, width, (i + 1) * height) for i in range(len(self.prompts))]
                # Made small before the next one is opened.
                columns[f"step {step:,}"] = [shown(column.crop(box), side) for box in boxes]
        return strip(columns, self.prompts, side)

    def is_ours(self, path):
        """Whether a file holds these prompts: those of a run that was interrupted may be others."""
        try:
            with Image.open(path) as column:
                return column.getexif().get(DESCRIPTION) == json.dumps(self.prompts)
        except OSError:  # damaged
            return False

    @staticmethod
    def spread(found):
        """At most MOST_COLUMNS of a list, evenly spread, with its first and last."""
        places = np.linspace(0, len(found) - 1, min(len(found), MOST_COLUMNS)).round().astype(int)
        return [found[place] for place in places]
