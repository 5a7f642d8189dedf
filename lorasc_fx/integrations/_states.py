"""The slow state of a weight cut to the part that lies here, and put together again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from lorasc_fx.integrations._parts import whole
from lorasc_fx.shards import Rows
from lorasc_fx.state import Expert, Factors, SlowWeight

__all__ = ["cut", "cut_state", "joined", "joined_state"]


def cut(value: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    """Return the part of a tensor, in memory of its own."""
    return value if rows is None else rows.of_whole(value).clone()


def cut_state(state: SlowWeight, rows: Rows | None) -> SlowWeight:
    """Return the slow state of the part: its rows of W0 and B, or its columns of W0 and A."""
    if rows is None:
        return state

    def factors(pair: Factors) -> Factors:
        return Factors(cut(pair.b, rows), pair.a) if rows.axis == 0 else Factors(pair.b, cut(pair.a, rows))

    return _state(state, partial(cut, rows=rows), factors, rows)


def joined(value: torch.Tensor, like: DTensor) -> torch.Tensor:
    """Return the whole tensor of which a plain one is the part here, lying as `like` lies."""
    own = value.to(like.to_local().device)
    return whole(DTensor.from_local(own, like.device_mesh, like.placements, run_check=False)).to(value.device)


def joined_state(state: SlowWeight, like: DTensor) -> SlowWeight:
    """Return the slow state of the whole weight, whose parts lie as `like` does."""
    (place,) = like.placements

    def side(value: torch.Tensor, axis: int) -> torch.Tensor:
        lies = [place if place == Shard(axis) else Replicate()]
        own = DTensor.from_local(value.to(like.to_local().device), like.device_mesh, lies, run_check=False)
        return whole(own).to(value.device)

    def factors(pair: Factors) -> Factors:
        return Factors(side(pair.b, 0), side(pair.a, 1))

    return _state(state, partial(joined, like=like), factors, None)


def _state(
    state: SlowWeight,
    dense: Callable[[torch.Tensor], torch.Tensor],
    factors: Callable[[Factors], Factors],
    rows: Rows | None,
) -> SlowWeight:
    slow = None if state.dense_slow is None else dense(state.dense_slow)
    same = state.dense_start is state.dense_slow
    start = slow if same or state.dense_start is None else dense(state.dense_start)
    experts = tuple(Expert(each.stage, factors(each.factors)) for each in state.experts)
    return replace(state, base=dense(state.base), experts=experts, dense_slow=slow, dense_start=start, part=rows)
