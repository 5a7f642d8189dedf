"""Run a model without side effects: restore the model and the process after the execution.

Buffers, parameters that forward writes into, and attributes that forward sets are restored.

A sharded model has no full weights to compute with, so it runs on fake tensors. These have a shape, a dtype and the
device of the inputs, but no memory. Such a model can run and be traced, but code that reads a value (`.item()`) raises.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lorasc_fx.check.guards import MISSING, StateHolder, attribute_tensors, walk
from lorasc_fx.check.process_state import ObserverMode, eager, quiet, seed
from lorasc_fx.parameters import exchange, substituted
from lorasc_fx.quantized import writable
from lorasc_fx.signature import copy_inputs, leaves
from lorasc_fx.util.torch_private import FakeTensor, FakeTensorMode, OpOverload, has_storage
from lorasc_fx.util.undo import Block, isolated


@isolated
def isolation(
    undo: Block,
    model: nn.Module,
    args: object,
    kwargs: Mapping[str, object],
    *observers: AbstractContextManager[Any],
    grad: bool = True,
    seeded: bool = True,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Context manager: isolate executions of the model, and return copies of the arguments to run it with.

    Args:
        undo: restores the state at the end of the block.
        model: the model to run.
        args, kwargs: arguments of a call.
        observers: context managers that are entered last, such as hooks, dispatch modes and replaced weights.
        grad: whether gradients are on.
        seeded: whether the random generators start from a fixed seed, so that two executions draw the same numbers.
            Otherwise an execution draws the numbers of the next real call, and so skips the same layers at random.
    """
    inputs = copy_inputs(args, kwargs)
    undo.enter(quiet(grad))
    undo.enter(isolated_model(model))
    for observer in observers:
        undo.enter(observer)
    if seeded:
        seed()
    return inputs


@isolated
def call_recorder(
    undo: Block,
    model: nn.Module,
    before_call: Callable[[str, nn.Module, Any, Any], None],
    after_call: Callable[[str, nn.Module, Any], None],
) -> None:
    """Context manager: call functions before and after each call of a module of the model.

    Args:
        undo: removes the hooks at the end of the block.
        model: the model. A module with several paths is reported under the first path.
        before_call: gets path, module, args and kwargs.
        after_call: gets path, module and output. The output is None if the call raised.
    """

    def without_args(path: str, module: nn.Module, args: object, output: object) -> None:
        after_call(path, module, output)

    for path, module in model.named_modules():
        undo(module.register_forward_pre_hook(partial(before_call, path), prepend=True, with_kwargs=True).remove)
        undo(module.register_forward_hook(partial(without_args, path), always_call=True).remove)


WRITTEN: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
"""{model that has run in isolation: the names that `written_by` returns}."""


def written_by(model: nn.Module, default: frozenset[str] = frozenset()) -> frozenset[str]:
    """Return the names of the parameters that forward writes into, and of the buffers that forward registers.

    Args:
        model: the model.
        default: the result for a model that has not run in isolation.
    """
    return WRITTEN.get(model, default)


@dataclass(frozen=True)
class Attributes:
    """A snapshot of the Python state of a model.

    Args:
        holders: (holder, shallow copy of its contents) for each holder.
        tensors: (tensor, its version, copy of its values, whether it had a grad_fn) for each tensor in the holders.
    """

    holders: list[tuple[StateHolder, Any]]
    tensors: list[tuple[torch.Tensor, int, torch.Tensor, bool]]

    @classmethod
    def of(cls, model: nn.Module) -> Attributes:
        """Take a snapshot."""
        holders = list(walk(model))
        tensors = [
            (tensor, tensor._version, tensor.detach().clone(), tensor.grad_fn is not None)
            for _, tensor in attribute_tensors(model, holders)
            if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
            if not (tensor.is_inference() or tensor.is_nested)
        ]
        return cls([(holder, holder.contents()) for holder in holders], tensors)

    def restore(self) -> None:
        """Restore the contents of every holder, and the values of every tensor. Detach tensors that had no grad_fn."""
        for tensor, version, value, had_history in self.tensors:
            if tensor._version != version:
                with torch.no_grad():
                    if not torch.equal(tensor, value):
                        tensor.copy_(value)
                if not had_history:
                    detach(tensor)
        for holder, before in self.holders:
            store = holder.store
            if isinstance(store, dict):
                for key in [key for key in holder.contents() if key not in before]:
                    del store[key]
                for key, value in before.items():
                    if store.get(key, MISSING) is not value:
                        store[key] = value
            elif list(map(id, store)) != list(map(id, before)):
                store.clear()
                store.extend(before) if isinstance(store, (list, deque)) else store.update(before)


def detach(tensor: torch.Tensor) -> None:
    """Remove the autograd history that a write in forward has given to a tensor. No-op for a view, as torch raises."""
    if tensor.grad_fn is not None and not tensor._is_view():
        tensor.detach_()


@isolated
def restored_attributes(undo: Block, model: nn.Module) -> Attributes:
    """Context manager: restore the model's Python state at the end of the block. Returns the snapshot."""
    attributes = Attributes.of(model)
    undo(attributes.restore)
    return attributes


