"""The memsets of a CUDA graph as kernels.

cuDNN and cuBLAS set some of their working memory before many of their kernels. Recorded, such a memset holds up the
graph: the GPU waits some two microseconds before and up to five behind one of one microsecond, and half of one around
a kernel that does the same. PyTorch has no names for a graph's nodes; NVIDIA's bindings, which it brings along, have.
"""

import torch

# By the bytes of a memset's element: their type here, and the name that NumPy's interface has for it.
TYPES = {1: (torch.uint8, "|u1"), 2: (torch.int16, "<i2"), 4: (torch.int32, "<i4")}


class Memory:
    """Some memory of the GPU, of which torch.as_tensor makes a tensor."""

    def __init__(self, address, count, kind):
        self.__cuda_array_interface__ = dict(shape=(count,), typestr=kind, data=(int(address), False), version=3)


def memsets_as_kernels(graph, stream):
    """Put kernels in the place of the memsets of `graph`, a torch.cuda.CUDAGraph that keeps its graph and is not
    instantiated yet; `stream` is to record them on. Returns how many. If this raises, the graph may be unusable.
    """
    from cuda.bindings import driver

    def value(result):
        error, *values = result
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"changing a CUDA graph: {error.name}")
        return values[0] if len(values) == 1 else values

    def several(query, of):
        """All that `query` finds; asked for none, it says how many there are."""
        count = value(query(of))[-1]
        return value(query(of, count))[:-1] if count else ([], [])

    def around(node):
        """(the nodes before it, those behind it, whether it begins when those before have ended, and so on)"""
        before, in_edges = several(driver.cuGraphNodeGetDependencies, node)
        behind, out_edges = several(driver.cuGraphNodeGetDependentNodes, node)
        return before, behind, not any(int(edge.type) for edge in [*in_edges, *out_edges])

    whole, found = driver.CUgraph(graph.raw_cuda_graph()), []
    memset = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET
    for node in several(driver.cuGraphGetNodes, whole)[0]:
        if value(driver.cuGraphNodeGetType(node)) == memset:
            what = value(driver.cuGraphMemsetNodeGetParams(node))
            if what.height == 1 and around(node)[-1]:
                found.append((node, what))
    if not found:
        return 0
    fills = _fills([what for _, what in found], stream)
    recorded = several(driver.cuGraphGetNodes, driver.CUgraph(fills.raw_cuda_graph()))[0]
    # One behind the other, as they were recorded.
    chain = [node for node in recorded if not several(driver.cuGraphNodeGetDependencies, node)[0]]
    while following := several(driver.cuGraphNodeGetDependentNodes, chain[-1])[0]:
        chain += following
    for (node, _), fill in zip(found, chain, strict=True):
        before, behind, _ = around(node)  # now: one of them may have been a memset
        parameters = value(driver.cuGraphKernelNodeGetParams(fill))
        kernel = value(driver.cuGraphAddKernelNode(whole, before, len(before), parameters))
        value(driver.cuGraphAddDependencies(whole, [kernel] * len(behind), behind, None, len(behind)))
        value(driver.cuGraphDestroyNode(node))
    return len(found)


def _fills(memsets, stream):
    """A graph of kernels that do what `memsets` do, in that order."""
    for dtype, _ in TYPES.values():
        torch.zeros(1, dtype=dtype, device=stream.device).fill_(1)  # loads the kernel
    pieces = []
    for what in memsets:
        dtype, kind = TYPES[what.elementSize]
        number = what.value & (256**what.elementSize - 1)
        if number > torch.iinfo(dtype).max:  # PyTorch's types are signed
            number -= 256**what.elementSize
        memory = Memory(what.dst, what.width, kind)
        pieces.append((torch.as_tensor(memory, device=stream.device), number))
    fills = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.stream(stream):
        fills.capture_begin(capture_error_mode="thread_local")
        try:
            for piece, number in pieces:
                piece.fill_(number)
        finally:
            fills.capture_end()
    return fills
