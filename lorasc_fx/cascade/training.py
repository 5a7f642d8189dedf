"""Pending gradients, optimizers, optimizer state and one-time warnings of a training loop."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lorasc_fx.branch import Branch
from lorasc_fx.errors import SpecError, StateError, named, warn
from lorasc_fx.shards import dtensor_like, full_tensor, local
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.util.undo import Undo


class Fresh:
    """Base class for state that belongs to one object in one process. A deep copy or a pickle starts empty."""

    def __reduce__(self) -> tuple[type[Fresh], tuple[()]]:
        return (type(self), ())


class Warned(Fresh):
    """Gives each warning at most once per cascade, by its code."""

    def __init__(self) -> None:
        self._codes: set[str] = set()

    def __contains__(self, code: str) -> bool:
        return code in self._codes

    def once(self, code: str, message: str) -> None:
        """Warn, unless a warning with this code was given before."""
        if code not in self._codes:
            self._codes.add(code)
            warn(message, code)


class PendingWatch(Fresh):
    """Detects gradients that no optimizer step has consumed, by comparing version counters.

    An optimizer step writes a parameter in place, which increments its version counter. When a gradient is accumulated,
    the version of the parameter is recorded. The gradient is pending while the parameter has the recorded version.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._versions: dict[int, int] = {}  # recorded versions, by the id of the parameter
        # Weak references: a hook of a parameter refers to this watch, and Python cannot collect such a cycle.
        self._watched = weakref.WeakValueDictionary[int, nn.Parameter]()

    def arm(self, parameters: Iterable[nn.Parameter]) -> None:
        """Start watching these parameters. Parameters that are watched already stay watched."""
        for parameter in parameters:
            if id(parameter) not in self._watched:
                self._watched[id(parameter)] = parameter
                self._handles.append(parameter.register_post_accumulate_grad_hook(self.note))

    @property
    def accumulated(self) -> bool:
        """Whether a watched parameter has ever received a gradient."""
        return bool(self._versions)

    def disarm(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._watched, self._versions = [], weakref.WeakValueDictionary(), {}

    def restorer(self) -> Callable[[], None]:
        """Return a function that restores which parameters are watched and the versions recorded for them."""
        watched, versions = tuple(self._watched.values()), dict(self._versions)

        def restore() -> None:
            self.disarm()
            self.arm(watched)
            self._versions = dict(versions)

        return restore

    def waiting(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Return the names of the parameters with a nonzero gradient that no step has consumed."""
        names = []
        for name, parameter in parameters.items():
            is_noted = self._versions.get(id(parameter)) == parameter._version
            if is_noted and parameter.grad is not None and bool(local(parameter.grad).any()):
                names.append(name)
        return names

    def note(self, parameter: nn.Parameter) -> None:
        """Record that the current gradient of a parameter waits for a step."""
        self._versions[id(parameter)] = parameter._version


def check_numbers(state: object, path: str) -> None:
    """Raise ValueError if an optimizer state contains nan. The message has the path of the value in the state."""
    if isinstance(state, Mapping):
        for name, value in state.items():
            check_numbers(value, f"{path}.{name}")
    elif isinstance(state, (list, tuple)):
        for index, value in enumerate(state):
            check_numbers(value, f"{path}[{index}]")
    elif isinstance(state, (float, torch.Tensor)):
        numbers = local(state) if isinstance(state, torch.Tensor) else torch.tensor(state)
        if numbers.is_floating_point() and numbers.element_size() == 1:
            numbers = numbers.float()  # torch cannot compare fp8 values
        if bool(numbers.isnan().any()):
            raise ValueError(f"{path} holds NaN")


Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
"""One optimizer, or several that train one cascade together, such as Muon for matrices and AdamW for the rest."""


def optimizers_of(call: str, optimizer: Optimizers | None) -> tuple[torch.optim.Optimizer, ...]:
    """Return the argument `optimizer` (one optimizer, several, or None) of a method as a tuple."""
    if optimizer is None:
        return ()
    optimizers: tuple[Any, ...] = tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)
    for item in optimizers:
        if not (hasattr(item, "param_groups") and hasattr(item, "state")):
            raise SpecError(
                f"{call}: optimizer is a {type(item).__name__}, not a torch optimizer. Give one optimizer, or a list "
                "of several"
            )
    if len({id(item) for item in optimizers}) < max(1, len(optimizers)):
        fault = "the same optimizer is given twice" if optimizers else "optimizer is an empty list"
        raise SpecError(f"{call}: {fault}. Give each optimizer of the training once", code="conflicting-options")
    return optimizers


def check_holds(optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise StateError unless each of these parameters, given by name, is in exactly one of the optimizers."""
    owners: dict[int, int] = {}  # indices of optimizers, by the id of a parameter
    shared: set[int] = set()
    for index, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if owners.setdefault(id(parameter), index) != index:
                    shared.add(id(parameter))
    missing, repeated = list[str](), list[str]()
    for name, parameter in parameters.items():
        if id(parameter) not in owners:
            missing.append(name)
        elif id(parameter) in shared:
            repeated.append(name)
    if missing:
        raise StateError(
            f"no optimizer of this call holds {named(missing)}. Build it from cascade.param_groups(lr=...). With "
            "several, give each one. If a later call of the cascade has added these branches, add them by "
            "optimizer.add_param_group",
            code="optimizer-lacks-parameters",
        )
    if repeated:
        raise StateError(
            f"two optimizers hold {named(repeated)}, and both would train it. Give each group of "
            "cascade.param_groups(lr=...) to one optimizer",
            code="conflicting-options",
        )


def check_rates(
    optimizers: Sequence[torch.optim.Optimizer], expected_groups: Callable[[float], Sequence[Mapping[str, Any]]]
) -> None:
    """Raise SpecError if the optimizers have one learning rate for all trained parameters and the spec has several.

    With one rate, the user has built the optimizer from `parameters()`, and the lr_ratio of the spec would be ignored.
    Several rates are not checked, because the user has chosen them.
    """
    trained = {id(parameter) for group in expected_groups(0.0) for parameter in group["params"]}
    rates = {
        float(group.get("initial_lr", group["lr"]))
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in trained
    }
    if len(rates) != 1:
        return
    rate = rates.pop()
    for group in expected_groups(rate):
        if not math.isclose(group["lr"], rate, rel_tol=1e-6):
            raise SpecError(
                f"the spec gives {group['name']} the learning rate {group['lr']:g} (lr_ratio), but the "
                f"optimizer has {rate:g} for all trained parameters. Build it from cascade.param_groups(lr=...). In "
                "timm, use create_optimizer_v2(cascade, param_group_fn=lambda cascade: cascade.param_groups(lr=...)). "
                "Give a transformers Trainer optimizers=(optimizer, None)",
                code="optimizer-differs",
            )


Treatment = Literal["reset"] | float
"""Treatment of a parameter's optimizer state at a transition: "reset" removes the state. A number in (0, 1) prunes this
share of its entries, the smallest ones (ReLoRA, 2307.05695)."""


def treated_state(
    optimizers: Iterable[torch.optim.Optimizer], treatments: Mapping[nn.Parameter, Treatment]
) -> dict[nn.Parameter, Any]:
    """Return {parameter: its optimizer state after a transition} in new tensors.

    Parameters without a state are left out. The optimizers are not changed.
    """
    states: dict[nn.Parameter, Any] = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if state and isinstance(parameter, nn.Parameter) and parameter in treatments:
                how = treatments[parameter]
                states[parameter] = {} if how == "reset" else _pruned(state, parameter, float(how))
    return states


def put_state(optimizers: Iterable[torch.optim.Optimizer], states: Mapping[nn.Parameter, object], undo: Undo) -> None:
    """Set the optimizer state of these parameters, where an optimizer has one. An empty new state removes it.

    The next step initializes a removed state.
    """
    for optimizer in optimizers:
        table = optimizer.state
        undo(partial(table.update, dict(table)))
        for parameter, state in states.items():
            if parameter in table and state:
                table[parameter] = state
            elif parameter in table:
                del table[parameter]


def _pruned(state: Mapping[str, object], parameter: nn.Parameter, ratio: float) -> dict[str, Any]:
    """Return a state in which the share `ratio` of each tensor in the parameter's shape, its smallest entries, is zero.

    An entry that is pruned in one tensor becomes zero in every tensor. Otherwise Adam's second moment could be zero
    where the first is not. Then A would step by exp_avg / eps, because the gradient of A is zero while B is zero.
    """
    shaped = {n: v.detach() for n, v in state.items() if isinstance(v, torch.Tensor) and v.shape == parameter.shape}
    count = round(ratio * parameter.numel())
    if not count or not shaped:
        return dict(state)
    # Compare the entries of full tensors, so that the result does not depend on the number of ranks.
    values = {name: full_tensor(value) for name, value in shaped.items()}
    zeros = torch.cat([value.abs().flatten().topk(count, largest=False).indices for value in values.values()])
    return dict(state) | {
        name: dtensor_like(value.flatten().index_fill(0, zeros, 0).view_as(value), shaped[name])
        for name, value in values.items()
    }


def groups(
    spec: CascadeSpec,
    branches: Iterable[Branch],
    trained: Iterable[nn.Parameter],
    lr: float,
    options: Mapping[str, object],
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer; see `Cascade.param_groups`."""
    parts: dict[str, tuple[float, list[nn.Parameter]]] = {}
    for branch in branches:
        for name, parameter in branch.trainable().items():
            parts.setdefault(name, (branch.learning_rate(name, lr, spec), []))[1].append(parameter)
    parts["train"] = (lr, list(trained))
    return [
        {"params": parameters, "name": name, "lr": rate, **options}
        for name, (rate, parameters) in parts.items()
        if parameters
    ]
