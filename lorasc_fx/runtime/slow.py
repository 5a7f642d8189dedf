"""The slow weights of a whole model: who owns W0, and the one place that writes values into the user's parameters.

While a stage trains, the user's parameters hold `W_t`. `SlowWeights` is a value: a transition makes the next one,
writes it, and only then is it the cascade's. A write that raises puts back what was there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lorasc_fx.branch import Branch, SlowWeight, Which, arithmetic, end_stage, factors_of, is_quantized
from lorasc_fx.branch.stage import all_finite, write_start
from lorasc_fx.plan import Plan

__all__ = ["AFFORDABLE", "SlowWeights", "Trained", "fill", "write"]

AFFORDABLE = 1 << 20
"""Entries trained in full of which a copy is kept at the end of each stage; more only if the branches hold as many."""


@dataclass(frozen=True)
class Trained:
    """A parameter trained in full: its value before adaptation, its slow value, and the one its stage started from.

    `past` holds the slow values at the ends of stages, oldest first, as long as that is affordable (`AFFORDABLE`).
    """

    base: torch.Tensor
    slow: torch.Tensor
    start: torch.Tensor
    past: tuple[tuple[int, torch.Tensor], ...] = ()


@dataclass(frozen=True)
class SlowWeights:
    """Slow states by weight name.

    Args:
        states: of the sites, and of every matrix that carries noise.
        trained: of the parameters trained in full.
        parked: no stage runs; the parameters hold the slow weights, without noise.
    """

    states: Mapping[str, SlowWeight] = field(default_factory=dict)
    trained: Mapping[str, Trained] = field(default_factory=dict)
    parked: bool = False

    def with_weights(
        self, parameters: Mapping[str, nn.Parameter], plan: Plan, mapped: Mapping[str, torch.Tensor] | None = None
    ) -> SlowWeights:
        """Return the state that knows these weights as well; their present values are W0, kept on the host.

        `mapped` are W0 of some of them, equal to the present values, kept where they are.
        """
        sites, mapped = plan.by_weight, mapped or {}
        new = {
            name: SlowWeight(
                name,
                mapped[name] if name in mapped else host(value),
                stacked=name in sites and sites[name].experts is not None,
            )
            for name, value in parameters.items()
            if name not in self.states
        }
        return replace(self, states={**self.states, **new})

    def with_trained(self, parameters: Mapping[str, nn.Parameter]) -> SlowWeights:
        """Return the state that knows these parameters, trained in full."""
        new = {}
        for name, value in parameters.items():
            base = host(value)
            new[name] = Trained(base, base.to(arithmetic(base.dtype)), base)
        return replace(self, trained=new)

    def resting(self, name: str, plan: Plan, like: torch.Tensor) -> torch.Tensor:
        """Return what the parameter of this name holds between two steps: W_t, or when parked the slow weight."""
        value = torch.empty_like(like, requires_grad=False)
        with torch.no_grad():
            self.write_resting(name, plan, value)
        return value

    def write_resting(self, name: str, plan: Plan, out: torch.Tensor) -> None:
        """Write what `resting` returns into `out`."""
        if self.parked:
            self.write_value(name, "slow", out)
        else:
            write_start(out, self.states[name], plan.spec, plan.stage)

    def value(self, name: str, which: Which, like: torch.Tensor, branch: Branch | None = None) -> torch.Tensor:
        """Return slow, fast or base weights of this name, rounded once to the dtype of `like`, on its device."""
        state = self._as_run(self.states[name])
        value = torch.empty(state.base.shape, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            self.write_value(name, which, value, branch)
        return value

    def write_value(self, name: str, which: Which, out: torch.Tensor, branch: Branch | None = None) -> None:
        """Write what `value` returns into `out`."""
        live = factors_of(branch, out.device) if branch is not None and which == "fast" else None
        self._as_run(self.states[name]).write(out, which, arithmetic(out.dtype), live)

    def after_stage(
        self, plan: Plan, branches: Mapping[str, Branch], parameters: Mapping[str, nn.Parameter]
    ) -> SlowWeights:
        """Return the state after the slow update of the running stage (algorithm.md, row "slow update").

        Args:
            plan: of the stage that ends.
            branches: by weight name.
            parameters: those trained in full, by name, with their fast values.
        """
        spec, noisy, finite = plan.spec, not self.parked, all_finite(branches.values())
        size = sum(each.numel() for branch in branches.values() for each in (branch.lora_A, branch.lora_B))
        kept_on = sum(kept.base.numel() for kept in self.trained.values()) <= max(AFFORDABLE, size)
        states = {
            name: end_stage(self._as_run(state), branches.get(name), spec, plan.stage, noisy, checked=finite)
            for name, state in self.states.items()
        }
        trained = {}
        for name, kept in self.trained.items():
            fast = host(parameters[name])
            exact = fast.to(kept.slow.dtype)
            same = spec.pace == 1 or not spec.slow_train
            slow = exact if same else torch.lerp(kept.slow, exact, spec.pace)
            start = fast if spec.restart == "fast" or same else slow.to(fast.dtype)
            past = (*kept.past, (plan.stage, slow)) if kept_on else ()
            trained[name] = Trained(kept.base, slow, start, past)
        return replace(self, states=states, trained=trained, parked=False)

    def _as_run(self, state: SlowWeight) -> SlowWeight:
        """Return the state from which the running stage started: when parked, the slow weights."""
        return replace(state, start=state.slow, dense_start=state.dense_slow) if self.parked else state


def host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in host memory, off the training device; of a quantized weight, which nothing writes to, itself."""
    if is_quantized(tensor):
        return tensor.detach()
    return tensor.detach().to("cpu", copy=True)


def write(
    parameters: Mapping[str, nn.Parameter],
    names: Iterable[str],
    new: Callable[[str, torch.Tensor], torch.Tensor],
    old: Callable[[str, torch.Tensor], torch.Tensor],
) -> None:
    """Write `new(name, parameter)` into each parameter, one at a time; if anything raises, write `old` back."""
    fill(
        parameters,
        names,
        lambda name, out: out.copy_(new(name, out)),
        lambda name, out: out.copy_(old(name, out)),
    )


def fill(
    parameters: Mapping[str, nn.Parameter],
    names: Iterable[str],
    new: Callable[[str, torch.Tensor], object],
    old: Callable[[str, torch.Tensor], object],
) -> None:
    """Let `new(name, parameter)` write into each parameter in turn; if anything raises, let `old` do so again.

    A quantized weight is not written to: its branch carries what the stages added (`Core.advance`).
    """
    touched: list[str] = []
    with torch.no_grad():
        try:
            for name in names:
                if not is_quantized(parameters[name]):
                    touched.append(name)
                    new(name, parameters[name])
        except BaseException:
            for name in touched:
                old(name, parameters[name])
            raise
