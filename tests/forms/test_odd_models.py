"""Models in the style of published code are the eager model, or a front end refuses them in one line."""

from __future__ import annotations

import pytest

import lorasc_fx as lx
from tests.forms.kit import NAMED, Case, check
from tests.forms.odd_models import ODD

ROWS = pytest.mark.parametrize("case", ODD, ids=[case.name for case in ODD])


@ROWS
def test_auto(case: Case) -> None:
    cascade = check(case, "auto")
    assert cascade.frontend == case.taken_by


@ROWS
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "dynamo" else []) for name in NAMED]
)
def test_named(case: Case, name: str) -> None:
    """As for the spellings: exact, or refused; the one that auto takes is tested there."""
    if name in case.refuses:
        with pytest.raises(
            lx.CaptureError,
            match=rf"^no front end takes \w+. Change what is told here, or adapt a part of it:\n  {name}: [^\n]+$",
        ):
            check(case, name)
    elif name == "symbolic" and case.invisible:
        with pytest.raises(lx.passes.NoSites, match=r"opaque-module|mixed-uses"):
            check(case, name)
    elif name != case.taken_by:
        check(case, name, case.modes[:1] if name == "dynamo" else None)
