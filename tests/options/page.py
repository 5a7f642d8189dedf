"""`python -m tests.options.page` writes the conflicts of the spec as a table into docs/method.md."""

from __future__ import annotations

from pathlib import Path

from lorasc_fx.spec import CONFLICTS, RULE_CONFLICTS
from lorasc_fx.util.decode import Conflict

PAGE = Path(__file__).parents[2] / "docs" / "method.md"
HEAD = "| options | why | what to do |\n|---|---|---|\n"


def table() -> str:
    """Return the table. Options that are refused for one reason with one method share a row."""
    named = [(conflict, "") for conflict in CONFLICTS]
    named += [(conflict, "Rule.") for conflict in RULE_CONFLICTS]
    rows: dict[str, list[tuple[Conflict, str]]] = {}
    for conflict, prefix in named:
        rows.setdefault(conflict.why, []).append((conflict, prefix))
    return HEAD + "".join(f"| {_names(group)} | {why} | {_remedy(group)} |\n" for why, group in rows.items())


def _names(group: list[tuple[Conflict, str]]) -> str:
    shown = dict.fromkeys(f"`{prefix}{name}`" for conflict, prefix in group for name in conflict.fields)
    return ", ".join(shown)


def _remedy(group: list[tuple[Conflict, str]]) -> str:
    (conflict, _), *more = group
    return conflict.remedy.replace(conflict.fields[-1], "the option") if more else conflict.remedy


def page() -> str:
    """Return the page with the current table."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, after = text.partition(HEAD)
    lines = after.splitlines(keepends=True)
    end = next((index for index, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return before + table() + "".join(lines[end:])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
