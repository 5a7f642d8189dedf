"""Front end `graph-breaks`: dynamo splits the model into subgraphs, and runs its Python code between them.

`torch.compile` passes each subgraph to a backend of this package, which adds branches to it. Dynamo's guards select the
subgraph of a call.

- The weights are inputs of a subgraph. The identity of a Parameter tells its name.
- Layers of one class share a subgraph, so a subgraph has one rewritten graph for each tuple of weights.
- A first run collects the subgraphs, because a branch must be decided over all uses of its weight.

Python between the subgraphs may use weights too. `eager_trace` finds them: it follows tensors that are computed from
weights alone until they meet an input. graph/flow.py applies the same rules to nodes.
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
from lorasc_fx.check.observe import tensors_in
from lorasc_fx.check.process_state import Shared, no_fastpath, own_warnings
from lorasc_fx.errors import CaptureError
from lorasc_fx.graph import copy_graph
from lorasc_fx.graph.editor import regions_as_modules, weights_from_inputs
from lorasc_fx.graph.forms import ADDED_FIRST, CONTRACTIONS, LIKE_ANOTHER, SCALES, has_weight_argument, registered_form
from lorasc_fx.parameters import shallow, substituted
from lorasc_fx.quantized import as_opaque_products, can_require_grad
from lorasc_fx.util.undo import PROCESS, Block, isolated

WRITES_ARGUMENT = (
    "forward writes into an argument, such as a cache (past_key_values), and no front end that traces one graph "
    "repeats that"
)
"""Why there is no full graph of such a call."""

MAX_CAPTURES = 64
"""Maximum number of subgraphs that dynamo may compile from one code object for the same modules."""

Names = tuple[str | None, ...]
"""For each input of a subgraph: the name of the parameter or buffer that it is, or None."""
Rewrite = Callable[[fx.GraphModule], Callable[..., Any]]


@dataclass
class _Subgraph:
    """A subgraph of dynamo, and the graphs made from it.

    Args:
        source: the graph of dynamo, which takes its weights as inputs.
        graphs: graphs that read the weights as `model.NAME`, by the names of the weights.
        running: the same graphs after rewriting.
    """

    source: fx.GraphModule
    graphs: dict[Names, fx.GraphModule] = field(default_factory=dict)
    running: dict[Names, Callable[..., Any]] = field(default_factory=dict)


class GraphBreakFallback:
    """A model that runs as several graphs with Python in between. It takes the arguments of the model.

    Attributes:
        model: the user's model.
        swapped: a function f for each swapped weight, by name. While the model runs, graphs and Python code read
            `f(weight)` instead of the weight. It is needed for weights that Python uses outside of the subgraphs.
        before_call: called with the arguments before each call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._rewrite: Rewrite = lambda graph: graph
        self._subgraphs: list[_Subgraph] = []
        self._names = {id(value): name for name, value in [*model.named_parameters(), *model.named_buffers()]}
        self.swapped: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        self._effective: EffectiveWeights | None = None
        self.before_call: Callable[[Any, Mapping[str, Any]], None] = lambda args, kwargs: None
        self._discovering = False
        compiler = inspect.unwrap(torch.compile)  # Lightning Fabric wraps it, and would copy the backend
        # Dynamo keeps the backend in the cache of the code object. That must not keep the model alive.
        backend = _Backend(ref(self))
        self._compiled: Any = compiler(model, backend=backend)
        finalize(self, backend.invalidate)

    def discover(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run the model once and collect its subgraphs. The model and the random generators are left unchanged.

        There may be no subgraph: dynamo runs a loop that contains a graph break in Python, with all modules called in
        it.
        """
        try:
            with isolation(self.model, args, kwargs, seeded=False) as (inputs, named):
                _reset_codes_without_entries()
                self._discovering = True
                self(*inputs, **named)
        except torch._dynamo.exc.TorchDynamoException:  # a bug of dynamo, because the eager model has run before
            self._subgraphs.clear()
            self.run_eager()
        finally:
            self._discovering = False

    def rewrite_with(self, rewrite: Rewrite) -> None:
        """Rewrite every subgraph, and also the subgraphs of later calls."""
        # Assign the results only when all rewrites have succeeded.
        rewritten = [
            {names: rewrite(graph) for names, graph in subgraph.graphs.items()} for subgraph in self._subgraphs
        ]
        self._rewrite = rewrite
        for subgraph, running in zip(self._subgraphs, rewritten, strict=True):
            subgraph.running = running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with rewritten subgraphs.

        Raises:
            CaptureError: too many subgraphs. Dynamo would continue eagerly, and so without branches.
        """
        self.before_call(args, kwargs)
        return self.compute(args, kwargs)

    @_disable_dynamo  # torch.compile around a cascade would otherwise trace the model itself, without branches
    def compute(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a call like `__call__`, but without `before_call`."""
        try:
            with _dynamo_settings(), as_opaque_products():
                return self._call(args, kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as fault:
            raise fault.inner_exception from fault
        except torch._dynamo.exc.TorchRuntimeError:
            # An op failed on fake tensors, for example because of the sizes. The eager model has a clearer error.
            with isolation(self.model, args, kwargs, grad=torch.is_grad_enabled(), seeded=False) as (inputs, named):
                self.model(*inputs, **named)
            raise

    def swap(self, swapped: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> None:
        """Add weights to `swapped`."""
        self.swapped = {**self.swapped, **swapped}
        if self._effective is not None:
            self._effective.read_as(self.swapped)

    @property
    def eager(self) -> bool:
        """Whether the model runs eagerly, without graphs."""
        return self._effective is not None

    def run_eager(self, once: bool = False) -> None:
        """Run the model eagerly from now on. Code that backward runs again reads swapped weights too.

        Args:
            once: whether `f(weight)` is computed once for a call and its backward, instead of at each read.
        """
        if self._effective is None:
            self._effective = EffectiveWeights(self.model, self.swapped)
        self._effective.once = once

    @property
    def once(self) -> bool:
        """Whether `f(weight)` is computed once for a call and its backward."""
        return self._effective is not None and self._effective.once

    def detach(self) -> None:
        """Stop intercepting reads of parameters in the model's modules. A later call intercepts them again."""
        if self._effective is not None:
            self._effective.close()

    @property
    def reached(self) -> set[str]:
        """Names of the parameters that a graph reads or that are swapped."""
        nodes = [node for graph in self.graphs for node in graph.graph.nodes if node.op == "get_attr"]
        return {str(node.target).removeprefix(f"{OWNER}.") for node in nodes} | self.swapped.keys()

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self._effective is not None:
            return self._effective(*args, **kwargs)
        if not self.swapped:
            return self._compiled(*args, **kwargs)
        values = {name: f(self.model.get_parameter(name)) for name, f in self.swapped.items()}
        with substituted(self.model, values):
            return self._compiled(*args, **kwargs)

    def why_not_whole(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Return why there is no full graph: file, line and reason of the first graph break, or another reason."""
        if self.eager:
            return "the model runs eagerly"
        with isolation(self.model, args, kwargs) as (inputs, named), _dynamo_settings():  # explain runs the model
            explained = torch._dynamo.explain(self.model)(*inputs, **named)
        for reason in explained.break_reasons:
            if reason.user_stack:
                frame = reason.user_stack[-1]
                return f"the first break is {frame.filename}:{frame.lineno}: {reason.reason.splitlines()[0]}"
        before, after = (
            [tensor for value in (*positional, *by_name.values()) for tensor in tensors_in(value)]
            for positional, by_name in ((args, kwargs), (inputs, named))
        )
        if len(before) != len(after) or not all(map(torch.equal, before, after)):
            return WRITES_ARGUMENT
        return "gradient checkpointing makes each recomputed region a separate graph. Turn it off first"

    @property
    def graphs(self) -> list[fx.GraphModule]:
        """The graphs so far, before rewriting. Each reads the weights as `model.NAME`. One empty graph if none."""
        graphs = [graph for subgraph in self._subgraphs for graph in subgraph.graphs.values()]
        return graphs or [read_live(nn.Module(), fx.Graph(), self.model)]

    @property
    def rewritten(self) -> list[Callable[..., Any]]:
        """The graphs so far, after rewriting."""
        return [running for subgraph in self._subgraphs for running in subgraph.running.values()]

    def compile_subgraph(self, source: fx.GraphModule) -> Callable[..., Any]:
        """Register a subgraph of dynamo, and return the function that dynamo runs for it."""
        subgraph = _Subgraph(source)
        self._subgraphs.append(subgraph)
        # Weak references, because dynamo keeps the function in its cache.
        fallback_ref, subgraph_ref = ref(self), ref(subgraph)

        def run(*inputs: Any) -> Any:
            fallback, subgraph = fallback_ref(), subgraph_ref()
            assert fallback is not None
            assert subgraph is not None
            return fallback._run(subgraph, inputs)

        return run

    def _run(self, subgraph: _Subgraph, inputs: tuple[Any, ...]) -> Any:
        """Run the rewritten graph for these weights. It is made at the first call with them."""
        names = tuple(map(self._name_of, inputs))
        running = subgraph.running.get(names)
        running = self._add_graph(subgraph, names) if running is None else running
        if not self._discovering:
            return running(*inputs)
        # With branches, the outputs will require gradients. Let them do so in the first run too: dynamo guards on it,
        # and would compile everything after them again. Not for weights that forward writes into: they get no branch,
        # and torch forbids writes into a leaf that requires gradients.
        written = written_by(self.model)
        named = [value for value, name in zip(inputs, names, strict=True) if name not in (None, *written)]
        with _weights_require_grad(value for value in named if isinstance(value, nn.Parameter)):
            return running(*inputs)

    def _name_of(self, value: Any) -> str | None:
        """Return the name of an input that is a parameter or buffer of the model, otherwise None."""
        name = self._names.get(id(value)) if isinstance(value, torch.Tensor) else None
        if name is None:
            return None
        # Another tensor may have got the id of a parameter that was replaced, so check the identity.
        holder, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(holder)
        return name if value is module._parameters.get(leaf, module._buffers.get(leaf)) else None

    def _add_graph(self, subgraph: _Subgraph, names: Names) -> Callable[..., Any]:
        """Make and rewrite the graph of a subgraph for these weights, and return the rewritten graph."""
        # Replace the inputs that are weights by reads of the weights.
        graph = copy_graph(subgraph.source.graph)
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        weights = {node: name for node, name in zip(inputs, names, strict=True) if name is not None}
        if weights:
            weights_from_inputs(graph, weights)
        holder = shallow(subgraph.source)

        def region(body: str, inputs: Names, options: Mapping[str, Any]) -> str:
            """Make a checkpointed region a subgraph, and return the name of the module that runs it."""
            inner, name = _Subgraph(getattr(subgraph.source, body)), f"{body}_region"
            self._subgraphs.append(inner)
            self._add_graph(inner, tuple(name if name in weights.values() else None for name in inputs))
            holder._modules[name] = _Region(inner, next(iter(inner.graphs)), options)
            return name

        # Checkpointed regions get branches too, so each becomes a subgraph that can be rewritten.
        regions_as_modules(graph, weights.values(), region)
        module = read_live(holder, graph, self.model)
        running = self._rewrite(module)
        subgraph.graphs[names], subgraph.running[names] = module, running
        return running


def _capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Collection[Axis]) -> Captured:
    """Return the model's subgraphs. Raises any exception of the model."""
    fallback = GraphBreakFallback(model)
    fallback.discover(args, kwargs)
    return Captured(fx.GraphModule(nn.Module(), fx.Graph()), GRAPH_BREAKS, fallback=fallback)


GRAPH_BREAKS = FrontEnd("graph-breaks", _capture, full_graph=False)


@isolated
def _weights_require_grad(undo: Block, weights: Iterable[torch.Tensor]) -> None:
    """Context manager: let these matrices require gradients, so that products with them do as well."""
    for weight in weights:
        if weight.dim() > 1 and weight.is_floating_point() and not weight.requires_grad and can_require_grad(weight):
            undo(partial(weight.requires_grad_, False))
            weight.requires_grad_(True)


class _Backend:
    """The torch.compile backend of one fallback.

    Dynamo keeps compiled code in one cache for each code object, which all models of a class share. Its recompile
    limits count the entries of all these models. So the limits are disabled, and each backend counts its own entries.
    """

    def __init__(self, fallback: ref[GraphBreakFallback]) -> None:
        self._fallback = fallback

    def __call__(self, source: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        """Compile a subgraph.

        Raises:
            CaptureError: dynamo has compiled the current code too often for the same modules.
        """
        fallback = self._fallback()
        assert fallback is not None
        # Count how often the current code was compiled for the same modules: different layers of one class are no sign
        # of varying calls.
        frame: Any = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output.root_tx
        entries = [entry for entry in _entries_of(frame.f_code) if self._owns(entry)]
        alike = sum(torch._dynamo.cache_size._has_same_id_matched_objs(frame, entry) for entry in entries)
        if alike < MAX_CAPTURES and len(entries) < 4 * MAX_CAPTURES:
            return fallback.compile_subgraph(source)
        # Report the last guard that failed, without the number and the comment that dynamo adds.
        guards = torch._dynamo.utils.guard_failures.get(frame.f_code, ["its inputs"])
        guard = str(guards[-1]).splitlines()[0].partition(" #")[0].strip()
        raise CaptureError(
            f"{type(fallback.model).__name__} was captured {MAX_CAPTURES} times for the same modules. The last graph "
            f"did not fit because of {guard.partition(': ')[2] or guard}. Pad the inputs to fewer sizes, do not let "
            "state in Python grow, or adapt only a part of the model."
        )

    def _owns(self, entry: Any) -> bool:
        return getattr(entry.backend, "compiler_fn", None) is self  # torch.compile wraps the backend

    def invalidate(self) -> None:
        """Invalidate the code that dynamo has compiled with this backend."""
        deleted = torch._dynamo.guards.DeletedGuardManagerWrapper
        for code in _compiled_codes():
            for entry in _entries_of(code):
                guards = entry.guard_manager
                if self._owns(entry) and not isinstance(guards, deleted):
                    guards.extra_state.invalidate(guards.cache_entry, deleted("the cascade is gone"))


def _compiled_codes() -> list[CodeType]:
    """Return the code objects that dynamo has tried to compile."""
    codes = [code() for code in list(torch._dynamo.convert_frame.input_codes.seen)]
    return [code for code in codes if code is not None]


def _entries_of(code: CodeType) -> list[Any]:
    """Return dynamo's cache entries of a code object."""
    entries: list[Any] = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code)
    return entries


def _reset_codes_without_entries() -> None:
    """Free the caches in which every entry was invalidated, because dynamo would keep and count these entries."""
    deleted = torch._dynamo.guards.DeletedGuardManagerWrapper
    for code in _compiled_codes():
        entries = _entries_of(code)
        if entries and all(isinstance(entry.guard_manager, deleted) for entry in entries):
            torch._C._dynamo.eval_frame.reset_code(code)


class _Region(nn.Module):
    """Runs a checkpointed region of a subgraph under torch.utils.checkpoint.

    Args:
        subgraph: the region.
        names: of its inputs that are weights.
        options: keyword arguments of torch.utils.checkpoint, as in the model.
    """

    def __init__(self, subgraph: _Subgraph, names: Names, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.subgraph, self.names = subgraph, names
        self.options = {
            key: value for key, value in options.items() if key not in ("use_reentrant", "preserve_rng_state")
        }
        if "_checkpoint_context_fn" in subgraph.source.meta:
            self.options["context_fn"] = subgraph.source.meta["_checkpoint_context_fn"]

    def forward(self, *values: Any) -> Any:
        # The graph of the region reads its weights itself, and ignores the inputs in their positions.
        remaining = iter(values)
        inputs = [next(remaining) if name is None else None for name in self.names]
        return checkpoint(
            self.subgraph.running[self.names], *inputs, use_reentrant=False, preserve_rng_state=True, **self.options
        )


@contextlib.contextmanager
def _no_graph_break_messages() -> Iterator[None]:
    """Silence dynamo's messages about graph breaks, which are expected. Must be used inside `own_warnings`."""
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._dynamo.variables.tensor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # Dynamo itself causes these warnings: it reads .grad of tensors between subgraphs, and copies tensors by
    # torch.tensor.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", message="To copy construct from a tensor")
    warnings.filterwarnings("ignore", message=".*should not be instantiated. Methods on autograd functions")
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


_quiet_dynamo = Shared(_no_graph_break_messages)


@isolated
def _dynamo_settings(undo: Block) -> None:
    """Let dynamo compile every call. A call that ran eagerly instead would run without branches."""
    if torch._dynamo.eval_frame._stance.stance in ("force_eager", "eager_on_recompile"):
        undo.enter(PROCESS)  # a capture in another thread may have set the stance: wait for its end
        undo.enter(torch.compiler.set_stance("default"))
    for shared in (own_warnings, _quiet_dynamo, no_fastpath):
        undo.enter(shared)
    undo.enter(
        torch._dynamo.config.patch(
            fail_on_recompile_limit_hit=True,
            recompile_limit=sys.maxsize,  # `_Backend` has its own limits
            accumulated_recompile_limit=sys.maxsize,
            use_numpy_random_stream=True,  # draw from numpy's generator, as the eager model does, not from torch's
            skip_nnmodule_hook_guards=False,  # hooks may change after the capture
            allow_unspec_int_on_nn_module=True,  # otherwise each value of a counter would get a separate graph
        )
    )


_READS_NO_VALUE = {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "detach", "requires_grad_"}
"""Names of functions that do not use the values of a tensor."""


def eager_trace(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Run the eager model once and return the weights that it uses, with the kind of branch that each can get.

    The kind is taken from the form that uses the weight, such as `linear` or `embedding`, or "" if no form uses it.
    Model, inputs and random generators are left unchanged.
    """
    watcher = _Watcher(model)
    with isolation(model, args, kwargs, watcher, seeded=False) as (inputs, named):
        model(*inputs, **named)
    return dict.fromkeys(sorted(watcher.seen), "") | watcher.kinds


class _Watcher(TorchFunctionMode):
    """Follows the weights through a run, and records which forms use them, by the four rules in graph/flow.py.

    Args:
        model: its parameters are followed. Its buffers count as constants.

    Attributes:
        seen: names of the weights whose values are used.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self._kinds: dict[int, dict[str, str]] = {rule: {} for rule in (1, 2, 3, 4)}  # weight name -> kind
        # By id: the weights that a tensor was computed from, without any input. Empty for a constant.
        self._sources: dict[int, set[str]] = {id(value): {name} for name, value in model.named_parameters()}
        self._sources |= {id(value): set() for value in model.buffers()}
        # By id: the weights that a tensor is the product of, together with an input.
        self._scaled: dict[int, set[str]] = {}
        self._alive: list[Any] = []  # an id is valid only while its tensor lives

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each weight that a form uses. If several rules apply to a weight, the first one counts."""
        return {name: kind for kinds in reversed(self._kinds.values()) for name, kind in kinds.items()}

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
        inputs = [tensor for tensor in tensors if id(tensor) not in self._sources]
        if weights and (kind == "embedding" or any(tensor.is_floating_point() for tensor in inputs)):
            # Rule 1: the weight is multiplied by an input or looked up. addmm only adds its first operand.
            added = args[0] if name in ADDED_FIRST else None
            self._note(1, self._weights([tensor for tensor in tensors if tensor is not added]), kind)
            if name in SCALES:
                self._follow(output, self._scaled, weights)
        elif weights:
            # Rule 2: the weight is multiplied by a constant. Rule 4: an integer input selects rows of the weight.
            # In both cases, follow the output like the weight itself.
            self._note(2, weights, kind)
            self._note(4, weights if inputs and id(args[0]) in self._sources else (), "embedding")
            self._follow(output, self._sources, weights)
        # Rule 3: the weight, scaled by an input, is the weight of a linear or a convolution: `linear(x, g * W)`.
        scaled = set().union(*(self._scaled.get(id(tensor), set()) for tensor in tensors))
        if scaled and kind is not None and len(args) > 1 and id(args[1]) in self._scaled and has_weight_argument(name):
            self._note(3, self._scaled[id(args[1])], kind)
        elif scaled and (name in SCALES or not any(id(tensor) not in self._scaled for tensor in inputs)):
            self._follow(output, self._scaled, scaled | weights)
        return output

    def _weights(self, tensors: list[torch.Tensor]) -> set[str]:
        """Return the weights that some of the tensors were computed from."""
        return set().union(*(self._sources.get(id(tensor), set()) for tensor in tensors))

    def _note(self, rule: int, weights: Iterable[str], kind: str | None) -> None:
        """Record that a form of this kind uses the weights. Functions without a form (`kind` is None) are skipped."""
        for weight in weights if kind is not None else ():
            self._kinds[rule].setdefault(weight, kind or "")

    def _follow(self, output: Any, record: dict[int, set[str]], weights: set[str]) -> None:
        """Record the weights of the output tensors in `_sources` or `_scaled`."""
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                record.setdefault(id(leaf), weights)
                self._alive.append(leaf)
