"""Converts the state of a cascade to a manifest and tensors (`encode`), and back (`decode`), without any file access.

Checkpoint folders of one or several ranks, state dicts, folds and sums of saved runs all use these two functions.
`decode` checks the content of a file against the plan, and against the cascade that is restored, if there is one. Its
errors do not name the path: call it inside `layout.refusing`. Names of tensors:

| name | content |
|---|---|
| `branch/WEIGHT/FACTOR` | the running branch |
| `expert/WEIGHT/NUMBER/FIELD` | the tensors of an expert that its entry in the manifest names |
| `row_scale/WEIGHT` | the row scale of W0 |
| `dense/WEIGHT/VIEW` | the dense tensor of a view: a delta, or a value. A view without one uses the tensor of `slow` |
| `initial/WEIGHT/b`, `a`, `magnitude` | initial factors and magnitudes |
| `value/NAME` | the current value of a parameter trained in full |
| `gradient/NAME` | a gradient |
| `buffer/NAME` | a buffer, or a parameter that forward writes |
| `base/NAME` | W0 of a parameter trained in full |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from lorasc_fx.branch import Branch, Factors, InitialFactors, Side
from lorasc_fx.cascade.commit import Planned
from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint.layout import sanitized
from lorasc_fx.checkpoint.manifest import EXPERT_FIELDS, VIEWS
from lorasc_fx.errors import CheckpointError
from lorasc_fx.parameters import Holder, buffer_holders, buffer_layout
from lorasc_fx.plan import Plan, Site
from lorasc_fx.shards import UNSHARDED, local, local_like, shard_axis
from lorasc_fx.spec import Noise
from lorasc_fx.state import Expert, KeptNoise, Learner, SlowWeights, View, WeightState
from lorasc_fx.util.undo import Undo

Tensors = dict[str, torch.Tensor]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
OUTSIDE_STATE = ("rng/", "optimizer/", "gradient/", "reference/", "base/")
"""Prefixes of tensors outside of the slow state. `resume`, or the code that builds the base, reads them."""


@dataclass(frozen=True)
class RunState:
    """The part of a cascade's state that a checkpoint stores.

    Args:
        plan: the plan in the running stage.
        slow: the slow state.
        branches: parameters of the running branches, by weight and name.
        values: current values of the parameters trained in full, by name.
        buffers: buffers of the model, and parameters that forward writes, by name.
        layout: names of buffers that are None, and of buffers that share the tensor of another buffer.
    """

    plan: Plan
    slow: SlowWeights
    branches: Mapping[str, Mapping[str, torch.Tensor]]
    values: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    layout: Mapping[str, Any]

    @classmethod
    def of(cls, run: Run) -> RunState:
        """Return the state of a cascade. Its tensors are not copied."""
        parameters = run.parameters_by_name()
        branches = {
            weight: {name: value.detach() for name, value in branch.named_parameters()}
            for weight, branch in run.branches_by_weight().items()
        }
        values = {name: parameters[name].detach() for name in run.slow.trained}
        buffers = {name: value.detach() for name, value in run.model_state().items()}
        return cls(run.plan, run.slow, branches, values, buffers, buffer_layout(run.model))

    def learners(self) -> dict[str, Learner]:
        """Return the learners of the running stage by weight: branches, and values of parameters trained in full."""
        branches: dict[str, Branch] = {}
        for site in self.plan.sites:
            factors = self.branches[site.weight]
            like = next(iter(factors.values())).new_zeros(()).expand(site.shape)
            branches[site.weight] = site.options.method(site, self.plan.spec.seed, self.plan.stage, like)
            for name, value in factors.items():
                setattr(branches[site.weight], name, nn.Parameter(value, False))
        return {**branches, **self.values}

    def placed_like(self, taker: RunState) -> RunState:
        """Return this state with the W0, the shards and the dtypes of another state of the same weights.

        For a parameter trained in full, the W0 of this state is kept if it is known.
        """
        slow, states = taker.slow, {}
        for name, state in self.slow.states.items():
            states[name] = state.to_shard(slow.states[name].shard)
            if not state.full or state.base.is_meta:
                states[name] = replace(states[name], base=slow.states[name].base)
        branches = {
            weight: {name: local_like(value, taker.branches[weight][name]) for name, value in factors.items()}
            for weight, factors in self.branches.items()
        }
        values = {name: local_like(value, taker.values[name]) for name, value in self.values.items()}
        placed = replace(self.slow, states=states, group=slow.group)
        return replace(self, slow=placed, branches=branches, values=values)


def encode(state: RunState) -> tuple[dict[str, Any], Tensors, dict[str, int]]:
    """Return fields of the manifest, copies of this rank's tensors, and the axis of each sharded tensor, by name."""
    slow, spec = state.slow, state.plan.spec
    tensors: Tensors = {}
    axes: dict[str, int | None] = {}
    weights: dict[str, Any] = {}
    for weight, factors in state.branches.items():
        tensors |= {f"branch/{weight}/{name}": value for name, value in factors.items()}
    for weight, weight_state in slow.states.items():
        weights[weight], more = _encoded(weight_state)
        tensors |= {name: value for name, (value, _) in more.items()}
        axes |= {name: weight_state.axis(side) for name, (_, side) in more.items()}
    tensors |= {f"value/{name}": value for name, value in state.values.items()}
    tensors |= {f"buffer/{name}": value for name, value in state.buffers.items()}
    rules = {name: weight_state.rule for name, weight_state in slow.trained.items()}
    trained = {name: None if rule is None else spec.train_rules.index(rule) for name, rule in rules.items()}
    manifest: dict[str, Any] = {"idle": slow.idle, "trained": trained, "slow": weights}
    if spec.keeps_average:
        manifest["averaged"] = slow.averaged
    if spec.needs_loss:
        manifest["losses"] = [[stage, loss] for stage, loss in slow.losses.items()]
    axes = {name: shard_axis(tensor) for name, tensor in tensors.items()} | axes
    copies = {name: local(tensor).clone() for name, tensor in tensors.items()}
    return {**manifest, **state.layout}, copies, {name: axis for name, axis in axes.items() if axis is not None}


