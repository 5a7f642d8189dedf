"""The table of operators as graphs: each row is traced in its dialects, and says which sites a match must find.

ATen comes from the project's own `export` front end, functions and modules from the tracer of torch.fx. All in fp64,
no weight square, no batch of one.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lorasc_fx import CascadeSpec, Rule
from lorasc_fx.capture import OWNER, capture
from lorasc_fx.graph import copy_graph, graph_module_like
from lorasc_fx.graph.editor import retarget
from lorasc_fx.plan import Reason
from tests.kit import operators
from tests.kit.operators import OPERATORS
from tests.kit.operators.case import Uses, kind_in, rand, row, sites_in
from tests.kit.operators.graphs import Attention

__all__ = ["ADAPTABLE", "BY_NAME", "CASES", "SPEC", "Case", "Encoder", "tracer"]

# The scale is not a power of two, so that products with it are rounded.
SPEC = CascadeSpec(rank=3, lora_alpha=5.0, pace=0.7, seed=11)


@dataclass(frozen=True)
class Case:
    """A row of the table in one dialect."""

    row: operators.Case
    dialect: str
    spec: CascadeSpec = SPEC

    @property
    def name(self) -> str:
        """Name of the case and of its golden file."""
        return f"{self.dialect}_{self.row.name}"

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def text(self) -> str:
        """The sites and their uses, as `sites_in` reads them."""
        return self.row.graphs[self.dialect]

    @functools.cached_property
    def sites(self) -> dict[str, Uses]:
        """By weight name, the (node, form) of each use."""
        return {weight: uses for weight, (_, uses) in sites_in(self.text).items()}

    @property
    def transposed(self) -> tuple[str, ...]:
        """Sites whose weight is stored [in, out]."""
        return tuple(weight for weight, (line, _) in sites_in(self.text).items() if "in_out" in line)

    def kind(self, weight: str) -> str:
        return kind_in(self.text, weight)

    @property
    def refusals(self) -> dict[str, Reason]:
        """Reason by weight name. Sites of the row that this dialect does not have are inside a leaf module."""
        blind = [weight for weight in self.row.sites if weight not in self.sites]
        reasons = {weight: Reason.MIXED_USES if weight in self.row.mixed else Reason.OPAQUE for weight in blind}
        for weight, reason in self.row.refused.items():
            reasons[weight] = reason if isinstance(reason, Reason) else reason[0]
        return reasons

    @property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """The other names of a tied site."""
        names: dict[int, list[str]] = {}
        for name, value in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(value), []).append(name)
        return {name: tuple(others) for name, *others in names.values() if others and name in self.sites}

    @functools.cached_property
    def model(self) -> nn.Module:
        """The eager model, the oracle of all numbers; the same object at each call, so it must not be changed."""
        with torch.random.fork_rng(()):
            return self.row.model().eval()

    @property
    def args(self) -> tuple[Any, ...]:
        """The inputs, new ones of the same values at each call."""
        with torch.random.fork_rng(()):
            return self.row.call()[0]

    @functools.cached_property
    def _graph(self) -> fx.Graph:
        model = copy.deepcopy(self.model)
        if self.dialect != "aten":
            return tracer(self.row.leaves).trace(model)
        graph = capture(model, self.args, {}, "export").module.graph
        retarget(graph, lambda node: str(node.target).removeprefix(f"{OWNER}."))
        return graph

    def own(self) -> fx.GraphModule:
        """A new graph module that owns all weights of the model, also the ones that its graph does not use."""
        graph, root = self._graph, copy.deepcopy(self.model)
        for node in graph.nodes:
            if (
                node.op == "get_attr"
                and hasattr(graph.owning_module, str(node.target))
                and node.target not in dir(root)
            ):
                root.add_module(node.target, copy.deepcopy(getattr(graph.owning_module, node.target)))  # a region
        return graph_module_like(root, copy_graph(graph))

    def live(self) -> fx.GraphModule:
        """A new graph module that reads the weights of another module, its child `model`."""
        return capture(self.own(), self.args, {}).module

    def graph(self, mode: str) -> fx.GraphModule:
        """A new graph module, `own` or `live`."""
        return self.own() if mode == "own" else self.live()


def tracer(names: tuple[str, ...]) -> fx.Tracer:
    """A tracer for which modules of these classes are leaf modules too."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return type(m).__name__ in names or super().is_leaf_module(m, module_qualified_name)

    return Tracer()


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.fc1, self.fc2 = nn.LayerNorm(6), Attention(), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.fc2(F.gelu(self.fc1(x)))


class Encoder(nn.Module):
    """Two blocks, a head, a matrix of positions, and an unused layer. The output is a pytree."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.randn(4, 6))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head, self.spare = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = x + self.pos
        for block in self.blocks:
            x = block(x)
        return {"features": x, "logits": [self.head(x.mean(1)), x.sum()]}


ENCODER = row(
    "encoder",
    Encoder,
    rand((2, 4, 6)),
    None,
    {
        "pos": Reason.NO_FORM,
        "blocks.0.fc1.weight": Reason.EXCLUDED,
        "blocks.1.fc1.weight": Reason.EXCLUDED,
        "blocks.0.fc2.weight": Reason.TRAINED,
        "blocks.1.fc2.weight": Reason.EXCLUDED,
    },
    unreached=("spare.weight",),
    aten="blocks.0.attn.qkv.weight=linear blocks.0.attn.proj.weight=linear_1 "
    "blocks.1.attn.qkv.weight=linear_4 blocks.1.attn.proj.weight=linear_5 head.weight=linear_8",
)
RULES = CascadeSpec(
    exclude=("*.fc1", "blocks.1.fc2.*"),
    train=("*.fc2",),
    rules=(Rule("*.qkv", rank=2), Rule("linear", lora_alpha=7.0), Rule("head", rank=1)),
    rank=3,
    lora_alpha=4.0,
    use_rslora=True,
    pace=0.3,
)

CASES = (*(Case(case, dialect) for case in OPERATORS for dialect in case.graphs), Case(ENCODER, "aten", RULES))
BY_NAME = {case.name: case for case in CASES}
ADAPTABLE = tuple(case for case in CASES if case.sites)
"""The cases with a site."""
