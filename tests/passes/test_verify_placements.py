"""The verifier on merged branches, shared inputs, plans and slow states: more kinds of damage, each told by name.

And whatever is done to the arguments of a graph, the verifier tells faults; it raises nothing of its own.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from lorasc_fx import Plan
from lorasc_fx.graph import branch_nodes, faults, record_of, set_record, use_of, verify
from lorasc_fx.passes import InsertBranches, MatchSites, Pipeline, ShareInputs, StageTransition, VerifyError
from tests.kit.state import change_state, weight_state, weight_states
from tests.passes.cases import ADAPTABLE, BY_NAME, Case
from tests.passes.kit import branches_of, fill, insert
from tests.passes.test_placements import SHARED, attention, merged_graph
from tests.passes.test_verify import DAMAGE as OTHERS
from tests.passes.test_verify import at

Harm = Callable[[fx.GraphModule], None]
DAMAGE: dict[str, tuple[Callable[[], fx.GraphModule], Harm, list[str]]] = {}


def damage(make: Callable[[], fx.GraphModule], *told: str) -> Callable[[Harm], None]:
    """Register a way to damage a graph, and what the verifier has to say of it, among more."""

    def register(harm: Harm) -> None:
        DAMAGE[harm.__name__] = (make, harm, list(told))

    return register


def merged() -> fx.GraphModule:
    return fill(merged_graph())


def shared() -> fx.GraphModule:
    return fill(Pipeline([MatchSites(SHARED), InsertBranches(), ShareInputs()])(attention("export")).graph_module)


def inserted() -> fx.GraphModule:
    return fill(insert(BY_NAME["aten_linear"].own(), BY_NAME["aten_linear"].spec))


def packed() -> fx.GraphModule:
    return fill(insert(BY_NAME["aten_slices"].own(), BY_NAME["aten_slices"].spec))


def in_stage_two() -> fx.GraphModule:
    """Each weight has one expert."""
    case = BY_NAME["aten_conv2d"]
    spec = replace(case.spec, rank=1)
    return fill(StageTransition()(fill(insert(case.own(), spec))).graph_module)


# ---- merged: %linear_lora = branches.q/weight(%relu, %q_weight, %q_bias, op='linear')


@damage(merged, "branch node linear_lora stands in place of an op that is no use of a site")
def merged_without_its_bias(graph_module: fx.GraphModule) -> None:
    node = at(graph_module, "linear_lora")
    node.args = node.args[:2]


@damage(merged, "branch node linear_lora stands in place of an op that is no use of a site")
def merged_without_its_weight(graph_module: fx.GraphModule) -> None:
    node = at(graph_module, "linear_lora")
    node.args = node.args[:1]


@damage(merged, "branch node linear_lora stands in place of an op that is no use of a site")
def merged_with_an_argument_too_many(graph_module: fx.GraphModule) -> None:
    node = at(graph_module, "linear_lora")
    node.args = (*node.args, node.args[0])


@damage(merged, "node linear_lora is marked as a use of q.weight, but computes with k.weight")
def merged_with_another_weight(graph_module: fx.GraphModule) -> None:
    node, other = at(graph_module, "linear_lora"), at(graph_module, "linear_1_lora")
    node.args = (node.args[0], other.args[1], *node.args[2:])


@damage(merged, "branch node linear_lora has {'op': 'matmul'}, but linear has {}")
def merged_into_another_product(graph_module: fx.GraphModule) -> None:
    at(graph_module, "linear_lora").kwargs = {"op": "matmul"}


@damage(merged, "branch node linear_lora computes with q.weight, but calls branches.k/weight")
def merged_branch_of_another_site(graph_module: fx.GraphModule) -> None:
    at(graph_module, "linear_lora").target = "branches.k/weight"


@damage(merged, "branch node linear_lora does not stand beside the use of a site")
def merged_without_its_spelling(graph_module: fx.GraphModule) -> None:
    at(graph_module, "linear_lora").meta.pop("lorasc_fx.replaced_call")


@damage(merged, "branch node linear_lora stands in place of an op that is no use of a site")
def merged_without_its_mark(graph_module: fx.GraphModule) -> None:
    at(graph_module, "linear_lora").meta.pop("lorasc_fx.use")


@damage(merged, "node linear_lora stands in place of linear, but no pass has marked it so")
def merged_marked_as_beside(graph_module: fx.GraphModule) -> None:
    node = at(graph_module, "linear_lora")
    use = use_of(node)
    assert use is not None
    node.meta["lorasc_fx.use"] = replace(use, merged=False)


@damage(merged, "branch node linear_lora was made by no pass of ours")
def merged_without_its_stamp(graph_module: fx.GraphModule) -> None:
    at(graph_module, "linear_lora").meta.pop("lorasc_fx.made_by")


@damage(merged, "branch node linear_lora is said to be ('(3, 8, 9)', torch.float64), but q.weight has 4 outputs")
def merged_with_wrong_metadata(graph_module: fx.GraphModule) -> None:
    at(graph_module, "linear_lora").meta["val"] = torch.empty(3, 8, 9, dtype=torch.float64, device="meta")


@damage(merged, "branch node linear_3_lora is read by nobody")
def merged_and_read_by_nobody(graph_module: fx.GraphModule) -> None:
    node = at(graph_module, "linear_3_lora")
    node.replace_all_uses_with(node.args[0])


@damage(merged, "node linear_lora is merged with the branch of q.weight, planned beside")
def merged_and_planned_beside(graph_module: fx.GraphModule) -> None:
    planned(graph_module, "q.weight", placement="beside")


# ---- shared: %relu_shared_0 = shared_down(%relu, (q.A, k.A, v.A))[0]; branches.q(%linear, %relu_shared_0, shared=True)


def parts(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.name.startswith("relu_shared_")]


@damage(
    shared,
    "branch node linear_lora gets what the lora_A of k/weight makes, not its own",
    "branch node linear_1_lora gets what the lora_A of q/weight makes, not its own",
)
def shared_parts_swapped(graph_module: fx.GraphModule) -> None:
    first, second = parts(graph_module)[:2]
    first.args, second.args = second.args, first.args


@damage(shared, "branch node linear_lora does not read the input of linear")
def shared_product_of_another_input(graph_module: fx.GraphModule) -> None:
    group = at(graph_module, "relu_shared")
    group.args = (group.args[0].args[0], *group.args[1:])


@damage(shared, "branch node linear_lora gets what the lora_A of k/weight makes, not its own")
def shared_factor_of_another(graph_module: fx.GraphModule) -> None:
    group = at(graph_module, "relu_shared")
    x, (_, second, third) = group.args
    group.args = (x, (second, second, third))


@damage(shared, "branch node linear_2_lora does not read the input of linear_2")
def shared_factor_missing(graph_module: fx.GraphModule) -> None:
    group = at(graph_module, "relu_shared")
    group.args = (group.args[0], group.args[1][:2])


@damage(shared, "branch node linear_lora does not read the input of linear")
def shared_part_out_of_range(graph_module: fx.GraphModule) -> None:
    first = parts(graph_module)[0]
    first.args = (first.args[0], 7)


@damage(shared, "branch node linear_lora does not read the input of linear")
def node_between_a_shared_product_and_its_branch(graph_module: fx.GraphModule) -> None:
    first = parts(graph_module)[0]
    with graph_module.graph.inserting_after(first):
        between = graph_module.graph.call_function(torch.relu, (first,))
    branch = at(graph_module, "linear_lora")
    branch.args = (branch.args[0], between)


@damage(shared, "branch node linear_lora does not read the input of linear")
def shared_option_lost(graph_module: fx.GraphModule) -> None:
    at(graph_module, "linear_lora").kwargs = {}


@damage(shared, "node relu_shared_0 was made by share-inputs for a branch, and is read by nobody")
def shared_part_left_over(graph_module: fx.GraphModule) -> None:
    branch = at(graph_module, "linear_lora")
    branch.args, branch.kwargs = (branch.args[0], at(graph_module, "relu")), {}


@damage(shared, "the graph is malformed: ")
def shared_product_after_its_branch(graph_module: fx.GraphModule) -> None:
    at(graph_module, "linear_lora").append(parts(graph_module)[0])


# ---- the plan


def planned(graph_module: fx.GraphModule, weight: str, **changes: Any) -> None:
    """Let the plan say something else of a site."""
    record = record_of(graph_module)
    assert record.plan is not None
    sites = tuple(replace(site, **changes) if site.weight == weight else site for site in record.plan.sites)
    set_record(graph_module, replace(record, plan=replace(record.plan, sites=sites)))


def planned_sites(graph_module: fx.GraphModule, change: Callable[[Plan], Plan | None]) -> None:
    record = record_of(graph_module)
    assert record.plan is not None
    set_record(graph_module, replace(record, plan=change(record.plan)))


@damage(
    inserted,
    "node linear is marked as a use of 0.weight, which is not planned",
    "branch node linear_lora stands beside 0.weight, but calls branches.0/weight",
    "branch 0/weight belongs to no planned site",
)
def site_taken_from_the_plan(graph_module: fx.GraphModule) -> None:
    planned_sites(graph_module, lambda plan: replace(plan, sites=plan.sites[1:]))


@damage(inserted, "0.weight is planned twice")
def site_planned_twice(graph_module: fx.GraphModule) -> None:
    planned_sites(graph_module, lambda plan: replace(plan, sites=(plan.sites[0], *plan.sites)))


@damage(inserted, "node linear is marked as a use of 0.weight, which is not planned")
def plan_lost(graph_module: fx.GraphModule) -> None:
    planned_sites(graph_module, lambda plan: None)


@damage(inserted, "the plan is in stage 0; the first one is 1")
def plan_before_its_first_stage(graph_module: fx.GraphModule) -> None:
    planned_sites(graph_module, lambda plan: replace(plan, stage=0))


@damage(inserted, "lora_A of 0.weight is (3, 5), planned as (4, 5)", "lora_B of 0.weight is (7, 3), planned as (7, 4)")
def plan_of_another_rank(graph_module: fx.GraphModule) -> None:
    planned(graph_module, "0.weight", rank=4)


@damage(inserted, "the branch of 0.weight has scale 1.6666666666666667, planned as 3.0")
def plan_of_another_lora_alpha(graph_module: fx.GraphModule) -> None:
    planned(graph_module, "0.weight", lora_alpha=9.0)


@damage(inserted, "the branch of 0.weight has scale 1.6666666666666667, planned as 2.886751345948129")
def plan_of_another_scaling(graph_module: fx.GraphModule) -> None:
    planned(graph_module, "0.weight", use_rslora=True)


@damage(
    inserted,
    "node linear reads 0.weight as out_in, planned as in_out",
    "the branch of 0.weight is turned the other way than its layout, in_out, says",
)
def plan_of_another_layout(graph_module: fx.GraphModule) -> None:
    planned(graph_module, "0.weight", layout="in_out")


@damage(inserted, "node linear is a linear, but 0.weight is planned as a conv")
def plan_of_another_kind(graph_module: fx.GraphModule) -> None:
    planned(graph_module, "0.weight", kind="conv")


@damage(inserted, "0.weight is tied to (), planned with ('2.weight',)")
def plan_of_another_tie(graph_module: fx.GraphModule) -> None:
    planned(graph_module, "0.weight", aliases=("2.weight",))


@damage(inserted, "the branch of 0.weight has dropout 0.0, planned as 0.25")
def plan_of_another_dropout(graph_module: fx.GraphModule) -> None:
    planned(graph_module, "0.weight", dropout=0.25)


@damage(inserted, "3.weight is planned, but the model has no weight of this name")
def plan_of_an_unknown_weight(graph_module: fx.GraphModule) -> None:
    planned_sites(graph_module, lambda plan: plan.with_sites((replace(plan.sites[0], weight="3.weight"),)))


@damage(packed, "the branch of w0 has parts (2, 4, 6), planned as (4, 2, 6)")
def plan_of_other_parts(graph_module: fx.GraphModule) -> None:
    planned(graph_module, "w0", parts=(4, 2, 6))


# ---- branches and slow states


@damage(inserted, "the branch of 0.weight has weight_name 2.weight, planned as 0.weight")
def branch_of_another_name(graph_module: fx.GraphModule) -> None:
    branches_of(graph_module)["0.weight"].weight_name = "2.weight"


@damage(inserted, "the branch of 0.weight has dropout 0.5, planned as 0.0")
def branch_with_dropout(graph_module: fx.GraphModule) -> None:
    branches_of(graph_module)["0.weight"].dropout = 0.5


@damage(in_stage_two, "the slow state of 0.weight holds inf or nan")
def expert_that_is_not_finite(graph_module: fx.GraphModule) -> None:
    (expert,) = weight_state(graph_module, "0.weight").experts
    change_state(graph_module, "0.weight", experts=(expert._replace(b=expert.b / 0),))


@damage(in_stage_two, "the slow state of 0.weight holds inf or nan")
def coefficient_that_is_not_finite(graph_module: fx.GraphModule) -> None:
    change_state(graph_module, "0.weight", slow=(float("nan"),))


@damage(in_stage_two, "the slow state of 0.weight has 1 experts, but 2 slow and 1 start coefficients")
def coefficient_too_many(graph_module: fx.GraphModule) -> None:
    change_state(graph_module, "0.weight", slow=(0.5, 0.5))


@damage(
    in_stage_two,
    "the slow state of 0.weight has an expert of stage 1 of (1, 6) and (24, 1), which is no delta of (6, 24)",
)
def expert_turned_around(graph_module: fx.GraphModule) -> None:
    (expert,) = weight_state(graph_module, "0.weight").experts
    change_state(graph_module, "0.weight", experts=(expert._replace(b=expert.b.t(), a=expert.a.t()),))


@damage(in_stage_two, "the slow state of 0.weight has a dense delta of (24, 6), which is none of (6, 24)")
def dense_delta_turned_around(graph_module: fx.GraphModule) -> None:
    change_state(graph_module, "0.weight", dense_slow=torch.zeros(24, 6))


def damaged(name: str) -> tuple[fx.GraphModule, list[str]]:
    make, harm, told = DAMAGE[name]
    graph_module = make()
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


def test_many_kinds() -> None:
    assert not DAMAGE.keys() & OTHERS.keys()
    assert len(DAMAGE) + len(OTHERS) >= 80


def test_slow_states_of_a_second_stage_are_sound() -> None:
    experts = {name: state.experts for name, state in weight_states(in_stage_two()).items()}
    assert any(experts.values())


@pytest.mark.parametrize("placement", ["auto", "merged", "weight"])
@pytest.mark.parametrize("case", ADAPTABLE[::3], ids=str)
def test_whatever_is_done_to_arguments_is_answered_by_sentences(case: Case, placement: str) -> None:
    """The last argument taken away, another node put in, None put in, at every node near a branch."""
    source = random.Random(case.name + placement)
    graph_module = insert(case.own(), replace(case.spec, placement=placement))
    near = {each for node in branch_nodes(graph_module) for each in (node, *node.all_input_nodes, *node.users)}
    nodes = list(graph_module.graph.nodes)
    told = 0
    for node in nodes:
        if node not in near or node.op in ("placeholder", "output"):
            continue
        args, kwargs = node.args, node.kwargs
        places = [place for place, each in enumerate(args) if isinstance(each, fx.Node)]
        tries: list[tuple[Any, ...]] = [args[:-1], (), (*args, None)]
        for place in places:
            for other in (None, 3, source.choice(nodes[: nodes.index(node)] or nodes)):
                tries.append((*args[:place], other, *args[place + 1 :]))
        for each in tries:
            node.args = each
            told += bool(faults(graph_module))
            node.args, node.kwargs = args, kwargs
        if node.op == "call_function" and node.target is not operator.getitem:
            target, node.target = node.target, torch.relu
            told += bool(faults(graph_module))
            node.target = target
    assert told
    assert faults(graph_module) == []
