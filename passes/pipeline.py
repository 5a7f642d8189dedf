"""Run passes in an order that their contracts allow, on a copy, and commit at the end.

The given order is kept where the facts that a graph brings along allow it; else it is solved, by a lexicographic
topological sort over facts (networkx), so that it is unique and as near as possible to the given one. Passes that occur
more than once, and pipelines with `order="given"`, always run as given. Other people's passes (any callable on a
GraphModule) may stand in between; a pipeline that holds one runs as given, and hands on what is noted of a graph where
such a pass makes a new graph module and drops it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from lorasc_fx.errors import PassError, PassOrderError, listed, nearest
from lorasc_fx.graph import GraphEditor, record_of, set_record, verify
from lorasc_fx.spec import CascadeSpec

from .attention_masks import AttentionMasks
from .base import CascadePass
from .fold_branches import FoldBranches
from .insert_branches import InsertBranches
from .match_sites import MatchSites
from .share_inputs import ShareInputs, SplitInputs
from .stage_transition import StageTransition

AnyPass = CascadePass | Callable[[fx.GraphModule], Any]

PASSES: tuple[type[CascadePass], ...] = (
    AttentionMasks,
    MatchSites,
    InsertBranches,
    ShareInputs,
    SplitInputs,
    FoldBranches,
    StageTransition,
)
"""Passes that `Pipeline.parse` knows."""


class Pipeline:
    """A sequence of passes that runs as one: all of it, or nothing.

    Args:
        passes: ours or other people's.
        order: `solved` (by requires and provides) or `given` (checked only).

    Raises:
        PassOrderError: the passes need each other in a circle, or the given order is wrong; lists every violated pair.
    """

    def __init__(self, passes: Sequence[AnyPass], order: Literal["solved", "given"] = "solved") -> None:
        self.passes: tuple[AnyPass, ...] = tuple(passes)
        if not self.passes:
            raise PassOrderError("the pipeline is empty; give at least one pass", code="invalid-value")
        names = [name_of(pass_) for pass_ in self.passes]
        foreign = any(not isinstance(pass_, CascadePass) for pass_ in self.passes)
        self._fixed = order == "given" or foreign or len(set(names)) < len(names)
        if order == "given":
            _check_given(self.passes, frozenset())
        elif not self._fixed:
            _solve(self.passes)

    def ordered(self, facts: frozenset[str] = frozenset()) -> tuple[AnyPass, ...]:
        """Return the passes in the order in which they run on a graph that carries these facts.

        Raises:
            PassOrderError: they always run as given, and cannot on this graph.
        """
        if self._fixed:
            _check_given(self.passes, facts)
        return self.passes if self._fixed or _feasible(self.passes, facts) else _solve(self.passes)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Run every pass on one copy of the graph; whatever raises, the input stays as it was.

        Raises:
            PassError: a fact that a pass requires is missing, or a foreign pass returned no graph module.
            VerifyError: the graph does not agree with its plan, before or after a pass.
        """
        passes = self.ordered(record_of(graph_module).facts)
        first = passes[0]
        if isinstance(first, CascadePass) and not first.done(graph_module):
            first.check(graph_module)
        verify(graph_module, f"before {name_of(first)}")
        editor = GraphEditor(graph_module)
        for pass_ in passes:
            if not isinstance(pass_, CascadePass):
                editor = _run_foreign(pass_, editor)
            elif not pass_.done(editor.module):
                pass_.check(editor.module)
                pass_.apply(editor)
        return PassResult(editor.finish(), True) if editor.modified else PassResult(graph_module, False)

    def __str__(self) -> str:
        """Return the text form, which `parse` reads."""
        return ", ".join(_text(pass_) for pass_ in self.passes)

    @classmethod
    def parse(
        cls, text: str, order: Literal["solved", "given"] = "solved", passes: Sequence[type[CascadePass]] = ()
    ) -> Pipeline:
        """Build a pipeline from `name, name{options as JSON}, ...`.

        Args:
            text: names of passes in PASSES, or in `passes`.
            order: as for a Pipeline.
            passes: classes of your own, that the text may name besides.

        Raises:
            PassError: an unknown pass (with the nearest names), unknown options, or text that cannot be read.
        """
        return cls(tuple(_parse(text, (*PASSES, *passes))), order)


def name_of(pass_: AnyPass) -> str:
    """Return a pass's kebab-case name; of a foreign one, its own name."""
    return pass_.name if isinstance(pass_, CascadePass) else getattr(pass_, "__name__", type(pass_).__name__)


def _run_foreign(pass_: Callable[[fx.GraphModule], Any], editor: GraphEditor) -> GraphEditor:
    before, record = editor.release_module(), editor.record
    result = pass_(before)
    changed = True
    if isinstance(result, PassResult):
        result, changed = result.graph_module, result.modified
    result = before if result is None else result
    if not isinstance(result, fx.GraphModule):
        raise PassError(
            f"pass {name_of(pass_)} returned {type(result).__name__}; a pass returns a GraphModule or PassResult",
            code="wrong-function-result",
        )
    if not record_of(result).facts and "branches-folded" not in record.facts:
        set_record(result, record)  # made anew; of a folded graph nothing has to be known any more
    verify(result, f"after {name_of(pass_)}")
    after = editor.resume(result)
    after.modified |= changed
    return after


