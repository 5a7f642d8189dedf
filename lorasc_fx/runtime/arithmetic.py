"""Weighted sums of what several runs on one base have learnt: `sum_i w_i S_i`, exactly, through their experts.

The experts of all runs stand side by side, each coefficient times its run's weight (algorithm.md, "The slow state is
small"); what is dense already (a collapsed delta, a parameter trained in full) is summed in fp64 and rounded once. No
rounded weight of any run is read. Relatives: model soups (2203.05482), task arithmetic (2212.04089).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lorasc_fx.branch import dense
from lorasc_fx.errors import SpecError, warn
from lorasc_fx.plan import Plan
from lorasc_fx.runtime.adopt import install
from lorasc_fx.runtime.checkpoint_read import Checkpoint, decoded, refused
from lorasc_fx.runtime.folded import has_trained_since, running_branches
from lorasc_fx.runtime.folding import ended
from lorasc_fx.runtime.run import Run
from lorasc_fx.state import Expert, SlowWeights, Trained, View, WeightState, arithmetic, summing
from lorasc_fx.state.model import host
from lorasc_fx.undo import Undo

__all__ = ["Part", "join", "part_of", "part_of_file", "weighted_sum"]


@dataclass(frozen=True)
class Part:
    """One run of a sum.

    Args:
        name: for messages.
        plan: of its running stage.
        slow: its slow weights as a release would have them; its bases are without numbers, they are those of the sum.
        buffers: of its model.
    """

    name: str
    plan: Plan
    slow: SlowWeights
    buffers: Mapping[str, torch.Tensor]


def part_of(core: Run, name: str) -> Part:
    """Return a run as a part; a running stage that has trained is counted, as `release` counts it.

    Raises:
        NonFiniteBranch: a running branch holds inf or nan.
    """
    buffers = {key: buffer.detach().clone() for key, buffer in core.model.named_buffers()}
    return Part(name, core.plan, _bare(ended(core, "merge")), buffers)


def part_of_file(checkpoint: Checkpoint, name: str, model: nn.Module) -> Part:
    """Return a run that was saved as a part; a running stage that has trained is counted.

    Args:
        checkpoint: as read.
        name: of the run, for messages.
        model: the base, whose weights the running stage ends on.

    Raises:
        CheckpointError: it is not what a checkpoint of its plan holds.
        NonFiniteBranch: a running branch holds inf or nan.
    """
    state = decoded(checkpoint)
    with refused(checkpoint):
        branches, slow = running_branches(state), state.slow
    if has_trained_since(state, branches):
        bases = {
            key: host(value) for key, value in model.named_parameters() if key in slow.states or key in slow.trained
        }
        states = {key: replace(weight, base=bases[key]) for key, weight in slow.states.items()}
        trained = {key: replace(kept, base=bases[key]) for key, kept in slow.trained.items()}
        slow = replace(slow, states=states, trained=trained).after_stage(state.plan, branches, state.values)
    return Part(name, state.plan, _bare(slow), state.buffers)


def _bare(slow: SlowWeights) -> SlowWeights:
    """Return slow weights whose W0 are without numbers."""
    states = {name: replace(state, base=state.base.to("meta")) for name, state in slow.states.items()}
    return replace(slow, states=states)


def weighted_sum(own: SlowWeights, parts: Sequence[Part], weights: Sequence[float], stage: int) -> SlowWeights:
    """Return `W0 + sum_i w_i S_i` for every weight that `own` knows; a run that did not adapt one has S = 0 there.

    Args:
        own: slow weights of a fresh cascade on the common base, which knows every weight of every part.
        parts: the runs.
        weights: one a run; they need not sum to 1.
        stage: number of the stage that the sum counts as the end of.

    Raises:
        SpecError: a run knows a weight that `own` does not, or reads one as another kind of matrix.
    """
    terms = list(zip(weights, parts, strict=True))
    for part in parts:
        odd = sorted({*part.slow.states, *part.slow.trained} - {*own.states, *own.trained})
        if odd:
            raise SpecError(
                f"merge: {part.name}, keeps noise in {odd[0]}, which is no site of the first run; "
                "give a run with noise.where='all' first",
                code="sites-differ",
            )
    states = {name: _state(state, terms, stage) for name, state in own.states.items()}
    trained = {}
    for name, kept in own.trained.items():
        total = kept.base.double() + _dense(name, kept.base, terms)
        slow = total.to(arithmetic(kept.base.dtype))
        views = {"slow": slow, "start": total.to(kept.base.dtype), f"stage/{stage}": slow}
        trained[name] = Trained(kept.base, views, kept.rule)
    return SlowWeights(states, trained)


def _state(own: WeightState, terms: Sequence[tuple[float, Part]], stage: int) -> WeightState:
    experts: list[Expert] = []
    coefficients: list[float] = []
    noises = []
    for weight, part in terms:
        state = part.slow.states.get(own.name)
        if state is None or weight == 0:
            continue
        if state.stacked != own.stacked:
            raise SpecError(
                f"merge: {part.name}, adapted {own.name} as another kind of matrix than the first run; "
                "sum runs of one model",
                code="sites-differ",
            )
        for coefficient, expert in zip(state.slow.coefficients, state.experts, strict=True):
            if coefficient != 0:
                experts.append(expert)
                coefficients.append(weight * coefficient)
        noises += [replace(noise, amplitude=weight * noise.amplitude) for noise in state.noises]
    total = None
    if any(_holds_dense(own.name, part) for weight, part in terms if weight != 0):
        total = _dense(own.name, own.base, terms, factors=False).view(own.matrix).to(summing(own.base.dtype))
    slow = View(tuple(coefficients), total)
    views = {"slow": slow, "start": slow, f"stage/{stage}": slow}
    after = WeightState(own.name, own.base, own.stacked, own.transposed, tuple(experts), views, noises=tuple(noises))
    return after.collapsed() if after.crowded else after


def _holds_dense(name: str, part: Part) -> bool:
    state = part.slow.states.get(name)
    return name in part.slow.trained or (state is not None and state.slow.dense is not None)


def _dense(name: str, base: torch.Tensor, terms: Sequence[tuple[float, Part]], factors: bool = True) -> torch.Tensor:
    """Return the weighted sum of the deltas of one weight in fp64, as the weight is stored.

    Without `factors` it is only what is dense in the runs: collapsed deltas, and what was trained in full.
    """
    total = torch.zeros(base.shape, dtype=torch.float64)
    for weight, part in terms:
        if weight == 0:
            continue
        if name in part.slow.trained:
            total += weight * (part.slow.trained[name].slow.double().cpu() - base.double().cpu())
        elif (state := part.slow.states.get(name)) is not None:
            if factors:
                total += weight * (
                    replace(state, base=base).exact("slow", torch.float64).cpu() - dense(base).double().cpu()
                )
            elif state.slow.dense is not None:
                total += weight * state.slow.dense.double().cpu().view(base.shape)
    return total


def join(core: Run, after: SlowWeights, parts: Sequence[Part], undo: Undo) -> None:
    """Let the first stage of a fresh cascade start from these slow weights; a part of a larger block.

    Buffers (running statistics) have no sum: those that are the same in all runs are taken over, others stay the base's
    and are told of.
    """
    buffers = dict(core.model.named_buffers())
    taken = {name: parts[0].buffers[name] for name in buffers if _agree(name, parts)}
    told = [name for name, buffer in buffers.items() if name not in taken and buffer.is_floating_point()]
    install(core, after, [*after.states, *after.trained], taken, undo)
    if told:
        warn(
            f"merge: {len(told)} buffers differ between the runs and stay as the base has them: {', '.join(told[:3])}; "
            "torch.optim.swa_utils.update_bn makes running statistics anew",
            "buffers-differ",
        )


def _agree(name: str, parts: Sequence[Part]) -> bool:
    first, *others = [part.buffers.get(name) for part in parts]
    return first is not None and all(
        each is not None and each.dtype == first.dtype and torch.equal(each.cpu(), first.cpu()) for each in others
    )
