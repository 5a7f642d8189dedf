"""Writes the next state of a cascade, all or nothing.

Stages begin, checkpoints are restored and folds end through `write_planned`. It computes weights while it writes them.
`views` writes weights for the time of a block; `moving`, `folding` and `dropped` move or replace tensors of the model.
All of them do so inside a transaction (`util.undo`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lorasc_fx.branch import fill
from lorasc_fx.branch.noise import PIECE, WORKSPACE
from lorasc_fx.cascade.optim import put_state
from lorasc_fx.cascade.run_base import RunBase
from lorasc_fx.parameters import Holder, exchange
from lorasc_fx.plan import Plan
from lorasc_fx.quantized import writable
from lorasc_fx.shards import dtensor_like, local
from lorasc_fx.state import Learner, Scratch, SlowWeights, ViewName, arithmetic
from lorasc_fx.util.undo import Undo

SPARE = 1 << 12
"""Bytes reserved on each device for the small tensors that restoring a weight allocates, in case memory runs out."""


@dataclass(frozen=True)
class WeightValues:
    """Values of the model's weights. Each is computed when it is written, because all of them would need much memory.

    Args:
        slow: the slow state.
        view: the view of the state. None for the weights that train in the running stage (W_t).
        learners: branches, and current values of parameters trained in full, by weight name, if the view includes the
            running stage.
        plan: plan of the running stage. Then parameters that do not follow the slow rule have their current values.
            None for an earlier stage.
        known: values that need not be computed, by name.
    """

    slow: SlowWeights
    view: ViewName | None = "slow"
    learners: Mapping[str, Learner] = field(default_factory=dict)
    plan: Plan | None = None
    known: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def write(self, name: str, out: torch.Tensor, scratch: Scratch | None = None) -> None:
        """Write the weight of this name into a local tensor of its shape."""
        if name in self.known:
            out.copy_(self.known[name])
        elif self.view is not None:
            self.slow.write_value(name, self.view, out, self.learners.get(name), self.plan)
        else:
            assert self.plan is not None, "the weights of a stage depend on its plan"
            self.slow.write_resting(name, self.plan, out, scratch)

    def matches(self, name: str, weight: torch.Tensor, noisy: bool) -> bool:
        """Whether the weight in the model has this value already. Without noise, slow weights usually do.

        Args:
            name: name of the weight.
            weight: the local tensor in the model.
            noisy: whether the weights of the model have noise now.
        """
        state = self.slow.started(name)
        is_slow = self.plan is not None and self.view is not None and self.slow.is_slow(name, self.view)
        same_dtype = weight.dtype == state.base.dtype
        return is_slow and same_dtype and not state.full and not state.differs_from_slow(noisy)

    def dense(self, names: Iterable[str], parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the values of quantized weights as dense tensors, by name."""
        return {name: self.value(name, parameters[name]) for name in names}

    def value(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Return the weight of this name in the dtype of `like`, on its device."""
        value = torch.empty(self.slow.states[name].base.shape, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            self.write(name, value)
        return value


@dataclass(frozen=True)
class Planned:
    """The next state of a cascade: which tensors get which values.

    Args:
        plan: the next plan.
        slow: the next slow weights.
        parameters: parameters of the model to write, by name. Quantized parameters are skipped.
        values: their values. By default the weights of the stage that the plan and the slow weights describe.
        dense: dense values that replace quantized weights, by name.
        factors: local values of the branches' parameters, by weight name and parameter name.
        tensors: pairs of a tensor to write and its value, for example buffers.
        buffers: pairs of a buffer's place in the model and the tensor to put there.
        gradients: full gradients of trained parameters, by the names of `Run.trainable`. All other trained parameters
            get `grad = None`. None to keep the current gradients.
        pending: names of the gradients that no optimizer step has consumed.
        optimizers: the optimizers that get `states`.
        states: the next optimizer state of some parameters. An empty state resets the parameter.
        current: copies of the current values of parameters trained in full, if the caller has them, for a rollback.
            Otherwise copies are made.
    """

    plan: Plan
    slow: SlowWeights
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    values: WeightValues | None = None
    dense: Mapping[str, torch.Tensor] = field(default_factory=dict)
    factors: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    tensors: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    buffers: Sequence[tuple[Holder, torch.Tensor | None]] = ()
    gradients: Mapping[str, torch.Tensor] | None = None
    pending: Collection[str] = ()
    optimizers: Sequence[torch.optim.Optimizer] = ()
    states: Mapping[nn.Parameter, Any] = field(default_factory=dict)
    current: Mapping[str, torch.Tensor] = field(default_factory=dict)


def write_planned(run: RunBase, planned: Planned, undo: Undo) -> None:
    """Write the planned state into the model, the branches, the optimizer and the run. `undo` collects undo steps."""
    branches = run.branches_by_weight()
    if planned.dense:
        quantized = run.present(planned.dense)
        dense = {id(quantized[name]): nn.Parameter(value, False) for name, value in planned.dense.items()}
        exchange(run.model, lambda holder: dense.get(id(holder.value)), undo)
    # Undo steps run in reverse order, so the fields of the run are restored after all values.
    undo(run.restorer())
    undo(_values_restorer(run, planned))
    with torch.no_grad():
        for weight, values in planned.factors.items():
            branches[weight].resize(planned.plan.by_weight[weight])
            for name, factor in branches[weight].named_parameters():
                if name in values:
                    local(factor).copy_(values[name])
        for tensor, value in planned.tensors:
            tensor.copy_(value)
        for holder, buffer in planned.buffers:
            undo(partial(holder.put, holder.value) if holder.exists else partial(holder.store.pop, holder.key, 0))
            holder.put(buffer)
        put_state(planned.optimizers, planned.states, undo)
        _write_parameters(run, planned, undo)
    if planned.gradients is not None:
        # Frozen factors may have a gradient from the stage before too.
        for parameter in run.branches.parameters():
            parameter.grad = None
        for name, parameter in run.trainable().items():
            gradient = planned.gradients.get(name)
            if gradient is not None:
                gradient = dtensor_like(gradient.to(parameter.device, copy=True), parameter)
            parameter.grad = gradient
            if name in planned.pending:
                run.pending.note(parameter)
    run.plan, run.slow = planned.plan, planned.slow
    run.note_weights(planned.parameters)
    run.set_unmerged()


def _write_parameters(run: RunBase, planned: Planned, undo: Undo) -> None:
    """Write the planned parameters one after another. A rollback writes the weights of the stage before.

    A rollback computes each weight again. Copies of all weights would double the memory.
    """
    scratch, spare = Scratch(), reserve(planned.parameters, planned.plan.spec.noise.is_on)
    values = planned.values or WeightValues(planned.slow, None, plan=planned.plan)
    before = WeightValues(run.slow, None, plan=run.plan, known=planned.current)
    new = WeightValues(planned.slow, "base")  # before this commit, a new weight had the value that is W0 now
    for name, out in weights_to_write(run, planned.parameters, planned.slow):
        known = name in run.slow.states or name in planned.current
        undo(partial(_restore, before if known else new, name, out, out._version, spare))
        values.write(name, out, scratch)


def _restore(values: WeightValues, name: str, out: torch.Tensor, version: int, spare: list[torch.Tensor]) -> None:
    """Write the value of before a commit, with the memory of `spare`. Raise only if the weight was written since."""
    spare.clear()
    with torch.no_grad():
        try:
            values.write(name, out)
        except (MemoryError, RuntimeError):  # out of memory
            if out._version != version:
                raise


def reserve(parameters: Mapping[str, nn.Parameter], noisy: bool, narrow: bool = False) -> list[torch.Tensor]:
    """Allocate memory on the host and on each device with a weight. The caller frees it to restore weights.

    Without this reserve, a rollback after running out of memory could fail as well, and leave some weights changed.

    Args:
        parameters: parameters of the model, by name.
        noisy: whether restored weights have noise. An accelerator draws it in a workspace.
        narrow: whether restoring a weight narrower than fp32 needs a buffer for its exact values as well.

    Returns:
        One tensor of bytes per device.
    """
    sizes = {torch.device("cpu"): SPARE} | {local(parameter).device: SPARE for parameter in parameters.values()}
    for parameter in writable(parameters).values() if noisy else ():
        if (weight := local(parameter)).device.type != "cpu":
            exact = 4 * weight.numel() if narrow and weight.dtype != arithmetic(weight.dtype) else 0
            workspace = WORKSPACE * min(weight.numel(), PIECE)
            sizes[weight.device] = max(sizes[weight.device], exact + workspace + 2 * SPARE)
    return [torch.empty(size, dtype=torch.uint8, device=device) for device, size in sizes.items()]


def weights_to_write(
    run: RunBase, parameters: Mapping[str, nn.Parameter], after: SlowWeights | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the local tensor of each parameter. The caller writes into the tensor.

    W0 is copied first if it shares the memory of the tensor. Quantized weights are skipped, because their branches
    compute the deltas (`RunBase.set_unmerged`).

    Args:
        run: the run, whose W0 must survive the write.
        parameters: parameters of the model, by name.
        after: the next slow weights, if they are other ones than the run has now. Their W0 must survive as well.
    """
    for name, parameter in writable(parameters).items():
        out = local(parameter)
        for slow in (run.slow, after):
            if slow is not None and name in slow.states:
                slow.states[name].keep_base(out)
        yield name, out


def _values_restorer(run: RunBase, planned: Planned) -> Callable[[], None]:
    """Return a function that restores the branches, tensors and gradients that a commit changes, from copies.

    Weights of the slow state are left out, because `_write_parameters` computes them again. Of parameters trained in
    full, only those without a copy in `current` are copied.
    """
    branches, trained = run.branches_by_weight(), run.slow.trained
    written = [branches[weight] for weight in planned.factors]
    sites = [run.plan.by_weight[weight] for weight in planned.factors]
    copied = [factor for branch in written for factor in branch.parameters()]
    copied += [
        parameter for name, parameter in planned.parameters.items() if name in trained and name not in planned.current
    ]
    values = [(parameter, parameter.detach().clone()) for parameter in copied]
    tensors = [(tensor, tensor.detach().clone()) for tensor, _ in planned.tensors]
    if planned.gradients is not None:
        copied += [*run.branches.parameters(), *run.trainable().values()]
    gradients = [(parameter, parameter.grad) for parameter in copied]

    def restore() -> None:
        for parameter, value in values:
            fill(parameter, value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for branch, site in zip(written, sites, strict=True):
            branch.resize(site)  # the values have this rank already
        with torch.no_grad():
            for tensor, value in tensors:
                tensor.copy_(value)

    return restore
