"""Whether `placement="auto"` chooses what is fastest: `python -m benchmarks --only placement`.

Sites whose weights have one shape and one placement are a group. A rival has the placements that the rule chose,
all branches beside, all merged, or the choice with one group changed to the other placement. Rivals take turns over the
same weights and batch, as in the benchmark. A ratio is that of a step as chosen over the rival's: above 1.00, the rival
is faster. One rival is as chosen again: its deviation from 1.00 is measurement noise.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import fx

import lorasc_fx as lx
from lorasc_fx.graph import matching

from .measure import Turn, alternate, ratio
from .models import Work
from .rivals import make

__all__ = ["AGAIN", "groups", "oracle", "placed"]

OTHER = {"beside": "merged", "merged": "beside"}
CHOSEN, AGAIN = "as chosen", "as chosen, again"


@contextmanager
def placed(placements: Mapping[str, str]) -> Iterator[None]:
    """Give new sites these placements, where the spec leaves them open and the op can be merged."""

    def placed(site: lx.Site, nodes: Sequence[fx.Node]) -> str:
        return placements[site.weight]

    with mock.patch.object(matching, "by_shape", placed):
        yield


Group = tuple[tuple[int, ...], str]
"""Shape of the weights, and the placement that was chosen."""


def groups(cascade: lx.Cascade) -> dict[Group, frozenset[str]]:
    """Return the weights of each group of sites that can have another placement."""
    found: dict[Group, set[str]] = {}
    for site in cascade.sites:
        if site.placement in OTHER:
            found.setdefault((site.shape, site.placement), set()).add(site.weight)
    return {group: frozenset(weights) for group, weights in found.items()}


def oracle(work: Work, rounds: int) -> dict[str, Any]:
    """Return the step as chosen over that of each other choice, and how many sites each is about, as plain data."""
    model, batch = work.build(), work.batch()
    rivals = {CHOSEN: make("ours", work, copy.deepcopy(model), batch)}
    cascade = rivals[CHOSEN].model
    assert isinstance(cascade, lx.Cascade)
    found = groups(cascade)
    chosen = {site.weight: site.placement for site in cascade.sites}
    choices = {AGAIN: (0, chosen)}
    for placement in OTHER:
        choices[f"all {placement}"] = len(chosen), dict.fromkeys(chosen, placement)
    for (shape, placement), weights in found.items():
        title = f"{' x '.join(map(str, shape))}: {placement}, here {OTHER[placement]}"
        choices[title] = len(weights), chosen | dict.fromkeys(weights, OTHER[placement])
    for title, (_, placements) in choices.items():
        with placed(placements):
            rivals[title] = make("ours", work, copy.deepcopy(model), batch)
    times = alternate({title: Turn(rival.prepare, rival.step) for title, rival in rivals.items()}, rounds)
    return {
        "title": work.title,
        "sites": {title: count for title, (count, _) in choices.items()},
        "ratios": {title: ratio(times[CHOSEN], times[title]) for title in choices},
    }
