"""Which nodes of small graphs are constant, use a weight, or write into it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lorasc_fx.graph.flow import constants, kind_of, mutates, uses_of

aten = torch.ops.aten


def test_constants() -> None:
    graph = fx.Graph()
    call, x, w = graph.call_function, graph.placeholder("x"), graph.get_attr("w")
    rows, shape = graph.call_method("size", (x, 0)), call(getattr, (x, "shape"))
    half = call(operator.floordiv, (call(operator.getitem, (shape, 1)), 2))
    sizes = [w, rows, shape, half.args[0], half, call(math.sqrt, (half,)), call(torch.sym_max, (half, rows))]
    computed = [call(torch.eye, (3,)), graph.call_method("t", (w,)), call(torch.narrow, (w, 0, 0, half))]
    computed += [call(getattr, (w, "data")), call(aten.type_as.default, (w, x))]
    others = {torch.zeros: (rows,), torch.rand: (3,), torch.mul: (w, x), torch.add: (rows, half)}
    others |= {aten.bernoulli.default: (w,), aten.add_.Tensor: (w, 1), aten.type_as.default: (x, w)}
    for op, args in others.items():
        call(op, args)
    assert constants(graph) == {*sizes, *computed}


def test_mutates() -> None:
    graph = fx.Graph()
    call, method, w, x = graph.call_function, graph.call_method, graph.placeholder("w"), graph.placeholder("x")
    writing = [call(aten.add_.Tensor, (w, x)), call(aten.add.out, (x, x), {"out": w}), method("add_", (w, x))]
    writing += [method("__iadd__", (w, x)), call(F.embedding, (x,), {"weight": w, "max_norm": 1.0})]
    reading = [call(aten.add.Tensor, (w, x)), call(torch.add, (w, x)), call(F.embedding, (x, w, None))]
    reading += [method("__add__", (w, x)), method("add", (w, x))]
    assert [mutates(node, w) for node in writing + reading] == [True] * len(writing) + [False] * len(reading)
    assert not any(mutates(node, x) for node in writing + reading)


RULES: list[tuple[Callable[..., Any], list[tuple[str, list[str], str | None]]]] = [
    (lambda x, w, c: F.linear(c, w) + x, [("linear", ["w"], "linear")]),
    (lambda x, w, c: F.linear(x, w * x), [("linear", ["mul"], "linear")]),
    (lambda x, w, c: F.linear(w * x, weight=x), [("mul", ["w"], None)]),
    (lambda x, w, c: torch.index_select(w, 0, index=x) + c, [("index_select", ["w"], "embedding")]),
]


def test_uses() -> None:
    """Consumers by the first rule of `uses_of` that gives a site, with the kind of the site."""
    for function, expected in RULES:
        graph = fx.symbolic_trace(function).graph
        _, weight, constant = graph.find_nodes(op="placeholder")
        uses = uses_of(weight, constants(graph) | {weight, constant})
        assert [(use.node.name, [read.name for read in use.reads], kind_of(use)) for use in uses] == expected
