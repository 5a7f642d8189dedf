"""Stand-ins for accelerators: fake tensors, which find ops on two devices and fp64, and a module with generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["DEVICE", "fake_device", "pretend_accelerator"]

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


def pretend_accelerator(patch: pytest.MonkeyPatch, kind: str, generators: list[torch.Generator]) -> None:
    """Let torch have an accelerator of this kind with a device for each of these generators, which are the host's."""
    module = SimpleNamespace(
        is_available=lambda: bool(generators),
        device_count=lambda: len(generators),
        get_rng_state=lambda index: generators[index].get_state(),
        set_rng_state=lambda state, index: generators[index].set_state(state),
    )

    def seed(value: int) -> None:
        for generator in generators:
            generator.manual_seed(value)

    if kind == "mps":  # torch.mps has fewer functions
        module.manual_seed = seed
    else:
        module.is_initialized, module.manual_seed_all = module.is_available, seed
    patch.setattr(
        torch.accelerator,
        "current_accelerator",
        lambda check_available=False: torch.device(kind) if generators or not check_available else None,
    )
    patch.setattr(torch, "get_device_module", lambda device=None: module)
