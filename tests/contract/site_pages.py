"""The pages of the site that are made of the code, its notebooks, and its links out of docs/: hooks of mkdocs.

The API reference has every public name, by the `__all__` of each module; the keys of the configuration are the fields
of its dataclasses, with the text after each. Each page of docs/ with code is a notebook too. lorasc_fx is not imported.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lorasc_fx"
MODULES = {
    "errors": PACKAGE / "errors.py",
    "export": PACKAGE / "export" / "__init__.py",
    "graph": PACKAGE / "graph" / "__init__.py",
    "passes": ROOT / "passes" / "__init__.py",
    "plan": PACKAGE / "plan.py",
    "recipes": PACKAGE / "recipes.py",
}
"""Public modules, beside the package itself and the integrations."""
TABLES = {"ModelConfig": "model", "DataConfig": "data", "StagesConfig": "stages", "CompareConfig": "compare"}
"""Tables of a configuration whose keys are their own."""
FIRST = ("adapt", "load", "Cascade", "CascadeSpec")
"""Names that the reference of the package begins with."""
OUTSIDE = {"../CONTRIBUTING.md": "contributing.md", "../README.md": "index.md"}
"""Where links out of docs/ lead on the site; others become text, as the site has no files of the repository."""


BLOCK = re.compile(r"^```python[^\S\n]*\n(.*?)^```[^\S\n]*\n?", re.MULTILINE | re.DOTALL)
"""A block of code of a page."""
LOCAL = re.compile(r"!?\[([^\]]*)\]\((?![a-z]+://)[^)]*\)")
"""A link to another page, or a picture."""


def public(path: Path) -> list[str]:
    """The names in the `__all__` of a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if isinstance(name, str)]
    raise LookupError(f"{path} has no __all__")


def summary(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def names_by_module() -> dict[str, list[str]]:
    """The public names of each module, by its full name; one that the package itself names stands there alone."""
    names = [name for name in public(PACKAGE / "__init__.py") if name not in {*MODULES, "integrations"}]
    names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    modules = {"lorasc_fx": names}
    for module, path in MODULES.items():
        modules[f"lorasc_fx.{module}"] = [name for name in public(path) if name not in names]
    for path in sorted((PACKAGE / "integrations").glob("*.py")):
        if path.stem != "__init__" and (own_names := [name for name in public(path) if name not in names]):
            modules[f"lorasc_fx.integrations.{path.stem}"] = own_names
    return modules


def reference(module: str, names: list[str]) -> str:
    return "\n\n".join(f"::: {module}.{name}" for name in names)


def pages() -> dict[str, str]:
    """The text of each generated page, by its path."""
    names = names_by_module()
    texts = {
        "reference/lorasc_fx.md": f"# lorasc_fx\n\n{summary(PACKAGE / '__init__.py')}\n\n"
        + reference("lorasc_fx", names["lorasc_fx"]),
        "reference/toml.md": keys(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "]("),
    }
    for module, path in MODULES.items():
        full = f"lorasc_fx.{module}"
        texts[f"reference/{module}.md"] = f"# {full}\n\n{summary(path)}\n\n{reference(full, names[full])}"
    modules = [module for module in names if ".integrations." in module]
    parts = [f"## {module}\n\n{reference(module, names[module])}" for module in modules]
    texts["reference/integrations.md"] = "\n\n".join(["# lorasc_fx.integrations", *parts])
    return texts


def notebooks() -> dict[str, str]:
    """The text of the notebook of each page of docs/ with blocks of Python, by its path on the site."""
    pages = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
    return {f"notebooks/{name}.ipynb": notebook(page) for name, page in pages.items() if BLOCK.search(page)}


def notebook(page: str) -> str:
    """A page as a notebook: a cell for each block of Python, and one for the text between two of them."""
    cells: list[dict[str, Any]] = []
    for number, text in enumerate(re.split(BLOCK, page)):  # text and code by turns
        if not text.strip():
            continue
        source = (text if number % 2 else LOCAL.sub(r"\1", text)).strip("\n")
        code = {"execution_count": None, "outputs": []} if number % 2 else {}
        kind = "code" if number % 2 else "markdown"
        about = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": source.splitlines(True)}
        cells.append(about | code)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def keys() -> str:
    """The keys of the configuration: fields, types, defaults and what the source says after each."""
    tree = ast.parse((PACKAGE / "cli" / "config.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    lines = ["# Keys of the configuration", "", "A file for the [command line](../llm.md#command-line), in TOML.", ""]
    for name, table in {"Config": "", **TABLES}.items():
        node = classes[name]
        lines += [f"## [{table}]", ""] if table else []
        lines += [ast.get_docstring(node) or "", "", "| key | type | default | |", "|---|---|---|---|"]
        for field, text in zip(node.body, node.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(text, ast.Expr):
                continue
            meaning = " ".join(str(ast.literal_eval(text.value)).split())
            default = ast.unparse(field.value) if field.value is not None else ""
            default = "{}" if "default_factory=dict" in default else default
            row = (f"`{ast.unparse(field.target)}`", f"`{ast.unparse(field.annotation)}`", f"`{default}`", meaning)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
        lines.append("")
    train = (
        "The keys of transformers' [TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer), "
        "or for a language model of TRL's [SFTConfig](https://huggingface.co/docs/trl/sft_trainer), except `output_dir`"
        " and `dataloader_drop_last`."
    )
    lines += ["## [train]", "", train, ""]
    spec = "The fields of [CascadeSpec][lorasc_fx.CascadeSpec]; `[spec.noise]` those of [Noise][lorasc_fx.Noise]."
    lines += ["## [spec]", "", spec, ""]
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for path, text in (pages() | notebooks()).items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links out of docs/ to pages of the site, or nowhere; name the notebook of a page below its title."""

    def lead(match: re.Match[str]) -> str:
        target = OUTSIDE.get(match[2].partition("#")[0])
        return match[1] if target is None else f"[{match[1]}]({target})"

    notebook_path = f"notebooks/{Path(page.file.src_uri).stem}.ipynb"
    if page.file.src_uri in {path.name for path in (ROOT / "docs").glob("*.md")} and BLOCK.search(markdown):
        title, body = markdown.split("\n", 1)
        markdown = f"{title}\n\n[This page as a notebook]({notebook_path})\n{body}"
    return re.sub(r"(?<!!)\[([^\]]*)\]\((\.\./(?!llm)[^)]*)\)", lead, markdown)
