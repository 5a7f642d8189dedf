"""Layouts of random acyclic graphs: no two boxes overlap, arrows go down, and start and end at their boxes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

import pytest

from lorasc_fx.pictures import layout_of, scene
from tests.kit.state import oldest_variant
from tests.pictures.test_draw import adapted

ACROSS, DOWN = 100.0, 50.0


def check(names: Sequence[str], arrows: Sequence[tuple[str, str]]) -> None:
    found = layout_of(names, arrows, ACROSS, DOWN)
    assert list(found.centres) == list(names)
    for a, b in combinations(names, 2):
        (xa, ya), (xb, yb) = found.centres[a], found.centres[b]
        assert abs(xa - xb) > ACROSS - 1e-6 or abs(ya - yb) > DOWN - 1e-6
    for (a, b), path in zip(arrows, found.arrows, strict=True):
        assert (path[0], path[-1]) == (found.centres[a], found.centres[b])
        assert all(below[1] - above[1] == pytest.approx(DOWN) for above, below in pairwise(path))


@pytest.mark.parametrize("seed", range(25))
def test_boxes_stand_apart_and_arrows_go_down(seed: int) -> None:
    source = random.Random(seed)
    names = [f"n{number}" for number in range(source.randint(2, 24))]
    check(names, [(a, b) for a, b in combinations(names, 2) if source.random() < 0.15])


@pytest.mark.parametrize("placement", ["beside", "merged", "weight"])
def test_a_real_graph(placement: Any) -> None:
    """Of branches beside their op, which igraph alone lets overlap."""
    cascade = adapted(placement=placement)
    shown = scene([oldest_variant(cascade).module], cascade.plan, cascade.sites[:3], 2)
    check(list(shown.boxes), shown.arrows)


def test_boxes_without_arrows_stand_side_by_side() -> None:
    found = layout_of(["a", "b", "c"], [], ACROSS, DOWN)
    assert sorted(x for x, _ in found.centres.values()) == pytest.approx([0, ACROSS, 2 * ACROSS])
