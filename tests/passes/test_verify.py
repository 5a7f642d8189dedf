"""The verifier: every kind of damage that we could think of is told, by node or weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from lorasc_fx.branch import Branch, MatrixBranch
from lorasc_fx.graph import branch_nodes, faults, record_of, set_record, use_of, verify
from lorasc_fx.passes import FoldBranches, InsertBranches, VerifyError
from tests.kit.state import drop_state
from tests.passes.cases import ADAPTABLE, BY_NAME, CASES, Case
from tests.passes.kit import branches_of, fill, insert

DAMAGE: dict[str, tuple[str, Callable[[fx.GraphModule], None], list[str]]] = {}


def damage(*told: str, case: str = "aten_conv2d") -> Callable[[Callable[[fx.GraphModule], None]], None]:
    """Register a way to damage the inserted graph of a case, and all that the verifier has to say of it."""

    def register(harm: Callable[[fx.GraphModule], None]) -> None:
        DAMAGE[harm.__name__] = (case, harm, list(told))

    return register


def at(graph_module: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in graph_module.graph.nodes if node.name == name)


def held(graph_module: fx.GraphModule) -> nn.ModuleDict:
    branches = graph_module.branches
    assert isinstance(branches, nn.ModuleDict)
    return branches


# Graph: input_1 -> conv2d (0) -> conv2d_1 (1, depthwise, same) -> gelu -> conv2d_2 (3) -> conv2d_3 (4, groups, valid)


@damage("branch node conv2d_1_lora does not read the input of conv2d_1")
def rewired_input(graph_module: fx.GraphModule) -> None:
    at(graph_module, "conv2d_1_lora").args = (at(graph_module, "conv2d_1"), at(graph_module, "input_1"))


@damage("branch node conv2d_1_lora does not read the input of conv2d_1")
def rewired_base(graph_module: fx.GraphModule) -> None:
    base = at(graph_module, "conv2d_1")
    base.args = (at(graph_module, "input_1"), *base.args[1:])


@damage(
    "branch node conv2d_1_lora does not stand beside the use of a site",
    "1.weight is used at node conv2d_1 with 0 branches instead of one",
)
def node_between(graph_module: fx.GraphModule) -> None:
    base, branch = at(graph_module, "conv2d_1"), at(graph_module, "conv2d_1_lora")
    with graph_module.graph.inserting_after(base):
        between = graph_module.graph.call_function(torch.relu, (base,))
    between.meta["val"] = base.meta["val"]
    branch.args = (between, branch.args[1])


@damage(
    "branch node conv2d_lora has {'stride': [2, 2], 'padding': [1, 2], 'dilation': [1, 2]}, but conv2d has {'stride': "
    "[2, 1], "
    "'padding': [1, 2], 'dilation': [1, 2]}"
)
def changed_branch_options(graph_module: fx.GraphModule) -> None:
    branch = at(graph_module, "conv2d_lora")
    branch.kwargs = {**branch.kwargs, "stride": [2, 2]}


@damage(
    "branch node conv2d_lora has {'stride': [2, 1], 'padding': [1, 2], 'dilation': [1, 2]}, but conv2d has {'stride': "
    "[2, 1], "
    "'padding': [1, 2], 'dilation': [2, 2]}"
)
def changed_base_options(graph_module: fx.GraphModule) -> None:
    base = at(graph_module, "conv2d")
    base.args = (*base.args[:-1], [2, 2])


@damage(
    "branch node _1_lora has {'stride': (1, 1), 'padding': 'same', 'dilation': (1, 1), 'groups': 6}, but _1 has "
    "{'stride': (2, 1), "
    "'padding': 'same', 'dilation': (1, 1), 'groups': 6}",
    case="module_conv2d",
)
def changed_module(graph_module: fx.GraphModule) -> None:
    graph_module.get_submodule("1").stride = (2, 1)


@damage("3.weight is used at node conv2d_2 with 0 branches instead of one")
def removed_branch_node(graph_module: fx.GraphModule) -> None:
    branch = at(graph_module, "conv2d_2_lora")
    branch.replace_all_uses_with(at(graph_module, "conv2d_2"))
    graph_module.graph.erase_node(branch)


@damage(
    "node conv2d_2 has a branch, but conv2d_2_lora_1 read it without",
    "node conv2d_2 has a branch, but conv2d_2_lora read it without",
    "branch node conv2d_2_lora_1 is read by nobody",
    "3.weight is used at node conv2d_2 with 2 branches instead of one",
)
def second_branch_on_a_base(graph_module: fx.GraphModule) -> None:
    branch = at(graph_module, "conv2d_2_lora")
    with graph_module.graph.inserting_after(branch):
        graph_module.graph.node_copy(branch)


@damage(
    "branch node conv2d_2_lora_1 does not stand beside the use of a site",
)
def branch_on_a_branch(graph_module: fx.GraphModule) -> None:
    branch = at(graph_module, "conv2d_2_lora")
    with graph_module.graph.inserting_after(branch):
        twin = graph_module.graph.node_copy(branch)
    branch.replace_all_uses_with(twin)
    twin.args = (branch, twin.args[1])


@damage("branch node conv2d_1_lora stands beside 1.weight, but calls branches.3/weight")
def call_of_another_sites_branch(graph_module: fx.GraphModule) -> None:
    at(graph_module, "conv2d_1_lora").target = "branches.3/weight"


@damage(
    "branch node linear_lora calls the branch of back.weight beside shared.weight",
    "branch node linear_1_lora calls the branch of shared.weight beside back.weight",
    "branch node linear_2_lora calls the branch of back.weight beside shared.weight",
    "the branch of shared.weight is a MatrixBranch for (5, 6), planned for a linear of (6, 5)",
    "lora_A of shared.weight is (3, 6), planned as (3, 5)",
    "lora_B of shared.weight is (5, 3), planned as (6, 3)",
    "the branch of back.weight is a MatrixBranch for (6, 5), planned for a linear of (5, 6)",
    "lora_A of back.weight is (3, 5), planned as (3, 6)",
    "lora_B of back.weight is (6, 3), planned as (5, 3)",
    case="aten_shared",
)
def swapped_branches(graph_module: fx.GraphModule) -> None:
    branches = held(graph_module)
    one, two = branches["shared/weight"], branches["back/weight"]
    branches["shared/weight"], branches["back/weight"] = two, one


@damage(
    "lora_A of 0.weight is (4, 24), planned as (3, 24)",
    "lora_B of 0.weight is (6, 4), planned as (6, 3)",
)
def another_rank(graph_module: fx.GraphModule) -> None:
    branch = branches_of(graph_module)["0.weight"]
    branch.lora_A, branch.lora_B = nn.Parameter(torch.ones(4, 24)), nn.Parameter(torch.ones(6, 4))


@damage("lora_B of 1.weight is (3, 12), planned as (12, 3)")
def transposed_factor(graph_module: fx.GraphModule) -> None:
    branch = branches_of(graph_module)["1.weight"]
    branch.lora_B = nn.Parameter(branch.lora_B.t())


@damage("the branch of 4.weight holds inf or nan")
def nan_in_a_factor(graph_module: fx.GraphModule) -> None:
    branches_of(graph_module)["4.weight"].lora_A.data[0, 1] = float("nan")


@damage("the branch of 3.weight holds inf or nan")
def inf_in_a_factor(graph_module: fx.GraphModule) -> None:
    branches_of(graph_module)["3.weight"].lora_B.data[1, 0] = float("-inf")


@damage("the branch of 3.weight has scale 2.5, planned as 1.6666666666666667")
def changed_scale(graph_module: fx.GraphModule) -> None:
    branches_of(graph_module)["3.weight"].scale = 2.5


@damage(
    "the branch of 3.weight is a MatrixBranch for (6, 12, 1, 1), planned for a conv of (6, 12, 1, 1)",
)
def another_kind_of_branch(graph_module: fx.GraphModule) -> None:
    old = branches_of(graph_module)["3.weight"]
    plan = record_of(graph_module).plan
    assert plan is not None
    new = MatrixBranch(plan.by_weight["3.weight"], 0, 1, old.lora_A)
    held(graph_module)["3/weight"] = new


@damage(
    "the graph is malformed: Node conv2d_1_lora target branches.1/weight references nonexistent attribute 1/weight of "
    "branches",
    "node conv2d_1_lora calls branches.1/weight, which the module does not have",
    "1.weight is used at node conv2d_1 with 0 branches instead of one",
    "1.weight is planned, but has no branch",
)
def missing_branch(graph_module: fx.GraphModule) -> None:
    del held(graph_module)["1/weight"]


@damage(
    "the graph is malformed: Node _2 target 2 references nonexistent attribute 2 of ",
    "node _2 calls 2, which the module does not have",
    case="module_conv2d",
)
def missing_module(graph_module: fx.GraphModule) -> None:
    del graph_module._modules["2"]


@damage("branch 2/weight belongs to no planned site")
def branch_too_many(graph_module: fx.GraphModule) -> None:
    held(graph_module)["2/weight"] = copy.deepcopy(held(graph_module)["3/weight"])


@damage(
    "3.weight is (6, 12, 1, 1), planned as (7, 12, 1, 1)",
    "the branch of 3.weight is a ConvBranch for (6, 12, 1, 1), planned for a conv of (7, 12, 1, 1)",
    "lora_B of 3.weight is (6, 3), planned as (7, 3)",
    "the slow state of 3.weight is (6, 12, 1, 1), planned as (7, 12, 1, 1)",
)
def plan_of_another_shape(graph_module: fx.GraphModule) -> None:
    record = record_of(graph_module)
    assert record.plan is not None
    sites = tuple(replace(s, shape=(7, 12, 1, 1)) if s.weight == "3.weight" else s for s in record.plan.sites)
    set_record(graph_module, replace(record, plan=replace(record.plan, sites=sites)))


@damage("0.weight is (4, 5), planned as (7, 5)", case="module_linear")
def weight_of_another_shape(graph_module: fx.GraphModule) -> None:
    graph_module.get_submodule("0").weight = nn.Parameter(torch.ones(4, 5, dtype=torch.float64))


@damage(
    "3.weight is planned, but the model has no weight of this name",
    "the graph is malformed: Node _3_weight target 3.weight references nonexistent attribute weight of 3",
    "node conv2d_2 is marked as a use of 3.weight, but computes with None",
)
def renamed_weight(graph_module: fx.GraphModule) -> None:
    module = graph_module.get_submodule("3")
    module.register_parameter("kernel", module._parameters.pop("weight"))


@damage(
    "first.weight is tied to (), planned with ('second.weight',)",
    "node linear_2 is marked as a use of first.weight, but computes with second.weight",
    case="aten_tied_live",
)
def untied_weight(graph_module: fx.GraphModule) -> None:
    for name in ("first", "second"):
        owner = graph_module.get_submodule(f"model.{name}")
        owner.weight = nn.Parameter(owner.weight.detach().clone())
    last = [node for node in graph_module.graph.nodes if node.target == "model.second.weight"]
    assert last or _use_second(graph_module)


def _use_second(graph_module: fx.GraphModule) -> bool:
    base = at(graph_module, "linear_2")
    with graph_module.graph.inserting_before(base):
        weight = graph_module.graph.get_attr("model.second.weight")
    base.args = (base.args[0], weight, *base.args[2:])
    return True


@damage("node conv2d_2 is marked as a use of 3.weight, but computes with 4.weight")
def another_weight(graph_module: fx.GraphModule) -> None:
    base = at(graph_module, "conv2d_2")
    base.args = (base.args[0], at(graph_module, "_4_weight"), *base.args[2:])


@damage("node conv2d_2 is marked as aten.conv2d, but is in no form")
def another_operator(graph_module: fx.GraphModule) -> None:
    at(graph_module, "conv2d_2").target = torch.ops.aten.convolution.default


@damage("branch node conv2d_3_lora is read by nobody")
def branch_without_reader(graph_module: fx.GraphModule) -> None:
    output = next(iter(reversed(graph_module.graph.nodes)))
    output.args = ((at(graph_module, "conv2d_2_lora"),),)


@damage("node conv2d_2 has a branch, but output read it without")
def stray_reader(graph_module: fx.GraphModule) -> None:
    output = next(iter(reversed(graph_module.graph.nodes)))
    output.args = ((at(graph_module, "conv2d_3_lora"), at(graph_module, "conv2d_2")),)


@damage(
    "branch node linear_1_lora is said to be ('(6, 2, 3)', torch.float32), linear_1 is ('(6, 2, 3)', torch.float64)",
    case="aten_linear",
)
def wrong_dtype_in_metadata(graph_module: fx.GraphModule) -> None:
    for name, dtype in (("linear_1_lora", torch.float32), ("linear_1", torch.float64)):
        at(graph_module, name).meta["val"] = torch.empty(6, 2, 3, dtype=dtype, device="meta")


@damage(
    "branch node linear_lora is said to be ('(6, 2, 5)', torch.float64), linear is ('(6, 2, 7)', torch.float64)",
    case="aten_linear",
)
def wrong_shape_in_metadata(graph_module: fx.GraphModule) -> None:
    for name, size in (("linear_lora", 5), ("linear", 7)):
        at(graph_module, name).meta["val"] = torch.empty(6, 2, size, dtype=torch.float64, device="meta")


@damage("branch node conv2d_3_lora was made by no pass of ours")
def lost_stamp(graph_module: fx.GraphModule) -> None:
    at(graph_module, "conv2d_3_lora").meta.pop("lorasc_fx.made_by")


@damage(
    "node conv2d_3 reads 4.weight, a site, but no pass has marked it as a use",
    "branch node conv2d_3_lora does not stand beside the use of a site",
)
def lost_mark(graph_module: fx.GraphModule) -> None:
    at(graph_module, "conv2d_3").meta.pop("lorasc_fx.use")


@damage("node conv2d_default reads 3.weight, a site, but no pass has marked it as a use")
def unmarked_use(graph_module: fx.GraphModule) -> None:
    base, output = at(graph_module, "conv2d_2"), next(iter(reversed(graph_module.graph.nodes)))
    with graph_module.graph.inserting_before(output):
        new = graph_module.graph.call_function(base.target, base.args)
    output.args = ((at(graph_module, "conv2d_3_lora"), new),)


@damage("node abs_1 reads 3.weight, a site, but no pass has marked it as a use")
def unknown_use(graph_module: fx.GraphModule) -> None:
    with graph_module.graph.inserting_after(at(graph_module, "_3_weight")):
        graph_module.graph.call_function(torch.abs, (at(graph_module, "_3_weight"),))


@damage("node _3_1 reads 3.weight, a site, but no pass has marked it as a use", case="module_conv2d")
def unmarked_call(graph_module: fx.GraphModule) -> None:
    with graph_module.graph.inserting_after(at(graph_module, "_3")):
        graph_module.graph.call_module("3", at(graph_module, "_3").args)


@damage("node conv2d is marked as a use of 9.weight, which is not planned", case="aten_conv2d")
def mark_of_another_weight(graph_module: fx.GraphModule) -> None:
    node = at(graph_module, "conv2d")
    use = use_of(node)
    assert use is not None
    node.meta["lorasc_fx.use"] = replace(use, weight="9.weight")


@damage(*(f"node conv2d{tail}_lora calls a branch, but no pass has inserted any" for tail in ("", "_1", "_2", "_3")))
def lost_fact(graph_module: fx.GraphModule) -> None:
    record = record_of(graph_module)
    set_record(graph_module, replace(record, facts=record.facts - {"branches-inserted"}))


@damage("4.weight has a branch, but the record holds no slow state of it")
def lost_slow_state(graph_module: fx.GraphModule) -> None:
    drop_state(graph_module, "4.weight")


@damage(
    "the graph is malformed: Argument 'conv2d_3' of Node 'conv2d_3_lora' was used before it has been defined! Please"
)
def wrong_order(graph_module: fx.GraphModule) -> None:
    at(graph_module, "conv2d_2_lora").append(at(graph_module, "conv2d_3_lora"))


@damage("branch node conv2d_3_lora does not read the input of conv2d_3")
def argument_too_many(graph_module: fx.GraphModule) -> None:
    node = at(graph_module, "conv2d_3_lora")
    node.args = (*node.args, None)


@damage("branch node conv2d_3_lora does not stand beside the use of a site")
def no_arguments(graph_module: fx.GraphModule) -> None:
    node = at(graph_module, "conv2d_3_lora")
    node.args = ()


# Graph: w0 -> w0_lora -> chunk -> linear ...; w1 -> w1_lora -> slice -> linear


@damage("w0 is used at node w0 with 0 branches instead of one", case="aten_packed")
def removed_branch_on_a_weight(graph_module: fx.GraphModule) -> None:
    branch = at(graph_module, "w0_lora")
    branch.replace_all_uses_with(at(graph_module, "w0"))
    graph_module.graph.erase_node(branch)


@damage(
    "node w1 has a branch, but slice_1 read it without", "branch node w1_lora is read by nobody", case="aten_packed"
)
def stray_reader_of_a_weight(graph_module: fx.GraphModule) -> None:
    node = at(graph_module, "slice_1")
    node.args = (at(graph_module, "w1"), *node.args[1:])


@damage(
    "branch node w1_lora does not stand beside the use of a site",
    "w1 is used at node w1 with 0 branches instead of one",
    case="aten_packed",
)
def branch_behind_a_slice(graph_module: fx.GraphModule) -> None:
    branch, part = at(graph_module, "w1_lora"), at(graph_module, "slice_1")
    part.args = (at(graph_module, "w1"), *part.args[1:])
    part.append(branch)
    part.replace_all_uses_with(branch)
    branch.args = (part,)


@damage("branch node w0_lora does not read the input of w0", case="aten_packed")
def input_of_a_branch_on_a_weight(graph_module: fx.GraphModule) -> None:
    at(graph_module, "w0_lora").args = (at(graph_module, "w0"), at(graph_module, "w1"))


@damage("branch node w0_lora has {'lookup': True}, but w0 has {}", case="aten_packed")
def option_of_a_branch_on_a_weight(graph_module: fx.GraphModule) -> None:
    at(graph_module, "w0_lora").kwargs = {"lookup": True}


@damage("node linear_default reads w0, a site, but no pass has marked it as a use", case="aten_packed")
def second_read_of_a_weight(graph_module: fx.GraphModule) -> None:
    output, base = next(iter(reversed(graph_module.graph.nodes))), at(graph_module, "linear")
    with graph_module.graph.inserting_before(output):
        weight = graph_module.graph.get_attr("w0")
        new = graph_module.graph.call_function(base.target, (base.args[0], weight))
    output.args = ((output.args[0][0], new),)  # type: ignore[index]


@damage("node w1 is marked as a use of w1, but computes with w0", case="aten_packed")
def another_weight_under_a_branch(graph_module: fx.GraphModule) -> None:
    at(graph_module, "w1").target = "w0"


@damage(
    "node linear_1 reads w0, a site, but no pass has marked it as a use",
    "branch node w0_lora does not stand beside the use of a site",
    case="aten_packed",
)
def lost_mark_of_a_weight(graph_module: fx.GraphModule) -> None:
    at(graph_module, "w0").meta.pop("lorasc_fx.use")


@damage("the branch of w0 is turned the other way than its layout, in_out, says", case="aten_products")
def turned_branch(graph_module: fx.GraphModule) -> None:
    branches_of(graph_module)["w0"].transposed = False


@damage("node addmm reads w0 as out_in, planned as in_out", case="aten_products")
def turned_weight(graph_module: fx.GraphModule) -> None:
    base = at(graph_module, "addmm")
    with graph_module.graph.inserting_before(base):
        base.args = (*base.args[:2], graph_module.graph.call_function(torch.ops.aten.t.default, (base.args[2],)))


@damage(
    "branch node embedding_lora has {'lookup': True, 'padding_idx': 1}, but embedding has {'lookup': True}",
    case="aten_lookups",
)
def lost_padding_row(graph_module: fx.GraphModule) -> None:
    base = at(graph_module, "embedding")
    base.args = base.args[:2]


@damage(
    "lora_A of w1 is (3, 3, 5), planned as (3, 3, 4)",
    "lora_B of w1 is (3, 4, 3), planned as (3, 5, 3)",
    case="aten_routed",
)
def turned_experts(graph_module: fx.GraphModule) -> None:
    branch = branches_of(graph_module)["w1"]
    branch.lora_A, branch.lora_B = (
        nn.Parameter(factor.transpose(1, 2).contiguous()) for factor in (branch.lora_B, branch.lora_A)
    )


GROUPED = "transformers::grouped_mm_fallback"


@damage(
    f"branch node grouped_mm_fallback_1_lora has {{'by': {GROUPED!r}}}, but grouped_mm_fallback_1 has "
    f"{{'by': {GROUPED!r}, 'offs': to}}",
    case="aten_grouped",
)
def lost_ends(graph_module: fx.GraphModule) -> None:
    branch = at(graph_module, "grouped_mm_fallback_1_lora")
    branch.kwargs = {"by": branch.kwargs["by"]}


@damage(
    "node grouped_mm_fallback_1 reads w1 as in_out, planned as out_in",
    case="aten_grouped",
)
def experts_read_the_other_way(graph_module: fx.GraphModule) -> None:
    base = at(graph_module, "grouped_mm_fallback_1")
    base.args = (base.args[0], at(graph_module, "w1"), base.args[2])


@damage(
    "node grouped_mm_fallback_1 is a experts, but w1 is planned as a linear",
    case="aten_grouped",
)
def experts_planned_as_a_matrix(graph_module: fx.GraphModule) -> None:
    record = record_of(graph_module)
    assert record.plan is not None
    sites = tuple(replace(site, kind="linear") if site.weight == "w1" else site for site in record.plan.sites)
    set_record(graph_module, replace(record, plan=replace(record.plan, sites=sites)))


def damaged(name: str) -> tuple[fx.GraphModule, list[str]]:
    case_name, harm, told = DAMAGE[name]
    case = BY_NAME[case_name.removesuffix("_live")]
    graph_module = fill(insert(case.live() if case_name.endswith("_live") else case.own(), case.spec))
    assert faults(graph_module) == []
    harm(graph_module)
    return graph_module, told


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told(name: str) -> None:
    graph_module, told = damaged(name)
    found = faults(graph_module)
    missed = [each for each in told if not any(fault.startswith(each) for fault in found)]
    assert missed == [], "\n".join(found)
    with pytest.raises(VerifyError) as raised:
        verify(graph_module, "after the harm")
    assert str(raised.value) == "after the harm, the graph does not agree with its plan:\n  " + "\n  ".join(found)


@pytest.mark.parametrize("name", [name for name in DAMAGE if not name.endswith("in_a_factor")])
def test_a_pass_refuses_a_damaged_graph(name: str) -> None:
    graph_module, told = damaged(name)
    for each in (InsertBranches(),) if name == "lost_fact" else (FoldBranches(), InsertBranches()):
        with pytest.raises(VerifyError) as raised:
            each(graph_module)
        assert told[0] in str(raised.value)


def test_at_least_twenty_five_kinds() -> None:
    assert len(DAMAGE) >= 25


@pytest.mark.parametrize("mode", ["own", "live"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sound_graph_has_no_faults(case: Case, mode: str) -> None:
    graph_module = case.graph(mode)
    assert faults(graph_module) == []
    if case.sites:
        inserted = fill(insert(graph_module, case.spec))
        assert faults(inserted) == []
        assert faults(FoldBranches()(inserted).graph_module) == []


def test_a_branch_that_may_be_left_out_is_no_fault() -> None:
    case = ADAPTABLE[0]
    inserted = insert(case.own(), replace(case.spec, on_nonfinite="skip"))
    next(iter(branches_of(inserted).values())).lora_A.data.fill_(float("nan"))
    assert faults(inserted) == []


def test_every_branch_is_looked_at() -> None:
    """No rule stops at the first site: the same damage at each one is told once for each."""
    inserted = insert(BY_NAME["aten_conv2d"].own(), BY_NAME["aten_conv2d"].spec)
    for branch in branches_of(inserted).values():
        assert isinstance(branch, Branch)
        branch.scale = 0.5
    assert len(faults(inserted)) == len(branch_nodes(inserted)) == 4
