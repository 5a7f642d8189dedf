"""The cache of a cascade for its adapted graphs, keyed by signature."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import fx

from lorasc_fx.branch import Branch, Decided
from lorasc_fx.capture import Axis, Conditions, FrontEnd
from lorasc_fx.errors import StateError, warn
from lorasc_fx.graph.function import as_function, hooks_of, takes_leaves
from lorasc_fx.plan import Plan, Refusal
from lorasc_fx.signature import Call

MAX_VARIANTS = 32
"""Maximum number of variants of a cascade."""

_NOT_CAPTURED = (
    "This call has no graph yet, and none can be captured inside torch.compile. First call the cascade once without "
    "torch.compile, in the same mode, with the same settings of the model and with arguments of the same sizes."
)


class Growable(Protocol):
    """A run of a cascade to which sites can be added."""

    plan: Plan
    refusals: tuple[Refusal, ...]

    @property
    def by_key(self) -> dict[str, Branch]:
        """The branches, as {`Site.key`: branch}."""

    def grow(self, decided: Decided) -> None:
        """Replace plan, branches, refusals and unreached weights. The new plan has more sites."""


@dataclass(frozen=True)
class Variant:
    """One adapted graph of a cascade.

    Args:
        module: computes a call. It takes the arguments of the model.
        frontend: the front end that captured it.
        conditions: the conditions under which the variant is valid for a call with the same key.
        universal: whether the variant serves every signature, because the model runs eagerly.
        attach: function that connects the variant to a run, so that later calls can add sites to the run.
        detach: function that stops intercepting reads of parameters in the modules of the model.
        placements: {weight name: placement of its branch, `beside`, `merged` or `weight`}.
    """

    module: Callable[..., Any]
    frontend: FrontEnd
    conditions: Conditions = field(default_factory=Conditions)
    universal: bool = False
    attach: Callable[[Growable], None] | None = None
    detach: Callable[[], None] | None = None
    placements: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def compute(self) -> Callable[[Call], Any]:
        """A function that computes a call.

        It runs a captured graph as a plain function, which is faster than calling the graph module. If a branch has
        hooks, it calls the graph module, because the plain function would skip the hooks.
        """
        module = self.module

        def by_module(call: Call) -> Any:
            return module(*call.args, **call.kwargs)

        if not isinstance(module, fx.GraphModule) or self.frontend.serves_all_calls:
            return by_module
        function, hooks, flat = as_function(module), hooks_of(module), takes_leaves(module.graph)
        inputs = sum(node.op == "placeholder" for node in module.graph.nodes)

        def by_function(call: Call) -> Any:
            if any(hooks) or (flat and len(call.leaves) != inputs):
                return by_module(call)
            return function(*call.leaves) if flat else function(*call.args, **call.kwargs)

        return by_function


@dataclass(frozen=True)
class NewVariant(Decided):
    """A new variant, and the plan, branches and refusals of the cascade with this variant.

    Args:
        variant: the variant.
        refused_frontends: (name, reason) of each front end that was tried first and failed.
    """

    variant: Variant
    refused_frontends: tuple[tuple[str, str], ...] = ()


class _Entry(NamedTuple):
    """A variant and the call for which it was captured.

    Args:
        key: signature of the call.
        training: whether the model was in train mode.
        kinds: the `_kind` of each leaf of the arguments, which dynamo can compare.
        variant: the variant.
    """

    key: Hashable
    training: bool
    kinds: list[Any]
    variant: Variant


@dataclass
class Variants:
    """A cache of at most MAX_VARIANTS variants. The oldest one is dropped first.

    Args:
        entries: the variants, oldest first.
    """

    entries: list[_Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Used if dynamo traces a call that has no variant: it breaks dynamo's graph, or raises if fullgraph=True.
        self.not_compiled = torch.compiler.disable(_not_compiled, reason=_NOT_CAPTURED)

    def find(self, call: Call, dynamic: Collection[Axis] = ()) -> Variant | None:
        """Return a variant that is valid for this call and the model's current Python state, or None.

        Args:
            call: the call.
            dynamic: axes that must have been requested to be dynamic at the capture.
        """
        for entry in self.entries:
            if entry.key == call.key:
                conditions = entry.variant.conditions
                is_dynamic = not conditions.sizes or conditions.requested.issuperset(dynamic)
                if is_dynamic and conditions.accepts(call.leaves) and conditions.hold():
                    return entry.variant
        return next((variant for variant in self.all if variant.universal), None)

    def reusable(self, call: Call) -> Variant | None:
        """Return a variant for the inputs of this call that was captured in another mode of the model, or None.

        Also returns None if there is a variant for the current mode, because the sizes of this call are new for it.
        """
        alike = [entry.variant for entry in self.entries if entry.key == call.key]
        if any(variant.conditions.hold() for variant in alike):
            return None
        for variant in reversed(alike):
            conditions = variant.conditions
            if conditions.grad in (None, torch.is_grad_enabled()) and conditions.accepts(call.leaves):
                return variant
        return None

    @property
    def all(self) -> list[Variant]:
        """The variants, oldest first."""
        return [entry.variant for entry in self.entries]

    @property
    def oldest(self) -> Variant | None:
        """The oldest variant, or None if there are none."""
        return next(iter(self.all), None)

    def varying(self, call: Call) -> frozenset[Axis]:
        """Return the axes that differ in size from a variant with the same key, or that are dynamic in it.

        Axes of size 0 or 1 are left out, because these sizes always get a separate graph.
        """
        alike = [entry.variant.conditions for entry in self.entries if entry.key == call.key]
        return frozenset[Axis]().union(*(conditions.varying_axes(call.leaves) for conditions in alike))

    def compiled(self, training: bool, leaves: list[object]) -> Variant | None:
        """Return the newest valid variant, or None. Dynamo can trace this method inside torch.compile.

        Args:
            training: whether the model is in train mode.
            leaves: the leaves of the arguments.
        """
        kinds = [_kind(leaf) for leaf in leaves]
        for entry in self.entries[::-1]:
            if entry.training == training and entry.kinds == kinds:
                conditions = entry.variant.conditions
                fits = conditions.accepts_gradients(leaves) and conditions.accepts_sizes(leaves)
                if fits and conditions.hold(traced=True):
                    return entry.variant
        return None

    def add(self, call: Call, variant: Variant, training: bool) -> None:
        """Add a variant, with the call and the mode for which it was captured."""
        if variant.universal:
            # The variant serves all calls, so drop earlier variants that intercept reads of parameters.
            self.entries = [entry for entry in self.entries if entry.variant.detach is None]
        self.entries.append(_Entry(call.key, training, [_kind(leaf) for leaf in call.leaves], variant))
        if len(self) > MAX_VARIANTS:
            del self.entries[0]
            warn(
                f"The cascade has more than {MAX_VARIANTS} graphs: calls vary in mode, settings, sizes or dtype. "
                "The oldest is dropped, and captured again if it is needed. Pad or group the inputs to fewer sizes.",
                "too-many-variants",
            )

    def exchange(self, change: Callable[[Variant], Variant]) -> None:
        """Replace each variant by `change(variant)`."""
        self.entries = [entry._replace(variant=change(entry.variant)) for entry in self.entries]

    def detach(self) -> None:
        """Stop intercepting reads of parameters in the model's modules, until a variant is called again."""
        for variant in self.all:
            if variant.detach is not None:
                variant.detach()

    def restorer(self) -> Callable[[], None]:
        """Return a function that restores the current variants."""
        return partial(setattr, self, "entries", list(self.entries))

    def __reduce__(self) -> tuple[type[Variants], tuple[()]]:
        """Copy and pickle as an empty cache, because the graphs read the original model and the original branches."""
        return (Variants, ())

    def __len__(self) -> int:
        return len(self.entries)


def _not_compiled(cascade: Any, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Any:
    """Compute a call outside of torch.compile, because it has no variant yet.

    Raises:
        StateError: a tracer other than dynamo (such as non-strict torch.export) makes the call.
    """
    if torch.compiler.is_compiling():
        raise StateError(_NOT_CAPTURED, code="not-available")
    return cascade.forward(*args, **kwargs)


def _kind(leaf: object) -> Any:
    """Return (dtype, number of axes) of a tensor. Any other leaf is returned unchanged."""
    return (leaf.dtype, leaf.dim()) if isinstance(leaf, torch.Tensor) else leaf
