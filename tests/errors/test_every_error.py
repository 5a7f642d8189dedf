"""Every public error is exported and on the page; every code has a test, found in the sources of the tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import lorasc_fx as lx
from lorasc_fx import errors
from tests.errors import page
from tests.kit.errors import raises

ROOT = Path(__file__).parents[2]
PUBLIC = [name for name in errors.__all__ if isinstance(getattr(errors, name), type)]
TABLES = (Path(page.__file__), ROOT / "lorasc_fx" / "errors.py")
"""The files that list all codes."""
CLASSES = [name for name in PUBLIC if not issubclass(getattr(errors, name), Warning)]


def trees(*folders: str) -> Iterator[ast.Module]:
    """Yield the source files of folders of the repository. The link to `passes` is not followed."""
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            if not path.is_relative_to(ROOT / "lorasc_fx" / "passes") and path not in TABLES:
                yield ast.parse(path.read_text(encoding="utf-8"))


def strings(node: ast.AST) -> set[str]:
    """Return the strings in a part of a program, without docstrings."""
    prose = {id(part.value) for part in ast.walk(node) if isinstance(part, ast.Expr)}
    constants = (part for part in ast.walk(node) if isinstance(part, ast.Constant) and id(part) not in prose)
    return {constant.value for constant in constants if isinstance(constant.value, str)}


def codes_of(call: ast.Call) -> list[ast.expr]:
    """Return the code that a call gives: the keyword `code`, or an argument of a function that takes a code."""
    name = ast.unparse(call.func).rpartition(".")[2]
    position, count = {"warn": (1, 2), "refusing": (2, 3), "once": (0, 2)}.get(name, (0, -1))
    named = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
    return named or ([call.args[position]] if len(call.args) == count else [])


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


def test_every_code_is_in_the_table_and_used() -> None:
    calls = [node for tree in trees("lorasc_fx", "passes") for node in ast.walk(tree) if isinstance(node, ast.Call)]
    defaults = {getattr(errors, name).code for name in CLASSES} - {""}
    codes = {code for call in calls for part in codes_of(call) for code in strings(part)}
    assert codes | defaults <= set(errors.CODES)
    assert set(errors.CODES) <= defaults | {text for tree in trees("lorasc_fx", "passes") for text in strings(tree)}
    assert list(errors.CODES) == sorted(errors.CODES)
    for code in errors.CODES:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code), code
    uncoded = [name for name in CLASSES if not getattr(errors, name).code]
    assert all(codes_of(call) for call in calls if ast.unparse(call.func).rpartition(".")[2] in uncoded)


def test_every_code_is_raised_by_some_test() -> None:
    assert set(errors.CODES) <= {text for tree in trees("tests") for text in strings(tree)}


def test_the_page_has_every_error_and_every_code() -> None:
    """`python -m tests.errors.page` writes it."""
    assert sorted(page.CLASSES) == sorted({*CLASSES} - {"LorascError"})
    assert sorted(" ".join(page.TASKS.values()).split()) == sorted(errors.CODES)
    assert page.PAGE.read_text(encoding="utf-8") == page.page()


def test_an_extra_that_is_missing() -> None:
    from lorasc_fx.util.environment import module_of

    with raises(lx.errors.MissingExtra, "missing-extra", "absent_package", "lorasc-fx[vision]") as caught:
        module_of("vision", "absent_package.part")
    assert isinstance(caught.value, ImportError)
