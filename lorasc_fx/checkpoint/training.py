"""The state of optimizers, schedulers and random generators in a checkpoint."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, Self, TypeVar

import torch
from torch import nn

from lorasc_fx.branch import generator
from lorasc_fx.cascade.training import check_numbers, stepping
from lorasc_fx.checkpoint.files import sanitized
from lorasc_fx.checkpoint.tree import Tensors
from lorasc_fx.errors import CheckpointError
from lorasc_fx.shards import ProcessGroup, dtensor_like
from lorasc_fx.util.decode import Check, decode
from lorasc_fx.util.environment import generator_states, set_generator_states
from lorasc_fx.util.files import parse_json

T = TypeVar("T")

_OTHER_SHAPES = ("Adafactor", "LBFGS", "SparseAdam")
"""Optimizers of torch whose state has other shapes than the parameter."""

_Words = Annotated[
    tuple[Annotated[int, Check(lambda word: 0 <= word < 2**32, "give a word of 32 bits")], ...],
    Check(lambda words: len(words) in (624, 625), "give 624 words"),
]
_Position = Annotated[int, Check(lambda number: 0 <= number <= 624, "give a position in 624 words")]
_PYTHON = tuple[Annotated[int, Check(lambda version: version == 3, "give version 3")], _Words, float | None]
_NUMPY = tuple[str, _Words, _Position, int, float]
"""States of Mersenne twisters. numpy reads at the position without a check."""


class Stateful(Protocol):
    """An optimizer or scheduler."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> object:
        """Restore a state."""
        ...


def several(scheduler: Stateful | Sequence[Stateful] | None) -> tuple[Stateful, ...]:
    """Return the schedulers of an argument `scheduler`, which is one scheduler, several, or None."""
    if scheduler is None:
        return ()
    return tuple(scheduler) if isinstance(scheduler, Sequence) else (scheduler,)


@dataclass(frozen=True)
class Owner:
    """The state of an optimizer or scheduler.

    Args:
        kind: name of its class.
        state: its state dict.
        host: tensors of an optimizer on the CPU whose parameters were elsewhere, as `INDEX/NAME`. torch would move them
            in `load_state_dict`.
    """

    kind: str
    state: dict[str, Any]
    host: tuple[str, ...] = ()

    @classmethod
    def of(cls, owner: Stateful) -> Self:
        """Return the state of an optimizer or scheduler. Its tensors are not copied."""
        state = owner.state_dict()
        if not isinstance(owner, torch.optim.Optimizer):
            return cls(type(owner).__name__, state)
        parameters = parameters_of(owner)
        host = tuple(
            f"{index}/{name}"
            for index, entries in state["state"].items()
            for name, value in entries.items()
            if isinstance(value, torch.Tensor) and value.device.type == "cpu" != parameters[index].device.type
        )
        return cls(type(owner).__name__, state, host)


def matched(path: object, part: str, owners: Sequence[T], saved: Sequence[Owner]) -> list[tuple[T, Owner]]:
    """Return each optimizer or scheduler (`part`) with a copy of its saved state, which a training may change.

    Raises:
        CheckpointError: the checkpoint has no such state, or the number or the classes differ.
    """
    if not owners:
        return []
    if not saved:
        raise CheckpointError(
            f"{path}: has no {part} state, because it was saved without one; call resume without it",
            code="not-available",
        )
    kinds, given = [owner.kind for owner in saved], [type(owner).__name__ for owner in owners]
    if kinds != given:
        raise CheckpointError(
            f"{path}: has the {part} state of {sanitized(', '.join(kinds), 300)}, but resume was called with "
            f"{', '.join(given)}; give the same number of {part}s of these classes, in this order",
            code="optimizer-differs",
        )
    return list(zip(owners, deepcopy(list(saved)), strict=True))


# ---- optimizers and schedulers


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters of an optimizer in the order of their indices in its state dict."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], finite: bool, complete: bool) -> None:
    """Check that a saved state fits an optimizer, and shard its tensors like the parameters.

    Args:
        optimizer: the optimizer.
        saved: the state. Its tensors are replaced by shards.
        finite: whether nan is an error.
        complete: whether a missing option is an error, because the same version of torch has saved it.

    Raises:
        ValueError: the state does not fit. It does not if the order of the parameters has changed.
    """
    if finite:
        check_numbers(saved, "optimizer")
    groups, parameters = optimizer.state_dict()["param_groups"], parameters_of(optimizer)
    if [group["params"] for group in groups] != [group["params"] for group in saved["param_groups"]]:
        raise ValueError("the optimizer has other parameter groups than the saved one")
    from_torch = type(optimizer).__module__.startswith("torch.optim.")
    for number, (group, new) in enumerate(zip(groups, saved["param_groups"], strict=True)):
        if from_torch:
            check_kinds(f"optimizer.param_groups[{number}]", new, group, optimizer.defaults if complete else ())
        # A learning rate may be a tensor on a device.
        new |= {key: new[key].to(value.device) for key, value in group.items() if isinstance(value, torch.Tensor)}
    has_shapes = from_torch and type(optimizer).__name__ not in _OTHER_SHAPES
    for index, entries in saved["state"].items():
        if index not in range(len(parameters)):
            raise ValueError(f"optimizer.state has the entry {sanitized(index)}, but there is no such parameter")
        shape = parameters[index].shape
        for name, value in entries.items():
            if not isinstance(value, torch.Tensor):
                continue
            if has_shapes and value.dim() and value.shape != shape:
                raise ValueError(
                    f"optimizer: {sanitized(name)} of parameter {index} is {tuple(value.shape)}, but the parameter is "
                    f"{tuple(shape)}"
                )
            if value.shape == shape:
                entries[name] = dtensor_like(value, parameters[index])


