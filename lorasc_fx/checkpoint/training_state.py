"""What a checkpoint holds besides the cascade: the state of optimizer, scheduler and random generators, and `extra`.

Written as JSON with tensor references, and given back by `resume`, all of it or none. Both `load_state_dict` of torch
take what they get: a scheduler's puts it into its `__dict__`, where a name of a method would stand before the method.
So a saved value is taken only where a value of its kind stands now.
"""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lorasc_fx.branch import generator
from lorasc_fx.cascade.optim import check_holds, check_numbers, stepping
from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint.gradients import gradients_of
from lorasc_fx.checkpoint.layout import differences, sanitized
from lorasc_fx.checkpoint.manifest import optimizer_index
from lorasc_fx.checkpoint.reader import Checkpoint
from lorasc_fx.errors import CheckpointError, warn
from lorasc_fx.shards import ONE_PROCESS, ProcessGroup, dtensor_like
from lorasc_fx.util.accelerator import generator_states, set_generator_states
from lorasc_fx.util.checks import is_number
from lorasc_fx.util.files import parse_json
from lorasc_fx.util.undo import commit

RANKS = "lorasc_fx.ranks"
"""Key in the extra of a checkpoint that several ranks wrote: the random generators of each rank, as bytes."""

_ODD = ("Adafactor", "LBFGS", "SparseAdam")
"""Optimizers of torch whose state has other shapes than the parameter's."""


def resume(
    run: Run,
    checkpoint: Checkpoint,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    group: ProcessGroup = ONE_PROCESS,
) -> dict[str, Any]:
    """Give optimizer, scheduler, pending gradients and random generators their state back, and return `extra`.

    The group is that of the ranks that go on, for their random generators.

    Raises:
        CheckpointError: the checkpoint holds no such state, or that of another optimizer or scheduler. All are as they
            were.
        StateError: the optimizer does not hold the branches.
    """
    where = str(checkpoint.path)
    manifest = with_tensors(checkpoint, where)
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
                f"{where}: holds the state of {sanitized(saved)}, the {what} is {type(given).__name__}; "
                "give one of the kind that was saved",
                code="optimizer-differs",
            )
    if optimizer is not None:
        check_holds(optimizer, run.trainable())
    try:
        state, then = None, None
        if optimizer is not None:
            state = _state_for(optimizer, manifest["optimizer"], checkpoint.tensors, where)
            check_numbers(state, "optimizer", finite=run.plan.spec.on_nonfinite == "raise")
        if scheduler is not None:
            then = like(scheduler.state_dict(), manifest["scheduler"]["state"], "scheduler")
            check_numbers(then, "scheduler")
    except (ValueError, RecursionError) as fault:
        raise CheckpointError(
            f"{where}: {sanitized(str(fault), 300)}; build optimizer and scheduler the same way",
            code="optimizer-differs",
        ) from fault
    extra: dict[str, Any] = manifest["extra"]
    ranks = extra.pop(RANKS, None)
    try:
        _give(run, checkpoint, optimizer, state, scheduler, then, partial(set_rank_random_state, ranks, group))
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as fault:
        raise CheckpointError(
            f"{where}: its state was not taken: {sanitized(str(fault), 300)}; build optimizer and scheduler the same "
            "way, or go on without them",
            code="optimizer-differs",
        ) from fault
    if changed := differences(manifest.get("versions")):
        names = sanitized(", ".join(changed), 300)
        warn(f"{where}: written under {names}; the run goes on, but perhaps not bit for bit", "other-versions")
    return extra


def with_tensors(checkpoint: Checkpoint, where: str) -> dict[str, Any]:
    """Return the manifest with the tensors and numbers that JSON does not hold in their places, each used."""
    manifest = checkpoint.manifest
    parts = {key: manifest[key] for key in ("optimizer", "scheduler", "extra") if key in manifest}
    references = manifest.get("tensor_references", ())
    try:
        whole = insert_tensors(parts, references, checkpoint.tensors)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as fault:
        what = f"{type(fault).__name__}: {sanitized(str(fault))}"
        raise CheckpointError(f"{where}: tensors and numbers outside of JSON have no place in it: {what}") from fault
    used = {reference.get("tensor") for reference in references}
    odd = next((name for name in checkpoint.tensors if name.startswith("reference/") and name not in used), None)
    if odd is not None:
        raise CheckpointError(f"{where}: holds {sanitized(repr(odd))}, which has no place in it")
    return {**manifest, **whole}


