"""Updates decided on the GPU against those of accelerate and bitsandbytes; copies through pinned memory."""

import copy
import functools
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from conftest import ROOT, finish, forked
from kernel_models import needs_gpu, needs_triton

from lib.kernels import adamw8bit, pinned_staging
from lib.training import checkpoints, optimizer, updates

# The last blocks are not full and the second gradient is not aligned. Triton's interpreter is slow.
SIZES = (50_001, 4099) if torch.cuda.is_available() else (1025, 259)
PEAKS = 1e-2, 1e-3


class GivenUp(Exception):
    pass


def starts():
    """Both vectors before the first update, with values of LoRA's size."""
    generator = torch.Generator().manual_seed(1)
    return [0.02 * torch.randn(size, generator=generator) for size in SIZES]


class Run:
    """Updates of a `kind`, "plain" or "recorded", with random gradients; if `scaled`, with a loss scaler whose scale
    grows after every fourth step."""

    def __init__(self, kind, device, scaled=True, most=2, saved=None):
        accelerator = Accelerator(cpu=device.type == "cpu")
        self.process = accelerator.process_index
        accelerator.scaler = None
        if scaled:
            accelerator.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, growth_interval=4)
        flats = [torch.nn.Parameter(start.to(device)) for start in starts()]
        gradient = torch.zeros(sum(SIZES) + 1, device=device)
        for flat, view in zip(flats, gradient[:-1].split(SIZES), strict=True):
            flat.grad = view
        self.trained = {
            name: SimpleNamespace(flat=flat, learning_rate=rate, projected=[])
            for name, flat, rate in zip(("unet", "text_encoder"), flats, PEAKS, strict=True)
        }
        groups = [dict(params=[p.flat], lr=p.learning_rate) for p in self.trained.values()]
        self.optimizer = AcceleratedOptimizer(
            bitsandbytes.optim.AdamW8bit(groups, betas=(0.8, 0.95), weight_decay=0.02, min_8bit_size=256),
            scaler=accelerator.scaler,
        )
        self.scaler, self.gradient = accelerator.scaler, gradient
        micro = SimpleNamespace(trained=self.trained, gradient=gradient, loss=gradient[-1], begin_sum=gradient.zero_)
        self.progress = checkpoints.Progress(0, torch.zeros((), device=device))
        if saved:
            self.saver(None).restore(saved)
        arguments = micro, self.optimizer, accelerator, self.progress, most, self.give_up
        if kind == "plain":
            self.updates = updates.PlainUpdates(*arguments)
        else:
            states = optimizer.eight_bit_states(self.optimizer, self.trained)
            self.updates = updates.CapturedUpdates(states, *arguments)

    def saver(self, folder):
        journal = SimpleNamespace(rows=[], run_id=None)
        return checkpoints.Saver(folder, {}, self.trained, self.optimizer, self.scaler, journal, self.progress, 1)

    def give_up(self, problem, step, pictures):
        self.given_up = problem, step, pictures
        raise GivenUp

    def go(self, last, overflows=(), losses=(), always_settled=False):
        """Train until `last` steps are done, then settle. The gradients of the steps `overflows`, counted from 0, contain
        infinity; loss and gradient of the steps `losses` are NaN."""
        for step in range(self.progress.step, last):
            generator = torch.Generator().manual_seed(2 * step + self.process)
            values = torch.randn(len(self.gradient), generator=generator).to(self.gradient.device)
            values[:-1] *= 1 if self.scaler is None else self.scaler.scale(torch.ones_like(values[:-1]))
            if step in overflows:
                values[SIZES[0] + 7] = -torch.inf
            if step in losses:
                values[:] = torch.nan
            self.gradient += values
            self.updates.step((step + 1) / 60, [step])
            assert self.gradient.abs().max() == 0
            if always_settled:
                self.updates.settle()
        self.updates.settle()
        return self

    def give_up_in(self, *arguments, **named):
        with pytest.raises(GivenUp):
            self.go(*arguments, **named)
        return self

    def state(self):
        """The contents of a checkpoint: (parameters, the optimizer's tensors, everything else)"""
        parameters = [part.flat.detach().clone() for part in self.trained.values()]
        tensors, numbers = optimizer.state_of(self.optimizer, self.trained)
        progress = self.progress
        numbers |= dict(
            step=progress.step,
            losses=progress.loss_count,
            sum=progress.loss_sum.item(),
            skipped=progress.skipped,
            updates=progress.updates,
            scaler=self.scaler and self.scaler.state_dict(),
        )
        return parameters, {key: tensor.clone() for key, tensor in tensors.items()}, numbers


