"""The content of a checkpoint, as the dataclass `Content`, and the functions that restore it in a run.

Checkpoint folders of one or several ranks, state dicts, and folds of saved runs all use `Content`. `files.pack`
converts it to JSON and tensors. `util.decode` converts it back, and checks the types of all fields. Because digests
detect damage, values are only checked by `WeightState.faults`, and against the model.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import nn

from lorasc_fx.branch import Branch, InitialFactors, Side, generator
from lorasc_fx.cascade.run import Planned, Run, WeightValues
from lorasc_fx.cascade.training import check_holds, check_numbers
from lorasc_fx.checkpoint.files import Tensors, is_storable, refusing, versions
from lorasc_fx.errors import CheckpointError, warn
from lorasc_fx.parameters import Holder, buffer_holders
from lorasc_fx.plan import Plan
from lorasc_fx.shards import ProcessGroup, dtensor_like, local, shard_axis
from lorasc_fx.state import Expert, History, KeptNoise, Learner, SlowWeights, StageEnd, Summed, WeightState
from lorasc_fx.util.environment import generator_states, set_generator_states
from lorasc_fx.util.fingerprint import fingerprint
from lorasc_fx.util.undo import Undo, commit

T = TypeVar("T")

_OTHER_SHAPES = ("Adafactor", "LBFGS", "SparseAdam")
"""Optimizers of torch whose state tensors differ in shape from the parameter."""


class Stateful(Protocol):
    """An optimizer or scheduler."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> object:
        """Restore a state."""
        ...


def several(scheduler: Stateful | Sequence[Stateful] | None) -> tuple[Stateful, ...]:
    """Return the argument `scheduler` (one scheduler, several, or None) as a tuple."""
    if scheduler is None:
        return ()
    return tuple(scheduler) if isinstance(scheduler, Sequence) else (scheduler,)


@dataclass(frozen=True)
class Owner:
    """The state of an optimizer or scheduler.

    Args:
        kind: name of its class.
        state: its state dict.
        host: `INDEX/NAME` of the optimizer's tensors on the CPU whose parameters were on another device. torch would
            move these tensors in `load_state_dict`.
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
    """Pair optimizers or schedulers with copies of their saved states. Raises CheckpointError if they do not match."""
    if not owners:
        return []
    if not saved:
        raise CheckpointError(
            f"{path}: has no {part} state, because it was saved without one; call resume without it",
            code="not-available",
        )
    kinds, class_names = [owner.kind for owner in saved], [type(owner).__name__ for owner in owners]
    if kinds != class_names:
        raise CheckpointError(
            f"{path}: has the {part} state of {', '.join(kinds)}, but resume was called with "
            f"{', '.join(class_names)}; give the same number of {part}s of these classes, in this order",
            code="optimizer-differs",
        )
    return list(zip(owners, deepcopy(list(saved)), strict=True))


# ---- optimizers and schedulers


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters of an optimizer in the order of their indices in its state dict."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Raise ValueError unless a saved state fits the optimizer. Shard its tensors like the parameters, in place."""
    groups, parameters = optimizer.state_dict()["param_groups"], parameters_of(optimizer)
    if [group["params"] for group in groups] != [group["params"] for group in saved["param_groups"]]:
        raise ValueError("the optimizer has other parameter groups than the saved one")
    for group, new in zip(groups, saved["param_groups"], strict=True):
        # A learning rate may be a tensor on a device.
        new |= {key: new[key].to(value.device) for key, value in group.items() if isinstance(value, torch.Tensor)}
    kind = type(optimizer)
    has_shapes = kind.__module__.startswith("torch.optim.") and kind.__name__ not in _OTHER_SHAPES
    for index, entries in saved["state"].items():
        shape = parameters[index].shape
        for name, value in entries.items():
            if not isinstance(value, torch.Tensor):
                if has_shapes and value is not None:
                    raise ValueError(f"optimizer: {name} of parameter {index} is {value!r:.40}, not a tensor")
                continue
            if has_shapes and value.dim() and value.shape != shape:
                raise ValueError(
                    f"optimizer: {name} of parameter {index} is {tuple(value.shape)}, but the parameter is "
                    f"{tuple(shape)}"
                )
            if value.shape == shape:
                entries[name] = dtensor_like(value, parameters[index])


