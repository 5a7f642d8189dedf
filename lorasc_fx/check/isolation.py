"""Isolated runs: the model, the random generators and the standard streams are unchanged afterwards.

Buffers, parameters that forward writes into and the attributes that its Python sets are given back. A model without
values here, on the meta device or sharded, runs on fake tensors: a fake tensor has a shape, a dtype and the device of
the inputs, and no memory. With them the model's Python runs and is traced as it will be with its values; what looks at
a value (`.item()`, a branch on a sum) raises.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn, overrides
from torch._compile import _disable_dynamo
from torch._higher_order_ops import utils as higher_order
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode

from lorasc_fx.check.guards import Held, attribute_tensors, walk
from lorasc_fx.errors import CaptureError, named
from lorasc_fx.parameters import exchange, substituted
from lorasc_fx.quantized import is_quantized
from lorasc_fx.signature import copied, whole
from lorasc_fx.util.accelerator import generator_states, seed_generators, set_generator_states
from lorasc_fx.util.fingerprint import checksums
from lorasc_fx.util.undo import PROCESS, Block, isolated


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

    Buffers, the Python state of the model, its hooks and all random generators are restored.

    Args:
        undo: restores everything.
        model: that is to run.
        args, kwargs: of the call.
        observers: entered last, and left first: hooks, dispatch modes, other weights in place.
        grad: whether gradients are on.
        seeded: whether the generators start from a fixed seed, so that two runs draw the same. A run that looks for
            what any call may do draws what this call would draw, a layer that is skipped at random among it.
    """
    inputs = copied(args, kwargs)
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
    """An observer of the calls of modules.

    Args:
        undo: removes the hooks.
        model: whose modules are observed, each by its first path.
        enters: gets path, module and arguments before a call.
        leaves: gets path, module and output after it, None where the call raises.
    """

    def before(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        enters(path, module, args, kwargs)

    def after(path: str, module: nn.Module, args: Any, output: Any) -> None:
        leaves(path, module, output)

    for path, module in model.named_modules():
        undo(module.register_forward_pre_hook(partial(before, path), prepend=True, with_kwargs=True).remove)
        undo(module.register_forward_hook(partial(after, path), always_call=True).remove)


class Shared:
    """A change of process-wide state that several threads need at once, undone when the last of them leaves.

    Each of them would otherwise restore what it found, which may be what another thread has set.

    Args:
        change: returns a context manager that makes the change. It may be exited in another thread.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[Any]]) -> None:
        self._change = change
        self._guard = threading.Lock()
        self._threads: list[int] = []  # that are inside, once for each time
        self._manager: AbstractContextManager[Any] | None = None
        os.register_at_fork(after_in_child=self._after_fork)

    def __enter__(self) -> None:
        with self._guard:
            if self._manager is None:
                self._manager = self._change()
                self._manager.__enter__()
            self._threads.append(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._threads.remove(threading.get_ident())
            self._restore()

    def _restore(self) -> None:
        if not self._threads and self._manager is not None:
            manager, self._manager = self._manager, None
            manager.__exit__(None, None, None)

    def _after_fork(self) -> None:
        """Forget the threads that do not exist in a forked process."""
        self._guard = threading.Lock()
        self._threads[:] = [thread for thread in self._threads if thread == threading.get_ident()]
        self._restore()


@contextlib.contextmanager
def _fastpath_off() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _logs_off() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(before)


@contextlib.contextmanager
def _warnings_off() -> Iterator[None]:
    warnings.simplefilter("ignore")
    ignore = warnings.filters[0]
    yield
    if ignore in warnings.filters:  # other threads may still be inside `own_warnings`
        warnings.filters.remove(ignore)  # type: ignore[attr-defined]


no_fastpath = Shared(_fastpath_off)
"""Turns off torch's fused path of attention, which has no gradient."""
own_warnings = Shared(warnings.catch_warnings)
"""Drops warning filters at the end that were added inside."""
_no_logs, _no_warnings = Shared(_logs_off), Shared(_warnings_off)


class _Muted:
    """A standard stream without the output of one thread; other threads, which may print, write to the stream.

    Attributes:
        thread: whose output is dropped; None if no output is.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.thread: int | None = threading.get_ident()

    def write(self, text: str) -> int:
        """Write the text, unless the muted thread does."""
        return len(text) if threading.get_ident() == self.thread else self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write the lines, unless the muted thread does."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@isolated
def _muted(undo: Block, name: str) -> None:
    """Drop what this thread writes to the standard stream of this name."""
    stream = getattr(sys, name)
    muted = _Muted(stream)

    def unmute() -> None:
        muted.thread = None  # a handler of logs that was made inside may hold it
        if getattr(sys, name) is muted:
            setattr(sys, name, stream)

    undo(unmute)
    setattr(sys, name, muted)


@isolated
def _same_torch_stacks(undo: Block) -> None:
    """Restore this thread's torch.func levels, modes, dispatch keys and autocast.

    A tracer that raises may leave entries behind.
    """
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    undo.enter(torch._C._ForceDispatchKeyGuard(*keys))
    refused = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()

    def same_hooks() -> None:  # a level of torch.func disables the hooks of checkpoints
        if refused is None:
            torch._C._autograd._saved_tensors_hooks_enable()
        else:
            torch._C._autograd._saved_tensors_hooks_disable(refused, False)

    undo(same_hooks)
    functions, dispatches = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()

    def pop_modes() -> None:
        while torch._C._len_torch_function_stack() > functions:
            torch._C._pop_torch_function_stack()
        while torch._C._len_torch_dispatch_stack() > dispatches:
            _pop_mode()

    accelerator = torch.accelerator.current_accelerator()
    for device in {"cpu", accelerator.type if accelerator is not None else "cpu"}:
        undo(partial(torch.set_autocast_enabled, device, torch.is_autocast_enabled(device)))
        undo(partial(torch.set_autocast_dtype, device, torch.get_autocast_dtype(device)))
    undo(pop_modes)
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    undo(partial(torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth, depth))


@isolated
def quiet(undo: Block, grad: bool = True) -> None:
    """Restore random generators, and suppress the output and logs of tracers.

    Gradients are on, or off, as `grad` says, whatever the caller has. Blocks of other threads wait for this one.
    `torch.seed()` draws its seed from the generator, so that a model which calls it repeats itself.
    """
    undo.enter(PROCESS)
    numpy = sys.modules.get("numpy")  # a model that draws from it has imported it
    undo(partial(random.setstate, random.getstate()))
    if numpy is not None:
        undo(partial(numpy.random.set_state, numpy.random.get_state()))
    undo(partial(setattr, torch, "seed", torch.seed))
    torch.seed = partial(_seed_from_generator, torch.seed, threading.get_ident())
    undo(partial(set_generator_states, generator_states()))
    for shared in (_no_logs, no_fastpath, own_warnings, _no_warnings):
        undo.enter(shared)
    undo.enter(_muted("stdout"))  # an export that fails prints its graph; the reason is in the error
    undo.enter(_muted("stderr"))
    undo.enter(torch.set_grad_enabled(grad))
    undo.enter(_same_torch_stacks())  # left first, since operations of the other steps would run inside what is left


@_disable_dynamo  # it breaks the graph at torch.seed too
def _seed_from_generator(reseed: Callable[[], int], thread: int) -> int:
    """Seed all generators by a number that the default one draws, and return it; other threads call `reseed`."""
    if threading.get_ident() != thread:
        return reseed()
    number = int(torch.randint(1 << 62, ()))
    torch.manual_seed(number)
    return number


@isolated
def eager(undo: Block) -> None:
    """Run what `torch.compile` has compiled as it was written.

    Control flow operators (torch.cond, while_loop, scan) still compile their bodies. Otherwise the weights that a body
    reads from its closure would get no gradients.
    """
    undo.enter(torch.compiler.set_stance("force_eager"))
    compile_body = getattr(higher_order, "_hop_compile_and_call", None)
    if compile_body is not None:  # torch 2.9 has another structure
        undo(partial(setattr, higher_order, "_hop_compile_and_call", compile_body))
        higher_order._hop_compile_and_call = partial(_with_compiler, compile_body)


def _with_compiler(compile_body: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a control flow operator, outside the modes of this package: dynamo cannot compile its body under them."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("default"))
        while isinstance(mode := _python_dispatch._get_current_dispatch_mode(), OurMode):
            if isinstance(mode, _Writes):
                mode.keep_all()
            stack.enter_context(_python_dispatch._pop_mode_temporarily())
        while isinstance(overrides._get_current_function_mode(), OurMode):
            stack.enter_context(overrides._pop_mode_temporarily())
        return compile_body(*args, **kwargs)


class OurMode:
    """Marks the modes of this package, which only observe."""


def seed(value: int = 0) -> None:
    """Seed the generators that `quiet` restores."""
    random.seed(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(value)
    seed_generators(value)


_MISSING = object()

_WRITTEN: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
"""Names of the parameters that each model's forward writes into, and of the buffers that it registers, of models that
have had a preflight."""


def has_run(model: nn.Module) -> bool:
    """Whether a first run has shown what forward writes."""
    return model in _WRITTEN


def forget_written(model: nn.Module) -> None:
    """Let the next run of a model be its first, as where the first one has raised."""
    _WRITTEN.pop(model, None)


def written_by(model: nn.Module, otherwise: frozenset[str] = frozenset()) -> frozenset[str]:
    """Return the names of the parameters that forward writes and of the buffers that it registers, of a model that has
    had a preflight.
    """
    return _WRITTEN.get(model, otherwise)


_SUMMED: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


@isolated
def first_checksums(undo: Block, model: nn.Module) -> dict[str, int]:
    """Return what gets the checksums of the parameters that a first run in this block has left as they were."""
    undo(partial(_SUMMED.pop, model, None))
    return _SUMMED.setdefault(model, {})


@dataclass(frozen=True)
class Attributes:
    """The Python state of a model: the contents of its holders, and the values of the tensors in them.

    Args:
        places: each holder, and a copy of its contents.
        tensors: each tensor with its version, a copy of its values, and whether it had an autograd history.
    """

    places: list[tuple[Held, Any]]
    tensors: list[tuple[torch.Tensor, int, torch.Tensor, bool]]

    @classmethod
    def of(cls, model: nn.Module) -> Attributes:
        """Return those of a model as they are."""
        held_now = list(walk(model))
        places = [(held, held.contents()) for held in held_now if held.restored]
        tensors = [
            (tensor, tensor._version, tensor.detach().clone(), tensor.grad_fn is not None)
            for _, tensor in attribute_tensors(model, held_now)
            if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
            if not (tensor.is_inference() or tensor.is_meta or tensor.is_nested)
        ]
        return cls(places, tensors)

    def moved(self) -> list[str]:
        """Return the names of the attributes whose values have changed."""
        names = []
        for held, before in self.places:
            now = held.contents()
            if held.of_model and held.attributes:
                keys = dict.fromkeys((*before, *now))
                moved = [key for key in keys if not _same(now.get(key, _MISSING), before.get(key, _MISSING))]
                names += [held.entry(key) for key in moved]
            elif held.of_model and not _same(now, before):
                names.append(held.name)
        return sorted(names)

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
            where, before = held.where, _exchanged(contents, detached)
            if isinstance(where, dict):
                for key in [key for key in held.contents() if key not in before]:
                    del where[key]
                if not held.attributes and list(where) != list(before):
                    where.clear()
                for key, value in before.items():
                    if where.get(key, _MISSING) is not value:
                        where[key] = value
            elif len(where) != len(before) or not _same(held.contents(), before):
                where.clear()
                where.extend(before) if isinstance(where, (list, deque)) else where.update(before)


def _exchanged(contents: Any, new: Mapping[int, torch.Tensor]) -> Any:
    """Return the contents of a holder with other tensors in the places of some, by id."""
    if not new:
        return contents
    if isinstance(contents, dict):
        return {key: new.get(id(value), value) for key, value in contents.items()}
    return type(contents)(new.get(id(value), value) for value in contents)


def without_history(tensor: torch.Tensor) -> torch.Tensor:
    """Detach a tensor that a forward with gradients has written into, in place.

    Torch detaches no view in place: it gets a new TensorImpl on the same memory. If something else holds the old one,
    return a new tensor, which is to take the place of this one.
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


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype
        return alike and ((isinstance(one, FakeTensor) and isinstance(other, FakeTensor)) or torch.equal(one, other))
    if isinstance(one, (bool, int, float, str, bytes)):
        return bool(one == other)
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(_same, one.values(), other.values()))
    return isinstance(one, (set, torch.Size, torch.dtype, torch.device)) and bool(one == other)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape are known to have the same bits."""
    odd = type(one) is not torch.Tensor or one.is_meta or one.is_quantized or one.layout is not torch.strided
    if odd or one.is_conj() or one.is_neg():
        return False
    return torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (one, other)))


@isolated
def same_attributes(undo: Block, model: nn.Module) -> Attributes:
    """Restore attributes at the end; yields them as they were."""
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
"""What writes by other means than ops, or gives Python the memory of a tensor, into which it can write so."""


class _Writes(OurMode, TorchDispatchMode):
    """Keeps a copy of tensors, in host memory, each before an op writes into its storage.

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
        if not isinstance(func, torch._ops.OpOverload):  # a higher-order op: what it runs is not seen here
            self.keep_all()
        elif func.namespace not in _DECLARED:
            self.keep((args, given))
        else:
            arguments = func._schema.arguments
            given |= {argument.name: value for argument, value in zip(arguments, args, strict=False)}
            aliases = {argument.name: argument.alias_info for argument in arguments}
            self.keep([value for name, value in given.items() if name in _STATISTICS or _is_written(aliases[name])])
        return func(*args, **(kwargs or {}))

    def keep_all(self) -> None:
        """Copy every tensor, before code runs whose writes are not seen."""
        self.keep([tensor for group in self._unwritten.values() for tensor in group.values()])

    def keep(self, values: Any) -> None:
        """Copy the tensors that share a storage with one of these."""
        for value in pytree.tree_leaves(values):
            if isinstance(value, torch.Tensor) and torch._C._has_storage(value):
                for name, tensor in self._unwritten.pop(_storage_of(value), {}).items():
                    self.kept[name] = tensor.to("cpu", copy=True)


