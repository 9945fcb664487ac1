"""Monitors a run without changing it: held-out loss, snapshots, previews."""

import json
import time
from collections import Counter

import numpy as np
from PIL import Image

from lib.files import write_bytes
from lib.images import shown, strip, webp
from lib.training.run_folder import drop_later_snapshots, write_snapshot

# The strip is read into memory as a whole, so it shows at most this many previews: an even selection with the first
# and the last. Every preview also has its own file.
MOST_COLUMNS = 16
LARGEST_SIDE = 256  # pixels, the width of an image in the strip
DESCRIPTION = 0x010E  # EXIF's ImageDescription holds the prompts of a preview's file


def due(step, every, last):
    """Whether `step` is the start, the `last` step or a multiple of `every`; 0 means never."""
    return bool(every) and (step % every == 0 or step == last)


def looks(config, step):
    """Whether the Monitor has something to do after `step` steps of a run with train.py's `config`."""
    kinds = "validate", "snapshot", "preview"
    return any(due(step, config[f"{kind}_every"], config["max_steps"]) for kind in kinds)


class Monitor:
    """The monitor of one run, in its first process.

    `micro` is the run's MicroStep, `probes` are those of the held-out loss (none: it is not computed), `data` is from
    `data_record`, `ending` is the run's EarlyStopping. If there are `prompts`, `generate` returns their images (see Previews). A run that resumes after
    `first_step` drops later previews and snapshots.
    """

    def __init__(self, folder, config, micro, probes, data, journal, ending, first_step=0, prompts=(), generate=None):
        self.folder, self.config, self.micro = folder, config, micro
        self.probes, self.data, self.journal, self.ending = probes, data, journal, ending
        self.seconds = 0.0  # spent on previews since `first_step`
        self.preview_seconds = 0.0  # the same with the one at the start
        drop_later_snapshots(folder, first_step)
        self.previews = Previews(folder, generate, prompts, first_step) if prompts else None
        if prompts:
            print(f"previews: {folder / 'previews.webp'}, every {config['preview_every']} steps")

    def look(self, step):
        """Do what is due after `step` steps."""
        last = self.config["max_steps"]
        snapshot = 0 < step < last and due(step, self.config["snapshot_every"], last)
        measured = snapshot or self.ending.is_look(step) or due(step, self.config["validate_every"], last)
        if self.probes and measured:  # a snapshot has its held-out loss
            self.journal.record(step=step, **self.micro.validation_row(self.probes))
            last = self.ending.last_step(self.journal.rows)
        if snapshot and step < last:  # the adapter of the last step is the run's own
            write_snapshot(self.folder, self.config, self.micro.trained, self.data, step)
        if self.previews and due(step, self.config["preview_every"], last):
            started = time.monotonic()
            self.journal.show(step, self.previews.take(step))
            self.preview_seconds += time.monotonic() - started
            if step:
                self.seconds += time.monotonic() - started


def preview_texts(prompts, rows):
    """The distinct preview prompts; {caption} becomes the most frequent caption of `rows`."""
    caption = Counter(row.caption for row in rows).most_common(1)[0][0]
    return list(dict.fromkeys(prompt.replace("{caption}", caption) for prompt in prompts))


class Previews:
    """The previews of a run in `folder`: previews/step_001000.webp, the images of all prompts in a column, and
    previews.webp, the strip with a column per step.

    `generate` is a function of a title that returns a PIL image per prompt, all of one size. Only the files hold the
    images, so a run that resumes after `first_step` continues the strip; later previews are removed.
    """

    def __init__(self, folder, generate, prompts, first_step=0):
        self.folder, self.generate, self.prompts = folder, generate, list(prompts)
        (folder / "previews").mkdir(exist_ok=True)
        for step, path in self.files():
            if step > first_step:
                path.unlink()

    def files(self):
        """[(step, path)] of the previews on disk, by step."""
        paths = (self.folder / "previews").glob("step_*.webp")
        return sorted((int(path.stem.removeprefix("step_")), path) for path in paths)

    def take(self, step):
        """Generate the preview after `step` steps and write it and the strip; returns the images."""
        images = self.generate(f"preview {step}")
        column = np.concatenate([np.asarray(image) for image in images])
        path = self.folder / "previews" / f"step_{step:06}.webp"
        exif = Image.Exif()
        exif[DESCRIPTION] = json.dumps(self.prompts)
        write_bytes(path, webp(Image.fromarray(column), exif=exif))
        write_bytes(self.folder / "previews.webp", webp(self.strip()))
        return images

    def strip(self):
        """The strip of the previews that show these prompts, as a PIL image."""
        columns = {}
        for step, path in self.spread([pair for pair in self.files() if self.is_ours(pair[1])]):
            with Image.open(path) as column:
                width, height = column.width, column.height // len(self.prompts)
                side = min(width, LARGEST_SIDE)
                boxes = [(0, i * height, width, (i + 1) * height) for i in range(len(self.prompts))]
                # Reduced before the next file is opened.
                columns[f"step {step:,}"] = [shown(column.crop(box), side) for box in boxes]
        return strip(columns, self.prompts, side)

    def is_ours(self, path):
        """Whether a file shows these prompts. Those of the interrupted run may differ."""
        try:
            with Image.open(path) as column:
                return column.getexif().get(DESCRIPTION) == json.dumps(self.prompts)
        except OSError:  # damaged
            return False

    @staticmethod
    def spread(files):
        """At most MOST_COLUMNS of a list, evenly spread, with its first and last."""
        places = np.linspace(0, len(files) - 1, min(len(files), MOST_COLUMNS)).round().astype(int)
        return [files[place] for place in places]
