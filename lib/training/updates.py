"""The end of an optimizer step, after its backward passes: the overflow check, the update and the counts.

PlainUpdates works with any optimizer, as accelerate does, and waits for the GPU in every step. CapturedUpdates decides
on the GPU. Meanwhile the host prepares the next steps, and it reads each outcome a little later. CapturedUpdates
supports 8-bit AdamW only.
"""

from collections import deque

import torch

from lib.kernels import adamw8bit
from lib.kernels.adamw8bit import missing_kernels
from lib.kernels.graphs import captured
from lib.kernels.pinned_staging import STEPS_AHEAD, Uploader, pinned_buffers
from lib.training.optimizer import eight_bit_states

LOSS_OR_GRADIENT = "the loss or its gradient is NaN or infinite"
LOSS = "the loss is NaN or infinite"
IN_A_ROW = "fp16 overflowed {} times in a row"


def make_updates(micro, optimizer, accelerator, progress, max_overflows, give_up):
    """The updates of a run that continues from `progress` and the states of the optimizer and the loss scaler.

    `micro` is the MicroStep after `prepare`, `optimizer` as accelerate prepared it. A non-finite loss or gradient, or
    more than `max_overflows` consecutive fp16 overflows, stops all updates: `progress` returns to before that step, and
    give_up(problem, step counted from 0, its images) is called, which raises.
    """
    arguments = micro, optimizer, accelerator, progress, max_overflows, give_up
    if accelerator.device.type != "cuda":
        return PlainUpdates(*arguments)
    states = eight_bit_states(optimizer, micro.trained)
    if states is None:
        kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
        print(
            f"note: {kind} updates without a CUDA graph, which only long 8-bit AdamW states have: the GPU waits for it"
        )
        return PlainUpdates(*arguments)
    reason = missing_kernels(accelerator.device)
    if reason:
        print(f"note: no Triton kernel for AdamW, so the GPU waits between steps: {reason}")
        return PlainUpdates(*arguments)
    return CapturedUpdates(states, *arguments)


def average(vector, processes):
    """Replace a vector by its mean over all processes."""
    if processes > 1:
        torch.distributed.all_reduce(vector)
        vector /= processes


class PlainUpdates:
    """Updates by the optimizer itself (see `make_updates`)."""

    def __init__(self, micro, optimizer, accelerator, progress, max_overflows, give_up):
        self.micro, self.optimizer, self.accelerator = micro, optimizer, accelerator
        self.progress, self.max_overflows, self.give_up = progress, max_overflows, give_up
        self.in_a_row = 0  # overflows

    def step(self, factor, images):
        """Update with the gradient accumulated in `micro`, at `factor` times the learning rates, and begin a new sum.

        `images` are the data-set indices of the step.
        """
        for group, part in zip(self.optimizer.param_groups, self.micro.trained.values(), strict=True):
            group["lr"] = part.learning_rate * factor
        average(self.micro.gradient[:-1], self.accelerator.num_processes)
        problem = self.update()
        if problem:
            self.give_up(problem, self.progress.step, images)
        self.progress.add(self.micro.loss)
        self.micro.begin_sum()

    def update(self):
        """Update unless fp16 overflowed; returns the problem that ends the run, or None.

        The fp16 loss scaler skips an update whose gradient overflowed: that is ordinary, and counted. Without a scaler
        nothing may be infinite. A non-finite loss always ends the run.
        """
        if self.accelerator.scaler is None and not self.micro.gradient.isfinite().all():
            return LOSS_OR_GRADIENT
        self.optimizer.step()
        skipped = self.optimizer.step_was_skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.progress.skipped += skipped
        self.progress.updates += not skipped
        # The loss of any process.
        if skipped and not self.accelerator.reduce(self.micro.loss, "sum").isfinite():
            return LOSS
        return IN_A_ROW.format(self.in_a_row) if self.in_a_row > self.max_overflows else None

    def settle(self):
        """Wait until `progress`, the optimizer and the weights are those after the last step, or give up."""


