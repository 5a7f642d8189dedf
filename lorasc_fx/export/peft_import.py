"""A LoRA adapter of peft as the first expert of a cascade, whose slow weights are then what peft merges."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn

from lorasc_fx.adapt import adapt
from lorasc_fx.capture import open_model
from lorasc_fx.errors import CheckpointError, path_of
from lorasc_fx.export.peft_adapter import Adapter, Pair, read_adapter
from lorasc_fx.graph import matches, named_weights
from lorasc_fx.runtime import Cascade
from lorasc_fx.runtime.adopt import adopt
from lorasc_fx.spec import CascadeSpec, Rule
from lorasc_fx.state import Factors

__all__ = ["from_peft", "peft_spec"]


def from_peft(
    folder: str | PathLike[str],
    model: nn.Module | torch.export.ExportedProgram | str | PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    spec: CascadeSpec | None = None,
    frontend: str = "auto",
    base: str | PathLike[str] = "memory",
) -> Cascade:
    """Adapt a model, and take a LoRA adapter that peft trained as the first expert, with coefficient 1.

    Plain LoRA, rsLoRA, patterns of ranks and alphas, linears, transformers' Conv1D, convolutions, embeddings,
    parameters (`target_parameters`), `modules_to_save`, biases. JSON and safetensors are read, and nothing else.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        model, args, kwargs, frontend, base: as for `adapt`; the model is the adapter's base.
        spec: what is asked of the training that follows; by default `export.peft_spec(folder, model)`. It has to adapt
            every weight that the adapter does, and to train in full what the adapter did.

    Returns:
        The cascade at stage 1. Its slow weights are the base with the adapter merged, exactly; its branches are new.

    Raises:
        CheckpointError: the adapter is damaged, of another model, or no plain LoRA; or the spec leaves out what it
        holds. And what `adapt` raises. The model is as it was.
    """
    opened = open_model(model)
    adapter = read_adapter(path_of(folder), opened)
    asked = spec if spec is not None else _spec_of(adapter, opened)
    changes = _changes(adapter, opened, asked)
    cascade = adapt(opened, args, kwargs, spec=asked, frontend=frontend, base=base)
    try:
        _install(cascade, adapter, changes)
    except BaseException:
        cascade.release()
        raise
    return cascade


def peft_spec(folder: str | PathLike[str], model: nn.Module) -> CascadeSpec:
    """Return a spec that adapts what an adapter does, at its ranks, scales and dropout, and trains what it trained.

    `dataclasses.replace` gives it another pace or noise.

    Raises:
        CheckpointError: as `from_peft` does.
    """
    return _spec_of(read_adapter(path_of(folder), model), model)


def _spec_of(adapter: Adapter, model: nn.Module) -> CascadeSpec:
    config, canonical = adapter.config, named_weights(model).canonical
    usual = (config.rank, config.lora_alpha)
    rules = [
        Rule(glob.escape(name), pair.rank, pair.lora_alpha)
        for name, pair in adapter.pairs.items()
        if (pair.rank, pair.lora_alpha) != usual
    ]
    return CascadeSpec(
        targets=tuple(glob.escape(name) for name in adapter.pairs),
        train=tuple(dict.fromkeys(glob.escape(canonical[name]) for name in adapter.whole if name in canonical)),
        rules=tuple(rules),
        rank=config.rank,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        dropout=config.dropout,
    )


def _changes(adapter: Adapter, model: nn.Module, spec: CascadeSpec) -> dict[str, Pair]:
    """Return the pairs, one for each weight as it will be tied.

    Raises:
        CheckpointError: of a tied weight the adapter changes one name only, or each in another way.
    """
    changes = {}
    groups: list[list[str]] = []
    for names in named_weights(model).names.values():
        apart = [name for name in names if any(matches(pattern, (name,)) for pattern in spec.untie)]
        rest = [name for name in names if name not in apart]
        groups += [[name] for name in apart] + ([rest] if rest else [])
    for group in groups:
        held = [adapter.pairs[name] for name in group if name in adapter.pairs]
        if not held:
            continue
        if len(held) < len(group) or any(not _same(held[0], each) for each in held[1:]):
            raise CheckpointError(
                f"{adapter.folder}: {' and '.join(group)} are one weight, and the adapter changes "
                f"{' and '.join(each.place.name for each in held)}, each by itself; untie them: spec with "
                f"untie=({group[-1]!r},)",
                code="tied-weights-differ",
            )
        changes[group[0]] = held[0]
    return changes


def _same(one: Pair, other: Pair) -> bool:
    pairs = ((one.factors.b, other.factors.b), (one.factors.a, other.factors.a))
    return one.scale == other.scale and all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def _install(cascade: Cascade, adapter: Adapter, changes: Mapping[str, Pair]) -> None:
    """Put an adapter into a cascade whose stage has not begun."""
    core, canonical = cascade.core, named_weights(cascade.model).canonical
    reasons = {each.weight: f"{each.reason.value} ({each.sentence})" for each in cascade.refusals}
    experts, left_out = {}, []
    for name, pair in changes.items():
        own = canonical[name]
        if core.plan.site(own) is None:
            left_out.append(f"{own} is not adapted here: {reasons.get(own, 'no call has used it yet')}")
            continue
        experts[own] = [(1.0, Factors(pair.factors.b * pair.scale, pair.factors.a))]
    trained, buffers = {}, {}
    for name, value in adapter.whole.items():
        if name not in canonical:
            buffers[name] = value
        elif canonical[name] in core.slow.trained:
            trained[canonical[name]] = value
        else:
            left_out.append(f"{name} was trained in full; add it to spec.train")
    if left_out:
        raise CheckpointError(
            f"{adapter.folder}: the spec leaves out what the adapter holds: {'; '.join(left_out)}",
            code="spec-omits-adapter",
        )
    adopt(core, experts, trained, buffers)
