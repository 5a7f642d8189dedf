"""The methods that `lorasc-fx compare` can train: which parameters each one trains, and in how many stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lorasc_fx.spec import CascadeSpec, Noise


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Args:
        about: a description for the tables.
        spec: a function from the configuration's spec and number of stages to the spec of this method. If it is None,
            parameters of the plain model are trained.
        staged: whether the steps are divided into the configuration's stages. Otherwise there is one stage.
        parameters: a function from the spec to globs on the names of the parameters that are trained in a plain model.
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
    """Return the spec of LoRA with the sum of the ranks of all stages, and the same scale lora_alpha / rank."""
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
    "probe": Method("only the parameters in spec.train, without branches"),
    "lora": Method("one stage, pace 1, no noise", _plain),
    "lora-summed": Method("LoRA with the sum of the ranks of all stages, same scale", _summed),
    "cascade": Method("similar to ReLoRA: all stages, pace 1, no noise", _plain, staged=True),
    "lorasc": Method("LoRASC: all stages, with the pace and noise in [spec]", lambda spec, _: spec, staged=True),
    "full": Method("every parameter", parameters=lambda spec: ("*",)),
}
"""The methods by name, in the order of the tables of `compare`."""