class CapturedUpdates:
    """Updates by a CUDA graph, with the `states` from `eight_bit_states` (see `make_updates` and PlainUpdates).

    The host is at most STEPS_AHEAD steps ahead of the GPU. It reads the outcome of a step that much later, or in `settle`;
    until then `progress.skipped`, `progress.updates` and the step count in the optimizer's state lag behind.
    """

    def __init__(self, states, micro, optimizer, accelerator, progress, max_overflows, give_up):
        self.states, self.micro, self.progress, self.give_up = states, micro, progress, give_up
        self.processes, self.scaler = accelerator.num_processes, accelerator.scaler
        self.max_overflows = max_overflows
        self.group = optimizer.param_groups[0]  # all have the same betas, eps and weight_decay
        device = micro.gradient.device
        self.rates, self.control = torch.zeros(len(states), device=device), torch.zeros(4, device=device)
        self.rates_sent = Uploader(self.rates, pinned_buffers(self.rates, STEPS_AHEAD + 1))
        # Written by `decide`. HALTED: capturing calls the update, which must not change anything.
        counts = [progress.updates, progress.skipped, 0, adamw8bit.HALTED]
        self.outcome = torch.tensor(counts, dtype=torch.int32, device=device)
        self.unread = deque()  # (step, images, the buffer of its outcome, event), oldest first
        self.buffers = pinned_buffers(self.outcome, STEPS_AHEAD + 1)
        if self.scaler is not None:
            self.scaler.scale(micro.loss)  # creates its tensors
        (self.update,) = captured([self.launch], device)
        self.outcome[-1] = 0
        # All zeros: the first all-reduce connects the GPUs.
        average(micro.gradient, self.processes)

    @torch.no_grad()
    def launch(self):
        """The update at `rates`, to be captured. It writes `outcome`."""
        gradient, group, scaling = self.micro.gradient[:-1], self.group, None
        if self.scaler is not None:
            scaler = self.scaler  # its two tensors have no public name
            growth = scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
            scaling = scaler._scale, scaler._growth_tracker, *growth
        largest = torch.linalg.vector_norm(gradient, torch.inf)  # NaN if any element is
        loss, loss_sum = self.micro.loss, self.progress.loss_sum
        most, betas, control = self.max_overflows, group["betas"], self.control
        adamw8bit.decide(largest, loss, loss_sum, self.outcome, scaling, most, betas, control)
        for part, state, rate in zip(self.micro.trained.values(), self.states, self.rates, strict=True):
            weights, settings = part.flat, (betas, group["eps"], group["weight_decay"])
            adamw8bit.update(weights.data, weights.grad, state, rate, control, *settings)
        self.micro.begin_sum()

    def step(self, factor, images):
        rates = [part.learning_rate * factor for part in self.micro.trained.values()]
        self.rates_sent.buffer().copy_(torch.tensor(rates))
        self.rates_sent.upload()
        average(self.micro.gradient, self.processes)  # its last element, the loss, too: not finite if any is not
        self.update()
        # Free: its last outcome, STEPS_AHEAD + 1 steps old, has been read.
        buffer, copied = self.buffers[self.progress.step % len(self.buffers)]
        buffer.copy_(self.outcome, non_blocking=True)
        copied.record()
        self.unread.append((self.progress.step, images, buffer, copied))
        self.progress.step += 1
        self.progress.loss_count += 1
        self.read(STEPS_AHEAD)

    def settle(self):
        self.read(0)

    def read(self, left):
        """Wait for and read the outcomes of the oldest steps until only `left` are unread."""
        while len(self.unread) > left:
            step, images, outcome, copied = self.unread.popleft()
            copied.synchronize()
            self.progress.updates, self.progress.skipped, in_a_row, problem = outcome.tolist()
            for state in self.states:
                state["step"] = self.progress.updates
            if problem:
                # The steps after it changed nothing.
                self.progress.loss_count -= self.progress.step - step
                self.progress.step = step
                texts = {
                    adamw8bit.NOT_FINITE: LOSS_OR_GRADIENT,
                    adamw8bit.LOSS_NOT_FINITE: LOSS,
                    adamw8bit.OVERFLOWS: IN_A_ROW.format(in_a_row),
                }
                self.give_up(texts[problem], step, images)
