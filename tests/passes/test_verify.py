"""The verifier reports every kind of damage, with the node or weight.

A row of the table is a function that damages a graph, and the faults that the verifier must report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from lorasc_fx.graph import faults, record_of, set_record, verify
from lorasc_fx.graph.record import REPLACED_CALL
from lorasc_fx.passes import FoldBranches, InsertBranches, VerifyError
from tests.passes.cases import BY_NAME, CASES, Case
from tests.passes.kit import branches_of, fill, insert
from tests.passes.test_insert_branches import merged_graph

Damage = Callable[[fx.GraphModule], Any]

# --- what is damaged -------------------------------------------------------------------------------------------------


def of_case(name: str) -> fx.GraphModule:
    case = BY_NAME[name.removesuffix("_live")]
    return fill(insert(case.live() if name.endswith("_live") else case.own(), case.spec))


OTHER_GRAPHS: dict[str, Callable[[], fx.GraphModule]] = {
    "merged": lambda: fill(merged_graph()),
}
"""Graphs that `of_case` does not make."""

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


def plan(change: Callable[[Any], Any]) -> Damage:
    def damage(graph_module: fx.GraphModule) -> None:
        record = record_of(graph_module)
        set_record(graph_module, replace(record, plan=change(record.plan)))

    return damage


def site(weight: str, **changes: Any) -> Damage:
    """Change fields of a site in the plan."""
    return plan(
        lambda current: replace(
            current, sites=tuple(replace(s, **changes) if s.weight == weight else s for s in current.sites)
        )
    )


def node_between(graph: fx.Graph, base: fx.Node) -> None:
    between = graph.call_function(torch.relu, (base,))
    between.meta["val"] = base.meta["val"]
    (lora,) = (node for node in base.users if node.name == f"{base.name}_lora")
    lora.args = (between, lora.args[1])


def branch_on_a_branch(graph: fx.Graph, lora: fx.Node) -> None:
    twin = graph.node_copy(lora)
    lora.replace_all_uses_with(twin)
    twin.args = (lora, twin.args[1])


def swapped(graph_module: fx.GraphModule) -> None:
    branches = branch_dict(graph_module)
    one, two = branches["shared/weight"], branches["back/weight"]
    branches["shared/weight"], branches["back/weight"] = two, one


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


def second_call(weight: str, base: str, last: str) -> Damage:
    """Use a weight a second time without its branch, and return that result too."""

    def damage(graph_module: fx.GraphModule) -> None:
        graph, old = graph_module.graph, at(graph_module, base)
        with graph.inserting_before(graph.output_node()):
            read = graph.get_attr(weight) if weight else old.args[1]
            new = graph.call_function(old.target, (old.args[0], read, *old.args[2:]))
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


def turned_factors(experts: Any) -> None:
    experts.lora_A, experts.lora_B = (
        nn.Parameter(factor.transpose(1, 2).contiguous()) for factor in (experts.lora_B, experts.lora_A)
    )


def larger_factors(matrix: Any) -> None:
    matrix.lora_A, matrix.lora_B = nn.Parameter(torch.ones(4, 24)), nn.Parameter(torch.ones(6, 4))


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
        "rewired input": (args("conv2d_1_lora", lambda old, at: (at("conv2d_1"), at("input_1"))),
            other_call("conv2d_1_lora", "(conv2d_1, input_1)", "needs branches.1/weight(conv2d_1, conv2d_lora)")),
        "rewired base": (args("conv2d_1", lambda old, at: (at("input_1"), *old[1:])),
            other_call("conv2d_1_lora", "(conv2d_1, conv2d_lora)", "needs branches.1/weight(conv2d_1, input_1)")),
        "node between": (after("conv2d_1", node_between),
            (no_use("conv2d_1_lora", "relu"), f"1.weight is used at node conv2d_1 {NO_BRANCH}")),
        "changed branch options": (kwargs("conv2d_lora", lambda old: {**old, "stride": [2, 2]}),
            other_call("conv2d_lora", "'stride': [2, 2]", "conv2d needs", "'stride': [2, 1]")),
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
        "another rank": (branch("0.weight", larger_factors),
            ("lora_A of 0.weight has shape (4, 24), but the plan says (3, 24)",
            "lora_B of 0.weight has shape (6, 4), but the plan says (6, 3)")),
        "transposed factor": (branch("1.weight", lambda conv: setattr(conv, "lora_B", nn.Parameter(conv.lora_B.t()))),
            ("lora_B of 1.weight has shape (3, 12), but the plan says (12, 3)",)),
        "missing branch": (lambda graph_module: branch_dict(graph_module).pop("1/weight"),
            (f"{MALFORMED}Node conv2d_1_lora target branches.1/weight references nonexistent attribute 1/weight of "
            "branches", "node conv2d_1_lora calls branches.1/weight, which the module does not have",
            f"1.weight is used at node conv2d_1 {NO_BRANCH}", "1.weight is in the plan, but has no branch")),
        "plan of another shape": (site("3.weight", shape=(7, 12, 1, 1)),
            (f"3.weight has shape {SHAPE}, but the plan says (7, 12, 1, 1)",
            f"the branch of 3.weight is for 3.weight of shape {SHAPE}, but the weight has (7, 12, 1, 1)")),
        "renamed weight": (renamed_weight, ("3.weight is in the plan, but the model has no weight of this name",
            f"{MALFORMED}Node _3_weight target 3.weight references nonexistent attribute weight of 3",
            no_use("conv2d_2_lora", "conv2d_2"))),
        "another weight": (args("conv2d_2", lambda old, at: (old[0], at("_4_weight"), *old[2:])),
            other_call("conv2d_2_lora", "the use of 4.weight at conv2d_2 needs branches.4/weight",
            "3.weight had a branch in this graph, but no node of it calls the branch any more")),
        "another operator": (target("conv2d_2", torch.ops.aten.convolution.default),
            (no_use("conv2d_2_lora", "conv2d_2"), f"3.weight is used at node _3_weight {NO_BRANCH}")),
        "branch without reader": (args("output", lambda old, at: ((at("conv2d_2_lora"),),)),
            (f"branch node conv2d_3_lora {NO_USERS}",)),
        "stray reader": (args("output", lambda old, at: ((at("conv2d_3_lora"), at("conv2d_2")),)),
            ("node conv2d_2 has a branch, but is also read without it, by output",)),
        "second use": (second_call("", "conv2d_2", "conv2d_3_lora"),
            (f"3.weight is used at node conv2d_default {NO_BRANCH}",)),
        "unknown use": (after("_3_weight", lambda graph, weight: graph.call_function(torch.abs, (weight,))),
            (f"3.weight is used at node _3_weight {NO_BRANCH}", no_use("conv2d_2_lora", "conv2d_2"))),
        "lost fact": (lost_fact,
            tuple(no_use(f"conv2d{tail}_lora", f"conv2d{tail}") for tail in ("", "_1", "_2", "_3"))),
        "wrong order": (lambda graph_module: at(graph_module,
            "conv2d_2_lora").append(at(graph_module, "conv2d_3_lora")),
            (f"{MALFORMED}Argument 'conv2d_3' of Node 'conv2d_3_lora' was used before it has been defined! Please",)),
        "argument too many": (args("conv2d_3_lora", lambda old, at: (*old, None)),
            other_call("conv2d_3_lora", "(conv2d_3, conv2d_2_lora, None)")),
        "no arguments": (args("conv2d_3_lora", lambda old, at: ()), (no_use("conv2d_3_lora", "None"),)),
    },
    "module_conv2d": {
        "changed module": (lambda graph_module: setattr(graph_module.get_submodule("1"), "stride", (2, 1)),
            other_call("_1_lora", "'stride': (1, 1)", "_1 needs", "'stride': (2, 1)")),
        "missing module": (lambda graph_module: graph_module._modules.pop("2"),
            (f"{MALFORMED}Node _2 target 2 references nonexistent attribute 2 of ",
            "node _2 calls 2, which the module does not have")),
    },
    "aten_shared": {
        "swapped branches": (swapped,
            ("the branch of shared.weight is for back.weight of shape (5, 6), but the weight has (6, 5)",
            "the branch of back.weight is for shared.weight of shape (6, 5), but the weight has (5, 6)")),
    },
    "module_linear": {
        "weight of another shape": (lambda graph_module: setattr(graph_module.get_submodule("0"), "weight",
            nn.Parameter(torch.ones(4, 5, dtype=torch.float64))),
            ("0.weight has shape (4, 5), but the plan says (7, 5)",)),
    },
    "aten_tied_live": {
        "untied weight": (untied, ("first.weight is tied to (), but the plan says ('second.weight',)",
            no_use("linear_2_lora", "linear_2"))),
    },
    "aten_linear": {
        "site taken from the plan": (plan(lambda current: replace(current, sites=current.sites[1:])),
            (no_use("linear_lora", "linear"),)),
        "plan of another rank": (plan(lambda current: replace(current, sites=tuple(
            replace(one, options=replace(one.options, rank=4)) for one in current.sites))),
            ("lora_A of 0.weight has shape (3, 5), but the plan says (4, 5)",
            "lora_B of 0.weight has shape (7, 3), but the plan says (7, 4)")),
        "plan of another layout": (site("0.weight", layout="in_out"),
            (no_use("linear_lora", "linear"), "lora_A of 0.weight has shape (3, 5), but the plan says (3, 7)")),
        "plan of another tie": (site("0.weight", aliases=("2.weight",)),
            ("0.weight is tied to (), but the plan says ('2.weight',)",)),
        "plan of an unknown weight": (
            plan(lambda current: current.with_sites((replace(current.sites[0], weight="3.weight"),))),
            ("3.weight is in the plan, but the model has no weight of this name",)),
        "branch of another name": (branch("0.weight", lambda matrix: setattr(matrix, "weight_name", "2.weight")),
            ("the branch of 0.weight is for 2.weight of shape (7, 5)",)),
    },
    # w0 -> w0_lora -> chunk -> linear ...; w1 -> w1_lora -> slice -> linear
    "aten_packed": {
        "removed branch on a weight": (unhook("w0_lora", "w0"), (f"w0 is used at node w0 {NO_BRANCH}",)),
        "stray reader of a weight": (args("slice_1", lambda old, at: (at("w1"), *old[1:])), (no_use("w1_lora", "w1"),)),
        "branch behind a slice": (branch_behind_a_slice,
            (no_use("w1_lora", "slice_1"), f"w1 is used at node w1 {NO_BRANCH}")),
        "input of a branch on a weight": (args("w0_lora", lambda old, at: (at("w0"), at("w1"))),
            other_call("w0_lora", "branches.w0(w0, w1)")),
        "option of a branch on a weight": (kwargs("w0_lora", lambda old: {"at": "lookup"}),
            other_call("w0_lora", "with {'at': 'lookup'}, but the use of w0 at w0 needs branches.w0(w0,)")),
        "second read of a weight": (second_call("w0", "linear", "mul"), (f"w0 is used at node w0_1 {NO_BRANCH}",)),
        "another weight under a branch": (target("w1", "w0"),
            other_call("w1_lora", "the use of w0 at w1 needs branches.w0(w1,)")),
    },
    "aten_products": {
        "transposed weight": (turned_weight, (no_use("addmm_lora", "addmm"), f"w0 is used at node w0 {NO_BRANCH}")),
    },
    "aten_lookups": {
        "lost padding row": (args("embedding", lambda old, at: old[:2]),
            other_call("embedding_lora", "with {'at': 'lookup', 'padding_idx': 1}, but", "with {'at': 'lookup'}")),
    },
    "aten_routed": {
        "transposed experts": (branch("w1", turned_factors),
            ("lora_A of w1 has shape (3, 3, 5), but the plan says (3, 3, 4)",
            "lora_B of w1 has shape (3, 4, 3), but the plan says (3, 5, 3)")),
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
        "an argument too many": (args("linear_lora", lambda old, at: (*old, old[0])),
            (no_use("linear_lora", "linear_lora"),)),
        "with another weight": (args("linear_lora", lambda old, at: (old[0], at("linear_1_lora").args[1], *old[2:])),
            other_call("linear_lora", "the use of k.weight at linear needs branches.k/weight")),
        "into another product": (kwargs("linear_lora", lambda old: {"op": "matmul"}),
            other_call("linear_lora", "with {'op': 'matmul'}, but the use of q.weight at linear needs")),
        "branch of another site": (target("linear_lora", "branches.k/weight"),
            other_call("linear_lora", "branches.k/weight(", "needs branches.q/weight(")),
        "without its replaced call": (lambda graph_module: at(graph_module, "linear_lora").meta.pop(REPLACED_CALL),
            (no_use("linear_lora", "relu"),)),
        "no users": (lambda graph_module: (node := at(graph_module,
            "linear_3_lora")).replace_all_uses_with(node.args[0]), (f"branch node linear_3_lora {NO_USERS}",)),
    },
}
# fmt: on
ROWS = [(graph, name) for graph, rows in DAMAGE.items() for name in rows]


def damaged(graph: str, name: str) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Return the damaged graph of a row, and the faults that the verifier must report."""
    damage, expected = DAMAGE[graph][name]
    graph_module = OTHER_GRAPHS[graph]() if graph in OTHER_GRAPHS else of_case(graph)
    assert faults(graph_module) == []
    damage(graph_module)
    return graph_module, expected