def _give(
    run: Run,
    checkpoint: Checkpoint,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any] | None,
    scheduler: Any,
    then: Any,
    set_rank: Callable[[int], None],
) -> None:
    """Write what was checked, all or nothing.

    Optimizer and scheduler take their state by their own methods, and the generators belong to the process: what is the
    run's is one commit, and the others are steps of the same block.
    """
    manifest, tensors = checkpoint.manifest, checkpoint.tensors
    with run.lock, commit() as undo:
        if optimizer is not None and state is not None:
            for holder in (optimizer, stepping(optimizer)):
                for name in ("state", "param_groups"):
                    undo(partial(setattr, holder, name, getattr(holder, name)))
            optimizer.load_state_dict(state)
            host = manifest["optimizer"].get("host", ())
            keep_as_saved(optimizer, state["state"], host, _saved_dtypes(run, checkpoint))
            run.commit(replace(gradients_of(run, checkpoint), optimizer=optimizer), undo)
        if scheduler is not None:
            undo(partial(scheduler.load_state_dict, deepcopy(scheduler.state_dict())))
            scheduler.load_state_dict(then)
        undo(partial(set_random_state, *random_state()))
        set_random_state(tensors, manifest["rng"])
        set_rank(run.plan.stage)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return an optimizer's state as tensors and JSON, which names the tensors that are on the host beside parameters
    that are not: torch moves these when it loads them.
    """
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
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


def _state_for(
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
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameters[index].shape:
                entries[key] = dtensor_like(value, parameters[index])
    groups = [_group(group, old, optimizer.defaults) for group, old in zip(now, then, strict=True)]
    return {"state": state, "param_groups": groups}


def _saved_dtypes(run: Run, checkpoint: Checkpoint) -> dict[nn.Parameter, torch.dtype]:
    """Return the dtype that each trained parameter had when the checkpoint was written."""
    saved = {
        parameter: checkpoint.tensors.get(f"branch/{weight}/{name}")
        for weight, branch in run.branches_by_weight().items()
        for name, parameter in branch.named_parameters()
    }
    saved |= {
        parameter: checkpoint.tensors.get(f"value/{name}") for name, parameter in run.trained_parameters().items()
    }
    return {parameter: tensor.dtype for parameter, tensor in saved.items() if tensor is not None}


def keep_as_saved(
    optimizer: torch.optim.Optimizer,
    state: Mapping[int, Any],
    host: Collection[str],
    dtypes: Mapping[nn.Parameter, torch.dtype],
) -> None:
    """Give the tensors of an optimizer's state their saved dtypes, and keep on the host what was there.

    `Optimizer.load_state_dict` moves all of them except `step` to the dtype and the device of the parameter. The dtype
    is right only for a moment in the dtype of its parameter, if the parameter has another one now.

    Args:
        optimizer: has loaded the state.
        state: as it was saved, by the index of the parameter.
        host: names of tensors that were on the host, and their parameters were not (`optimizer_state`).
        dtypes: of the parameters when they were saved.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    table = stepping(optimizer).state
    for index, entries in state.items():
        parameter = parameters[index]
        before = dtypes.get(parameter)
        follows = before if before != parameter.dtype else None
        loaded = table.get(parameter, {})
        for key in loaded.keys() & entries.keys():
            on_host = key != "step" and f"{index}/{key}" in host
            loaded[key] = _as_saved(loaded[key], entries[key], follows, on_host)


def _as_saved(loaded: Any, saved: Any, follows: torch.dtype | None, on_host: bool) -> Any:
    """Return what was loaded in its saved dtypes, except tensors of the dtype `follows`, which stay."""
    if isinstance(loaded, torch.Tensor) and isinstance(saved, torch.Tensor) and loaded.shape == saved.shape:
        dtype = loaded.dtype if saved.dtype == follows else saved.dtype
        device = torch.device("cpu") if on_host else loaded.device
        return loaded if (loaded.dtype, loaded.device) == (dtype, device) else saved.to(device, dtype)
    if isinstance(loaded, dict) and isinstance(saved, Mapping):
        known = loaded.keys() & saved.keys()
        return loaded | {key: _as_saved(loaded[key], saved[key], follows, on_host) for key in known}
    if isinstance(loaded, list) and isinstance(saved, list) and len(loaded) == len(saved):
        return [_as_saved(one, other, follows, on_host) for one, other in zip(loaded, saved, strict=True)]
    return loaded


