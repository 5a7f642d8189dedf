"""The cache of adapted graphs of a cascade, keyed by signature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import fx

from lorasc_fx.branch import Decided
from lorasc_fx.capture import Axis, Conditions, FrontEnd
from lorasc_fx.errors import StateError, warn
from lorasc_fx.graph.function import as_function, hooks_of, takes_leaves
from lorasc_fx.plan import Plan
from lorasc_fx.signature import Call

MAX_VARIANTS = 32
MAX_CHANGES = 8
"""Changes of one setting after which a warning says that each of them costs a capture."""


_NOT_CAPTURED = (
    "inside torch.compile there is no graph for this call yet, and none can be captured there: "
    "call the cascade once without torch.compile, in the same mode, with the model's settings as they are and "
    "arguments of the same sizes"
)


class Growable(Protocol):
    """The state of a run: it has the plan of the running stage, and takes over sites that a new graph brings."""

    plan: Plan

    def grow(self, decided: Decided) -> None:
        """Take over plan, branches, refusals and unreached weights."""


@dataclass(frozen=True)
class Variant:
    """One adapted graph.

    Args:
        module: computes a call from its own arguments.
        frontend: that captured it.
        conditions: the calls that it is valid for, apart from their key.
        universal: whether it serves every signature, because dynamo chooses among the graphs of a fallback.
        attach: connects it to the run that takes over the sites of later calls.
        detach: restores the modules of the model.
        placements: of each weight's branch in this graph (`beside`, `merged`, `weight`).
    """

    module: Callable[..., Any]
    frontend: FrontEnd
    conditions: Conditions = field(default_factory=Conditions)
    universal: bool = False
    attach: Callable[[Growable], None] | None = None
    detach: Callable[[], None] | None = None
    placements: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def run(self) -> Callable[[Call], Any]:
        """Compute a call as `module` does. A captured graph runs as a plain function, unless a branch has hooks."""
        module = self.module

        def by_module(call: Call) -> Any:
            return module(*call.args, **call.kwargs)

        if not isinstance(module, fx.GraphModule) or self.frontend.serves_all_calls:
            return by_module
        function, hooks, flat = as_function(module), hooks_of(module), takes_leaves(module.graph)
        inputs = sum(node.op == "placeholder" for node in module.graph.nodes)

        def run(call: Call) -> Any:
            if any(hooks) or (flat and len(call.leaves) != inputs):
                return by_module(call)
            return function(*call.leaves) if flat else function(*call.args, **call.kwargs)

        return run


@dataclass(frozen=True)
class Made(Decided):
    """A new variant, with the plan and the branches including it."""

    variant: Variant
    refused_frontends: tuple[tuple[str, str], ...] = ()


class _Entry(NamedTuple):
    """A variant with the call that it was made for.

    Args:
        key: of the call.
        training: mode of the call.
        kinds: what dynamo can compare of each leaf: dtype and number of axes of a tensor, another value itself.
        variant: the graph.
    """

    key: Hashable
    training: bool
    kinds: list[Any]
    variant: Variant


@dataclass
class Variants:
    """At most MAX_VARIANTS variants, oldest first. The oldest is dropped, and made again when it is called."""

    entries: list[_Entry] = field(default_factory=list)
    changed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        # Dynamo breaks the graph here, or raises with the reason under fullgraph=True.
        self.not_compiled = torch.compiler.disable(_not_compiled, reason=_NOT_CAPTURED)

    def find(self, call: Call, dynamic: Collection[Axis] = ()) -> Variant | None:
        """Return a variant for this call and the model's current Python state, or None.

        Args:
            call: that it is valid for.
            dynamic: axes that were to be dynamic at its capture.
        """
        for entry in self.entries:
            if entry.key == call.key:
                conditions = entry.variant.conditions
                open_enough = not conditions.sizes or conditions.asked.issuperset(dynamic)
                if open_enough and conditions.accepts(call.leaves) and conditions.hold():
                    return entry.variant
        return next((variant for variant in self.all if variant.universal), None)

    @property
    def all(self) -> list[Variant]:
        """The variants, oldest first."""
        return [entry.variant for entry in self.entries]

    @property
    def oldest(self) -> Variant | None:
        """The first of the variants, or None."""
        return next(iter(self.all), None)

    def varying(self, call: Call) -> frozenset[Axis]:
        """Return the axes whose sizes vary among this call and the variants for such arguments.

        Sizes of 0 and 1 do not count: each is captured on its own.
        """
        alike = [entry.variant.conditions for entry in self.entries if entry.key == call.key]
        return frozenset[Axis]().union(*(conditions.other_axes(call.leaves) for conditions in alike))

    def count_changes(self, call: Call) -> None:
        """Warn of a setting that was changed again and again, if that is why there is no variant for a call."""
        alike = [entry.variant.conditions for entry in self.entries if entry.key == call.key]
        state = alike[-1].state if alike else None
        if state is None or any(conditions.hold() for conditions in alike):
            return
        if changes := state.changes():
            name = changes[0].entry
            self.changed[name] += 1
            if self.changed[name] == MAX_CHANGES:
                warn(
                    f"{name} has changed {MAX_CHANGES} times between calls, and each new value costs a capture, since "
                    "a graph holds it as a constant: make it a buffer, or a tensor that forward takes as an argument",
                    "too-many-variants",
                )

    def compiled(self, training: bool, leaves: list[Any]) -> Variant | None:
        """Return the newest variant while torch.compile traces, by what dynamo can compare, or None."""
        kinds = [_kind(leaf) for leaf in leaves]
        for entry in self.entries[::-1]:
            if entry.training == training and entry.kinds == kinds:
                conditions = entry.variant.conditions
                fits = conditions.accepts_gradients(leaves) and conditions.accepts_sizes(leaves)
                if fits and conditions.hold(traced=True):
                    return entry.variant
        return None

    def symbolic(self, training: bool) -> tuple[Variant, int]:
        """Return the newest whole graph of a mode, and its number of arguments, for a trace by torch.fx.

        The proxies of torch.fx have no sizes, and there is one for each argument, defaults included.

        Raises:
            StateError: there is none.
        """
        for entry in self.entries[::-1]:
            if entry.training == training and not entry.variant.universal and entry.variant.conditions.hold():
                return entry.variant, len(entry.kinds)
        raise StateError(
            "torch.fx traces a whole graph, and there is none for this mode and these settings yet: "
            "call the cascade once in this mode (a model with graph breaks has none)",
            code="not-available",
        )

    def add(self, call: Call, variant: Variant, training: bool) -> None:
        """Keep a variant, with the call and the mode that it was made for."""
        if variant.universal:
            # It serves all calls, and may change how modules hold parameters, which dynamo would not trace.
            self.entries = [entry for entry in self.entries if entry.variant.detach is None]
        self.entries.append(_Entry(call.key, training, [_kind(leaf) for leaf in call.leaves], variant))
        if len(self) > MAX_VARIANTS:
            del self.entries[0]
            warn(
                f"more than {MAX_VARIANTS} variants: the oldest one is dropped, and captured again when it is called; "
                "calls vary in mode, settings, sizes or dtype. Pad or group the inputs to fewer sizes",
                "too-many-variants",
            )

    def exchange(self, change: Callable[[Variant], Variant]) -> None:
        """Replace each variant."""
        self.entries = [entry._replace(variant=change(entry.variant)) for entry in self.entries]

    def detach(self) -> None:
        """Restore the model's modules. A variant that is called again swaps its weights again."""
        for variant in self.all:
            if variant.detach is not None:
                variant.detach()

    def restorer(self) -> Callable[[], None]:
        """Return a function that restores the current variants."""
        return partial(setattr, self, "entries", list(self.entries))

    def __deepcopy__(self, memo: dict[int, Any]) -> Variants:
        """Return an empty cache: a graph reads the model and the branches that it was made with."""
        return Variants()

    def __reduce__(self) -> tuple[type[Variants], tuple[()]]:
        """Pickle as an empty cache, for the same reason."""
        return (Variants, ())

    def __len__(self) -> int:
        return len(self.entries)


def _not_compiled(cascade: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Compute eagerly a call that torch.compile has no graph for.

    Raises:
        StateError: another tracer than dynamo makes the call.
    """
    if torch.compiler.is_compiling():
        raise StateError(_NOT_CAPTURED, code="not-available")
    return cascade.forward(*args, **kwargs)


def _kind(leaf: Any) -> Any:
    return (leaf.dtype, leaf.dim()) if isinstance(leaf, torch.Tensor) else leaf
