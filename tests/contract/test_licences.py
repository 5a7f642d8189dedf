"""Few dependencies, each with a lower bound and a licence that is told; nothing imports what is not listed."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from pathlib import Path

from packaging.utils import canonicalize_name

from tests.contract.licences import PAGE, ROOT, groups, licence, page, pinned

FREE = (
    "MIT",
    "BSD",
    "Apache",
    "PSF",
    "Python Software Foundation",
    "MPL",
    "Mozilla",
    "ISC",
    "Unlicense",
    "HPND",
    "CNRI",
)


def test_the_page_is_what_the_packages_say() -> None:
    told = "requirements/licences.md is out of date: python -m tests.contract.licences"
    assert PAGE.read_text(encoding="utf-8") == page(), told


def test_the_core_is_three_packages() -> None:
    assert [each.name for each in groups()["core"]] == ["torch", "networkx", "safetensors"]


def test_every_dependency_has_a_lower_bound() -> None:
    for extra, wanted in groups().items():
        for each in wanted:
            operators = {part.operator for part in each.specifier}
            assert ">=" in operators, f"{extra}: {each} has no lower bound"
            assert each.url is None, f"{extra}: {each} comes from an address"
            assert each.specifier.contains(importlib.metadata.version(each.name), prereleases=True)


def test_every_licence_lets_it_be_used() -> None:
    """None of the core and of what it needs asks more than to be named; those of others are for the reader."""
    for each in groups()["core"]:
        assert any(word in licence(each.name) for word in FREE), f"{each.name}: {licence(each.name)}"
    assert all(licence(name) for name in pinned())


def imported(path: Path) -> set[str]:
    """Top-level names of all that a file imports, wherever in it; modules named in `module_of(extra, name)` too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=aliases):
                names |= {alias.name.partition(".")[0] for alias in aliases}
            case ast.ImportFrom(module=str(module), level=0):
                names.add(module.partition(".")[0])
            case ast.Call(func=ast.Name(id="module_of"), args=[_, ast.Constant(value=str(module))]):
                names.add(module.partition(".")[0])
    return names


OF_USERS = ("lightning",)
"""No extra has it: who trains by its Trainer has it."""


def test_nothing_imports_what_is_not_listed() -> None:
    linked = ROOT / "lorasc_fx" / "passes"
    files = [path for path in (ROOT / "lorasc_fx").rglob("*.py") if linked not in path.parents]
    files += (ROOT / "passes").rglob("*.py")
    listed = {canonicalize_name(each.name) for wanted in groups().values() for each in wanted}
    owners = importlib.metadata.packages_distributions()
    foreign = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imported(path) - set(sys.stdlib_module_names) - {"lorasc_fx", "passes", *OF_USERS}
        if not {canonicalize_name(owner) for owner in owners.get(name, ())} & listed
    }
    assert not foreign, f"not in pyproject.toml: {sorted(foreign)}"
