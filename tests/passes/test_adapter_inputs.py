"""AdapterInputs makes the tensors of branches inputs of the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

import lorasc_fx as lx
from lorasc_fx.passes import (
    AdapterInputs,
    FoldBranches,
    InsertBranches,
    adapter_inputs,
    adapter_values,
)
from tests.branch.test_contract import ROWS, adapted, train
from tests.kit.errors import raises
from tests.kit.models import TwoLayers
from tests.kit.state import oldest_variant
from tests.passes.cases import ADAPTABLE, Case
from tests.passes.kit import Snapshot, assert_close, assert_differ, fill, insert, run, same_bits, sites_of

UNPADDED = ("vera", "miss", "oft", "lokr", "delora")
"""Methods whose delta depends on the rank, so that zeros cannot pad them."""


def call(graph: fx.GraphModule, case: Case, tensors: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return graph(*case.args, **tensors)


def zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in tensors.items()}


def net(**options: Any) -> fx.GraphModule:
    torch.manual_seed(0)
    return fill(insert(fx.symbolic_trace(TwoLayers().double()), lx.CascadeSpec(rank=2, **options)))


@pytest.mark.parametrize("case", ADAPTABLE, ids=str)
def test_lift(case: Case) -> None:
    inserted, base = insert(case.own(), case.spec), run(case.own(), case)
    untrained = same_bits(run(inserted, case), base)  # else eager mode takes another path for the base
    snapshot = Snapshot(fill(inserted))
    rank = max(site.rank for site in sites_of(inserted).values()) + 2
    result = AdapterInputs(rank)(inserted)
    lifted, inputs, values = (
        result.graph_module,
        adapter_inputs(result.graph_module),
        adapter_values(result.graph_module),
    )
    assert result.modified  # 1 truthful
    snapshot.assert_unchanged()
    placeholders = [node.name for node in lifted.graph.nodes if node.op == "placeholder"]
    assert placeholders[-len(inputs) :] == [adapter_input.name for adapter_input in inputs] == [*values]
    assert not [name for name, _ in lifted.named_parameters() if name.startswith("branches")]

    assert_close(call(lifted, case, values), run(inserted, case))  # 2 numerics, and zeros are the base
    nothing = call(lifted, case, zeros(values))
    if not untrained:
        assert_close(nothing, base)
    for got, want in zip(pytree.tree_leaves(nothing), pytree.tree_leaves(base), strict=True) if untrained else ():
        assert got is want or torch.equal(got, want)
    assert_differ(call(lifted, case, values), nothing)

    again = AdapterInputs(rank)(lifted)  # 3 a fixed point
    assert not again.modified
    assert again.graph_module is lifted


@pytest.mark.parametrize(("name", "kind"), [row for row in ROWS if row[1] in ("linear", "conv", "embedding")])
def test_every_method(name: str, kind: str) -> None:
    model, cascade, x = adapted(name, kind)
    train(cascade)
    variant = oldest_variant(cascade)
    assert variant is not None
    assert isinstance(variant.module, fx.GraphModule)
    expected = variant.module(x).detach()
    lifted = AdapterInputs(2 if name in UNPADDED else 4)(variant.module).graph_module
    values = adapter_values(lifted)
    with torch.no_grad():
        torch.testing.assert_close(lifted(x, **values), expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(lifted(x, **zeros(values)), model(x))


def test_names_and_order() -> None:
    inputs = adapter_inputs(AdapterInputs(3)(net()).graph_module)
    assert [(item.name, item.weight, item.tensor, item.shape) for item in inputs] == [
        ("body_weight_lora_a", "body.weight", "lora_A", (3, 5)),
        ("body_weight_lora_b", "body.weight", "lora_B", (7, 3)),
        ("body_weight_scale", "body.weight", "scale", ()),
        ("head_weight_lora_a", "head.weight", "lora_A", (3, 7)),
        ("head_weight_lora_b", "head.weight", "lora_B", (3, 3)),
        ("head_weight_scale", "head.weight", "scale", ()),
    ]
    assert {adapter_input.dtype for adapter_input in inputs} == {torch.float64}


def test_errors() -> None:
    inserted = net()
    for rank in (2.5, 0, "2", None):
        with raises(lx.SpecError, "invalid-value", "adapter-inputs", f"max_rank is {rank!r}"):
            AdapterInputs(rank)  # type: ignore[arg-type]
    with raises(lx.PassError, "rank-too-large", "body.weight", "rank 2", "Give max_rank=2 or more"):
        AdapterInputs(1)(inserted)
    for name in UNPADDED:
        variant = oldest_variant(adapted(name, "linear")[1])
        with raises(lx.PassError, "input-not-supported", "0.weight", name, "rank 4"):
            AdapterInputs(4)(variant.module)
    lifted = AdapterInputs(4)(inserted).graph_module
    for pass_ in (FoldBranches(), AdapterInputs(8), InsertBranches()):
        with raises(lx.PassError, "requirement-not-met", pass_.name):
            pass_(lifted)
