"""What a resume gives back: the state of optimizer, scheduler and random generators, all of it or none.

Both `load_state_dict` of torch take what they get: a scheduler's puts it into its `__dict__`, where a name of a method
would stand before the method. So a saved value is taken only where a value of its kind stands now.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch

from lorasc_fx.checks import is_number
from lorasc_fx.errors import CheckpointError, warn
from lorasc_fx.runtime import generators, outside_json
from lorasc_fx.runtime.checkpoint_read import Checkpoint
from lorasc_fx.runtime.manifest import optimizer_index
from lorasc_fx.runtime.opening import told
from lorasc_fx.runtime.optim import check_holds, check_numbers
from lorasc_fx.runtime.provenance import differences
from lorasc_fx.runtime.run import Planned, Run
from lorasc_fx.undo import Commit

__all__ = ["resume"]

_ODD = ("Adafactor", "LBFGS", "SparseAdam")
"""Optimizers of torch whose state has other shapes than the parameter's."""


def resume(run: Run, checkpoint: Checkpoint, optimizer: torch.optim.Optimizer | None, scheduler: Any) -> dict[str, Any]:
    """Give optimizer, scheduler, pending gradients and random generators their state back, and return `extra`.

    Raises:
        CheckpointError: the checkpoint holds no such state, or that of another optimizer or scheduler. All are as they
            were.
        StateError: the optimizer does not hold the branches.
    """
    where = str(checkpoint.path)
    manifest = _with_outside(checkpoint, where)
    for what, given in (("optimizer", optimizer), ("scheduler", scheduler)):
        if given is None:
            continue
        if what not in manifest:
            raise CheckpointError(
                f"{where}: holds no {what}; it was saved without one: resume without it", code="state-not-saved"
            )
        saved = manifest[what]["class"]
        if type(given).__name__ != saved:
            raise CheckpointError(
                f"{where}: holds the state of {told(saved)}, the {what} is {type(given).__name__}; give one of the "
                "kind that was saved",
                code="optimizer-differs",
            )
    if optimizer is not None:
        check_holds(optimizer, run.trainable())
    try:
        state, then = None, None
        if optimizer is not None:
            state = _of_optimizer(optimizer, manifest["optimizer"], checkpoint.tensors, where)
            check_numbers(state, "optimizer", finite=run.plan.spec.on_nonfinite == "raise")
        if scheduler is not None:
            then = like(scheduler.state_dict(), manifest["scheduler"]["state"], "scheduler")
            check_numbers(then, "scheduler")
    except (ValueError, RecursionError) as fault:
        raise CheckpointError(
            f"{where}: {told(str(fault), 300)}; build optimizer and scheduler the same way", code="optimizer-differs"
        ) from fault
    try:
        _give(run, checkpoint, optimizer, state, scheduler, then)
    except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as fault:
        raise CheckpointError(
            f"{where}: its state was not taken: {told(str(fault), 300)}; build optimizer and scheduler the same way, "
            "or go on without them",
            code="optimizer-differs",
        ) from fault
    if changed := differences(manifest.get("versions")):
        names = told(", ".join(changed), 300)
        warn(f"{where}: written under {names}; the run goes on, but perhaps not bit for bit", "other-versions")
    extra: dict[str, Any] = manifest["extra"]
    return extra


def _with_outside(checkpoint: Checkpoint, where: str) -> dict[str, Any]:
    """Return the manifest with the tensors and numbers that JSON does not hold in their places, each used."""
    manifest = checkpoint.manifest
    parts = {key: manifest[key] for key in ("optimizer", "scheduler", "extra") if key in manifest}
    notes = manifest.get("outside", ())
    try:
        whole = outside_json.put_back(parts, notes, checkpoint.tensors)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as fault:
        what = f"{type(fault).__name__}: {told(str(fault))}"
        raise CheckpointError(f"{where}: tensors and numbers outside of JSON have no place in it: {what}") from fault
    used = {note.get("tensor") for note in notes}
    odd = next((name for name in checkpoint.tensors if name.startswith("outside/") and name not in used), None)
    if odd is not None:
        raise CheckpointError(f"{where}: holds {told(repr(odd))}, which has no place in it")
    return {**manifest, **whole}


def _give(
    run: Run,
    checkpoint: Checkpoint,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any] | None,
    scheduler: Any,
    then: Any,
) -> None:
    """Write what was checked, all or nothing.

    Optimizer and scheduler take their state by their own methods, and the generators belong to the process: what is the
    run's is one commit, and the others are steps of the same block.
    """
    manifest, tensors = checkpoint.manifest, checkpoint.tensors
    with Commit(run.lock) as undo:
        if optimizer is not None and state is not None:
            for name in ("state", "param_groups"):
                undo(partial(setattr, optimizer, name, getattr(optimizer, name)))
            optimizer.load_state_dict(state)
            gathers, pending = bool(manifest["turning"]), manifest.get("pending", ())
            gradients = run.gradients_in(tensors, pending, gathers, str(checkpoint.path))
            run.commit(
                Planned(run.plan, run.slow, gradients=gradients, optimizer=optimizer, gathers=gathers),
                undo,
            )
        if scheduler is not None:
            undo(partial(scheduler.load_state_dict, deepcopy(scheduler.state_dict())))
            scheduler.load_state_dict(then)
        undo(partial(generators.unpack, *generators.pack()))
        generators.unpack(tensors, manifest["rng"])


