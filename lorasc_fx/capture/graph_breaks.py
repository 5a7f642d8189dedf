"""Front end `graph-breaks`: the graphs between dynamo's graph breaks, with the model's Python in between.

torch.compile passes each subgraph to a backend of this package. The weights are inputs of a subgraph; their names
follow from the identity of the Parameters. Dynamo's guards choose the subgraph, as the key of a call chooses a variant.
Layers of one class share a subgraph, so there is one rewritten graph for each set of weights that it is called with. A
first run collects the graphs before it is decided which weights get a branch.

`eager_trace` finds the weights that the Python in between uses. It follows tensors computed from weights alone, as
graph/flow.py does in graphs, until they meet an input.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import CodeType
from typing import Any
from weakref import finalize, ref

import torch
from torch import fx, nn
from torch._compile import _disable_dynamo
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from lorasc_fx.capture.captured import OWNER, Axis, Captured, FrontEnd, read_live
from lorasc_fx.capture.effective import EffectiveWeights
from lorasc_fx.check.isolation import isolation, written_by
from lorasc_fx.check.process_state import Shared, no_fastpath, own_warnings
from lorasc_fx.errors import CaptureError
from lorasc_fx.graph import copy_graph
from lorasc_fx.graph.editor import regions_as_modules, weights_from_inputs
from lorasc_fx.graph.forms import ADDED_FIRST, CONTRACTIONS, LIKE_ANOTHER, SCALES, has_weight_argument, registered_form
from lorasc_fx.parameters import shallow, substituted
from lorasc_fx.quantized import as_opaque_products, can_require_grad
from lorasc_fx.util.undo import PROCESS, Block, isolated

MAX_CAPTURES = 64
"""Captures of one code object for the same modules, after which a call raises."""

Names = tuple[str | None, ...]
Rewrite = Callable[[fx.GraphModule], Callable[..., Any]]


@dataclass
class _Subgraph:
    """A subgraph of dynamo, with its graphs before and after rewriting, by the weights that it is called with."""

    source: fx.GraphModule
    graphs: dict[Names, fx.GraphModule] = field(default_factory=dict)
    running: dict[Names, Callable[..., Any]] = field(default_factory=dict)


class GraphBreakFallback:
    """A model that runs as graphs with Python in between. It is called as the model is.

    Attributes:
        model: the user's model.
        swapped: functions of weights, by name. While the model runs it reads `f(weight)` in place of the weight, in
            graphs and in between.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._rewrite: Rewrite | None = None
        self._subgraphs: list[_Subgraph] = []
        self._own = {id(value): name for name, value in [*model.named_parameters(), *model.named_buffers()]}
        self.swapped: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        self._effective: EffectiveWeights | None = None
        self.look: Callable[[Any, Mapping[str, Any]], None] | None = None  # gets the arguments before each call runs
        self._discovering = False
        compiler = inspect.unwrap(torch.compile)  # Lightning Fabric wraps it, and would copy the backend
        backend = _Backend(ref(self))
        self._compiled: Any = compiler(model, backend=backend)
        finalize(self, backend.invalidate)

    def discover(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run the model once, and collect its subgraphs. The model and the random generators are left unchanged.

        Inside the subgraphs, weights require gradients in this run, as they will with branches: dynamo guards on
        `requires_grad` of a subgraph's outputs, and would otherwise capture everything after them again. There may be
        no subgraph at all: dynamo leaves a loop with a break in it to Python, with the modules called there.
        """
        try:
            with isolation(self.model, args, kwargs, seeded=False) as (inputs, named):
                _reset_codes_without_entries()
                self._discovering = True
                self(*inputs, **named)
        except torch._dynamo.exc.TorchDynamoException:  # a bug of dynamo: the model itself runs
            self._subgraphs.clear()
            self.run_eager()
        finally:
            self._discovering = False

    def rewrite_by(self, rewrite: Rewrite) -> None:
        """Rewrite every subgraph, also those that later calls bring."""
        rewritten = [
            {names: rewrite(graph) for names, graph in subgraph.graphs.items()} for subgraph in self._subgraphs
        ]
        self._rewrite = rewrite
        for subgraph, running in zip(self._subgraphs, rewritten, strict=True):
            subgraph.running = running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with rewritten subgraphs.

        Raises:
            CaptureError: the calls vary too much: dynamo would continue without graphs, and so without branches.
        """
        if self.look is not None:
            self.look(args, kwargs)
        return self.compute(args, kwargs)

    @_disable_dynamo  # torch.compile around a cascade would trace the model itself, without branches
    def compute(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a call without calling `look` first. Raises as a call does."""
        try:
            with _dynamo_settings(), as_opaque_products():
                return self._call(args, kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as fault:
            raise fault.inner_exception from fault
        except torch._dynamo.exc.TorchRuntimeError:  # an op refuses the sizes: let the model raise its own error
            with isolation(self.model, args, kwargs, grad=torch.is_grad_enabled(), seeded=False) as (inputs, named):
                self.model(*inputs, **named)
            raise

    def swap(self, swapped: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> None:
        """Replace the functions of weights."""
        self.swapped = dict(swapped)
        if self._effective is not None:
            self._effective.read_as(swapped)

    @property
    def eager(self) -> bool:
        """Whether the model runs eagerly, without graphs."""
        return self._effective is not None

    def run_eager(self, once: bool = False) -> None:
        """Run the model eagerly from now on. Swapped weights are swapped in the backward of a call as well.

        With `once`, each weight is computed once for a call and its backward.
        """
        if self._effective is None:
            self._effective = EffectiveWeights(self.model, self.swapped)
        self._effective.once = once

    @property
    def once(self) -> bool:
        """Whether each swapped weight is computed once for a call and its backward."""
        return self._effective is not None and self._effective.once

    def detach(self) -> None:
        """Restore the parameters of the model's modules. A later call swaps them again."""
        if self._effective is not None:
            self._effective.close()

    @property
    def located(self) -> set[str]:
        """Names of the parameters that a graph reads or that are swapped."""
        read = {name for subgraph in self._subgraphs for names in subgraph.graphs for name in names if name is not None}
        graphs = [graph for subgraph in self._subgraphs for graph in subgraph.graphs.values()]
        nodes = [node for graph in graphs for node in graph.graph.nodes if node.op == "get_attr"]
        return read | {str(node.target).removeprefix(f"{OWNER}.") for node in nodes} | self.swapped.keys()

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self._effective is not None:
            return self._effective(*args, **kwargs)
        if not self.swapped:
            return self._compiled(*args, **kwargs)
        values = {name: f(self.model.get_parameter(name)) for name, f in self.swapped.items()}
        with substituted(self.model, values):
            return self._compiled(*args, **kwargs)

    def why_not_whole(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Return why there is no whole graph: file, line and reason of the first graph break, or another reason."""
        if self.eager:
            return "the model runs eagerly, by its own Python"
        with isolation(self.model, args, kwargs) as (inputs, named), _dynamo_settings():  # explain runs the model
            explained = torch._dynamo.explain(self.model)(*inputs, **named)
        for reason in explained.break_reasons:
            if reason.user_stack:
                frame = reason.user_stack[-1]
                return f"the first break is {frame.filename}:{frame.lineno}: {reason.reason.splitlines()[0]}"
        return "what it recomputes in backward (gradient checkpointing) are graphs of their own; turn that off first"

    @property
    def graphs(self) -> list[fx.GraphModule]:
        """The graphs so far, each reading the live model. One empty graph if there are none."""
        graphs = [graph for subgraph in self._subgraphs for graph in subgraph.graphs.values()]
        return graphs or [read_live(nn.Module(), fx.Graph(), self.model)]

    @property
    def rewritten(self) -> list[Callable[..., Any]]:
        """The rewritten subgraphs."""
        return [running for subgraph in self._subgraphs for running in subgraph.running.values()]

    def take(self, source: fx.GraphModule) -> Callable[..., Any]:
        """Return what dynamo runs instead of a subgraph. It does not hold the model, because dynamo caches it."""
        subgraph = _Subgraph(source)
        self._subgraphs.append(subgraph)
        owner, held = ref(self), ref(subgraph)

        def run(*inputs: Any) -> Any:
            fallback, subgraph = owner(), held()
            assert fallback is not None
            assert subgraph is not None
            return fallback._run(subgraph, inputs)

        return run

    def _run(self, subgraph: _Subgraph, inputs: tuple[Any, ...]) -> Any:
        names = tuple(map(self._name, inputs))
        running = subgraph.running.get(names)
        running = self._add_graph(subgraph, names) if running is None else running
        if not self._discovering:
            return running(*inputs)
        written = written_by(self.model)  # they get no branch, and a leaf that requires grad cannot be written
        named = [value for value, name in zip(inputs, names, strict=True) if name not in (None, *written)]
        with _weights_require_grad(value for value in named if isinstance(value, nn.Parameter)):
            return running(*inputs)

    def _name(self, value: Any) -> str | None:
        """Return the name of an input that is a current parameter or buffer of the model, or None."""
        name = self._own.get(id(value)) if isinstance(value, torch.Tensor) else None
        if name is None:
            return None
        holder, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(holder)
        return name if value is module._parameters.get(leaf, module._buffers.get(leaf)) else None

    def _add_graph(self, subgraph: _Subgraph, names: Names) -> Callable[..., Any]:
        graph = copy_graph(subgraph.source.graph)
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        weights = {node: name for node, name in zip(inputs, names, strict=True) if name is not None}
        if weights:
            weights_from_inputs(graph, weights)
        holder = shallow(subgraph.source)

        def region(body: str, given: Names, options: Mapping[str, Any]) -> str:
            inner, name = _Subgraph(getattr(subgraph.source, body)), f"{body}_region"
            self._subgraphs.append(inner)
            self._add_graph(inner, tuple(name if name in weights.values() else None for name in given))
            holder._modules[name] = _Region(inner, next(iter(inner.graphs)), options)
            return name

        regions_as_modules(graph, torch.ops.higher_order.tag_activation_checkpoint, weights.values(), region)
        live = read_live(holder, graph, self.model)
        running = live if self._rewrite is None else self._rewrite(live)
        subgraph.graphs[names], subgraph.running[names] = live, running
        return running

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphBreakFallback:
        """Refuse: a copy would run the branches of the original. Copies of a cascade drop its variants."""
        raise TypeError("the subgraphs of a model are not copied")


def _capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Collection[Axis]) -> Captured:
    """Return the model's subgraphs. Raises what the model raises."""
    fallback = GraphBreakFallback(model)
    fallback.discover(args, kwargs)
    return Captured(fx.GraphModule(nn.Module(), fx.Graph()), GRAPH_BREAKS, fallback=fallback)


GRAPH_BREAKS = FrontEnd("graph-breaks", _capture, whole=False)


@isolated
def _weights_require_grad(undo: Block, weights: Iterable[torch.Tensor]) -> None:
    """Let matrices require gradients inside the block, as the outputs of branches do."""
    for weight in weights:
        if weight.dim() > 1 and weight.is_floating_point() and not weight.requires_grad and can_require_grad(weight):
            undo(partial(weight.requires_grad_, False))
            weight.requires_grad_(True)


class _Backend:
    """The backend of one fallback, which dynamo keeps in its cache of each code object.

    All models of a class share this cache, and dynamo's limits count all entries. So these limits are lifted, and the
    entries of each backend are counted here.
    """

    def __init__(self, owner: ref[GraphBreakFallback]) -> None:
        self._owner = owner

    def __call__(self, source: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        """Compile a subgraph.

        Raises:
            CaptureError: the current code was compiled too often for the same modules.
        """
        fallback = self._owner()
        assert fallback is not None
        # Count how often the current code was compiled for the same modules.
        frame: Any = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output.root_tx
        entries = [entry for entry in _entries_of(frame.f_code) if self._owns(entry)]
        alike = sum(torch._dynamo.cache_size._has_same_id_matched_objs(frame, entry) for entry in entries)
        if alike < MAX_CAPTURES and len(entries) < 4 * MAX_CAPTURES:
            return fallback.take(source)
        guards = torch._dynamo.utils.guard_failures.get(frame.f_code, ["its inputs"])
        guard = str(guards[-1]).splitlines()[0].partition(" #")[0].strip()
        raise CaptureError(
            f"{type(fallback.model).__name__} was captured {MAX_CAPTURES} times for the same modules. The last graph "
            f"did not fit because of {guard.partition(': ')[2] or guard}. Pad inputs to fewer sizes, keep no growing "
            "state in Python, or adapt a part of the model"
        )

    def _owns(self, entry: Any) -> bool:
        return getattr(entry.backend, "compiler_fn", None) is self  # torch.compile wraps a backend

    def invalidate(self) -> None:
        """Drop the code that dynamo has compiled for this backend."""
        deleted = torch._dynamo.guards.DeletedGuardManagerWrapper
        for code in _compiled_codes():
            for entry in _entries_of(code):
                guards = entry.guard_manager
                if self._owns(entry) and not isinstance(guards, deleted):
                    guards.extra_state.invalidate(guards.cache_entry, deleted("the cascade is gone"))


def _compiled_codes() -> list[CodeType]:
    """Return the code objects that dynamo has looked at."""
    codes = [code() for code in list(torch._dynamo.convert_frame.input_codes.seen)]
    return [code for code in codes if code is not None]


def _entries_of(code: CodeType) -> list[Any]:
    """Return dynamo's cache entries of a code object."""
    entries: list[Any] = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code)
    return entries


def _reset_codes_without_entries() -> None:
    """Free the caches with invalidated entries only, because dynamo keeps and counts such entries."""
    deleted = torch._dynamo.guards.DeletedGuardManagerWrapper
    for code in _compiled_codes():
        entries = _entries_of(code)
        if entries and all(isinstance(entry.guard_manager, deleted) for entry in entries):
            torch._C._dynamo.eval_frame.reset_code(code)


class _Region(nn.Module):
    """Runs a region of a subgraph under torch.utils.checkpoint. The region is a subgraph itself."""

    def __init__(self, subgraph: _Subgraph, names: Names, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.subgraph, self.names = subgraph, names
        self.options = {
            key: value for key, value in options.items() if key not in ("use_reentrant", "preserve_rng_state")
        }
        if "_checkpoint_context_fn" in subgraph.source.meta:
            self.options["context_fn"] = subgraph.source.meta["_checkpoint_context_fn"]

    def forward(self, *values: Any) -> Any:
        given = iter(values)
        inputs = [next(given) if name is None else None for name in self.names]  # the region reads its weights itself
        return checkpoint(
            self.subgraph.running[self.names], *inputs, use_reentrant=False, preserve_rng_state=True, **self.options
        )


@contextlib.contextmanager
def _no_graph_break_messages() -> Iterator[None]:
    """Silence dynamo's messages about graph breaks, which are expected. Only inside `own_warnings`."""
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._dynamo.variables.tensor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # Dynamo reads .grad of tensors between subgraphs, and makes tensors of arrays that are tensors already.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", message="To copy construct from a tensor")
    warnings.filterwarnings("ignore", message=".*should not be instantiated. Methods on autograd functions")
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


_quiet_dynamo = Shared(_no_graph_break_messages)


@isolated
def _dynamo_settings(undo: Block) -> None:
    """Let dynamo compile everything. Without graphs the model would run without branches."""
    if torch._dynamo.eval_frame._stance.stance in ("force_eager", "eager_on_recompile"):
        undo.enter(PROCESS)  # waits for a capture in another thread, which sets a stance
        undo.enter(torch.compiler.set_stance("default"))
    for shared in (own_warnings, _quiet_dynamo, no_fastpath):
        undo.enter(shared)
    undo.enter(
        torch._dynamo.config.patch(
            fail_on_recompile_limit_hit=True,
            recompile_limit=sys.maxsize,  # `_Backend` has its own limits
            accumulated_recompile_limit=sys.maxsize,
            use_numpy_random_stream=True,  # draw from numpy's generator, not from torch's
            skip_nnmodule_hook_guards=False,  # hooks may change after the capture
            allow_unspec_int_on_nn_module=True,  # or each value of a counter would get its own graph
        )
    )


_READS_NO_VALUE = {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "detach", "requires_grad_"}


def eager_trace(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Run the model once and return the kind of site of each weight that it uses.

    The kind is "" if the weight is neither multiplied nor looked up. Model, inputs and generators are left unchanged.
    """
    watcher = _Watcher(model, list(model.buffers()))
    with isolation(model, args, kwargs, watcher, seeded=False) as (inputs, named):
        model(*inputs, **named)
    return dict.fromkeys(sorted(watcher.seen), "") | watcher.kinds


class _Watcher(TorchFunctionMode):
    """Follows tensors that are computed from weights. The ways to a site are those that graph/flow.py lists."""

    def __init__(self, model: nn.Module, constants: list[torch.Tensor]) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self._kinds: tuple[dict[str, str], ...] = ({}, {}, {}, {})  # one for each way
        self._made_of: dict[int, set[str]] = {id(value): {name} for name, value in model.named_parameters()}
        self._made_of |= {id(value): set() for value in constants}
        self._scaled: dict[int, set[str]] = {}
        self._alive: list[Any] = []  # an id is valid only while its tensor lives

    @property
    def kinds(self) -> dict[str, str]:
        """Kinds of sites by weight. The first way that makes a site counts."""
        return {name: kind for kinds in reversed(self._kinds) for name, kind in kinds.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        read = args[:1] if name in LIKE_ANOTHER else (args, kwargs or {})
        tensors = [leaf for leaf in pytree.tree_leaves(read) if isinstance(leaf, torch.Tensor)]
        weights = self._weights(tensors)
        if name not in _READS_NO_VALUE:
            self.seen |= weights
        form = registered_form(func)
        kind = CONTRACTIONS.get(name) if form is None else form.kind
        inputs = [tensor for tensor in tensors if id(tensor) not in self._made_of]
        if weights and (kind == "embedding" or any(tensor.is_floating_point() for tensor in inputs)):
            added = args[0] if name in ADDED_FIRST else None
            self._note(0, self._weights([tensor for tensor in tensors if tensor is not added]), kind)
            if name in SCALES:
                self._follow(output, self._scaled, weights)
        elif weights:  # with constants alone, or with an index that only selects
            self._note(1, weights, kind)
            self._note(3, weights if inputs and id(args[0]) in self._made_of else (), "embedding")
            self._follow(output, self._made_of, weights)
        scaled = set().union(*(self._scaled.get(id(tensor), set()) for tensor in tensors))
        if scaled and kind is not None and len(args) > 1 and id(args[1]) in self._scaled and has_weight_argument(name):
            self._note(2, self._scaled[id(args[1])], kind)
        elif scaled and (name in SCALES or not any(id(tensor) not in self._scaled for tensor in inputs)):
            self._follow(output, self._scaled, scaled | weights)
        return output

    def _weights(self, tensors: list[torch.Tensor]) -> set[str]:
        return set().union(*(self._made_of.get(id(tensor), set()) for tensor in tensors))

    def _note(self, way: int, weights: Iterable[str], kind: str | None) -> None:
        for weight in weights if kind is not None else ():
            self._kinds[way].setdefault(weight, kind or "")

    def _follow(self, output: Any, into: dict[int, set[str]], weights: set[str]) -> None:
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                into.setdefault(id(leaf), weights)
                self._alive.append(leaf)
