"""The rest of a checkpoint: the state of optimizer, scheduler and random generators, and `extra`.

It is stored as JSON with references to tensors. `resume` restores everything or nothing.
"""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lorasc_fx.branch import generator
from lorasc_fx.cascade.optim import check_holds, check_numbers, stepping
from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint.codec import gradients_of
from lorasc_fx.checkpoint.layout import refusing, sanitized, versions
from lorasc_fx.checkpoint.reader import Checkpoint
from lorasc_fx.errors import CheckpointError, warn
from lorasc_fx.shards import ONE_PROCESS, ProcessGroup, dtensor_like
from lorasc_fx.util.accelerator import generator_states, set_generator_states
from lorasc_fx.util.files import parse_json
from lorasc_fx.util.undo import commit

RANKS = "lorasc_fx.ranks"
"""Key in the `extra` of a checkpoint of several ranks: the random generators of each rank, as bytes."""

_ODD = ("Adafactor", "LBFGS", "SparseAdam")
"""Optimizers of torch whose state has other shapes than the parameter."""


def resume(
    run: Run,
    checkpoint: Checkpoint,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    group: ProcessGroup = ONE_PROCESS,
) -> dict[str, Any]:
    """Restore optimizer, scheduler, pending gradients and random generators, all or nothing, and return `extra`.

    The ranks of the group go on; each has its own random generators.

    Raises:
        CheckpointError: the checkpoint holds no such state, or that of another optimizer or scheduler. All are
            unchanged.
        StateError: the optimizer does not hold the branches.
    """
    where, tensors = checkpoint.path, checkpoint.tensors
    with checkpoint.refusing():
        manifest = _with_tensors(checkpoint)
    # Everything is checked before anything is written.
    saved = manifest.get("versions", {})
    for part, owner in (("optimizer", optimizer), ("scheduler", scheduler)):
        if owner is None:
            continue
        if part not in manifest:
            raise CheckpointError(
                f"{where}: has no {part} state, because it was saved without one; call resume without it",
                code="not-available",
            )
        kind = manifest[part]["class"]
        if type(owner).__name__ != kind:
            raise CheckpointError(
                f"{where}: has the state of {sanitized(kind)}, and this {part} is {type(owner).__name__}; give one of "
                "the class that was saved",
                code="optimizer-differs",
            )
    if optimizer is not None:
        check_holds(optimizer, run.trainable())
    same_way = "build optimizer and scheduler the same way"
    optimizer_state: dict[str, Any] = {}
    with refusing(where, same_way, code="optimizer-differs"):
        if optimizer is not None:
            optimizer_state = _state_for(optimizer, manifest["optimizer"], tensors)
            if run.plan.spec.on_nonfinite == "raise":
                check_numbers(optimizer_state, "optimizer")
        if scheduler is not None:
            current_state, saved_state = scheduler.state_dict(), manifest["scheduler"]["state"]
            if len(saved_state.get("base_lrs", ())) != len(current_state.get("base_lrs", ())):
                raise ValueError("scheduler.base_lrs: the optimizer has other groups than the saved one")
            scheduler_state = like(current_state, saved_state)
    extra: dict[str, Any] = manifest["extra"]
    ranks = extra.pop(RANKS, None)
    # Optimizer and scheduler take their state through their own methods, and the generators belong to the process:
    # what belongs to the run is one commit, and the others are steps of the same transaction.
    with (
        refusing(where, f"{same_way}, or go on without them", code="optimizer-differs", also=(RuntimeError,)),
        run.lock,
        commit() as undo,
    ):
        if optimizer is not None:
            for holder in (optimizer, stepping(optimizer)):
                for name in ("state", "param_groups"):
                    undo(partial(setattr, holder, name, getattr(holder, name)))
            optimizer.load_state_dict(optimizer_state)
            host = manifest["optimizer"].get("host", ())
            # The dtype of each trained parameter when the checkpoint was written.
            saved_as = {
                parameter: tensors.get(f"branch/{weight}/{name}")
                for weight, branch in run.branches_by_weight().items()
                for name, parameter in branch.named_parameters()
            }
            saved_as |= {value: tensors.get(f"value/{name}") for name, value in run.present(run.slow.trained).items()}
            dtypes = {parameter: tensor.dtype for parameter, tensor in saved_as.items() if tensor is not None}
            keep_as_saved(optimizer, optimizer_state["state"], host, dtypes)
            run.commit(replace(gradients_of(run, manifest, tensors), optimizer=optimizer), undo)
        if scheduler is not None:
            undo(partial(scheduler.load_state_dict, deepcopy(scheduler.state_dict())))
            scheduler.load_state_dict(scheduler_state)
        undo(partial(set_random_state, *random_state()))
        set_random_state(tensors, manifest["rng"])
        set_rank_random_state(ranks, group, run.plan.stage)
    changed = [
        f"{name} {saved[name]}, here {current}"
        for name, current in versions().items()
        if saved.get(name, current) != current
    ]
    if changed:
        names = sanitized(", ".join(changed), 300)
        warn(f"{where}: was written with {names}; the run goes on, but perhaps not bit for bit", "other-versions")
    return extra


