"""Early stopping: ends a run once more training would gain nothing noticeable, judged by the loss of held-out images.

`inference.py --snapshots` takes the earliest step beyond which no later one gains more than the margin. While a run
trains there are no later steps. The last stretch of steps stands for them: one whose learning rates add up to those of
all the steps that remain, or to a little more. With diminishing returns the remaining steps gain no more than it did.
Of each held-out image i, at the noise and timesteps that never change,

    gained_i = loss_i(before the stretch) - loss_i(now)
    so_far_i = loss_i(before the first step) - loss_i(now)

A look passes if the mean of gained_i - MARGIN * so_far_i is below 0 with confidence 1 - TAIL: Student's t over the
images, one-sided. The run ends at the second passing look in succession. How often that is too early, and what it does
not see, is in lib/evaluation/README.md ("Early stopping"); `python bench/early_stopping.py` simulates it.

The loss is measured because it is cheap: 16 forward passes a look. Generated images would show the concept itself, but
as many as a verdict needs take longer than the steps that they could save.
"""

from itertools import pairwise

import numpy as np
import scipy

LOOKS = 16  # in a run, evenly spread
MARGIN = 0.1  # of the loss's fall so far; inference.py's concept_margin is a tenth of the way as well
TAIL = 0.05
FEWEST_IMAGES = 3


class EarlyStopping:
    """The last step of a run with train.py's `config`: max_steps, or earlier if stop_early is set.

    `factor` is the schedule, learning_rate_factor(step, max_steps, warmup_steps). The decision depends on nothing but
    the log's rows, which a checkpoint holds: a run that resumes decides as one without interruption.
    """

    def __init__(self, config, factor):
        self.on, self.max_steps = config["stop_early"], config["max_steps"]
        if self.on:
            factors = [factor(step, self.max_steps, config["warmup_steps"]) for step in range(self.max_steps)]
            shares = np.cumsum([0.0, *factors])
            self.shares = shares / shares[-1]  # of all learning rates, those of the first n steps

    def is_look(self, step):
        """Whether the held-out loss after `step` steps counts."""
        return self.on and step * LOOKS // self.max_steps > (step - 1) * LOOKS // self.max_steps

    def last_step(self, rows):
        """The step after which the run ends, as far as the `rows` of its log tell."""
        losses = {
            row["step"]: np.array(row["validation_losses"])
            for row in rows
            if "validation_losses" in row and self.is_look(row["step"])
        }
        passing = {step: self.passes(losses, step) for step in losses}
        return next((now for before, now in pairwise(passing) if passing[before] and passing[now]), self.max_steps)

    def agreed(self, rows, accelerator):
        """The `last_step` of the first process, the only one with `rows`, in every process."""
        last = self.last_step(rows)
        if not self.on or accelerator.num_processes == 1:
            return last
        import torch

        return int(accelerator.gather(torch.tensor([last], device=accelerator.device)).min())

    def passes(self, losses, now):
        """Whether the look after step `now` passes, by the `losses` {step: [..., images]} of the looks: bool [...]."""
        # With half of the learning rate behind, the stretch begins after the start.
        starts = [step for step in losses if self.shares[step] <= 2 * self.shares[now] - 1]
        if not starts:
            return False
        gained, so_far = losses[max(starts)] - losses[now], losses[0] - losses[now]
        excess = gained - MARGIN * so_far
        images = excess.shape[-1]
        error = excess.std(axis=-1, ddof=1) / images**0.5
        return excess.mean(axis=-1) + scipy.stats.t.isf(TAIL, images - 1) * error < 0