def keep_as_saved(
    optimizer: torch.optim.Optimizer,
    state: Mapping[int, Any],
    host: Collection[str],
    dtypes: Mapping[nn.Parameter, torch.dtype],
) -> None:
    """Restore the saved dtypes in the state that an optimizer has loaded, and move the `host` tensors to the CPU.

    `Optimizer.load_state_dict` converts each tensor, except `step`, to the dtype and device of the parameter. This is
    right only for a tensor that was saved in the parameter's old dtype (`dtypes`), if the parameter has another one
    now.
    """
    table = optimizer.state
    for index, parameter in enumerate(parameters_of(optimizer)):
        entries, loaded = state.get(index, {}), table.get(parameter, {})
        converted = dtypes.get(parameter) if dtypes.get(parameter) != parameter.dtype else None
        for key in loaded.keys() & entries.keys():
            on_host = key != "step" and f"{index}/{key}" in host
            loaded[key] = _as_saved(loaded[key], entries[key], converted, on_host)


def _as_saved(loaded: object, saved: object, converted: torch.dtype | None, on_host: bool) -> object:
    """Return loaded values in their saved dtypes. Tensors whose saved dtype is `converted` keep the loaded dtype."""
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
    """Return {name of a random generator: its state as bytes}, for all generators that may have been used."""
    others: dict[str, Any] = {"python": random.getstate()}
    if "numpy.random" in sys.modules:  # otherwise nothing was drawn from it
        numpy = sys.modules["numpy.random"]
        if numpy.get_state(legacy=False)["bit_generator"] == "MT19937":  # the default; others have no tuple
            name, key, *gaussian = numpy.get_state()
            others["numpy"] = name, key.tolist(), *gaussian
    texts = {name: json.dumps(state).encode() for name, state in others.items()}
    return generator_states() | {name: torch.tensor(list(text), dtype=torch.uint8) for name, text in texts.items()}


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Restore the states that `random_state` returned. Missing devices and packages are skipped."""
    version, words, gauss = json.loads(bytes(state["python"].tolist()))
    random.setstate((version, tuple(words), gauss))
    if "numpy" in state and "numpy.random" in sys.modules:
        name, words, position, *gaussian = json.loads(bytes(state["numpy"].tolist()))
        if not 0 <= position <= len(words) == 624:
            raise ValueError("rng/numpy has an invalid position")  # numpy would read there without a check
        sys.modules["numpy.random"].set_state((name, words, position, *gaussian))
    set_generator_states(state)


def gathered_random_states(group: ProcessGroup, call: str) -> tuple[Tensors, ...]:
    """Return the `random_state` of each rank, in order. Every rank must call this."""
    if group.is_alone:
        return (random_state(),)
    plain = {name: state.tolist() for name, state in random_state().items()}
    ranks = [json.loads(text) for text in group.gather_text(json.dumps(plain), call)]
    return tuple({name: torch.tensor(state, dtype=torch.uint8) for name, state in rank.items()} for rank in ranks)


def set_rank_random_state(ranks: Sequence[Tensors], group: ProcessGroup, stage: int) -> None:
    """Restore this rank's random state. If the number of ranks has changed, derive one from the first rank."""
    if len(ranks) == group.size:
        set_random_state(ranks[group.rank])
        return
    set_random_state(ranks[0])
    seed = int(torch.randint(2**62, ()).item())
    torch.manual_seed(generator(seed, stage, "rank", f"{group.rank} of {group.size}").initial_seed())