def apart(run, other):
    """How far two runs are apart, which must agree in all counts: (the norm of the difference of the vectors over that
    of their movement, the share of codes that differ).

    A value between two codes may get either, and its parameter then moves differently.
    """
    (ours, states, numbers), (theirs, other_states, other_numbers) = run.state(), other.state()
    assert numbers == other_numbers
    assert states.keys() == other_states.keys()
    moved = [
        (a - b).norm() / (b - start.to(b.device)).norm() for a, b, start in zip(ours, theirs, starts(), strict=True)
    ]
    differing = []
    for key, tensor in states.items():
        if tensor.dtype == torch.uint8:
            codes = (tensor.int() - other_states[key].int()).abs()
            differing.append((codes > 0).float().mean())
        else:
            torch.testing.assert_close(tensor, other_states[key], rtol=0.02, atol=0)
    return max(moved).item(), max(differing).item()


def check_they_equal_the_plain_updates(device):
    """Over 50 steps, some of which overflow; also if the host waits in every step."""
    steps, overflows = 50 if device.type == "cuda" else 24, {0, 3, 11, 12, 20}
    plain = Run("plain", device).go(steps, overflows)
    assert plain.progress.skipped == 5
    assert plain.scaler.get_scale() != 2.0**12
    for settled in (False, True):
        recorded = Run("recorded", device).go(steps, overflows, always_settled=settled)
        found = apart(recorded, plain)
        print(f"apart from the plain updates: parameters {found[0]:.1e}, codes {found[1]:.1e}")
        assert found[0] < 0.005
        assert found[1] < 0.02


def check_the_bias_correction_counts_updates_on_the_gpu(device):
    """Updates, not steps; the optimizer's state continues their count."""
    found = []
    for updates_before in (0, 30):
        run = Run("recorded", device)
        run.updates.outcome[0] = updates_before
        run.go(4, overflows={0})
        assert all(state["step"] == updates_before + 3 for state in run.updates.states)
        assert run.updates.control[2:].tolist() == pytest.approx(
            [1 - 0.8 ** (updates_before + 3), (1 - 0.95 ** (updates_before + 3)) ** 0.5], rel=1e-6
        )
        found.append((run.state()[0][0] - starts()[0].to(device)).norm().item())
    assert found[1] != pytest.approx(found[0], rel=0.01)


def check_without_a_scaler(device):
    runs = [Run(kind, device, scaled=False).go(12) for kind in ("recorded", "plain")]
    assert apart(*runs)[0] < 0.005


def check_an_overflow_changes_nothing(device):
    run = Run("recorded", device).go(4)
    parameters, states, numbers = copy.deepcopy(run.state())
    run.go(5, overflows={4})
    after, states_after, numbers_after = run.state()
    assert all(map(torch.equal, parameters, after))
    assert all(torch.equal(tensor, states_after[key]) for key, tensor in states.items())
    assert numbers_after["unet.optimizer.step"] == numbers["unet.optimizer.step"] == 4
    assert numbers_after["skipped"] == 1
    assert numbers_after["losses"] == 5
    assert numbers_after["scaler"]["scale"] == numbers["scaler"]["scale"] / 2


def check_a_tiny_mean_gradient_keeps_its_sign(device):
    """Far below the smallest code a negative mean does not become zero, as with bitsandbytes on a GPU."""
    codes = []
    for kind in ("recorded", "plain"):
        run = Run(kind, device, scaled=False)
        run.gradient[:256] = 1e-9
        run.gradient[:256:2] *= -1
        run.gradient[7] = 1.0
        run.updates.step(1.0, [0])
        run.updates.settle()
        state = run.optimizer.state[run.trained["unet"].flat]
        values = state["qmap1"][state["state1"][:256].long()]
        assert (values[:256:2] < 0).all()
        assert (values[1:256:2] >= 0).all()
        codes.append(state["state1"][:256])
    assert torch.equal(*codes)


