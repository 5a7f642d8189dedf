"""Gradients that no optimizer step has used: known from the order of two version counters, without the optimizer.

A parameter's version grows when a step writes it. Each accumulation notes the version; a gradient is pending while the
parameter is still at the noted one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lorasc_fx.shards import local

__all__ = ["PendingWatch"]


class PendingWatch:
    """Watches parameters; a copy of it (deepcopy, pickle) watches nothing until it is armed."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._seen: dict[int, int] = {}
        self._armed: set[int] = set()

    def arm(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Watch these parameters as well."""
        for parameter in parameters.values():
            if id(parameter) not in self._armed:
                self._armed.add(id(parameter))
                self._handles.append(parameter.register_post_accumulate_grad_hook(self.note))

    @property
    def accumulated(self) -> bool:
        """Whether some watched parameter has had a gradient."""
        return bool(self._seen)

    def disarm(self) -> None:
        """Watch nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._armed, self._seen = [], set(), {}

    def knows(self, parameter: nn.Parameter) -> bool:
        """Whether this parameter is watched."""
        return id(parameter) in self._armed

    def restorer(self, parameters: Mapping[str, nn.Parameter]) -> Callable[[], None]:
        """Return what brings this state back, in which these parameters are watched and no others."""
        seen = dict(self._seen)

        def restore() -> None:
            self.disarm()
            self.arm(parameters)
            self._seen = seen

        return restore

    def waiting(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Return the names of the parameters whose gradient, if it is not zero, no step has used."""
        return [
            name
            for name, parameter in parameters.items()
            if parameter.grad is not None
            and self._seen.get(id(parameter)) == parameter._version
            and bool(local(parameter.grad).any())
        ]

    def note(self, parameter: nn.Parameter) -> None:
        """The gradient that the parameter holds now waits for a step."""
        self._seen[id(parameter)] = parameter._version

    def __reduce__(self) -> tuple[type[PendingWatch], tuple[()]]:
        return (PendingWatch, ())