def _is_written(alias: Any) -> bool:
    return alias is not None and alias.is_write


class _Addresses(OurMode, TorchFunctionMode):
    """Keeps the tensors of which Python asks for the memory."""

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


def _for_good(step: Callable[[], object]) -> None:
    """Drop the step that would undo a change."""


@isolated
def same_values(undo: Block, model: nn.Module) -> None:
    """Restore buffers at the end, and parameters that forward writes into: values, and that they have no autograd
    history. A buffer that has one, from a call before, has a copy without in its place while the model runs.

    Which ones these are is known after a first run, in which each is copied to host memory before it is written;
    `torch.compile` compiles nothing in it, as a kernel that it makes does not tell.

    Raises:
        CaptureError: at the end, for a parameter that a first run has written by means that are not seen.
    """
    with_history = {id(value): value.detach().clone() for value in model.buffers() if value.grad_fn is not None}
    if with_history:  # a backward through the run would go on into the graph of that call
        exchange(model, lambda holder: with_history.get(id(holder.value)), undo)
    clean = [parameter for parameter in model.parameters() if parameter.grad_fn is None]
    paths = {module: path for path, module in model.named_modules()}
    buffers = [
        (
            module,
            dict(module._buffers),
            {name: value.detach().clone() for name, value in module._buffers.items() if value is not None},
        )
        for module in model.modules()
    ]
    known = _WRITTEN.get(model)
    memory = {
        name: (parameter, parameter.data)
        for name, parameter in model.named_parameters()
        if (known is None or name in known) and not isinstance(parameter, FakeTensor)
        if not is_quantized(parameter)  # these have few ops, and none that a forward would write with
    }
    lazily = {
        name: tensor
        for name, (_, tensor) in memory.items()
        if known is None and type(tensor) is torch.Tensor and torch._C._has_storage(tensor)
    }
    writes, before = _Writes(lazily), checksums(lazily)
    writes.kept |= {name: tensor.to("cpu", copy=True) for name, (_, tensor) in memory.items() if name not in lazily}
    versions = [
        (name, parameter, parameter._version)
        for name, parameter in model.named_parameters()
        if isinstance(parameter, FakeTensor)
    ]
    written = set(known or ())

    def put_back() -> None:
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
            written.update(name for name, parameter, version in versions if parameter._version != version)
            for module, objects, values in buffers:
                if isinstance(module._buffers, dict):  # a script module keeps its own
                    added = module._buffers.keys() - objects.keys()
                    written.update(f"{paths[module]}.{leaf}".lstrip(".") for leaf in added)
                    module._buffers.clear()
                    module._buffers.update(objects)
                for name, value in values.items():
                    buffer = module._buffers[name]
                    if buffer is not None and buffer.shape == value.shape and not _same_bits(buffer, value):
                        buffer.copy_(value)  # and only then, as an autograd graph of before may have kept the buffer
            views = {id(value): new for value in model.buffers() if (new := without_history(value)) is not value}
            if views:
                exchange(model, lambda holder: views.get(id(holder.value)), _for_good)
        unseen = {name: tensor for name, tensor in lazily.items() if name not in writes.kept}
        changed = [name for name, value in checksums(unseen).items() if value != before[name]]
        if changed:
            raise CaptureError(
                f"{type(model).__name__} has written into {named(changed)} in its forward by means that torch does not "
                "see (a thread of its own, memory that it shares with numpy, an extension), so that nothing could "
                "restore it: load the weights again, and write by operations of torch"
            )
        _WRITTEN[model] = frozenset(written)
        _SUMMED.get(model, {}).update({name: before[name] for name in unseen})

    undo(put_back)
    if lazily:
        undo.enter(eager())
        undo.enter(_Addresses(writes))
        undo.enter(writes)


