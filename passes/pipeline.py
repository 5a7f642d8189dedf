"""Run passes on a copy of the graph, and commit at the end.

They run in the given order, or in one that is solved from their contracts: a topological sort over the facts that
passes provide, require and remove, as near as possible to the given order.

Other people's passes (any callable on a GraphModule) may stand in between. If such a pass makes a new graph module and
drops the record of the graph, the pipeline copies the record to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from lorasc_fx.errors import PassError, PassOrderError
from lorasc_fx.graph import GraphEditor, record_of, set_record, verify

from .base import CascadePass

AnyPass = CascadePass | Callable[[fx.GraphModule], Any]


class Pipeline:
    """A sequence of passes that runs as one: all of it, or nothing.

    Args:
        passes: ours or other people's.
        order: `given`; or `solved` from what the passes require, provide and remove, which `passes` then has.

    Raises:
        PassOrderError: there is no pass; or no order can be solved, because passes need each other in a circle, one is
            there twice, or one has no contract.
    """

    def __init__(self, passes: Sequence[AnyPass], order: Literal["given", "solved"] = "given") -> None:
        self.passes: tuple[AnyPass, ...] = tuple(passes)
        if not self.passes:
            raise PassOrderError("the pipeline is empty; give at least one pass", code="invalid-value")
        if order == "solved":
            self.passes = _solved(self.passes)
        elif order != "given":
            raise PassOrderError(f"order is {order!r}; give 'given' or 'solved'", code="invalid-value")

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Run every pass on one copy of the graph; whatever raises, the input stays as it was.

        An exception of a pass gets a note with the name of the pass (`__notes__`, which a traceback prints).

        Raises:
            PassOrderError: a pass requires a fact that an earlier one removes, or that only a later one provides; lists
                every such pair.
            PassError: a fact that a pass requires is missing, or a foreign pass returned no graph module.
            VerifyError: the graph does not agree with its plan, before or after a pass.
        """
        _check_order(self.passes, record_of(graph_module).facts)
        first = self.passes[0]
        if isinstance(first, CascadePass) and not first.done(graph_module):
            first.check(graph_module)
        verify(graph_module, f"before {name_of(first)}")
        editor = GraphEditor(graph_module)
        for number, pass_ in enumerate(self.passes, start=1):
            try:
                if not isinstance(pass_, CascadePass):
                    editor = _run_foreign(pass_, editor)
                elif not pass_.done(editor.module):
                    pass_.check(editor.module)
                    pass_.apply(editor)
            except Exception as fault:
                fault.add_note(f"in the pass {name_of(pass_)}, number {number} of {len(self.passes)} of a Pipeline")
                raise
        return PassResult(editor.finish(), True) if editor.modified else PassResult(graph_module, False)


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


def _solved(passes: tuple[AnyPass, ...]) -> tuple[AnyPass, ...]:
    import networkx as nx  # noqa: PLC0415 - its import takes longer than that of this package

    contracts = [pass_ for pass_ in passes if isinstance(pass_, CascadePass)]
    foreign = next((name_of(pass_) for pass_ in passes if not isinstance(pass_, CascadePass)), None)
    if foreign is not None:
        raise PassOrderError(
            f"order='solved': {foreign} does not say what it requires and provides. Give the passes in their order, or "
            "make it a CascadePass"
        )
    names = [pass_.name for pass_ in contracts]
    if len(set(names)) < len(names):
        raise PassOrderError(f"order='solved': a pass is there twice ({', '.join(names)}). Give them in their order")
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(contracts)))
    graph.add_edges_from(_before(contracts))
    try:
        return tuple(contracts[index] for index in nx.lexicographical_topological_sort(graph))
    except nx.NetworkXUnfeasible:
        circle = [earlier for earlier, _ in nx.find_cycle(graph)]
        chain = " -> ".join(names[index] for index in [*circle, circle[0]])
        raise PassOrderError(f"these passes need each other in a circle: {chain}. Run one of them by itself") from None


def _before(passes: Sequence[CascadePass]) -> Iterator[tuple[int, int]]:
    """Yield (earlier, later) for passes of which one provides a fact that the other requires, or requires a fact that
    the other removes.
    """
    for later, pass_ in enumerate(passes):
        for earlier, other in enumerate(passes):
            if earlier == later:
                continue
            wanted = pass_.requires & other.provides
            passed_on = pass_.provides & wanted  # it requires and provides the fact: any earlier provider will do
            if wanted - passed_on or (wanted and not other.requires & wanted):
                yield earlier, later
            if other.requires & (pass_.requires & pass_.removes - other.removes):
                yield earlier, later


def _check_order(passes: tuple[AnyPass, ...], facts: frozenset[str]) -> None:
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
