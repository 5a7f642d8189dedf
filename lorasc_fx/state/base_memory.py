"""Where W0 of a weight is kept."""

from __future__ import annotations

from typing import Literal

import torch

from lorasc_fx.quantized import is_quantized
from lorasc_fx.shards import local

Memory = Literal["memory", "pinned", "device"]
"""Where W0 is kept: in host memory, in page-locked host memory, or in the memory of the weight's device."""


def host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of the local tensor in host memory.

    A quantized weight is not copied, because it is never written. A tensor on the meta device is not copied either.
    """
    if is_quantized(tensor) or tensor.is_meta:
        return tensor.detach()
    return local(tensor).detach().to("cpu", copy=True)


def base_of(weight: torch.Tensor, memory: Memory = "memory") -> torch.Tensor:
    """Return W0 of a weight in a kind of memory.

    If the weight is in this kind of memory already, W0 shares its memory until the first write
    (`WeightState.keep_base`). Otherwise W0 is a copy.
    """
    if is_quantized(weight) or weight.is_meta:
        return host(weight)
    if memory == "device" or (weight.device.type == "cpu" and memory == "memory"):
        # Only a plain parameter shares its memory: the copy before a write replaces `data` of the shared tensor.
        shared = type(weight) is torch.nn.Parameter and not weight.is_inference()
        return weight.data if shared else local(weight).detach().clone()
    return host(weight).pin_memory() if memory == "pinned" else host(weight)
