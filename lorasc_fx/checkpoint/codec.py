"""The state of a cascade as a manifest and tensors, and back: `encode` and `decode`, on values alone.

A folder that one rank writes or several, a flat state dict, a fold or a sum from a run's folder read and write bytes
around these two. What a file says is checked in `decode`, against the plan, and against the cascade that takes it
where there is one. Names of tensors:

| name | what |
|---|---|
| `branch/WEIGHT/FACTOR` | the running branch |
| `expert/WEIGHT/NUMBER/FIELD` | an expert: its fields that hold numbers, which "experts" names |
| `row_scale/WEIGHT` | the row scale of W0 |
| `dense/WEIGHT/VIEW` | the dense tensor of a view: a delta, or a value. A view without one has that of `slow` |
| `initial/WEIGHT/b`, `a`, `magnitude` | initial factors and magnitudes |
| `value/NAME` | a parameter trained in full, as it is |
| `buffer/NAME` | a buffer, or a parameter that forward writes |
| `base/NAME` | W0 of a parameter trained in full; if the base is named, also of what its files do not have |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from lorasc_fx.branch import Branch, branch_class
from lorasc_fx.cascade.commit import Planned
from lorasc_fx.cascade.run import Run
from lorasc_fx.checkpoint.layout import sanitized
from lorasc_fx.checkpoint.manifest import EXPERT_FIELDS, VIEWS
from lorasc_fx.errors import CheckpointError
from lorasc_fx.parameters import Holder, buffer_holders, buffer_layout
from lorasc_fx.plan import Plan, Site
from lorasc_fx.shards import WHOLE, local, local_like, shard_axis
from lorasc_fx.spec import Noise
from lorasc_fx.state import Expert, Factors, InitialFactors, KeptNoise, Learner, Side, SlowWeights, View, WeightState
from lorasc_fx.util.undo import Undo

Tensors = dict[str, torch.Tensor]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
ELSEWHERE = ("rng/", "optimizer/", "gradient/", "reference/", "base/")
"""Tensors that a resume takes, or who builds the base, and no slow state."""


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds of a cascade, for the plan of its running stage.

    Args:
        plan: of the running stage.
        slow: the slow state.
        branches: parameters of the running branches, by weight.
        values: of the parameters trained in full, as they are.
        buffers: of the model, and parameters that forward writes, by name.
        layout: which buffers hold no tensor, and which that of another one.
    """

    plan: Plan
    slow: SlowWeights
    branches: Mapping[str, Mapping[str, torch.Tensor]]
    values: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    layout: Mapping[str, Any]

    @classmethod
    def of(cls, run: Run) -> RunState:
        """Return the state of a living cascade; its tensors are not copied."""
        parameters = run.parameters_by_name()
        branches = {
            weight: {name: value.detach() for name, value in branch.named_parameters()}
            for weight, branch in run.branches_by_weight().items()
        }
        values = {name: parameters[name].detach() for name in run.slow.trained}
        buffers = {name: value.detach() for name, value in run.model_state().items()}
        return cls(run.plan, run.slow, branches, values, buffers, buffer_layout(run.model))

    def learners(self) -> dict[str, Learner]:
        """Return what trains in the running stage, by weight: branches with these factors, whatever the way they
        compute, and the values of parameters trained in full.
        """
        branches: dict[str, Branch] = {}
        for site in self.plan.sites:
            factors = self.branches[site.weight]
            like = factors["lora_A"].new_zeros(()).expand(site.shape)
            branches[site.weight] = branch_class(site)(site, self.plan.spec.seed, self.plan.stage, like)
            for name, value in factors.items():
                setattr(branches[site.weight], name, nn.Parameter(value, False))
        return {**branches, **self.values}

    def without_values(self) -> list[WeightState]:
        """Return bare states of whole weights on the meta device."""
        states = []
        for state in self.slow.states.values():
            base = torch.empty(state.shard.full_shape(state.base.shape), dtype=state.base.dtype, device="meta")
            states.append(replace(state, shard=WHOLE).bare(base))
        return states

    def placed_like(self, other: RunState) -> RunState:
        """Return this state with the W0 of another one of the same weights, and of its shards those that are here.

        W0 of a parameter trained in full stays its own, if it is known.
        """
        slow, states = other.slow, {}
        for name, state in self.slow.states.items():
            states[name] = state.to_shard(slow.states[name].shard)
            if not state.full or state.base.is_meta:
                states[name] = replace(states[name], base=slow.states[name].base)
        branches = {
            weight: {name: local_like(value, other.branches[weight][name]) for name, value in factors.items()}
            for weight, factors in self.branches.items()
        }
        values = {name: local_like(value, other.values[name]) for name, value in self.values.items()}
        whole = replace(self.slow, states=states, group=slow.group)
        return replace(self, slow=whole, branches=branches, values=values)