@dataclass(frozen=True)
class Stored:
    """The slow state of a weight, without W0 unless it is trained in full. Its other fields are as in `WeightState`.

    Args:
        base: W0 of a parameter trained in full.
    """

    experts: tuple[Expert, ...] = ()
    dense: dict[Summed, torch.Tensor] = field(default_factory=dict)
    ends: dict[int, torch.Tensor] = field(default_factory=dict)
    gone: int = 0
    row_scale: torch.Tensor | None = None
    noises: tuple[KeptNoise, ...] = ()
    initial: InitialFactors | None = None
    base: torch.Tensor | None = None

    @classmethod
    def of(cls, state: WeightState) -> Self:
        """Return the stored fields of a state. Its tensors are not copied."""
        values = {name: getattr(state, name) for name in _STATE_FIELDS}
        base = state.base if state.full else None
        return cls(**values, base=base)

    def on(self, bare: WeightState, history: History) -> WeightState:
        """Return the state `bare` of a weight, which has no changes, with these changes and this history."""
        values = {name: getattr(self, name) for name in _STATE_FIELDS}
        return replace(bare, **values, history=history)


_STATE_FIELDS = [item.name for item in fields(Stored) if item.name != "base"]


@dataclass(frozen=True)
class Content:
    """Everything that a version stores.

    Args:
        plan: the plan of the running stage, as `Plan.to_json` writes it.
        frontend: the front end that the user has chosen.
        versions: versions of libraries.
        base: fingerprint of each parameter of the base.
        slow: the slow state of each weight.
        branch: {weight name: {name: parameter of the running branch}}.
        value: current values of the parameters trained in full.
        buffer: buffers of the model (tensors or None), and parameters that forward writes.
        changed_buffers: names of the entries of `buffer` that differ from the base.
        idle, history: see `SlowWeights`.
        gradient: gradients of trained parameters.
        pending: names of the gradients that no optimizer step has consumed.
        rng: states of the random generators on each rank (`random_state`).
        optimizers, schedulers: their states.
        extra: values of the user.
    """

    plan: dict[str, Any]
    frontend: str
    versions: dict[str, str]
    base: dict[str, str]
    slow: dict[str, Stored]
    branch: dict[str, Tensors]
    idle: bool
    rng: tuple[Tensors, ...]
    value: Tensors = field(default_factory=dict)
    buffer: dict[str, torch.Tensor | None] = field(default_factory=dict)
    changed_buffers: tuple[str, ...] = ()
    history: tuple[StageEnd, ...] = ()
    gradient: Tensors = field(default_factory=dict)
    pending: tuple[str, ...] = ()
    optimizers: tuple[Owner, ...] = ()
    schedulers: tuple[Owner, ...] = ()
    extra: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        run: Run,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        schedulers: Sequence[Stateful] = (),
        extra: Mapping[str, Any] | None = None,
        rng: tuple[Tensors, ...] | None = None,
    ) -> Self:
        """Return the content of a checkpoint of a run. Its tensors are not copied.

        `rng` is the result of `gathered_random_states`. By default it has only the state of this process.
        """
        state, slow, trainable = RunState.of(run), run.slow, run.trainable()
        return cls(
            plan=json.loads(run.plan.to_json()),
            frontend=run.frontend,
            versions=versions(),
            base=run.fingerprints(),
            slow={name: Stored.of(weight) for name, weight in slow.states.items()},
            branch={weight: dict(factors) for weight, factors in state.branches.items()},
            value=dict(state.values),
            buffer=dict(state.buffers),
            changed_buffers=tuple(run.changed_buffers()),
            idle=slow.idle,
            history=slow.history.ends,
            # A run that is saved before an optimizer step, or while it accumulates gradients, keeps its gradients.
            gradient={name: value.grad.detach() for name, value in trainable.items() if value.grad is not None},
            pending=tuple(run.pending.waiting(trainable)),
            rng=(random_state(),) if rng is None else rng,
            optimizers=tuple(map(Owner.of, optimizers)),
            schedulers=tuple(map(Owner.of, schedulers)),
            extra=dict(extra or {}),
        )

    def axes(self, slow: SlowWeights) -> dict[int, int]:
        """Return {id of a sharded tensor: the axis along which it is sharded}."""
        axes: dict[int, int | None] = {}
        for state in slow.states.values():

            def note(value: torch.Tensor, side: Side, state: WeightState = state) -> torch.Tensor:
                axes[id(value)] = state.axis(side)
                return value

            state.map(note)
        moments = [entries for owner in self.optimizers for entries in owner.state["state"].values()]
        for table in (self.value, self.buffer, self.gradient, *self.branch.values(), *moments):
            axes |= {id(value): shard_axis(value) for value in table.values() if isinstance(value, torch.Tensor)}
        return {key: axis for key, axis in axes.items() if axis is not None}


