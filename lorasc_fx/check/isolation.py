"""Isolated runs: afterwards the model and the process are as before.

Buffers, parameters that forward writes into, and attributes that its Python sets are restored. A model without values
here, on the meta device or sharded, runs on fake tensors, which have a shape, a dtype and the device of the inputs, but
no memory. The model's Python runs and is traced as usual then, but whatever reads a value (`.item()`) raises.
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
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lorasc_fx.check.guards import MISSING, Held, attribute_tensors, same_value, walk
from lorasc_fx.check.process_state import OurMode, eager, quiet, seed
from lorasc_fx.errors import CaptureError, named
from lorasc_fx.parameters import exchange, substituted
from lorasc_fx.quantized import writable
from lorasc_fx.signature import copy_inputs, is_opaque_leaf
from lorasc_fx.util.fingerprint import checksums
from lorasc_fx.util.undo import Block, isolated


@isolated
def isolation(
    undo: Block,
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any],
    *observers: AbstractContextManager[Any],
    grad: bool = True,
    seeded: bool = True,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Isolate runs of the model in this block, and return copies of the arguments of a call.

    Args:
        undo: restores the state.
        model: the model to run.
        args, kwargs: of the call.
        observers: context managers that are entered last, such as hooks, dispatch modes and other weights.
        grad: whether gradients are on.
        seeded: whether the generators start from a fixed seed, so that two runs draw the same numbers. Otherwise they
            draw what the next call would draw, for example which layers are skipped.
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
    enters: Callable[[str, nn.Module, Any, Any], None],
    leaves: Callable[[str, nn.Module, Any], None],
) -> None:
    """Observe the calls of the model's modules.

    Args:
        undo: removes the hooks.
        model: its modules are known by their first path.
        enters: gets path, module and arguments before a call.
        leaves: gets path, module and output after a call; None if the call raised.
    """

    def after(path: str, module: nn.Module, args: Any, output: Any) -> None:
        leaves(path, module, output)

    for path, module in model.named_modules():
        undo(module.register_forward_pre_hook(partial(enters, path), prepend=True, with_kwargs=True).remove)
        undo(module.register_forward_hook(partial(after, path), always_call=True).remove)


WRITTEN: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
"""For each model that has run: names of the parameters that forward writes, and of the buffers that it registers."""


def written_by(model: nn.Module, default: frozenset[str] = frozenset()) -> frozenset[str]:
    """Return names of the parameters that forward writes and of the buffers that it registers.

    Args:
        model: whose forward it is.
        default: returned for a model without an isolated run.
    """
    return WRITTEN.get(model, default)


@dataclass(frozen=True)
class Attributes:
    """A snapshot of the Python state of a model.

    Args:
        places: each holder, and a copy of its contents.
        tensors: each tensor in them, with its version, a copy of its values, and whether it had an autograd history.
    """

    places: list[tuple[Held, Any]]
    tensors: list[tuple[torch.Tensor, int, torch.Tensor, bool]]

    @classmethod
    def of(cls, model: nn.Module) -> Attributes:
        """Take a snapshot."""
        held = list(walk(model))
        places = [(each, each.contents()) for each in held if each.restored]
        tensors = [
            (tensor, tensor._version, tensor.detach().clone(), tensor.grad_fn is not None)
            for _, tensor in attribute_tensors(model, held)
            if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
            if not (tensor.is_inference() or tensor.is_meta or tensor.is_nested)
        ]
        return cls(places, tensors)

    def restore(self) -> None:
        """Restore the contents of every holder, and the values and the missing history of every tensor."""
        detached: dict[int, torch.Tensor] = {}
        for tensor, version, value, has_history in self.tensors:
            if tensor._version != version:
                with torch.no_grad():
                    if not torch.equal(tensor, value):
                        tensor.copy_(value)
                if not has_history and (without := without_history(tensor)) is not tensor:
                    detached[id(tensor)] = without
        for held, contents in self.places:
            where, before = held.where, contents
            if detached and isinstance(contents, dict):
                before = {key: detached.get(id(value), value) for key, value in contents.items()}
            elif detached:
                before = type(contents)(detached.get(id(value), value) for value in contents)
            if isinstance(where, dict):
                for key in [key for key in held.contents() if key not in before]:
                    del where[key]
                if not held.attributes and list(where) != list(before):
                    where.clear()
                for key, value in before.items():
                    if where.get(key, MISSING) is not value:
                        where[key] = value
            elif len(where) != len(before) or not same_value(held.contents(), before):
                where.clear()
                where.extend(before) if isinstance(where, (list, deque)) else where.update(before)


def without_history(tensor: torch.Tensor) -> torch.Tensor:
    """Detach in place a tensor that a forward with gradients has written into, and return it.

    Torch cannot detach a view in place, so a view gets a new TensorImpl on the same memory. If something else holds the
    old one, a new tensor is returned, and the caller has to replace the old one.
    """
    if tensor.grad_fn is None:
        return tensor
    if not tensor._is_view():
        return tensor.detach_()
    new = tensor.detach()
    try:
        torch.utils.swap_tensors(tensor, new)
    except RuntimeError:
        return new
    return tensor


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape have the same bits. False for kinds of tensors that cannot be compared so."""
    odd = type(one) is not torch.Tensor or one.is_meta or one.is_quantized or one.layout is not torch.strided
    if odd or one.is_conj() or one.is_neg():
        return False
    return torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (one, other)))


