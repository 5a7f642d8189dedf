"""Each operator, and models in the style of published code, equal the eager model, with a graph and without."""

from __future__ import annotations

import pytest

import lorasc_fx as lx
from benchmarks.coverage.examine import examine
from benchmarks.coverage.zoo import LIBRARIES, QUICK, ZOO
from tests.forms.kit import check
from tests.forms.odd_models import ODD
from tests.kit.errors import raises
from tests.kit.operators import OPERATORS
from tests.kit.operators.case import Case

pytestmark = pytest.mark.filterwarnings("ignore:q. these quantized weights get no branches")  # whole_numbers

ALL = [*(case for case in OPERATORS if case.modes), *ODD]
ROWS = pytest.mark.parametrize("case", ALL, ids=[case.name for case in ALL])


def test_names_are_unique() -> None:
    assert len({case.name for case in ALL}) == len(ALL) > 130


@ROWS
def test_auto(case: Case) -> None:
    """torch.export captures a case, or refuses it, and it is adapted without a graph."""
    cascade = check(case, "auto")
    assert cascade.frontend == case.taken_by
    assert [name for name, _ in cascade.refused_frontends] == ([] if case.has_graph else ["export"])


@pytest.mark.parametrize("case", [case for case in ALL if not case.has_graph], ids=lambda case: case.name)
def test_a_case_without_a_graph_is_refused_by_export(case: Case) -> None:
    with raises(lx.CaptureError, "not-captured", "export"):
        check(case, "export")


OTHER_KINDS = (
    "turned_table",
    "old_spectral_norm_transposed",
    "spectral_norm_conv",
    "generator",
    "experts_sorted_turned",
)
"""Cases with a weight whose kind or layout in an eager run, from its first op, differs from the graph."""
UNSEEN = ("orthogonal_cayley", "control_flow")
"""Cases with a weight that only torch.linalg or a body of torch.cond reads, so that an eager run finds no form."""
WITHOUT_A_GRAPH = [case for case in ALL if case.has_graph and case.name not in (*OTHER_KINDS, *UNSEEN)]


@pytest.mark.parametrize("case", WITHOUT_A_GRAPH, ids=lambda case: case.name)
def test_without_a_graph(case: Case) -> None:
    """A model that could have a graph computes the same eagerly."""
    check(case, "eager")


SAMPLE = [name for entries in LIBRARIES.values() for name in [entry.name for entry in entries][::16]]
"""One architecture of sixteen of each library."""
ARCHITECTURES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SAMPLE if name not in QUICK)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_model_is_its_own_oracle(name: str) -> None:
    examine(ZOO[name])
