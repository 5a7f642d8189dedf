"""What is built and shipped: the list of packages, the wheel, the sdist, and that they work away from the checkout."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def tree(top: Path, name: str) -> dict[str, Path]:
    """Every package at and under `top`, which imports as `name`; links are not followed."""
    found = {name: top}
    for folder in sorted(top.rglob("*")):
        inside = folder.relative_to(top).parts
        if folder.is_dir() and "__pycache__" not in inside and not (top / inside[0]).is_symlink():
            found[".".join((name, *inside))] = folder
    return found


def packages() -> dict[str, Path]:
    return tree(ROOT / "lorasc_fx", "lorasc_fx") | tree(ROOT / "passes", "lorasc_fx.passes")


def test_the_list_of_packages_is_the_tree() -> None:
    with_code = sorted(name for name, folder in packages().items() if any(folder.glob("*.py")))
    assert sorted(SETUPTOOLS["packages"]) == with_code, "mend `packages` in pyproject.toml"


def test_each_package_has_an_init() -> None:
    bare = [
        name
        for name, folder in packages().items()
        if any(folder.glob("*.py")) and not (folder / "__init__.py").exists()
    ]
    assert not bare, f"without __init__.py: {bare}"


def test_passes_is_reached_from_both_sides() -> None:
    assert SETUPTOOLS["package-dir"] == {"lorasc_fx": "lorasc_fx", "lorasc_fx.passes": "passes"}
    link = ROOT / "lorasc_fx" / "passes"
    if link.is_symlink():  # a checkout may be without links: package-dir does for installing
        assert link.readlink().as_posix() == "../passes", "the link has to be relative"


def test_constraints_fit_any_build_of_a_release() -> None:
    """No local label (`+cpu`), no address, no path: exact versions of what the extras need."""
    lines = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    odd = [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin)]
    assert not odd, f"not plain pins: {odd}"
    names = [pin.partition("==")[0] for pin in pins]
    assert names == sorted(set(names))
    project = PYPROJECT["project"]
    extras = [lines for extra, lines in project["optional-dependencies"].items() if extra not in ("all", "docs")]
    wanted = sum(extras, project["dependencies"])
    missing = {re.split(r"[<>=!~ \[;]", line, maxsplit=1)[0] for line in wanted} - set(names)
    assert not missing, f"dependencies without a pin in requirements/constraints.txt: {missing}"


def test_the_extra_all_is_every_extra_of_users() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    (named,) = extras["all"]
    own = Requirement(named)
    assert own.name == PYPROJECT["project"]["name"]
    assert own.extras == set(extras) - {"all", "bench", "demo", "docs", "test"}


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path


def build(source: Path, out: Path, kind: str) -> Path:
    """Run `python -m build` with the setuptools at hand; return the one file that it makes."""
    command = [sys.executable, "-m", "build", kind, "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.iterdir()
    return made


def copy_of_the_source(out: Path) -> Path:
    """The files that a build reads, so that it leaves nothing in the checkout and sees none of its leftovers."""
    skip = shutil.ignore_patterns("__pycache__", "*.py[cod]")
    out.mkdir()
    for name in ("lorasc_fx", "passes"):
        shutil.copytree(ROOT / name, out / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, out / name)
    return out


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    top = tmp_path_factory.mktemp("built")
    source = copy_of_the_source(top / "source")
    return Built(build(source, top / "wheel", "--wheel"), build(source, top / "sdist", "--sdist"))


def code_as_imported() -> set[str]:
    return {
        f"{name.replace('.', '/')}/{path.name}" for name, folder in packages().items() for path in folder.glob("*.py")
    } | {"lorasc_fx/py.typed"}


def test_wheel_holds_the_code_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == code_as_imported()


def test_sdist_holds_passes_and_what_a_build_needs(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        assert not [member.name for member in archive if member.issym()]
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "passes").rglob("*.py")} <= names
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "lorasc_fx/py.typed"} <= names


def test_wheel_works_away_from_the_checkout(built: Built, tmp_path: Path) -> None:
    """In an empty environment that borrows torch and the rest from this one, but not the package."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, str(built.wheel)], check=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # A folder that a .pth adds has its own .pth files left unread, so an editable install of ours is out of sight.
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    away = tmp_path / "away"
    away.mkdir()
    code = "import lorasc_fx, lorasc_fx.passes; print(lorasc_fx.__file__, lorasc_fx.passes.__file__, sep='\\n')"
    done = subprocess.run([python, "-c", code], cwd=away, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [Path(line).parent for line in done.stdout.split()] == [site / "lorasc_fx", site / "lorasc_fx" / "passes"]
    script = tmp_path / "env" / "bin" / "lorasc-fx"
    done = subprocess.run([script, "--help"], cwd=away, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def groups() -> dict[str, list[Requirement]]:
    """The requirements of the core and of each extra, but for `all`, which names others, and `docs`, which no
    test installs.
    """
    project = PYPROJECT["project"]
    named = {"core": project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in named.items() if name not in ("all", "docs")}


def test_the_core_is_three_packages() -> None:
    assert [each.name for each in groups()["core"]] == ["torch", "networkx", "safetensors"]


def test_every_dependency_has_a_lower_bound() -> None:
    for extra, wanted in groups().items():
        for each in wanted:
            operators = {part.operator for part in each.specifier}
            assert ">=" in operators, f"{extra}: {each} has no lower bound"
            assert each.url is None, f"{extra}: {each} comes from an address"
            assert each.specifier.contains(importlib.metadata.version(each.name), prereleases=True)


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


def test_nothing_imports_what_is_not_listed() -> None:
    linked = ROOT / "lorasc_fx" / "passes"
    files = [path for path in (ROOT / "lorasc_fx").rglob("*.py") if linked not in path.parents]
    files += (ROOT / "passes").rglob("*.py")
    listed = {canonicalize_name(each.name) for wanted in groups().values() for each in wanted}
    owners = importlib.metadata.packages_distributions()
    foreign = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imported(path) - set(sys.stdlib_module_names) - {"lorasc_fx", "passes"}
        if not {canonicalize_name(owner) for owner in owners.get(name, ())} & listed
    }
    assert not foreign, f"not in pyproject.toml: {sorted(foreign)}"