def _encoded(state: WeightState) -> tuple[dict[str, Any], dict[str, tuple[torch.Tensor, Side]]]:
    """Return the manifest's entry and the tensors of one weight. Each tensor comes with its side of the weight."""
    name, tensors = state.name, dict[str, tuple[torch.Tensor, Side]]()
    entry: dict[str, Any] = {"experts": [], "gone": state.gone, "noises": [asdict(noise) for noise in state.noises]}
    for number, expert in enumerate(state.experts):
        fields = {key: getattr(expert, key) for key, side in EXPERT_FIELDS.items() if expert.rank or side is Side.OUT}
        fields = {key: value for key, value in fields.items() if value is not None}
        entry["experts"].append({"stage": expert.stage, "tensors": list(fields)})
        tensors |= {f"expert/{name}/{number}/{key}": (value, EXPERT_FIELDS[key]) for key, value in fields.items()}
    views = {key: view for key, view in state.views.items() if key in VIEWS}
    entry |= {key: list(view.coefficients) for key, view in views.items()}
    entry["stage_ends"] = [[stage, list(view.coefficients)] for stage, view in state.ends.items()]
    if state.row_scale is not None:
        tensors[f"row_scale/{name}"] = state.row_scale, Side.OUT
    for key, view in state.views.items():
        if view.dense is not None and (key == "slow" or view.dense is not state.slow.dense):
            tensors[f"dense/{name}/{key}"] = view.dense, Side.WEIGHT
    if state.full:
        tensors[f"base/{name}"] = state.base, Side.WEIGHT
    if state.initial is not None:
        pair, magnitude = state.initial.factors, state.initial.magnitude
        if magnitude is not None:
            tensors[f"initial/{name}/magnitude"] = magnitude, Side.OUT
        if pair is not None:
            tensors |= {f"initial/{name}/b": (pair.b, Side.LEFT), f"initial/{name}/a": (pair.a, Side.RIGHT)}
    return entry, tensors


