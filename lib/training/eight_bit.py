"""bitsandbytes, imported without the compiler of PyTorch.

It hands functions to `torch.compile` as it is imported, which loads that compiler, 0.9 of the 6.3 seconds that
training's imports take on one core of an AMD EPYC (`python -X importtime`). They are those of devices that have no library of
bitsandbytes, and are not called here; called all the same, they would compute the same uncompiled.
"""

from unittest.mock import patch

import torch


def _as_it_is(function=None, **settings):
    return function if function is not None else _as_it_is


with patch.object(torch, "compile", _as_it_is):
    import bitsandbytes

__all__ = ["bitsandbytes"]