@isolated
def same_attributes(undo: Block, model: nn.Module) -> Attributes:
    """Restore the model's Python state at the end. Returns the snapshot."""
    attributes = Attributes.of(model)
    undo(attributes.restore)
    return attributes


_DECLARED = {"aten", "prim", "prims"}
"""Namespaces of ops whose schemas say what they write."""
_STATISTICS = {"running_mean", "running_var"}
"""Arguments of batch norms that are written, though the schemas do not say so."""
_ADDRESSES = (
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.data_ptr,
    torch.Tensor.untyped_storage,
    torch.Tensor.storage,
    torch.Tensor._typed_storage,
    torch.Tensor.__dlpack__,
    torch.Tensor.apply_,
    torch.Tensor.map_,
    torch.Tensor.map2_,
)
"""Functions that write by other means than ops, or give Python the memory of a tensor."""


class _Writes(OurMode, TorchDispatchMode):
    """Copies tensors to host memory, each just before the first op that writes into its storage.

    Args:
        tensors: by name.

    Attributes:
        kept: the copies, by name.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: dict[str, torch.Tensor] = {}
        self._unwritten: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            self._unwritten.setdefault(_storage_of(tensor), {})[name] = tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        # Only schemas of torch's own namespaces are known to say what an op writes.
        if not isinstance(func, torch._ops.OpOverload):  # the ops inside a higher-order op are not seen here
            self.unseen()
        elif func.namespace not in _DECLARED:
            self.keep((args, given))
        else:
            arguments = func._schema.arguments
            given |= {argument.name: value for argument, value in zip(arguments, args, strict=False)}
            aliases = {argument.name: argument.alias_info for argument in arguments if argument.alias_info is not None}
            written = {name for name, alias in aliases.items() if alias.is_write} | _STATISTICS
            self.keep([value for name, value in given.items() if name in written])
        return func(*args, **(kwargs or {}))

    def unseen(self) -> None:
        """Copy every tensor, before code runs whose writes cannot be seen."""
        self.keep([tensor for group in self._unwritten.values() for tensor in group.values()])

    def keep(self, values: Any) -> None:
        """Copy the tensors that share a storage with one of these."""
        for value in pytree.tree_leaves(values):
            if isinstance(value, torch.Tensor) and torch._C._has_storage(value):
                for name, tensor in self._unwritten.pop(_storage_of(value), {}).items():
                    self.kept[name] = tensor.to("cpu", copy=True)


class _Addresses(OurMode, TorchFunctionMode):
    """Copies tensors before Python gets access to their memory."""

    def __init__(self, writes: _Writes) -> None:
        super().__init__()
        self._writes = writes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ADDRESSES:
            self._writes.keep(args[0])
        return func(*args, **(kwargs or {}))


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    layout = (tensor.stride(),) if tensor.layout is torch.strided else ()
    return tensor.data_ptr(), tensor.shape, *layout


def _storage_of(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@isolated
def same_values(undo: Block, model: nn.Module) -> None:
    """Restore buffers, and parameters that forward writes into, at the end: their values and their missing history.

    The first run of a model shows which parameters these are. It copies each to host memory before it is written.
    `torch.compile` compiles nothing in it, because the writes of compiled kernels cannot be seen.

    Raises:
        CaptureError: at the end, if a first run has written into a parameter by means that cannot be seen.
    """
    # Buffers of an earlier call with gradients: a backward through this run would go on into the graph of that call.
    with_history = {id(value): value.detach().clone() for value in model.buffers() if value.grad_fn is not None}
    if with_history:
        exchange(model, lambda holder: with_history.get(id(holder.value)), undo)
    clean = [parameter for parameter in model.parameters() if parameter.grad_fn is None]
    buffers = [
        (
            path,
            module,
            dict(module._buffers),
            {name: value.detach().clone() for name, value in module._buffers.items() if value is not None},
        )
        for path, module in model.named_modules()
    ]
    written_before = WRITTEN.get(model)
    memory = {
        name: (parameter, parameter.data)
        # Quantized weights have few ops, and none that forward would write with.
        for name, parameter in writable(dict(model.named_parameters())).items()
        if (written_before is None or name in written_before) and not isinstance(parameter, FakeTensor)
    }
    # In a first run, most parameters are never written, so each is copied only when an op writes into it.
    lazily = {
        name: tensor
        for name, (_, tensor) in memory.items()
        if written_before is None and type(tensor) is torch.Tensor and torch._C._has_storage(tensor)
    }
    writes, before = _Writes(lazily), checksums(lazily)
    writes.kept |= {name: tensor.to("cpu", copy=True) for name, (_, tensor) in memory.items() if name not in lazily}
    fakes = [
        (name, parameter, parameter._version)
        for name, parameter in model.named_parameters()
        if isinstance(parameter, FakeTensor)
    ]
    written = set(written_before or ())

    def restore() -> None:
        with torch.no_grad():
            for name, (parameter, tensor) in memory.items():
                if _place(parameter) != _place(tensor):
                    parameter.data = tensor
                    written.add(name)
                if name in writes.kept and not torch.equal(writes.kept[name], tensor.cpu()):
                    parameter.copy_(writes.kept[name])
                    written.add(name)
            for parameter in clean:
                without_history(parameter)
            written.update(name for name, parameter, version in fakes if parameter._version != version)
            for path, module, objects, values in buffers:
                if isinstance(module._buffers, dict):  # a script module has another container
                    added = module._buffers.keys() - objects.keys()
                    written.update(f"{path}.{leaf}".lstrip(".") for leaf in added)
                    module._buffers.clear()
                    module._buffers.update(objects)
                for name, value in values.items():
                    buffer = module._buffers[name]
                    # Only if it differs: a write would invalidate an autograd graph that has saved the buffer.
                    if buffer is not None and buffer.shape == value.shape and not _same_bits(buffer, value):
                        buffer.copy_(value)
            views = {id(value): new for value in model.buffers() if (new := without_history(value)) is not value}
            if views:
                exchange(model, lambda holder: views.get(id(holder.value)), lambda step: None)  # for good
        unseen = {name: tensor for name, tensor in lazily.items() if name not in writes.kept}
        changed = [name for name, value in checksums(unseen).items() if value != before[name]]
        if changed:
            raise CaptureError(
                f"{type(model).__name__} has written into {named(changed)} in its forward by means that torch does not "
                "see (a thread of its own, memory that it shares with numpy, an extension), so that nothing could "
                "restore it: load the weights again, and write by operations of torch"
            )
        WRITTEN[model] = frozenset(written)

    undo(restore)
    if lazily:
        undo.enter(eager())
        undo.enter(_Addresses(writes))
        undo.enter(writes)


@isolated
def isolated_model(undo: Block, model: nn.Module) -> None:
    """Restore the model's Python state and values at the end."""
    undo.enter(same_attributes(model))
    undo.enter(same_values(model))