def decode(
    manifest: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], plan: Plan, taker: RunState | None = None
) -> RunState:
    """Return the state in a checkpoint.

    Args:
        manifest: the manifest, which `manifest.plan_of` has checked.
        tensors: the tensors.
        plan: the plan in the manifest.
        taker: state of the cascade that is restored, with the same weights. The result gets its W0, shards and dtypes.
            Without it, W0 is on the meta device, with the shapes in the plan.

    Raises:
        ValueError, CheckpointError: a tensor is missing, unexpected or not finite, or has another shape or dtype.
    """
    # Check that the manifest, the plan and the spec name the same weights, then read the running branches.
    file = TensorTable(tensors)
    bare = _bare(manifest, tensors, plan, taker)
    entries = manifest["slow"]
    if odd := sorted((entries.keys() ^ {state.name for state in bare}) | (plan.by_weight.keys() - entries.keys())):
        raise ValueError(f"the slow state and the plan disagree about {sanitized(odd[0])}")
    if manifest["trained"].keys() != {state.name for state in bare if state.full}:
        raise ValueError("the parameters that were trained in full differ from the spec")
    finite = plan.spec.on_nonfinite == "raise"  # otherwise, inf and nan are valid: the fold skips such a branch
    branches = {
        site.weight: {
            name: file.take(f"branch/{site.weight}/{name}", shape, finite=finite)
            for name, shape in site.parameter_shapes.items()
        }
        for site in plan.sites
    }
    # Read the slow state of each weight, and the initial factors of the running stage.
    values = {
        state.name: file.take(f"value/{state.name}", state.matrix, state.base.dtype) for state in bare if state.full
    }
    states = {state.name: _decoded(state, entries[state.name], file) for state in bare}
    for site in plan.sites:
        states[site.weight] = replace(
            states[site.weight], initial=_initial(states[site.weight], site, manifest, plan, file)
        )
    losses = dict(manifest.get("losses", ()))
    slow = SlowWeights(states, manifest["idle"], averaged=manifest.get("averaged", 0), losses=losses)
    for name, value in values.items():
        start = slow.started(name).start.dense
        if start is not None and not slow.moved({name: value}):
            # The value only differs by rounding, because the cascade was saved in another dtype.
            values[name] = start
    buffers = {
        name.removeprefix("buffer/"): file.take(name) for name in list(file.unread) if name.startswith("buffer/")
    }
    layout = {key: manifest[key] for key in ("empty_buffers", "shared_buffers") if key in manifest}
    file.check_all_read()
    state = RunState(plan, slow, branches, values, buffers, layout)
    return state if taker is None else state.placed_like(taker)


def _bare(
    manifest: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], plan: Plan, taker: RunState | None
) -> list[WeightState]:
    """Return the states of full weights without experts or values, for the weights of `taker`, otherwise of the plan.

    A parameter trained in full has no shape in the plan. Without `taker`, its shape is the shape of its tensor.
    """
    states, trained = [], manifest["trained"]
    if taker is not None:
        for state in taker.slow.states.values():
            base = torch.empty(state.shard.full_shape(state.base.shape), dtype=state.base.dtype, device="meta")
            states.append(replace(state, shard=UNSHARDED).bare(base))
        return states
    for name in manifest["slow"]:
        if name in trained:
            rule = plan.spec.train_rules[trained[name]] if trained[name] is not None else None
            base = tensors.get(f"value/{name}", torch.empty(()))
            states.append(WeightState(name, base, full=True, rule=rule).bare())
        elif (site := plan.by_weight.get(name)) is not None:
            base = torch.empty(site.shape, device="meta")
            states.append(WeightState(name, base, site.experts is not None, site.layout == "in_out"))
        else:
            states.append(WeightState(name, torch.empty((0,), device="meta")))
    return states


def _decoded(state: WeightState, entry: Mapping[str, Any], file: TensorTable) -> WeightState:
    """Return the slow state of a weight from its entry in the manifest and its tensors."""
    name, experts = state.name, []
    for number, described in enumerate(entry["experts"]):
        *stack, rows, columns = state.matrix  # only matrices have experts
        path = f"expert/{name}/{number}"
        a = file.tensors.get(f"{path}/a") if "a" in described["tensors"] else None
        rank = a.shape[-2] if a is not None and a.dim() > 1 else 0
        shapes = {
            Side.LEFT: (*stack, rows, rank),
            Side.RIGHT: (*stack, rank, columns),
            Side.WEIGHT: state.matrix,
            Side.OUT: (state.out,),
        }
        fields = {key: torch.zeros(shapes[EXPERT_FIELDS[key]]) for key in ("b", "a") if not rank}
        fields |= {
            key: file.take(f"{path}/{key}", shapes[EXPERT_FIELDS[key]], finite=True)
            for key in sorted(described["tensors"])
        }
        experts.append(Expert(**fields, stage=described["stage"]))
    vectors = {view: entry[view] for view in VIEWS if view in entry}
    vectors |= {f"stage/{stage}": numbers for stage, numbers in entry["stage_ends"]}
    kind = state.views["slow"].dense.dtype if state.views["slow"].dense is not None else None
    dense = {
        view: file.take(f"dense/{name}/{view}", state.matrix, kind, finite=not state.full)
        for view in vectors
        if f"dense/{name}/{view}" in file.tensors or (state.full and view == "slow")
    }
    if dense and "slow" not in dense:
        raise ValueError(
            f"has no tensor {sanitized(repr(f'dense/{name}/slow'))}, which the other dense views of this weight need"
        )
    views = {
        view: View(tuple(map(float, numbers)), dense.get(view, dense.get("slow"))) for view, numbers in vectors.items()
    }
    scale = f"row_scale/{name}"
    return replace(
        state,
        base=file.take(f"base/{name}", state.matrix, state.base.dtype) if state.full else state.base,
        experts=tuple(experts),
        views=views,
        gone=entry["gone"],
        row_scale=file.take(scale, (state.out,), finite=True) if scale in file.tensors and not state.full else None,
        noises=tuple(KeptNoise(**{**noise, "noise": Noise(**noise["noise"])}) for noise in entry["noises"]),
    )


