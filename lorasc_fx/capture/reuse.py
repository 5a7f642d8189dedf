"""A cache of exported graphs. It replaces a slow export by a fast trace, if an earlier call computed the same.

`Trace.of` runs the model once on fake tensors, with the sizes of the call, and records each call of a torch function:
the function, its arguments, and the shapes of its results. That takes a tenth of the time of an export. Two calls with
equal traces have equal static graphs. So one export serves copies of a model, and calls whose arguments do not
change the computation. It also serves both train and eval mode if forward does not read the mode.

A cached graph can also be edited for a call whose trace differs, in two cases:

1. An argument in `FLAGS` has another value, such as `training` of a dropout. The copy of the graph gets the new value.
2. The new call lacks some function calls, and no result depends on them. For example, a call without labels computes no
   loss. The copy has other outputs, and the nodes that only the old outputs needed are removed.

A trace is valid for its sizes only. A cached graph with dynamic sizes may serve a call of other sizes. Then the call
for which it was exported is traced again at the new sizes. A run is not traced at all if it reads the
value of a tensor, or calls a function that the recorder cannot describe.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lorasc_fx.capture.captured import OWNER, Conditions, with_owner
from lorasc_fx.check.guards import Guards
from lorasc_fx.check.isolation import isolated_model
from lorasc_fx.check.observe import attempt
from lorasc_fx.check.process_state import quiet
from lorasc_fx.graph import copy_graph
from lorasc_fx.graph.editor import adjust
from lorasc_fx.parameters import substituted
from lorasc_fx.signature import argument_names, is_opaque_leaf, leaves, signature_of
from lorasc_fx.util.accelerator import autocast_state
from lorasc_fx.util.undo import Block, isolated

MAX_GRAPHS = 16
"""Maximum number of cached graphs. The least recently used one is dropped first."""
MAX_BYTES = 1 << 20
"""Maximum size in bytes of the constants of a cached graph."""
MAX_SIZES = 4
"""Maximum number of other sizes at which one dynamic graph is traced again for new calls. Each size takes two traces,
so that more sizes would take longer than one export of a second graph."""


class Flag(NamedTuple):
    """An argument of a torch function that depends on train or eval mode.

    Args:
        name: name of the argument.
        position: its position, the same in the function and in the ATen op.
        default: its default value.
        op: the ATen op that torch.export records for the function.
        inplace: position of the argument `inplace`, if the function has one.
    """

    name: str
    position: int
    default: Any
    op: Any
    inplace: int | None = None


_ATEN = torch.ops.aten
FLAGS: dict[Any, Flag] = {
    F.dropout: Flag("training", 2, True, _ATEN.dropout.default, 3),
    F.dropout1d: Flag("training", 2, True, _ATEN.feature_dropout.default, 3),
    F.dropout2d: Flag("training", 2, True, _ATEN.feature_dropout.default, 3),
    F.dropout3d: Flag("training", 2, True, _ATEN.feature_dropout.default, 3),
    F.alpha_dropout: Flag("training", 2, False, _ATEN.alpha_dropout.default, 3),
    F.feature_alpha_dropout: Flag("training", 2, False, _ATEN.feature_alpha_dropout.default, 3),
    F.batch_norm: Flag("training", 5, False, _ATEN.batch_norm.default),
    F.scaled_dot_product_attention: Flag("dropout_p", 4, 0.0, _ATEN.scaled_dot_product_attention.default),
}
"""Functions with an argument that depends on the mode. It can be changed in a cached graph."""

_CACHE: OrderedDict[int, CachedGraph] = OrderedDict()


class _NoTrace(Exception):
    """The run does something that a trace cannot describe. The message is for debugging; it reaches no user."""


@dataclass(frozen=True)
class Op:
    """One call of a torch function.

    Args:
        function: the function.
        args: its arguments without the flag. Each tensor is replaced by its origin, see `_Recorder`.
        results: shape, dtype and device of each result. Strides are left out: they depend on the kernel, which may
            depend on the mode.
        flag: value of the argument in FLAGS, if the function has one.
        pure: whether it neither draws random numbers nor writes into a tensor.
    """

    function: Any
    args: Any
    results: Any
    flag: Any = field(default=None, compare=False)
    pure: bool = field(default=True, compare=False)


@dataclass(frozen=True)
class Trace:
    """The torch functions that one call of a model runs, with their data flow. Two equal traces have equal graphs.

    Args:
        ops: the function calls, in order.
        names: names of the arguments.
        inputs: path of each pytree leaf of the arguments, such as `batch['mask']`.
        sizes: shape of each leaf, with None for a leaf other than a tensor.
        values: each leaf other than a tensor, with None for a tensor.
        outputs: each leaf of the output: the origin of a tensor, or any other value itself.
        specs: pytree structures of the arguments and of the output.
        settings: global settings of torch, see `_settings`.
    """

    ops: tuple[Op, ...]
    names: list[str]
    inputs: tuple[str, ...]
    sizes: tuple[tuple[int, ...] | None, ...]
    values: tuple[Any, ...]
    outputs: tuple[Any, ...]
    specs: tuple[pytree.TreeSpec, pytree.TreeSpec]
    settings: Hashable

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace | None:
        """Trace a call, or return None if a trace cannot describe everything that the call does.

        Args:
            model: the model. It is left unchanged.
            args, kwargs: arguments of the call.
        """
        tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        inputs = [leaf for leaf in leaves(args, kwargs) if isinstance(leaf, torch.Tensor)]
        # The code of a tensor subclass may compute anything. A fake tensor is such a subclass.
        for tensor in (*tensors.values(), *inputs):
            if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_meta:
                return None
        if len({*map(id, inputs)}) < len(inputs):  # a tensor that is passed twice would have two origins
            return None
        # It may raise `_NoTrace`, for an op without a fake kernel, or because forward raises on fake tensors.
        trace, _ = attempt(_trace, model, args, kwargs, tensors)
        return trace


@isolated
def _run(
    undo: Block, model: nn.Module, tensors: Mapping[str, torch.Tensor], fake: FakeTensorMode, recorder: _Recorder
) -> None:
    """Context manager: prepare the model to run on fake tensors, in the same conditions as in torch.export."""
    undo.enter(quiet(torch.is_grad_enabled()))
    undo.enter(isolated_model(model))
    # torch.cond and similar ops compile their bodies. Dynamo would remember a failure here and skip them in the export.
    undo.enter(torch.compiler.set_stance("force_eager"))
    values = {name: fake.from_tensor(tensor) for name, tensor in tensors.items()}
    for name, value in values.items():
        recorder.register(value, ("model", name, _layout(value)))
    undo.enter(substituted(model, values))
    # Models may branch on torch.compiler.is_exporting(), and must take the same branch as in the export.
    for flag in ("_is_compiling_flag", "_is_exporting_flag"):
        undo(partial(setattr, torch.compiler, flag, getattr(torch.compiler, flag)))
        setattr(torch.compiler, flag, True)
    undo.enter(fake)
    undo.enter(recorder.dispatch)
    undo.enter(recorder)


def _trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> Trace:
    """Trace a call. Raises `_NoTrace`, and any exception of the model."""
    fake, recorder = FakeTensorMode(allow_non_fake_inputs=True), _Recorder()
    # Name the leaves by their paths, so that they can be matched with the leaves of a call with other arguments.
    flat, spec = pytree.tree_flatten((args, dict(kwargs)), is_leaf=is_opaque_leaf)
    names, paths = argument_names(signature_of(model), args, kwargs), list[str]()
    for name, value in zip(names, (*args, *kwargs.values()), strict=True):
        paths += [
            f"{name}{pytree.keystr(path)}"
            for path, _ in pytree.tree_flatten_with_path(value, is_leaf=is_opaque_leaf)[0]
        ]
    if len(paths) != len(flat):
        raise _NoTrace("the names do not match the structure of the arguments")
    if any(not isinstance(leaf, (torch.Tensor, *_VALUES, torch.dtype, torch.device)) for leaf in flat):
        raise _NoTrace("an argument has an unsupported type")
    # Run the model on fake copies of the inputs.
    inputs = [fake.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]
    for path, leaf in zip(paths, inputs, strict=True):
        if isinstance(leaf, torch.Tensor):
            recorder.register(leaf, ("input", path, _layout(leaf)))
    positional, named = pytree.tree_unflatten(inputs, spec)
    with _run(model, tensors, fake, recorder):
        output = model(*positional, **named)
    leaves, out_spec = pytree.tree_flatten(output)
    if any(not isinstance(leaf, (torch.Tensor, *_VALUES)) for leaf in leaves):
        raise _NoTrace("an output has an unsupported type")
    outputs = tuple(recorder.described(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    sizes = tuple(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in flat)
    values = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in flat)
    return Trace(tuple(recorder.ops), names, tuple(paths), sizes, values, outputs, (spec, out_spec), _settings())


def _settings() -> Hashable:
    """Return the global settings of torch that can change the graph of a model."""
    backends = torch.backends
    return (
        *(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), autocast_state()),
        *(torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        *(backends.mha.get_fastpath_enabled(), backends.mkldnn.enabled, backends.cudnn.enabled),
        *(backends.cuda.flash_sdp_enabled(), backends.cuda.mem_efficient_sdp_enabled()),
        *(backends.cuda.math_sdp_enabled(), backends.cuda.cudnn_sdp_enabled()),
    )


def _layout(value: torch.Tensor, strides: bool = True) -> Hashable:
    """Return shape, strides (if wanted), dtype and device of a tensor."""
    return tuple(value.shape), value.stride() if strides else (), value.dtype, value.device


_METADATA = {
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.ndimension, torch.Tensor.numel, torch.Tensor.nelement),
    *(torch.Tensor.stride, torch.Tensor.is_contiguous, torch.Tensor.is_floating_point, torch.Tensor.is_complex),
    *(torch.Tensor.__len__, torch.Tensor.get_device, torch.Tensor.element_size, torch.Tensor.storage_offset),
    *(torch.is_floating_point, torch.is_complex, torch.is_tensor, torch.numel, torch.is_same_size),
}
"""Functions that return metadata of tensors. They need no record, because the metadata follow from the inputs."""
_HIDDEN = {torch.Tensor.requires_grad_, torch.Tensor.register_hook}
"""Functions with side effects that neither their results nor the ops that they dispatch show."""


class _Recorder(TorchFunctionMode):
    """Records the calls of torch functions, and the origin of each tensor.

    An origin is a tuple: `("model", name, layout)` for a parameter or buffer, `("input", path, layout)` for an input,
    and `("op", number, index)` for result `index` of the recorded call `number`.

    Attributes:
        ops: the recorded calls.
        inside: whether a torch function is running.
        pure: whether the running function has neither written into a tensor nor drawn random numbers.
        dispatch: the dispatch mode that watches the ops of the running function.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.inside = self.pure = False
        self.dispatch = _Unrecorded(self)
        self._origins: dict[int, Any] = {}
        self._alive: list[Any] = []  # an id is valid only while its object lives

    def register(self, tensor: torch.Tensor, origin: Any) -> None:
        """Set the origin of a tensor."""
        self._origins[id(tensor)] = origin
        self._alive.append(tensor)

    def described(self, value: Any) -> Any:
        """Return an argument with each tensor replaced by its origin, in a form that can be compared by `==`.

        Raises:
            _NoTrace: a tensor has no origin, or the argument has an unsupported type.
        """
        if isinstance(value, torch.Tensor):
            if id(value) not in self._origins:
                raise _NoTrace("a tensor is neither an input, a parameter, a buffer, nor the result of an op")
            return self._origins[id(value)]
        if isinstance(value, (list, tuple)):
            return (type(value), *map(self.described, value))
        if isinstance(value, dict):
            return (dict, *((key, self.described(item)) for key, item in value.items()))
        if isinstance(value, slice):
            return (slice, *map(self.described, (value.start, value.stop, value.step)))
        if value is None or value is Ellipsis or isinstance(value, _PLAIN):
            return type(value), repr(value)
        if isinstance(value, type) or callable(value):
            return value
        raise _NoTrace(type(value).__name__)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _HIDDEN or getattr(func, "__name__", "") in ("__set__", "__delete__"):
            raise _NoTrace(func.__name__)
        # Metadata need no record. A getter that returns a tensor (`x.T`) is recorded below.
        is_getter = getattr(func, "__name__", "") == "__get__"
        if is_getter or func in _METADATA:
            self.inside = True
            result = func(*args, **kwargs)
            self.inside = False
            if not isinstance(result, torch.Tensor):
                return result
        flag, positional, named = _without_flag(func, args, kwargs)
        described = self.described((positional, named))  # before the call, which may write into its arguments
        self.inside, self.pure = True, True
        result = func(*args, **kwargs)
        if self.pure and isinstance(result, torch.Tensor) and id(result) in self._origins:
            # Dropout in eval mode returns its input itself, but in the graph they are two nodes. Make a new tensor, so
            # that input and result have different origins.
            result = result.view(result.shape)
        self.inside = False
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        reads = any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(args))
        if reads and not tensors and result is not None:
            # The model may branch on this value, which a static graph does not.
            raise _NoTrace(f"{func} returns a value of a tensor")
        number = len(self.ops)
        pure = self.pure and result is not None
        self.ops.append(
            Op(_comparable(func), described, tuple([_layout(tensor, strides=False) for tensor in tensors]), flag, pure)
        )
        for index, tensor in enumerate(tensors):
            if id(tensor) not in self._origins:
                self.register(tensor, ("op", number, index))
        return result


