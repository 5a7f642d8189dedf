"""Differences between two methods, with intervals: over seeds (Student's t) and over test examples (bootstrap).

The two answer different questions. Over seeds: would other training runs show the difference, on these test examples?
Over examples: would other test examples show it, with these runs? What holds under one of them only is not settled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Interval", "bootstrap_interval", "mean_and_deviation", "t_interval"]

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; above that the normal one is within 2 %.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean difference and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def settled(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (nan for one value)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def t_interval(differences: Sequence[float]) -> Interval:
    """Return the t interval of paired differences, one a seed; with one seed it is unbounded."""
    mean, deviation = mean_and_deviation(differences)
    count = len(differences)
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    quantile = _T95[count - 2] if count - 2 < len(_T95) else 1.96
    half = quantile * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def bootstrap_interval(ours: Tensor, theirs: Tensor, resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the percentile bootstrap interval of a difference in accuracy.

    Args:
        ours, theirs: whether each prediction was right, [seeds, examples]; both on the same examples. The seeds of an
            example stay together: an example is what is resampled.
        resamples: number of bootstrap samples.
        seed: of the resampling.
    """
    differences = (ours.double() - theirs.double()).mean(0)
    generator = torch.Generator().manual_seed(seed)
    count = len(differences)
    means = torch.stack(
        [differences[torch.randint(count, (count,), generator=generator)].mean() for _ in range(resamples)]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(differences.mean().item(), low, high)
