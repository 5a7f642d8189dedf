"""`python -m tests.spec.page` writes the conflicts of options in docs/method.md from those of the spec."""

from __future__ import annotations

from pathlib import Path

from lorasc_fx.spec import CONFLICTS, RULE_CONFLICTS

PAGE = Path(__file__).parents[2] / "docs" / "method.md"
START, END = "<!-- conflicts -->\n", "<!-- /conflicts -->\n"


def conflicts() -> str:
    """Return a line for each conflict. Options that are refused for one reason with one method share a line."""
    named = [(conflict, "") for conflict in CONFLICTS]
    named += [(conflict, "Rule.") for conflict in RULE_CONFLICTS]
    lines: dict[str, dict[str, None]] = {}
    for conflict, prefix in named:
        lines.setdefault(conflict.why, {}).update(dict.fromkeys(f"`{prefix}{name}`" for name in conflict.fields))
    return "".join(f"- {', '.join(names)}: {why}\n" for why, names in lines.items())


def page() -> str:
    """Return the page with the current conflicts."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return before + START + conflicts() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
