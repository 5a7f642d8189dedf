"""The global random generators that a training step may draw from: torch's, python's, numpy's and CUDA's if used."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["CPU", "pack", "unpack"]

CPU = "rng/torch"
_CUDA = "rng/cuda/"


def pack() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return their states as tensors and JSON: of those that have been used, or may have been."""
    tensors = {CPU: torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        tensors |= {f"{_CUDA}{index}": state for index, state in enumerate(states)}
    meta: dict[str, Any] = {"python": random.getstate()}
    if "numpy.random" in sys.modules:  # as long as nobody has asked for it, nothing was drawn
        meta["numpy"] = _as_lists(sys.modules["numpy.random"].get_state(legacy=False))
    return tensors, meta


def unpack(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Give them back the states that `pack` returned; devices and packages that are not here are left out.

    Raises:
        IndexError, KeyError, RuntimeError, TypeError, ValueError: a state is none of this generator's.
    """
    version, words, gauss = meta["python"]
    random.setstate((version, tuple(words), gauss))
    if "numpy" in meta and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(meta["numpy"])
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        if f"{_CUDA}{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"{_CUDA}{index}"], index)
    torch.set_rng_state(tensors[CPU])


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_lists(each) for key, each in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value
