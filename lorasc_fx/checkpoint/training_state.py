"""Saves and restores the training state in a checkpoint: optimizer, scheduler, random generators and `extra`.

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
from functools import partial
from typing import Any

import torch
from torch import nn

from lorasc_fx.branch import generator
from lorasc_fx.cascade.optim import check_holds, check_numbers, stepping
from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint.codec import gradients_of
from lorasc_fx.checkpoint.layout import DTYPES, refusing, sanitized, versions
from lorasc_fx.checkpoint.manifest import Generators
from lorasc_fx.checkpoint.reader import Checkpoint
from lorasc_fx.errors import CheckpointError, warn
from lorasc_fx.shards import ProcessGroup, dtensor_like
from lorasc_fx.util.accelerator import generator_states, set_generator_states
from lorasc_fx.util.decode import decode
from lorasc_fx.util.files import parse_json
from lorasc_fx.util.undo import commit

RANKS = "lorasc_fx.ranks"
"""Key in the `extra` of a checkpoint of several ranks. Its value is the random generators of each rank, as bytes."""

_OTHER_SHAPES = ("Adafactor", "LBFGS", "SparseAdam")
"""Optimizers of torch whose state has other shapes than the parameter."""


def resume(
    run: Run,
    checkpoint: Checkpoint,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    group: ProcessGroup,
) -> dict[str, Any]:
    """Restore optimizer, scheduler, gradients and random generators in one transaction, and return `extra`.

    `group` has the ranks that resume. Each rank gets separate random generators.

    Raises:
        CheckpointError: the checkpoint has no state of an optimizer or scheduler, or it is from another class. Nothing
            is changed.
        StateError: the optimizer does not have the branches' parameters.
    """
    where, tensors = checkpoint.path, checkpoint.tensors
    with checkpoint.refusing():
        manifest = _with_tensors(checkpoint)
    # Check everything before anything is changed.
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
                f"{where}: has the state of a {sanitized(kind)}, but this {part} is a {type(owner).__name__}; give a "
                f"{part} of the saved class",
                code="optimizer-differs",
            )
    if optimizer is not None:
        check_holds([optimizer], run.trainable())
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
                raise ValueError("scheduler.base_lrs: the optimizer has other parameter groups than the saved one")
            scheduler_state = like(current_state, saved_state)
    extra: dict[str, Any] = manifest["extra"]
    ranks = extra.pop(RANKS, None)
    # Restore everything in one transaction: the optimizer and the scheduler by their own methods, the gradients as a
    # commit of the run, and the random generators, which belong to the process.
    with (
        refusing(where, f"{same_way}, or resume without them", code="optimizer-differs", also=(RuntimeError,)),
        run.lock,
        commit() as undo,
    ):
        if optimizer is not None:
            for holder in (optimizer, stepping(optimizer)):
                for name in ("state", "param_groups"):
                    undo(partial(setattr, holder, name, getattr(holder, name)))
            optimizer.load_state_dict(optimizer_state)
            host = manifest["optimizer"].get("host", ())
            # Find the dtype that each trained parameter had when the checkpoint was written.
            saved_as = {
                parameter: tensors.get(f"branch/{weight}/{name}")
                for weight, branch in run.branches_by_weight().items()
                for name, parameter in branch.named_parameters()
            }
            saved_as |= {value: tensors.get(f"value/{name}") for name, value in run.present(run.slow.trained).items()}
            dtypes = {parameter: tensor.dtype for parameter, tensor in saved_as.items() if tensor is not None}
            keep_as_saved(optimizer, optimizer_state["state"], host, dtypes)
            run.commit(gradients_of(run, manifest, tensors), undo)
        if scheduler is not None:
            undo(partial(scheduler.load_state_dict, deepcopy(scheduler.state_dict())))
            scheduler.load_state_dict(scheduler_state)
        undo(partial(set_random_state, *random_state()))
        set_random_state(tensors, manifest["rng"])
        set_rank_random_state(ranks, group, run.plan.stage)
    changed = [
        f"{name} {saved[name]} (now {current})"
        for name, current in versions().items()
        if saved.get(name, current) != current
    ]
    if changed:
        names = sanitized(", ".join(changed), 300)
        warn(
            f"{where}: was written with {names}. The run can continue, but may not give bit-identical results",
            "other-versions",
        )
    return extra


def _with_tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the manifest with its references replaced by tensors and numbers."""
    manifest = checkpoint.manifest
    parts = {key: manifest[key] for key in ("optimizer", "scheduler", "extra") if key in manifest}
    references = manifest.get("tensor_references", ())
    parts = insert_tensors(parts, references, checkpoint.tensors)
    used = {reference.get("tensor") for reference in references}
    odd = next((name for name in checkpoint.tensors if name.startswith("reference/") and name not in used), None)
    if odd is not None:
        raise ValueError(f"has the unexpected tensor {sanitized(repr(odd))}")
    return {**manifest, **parts}


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the state of an optimizer as tensors and JSON.

    The JSON lists the tensors on the CPU whose parameters are on another device, because torch would move them there in
    `load_state_dict`.
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
    """Return the parameters of an optimizer in the order of their indices in its state dict."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state_for(
    optimizer: torch.optim.Optimizer, meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Return the optimizer's state dict from a checkpoint. It must have the same parameters and groups."""
    current_groups, saved_groups = optimizer.state_dict()["param_groups"], meta["groups"]
    if [group["params"] for group in current_groups] != [group["params"] for group in saved_groups]:
        raise ValueError("the optimizer has other parameter groups than the saved one")
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in meta["numbers"].items()}
    parameters = _parameters(optimizer)
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            index, _, key = name.removeprefix("optimizer/").partition("/")
            if not index.isdecimal() or len(index) > 9 or int(index) >= len(parameters) or not key:
                raise ValueError(f"{sanitized(name)} does not belong to one of the {len(parameters)} parameters")
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
    """Restore the saved dtypes of the tensors in an optimizer's state, and move tensors back to the CPU.

    `Optimizer.load_state_dict` converts each tensor, except `step`, to the dtype and device of the parameter. This is
    right only if the tensor was saved in the dtype of its parameter, and the parameter now has another dtype.

    Args:
        optimizer: the optimizer, after it has loaded the state.
        state: the saved state, by the index of the parameter.
        host: names of tensors that were on the CPU while their parameters were not (`optimizer_state`).
        dtypes: dtypes of the parameters when they were saved.
    """
    table = stepping(optimizer).state
    for index, parameter in enumerate(_parameters(optimizer)):
        entries, loaded = state.get(index, {}), table.get(parameter, {})
        saved_dtype = dtypes.get(parameter)
        converted = saved_dtype if saved_dtype != parameter.dtype else None
        for key in loaded.keys() & entries.keys():
            on_host = key != "step" and f"{index}/{key}" in host
            loaded[key] = _as_saved(loaded[key], entries[key], converted, on_host)


