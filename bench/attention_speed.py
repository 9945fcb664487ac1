#!/usr/bin/env python3
"""Time PyTorch's attention kernels for the layers of Stable Diffusion v1.5 at 512 pixels, on a GPU.

    python bench/attention_speed.py

Per kernel: the first call, in which cuDNN builds a plan, and the mean of 20 calls in a CUDA graph, the best of five. Each
kernel has a process of its own. The plans of a first run on a machine are also compiled: run it twice.
"""

import itertools
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
MAPS = {4096: 320, 1024: 640, 256: 1280, 64: 1280}  # pixels: width
TEXT, CALLS = 77, 20


def cases():
    """[(name, batch, queries, keys, width, heads, with the backward pass, causal)]"""
    every = []
    for pixels, width in MAPS.items():
        chunks = {4096: 16, 1024: 8}.get(pixels, 1)  # of lib/kernels/fused_projections.py
        every.append((f"training, {pixels} to themselves", 1, pixels, pixels, width, 8, True, False))
        every.append((f"training, {pixels} to a text", chunks, pixels // chunks, TEXT, width, 8, True, False))
        for batch, keys in itertools.product((6, 16), (pixels, TEXT)):
            whom = "themselves" if keys == pixels else "a text"
            every.append((f"{batch} samples, {pixels} to {whom}", batch, pixels, keys, width, 8, False, False))
    return [*every, ("training, the text encoder", 1, TEXT, TEXT, 768, 12, True, True)]


def attention(kernel, batch, queries, keys, width, heads, training, causal):
    """A function that computes one attention, its inputs views of fused projections."""
    how = dict(device="cuda", dtype=torch.float16, requires_grad=training)
    if queries == keys:
        leaves = [torch.randn(batch, queries, 3 * width, **how)]
    else:
        leaves = [torch.randn(batch, queries, width, **how), torch.randn(batch, keys, 2 * width, **how)]

    def call():
        inputs = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for x in leaves for part in x.split(width, -1)]
        with torch.set_grad_enabled(training), sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(*inputs, is_causal=causal).transpose(1, 2).flatten(2)
        if training:
            torch.autograd.grad(out, leaves, out.detach())

    return call


def seconds(work):
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(kernel):
    """Print a line for each case."""
    torch.randn(8, 8, device="cuda") @ torch.randn(8, 8, device="cuda")  # starts CUDA and cuBLAS
    stream = torch.cuda.Stream()
    for name, *shape in cases():
        call = attention(KERNELS[kernel], *shape)
        with torch.cuda.stream(stream):
            first = seconds(call)
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CALLS):
                call()
        best = min(seconds(graph.replay) for _ in range(6)) / CALLS
        print(f"{kernel:9s} {name:35s} first {1e3 * first:7.1f} ms, then {1e6 * best:7.1f} µs", flush=True)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("error: attention_speed.py needs a CUDA GPU")
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        for kernel in KERNELS:
            subprocess.run([sys.executable, __file__, kernel], check=True)
