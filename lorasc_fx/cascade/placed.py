"""The context manager `Cascade.weights`: puts other weights in place of W_t, and restores W_t at the end."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lorasc_fx.cascade.commit import reserve, weights_to_write
from lorasc_fx.cascade.run import Run
from lorasc_fx.cascade.transition import at_stage
from lorasc_fx.cascade.views import VIEW_NAMES, Weights, added_weights, check_view
from lorasc_fx.errors import StateError
from lorasc_fx.parameters import holders_of
from lorasc_fx.quantized import writable
from lorasc_fx.shards import local
from lorasc_fx.state import Scratch, ViewName
from lorasc_fx.util.fingerprint import checksums
from lorasc_fx.util.undo import AllOrNothing, Block, isolated

Value = TypeVar("Value")

_VERSIONS = itertools.count(1 << 24)
"""Version counters for parameters whose weights are replaced. torch counts writes from 0 and does not reach these."""


@isolated
def placed(undo: Block, run: Run, view: str | Mapping[str, float] | None, stage: int | None, value: Value) -> Value:
    """Put other weights in place; see `Cascade.weights`. Returns `value`, which `with ... as` binds.

    `isolated` makes this a context manager: the steps in `undo` run when the block ends.
    """
    run.check_alive("weights")
    if stage is not None and view is not None:
        raise StateError(
            f"weights({view!r}, stage={stage!r}): give either a view or a stage, not both", code="conflicting-options"
        )
    added = isinstance(view, Mapping) or (isinstance(view, str) and view in run.added)
    if stage is None and not added:
        check_view(f"weights({view!r})", str(view), run.plan.spec, (*VIEW_NAMES, *run.added))
    # Leave inference mode: DTensors cannot be read or written in it.
    with torch.inference_mode(False), torch.no_grad(), run.exclusive("weights", sharded=not added):
        before = Before(run)
        weights = added_weights(run, view, f"weights({view!r})")
        if stage is not None:
            weights = Weights(at_stage(run.slow, stage, "weights"), "slow" if stage else "base")
        elif weights is None:
            checked: ViewName = next(name for name in VIEW_NAMES if name == view)
            weights = Weights(run.slow, checked, learners={**run.branches_by_weight(), **before.trained}, plan=run.plan)
        # Compute everything that needs memory before the first write.
        buffers = weights.buffer_values(run) if weights.buffers else []
        quantized = run.slow.quantized if weights.view != "base" else ()
        dense = weights.dense(quantized, before.parameters) if quantized else {}
        replaced = {id(before.parameters[name]): nn.Parameter(value, False) for name, value in dense.items()}
        undo(before.restore)
        before.keep_buffers(buffer for buffer, _ in buffers)
        for holder in before.places:
            if id(holder.value) in replaced:
                holder.put(replaced[id(holder.value)])
        for name, out in weights_to_write(run, before.parameters):
            weights.write(name, out)
        for buffer, statistics in buffers:
            buffer.copy_(statistics)
        run.placed = stage if stage is not None else str(view)
        run.placed_checksums = checksums(run.present(run.slow.states))
        # With another version, autograd raises for a graph that saved W_t, instead of computing with other weights.
        before.set_versions(next(_VERSIONS))
    return value


class Before:
    """Snapshot of a run's parameters before other weights replace them, which can be restored.

    It has copies of parameters trained in full and of running statistics. All other weights are computed again.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.parameters = run.present(run.slow.states)
        self.trained = {name: local(self.parameters[name]).detach().clone() for name in run.slow.trained}
        dense = writable(self.parameters)
        self.versions = {name: local(value)._version for name, value in dense.items() if not value.is_inference()}
        # FSDP itself replaces sharded parameters and their memory, so only the values of those are restored.
        self.owned = {} if run.is_sharded else self.parameters
        self.places = holders_of(run.model, self.owned)
        self.memory = [(parameter, parameter.data) for name, parameter in dense.items() if name in self.owned]
        self.reserve = reserve(self.parameters, run.is_noisy, narrow=True)
        self.changed: str | None = None  # the first weight that was written inside the `with`
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []  # with their values from before
        norms = (module for module in run.model.modules() if isinstance(module, _BatchNorm))
        self.keep_buffers(buffer for norm in norms for buffer in norm.buffers(recurse=False))

    def keep_buffers(self, buffers: Iterable[torch.Tensor]) -> None:
        """Copy buffers, to restore them with the weights. A buffer that was copied before is skipped."""
        copied = {id(buffer) for buffer, _ in self.buffers}
        self.buffers += [(buffer, buffer.detach().clone()) for buffer in buffers if id(buffer) not in copied]

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
            self._write()
        if self.changed is not None:
            raise StateError(
                f"weights: {self.changed} was written inside the with block (by a training step, load_state_dict, "
                "half, .data). The previous weights are restored, and the write is lost. Train the cascade outside the "
                "block. To cast or change these weights, use a copy (copy.deepcopy(model) inside the block), or the "
                "model after release",
                code="inside-weights",
            )

    def _write(self) -> None:
        """Write the weights of the running stage. Safe to call again after it has raised."""
        run, scratch = self.run, Scratch()
        for holder in self.places:
            if holder.exists:
                holder.put(holder.value)
        for parameter, memory in self.memory:  # a cast or an assignment to `.data` inside the block may replace it
            if parameter.dtype != memory.dtype or parameter.data_ptr() != memory.data_ptr():
                parameter.data = memory

        for name, out in weights_to_write(run, self.parameters):
            if name in self.trained:
                out.copy_(self.trained[name])
                continue
            try:
                run.slow.write_resting(name, run.plan, out, scratch)
            except (MemoryError, RuntimeError):  # out of memory; harmless if this weight was not replaced yet
                if run.placed is not None or self.versions.get(name) != out._version:
                    raise
        for buffer, value in self.buffers:
            buffer.copy_(value)
        run.note_weights(self.parameters)
        run.placed, run.placed_checksums = None, {}
        if self.changed is None:
            self.set_versions()  # the weights are the same again, so autograd graphs that saved them are valid

    def set_versions(self, version: int | None = None) -> None:
        """Set the version counters of the parameters to `version`, or to their values of before if it is None."""
        names = tuple(name for name in self.versions if name in self.owned)
        versions = tuple(self.versions[name] if version is None else version for name in names)
        torch._C._autograd._unsafe_set_version_counter(tuple(self.parameters[name] for name in names), versions)
