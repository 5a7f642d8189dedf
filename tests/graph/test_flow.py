"""Which nodes are constant, which nodes use a weight, and which write into it, in small graphs of all kinds of nodes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from lorasc_fx.graph.flow import constants, consumers, kind_of, mutates, uses_of

aten = torch.ops.aten


def test_constants() -> None:
    graph = fx.Graph()
    call, x, w = graph.call_function, graph.placeholder("x"), graph.get_attr("w")
    rows, shape = graph.call_method("size", (x, 0)), call(getattr, (x, "shape"))
    half = call(operator.floordiv, (call(operator.getitem, (shape, 1)), 2))
    sizes = [w, rows, shape, half.args[0], half, call(math.sqrt, (half,)), call(torch.sym_max, (half, rows))]
    of_weights = [
        call(torch.eye, (3,)),
        graph.call_method("t", (w,)),
        call(torch.narrow, (w, 0, 0, half)),
        call(getattr, (w, "data")),
        call(aten.type_as.default, (w, x)),
    ]
    call(torch.zeros, (rows,))
    call(torch.rand, (3,))
    for op, *args in (
        (torch.mul, w, x),
        (torch.add, rows, half),
        (aten.bernoulli.default, w),
        (aten.add_.Tensor, w, 1),
        (aten.type_as.default, x, w),
    ):
        call(op, tuple(args))
    assert constants(graph) == {*sizes, *of_weights}


def test_consumers() -> None:
    graph = fx.Graph()
    call, x, w = graph.call_function, graph.placeholder("x"), graph.get_attr("w")
    turned, copied = call(aten.t.default, (w,)), call(aten.clone.default, (w,))
    product, total = call(aten.mm.default, (x, turned)), call(aten.add.Tensor, (copied, x))
    doubled, picked = call(aten.mul_.Tensor, (copied, 2)), call(aten.index.Tensor, (w, [x]))
    written, unused = call(aten.mul_.Tensor, (turned, 2)), call(aten.neg.default, (w,))
    gated, size = call(aten.mul.Tensor, (picked, x)), graph.call_method("size", (w, 0))
    row = call(F.embedding, (w, call(torch.eye, (3,))))
    output = graph.output((product, total, doubled, written, gated, size, row))
    found = {consumer.node: (consumer.reads, consumer.aliases) for consumer in consumers(w, constants(graph))}
    assert found == {
        product: ((turned,), (turned,)),
        written: ((turned,), (turned,)),
        total: ((copied,), ()),
        unused: ((w,), (w,)),
        gated: ((picked,), ()),
        row: ((w,), (w,)),
        output: ((doubled,), ()),
    }


W, X = "w", "x"
WRITES: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (aten.add_.Tensor, (W, X), {}, W),
    (aten.add.out, (X, X), {"out": W}, W),
    (aten.add.Tensor, (W, X), {}, ""),
    (F.embedding, (X, W, None, 1.0), {}, W),
    (F.embedding, (X,), {"weight": W, "max_norm": 1.0}, W),
    (F.embedding, (X, W, None), {}, ""),
    (torch.add, (W, X), {}, ""),
    ("add_", (W, X), {}, W),
    ("__iadd__", (W, X), {}, W),
    ("__add__", (W, X), {}, ""),
    ("add", (W, X), {}, ""),
]


@pytest.mark.parametrize(("target", "args", "kwargs", "written"), WRITES, ids=range(len(WRITES)))
def test_mutates(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: str) -> None:
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in (W, X)}
    args, kwargs = tuple(nodes.get(arg, arg) for arg in args), {key: nodes.get(arg, arg) for key, arg in kwargs.items()}
    create = graph.call_method if isinstance(target, str) else graph.call_function
    node = create(target, args, kwargs)
    assert [name for name, source in nodes.items() if mutates(node, source)] == [written] * bool(written)


Uses = list[tuple[str, list[str], str | None]]
RULES: list[tuple[Callable[..., Any], Uses]] = [
    (
        lambda x, w, c: F.linear(x, w.t()) + torch.einsum("ij,jk", w, c),
        [("add", ["einsum"], None), ("linear", ["t"], "linear")],
    ),
    (lambda x, w, c: F.linear(c, w) + x, [("linear", ["w"], "linear")]),
    (lambda x, w, c: torch.einsum("ij,jk", w, c) + x, [("einsum", ["w"], "linear")]),
    (lambda x, w, c: F.linear(x, w * x), [("linear", ["mul"], "linear")]),
    (lambda x, w, c: F.linear(w * x, c), [("mul", ["w"], None)]),
    (lambda x, w, c: F.linear(w * x, weight=c), [("mul", ["w"], None)]),
    (lambda x, w, c: F.linear(w * x, w * c), [("linear", ["mul_1"], "linear"), ("mul", ["w"], None)]),
    (lambda x, w, c: w[x] + x, [("getitem", ["w"], "embedding")]),
    (lambda x, w, c: w[c] + x, [("add", ["getitem"], None)]),
    (lambda x, w, c: torch.index_select(w, 0, index=x) + c, [("index_select", ["w"], "embedding")]),
    (lambda x, w, c: torch.addmm(w, x, c), [("addmm", ["w"], None)]),
]


@pytest.mark.parametrize(("function", "expected"), RULES, ids=range(len(RULES)))
def test_uses(function: Callable[..., Any], expected: Uses) -> None:
    """Consumers by the first rule of `uses_of` that gives a site, with the kind of the site."""
    graph = fx.symbolic_trace(function).graph
    _, weight, constant = graph.find_nodes(op="placeholder")
    uses = uses_of(weight, constants(graph) | {weight, constant})
    assert sorted((use.node.name, [read.name for read in use.reads], kind_of(use)) for use in uses) == expected