def check_giving_up(device):
    """The problem, the step and its images are named although later steps have started, and the state before that step
    is left, as by the plain updates."""
    for how, problem, step in (
        (dict(overflows={2, 4, 5, 6, 7, 8}), "fp16 overflowed 3 times in a row", 6),
        (dict(losses={5, 6}), "the loss is NaN or infinite", 5),
        (dict(losses={5}, scaled=False), "the loss or its gradient is NaN or infinite", 5),
        (dict(overflows={5}, scaled=False), "the loss or its gradient is NaN or infinite", 5),
        (dict(overflows={7, 8, 9}), "fp16 overflowed 3 times in a row", 9),  # the last steps
    ):
        scaled = how.pop("scaled", True)
        runs = [Run(k, device, scaled).give_up_in(10, **how) for k in ("recorded", "plain")]
        for run in runs:
            assert run.given_up == (problem, step, [step])
            assert run.progress.step == step
        assert apart(*runs)[0] < 0.005
        before = Run("recorded", device, scaled, most=9).go(step, overflows=how.get("overflows", ()))
        assert all(map(torch.equal, runs[0].state()[0], before.state()[0]))


def check_resuming(device, folder):
    """A resumed run equals an uninterrupted one, bit for bit."""
    whole = Run("recorded", device).go(12, overflows={2, 9})
    first = Run("recorded", device).go(6, overflows={2, 9})
    first.saver(folder).save()
    second = Run("recorded", device, saved=checkpoints.latest(folder)).go(12, overflows={2, 9})
    assert whole.progress.skipped == second.progress.skipped == 2
    assert apart(second, whole) == (0, 0)
    # The plain updates resume from it too.
    plain = Run("plain", device, saved=checkpoints.latest(folder)).go(12, overflows={2, 9})
    assert apart(plain, whole)[0] < 0.005


@pytest.fixture
def fresh():
    """accelerate keeps the first settings of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


CHECKS = [
    check_they_equal_the_plain_updates,
    check_the_bias_correction_counts_updates_on_the_gpu,
    check_without_a_scaler,
    check_an_overflow_changes_nothing,
    check_a_tiny_mean_gradient_keeps_its_sign,
    check_giving_up,
    check_resuming,
]


@needs_gpu
@pytest.mark.parametrize("check", CHECKS)
def test_recorded_updates(check, tmp_path, fresh):
    """On the GPU, by CUDA graphs."""
    device = torch.device("cuda", 0)
    assert adamw8bit.missing_kernels(device) is None
    check(device, *[tmp_path] * (check is check_resuming))


def quantize_exactly(values, qmap, absmax, codes, blocksize):
    """bitsandbytes' quantization on a GPU, in place of that on a CPU, which misses the nearest code for a few in a
    hundred values."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % blocksize)).view(-1, blocksize)
    absmax.copy_(blocks.abs().amax(dim=1))
    relative = (blocks / absmax.clamp_min(1e-38)[:, None]).flatten()[: len(values)]
    found = torch.bucketize(relative, (qmap[1:] + qmap[:-1]) / 2)
    turned = (qmap[found] < 0) != (values < 0)
    codes.copy_(found + turned * torch.where(values > 0, 1, -1))


def check_two_processes_decide_alike(folder):
    """Also if the gradient of one overflows, or its loss is NaN: they update with the mean."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    def train(rank):
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        run = Run("recorded", torch.device("cpu"))
        run.go(6, overflows={0: set(), 1: {3}}[run.process])
        print(run.progress, run.scaler.state_dict(), [p.flat.double().sum().item() for p in run.trained.values()])
        run.give_up_in(20, losses={0: {8}, 1: set()}[run.process])
        print(run.given_up, run.progress, [p.flat.double().sum().item() for p in run.trained.values()])

    children = []
    for rank in "01":
        (folder / rank).mkdir()
        children.append(forked(functools.partial(train, rank), folder / rank))
    one, other = (finish(child, folder / rank) for child, rank in zip(children, "01", strict=True))
    assert one.stdout == other.stdout, (one, other)
    assert "skipped=1" in one.stdout.splitlines()[0], one
    assert "('the loss is NaN or infinite', 8, [8]) Progress(step=8" in one.stdout.splitlines()[1], one


INTERPRETED = """
import sys; sys.path[:0] = sys.argv[1:3]
import pathlib, torch
import bitsandbytes.backends.cpu.ops
import test_updates
from lib.kernels import adamw8bit
device, folder = torch.device("cpu"), pathlib.Path(sys.argv[3])
(folder / "checkpoint").mkdir()
assert adamw8bit.missing_kernels(device) is None, adamw8bit.missing_kernels(device)
bitsandbytes.backends.cpu.ops._quant_blockwise_fp32_direct = test_updates.quantize_exactly
for check in test_updates.CHECKS:
    check(device, *[folder / "checkpoint"] * (check is test_updates.check_resuming))
