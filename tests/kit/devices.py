"""A stand-in for an accelerator without fp64, by fake tensors: it finds ops on two devices, and computes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["DEVICE", "fake_device"]

DEVICE = "lazy:0"
"""Device of the stand-in: the only one besides the CPU whose in-place ops run in a CPU build of torch."""


class _NoDoubles(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "lazy" and value.dtype == torch.float64:
                raise TypeError(f"{func}: this device has no float64")
        return result


@contextmanager
def fake_device() -> Iterator[FakeTensorMode]:
    """Let tensors be fake ones in this block. Ops on tensors of two devices raise, and so does fp64 on `DEVICE`."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _NoDoubles():
        yield mode
