"""A cache of exported graphs: a call whose trace is known gets a copy of the graph of an earlier call.

`Trace.of` runs the model once on fake tensors, with the sizes of the call, and records each function of torch that it
calls: the function, its arguments and the shapes of its results. That takes a tenth of an export. Two calls with equal
traces have equal static graphs, so one export serves models in the same state, arguments that change nothing, and both
modes of a model that does not read its mode.

One graph also serves a call whose trace differs from that of the graph in one of these ways:

- The arguments of `FLAGS` that depend on the mode differ: dropout and batch norm. The copy gets the new values.
- Some functions are not called, and nothing needs their results: a call without labels needs no loss. The copy has
  other outputs, and no nodes that only the old ones needed.

A trace holds for its own sizes. A graph with dynamic sizes therefore serves another call only at the sizes at which
both calls were traced. A trace that reads a value or calls an unknown kind of function is not used.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from lorasc_fx.capture.captured import OWNER, Conditions, with_owner
from lorasc_fx.check.guards import Guards
from lorasc_fx.check.isolation import isolated_model
from lorasc_fx.check.process_state import quiet
from lorasc_fx.graph import copy_graph
from lorasc_fx.graph.editor import adjust
from lorasc_fx.parameters import substituted
from lorasc_fx.signature import is_opaque_leaf
from lorasc_fx.util.accelerator import autocast_state
from lorasc_fx.util.undo import Block, isolated

MAX_GRAPHS = 16
"""Graphs in the cache; the least recently used one is dropped first."""
MAX_BYTES = 1 << 20
"""Size of the constants of a cached graph."""
MAX_SIZES = 4
"""Sizes at which one graph with dynamic sizes serves calls of another kind. Then these calls get a graph of their own,
because two traces for each size would take longer than one export."""

_ATEN = torch.ops.aten
FLAGS: dict[Any, tuple[tuple[str, int], Any, int]] = {
    F.dropout: (("training", 2), _ATEN.dropout.default, 2),
    F.dropout1d: (("training", 2), _ATEN.feature_dropout.default, 2),
    F.dropout2d: (("training", 2), _ATEN.feature_dropout.default, 2),
    F.dropout3d: (("training", 2), _ATEN.feature_dropout.default, 2),
    F.alpha_dropout: (("training", 2), _ATEN.alpha_dropout.default, 2),
    F.feature_alpha_dropout: (("training", 2), _ATEN.feature_alpha_dropout.default, 2),
    F.batch_norm: (("training", 5), _ATEN.batch_norm.default, 5),
    F.scaled_dot_product_attention: (("dropout_p", 4), _ATEN.scaled_dot_product_attention.default, 4),
}
"""Functions with an argument that depends on the mode: its name and position, the op of its node, and the position
there."""
_DEFAULTS = {"training": False, "dropout_p": 0.0}
_ALWAYS_TRAINING = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}
"""Functions of FLAGS whose default is training."""

_CACHE: OrderedDict[int, Known] = OrderedDict()


class _NoTrace(Exception):
    """The run does something that a trace does not show."""


@dataclass(frozen=True)
class Op:
    """One call of a function of torch.

    Args:
        function: that is called.
        args: arguments without the flag. Tensors are replaced by where they come from.
        results: shapes, dtypes and devices. Strides depend on the kernel, and with it on the mode.
        flag: value of the flag of a function in FLAGS.
        pure: whether it only computes its results: it draws no random numbers and writes into nothing.
    """

    function: Any
    args: Any
    results: Any
    flag: Any = field(default=None, compare=False)
    pure: bool = field(default=True, compare=False)


@dataclass(frozen=True)
class Trace:
    """What one call of a model does, on fake tensors.

    Args:
        ops: in order.
        inputs: path of each leaf of the arguments.
        sizes: of each leaf that is a tensor, None for others.
        values: of each leaf that is no tensor, None for others.
        outputs: each leaf of the output: where the tensor comes from, or another value.
        specs: pytree structures of the arguments and of the output.
        settings: of torch.
    """

    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    sizes: tuple[tuple[int, ...] | None, ...]
    values: tuple[Any, ...]
    outputs: tuple[Any, ...]
    specs: tuple[pytree.TreeSpec, pytree.TreeSpec]
    settings: Hashable

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: list[str]) -> Trace | None:
        """Trace a call, or return None if a trace would not show all of it.

        Args:
            model: is left unchanged.
            args, kwargs: of the call.
            names: of the arguments, in the order of `args` and `kwargs`.
        """
        tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        flat = pytree.tree_leaves((args, dict(kwargs)), is_leaf=is_opaque_leaf)
        given = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
        for tensor in (*tensors.values(), *given):
            plain = type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided
            wrapped = isinstance(tensor, FakeTensor) or is_traceable_wrapper_subclass(tensor)
            if not plain or wrapped or tensor.is_meta:
                return None
        if len({*map(id, given)}) < len(given):  # one tensor given twice would have two origins
            return None
        try:
            return _trace(model, args, kwargs, names, tensors)
        except MemoryError:
            raise
        except Exception:  # a read of a value, an op without a fake kernel, or what forward raises on fake tensors
            return None


@isolated
def _run(
    undo: Block, model: nn.Module, tensors: Mapping[str, torch.Tensor], fake: FakeTensorMode, recorder: _Recorder
) -> None:
    """Let the model run on fake tensors in the block, as torch.export lets it run."""
    undo.enter(quiet(torch.is_grad_enabled()))
    undo.enter(isolated_model(model))
    # torch.cond and its like compile what they call: a compilation that fails here would be skipped in the export, too.
    undo.enter(torch.compiler.set_stance("force_eager"))
    values = {name: fake.from_tensor(tensor) for name, tensor in tensors.items()}
    for name, value in values.items():
        recorder.know(value, ("model", name, _layout(value)))
    undo.enter(substituted(model, values))
    # Models ask torch.compiler.is_exporting(), and must answer as in an export.
    for flag in ("_is_compiling_flag", "_is_exporting_flag"):
        undo(partial(setattr, torch.compiler, flag, getattr(torch.compiler, flag)))
        setattr(torch.compiler, flag, True)
    undo.enter(fake)
    undo.enter(recorder.dispatch)
    undo.enter(recorder)


def _trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    names: list[str],
    tensors: Mapping[str, torch.Tensor],
) -> Trace:
    fake, recorder = FakeTensorMode(allow_non_fake_inputs=True), _Recorder()
    flat, spec = pytree.tree_flatten((args, dict(kwargs)), is_leaf=is_opaque_leaf)
    paths: list[str] = []
    for name, value in zip(names, (*args, *kwargs.values()), strict=True):
        paths += [
            f"{name}{pytree.keystr(path)}"
            for path, _ in pytree.tree_flatten_with_path(value, is_leaf=is_opaque_leaf)[0]
        ]
    if len(paths) != len(flat):
        raise _NoTrace("arguments of another structure")
    if any(not isinstance(leaf, (torch.Tensor, *_VALUES, torch.dtype, torch.device)) for leaf in flat):
        raise _NoTrace("an argument of another type")
    inputs = [fake.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]
    for path, leaf in zip(paths, inputs, strict=True):
        if isinstance(leaf, torch.Tensor):
            recorder.know(leaf, ("input", path, _layout(leaf)))
    positional, named = pytree.tree_unflatten(inputs, spec)
    with _run(model, tensors, fake, recorder):
        output = model(*positional, **named)
    leaves, out_spec = pytree.tree_flatten(output)
    if any(not isinstance(leaf, (torch.Tensor, *_VALUES)) for leaf in leaves):
        raise _NoTrace("an output of another type")
    outputs = tuple(recorder.described(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    sizes = tuple(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in flat)
    values = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in flat)
    return Trace(tuple(recorder.ops), tuple(paths), sizes, values, outputs, (spec, out_spec), _settings())


def _settings() -> Hashable:
    """Return the settings of torch that decide what a model does."""
    backends = torch.backends
    return (
        *(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), autocast_state()),
        *(torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        *(backends.mha.get_fastpath_enabled(), backends.mkldnn.enabled, backends.cudnn.enabled),
        *(backends.cuda.flash_sdp_enabled(), backends.cuda.mem_efficient_sdp_enabled()),
        *(backends.cuda.math_sdp_enabled(), backends.cuda.cudnn_sdp_enabled()),
    )


def _layout(value: torch.Tensor, strides: bool = True) -> Hashable:
    return tuple(value.shape), value.stride() if strides else (), value.dtype, value.device


_METADATA = {
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.ndimension, torch.Tensor.numel, torch.Tensor.nelement),
    *(torch.Tensor.stride, torch.Tensor.is_contiguous, torch.Tensor.is_floating_point, torch.Tensor.is_complex),
    *(torch.Tensor.__len__, torch.Tensor.get_device, torch.Tensor.element_size, torch.Tensor.storage_offset),
    *(torch.is_floating_point, torch.is_complex, torch.is_tensor, torch.numel, torch.is_same_size),
}
"""Functions whose results follow from sizes and dtypes."""
_HIDDEN = {torch.Tensor.requires_grad_, torch.Tensor.register_hook}
"""Functions that act on more than their results show."""


class _Recorder(TorchFunctionMode):
    """Records the functions of torch that are called, and where their tensors come from."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.inside = self.pure = False
        self.dispatch = _Unrecorded(self)
        self._origins: dict[int, Any] = {}
        self._alive: list[Any] = []  # an id is valid only while its object lives

    def know(self, tensor: torch.Tensor, origin: Any) -> None:
        """Learn where a tensor comes from."""
        self._origins[id(tensor)] = origin
        self._alive.append(tensor)

    def described(self, value: Any) -> Any:
        """Return what a trace holds of a value."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self._origins:
                raise _NoTrace("a tensor that is neither an input nor a parameter or buffer")
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
        is_getter = getattr(func, "__name__", "") == "__get__"
        if is_getter or func in _METADATA:
            self.inside = True
            result = func(*args, **kwargs)
            self.inside = False
            if not isinstance(result, torch.Tensor):
                return result
        flag, given, named = _without_flag(func, args, kwargs)
        before = self.described((given, named))  # before the call, which may write into its arguments
        self.inside, self.pure = True, True
        result = func(*args, **kwargs)
        if self.pure and isinstance(result, torch.Tensor) and id(result) in self._origins:
            # Dropout in eval mode returns its input, and so does `contiguous`. In the graph they are two nodes.
            result = result.view(result.shape)
        self.inside = False
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        reads = any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(args))
        if reads and not tensors and result is not None:
            raise _NoTrace(f"{func} returns a value of a tensor")
        number = len(self.ops)
        pure = self.pure and result is not None
        self.ops.append(
            Op(_named(func), before, tuple([_layout(tensor, strides=False) for tensor in tensors]), flag, pure)
        )
        for index, tensor in enumerate(tensors):
            if id(tensor) not in self._origins:
                self.know(tensor, ("op", number, index))
        return result


_VALUES = (bool, int, float, str, type(None))
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)


def _named(func: Any) -> Any:
    """Return a value that is equal for the same function. Getters of attributes are made at each access."""
    owner = getattr(func, "__self__", None)
    return (owner, func.__name__) if owner is not None and getattr(func, "__name__", "") == "__get__" else func


def _without_flag(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], Any]:
    """Return the flag of a function in FLAGS, and the other arguments."""
    if func not in FLAGS:
        return None, args, kwargs
    (name, position), _, _ = FLAGS[func]
    if kwargs.get("inplace") or (func in _ALWAYS_TRAINING and len(args) > 3 and args[3]):
        raise _NoTrace("a dropout in place")
    if len(args) > position:
        return args[position], (*args[:position], *args[position + 1 :]), kwargs
    default = func in _ALWAYS_TRAINING or _DEFAULTS[name]
    return kwargs.get(name, default), args, {key: value for key, value in kwargs.items() if key != name}


class _Unrecorded(TorchDispatchMode):
    """Refuses ops that no recorded function has called."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._recorder.inside:
            raise _NoTrace(f"{func} outside of a function of torch")
        if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
            self._recorder.pure = False
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Difference:
    """How to make the graph of one trace from that of another.

    Args:
        flags: for each op of a node, the flags of these nodes before and after, in order.
        outputs: for each leaf of the new output its index in the old one, or a tuple with another value.
        stopped, started: buffers that only the old graph, or only the new one, counts up.
    """

    flags: Mapping[Any, list[tuple[Any, Any]]]
    outputs: tuple[int | tuple[Any], ...]
    stopped: frozenset[str]
    started: frozenset[str]

    @classmethod
    def of(cls, old: Trace, new: Trace) -> Difference | None:
        """Compare two traces. None if the graph of one does not contain that of the other."""
        if old.settings != new.settings:
            return None
        numbers: dict[int, int] = {}  # of an op in the old trace, by that in the new one

        def renumbered(value: Any) -> Any:
            if not isinstance(value, tuple):
                return value
            if len(value) == 3 and value[0] == "op":
                return ("op", numbers[value[1]], value[2])
            return tuple(map(renumbered, value))

        # Match each new op with the next old op that is the same. Old ops in between are skipped: nothing needs them.
        flags: dict[Any, list[tuple[Any, Any]]] = {}
        skipped: list[Op] = []
        started = _counted(new.ops) - _counted(old.ops)
        waiting = enumerate(old.ops)
        for number, op in enumerate(new.ops):
            if _counter(op) in started:
                continue
            args = renumbered(op.args)
            for position, candidate in waiting:
                if (candidate.function, candidate.args, candidate.results) == (op.function, args, op.results):
                    numbers[number] = position
                    if op.function in FLAGS:
                        flags.setdefault(FLAGS[op.function][1], []).append((candidate.flag, op.flag))
                    break
                skipped.append(candidate)
            else:
                return None
        skipped += [candidate for _, candidate in waiting]
        # A skipped op must not have done anything else than compute its results, except count up a buffer.
        stopped = {_counter(op) for op in skipped if not op.pure}
        if None in stopped or any(op.function in FLAGS for op in skipped):
            return None
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
    """Return the buffer that an op counts up, as batch norm does in training, or None for any other op."""
    if op.function is not torch.Tensor.add_:
        return None
    match op.args:
        case (_, (_, ("model", str(name), _), (_, "1")), (_,)):
            return name
    return None


