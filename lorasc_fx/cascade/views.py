"""The weights that `Cascade.weights` puts in place and that folds write.

`placed` puts weights in place of W_t, and restores W_t at the end of the block.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lorasc_fx.cascade.commit import WeightValues, reserve, weights_to_write
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.transition import at_stage, ended
from lorasc_fx.errors import StateError, nearest
from lorasc_fx.parameters import holders_of
from lorasc_fx.quantized import writable
from lorasc_fx.shards import local
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state import Scratch, ViewName
from lorasc_fx.util.environment import free_memory
from lorasc_fx.util.fingerprint import checksums
from lorasc_fx.util.undo import AllOrNothing, Block, isolated

Value = TypeVar("Value")

VIEW_NAMES: tuple[ViewName, ...] = ("slow", "fast", "base", "averaged")
FOLDED: tuple[ViewName, ...] = ("slow", "averaged")
"""The views that a fold can write."""

COPIED = 0.25
"""Part of the free memory of an accelerator for copies of weights, while others are in place."""

_VERSIONS = itertools.count(1 << 24)
"""Version counters for parameters whose weights are replaced. torch counts writes from 0 and does not reach these."""


def check_view(call: str, view: str, spec: CascadeSpec, names: Sequence[str] = FOLDED) -> None:
    """Raise StateError if `view` is not one of these names, or is "averaged" and the spec keeps no average."""
    if view not in names:
        raise StateError(
            f"{call}: {view!r} is not a view of the weights. Give one of {', '.join(names)}{nearest(str(view), names)}",
            code="unknown-name",
        )
    if view == "averaged" and not spec.average:
        raise StateError(
            f"{call}: the spec keeps no average of the slow weights. Give it average=True",
            code="not-available",
        )


def folded_weights(run: Run, view: str, call: str) -> WeightValues:
    """Return the weights that a fold writes. If the running stage has trained, its slow update is included.

    Raises:
        StateError, SpecError, NonFiniteBranch: as for `Cascade.weights` and `Cascade.release`.
    """
    check_view(call, view, run.plan.spec)
    return WeightValues(ended(run, call), "averaged" if view == "averaged" else "slow")


@isolated
def placed(undo: Block, run: Run, view: str | None, stage: int | None, value: Value) -> Value:
    """Put other weights in place; see `Cascade.weights`. Returns `value`, which `with ... as` binds.

    `isolated` makes this a context manager: the steps in `undo` run when the block ends.
    """
    run.check_alive("weights")
    if stage is not None and view is not None:
        raise StateError(
            f"weights({view!r}, stage={stage!r}): give either a view or a stage, not both", code="conflicting-options"
        )
    if stage is None:
        check_view(f"weights({view!r})", str(view), run.plan.spec, VIEW_NAMES)
    # Leave inference mode: DTensors cannot be read or written in it.
    with torch.inference_mode(False), torch.no_grad(), run.exclusive("weights", sharded=True):
        before = Before(run)
        if stage is not None:
            weights = WeightValues(at_stage(run.slow, stage, "weights"), "slow" if stage else "base")
        else:
            checked: ViewName = next(name for name in VIEW_NAMES if name == view)
            weights = WeightValues(
                run.slow, checked, learners={**run.branches_by_weight(), **before.trained}, plan=run.plan
            )
        # Compute everything that needs memory before the first write.
        quantized = run.slow.quantized if weights.view != "base" else ()
        dense = weights.dense(quantized, before.parameters) if quantized else {}
        replaced = {id(before.parameters[name]): nn.Parameter(value, False) for name, value in dense.items()}
        undo(before.restore)
        weights = before.keep_weights(weights)
        for holder in before.places:
            if id(holder.value) in replaced:
                holder.put(replaced[id(holder.value)])
        for name, out in weights_to_write(run, before.parameters):
            if name not in before.matching:
                weights.write(name, out)
        run.placed = stage if stage is not None else str(view)
        written = run.present(name for name in run.slow.states if name not in before.matching)
        by_name = run.recorded(before.matching) | checksums(written)
        run.placed_checksums = {name: by_name[name] for name in run.slow.states if name in by_name}
        # With another version, autograd raises for a graph that saved W_t, instead of computing with other weights.
        before.set_versions(next(_VERSIONS))
    return value


def fast_parameters(run: Run, call: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Return an iterator over the user's model's parameters with the fast weights, for a sampler such as vLLM.

    Each tensor is computed when it is asked for, and rounded once. Inside `weights(...)` the weights in place are
    returned.

    Raises:
        StateError: the sampler could not use the tensors, because weights are quantized, sharded or untied.
    """
    run.check_alive(call)
    for name, fault in (
        (next(iter(run.slow.quantized), None), "quantized"),
        ("the weights", "sharded over processes") if run.is_sharded else (None, ""),
        (next(iter(run.plan.spec.untie), None), "untied, and vLLM ties it again"),
    ):
        if name is not None:
            raise StateError(
                f"{call}: vLLM cannot sample from this cascade, because {name} is {fault}. Set use_vllm=False, so that "
                "transformers generates",
                code="trainer-not-supported",
            )
    learners = run.learners()

    def value(name: str, parameter: nn.Parameter) -> torch.Tensor:
        if run.placed is not None or name not in run.slow.states:
            return parameter
        with run.lock:
            return run.slow.value(name, "fast", parameter, learners.get(name), run.plan)

    return ((name, value(name, parameter)) for name, parameter in run.model.named_parameters())


