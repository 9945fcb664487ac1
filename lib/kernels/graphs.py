"""CUDA graphs: the kernels that a function launches, captured once and replayed with one launch."""

import torch

from lib.errors import is_memory, one_line


def captured(functions, device):
    """Capture each of `functions` as a CUDA graph; returns callables that replay them.

    A function takes no arguments and returns a tensor, a collection of tensors or None. It must read and write the same
    tensors in every call, draw no random numbers on the GPU and never wait for the GPU. On a GPU each is called twice
    here: once to let the libraries choose their kernels, and once to be captured, which computes nothing. The graphs
    share one memory pool: a replay overwrites earlier outputs of its own graph and of those captured after it.

    Without a GPU, or with a note if capture fails, the functions themselves are returned.
    """
    if device.type != "cuda":
        return list(functions)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.empty_cache()  # the graphs allocate from a pool of their own
    pool = torch.cuda.graph_pool_handle()
    try:
        return [_capture(function, pool, stream) for function in functions]
    except RuntimeError as problem:
        if is_memory(problem):
            raise
        print(
            "note: CUDA graph capture failed, so Python launches every kernel, which is several times slower: "
            f"{one_line(problem, 160)}"
        )
        return list(functions)


def _capture(function, pool, stream):
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads, such as W&B's, may use CUDA meanwhile.
    with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        result = function()

    def replay():
        graph.replay()
        return result

    return replay
