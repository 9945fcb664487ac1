"""Importing large packages in less time."""

import contextlib
import gc
import sys


@contextlib.contextmanager
def quick_imports():
    """Import PyTorch and packages built on it inside, without the garbage collector.

    It would scan the half a million new objects repeatedly and free none. They are also exempt from later collections.
    """
    first = "torch" not in sys.modules
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if first:  # later this would also exempt objects of an earlier run
            gc.freeze()
        if collected:
            gc.enable()
