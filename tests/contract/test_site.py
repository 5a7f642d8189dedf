"""The site: every page and every public name on it, no broken link, no request to another host."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lorasc_fx as lx
from lorasc_fx.cli import config
from lorasc_fx.util.environment import module_of
from tests.contract import site_pages
from tests.contract.test_docs import BLOCK

ROOT = Path(__file__).parents[2]
NAMES = [f"{module}.{name}" for module, members in site_pages.names_by_module().items() for name in members]


def test_every_public_name_has_a_place() -> None:
    """Once; a module that is public itself has a page."""
    assert len(set(NAMES)) == len(NAMES)
    homes = {name.rpartition(".")[2] for name in NAMES}
    for module in (lx, *(module_of("", f"lorasc_fx.{name}") for name in site_pages.MODULES)):
        assert set(module.__all__) - homes <= {*site_pages.MODULES, "integrations"}, module.__name__
    for name in NAMES:
        module, _, member = name.rpartition(".")
        assert hasattr(module_of("", module), member), name
    assert {"lorasc_fx.adapt", "lorasc_fx.integrations.transformers.CascadeCallback"} <= set(NAMES)
    assert [name.removeprefix("lorasc_fx.") for name in NAMES[:4]] == [*site_pages.FIRST]


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set(re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")} | set(site_pages.pages())


def test_every_key_of_the_configuration_is_documented() -> None:
    rows = re.findall(
        r"^## \[(\w+)\]|^\| `(\w+)` \| `([^`]*)` \| `([^`]*)` \| (.+) \|$", site_pages.keys(), re.MULTILINE
    )
    documented, table = [], ""
    for head, key, *_, meaning in rows:
        table = head or table
        if key:
            documented.append((table, key))
            assert len(meaning) > 10, key
    kinds = {table: getattr(config, kind) for kind, table in site_pages.TABLES.items()}
    keys = [(table, field.name) for table, kind in kinds.items() for field in dataclasses.fields(kind)]
    assert documented == [("", "output"), *keys]
    assert {field.name for field in dataclasses.fields(config.Config)} == {"output", *kinds, "train", "spec"}


def test_each_page_with_code_is_a_notebook() -> None:
    """Its cells are the text of the page and the blocks that test_docs.py runs, in this order."""
    notebooks = {Path(path).stem: json.loads(text)["cells"] for path, text in site_pages.notebooks().items()}
    assert {"adapt", "export", "from-peft", "llm", "method", "passes", "quantized"} <= set(notebooks)
    for name, cells in notebooks.items():
        page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        code, text = (
            ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind] for kind in ("code", "markdown")
        )
        assert [f"{cell}\n" for cell in code] == [block[1] for block in BLOCK.finditer(page)]
        plain = re.sub(r"!?\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", BLOCK.sub("", page))
        assert " ".join(text).split() == plain.split()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="make site installs what builds it")
def test_the_site_is_built(tmp_path: Path) -> None:
    """A broken link or anchor, or a missing page, is an error."""
    nbformat = pytest.importorskip("nbformat")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    anchors = {anchor for page in pages.values() for anchor in re.findall(r'id="(lorasc_fx\.[\w.]+)"', page)}
    assert not set(NAMES) - anchors
    for name, text in site_pages.notebooks().items():
        assert (tmp_path / name).read_text(encoding="utf-8") == text
        assert f'href="{name}"' in (tmp_path / f"{Path(name).stem}.html").read_text(encoding="utf-8")
        nbformat.validate(nbformat.reads(text, as_version=4))
    assert (tmp_path / "search" / "search_index.js").is_file()  # which a page reads without a server
    request = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"')
    assert {url for page in pages.values() for url in request.findall(page)} == set()
