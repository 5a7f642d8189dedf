"""The verifier reports every kind of damage, with the node or weight.

A row of the table is a function that damages a graph, and the faults that the verifier must report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from lorasc_fx import CascadeSpec
from lorasc_fx.graph import faults, record_of, set_record
from lorasc_fx.graph.record import REPLACED_CALL
from lorasc_fx.passes import FoldBranches, InsertBranches, VerifyError
from tests.kit.errors import raises
from tests.passes.cases import BY_NAME
from tests.passes.kit import branches_of, fill, insert

Damage = Callable[[fx.GraphModule], Any]

# --- what is damaged -------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Three projections of one node, with different widths, and one of another node."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 5)
        self.v, self.o = nn.Linear(6, 3, bias=False), nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x)
        return self.q(h).sin().sum() + self.k(h).square().sum() + self.o(self.v(h)).sin().sum()


@functools.cache
def exported() -> fx.GraphModule:
    return torch.export.export(Attention().double(), (torch.ones(3, 8, 6, dtype=torch.float64),)).module()


def graph_of(name: str) -> fx.GraphModule:
    """Return a new graph with branches: of a case, of a case that reads a live model, or `merged`."""
    if name == "merged":
        return insert(exported(), CascadeSpec(rank=2, placement="merged"))
    case = BY_NAME[name.removesuffix("_live")]
    return fill(insert(case.live() if name.endswith("_live") else case.own(), case.spec))


# --- ways to damage it -----------------------------------------------------------------------------------------------


def at(graph_module: fx.GraphModule, name: str) -> fx.Node:
    if name == "output":
        return graph_module.graph.output_node()
    return next(node for node in graph_module.graph.nodes if node.name == name)


def branch_dict(graph_module: fx.GraphModule) -> nn.ModuleDict:
    branches = graph_module.branches
    assert isinstance(branches, nn.ModuleDict)
    return branches


def args(name: str, change: Callable[..., tuple[Any, ...]]) -> Damage:
    """Replace the arguments of a node: `change` gets the current ones, and a function that finds a node by name."""

    def damage(graph_module: fx.GraphModule) -> None:
        node = at(graph_module, name)
        node.args = change(node.args, lambda source: at(graph_module, source))

    return damage


def kwargs(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Damage:
    def damage(graph_module: fx.GraphModule) -> None:
        node = at(graph_module, name)
        node.kwargs = change(dict(node.kwargs))

    return damage


def target(name: str, new: Any) -> Damage:
    return lambda graph_module: setattr(at(graph_module, name), "target", new)


def after(name: str, add: Callable[[fx.Graph, fx.Node], Any]) -> Damage:
    """Add nodes after this one."""

    def damage(graph_module: fx.GraphModule) -> None:
        node = at(graph_module, name)
        with graph_module.graph.inserting_after(node):
            add(graph_module.graph, node)

    return damage


def unhook(name: str, base: str) -> Damage:
    """Erase a branch node. Its users read the op instead."""

    def damage(graph_module: fx.GraphModule) -> None:
        branch = at(graph_module, name)
        branch.replace_all_uses_with(at(graph_module, base))
        graph_module.graph.erase_node(branch)

    return damage


def branch(weight: str, change: Callable[[Any], Any]) -> Damage:
    return lambda graph_module: change(branches_of(graph_module)[weight])


def site(weight: str, **changes: Any) -> Damage:
    """Change fields of a site in the plan."""

    def damage(graph_module: fx.GraphModule) -> None:
        record = record_of(graph_module)
        sites = tuple(replace(site, **changes) if site.weight == weight else site for site in record.plan.sites)
        set_record(graph_module, replace(record, plan=replace(record.plan, sites=sites)))

    return damage


def node_between(graph: fx.Graph, base: fx.Node) -> None:
    between = graph.call_function(torch.relu, (base,))
    between.meta["val"] = base.meta["val"]
    (lora,) = (node for node in base.users if node.name == f"{base.name}_lora")
    lora.args = (between, lora.args[1])


def branch_on_a_branch(graph: fx.Graph, lora: fx.Node) -> None:
    twin = graph.node_copy(lora)
    lora.replace_all_uses_with(twin)
    twin.args = (lora, twin.args[1])


def renamed_weight(graph_module: fx.GraphModule) -> None:
    module = graph_module.get_submodule("3")
    module.register_parameter("kernel", module._parameters.pop("weight"))


def untied(graph_module: fx.GraphModule) -> None:
    for name in ("first", "second"):
        owner = graph_module.get_submodule(f"model.{name}")
        owner.weight = nn.Parameter(owner.weight.detach().clone())
    if not any(node.target == "model.second.weight" for node in graph_module.graph.nodes):
        base = at(graph_module, "linear_2")
        with graph_module.graph.inserting_before(base):
            weight = graph_module.graph.get_attr("model.second.weight")
        base.args = (base.args[0], weight, *base.args[2:])


def second_call(base: str, last: str) -> Damage:
    """Use a weight a second time without its branch, and return that result too."""

    def damage(graph_module: fx.GraphModule) -> None:
        graph, call = graph_module.graph, at(graph_module, base)
        with graph.inserting_before(graph.output_node()):
            new = graph.call_function(call.target, call.args)
        graph.output_node().args = ((at(graph_module, last), new),)

    return damage


def branch_behind_a_slice(graph_module: fx.GraphModule) -> None:
    lora, part = at(graph_module, "w1_lora"), at(graph_module, "slice_1")
    part.args = (at(graph_module, "w1"), *part.args[1:])
    part.append(lora)
    part.replace_all_uses_with(lora)
    lora.args = (part,)


def turned_weight(graph_module: fx.GraphModule) -> None:
    base = at(graph_module, "addmm")
    with graph_module.graph.inserting_before(base):
        base.args = (*base.args[:2], graph_module.graph.call_function(torch.ops.aten.t.default, (base.args[2],)))


def lost_fact(graph_module: fx.GraphModule) -> None:
    record = record_of(graph_module)
    set_record(graph_module, replace(record, facts=record.facts - {"branches-inserted"}))


# --- the table -------------------------------------------------------------------------------------------------------

NO_BRANCH = "with 0 branches instead of one"
NO_USERS = "has no users"
MALFORMED = "the graph is malformed: "
SHAPE = "(6, 12, 1, 1)"


def no_use(node: str, base: str) -> str:
    return f"branch node {node} is at {base}, where the plan and this graph need none; run fold-branches before a pass"


def other_call(node: str, *parts: str) -> tuple[str, ...]:
    return f"branch node {node} is branches.", *parts


Row = tuple[Damage, tuple[str, ...]]
# fmt: off
DAMAGE: dict[str, dict[str, Row]] = {
    # input_1 -> conv2d (0) -> conv2d_1 (1, depthwise, same) -> gelu -> conv2d_2 (3) -> conv2d_3 (4, groups, valid)
    "aten_conv2d": {
        "rewired base": (args("conv2d_1", lambda old, at: (at("input_1"), *old[1:])),
            other_call("conv2d_1_lora", "(conv2d_1, conv2d_lora)", "needs branches.1/weight(conv2d_1, input_1)")),
        "node between": (after("conv2d_1", node_between),
            (no_use("conv2d_1_lora", "relu"), f"1.weight is used at node conv2d_1 {NO_BRANCH}")),
        "changed base options": (args("conv2d", lambda old, at: (*old[:-1], [2, 2])),
            other_call("conv2d_lora", "'dilation': [1, 2]}, but", "'dilation': [2, 2]}")),
        "removed branch node": (unhook("conv2d_2_lora", "conv2d_2"),
            (f"3.weight is used at node conv2d_2 {NO_BRANCH}",)),
        "second branch on a base": (after("conv2d_2_lora", lambda graph, lora: graph.node_copy(lora)),
            ("3.weight is used at node conv2d_2 with 2 branches instead of one",
            "node conv2d_2 has a branch, but is also read without it, by conv2d_2_lora_1",
            f"branch node conv2d_2_lora_1 {NO_USERS}")),
        "branch on a branch": (after("conv2d_2_lora", branch_on_a_branch),
            (no_use("conv2d_2_lora_1", "conv2d_2_lora"),)),
        "call of another site's branch": (target("conv2d_1_lora", "branches.3/weight"),
            other_call("conv2d_1_lora", "branches.3/weight(", "needs branches.1/weight(")),
        "transposed factor": (branch("1.weight", lambda conv: setattr(conv, "lora_B", nn.Parameter(conv.lora_B.t()))),
            ("lora_B of 1.weight has shape (3, 12), but the plan says (12, 3)",)),
        "missing branch": (lambda graph_module: branch_dict(graph_module).pop("1/weight"),
            (f"{MALFORMED}Node conv2d_1_lora", "node conv2d_1_lora calls branches.1/weight, which the module does not",
            f"1.weight is used at node conv2d_1 {NO_BRANCH}", "1.weight is in the plan, but has no branch")),
        "plan of another shape": (site("3.weight", shape=(7, 12, 1, 1)),
            (f"3.weight has shape {SHAPE}, but the plan says (7, 12, 1, 1)",
            f"the branch of 3.weight is for 3.weight of shape {SHAPE}, but the weight has (7, 12, 1, 1)")),
        "renamed weight": (renamed_weight, ("3.weight is in the plan, but the model has no weight of this name",
            f"{MALFORMED}Node _3_weight", no_use("conv2d_2_lora", "conv2d_2"))),
        "another weight": (args("conv2d_2", lambda old, at: (old[0], at("_4_weight"), *old[2:])),
            other_call("conv2d_2_lora", "the use of 4.weight at conv2d_2 needs branches.4/weight",
            "3.weight had a branch in this graph, but no node of it calls the branch any more")),
        "another operator": (target("conv2d_2", torch.ops.aten.convolution.default),
            (no_use("conv2d_2_lora", "conv2d_2"), f"3.weight is used at node _3_weight {NO_BRANCH}")),
        "branch without reader": (args("output", lambda old, at: ((at("conv2d_2_lora"),),)),
            (f"branch node conv2d_3_lora {NO_USERS}",)),
        "stray reader": (args("output", lambda old, at: ((at("conv2d_3_lora"), at("conv2d_2")),)),
            ("node conv2d_2 has a branch, but is also read without it, by output",)),
        "second use": (second_call("conv2d_2", "conv2d_3_lora"),
            (f"3.weight is used at node conv2d_default {NO_BRANCH}",)),
        "lost fact": (lost_fact,
            tuple(no_use(f"conv2d{tail}_lora", f"conv2d{tail}") for tail in ("", "_1", "_2", "_3"))),
        "wrong order": (lambda graph_module: at(graph_module,
            "conv2d_2_lora").append(at(graph_module, "conv2d_3_lora")),
            (f"{MALFORMED}Argument 'conv2d_3' of Node 'conv2d_3_lora'",)),
        "no arguments": (args("conv2d_3_lora", lambda old, at: ()), (no_use("conv2d_3_lora", "None"),)),
    },
    "module_conv2d": {
        "changed module": (lambda graph_module: setattr(graph_module.get_submodule("1"), "stride", (2, 1)),
            other_call("_1_lora", "'stride': (1, 1)", "_1 needs", "'stride': (2, 1)")),
    },
    "aten_tied_live": {
        "untied weight": (untied, ("first.weight is tied to (), but the plan says ('second.weight',)",
            no_use("linear_2_lora", "linear_2"))),
    },
    "aten_linear": {
        "plan of another layout": (site("0.weight", layout="in_out"),
            (no_use("linear_lora", "linear"), "lora_A of 0.weight has shape (3, 5), but the plan says (3, 7)")),
        "plan of another tie": (site("0.weight", aliases=("2.weight",)),
            ("0.weight is tied to (), but the plan says ('2.weight',)",)),
        "branch of another name": (branch("0.weight", lambda matrix: setattr(matrix, "weight_name", "2.weight")),
            ("the branch of 0.weight is for 2.weight of shape (7, 5)",)),
    },
    # w0 -> w0_lora -> chunk -> linear ...; w1 -> w1_lora -> slice -> linear
    "aten_packed": {
        "stray reader of a weight": (args("slice_1", lambda old, at: (at("w1"), *old[1:])), (no_use("w1_lora", "w1"),)),
        "branch behind a slice": (branch_behind_a_slice,
            (no_use("w1_lora", "slice_1"), f"w1 is used at node w1 {NO_BRANCH}")),
        "option of a branch on a weight": (kwargs("w0_lora", lambda old: {"at": "lookup"}),
            other_call("w0_lora", "with {'at': 'lookup'}, but the use of w0 at w0 needs branches.w0(w0,)")),
    },
    "aten_products": {
        "transposed weight": (turned_weight, (no_use("addmm_lora", "addmm"), f"w0 is used at node w0 {NO_BRANCH}")),
    },
    "aten_lookups": {
        "lost padding row": (args("embedding", lambda old, at: old[:2]),
            other_call("embedding_lora", "with {'at': 'lookup', 'padding_idx': 1}, but", "with {'at': 'lookup'}")),
    },
    "aten_grouped": {
        "lost ends": (kwargs("grouped_mm_fallback_1_lora", lambda old: {"at": old["at"], "by": old["by"]}),
            other_call("grouped_mm_fallback_1_lora", "'offs': to, 'weight': transpose}")),
        "experts read the other way": (args("grouped_mm_fallback_1", lambda old, at: (old[0], at("w1"), old[2])),
            (no_use("grouped_mm_fallback_1_lora", "grouped_mm_fallback_1"),)),
    },
    # %linear_lora = branches.q/weight(%relu, %q_weight, %q_bias, op='linear')
    "merged": {
        "without its bias": (args("linear_lora", lambda old, at: old[:2]), (no_use("linear_lora", "linear_lora"),)),
        "with another weight": (args("linear_lora", lambda old, at: (old[0], at("linear_1_lora").args[1], *old[2:])),
            other_call("linear_lora", "the use of k.weight at linear needs branches.k/weight")),
        "into another product": (kwargs("linear_lora", lambda old: {"op": "matmul"}),
            other_call("linear_lora", "with {'op': 'matmul'}, but the use of q.weight at linear needs")),
        "without its replaced call": (lambda graph_module: at(graph_module, "linear_lora").meta.pop(REPLACED_CALL),
            (no_use("linear_lora", "relu"),)),
        "no users": (lambda graph_module: (node := at(graph_module,
            "linear_3_lora")).replace_all_uses_with(node.args[0]), (f"branch node linear_3_lora {NO_USERS}",)),
    },
}
# fmt: on
ROWS = [(graph, name) for graph, rows in DAMAGE.items() for name in rows]


@pytest.mark.parametrize(("graph", "name"), ROWS)
def test_damage_is_reported_and_refused(graph: str, name: str) -> None:
    """The verifier reports each fault of the row, and a pass raises all that it reports."""
    damage, expected = DAMAGE[graph][name]
    graph_module = graph_of(graph)
    assert faults(graph_module) == []
    damage(graph_module)
    reported = faults(graph_module)
    assert [part for part in expected if part not in "\n".join(reported)] == [], "\n".join(reported)
    for pass_ in (InsertBranches(),) if name == "lost fact" else (FoldBranches(), InsertBranches()):
        with raises(VerifyError, "graph-not-verified", f"before {pass_.name}", *reported):
            pass_(graph_module)
