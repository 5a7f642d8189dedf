"""Replace branch nodes by plain nodes.

    %fc = linear(%x, %weight, %bias)
    %fc_lora = branches.fc/weight(%fc, %x, at="beside")

becomes

    %fc = linear(%x, %weight, %bias)
    %a = get_attr[branches.fc/weight.lora_A]
    %b = get_attr[branches.fc/weight.lora_B]
    %low = linear(%x, %a)
    %up = linear(%low, %b)
    %term = mul(%up, 1.5)
    %fc_lora = add(%fc, %term)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from lorasc_fx.errors import PassError
from lorasc_fx.graph import GraphEditor, branch_nodes, record_of
from lorasc_fx.graph.matching import uses_in
from lorasc_fx.graph.record import Inlined

from .base import CascadePass
from .inlined import formula, plain_call, refusal


@dataclass(frozen=True)
class InlineBranches(CascadePass):
    """Replace each branch node by the nodes of its formula, for compilers and passes of other libraries.

    The nodes read the parameters of the branches, so training can continue, without dropout. If a branch had replaced
    an op, the op is restored, and the branch is added to the output or to the weight of the op.

    Every other pass of this package first restores the branch nodes. If the nodes of a formula were changed, it raises
    VerifyError with the difference.

    Raises:
        PassError: the graph module reads a live model. Or a branch has dropout in train mode, trains on a grid, or has
            no plain formula, as for DoRA and stacked matrices.
    """

    name: ClassVar[str] = "inline-branches"
    requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})
    provides: ClassVar[frozenset[str]] = frozenset({"branches-inlined"})

    def done(self, graph_module: fx.GraphModule) -> bool:
        """Whether the branches are already inlined."""
        return bool(record_of(graph_module).inlined.calls)

    def prepared(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """Return the graph module itself, because this pass does not restore inlined branches."""
        return graph_module

    def rewrite(self, graph: GraphEditor) -> None:
        """Restore replaced ops, and insert the formula of each branch."""
        record, branches = graph.record, graph.branches
        if record.owner:
            raise PassError(
                f"{self.name}: this graph reads a live model, whose cascade needs the branch nodes. Use a graph module "
                "that owns its weights",
                code="requirement-not-met",
            )
        for node in branch_nodes(graph.module):
            graph.remove_branch(node)
        calls: dict[str, tuple[str, Mapping[str, Any]]] = {}
        done = set[fx.Node]()
        for node, use in uses_in(graph.module, record).items():
            if not node.users:  # dead code
                continue
            key = record.plan.by_weight[use.weight].key
            branch = branches[key]
            if branch.training and branch.dropout:
                raise refusal(branch, "it has dropout in train mode, so call eval() first")
            inputs, options = plain_call(branch, use, node)
            if inputs[0] not in done:  # several ops may read one node of the weight
                done |= {inputs[0], graph.insert_formula(inputs, formula(branch, record, options))}
                calls[f"{key} {options}"] = key, options
        graph.record = replace(record, inlined=Inlined(branches, tuple(calls.values())))