def _of_optimizer(
    optimizer: torch.optim.Optimizer, meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: str
) -> dict[str, Any]:
    """Return the state dict that the checkpoint has for this optimizer.

    Raises:
        CheckpointError: the optimizer has other groups.
        ValueError: the state is not that of such an optimizer.
    """
    now, then = optimizer.state_dict()["param_groups"], meta["groups"]
    if [group["params"] for group in now] != [group["params"] for group in then]:
        raise CheckpointError(
            f"{where}: the optimizer has other groups than the saved one; build it the same way",
            code="optimizer-differs",
        )
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in meta["numbers"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            index, key = optimizer_index(name, then)
            state.setdefault(index, {})[key] = tensor.clone()
    _check_state(optimizer, state)
    groups = [_group(group, old, optimizer.defaults) for group, old in zip(now, then, strict=True)]
    return {"state": state, "param_groups": groups}


def _check_state(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Refuse a state that parameters of one group have in part, or that has another shape than the parameter."""
    if not type(optimizer).__module__.startswith("torch.optim.") or type(optimizer).__name__ in _ODD:
        return  # what another optimizer keeps is its own affair
    index = 0
    for group in optimizer.param_groups:
        names: set[str] | None = None
        for parameter in group["params"]:
            entries = state.get(index)
            if entries is not None:
                names = set(entries) if names is None else names
                if set(entries) != names:
                    odd = sorted(set(entries) ^ names)[0]
                    raise ValueError(f"optimizer: {told(odd)} is there for some parameters of a group, not for {index}")
                for name, value in entries.items():
                    if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                        raise ValueError(
                            f"optimizer: {told(name)} of parameter {index} is {tuple(value.shape)}, the parameter "
                            f"{tuple(parameter.shape)}"
                        )
                    if isinstance(value, (dict, list, str)):
                        raise ValueError(f"optimizer: {told(name)} of parameter {index} is no number")
            index += 1


def _group(now: Mapping[str, Any], then: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group; what a scheduler notes there may be missing or be more."""
    lost = next((key for key in now if key not in then and key in defaults), None)
    if lost is not None:
        raise ValueError(f"optimizer: a group has no {lost!r}")
    taken = {key: like(now[key], value, f"optimizer: {key}") for key, value in then.items() if key in now}
    more = {key: value for key, value in then.items() if key not in now}
    for key, value in more.items():
        if not is_number(value):
            raise ValueError(f"optimizer: a group has {told(repr(key))}, which this one has not")
    return taken | more


def like(now: Any, then: Any, place: str) -> Any:
    """Return a value that JSON gave back as one of the kind that stands there now: tuples and integer keys again.

    Raises:
        ValueError: it is of another kind, or has other keys; names the place.
    """
    if isinstance(now, dict):
        return _like_table(now, then, place)
    if isinstance(now, (list, tuple)):
        return _like_list(now, then, place)
    if isinstance(now, bool):
        fits = isinstance(then, bool) or then is None
    elif isinstance(now, (int, float)):
        fits = _number(then)
    elif isinstance(now, torch.Tensor):
        if isinstance(then, torch.Tensor) and then.shape == now.shape and then.dtype == now.dtype:
            return then.to(now.device)
        fits = False
    elif now is None:
        fits = then is None or isinstance(then, (bool, str)) or _number(then)
    else:
        fits = isinstance(now, str) and isinstance(then, str)
    if not fits:
        raise ValueError(f"{place} is {told(repr(then))}, where {type(now).__name__} is expected")
    return then


def _like_table(now: dict[Any, Any], then: Any, place: str) -> Any:
    if not isinstance(then, dict):
        raise ValueError(f"{place} is {type(then).__name__}, not a table")
    counted = bool(now) and all(type(key) is int for key in now)
    if counted:
        keys = {name: int(name) for name in then}
        sample = next(iter(now.values()))
        return type(now)({key: like(now.get(key, sample), then[name], f"{place}[{key}]") for name, key in keys.items()})
    odd = sorted(set(then) ^ set(now)) if now else [name for name in then if name.startswith("_")]
    if odd:
        there = "has" if odd[0] in then else "has no"
        raise ValueError(f"{place} {there} {told(repr(odd[0]))}, unlike the one that is to take it")
    return type(now)({name: like(now.get(name), value, f"{place}.{told(name)}") for name, value in then.items()})


def _like_list(now: list[Any] | tuple[Any, ...], then: Any, place: str) -> Any:
    if not isinstance(then, list):
        raise ValueError(f"{place} is {type(then).__name__}, not a list")
    fixed = isinstance(now, tuple) or place.endswith(("lr", "lrs", "momentums")) or any(map(_nested, now))
    if fixed and len(now) != len(then):
        raise ValueError(f"{place} has {len(then)} entries, {len(now)} are expected")
    samples = now if fixed else [now[0] if now else None] * len(then)
    taken = [
        like(sample, each, f"{place}[{index}]") for index, (sample, each) in enumerate(zip(samples, then, strict=True))
    ]
    return tuple(taken) if isinstance(now, tuple) else taken


def _number(value: Any) -> bool:
    """Whether a value is a number; inf and nan are some where a note beside the JSON has put them."""
    return isinstance(value, float) or is_number(value)


def _nested(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple))
