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
    """Where the factors of a stage start (`CascadeSpec.start`)."""

    from_weight: ClassVar[bool] = True
    """Whether factors are taken out of the weight, which then holds the residual `W - s B_0 A_0` while a stage runs."""

    of_delta: ClassVar[bool] = False
    """Whether they are taken out of what the weight differs by from W0, and not out of the weight itself."""

    @abc.abstractmethod
    def initial_factors(self, matrix: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return B_0 [..., out, k] and A_0 [..., k, in] of a matrix [..., out, in], with k of at most `rank`.

        Further rows of A start as in LoRA, further columns of B at zero. `scale` is s of the branch.
        """


class LoraStart(Start):
    """B = 0, and A as restart_A says: nothing is taken out of the weight."""

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
    """MiLoRA (2406.09044): the r smallest singular triplets; what training adds is orthogonal to the largest ones."""

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
    """LoftQ (2310.08659), with one step: the r largest singular triplets of what quantization took from the weight.

    W0 is the quantized weight Q, and the slow delta begins as the nearest matrix of rank r to `W - Q`, where W are the
    numbers before; the branch starts from it, so that Q stays as it is. Later stages start from the r largest triplets
    of the delta. A weight without a delta starts as in LoRA.
    """

    of_delta: ClassVar[bool] = True

    def initial_factors(self, matrix: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `U sqrt(v / s)` and `sqrt(v / s) V^T` of the first r values that are not zero up to rounding."""
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        count = min(rank, int((values > 1e-5 * values[..., :1]).sum(-1).min()))
        return split_evenly(left[..., :count], values[..., :count], right[..., :count, :], scale)


def split_evenly(
    left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors with `scale * b @ a = left diag(values) right`, the root of each value in either."""
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
    """Which share of the fast weights a transition takes into the slow ones (`CascadeSpec.pace`)."""

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
    """1/t in stage t: under restart = fast the slow weights are the mean of the weights at the ends of stages."""

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
        """Return the share. The weights are relative to that of the smallest loss, so that no power overflows."""
        least = math.log(min(losses.values()))
        weights = {number: math.exp(penalty * (least - math.log(loss))) for number, loss in losses.items()}
        return weights[stage] / math.fsum(weights.values())


PACES: Mapping[str, PaceRule] = {"mean": MeanPace(), "loss": LossPace()}
"""By the value of `CascadeSpec.pace`, if that is not a number."""


class Scale:
    """The scale s of a branch (`CascadeSpec.use_rslora`): this one is that of LoRA."""

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
    """Where A of the next stage starts (`CascadeSpec.restart_A`): this one is fresh."""

    def next_a(self, previous: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        """Return A as the stage starts it, of the one before and of a fresh one (which may have another rank)."""
        return fresh


class KeptA(NextA):
    """Goes on from the stage before, where that has the same rank and is finite."""

    def next_a(self, previous: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        """Return a copy of the one before."""
        if previous.shape != fresh.shape or not bool(torch.isfinite(full_tensor(previous)).all()):
            return fresh
        return previous.detach().clone()


NEXT_A: Mapping[str, NextA] = {"fresh": NextA(), "kept": KeptA()}
"""By the value of `CascadeSpec.restart_A`."""


class Restart(abc.ABC):
    """Which weights the next stage starts from (`CascadeSpec.restart`)."""

    @abc.abstractmethod
    def start(self, slow: Value, fast: Value) -> Value:
        """Return that of the slow or of the fast weights: coefficients, or tensors."""


class FromSlow(Restart):
    """`W0 + S_t`."""

    def start(self, slow: Value, fast: Value) -> Value:
        """Return the slow one."""
        return slow


class FromFast(Restart):
    """`W0 + F_t`: the slow weights average the trajectory."""

    def start(self, slow: Value, fast: Value) -> Value:
        """Return the fast one."""
        return fast


RESTARTS: Mapping[str, Restart] = {"slow": FromSlow(), "fast": FromFast()}
"""By the value of `CascadeSpec.restart`."""


class Average:
    """The average of the slow weights at the ends of stages (`CascadeSpec.average`): this one keeps none."""

    kept: ClassVar[bool] = False

    def share(self, count: int, decay: float) -> float:
        """Return the share of the new slow weights, after `count` stages, of which there is at least one."""
        return 1.0


class Exponential(Average):
    """`decay` of the average stays at each stage."""

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
    """What the noise of a stage is drawn from (`Noise.distribution`), before it is scaled."""

    by_rows: ClassVar[bool] = False
    """Whether its size is that of each row of the weight, and not the standard deviation of the whole."""

    @abc.abstractmethod
    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        """Return unscaled noise in fp32 on the CPU."""


class Uniform(Distribution):
    """U(-1/2, 1/2): NoisyTune (2202.12024)."""

    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        """Return the draw."""
        return torch.rand(shape, generator=generator, dtype=torch.float32).sub_(0.5)


class Normal(Distribution):
    """N(0, 1/12), of the variance of the uniform one."""

    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        """Return the draw."""
        return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(12**-0.5)


class Filter(Distribution):
    """N(0, 1), scaled by `|W_i| / sqrt(n)` of each row i of n entries: Flat-LoRA (2409.14396)."""

    by_rows: ClassVar[bool] = True

    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        """Return the draw."""
        return torch.randn(shape, generator=generator, dtype=torch.float32)


DISTRIBUTIONS: Mapping[str, Distribution] = {"uniform": Uniform(), "normal": Normal(), "filter": Filter()}
"""By the value of `Noise.distribution`."""


def one_of(table: Mapping[str, object]) -> str:
    """Return the values of a table for a sentence: "'a', 'b' or 'c'"."""
    *first, last = map(repr, table)
    return f"{', '.join(first)} or {last}" if first else last
