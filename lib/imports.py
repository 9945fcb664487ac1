"""Importing large packages in less time."""

import contextlib
import gc
import os
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


def import_bitsandbytes():
    """Import bitsandbytes, before PEFT and diffusers do, without PyTorch's compiler (inductor).

    At import it hands functions to `torch.compile`, those for devices without a library of bitsandbytes. None of them is
    called here, but the compiler would be loaded for them. PyTorch's own switch makes `torch.compile` return functions as
    they are; it is set during this import alone.
    """
    switch = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        import bitsandbytes  # noqa: F401
    finally:
        del os.environ[switch]
        if before is not None:
            os.environ[switch] = before
