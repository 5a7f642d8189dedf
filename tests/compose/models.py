"""A small model in two dialects, in which each pass finds something to change."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import lorasc_fx as lx

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=1.0, seed=5)
"""Pace 1 and no noise: a fold is `W + s B A`, so that adapted and folded graphs compute the same."""


class Net(nn.Module):
    """A convolution, batch norm, attention and two linears, with dead, repeated and constant nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.q, self.k, self.v, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.up, self.head = nn.Linear(6, 10), nn.Linear(10, 4)
        self.register_buffer("log_scale", torch.randn(6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x))).flatten(2).transpose(1, 2)
        torch.sin(y)  # nobody reads it
        y = y * self.log_scale.exp()  # a constant
        q, k, v = self.q(y).unsqueeze(1), self.k(y).unsqueeze(1), self.v(y).unsqueeze(1)  # ONNX wants an axis of heads
        z = self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        z = torch.tanh(y) * z + torch.tanh(y)  # the same twice
        return self.head(F.gelu(self.up(z)).mean(1))


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Two images."""
    return (torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64).to(dtype),)


def eager(dtype: torch.dtype = torch.float64, values: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The model in eval mode with batch statistics, and with these values of its parameters and buffers."""
    with torch.random.fork_rng(()):
        torch.manual_seed(4)
        model = Net().double()
        model(torch.randn(7, 3, 5, 6, dtype=torch.float64) * 2 + 1)
    model.load_state_dict({**model.state_dict(), **(values or {})})
    return model.to(dtype).eval()


def graph(dialect: str, values: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """A new graph module of the model, or for `eager` the model itself."""
    model = eager(dtype, values)
    if dialect == "modules":
        return fx.symbolic_trace(model)
    return exported(dtype, model) if dialect == "aten" else model


def exported(dtype: torch.dtype, model: nn.Module) -> fx.GraphModule:
    """The exported model. The program is exported once, and gets other values."""
    module = plainly(_program(dtype).module(check_guards=False))
    module.load_state_dict(model.state_dict(), strict=False)  # the counter of batches is in no graph
    return module


def traced(model: nn.Module, dialect: str, *args: Any) -> Any:
    """A graph module of a model, called with these inputs: of torch.fx, or for `aten` of torch.export."""
    return (
        torch.export.export(model, args).module(check_guards=False) if dialect == "aten" else fx.symbolic_trace(model)
    )


@functools.cache
def _program(dtype: torch.dtype) -> torch.export.ExportedProgram:
    return torch.export.export(eager(dtype), inputs(dtype))


def plainly(module: nn.Module) -> fx.GraphModule:
    """The exported module with plain tensors as inputs and output, because passes of torch lose pytrees."""
    assert isinstance(module, fx.GraphModule)
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    output: Any = graph.graph_copy(module.graph, copied)
    graph.output(output[0])
    new = fx.GraphModule(module, graph)
    return copy.deepcopy(new).eval()


def calls(module: fx.GraphModule, name: str) -> int:
    """Return the number of nodes that call a function, method or module class of this name."""
    count = 0
    for node in module.graph.nodes:
        if node.op == "call_module":
            called = type(module.get_submodule(node.target)).__name__
        else:
            called = getattr(getattr(node.target, "overloadpacket", node.target), "__name__", str(node.target))
        count += called == name
    return count
