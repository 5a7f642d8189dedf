"""Every public error is exported and is raised by some test, found in the sources of the tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorasc_fx as lx
from lorasc_fx import errors
from tests.errors.catalogue import ENTRIES
from tests.errors.page import PAGE, page
from tests.errors.raises import expected_codes, given_codes, uncoded
from tests.kit.errors import raises

PUBLIC = [name for name in errors.__all__ if isinstance(getattr(errors, name), type)]
CLASSES = [name for name in PUBLIC if not issubclass(getattr(errors, name), Warning)]


def raised_in(source: str) -> Iterator[str]:
    """Names inside the first argument of each `pytest.raises`, and of each `with raises` written in full."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("pytest.raises", "raises", "refuse") and node.args:
            for inside in ast.walk(node.args[0]):
                if isinstance(inside, ast.Name):
                    yield inside.id
                elif isinstance(inside, ast.Attribute):
                    yield inside.attr


def test_every_error_is_exported() -> None:
    assert set(errors.__all__) == {*PUBLIC, "CODES", "listed", "named", "nearest", "path_of", "reason_of", "warn"}
    for name in PUBLIC:
        home = next((module for module in (lx, lx.passes, lx.export) if name in module.__all__), lx.errors)
        assert getattr(home, name) is getattr(errors, name)
    assert {name for name in lx.__all__ if name in PUBLIC} == {
        "LorascError", "SpecError", "UnknownTarget", "CaptureError", "PassError", "StateError", "NonFiniteBranch",
        "CheckpointError",
    }  # fmt: skip
    for name in CLASSES:
        assert issubclass(getattr(errors, name), lx.LorascError)
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert defined == set(PUBLIC)


def test_every_error_is_raised_by_some_test() -> None:
    tests = Path(__file__).parents[1]
    found = {name for path in tests.rglob("test_*.py") for name in raised_in(path.read_text(encoding="utf-8"))}
    assert set(CLASSES) - found == set()


def test_every_code_is_in_the_table_and_used() -> None:
    assert set(given_codes()) == set(errors.CODES)
    assert list(errors.CODES) == sorted(errors.CODES)
    for code in errors.CODES:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code), code


def test_every_code_is_raised_by_some_test() -> None:
    """Found in the sources of the tests."""
    assert not set(errors.CODES) - expected_codes()


def test_no_error_is_without_a_code() -> None:
    assert uncoded() == []


def test_the_catalogue_has_every_error() -> None:
    assert sorted(entry.raised.__name__ for entry in ENTRIES) == sorted(CLASSES)


def test_the_page_is_what_the_calls_raise() -> None:
    """`python -m tests.errors.page` writes it anew."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_an_extra_that_is_missing() -> None:
    from lorasc_fx.util.extras import module_of

    with raises(lx.errors.MissingExtra, "missing-extra", "absent_package", "lorasc-fx[vision]") as caught:
        module_of("vision", "absent_package.part")
    assert isinstance(caught.value, ImportError)


def test_one_root_catches_them_all() -> None:
    with raises(lx.LorascError, "invalid-value", "rank"):
        lx.CascadeSpec(rank=0)
    with pytest.raises(ValueError, match="rank"):
        lx.CascadeSpec(rank=0)
