"""What follows the backward passes of an optimizer step: the check for overflow, AdamW, the counts.

PlainUpdates does it as accelerate and bitsandbytes do, which ask the GPU in every step. RecordedUpdates
leaves every decision to the GPU, so that the host need not wait and prepares the next steps meanwhile; it
learns of what became of a step a little later.
"""

from collections import deque

import torch

from lib.kernels import adamw8bit
from lib.kernels.adamw8bit import missing_kernels
from lib.kernels.graphs import captured
from lib.kernels.pinned_staging import STEPS_AHEAD, Uploader, pinned_buffers

LOSS_OR_GRADIENT = "the loss or its gradient is NaN or infinite"
LOSS = "the loss is NaN or infinite"
IN_A_ROW = "fp16 overflowed {} times in a row"


def make_updates(micro, optimizer, accelerator, progress, max_overflows, give_up):
    """What makes the updates of a run that stands where `progress`, the optimizer and the loss scaler say.

    `micro` is its MicroStep, which has recorded its passes, `optimizer` bitsandbytes' AdamW8bit as accelerate
    prepared it. Where the numbers of a step are not finite, or one overflows in fp16 after `max_overflows` that
    did, nothing is updated any more, `progress` is set back to before that step and give_up(what is wrong, the
    step counted from 0, its images) is called, which raises.
    """
    arguments = micro, optimizer, accelerator, progress, max_overflows, give_up
    if accelerator.device.type != "cuda":
        return PlainUpdates(*arguments)
    reason = missing_kernels(accelerator.device)
    if reason:
        print(f"note: no Triton kernel for AdamW, so the GPU waits between steps: {reason}")
        return PlainUpdates(*arguments)
    states = eight_bit_states(optimizer, micro.trained)
    return RecordedUpdates(states, *arguments) if states else PlainUpdates(*arguments)


def eight_bit_states(optimizer, trained):
    """bitsandbytes' state of each flat vector, begun where there was none, or None if one is so short that it is
    not kept in 8 bits."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
    states = []
    for number, part in enumerate(trained.values()):
        if part.flat.numel() < optimizer.args.min_8bit_size:
            return None
        state = optimizer.state[part.flat]
        if not state:
            optimizer.init_state(optimizer.param_groups[number], part.flat, number, 0)
        states.append(state)
    return states


def average(vector, processes):
    """Replace a vector by the mean of those of all processes."""
    if processes > 1:
        torch.distributed.all_reduce(vector)
        vector /= processes


class PlainUpdates:
    """See `make_updates`."""

    def __init__(self, micro, optimizer, accelerator, progress, max_overflows, give_up):
        self.micro, self.optimizer, self.accelerator = micro, optimizer, accelerator
        self.progress, self.max_overflows, self.give_up = progress, max_overflows, give_up
        self.in_a_row = 0  # overflows

    def step(self, factor, pictures):
        """Update with the gradient that `micro` has summed up from the `images`, data-set indices, at `factor`
        times the learning rates; then the step counts and a new sum begins."""
        for group, part in zip(self.optimizer.param_groups, self.micro.trained.values(), strict=True):
            group["lr"] = part.learning_rate * factor
        average(self.micro.gradient[:-1], self.accelerator.num_processes)
        problem = self.update()
        if problem:
            self.give_up(problem, self.progress.step, pictures)
        self.progress.add(self.micro.loss)
        self.micro.begin_sum()

    def update(self):
        """What is wrong, or None.

        The fp16 loss scaler skips an update whose gradient overflowed, which is ordinary and counted; without
        it nothing may be wrong. A loss that is not finite is never ordinary.
        """
        if self.accelerator.scaler is None and not self.micro.gradient.isfinite().all():
            return LOSS_OR_GRADIENT
        self.optimizer.step()
        self.in_a_row = self.in_a_row + 1 if self.optimizer.step_was_skipped else 0
        self.progress.skipped += bool(self.in_a_row)
        # The loss of any process.
        if self.in_a_row and not self.accelerator.reduce(self.micro.loss, "sum").isfinite():
            return LOSS
        return IN_A_ROW.format(self.in_a_row) if self.in_a_row > self.max_overflows else None

    def settle(self):
        """Let `progress`, the optimizer's state and the weights be those after the last step, or give up."""


