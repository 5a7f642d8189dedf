"""The other processes that train copies of a cascade: DistributedDataParallel averages the gradients of the parameters
that it was made with, and no others.

It is seen while its forward runs, so that nothing has to be told of it, whoever wraps the cascade.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lorasc_fx.errors import StateError

__all__ = ["Replicas"]


class Replicas:
    """Knows the wrapper that a cascade was last called through; a copy of it (deepcopy, pickle) knows none."""

    def __init__(self) -> None:
        self._wrapper: Callable[[], Any] = _nobody
        self._outdated: Callable[[], Any] = _nobody
        self._sites = 0

    def see(self, sites: int, trainable: Callable[[], Mapping[str, nn.Parameter]]) -> None:
        """Note the wrapper whose forward runs, if any.

        Args:
            sites: number of the cascade's branches now.
            trainable: returns what is trained, by name.

        Raises:
            StateError: a parameter that is trained came after the wrapper was made, or has another shape since.
        """
        wrapper = DistributedDataParallel._active_ddp_module
        if wrapper is not None and self._outdated() is wrapper:
            raise StateError(
                "DistributedDataParallel wrapped the cascade before a stage changed the ranks of its branches, and "
                "adds up gradients in buffers of the old shapes: wrap it anew",
                code="wrapped-too-early",
            )
        if wrapper is None or (self._sites == sites and self._wrapper() is wrapper):
            return
        known = {id(parameter) for parameter in wrapper._module_parameters}
        late = [name for name, parameter in trainable().items() if id(parameter) not in known]
        if late:
            more = f" and {len(late) - 3} more" if len(late) > 3 else ""
            raise StateError(
                f"{', '.join(late[:3])}{more} came with a graph that was made after DistributedDataParallel wrapped "
                "the cascade, which would not average their gradients over the processes: call the cascade once in "
                "each mode and with each kind of arguments before you wrap it, or wrap it anew",
                code="wrapped-too-early",
            )
        self._wrapper, self._sites = weakref.ref(wrapper), sites

    def outdate(self) -> None:
        """Note that parameters have other shapes than the wrapper of now has buffers for."""
        self._outdated = self._wrapper

    def averaged(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the mean of a gradient over the processes, all of which have to ask for it; without any, itself."""
        wrapper = self._wrapper()
        if wrapper is None:
            return gradient
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=wrapper.process_group)
        return total.div_(torch.distributed.get_world_size(wrapper.process_group))

    def __reduce__(self) -> tuple[type[Replicas], tuple[()]]:
        return (Replicas, ())


def _nobody() -> None:
    return None
