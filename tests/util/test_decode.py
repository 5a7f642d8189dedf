"""Conversion of plain data to dataclasses, and error messages with the path of the field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

import lorasc_fx as lx
from lorasc_fx.util.decode import Check, Conflict, check, decode
from tests.kit.errors import raises

Count = Annotated[int, Check(lambda count: count >= 1, "give 1 or more")]


class Row(TypedDict):
    name: str
    pair: tuple[Count, float]
    more: NotRequired[list[bool]]


@dataclass(frozen=True)
class Inner:
    count: Count
    mode: Literal["slow", "fast"] = "slow"


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...] = ()
    rows: dict[str, Row] = field(default_factory=dict)
    size: int | float | None = None
    on: bool = False

    def __post_init__(self) -> None:
        check(self, conflicts=(Conflict(("on", "size"), lambda on, size: on and size, "no", "Give one"),))


ROW = {"name": "x", "pair": [1, 2]}


def test_data_become_dataclasses() -> None:
    data = {"inner": [{"count": 3}, Inner(2, "fast")], "rows": {"a.b": {**ROW, "more": [True]}}, "size": 1}
    found = decode(Outer, data)
    assert found == Outer((Inner(3), Inner(2, "fast")), {"a.b": {"name": "x", "pair": (1, 2), "more": [True]}}, 1)  # type: ignore[typeddict-item]
    assert type(found.size) is int
    assert Outer(inner=[{"count": 3}]).inner == (Inner(3),)  # type: ignore[arg-type, list-item]


@pytest.mark.parametrize(
    ("data", "code", "told"),
    [
        ([], "invalid-value", "root is empty; give Outer(...)"),
        ({"inner": {}}, "invalid-value", "root.inner is empty; give a list"),
        ({"inner": [{}]}, "invalid-value", "root.inner[0].count is missing; give 1 or more"),
        ({"inner": [{"count": True}]}, "invalid-value", "root.inner[0].count is True"),
        ({"inner": [{"count": 1, "mode": "fsat"}]}, "invalid-value", "nearest: 'fast'"),
        ({"inner": [{"cuont": 1}]}, "unknown-name", "'cuont'; nearest: 'count'"),
        ({"rows": {"a.b": {}}}, "invalid-value", "root.rows.a.b.name is missing"),
        ({"rows": {"0 1": 5}}, "invalid-value", "root.rows['0 1'] is 5; give a table"),
        ({"rows": {1: ROW}}, "invalid-value", "root.rows is 1; give a string"),
        ({"rows": {"x": {**ROW, "pair": [1]}}}, "invalid-value", "give 2 entries"),
        ({"rows": {"x": {**ROW, "more": [1]}}}, "invalid-value", "more[0] is 1"),
        ({"size": "9" * 500}, "invalid-value", "... (502 characters); give a whole number"),
        ({"size": float("nan")}, "invalid-value", "root.size is nan"),
        ({"on": 1}, "invalid-value", "root.on is 1; give true or false"),
        ({"on": True, "size": 2}, "conflicting-options", "on=True cannot be combined with size=2: no. Give one"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(data: Any, code: str, told: str) -> None:
    with raises(lx.SpecError, code, told):
        decode(Outer, data, ("root",))
