"""Memory of the host that a GPU copies from and to while the host goes on.

Such a copy is only begun when the call returns, so what it reads must stay as it is until it is done: there
are several places, and each is used again when the copy that had it has ended.
"""

from collections import deque

import torch

AHEAD = 2  # steps that the host may be ahead of the GPU
ALIGNMENT = 256  # bytes, as PyTorch's own allocations


class Done:
    """A CPU's stand-in for torch.cuda.Event: there a copy has ended when its call returns."""

    def record(self):
        pass

    def synchronize(self):
        pass


def event(device):
    """What can be recorded and waited for: where a GPU's work has come to when it is recorded."""
    return torch.cuda.Event() if device.type == "cuda" else Done()


def places(like, count):
    """[(tensor on the host, event)]: so many, of the shape and type of the tensor `like`, for copies to and
    from its device; the events are to be recorded behind the copies."""
    on_gpu = like.device.type == "cuda"
    return [(torch.zeros(like.shape, dtype=like.dtype, pin_memory=on_gpu), event(like.device)) for _ in range(count)]


def sent(tensor, device):
    """A tensor on `device` to which that of the host is being copied."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def fetched(tensor):
    """(a tensor on the host to which this one is being copied, the event after which it is there)"""
    copied = event(tensor.device)
    copy = tensor.to("cpu", non_blocking=True)
    copied.record()
    return copy, copied


class Pace:
    """Keeps the host so many steps `ahead` of the GPU, at most."""

    def __init__(self, device, ahead):
        self.device, self.ahead, self.begun = device, ahead, deque()

    def step(self):
        """To be called behind each step."""
        self.begun.append(event(self.device))
        self.begun[-1].record()
        if len(self.begun) > self.ahead:
            self.begun.popleft().synchronize()


class Ring:
    """The way of values from the host into `target`, a tensor on some device, with `places` to copy them from."""

    def __init__(self, target, places):
        self.target, self.places, self.turn = target, places, 0

    def place(self):
        """The tensor to fill next: waits until the copy that was last begun from it has ended."""
        values, copied = self.places[self.turn]
        copied.synchronize()
        return values

    def send(self):
        """Begin to copy what `place` gave, filled meanwhile, to the target."""
        values, copied = self.places[self.turn]
        self.target.copy_(values, non_blocking=True)
        copied.record()
        self.turn = (self.turn + 1) % len(self.places)


def length(parts):
    """How many bytes `divided` needs for `parts`."""
    return sum(map(_aligned, parts.values()))


def divided(vector, parts):
    """{name: tensor}: views of a vector of bytes as tensors of `parts`, {name: (shape, dtype)}."""
    found, begin = {}, 0
    for name, (shape, dtype) in parts.items():
        end = begin + torch.Size(shape).numel() * dtype.itemsize
        found[name] = vector[begin:end].view(dtype).view(shape)
        begin += _aligned(parts[name])
    return found


def _aligned(part):
    shape, dtype = part
    return -(-torch.Size(shape).numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