@pytest.mark.parametrize(("graph", "name"), ROWS)
def test_damage_is_reported(graph: str, name: str) -> None:
    graph_module, expected = damaged(graph, name)
    reported = faults(graph_module)
    assert [part for part in expected if part not in "\n".join(reported)] == [], "\n".join(reported)
    with pytest.raises(VerifyError) as raised:
        verify(graph_module, "after the damage")
    faults_text = "\n  ".join(reported)
    assert str(raised.value) == f"after the damage, the graph does not agree with its plan:\n  {faults_text}"


@pytest.mark.parametrize(("graph", "name"), [row for row in ROWS if row[0] not in OTHER_GRAPHS])
def test_a_pass_refuses_a_damaged_graph(graph: str, name: str) -> None:
    graph_module, expected = damaged(graph, name)
    for run in (InsertBranches(),) if name == "lost fact" else (FoldBranches(), InsertBranches()):
        with pytest.raises(VerifyError) as raised:
            run(graph_module)
        assert expected[0] in str(raised.value)


@pytest.mark.parametrize("mode", ["own", "live"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sound_graph_has_no_faults(case: Case, mode: str) -> None:
    graph_module = case.graph(mode)
    assert faults(graph_module) == []
    if case.sites:
        inserted = fill(insert(graph_module, case.spec))
        assert faults(inserted) == []
        assert faults(FoldBranches()(inserted).graph_module) == []