def check_scheduler(scheduler: Stateful, saved: dict[str, Any], complete: bool) -> None:
    """Check that a saved state fits a scheduler, and restore the types of its tables (a Counter of MultiStepLR).

    `complete`: see `check_optimizer`.

    Raises:
        ValueError: the state does not fit.
    """
    current = scheduler.state_dict()
    if len(saved.get("base_lrs", ())) != len(current.get("base_lrs", ())):
        raise ValueError("scheduler.base_lrs: the optimizer has other parameter groups than the saved one")
    if type(scheduler).__module__.startswith("torch.optim."):
        check_kinds("scheduler", saved, current, current if complete else ())
    for name, value in saved.items():
        if isinstance(value, dict) and isinstance(current.get(name), dict):
            saved[name] = type(current[name])(value)


def check_kinds(path: str, saved: Any, current: object, needed: Iterable[str] = ()) -> None:
    """Check that saved values are flags, texts, numbers, lists and tables where the current ones are.

    Args:
        path: where the values come from, for messages.
        saved: the saved value. It may be anything where the current one is None.
        current: the current value.
        needed: keys that the saved table must have.

    Raises:
        ValueError: names the first value of another kind. For example, the learning rate is None.
    """
    for kinds in ((dict,), (list, tuple), (bool,), (str,), (int, float, torch.Tensor)):
        if isinstance(current, kinds):
            if not isinstance(saved, kinds) or (bool not in kinds and isinstance(saved, bool)):
                raise ValueError(f"{path} is {sanitized(saved)}, which is not like {sanitized(current)}")
            break
    if isinstance(current, dict):
        for name in needed:
            if name not in saved:
                raise ValueError(f"{path} has no {sanitized(name)}")
        for name in current.keys() & saved.keys():
            check_kinds(f"{path}.{sanitized(name)}", saved[name], current[name])
    elif isinstance(current, (list, tuple)):
        for index, (new, old) in enumerate(zip(saved, current, strict=False)):
            check_kinds(f"{path}[{index}]", new, old)


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
        host: see `Owner`.
        dtypes: dtypes of the parameters when they were saved.
    """
    table = stepping(optimizer).state
    for index, parameter in enumerate(parameters_of(optimizer)):
        entries, loaded = state.get(index, {}), table.get(parameter, {})
        converted = dtypes.get(parameter) if dtypes.get(parameter) != parameter.dtype else None
        for key in loaded.keys() & entries.keys():
            on_host = key != "step" and f"{index}/{key}" in host
            loaded[key] = _as_saved(loaded[key], entries[key], converted, on_host)


def _as_saved(loaded: object, saved: object, converted: torch.dtype | None, on_host: bool) -> object:
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


# ---- random generators


def random_state() -> Tensors:
    """Return the states of all random generators that may have been used, as bytes by the name of the generator."""
    others: dict[str, Any] = {"python": random.getstate()}
    if "numpy.random" in sys.modules:  # otherwise nothing was drawn from it
        numpy = sys.modules["numpy.random"]
        if numpy.get_state(legacy=False)["bit_generator"] == "MT19937":  # the default, and the only one with a tuple
            name, key, *rest = numpy.get_state()
            others["numpy"] = name, key.tolist(), *rest
    texts = {name: json.dumps(state).encode() for name, state in others.items()}
    return generator_states() | {name: torch.tensor(list(text), dtype=torch.uint8) for name, text in texts.items()}


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Restore the states that `random_state` returned. Missing devices and packages are skipped.

    Raises:
        KeyError, RuntimeError, TypeError, ValueError, SpecError: a state is invalid.
    """
    texts = {name: bytes(state[name].tolist()) for name in ("python", "numpy") if name in state}
    python = decode(_PYTHON, parse_json(texts["python"]), ("rng", "python"))
    numpy = decode(_NUMPY, parse_json(texts["numpy"]), ("rng", "numpy")) if "numpy" in texts else None
    random.setstate(python)
    if numpy is not None and "numpy.random" in sys.modules:
        sys.modules["numpy.random"].set_state(numpy)
    set_generator_states(state)


def gathered_random_states(group: ProcessGroup, call: str) -> tuple[Tensors, ...]:
    """Return the `random_state` of each rank. Every rank must call this."""
    if group.is_alone:
        return (random_state(),)
    plain = {name: state.tolist() for name, state in random_state().items()}
    ranks = [json.loads(text) for text in group.gather_text(json.dumps(plain), call)]
    return tuple({name: torch.tensor(state, dtype=torch.uint8) for name, state in rank.items()} for rank in ranks)


def set_rank_random_state(ranks: Sequence[Tensors], group: ProcessGroup, stage: int) -> None:
    """Restore the random state of this rank from the states of all ranks that wrote a checkpoint.

    If the number of ranks has changed, each rank gets a new state. It is derived from the first rank's state, the rank
    and the number of ranks.
    """
    if len(ranks) == group.size:
        set_random_state(ranks[group.rank])
        return
    set_random_state(ranks[0])
    seed = int(torch.randint(2**62, ()).item())
    torch.manual_seed(generator(seed, stage, "rank", f"{group.rank} of {group.size}").initial_seed())