def _initial(
    state: WeightState, site: Site, manifest: Mapping[str, Any], plan: Plan, file: TensorTable
) -> InitialFactors | None:
    """Return the factors and magnitudes that the running stage started with. None if it started with B = 0."""
    factors, magnitude, path = None, None, f"initial/{state.name}"
    fields = site.options.method.starts_from(plan.spec, not manifest["idle"])
    if "factors" in fields or (plan.spec.restart_pairs < 1 and f"{path}/b" in file.tensors):
        *stack, rows, columns = state.matrix
        rank = site.factor_shapes[0][-2]
        b = file.take(f"{path}/b", (*stack, rows, rank), finite=True)
        factors = Factors(b.double(), file.take(f"{path}/a", (*stack, rank, columns), finite=True).double())
    if "magnitude" in fields:
        magnitude = file.take(f"{path}/magnitude", (state.out,), finite=True).double()
    return None if factors is None and magnitude is None else InitialFactors(factors, magnitude)


class TensorTable:
    """The tensors of a checkpoint. Checks each tensor that is read, and reports tensors that were not read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.unread = dict.fromkeys(name for name in tensors if not name.startswith(OUTSIDE_STATE))

    def take(
        self, name: str, shape: tuple[int, ...] | None = None, like: torch.dtype | None = None, finite: bool = False
    ) -> torch.Tensor:
        """Return a tensor and mark it as read.

        Args:
            name: name in the file.
            shape: required shape. Without one, any shape and dtype are accepted.
            like: a dtype of the required kind. A floating-point dtype accepts every floating-point dtype, a complex
                dtype accepts every complex dtype, and another dtype accepts only itself. The default is float32.
            finite: whether inf and nan are an error.

        Raises:
            ValueError, CheckpointError: the tensor is missing, or does not meet a requirement.
        """
        tensor, shown = self.tensors.get(name), sanitized(repr(name))
        if tensor is None:
            raise ValueError(f"has no tensor {shown}")
        like = torch.float32 if like is None else like
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{shown} is {tuple(tensor.shape)}, but must be {tuple(shape)}")
        same_kind = tensor.dtype == like or any(tensor.dtype in kind and like in kind for kind in (FLOATS, COMPLEX))
        if shape is not None and not same_kind:
            raise ValueError(f"{shown} is {tensor.dtype}, not {like}")
        if finite and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{shown} holds inf or nan, which save never writes", code="non-finite")
        self.unread.pop(name, None)
        return tensor

    def check_all_read(self) -> None:
        """Raise ValueError if there are tensors that nothing has read."""
        if self.unread:
            raise ValueError(f"has the unexpected tensor {sanitized(repr(next(iter(self.unread))))}")


# ---- restore a cascade from a state


def install(run: Run, state: RunState, undo: Undo) -> None:
    """Restore a decoded state in a cascade with the same sites, as part of a transaction.

    The cascade also gets the plan of the state.

    Raises:
        ValueError, CheckpointError: the buffers do not fit the model. The cascade is unchanged.
    """
    tensors, buffers = _model_state(run, state)

    def write(name: str, out: torch.Tensor) -> None:
        if name in state.values:
            out.copy_(state.values[name])
        else:
            state.slow.write_resting(name, state.plan, out)

    # A rollback can restore untrained parameters from their start, so they need no copy. In `load`, all are untrained.
    parameters = run.parameters_by_name()
    untrained = {
        name: start
        for name in run.slow.trained
        if (start := run.slow.started(name).start.dense) is not None and not run.slow.moved({name: parameters[name]})
    }
    planned = Planned(
        state.plan,
        state.slow,
        run.present(state.slow.states),
        write,
        factors=state.branches,
        tensors=tensors,
        buffers=buffers,
        current=untrained,
    )
    run.commit(planned, undo)


def _model_state(
    run: Run, state: RunState
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[tuple[Holder, torch.Tensor | None]]]:
    """Return the tensors of the model that get new values in place, and the buffers that are replaced.

    Buffers whose shape and ties are unchanged, and parameters that forward writes, are written in place. Any other
    buffer is replaced by the tensor from the file, or by None. Its shape is not checked, because the tensor cannot be
    larger than the file.
    """
    in_place: list[tuple[torch.Tensor, torch.Tensor]] = []
    empty, shared = state.layout.get("empty_buffers", ()), state.layout.get("shared_buffers", {})
    tensors = TensorTable({f"buffer/{name}": value for name, value in state.buffers.items()})
    buffers = buffer_holders(run.model, run.written())
    foreign = next((name for name in (*empty, *shared) if name not in buffers), None)
    if foreign is not None:
        raise ValueError(f"has the buffer {sanitized(repr(foreign))}, but the model has no such buffer")
    names_by_id: dict[int, str] = {}
    groups: dict[str, list[str]] = {}  # names of the buffers that share a tensor, by the tensor's name in the file
    for name, holder in buffers.items():
        first_name = names_by_id.setdefault(id(holder.value), name) if holder.value is not None else name
        source = shared.get(name, name if name in state.buffers else first_name)
        if source in state.buffers:
            groups.setdefault(source, []).append(name)
        elif holder.value is not None and name not in empty:
            tensors.take(f"buffer/{source}")  # raises, because it is missing
    replaced: list[tuple[Holder, torch.Tensor | None]] = [(buffers[name], None) for name in empty]
    for source, names in groups.items():
        value, current = tensors.take(f"buffer/{source}"), buffers[names[0]].value
        holders = [name for name, holder in buffers.items() if holder.value is current]
        if current is not None and value.shape == current.shape and holders == names:
            finite = any(run.started_finite(name, current.shape) for name in names)
            in_place.append((current, tensors.take(f"buffer/{source}", tuple(current.shape), current.dtype, finite)))
        else:
            new = value.to(buffers[names[0]].device, copy=True)
            replaced += [(buffers[name], new) for name in names]
    for name, parameter in run.parameters_by_name().items():
        if name in state.buffers and name not in run.slow.states and name not in buffers:  # forward writes it
            local_value = local(parameter)
            in_place.append((local_value, tensors.take(f"buffer/{name}", tuple(local_value.shape), local_value.dtype)))
    tensors.check_all_read()
    return in_place, replaced


def gradients_in(run: Run) -> tuple[Tensors, list[str]]:
    """Return copies of the gradients by their names in a checkpoint, and the names of parameters with unused gradients.

    So a run that is saved between backward and step, or while it accumulates gradients, loses none.
    """
    trainable = run.trainable()
    tensors = {
        f"gradient/{name}": parameter.grad.detach().clone()
        for name, parameter in trainable.items()
        if parameter.grad is not None
    }
    return tensors, run.pending.waiting(trainable)


def gradients_of(run: Run, manifest: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Planned:
    """Return a commit that restores the gradients of a checkpoint, for a cascade that already has its state.

    Raises:
        CheckpointError: a gradient belongs to no trained parameter, or has another shape or dtype.
    """
    parameters, values = run.trainable(), {}
    for key in (key for key in tensors if key.startswith("gradient/")):
        name, tensor = key.removeprefix("gradient/"), tensors[key]
        parameter = parameters.get(name)
        if parameter is None:
            raise CheckpointError(f"{key!r} belongs to no trained parameter")
        if parameter.shape != tensor.shape or parameter.dtype != tensor.dtype:
            raise CheckpointError(
                f"{key!r} is {tuple(tensor.shape)} {tensor.dtype}, but its parameter is {tuple(parameter.shape)} "
                f"{parameter.dtype}: it is from another run"
            )
        values[name] = tensor
    return Planned(run.plan, run.slow, gradients=values, pending=manifest.get("unapplied_gradients", ()))