@dataclass(frozen=True)
class RunState:
    """The part of a run that training changes, without optimizers and generators.

    Args:
        plan, slow: the plan of the running stage, and the slow state.
        branches: {weight name: {name: parameter of the running branch}}.
        values: current values of the parameters trained in full, by name.
        buffers: buffers of the model (tensors or None), and parameters that forward writes, by name.
    """

    plan: Plan
    slow: SlowWeights
    branches: Mapping[str, Mapping[str, torch.Tensor]]
    values: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor | None]

    @classmethod
    def of(cls, run: Run) -> Self:
        """Return the state of a cascade. Its tensors are not copied."""
        parameters = run.parameters_by_name()
        branches = {
            weight: {name: value.detach() for name, value in branch.named_parameters()}
            for weight, branch in run.branches_by_weight().items()
        }
        values = {name: parameters[name].detach() for name in run.slow.trained}
        buffers = {name: holder.value for name, holder in buffer_holders(run.model).items() if is_saved(holder)}
        return cls(run.plan, run.slow, branches, values, {**buffers, **run.written_parameters()})

    def learners(self) -> dict[str, Learner]:
        """Return {weight name: new branch, or value of a parameter trained in full} of the running stage."""
        branches: dict[str, Branch] = {}
        for site in self.plan.sites:
            factors = self.branches[site.weight]
            like = next(iter(factors.values())).new_zeros(()).expand(site.shape)
            branches[site.weight] = site.options.method(site, self.plan.spec.seed, self.plan.stage, like)
            for name, value in factors.items():
                setattr(branches[site.weight], name, nn.Parameter(value, False))
        return {**branches, **self.values}

    def on(self, slow: SlowWeights) -> Self:
        """Return this state with W0 from another state. Parameters trained in full keep their own W0."""
        if odd := sorted(slow.states.keys() ^ self.slow.states.keys()):
            raise ValueError(f"the slow state and the cascade disagree about {odd[0]}")
        states = {
            name: state if state.full else state.on_base(slow.states[name].base)
            for name, state in self.slow.states.items()
        }
        return replace(self, slow=replace(self.slow, states=states))


def is_saved(holder: Holder) -> bool:
    """Return whether a checkpoint stores a buffer.

    A non-persistent buffer that safetensors cannot store is left out, because building the model sets its value.
    """
    is_persistent = holder.leaf not in holder.module._non_persistent_buffers_set
    return holder.value is None or is_persistent or is_storable(holder.value)


# ---- from a file to a state


def decoded(content: Content, plan: Plan) -> RunState:
    """Return the state in a checkpoint. Except for parameters trained in full, W0 is on the meta device.

    Raises:
        ValueError, CheckpointError: weights are missing or unexpected, or the slow state of a weight is invalid.
    """
    history, states = History(content.history), dict[str, WeightState]()
    for name, stored in content.slow.items():
        if stored.base is not None:
            if content.base.get(name, digest := fingerprint(stored.base)) != digest:
                raise ValueError(f"slow/{name}/base differs from its fingerprint")
            bare = WeightState(name, stored.base, full=True).bare()
        elif (site := plan.by_weight.get(name)) is not None:
            base = torch.empty(site.shape, device="meta")
            grid = site.options.grid
            bare = WeightState(name, base, site.stacked, site.layout == "in_out", grid=grid)
        else:  # a weight that only has noise
            bare = WeightState(name, torch.empty((0,), device="meta"))
        states[name] = stored.on(bare, history)
        if faults := states[name].faults():
            code = "non-finite" if "inf or nan" in faults[0] else None
            raise CheckpointError(f"slow/{name} {faults[0]}", code=code)
    slow = SlowWeights(states, content.idle, history=history)
    values = dict(content.value)
    for name, value in content.value.items():
        start = slow.started(name).dense_in("fast")
        if start is not None and not slow.moved({name: value}):
            values[name] = start  # not trained: only a cast has rounded it
    return RunState(plan, slow, content.branch, values, content.buffer)


