"""Adds experts that were trained elsewhere to the slow state: another tool's adapter, or other runs on the same base.

Everything is checked and computed before the first write.

A sum of runs is `sum_i w_i S_i`, exactly. It has the experts of all runs, each coefficient times the weight of its run.
Dense parts (collapsed deltas, parameters trained in full) are summed in fp64 and rounded once. No rounded weight of a
run is read. Related: model soups (2203.05482), task arithmetic (2212.04089).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lorasc_fx.cascade.commit import Planned
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.transition import ended
from lorasc_fx.errors import SpecError, StateError, named, nearest, warn
from lorasc_fx.parameters import Holder, buffer_holders
from lorasc_fx.plan import Plan
from lorasc_fx.quantized import dense
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state import Expert, Learner, Part, SlowWeights, View, ViewName, WeightState, arithmetic, host, summing
from lorasc_fx.util.checks import is_number
from lorasc_fx.util.undo import Undo


def install_experts(
    run: Run,
    experts: Mapping[str, Sequence[tuple[float, Expert]]],
    trained: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
) -> None:
    """Add experts to the slow weights and to the start of the running stage, and set parameters trained in full.

    Args:
        run: of the cascade.
        experts: pairs of coefficient and expert by weight name, with `b` [rows, r] and `a` [r, columns] as the weight
            is stored.
        trained: slow values of parameters trained in full, by name.
        buffers: values of the model's buffers, by name.

    Raises:
        StateError: the cascade does not have this name, or a factor has another shape.
    """
    with run.exclusive("install_experts"):
        before = run.slow
        tensors = dict(run.model.named_buffers())
        for what, given, known in (
            ("a site", experts, before.states.keys() - before.trained.keys()),
            ("a parameter trained in full", trained, before.trained),
            ("a buffer", buffers, tensors),
        ):
            foreign = [name for name in given if name not in known]
            if foreign:
                raise StateError(
                    f"install_experts: {', '.join(sorted(foreign))} is not {what} of this cascade", code="sites-differ"
                )
        states = {name: _with_experts(state, experts.get(name, ())) for name, state in before.states.items()}
        for name, value in trained.items():
            if value.shape != states[name].base.shape:
                raise StateError(
                    f"install_experts: {name} has the shape {list(states[name].base.shape)}, not {list(value.shape)}",
                    code="sites-differ",
                )
            states[name] = states[name].holding(value.detach().to("cpu", copy=True))
        # Write only what changes: other weights keep their W0 as their own memory.
        touched = [*(name for name in experts if experts[name]), *trained]
        install_slow(run, replace(before, states=states), touched, buffers)


def install_slow(
    run: Run,
    after: SlowWeights,
    names: Sequence[str],
    buffers: Mapping[str, torch.Tensor],
    undo: Undo | None = None,
) -> None:
    """Replace the slow weights inside the running stage. Branches and noise stay.

    Branches that take their start from the weights start again from the new ones, unless they have trained.

    Args:
        run: of the cascade.
        after: the slow weights.
        names: the weights that they change, whether trained in full or not.
        buffers: values of the model's buffers, by name.
        undo: of the block that this is part of, if any.
    """
    before, plan = run.slow, run.plan
    branches = run.branches_by_weight()
    # Branches that have not trained take their start (PiSSA, DoRA) from the new weights.
    unmoved = {name: branches[name] for name in names if name in branches and not before.moved({name: branches[name]})}
    after, factors = after.begin_stage(plan, unmoved)
    tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
    replaced: list[tuple[Holder, torch.Tensor | None]] = []
    holders = buffer_holders(run.model)
    for name, value in buffers.items():
        buffer = holders[name].value
        # A buffer of another shape, or one that is not there yet, needs a new tensor.
        if buffer is not None and value.shape == buffer.shape:
            tensors.append((buffer, value))
        else:
            replaced.append((holders[name], value.to(holders[name].device, copy=True)))
    written = run.present(names)
    run.commit(Planned(plan, after, written, factors=factors, tensors=tensors, buffers=replaced), undo)


def _with_experts(state: WeightState, experts: Sequence[tuple[float, Expert]]) -> WeightState:
    """Return the state with these pairs of coefficient and expert added."""
    if not experts:
        return state
    *stack, rows, columns = state.matrix
    for _, pair in experts:
        rank = pair.a.shape[-2] if pair.a.dim() > 1 else 0
        if tuple(pair.b.shape) != (*stack, rows, rank) or tuple(pair.a.shape) != (*stack, rank, columns):
            shapes = f"b {list(pair.b.shape)} and a {list(pair.a.shape)}"
            raise StateError(
                f"install_experts: {state.name} has the shape {list(state.base.shape)}, which does not fit {shapes}",
                code="sites-differ",
            )
    device = state.base.device
    more = [expert.map(lambda value, _: value.detach().to(device, copy=True)) for _, expert in experts]
    return state.added(more, [float(coefficient) for coefficient, _ in experts])


def bare(slow: SlowWeights) -> SlowWeights:
    """Return slow weights whose W0 have no values."""
    states = {name: replace(state, base=state.base.to("meta")) for name, state in slow.states.items()}
    return replace(slow, states=states)


def differ(one: WeightState, other: WeightState) -> bool:
    """Whether two runs adapted a weight as different kinds of matrices."""
    return one.stacked != other.stacked and not (one.full or other.full)


def other_kind(call: str, name: str, weight: str) -> SpecError:
    """Return the error for a run that adapted a weight as another kind of matrix."""
    return SpecError(
        f"{call}: {name}, adapted {weight} as another kind of matrix than the first run. Sum only runs of one model",
        code="sites-differ",
    )


VIEW_NAMES: tuple[ViewName, ...] = ("slow", "fast", "base", "averaged")
FOLDED: tuple[ViewName, ...] = ("slow", "averaged")
"""The weights that a fold can write."""


def check_view(call: str, view: str, spec: CascadeSpec, known: Sequence[str] = FOLDED) -> None:
    """Raise StateError for an unknown name, and for averaged weights if the spec keeps no average."""
    if view not in known:
        raise StateError(f"{call}: give one of {', '.join(known)}{nearest(str(view), known)}", code="unknown-name")
    if view == "averaged" and not spec.keeps_average:
        raise StateError(
            f"{call}: the spec keeps no average of the slow weights. Give it average='ema' or 'swa'",
            code="not-available",
        )


@dataclass(frozen=True)
class Weights:
    """The weights that a call puts in place or folds: of the run itself, of an earlier stage, or of other runs.

    Args:
        slow: the slow state.
        view: the view of the state.
        buffers: buffers, and parameters that forward writes, by name, if these weights have their own.
        learners: branches and current values of parameters trained in full, by weight name, if the running stage
            counts.
        plan: of the running stage, for the run's own weights. Parameters outside the slow rule have their current
            values then.
    """

    slow: SlowWeights
    view: ViewName = "slow"
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    learners: Mapping[str, Learner] = field(default_factory=dict)
    plan: Plan | None = None

    def write(self, name: str, out: torch.Tensor) -> None:
        """Write the weight of this name."""
        self.slow.write_value(name, self.view, out, self.learners.get(name), self.plan)

    def dense(self, names: Iterable[str], parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the values of quantized weights as dense tensors, by name."""
        return {
            name: self.slow.value(name, self.view, parameters[name], self.learners.get(name), self.plan)
            for name in names
        }

    def moves(self, run: Run) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return pairs of a buffer of the run's model and its value for these weights."""
        held = run.model_state() if self.buffers else {}
        pairs = [(held[name], value) for name, value in self.buffers.items() if name in held]
        return [(buffer, value) for buffer, value in pairs if buffer.shape == value.shape]


