"""CUDA graphs: what a function launches on the GPU, recorded once and replayed with one launch."""

import functools

import torch

from lib.errors import is_memory, one_line
from lib.kernels.compiling import failure
from lib.kernels.memsets import memsets_as_kernels


def captured(functions, device):
    """`functions` recorded as CUDA graphs: a list of callables that run them.

    A function takes nothing and returns a tensor, a collection of such, or None. It must read and write the same tensors
    whenever it is called, draw no random numbers on the GPU, and never wait for the GPU. With a GPU each
    is called twice here: once to let the libraries choose their kernels, once to be recorded, which computes
    nothing (once more where its memsets cannot be replaced). The graphs share their memory, so what one returned is
    written over by its next replay, and by that of one recorded before it.

    Without a GPU, or if one cannot be recorded, which is then said, they are the functions themselves.
    """
    if device.type != "cuda":
        return list(functions)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.empty_cache()  # the graphs take their memory from a pool of their own
    pool = torch.cuda.graph_pool_handle()
    try:
        return [_record(function, pool, stream) for function in functions]
    except RuntimeError as problem:
        if is_memory(problem):
            raise
        print(
            "note: this GPU's work cannot be recorded as a CUDA graph, so Python launches every kernel, "
            f"which is several times slower: {one_line(problem, 160)}"
        )
        return list(functions)


def _record(function, pool, stream):
    graph, result = _graph(function, pool, stream)
    problem = failure(lambda: memsets_as_kernels(graph, stream))
    if isinstance(problem, str):
        _say(f"note: memsets in CUDA graphs stay, which costs time: {problem}")
        graph, result = _graph(function, pool, stream)
    graph.instantiate()

    def replay():
        graph.replay()
        return result

    return replay


_say = functools.cache(print)  # once, however many graphs there are


def _graph(function, pool, stream):
    """(what `function` launches as a graph that is not instantiated yet, what it returns)"""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    # thread_local: other threads (W&B's, say) may meanwhile do as they like.
    with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        result = function()
    return graph, result
