"""The verifier reports every kind of damage, with the node or weight.

A row of the table is a function that damages a graph, and the faults that the verifier must report.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from lorasc_fx.branch import Branch
from lorasc_fx.branch.lora import LoraBranch
from lorasc_fx.graph import branch_nodes, faults, record_of, set_record, use_of, verify
from lorasc_fx.passes import FoldBranches, InsertBranches, StageTransition, VerifyError
from tests.kit.state import change_state, drop_state, weight_state, weight_states
from tests.passes.cases import ADAPTABLE, BY_NAME, CASES, Case
from tests.passes.kit import branches_of, fill, insert
from tests.passes.test_insert_branches import merged_graph

Damage = Callable[[fx.GraphModule], Any]

# --- what is damaged -------------------------------------------------------------------------------------------------


def of_case(name: str) -> fx.GraphModule:
    case = BY_NAME[name.removesuffix("_live")]
    return fill(insert(case.live() if name.endswith("_live") else case.own(), case.spec))


def in_stage_two() -> fx.GraphModule:
    """Each weight has one expert."""
    case = BY_NAME["aten_conv2d"]
    return fill(StageTransition()(fill(insert(case.own(), replace(case.spec, rank=1)))).graph_module)


OTHER_GRAPHS: dict[str, Callable[[], fx.GraphModule]] = {
    "merged": lambda: fill(merged_graph()),
    "stage two": in_stage_two,
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


def unmark(name: str, mark: str) -> Damage:
    return lambda graph_module: at(graph_module, name).meta.pop(f"lorasc_fx.{mark}")


def mark(name: str, **changes: Any) -> Damage:
    """Change fields of the mark of a node."""

    def damage(graph_module: fx.GraphModule) -> None:
        use = use_of(at(graph_module, name))
        assert use is not None
        at(graph_module, name).meta["lorasc_fx.use"] = replace(use, **changes)

    return damage


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


def option(weight: str, **changes: Any) -> Damage:
    """Change options of a site in the plan."""
    return plan(
        lambda current: replace(
            current,
            sites=tuple(
                replace(s, options=replace(s.options, **changes)) if s.weight == weight else s for s in current.sites
            ),
        )
    )


def state(**changes: Any) -> Damage:
    """Change fields of the slow state of 0.weight."""
    return lambda graph_module: change_state(graph_module, "0.weight", **changes)


def expert(change: Callable[[Any], Any]) -> Damage:
    def damage(graph_module: fx.GraphModule) -> None:
        (only,) = weight_state(graph_module, "0.weight").experts
        change_state(graph_module, "0.weight", experts=(change(only),))

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


def swapped(graph_module: fx.GraphModule) -> None:
    branches = branch_dict(graph_module)
    one, two = branches["shared/weight"], branches["back/weight"]
    branches["shared/weight"], branches["back/weight"] = two, one


def another_kind_of_branch(graph_module: fx.GraphModule) -> None:
    old, plan = branches_of(graph_module)["3.weight"], record_of(graph_module).plan
    site = dataclasses.replace(plan.by_weight["3.weight"], kind="linear")
    branch_dict(graph_module)["3/weight"] = LoraBranch(site, 0, 1, old.lora_A)


def branch_too_many(graph_module: fx.GraphModule) -> None:
    branch_dict(graph_module)["2/weight"] = copy.deepcopy(branch_dict(graph_module)["3/weight"])


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

NO_OP = "the op that branch node linear_lora replaced is not marked as a use of a site"
NO_MARK = "a site, but no pass has marked it as a use"
NO_BRANCH = "with 0 branches instead of one"
NO_USERS = "has no users"
OTHER_INPUT = "branch node linear_lora does not read the input of linear"
MALFORMED = "the graph is malformed: "
GROUPED = "transformers::grouped_mm_fallback"
SHAPE = "(6, 12, 1, 1)"


def no_use(node: str) -> str:
    return f"the first argument of branch node {node} is not marked as a use of a site"


Row = tuple[Damage, tuple[str, ...]]
# fmt: off
DAMAGE: dict[str, dict[str, Row]] = {
    # input_1 -> conv2d (0) -> conv2d_1 (1, depthwise, same) -> gelu -> conv2d_2 (3) -> conv2d_3 (4, groups, valid)
    "aten_conv2d": {
        "rewired input": (args("conv2d_1_lora", lambda old, at: (at("conv2d_1"), at("input_1"))),
            ("branch node conv2d_1_lora does not read the input of conv2d_1",)),
        "rewired base": (args("conv2d_1", lambda old, at: (at("input_1"), *old[1:])),
            ("branch node conv2d_1_lora does not read the input of conv2d_1",)),
        "node between": (after("conv2d_1", node_between),
            (no_use("conv2d_1_lora"), f"1.weight is used at node conv2d_1 {NO_BRANCH}")),
        "changed branch options": (kwargs("conv2d_lora", lambda old: {**old, "stride": [2, 2]}),
            ("branch node conv2d_lora has options {'at': 'beside', 'stride': [2, 2], 'padding': [1, 2], 'dilation': "
            "[1, 2]}, but conv2d needs {'at': 'beside', 'stride': [2, 1], 'padding': [1, 2], 'dilation': [1, 2]}",)),
        "changed base options": (args("conv2d", lambda old, at: (*old[:-1], [2, 2])),
            ("branch node conv2d_lora has options {'at': 'beside', 'stride': [2, 1], 'padding': [1, 2], 'dilation': "
            "[1, 2]}, but conv2d needs {'at': 'beside', 'stride': [2, 1], 'padding': [1, 2], 'dilation': [2, 2]}",)),
        "removed branch node": (unhook("conv2d_2_lora", "conv2d_2"),
            (f"3.weight is used at node conv2d_2 {NO_BRANCH}",)),
        "second branch on a base": (after("conv2d_2_lora", lambda graph, lora: graph.node_copy(lora)),
            ("node conv2d_2 has a branch, but is also read without it, by conv2d_2_lora_1",
            "node conv2d_2 has a branch, but is also read without it, by conv2d_2_lora",
            f"branch node conv2d_2_lora_1 {NO_USERS}",
            "3.weight is used at node conv2d_2 with 2 branches instead of one")),
        "branch on a branch": (after("conv2d_2_lora", branch_on_a_branch), (no_use("conv2d_2_lora_1"),)),
        "call of another site's branch": (target("conv2d_1_lora", "branches.3/weight"),
            ("branch node conv2d_1_lora is at a use of 1.weight, but calls branches.3/weight",)),
        "another rank": (branch("0.weight", larger_factors),
            ("lora_A of 0.weight has shape (4, 24), but the plan says (3, 24)",
            "lora_B of 0.weight has shape (6, 4), but the plan says (6, 3)")),
        "transposed factor": (branch("1.weight", lambda conv: setattr(conv, "lora_B", nn.Parameter(conv.lora_B.t()))),
            ("lora_B of 1.weight has shape (3, 12), but the plan says (12, 3)",)),
        "nan in a factor": (branch("4.weight", lambda conv: conv.lora_A.data[0, 1].fill_(float("nan"))),
            ("the branch of 4.weight has inf or nan values",)),
        "inf in a factor": (branch("3.weight", lambda conv: conv.lora_B.data[1, 0].fill_(float("-inf"))),
            ("the branch of 3.weight has inf or nan values",)),
        "changed scale": (branch("3.weight", lambda conv: setattr(conv, "scale", 2.5)),
            ("the branch of 3.weight has scale 2.5, but the plan says 1.6666666666666667",)),
        "another kind of branch": (another_kind_of_branch,
            (f"the branch of 3.weight is a LoraBranch for linear of shape {SHAPE}, but the plan says conv of shape "
            f"{SHAPE}",)),
        "missing branch": (lambda graph_module: branch_dict(graph_module).pop("1/weight"),
            (f"{MALFORMED}Node conv2d_1_lora target branches.1/weight references nonexistent attribute 1/weight of "
            "branches", "node conv2d_1_lora calls branches.1/weight, which the module does not have",
            f"1.weight is used at node conv2d_1 {NO_BRANCH}", "1.weight is in the plan, but has no branch")),
        "branch too many": (branch_too_many, ("branch 2/weight does not belong to a site of the plan",)),
        "plan of another shape": (site("3.weight", shape=(7, 12, 1, 1)),
            (f"3.weight has shape {SHAPE}, but the plan says (7, 12, 1, 1)",
            f"the branch of 3.weight is a LoraBranch for conv of shape {SHAPE}, but the plan says conv of shape "
            "(7, 12, 1, 1)",
            "lora_B of 3.weight has shape (6, 3), but the plan says (7, 3)",
            f"the slow state of 3.weight has shape {SHAPE}, but the plan says (7, 12, 1, 1)")),
        "renamed weight": (renamed_weight, ("3.weight is in the plan, but the model has no weight of this name",
            f"{MALFORMED}Node _3_weight target 3.weight references nonexistent attribute weight of 3",
            "node conv2d_2 is marked as a use of 3.weight, but reads no weight of the model")),
        "another weight": (args("conv2d_2", lambda old, at: (old[0], at("_4_weight"), *old[2:])),
            ("node conv2d_2 is marked as a use of 3.weight, but reads 4.weight",)),
        "another operator": (target("conv2d_2", torch.ops.aten.convolution.default),
            ("node conv2d_2 is marked as aten.conv2d, but is an op without a form",)),
        "branch without reader": (args("output", lambda old, at: ((at("conv2d_2_lora"),),)),
            (f"branch node conv2d_3_lora {NO_USERS}",)),
        "stray reader": (args("output", lambda old, at: ((at("conv2d_3_lora"), at("conv2d_2")),)),
            ("node conv2d_2 has a branch, but is also read without it, by output",)),
        "lost mark": (unmark("conv2d_3", "use"),
            (f"node conv2d_3 reads 4.weight, {NO_MARK}", no_use("conv2d_3_lora"))),
        "unmarked use": (second_call("", "conv2d_2", "conv2d_3_lora"),
            (f"node conv2d_default reads 3.weight, {NO_MARK}",)),
        "unknown use": (after("_3_weight", lambda graph, weight: graph.call_function(torch.abs, (weight,))),
            (f"node abs_1 reads 3.weight, {NO_MARK}",)),
        "mark of another weight": (mark("conv2d", weight="9.weight"),
            ("node conv2d is marked as a use of 9.weight, which is not in the plan",)),
        "lost fact": (lost_fact,
            tuple(f"node conv2d{tail}_lora calls a branch, but no pass has inserted any" for tail in ("", "_1", "_2",
            "_3"))),
        "lost slow state": (lambda graph_module: drop_state(graph_module, "4.weight"),
            ("4.weight has a branch, but the record has no slow state for it",)),
        "wrong order": (lambda graph_module: at(graph_module,
            "conv2d_2_lora").append(at(graph_module, "conv2d_3_lora")),
            (f"{MALFORMED}Argument 'conv2d_3' of Node 'conv2d_3_lora' was used before it has been defined! Please",)),
        "argument too many": (args("conv2d_3_lora", lambda old, at: (*old, None)),
            ("branch node conv2d_3_lora does not read the input of conv2d_3",)),
        "no arguments": (args("conv2d_3_lora", lambda old, at: ()), (no_use("conv2d_3_lora"),)),
    },
    "module_conv2d": {
        "changed module": (lambda graph_module: setattr(graph_module.get_submodule("1"), "stride", (2, 1)),
            ("branch node _1_lora has options {'at': 'beside', 'stride': (1, 1), 'padding': 'same', 'dilation': "
            "(1, 1), 'groups': 6}, "
            "but _1 needs {'at': 'beside', 'stride': (2, 1), 'padding': 'same', 'dilation': (1, 1), 'groups': 6}",)),
        "missing module": (lambda graph_module: graph_module._modules.pop("2"),
            (f"{MALFORMED}Node _2 target 2 references nonexistent attribute 2 of ",
            "node _2 calls 2, which the module does not have")),
        "unmarked call": (after("_3", lambda graph, node: graph.call_module("3", node.args)),
            (f"node _3_1 reads 3.weight, {NO_MARK}",)),
    },
    "aten_shared": {
        "swapped branches": (swapped,
            ("branch node linear_lora calls the branch of back.weight at a use of shared.weight",
            "branch node linear_1_lora calls the branch of shared.weight at a use of back.weight",
            "branch node linear_2_lora calls the branch of back.weight at a use of shared.weight",
            "the branch of shared.weight is a LoraBranch for linear of shape (5, 6), but the plan says linear of "
            "shape (6, 5)",
            "lora_A of shared.weight has shape (3, 6), but the plan says (3, 5)",
            "lora_B of shared.weight has shape (5, 3), but the plan says (6, 3)",
            "the branch of back.weight is a LoraBranch for linear of shape (6, 5), but the plan says linear of shape "
            "(5, 6)",
            "lora_A of back.weight has shape (3, 5), but the plan says (3, 6)",
            "lora_B of back.weight has shape (6, 3), but the plan says (5, 3)")),
    },
    "module_linear": {
        "weight of another shape": (lambda graph_module: setattr(graph_module.get_submodule("0"), "weight",
            nn.Parameter(torch.ones(4, 5, dtype=torch.float64))),
            ("0.weight has shape (4, 5), but the plan says (7, 5)",)),
    },
    "aten_tied_live": {
        "untied weight": (untied, ("first.weight is tied to (), but the plan says ('second.weight',)",
            "node linear_2 is marked as a use of first.weight, but reads second.weight")),
    },
    "aten_linear": {
        "site taken from the plan": (plan(lambda current: replace(current, sites=current.sites[1:])),
            ("node linear is marked as a use of 0.weight, which is not in the plan",
            "branch node linear_lora is at a use of 0.weight, but calls branches.0/weight",
            "branch 0/weight does not belong to a site of the plan")),
        "site planned twice": (plan(lambda current: replace(current, sites=(current.sites[0], *current.sites))),
            ("0.weight is in the plan twice",)),
        "plan lost": (plan(lambda current: replace(current, sites=())),
            ("node linear is marked as a use of 0.weight, which is not in the plan",)),
        "plan before its first stage": (plan(lambda current: replace(current, stage=0)),
            ("the plan is in stage 0, but stages are counted from 1",)),
        "plan of another rank": (option("0.weight", rank=4),
            ("lora_A of 0.weight has shape (3, 5), but the plan says (4, 5)",
            "lora_B of 0.weight has shape (7, 3), but the plan says (7, 4)")),
        "plan of another lora_alpha": (option("0.weight", lora_alpha=9.0),
            ("the branch of 0.weight has scale 1.6666666666666667, but the plan says 3.0",)),
        "plan of another scaling": (option("0.weight", use_rslora=True),
            ("the branch of 0.weight has scale 1.6666666666666667, but the plan says 2.886751345948129",)),
        "plan of another layout": (site("0.weight", layout="in_out"),
            ("node linear reads 0.weight as out_in, but the plan says in_out",
            "the branch of 0.weight has transposed=False, but its layout is in_out")),
        "plan of another kind": (site("0.weight", kind="conv"),
            ("node linear is of kind linear, but 0.weight is planned as conv",)),
        "plan of another tie": (site("0.weight", aliases=("2.weight",)),
            ("0.weight is tied to (), but the plan says ('2.weight',)",)),
        "plan of another dropout": (site("0.weight", dropout=0.25),
            ("the branch of 0.weight has dropout 0.0, but the plan says 0.25",)),
        "plan of an unknown weight": (
            plan(lambda current: current.with_sites((replace(current.sites[0], weight="3.weight"),))),
            ("3.weight is in the plan, but the model has no weight of this name",)),
        "branch of another name": (branch("0.weight", lambda matrix: setattr(matrix, "weight_name", "2.weight")),
            ("the branch of 0.weight has weight_name 2.weight, but the plan says 0.weight",)),
        "branch with dropout": (branch("0.weight", lambda matrix: setattr(matrix, "dropout", 0.5)),
            ("the branch of 0.weight has dropout 0.5, but the plan says 0.0",)),
    },
    # w0 -> w0_lora -> chunk -> linear ...; w1 -> w1_lora -> slice -> linear
    "aten_packed": {
        "removed branch on a weight": (unhook("w0_lora", "w0"), (f"w0 is used at node w0 {NO_BRANCH}",)),
        "stray reader of a weight": (args("slice_1", lambda old, at: (at("w1"), *old[1:])),
            ("node w1 has a branch, but is also read without it, by slice_1", f"branch node w1_lora {NO_USERS}")),
        "branch behind a slice": (branch_behind_a_slice,
            (no_use("w1_lora"), f"w1 is used at node w1 {NO_BRANCH}")),
        "input of a branch on a weight": (args("w0_lora", lambda old, at: (at("w0"), at("w1"))),
            ("branch node w0_lora does not read the input of w0",)),
        "option of a branch on a weight": (kwargs("w0_lora", lambda old: {"at": "lookup"}),
            ("branch node w0_lora has options {'at': 'lookup'}, but w0 needs {'at': 'weight'}",)),
        "second read of a weight": (second_call("w0", "linear", "mul"), (f"node linear_default reads w0, {NO_MARK}",)),
        "another weight under a branch": (target("w1", "w0"),
            ("node w1 is marked as a use of w1, but reads w0",)),
        "lost mark of a weight": (unmark("w0", "use"),
            (f"node linear_1 reads w0, {NO_MARK}", no_use("w0_lora"))),
    },
    "aten_products": {
        "transposed branch": (branch("w0", lambda matrix: setattr(matrix, "transposed", False)),
            ("the branch of w0 has transposed=False, but its layout is in_out",)),
        "transposed weight": (turned_weight, ("node addmm reads w0 as out_in, but the plan says in_out",)),
    },
    "aten_lookups": {
        "lost padding row": (args("embedding", lambda old, at: old[:2]),
            ("branch node embedding_lora has options {'at': 'lookup', 'padding_idx': 1}, but "
            "embedding needs {'at': 'lookup'}",)),
    },
    "aten_routed": {
        "transposed experts": (branch("w1", turned_factors),
            ("lora_A of w1 has shape (3, 3, 5), but the plan says (3, 3, 4)",
            "lora_B of w1 has shape (3, 4, 3), but the plan says (3, 5, 3)")),
    },
    "aten_grouped": {
        "lost ends": (kwargs("grouped_mm_fallback_1_lora", lambda old: {"at": old["at"], "by": old["by"]}),
            (f"branch node grouped_mm_fallback_1_lora has options {{'at': 'grouped', 'by': {GROUPED!r}}}, but "
            "grouped_mm_fallback_1 needs "
            f"{{'at': 'grouped', 'by': {GROUPED!r}, 'offs': to, 'weight': transpose}}",)),
        "experts read the other way": (args("grouped_mm_fallback_1", lambda old, at: (old[0], at("w1"), old[2])),
            ("node grouped_mm_fallback_1 reads w1 as in_out, but the plan says out_in",)),
        "experts planned as a matrix": (site("w1", kind="linear"),
            ("node grouped_mm_fallback_1 is of kind experts, but w1 is planned as linear",)),
    },
    "aten_slices": {
        "plan of other slices": (site("w0", slices=(4, 2, 6)),
            ("the branch of w0 has slices (2, 4, 6), but the plan says (4, 2, 6)",)),
    },
    # %linear_lora = branches.q/weight(%relu, %q_weight, %q_bias, op='linear')
    "merged": {
        "without its bias": (args("linear_lora", lambda old, at: old[:2]), (NO_OP,)),
        "without its weight": (args("linear_lora", lambda old, at: old[:1]), (NO_OP,)),
        "an argument too many": (args("linear_lora", lambda old, at: (*old, old[0])), (NO_OP,)),
        "without its mark": (unmark("linear_lora", "use"), (NO_OP,)),
        "with another weight": (args("linear_lora", lambda old, at: (old[0], at("linear_1_lora").args[1], *old[2:])),
            ("node linear_lora is marked as a use of q.weight, but reads k.weight",)),
        "into another product": (kwargs("linear_lora", lambda old: {"op": "matmul"}),
            ("branch node linear_lora has options {'op': 'matmul'}, but linear needs {'at': 'merged', 'op': ",)),
        "branch of another site": (target("linear_lora", "branches.k/weight"),
            ("branch node linear_lora is at a use of q.weight, but calls branches.k/weight",)),
        "without its replaced call": (unmark("linear_lora", "replaced_call"), (no_use("linear_lora"),)),
        "marked as beside": (mark("linear_lora", merged=False),
            ("node linear_lora is a merged branch that replaced linear, but is not marked as merged",)),
        "no users": (lambda graph_module: (node := at(graph_module,
            "linear_3_lora")).replace_all_uses_with(node.args[0]), (f"branch node linear_3_lora {NO_USERS}",)),
        "planned beside": (site("q.weight", placement="beside"),
            ("node linear_lora is marked as merged, but the plan has placement beside for q.weight",)),
    },
    "stage two": {
        "expert that is not finite": (expert(lambda only: only._replace(b=only.b / 0)),
            ("the slow state of 0.weight holds inf or nan",)),
        "expert of a later stage": (expert(lambda only: only._replace(stage=7)),
            ("the slow state of 0.weight has an expert of stage 7, which has not ended",)),
        "expert transposed": (expert(lambda only: only._replace(b=only.b.t(), a=only.a.t())),
            ("the slow state of 0.weight has factors of (1, 6) and (24, 1), which are no delta of "
            "(6, 24)",)),
        "dense delta transposed": (state(dense_slow=torch.zeros(24, 6)),
            ("the slow state of 0.weight has a dense delta of (24, 6), which is none of (6, 24)",)),
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
    missing = [start for start in expected if not any(fault.startswith(start) for fault in reported)]
    assert missing == [], "\n".join(reported)
    with pytest.raises(VerifyError) as raised:
        verify(graph_module, "after the damage")
    faults_text = "\n  ".join(reported)
    assert str(raised.value) == f"after the damage, the graph does not agree with its plan:\n  {faults_text}"


@pytest.mark.parametrize(
    ("graph", "name"), [row for row in ROWS if row[0] not in OTHER_GRAPHS and not row[1].endswith("in a factor")]
)
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


def test_a_nonfinite_branch_is_no_fault_if_the_spec_skips_it() -> None:
    case = ADAPTABLE[0]
    inserted = insert(case.own(), replace(case.spec, on_nonfinite="skip"))
    next(iter(branches_of(inserted).values())).lora_A.data.fill_(float("nan"))
    assert faults(inserted) == []


def test_every_branch_is_checked() -> None:
    """The same damage at each site is reported once per site."""
    inserted = insert(BY_NAME["aten_conv2d"].own(), BY_NAME["aten_conv2d"].spec)
    for branch in branches_of(inserted).values():
        assert isinstance(branch, Branch)
        branch.scale = 0.5
    assert len(faults(inserted)) == len(branch_nodes(inserted)) == 4


def test_slow_states_of_a_second_stage_have_experts() -> None:
    experts = {name: state.experts for name, state in weight_states(in_stage_two()).items()}
    assert any(experts.values())