def check_branches(content: Content, plan: Plan) -> None:
    """Check that branches have the shapes in the plan, so that the plan requests no more memory than the file has."""
    shapes = {(site.weight, name): shape for site in plan.sites for name, shape in site.parameter_shapes.items()}
    tensors = {(weight, name): value for weight, factors in content.branch.items() for name, value in factors.items()}
    if odd := sorted(tensors.keys() ^ shapes.keys()):
        raise ValueError(f"the branches and the plan disagree about branch/{'/'.join(odd[0])}")
    for key, shape in shapes.items():
        value = tensors[key]
        if tuple(value.shape) != shape or not value.is_floating_point():
            raise ValueError(
                f"branch/{'/'.join(key)} is {tuple(value.shape)} {value.dtype}, but must be {shape} floats"
            )


# ---- restore a run


def install(run: Run, state: RunState, undo: Undo) -> None:
    """Restore a decoded state and its plan in a cascade with the same sites, as part of a transaction.

    Raises:
        ValueError, CheckpointError: the buffers do not fit the model. The cascade is unchanged.
    """
    tensors, buffers = _model_state(run, state.buffers)
    # A rollback restores untrained parameters from their start, so they need no copy. In `load`, all are untrained.
    parameters = run.parameters_by_name()
    untrained = {
        name: start
        for name in run.slow.trained
        if (start := run.slow.started(name).dense_in("fast")) is not None
        and not run.slow.moved({name: parameters[name]})
    }
    written = run.present(state.slow.states)
    values = WeightValues(state.slow, None, plan=state.plan, known=state.values)
    planned = Planned(state.plan, state.slow, written, values, factors=state.branches, current=untrained)
    run.commit(replace(planned, tensors=tensors, buffers=buffers), undo)


def _model_state(
    run: Run, saved: Mapping[str, torch.Tensor | None]
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[tuple[Holder, torch.Tensor | None]]]:
    """Return the model's tensors to write in place, as (tensor, value), and the buffers to replace, as (place, value).

    Buffers whose shape and ties are unchanged, and parameters that forward writes, are written in place. Any other
    buffer is replaced by the tensor from the file, or by None. Its shape is not checked, because the tensor cannot be
    larger than the file.
    """
    places, parameters = buffer_holders(run.model, run.written()), run.parameters_by_name()
    written = {
        name: local(value)
        for name, value in parameters.items()
        if name in saved and name not in places and name not in run.slow.states
    }
    if odd := sorted(saved.keys() - places.keys() - written.keys()):
        raise ValueError(f"has the buffer {odd[0]}, but the model has no such buffer")
    needed = [name for name, holder in places.items() if holder.value is not None and is_saved(holder)]
    if missing := [name for name in needed if name not in saved]:
        raise ValueError(f"has no tensor buffer/{missing[0]}")
    in_place, replaced = [], list[tuple[Holder, torch.Tensor | None]]()
    groups: dict[int, tuple[torch.Tensor, list[str]]] = {}  # names of the buffers that share a tensor in the file
    for name, value in saved.items():
        if value is None:
            replaced.append((places[name], None))
        elif name in written:
            in_place.append((written[name], value))
        else:
            groups.setdefault(id(value), (value, []))[1].append(name)
    for value, names in groups.values():
        current = places[names[0]].value
        together = [name for name, holder in places.items() if holder.value is current]
        if (
            current is not None
            and (value.shape, value.is_floating_point()) == (current.shape, current.is_floating_point())
            and sorted(together) == sorted(names)
        ):
            in_place.append((current, value))
        else:
            new = value.to(places[names[0]].device, copy=True)
            replaced += [(places[name], new) for name in names]
    return in_place, replaced


