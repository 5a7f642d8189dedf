"""The metadata of a graph between passes: facts, plan and refusals of the module; uses and stamps of its nodes.

A record lives in `graph_module.meta`, a use or a stamp in `node.meta`; both survive copies of the graph and other
people's passes. `strip` removes all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import fx, nn

from lorasc_fx.plan import Plan, Refusal
from lorasc_fx.state import SlowWeights

_RECORD = "lorasc_fx"
USE = "lorasc_fx.use"
MADE_BY = "lorasc_fx.made_by"
REPLACED_CALL = "lorasc_fx.replaced_call"


@dataclass(frozen=True)
class Use:
    """A node that consumes a site's weight, in the form of this name; the branch stands beside it, or with `merged` in
    its place.
    """

    weight: str
    form: str
    merged: bool = False


@dataclass(frozen=True)
class Record:
    """The metadata of a graph module.

    Args:
        facts: what the passes so far provide (`sites-matched`, `branches-inserted`, ...).
        owner: name of the child that owns the weights (`model`: live weights, their values are the runtime's), or ""
            for a graph module that owns its weights itself (a fold then writes new constants).
        plan: what was decided, or None.
        refusals, unreached: what was not adapted; with the sites, every weight matrix.
        slow: weights of a graph module that owns its weights: those of the sites, and those that have noise.
        branched: the weights whose branch nodes of this graph call, since they were inserted.
        frozen: the Parameters in whose places frozen ones stand since then, by name.
    """

    facts: frozenset[str] = frozenset()
    owner: str = ""
    plan: Plan | None = None
    refusals: tuple[Refusal, ...] = ()
    unreached: tuple[str, ...] = ()
    slow: SlowWeights = field(default_factory=SlowWeights)
    branched: frozenset[str] = frozenset()
    frozen: Mapping[str, nn.Parameter] = field(default_factory=dict, compare=False)

    @property
    def prefix(self) -> str:
        """What stands before a weight's name in a node's target."""
        return f"{self.owner}." if self.owner else ""


def record_of(graph_module: fx.GraphModule) -> Record:
    """Return the module's record, or an empty one."""
    record = graph_module.meta.get(_RECORD)
    return record if isinstance(record, Record) else Record()


def set_record(graph_module: fx.GraphModule, record: Record) -> None:
    """Give the module this record."""
    graph_module.meta[_RECORD] = record


def at_stage(graph_module: fx.GraphModule, stage: int) -> None:
    """Set the module's plan to this stage, whose branches it has."""
    record = record_of(graph_module)
    if record.plan is not None:
        set_record(graph_module, replace(record, plan=record.plan.at_stage(stage)))


def strip(graph_module: fx.GraphModule) -> None:
    """Remove every record, use and stamp of ours."""
    graph_module.meta.pop(_RECORD, None)
    for node in graph_module.graph.nodes:
        node.meta.pop(USE, None)
        node.meta.pop(MADE_BY, None)
        node.meta.pop(REPLACED_CALL, None)