test_updates.check_two_processes_decide_alike(folder)
print("all right")
"""


@needs_triton
def test_recorded_updates_in_tritons_interpreter(tmp_path):
    """The same without a GPU, called in place of captured, against bitsandbytes on a CPU; and in two processes."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(ROOT), str(ROOT / "tests"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    print(done.stdout)
    assert "all right" in done.stdout, done.stderr


def test_kernels_that_are_wrong_are_not_used(monkeypatch, capsys, fresh):
    device = torch.device("cpu")
    for triton, words in ((None, "no Triton"), (True, "wrong on this device"), (True, "no C compiler")):
        adamw8bit.missing_kernels.cache_clear()

        def agrees(device, words=words):
            if "compiler" in words:
                raise OSError(words)
            return False

        with monkeypatch.context() as patch:
            patch.setattr(adamw8bit, "triton", triton)
            patch.setattr(adamw8bit, "agrees", agrees)
            assert words in adamw8bit.missing_kernels(device)
    adamw8bit.missing_kernels.cache_clear()
    monkeypatch.setattr(updates, "missing_kernels", lambda device: "no C compiler")
    monkeypatch.setattr(updates, "eight_bit_states", lambda *given: [])
    accelerator = SimpleNamespace(device=torch.device("cuda"))
    found = updates.make_updates(SimpleNamespace(trained={}), None, accelerator, None, 1, None)
    assert type(found) is updates.PlainUpdates
    assert "no Triton kernel for AdamW" in capsys.readouterr().out


def test_a_short_vector_has_plain_updates():
    """As bitsandbytes keeps its state in 32 bits."""
    flat = torch.nn.Parameter(torch.zeros(4095))
    adamw = bitsandbytes.optim.AdamW8bit([flat])
    assert optimizer.eight_bit_states(adamw, dict(unet=SimpleNamespace(flat=flat))) is None
    assert not adamw.state


# ---- pinned memory -------------------------------------------------------------------------


def test_a_buffer_is_filled_again_only_when_its_last_copy_has_finished():
    done = []

    class Event:
        def __init__(self, number):
            self.number = number

        def record(self):
            done.append(("begun", self.number))

        def synchronize(self):
            done.append(("ended", self.number))

    target = torch.zeros(2)
    uploader = pinned_staging.Uploader(target, [(torch.zeros(2), Event(number)) for number in range(3)])
    filled = []
    for value in range(1, 6):
        buffer = uploader.buffer()
        assert done[-1] == ("ended", (value - 1) % 3)
        assert all(buffer is not other for other in filled[-2:])
        filled.append(buffer.fill_(value))
        uploader.upload()
        assert target.tolist() == [value, value]
        assert done[-1] == ("begun", (value - 1) % 3)


def test_one_vector_holds_tensors_of_several_types():
    parts = dict(numbers=((3,), torch.long), none=((3, 0), torch.long), images=((2, 3, 5), torch.float32))
    vector = torch.zeros(pinned_staging.packed_size(parts), dtype=torch.uint8)
    tensors = pinned_staging.unpack(vector, parts)
    for name, (shape, dtype) in parts.items():
        assert tensors[name].shape == shape
        assert tensors[name].dtype == dtype
        tensors[name].fill_(7)
        assert tensors[name].storage_offset() * dtype.itemsize % pinned_staging.ALIGNMENT == 0
    assert all((tensor == 7).all() for tensor in pinned_staging.unpack(vector.clone(), parts).values())