def folded_weights(run: Run, view: str | Mapping[str, float], call: str) -> Weights:
    """Return the weights that a fold writes. A running stage that has trained is folded first.

    Raises:
        StateError, SpecError, NonFiniteBranch: as of `Cascade.weights` and `Cascade.release`.
    """
    if (weights := added_weights(run, view, call, folded=True)) is not None:
        return weights
    check_view(call, str(view), run.plan.spec, (*FOLDED, *run.added))
    return Weights(ended(run, call), "averaged" if view == "averaged" else "slow")


def added_weights(run: Run, view: Any, call: str, folded: bool = False) -> Weights | None:
    """Return the weights of an added run, or a sum of several, `W0 + sum_i w_i S_i`. None if `view` is another name.

    A single run has the same bits as its own fold.

    Args:
        run: to which the runs were added.
        view: the name of an added run, or numbers by such names. `slow` is the run itself.
        call: for messages.
        folded: whether the running stage of the run itself is folded first.

    Raises:
        StateError: an unknown name.
        SpecError: no name, a number that is not finite, a sum beyond the dtype of a weight, or a sum with DoRA.
    """
    weights: Mapping[str, float] = {view: 1} if isinstance(view, str) and view in run.added else view
    if not isinstance(weights, Mapping):
        return None
    if not weights:
        raise SpecError(f"{call}: no run is named. Give numbers by the names of added runs, or 'slow'")
    for name in weights:
        check_view(call, name, run.plan.spec, ("slow", *run.added))
    for name, weight in weights.items():
        if not is_number(weight):
            raise SpecError(f"{call}: {name!r} has the weight {weight!r}. Give finite numbers")
    slow = run.slow
    parts = [run.added[name] if name in run.added else _own(run, call, folded) for name in weights]
    alone = [*weights.values()] == [1]
    if not alone:
        check_summable(call, {part.name: part.plan for part in parts}, "Give one run by its name")
    after = weighted_sum(slow, parts, [*weights.values()], 1)
    if alone:  # take the run's own state, so that nothing is rounded in another order
        states = dict(after.states)
        for name, state in slow.states.items():
            held = parts[0].slow.states.get(name)
            if held is None or (held.full and not state.full):
                continue
            held = replace(held, base=state.base)
            exact = arithmetic(state.base.dtype)
            states[name] = state.bare().holding(held.exact("slow", exact)) if state.full else held
        after = replace(after, states=states)
    else:
        _check_fits(after, call)
    return Weights(after, buffers={name: value for name, value in parts[0].buffers.items() if _agree(name, parts)})