def encode(state: RunState) -> tuple[dict[str, Any], Tensors, dict[str, int]]:
    """Return the fields of the manifest, copies of this rank's tensors, and the axis of each sharded tensor."""
    slow, spec = state.slow, state.plan.spec
    tensors: Tensors = {}
    axes: dict[str, int | None] = {}
    weights: dict[str, Any] = {}
    for weight, factors in state.branches.items():
        tensors |= {f"branch/{weight}/{name}": value for name, value in factors.items()}
    for weight, held in slow.states.items():
        weights[weight], more = _encoded(held)
        tensors |= {name: value for name, (value, _) in more.items()}
        axes |= {name: held.axis(side) for name, (_, side) in more.items()}
    tensors |= {f"value/{name}": value for name, value in state.values.items()}
    tensors |= {f"buffer/{name}": value for name, value in state.buffers.items()}
    rules = {name: held.rule for name, held in slow.trained.items()}
    trained = {name: None if rule is None else spec.train_rules.index(rule) for name, rule in rules.items()}
    manifest: dict[str, Any] = {"idle": slow.idle, "trained": trained, "slow": weights}
    if spec.keeps_average:
        manifest["averaged"] = slow.averaged
    axes = {name: shard_axis(tensor) for name, tensor in tensors.items()} | axes
    copies = {name: local(tensor).clone() for name, tensor in tensors.items()}
    return {**manifest, **state.layout}, copies, {name: axis for name, axis in axes.items() if axis is not None}


def _encoded(state: WeightState) -> tuple[dict[str, Any], dict[str, tuple[torch.Tensor, Side]]]:
    """Return the manifest's entry and the tensors of one weight, each with how it lies beside the weight."""
    name, tensors = state.name, dict[str, tuple[torch.Tensor, Side]]()
    entry: dict[str, Any] = {"experts": [], "gone": state.gone, "noises": [asdict(noise) for noise in state.noises]}
    for number, expert in enumerate(state.experts):
        held = {key: getattr(expert, key) for key, side in EXPERT_FIELDS.items() if expert.rank or side is Side.OUT}
        held = {key: value for key, value in held.items() if value is not None}
        entry["experts"].append({"stage": expert.stage, "tensors": list(held)})
        tensors |= {f"expert/{name}/{number}/{key}": (value, EXPERT_FIELDS[key]) for key, value in held.items()}
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
    manifest: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    plan: Plan,
    where: str,
    taker: RunState | None = None,
) -> RunState:
    """Return the state that a manifest, checked for itself (`manifest.plan_of`), and tensors describe.

    Args:
        manifest, tensors: of a checkpoint.
        plan: the manifest's.
        where: they come from, for messages.
        taker: state of the cascade that is to take this one over: of the same weights, whose W0, shards and dtypes it
            gets. Without, W0 has no numbers, and shapes are those of the plan.

    Raises:
        CheckpointError: a tensor is missing, foreign, not finite, or has another shape or kind than it must have.
    """
    file = _Taken(tensors, where)
    bare = _bare(manifest, tensors, plan) if taker is None else taker.without_values()
    entries = manifest["slow"]
    if odd := sorted((entries.keys() ^ {state.name for state in bare}) | (plan.by_weight.keys() - entries.keys())):
        raise CheckpointError(f"{where}: the slow state and the plan disagree about {sanitized(odd[0])}")
    if manifest["trained"].keys() != {state.name for state in bare if state.full}:
        raise CheckpointError(f"{where}: other parameters were trained in full than the spec names")
    finite = plan.spec.on_nonfinite == "raise"  # else such a branch is left out at the fold, and may be here
    branches = {
        site.weight: {
            name: file.take(f"branch/{site.weight}/{name}", shape, finite=finite)
            for name, shape in site.parameter_shapes.items()
        }
        for site in plan.sites
    }
    values = {
        state.name: file.take(f"value/{state.name}", state.matrix, state.base.dtype) for state in bare if state.full
    }
    states = {state.name: _decoded(state, entries[state.name], file) for state in bare}
    for site in plan.sites:
        states[site.weight] = replace(
            states[site.weight], initial=_initial(states[site.weight], site, manifest, plan, file)
        )
    slow = SlowWeights(states, manifest["idle"], averaged=manifest.get("averaged", 0))
    for name, value in values.items():
        start = slow.started(name).start.dense
        if start is not None and not slow.moved({name: value}):
            values[name] = start  # the file may be of a cascade in another dtype: rounding is no training
    prefix = "buffer/"
    buffers = {name.removeprefix(prefix): file.any_of(name) for name in list(file.left) if name.startswith(prefix)}
    layout = {key: manifest[key] for key in ("empty_buffers", "shared_buffers") if key in manifest}
    file.check_all_taken()
    found = RunState(plan, slow, branches, values, buffers, layout)
    return found if taker is None else found.placed_like(taker)


