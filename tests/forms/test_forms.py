"""Every spelling of a weight, and models in the style of published code, are the eager model, with a graph and without:
at B = 0, with branches, and released.
"""

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

EVERY = [*(case for case in OPERATORS if case.modes), *ODD]
ROWS = pytest.mark.parametrize("case", EVERY, ids=[case.name for case in EVERY])


def test_rows_have_names_of_their_own() -> None:
    assert len({case.name for case in EVERY}) == len(EVERY) > 140


@ROWS
def test_auto(case: Case) -> None:
    """torch.export takes a row, or it is refused there and adapted without a graph."""
    cascade = check(case, "auto")
    assert cascade.frontend == case.taken_by
    assert [name for name, _ in cascade.refused_frontends] == ([] if case.has_graph else ["export"])


@pytest.mark.parametrize("case", [case for case in EVERY if not case.has_graph], ids=lambda case: case.name)
def test_a_graph_that_is_asked_for_is_made_or_refused(case: Case) -> None:
    with raises(lx.CaptureError, "not-captured", "export"):
        check(case, "export")


OTHER_KINDS = (
    "turned_table",
    "old_spectral_norm_transposed",
    "spectral_norm_conv",
    "generator",
    "experts_sorted_turned",
)
"""Rows with a weight that an eager run takes for another kind or layout than a graph does, by its first op."""
UNSEEN = ("orthogonal_cayley", "control_flow")
"""Rows with a weight that only torch.linalg or a body of torch.cond reads, where an eager run sees no form."""
WITHOUT_A_GRAPH = [case for case in EVERY if case.has_graph and case.name not in (*OTHER_KINDS, *UNSEEN)]


@pytest.mark.parametrize("case", WITHOUT_A_GRAPH, ids=lambda case: case.name)
def test_without_a_graph(case: Case) -> None:
    """A model that could have a graph computes the same eagerly."""
    check(case, "eager")


SAMPLE = [name for entries in LIBRARIES.values() for name in [entry.name for entry in entries][::6]]
"""One architecture of six of each library."""
ARCHITECTURES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SAMPLE if name not in QUICK)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_model_is_its_own_oracle(name: str) -> None:
    assert examine(ZOO[name]).faults == []


def test_the_zoo_is_large_and_told_once() -> None:
    """Enough architectures of each library, from as many source files; each name once."""
    least = {"timm": 60, "torchvision": 15, "transformers": 60}
    assert len(ZOO) == sum(map(len, LIBRARIES.values()))
    for library, entries in LIBRARIES.items():
        assert len({entry.source for entry in entries}) >= least[library]