def gradients_of(run: Run, content: Content) -> Planned:
    """Return a commit that restores the gradients of a checkpoint whose state the cascade already has.

    Raises:
        ValueError: a gradient belongs to no trained parameter.
    """
    if odd := sorted(content.gradient.keys() - run.trainable().keys()):
        raise ValueError(f"has the gradient of {odd[0]}, which is not trained")
    if odd := sorted({*content.pending} - content.gradient.keys()):
        raise ValueError(f"has no tensor gradient/{odd[0]}")
    return Planned(run.plan, run.slow, gradients=content.gradient, pending=content.pending)


def resume(
    run: Run,
    path: object,
    content: Content,
    optimizers: Sequence[torch.optim.Optimizer],
    schedulers: Sequence[Stateful],
    group: ProcessGroup,
) -> dict[str, Any]:
    """Restore optimizers, schedulers, gradients and random generators in one transaction, and return `extra`.

    `group` has the ranks that resume. Each rank gets its own state of the random generators.

    Raises:
        CheckpointError: the checkpoint has no state of an optimizer or scheduler, or a state of another class. Nothing
            is changed.
        StateError: an optimizer lacks a trained parameter, or two have the same one.
    """
    # Check everything before anything is changed.
    installed, same_way = versions(), "build optimizer and scheduler the same way"
    changed = [
        f"{name} {then} (now {installed[name]})"
        for name, then in content.versions.items()
        if installed.get(name) != then
    ]
    with_optimizer = matched(path, "optimizer", optimizers, content.optimizers)
    with_scheduler = matched(path, "scheduler", schedulers, content.schedulers)
    if optimizers:
        check_holds(optimizers, run.trainable())
    with refusing(path, same_way, code="optimizer-differs"):
        for optimizer, saved in with_optimizer:
            check_numbers(saved.state, "optimizer")
            check_optimizer(optimizer, saved.state)
    # Restore everything in one transaction: optimizers and schedulers by their own methods, the gradients as a commit
    # of the run, and the random generators, which belong to the process.
    with (
        refusing(path, f"{same_way}, or resume without them", code="optimizer-differs"),
        run.lock,
        commit() as undo,
    ):
        dtypes = _saved_dtypes(run, content)
        for optimizer, saved in with_optimizer:
            for name in ("state", "param_groups"):
                undo(partial(setattr, optimizer, name, getattr(optimizer, name)))
            optimizer.load_state_dict(saved.state)
            keep_as_saved(optimizer, saved.state["state"], saved.host, dtypes)
        if with_optimizer:
            run.commit(gradients_of(run, content), undo)
        for scheduler, saved in with_scheduler:
            undo(partial(scheduler.load_state_dict, deepcopy(current := scheduler.state_dict())))
            if missing := sorted(current.keys() - saved.state.keys()):
                raise ValueError(f"scheduler: {missing[0]} is missing")
            tables = {name: value for name, value in current.items() if isinstance(value, dict)}
            # Restore the types of dicts, such as the Counter of MultiStepLR.
            restored = {name: type(value)(saved.state[name]) for name, value in tables.items() if name in saved.state}
            scheduler.load_state_dict(saved.state | restored)
        undo(partial(set_random_state, random_state()))
        set_rank_random_state(content.rng, group, run.plan.stage)
    if changed:
        warn(
            f"{path}: was written with {', '.join(changed)}. The run can continue, but may not give bit-identical "
            "results",
            "other-versions",
        )
    return deepcopy(content.extra)


def _saved_dtypes(run: Run, content: Content) -> dict[nn.Parameter, torch.dtype]:
    """Return {trained parameter: its dtype when the checkpoint was written}."""
    saved = {
        parameter: content.branch[weight][name]
        for weight, branch in run.branches_by_weight().items()
        for name, parameter in branch.named_parameters()
    }
    saved |= {parameter: content.value[name] for name, parameter in run.present(run.slow.trained).items()}
    return {parameter: tensor.dtype for parameter, tensor in saved.items()}
