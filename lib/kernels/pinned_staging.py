"""Asynchronous copies between host and GPU through pinned memory.

The call returns before the copy has finished, and the source must not change until then. Several buffers are used in
turn. Each is reused after its last copy has finished.
"""

from collections import deque

import torch

STEPS_AHEAD = 2  # how far the host may be ahead of the GPU
ALIGNMENT = 256  # bytes, as PyTorch's own allocations


class CompletedEvent:
    """Stands in for torch.cuda.Event on a CPU, where a copy has finished when its call returns."""

    def record(self):
        pass

    def synchronize(self):
        pass


def new_event(device):
    """An event to record in a GPU's stream and to wait for."""
    return torch.cuda.Event() if device.type == "cuda" else CompletedEvent()


def pinned_buffers(like, count):
    """[(tensor on the host, event)] * count, of the shape and type of `like`, for copies to and from its device. Record
    the event after each copy."""
    on_gpu = like.device.type == "cuda"
    return [
        (torch.zeros(like.shape, dtype=like.dtype, pin_memory=on_gpu), new_event(like.device)) for _ in range(count)
    ]


def to_device(tensor, device):
    """A tensor on `device` that receives a copy of `tensor`, from the host."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def to_host(tensor):
    """(a tensor on the host that receives a copy of `tensor`, the event after which the copy is complete)"""
    copied = new_event(tensor.device)
    copy = tensor.to("cpu", non_blocking=True)
    copied.record()
    return copy, copied


class Throttle:
    """Keeps the host at most `ahead` steps ahead of the GPU. Call `step` after each step."""

    def __init__(self, device, ahead):
        self.device, self.ahead, self.steps = device, ahead, deque()

    def step(self):
        self.steps.append(new_event(self.device))
        self.steps[-1].record()
        if len(self.steps) > self.ahead:
            self.steps.popleft().synchronize()


class Uploader:
    """Copies values from the host into `target`, a tensor on any device, through `buffers` in turn."""

    def __init__(self, target, buffers):
        self.target, self.buffers, self.turn = target, buffers, 0

    def buffer(self):
        """The tensor to fill next; waits until its last copy has finished."""
        values, copied = self.buffers[self.turn]
        copied.synchronize()
        return values

    def upload(self):
        """Start to copy the filled `buffer` to the target."""
        values, copied = self.buffers[self.turn]
        self.target.copy_(values, non_blocking=True)
        copied.record()
        self.turn = (self.turn + 1) % len(self.buffers)


def packed_size(parts):
    """Bytes that `unpack` needs for `parts`."""
    return sum(map(_aligned, parts.values()))


def unpack(vector, parts):
    """{name: tensor}: views of a vector of bytes as the tensors of `parts`, {name: (shape, dtype)}."""
    tensors, begin = {}, 0
    for name, (shape, dtype) in parts.items():
        end = begin + torch.Size(shape).numel() * dtype.itemsize
        tensors[name] = vector[begin:end].view(dtype).view(shape)
        begin += _aligned(parts[name])
    return tensors


def _aligned(part):
    shape, dtype = part
    return -(-torch.Size(shape).numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