class Before:
    """Snapshot of a run's parameters before other weights replace them, which can be restored.

    It has copies of parameters trained in full and of running statistics. It also copies weights on an accelerator, if
    W0 is in host memory and part of the free memory suffices. All other weights are computed again.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.plan = run, run.plan
        self.parameters = run.present(run.slow.states)
        self.trained = {name: local(self.parameters[name]).detach().clone() for name in run.slow.trained}
        dense = writable(self.parameters)
        self.versions = {name: local(value)._version for name, value in dense.items() if not value.is_inference()}
        # FSDP itself replaces sharded parameters and their memory, so only the values of those are restored.
        self.owned = {} if run.is_sharded else self.parameters
        self.places = holders_of(run.model, self.owned.values())
        self.memory = [(parameter, parameter.data) for name, parameter in dense.items() if name in self.owned]
        self.reserve = reserve(self.parameters, run.is_noisy, narrow=True)
        self.matching: set[str] = set()  # weights that have their new values already
        self.copies: dict[str, torch.Tensor] = {}  # copies of weights on accelerators
        self.changed: str | None = None  # the first weight that was written inside the `with`
        norms = (module for module in run.model.modules() if isinstance(module, _BatchNorm))
        statistics = {id(buffer): buffer for norm in norms for buffer in norm.buffers(recurse=False)}
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in statistics.values()]

    def keep_weights(self, weights: WeightValues) -> WeightValues:
        """Find the weights that need not be written, and copy others on accelerators, to restore them from there.

        Returns:
            `weights`, with W0 on the accelerator if the model's own weight is W0.
        """
        run, budgets, states = self.run, dict[torch.device, int](), dict(weights.slow.states)
        for name, parameter in writable(self.parameters).items():
            weight, state = local(parameter), run.slow.started(name)
            if weights.matches(name, weight, run.is_noisy):
                self.matching.add(name)
            elif name not in self.trained and weight.device not in (torch.device("cpu"), state.base.device):
                if weight.device not in budgets:
                    budgets[weight.device] = int(COPIED * free_memory(weight.device))
                if weight.nbytes <= budgets[weight.device]:
                    budgets[weight.device] -= weight.nbytes
                    self.copies[name] = weight.detach().clone()
                if state.starts_at_base(run.is_noisy) and weight.dtype == state.base.dtype and name in states:
                    states[name] = replace(states[name], base=weight.detach())
        return replace(weights, slow=replace(weights.slow, states=states))

    def restore(self) -> None:
        """Restore the weights of the running stage. If that raises, try once more.

        Raises:
            StateError: a weight was written inside the block. The weights are restored nevertheless.
        """
        run = self.run
        self.reserve.clear()  # the memory that restoring needs
        with torch.inference_mode(False), torch.no_grad(), run.lock, AllOrNothing() as again:
            again(self._write)
            self.changed = run.changed(run.placed_checksums)
            self._write(self.matching if self.changed is None else ())
        if self.changed is not None:
            raise StateError(
                f"weights: {self.changed} was written inside the with block (by a training step, load_state_dict, "
                "half, .data). The previous weights are restored, and the write is lost. Train the cascade outside the "
                "block. To cast or change these weights, use a copy (copy.deepcopy(model) inside the block), or the "
                "model after release",
                code="inside-weights",
            )

    def _write(self, unchanged: Collection[str] = ()) -> None:
        """Write the weights of the running stage, except unchanged ones. Safe to call again after it has raised."""
        run, scratch = self.run, Scratch()
        same_plan = run.plan is self.plan  # a step inside the block may have changed the noise
        kept = self.trained | (self.copies if same_plan else {})
        for holder in self.places:
            if holder.exists:
                holder.put(holder.value)
        for parameter, memory in self.memory:  # a cast or an assignment to `.data` inside the block may replace it
            if parameter.dtype != memory.dtype or parameter.data_ptr() != memory.data_ptr():
                parameter.data = memory

        for name, out in weights_to_write(run, self.parameters):
            if name in unchanged:
                continue
            if name in kept:
                out.copy_(kept[name])
                continue
            try:
                run.slow.write_resting(name, run.plan, out, scratch)
            except (MemoryError, RuntimeError):  # out of memory; harmless if this weight was not replaced yet
                if run.placed is not None or self.versions.get(name) != out._version:
                    raise
        for buffer, value in self.buffers:
            buffer.copy_(value)
        if not same_plan:
            run.note_weights(self.parameters)
        run.placed, run.placed_checksums = None, {}
        if self.changed is None:
            self.set_versions()  # the weights are the same again, so autograd graphs that saved them are valid

    def set_versions(self, version: int | None = None) -> None:
        """Set the version counters of the parameters to `version`, or to their values of before if it is None."""
        names = tuple(name for name in self.versions if name in self.owned)
        versions = tuple(self.versions[name] if version is None else version for name in names)
        torch._C._autograd._unsafe_set_version_counter(tuple(self.parameters[name] for name in names), versions)
