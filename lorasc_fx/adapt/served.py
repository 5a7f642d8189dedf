"""The models that banks use. Their parameters do not require gradients, and `adapt` refuses these models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from weakref import WeakSet

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary


@dataclass
class _Served:
    """The banks that use a parameter, and its requires_grad flag before the first of them."""

    flag: bool
    banks: WeakSet[object] = field(default_factory=WeakSet)


_SERVED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The `_Served` of each parameter in a bank."""


def serve(parameters: Iterable[nn.Parameter], bank: object) -> None:
    """Register a bank that uses these parameters, and disable their gradients."""
    for parameter in parameters:
        served = _SERVED.setdefault(parameter, _Served(parameter.requires_grad))
        served.flag |= parameter.requires_grad  # it may have been set since a bank was dropped without `release`
        served.banks.add(bank)
        parameter.requires_grad_(False)


def stop_serving(parameters: Iterable[nn.Parameter], bank: object) -> None:
    """Remove a bank. The flags of parameters that no other bank uses are restored. A second call has no effect."""
    for parameter in parameters:
        served = _SERVED.get(parameter)
        if served is None or bank not in served.banks:
            continue
        served.banks.discard(bank)
        if not served.banks:
            del _SERVED[parameter]
            parameter.requires_grad_(served.flag)


def is_served(parameter: nn.Parameter) -> bool:
    """Whether a bank that still exists and was not released uses the parameter."""
    served = _SERVED.get(parameter)
    return served is not None and bool(served.banks)
