"""Faster imports of large packages."""

import contextlib
import gc
import sys
from unittest.mock import patch


def _uncompiled(function=None, **settings):
    return function if function is not None else _uncompiled


@contextlib.contextmanager
def quick_imports():
    """Import PyTorch and the libraries above it in the block, without garbage collection and PyTorch's compiler.

    The collector would scan 500,000 live objects repeatedly, during the imports and in every later collection; they
    are frozen instead. The compiler would be loaded by bitsandbytes, which PEFT imports: it passes its functions for
    devices without a library of its own to `torch.compile`. They are not called here, and give the same results
    uncompiled.
    """
    first = "torch" not in sys.modules
    collected = gc.isenabled()
    gc.disable()
    try:
        import torch

        with patch.object(torch, "compile", _uncompiled):
            yield
    finally:
        if first:  # later, garbage of a run would be frozen too
            gc.freeze()
        if collected:
            gc.enable()
