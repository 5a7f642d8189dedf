"""Write docs/errors.md from the catalogue: `python -m tests.errors.page`. Every message on it was raised just now."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import lorasc_fx as lx
from tests.errors.catalogue import ENTRIES, Entry, Example, body
from tests.errors.models import inputs, mlp

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"

HEAD = """# Errors

Each message says what happened, where, and what to do; an unknown name is answered with the nearest known ones.
Whatever raises has changed nothing. In the examples `model` is a `Sequential` of `nn.Linear(5, 7)`, a `Tanh`,
`nn.Linear(7, 6)` and `nn.Linear(6, 2)`, and `x` is its input. `python -m tests.errors.page` runs them and writes this
page.
"""


def message_of(entry: Entry, example: Example) -> str:
    """Run an example in an empty folder; return what it raised, as Python prints it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        try:
            example(mlp(), inputs(2, 5))
        except entry.raised as error:
            if type(error) is not entry.raised and entry.raised is not lx.LorascError:
                raise
            return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{example.__name__} raised no {entry.raised.__name__}")


def section(entry: Entry) -> str:
    """One class."""
    sentence = " ".join((entry.raised.__doc__ or "").split())
    bases = ", ".join(f"`{name}`" for name in entry.bases)
    by = ", ".join(f"`{each}`" if " " not in each else each for each in entry.by)
    facts = [f"Raised by {by}."] + ([f"Is a {bases} as well."] if bases else [])
    lines = [f"## {entry.raised.__name__}", "", f"{sentence} {' '.join(facts)}", "", entry.remedy]
    for example in entry.examples:
        lines += ["", "```text", body(example), "", message_of(entry, example), "```"]
    return "\n".join(lines)


def page() -> str:
    """The whole text."""
    return "\n\n".join([HEAD.rstrip(), *map(section, ENTRIES)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