def check_summable(call: str, plans: Mapping[str, Plan], advice: str) -> None:
    """Raise SpecError if one of the runs scales rows, because a sum only adds experts. Plans are by the runs' names."""
    scaled = next((name for name, plan in plans.items() if plan.spec.method.scales_rows), None)
    if scaled is not None:
        raise SpecError(
            f"{call}: {scaled}, has magnitudes (DoRA), which scale rows, and a sum of runs only adds experts. {advice}",
            code="method-not-supported",
        )


def _check_fits(after: SlowWeights, call: str) -> None:
    """Raise SpecError if a weight of a sum overflows its dtype."""
    if beyond := [name for name, state in after.states.items() if not state.fits()]:
        raise SpecError(
            f"{call}: the sum takes {named(beyond)} beyond the dtype of the weight. Give the runs smaller numbers"
        )


def _own(run: Run, call: str, folded: bool) -> Part:
    """Return the run itself as a part of a sum. Parameters outside the slow rule have their current values."""
    slow, trained = (ended(run, call), {}) if folded else (run.slow, run.present(run.slow.trained))
    now = {
        name: state.holding(host(trained[name]))
        for name, state in slow.trained.items()
        if name in trained and not state.follows(run.plan.spec)
    }
    slow = replace(slow, states={**slow.states, **now})
    return Part("slow", run.plan, bare(slow), run.model_state())


