"""The metadata that passes store in a graph module and its nodes.

`graph_module.meta` holds a `Record`: the facts that passes provided, the plan, and the refusals. `node.meta` holds
marks: which pass created the node (`MADE_BY`), and which op the node replaced (`REPLACED_CALL`). Record and marks
survive copies of the graph and most foreign passes. `strip` removes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.branch import Branch
from lorasc_fx.plan import Plan, Refusal
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.state import SlowWeights

_RECORD = "lorasc_fx"
MADE_BY = "lorasc_fx.made_by"
REPLACED_CALL = "lorasc_fx.replaced_call"
NO_SITES = Plan(CascadeSpec())
"""The plan of a graph before `MatchSites`."""


@dataclass(frozen=True)
class Use:
    """The use of a weight at a node that gets a branch. The node is an op that reads the weight, or the weight itself.

    Args:
        weight: name of the weight.
        form: name of the form of the node, or `on-weight` if the node is the weight.
        merged: whether the branch replaces the node. Otherwise the branch is added to the output of the node.
    """

    weight: str
    form: str
    merged: bool = False


@dataclass(frozen=True)
class AdapterInput:
    """One tensor of an adapter that a graph takes as an input.

    Args:
        name: name of the placeholder, in lower case as in torch.export: `fc_weight_scale` for the scale of `fc.weight`.
        weight: name of the adapted weight.
        tensor: name of the branch's parameter, or `scale`.
        shape: shape of the tensor, padded to the rank of the inputs; () for a scale.
        dtype: dtype of the tensor.
    """

    name: str
    weight: str
    tensor: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Lifted:
    """The record of an `AdapterInputs` pass.

    Args:
        rank: rank to which the tensors are padded.
        inputs: the adapter inputs, in the order of the graph's last placeholders.
        branches: {key: branch before the pass, with values}.
    """

    rank: int = 0
    inputs: tuple[AdapterInput, ...] = ()
    branches: Mapping[str, Branch] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Inlined:
    """The record of an `InlineBranches` pass, from which the branch nodes are restored.

    Args:
        branches: {key: branch before the pass}.
        calls: (key, options) of the branch nodes, each pair once.
    """

    branches: Mapping[str, Branch] = field(default_factory=dict, compare=False)
    calls: tuple[tuple[str, Mapping[str, Any]], ...] = ()


@dataclass(frozen=True)
class Record:
    """The metadata of a graph module.

    Args:
        facts: facts that earlier passes provided, such as `sites-matched` and `branches-inserted`.
        owner: name of the child that owns the weights: `model` for a live model, whose weights the cascade changes. ""
            if the graph module itself owns the weights. Then passes change them.
        plan: spec, sites and stage. It has no sites before `MatchSites`.
        refusals: the weight matrices without a branch, with reasons.
        unreached: names of the weight matrices that the graph does not use.
        slow: slow state of the sites and of weights with noise, if the graph module owns its weights.
        branched: names of the weights whose branches this graph called just after the insertion.
        frozen: {weight: original Parameter}, for the Parameters that the insertion replaced by frozen ones.
        lifted: the adapter inputs. Empty if the branches hold their tensors.
        inlined: the branches that are plain nodes. Empty if all branches are branch nodes.
    """

    facts: frozenset[str] = frozenset()
    owner: str = ""
    plan: Plan = NO_SITES
    refusals: tuple[Refusal, ...] = ()
    unreached: tuple[str, ...] = ()
    slow: SlowWeights = field(default_factory=SlowWeights)
    branched: frozenset[str] = frozenset()
    frozen: Mapping[str, nn.Parameter] = field(default_factory=dict, compare=False)
    lifted: Lifted = Lifted()
    inlined: Inlined = Inlined()

    @property
    def prefix(self) -> str:
        """Prefix of a weight's name in the target of a node, `model.` or ""."""
        return f"{self.owner}." if self.owner else ""


def record_of(graph_module: fx.GraphModule) -> Record:
    """Return the record of a graph module, or an empty one."""
    record = graph_module.meta.get(_RECORD)
    return record if isinstance(record, Record) else Record()


def set_record(graph_module: fx.GraphModule, record: Record) -> None:
    """Set the record of a graph module."""
    graph_module.meta[_RECORD] = record


def at_stage(graph_module: fx.GraphModule, stage: int) -> None:
    """Set the stage of the plan in the record."""
    record = record_of(graph_module)
    set_record(graph_module, replace(record, plan=replace(record.plan, stage=stage)))


def strip(graph_module: fx.GraphModule) -> None:
    """Remove the record and the marks of all nodes."""
    graph_module.meta.pop(_RECORD, None)
    for node in graph_module.graph.nodes:
        node.meta.pop(MADE_BY, None)
        node.meta.pop(REPLACED_CALL, None)
