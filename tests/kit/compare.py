"""Seeds every generator, runs models, and compares outputs of whatever type."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

Call = tuple[tuple[Any, ...], dict[str, Any]]


def seed(value: int) -> None:
    """Seed every generator that a model on the CPU may draw from; torch.manual_seed queues seeds for others too."""
    random.seed(value)
    np.random.seed(value)
    torch.default_generator.manual_seed(value)


def tensors(output: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Yield the tensors of an output, of whatever type, in order; those in attributes of an object once."""
    seen = set() if seen is None else seen
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value, seen)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value, seen)
    elif hasattr(output, "__dict__") and id(output) not in seen:
        seen.add(id(output))
        yield from tensors(dict(vars(output)), seen)


def loss_of(output: Any) -> torch.Tensor:
    """Return a sum over every floating output, weighed differently at each entry."""
    seed(7)
    leaves = [leaf for leaf in tensors(output) if leaf.requires_grad]
    assert leaves, "no output needs a gradient"
    parts = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in leaves]
    return torch.stack([(part * torch.randn_like(part)).sum() for part in parts]).sum()


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference between tensors, each over its scale.

    Return inf if shapes, dtypes, or the places of inf and nan differ.
    """
    ours, theirs = list(tensors(found)), list(tensors(expected))
    if [(value.shape, value.dtype) for value in ours] != [(value.shape, value.dtype) for value in theirs]:
        return float("inf")
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if torch.equal(one, other):
            continue
        finite = one.isfinite() & other.isfinite()
        if not torch.allclose(one[~finite], other[~finite], rtol=0, atol=0, equal_nan=True):
            return float("inf")
        if finite.any():
            gap, scale = (one - other)[finite].detach().abs().max(), other[finite].detach().abs().max()
            worst = max(worst, float(gap) / max(float(scale), 1e-30))
    return worst


def assert_same(found: Any, expected: Any, close: float = 0.0) -> None:
    """Types, shapes, dtypes and values are equal; values up to `close` times the scale of each tensor."""
    assert type(found) is type(expected)
    assert any(True for _ in tensors(found))
    gap = difference(found, expected)
    assert gap <= close, f"differs by {gap:.1e} of its scale"


def assert_buffers(model: nn.Module, twin: nn.Module, close: float = 0.0) -> None:
    """Buffers that forward writes are the eager model's."""
    for (name, ours), (_, theirs) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=close, atol=close, equal_nan=True), f"buffer {name}"


def saved_storages(call: Callable[[], Any]) -> dict[int, int]:
    """Return the storages that autograd saves in a call: the bytes of each, by address."""
    sizes: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        output = call()
    del output
    return sizes


class Watch(TorchDispatchMode):
    """Tell a function of each operation: its op, its arguments and its result."""

    def __init__(self, see: Callable[[Any, Any, Any], object]) -> None:
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.see(func, args, result)
        return result


def quietly() -> Any:
    """Ignore the warnings of eager models."""
    return warnings.catch_warnings(action="ignore")


def run(model: Any, call: Call, grad: bool = False, fused: bool = True, start: int = 6) -> Any:
    """Call a model under one seed.

    `fused` allows torch's attention its kernel for calls without gradients, which no trainable model runs.
    """
    seed(start)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast and fused)
    try:
        with quietly(), torch.set_grad_enabled(grad):
            return model(*call[0], **call[1])
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