def weighted_sum(fresh: SlowWeights, parts: Sequence[Part], weights: Sequence[float], stage: int) -> SlowWeights:
    """Return `W0 + sum_i w_i S_i` for every weight of `fresh`. A run that did not adapt a weight has S = 0 there.

    Args:
        fresh: slow weights of a fresh cascade on the common base, with every weight of every part.
        parts: the runs.
        weights: one number per run. They need not sum to 1.
        stage: the stage that counts as ended with the sum.

    Raises:
        SpecError: a run has a weight that `fresh` lacks, or adapted one as another kind of matrix.
    """
    terms = list(zip(weights, parts, strict=True))
    for part in parts:
        odd = sorted(part.slow.states.keys() - fresh.states.keys())
        if odd:
            raise SpecError(
                f"merge: {part.name}, keeps noise in {odd[0]}, which is not a site of the first run. "
                "Give a run with noise.where='all' first",
                code="sites-differ",
            )
    return SlowWeights({name: _summed(state, terms, stage) for name, state in fresh.states.items()})


def _summed(fresh: WeightState, terms: Sequence[tuple[float, Part]], stage: int) -> WeightState:
    if fresh.full:  # there are no experts, so the values themselves are summed
        after = fresh.bare().holding(fresh.base.double() + _dense(fresh.name, fresh.base, terms))
        return replace(after, views={**after.views, f"stage/{stage}": after.slow})
    experts: list[Expert] = []
    coefficients: list[float] = []
    noises = []
    for weight, part in terms:
        state = part.slow.states.get(fresh.name)
        if state is None or weight == 0:
            continue
        if differ(state, fresh):
            raise other_kind("merge", part.name, fresh.name)
        for coefficient, expert in zip(state.slow.coefficients, state.experts, strict=True):
            if coefficient != 0:
                experts.append(expert)
                coefficients.append(weight * coefficient)
        noises += [replace(noise, amplitude=weight * noise.amplitude) for noise in state.noises]
    # A run whose experts were collapsed makes the sum partly dense.
    total = None
    held = [part.slow.states.get(fresh.name) for weight, part in terms if weight != 0]
    if any(state is not None and state.slow.dense is not None for state in held):
        total = _dense(fresh.name, fresh.base, terms, factors=False).view(fresh.matrix).to(summing(fresh.base.dtype))
    slow = View(tuple(coefficients), total)
    views = {"slow": slow, "start": slow, f"stage/{stage}": slow}
    after = WeightState(
        fresh.name, fresh.base, fresh.stacked, fresh.transposed, tuple(experts), views, noises=tuple(noises)
    )
    return after.compact()


def _dense(name: str, base: torch.Tensor, terms: Sequence[tuple[float, Part]], factors: bool = True) -> torch.Tensor:
    """Return the weighted sum of the deltas of one weight in fp64, as the weight is stored.

    Without `factors` it has only the dense parts: collapsed deltas and parameters trained in full.
    """
    total = torch.zeros(base.shape, dtype=torch.float64)
    for weight, part in terms:
        state = part.slow.states.get(name)
        if weight == 0 or state is None:
            continue
        if factors or state.full:
            slow = replace(state, base=base).exact("slow", torch.float64, device=total.device)
            total += weight * (slow - dense(base).cpu().double())
        elif state.slow.dense is not None:
            total += weight * state.slow.dense.cpu().double().view(base.shape)
    return total


def install_sum(run: Run, after: SlowWeights, parts: Sequence[Part], undo: Undo) -> None:
    """Start the first stage of a fresh cascade from these slow weights, as part of a larger block.

    Buffers (running statistics) cannot be summed. Those that are equal in all runs are taken, the others stay those of
    the base, with a warning.
    """
    _check_fits(after, "merge")
    buffers = dict(run.model.named_buffers())
    taken = {name: parts[0].buffers[name] for name in buffers if _agree(name, parts)}
    differing = [name for name, buffer in buffers.items() if name not in taken and buffer.is_floating_point()]
    install_slow(run, after, [*after.states], taken, undo)
    if differing:
        warn(
            f"merge: {len(differing)} buffers differ between the runs and stay those of the base: {named(differing)}. "
            "Estimate running statistics again by torch.optim.swa_utils.update_bn(batches, model)",
            "buffers-differ",
        )


def _agree(name: str, parts: Sequence[Part]) -> bool:
    first, *others = [part.buffers.get(name) for part in parts]
    return first is not None and all(
        buffer is not None and buffer.dtype == first.dtype and torch.equal(buffer.cpu(), first.cpu())
        for buffer in others
    )
