"""AttentionMasks removes a mask only if it is redundant for all sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lorasc_fx.capture.torch_export import capture_export
from lorasc_fx.graph import text
from lorasc_fx.passes import AttentionMasks
from lorasc_fx.passes.attention_masks import Truth, infer_values
from tests.passes.mask_cases import (
    ALWAYS,
    FRONT_ENDS,
    NEVER,
    SOMETIMES,
    TABLE,
    Masked,
    attention,
    batch,
    same,
    simplified,
)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("name", ALWAYS)
def test_a_redundant_mask_is_removed(name: str, front_end: Any) -> None:
    mask, expected = ALWAYS[name]
    model = Masked(mask).double()
    captured = simplified(model, (batch(2, 5),), by=front_end)
    assert attention(captured.module) == [expected]
    assert captured.conditions.sizes == ((None, None, None),)
    for size, length in ((2, 5), (3, 2), (1, 7), (4, 19)):
        same(captured.module(batch(size, length)), model(batch(size, length)))


@pytest.mark.parametrize("name", SOMETIMES | NEVER)
def test_a_mask_that_matters_at_some_size_is_kept(name: str) -> None:
    model = Masked((SOMETIMES | NEVER)[name]).double()
    captured = simplified(model, (batch(2, 5).abs(),))
    assert attention(captured.module) == ["mask"]
    assert captured.conditions.sizes == ((None, None, None),)
    for length in (5, 9):
        same(captured.module(batch(2, length)), model(batch(2, length)))
        same(captured.module(-batch(2, length)), model(-batch(2, length)))


@pytest.mark.parametrize(("mask", "changes"), [(ALWAYS["tril"][0], True), (SOMETIMES["window"], False)])
def test_the_result_is_truthful(mask: Any, changes: bool) -> None:
    """The input is unchanged, a second run changes nothing, and the pass has a repr."""
    before = capture_export(Masked(mask).double(), (batch(2, 5),), {}).module
    written = text(before)
    result = AttentionMasks()(before)
    assert text(before) == written
    assert (result.modified, result.graph_module is before) == (changes, not changes)
    assert (text(result.graph_module) != written) == changes
    again = AttentionMasks()(result.graph_module)
    assert not again.modified
    assert again.graph_module is result.graph_module


def test_a_mask_from_a_buffer_is_kept() -> None:
    model = Masked(NEVER["buffer"]).double()
    captured, x = simplified(model, (batch(2, 5),)), batch(2, 5)
    before = captured.module(x)
    model.open.fill_(False)
    same(captured.module(x), model(x))
    assert not torch.equal(captured.module(x).nan_to_num(), before)


class Cross(nn.Module):
    """A triangular mask with more keys than queries."""

    def __init__(self, lower: bool) -> None:
        super().__init__()
        self.body, self.lower = nn.Linear(8, 8), lower

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], y.shape[1], dtype=torch.bool)
        return F.scaled_dot_product_attention(self.body(x), y, y, attn_mask=mask.tril() if self.lower else mask)


@pytest.mark.parametrize("lower", [True, False])
def test_more_keys_than_queries(lower: bool) -> None:
    model = Cross(lower).double()
    captured = simplified(model, (batch(2, 5), batch(2, 7)))
    assert attention(captured.module) == ["mask" if lower else "none"]
    for length in (7, 5, 3):
        same(captured.module(batch(2, 5), batch(2, length)), model(batch(2, 5), batch(2, length)))


def predicted(value: Any, shape: torch.Size) -> Tensor:
    """The tensor of this shape that an abstract value describes."""

    def numbers(form: Any) -> Tensor:
        total = torch.full(shape, form.start)
        for axis, slope in form.slopes:
            total = total + slope * torch.arange(shape[axis]).view(-1, *(1,) * (-axis - 1))
        return total

    if not isinstance(value, Truth):
        return numbers(value)
    met = [numbers(form) >= 0 for form in value.conditions]
    return torch.stack([torch.ones(shape, dtype=torch.bool), *met]).all(0)


class Made(nn.Module):
    """Returns a mask without attention."""

    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        mask: Tensor = self.mask(self, x)
        return mask


class Values(fx.Interpreter):
    """Records the value of each node."""

    def run_node(self, n: fx.Node) -> Any:
        self.seen = {**getattr(self, "seen", {}), n: super().run_node(n)}
        return self.seen[n]


def exported(name: str) -> fx.GraphModule:
    program = torch.export.export(Made(TABLE[name]), (batch(2, 5),), dynamic_shapes=({1: torch.export.Dim.AUTO},))
    graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    return graph_module


@pytest.mark.parametrize("name", TABLE)
def test_inferred_values_are_the_computed_ones(name: str) -> None:
    graph_module = exported(name)
    proved = infer_values(graph_module.graph.nodes)
    assert proved or name == "few bits"
    for length in (5, 3, 8):
        values = Values(graph_module)
        values.run(batch(2, length))
        for node, value in proved.items():
            actual = values.seen[node]
            expected = predicted(value, actual.shape)
            assert torch.equal(actual, expected.to(actual.dtype)), (node.format_node(), value)
            assert (actual.dtype is torch.bool) == (expected.dtype is torch.bool)
