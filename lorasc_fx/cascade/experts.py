"""Experts that were trained elsewhere become part of the slow state: another tool's adapter, or runs on one base.

All or nothing: everything is checked and computed before anything is written.

A sum of runs is `sum_i w_i S_i`, exactly. The experts of all runs stand side by side, each coefficient times its run's
weight; what is dense already (a collapsed delta, a parameter trained in full) is summed in fp64 and rounded once. No
rounded weight of any run is read. Relatives: model soups (2203.05482), task arithmetic (2212.04089).
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
from lorasc_fx.state import Expert, Learner, Part, SlowWeights, View, WeightState, Which, arithmetic, summing
from lorasc_fx.state.engine import fits
from lorasc_fx.state.model import host
from lorasc_fx.util.checks import is_number
from lorasc_fx.util.undo import Undo


def install_experts(
    run: Run,
    experts: Mapping[str, Sequence[tuple[float, Expert]]],
    trained: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
) -> None:
    """Add experts to slow weights and start of the running stage, and set parameters trained in full.

    Args:
        run: of a cascade.
        experts: by weight name, each with its coefficient; `b` [rows, r] and `a` [r, columns] as the weight is stored.
        trained: slow values of parameters that the spec trains in full, by name.
        buffers: values of the model's buffers, by name.

    Raises:
        StateError: a name that the cascade does not know as such, or factors of another shape.
    """
    with run.exclusive("install_experts"):
        before = run.slow
        tensors = dict(run.model.named_buffers())
        for what, given, known in (
            ("a site", experts, before.states.keys() - before.trained.keys()),
            ("trained in full", trained, before.trained),
            ("a buffer", buffers, tensors),
        ):
            foreign = [name for name in given if name not in known]
            if foreign:
                raise StateError(
                    f"install_experts: {', '.join(sorted(foreign))} is not {what} here", code="sites-differ"
                )
        states = {name: _with_experts(state, experts.get(name, ())) for name, state in before.states.items()}
        for name, value in trained.items():
            if value.shape != states[name].base.shape:
                raise StateError(
                    f"install_experts: {name} is {list(states[name].base.shape)}, not {list(value.shape)}",
                    code="sites-differ",
                )
            states[name] = states[name].holding(value.detach().to("cpu", copy=True))
        touched = [*(name for name in experts if experts[name]), *trained]
        install_slow(run, SlowWeights(states, before.idle, averaged=before.averaged), touched, buffers)


def install_slow(
    run: Run,
    after: SlowWeights,
    names: Sequence[str],
    buffers: Mapping[str, torch.Tensor],
    undo: Undo | None = None,
) -> None:
    """Go on from other slow weights in the running stage, B and noise as they are; all or nothing.

    Branches that start from the weights and have not trained yet start from the new ones.

    Args:
        run: of a cascade.
        after: the slow weights.
        names: of the weights that they change, trained in full or not.
        buffers: values of the model's buffers, by name.
        undo: of a block that this is a part of.
    """
    before, plan = run.slow, run.plan
    branches = run.branches_by_weight()
    unmoved = {name: branches[name] for name in names if name in branches and not before.moved({name: branches[name]})}
    after, factors = after.begin_stage(plan, unmoved)
    tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
    replaced: list[tuple[Holder, torch.Tensor | None]] = []
    holders = buffer_holders(run.model)
    for name, value in buffers.items():
        buffer = holders[name].value
        if buffer is not None and value.shape == buffer.shape:
            tensors.append((buffer, value))
        else:
            replaced.append((holders[name], value.to(holders[name].device, copy=True)))
    written = run.present(names)
    run.commit(Planned(plan, after, written, factors=factors, tensors=tensors, buffers=replaced), undo)


def _with_experts(state: WeightState, experts: Sequence[tuple[float, Expert]]) -> WeightState:
    """Return the state with these experts added, each with its coefficient."""
    if not experts:
        return state
    *stack, rows, columns = state.matrix
    for _, pair in experts:
        rank = pair.a.shape[-2] if pair.a.dim() > 1 else 0
        if tuple(pair.b.shape) != (*stack, rows, rank) or tuple(pair.a.shape) != (*stack, rank, columns):
            shapes = f"b {list(pair.b.shape)} and a {list(pair.a.shape)}"
            raise StateError(
                f"install_experts: {state.name} is {list(state.base.shape)}, and its factors are {shapes}",
                code="sites-differ",
            )
    device = state.base.device
    more = [expert.map(lambda value, _: value.detach().to(device, copy=True)) for _, expert in experts]
    return state.added(more, [float(coefficient) for coefficient, _ in experts])


def bare(slow: SlowWeights) -> SlowWeights:
    """Return slow weights whose W0 are without numbers."""
    states = {name: replace(state, base=state.base.to("meta")) for name, state in slow.states.items()}
    return replace(slow, states=states)


def differ(one: WeightState, other: WeightState) -> bool:
    """Whether two runs adapted a weight as other kinds of matrices."""
    return one.stacked != other.stacked and not (one.full or other.full)


def other_kind(call: str, name: str, weight: str) -> SpecError:
    """Return the error of a run that adapted a weight as another kind of matrix."""
    return SpecError(
        f"{call}: {name}, adapted {weight} as another kind of matrix than the first run; sum runs of one model",
        code="sites-differ",
    )


WHICH: tuple[Which, ...] = ("slow", "fast", "base", "averaged")
FOLDED: tuple[Which, ...] = ("slow", "averaged")
"""What a fold can leave in the weights."""


def check_which(call: str, which: str, spec: CascadeSpec, known: Sequence[str] = FOLDED) -> None:
    """Raise StateError for weights of no such name, and for averaged ones where the spec keeps no average."""
    if which not in known:
        raise StateError(f"{call}: give one of {', '.join(known)}{nearest(str(which), known)}", code="unknown-name")
    if which == "averaged" and not spec.keeps_average:
        raise StateError(
            f"{call}: the spec keeps no average of the slow weights; give it average='ema' or 'swa'",
            code="not-available",
        )


@dataclass(frozen=True)
class Weights:
    """Weights that a call puts in place or folds: those of a run as it is, of a stage that has ended, or of other runs.

    Args:
        slow: their state.
        which: the weights of it that are meant.
        buffers: of the model, and parameters that forward writes, by name, as far as they belong to these weights.
        learners: by weight name, where the running stage counts: branches, and the present values of what is trained
            in full.
        plan: of the running stage, where these are the run's own: what does not follow the slow rule is as it is then.
    """

    slow: SlowWeights
    which: Which = "slow"
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    learners: Mapping[str, Learner] = field(default_factory=dict)
    plan: Plan | None = None

    def write(self, name: str, out: torch.Tensor) -> None:
        """Write one of them, by name."""
        self.slow.write_value(name, self.which, out, self.learners.get(name), self.plan)

    def dense(self, names: Iterable[str], parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return those of quantized weights, by name, as dense tensors."""
        return {name: self.slow.value(name, self.which, parameters[name], self.learners.get(name)) for name in names}

    def moves(self, run: Run) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the buffers of a run's model that belong to them, each with its value."""
        held = run.model_state() if self.buffers else {}
        pairs = [(held[name], value) for name, value in self.buffers.items() if name in held]
        return [(buffer, value) for buffer, value in pairs if buffer.shape == value.shape]


