"""What each site meets in a forward of the frozen model: the input of its products, their size and their flops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lorasc_fx import Site

__all__ = ["Meeting", "Recorder"]

_GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
"""Products of rows with the matrices of a stack, which torch's table of flops does not know."""


@dataclass(frozen=True)
class Meeting:
    """One product with a site's weight.

    Args:
        site: whose weight it is.
        x: the input, kept alive.
        flops: of the product.
        features, size: output features, and entries of the output.
    """

    site: Site
    x: torch.Tensor
    flops: int
    features: int
    size: int


class Recorder(TorchDispatchMode):
    """While it is on, every product that reads a site's weight, whole or a slice of it, is noted in `meetings`.

    Args:
        model: the frozen one, whose forward runs.
        sites: those of a cascade over the same model.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        super().__init__()
        parameters = dict(model.named_parameters())
        self.meetings: list[Meeting] = []
        self._sites = {_address(parameters[site.weight]): site for site in sites}
        self._owned = {_address(each) for each in (*parameters.values(), *model.buffers())}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if _multiplies(func):
            tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            site = next((self._sites[_address(t)] for t in tensors if _address(t) in self._sites), None)
            if site is not None:
                x = next(tensor for tensor in tensors if _address(tensor) not in self._owned)
                flops = _flops(func, args, kwargs or {}, out)
                features = out.shape[1 if site.kind == "conv" else -1]
                self.meetings.append(Meeting(site, x, flops, features, out.numel()))
        return out

    def check_all_met(self) -> None:
        """Raise RuntimeError where a site met no product."""
        met = {meeting.site.weight for meeting in self.meetings}
        missing = [site.weight for site in self._sites.values() if site.weight not in met]
        if missing:
            raise RuntimeError(
                f"no product with {missing[0]} and {len(missing) - 1} more was seen: what is counted is short"
            )


def _multiplies(func: Any) -> bool:
    return func._overloadpacket in flop_registry or func._schema.name in _GROUPED


def _flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    if func._schema.name in _GROUPED:  # each row meets one matrix of the stack
        return 2 * out.numel() * int(args[0].shape[-1])
    return int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
