"""The methods that `compare` sets side by side: what each one trains, and in how many stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from lorasc_fx.cli.batches import Batch
from lorasc_fx.cli.learners import CascadeLearner, Learner, PlainLearner
from lorasc_fx.spec import CascadeSpec, Noise

__all__ = ["TABLE", "Method"]


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Args:
        about: a phrase for people.
        stages: how many stages, given how many the configuration asks for.
        spec: the cascade that is trained, or None for a method without branches.
        patterns: of a method without branches: which parameters are trained.
    """

    about: str
    stages: Callable[[int], int]
    spec: Callable[[CascadeSpec, int], CascadeSpec] | None = None
    patterns: Callable[[CascadeSpec], tuple[str, ...]] = lambda spec: spec.train

    def learner(self, model: nn.Module, sample: Batch, spec: CascadeSpec, stages: int, *, train: bool) -> Learner:
        """Return the model as this method trains it."""
        if self.spec is None:
            learner = PlainLearner(model, self.patterns(spec), spec.exclude)
            learner.train(train)
            return learner
        return CascadeLearner.adapt(model, sample, self.spec(spec, stages), train=train)


def _one(stages: int) -> int:
    del stages
    return 1


def _same(stages: int) -> int:
    return stages


def _lora(spec: CascadeSpec, stages: int) -> CascadeSpec:
    del stages
    return _plain_cascade(spec, 1)


def _plain_cascade(spec: CascadeSpec, stages: int) -> CascadeSpec:
    del stages
    return replace(spec, pace=1.0, restart="slow", noise=Noise())


def _summed(spec: CascadeSpec, stages: int) -> CascadeSpec:
    """LoRA with the rank that all stages have together, at the same scale s = lora_alpha / rank."""
    rules = tuple(
        replace(
            rule,
            rank=None if rule.rank is None else rule.rank * stages,
            lora_alpha=None if rule.lora_alpha is None else rule.lora_alpha * stages,
        )
        for rule in spec.rules
    )
    summed = sum(spec.rank_at(stage) for stage in range(1, stages + 1))
    alpha = spec.lora_alpha * summed / spec.rank
    return replace(_lora(spec, 1), rank=summed, ranks=(), lora_alpha=alpha, rules=rules)


def _as_asked(spec: CascadeSpec, stages: int) -> CascadeSpec:
    del stages
    return spec


TABLE: dict[str, Method] = {
    "probe": Method("the parameters under spec.train alone", _one),
    "lora": Method("one stage, pace 1, no noise", _one, _lora),
    "lora-summed": Method("LoRA of the rank that all stages have together, same scale", _one, _summed),
    "cascade": Method("ReLoRA-like: all stages, pace 1, no noise", _same, _plain_cascade),
    "lorasc": Method("LoRASC: all stages, slow-fast and noise as [spec] says", _same, _as_asked),
    "full": Method("every parameter", _one, patterns=lambda spec: ("*",)),
}
