"""Run several passes as one transaction.

The passes run in the given order, or in an order that is derived from their contracts: a topological sort over the
facts that they require, provide and remove. Ties keep the given order.

A pipeline may also contain foreign passes: any callables on a GraphModule. If a foreign pass returns a new graph module
without a record, the pipeline copies the record to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from lorasc_fx.errors import PassError, PassOrderError
from lorasc_fx.graph import GraphEditor, record_of, set_record, verify
from lorasc_fx.graph.branch_calls import Kept
from lorasc_fx.graph.matching import recover

from .base import CascadePass

AnyPass = CascadePass | Callable[[fx.GraphModule], Any]


class Pipeline:
    """A sequence of passes that runs as a transaction: if one of them raises, the input is unchanged.

    Args:
        passes: instances of `CascadePass`, or callables on a GraphModule.
        order: `given`, or `solved` to sort the passes by their contracts. The attribute `passes` has the final order.

    Raises:
        PassOrderError: `passes` is empty. Or `order` is `solved`, and the contracts form a cycle, a pass occurs twice,
            or a pass is not a `CascadePass`.
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
        """Run all passes on one copy of the graph.

        An exception of a pass gets a note (`__notes__`) with the name of the pass, which the traceback prints.

        Returns:
            The edited copy and True. If no pass changed anything, the input itself and False.

        Raises:
            PassError: a fact that a pass requires is missing, or a foreign pass did not return a graph module.
            VerifyError: the graph does not agree with its plan. This is checked before the first pass, after the last
                pass, and after every pass that this package does not define.
        """
        recover(graph_module)
        verify(graph_module, f"before {name_of(self.passes[0])}")
        editor = GraphEditor(graph_module)
        for number, pass_ in enumerate(self.passes, start=1):
            try:
                if not isinstance(pass_, CascadePass):
                    editor = _run_foreign(pass_, editor)
                elif not pass_.done(editor.module):
                    prepared = pass_.prepared(editor.module)
                    editor = editor if prepared is editor.module else editor.resume(prepared)
                    pass_.check(editor.module)
                    pass_.apply(editor)
                    if editor.modified and (number == len(self.passes) or not _is_own(pass_)):
                        verify(editor.module, f"after {name_of(pass_)}")
            except Exception as fault:
                fault.add_note(f"in the pass {name_of(pass_)}, number {number} of {len(self.passes)} of a Pipeline")
                raise
        return PassResult(editor.finish(), True) if editor.modified else PassResult(graph_module, False)


def _is_own(pass_: AnyPass) -> bool:
    """Whether this package defines a pass. If so, its result is not verified before the next pass."""
    return type(pass_).__module__.startswith(f"{__package__}.")


def name_of(pass_: AnyPass) -> str:
    """Return the kebab-case name of a pass, or the `__name__` of a foreign pass."""
    return pass_.name if isinstance(pass_, CascadePass) else getattr(pass_, "__name__", type(pass_).__name__)


def _run_foreign(pass_: Callable[[fx.GraphModule], Any], editor: GraphEditor) -> GraphEditor:
    """Run a foreign pass, verify its result, and return an editor of the result.

    The pass may return a GraphModule, a PassResult, or None after an edit in place.
    """
    before, record = editor.release_module(), editor.record
    kept = Kept.of(before, record)
    result = pass_(before)
    changed = True
    if isinstance(result, PassResult):
        result, changed = result.graph_module, result.modified
    result = before if result is None else result
    if not isinstance(result, fx.GraphModule):
        raise PassError(
            f"pass {name_of(pass_)} returned {type(result).__name__}; it must return a GraphModule or a PassResult",
            code="wrong-function-result",
        )
    # A new graph module may lack the record. After a fold, no record is needed.
    if not record_of(result).facts and "branches-folded" not in record.facts:
        set_record(result, record)
        recover(result, kept)
    verify(result, f"after {name_of(pass_)}")
    after = editor.resume(result)
    after.modified |= changed
    return after


def _solved(passes: tuple[AnyPass, ...]) -> tuple[AnyPass, ...]:
    """Return the passes in an order that fulfils their contracts. Ties keep the given order."""
    import networkx as nx  # noqa: PLC0415 - importing it takes longer than this package

    contracts = [pass_ for pass_ in passes if isinstance(pass_, CascadePass)]
    foreign = next((name_of(pass_) for pass_ in passes if not isinstance(pass_, CascadePass)), None)
    if foreign is not None:
        raise PassOrderError(
            f"order='solved' reads what each pass requires and changes, but {foreign} is not a CascadePass. Give the "
            f"passes in their order, or make {foreign} a CascadePass"
        )
    names = [pass_.name for pass_ in contracts]
    if len(set(names)) < len(names):
        raise PassOrderError(
            f"order='solved': a pass occurs twice ({', '.join(names)}). Give the passes in their order without 'solved'"
        )
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(contracts)))
    graph.add_edges_from(_before(contracts))
    try:
        return tuple(contracts[index] for index in nx.lexicographical_topological_sort(graph))
    except nx.NetworkXUnfeasible:
        cycle = [earlier for earlier, _ in nx.find_cycle(graph)]
        chain = " -> ".join(names[index] for index in [*cycle, cycle[0]])
        raise PassOrderError(
            f"the contracts of these passes form a cycle: {chain}. Run one of them separately"
        ) from None


def _before(passes: Sequence[CascadePass]) -> Iterator[tuple[int, int]]:
    """Yield (index, later index) of each pair of passes whose order follows from their contracts.

    A pass runs after the passes that provide a fact that it requires, and before the passes that remove such a fact.
    """
    for later, pass_ in enumerate(passes):
        for earlier, candidate in enumerate(passes):
            if earlier == later:
                continue
            shared = pass_.requires & candidate.provides
            kept = pass_.provides & shared  # facts that the pass both requires and provides
            # Two passes that require and provide the same fact have no order. Both run after the pass that adds it.
            if shared - kept or (shared and not candidate.requires & shared):
                yield earlier, later
            if candidate.requires & (pass_.requires & pass_.removes - candidate.removes):
                yield earlier, later
