"""Where results go: results.json (cuda.json of a GPU), curves.json and curves.svg in one folder, and the section of a
page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import curves, report

__all__ = ["write"]

ROWS = ("steps", "placement", "costs", "start", "compiled")
"""Parts that results.json holds."""
FILES = {"cpu": "results.json", "cuda": "cuda.json"}
"""By device: the file of the results."""


def write(found: Mapping[str, Any], folder: Path, page: Path, whole: bool, device: str = "cpu") -> None:
    """Write what was found; a part takes the place of what the files hold of it.

    Args:
        found: `about`, and what was measured of ROWS (by model) and `curves` (which have `rounds` of their own).
        folder: of the results.
        page: with the markers of `report.put`.
        whole: it is all there is; what the files held is dropped.
        device: on which it was measured. Each has a file and a section of its own.

    Raises:
        SystemExit: a part was measured elsewhere, or otherwise, than the rest; nothing was written.
        ValueError: the page has no place for the section.
    """
    about, path = found["about"], folder / FILES[device]
    before = {} if whole or not path.exists() else json.loads(path.read_text(encoding="utf-8"))
    if before and before["about"] != about:
        raise SystemExit(f"{path.name} holds numbers of {before['about']}, these are of {about}: measure all of it")
    parts = {part: before.get(part, {}) | found.get(part, {}) for part in ROWS}
    needed = ("steps", "costs") if device == "cpu" else ("steps",)
    results = {"about": about, **{part: rows for part, rows in parts.items() if rows or part in needed}}
    text = report.put(page.read_text(encoding="utf-8"), report.SECTIONS[device](results), device)
    if "curves" in found:
        _dump({"about": about | {"rounds": found["curves"]["rounds"]}, **found["curves"]}, folder / "curves.json")
        curves.draw(found["curves"], folder / "curves.svg")
    _dump(results, path)
    page.write_text(text, encoding="utf-8")


def _dump(found: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
