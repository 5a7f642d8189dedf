"""The text of every graph after capture, insertion and fold, and with other placements, equals its golden file."""

from dataclasses import replace

import pytest

from lorasc_fx.graph import text
from lorasc_fx.passes import FoldBranches, ShareInputs
from tests.passes.cases import CASES, Case
from tests.passes.kit import golden, insert


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case: Case) -> None:
    graph_module = case.own()
    captured = text(graph_module)
    if not case.sites:
        golden(case.name, captured=captured)
        return
    inserted = insert(graph_module, case.spec)
    folded = FoldBranches()(inserted).graph_module
    merged = insert(graph_module, replace(case.spec, placement="merged"))
    shared = ShareInputs()(inserted).graph_module
    others = {"merged": text(merged), "shared": text(shared)}
    differ = {title: body for title, body in others.items() if body != text(inserted)}
    golden(case.name, captured=captured, inserted=text(inserted), folded=text(folded), **differ)
    assert text(folded) == captured
