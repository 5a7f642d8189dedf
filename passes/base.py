"""The contract of a pass: what it requires, what it provides, and a result that is truthful.

A pass is a frozen dataclass with a kebab-case name; its fields are its options and print back as text. It is a callable
`GraphModule -> torch.fx PassResult`, so that it runs in torch.fx's own PassManager as well. Called alone it is
transactional as a Pipeline is: it works on a copy of the graph, the copy is verified, and the input stays as it was.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from lorasc_fx.errors import PassError
from lorasc_fx.graph import GraphEditor, record_of, verify
from lorasc_fx.graph.branch_calls import calls_branches


@dataclass(frozen=True)
class CascadePass(abc.ABC):
    """A rewrite with a name and a contract.

    Class attributes:
        name: kebab-case, unique.
        requires: facts that the graph must carry.
        provides: facts that it carries afterwards.
        removes: facts that no longer hold afterwards.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    removes: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def rewrite(self, graph: GraphEditor) -> None:
        """Edit the graph through its editor; the editor notes whether anything changed."""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Return the rewritten copy and whether it differs; without a change, the input itself.

        Raises:
            PassError: a required fact is missing.
            VerifyError: the graph does not agree with its plan, before or after.
        """
        if self.done(graph_module):
            return PassResult(graph_module, False)
        self.check(graph_module)
        verify(graph_module, f"before {self.name}")
        editor = GraphEditor(graph_module, self.name)
        self.apply(editor)
        if not editor.modified:
            return PassResult(graph_module, False)
        return PassResult(editor.finish(), True)

    def done(self, graph_module: fx.GraphModule) -> bool:
        """Whether the pass has run already and what it would need is only missing because it took it away."""
        facts = record_of(graph_module).facts
        missing = self.requires - facts
        return bool(missing) and missing <= self.removes and self.provides <= facts

    def check(self, graph_module: fx.GraphModule) -> None:
        """Raise PassError unless the graph carries every required fact."""
        missing = sorted(self.requires - record_of(graph_module).facts)
        if missing:
            raise PassError(
                f"{self.name} requires {', '.join(missing)}, which this graph {_why_not(graph_module)}",
                code="requirement-not-met",
            )

    def apply(self, editor: GraphEditor) -> None:
        """Rewrite, note the new facts, and verify."""
        editor.name = self.name
        self.rewrite(editor)
        facts = (editor.record.facts - self.removes) | self.provides
        editor.record = replace(editor.record, facts=facts)
        if editor.modified:
            verify(editor.module, f"after {self.name}")


def _why_not(graph_module: fx.GraphModule) -> str:
    """Return what to do about a missing fact: run a pass, or keep what another's pass has dropped."""
    caller = calls_branches(graph_module)
    if caller is None or record_of(graph_module).facts:
        return "does not carry; run a pass that provides it before"
    return (
        f"does not carry, though its node {caller.name} calls a branch: a pass made a new graph module without the "
        "metadata (graph_module.meta); run that pass inside a Pipeline, which hands it on"
    )
