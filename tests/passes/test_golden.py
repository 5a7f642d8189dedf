"""The text of every case as captured, inserted and folded, as files that people read."""

import pytest

from lorasc_fx.graph import text
from lorasc_fx.passes import FoldBranches
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
    golden(case.name, captured=captured, inserted=text(inserted), folded=text(folded))
    assert text(folded) == captured