def is_on_meta(model: nn.Module) -> bool:
    """Whether a parameter or buffer of the model is on the meta device."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def device_of(args: Any, kwargs: Mapping[str, Any]) -> torch.device:
    """Return the device of the first input tensor that is not on the meta device; the CPU if there is none."""
    tensors = (
        leaf for leaf in pytree.tree_leaves((args, kwargs), is_leaf=is_opaque_leaf) if isinstance(leaf, torch.Tensor)
    )
    return next((leaf.device for leaf in tensors if not leaf.is_meta), torch.device("cpu"))


def has_values(model: nn.Module) -> bool:
    """Whether the model can run here: no tensor is on the meta device or sharded."""
    return not is_on_meta(model) and not any(hasattr(parameter, "to_local") for parameter in model.parameters())


@isolated
def with_fake_tensors(
    undo: Block, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace the tensors of a model without values by fake ones of full shapes, and return fake inputs.

    Another model and its inputs are left unchanged.
    """
    if has_values(model):
        return args, dict(kwargs)
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: PLC0415 - it imports sympy

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(tracked_fakes=[]))
    device = device_of(args, kwargs)

    def fake(value: torch.Tensor) -> torch.Tensor:
        with mode:
            empty = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
            return nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty

    tensors = {name: fake(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    inputs, named = pytree.tree_map_only(torch.Tensor, fake, (args, dict(kwargs)))
    undo.enter(substituted(model, tensors))
    return inputs, named


@isolated
def fake_mode(undo: Block, model: nn.Module) -> None:
    """Make every new tensor fake if the model holds fake tensors."""
    fake = next((parameter for parameter in model.parameters() if isinstance(parameter, FakeTensor)), None)
    if fake is not None:
        undo.enter(fake.fake_mode)
