"""Every code that the sources give to an error or a warning, and every code that the tests expect.

Found in the sources, so that a code without a test is seen whichever tests ran.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from lorasc_fx import errors

ROOT = Path(__file__).parents[2]
CLASSES = [name for name in errors.__all__ if isinstance(getattr(errors, name), type)]


def sources() -> Iterator[tuple[Path, ast.Module]]:
    """The package's files."""
    for room in ("lorasc_fx", "passes"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if not path.is_relative_to(ROOT / "lorasc_fx" / "passes"):  # the link to the other folder
                yield path, ast.parse(path.read_text(encoding="utf-8"))


def code_of(call: ast.Call) -> ast.expr | None:
    """The code that a call gives: of an error as a keyword, of a warning or of `refusing` as an argument; or None."""
    name = ast.unparse(call.func).rpartition(".")[2]
    given = next((keyword.value for keyword in call.keywords if keyword.arg == "code"), None)
    if name in CLASSES or given is not None:
        return given
    if name == "warn" and len(call.args) == 2:
        return call.args[1]
    if name == "refusing" and len(call.args) == 3:
        return call.args[2]
    return call.args[0] if name == "once" and len(call.args) == 2 else None


def given_codes() -> dict[str, list[str]]:
    """The places that give each code: calls, and classes with a default."""
    places: dict[str, list[str]] = {}
    for path, tree in sources():
        for node in ast.walk(tree):
            code = None
            if isinstance(node, ast.Call):
                code = code_of(node)
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "code":
                code = node.value
            for part in (code.body, code.orelse) if isinstance(code, ast.IfExp) else (code,):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    places.setdefault(part.value, []).append(f"{path.relative_to(ROOT).as_posix()}:{node.lineno}")
    return places


def uncoded() -> list[str]:
    """The places that make an error of a class without a default code, and give none."""
    return [
        f"{path.relative_to(ROOT).as_posix()}:{node.lineno}"
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(getattr(errors, ast.unparse(node.func), None), "code", None) == ""
        and code_of(node) is None
    ]


def expected_codes(tests: Path = ROOT / "tests") -> set[str]:
    """The strings of the tests that are codes, without prose."""
    codes: set[str] = set()
    for path in sorted(set(tests.rglob("*.py")) - {Path(__file__)}):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node.value in errors.CODES
                and id(node) not in prose
            ):
                codes.add(node.value)
    return codes