class RecordedUpdates:
    """See `make_updates`; `states` are from `eight_bit_states`. `step` and `settle` are PlainUpdates'.

    The host is at most STEPS_AHEAD steps ahead of the GPU; that many later, or at `settle`, it sees what became of a
    step. Meanwhile `progress.skipped` and the step number in the optimizer's state lag behind.
    """

    def __init__(self, states, micro, optimizer, accelerator, progress, max_overflows, give_up):
        self.states, self.micro, self.progress, self.give_up = states, micro, progress, give_up
        self.processes, self.scaler = accelerator.num_processes, accelerator.scaler
        self.max_overflows = max_overflows
        self.group = optimizer.param_groups[0]  # its betas, eps and weight_decay are those of all
        device = micro.gradient.device
        self.rates, self.control = torch.zeros(len(states), device=device), torch.zeros(4, device=device)
        self.rates_sent = Uploader(self.rates, pinned_buffers(self.rates, STEPS_AHEAD + 1))
        # What `decide` writes. Recording calls the update, which is not to change anything.
        counts = [states[0]["step"], progress.skipped, 0, adamw8bit.HALTED]
        self.outcome = torch.tensor(counts, dtype=torch.int32, device=device)
        self.unread = deque()  # (step, images, its outcome's place and event), oldest first
        self.places = pinned_buffers(self.outcome, STEPS_AHEAD + 1)
        if self.scaler is not None:
            self.scaler.scale(micro.loss)  # its tensors are there from its first use on
        (self.update,) = captured([self.recorded], device)
        self.outcome[-1] = 0
        # Of zeros: GPUs connect to one another at the first.
        average(micro.gradient, self.processes)

    @torch.no_grad()
    def recorded(self):
        """What is recorded: the update with `rates`; notes in `outcome` what became of it."""
        gradient, group, scaling = self.micro.gradient[:-1], self.group, None
        if self.scaler is not None:
            # Two tensors that it has no name for; its state_dict reads them.
            scaling = (
                self.scaler._scale,
                self.scaler._growth_tracker,
                self.scaler.get_growth_factor(),
                self.scaler.get_backoff_factor(),
                self.scaler.get_growth_interval(),
            )
        largest = torch.linalg.vector_norm(gradient, torch.inf)  # NaN if one is
        adamw8bit.decide(
            largest,
            self.micro.loss,
            self.progress.loss_sum,
            self.outcome,
            scaling,
            self.max_overflows,
            group["betas"],
            self.control,
        )
        for part, state, rate in zip(self.micro.trained.values(), self.states, self.rates, strict=True):
            adamw8bit.update(
                part.flat.data,
                part.flat.grad,
                state,
                rate,
                self.control,
                group["betas"],
                group["eps"],
                group["weight_decay"],
            )
        self.micro.begin_sum()

    def step(self, factor, pictures):
        rates = [part.learning_rate * factor for part in self.micro.trained.values()]
        self.rates_sent.buffer().copy_(torch.tensor(rates))
        self.rates_sent.upload()
        average(self.micro.gradient, self.processes)  # with the loss: not finite if one is not
        self.update()
        # Free: its last outcome, STEPS_AHEAD + 1 steps old, has been read.
        place, copied = self.places[self.progress.step % len(self.places)]
        place.copy_(self.outcome, non_blocking=True)
        copied.record()
        self.unread.append((self.progress.step, pictures, place, copied))
        self.progress.step += 1
        self.progress.loss_count += 1
        self.read(STEPS_AHEAD)

    def settle(self):
        self.read(0)

    def read(self, left):
        """Read what became of the oldest steps, waiting for it, until so many are `left`."""
        while len(self.unread) > left:
            step, pictures, outcome, copied = self.unread.popleft()
            copied.synchronize()
            updates, skipped, in_a_row, problem = outcome.tolist()
            self.progress.skipped = skipped
            for state in self.states:
                state["step"] = updates
            if problem:
                # The steps after it changed nothing.
                self.progress.loss_count -= self.progress.step - step
                self.progress.step = step
                texts = {
                    adamw8bit.NOT_FINITE: LOSS_OR_GRADIENT,
                    adamw8bit.LOSS_NOT_FINITE: LOSS,
                    adamw8bit.OVERFLOWS: IN_A_ROW.format(in_a_row),
                }
                self.give_up(texts[problem], step, pictures)