_VALUES = (bool, int, float, str, type(None))
"""Types of inputs and outputs that a graph can hold as constants."""
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
"""Types of arguments that are recorded by their `repr`."""


def _comparable(func: Any) -> Any:
    """Return the function itself, or a key for the getter of an attribute, which is a new object at each access."""
    owner = getattr(func, "__self__", None)
    return (owner, func.__name__) if owner is not None and getattr(func, "__name__", "") == "__get__" else func


def _without_flag(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], Any]:
    """Return the value of the flag of a function in FLAGS, and the other arguments.

    Raises:
        _NoTrace: a dropout in place. In eval mode it is no write, so the mode changes more than the flag.
    """
    flag = FLAGS.get(func)
    if flag is None:
        return None, args, kwargs
    if kwargs.get("inplace") or (flag.inplace is not None and len(args) > flag.inplace and args[flag.inplace]):
        raise _NoTrace("a dropout in place")
    if len(args) > flag.position:
        return args[flag.position], (*args[: flag.position], *args[flag.position + 1 :]), kwargs
    value = kwargs.get(flag.name, flag.default)
    return value, args, {key: item for key, item in kwargs.items() if key != flag.name}


class _Unrecorded(TorchDispatchMode):
    """Watches the ops of recorded functions, and raises `_NoTrace` for an op outside of them."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # torch aborts the process if an exception leaves this call
            return func(*args)
        if not self._recorder.inside:
            raise _NoTrace(f"{func} runs outside of a recorded torch function")
        if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
            self._recorder.pure = False
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class GraphEdit:
    """The changes that turn the graph of an old trace into the graph of a new one.

    Args:
        flags: for each ATen op in FLAGS: the position of its flag, and the old and the new value for each of its nodes.
        outputs: for each leaf of the new output, its index in the old output, or a 1-tuple with a constant.
        stopped: names of counter buffers, such as `num_batches_tracked`, that only the old graph increments.
        started: names of counter buffers that only the new graph increments.
    """

    flags: Mapping[Any, tuple[int, list[tuple[Any, Any]]]]
    outputs: tuple[int | tuple[Any], ...]
    stopped: frozenset[str]
    started: frozenset[str]

    @classmethod
    def between(cls, old: Trace, new: Trace) -> GraphEdit | None:
        """Compare two traces. Returns None if the old graph does not contain all nodes of the new one."""
        if old.settings != new.settings:
            return None
        numbers: dict[int, int] = {}  # number of an op in the new trace -> its number in the old trace

        def renumbered(value: Any) -> Any:
            """Translate the numbers of ops in an origin from the new trace to the old one."""
            if not isinstance(value, tuple):
                return value
            if len(value) == 3 and value[0] == "op":
                return ("op", numbers[value[1]], value[2])
            return tuple(map(renumbered, value))

        # Match each new op with the next equal old op. Old ops in between are skipped.
        flags: dict[Any, tuple[int, list[tuple[Any, Any]]]] = {}
        skipped: list[Op] = []
        started = _incremented(new.ops) - _incremented(old.ops)
        remaining = enumerate(old.ops)
        for number, op in enumerate(new.ops):
            if _counter(op) in started:
                continue
            args = renumbered(op.args)
            for position, candidate in remaining:
                if (candidate.function, candidate.args, candidate.results) == (op.function, args, op.results):
                    numbers[number] = position
                    if (flag := FLAGS.get(op.function)) is not None:
                        flags.setdefault(flag.op, (flag.position, []))[1].append((candidate.flag, op.flag))
                    break
                skipped.append(candidate)
            else:
                return None
        skipped += [candidate for _, candidate in remaining]
        # The skipped nodes will be removed, so they must have no side effects other than the increment of a counter.
        stopped = {_counter(op) for op in skipped if not op.pure}
        if None in stopped or any(op.function in FLAGS for op in skipped):
            return None
        # A new output must be an output of the old graph: a trace does not tell which node computes another result.
        outputs: list[int | tuple[Any]] = []
        for value in map(renumbered, new.outputs):
            if not isinstance(value, tuple):
                outputs.append((value,))
            elif value in old.outputs:
                outputs.append(old.outputs.index(value))
            else:
                return None
        return cls(flags, tuple(outputs), frozenset(filter(None, stopped)), started)


def _counter(op: Op) -> str | None:
    """Return the buffer that an op increments by 1, as batch norm does in train mode, or None for any other op."""
    if op.function is not torch.Tensor.add_:
        return None
    match op.args:
        case (_, (_, ("model", str(name), _), (_, "1")), (_,)):
            return name
    return None


def _incremented(ops: tuple[Op, ...]) -> frozenset[str]:
    """Return the buffers that are incremented once and not read by any other op."""
    counters = [name for op in ops if (name := _counter(op)) is not None]
    reads = Counter(name for op in ops for name in _read_by(op.args))
    return frozenset(name for name in counters if reads[name] == 1)


def _read_by(args: Any) -> Iterator[str]:
    """Yield the parameters and buffers among the arguments of an op."""
    if isinstance(args, tuple):
        if len(args) == 3 and args[0] == "model":
            yield args[1]
        for part in args:
            yield from _read_by(part)


@dataclass
class CachedGraph:
    """An exported graph without a model. It is copied for each model and call that it serves.

    Args:
        trace: the trace of the call that was exported.
        graph: the graph, which reads `model.NAME`.
        constants: tensors that the graph reads besides the model's, by name. Each copy gets its own.
        conditions: the calls that the graph is valid for.
        model: the model that was exported.
        modes: `training` of each module of that model.
        state: returns the guards on the Python state of that model, or None when they are freed.
        retraced: number of traces at other sizes so far.
    """

    trace: Trace
    graph: fx.Graph
    constants: Mapping[str, torch.Tensor]
    conditions: Conditions
    model: ReferenceType[nn.Module]
    modes: tuple[bool, ...]
    state: Callable[[], Guards | None] = lambda: None
    retraced: int = 0

    def trace_at(self, model: nn.Module, flat: list[Any], new: Trace) -> Trace | None:
        """Return the trace of the exported call at the sizes of a new call, or None if the graph cannot have them.

        Args:
            model: the model of the new call.
            flat: the leaves of its arguments.
            new: its trace.
        """
        shapes = dict(zip(self.trace.inputs, self.trace.sizes, strict=True))
        if all(shapes.get(path, shape) == shape for path, shape in zip(new.inputs, new.sizes, strict=True)):
            return self.trace
        # The sizes differ. Trace the exported call again, with the tensors of the new call and its own other arguments.
        tensors = {path: leaf for path, leaf in zip(new.inputs, flat, strict=True) if isinstance(leaf, torch.Tensor)}
        if self.model() is not model or self.retraced == MAX_SIZES:
            return None
        if any(shape is not None and path not in tensors for path, shape in shapes.items()):
            return None
        leaves = [
            value if shape is None else tensors[path]
            for (path, shape), value in zip(shapes.items(), self.trace.values, strict=True)
        ]
        if not self.conditions.accepts(leaves):
            return None
        args, kwargs = pytree.tree_unflatten(leaves, self.trace.specs[0])
        # The exported call may have been in another mode than the new one. Trace it in its own mode.
        modules, modes = list(model.modules()), [module.training for module in model.modules()]
        try:
            for module, mode in zip(modules, self.modes, strict=True):
                module.training = mode
            # In that mode, the Python state must be the same as at the export.
            if (state := self.state()) is None or not state.hold():
                return None
            self.retraced += 1
            return Trace.of(model, args, kwargs)
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode

    def edited(self, model: nn.Module, new: Trace, edit: GraphEdit) -> fx.GraphModule | None:
        """Return an edited copy of the graph, as a graph module that reads `model`, or None if the edit is impossible.

        Args:
            model: the model of the new call.
            new: the trace of the new call.
            edit: the changes.
        """
        order = [self.trace.inputs.index(path) if path in self.trace.inputs else None for path in new.inputs]
        stopped, started = ({f"{OWNER}.{name}" for name in counters} for counters in (edit.stopped, edit.started))
        graph = adjust(
            copy_graph(self.graph), order, edit.outputs, edit.flags, (stopped, started), new.names, new.specs
        )
        if graph is None:
            return None
        # Copy only the constants that the edited graph still reads.
        holder = nn.Module()
        used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        holder._buffers.update({name: value.clone() for name, value in self.constants.items() if name in used})
        return with_owner(holder, graph, model)


def derive(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any], new: Trace
) -> tuple[fx.GraphModule, Conditions] | None:
    """Return a graph for a call that is copied from a cached graph, and its conditions. None if no graph fits.

    Args:
        model, args, kwargs: the call.
        new: its trace.
    """
    flat = leaves(args, kwargs)
    for key, cached in reversed(_CACHE.items()):
        old = cached.trace_at(model, flat, new)
        edit = GraphEdit.between(old, new) if old is not None else None
        graph = cached.edited(model, new, edit) if edit is not None else None
        if graph is not None:
            _CACHE.move_to_end(key)
            return graph, Conditions(None, new.sizes)
    return None


def store(trace: Trace, model: nn.Module, module: fx.GraphModule, conditions: Conditions) -> CachedGraph | None:
    """Cache an exported graph, and return the entry. Returns None if the graph cannot be shared between models.

    Args:
        trace: the trace of the exported call.
        model: the exported model.
        module: the graph, which reads `model.NAME`.
        conditions: the calls that the graph is valid for.
    """
    constants = {
        name: value for name, value in (*module._parameters.items(), *module._buffers.items()) if value is not None
    }
    read = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    # Anything else that the graph reads, such as a submodule, could keep the model alive, or be changed by it.
    foreign = any(name not in constants and not name.startswith(f"{OWNER}.") for name in read)
    plain = all(type(value) is torch.Tensor and not value.requires_grad for value in constants.values())
    if foreign or not plain or sum(value.nbytes for value in constants.values()) > MAX_BYTES:
        return None
    copies = {name: value.detach().clone() for name, value in constants.items()}
    modes = tuple(module.training for module in model.modules())
    cached = CachedGraph(trace, copy_graph(module.graph), copies, conditions, ref(model), modes)
    _CACHE[id(cached)] = cached
    while len(_CACHE) > MAX_GRAPHS:
        _CACHE.popitem(last=False)
    return cached


def forget() -> None:
    """Drop all cached graphs."""
    _CACHE.clear()
