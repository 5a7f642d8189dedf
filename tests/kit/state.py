"""How tests look inside a cascade: a redesign of what is inside changes this file, and no test.

The slow state is given as this file's own classes, of plain tensors and tuples; branches are the modules themselves.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

import lorasc_fx as lx
from lorasc_fx.branch import Factors, draw
from lorasc_fx.cascade import Flags, Stage, transition
from lorasc_fx.cascade.run import SPARE, WeightValues
from lorasc_fx.checkpoint import read
from lorasc_fx.checkpoint.files import MANIFEST, TENSORS, canonical, pack
from lorasc_fx.graph import record_of
from lorasc_fx.shards import UNSHARDED, ShardSpec
from lorasc_fx.util.fingerprint import checksum, checksums, device_sum, file_digest, text_digest

# fmt: off
__all__ = ["MANIFEST", "SPARE", "TENSORS", "Expert", "Factors", "Flags", "Stage",
    "WeightState", "branches_of", "canonical", "checksum", "checksums", "device_sum",
    "end_idle", "exact_slow", "file_digest", "forget_warnings", "graphs_of", "is_released",
    "lock_of", "noise_drawn", "oldest_variant", "placed_weights", "read",
    "replace_plan", "resting_value", "slow_values", "stored_values", "text_digest", "trainable",
    "trained_in_full", "variant_count", "variant_for", "weight_state", "weight_states"]
# fmt: on


# ---- checkpoints


def stored_values(folder: Path) -> tuple[str, dict[str, object]]:
    """Return what a checkpoint says, as text and tensors, without omitted defaults and without derived fields."""
    checkpoint = read(folder)
    plan = json.loads(checkpoint.plan.to_json())
    plain, tensors = pack(dataclasses.replace(checkpoint.content, plan=plan, versions={}, changed_buffers=()))
    return json.dumps(plain, sort_keys=True), {
        name: (tensor.dtype, tensor.shape, tensor.flatten().view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


# ---- the slow state


class Expert(NamedTuple):
    """What one stage added to a weight: b @ a, the scale folded into b."""

    stage: int
    b: Tensor
    a: Tensor

    @property
    def pair(self) -> Factors:
        return Factors(self.b, self.a)


class WeightState(NamedTuple):
    """The slow state of one weight: W0, experts, and of each view its coefficients and, after a collapse, its delta."""

    base: Tensor
    experts: tuple[Expert, ...]
    slow: tuple[float, ...]
    start: tuple[float, ...]
    average: tuple[float, ...] | None
    dense_slow: Tensor | None
    dense_average: Tensor | None

    @property
    def matrix(self) -> tuple[int, ...]:
        """Rows and columns of the delta."""
        return tuple(self.base.flatten(1).shape)

    @property
    def is_dense(self) -> bool:
        """Whether experts were collapsed into a dense delta."""
        return self.dense_slow is not None

    @property
    def stages(self) -> list[int]:
        """The stages that trained the experts."""
        return [expert.stage for expert in self.experts]


def weight_states(holder: lx.Cascade | fx.GraphModule) -> dict[str, WeightState]:
    """The slow state of every weight that has one, by name; of a cascade, or of a graph that owns its weights."""
    states = (holder._run if isinstance(holder, lx.Cascade) else record_of(holder)).slow.states
    return {
        name: WeightState(
            state.base,
            tuple(Expert(expert.stage, expert.b, expert.a) for expert in state.experts),
            state.coefficients("slow"),
            state.coefficients("fast"),
            state.coefficients("averaged") if state.history.averaged else None,
            state.dense.get("slow"),
            state.dense_in("averaged") if state.history.averaged else None,
        )
        for name, state in states.items()
        if not state.full
    }


def weight_state(holder: lx.Cascade | fx.GraphModule, name: str) -> WeightState:
    return weight_states(holder)[name]


def exact_slow(holder: lx.Cascade | fx.GraphModule, name: str) -> Tensor:
    """The slow weight in fp64, before it is rounded."""
    states = (holder._run if isinstance(holder, lx.Cascade) else record_of(holder)).slow.states
    return states[name].exact("slow", torch.float64)


def slow_values(cascade: lx.Cascade) -> dict[str, Any]:
    """Everything in the slow state, as nested lists of tensors and plain values."""
    slow = cascade._run.slow
    return {
        **{f"slow {name}": _values(state) for name, state in slow.states.items()},
        "idle": slow.idle,
        "history": _values(slow.history),
    }


def _values(thing: Any) -> Any:
    if dataclasses.is_dataclass(thing):
        return [(field.name, _values(getattr(thing, field.name))) for field in dataclasses.fields(thing)]
    if isinstance(thing, Mapping):
        return [(name, _values(thing[name])) for name in sorted(thing, key=str)]  # a load may order them otherwise
    return [_values(item) for item in thing] if isinstance(thing, (list, tuple)) else thing


# ---- parameters


def branches_of(holder: Any) -> dict[str, Any]:
    """The branches of a cascade or of a graph module, by the names of their weights."""
    return {branch.weight_name: branch for branch in holder.branches.values()}


def trainable(cascade: lx.Cascade) -> dict[str, nn.Parameter]:
    """Every parameter that an optimizer should hold, by its name in the cascade."""
    return cascade._run.trainable()


def trained_in_full(cascade: lx.Cascade) -> dict[str, nn.Parameter]:
    """The parameters trained in full, by name."""
    return cascade._run.present(cascade._run.slow.trained)


def resting_value(cascade: lx.Cascade, name: str) -> Tensor:
    """Return the value of a parameter between two steps, as the cascade computes it."""
    value = torch.empty_like(cascade.model.get_parameter(name), requires_grad=False)
    with torch.no_grad():
        WeightValues(cascade._run.slow, None, plan=cascade._run.plan).write(name, value)
    return value


# ---- the state of the cascade


def is_released(cascade: lx.Cascade) -> bool:
    return cascade._run.released


def placed_weights(cascade: lx.Cascade) -> str | int | None:
    """Which weights `weights()` has put in place; a number names a stage."""
    return cascade._run.placed


def lock_of(cascade: lx.Cascade) -> Any:
    return cascade._run.lock


# ---- graphs


def variant_count(cascade: lx.Cascade) -> int:
    return len(cascade._graphs.variants)


def variant_for(cascade: lx.Cascade, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
    """The variant of a call, which is captured if there is none yet."""
    return cascade._graphs.variant_of(args, kwargs or {})[0]


def oldest_variant(cascade: lx.Cascade) -> Any:
    return cascade._graphs.variants.oldest


def graphs_of(cascade: lx.Cascade) -> list[Any]:
    """The adapted graph of each variant."""
    return [variant.module for variant in cascade._graphs.variants.all]


# ---- steps that the public face does not offer by themselves


def end_idle(cascade: lx.Cascade) -> None:
    """What the first stage of a loop does before it is handed out."""
    transition.end_idle(cascade._run)


def replace_plan(cascade: lx.Cascade, plan: lx.Plan) -> None:
    cascade._run.plan = plan


def forget_warnings(cascade: lx.Cascade) -> None:
    """Let warnings that come once come again."""
    cascade._run.warned._codes.clear()


def noise_drawn(
    noise: lx.Noise, seed: int, stage: int, name: str, shape: Sequence[int], shard: ShardSpec = UNSHARDED
) -> Tensor:
    """The unscaled noise of a weight, whole or of a shard; every entry is in one block."""
    out = torch.full(tuple(shape), torch.nan)
    for places, values in draw(noise, seed, stage, name, torch.Size(shape), shard=shard):
        assert out[places].isnan().all()
        out[places] = values
    assert not out.isnan().any()
    return out
