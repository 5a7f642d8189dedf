"""Options as strategies: an object for each value of an option, and one table from the value to the object.

Engine, passes and checkpoints call the object's methods and never compare the value. A new value of an option is a
class and a line in its table: the spec accepts it, and everything else works with it (CONTRIBUTING.md, "Add an
option").
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch

from lorasc_fx.shards import full_tensor

Value = TypeVar("Value")


class Start(abc.ABC):
    """Initial factors of a stage (`CascadeSpec.start`)."""

    from_weight: ClassVar[bool] = True
    """Whether the factors are computed from the weight, which holds the residual `W - s B_0 A_0` while a stage runs."""

    of_delta: ClassVar[bool] = False
    """Whether the factors are computed from the difference of the weight and W0 instead of the weight."""

    @abc.abstractmethod
    def initial_factors(self, matrix: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return B_0 [..., out, k] and A_0 [..., k, in] of a matrix [..., out, in], with k of at most `rank`.

        Further rows of A start as in LoRA, further columns of B at zero. `scale` is s of the branch.
        """


class LoraStart(Start):
    """B = 0, and A by restart_A. The weight stays unchanged."""

    from_weight: ClassVar[bool] = False

    def initial_factors(self, matrix: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return factors of rank 0."""
        return matrix[..., :0], matrix[..., :0, :]


class PissaStart(Start):
    """PiSSA (2404.02948): the r largest singular triplets, `s B_0 A_0` is the nearest matrix of rank r."""

    def initial_factors(self, matrix: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `U sqrt(v / s)` and `sqrt(v / s) V^T` of `W = U diag(v) V^T`."""
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return split_evenly(left[..., :rank], values[..., :rank], right[..., :rank, :], scale)


class MiloraStart(Start):
    """MiLoRA (2406.09044): the r smallest singular triplets, which are orthogonal to the largest ones."""

    def initial_factors(self, matrix: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `U sqrt(v / s)` and `sqrt(v / s) V^T` of the last r columns, values and rows."""
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return split_evenly(left[..., -rank:], values[..., -rank:], right[..., -rank:, :], scale)


class OloraStart(Start):
    """OLoRA (2406.01775): the first r columns of Q and rows of R of `W = Q R`."""

    def initial_factors(self, matrix: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the columns and the rows."""
        left, right = torch.linalg.qr(matrix)
        return left[..., :rank], right[..., :rank, :]


class LoftqStart(Start):
    """LoftQ (2310.08659), with one step: the r largest singular triplets of the quantization error.

    W0 is the quantized weight Q. The slow delta starts as the nearest matrix of rank r to `W - Q`, with the weight W
    before quantization. The branch starts from this delta, so Q is not changed. Later stages start from the r largest
    triplets of the delta. A weight without a delta starts as in LoRA.
    """

    of_delta: ClassVar[bool] = True

    def initial_factors(self, matrix: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `U sqrt(v / s)` and `sqrt(v / s) V^T` of the first r values above the rounding errors."""
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        count = min(rank, int((values > 1e-5 * values[..., :1]).sum(-1).min()))
        return split_evenly(left[..., :count], values[..., :count], right[..., :count, :], scale)


def split_evenly(
    left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors with `scale * b @ a = left diag(values) right`. Each factor has the root of the values."""
    root = (values / scale).sqrt()
    return left * root.unsqueeze(-2), root.unsqueeze(-1) * right


STARTS: Mapping[str, Start] = {
    "lora": LoraStart(),
    "pissa": PissaStart(),
    "olora": OloraStart(),
    "milora": MiloraStart(),
    "loftq": LoftqStart(),
}
"""By the value of `CascadeSpec.start`."""


class PaceRule(abc.ABC):
    """Share of the fast weights that a transition adds to the slow ones (`CascadeSpec.pace`)."""

    needs_loss: ClassVar[bool] = False
    """Whether the share depends on the losses of the stages."""

    @abc.abstractmethod
    def at(self, stage: int, losses: Mapping[int, float], penalty: float) -> float:
        """Return the share in a stage.

        Args:
            stage: number of the stage, 1 is the first.
            losses: of the stages that have ended, and of this one, by number, if `needs_loss`.
            penalty: `CascadeSpec.loss_penalty`.
        """


class GivenPace(PaceRule):
    """A share for each stage: the number of the spec, or an entry of its sequence, whose last entry repeats."""

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares = shares

    def at(self, stage: int, losses: Mapping[int, float], penalty: float) -> float:
        """Return the share."""
        return self.shares[min(stage, len(self.shares)) - 1]


class MeanPace(PaceRule):
    """1/t in stage t. With restart="fast" the slow weights are the mean of the weights at the ends of stages."""

    def at(self, stage: int, losses: Mapping[int, float], penalty: float) -> float:
        """Return the share."""
        return 1 / stage


class LossPace(PaceRule):
    """The mean of the fast weights of all stages, each weighted by `L_t^-p` (metrics-weighted averaging, 2504.18580).

    With `w_k = L_k^-p` the share of stage t is `w_t / (w_1 + ... + w_t)`: after it the slow weights are
    `sum_k w_k F_k / sum_k w_k`. p = 0 is the plain mean, and a large p takes the stage with the smallest loss.
    """

    needs_loss: ClassVar[bool] = True

    def at(self, stage: int, losses: Mapping[int, float], penalty: float) -> float:
        """Return the share. Weights are relative to the stage with the smallest loss, so no power overflows."""
        least = math.log(min(losses.values()))
        weights = {number: math.exp(penalty * (least - math.log(loss))) for number, loss in losses.items()}
        return weights[stage] / math.fsum(weights.values())


PACES: Mapping[str, PaceRule] = {"mean": MeanPace(), "loss": LossPace()}
"""By the value of `CascadeSpec.pace`, if that is not a number."""


class Scale:
    """Scale s of a branch (`CascadeSpec.use_rslora`): the one of LoRA."""

    def scale(self, rank: int, lora_alpha: float) -> float:
        """Return `lora_alpha / rank`."""
        return lora_alpha / rank


class RsloraScale(Scale):
    """rsLoRA (2312.03732)."""

    def scale(self, rank: int, lora_alpha: float) -> float:
        """Return `lora_alpha / sqrt(rank)`."""
        return lora_alpha / math.sqrt(rank)


SCALES: Mapping[bool, Scale] = {False: Scale(), True: RsloraScale()}
"""By the value of `CascadeSpec.use_rslora`."""


ADAPTERS: dict[str, type[Any]] = {}
"""Branch classes (`lorasc_fx.branch.Branch`) by the value of `CascadeSpec.adapter`; `lorasc_fx.branch.methods` fills
the table, and `register_branch` adds to it."""


class NextA:
    """A of the next stage (`CascadeSpec.restart_A`): fresh values."""

    def next_a(self, previous: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        """Return the initial A of a stage, from the previous A and a fresh one, which may have another rank."""
        return fresh


class KeptA(NextA):
    """A of the stage before, if it has the same rank and is finite."""

    def next_a(self, previous: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        """Return a copy of the previous A."""
        if previous.shape != fresh.shape or not bool(torch.isfinite(full_tensor(previous)).all()):
            return fresh
        return previous.detach().clone()


NEXT_A: Mapping[str, NextA] = {"fresh": NextA(), "kept": KeptA()}
"""By the value of `CascadeSpec.restart_A`."""


class Restart(abc.ABC):
    """Weights from which the next stage starts (`CascadeSpec.restart`)."""

    @abc.abstractmethod
    def start(self, slow: Value, fast: Value) -> Value:
        """Return the slow or the fast value: coefficients, or tensors."""


class FromSlow(Restart):
    """`W0 + S_t`."""

    def start(self, slow: Value, fast: Value) -> Value:
        """Return the slow value."""
        return slow


class FromFast(Restart):
    """`W0 + F_t`: the slow weights average the trajectory."""

    def start(self, slow: Value, fast: Value) -> Value:
        """Return the fast value."""
        return fast


RESTARTS: Mapping[str, Restart] = {"slow": FromSlow(), "fast": FromFast()}
"""By the value of `CascadeSpec.restart`."""


class Average:
    """Average of the slow weights at the ends of stages (`CascadeSpec.average`): no average."""

    kept: ClassVar[bool] = False

    def share(self, count: int, decay: float) -> float:
        """Return the share of the new slow weights after `count` stages, 1 or more."""
        return 1.0


class Exponential(Average):
    """Exponential average: each stage multiplies the average by `decay`."""

    kept: ClassVar[bool] = True

    def share(self, count: int, decay: float) -> float:
        """Return `1 - decay`."""
        return 1 - decay


class Mean(Average):
    """The plain mean: SWA (1803.05407)."""

    kept: ClassVar[bool] = True

    def share(self, count: int, decay: float) -> float:
        """Return `1 / (count + 1)`."""
        return 1 / (count + 1)


AVERAGES: Mapping[str, Average] = {"off": Average(), "ema": Exponential(), "swa": Mean()}
"""By the value of `CascadeSpec.average`."""


class Distribution(abc.ABC):
    """Distribution of the noise of a stage (`Noise.distribution`), before it is scaled."""

    by_rows: ClassVar[bool] = False
    """Whether the noise is scaled by the norm of each row, instead of the standard deviation of the weight."""

    @abc.abstractmethod
    def from_uniform(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return unscaled noise from fp32 numbers that are uniform in [-1/2, 1/2], in their memory."""


class Uniform(Distribution):
    """U(-1/2, 1/2): NoisyTune (2202.12024)."""

    def from_uniform(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the numbers."""
        return numbers


class Normal(Distribution):
    """N(0, 1/12), which has the variance of the uniform distribution."""

    def from_uniform(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the normal quantiles of the numbers."""
        return _normal(numbers).mul_(12**-0.5)


class Filter(Distribution):
    """N(0, 1), scaled by `|W_i| / sqrt(n)` of each row i of n entries: Flat-LoRA (2409.14396)."""

    by_rows: ClassVar[bool] = True

    def from_uniform(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the normal quantiles of the numbers."""
        return _normal(numbers)


def _normal(numbers: torch.Tensor) -> torch.Tensor:
    """Return the normal quantiles of fp32 numbers that are uniform in [-1/2, 1/2]; those of the ends are finite."""
    return numbers.mul_(2 - 2**-23).erfinv_().mul_(2**0.5)


DISTRIBUTIONS: Mapping[str, Distribution] = {"uniform": Uniform(), "normal": Normal(), "filter": Filter()}
"""By the value of `Noise.distribution`."""


def one_of(table: Mapping[str, object]) -> str:
    """Return the values of a table for a sentence: "'a', 'b' or 'c'"."""
    *first, last = map(repr, table)
    return f"{', '.join(first)} or {last}" if first else last