def _bare(manifest: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], plan: Plan) -> list[WeightState]:
    """Return bare states of the shapes that a plan says; where it says none, of those of the file."""
    states, trained = [], manifest["trained"]
    for name in manifest["slow"]:
        if name in trained:
            rule = plan.spec.train_rules[trained[name]] if trained[name] is not None else None
            base = tensors.get(f"value/{name}", torch.empty(()))
            states.append(WeightState(name, base, full=True, rule=rule).bare())
            continue
        site = plan.by_weight.get(name)
        base = torch.empty(site.shape if site is not None else (0,), device="meta")
        stacked, transposed = (
            site is not None and site.experts is not None,
            site is not None and site.layout == "in_out",
        )
        states.append(WeightState(name, base, stacked, transposed))
    return states


def _decoded(state: WeightState, entry: Mapping[str, Any], file: _Taken) -> WeightState:
    """Return the slow state that an entry of the manifest and these tensors describe."""
    name, experts = state.name, []
    for number, described in enumerate(entry["experts"]):
        *stack, rows, columns = state.matrix
        path = f"expert/{name}/{number}"
        a = file.tensors.get(f"{path}/a") if "a" in described["tensors"] else None
        rank = a.shape[-2] if a is not None and a.dim() > 1 else 0
        shapes = {
            Side.LEFT: (*stack, rows, rank),
            Side.RIGHT: (*stack, rank, columns),
            Side.WEIGHT: state.matrix,
            Side.OUT: (state.out,),
        }
        held = {key: torch.zeros(shapes[EXPERT_FIELDS[key]]) for key in ("b", "a") if not rank}
        held |= {
            key: file.take(f"{path}/{key}", shapes[EXPERT_FIELDS[key]], finite=True)
            for key in sorted(described["tensors"])
        }
        experts.append(Expert(**held, stage=described["stage"]))
    vectors = {view: entry[view] for view in VIEWS if view in entry}
    vectors |= {f"stage/{stage}": numbers for stage, numbers in entry["stage_ends"]}
    kind = state.views["slow"].dense.dtype if state.views["slow"].dense is not None else None
    dense = {
        view: file.take(f"dense/{name}/{view}", state.matrix, kind, finite=not state.full)
        for view in vectors
        if f"dense/{name}/{view}" in file or (state.full and view == "slow")
    }
    if dense and "slow" not in dense:
        raise CheckpointError(
            f"{file.where}: has no tensor {sanitized(repr(f'dense/{name}/slow'))}, which what is dense beside it needs"
        )
    views = {view: View(_vector(numbers), dense.get(view, dense.get("slow"))) for view, numbers in vectors.items()}
    scale = f"row_scale/{name}"
    return replace(
        state,
        base=file.take(f"base/{name}", state.matrix, state.base.dtype) if state.full else state.base,
        experts=tuple(experts),
        views=views,
        gone=entry["gone"],
        row_scale=file.take(scale, (state.out,), finite=True) if scale in file and not state.full else None,
        noises=tuple(KeptNoise(**{**noise, "noise": Noise(**noise["noise"])}) for noise in entry["noises"]),
    )


def _vector(numbers: Sequence[float]) -> tuple[float, ...]:
    return tuple(map(float, numbers))


def _initial(
    state: WeightState, site: Site, manifest: Mapping[str, Any], plan: Plan, file: _Taken
) -> InitialFactors | None:
    """Return the factors and magnitudes that the running stage began with; None for B = 0."""
    factors, magnitude, path = None, None, f"initial/{state.name}"
    if plan.spec.factor_start.from_weight and not manifest["idle"]:
        *stack, rows, columns = state.matrix
        rank = site.factor_shapes[0][-2]
        b = file.take(f"{path}/b", (*stack, rows, rank), finite=True)
        factors = Factors(b.double(), file.take(f"{path}/a", (*stack, rank, columns), finite=True).double())
    if site.options.row_scale.trained:
        magnitude = file.take(f"{path}/magnitude", (state.out,), finite=True).double()
    return None if factors is None and magnitude is None else InitialFactors(factors, magnitude)


