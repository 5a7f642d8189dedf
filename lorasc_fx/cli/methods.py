"""The methods that `compare` sets side by side: what each one trains, and in how many stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lorasc_fx.spec import CascadeSpec, Noise


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Args:
        about: a description.
        spec: the cascade that is trained, from the configuration's spec and number of stages; None trains parameters
            of the plain model.
        staged: whether the steps are divided into the configuration's stages; otherwise there is one stage.
        parameters: for a plain model, globs on the names of the parameters that are trained.
    """

    about: str
    spec: Callable[[CascadeSpec, int], CascadeSpec] | None = None
    staged: bool = False
    parameters: Callable[[CascadeSpec], tuple[str, ...]] = lambda spec: spec.train


DECAY = CascadeSpec.average_decay


def _plain(spec: CascadeSpec, stages: int) -> CascadeSpec:
    del stages
    spec = replace(spec, pace=1.0, loss_penalty=CascadeSpec.loss_penalty, momentum=0.0, restart="slow")
    return replace(spec, noise=Noise(), average="off", average_decay=DECAY)


def _summed(spec: CascadeSpec, stages: int) -> CascadeSpec:
    """LoRA with the rank that all stages have together, at the same scale lora_alpha / rank."""
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
    return replace(_plain(spec, 1), rank=summed, ranks=(), lora_alpha=alpha, rules=rules)


METHODS: dict[str, Method] = {
    "probe": Method("the parameters under spec.train alone"),
    "lora": Method("one stage, pace 1, no noise", _plain),
    "lora-summed": Method("LoRA of the rank that all stages have together, same scale", _summed),
    "cascade": Method("ReLoRA-like: all stages, pace 1, no noise", _plain, staged=True),
    "lorasc": Method("LoRASC: all stages, slow-fast and noise as [spec] says", lambda spec, _: spec, staged=True),
    "full": Method("every parameter", parameters=lambda spec: ("*",)),
}
"""By name, in the order of the table that `compare` prints."""
