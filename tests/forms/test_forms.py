"""Every spelling of a weight, and models in the style of published code, under every front end are the eager model: at
B = 0, with branches, and released; or the front end refuses them in one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lorasc_fx as lx
from benchmarks.coverage.examine import examine
from benchmarks.coverage.zoo import LIBRARIES, QUICK, ZOO
from tests.forms.kit import SPEC, check
from tests.forms.odd_models import ODD
from tests.kit.compare import assert_same, run
from tests.kit.errors import raises
from tests.kit.models import randomize
from tests.kit.operators import OPERATORS
from tests.kit.operators.case import NAMED, Case

pytestmark = pytest.mark.filterwarnings("ignore:q. these quantized weights get no branches")  # whole_numbers

EVERY = [*(case for case in OPERATORS if case.modes), *ODD]
ROWS = pytest.mark.parametrize("case", EVERY, ids=[case.name for case in EVERY])


def test_rows_have_names_of_their_own() -> None:
    assert len({case.name for case in EVERY}) == len(EVERY) > 170


@ROWS
def test_auto(case: Case) -> None:
    """The first front end that takes the row is the one that is used; some front end takes every row."""
    cascade = check(case, "auto")
    first = case.taken_by
    assert cascade.frontend == first
    assert [name for name, _ in cascade.refused_frontends] == list(NAMED[: NAMED.index(first)])


def test_auto_loads_what_it_has_adapted(tmp_path: Path) -> None:
    """Where a symbolic graph calls modules whole, auto adapts by graph breaks, and so does a load."""
    case = next(case for case in ODD if case.name == "adaptive_softmax")
    args, kwargs = case.call()
    cascade = lx.adapt(case.model(), args, kwargs, spec=SPEC)
    randomize(cascade, size=0.1)
    lx.save(cascade, tmp_path)
    again = lx.load(tmp_path, case.model(), args, kwargs)
    assert again.frontend == cascade.frontend == case.taken_by
    assert_same(run(again, case.call()), run(cascade, case.call()))


def pairs() -> list[Any]:
    """Every row under the front ends that test_auto shows neither to take it nor to refuse it.

    A row that is one graph of dynamo is the same graph for export, for dynamo and for the fallback: of each five such
    rows one is taken by dynamo, and another by the fallback; they are among the slow tests.
    """
    found = []
    for index, case in enumerate(EVERY):
        whole, turn = "dynamo" not in case.refuses and case.taken_by != "graph-breaks", index % 5
        for name in NAMED:
            refused = name in case.refuses and NAMED.index(name) < NAMED.index(case.taken_by)
            repeats = whole and name in ("dynamo", "graph-breaks")
            if refused or name == case.taken_by or (repeats and turn != ("dynamo", "graph-breaks").index(name)):
                continue
            slow = name == "dynamo" or repeats
            found.append(pytest.param(case, name, id=f"{name}-{case.name}", marks=[pytest.mark.slow] if slow else []))
    return found


@pytest.mark.parametrize(("case", "name"), pairs())
def test_named(case: Case, name: str) -> None:
    """A front end takes the row as it is, or refuses in one line; the one that auto takes is tested there.

    dynamo gives the graphs that export gives, and takes longer: one mode tells.
    """
    if name in case.refuses:
        with raises(lx.CaptureError, "not-captured", name):
            check(case, name)
    elif name == "symbolic" and case.invisible:
        with raises(lx.passes.NoSites, "no-sites"):
            check(case, name)
    else:
        check(case, name, case.modes[:1] if name == "dynamo" else None)


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
