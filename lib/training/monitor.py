"""What is looked at while a run trains, and leaves it as it is: held-out loss, snapshots, previews."""

import time

from lib.training.previews import Previews
from lib.training.run_folder import drop_later_snapshots, write_snapshot


def due(step, every, last):
    """Whether something that is done at the start, `every` steps (0: never) and at the `last` is due."""
    return bool(every) and (step % every == 0 or step == last)


def looks(config, step):
    """Whether something is due after `step` steps of a run with train.py's `config`."""
    kinds = "validate", "snapshot", "preview"
    return any(due(step, config[f"{kind}_every"], config["max_steps"]) for kind in kinds)


class Monitor:
    """The looks of one run, of its first process: `config` is train.py's, `micro` its MicroStep, `probes`
    those of the held-out loss (none: it is not computed), `data` from `data_record`.

    `draw`, where there are `prompts`, is a function of a title that returns their images; see Previews.
    A run that goes on after `first_step` drops what lies behind it.
    """

    def __init__(self, folder, config, micro, probes, data, journal, first_step=0, prompts=(), draw=None):
        self.folder, self.config, self.micro = folder, config, micro
        self.probes, self.data, self.journal = probes, data, journal
        self.seconds = 0.0  # that previews took since `first_step`
        self.preview_seconds = 0.0  # and the one at the start
        drop_later_snapshots(folder, first_step)
        self.previews = Previews(folder, draw, prompts, first_step) if prompts else None
        if prompts:
            print(f"previews: {folder / 'previews.webp'}, every {config['preview_every']} steps")

    def look(self, step):
        """Do what is due after `step` steps."""
        last = self.config["max_steps"]
        # The adapter of the last step is the run's own; a snapshot has its held-out loss.
        snapshot = 0 < step < last and due(step, self.config["snapshot_every"], last)
        if self.probes and (snapshot or due(step, self.config["validate_every"], last)):
            self.journal.record(step=step, **self.micro.validation_row(self.probes))
        if snapshot:
            write_snapshot(self.folder, self.config, self.micro.trained, self.data, step)
        if self.previews and due(step, self.config["preview_every"], last):
            started = time.monotonic()
            self.journal.show(step, self.previews.take(step))
            self.preview_seconds += time.monotonic() - started
            if step:
                self.seconds += time.monotonic() - started