def _check_state(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Refuse a state that parameters of one group have in part, or that has another shape than the parameter."""
    if not type(optimizer).__module__.startswith("torch.optim.") or type(optimizer).__name__ in _ODD:
        return  # the layout of another optimizer's state is unknown
    index = 0
    for group in optimizer.param_groups:
        names: set[str] | None = None
        for parameter in group["params"]:
            entries = state.get(index)
            if entries is not None:
                names = set(entries) if names is None else names
                if set(entries) != names:
                    odd = sorted(set(entries) ^ names)[0]
                    raise ValueError(
                        f"optimizer: {sanitized(odd)} is there for some parameters of a group, not for {index}"
                    )
                for name, value in entries.items():
                    if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                        raise ValueError(
                            f"optimizer: {sanitized(name)} of parameter {index} is {tuple(value.shape)}, the parameter "
                            f"{tuple(parameter.shape)}"
                        )
                    if isinstance(value, (dict, list, str)):
                        raise ValueError(f"optimizer: {sanitized(name)} of parameter {index} is no number")
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
            raise ValueError(f"optimizer: a group has {sanitized(repr(key))}, which this one has not")
    return taken | more


def like(now: Any, then: Any, path: str) -> Any:
    """Return a value from JSON with the types of the present one: tuples and integer keys again.

    Raises:
        ValueError: it is of another kind, or has other keys; names the path.
    """
    if isinstance(now, dict):
        return _like_table(now, then, path)
    if isinstance(now, (list, tuple)):
        return _like_list(now, then, path)
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
        raise ValueError(f"{path} is {sanitized(repr(then))}, where {type(now).__name__} is expected")
    return then


def _like_table(now: dict[Any, Any], then: Any, path: str) -> Any:
    if not isinstance(then, dict):
        raise ValueError(f"{path} is {type(then).__name__}, not a table")
    counted = bool(now) and all(type(key) is int for key in now)
    if counted:
        keys = {name: int(name) for name in then}
        sample = next(iter(now.values()))
        return type(now)({key: like(now.get(key, sample), then[name], f"{path}[{key}]") for name, key in keys.items()})
    odd = sorted(set(then) ^ set(now)) if now else [name for name in then if name.startswith("_")]
    if odd:
        there = "has" if odd[0] in then else "has no"
        raise ValueError(f"{path} {there} {sanitized(repr(odd[0]))}, unlike the one that is to take it")
    return type(now)({name: like(now.get(name), value, f"{path}.{sanitized(name)}") for name, value in then.items()})


def _like_list(now: list[Any] | tuple[Any, ...], then: Any, path: str) -> Any:
    if not isinstance(then, list):
        raise ValueError(f"{path} is {type(then).__name__}, not a list")
    fixed = isinstance(now, tuple) or path.endswith(("lr", "lrs", "momentums")) or any(map(_nested, now))
    if fixed and len(now) != len(then):
        raise ValueError(f"{path} has {len(then)} entries, {len(now)} are expected")
    samples = now if fixed else [now[0] if now else None] * len(then)
    taken = [
        like(sample, value, f"{path}[{index}]") for index, (sample, value) in enumerate(zip(samples, then, strict=True))
    ]
    return tuple(taken) if isinstance(now, tuple) else taken


def _number(value: Any) -> bool:
    """Whether a value is a number; inf and nan are some where a note beside the JSON has put them."""
    return isinstance(value, float) or is_number(value)


def _nested(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple))


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return their states as tensors and JSON: of those that have been used, or may have been."""
    tensors = generator_states()
    meta: dict[str, Any] = {"python": random.getstate()}
    if "numpy.random" in sys.modules:  # until it is imported, nothing was drawn
        meta["numpy"] = _as_lists(sys.modules["numpy.random"].get_state(legacy=False))
    return tensors, meta


def set_random_state(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Give them back the states that `random_state` returned; devices and packages that are not here are left out.

    Raises:
        IndexError, KeyError, RuntimeError, TypeError, ValueError: a state is none of this generator's.
    """
    version, words, gauss = meta["python"]
    random.setstate((version, tuple(words), gauss))
    if "numpy" in meta and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(meta["numpy"])
    set_generator_states(tensors)


def random_bytes() -> torch.Tensor:
    """Return what `random_state` returns in one tensor of bytes."""
    tensors, meta = random_state()
    lists = {name: state.tolist() for name, state in tensors.items()}
    return torch.tensor(list(json.dumps({"tensors": lists, "meta": meta}).encode()), dtype=torch.uint8)


def set_rank_random_state(ranks: Sequence[torch.Tensor] | None, group: ProcessGroup, stage: int) -> None:
    """After `set_random_state` of the first rank: give each rank its own state back, or on another number of ranks a
    new one, which is a function of the first rank's state, the rank and the number.

    Args:
        ranks: `random_bytes` of each rank that saved; None where one process did.
        group: of the ranks that go on.
        stage: the running one.

    Raises:
        AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError: a state is none of a generator's.
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


@dataclass(frozen=True)
class Extracted:
    """The value without them; a reference for each; the tensors, by the names that the references give."""

    value: Any
    references: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def is_storable(tensor: torch.Tensor) -> bool:
    """Whether safetensors holds such a tensor, and gives back the same."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.dtype in _HELD


def kind_of(tensor: torch.Tensor) -> str:
    """Return, for messages, what kind of tensor this is."""
    return f"a {type(tensor).__name__} of {str(tensor.dtype).removeprefix('torch.')}, {tensor.layout}"


def extract_tensors(value: Any) -> Extracted:
    """Return a value of dicts and lists without tensors, inf and nan. A tensor that stands twice is kept once.

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

    return Extracted(plain(value, (), ()), references, tensors)


def insert_tensors(value: Any, references: Sequence[Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return what `extract_tensors` was given, with lists for tuples and strings for keys, as JSON has them.

    Raises:
        KeyError, IndexError, TypeError, ValueError: the references are not of this value.
    """
    whole = copy.deepcopy(value)
    made: dict[str, torch.Tensor] = {}
    for reference in references:
        *keys, last = reference["path"]
        inner = whole
        for key in keys:
            inner = inner[key]
        if inner[last] is not None:
            raise ValueError(f"the place {reference['path']} is taken")
        if "tensor" in reference:
            name = reference["tensor"]
            inner[last] = made.setdefault(name, tensors[name].clone())
        else:
            inner[last] = float(reference["number"])
    return whole
