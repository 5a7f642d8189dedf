"""Adapters as inputs of the graph: one graph computes with any adapter of its sites, and with none.

    %fc = linear(%x, %weight)
    %fc_lora = branches.fc/weight(%fc, %x, at="beside")

becomes

    %fc_weight_lora_a, %fc_weight_lora_b, %fc_weight_scale = placeholder
    %fc = linear(%x, %weight)
    %fc_lora = branches.fc/weight(%fc, %x, at="beside", tensors={...}, scale=%fc_weight_scale)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import fx

from lorasc_fx.branch import Branch, fill
from lorasc_fx.errors import PassError, UnknownTarget, listed
from lorasc_fx.graph import GraphEditor, branch_nodes, matches, record_of
from lorasc_fx.graph.branch_calls import INPUT_OPTIONS, shared_input
from lorasc_fx.graph.record import AdapterInput, Lifted
from lorasc_fx.plan import Site

from .base import CascadePass

SCALE = "scale"
"""Name of the scale among the tensors of a site."""


@dataclass(frozen=True)
class AdapterInputs(CascadePass):
    """Make the tensors of each inserted branch, and its scale, inputs of the graph.

    The inputs follow the others in the signature, and can be given by name. They are ordered by site, as in the plan
    (sites that this graph does not call have none). The inputs of a site are the parameters of its branch, in the
    order of `Branch.shapes`, and its scale, of shape []. `adapter_inputs` lists them, and
    `adapter_values` has the values of the branches for them.

    Zeros pad the parameters to `max_rank`. All zeros, or the scale 0, are no adapter: the graph computes the base, bit
    for bit. Low-rank branches compute with A [rank, in] and B [out, rank], or, beside an op, with A [rows, rank, in],
    B [rows, out, rank] and a scale [rows] for each row of axis 0 of the batch. Other branches compute the weight that
    their tensors give. Dropout of branches is left out. The graph holds no values of branches any more, and traces into
    plain operations. `BindAdapter` is the inverse.

    Args:
        max_rank: rank of the inputs.
        sites: globs on the names of weights; the branches of others stay as they are.

    Raises:
        UnknownTarget: a glob matches no site.
        PassError: a branch cannot get its tensors as inputs (the message names the site and the reason).
    """

    max_rank: int
    sites: tuple[str, ...] = ("*",)

    name: ClassVar[str] = "adapter-inputs"
    requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})
    provides: ClassVar[frozenset[str]] = frozenset({"adapter-inputs"})
    removes: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

    def done(self, graph_module: fx.GraphModule) -> bool:
        """Whether the pass has run already, with these inputs."""
        lifted = record_of(graph_module).lifted
        return super().done(graph_module) and lifted is not None and lifted.rank == self.max_rank

    def rewrite(self, graph: GraphEditor) -> None:
        """Add the inputs, let the branch nodes read them, and take the values out of the branches."""
        plan = graph.record.plan
        assert plan is not None
        called = {branch.weight_name for branch in branch_nodes(graph.module).values()}
        chosen = [site for site in plan.sites if self._means(site)]
        sites = [site for site in chosen if site.weight in called]
        for pattern in self.sites:
            if not any(matches(pattern, (site.weight, *site.aliases)) for site in plan.sites):
                names = [site.weight for site in plan.sites]
                raise UnknownTarget(f"{self.name}: sites: {pattern!r} matches no site{listed(names)}")
        given, branches = {site.weight for site in sites}, graph.branches
        for node, branch in branch_nodes(graph.module).items():
            if branch.weight_name in given and shared_input(node) is not None:
                raise PassError(
                    f"{self.name}: the branch of {branch.weight_name} reads a product that several branches share; run "
                    "split-inputs before",
                    code="requirement-not-met",
                )
        values = {site.weight: _values(site, branches[site.key], self.max_rank) for site in sites}
        order = [(weight, tensor, value) for weight, of in values.items() for tensor, value in of.items()]
        placeholders = graph.add_inputs([f"{weight}.{tensor}" for weight, tensor, _ in order])
        read: dict[str, dict[str, fx.Node]] = {site.weight: {} for site in sites}
        for node, (weight, tensor, _) in zip(placeholders, order, strict=True):
            read[weight][tensor] = node
        for node, branch in reversed(branch_nodes(graph.module).items()):
            if branch.weight_name in given:
                if node < placeholders[-1]:  # torch.export reads weights before inputs
                    graph.move_after(node, placeholders[-1])
                tensors = dict(read[branch.weight_name])
                scale = tensors.pop(SCALE)
                graph.set_arguments(node, node.args, {**node.kwargs, "tensors": tensors, "scale": scale})
        lifted = {site.key: branches[site.key] for site in chosen}
        graph.set_branches({**branches, **{key: branch.without_values() for key, branch in lifted.items()}})
        inputs = tuple(
            AdapterInput(node.name, weight, tensor, tuple(value.shape), value.dtype)
            for node, (weight, tensor, value) in zip(placeholders, order, strict=True)
        )
        graph.record = replace(graph.record, lifted=Lifted(self.max_rank, inputs, lifted))

    def _means(self, site: Site) -> bool:
        return any(matches(pattern, (site.weight, *site.aliases)) for pattern in self.sites)


@dataclass(frozen=True)
class BindAdapter(CascadePass):
    """Give the branches tensors of their own again: the inverse of adapter-inputs, node for node.

    Args:
        tensors: values by the names of the inputs. They may be padded as the inputs are, and the scale is multiplied
            into B if it is not that of the plan. None to give the branches the values that they had.

    Raises:
        PassError: an input has no value, or one of another shape; a value has a larger rank than the plan's.
    """

    tensors: Mapping[str, torch.Tensor] | None = field(default=None, compare=False, repr=False)

    name: ClassVar[str] = "bind-adapter"
    requires: ClassVar[frozenset[str]] = frozenset({"adapter-inputs"})
    provides: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})
    removes: ClassVar[frozenset[str]] = frozenset({"adapter-inputs"})

    def rewrite(self, graph: GraphEditor) -> None:
        """Remove the inputs, and set the branches."""
        lifted, plan = graph.record.lifted, graph.record.plan
        assert lifted is not None
        assert plan is not None
        branches = dict(lifted.branches)
        if self.tensors is not None:
            check_tensors(lifted.inputs, self.tensors, self.name)
            given: dict[str, dict[str, torch.Tensor]] = {}
            for each in lifted.inputs:
                given.setdefault(each.weight, {})[each.tensor] = self.tensors[each.name]
            sites = plan.by_weight
            bound = {sites[weight].key: (sites[weight], values) for weight, values in given.items()}
            branches |= {key: _bound(site, branches[key], values) for key, (site, values) in bound.items()}
        names = {each.name for each in lifted.inputs}
        for node in branch_nodes(graph.module):
            kwargs = {name: value for name, value in node.kwargs.items() if name not in INPUT_OPTIONS}
            graph.set_arguments(node, node.args, kwargs)
            if kwargs["at"] == "on_weight" and isinstance(node.args[0], fx.Node):
                graph.move_after(node, node.args[0])
        graph.remove_inputs([node for node in graph.nodes if node.op == "placeholder" and node.name in names])
        graph.set_branches({**graph.branches, **branches})
        graph.record = replace(graph.record, lifted=None)


def adapter_inputs(graph_module: fx.GraphModule) -> tuple[AdapterInput, ...]:
    """Return the inputs that `AdapterInputs` has added, in their order: names, weights, tensors, shapes and dtypes."""
    lifted = record_of(graph_module).lifted
    return lifted.inputs if lifted is not None else ()


def adapter_values(graph_module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Return the values for the inputs, by name, with which the graph computes as before `AdapterInputs`."""
    record = record_of(graph_module)
    if record.lifted is None or record.plan is None:
        return {}
    sites = [record.plan.by_weight[weight] for weight in dict.fromkeys(each.weight for each in record.lifted.inputs)]
    branches, rank = record.lifted.branches, record.lifted.rank
    values = {site.weight: _values(site, branches[site.key], rank) for site in sites}
    return {each.name: values[each.weight][each.tensor] for each in record.lifted.inputs}