def folded_weights(run: Run, which: str | Mapping[str, float], call: str) -> Weights:
    """Return the weights that a fold is of: slow or averaged ones, a stage that has trained counted as ended, or those
    of runs that were added.

    Raises:
        StateError, SpecError, NonFiniteBranch: as of `Cascade.weights` and `Cascade.release`.
    """
    if (weights := added_weights(run, which, call, folded=True)) is not None:
        return weights
    check_which(call, str(which), run.plan.spec, (*FOLDED, *run.added))
    return Weights(ended(run, call), "averaged" if which == "averaged" else "slow")


def added_weights(run: Run, which: Any, call: str, folded: bool = False) -> Weights | None:
    """Return the weights of a run that was added, or a sum of several on W0 of this one, `W0 + sum_i w_i S_i`; None
    where `which` means the run's own. Of one run alone they have the bits of its own fold.

    Args:
        run: that they were added to.
        which: the name of a run that was added, or weights by such names; `slow` are those of the run itself.
        call: for messages.
        folded: whether a running stage of the run itself that has trained is counted.

    Raises:
        StateError: a name that is not known.
        SpecError: a sum without names, a weight that is no finite number, a sum beyond the dtype of a weight, or with
            rows scaled by DoRA.
    """
    weights: Mapping[str, float] = {which: 1} if isinstance(which, str) and which in run.added else which
    if not isinstance(weights, Mapping):
        return None
    if not weights:
        raise SpecError(f"{call}: names no run; give numbers by the names of runs that were added, or 'slow'")
    for name in weights:
        check_which(call, name, run.plan.spec, ("slow", *run.added))
    for name, weight in weights.items():
        if not is_number(weight):
            raise SpecError(f"{call}: {name!r} has the weight {weight!r}; give finite numbers")
    slow = run.slow
    parts = [run.added[name] if name in run.added else _own(run, call, folded) for name in weights]
    alone = [*weights.values()] == [1]
    scaled = next((part.name for part in parts if part.plan.spec.row_scale.trained), None)
    if scaled is not None and not alone:
        raise SpecError(
            f"{call}: {scaled}, has magnitudes (use_dora): its rows are scaled, and a sum of runs is one of experts. "
            "Give one run by its name",
            code="dora-not-supported",
        )
    after = weighted_sum(slow, parts, [*weights.values()], 1)
    if alone:
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


