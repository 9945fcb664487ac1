"""Stopping a run between two steps: signals, and what several processes agree on."""

import os
import signal
import time

import torch

from lib.errors import heeded

SAME_SIGNAL = 2.0  # seconds within which a second signal is the first one again


class StopSignals:
    """STOP_SIGNALS while a step is under way: remembered in `received` until it is done.

    A second one ends the process at once, unless it comes within SAME_SIGNAL seconds: what signals a
    launcher and its workers alike reaches a worker twice, as the launcher hands it on.
    """

    def __enter__(self):
        self.received, self.since = 0, None
        self.before = {s: signal.signal(s, self.note) for s in heeded()}
        return self

    def note(self, number, frame):
        if not self.received:
            self.received, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > SAME_SIGNAL:
            os._exit(128 + number)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def agreed(stopping, step, every, accelerator):
    """The signal by which all processes stop after `step`, or 0.

    A signal may reach the processes in different steps, so several agree every `every` steps.
    """
    if accelerator.num_processes == 1:
        return stopping
    if step % every:
        return 0
    mine = torch.tensor([stopping], device=accelerator.device)
    return int(accelerator.gather(mine).max())
