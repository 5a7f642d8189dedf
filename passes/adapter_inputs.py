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

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import fx

from lorasc_fx.branch import Branch, Placement, fill
from lorasc_fx.errors import PassError, SpecError, UnknownTarget, listed
from lorasc_fx.graph import GraphEditor, branch_nodes, matches, record_of
from lorasc_fx.graph.branch_calls import INPUT_OPTIONS
from lorasc_fx.graph.record import AdapterInput, Lifted
from lorasc_fx.plan import Site
from lorasc_fx.util.decode import is_integer

from .base import CascadePass

SCALE = "scale"
"""Name of the scale among the tensors of a site."""


@dataclass(frozen=True)
class AdapterInputs(CascadePass):
    """Make the parameters and the scale of each inserted branch inputs of the graph. `BindAdapter` is the inverse.

    The new inputs are the last ones of the signature, and can be passed by name. They are ordered by site as in the
    plan; a site that this graph does not call has none. The inputs of a site are the parameters of its branch, in the
    order of `Branch.shapes`, and the scale, of shape []. `adapter_inputs` lists the inputs, and `adapter_values`
    returns the values of the branches for them.

    The parameters must be padded with zeros to `max_rank`. If all are zero, or the scale is 0, the graph computes the
    base model, bit for bit.

    A low-rank branch takes A [rank, in] and B [out, rank]. With placement `beside`, it also takes one adapter for each
    row of axis 0 of the batch: A [rows, rank, in], B [rows, out, rank] and scale [rows]. Other branches compute the
    adapted weight from their tensors. Branches have no dropout in the new graph, and their modules no values. The graph
    can be traced into plain operations.

    Args:
        max_rank: rank of the inputs.
        sites: globs on the names of weights. Branches of other sites are not changed.

    Raises:
        SpecError: the rank is not an integer of 1 or more.
        UnknownTarget: a glob matches no site.
        PassError: a branch cannot get its tensors as inputs. The message has the site and the reason.
    """

    max_rank: int
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if not is_integer(self.max_rank, 1):
            raise SpecError(f"{self.name}: max_rank is {self.max_rank!r}; give an integer of 1 or more")

    name: ClassVar[str] = "adapter-inputs"
    requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})
    provides: ClassVar[frozenset[str]] = frozenset({"adapter-inputs"})
    removes: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

    def done(self, graph_module: fx.GraphModule) -> bool:
        """Whether the pass has run already with this rank, and for all of these sites that the graph calls."""
        record = record_of(graph_module)
        if not super().done(graph_module) or record.lifted.rank != self.max_rank:
            return False
        inputs = {item.weight for item in record.lifted.inputs}
        called = {branch.weight_name for branch in branch_nodes(graph_module).values()}
        return all(site.weight in inputs for site in record.plan.sites if site.weight in called and self._selects(site))

    def rewrite(self, graph: GraphEditor) -> None:
        """Add the inputs, make the branch nodes read them, and remove the values from the branches."""
        plan = graph.record.plan
        # Select the sites, and check them.
        called = {branch.weight_name for branch in branch_nodes(graph.module).values()}
        chosen = [site for site in plan.sites if self._selects(site)]
        sites = [site for site in chosen if site.weight in called]
        for pattern in self.sites:
            if not any(matches(pattern, (site.weight, *site.aliases)) for site in plan.sites):
                names = [site.weight for site in plan.sites]
                raise UnknownTarget(f"{self.name}: sites: {pattern!r} matches no site{listed(names)}")
        weights, branches = {site.weight for site in sites}, graph.branches
        # Add one placeholder per tensor.
        values = {site.weight: _values(site, branches[site.key], self.max_rank) for site in sites}
        order = [(weight, name, value) for weight, tensors in values.items() for name, value in tensors.items()]
        placeholders = graph.add_inputs([f"{weight}.{name}" for weight, name, _ in order])
        by_weight: dict[str, dict[str, fx.Node]] = {site.weight: {} for site in sites}
        for node, (weight, name, _) in zip(placeholders, order, strict=True):
            by_weight[weight][name] = node
        # Make the branch nodes read the placeholders.
        for node, branch in reversed(branch_nodes(graph.module).items()):
            if branch.weight_name in weights:
                if node < placeholders[-1]:  # in graphs of torch.export, weights come before the placeholders
                    graph.move_after(node, placeholders[-1])
                tensors = dict(by_weight[branch.weight_name])
                scale = tensors.pop(SCALE)
                graph.set_arguments(node, node.args, {**node.kwargs, "tensors": tensors, "scale": scale})
        # Keep the branches with their values in the record, for BindAdapter.
        lifted = {site.key: branches[site.key] for site in chosen}
        graph.set_branches({**branches, **{key: branch.without_values() for key, branch in lifted.items()}})
        inputs = tuple(
            AdapterInput(node.name, weight, name, tuple(value.shape), value.dtype)
            for node, (weight, name, value) in zip(placeholders, order, strict=True)
        )
        graph.record = replace(graph.record, lifted=Lifted(self.max_rank, inputs, lifted))

    def _selects(self, site: Site) -> bool:
        """Whether one of the globs matches a name of the site."""
        return any(matches(pattern, (site.weight, *site.aliases)) for pattern in self.sites)


