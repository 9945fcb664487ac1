"""cuDNN's attention kernels, compiled all at once before a run needs them."""

import functools

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lib.kernels.compiling import failure, in_threads


class _AttentionCalls(TorchFunctionMode):
    """Keeps the arguments of one of each kind of scaled_dot_product_attention; answers with zeros."""

    def __init__(self):
        super().__init__()
        self.kinds = {}

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is F.scaled_dot_product_attention:
            return self.keep(*arguments, **(named or {}))
        return function(*arguments, **(named or {}))

    def keep(self, query, key, value, *others, **named):
        inputs = query, key, value
        layout = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
        rest = (*enumerate(others), *named.items())
        rest = str([(key, x.shape if torch.is_tensor(x) else x) for key, x in rest])
        self.kinds[layout, rest] = inputs, others, named
        return query.new_zeros(*query.shape[:-1], value.shape[-1])


def attention_jobs(call, training):
    """A function for each attention kernel that `call()` will launch, which launches it."""
    with torch.no_grad(), _AttentionCalls() as seen:
        call()

    def forward(inputs, others, named):
        with torch.no_grad():
            F.scaled_dot_product_attention(*inputs, *others, **named)

    def forward_backward(inputs, others, named):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = F.scaled_dot_product_attention(*inputs, *others, **named)
        # In this thread: autograd's own is one for all, where they would be compiled in turn.
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.grad(out, inputs, torch.zeros_like(out))

    works = (forward_backward, forward) if training else (forward,)
    return [functools.partial(work, *kind) for work in works for kind in seen.kinds.values()]


def compile_attention(call, device, training=False):
    """Begin to compile the attention kernels that `call()` will need; returns a function that waits
    for them. `training` says whether their gradients will be needed too.

    On recent GPUs PyTorch takes cuDNN's attention, of which the driver compiles a kernel for each
    size of layer at its first use on a machine; it keeps them on disk for the next run. Here they are
    compiled all at once, in threads. `call` is called once, without its attention.
    """
    if device.type != "cuda":
        return lambda: None

    def begin():
        jobs = attention_jobs(call, training)
        torch.cuda.empty_cache()  # or what the call took would be held beside what comes
        return in_threads(jobs, device)

    begun = failure(begin)

    def wait():
        reason = begun if isinstance(begun, str) else failure(begun)
        torch.cuda.empty_cache()
        if reason:
            print(f"note: the attention's kernels were not compiled beforehand: {reason}")

    return wait