class _Taken:
    """The tensors of a checkpoint: checks each one that is taken, and knows which were not."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], where: str) -> None:
        self.tensors, self.where = tensors, where
        self.left = dict.fromkeys(name for name in tensors if not name.startswith(ELSEWHERE))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def any_of(self, name: str) -> torch.Tensor:
        """Return a tensor that may have any shape and kind."""
        self.left.pop(name, None)
        return self.tensors[name]

    def take(
        self, name: str, shape: tuple[int, ...], like: torch.dtype | None = None, finite: bool = False
    ) -> torch.Tensor:
        """Return a tensor of this shape, of the kind of numbers that `like` is (real ones by default); `finite`:
        without inf and nan.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.where}: has no tensor {sanitized(repr(name))}")
        if tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(
                f"{self.where}: {sanitized(repr(name))} is {tuple(tensor.shape)}, the plan says {tuple(shape)}"
            )
        like = torch.float32 if like is None else like
        if tensor.dtype != like and not any(tensor.dtype in kind and like in kind for kind in (FLOATS, COMPLEX)):
            raise CheckpointError(f"{self.where}: {sanitized(repr(name))} holds {tensor.dtype}, not {like}")
        if finite and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{self.where}: {sanitized(repr(name))} holds inf or nan, which save never writes",
                code="non-finite",
            )
        self.left.pop(name, None)
        return tensor

    def check_all_taken(self) -> None:
        """Refuse tensors that were not taken."""
        if self.left:
            raise CheckpointError(
                f"{self.where}: holds {sanitized(repr(next(iter(self.left))))}, which this plan has no place for"
            )


# ---- a living cascade takes a state over


def install(run: Run, state: RunState, where: str, undo: Undo | None = None) -> None:
    """Put a decoded state into a cascade that has its sites; the cascade's plan is then the state's; all or nothing.

    With `undo` this is a part of a larger block.

    Raises:
        CheckpointError: its buffers do not fit the model. The cascade is as it was.
    """
    moves: list[tuple[torch.Tensor, torch.Tensor]] = []
    replaced = _model_state(run, state, where, moves)

    def write(name: str, out: torch.Tensor) -> None:
        if name in state.values:
            out.copy_(state.values[name])
        else:
            state.slow.write_resting(name, state.plan, out)

    parameters = run.parameters_by_name()
    live = {  # needs no copy to be put back, as all that is trained in full where a cascade is loaded
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
        tensors=moves,
        buffers=replaced,
        live=live,
    )
    run.commit(planned, undo)


def _model_state(
    run: Run, state: RunState, where: str, moves: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[tuple[Holder, torch.Tensor | None]]:
    """Add to `moves` the buffers that keep their tensors, and parameters that forward writes; return the other buffers,
    each with the tensor that it gets.

    A tensor of the file takes no more memory than its bytes there, so that a buffer may have any shape.
    """
    empty, shared = state.layout.get("empty_buffers", ()), state.layout.get("shared_buffers", {})
    held = _Taken({f"buffer/{name}": value for name, value in state.buffers.items()}, where)
    buffers = buffer_holders(run.model, run.written())
    foreign = next((name for name in (*empty, *shared) if name not in buffers), None)
    if foreign is not None:
        raise CheckpointError(f"{where}: has a buffer {sanitized(repr(foreign))}, and the model has none of this name")
    first: dict[int, str] = {}
    groups: dict[str, list[str]] = {}  # names of the buffers that hold one tensor, by its name in the file
    for name, holder in buffers.items():
        same = first.setdefault(id(holder.value), name) if holder.value is not None else name
        source = shared.get(name, name if f"buffer/{name}" in held else same)
        if f"buffer/{source}" in held:
            groups.setdefault(source, []).append(name)
        elif holder.value is not None and name not in empty:
            held.take(f"buffer/{source}", tuple(holder.value.shape), holder.value.dtype)  # raises
    replaced: list[tuple[Holder, torch.Tensor | None]] = [(buffers[name], None) for name in empty]
    for source, names in groups.items():
        value, before = held.tensors[f"buffer/{source}"], buffers[names[0]].value
        holders = [name for name, holder in buffers.items() if holder.value is before]
        if before is not None and value.shape == before.shape and holders == names:
            finite = any(run.started_finite(name, before.shape) for name in names)
            moves.append((before, held.take(f"buffer/{source}", tuple(before.shape), before.dtype, finite)))
        else:
            new = held.any_of(f"buffer/{source}").to(buffers[names[0]].device, copy=True)
            replaced += [(buffers[name], new) for name in names]
    for name, parameter in run.parameters_by_name().items():
        if f"buffer/{name}" in held and name not in run.slow.states and name not in buffers:  # forward writes it
            here = local(parameter)
            moves.append((here, held.take(f"buffer/{name}", tuple(here.shape), here.dtype)))
    held.check_all_taken()
    return replaced
