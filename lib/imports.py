"""Importing large packages in less time."""

import contextlib
import gc
import importlib.util
import os
import sys
from pathlib import Path

from lib.cache import first_process


@contextlib.contextmanager
def quick_imports():
    """Context for importing PyTorch and packages built on it, with the garbage collector off; see also `import_first`.
    The first time it prints the `bytecode_note`, if there is one.

    The collector would scan half a million new objects repeatedly and free none. Later collections skip them too.
    """
    first = "torch" not in sys.modules
    collected = gc.isenabled()
    gc.disable()
    try:
        if first:
            if first_process() and (note := bytecode_note()):
                print(note)
            import_first()
        yield
    finally:
        if first:  # later this would also exempt objects of an earlier run
            gc.freeze()
        if collected:
            gc.enable()


def bytecode_note():
    """A note for the user if Python compiles the packages' sources again at every start, else None.

    pip writes bytecode as it installs. Others leave that to the first import, where a setting (common in containers) or
    a folder that cannot be written may prevent it.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or Path(importlib.util.cache_from_source(spec.origin)).exists():
        return None
    packages = Path(spec.origin).parents[1]
    if not sys.dont_write_bytecode and (sys.pycache_prefix or os.access(packages, os.W_OK)):
        return None
    reason, advice = "Python is told to write none (PYTHONDONTWRITEBYTECODE)", "write it once with"
    if not os.access(packages, os.W_OK):
        reason, advice = f"{packages} cannot be written", "let its owner run"
    return (
        "note: every start takes several seconds longer, because Python compiles all packages: they have no bytecode and "
        f'{reason}; {advice}: "{sys.executable}" -m compileall -q "{packages}"'
    )


def import_first():
    """Import what PEFT, transformers and diffusers import too, but in less time.

    At import bitsandbytes hands functions to `torch.compile`, those for devices without a library of bitsandbytes. None
    of them is called here, but PyTorch's compiler (inductor) would be loaded for them. PyTorch's own switch makes
    `torch.compile` return functions as they are. It is set during this import alone.

    For each operator that torchvision registers, PyTorch goes through all loaded modules. At first there are few.

    diffusers and transformers import much of SciPy for schedulers and losses that nothing here uses. Each looks once
    whether there is a SciPy. Meanwhile `None` in `sys.modules` hides it, as Python's documentation provides.
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
    import torchvision  # noqa: F401

    if "scipy" not in sys.modules:
        sys.modules["scipy"] = None
        try:
            import diffusers.utils
            import transformers.utils

            for package in (diffusers, transformers):
                package.utils.is_scipy_available()  # the answer is kept
        finally:
            del sys.modules["scipy"]
