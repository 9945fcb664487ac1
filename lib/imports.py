"""Importing large packages in less time."""

import contextlib
import gc
import sys


@contextlib.contextmanager
def quick_imports():
    """Context for importing PyTorch and packages built on it, with the garbage collector off.

    The collector would scan half a million new objects repeatedly and free none. Later collections skip them too.
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
