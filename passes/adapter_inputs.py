"""Make the adapter an input of the graph, so that one graph computes with any adapter or with none.

    %fc = linear(%x, %weight)
    %fc_lora = branches.fc/weight(%fc, %x, at="beside")

becomes

    %fc_weight_lora_a = placeholder
    %fc_weight_lora_b = placeholder
    %fc_weight_scale = placeholder
    %fc = linear(%x, %weight)
    %fc_lora = branches.fc/weight(%fc, %x, at="beside",
        tensors={"lora_A": %fc_weight_lora_a, "lora_B": %fc_weight_lora_b}, scale=%fc_weight_scale)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from lorasc_fx.branch import Branch
from lorasc_fx.errors import SpecError
from lorasc_fx.graph import GraphEditor, branch_nodes, record_of
from lorasc_fx.graph.record import AdapterInput, Lifted
from lorasc_fx.plan import Site
from lorasc_fx.util.decode import is_integer

from .base import CascadePass

SCALE = "scale"
"""Name of the scale among the tensors of a site."""


@dataclass(frozen=True)
class AdapterInputs(CascadePass):
    """Make the parameters and the scale of each inserted branch inputs of the graph.

    The new inputs are the last ones of the signature, and can be passed by name. They are in the order of the plan's
    sites, without the sites that this graph does not call. The inputs of a site are the parameters of its branch, in
    the order of `Branch.shapes`, and the scale, of shape []. `adapter_inputs` lists the inputs, and `adapter_values`
    returns their values in the branches.

    The parameters must be padded with zeros to `max_rank`. If all are zero, or the scale is 0, the graph computes the
    base model, bit for bit.

    A low-rank branch takes A [rank, in] and B [out, rank]. With placement `beside`, it can instead take one adapter per
    row of axis 0 of the batch: A [rows, rank, in], B [rows, out, rank] and scale [rows]. Other branches compute the
    adapted weight from their tensors. In the new graph, branches have no dropout, and their modules hold no values. The
    new graph can be traced into plain operations. The graph before the pass keeps its branches.

    Args:
        max_rank: rank of the inputs.

    Raises:
        SpecError: the rank is not an integer of 1 or more.
        PassError: a branch cannot get its tensors as inputs. The message names the site and the reason.
    """

    max_rank: int

    def __post_init__(self) -> None:
        if not is_integer(self.max_rank, 1):
            raise SpecError(f"{self.name}: max_rank is {self.max_rank!r}; give an integer of 1 or more")

    name: ClassVar[str] = "adapter-inputs"
    requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})
    provides: ClassVar[frozenset[str]] = frozenset({"adapter-inputs"})
    removes: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

    def done(self, graph_module: fx.GraphModule) -> bool:
        """Whether the pass has already run with this rank."""
        return super().done(graph_module) and record_of(graph_module).lifted.rank == self.max_rank

    def rewrite(self, graph: GraphEditor) -> None:
        """Add the inputs, make the branch nodes read them, and remove the values from the branches."""
        plan = graph.record.plan
        called = {branch.weight_name for branch in branch_nodes(graph.module).values()}
        sites, branches = [site for site in plan.sites if site.weight in called], graph.branches
        # Add one placeholder per tensor.
        values = {site.weight: _values(site, branches[site.key], self.max_rank) for site in sites}
        order = [(weight, name, value) for weight, tensors in values.items() for name, value in tensors.items()]
        placeholders = graph.add_inputs([f"{weight}.{name}" for weight, name, _ in order])
        by_weight: dict[str, dict[str, fx.Node]] = {site.weight: {} for site in sites}
        for node, (weight, name, _) in zip(placeholders, order, strict=True):
            by_weight[weight][name] = node
        # Make the branch nodes read the placeholders.
        for node, branch in reversed(branch_nodes(graph.module).items()):
            if node < placeholders[-1]:  # in graphs of torch.export, weights come before the placeholders
                graph.move_after(node, placeholders[-1])
            tensors = dict(by_weight[branch.weight_name])
            scale = tensors.pop(SCALE)
            graph.set_arguments(node, node.args, {**node.kwargs, "tensors": tensors, "scale": scale})
        # Keep the branches that have values in the record, for `adapter_values`.
        graph.set_branches({key: branch.without_values() for key, branch in branches.items()})
        inputs = tuple(
            AdapterInput(node.name, weight, name, tuple(value.shape), value.dtype)
            for node, (weight, name, value) in zip(placeholders, order, strict=True)
        )
        graph.record = replace(graph.record, lifted=Lifted(self.max_rank, inputs, branches))


def adapter_inputs(graph_module: fx.GraphModule) -> tuple[AdapterInput, ...]:
    """Return the inputs that `AdapterInputs` added, in the order of the signature. An empty tuple if there are none."""
    return record_of(graph_module).lifted.inputs


def adapter_values(graph_module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Return {input name: value}. With these values the graph computes the same as before `AdapterInputs`."""
    record = record_of(graph_module)
    inputs, branches, rank = record.lifted.inputs, record.lifted.branches, record.lifted.rank
    sites = [record.plan.by_weight[weight] for weight in dict.fromkeys(item.weight for item in inputs)]
    values = {site.weight: _values(site, branches[site.key], rank) for site in sites}
    return {item.name: values[item.weight][item.tensor] for item in inputs}


def _values(site: Site, branch: Branch, rank: int) -> dict[str, torch.Tensor]:
    """Return {name: padded parameter} of a branch, with the scale as the last item."""
    values = branch.padded(site, rank)
    like = next(iter(values.values()))
    return {**values, SCALE: torch.tensor(branch.scale, dtype=like.dtype, device=like.device)}
