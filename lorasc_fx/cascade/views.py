"""The weights that `Cascade.weights` puts in place and that folds write: views of the run, or sums with added runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.sums import agree, check_fits, check_summable, weighted_sum
from lorasc_fx.cascade.transition import ended
from lorasc_fx.errors import SpecError, StateError, nearest
from lorasc_fx.plan import Plan
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state import Learner, Part, SlowWeights, ViewName, arithmetic, host
from lorasc_fx.util.checks import is_number

VIEW_NAMES: tuple[ViewName, ...] = ("slow", "fast", "base", "averaged")
FOLDED: tuple[ViewName, ...] = ("slow", "averaged")
"""The views that a fold can write."""


def check_view(call: str, view: str, spec: CascadeSpec, names: Sequence[str] = FOLDED) -> None:
    """Raise StateError if `view` is not one of these names, or is "averaged" and the spec keeps no average."""
    if view not in names:
        raise StateError(
            f"{call}: {view!r} is not a view of the weights. Give one of {', '.join(names)}{nearest(str(view), names)}",
            code="unknown-name",
        )
    if view == "averaged" and not spec.keeps_average:
        raise StateError(
            f"{call}: the spec keeps no average of the slow weights. Give it average='ema' or average='swa'",
            code="not-available",
        )


@dataclass(frozen=True)
class Weights:
    """Weights to put in place or to fold: of the run itself, of an earlier stage, or of added runs.

    Args:
        slow: the slow state.
        view: the view of the state.
        buffers: buffers of the model, and parameters that its forward writes, by name. Empty to keep the current ones.
        learners: branches, and current values of parameters trained in full, by weight name, if the view includes the
            running stage.
        plan: plan of the running stage, for weights of the run itself. Then parameters that do not follow the slow rule
            have their current values.
    """

    slow: SlowWeights
    view: ViewName = "slow"
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    learners: Mapping[str, Learner] = field(default_factory=dict)
    plan: Plan | None = None

    def write(self, name: str, out: torch.Tensor) -> None:
        """Write the weight of this name into a local tensor of its shape."""
        self.slow.write_value(name, self.view, out, self.learners.get(name), self.plan)

    def dense(self, names: Iterable[str], parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the values of quantized weights as dense tensors, by name."""
        return {
            name: self.slow.value(name, self.view, parameters[name], self.learners.get(name), self.plan)
            for name in names
        }

    def buffer_values(self, run: Run) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return pairs of a buffer of the run's model and its value for these weights. Other shapes are skipped."""
        current = run.model_state() if self.buffers else {}
        pairs = [(current[name], value) for name, value in self.buffers.items() if name in current]
        return [(buffer, value) for buffer, value in pairs if buffer.shape == value.shape]


def folded_weights(run: Run, view: str | Mapping[str, float], call: str) -> Weights:
    """Return the weights that a fold writes. If the running stage has trained, its slow update is included.

    Raises:
        StateError, SpecError, NonFiniteBranch: as for `Cascade.weights` and `Cascade.release`.
    """
    if (weights := added_weights(run, view, call, folded=True)) is not None:
        return weights
    check_view(call, str(view), run.plan.spec, (*FOLDED, *run.added))
    return Weights(ended(run, call), "averaged" if view == "averaged" else "slow")


def added_weights(run: Run, view: Any, call: str, folded: bool = False) -> Weights | None:
    """Return the weights of an added run, or the sum `W0 + sum_i w_i S_i` of several. None for any other view.

    The weights of a single run have the same bits as its own fold.

    Args:
        run: the run to which other runs were added.
        view: the name of an added run, or a mapping of such names to numbers. `slow` is the run itself.
        call: name of the caller, for messages.
        folded: whether the slow update of the running stage is included for the run itself.

    Raises:
        StateError: an unknown name.
        SpecError: an empty mapping, a number that is inf or nan, a sum that overflows the dtype of a weight, or a sum
            with DoRA.
    """
    weights: Mapping[str, float] = {view: 1} if isinstance(view, str) and view in run.added else view
    if not isinstance(weights, Mapping):
        return None
    if not weights:
        raise SpecError(
            f"{call}: the mapping of runs is empty. Give numbers by names of added runs, such as "
            "{'legal': 0.7, 'slow': 0.3}"
        )
    for name in weights:
        check_view(call, name, run.plan.spec, ("slow", *run.added))
    for name, weight in weights.items():
        if not is_number(weight):
            raise SpecError(f"{call}: {name!r} has the weight {weight!r}. Give a finite number")
    slow = run.slow
    parts = [run.added[name] if name in run.added else _as_part(run, call, folded) for name in weights]
    is_single = [*weights.values()] == [1]
    if not is_single:
        check_summable(call, {part.name: part.plan for part in parts}, "Give a single run by its name")
    after = weighted_sum(slow, parts, [*weights.values()], 1)
    if is_single:  # use the state of the run itself: a sum would round in another order
        states = dict(after.states)
        for name, state in slow.states.items():
            added = parts[0].slow.states.get(name)
            if added is None or (added.full and not state.full):
                continue
            added = replace(added, base=state.base)
            exact = arithmetic(state.base.dtype)
            states[name] = state.bare().holding(added.exact("slow", exact)) if state.full else added
        after = replace(after, states=states)
    else:
        check_fits(after, call)
    return Weights(after, buffers={name: value for name, value in parts[0].buffers.items() if agree(name, parts)})


def _as_part(run: Run, call: str, folded: bool) -> Part:
    """Return the run itself as a part of a sum. Parameters that do not follow the slow rule have current values."""
    slow, trained = (ended(run, call), {}) if folded else (run.slow, run.present(run.slow.trained))
    current = {
        name: state.holding(host(trained[name]))
        for name, state in slow.trained.items()
        if name in trained and not state.follows(run.plan.spec)
    }
    slow = replace(slow, states={**slow.states, **current})
    return Part("slow", run.plan, slow.without_base(), run.model_state())
