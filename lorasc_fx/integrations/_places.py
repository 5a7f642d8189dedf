"""Where each tensor of a cascade lies under a tensor parallel plan: which axis of it is split, or that each process has
a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from lorasc_fx.branch import is_quantized
from lorasc_fx.errors import SpecError, nearest
from lorasc_fx.graph import matches, named_weights
from lorasc_fx.plan import Site
from lorasc_fx.runtime import Cascade

__all__ = ["Style", "places_of"]

Style = Literal["colwise", "rowwise"]


def places_of(cascade: Cascade, mesh: DeviceMesh, plan: Mapping[str, Style]) -> dict[str, Placement]:
    """Return how each parameter of the model and of the branches lies that is to become a DTensor."""
    weights, sites = named_weights(cascade.model), cascade._run.plan.by_weight
    count, used = mesh.size(), set[str]()
    found: dict[str, Placement] = {name: Replicate() for name in cascade._run.trainable()}
    for name in weights.matrices:
        pattern = next((each for each in plan if matches(each, weights.names[name])), None)
        if pattern is None:
            continue
        used.add(pattern)
        style, site, parameter = plan[pattern], sites.get(name), weights.parameters[name]
        if style not in get_args(Style):
            raise SpecError(f"parallelize: {pattern!r} is {style!r}; give 'colwise' or 'rowwise'")
        _check_weight(cascade.model, weights.names[name], parameter, site)
        turned = site is not None and site.layout == "in_out"
        out, into = (1, 0) if turned else (0, 1)
        axis = out if style == "colwise" else into
        if parameter.shape[axis] % count:
            raise SpecError(
                f"parallelize: {name} is {list(parameter.shape)}, and {parameter.shape[axis]} does not divide by "
                f"{count} processes; leave it out, or take another number",
                code="not-divisible",
            )
        found[f"model.{name}"] = Shard(axis)
        bias = f"{name.rpartition('.')[0]}.bias".lstrip(".")
        if bias in weights.parameters:
            found[f"model.{bias}"] = Shard(0) if style == "colwise" else Replicate()
        if site is not None:
            split, shard = ("lora_B", Shard(0)) if style == "colwise" else ("lora_A", Shard(1))
            found[f"branches.{site.key}.{split}"] = shard
    unused = [each for each in plan if each not in used]
    if unused:
        known = [*weights.matrices, *(name.rpartition(".")[0] for name in weights.matrices)]
        raise SpecError(
            f"parallelize: {unused[0]!r} means no weight matrix{nearest(unused[0], known)}", code="unknown-target"
        )
    return found


def _check_weight(model: nn.Module, names: tuple[str, ...], parameter: torch.Tensor, site: Site | None) -> None:
    """Raise SpecError for a weight that is not that of a linear layer, used whole."""
    name, *tied = names
    holder = model.get_submodule(name.rpartition(".")[0])
    fault = ""
    if is_quantized(parameter):
        fault = "is quantized"
    elif tied:
        fault = f"is tied to {tied[0]}"
    elif site is not None and site.kind != "linear":
        fault = f"is of kind {site.kind}"
    elif site is not None and site.parts:
        fault = "is used in slices, which would be cut across"
    elif parameter.dim() != 2 or (site is None and not isinstance(holder, nn.Linear)):
        fault = "is no weight of a linear layer"
    if fault:
        raise SpecError(
            f"parallelize: {name} {fault}; only linear layers go by columns or rows", code="not-a-linear-layer"
        )
