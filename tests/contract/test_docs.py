"""Documentation runs: the python blocks of each page, in order, as one program in an empty folder.

They are the cells of the page's notebook (test_site.py).
"""

import re
import runpy  # noqa: TID251 - the blocks of our own pages
from pathlib import Path

import pytest

from tests.conftest import SAMPLED
from tests.contract.site_pages import BLOCK

ROOT = Path(__file__).parents[2]
PAGES = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if path.exists()
]


def program(page: str) -> str:
    """The page with all but its python blocks blanked, so that a traceback's lines are the page's own."""
    lines = [""] * (page.count("\n") + 1)
    for block in BLOCK.finditer(page):
        first = page.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")  # peft's and TRL's
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = program(page.read_text(encoding="utf-8"))
    if not code.strip():
        return  # prose only
    script = tmp_path / f"{page.stem}.py"
    script.write_text(code, encoding="utf-8")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    runpy.run_path(str(script), run_name="__main__")


def test_lines_of_a_program_are_those_of_its_page() -> None:
    page = "# title\n\n```python\na = 1\n```\ntext\n```python\nb = 2\n```\n"
    assert program(page).splitlines()[3] == "a = 1"
    assert program(page).splitlines()[7] == "b = 2"


LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link).resolve() for link in LINK.findall(index.read_text(encoding="utf-8"))}
    assert {page for page in PAGES if page.parent == index.parent} - linked == {index}


def test_the_readme_is_a_front_page() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 120


def test_the_documentation_is_no_book() -> None:
    assert sum(page.stat().st_size for page in (ROOT / "docs").glob("*.md")) <= 220_000


def test_what_the_suite_samples_is_there() -> None:
    for test in SAMPLED:
        path, _, name = test.partition("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8")
