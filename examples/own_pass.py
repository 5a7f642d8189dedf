"""A pass of your own: limit the change of each weight to a fraction of the weight's norm."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

import lorasc_fx as lx
from lorasc_fx.graph import GraphEditor, named_weights
from lorasc_fx.passes import CascadePass, FoldBranches, InsertBranches, MatchSites, Pipeline


@dataclass(frozen=True)
class LimitNorm(CascadePass):
    """Scale lora_B down if the norm of a branch's delta is more than `fraction` times the norm of its weight."""

    fraction: float = 0.1

    name: ClassVar[str] = "limit-norm"
    requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

    def rewrite(self, graph: GraphEditor) -> None:
        weights = named_weights(graph.owner).parameters
        for key, branch in graph.branches.items():
            weight = weights[branch.weight_name]
            limit, norm = self.fraction * weight.norm(), branch.dense_delta(weight).norm()
            if norm > limit * 1.001:  # tolerate rounding, so that a second run changes nothing
                shorter = copy.deepcopy(branch)
                shorter.lora_B.data *= limit / norm
                graph.renew_branches({key: shorter})


def main() -> tuple[fx.GraphModule, fx.GraphModule]:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    spec = lx.CascadeSpec(rank=2)
    inserted = Pipeline([MatchSites(spec), InsertBranches()])(fx.symbolic_trace(model)).graph_module
    for branch in inserted.branches.children():  # your training goes here
        nn.init.normal_(branch.lora_B)
    passes = [LimitNorm(0.2), FoldBranches()]
    return inserted, Pipeline(passes)(inserted).graph_module


if __name__ == "__main__":
    torch.manual_seed(0)
    for graph_module in main():
        print(graph_module(torch.ones(1, 6)))