def _counted(ops: tuple[Op, ...]) -> frozenset[str]:
    """Return the buffers that are counted up once, and not read otherwise."""
    counters = [name for op in ops if (name := _counter(op)) is not None]
    read = Counter(name for op in ops for name in _read(op.args))
    return frozenset(name for name in counters if read[name] == 1)


def _read(value: Any) -> Iterator[str]:
    """Yield the parameters and buffers among the arguments of an op."""
    if isinstance(value, tuple):
        if len(value) == 3 and value[0] == "model":
            yield value[1]
        for part in value:
            yield from _read(part)


@dataclass
class Known:
    """A captured graph that reads `model.*`, without a model.

    Args:
        trace: of its call.
        names: of the arguments.
        graph: is copied for each model.
        constants: of the graph, by name. Each model's graph gets its own copies.
        conditions: the calls that the graph is valid for.
        model: that it was captured for.
        modes: of the model's modules.
        state: guards on the Python state of that model, while the model and its cascade live.
        sizes: number of other sizes at which it has served calls of another kind.
    """

    trace: Trace
    names: list[str]
    graph: fx.Graph
    constants: Mapping[str, torch.Tensor]
    conditions: Conditions
    model: ReferenceType[nn.Module]
    modes: tuple[bool, ...]
    state: Callable[[], Guards | None] = lambda: None
    sizes: int = 0

    def trace_at(self, model: nn.Module, flat: list[Any], new: Trace) -> Trace | None:
        """Return the trace of this graph's kind of call at the sizes of a new call, or None if it cannot serve it."""
        shapes = dict(zip(self.trace.inputs, self.trace.sizes, strict=True))
        if all(shapes.get(path, shape) == shape for path, shape in zip(new.inputs, new.sizes, strict=True)):
            return self.trace
        # Other sizes. Trace this graph's kind of call once more, with the tensors of the new call.
        given = dict(zip(new.inputs, flat, strict=True))
        if self.model() is not model or self.sizes == MAX_SIZES:
            return None
        if any(shape is not None and not isinstance(given.get(path), torch.Tensor) for path, shape in shapes.items()):
            return None
        ours = [
            value if shape is None else given[path]
            for (path, shape), value in zip(shapes.items(), self.trace.values, strict=True)
        ]
        if not self.conditions.accepts(ours):
            return None
        args, kwargs = pytree.tree_unflatten(ours, self.trace.specs[0])
        # The cached graph may be of another mode of this model.
        modules, modes = list(model.modules()), [module.training for module in model.modules()]
        try:
            for module, mode in zip(modules, self.modes, strict=True):
                module.training = mode
            if (state := self.state()) is None or not state.hold():
                return None
            self.sizes += 1
            return Trace.of(model, args, kwargs, self.names)
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode

    def on(self, model: nn.Module, new: Trace, names: list[str], difference: Difference) -> fx.GraphModule | None:
        """Return a graph module for a new call that reads this model, or None if the graph cannot be adjusted."""
        order = [self.trace.inputs.index(path) if path in self.trace.inputs else None for path in new.inputs]
        stopped, started = ({f"{OWNER}.{name}" for name in side} for side in (difference.stopped, difference.started))
        flags = {op: (_POSITIONS[op], values) for op, values in difference.flags.items()}
        graph = adjust(copy_graph(self.graph), order, difference.outputs, flags, (stopped, started), names, new.specs)
        if graph is None:
            return None
        holder = nn.Module()
        used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        holder._buffers.update({name: value.clone() for name, value in self.constants.items() if name in used})
        return with_owner(holder, graph, model)


