"""The optimizer at a transition: only the state of the branches' parameters changes."""

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
"""Entries of a state that are copies of the parameter. They are stale after a transition."""


def check_numbers(state: Any, path: str) -> None:
    """Raise ValueError if a number or tensor in the state of an optimizer is NaN; names the path."""
    if isinstance(state, Mapping):
        for name, value in state.items():
            check_numbers(value, f"{path}.{name}")
    elif isinstance(state, (list, tuple)):
        for index, value in enumerate(state):
            check_numbers(value, f"{path}[{index}]")
    elif isinstance(state, (float, torch.Tensor)):
        numbers = local(state) if isinstance(state, torch.Tensor) else torch.tensor(state)
        if numbers.is_floating_point() and numbers.element_size() == 1:
            numbers = numbers.float()  # torch compares no numbers of 8 bits
        if bool(numbers.isnan().any()):
            raise ValueError(f"{path} holds NaN")


def check_holds(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse an optimizer that does not hold every one of these parameters.

    Raises:
        StateError: names the first missing ones.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in held]
    if missing:
        raise StateError(
            f"the optimizer does not hold {named(missing)}: build it from cascade.param_groups(lr=...), "
            "or add_param_group what a new variant brought",
            code="optimizer-lacks-parameters",
        )


def check_rates(optimizer: torch.optim.Optimizer, asked: Callable[[float], Sequence[Mapping[str, Any]]]) -> None:
    """Refuse an optimizer that has one learning rate for all trained parameters although the spec has several.

    Args:
        optimizer: its initial rates count, before a scheduler changed them.
        asked: returns the groups that the spec asks for, given the learning rate of A (`groups`).

    Raises:
        SpecError: names the first group that needs another rate.
    """
    # With one rate for all, the user built the optimizer from `parameters()` and lost the rates of the spec.
    trained = {id(parameter) for group in asked(0.0) for parameter in group["params"]}
    rates = {
        float(group.get("initial_lr", group["lr"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in trained
    }
    if len(rates) != 1:
        return
    rate = rates.pop()
    for group in asked(rate):
        if not math.isclose(group["lr"], rate, rel_tol=1e-6):
            raise SpecError(
                f"{group['name']} is to have the learning rate {group['lr']:g} (lr_ratio, train_rules), and the "
                f"optimizer has {rate:g} for all that trains: build it from cascade.param_groups(lr=...), in timm by "
                "create_optimizer_v2(cascade, param_group_fn=lambda cascade: cascade.param_groups(lr=...)), and give a "
                "Trainer of transformers optimizers=(optimizer, None)",
                code="optimizer-differs",
            )


def stepping(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that steps and holds the state; in timm's Lookahead it is the one inside."""
    inner: torch.optim.Optimizer = getattr(optimizer, "_base_optimizer", optimizer)
    return inner


def treated_state(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], how: Literal["reset", "kept"] | float
) -> dict[nn.Parameter, Any]:
    """Return the optimizer's state for these parameters after a restart, as new tensors. Does not change the optimizer.

    `reset` is the state of a parameter that was never stepped. A number is the share to prune by magnitude (ReLoRA,
    2307.05695): an entry among the smallest of any state tensor becomes zero in all state tensors of the parameter's
    shape. So Adam's second moment is never zero where the first is not: A, whose gradient is zero while B is zero,
    would step by exp_avg / eps. Copies of the parameter are never kept.
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
    """Return the optimizer's state for these parameters with zeros where their masks are False, as new tensors.

    A state without an entry for each entry of the parameter, such as Adafactor's factored moments, is reset.
    """
    treated: dict[nn.Parameter, Any] = {}
    for parameter, mask in masks.items():
        state = stepping(optimizer).state.get(parameter, {})
        entries = {name: value for name, value in state.items() if name not in _COPIES}
        tensors = {name: value for name, value in entries.items() if isinstance(value, torch.Tensor) and value.dim()}
        if any(value.shape != parameter.shape for value in tensors.values()):
            entries, tensors = {}, {}  # factored moments: their entries are not those of the parameter
        for name, value in tensors.items():
            full = full_tensor(value.detach())
            entries[name] = dtensor_like(torch.where(mask.to(full.device), full, 0), value)
        if state:
            treated[parameter] = entries
    return treated


def put_state(optimizer: torch.optim.Optimizer, states: Mapping[nn.Parameter, Any]) -> None:
    """Give the optimizer these states. An empty state is removed, so that the next step initializes it."""
    table = stepping(optimizer).state
    for parameter, state in states.items():
        if state:
            table[parameter] = state
        else:
            table.pop(parameter, None)


def _pruned(state: Mapping[str, Any], parameter: nn.Parameter, ratio: float) -> dict[str, Any]:
    shaped = {n: v.detach() for n, v in state.items() if isinstance(v, torch.Tensor) and v.shape == parameter.shape}
    count = round(ratio * parameter.numel())
    if not count or not shaped:
        return dict(state)
    # The smallest entries of the full tensors: those of a shard would depend on the number of ranks.
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
    """Return the optimizer's groups: one for each name of a branch parameter, then `train`, and
    `train:PATTERN` for each rule with its own learning rate. No group is empty.
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
