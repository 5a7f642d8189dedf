"""Intervals, compared with scipy and with their definition."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]  # no stubs of its own

from lorasc_fx.cli.compare import bootstrap_interval, t_interval


@pytest.mark.parametrize("count", [2, 3, 5, 100])
def test_t_interval_is_scipys(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64).tolist()
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = t_interval(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_equal_differences_have_no_width() -> None:
    found = t_interval([0.25, 0.25, 0.25])
    assert (found.low, found.high, found.settled) == (0.25, 0.25, True)


def test_one_seed_says_nothing() -> None:
    found = t_interval([0.01])
    assert (found.mean, found.low, found.high, found.settled) == (0.01, -math.inf, math.inf, False)


def test_bootstrap_is_near_the_normal_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.rand(2, 4000, generator=generator) < 0.9
    theirs = torch.rand(2, 4000, generator=generator) < 0.88
    found = bootstrap_interval(ours, theirs)
    each = (ours.double() - theirs.double()).mean(0)
    half = 1.96 * each.std().item() / math.sqrt(4000)
    assert found.mean == pytest.approx(each.mean().item())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert found.settled


def test_bootstrap_pairs_examples() -> None:
    right = torch.rand(1, 500, generator=torch.Generator().manual_seed(1)) < 0.7
    same = bootstrap_interval(right, right)
    assert (same.mean, same.low, same.high, same.settled) == (0, 0, 0, False)