class _CopyBeforeWrite(ObserverMode, TorchDispatchMode):
    """Copies each tensor to host memory, just before the first op that writes into its storage.

    Args:
        tensors: {name: tensor to watch}.

    Attributes:
        copies: {name: copy}, for the tensors copied so far.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: dict[str, torch.Tensor] = {}
        self._watched: dict[int, dict[str, torch.Tensor]] = {}  # {storage: {name: tensor}}
        for name, tensor in tensors.items():
            self._watched.setdefault(_storage_of(tensor), {})[name] = tensor

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, OpOverload):  # not a higher-order op
            schema = func._schema.arguments
            arguments = {argument.name: value for argument, value in zip(schema, args, strict=False)} | (kwargs or {})
            aliases = {argument.name: argument.alias_info for argument in schema if argument.alias_info is not None}
            self.copy([arguments.get(name) for name, alias in aliases.items() if alias.is_write])
        return func(*args, **(kwargs or {}))

    def copy(self, values: Any) -> None:
        """Copy each watched tensor that shares its storage with a tensor in a pytree, unless it was copied before."""
        for value in pytree.tree_leaves(values):
            if isinstance(value, torch.Tensor) and has_storage(value):
                for name, tensor in self._watched.pop(_storage_of(value), {}).items():
                    self.copies[name] = tensor.to("cpu", copy=True)


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return the address, shape and strides of a tensor."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _storage_of(tensor: torch.Tensor) -> int:
    """Return an identifier of a tensor's storage."""
    return int(tensor.untyped_storage()._cdata)


@isolated
def restored_values(undo: Block, model: nn.Module) -> None:
    """Context manager: restore buffers, and parameters that forward writes into, at the end of the block.

    Forward works on copies of the buffers. The first execution of a model finds the written parameters: each is copied
    to host memory just before an op writes into it. In that execution, `torch.compile` inside the model is disabled,
    because writes of compiled kernels cannot be observed. Later executions copy only the parameters that were found.
    """
    is_first = model not in WRITTEN
    written = set(written_by(model))
    buffers = {path: (module, dict(module._buffers)) for path, module in model.named_modules()}
    parameters = {
        name: (parameter, parameter.data)
        for name, parameter in writable(dict(model.named_parameters())).items()
        if (is_first or name in written) and type(parameter.data) is torch.Tensor and has_storage(parameter)
    }
    writes = _CopyBeforeWrite({name: tensor for name, (_, tensor) in parameters.items()})
    # A fake tensor has no values to restore, but its version shows a write.
    fakes = [(name, value, value._version) for name, value in model.named_parameters() if isinstance(value, FakeTensor)]

    def restore() -> None:
        with torch.no_grad():
            for name, (parameter, tensor) in parameters.items():
                if _layout(parameter) != _layout(tensor):  # forward has assigned `parameter.data`
                    parameter.data = tensor
                    written.add(name)
                if name in writes.copies and not torch.equal(writes.copies[name], tensor.cpu()):
                    parameter.copy_(writes.copies[name])
                    detach(parameter)
                    written.add(name)
        written.update(name for name, parameter, version in fakes if parameter._version != version)
        for path, (module, before) in buffers.items():
            added = module._buffers.keys() - before.keys()
            written.update(f"{path}.{leaf}".lstrip(".") for leaf in added)
            if isinstance(module._buffers, dict):  # a ScriptModule has another type
                module._buffers.clear()
                module._buffers.update(before)
        WRITTEN[model] = frozenset(written)

    undo(restore)
    copies = {id(buffer): buffer.detach().clone() for buffer in model.buffers()}
    exchange(model, lambda holder: copies.get(id(holder.value)), undo)
    if is_first:
        undo.enter(eager())
        undo.enter(writes)
    else:
        writes.copy([tensor for _, tensor in parameters.values()])


@isolated
def isolated_model(undo: Block, model: nn.Module) -> None:
    """Context manager: restore the model's Python state and values at the end of the block."""
    undo.enter(restored_attributes(model))
    undo.enter(restored_values(model))


def has_values(model: nn.Module) -> bool:
    """Whether the model can compute values, because no parameter is sharded."""
    return not any(hasattr(parameter, "to_local") for parameter in model.parameters())


@isolated
def with_fake_tensors(
    undo: Block, model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Context manager: replace the tensors of a sharded model by fake full tensors, and return fake inputs.

    If the model is not sharded, replace nothing and return the inputs.
    """
    if has_values(model):
        return args, dict(kwargs)
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: PLC0415 - it imports sympy

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(tracked_fakes=[]))
    tensors = (leaf for leaf in leaves(args, kwargs) if isinstance(leaf, torch.Tensor))
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))

    def fake(value: torch.Tensor) -> torch.Tensor:
        with mode:
            empty = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
            return nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty

    fakes = {name: fake(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    inputs, named = pytree.tree_map_only(torch.Tensor, fake, (args, dict(kwargs)))
    undo.enter(substituted(model, fakes))
    return inputs, named


@isolated
def fake_mode(undo: Block, model: nn.Module) -> None:
    """Context manager: make new tensors fake, if the parameters of the model are fake."""
    fake = next((parameter for parameter in model.parameters() if isinstance(parameter, FakeTensor)), None)
    if fake is not None:
        undo.enter(fake.fake_mode)
