"""The optimizer of the user: its parameter groups, checks of it, and its state at a transition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from lorasc_fx.branch import Branch
from lorasc_fx.errors import SpecError, StateError, named
from lorasc_fx.shards import dtensor_like, full_tensor, local
from lorasc_fx.spec import CascadeSpec, TrainRule

_COPIES = {"lookahead_slow_buff"}
"""Entries of an optimizer state that are copies of the parameter. They are stale after a transition."""


def check_numbers(state: Any, path: str) -> None:
    """Raise ValueError if a number or an entry of a tensor in an optimizer state is nan. The message names its path."""
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


def check_holds(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise StateError if the optimizer does not hold all of these parameters, given by name."""
    ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in ids]
    if missing:
        raise StateError(
            f"the optimizer does not hold {named(missing)}. Build it from cascade.param_groups(lr=...). If a later "
            "call of the cascade has added these branches, add them by optimizer.add_param_group",
            code="optimizer-lacks-parameters",
        )


def check_rates(
    optimizer: torch.optim.Optimizer, expected_groups: Callable[[float], Sequence[Mapping[str, Any]]]
) -> None:
    """Raise SpecError if the optimizer has one learning rate for all trained parameters and the spec has several.

    Then the user has built the optimizer from `parameters()`, and the rates of the spec (lr_ratio, train_rules) would
    be ignored. An optimizer with several rates is not checked: the user has chosen them.

    Args:
        optimizer: the optimizer. Its initial rates count, from before a scheduler changed them.
        expected_groups: returns the groups of the spec for a learning rate of A (`groups`).
    """
    trained = {id(parameter) for group in expected_groups(0.0) for parameter in group["params"]}
    rates = {
        float(group.get("initial_lr", group["lr"]))
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
                f"the spec gives {group['name']} the learning rate {group['lr']:g} (lr_ratio, train_rules), but the "
                f"optimizer has {rate:g} for all trained parameters. Build it from cascade.param_groups(lr=...). In "
                "timm, use create_optimizer_v2(cascade, param_group_fn=lambda cascade: cascade.param_groups(lr=...)). "
                "Give a transformers Trainer optimizers=(optimizer, None)",
                code="optimizer-differs",
            )


def stepping(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that has the state: the inner optimizer of timm's Lookahead, otherwise the same one."""
    inner: torch.optim.Optimizer = getattr(optimizer, "_base_optimizer", optimizer)
    return inner


def treated_state(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], how: Literal["reset", "kept"] | float
) -> dict[nn.Parameter, Any]:
    """Return the optimizer's state for these parameters after a transition, as new tensors.

    Does not change the optimizer. Parameters whose state does not change are left out, and so are parameters without a
    state. Copies of the parameter are never kept.

    Args:
        optimizer: the optimizer.
        parameters: parameters to treat.
        how: `reset` for the state of a parameter that was never stepped, `kept` for the current state. A number in
            (0, 1) is the share of entries to prune by magnitude (ReLoRA, 2307.05695).
    """
    treated: dict[nn.Parameter, Any] = {}
    for parameter in parameters:
        state = stepping(optimizer).state.get(parameter)
        if not state:
            continue
        entries = {name: value for name, value in state.items() if name not in _COPIES}
        if how == "reset":
            treated[parameter] = {}
        elif how != "kept":
            treated[parameter] = _pruned(entries, parameter, float(how))
        elif len(entries) < len(state):
            treated[parameter] = entries
    return treated


def kept_state(optimizer: torch.optim.Optimizer, masks: Mapping[nn.Parameter, torch.Tensor]) -> dict[nn.Parameter, Any]:
    """Return the optimizer's state for these parameters, set to zero where their masks are False, as new tensors.

    A state with tensors of another shape is reset, because a mask in the shape of the parameter cannot be applied to
    it. An example are the factored moments of Adafactor.
    """
    treated: dict[nn.Parameter, Any] = {}
    for parameter, mask in masks.items():
        state = stepping(optimizer).state.get(parameter, {})
        entries = {name: value for name, value in state.items() if name not in _COPIES}
        tensors = {name: value for name, value in entries.items() if isinstance(value, torch.Tensor) and value.dim()}
        if any(value.shape != parameter.shape for value in tensors.values()):
            entries, tensors = {}, {}
        for name, value in tensors.items():
            full = full_tensor(value.detach())
            entries[name] = dtensor_like(torch.where(mask.to(full.device), full, 0), value)
        if state:
            treated[parameter] = entries
    return treated


def put_state(optimizer: torch.optim.Optimizer, states: Mapping[nn.Parameter, Any]) -> None:
    """Set the optimizer's state for these parameters. An empty state is removed: the next step initializes it."""
    table = stepping(optimizer).state
    for parameter, state in states.items():
        if state:
            table[parameter] = state
        else:
            table.pop(parameter, None)


def _pruned(state: Mapping[str, Any], parameter: nn.Parameter, ratio: float) -> dict[str, Any]:
    """Return a state whose smallest entries are zero: a share `ratio` of each tensor in the parameter's shape.

    An entry that is pruned in one tensor becomes zero in every tensor. Otherwise Adam's second moment could be zero
    where the first is not. Then A would step by exp_avg / eps, because its gradient is zero while B is zero.
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
    trained: Iterable[tuple[nn.Parameter, TrainRule | None]],
    lr: float,
    options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer; see `Cascade.param_groups`.

    Args:
        spec: the spec, with `lr_ratio`.
        branches: the branches.
        trained: parameters trained in full, each with its rule of train_rules, if any.
        lr: learning rate of A.
        options: more options for every group.
    """
    parts: dict[str, tuple[float, list[nn.Parameter]]] = {}
    for branch in branches:
        for name, parameter in branch.trainable().items():
            parts.setdefault(name, (branch.learning_rate(name, lr, spec), []))[1].append(parameter)
    parts["train"] = (lr, [])
    for parameter, rule in trained:
        name, rate = (f"train:{rule.pattern}", rule.lr) if rule is not None and rule.lr is not None else ("train", lr)
        parts.setdefault(name, (rate, []))[1].append(parameter)
    return [
        {"params": parameters, "name": name, "lr": rate, **options}
        for name, (rate, parameters) in parts.items()
        if parameters
    ]