def _as_saved(loaded: Any, saved: Any, converted: torch.dtype | None, on_host: bool) -> Any:
    """Return loaded values in their saved dtypes. Tensors with the saved dtype `converted` keep their new dtype."""
    if isinstance(loaded, torch.Tensor) and isinstance(saved, torch.Tensor) and loaded.shape == saved.shape:
        dtype = loaded.dtype if saved.dtype == converted else saved.dtype
        device = torch.device("cpu") if on_host else loaded.device
        return loaded if (loaded.dtype, loaded.device) == (dtype, device) else saved.to(device, dtype)
    if isinstance(loaded, dict) and isinstance(saved, Mapping):
        common = loaded.keys() & saved.keys()
        return loaded | {key: _as_saved(loaded[key], saved[key], converted, on_host) for key in common}
    if isinstance(loaded, list) and isinstance(saved, list) and len(loaded) == len(saved):
        return [_as_saved(item, saved_item, converted, on_host) for item, saved_item in zip(loaded, saved, strict=True)]
    return loaded


def _check_shapes(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Check that each tensor of a state has the shape of its parameter. It does not if the order has changed."""
    if not type(optimizer).__module__.startswith("torch.optim.") or type(optimizer).__name__ in _OTHER_SHAPES:
        return  # the layout of another optimizer's state is unknown
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in state.get(index, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"optimizer: {sanitized(name)} of parameter {index} is {tuple(value.shape)}, but the parameter is "
                    f"{tuple(parameter.shape)}"
                )


def like(current: Any, saved: Any) -> Any:
    """Return a value from JSON with the types of the current value. This restores tuples and integer keys."""
    if isinstance(current, dict) and isinstance(saved, dict):
        numbered = bool(current) and all(type(key) is int for key in current)
        keyed = {int(key) if numbered else key: value for key, value in saved.items()}
        return type(current)({key: like(current.get(key), value) for key, value in keyed.items()})
    if isinstance(current, (list, tuple)) and isinstance(saved, list):
        padded = [*current, *[None] * len(saved)]
        return type(current)(like(item, value) for item, value in zip(padded, saved, strict=False))
    return saved.to(current.device) if isinstance(current, torch.Tensor) and isinstance(saved, torch.Tensor) else saved


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the states of all random generators that may have been used, as tensors and JSON."""
    tensors = generator_states()
    meta: dict[str, Any] = {"python": random.getstate()}
    if "numpy.random" in sys.modules:  # otherwise nothing was drawn from it
        state = sys.modules["numpy.random"].get_state(legacy=False)
        if state["bit_generator"] == "MT19937":  # the default of numpy, and the only one that a manifest can store
            meta["numpy"] = {**state, "state": {**state["state"], "key": state["state"]["key"].tolist()}}
    return tensors, meta


def set_random_state(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Restore the states that `random_state` returned. Missing devices and packages are skipped.

    Raises:
        IndexError, KeyError, RuntimeError, TypeError, ValueError: a state is invalid.
    """
    version, words, gauss = meta["python"]
    random.setstate((version, tuple(words), gauss))
    if "numpy" in meta and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(meta["numpy"])
    set_generator_states(tensors)


def random_bytes() -> torch.Tensor:
    """Return the states of `random_state` as one tensor of bytes."""
    tensors, meta = random_state()
    lists = {name: state.tolist() for name, state in tensors.items()}
    return torch.tensor(list(json.dumps({"tensors": lists, "meta": meta}).encode()), dtype=torch.uint8)


def set_rank_random_state(ranks: Sequence[torch.Tensor] | None, group: ProcessGroup, stage: int) -> None:
    """Restore the random state of this rank, after `set_random_state` with the state of the first rank.

    If the number of ranks has changed, each rank gets a new state. It is derived from the first rank's state, the rank
    and the number of ranks.

    Args:
        ranks: `random_bytes` of each rank that saved the checkpoint. None if one process saved it.
        group: the ranks that resume.
        stage: the running stage.

    Raises:
        AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError: a state is invalid.
    """
    if (1 if ranks is None else len(ranks)) != group.size:
        seed = int(torch.randint(2**62, ()).item())
        torch.manual_seed(generator(seed, stage, "rank", f"{group.rank} of {group.size}").initial_seed())
    elif ranks is not None:
        saved = parse_json(bytes(ranks[group.rank].tolist()))
        tensors = {name: torch.tensor(state, dtype=torch.uint8) for name, state in saved["tensors"].items()}
        set_random_state(tensors, decode(Generators, saved["meta"]))


def is_storable(tensor: torch.Tensor) -> bool:
    """Return whether safetensors can store this tensor without conversion."""
    is_plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    return is_plain and tensor.dtype in DTYPES.values()


def extract_tensors(value: Any) -> tuple[Any, list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Replace tensors, inf and nan in nested dicts and lists by None, so that JSON can store the value.

    Returns:
        The value; a reference for each None, with its path and the name of the tensor or the number; and the tensors by
        name. A tensor that occurs several times is returned once.

    Raises:
        ValueError: a container contains itself.
    """
    references: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}

    def plain(value: Any, path: tuple[str | int, ...], parents: tuple[int, ...]) -> Any:
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
        if id(value) in parents:
            raise ValueError("Circular reference detected")
        parents = (*parents, id(value))
        if isinstance(value, Mapping):
            texts = {
                key: key if isinstance(key, str) else json.dumps(key) for key in value
            }  # JSON converts keys to text
            return {key: plain(inner, (*path, texts[key]), parents) for key, inner in value.items()}
        return [plain(inner, (*path, index), parents) for index, inner in enumerate(value)]

    return plain(value, (), ()), references, tensors


def insert_tensors(value: Any, references: Sequence[Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]) -> Any:
    """Insert tensors and numbers at their references: the inverse of `extract_tensors`, except for types lost in JSON.

    JSON turns tuples into lists, and keys into strings.

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
            raise ValueError(f"a reference replaces null, but there is another value at {sanitized(reference['path'])}")
        if "tensor" in reference:
            name = reference["tensor"]
            inner[last] = copies.setdefault(name, tensors[name].clone())
        else:
            inner[last] = float(reference["number"])
    return restored