def _with_tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the manifest with the tensors and numbers that JSON cannot hold in their places.

    Raises:
        ValueError, LookupError, TypeError: a reference has no place, or a tensor no reference.
    """
    manifest = checkpoint.manifest
    parts = {key: manifest[key] for key in ("optimizer", "scheduler", "extra") if key in manifest}
    references = manifest.get("tensor_references", ())
    parts = insert_tensors(parts, references, checkpoint.tensors)
    used = {reference.get("tensor") for reference in references}
    odd = next((name for name in checkpoint.tensors if name.startswith("reference/") and name not in used), None)
    if odd is not None:
        raise ValueError(f"holds the unexpected tensor {sanitized(repr(odd))}")
    return {**manifest, **parts}


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the state of an optimizer as tensors and JSON.

    The JSON names the tensors on the host whose parameters are elsewhere, because torch moves them when it loads them.
    """
    state = optimizer.state_dict()
    parameters = _parameters(optimizer)
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    host: list[str] = []
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{index}/{name}"] = value.detach().clone()
                if value.device.type == "cpu" and parameters[index].device.type != "cpu":
                    host.append(f"{index}/{name}")
            else:
                numbers.setdefault(str(index), {})[name] = value
    meta = {"class": type(optimizer).__name__, "groups": state["param_groups"], "numbers": numbers}
    return tensors, {**meta, "host": host} if host else meta


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters of an optimizer in the order of their numbers in its state dict."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state_for(
    optimizer: torch.optim.Optimizer, meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Return the state dict in a checkpoint for this optimizer.

    Raises:
        ValueError: it is the state of another optimizer.
    """
    current_groups, saved_groups = optimizer.state_dict()["param_groups"], meta["groups"]
    if [group["params"] for group in current_groups] != [group["params"] for group in saved_groups]:
        raise ValueError("the optimizer has other groups than the saved one")
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in meta["numbers"].items()}
    parameters = _parameters(optimizer)
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            index, _, key = name.removeprefix("optimizer/").partition("/")
            if not index.isdecimal() or len(index) > 9 or int(index) >= len(parameters) or not key:
                raise ValueError(f"{sanitized(name)} is not the state of one of {len(parameters)} parameters")
            state.setdefault(int(index), {})[key] = tensor.clone()
    _check_shapes(optimizer, state)
    for number, entries in state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameters[number].shape:
                entries[key] = dtensor_like(value, parameters[number])
    return {"state": state, "param_groups": like(current_groups, saved_groups)}


def keep_as_saved(
    optimizer: torch.optim.Optimizer,
    state: Mapping[int, Any],
    host: Collection[str],
    dtypes: Mapping[nn.Parameter, torch.dtype],
) -> None:
    """Give the tensors of an optimizer's state their saved dtypes, and keep on the host what was there.

    `Optimizer.load_state_dict` casts and moves them, except `step`, to the dtype and device of the parameter. The
    dtype is right only for a moment that had the dtype of its parameter, if the parameter now has another one.

    Args:
        optimizer: has loaded the state.
        state: the saved state, by the index of the parameter.
        host: names of tensors that were on the host while their parameters were not (`optimizer_state`).
        dtypes: of the parameters when they were saved.
    """
    table = stepping(optimizer).state
    for index, parameter in enumerate(_parameters(optimizer)):
        entries, loaded = state.get(index, {}), table.get(parameter, {})
        before = dtypes.get(parameter)
        follows = before if before != parameter.dtype else None
        for key in loaded.keys() & entries.keys():
            on_host = key != "step" and f"{index}/{key}" in host
            loaded[key] = _as_saved(loaded[key], entries[key], follows, on_host)


def _as_saved(loaded: Any, saved: Any, follows: torch.dtype | None, on_host: bool) -> Any:
    """Return loaded values in their saved dtypes. Tensors whose saved dtype is `follows` are unchanged."""
    if isinstance(loaded, torch.Tensor) and isinstance(saved, torch.Tensor) and loaded.shape == saved.shape:
        dtype = loaded.dtype if saved.dtype == follows else saved.dtype
        device = torch.device("cpu") if on_host else loaded.device
        return loaded if (loaded.dtype, loaded.device) == (dtype, device) else saved.to(device, dtype)
    if isinstance(loaded, dict) and isinstance(saved, Mapping):
        common = loaded.keys() & saved.keys()
        return loaded | {key: _as_saved(loaded[key], saved[key], follows, on_host) for key in common}
    if isinstance(loaded, list) and isinstance(saved, list) and len(loaded) == len(saved):
        return [_as_saved(before, after, follows, on_host) for before, after in zip(loaded, saved, strict=True)]
    return loaded


def _check_shapes(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Refuse a state that belongs to parameters of other shapes: those of the optimizer have another order.

    Raises:
        ValueError: names the entry and the parameter.
    """
    if not type(optimizer).__module__.startswith("torch.optim.") or type(optimizer).__name__ in _ODD:
        return  # the layout of another optimizer's state is unknown
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in state.get(index, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"optimizer: {sanitized(name)} of parameter {index} is {tuple(value.shape)}, the parameter "
                    f"{tuple(parameter.shape)}"
                )


