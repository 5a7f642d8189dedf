"""Every place that raises a public error, with the words of its message, and the words that the tests hold.

A place counts as tested where a test's string has a stretch of its message that no other message has: found in the
sources, so that a new message without a test is seen whichever tests ran.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lorasc_fx import errors

ROOT = Path(__file__).parents[2]
CLASSES = [name for name in errors.__all__ if isinstance(getattr(errors, name), type)]
STRETCH = 12
"""Letters in a row that tell one message from another; a message whose longest words are fewer gives them all."""


@dataclass(frozen=True)
class Place:
    """A `raise` in the code: where it stands, and the constant parts of its message, in order."""

    name: str
    where: str
    parts: tuple[str, ...]

    @property
    def stretches(self) -> frozenset[str]:
        """All pieces of STRETCH letters of the message."""
        longest = max(map(len, self.parts), default=0)
        size = min(STRETCH, longest)
        return frozenset(part[at : at + size] for part in self.parts for at in range(len(part) - size + 1) if size > 3)


def sources() -> Iterator[tuple[Path, ast.Module]]:
    """The package's files."""
    for room in ("lorasc_fx", "passes"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if not path.is_relative_to(ROOT / "lorasc_fx" / "passes"):  # the link to the other room
                yield path, ast.parse(path.read_text(encoding="utf-8"))


def strings(node: ast.AST) -> tuple[str, ...]:
    """The constant strings inside a node, without those of one letter or two."""
    found = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return tuple(each for each in found if len(each) > 2)


def makers() -> dict[str, ast.FunctionDef]:
    """Functions that a `raise` calls for its error or for its message: they return a public error, or a text."""
    found: dict[str, ast.FunctionDef] = {}
    for _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.returns and ast.unparse(node.returns) in (*CLASSES, "str"):
                found[node.name] = node
    return found


def called(node: ast.expr) -> str:
    """The last part of a call's name."""
    return ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""


@cache
def places() -> tuple[Place, ...]:
    """Every `raise` of a public error."""
    known, found = makers(), []
    for path, tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            node.exc.keywords = [keyword for keyword in node.exc.keywords if keyword.arg != "code"]
            name, words = called(node.exc), strings(node.exc)
            maker = known.get(name)
            if name not in CLASSES:
                if maker is None or maker.returns is None or ast.unparse(maker.returns) not in CLASSES:
                    continue
                name = ast.unparse(maker.returns)
                words += strings(maker) if not words else ()
            elif not words:  # the message is another function's
                inside = [called(each) for each in ast.walk(node.exc) if isinstance(each, ast.Call)]
                words = tuple(word for each in inside if each in known for word in strings(known[each]))
            if words:  # else it is another error's message, with a place before it
                found.append(Place(name, f"{path.relative_to(ROOT).as_posix()}:{node.lineno}", words))
    return tuple(found)


@cache
def held() -> tuple[str, ...]:
    """Every string that the tests hold messages against, with the backslashes of patterns taken away; and the page of
    errors, whose messages a test raises. What an f-string computes is left out.
    """
    found = [(ROOT / "docs" / "errors.md").read_text(encoding="utf-8")]
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("...".join(strings(node)).replace("\\", ""))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                found.append(node.value.replace("\\", ""))
    return tuple(found)


def untested(found: Sequence[Place], texts: Sequence[str]) -> list[str]:
    """The places whose message no text holds: no words that it alone has, nor all of its words in their order."""
    owners: dict[str, set[tuple[str, ...]]] = {}
    for place in found:
        for stretch in place.stretches:
            owners.setdefault(stretch, set()).add(place.parts)
    whole, lost = "\n".join(texts), []
    for place in found:
        own = [stretch for stretch in place.stretches if len(owners[stretch]) == 1]
        if any(stretch in whole for stretch in own):
            continue
        in_order = re.compile(".*".join(map(re.escape, place.parts)), re.DOTALL)
        if sum(map(len, place.parts)) < STRETCH or not any(in_order.search(text) for text in texts):
            lost.append(f"{place.where}: {place.name}({' ... '.join(place.parts)!r})")
    return lost