@dataclass(frozen=True)
class BindAdapter(CascadePass):
    """Store an adapter in the branches and remove the adapter inputs. The inverse of `AdapterInputs`, node for node.

    Args:
        tensors: value of each input, by its name and in its shape, padded with zeros. None restores the values that the
            branches had before `AdapterInputs`.

    Raises:
        PassError: an input has no value, a value of another shape, or a value with inf or nan; a value has a larger
            rank than the plan, beyond the padding; or a scale differs from the plan.
    """

    tensors: Mapping[str, torch.Tensor] | None = field(default=None, compare=False, repr=False)

    name: ClassVar[str] = "bind-adapter"
    requires: ClassVar[frozenset[str]] = frozenset({"adapter-inputs"})
    provides: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})
    removes: ClassVar[frozenset[str]] = frozenset({"adapter-inputs"})

    def rewrite(self, graph: GraphEditor) -> None:
        """Remove the inputs and restore the branches."""
        lifted, plan = graph.record.lifted, graph.record.plan
        branches = dict(lifted.branches)
        if self.tensors is not None:
            _check_tensors(lifted.inputs, self.tensors)
            values: dict[str, dict[str, torch.Tensor]] = {}
            for adapter_input in lifted.inputs:
                values.setdefault(adapter_input.weight, {})[adapter_input.tensor] = self.tensors[adapter_input.name]
            for weight, tensors in values.items():
                site = plan.by_weight[weight]
                branches[site.key] = _bound(site, branches[site.key], tensors)
        # Restore the calls of the branches, then remove the inputs that nothing reads any more.
        names = {adapter_input.name for adapter_input in lifted.inputs}
        for node in branch_nodes(graph.module):
            kwargs = {name: value for name, value in node.kwargs.items() if name not in INPUT_OPTIONS}
            graph.set_arguments(node, node.args, kwargs)
            # AdapterInputs moved branches of weights after the placeholders.
            if kwargs["at"] is Placement.WEIGHT and isinstance(node.args[0], fx.Node):
                graph.move_after(node, node.args[0])
        graph.remove_inputs([node for node in graph.nodes if node.op == "placeholder" and node.name in names])
        graph.set_branches({**graph.branches, **branches})
        graph.record = replace(graph.record, lifted=Lifted())


def adapter_inputs(graph_module: fx.GraphModule) -> tuple[AdapterInput, ...]:
    """Return the inputs that `AdapterInputs` added, in the order of the signature. An empty tuple if there are none."""
    return record_of(graph_module).lifted.inputs


def adapter_values(graph_module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Return the values, by input name, with which the graph computes the same as before `AdapterInputs`."""
    record = record_of(graph_module)
    inputs, branches, rank = record.lifted.inputs, record.lifted.branches, record.lifted.rank
    sites = [record.plan.by_weight[weight] for weight in dict.fromkeys(item.weight for item in inputs)]
    values = {site.weight: _values(site, branches[site.key], rank) for site in sites}
    return {item.name: values[item.weight][item.tensor] for item in inputs}


def _check_tensors(inputs: Sequence[AdapterInput], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise PassError unless there is exactly one finite tensor of the right shape for each input, by its name."""
    names = {adapter_input.name for adapter_input in inputs}
    if different := sorted(names ^ tensors.keys()):
        name = different[0]
        problem = f"the input {name} has no value" if name in names else f"{name} is not an input"
        raise PassError(f"bind-adapter: {problem}; call adapter_inputs to list the inputs", code="adapter-does-not-fit")
    for adapter_input in inputs:
        name, shape = adapter_input.name, tuple(tensors[adapter_input.name].shape)
        if shape != adapter_input.shape:
            raise PassError(
                f"bind-adapter: {name} has shape {shape}, but the input has shape {adapter_input.shape}; pad the "
                "factors with zeros to the rank of the inputs",
                code="adapter-does-not-fit",
            )
        if not tensors[name].isfinite().all():
            raise PassError(f"bind-adapter: {name} contains inf or nan; give finite factors", code="non-finite")


def _values(site: Site, branch: Branch, rank: int) -> dict[str, torch.Tensor]:
    """Return the padded parameters of a branch by name, and its scale as the last item."""
    values = branch.padded(site, rank)
    like = next(iter(values.values()))
    return {**values, SCALE: torch.tensor(branch.scale, dtype=like.dtype, device=like.device)}


def _bound(site: Site, branch: Branch, values: Mapping[str, torch.Tensor]) -> Branch:
    """Return a copy of a branch with other values, from which the padding is removed."""
    bound = copy.deepcopy(branch)
    scale = values[SCALE].item()
    if scale != torch.tensor(site.scale, dtype=values[SCALE].dtype).item():
        raise PassError(
            f"bind-adapter: the scale of {site.weight} is {scale}, but the plan says {site.scale}; multiply a factor "
            "by the ratio and pass the scale of the plan",
            code="adapter-does-not-fit",
        )
    for name, shape in branch.shapes(site).items():
        value = branch.cut(name, values[name], shape)
        # The entries that `cut` removes must be padding.
        if not torch.equal(branch.pad(name, value, tuple(values[name].shape)), values[name]):
            raise PassError(
                f"bind-adapter: {name} of {site.weight} has a larger rank than {site.rank}, the rank of the plan; use "
                "a graph whose spec has that rank",
                code="rank-too-large",
            )
        fill(bound.get_parameter(name), value)
    return bound