def _check_fits(after: SlowWeights, call: str) -> None:
    """Raise SpecError where a sum takes a weight beyond its dtype."""
    if beyond := [name for name, state in after.states.items() if not fits(state)]:
        raise SpecError(
            f"{call}: the sum takes {named(beyond)} beyond the dtype of the weight; give the runs smaller weights"
        )


def _own(run: Run, call: str, folded: bool) -> Part:
    """Return the slow weights of a run itself as a part; what does not follow the slow rule is as it is now."""
    slow, trained = (ended(run, call), {}) if folded else (run.slow, run.trained_parameters())
    now = {
        name: state.holding(host(trained[name]))
        for name, state in slow.trained.items()
        if name in trained and not state.follows(run.plan.spec)
    }
    slow = replace(slow, states={**slow.states, **now})
    return Part("slow", run.plan, bare(slow), run.model_state())


def weighted_sum(fresh: SlowWeights, parts: Sequence[Part], weights: Sequence[float], stage: int) -> SlowWeights:
    """Return `W0 + sum_i w_i S_i` for every weight that `own` knows; a run that did not adapt one has S = 0 there.

    Args:
        fresh: slow weights of a fresh cascade on the common base, which knows every weight of every part.
        parts: the runs.
        weights: one a run; they need not sum to 1.
        stage: number of the stage that the sum counts as the end of.

    Raises:
        SpecError: a run knows a weight that `own` does not, or reads one as another kind of matrix.
    """
    terms = list(zip(weights, parts, strict=True))
    for part in parts:
        odd = sorted(part.slow.states.keys() - fresh.states.keys())
        if odd:
            raise SpecError(
                f"merge: {part.name}, keeps noise in {odd[0]}, which is no site of the first run; "
                "give a run with noise.where='all' first",
                code="sites-differ",
            )
    return SlowWeights({name: _summed(state, terms, stage) for name, state in fresh.states.items()})


def _summed(fresh: WeightState, terms: Sequence[tuple[float, Part]], stage: int) -> WeightState:
    if fresh.full:
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

    Without `factors` it is only what is dense in the runs: collapsed deltas, and what was trained in full.
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
    """Let the first stage of a fresh cascade start from these slow weights; a part of a larger block.

    Buffers (running statistics) have no sum: those that agree in all runs are taken over; the others stay those of the
    base, with a warning.
    """
    _check_fits(after, "merge")
    buffers = dict(run.model.named_buffers())
    taken = {name: parts[0].buffers[name] for name in buffers if _agree(name, parts)}
    differing = [name for name, buffer in buffers.items() if name not in taken and buffer.is_floating_point()]
    install_slow(run, after, [*after.states], taken, undo)
    if differing:
        warn(
            f"merge: {len(differing)} buffers differ between the runs and stay those of the base: {named(differing)}; "
            "torch.optim.swa_utils.update_bn makes running statistics anew",
            "buffers-differ",
        )


def _agree(name: str, parts: Sequence[Part]) -> bool:
    first, *others = [part.buffers.get(name) for part in parts]
    return first is not None and all(
        buffer is not None and buffer.dtype == first.dtype and torch.equal(buffer.cpu(), first.cpu())
        for buffer in others
    )