@isolated
def isolated_model(undo: Block, model: nn.Module) -> None:
    """Restore the attributes and values of the model at the end."""
    undo.enter(same_attributes(model))
    undo.enter(same_values(model))


def is_on_meta(model: nn.Module) -> bool:
    """Whether a parameter or buffer of the model is on the meta device."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def device_of(args: Any, kwargs: Mapping[str, Any]) -> torch.device:
    """Return the device of the first tensor among inputs that has one; the CPU where none has."""
    tensors = (leaf for leaf in pytree.tree_leaves((args, kwargs), is_leaf=whole) if isinstance(leaf, torch.Tensor))
    return next((leaf.device for leaf in tensors if not leaf.is_meta), torch.device("cpu"))


def has_values(model: nn.Module) -> bool:
    """Whether plain code can compute with the model: nothing is on the meta device, or sharded."""
    return not is_on_meta(model) and not any(hasattr(parameter, "to_local") for parameter in model.parameters())


@isolated
def with_fake_tensors(
    undo: Block, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let a model without numbers here hold fake tensors, of whole shapes, and return fake inputs; any other model and
    its inputs stay as they are.
    """
    if has_values(model):
        return args, dict(kwargs)
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: PLC0415 - it imports sympy

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(tracked_fakes=[]))
    device = device_of(args, kwargs)

    def fake(value: torch.Tensor) -> torch.Tensor:
        with mode:
            made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
            return nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made

    held = {name: fake(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    inputs, named = pytree.tree_map_only(torch.Tensor, fake, (args, dict(kwargs)))
    undo.enter(substituted(model, held))
    return inputs, named


@isolated
def fake_mode(undo: Block, model: nn.Module) -> None:
    """Run what follows among fake tensors if the model holds such: what it makes itself is fake as well."""
    first = next((parameter for parameter in model.parameters() if isinstance(parameter, FakeTensor)), None)
    if first is not None:
        undo.enter(first.fake_mode)
