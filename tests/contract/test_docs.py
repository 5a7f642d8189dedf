"""The documentation and the examples run, as one program each in an empty folder.

They are the cells of the page's notebook (test_site.py).
"""

import re
import runpy  # noqa: TID251 - the blocks of our own pages
from pathlib import Path

import pytest
import torch

from tests.conftest import SAMPLED, SLOW
from tests.contract.site_pages import BLOCK

ROOT = Path(__file__).parents[2]
PAGES = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if path.exists()
]


def program(page: str) -> str:
    """Return the page with blank lines except its python blocks, so that line numbers of tracebacks are correct."""
    lines = [""] * (page.count("\n") + 1)
    for block in BLOCK.finditer(page):
        start = page.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[start : start + len(code)] = code
    return "\n".join(lines)


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")  # peft's and TRL's
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = program(page.read_text(encoding="utf-8"))
    if not code.strip() or page.name == "README.md":
        return  # prose only; or run by the test of what it prints
    script = tmp_path / f"{page.stem}.py"
    script.write_text(code, encoding="utf-8")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    runpy.run_path(str(script), run_name="__main__")


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
    assert len(lines) <= 110
    assert max(map(len, lines)) <= 120


def test_the_readme_says_what_its_block_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, script = (ROOT / "README.md").read_text(encoding="utf-8"), tmp_path / "readme.py"
    script.write_text(program(page), encoding="utf-8")
    runpy.run_path(str(script))
    printed = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    sentence = re.search(r"^It prints ([\d., and]+)\. ", page, re.MULTILINE)
    assert sentence is not None
    assert [float(number) for number in re.findall(r"\d\.\d+", sentence[1])] == pytest.approx(printed, abs=2e-3)
    assert printed[-1] == printed[-2] < printed[0]


def test_all_of_it_is_on_one_page() -> None:
    assert len((ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_the_documentation_is_no_book() -> None:
    assert sum(page.stat().st_size for page in (ROOT / "docs").glob("*.md")) <= 220_000


def test_what_the_suite_samples_is_there() -> None:
    for test in (*SAMPLED, *SLOW):
        path, _, name = test.partition("[")[0].partition("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8")


def test_the_table_names_every_example() -> None:
    folder = Path(__file__).parents[2] / "examples"
    table = (folder / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in folder.glob("*.py")} - {*re.findall(r"\((\w+\.py)\)", table)} == {"__init__.py"}


@pytest.mark.slow
def test_the_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    from examples.plain_loop import main

    assert 0 <= main(steps=2, stages=2) <= 1
    said = capsys.readouterr().out
    assert "stage 2: loss" in said
    assert "accuracy of the released model" in said


@pytest.mark.slow
def test_the_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.trainer import main

    before, after = main(str(tmp_path / "run"), epochs=2)
    assert after < before - 2
    assert "the saved model goes on counting: [24, 27, 1, 4, 7, 10, 13, 16, 19, 22]" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "names"), [("accelerate", ("ends with the same bits", "stage 3 starts")), ("fabric", ("stage 3: loss",))]
)
def test_loops_of_others(name: str, names: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples import accelerate_loop, fabric_loop

    assert {"accelerate": accelerate_loop, "fabric": fabric_loop}[name].main(str(tmp_path)) > 0.6
    said = capsys.readouterr().out
    assert all(name in said for name in names)


def test_many_runs_are_separate_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from examples.many_runs import main

    assert max(main(steps=12).values()) < 1e-10
    assert "large: loss" in capsys.readouterr().out


def test_a_graph_without_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.graph_only import main

    before, after = main(steps=60, stages=2, folder=tmp_path)
    assert after > before + 0.1
    assert "captured by graph" in capsys.readouterr().out
    given, adapted = (torch.export.load(tmp_path / f"{name}.pt2") for name in ("given", "adapted"))
    targets = [[str(node.target) for node in p.graph.nodes if node.op == "call_function"] for p in (given, adapted)]
    assert targets[0] == targets[1]
    assert adapted.module()(torch.randn(5, 12)).shape == (5, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sign"), [("images", 1), ("texts", -1)])
def test_images_and_texts(name: str, sign: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Accuracy rises, loss falls."""
    from examples import causal_lm, image_conv

    before, after = {"images": image_conv, "texts": causal_lm}[name].main()
    assert sign * (after - before) > 0.1
    assert "stage 2: loss" in capsys.readouterr().out