_POSITIONS = {op: position for _, op, position in FLAGS.values()}


def derive(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any], names: list[str], new: Trace | None
) -> tuple[fx.GraphModule, Conditions] | None:
    """Return the graph of a call made from a cached one, and the calls that it is valid for.

    Args:
        model, args, kwargs, names: of the call.
        new: its trace.
    """
    flat = pytree.tree_leaves((args, dict(kwargs)), is_leaf=is_opaque_leaf)
    for key, known in reversed(_CACHE.items() if new is not None else ()):
        assert new is not None
        old = known.trace_at(model, flat, new)
        difference = Difference.of(old, new) if old is not None else None
        graph = known.on(model, new, names, difference) if difference is not None else None
        if graph is not None:
            _CACHE.move_to_end(key)
            return graph, Conditions(None, new.sizes)
    return None


def store(
    new: Trace | None, names: list[str], model: nn.Module, live: fx.GraphModule, conditions: Conditions
) -> Known | None:
    """Cache a graph and return it, unless it holds more than names and small constants."""
    constants = {
        name: value for name, value in (*live._parameters.items(), *live._buffers.items()) if value is not None
    }
    read = {str(node.target) for node in live.graph.nodes if node.op in ("get_attr", "call_module")}
    # A graph that reads more than names of the model could keep another model alive, or compute with its values.
    foreign = any(name not in constants and not name.startswith(f"{OWNER}.") for name in read)
    plain = all(type(value) is torch.Tensor and not value.requires_grad for value in constants.values())
    if new is None or foreign or not plain or sum(value.nbytes for value in constants.values()) > MAX_BYTES:
        return None
    copies = {name: value.detach().clone() for name, value in constants.items()}
    modes = tuple(module.training for module in model.modules())
    known = Known(new, names, copy_graph(live.graph), copies, conditions, ref(model), modes)
    _CACHE[id(known)] = known
    while len(_CACHE) > MAX_GRAPHS:
        _CACHE.popitem(last=False)
    return known


def forget() -> None:
    """Drop all cached graphs."""
    _CACHE.clear()
