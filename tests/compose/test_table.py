"""Each cell of the table in page.py is true; docs/passes.md is generated from the same rows."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lorasc_fx as lx
from lorasc_fx.graph import record_of, text
from lorasc_fx.passes import FoldBranches, InlineBranches, InsertBranches, MatchSites, Pipeline
from tests.compose import page
from tests.compose.models import SPEC, eager, graph, inputs
from tests.compose.page import ROWS, Refused, Row, Yes, fuse
from tests.kit.models import branches, delta, randomize
from tests.passes.kit import deltas, fill, insert

SLOW = ("PT2E quantization", "ONNX", "Inductor with a pass of yours")
PARAMETRISED = pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.slow if row.name in SLOW else (), id=row.name) for row in ROWS]
)
EFFECT = 1e-3
"""Far more than any tolerance here, so that a lost branch is noticed."""


def run(module: Any, row: Row) -> Tensor:
    with torch.no_grad():
        output = module(*inputs(row.dtype))
    if isinstance(output, tuple):  # passes of torch lose the structure of the outputs
        (output,) = output
    assert isinstance(output, Tensor)
    return output


def plain(row: Row, values: Mapping[str, Tensor] | None = None) -> Any:
    """The model as the pass gets it, with these values."""
    return graph(row.dialect, values, row.dtype)


def composed(row: Row, module: Any) -> Any:
    """Return the result of the pass, which may change the module in place."""
    result = row.run(module, inputs(row.dtype))
    result = getattr(result, "graph_module", result)
    return module if result is None else result


def foreign(row: Row) -> Any:
    """The pass as a function for a Pipeline."""
    return functools.wraps(row.run)(lambda module: row.run(module, inputs(row.dtype)))


def merged(module: Any, added: Mapping[str, Tensor]) -> Any:
    """Write `W + s B A` to the weights of a module."""
    with torch.no_grad():
        for name, value in added.items():
            *path, leaf = name.split(".")
            holder = module.get_submodule(".".join(path))
            weight = getattr(holder, leaf)
            dense = weight.dequantize() if type(weight) is not nn.Parameter else weight
            setattr(holder, leaf, nn.Parameter(dense + value))
    return module


def assert_equal(got: Tensor, expected: Tensor, row: Row) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=row.tolerance * scale)


def expected_result(row: Row, added: Mapping[str, Tensor]) -> Any:
    """The oracle: the same pass on the plain model with `W + s B A` for W."""
    return composed(row, plain(row, dict(merged(eager(row.dtype), added).state_dict())))


def assert_refused(row: Row, cell: Refused, call: Any) -> None:
    with pytest.raises(lx.PassError) as raised:
        call()
    assert cell.message in str(raised.value), str(raised.value)


def train(cascade: lx.Cascade) -> dict[str, Tensor]:
    """Give each branch a random B, and return `s B A` by weight."""
    randomize(cascade)
    pairs = branches(cascade)
    return {s.weight: delta(s, pairs[s.weight].lora_A, pairs[s.weight].lora_B).detach() for s in cascade.sites}


@PARAMETRISED
def test_before(row: Row) -> None:
    result = composed(row, plain(row))
    assert row.did(result)
    without = run(result, row)
    if row.dialect == "eager":
        cascade = lx.adapt(result, inputs(row.dtype), spec=SPEC)
        added, inserted, released = train(cascade), cascade, lambda: cascade.release("dequantize")
    else:
        ours = Pipeline([MatchSites(SPEC), InsertBranches()])
        if isinstance(row.before, Refused):
            assert_refused(row, row.before, lambda: Pipeline([foreign(row), ours])(plain(row)))
            return
        inserted = fill(ours(result).graph_module)
        added, released = deltas(inserted), lambda: FoldBranches()(inserted).graph_module
    assert isinstance(row.before, Yes)
    assert len(added) >= 6
    expected = run(merged(composed(row, plain(row)), added), row)
    assert (expected - without).abs().max() > EFFECT
    assert_equal(run(inserted, row), expected, row)
    folded = released()
    assert row.dialect == "eager" or row.did(folded)
    assert_equal(run(folded, row), expected, row)


@PARAMETRISED
def test_between(row: Row) -> None:
    if row.dialect == "eager":
        row = replace(row, dialect="modules")
    inserted = fill(insert(plain(row), SPEC))
    adapted, before = run(inserted, row), text(inserted)
    if isinstance(row.between, Refused):
        assert_refused(row, row.between, lambda: Pipeline([foreign(row), FoldBranches()])(inserted))
    else:
        assert isinstance(row.between, Yes)
        expected = run(expected_result(row, deltas(inserted)), row)
        assert_equal(adapted, expected, row)
        result = Pipeline([foreign(row)])(inserted).graph_module
        assert row.did(result) or row.run is fuse
        assert_equal(run(result, row), adapted, row)
        folded = FoldBranches()(result).graph_module
        assert row.did(folded) or row.run is fuse
        assert "branches-folded" in record_of(folded).facts
        assert_equal(run(folded, row), expected, row)
    assert text(inserted) == before
    assert torch.equal(run(inserted, row), adapted)


@PARAMETRISED
def test_inlined(row: Row) -> None:
    """The same between `InlineBranches` and the fold. The plain nodes compute the same after every pass."""
    if row.inlined is None:
        assert row.dialect == "eager"
        return
    inserted = fill(insert(plain(row), SPEC))
    adapted, inlined = run(inserted, row), InlineBranches()(inserted).graph_module
    if isinstance(row.inlined, Refused):
        result = composed(row, InlineBranches()(inserted).graph_module)
        assert row.did(result)
        assert_equal(run(result, row), adapted, replace(row, tolerance=row.loss or row.tolerance))
        assert_refused(row, row.inlined, lambda: Pipeline([foreign(row), FoldBranches()])(inlined))
        return
    result = Pipeline([foreign(row)])(inlined).graph_module
    assert row.did(result) or row.run is fuse
    assert_equal(run(result, row), adapted, row)
    folded = FoldBranches()(result).graph_module
    assert row.did(folded) or row.run is fuse
    assert_equal(run(folded, row), run(expected_result(row, deltas(inserted)), row), row)


@PARAMETRISED
def test_after(row: Row) -> None:
    assert isinstance(row.after, Yes)
    model = eager(row.dtype) if row.dialect != "modules" else fx.symbolic_trace(eager(row.dtype))
    cascade = lx.adapt(model, inputs(row.dtype), spec=SPEC)
    added = train(cascade)
    values = dict(merged(eager(row.dtype), added).state_dict())
    if row.dtype != torch.float64:  # a last bit may fall on the other side of a step of the quantizer
        folded = cascade.folded_state_dict()
        for name, value in values.items():
            torch.testing.assert_close(folded[name], value, rtol=1e-6, atol=1e-6)
        values = folded
    expected = run(composed(row, plain(row, values)), row)
    assert (expected - run(plain(row), row)).abs().max() > 5 * EFFECT
    result = composed(row, cascade.folded_graph() if row.dialect != "eager" else cascade.release())
    assert row.did(result)
    assert_equal(run(result, row), expected, row)


def test_the_page_is_made_of_these_rows() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.text(), "run: python -m tests.compose.page"
