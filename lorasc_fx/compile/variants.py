"""The adapted graphs that a cascade has made, by signature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import fx

from lorasc_fx.branch import Decided
from lorasc_fx.capture import Call, Conditions
from lorasc_fx.errors import StateError, warn
from lorasc_fx.graph import as_function, hooks_of, takes_leaves
from lorasc_fx.plan import Plan

LIMIT = 32
OFTEN = 8
"""Changes of one setting after which a warning says what each of them costs."""


_NOT_CAPTURED = (
    "inside torch.compile there is no graph for this call yet, and none can be captured there: "
    "call the cascade once without torch.compile, in the same mode, with the model's settings as they are and "
    "arguments of the same sizes"
)

NOT_COMPILED: list[Callable[..., Any]] = []
"""`_not_compiled`, at which dynamo breaks the graph, or under fullgraph=True raises with the reason. It is made with
the first Variants: the import of dynamo takes most of a second."""


class Growable(Protocol):
    """What has a plan of the running stage, and takes over sites that come with a new graph: the state of a run."""

    plan: Plan

    def grow(self, decided: Decided) -> None:
        """Take over plan, branches, refusals and unreached weights."""


@dataclass(frozen=True)
class Variant:
    """One adapted graph; `module` is called with a call's own arguments.

    A `universal` one serves every signature (dynamo chooses the graphs of a fallback); `attach` gives it what later
    calls bring new sites to, and `detach` restores the modules of the model. `placements` tells of each weight where
    its branch computes in this graph (`beside`, `merged`, `weight`).
    """

    module: Callable[..., Any]
    frontend: str
    conditions: Conditions = field(default_factory=Conditions)
    universal: bool = False
    attach: Callable[[Growable], None] | None = None
    detach: Callable[[], None] | None = None
    placements: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def run(self) -> Callable[[Call], Any]:
        """Computes a call as `module` does, and of a captured graph at less cost where no branch has hooks."""
        module = self.module

        def plain(call: Call) -> Any:
            return module(*call.args, **call.kwargs)

        if not isinstance(module, fx.GraphModule) or self.frontend == "graph":  # of which one serves every tree
            return plain
        function, hooks, flat = as_function(module), hooks_of(module), takes_leaves(module.graph)
        inputs = sum(node.op == "placeholder" for node in module.graph.nodes)

        def run(call: Call) -> Any:
            if any(hooks):
                return module(*call.args, **call.kwargs)
            if not flat:
                return function(*call.args, **call.kwargs)
            return function(*call.leaves) if len(call.leaves) == inputs else module(*call.args, **call.kwargs)

        return run


@dataclass(frozen=True)
class Made(Decided):
    """A new variant, and what the plan and the branches are with it."""

    variant: Variant
    refused_frontends: tuple[tuple[str, str], ...] = ()


@dataclass
class Variants:
    """Variants by signature, the one made first is the first; at most LIMIT, older ones are dropped and made again."""

    held: dict[Hashable, list[Variant]] = field(default_factory=dict)
    plain: list[tuple[bool, list[Any], Variant]] = field(default_factory=list)
    changed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if not NOT_COMPILED:
            NOT_COMPILED.append(torch.compiler.disable(_not_compiled, reason=_NOT_CAPTURED))

    def find(self, call: Call) -> Variant | None:
        """Return a variant for this call, and for the model's Python state as it is."""
        for variant in self.held.get(call.key, ()):
            if variant.conditions.accepts(call.leaves) and variant.conditions.hold():
                return variant
        return next((variant for variant in self.all if variant.universal), None)

    @property
    def all(self) -> list[Variant]:
        """The variants that are held."""
        return [variant for variants in self.held.values() for variant in variants]

    @property
    def oldest(self) -> Variant | None:
        """The variant that was made first, of those held."""
        return next(iter(self.all), None)

    def known(self, call: Call) -> bool:
        """Whether there is a variant for such calls and this state, of other sizes; if not, count what changed.

        Sizes of 0 and 1 do not count: each is captured on its own, so more dynamic sizes would not help.
        """
        held = self.held.get(call.key, ())
        fitting = [
            variant.conditions
            for variant in held
            if variant.conditions.hold() and variant.conditions.accepts_gradients(call.leaves)
        ]
        if fitting:
            return not all(conditions.refuses_small_sizes(call.leaves) for conditions in fitting)
        state = held[-1].conditions.state if held else None
        changes = state.changes() if state is not None else ()
        if changes:
            name = changes[0].entry
            self.changed[name] += 1
            if self.changed[name] == OFTEN:
                warn(
                    f"{name} has changed {OFTEN} times between calls, and each new value costs a capture, since a "
                    "graph holds it as a constant: make it a buffer, or a tensor that forward takes as an argument",
                    "too-many-variants",
                )
        return False

    def compiled(self, training: bool, leaves: list[Any]) -> Variant | None:
        """Return a variant while torch.compile traces, by what dynamo can compare: state, dtypes, numbers of axes."""
        kinds = [_kind(leaf) for leaf in leaves]
        for mode, known, variant in self.plain:
            if mode == training and known == kinds:
                conditions = variant.conditions
                fit = conditions.accepts_gradients(leaves) and conditions.accepts_sizes(leaves)
                if fit and conditions.hold(traced=True):
                    return variant
        return None

    def symbolic(self, training: bool) -> tuple[Variant, int]:
        """Return the newest whole graph of this mode, and how many arguments it takes, for a trace by torch.fx.

        Its proxies have no sizes, and it makes one for each argument, those left to their defaults as well.

        Raises:
            StateError: there is none.
        """
        for mode, known, variant in self.plain:
            if mode == training and not variant.universal and variant.conditions.hold():
                return variant, len(known)
        raise StateError(
            "torch.fx traces a whole graph, and there is none for this mode and these settings yet: "
            "call the cascade once in this mode (a model with graph breaks has none)",
            code="not-available",
        )

    def add(self, call: Call, variant: Variant, training: bool) -> None:
        """Keep a variant, with the call and the mode that it was made for.

        A universal one serves all calls, and takes their place: it may change how modules hold their
        parameters, which dynamo would not trace.
        """
        if variant.universal:
            self._drop([variant for variant in self.all if variant.detach is not None])
        self.held.setdefault(call.key, []).append(variant)
        self.plain.insert(0, (training, [_kind(leaf) for leaf in call.leaves], variant))
        if len(self) > LIMIT:
            self._drop([next(iter(self.held.values()))[0]])
            warn(
                f"more than {LIMIT} variants: the oldest one is dropped, and captured again when it is called; calls "
                "vary in mode, settings, sizes or dtype. Pad or group the inputs to fewer sizes",
                "too-many-variants",
            )

    def _drop(self, variants: list[Variant]) -> None:
        dropped = set(map(id, variants))
        held = {key: [one for one in variants if id(one) not in dropped] for key, variants in self.held.items()}
        self.held = {key: variants for key, variants in held.items() if variants}
        self.plain = [entry for entry in self.plain if id(entry[2]) not in dropped]

    def exchange(self, change: Callable[[Variant], Variant]) -> None:
        """Put another variant in the place of each."""
        new = {id(variant): change(variant) for variant in self.all}
        self.held = {key: [new[id(variant)] for variant in variants] for key, variants in self.held.items()}
        self.plain = [(mode, kinds, new[id(variant)]) for mode, kinds, variant in self.plain]

    def detach(self) -> None:
        """Restore the model's modules; a variant that is called again swaps its weights again."""
        for variant in self.all:
            if variant.detach is not None:
                variant.detach()

    def restorer(self) -> Callable[[], None]:
        """Return what brings back the variants of this moment."""
        held, plain = {key: list(variants) for key, variants in self.held.items()}, list(self.plain)
        return partial(vars(self).update, held=held, plain=plain)

    def __deepcopy__(self, memo: dict[int, Any]) -> Variants:
        """Return an empty store: a graph reads the model and the branches that it was made with."""
        return Variants()

    def __reduce__(self) -> tuple[type[Variants], tuple[()]]:
        """Pickle as an empty store, for the same reason."""
        return (Variants, ())

    def __len__(self) -> int:
        return len(self.all)


def _not_compiled(cascade: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Compute a call that torch.compile has no graph for, in eager mode.

    Raises:
        StateError: a tracer that is not dynamo makes the call.
    """
    if torch.compiler.is_compiling():
        raise StateError(_NOT_CAPTURED, code="not-available")
    return cascade.forward(*args, **kwargs)


def _kind(leaf: Any) -> Any:
    return (leaf.dtype, leaf.dim()) if isinstance(leaf, torch.Tensor) else leaf
