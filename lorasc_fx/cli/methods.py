"""The methods that `lorasc-fx compare` can train, as changes of the configured spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from lorasc_fx.branch import METHODS as ADAPTERS
from lorasc_fx.spec import METHOD_OPTIONS, CascadeSpec, Noise


class Method(NamedTuple):
    """One row of the comparison.

    Args:
        about: a description for the tables.
        spec: from the configured spec and number of stages to the spec of this method.
        staged: whether the steps are divided into the configured stages. Otherwise there is one stage.
    """

    about: str
    spec: Callable[[CascadeSpec, int], CascadeSpec]
    staged: bool = False


_PLAIN: dict[str, Any] = {"pace": 1.0, "restart": "slow", "noise": Noise(), "average": False}


def _plain(**changes: object) -> Callable[[CascadeSpec, int], CascadeSpec]:
    return lambda spec, stages: replace(spec, **_PLAIN | changes)


def _summed(spec: CascadeSpec, stages: int) -> CascadeSpec:
    """Return the spec of LoRA with the sum of the ranks of all stages, and the same scale lora_alpha / rank."""
    rules = tuple(
        replace(rule, rank=rule.rank and rule.rank * stages, lora_alpha=rule.lora_alpha and rule.lora_alpha * stages)
        for rule in spec.rules
    )
    options = spec.site_options()
    summed = sum(options.at_stage(stage).rank for stage in range(1, stages + 1))
    alpha = spec.lora_alpha * summed / options.rank
    return replace(spec, **_PLAIN | {"rank": summed, "lora_alpha": alpha, "rules": rules})


def _adapter(name: str, pace: float) -> Callable[[CascadeSpec, int], CascadeSpec]:
    """Return the spec with another adapter method. Options that only the configured method has get their defaults."""
    defaults = {option: METHOD_OPTIONS[option] for option in METHOD_OPTIONS.keys() - ADAPTERS[name].options}

    def changed(spec: CascadeSpec, stages: int) -> CascadeSpec:
        options = spec.adapter_options if spec.adapter == name else ()
        return replace(spec, **_PLAIN | {"adapter": name, "adapter_options": options, "pace": pace, **defaults})

    return changed


_OTHERS = [name for name in ADAPTERS if name != "lora"]
METHODS: dict[str, Method] = {
    "lora": Method("one stage, pace 1, no noise", _plain()),
    "lora-summed": Method("LoRA with the sum of the ranks of all stages, same scale", _summed),
    "cascade": Method("similar to ReLoRA: all stages, pace 1, no noise", _plain(), staged=True),
    "lorasc": Method("LoRASC: all stages, with the pace and noise in [spec]", lambda spec, _: spec, staged=True),
    "rslora": Method("LoRA with the scale lora_alpha / sqrt(rank)", _plain(use_rslora=True)),
    "mean": Method(
        "restarts from the fast weights, mean of the weights at the ends of stages",
        _plain(pace="mean", restart="fast"),
        staged=True,
    ),
    **{name: Method(f"adapter={name!r} in one stage", _adapter(name, 1.0)) for name in _OTHERS},
    **{
        f"{name}-stages": Method(
            f"adapter={name!r} in all stages, pace 0.5, no noise", _adapter(name, 0.5), staged=True
        )
        for name in _OTHERS
    },
}
"""The methods by name, in the order of the tables of `compare`."""
