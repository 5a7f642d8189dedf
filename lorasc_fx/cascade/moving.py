"""Moves and casts of a cascade: `to`, `cuda`, `half` and the other methods that call `nn.Module._apply`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorasc_fx.cascade.commit import Planned
from lorasc_fx.cascade.graphs import Graphs
from lorasc_fx.cascade.run import Run
from lorasc_fx.quantized import QuantizedLinear, quantized_in
from lorasc_fx.util.undo import PROCESS, AllOrNothing

Change = Callable[[torch.Tensor], torch.Tensor]
"""Moves or casts one tensor."""


def move(run: Run, graphs: Graphs, cascade: nn.Module, fn: Change, recurse: bool) -> None:
    """Move or cast the model and the branches of a run. If anything raises, nothing is changed.

    Args:
        run: the run.
        graphs: its graphs, which are dropped.
        cascade: the module that has the model and the branches as children.
        fn: moves or casts one tensor.
        recurse: whether to change submodules, as for `nn.Module._apply`.

    Raises:
        StateError: after `release`, or if `fn` changes a tensor inside `weights` or inside a backward.
    """
    with PROCESS, run.lock, AllOrNothing() as undo:
        run.check_alive("to")
        # `to` with the current device and dtype changes nothing, and must not drop the graphs.
        parameters, trained = run.parameters_by_name(), run.present(run.slow.trained)
        tensors = [*(value.data for value in parameters.values()), *run.model.buffers(), *run.branches.parameters()]
        if all(_is_unchanged(tensor.data, fn(tensor.data)) for tensor in tensors):
            return
        run.check_ready("to")
        dtypes = {name: value.dtype for name, value in parameters.items()}
        # Fingerprints identify the base that was adapted, so compute them before its values change.
        if run.digests or any(fn(torch.empty(0, dtype=dtype)).dtype != dtype for dtype in set(dtypes.values())):
            run.fingerprints()
        changed_buffers = run.changed_buffers()
        unmoved = [name for name, value in trained.items() if not run.slow.moved({name: value})]
        undo(partial(setattr, graphs, "example", graphs.example))
        undo(_tensors_restorer(run, cascade))
        if recurse:
            _replace_quantized(run.model, fn)
            run.model._apply(fn)
            run.branches._apply(_at_least_fp32(fn))
        graphs.drop(undo)
        graphs.example = pytree.tree_map_only(torch.Tensor, fn, graphs.example)
        # A cast has rounded these weights a second time. Compute them again from W0, so that they are rounded once.
        cast = [name for name, value in run.weights_by_name().items() if value.dtype != dtypes[name]]
        run.commit(Planned(run.plan, run.slow, run.present([*cast, *unmoved])), undo)
        run.note_weights()
        run.note_frozen()
        run.note_buffers(changed_buffers)


def _is_unchanged(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether `after` is the same tensor, or an equal copy of the same kind: torch copies for the device `cpu:0`."""
    if after is before:
        return True
    if is_traceable_wrapper_subclass(before) and type(after) is type(before):  # a quantized weight
        names, context = before.__tensor_flatten__()
        after_names, after_context = after.__tensor_flatten__()
        alike = (names, context, before.dtype) == (after_names, after_context, after.dtype)
        return alike and all(_is_unchanged(getattr(before, name), getattr(after, name)) for name in names)
    if type(before) is not torch.Tensor or type(after) is not torch.Tensor:
        return False
    kind = (before.device, before.dtype, before.is_pinned())
    if kind != (after.device, after.dtype, after.is_pinned()):
        return False
    bits = [value.view(torch.uint8) if value.dtype.itemsize == 1 else value for value in (before, after)]
    return torch.equal(*bits)  # torch cannot compare fp8 values


def _at_least_fp32(fn: Change) -> Change:
    """Return a function that moves and casts factors like `fn`, but never to a dtype narrower than fp32."""

    def change(factor: torch.Tensor) -> torch.Tensor:
        value = fn(factor)
        return value if value.dtype.itemsize >= 4 else factor.to(value.device, torch.float32)

    return change


def _tensors_restorer(run: Run, cascade: nn.Module) -> Callable[[], None]:
    """Return a function that restores the parameters and buffers of every module, with their current memory."""
    modules = [(module, dict(module._parameters), dict(module._buffers)) for module in cascade.modules()]
    # Some modules (nn.LSTM) keep parameters in lists as well, and `_apply` writes into them.
    lists = [
        (store, list(store)) for module in cascade.modules() for store in vars(module).values() if type(store) is list
    ]
    data = [
        (value, value.data, value.grad, None if value.grad is None else value.grad.data, value.requires_grad)
        for value in cascade.parameters()
    ]

    def restore() -> None:
        for module, parameters, buffers in modules:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for store, values in lists:
            store[:] = values
        for value, memory, gradient, gradient_memory, requires_grad in data:
            value.grad = None  # torch refuses new data whose dtype or device differs from the gradient's
            value.data = memory
            value.requires_grad_(requires_grad)
            if gradient is not None and gradient_memory is not None:
                gradient.data = gradient_memory
            value.grad = gradient
        run.note_weights()
        run.note_frozen()

    return restore


def _replace_quantized(model: nn.Module, fn: Change) -> None:
    """Move or cast quantized weights into new parameters.

    `nn.Module._apply` would swap the tensors of old and new parameters, and raises if a weak reference to one exists.
    """
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            continue
        own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        for name, parameter in quantized_in(own).items():
            if id(parameter) not in new:  # tied weights stay tied
                new[id(parameter)] = nn.Parameter(fn(parameter.detach()), False)
            module._parameters[name] = new[id(parameter)]
