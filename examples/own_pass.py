"""A pass of your own: no branch may move its weight by more than a share of the weight's norm."""

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
    """Scale lora_B down where a branch's delta is longer than `most` times its weight."""

    most: float = 0.1

    name: ClassVar[str] = "limit-norm"
    requires: ClassVar[frozenset[str]] = frozenset({"branches-inserted"})

    def rewrite(self, graph: GraphEditor) -> None:
        weights = named_weights(graph.owner).parameters
        for key, branch in graph.branches.items():
            weight = weights[branch.weight_name]
            limit, norm = self.most * weight.norm(), branch.dense_delta(weight).norm()
            if norm > limit * 1.001:  # or a second run would find its own rounding
                shorter = copy.deepcopy(branch)
                shorter.lora_B.data *= limit / norm
                graph.renew_branches({key: shorter})


def main() -> tuple[fx.GraphModule, fx.GraphModule]:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    spec = lx.CascadeSpec(rank=2)
    inserted = Pipeline([MatchSites(spec), InsertBranches()])(fx.symbolic_trace(model)).graph_module
    for branch in inserted.branches.children():  # stands for your training
        nn.init.normal_(branch.lora_B)
    passes = [LimitNorm(0.2), FoldBranches()]
    return inserted, Pipeline(passes)(inserted).graph_module


if __name__ == "__main__":
    torch.manual_seed(0)
    for each in main():
        print(each(torch.ones(1, 6)))