def like(current: Any, saved: Any) -> Any:
    """Return a value from JSON with the types of the current one: tuples and integer keys are restored."""
    if isinstance(current, dict) and isinstance(saved, dict):
        numbered = bool(current) and all(type(key) is int for key in current)
        keyed = {int(key) if numbered else key: value for key, value in saved.items()}
        return type(current)({key: like(current.get(key), value) for key, value in keyed.items()})
    if isinstance(current, (list, tuple)) and isinstance(saved, list):
        padded = [*current, *[None] * len(saved)]
        return type(current)(like(before, value) for before, value in zip(padded, saved, strict=False))
    return saved.to(current.device) if isinstance(current, torch.Tensor) and isinstance(saved, torch.Tensor) else saved


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the states of the random generators that have been used, or may have been, as tensors and JSON."""
    tensors = generator_states()
    meta: dict[str, Any] = {"python": random.getstate()}
    if "numpy.random" in sys.modules:  # nothing was drawn before its first import
        meta["numpy"] = _as_lists(sys.modules["numpy.random"].get_state(legacy=False))
    return tensors, meta


def set_random_state(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned, except for devices and packages that are not here.

    Raises:
        IndexError, KeyError, RuntimeError, TypeError, ValueError: this is not a state of the generator.
    """
    version, words, gauss = meta["python"]
    random.setstate((version, tuple(words), gauss))
    if "numpy" in meta and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(meta["numpy"])
    set_generator_states(tensors)


def random_bytes() -> torch.Tensor:
    """Return what `random_state` returns as one tensor of bytes."""
    tensors, meta = random_state()
    lists = {name: state.tolist() for name, state in tensors.items()}
    return torch.tensor(list(json.dumps({"tensors": lists, "meta": meta}).encode()), dtype=torch.uint8)


def set_rank_random_state(ranks: Sequence[torch.Tensor] | None, group: ProcessGroup, stage: int) -> None:
    """Restore the random state of each rank, after `set_random_state` of the first rank.

    If the number of ranks has changed, each rank gets a new state: a function of the first rank's state, the rank and
    the number of ranks.

    Args:
        ranks: `random_bytes` of each rank that saved; None if one process saved.
        group: of the ranks that go on.
        stage: the running one.

    Raises:
        AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError: this is not a state of a generator.
    """
    if (1 if ranks is None else len(ranks)) != group.size:
        drawn = int(torch.randint(2**62, ()).item())
        torch.manual_seed(generator(drawn, stage, "rank", f"{group.rank} of {group.size}").initial_seed())
    elif ranks is not None:
        saved = parse_json(bytes(ranks[group.rank].tolist()))
        tensors = {name: torch.tensor(state, dtype=torch.uint8) for name, state in saved["tensors"].items()}
        set_random_state(tensors, saved["meta"])


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


_HELD = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
}  # fmt: skip


def is_storable(tensor: torch.Tensor) -> bool:
    """Whether safetensors can store this tensor without a change."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.dtype in _HELD


def extract_tensors(value: Any) -> tuple[Any, list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Move tensors, inf and nan out of a value of dicts and lists, for JSON. A tensor that occurs twice is stored once.

    Returns:
        The value with None in their places; a reference (path, and name or number) for each; the tensors by name.

    Raises:
        ValueError: a container holds itself.
    """
    references: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}

    def plain(value: Any, path: tuple[str | int, ...], above: tuple[int, ...]) -> Any:
        if isinstance(value, torch.Tensor) and is_storable(value):
            name = names.setdefault(id(value), f"reference/{len(names)}")
            tensors[name] = tensors.get(name, value).detach().clone()
            references.append({"path": path, "tensor": name})
            return None
        if isinstance(value, float) and not math.isfinite(value):
            references.append({"path": path, "number": repr(float(value))})
            return None
        if not isinstance(value, (Mapping, list, tuple)):
            return value
        if id(value) in above:
            raise ValueError("Circular reference detected")
        above = (*above, id(value))
        if isinstance(value, Mapping):
            texts = {key: key if isinstance(key, str) else json.dumps(key) for key in value}  # as JSON writes them
            return {key: plain(inner, (*path, texts[key]), above) for key, inner in value.items()}
        return [plain(inner, (*path, index), above) for index, inner in enumerate(value)]

    return plain(value, (), ()), references, tensors


def insert_tensors(value: Any, references: Sequence[Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]) -> Any:
    """Undo `extract_tensors`, except that JSON has lists in place of tuples, and strings as keys.

    Raises:
        KeyError, IndexError, TypeError, ValueError: the references do not fit the value.
    """
    restored = copy.deepcopy(value)
    copies: dict[str, torch.Tensor] = {}
    for reference in references:
        *keys, last = reference["path"]
        inner = restored
        for key in keys:
            inner = inner[key]
        if inner[last] is not None:
            raise ValueError(f"something else stands at {sanitized(reference['path'])}, the place of a reference")
        if "tensor" in reference:
            name = reference["tensor"]
            inner[last] = copies.setdefault(name, tensors[name].clone())
        else:
            inner[last] = float(reference["number"])
    return restored
