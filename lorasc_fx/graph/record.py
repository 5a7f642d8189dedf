"""The metadata of a graph between passes: facts, plan and refusals of the module, uses and stamps of its nodes.

A record is kept in `graph_module.meta`, a use or a stamp in `node.meta`. Both survive copies of the graph and foreign
passes. `strip` removes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from lorasc_fx.branch import Branch
from lorasc_fx.plan import Plan, Refusal
from lorasc_fx.state import SlowWeights

_RECORD = "lorasc_fx"
USE = "lorasc_fx.use"
MADE_BY = "lorasc_fx.made_by"
REPLACED_CALL = "lorasc_fx.replaced_call"


@dataclass(frozen=True)
class Use:
    """Marks a node that uses a site's weight.

    Args:
        weight: the site.
        form: name of the form of the node.
        merged: whether the branch replaces the node, or stands beside it.
    """

    weight: str
    form: str
    merged: bool = False


@dataclass(frozen=True)
class AdapterInput:
    """One tensor of an adapter that a graph takes as an input.

    Args:
        name: of the input: `fc_weight_scale` for the scale of `fc.weight`, in lower case, as torch.export names inputs.
        weight: name of the site.
        tensor: name of the branch's parameter, or `scale`.
        shape: of the tensor, padded to the rank of the inputs; () for a scale.
        dtype: of the tensor.
    """

    name: str
    weight: str
    tensor: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Lifted:
    """What AdapterInputs has done to a graph.

    Args:
        rank: to which the tensors are padded.
        inputs: in the order of the graph's last placeholders.
        branches: as they were, by key.
    """

    rank: int
    inputs: tuple[AdapterInput, ...]
    branches: Mapping[str, Branch] = field(compare=False)


@dataclass(frozen=True)
class Record:
    """The metadata of a graph module.

    Args:
        facts: provided by the passes so far (`sites-matched`, `branches-inserted`, ...).
        owner: name of the child that owns the weights (`model`, whose values the runtime changes), or "" for a graph
            module that owns its weights itself (a fold then writes new constants).
        plan: what was decided, or None.
        refusals, unreached: the weight matrices that are not sites.
        slow: state of the sites and of weights with noise, for a graph module that owns its weights.
        branched: the weights whose branches nodes of this graph called after the insertion.
        frozen: the Parameters that were replaced by frozen ones at the insertion, by name.
        lifted: the tensors of branches that are inputs of the graph; None if there are none.
    """

    facts: frozenset[str] = frozenset()
    owner: str = ""
    plan: Plan | None = None
    refusals: tuple[Refusal, ...] = ()
    unreached: tuple[str, ...] = ()
    slow: SlowWeights = field(default_factory=SlowWeights)
    branched: frozenset[str] = frozenset()
    frozen: Mapping[str, nn.Parameter] = field(default_factory=dict, compare=False)
    lifted: Lifted | None = None

    @property
    def prefix(self) -> str:
        """Prefix of a weight's name in the target of a node."""
        return f"{self.owner}." if self.owner else ""


def record_of(graph_module: fx.GraphModule) -> Record:
    """Return the module's record, or an empty one."""
    record = graph_module.meta.get(_RECORD)
    return record if isinstance(record, Record) else Record()


def set_record(graph_module: fx.GraphModule, record: Record) -> None:
    """Give the module this record."""
    graph_module.meta[_RECORD] = record


def at_stage(graph_module: fx.GraphModule, stage: int) -> None:
    """Set the stage of the module's plan to that of its branches."""
    record = record_of(graph_module)
    if record.plan is not None:
        set_record(graph_module, replace(record, plan=record.plan.at_stage(stage)))


def strip(graph_module: fx.GraphModule) -> None:
    """Remove the record, and all uses and stamps."""
    graph_module.meta.pop(_RECORD, None)
    for node in graph_module.graph.nodes:
        node.meta.pop(USE, None)
        node.meta.pop(MADE_BY, None)
        node.meta.pop(REPLACED_CALL, None)
