"""The base class of all passes.

A pass is a frozen dataclass with a kebab-case name. Its fields are its options. It is a callable from a GraphModule to
a torch.fx `PassResult`, so that the `PassManager` of torch.fx can run it too.

A pass edits a copy of the graph. A graph with a record is verified before the pass, and the result is verified after
it. A `Pipeline` verifies once for all passes of this package. If anything raises, the input is unchanged.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from lorasc_fx.branch import Branch
from lorasc_fx.errors import PassError
from lorasc_fx.graph import GraphEditor, record_of, verify
from lorasc_fx.graph.matching import recover
from lorasc_fx.graph.weights import BRANCHES

from .inlined import outlined


@dataclass(frozen=True)
class CascadePass(abc.ABC):
    """A pass, with a contract. It consists of facts: strings in the record of the graph, such as `branches-inserted`.

    Class attributes:
        name: unique name in kebab-case.
        requires: facts that the graph must have before the pass.
        provides: facts that the graph has after the pass.
        removes: facts that the graph no longer has after the pass.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    removes: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def rewrite(self, graph: GraphEditor) -> None:
        """Edit the graph through the editor, which records whether anything changed."""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the pass.

        Returns:
            The edited copy and True. If nothing changed, the input itself and False.

        Raises:
            PassError: a required fact is missing.
            VerifyError: the graph does not agree with its plan, before or after the pass.
        """
        recover(graph_module)
        if self.done(graph_module):
            return PassResult(graph_module, False)
        prepared = self.prepared(graph_module)
        self.check(prepared)
        verify(prepared, f"before {self.name}")
        editor = GraphEditor(prepared, self.name)
        self.apply(editor)
        if not editor.modified:
            return PassResult(graph_module, False)
        verify(editor.module, f"after {self.name}")
        return PassResult(editor.finish(), True)

    def done(self, graph_module: fx.GraphModule) -> bool:
        """Whether the pass has already run.

        This is so if the graph has all facts that the pass provides, and lacks required facts, all of which the pass
        removes. A pass that removes none of its required facts always runs.
        """
        facts = record_of(graph_module).facts
        missing = self.requires - facts
        return bool(missing) and missing <= self.removes and self.provides <= facts

    def prepared(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """Return a graph module with branch nodes: a copy if the branches are inlined, otherwise the argument."""
        return outlined(graph_module, f"before {self.name}")

    def check(self, graph_module: fx.GraphModule) -> None:
        """Raise PassError unless the graph has every required fact."""
        missing = sorted(self.requires - record_of(graph_module).facts)
        if missing:
            raise PassError(
                f"{self.name} requires {', '.join(missing)}, which this graph does not have{_advice(graph_module)}",
                code="requirement-not-met",
            )

    def apply(self, editor: GraphEditor) -> None:
        """Rewrite the graph and update its facts."""
        editor.name = self.name
        self.rewrite(editor)
        facts = (editor.record.facts - self.removes) | self.provides
        editor.record = replace(editor.record, facts=facts)


def _advice(graph_module: fx.GraphModule) -> str:
    """Return the end of the message about a missing fact: the likely reason, and what to do."""
    has_branches = any(isinstance(module, Branch) for module in graph_module.modules())
    has_branches = has_branches or any(str(node.target).startswith(f"{BRANCHES}.") for node in graph_module.graph.nodes)
    if record_of(graph_module).facts or not has_branches:
        return "; run a pass that provides it first"
    return (
        ", although it contains branches: other code moved them into a module where no pass reaches them, or dropped "
        "the record of InlineBranches. Run this pass before that code, or run that code inside a Pipeline"
    )
