"""Frozen random tensors that the branches of many sites share (VeRA)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch

from lorasc_fx.branch.noise import generator


class SharedTensor:
    """A random tensor that is determined by its key. All branches with the same key refer to the same object.

    It is not a parameter: it is not trained and not saved in checkpoints, but drawn again when a run is loaded.

    Args:
        seed, purpose, shape: the key.
    """

    def __init__(self, seed: int, purpose: str, shape: tuple[int, ...]) -> None:
        self.key = seed, purpose, shape
        bound = (6 / max(1, shape[-1])) ** 0.5  # Kaiming uniform for ReLU, as in peft's VeRA
        draw = torch.rand(shape, generator=generator(seed, 0, purpose, ""), dtype=torch.float32)
        self._values = {(torch.device("cpu"), torch.float32): draw.mul_(2 * bound).sub_(bound)}

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values on the device and in the dtype of a tensor. The conversion is cached."""
        key = tensor.device, tensor.dtype
        if key not in self._values:
            self._values[key] = next(iter(self._values.values())).to(tensor.device, tensor.dtype)
        return self._values[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedTensor:
        """Return the same object, because its values never change."""
        return self

    def __reduce__(self) -> tuple[Callable[..., SharedTensor], tuple[Any, ...]]:
        """Pickle only the key."""
        return shared_tensor, self.key


_TENSORS: WeakValueDictionary[tuple[Any, ...], SharedTensor] = WeakValueDictionary()


def shared_tensor(seed: int, purpose: str, shape: tuple[int, ...]) -> SharedTensor:
    """Return the shared tensor for a key. It is freed when no branch refers to it."""
    key = seed, purpose, shape
    tensor = _TENSORS.get(key)
    if tensor is None:
        _TENSORS[key] = tensor = SharedTensor(*key)
    return tensor