def _pairs(passes: Sequence[AnyPass]) -> Iterator[tuple[int, int]]:
    """Yield (provider, requirer) for each fact that one pass provides and another requires, and (requirer, taker) for
    each that a pass takes away which requires it itself.
    """
    for later, pass_ in enumerate(passes):
        if not isinstance(pass_, CascadePass):
            continue
        for earlier, other in enumerate(passes):
            if earlier == later or not isinstance(other, CascadePass):
                continue
            wanted = pass_.requires & other.provides
            kept = pass_.provides & wanted  # a pass that hands a fact on, as it got it, needs nobody to renew it
            if wanted - kept or (wanted and not other.requires & wanted):
                yield earlier, later
            if other.requires & (pass_.requires & pass_.removes - other.removes):
                yield earlier, later


def _feasible(passes: Sequence[AnyPass], facts: frozenset[str]) -> bool:
    """Whether each pass, in this order, finds what it requires."""
    for pass_ in passes:
        if isinstance(pass_, CascadePass):
            if not pass_.requires <= facts:
                return False
            facts = (facts - pass_.removes) | pass_.provides
    return True


def _solve(passes: tuple[AnyPass, ...]) -> tuple[AnyPass, ...]:
    import networkx as nx  # noqa: PLC0415 - it takes longer to import than this package

    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    graph.add_edges_from(_pairs(passes))
    try:
        return tuple(passes[index] for index in nx.lexicographical_topological_sort(graph))
    except nx.NetworkXUnfeasible:
        circle = [earlier for earlier, _ in nx.find_cycle(graph)]
        chain = " -> ".join(name_of(passes[index]) for index in [*circle, circle[0]])
        raise PassOrderError(f"these passes need each other in a circle: {chain}; run one of them by itself") from None


def _check_given(passes: tuple[AnyPass, ...], facts: frozenset[str]) -> None:
    wrong = []
    for later, pass_ in enumerate(passes):
        if not isinstance(pass_, CascadePass):
            continue
        for fact in sorted(pass_.requires):
            before = [p for p in passes[:later] if isinstance(p, CascadePass)]
            after = [p for p in passes[later + 1 :] if isinstance(p, CascadePass)]
            changes = [fact in p.provides for p in before if fact in p.provides | p.removes]
            provider = next((p for p in after if fact in p.provides and fact not in p.requires), None)
            if changes and not changes[-1]:
                taker = next(p for p in reversed(before) if fact in p.removes)
                wrong.append(f"{pass_.name} requires {fact}, which {taker.name} before it takes away")
            elif not changes and provider is not None and fact not in facts and not _unknown(passes[:later]):
                wrong.append(f"{pass_.name} requires {fact}, which {provider.name} provides only after it")
    if wrong:
        raise PassOrderError("the passes cannot run in this order:\n  " + "\n  ".join(wrong))


def _unknown(passes: Sequence[AnyPass]) -> bool:
    """Whether one of them is a pipeline, which may provide anything."""
    return any(isinstance(pass_, Pipeline) for pass_ in passes)


def _text(pass_: AnyPass) -> str:
    if not isinstance(pass_, CascadePass):
        return name_of(pass_)
    options = {}
    for field in fields(pass_):
        value = getattr(pass_, field.name)
        usual = field.default if field.default_factory is MISSING else field.default_factory()
        if value != usual:
            options[field.name] = value.to_dict() if isinstance(value, CascadeSpec) else value
    return pass_.name + (json.dumps(options) if options else "")


def _parse(text: str, passes: Sequence[type[CascadePass]]) -> Iterator[CascadePass]:
    known = {pass_.name: pass_ for pass_ in passes}
    rest = text.strip()
    while rest:
        length = next((at for at, letter in enumerate(rest) if letter in "{,"), len(rest))
        name, rest = rest[:length].strip(), rest[length:]
        if name not in known:
            raise PassError(
                f"no pass is named {name!r}{nearest(name, known)}; known: {', '.join(known)}", code="unknown-name"
            )
        options: dict[str, Any] = {}
        if rest.startswith("{"):
            try:
                options, end = json.JSONDecoder().raw_decode(rest)
            except json.JSONDecodeError as fault:
                raise PassError(
                    f'the options of {name} are not JSON: {fault}; write {name}{{"option": value}}',
                    code="invalid-value",
                ) from fault
            rest = rest[end:].lstrip()
        if rest and not rest.startswith(","):
            raise PassError(
                f"after {name} there is {rest[:20]!r}; passes are separated by a comma", code="invalid-value"
            )
        rest = rest[1:].lstrip()
        names = [field.name for field in fields(known[name])]
        for option in options:
            if option not in names:
                raise PassError(
                    f"{name} has no option {option!r}{nearest(option, names) or listed(names) or '; it takes none'}",
                    code="unknown-name",
                )
        if "spec" in options:
            if not isinstance(options["spec"], dict):
                raise PassError(
                    f"{name}: spec is {options['spec']!r}; give its fields as an object", code="invalid-value"
                )
            options["spec"] = CascadeSpec.from_dict(options["spec"])
        yield known[name](**options)
