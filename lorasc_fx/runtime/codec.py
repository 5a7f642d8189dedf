"""The state of a cascade as a manifest and tensors, and back: `encode` and `decode`, on values alone.

A folder that one rank writes or several, a flat state dict, a fold or a sum from a run's folder read and write bytes
around these two. What a file says is checked in `decode`, against a known state whose tensors have the shapes that it
must have: that of a fresh cascade, or `RunState.planned`, which needs no model. Names of tensors (format 1):

| name | what |
|---|---|
| `branch/WEIGHT/FACTOR` | the running branch |
| `expert/WEIGHT/NUMBER/FIELD` | an expert |
| `turn/WEIGHT/NUMBER` | the row scale of a stage; "turns" has the stage, and the number of experts before it |
| `rows/WEIGHT` | the row scale of W0 |
| `dense/WEIGHT/VIEW` | the dense delta of a view; `start` where it is not that of `slow` |
| `began/WEIGHT/b`, `a`, `m` | initial factors and magnitudes |
| `trained/NAME/value`, `slow`, `start`, `average`, `past/STAGE` | a parameter trained in full, and its views |
| `buffer/NAME` | a buffer, or a parameter that forward writes |
| `base/NAME` | W0 of a parameter, where the base is named and may not have it by this name (a new head) |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from lorasc_fx.errors import CheckpointError
from lorasc_fx.parameters import Holder, buffer_holders, buffer_layout
from lorasc_fx.plan import Plan
from lorasc_fx.runtime.checkpoint import sanitized
from lorasc_fx.runtime.manifest import VIEWS
from lorasc_fx.runtime.run import Planned, Run
from lorasc_fx.runtime.transition import trained_moved
from lorasc_fx.shards import local, local_like, shard_axis
from lorasc_fx.spec import Noise
from lorasc_fx.state import Expert, Factors, InitialFactors, KeptNoise, Side, SlowWeights, Trained, View, WeightState
from lorasc_fx.undo import Undo

__all__ = ["RunState", "Tensors", "decode", "encode", "install"]

Tensors = dict[str, torch.Tensor]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
ELSEWHERE = ("rng/", "optimizer/", "gradient/", "outside/", "base/")
"""Tensors that a resume takes, or who builds the base, and no slow state."""
FACTORS = {
    item.name: item.metadata[Side] for item in fields(Expert) if Side in item.metadata and item.name != "row_scale"
}
"""Tensors of an expert that are named by their field, and how they lie."""


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
        waits_for_gradient: whether lora_A waits for the first gradient of the stage.
    """

    plan: Plan
    slow: SlowWeights
    branches: Mapping[str, Mapping[str, torch.Tensor]]
    values: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    layout: Mapping[str, Any]
    waits_for_gradient: bool = False

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
        return cls(run.plan, run.slow, branches, values, buffers, buffer_layout(run.model), run.gradient_init.armed)

    def at_ranks(self, plan: Plan) -> RunState:
        """Return the state whose branches have the shapes that a plan says, without numbers where these are others."""
        shapes = {site.weight: site.parameter_shapes for site in plan.sites}
        branches = {
            weight: {
                name: value
                if (shape := shapes.get(weight, {}).get(name, value.shape)) == tuple(value.shape)
                else torch.empty(shape, dtype=value.dtype, device="meta")
                for name, value in factors.items()
            }
            for weight, factors in self.branches.items()
        }
        return replace(self, branches=branches)

    def without_numbers(self) -> RunState:
        """Return the state of whole tensors, without numbers, of one that lies in shards: what a checkpoint is held
        against.
        """

        def bare(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
            return torch.empty(like.shape, dtype=value.dtype, device="meta")

        states = {}
        for name, state in self.slow.states.items():
            whole = state.shard.full_shape(state.base.shape) if state.shard is not None else state.base.shape
            base = torch.empty(whole, dtype=state.base.dtype, device="meta")
            states[name] = WeightState(name, base, state.stacked, state.transposed)
        trained = {
            name: entry.map(lambda value, _, like=self.values[name]: bare(value, like))  # type: ignore[misc]
            for name, entry in self.slow.trained.items()
        }
        branches = {
            weight: {name: bare(value, value) for name, value in factors.items()}
            for weight, factors in self.branches.items()
        }
        values = {name: bare(value, value) for name, value in self.values.items()}
        slow = SlowWeights(states, trained, group=self.slow.group, replicas=self.slow.replicas)
        return replace(self, slow=slow, branches=branches, values=values)

    def shards_like(self, other: RunState) -> RunState:
        """Return the shards of this state that are here, cut as another state of the same weights is, with its W0."""
        slow = other.slow
        states = {
            name: replace(state.to_shard(slow.states[name].shard), base=slow.states[name].base)
            for name, state in self.slow.states.items()
        }
        trained = {
            name: replace(
                entry.map(lambda value, _, like=other.values[name]: local_like(value, like).clone()),  # type: ignore[misc]
                base=slow.trained[name].base,
            )
            for name, entry in self.slow.trained.items()
        }
        branches = {
            weight: {name: local_like(value, other.branches[weight][name]) for name, value in factors.items()}
            for weight, factors in self.branches.items()
        }
        values = {name: local_like(value, other.values[name]) for name, value in self.values.items()}
        whole = replace(self.slow, states=states, trained=trained, group=slow.group, replicas=slow.replicas)
        return replace(self, slow=whole, branches=branches, values=values)

    @classmethod
    def planned(cls, plan: Plan, manifest: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> RunState:
        """Return a state without numbers of the shapes that a plan says; where it says none, of those of the file."""
        rules = manifest.get("rules", {})

        def bare(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(tuple(shape), dtype=dtype, device="meta")

        states = {}
        for name in manifest["slow"]:
            site = plan.by_weight.get(name)
            states[name] = WeightState(
                name,
                bare(site.shape if site is not None else (0,)),
                stacked=site is not None and site.experts is not None,
                transposed=site is not None and site.layout == "in_out",
            )
        trained = {}
        for name in manifest["trained"]:
            value = tensors.get(f"trained/{name}/value", bare(()))
            rule = plan.spec.train_rules[rules[name]] if name in rules else None
            trained[name] = Trained.of(value, value, rule)
        branches = {
            site.weight: {name: bare(shape) for name, shape in site.parameter_shapes.items()} for site in plan.sites
        }
        values = {name: entry.base for name, entry in trained.items()}
        return cls(plan, SlowWeights(states, trained), branches, values, {}, {})


def encode(state: RunState) -> tuple[dict[str, Any], Tensors, dict[str, int]]:
    """Return the fields of the manifest, copies of the tensors as far as they are here, and of each that lies in shards
    on several ranks the axis along which it is cut.
    """
    slow, spec = state.slow, state.plan.spec
    tensors: Tensors = {}
    axes: dict[str, int | None] = {}
    weights: dict[str, Any] = {}
    past: dict[str, Any] = {}
    for weight, factors in state.branches.items():
        tensors |= {f"branch/{weight}/{name}": value for name, value in factors.items()}
    for weight, held in slow.states.items():
        weights[weight], more = _encoded(held)
        tensors |= {name: value for name, (value, _) in more.items()}
        axes |= {name: held.axis(side) for name, (_, side) in more.items()}
    for name, entry in slow.trained.items():
        tensors[f"trained/{name}/value"] = state.values[name]
        past[name] = list(entry.ends)
        for view, value in entry.views.items():
            tensors[key := f"trained/{name}/{view.replace('stage/', 'past/')}"] = value
            axes[key] = shard_axis(state.values[name])
    tensors |= {f"buffer/{name}": value for name, value in state.buffers.items()}
    manifest: dict[str, Any] = {"parked": slow.idle, "trained": list(slow.trained), "slow": weights, "past": past}
    manifest["turning"] = state.waits_for_gradient
    ruled = {name: entry.rule for name, entry in slow.trained.items() if entry.rule is not None}
    if ruled:
        manifest["rules"] = {name: spec.train_rules.index(rule) for name, rule in ruled.items()}
    if spec.keeps_average:
        manifest["averaged"] = slow.averaged
    axes = {name: shard_axis(tensor) for name, tensor in tensors.items()} | axes
    copies = {name: local(tensor).clone() for name, tensor in tensors.items()}
    return {**manifest, **state.layout}, copies, {name: axis for name, axis in axes.items() if axis is not None}


def _encoded(state: WeightState) -> tuple[dict[str, Any], dict[str, tuple[torch.Tensor, Side]]]:
    """Return the manifest's entry and the tensors of one weight, each with how it lies beside the weight.

    Of an expert that only scales rows the row scale alone is written.
    """
    name, tensors = state.name, dict[str, tuple[torch.Tensor, Side]]()
    written = [expert.rank > 0 or expert.row_scale is None for expert in state.experts]
    experts = [expert for expert, is_written in zip(state.experts, written, strict=True) if is_written]

    def vector(view: View) -> list[float]:
        return [c for c, is_written in zip(view.coefficients, written, strict=False) if is_written]

    views = {key: view for key, view in state.views.items() if key in VIEWS}
    entry: dict[str, Any] = {"stages": [expert.stage for expert in experts]}
    entry |= {key: vector(view) for key, view in views.items()}
    entry["kept"] = [asdict(noise) for noise in state.noises]
    entry["past"] = [[state.gone, None]] if state.gone else []
    entry["past"] += [[end, vector(view)] for end, view in state.ends.items()]
    for number, expert in enumerate(experts):
        tensors |= {
            f"expert/{name}/{number}/{field}": (value, side)
            for field, side in FACTORS.items()
            if (value := getattr(expert, field)) is not None
        }
    scaling = [(index, expert) for index, expert in enumerate(state.experts) if expert.row_scale is not None]
    if scaling or state.row_scale is not None:
        entry["turns"] = [[expert.stage, sum(written[:index])] for index, expert in scaling]
    for number, (_, expert) in enumerate(scaling):
        assert expert.row_scale is not None
        tensors[f"turn/{name}/{number}"] = expert.row_scale, Side.OUT
    if state.row_scale is not None:
        tensors[f"rows/{name}"] = state.row_scale, Side.OUT
    for key, view in views.items():
        if view.dense is not None and not (key == "start" and view.dense is state.slow.dense):
            tensors[f"dense/{name}/{key}"] = view.dense, Side.WEIGHT
    if state.initial is not None:
        pair, magnitude = state.initial.factors, state.initial.magnitude
        if magnitude is not None:
            tensors[f"began/{name}/m"] = magnitude, Side.OUT
        if pair is not None:
            tensors |= {f"began/{name}/b": (pair.b, Side.LEFT), f"began/{name}/a": (pair.a, Side.RIGHT)}
    return entry, tensors


def decode(
    manifest: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], plan: Plan, known: RunState, where: str
) -> RunState:
    """Return the state that a manifest, checked for itself (`manifest.check_fields`), and tensors describe.

    Args:
        manifest, tensors: of a checkpoint.
        plan: the manifest's.
        known: of the same sites; gives W0 and the shapes and kinds of tensors.
        where: they come from, for messages.

    Raises:
        CheckpointError: a tensor is missing, foreign, not finite, or has another shape or kind than it must have.
    """
    held = _Taken(tensors, where)
    finite = plan.spec.on_nonfinite == "raise"  # else such a branch is left out at the fold, and may be here
    branches = {
        weight: {
            name: held.take(f"branch/{weight}/{name}", tuple(like.shape), like.dtype, finite)
            for name, like in ((name, local(factor)) for name, factor in factors.items())
        }
        for weight, factors in known.branches.items()
    }
    entries, names = manifest["slow"], known.slow.states
    if odd := sorted((set(entries) ^ set(names)) | (known.branches.keys() - entries.keys())):
        raise CheckpointError(f"{where}: the slow state and the plan disagree about {sanitized(odd[0])}")
    states = {name: _decoded(state, entries[name], held) for name, state in names.items()}
    for name, factors in known.branches.items():
        states[name] = replace(states[name], initial=_initial(states[name], factors, plan, manifest["parked"], held))
    if set(manifest["trained"]) != set(known.slow.trained):
        raise CheckpointError(f"{where}: other parameters were trained in full than the spec names")
    values, trained = {}, {}
    for name, entry in known.slow.trained.items():
        shape, dtype = tuple(entry.slow.shape), entry.slow.dtype
        values[name] = held.take(f"trained/{name}/value", shape, entry.base.dtype)
        views = {"slow": held.take(f"trained/{name}/slow", shape, dtype)}
        views["start"] = held.take(f"trained/{name}/start", shape, entry.start.dtype)
        for end in manifest["past"].get(name, ()):
            views[f"stage/{end}"] = held.take(f"trained/{name}/past/{end}", shape, dtype)
        if f"trained/{name}/average" in held:
            views["average"] = held.take(f"trained/{name}/average", shape, dtype)
        trained[name] = replace(entry, views=views)
        start = trained[name].resting(manifest["parked"])
        if torch.equal(values[name], start.to(values[name].dtype)):
            values[name] = start  # the file may be of a cascade in another dtype: rounding is no training
    slow = SlowWeights(
        states,
        trained,
        manifest["parked"],
        averaged=manifest.get("averaged", 0),
        group=known.slow.group,
        replicas=known.slow.replicas,
    )
    prefix = "buffer/"
    buffers = {name.removeprefix(prefix): held.any_of(name) for name in list(held.left) if name.startswith(prefix)}
    kept_layout = {key: manifest[key] for key in ("empty_buffers", "shared_buffers") if key in manifest}
    held.check_all_taken()
    return RunState(plan, slow, branches, values, buffers, kept_layout, manifest["turning"])


def _decoded(state: WeightState, entry: Mapping[str, Any], held: _Taken) -> WeightState:
    """Return the slow state that an entry of the manifest and these tensors describe."""
    *stack, rows, columns = state.matrix
    name, experts = state.name, []
    for number, stage in enumerate(entry["stages"]):
        place = f"expert/{name}/{number}"
        found = held.tensors.get(f"{place}/a")
        rank = found.shape[-2] if found is not None and found.dim() > 1 else 0
        shapes = {
            Side.LEFT: (*stack, rows, rank),
            Side.RIGHT: (*stack, rank, columns),
            Side.WEIGHT: state.matrix,
            Side.OUT: (state.out,),
        }
        factors = {
            key: held.take(f"{place}/{key}", shapes[side], finite=True)
            for key, side in sorted(FACTORS.items())
            if key in ("a", "b") or f"{place}/{key}" in held
        }
        experts.append(Expert(**factors, stage=stage))
    dense = {
        view: held.take(f"dense/{name}/{view}", (*stack, rows, columns), finite=True)
        for view in VIEWS
        if f"dense/{name}/{view}" in held
    }
    if dense and "slow" not in dense:
        raise CheckpointError(
            f"{held.where}: has no tensor {sanitized(repr(f'dense/{name}/slow'))}, which what is dense beside it needs",
            code="missing-tensor",
        )
    scales = [
        held.take(f"turn/{name}/{number}", (state.out,), torch.float64, True).double()
        for number, _ in enumerate(entry.get("turns", ()))
    ]
    total = held.take(f"rows/{name}", (state.out,), torch.float64, True) if f"rows/{name}" in held else None
    slow = View(_vector(entry["slow"]), dense.get("slow"))
    views = {"slow": slow, "start": View(_vector(entry["start"]), dense.get("start", slow.dense))}
    gone = max((stage for stage, vector in entry["past"] if vector is None), default=0)
    for end, vector in entry["past"]:
        if end > gone:
            views[f"stage/{end}"] = View(_vector(vector), slow.dense)
    if "average" in entry:
        views["average"] = View(_vector(entry["average"]), dense.get("average"))
    noises = tuple(
        KeptNoise(Noise(**{"key": "weight", **kept["noise"]}), kept["seed"], kept["stage"], float(kept["amplitude"]))
        for kept in entry["kept"]
    )
    after = replace(
        state,
        experts=tuple(experts),
        views=views,
        gone=gone,
        row_scale=None if total is None else total.double(),
        noises=noises,
    )
    return _with_scales(after, entry.get("turns", ()), scales)


def _vector(numbers: Sequence[float]) -> tuple[float, ...]:
    return tuple(map(float, numbers))


def _with_scales(state: WeightState, stages: Sequence[tuple[int, int]], scales: Sequence[torch.Tensor]) -> WeightState:
    """Return the state whose experts have the row scales of their stages; a stage without an expert gets one of rank 0.

    `stages` are those of the scales, each with the number of experts in the file before it.
    """
    *stack, rows, columns = state.matrix
    experts, views = list(state.experts), dict(state.views)
    added = 0  # experts of rank 0 so far
    for (stage, before), scale in zip(stages, scales, strict=True):
        place = before + added
        if place < len(experts) and experts[place].stage == stage and experts[place].row_scale is None:
            experts[place] = replace(experts[place], row_scale=scale)
            continue
        empty = torch.zeros(*stack, rows, 0), torch.zeros(*stack, 0, columns)
        experts.insert(place, Expert(*empty, stage, scale))
        for name, view in views.items():
            if not name.startswith("stage/") or int(name.removeprefix("stage/")) >= stage:
                c = view.coefficients
                views[name] = replace(view, coefficients=(*c[:place], 1.0, *c[place:]))
        added += 1
    return replace(state, experts=tuple(experts), views=views)


def _initial(
    state: WeightState, factors: Mapping[str, torch.Tensor], plan: Plan, idle: bool, held: _Taken
) -> InitialFactors | None:
    """Return where the branch of the running stage began; None for B = 0."""
    initial, name = InitialFactors(), f"began/{state.name}"
    if plan.spec.factor_start.from_weight and not idle:
        *stack, rows, columns = state.matrix
        rank = local(factors["lora_A"]).shape[-2]
        b = held.take(f"{name}/b", (*stack, rows, rank), torch.float64, True).double()
        a = held.take(f"{name}/a", (*stack, rank, columns), torch.float64, True).double()
        initial = replace(initial, factors=Factors(b, a))
    if "lora_magnitude_vector" in factors:
        shape = tuple(factors["lora_magnitude_vector"].shape)
        initial = replace(initial, magnitude=held.take(f"{name}/m", shape, torch.float64, True).double())
    return None if initial == InitialFactors() else initial


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
            raise CheckpointError(f"{self.where}: has no tensor {sanitized(repr(name))}", code="missing-tensor")
        if tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(
                f"{self.where}: {sanitized(repr(name))} is {tuple(tensor.shape)}, the plan says {tuple(shape)}",
                code="wrong-shape",
            )
        like = torch.float32 if like is None else like
        if tensor.dtype != like and not any(tensor.dtype in kind and like in kind for kind in (FLOATS, COMPLEX)):
            raise CheckpointError(
                f"{self.where}: {sanitized(repr(name))} holds {tensor.dtype}, not {like}", code="wrong-dtype"
            )
        if finite and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{self.where}: {sanitized(repr(name))} holds inf or nan, which no fold takes", code="non-finite-tensor"
            )
        self.left.pop(name, None)
        return tensor

    def check_all_taken(self) -> None:
        """Refuse tensors that were not taken."""
        if self.left:
            raise CheckpointError(
                f"{self.where}: holds {sanitized(repr(next(iter(self.left))))}, which this plan has no place for",
                code="foreign-tensor",
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
        name: entry.resting(run.slow.idle)
        for name, entry in run.slow.trained.items()
        if not trained_moved(run.slow, {name: parameters[name]})
    }
    planned = Planned(
        state.plan,
        state.slow,
        run.present([*state.slow.states, *state.slow.trained]),
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
        raise CheckpointError(
            f"{where}: has a buffer {sanitized(repr(foreign))}, and the model has none of this name",
            code="foreign-tensor",
        )
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
            moves.append((before, held.take(f"buffer/{source}", tuple(before.shape), before.dtype)))
        else:
            new = held.any_of(f"buffer/{source}").to(buffers[names[0]].device, copy=True)
            replaced += [(buffers[name], new) for name in names]
    known = run.slow.states.keys() | run.slow.trained.keys()
    for name, parameter in run.parameters_by_name().items():
        if f"buffer/{name}" in held and name not in known and name not in buffers:  # forward writes it
            own = local(parameter)
            moves.append((own, held.take(f"buffer/{name}", tuple(own.shape), own.dtype)))
    held.check_all_taken()
    return replaced
