"""Writes planned values. Only this file and `placed` write to the user's model and to the branches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lorasc_fx.branch import fill
from lorasc_fx.branch.noise import PIECE, WORKSPACE
from lorasc_fx.cascade.optim import put_state, stepping
from lorasc_fx.cascade.run_base import RunBase
from lorasc_fx.parameters import Holder, exchange
from lorasc_fx.plan import Plan
from lorasc_fx.quantized import writable
from lorasc_fx.shards import dtensor_like, local
from lorasc_fx.state import Scratch, SlowWeights, arithmetic
from lorasc_fx.util.undo import Undo

SPARE = 1 << 12
"""Bytes that are kept free so that weights can be restored if memory runs out: for small tensors."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of the running stage. A trained parameter that is not named has none.

    Args:
        values: by the names of `Run.trainable`.
        pending: names of the gradients that no optimizer step has consumed.
    """

    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    pending: Collection[str] = ()


@dataclass(frozen=True)
class Planned:
    """The next state of a cascade. All values are known before the first one is written.

    Args:
        plan: the next plan.
        slow: the next slow weights.
        parameters: parameters of the model to write, by name. Quantized ones are not written.
        write: writes one of them, by name. The default writes what the parameter holds between two steps, and `live`
            values of parameters trained in full.
        dense: dense values that replace quantized weights, by name.
        factors: local values of the branches' parameters, by weight and by name.
        tensors: pairs of another tensor and its value.
        buffers: pairs of the place of a buffer and the tensor to put there.
        gradients: of trained parameters; None to keep them.
        optimizer, states: an optimizer, and the states that it gets.
        live: copies of parameters trained in full, if the caller has them. Otherwise a copy is made for the rollback.
    """

    plan: Plan
    slow: SlowWeights
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    write: Callable[[str, torch.Tensor], object] | None = None
    dense: Mapping[str, torch.Tensor] = field(default_factory=dict)
    factors: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    tensors: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    buffers: Sequence[tuple[Holder, torch.Tensor | None]] = ()
    gradients: Gradients | None = None
    optimizer: torch.optim.Optimizer | None = None
    states: Mapping[nn.Parameter, Any] = field(default_factory=dict)
    live: Mapping[str, torch.Tensor] = field(default_factory=dict)


def write_planned(run: RunBase, planned: Planned, undo: Undo) -> None:
    """Write planned values and let the run hold them. `undo` gets the steps that restore everything."""
    branches = run.branches_by_weight()
    if planned.dense:
        quantized = run.present(planned.dense)
        dense = {id(quantized[name]): nn.Parameter(value, False) for name, value in planned.dense.items()}
        exchange(run.model, lambda holder: dense.get(id(holder.value)), undo)
    # Steps to undo are added before the writes and run in reverse order, so the run's fields are restored after values.
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
            undo(partial(holder.put, holder.value) if holder.is_there else partial(holder.store.pop, holder.key, 0))
            holder.put(buffer)
        if (optimizer := planned.optimizer) is not None:
            table = stepping(optimizer).state
            undo(partial(put_state, optimizer, {parameter: table[parameter] for parameter in planned.states}))
            put_state(optimizer, planned.states)
        _write_parameters(run, planned, undo)
    if planned.gradients is not None:
        # Also factors that are not trained may hold a gradient of the stage before.
        for parameter in run.branches.parameters():
            parameter.grad = None
        for name, parameter in run.trainable().items():
            gradient = planned.gradients.values.get(name)
            if gradient is not None:
                gradient = dtensor_like(gradient.to(parameter.device, copy=True), parameter)
            parameter.grad = gradient
            if name in planned.gradients.pending:
                run.pending.note(parameter)
    run.plan, run.slow = planned.plan, planned.slow
    run.note_weights(planned.parameters)
    run.set_unmerged()


def _write_parameters(run: RunBase, planned: Planned, undo: Undo) -> None:
    """Write the planned parameters in turn. A rollback writes what they hold between two steps of the current stage."""
    scratch, plan = Scratch(), run.plan
    spare = reserve(planned.parameters, planned.plan.spec.noise.is_on)

    def write_resting(plan: Plan, slow: SlowWeights, name: str, out: torch.Tensor) -> None:
        if name in planned.live:
            out.copy_(planned.live[name])
        elif name in slow.states:
            slow.write_resting(name, plan, out, scratch)
        else:  # the state does not know this weight yet
            planned.slow.write_value(name, "base", out)

    def restore(slow: SlowWeights, name: str, out: torch.Tensor, version: int) -> None:
        spare.clear()
        with torch.no_grad():
            try:
                write_resting(plan, slow, name, out)
            except (MemoryError, RuntimeError):  # out of memory does no harm if nothing was written here
                if out._version != version:
                    raise

    # Each weight is computed again for a rollback: a copy of all weights would double the memory.
    for name, out in weights_to_write(run, planned.parameters, planned.slow):
        undo(partial(restore, run.slow, name, out, out._version))
        if planned.write is not None:
            planned.write(name, out)
        else:
            write_resting(planned.plan, planned.slow, name, out)


def reserve(parameters: Mapping[str, nn.Parameter], noisy: bool, narrow: bool = False) -> list[torch.Tensor]:
    """Allocate memory, on the host and wherever a weight is, that is freed before weights are restored.

    Without it, a device that has run full would keep some of the weights that were written.

    Args:
        parameters: of the model, by name.
        noisy: whether noise is restored with them, which an accelerator computes in a workspace.
        narrow: whether the exact values of a narrow weight need memory as well.
    """
    sizes = {torch.device("cpu"): SPARE} | {local(each).device: SPARE for each in parameters.values()}
    for parameter in writable(parameters).values() if noisy else ():
        if (weight := local(parameter)).device.type != "cpu":
            exact = 4 * weight.numel() if narrow and weight.dtype != arithmetic(weight.dtype) else 0
            workspace = WORKSPACE * min(weight.numel(), PIECE)
            sizes[weight.device] = max(sizes[weight.device], exact + workspace + 2 * SPARE)
    return [torch.empty(size, dtype=torch.uint8, device=device) for device, size in sizes.items()]


def weights_to_write(
    run: RunBase, parameters: Mapping[str, nn.Parameter], after: SlowWeights | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the local tensor of each of these parameters. The caller writes into the tensor.

    W0 is copied first if it shares the memory of the tensor. Quantized weights are left out: their branches compute the
    deltas (`RunBase.set_unmerged`).

    Args:
        run: whose W0 is kept.
        parameters: by name.
        after: slow weights that the run will hold, if they differ.
    """
    for name, parameter in writable(parameters).items():
        out = local(parameter)
        for slow in (run.slow, after):
            if slow is not None and name in slow.states:
                slow.states[name].keep_base(out)
        yield name, out


def _values_restorer(run: RunBase, planned: Planned) -> Callable[[], None]:
    """Return a function that restores the values and gradients that a commit changes.

    Weights of the slow state are computed again, and for parameters in `live` there is a copy: both are left out.
    """
    branches, trained = run.branches_by_weight(), run.slow.trained
    written = [branches[weight] for weight in planned.factors]
    scales = [(branch, branch.scale) for branch in written]
    copied = [factor for branch in written for factor in branch.parameters()]
    copied += [
        parameter for name, parameter in planned.parameters.items() if name in trained and name not in planned.live
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
        for branch, scale in scales:
            branch.scale = scale
        with torch.no_grad():
            for tensor, value in tensors:
                tensor.copy_(value)

    return restore
