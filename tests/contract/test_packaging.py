"""The list of packages, the wheel, the sdist, the requirements, and that the wheel works without the checkout."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def packages() -> dict[str, Path]:
    """Return the folder of each package by name. Links are not followed."""
    folders = {path.parent for name in ("lorasc_fx", "passes") for path in (ROOT / name).rglob("*.py")}
    folders -= {folder for folder in folders if folder.is_relative_to(ROOT / "lorasc_fx" / "passes")}
    names = {folder: ".".join(folder.relative_to(ROOT).parts) for folder in folders}
    return {name if name.startswith("lorasc_fx") else f"lorasc_fx.{name}": folder for folder, name in names.items()}


def test_the_list_of_packages_is_complete() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages()), "correct `packages` in pyproject.toml"
    assert [name for name, folder in packages().items() if not (folder / "__init__.py").exists()] == []


def test_passes_is_reached_from_both_sides() -> None:
    assert SETUPTOOLS["package-dir"] == {"lorasc_fx": "lorasc_fx", "lorasc_fx.passes": "passes"}
    link = ROOT / "lorasc_fx" / "passes"
    if link.is_symlink():  # a checkout may have no links, because package-dir is enough to install
        assert link.readlink().as_posix() == "../passes", "the link has to be relative"


def test_constraints_fit_any_build_of_a_release() -> None:
    """No local label (`+cpu`), no address, no path: exact versions of what the extras need."""
    lines = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin)] == []
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
    requirement = Requirement(named)
    assert requirement.name == PYPROJECT["project"]["name"]
    assert requirement.extras == set(extras) - {"all", "bench", "demo", "docs", "test"}


def build(source: Path, out: Path) -> Path:
    """Run `python -m build` with the installed setuptools, and return the file that it writes."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.iterdir()
    return file


def copy_of_the_source(out: Path) -> Path:
    """Copy the files that a build reads, so that it writes nothing to the checkout."""
    skip = shutil.ignore_patterns("__pycache__", "*.py[cod]")
    out.mkdir()
    for name in ("lorasc_fx", "passes"):
        shutil.copytree(ROOT / name, out / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, out / name)
    return out


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    return build(copy_of_the_source(folder / "source"), folder / "wheel")


def test_the_wheel_has_the_code_and_nothing_else(wheel: Path) -> None:
    code = {
        f"{name.replace('.', '/')}/{path.name}" for name, folder in packages().items() for path in folder.glob("*.py")
    }
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == code | {"lorasc_fx/py.typed"}


def test_the_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """In an empty environment that reads torch and the other packages from this one, but not lorasc-fx."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, str(wheel)], check=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # Python reads no .pth files in a folder that a .pth file adds, so an editable install of lorasc-fx is not found.
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
    """Return the requirements of the core and of each extra, except `all`, and `docs`, which no test installs."""
    project = PYPROJECT["project"]
    named = {"core": project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in named.items() if name not in ("all", "docs")}


def test_every_dependency_has_a_lower_bound() -> None:
    assert [requirement.name for requirement in groups()["core"]] == ["torch", "networkx", "safetensors"]
    for requirement in (requirement for requirements in groups().values() for requirement in requirements):
        assert ">=" in {part.operator for part in requirement.specifier}, requirement
        assert requirement.url is None, requirement
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)


def imported(path: Path) -> set[str]:
    """Return the top-level names that a file imports anywhere, also by `module_of(extra, name)`."""
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


def test_every_imported_package_is_listed() -> None:
    files = [path for folder in packages().values() for path in folder.glob("*.py")]
    listed = {canonicalize_name(requirement.name) for group in groups().values() for requirement in group}
    owners = importlib.metadata.packages_distributions()
    foreign = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imported(path) - set(sys.stdlib_module_names) - {"lorasc_fx", "passes"}
        if not {canonicalize_name(owner) for owner in owners.get(name, ())} & listed
    }
    assert not foreign, f"not in pyproject.toml: {sorted(foreign)}"