def check_tensors(inputs: Sequence[AdapterInput], tensors: Mapping[str, torch.Tensor], call: str) -> None:
    """Raise PassError unless there is a tensor of the right shape for each input, and no other."""
    names = {each.name for each in inputs}
    if odd := sorted(names ^ tensors.keys()):
        what = f"no value for the input {odd[0]}" if odd[0] in names else f"a value for {odd[0]}, which is no input"
        raise PassError(f"{call}: there is {what}; adapter_inputs lists the inputs", code="adapter-does-not-fit")
    for each in inputs:
        if tuple(tensors[each.name].shape) != each.shape:
            raise PassError(
                f"{call}: {each.name} has shape {tuple(tensors[each.name].shape)}, and the input {each.shape}; pad "
                "the factors with zeros to the rank of the inputs",
                code="adapter-does-not-fit",
            )


def _values(site: Site, branch: Branch, rank: int) -> dict[str, torch.Tensor]:
    """Return the padded tensors of a branch and its scale, in their order."""
    values = branch.padded(site, rank)
    like = next(iter(values.values()))
    return {**values, SCALE: torch.tensor(branch.scale, dtype=like.dtype, device=like.device)}


def _bound(site: Site, branch: Branch, given: Mapping[str, torch.Tensor]) -> Branch:
    """Return a copy of a branch with these values, without their padding."""
    bound = copy.deepcopy(branch)
    scale = given[SCALE].item()
    if scale != torch.tensor(site.scale, dtype=given[SCALE].dtype).item():
        raise PassError(
            f"bind-adapter: the scale of {site.weight} is {scale}, and the plan has {site.scale}; multiply the "
            "difference into a factor",
            code="adapter-does-not-fit",
        )
    for name, shape in branch.shapes(site).items():
        value = branch.cut(name, given[name], shape)
        if not torch.equal(branch.pad(name, value, tuple(given[name].shape)), given[name]):
            raise PassError(
                f"bind-adapter: {name} of {site.weight} has a larger rank than {site.rank}, which the plan has; lift "
                "the graph of a plan of that rank",
                code="rank-too-large",
            )
        fill(bound.get_parameter(name), value)
    return bound
