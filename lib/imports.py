"""Importing large packages without what takes time there and finds nothing."""

import contextlib
import gc
import sys
from unittest.mock import patch


def _as_it_is(function=None, **settings):
    return function if function is not None else _as_it_is


@contextlib.contextmanager
def quick_imports():
    """Import PyTorch and what builds on it inside, without the garbage collector and PyTorch's compiler.

    The collector would look through the half a million objects again and again, of which nothing is garbage,
    and later through all that is imported: it passes over them for good. The compiler is loaded by
    bitsandbytes, which PEFT imports: it hands functions to `torch.compile`, those of devices that have no
    library of bitsandbytes. They are not called here; called all the same, they would compute the same uncompiled.
    """
    first = "torch" not in sys.modules
    collected = gc.isenabled()
    gc.disable()
    try:
        import torch

        with patch.object(torch, "compile", _as_it_is):
            yield
    finally:
        if first:  # later what a run left would be passed over too
            gc.freeze()
        if collected:
            gc.enable()
