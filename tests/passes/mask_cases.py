"""Attention masks computed from sizes and from other values, and helpers to read the masks of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lorasc_fx.capture import Captured
from lorasc_fx.capture.torch_export import capture_dynamo, capture_export
from lorasc_fx.passes import AttentionMasks
from lorasc_fx.signature import leaves

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def simplified(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, by: Any = capture_export
) -> Captured:
    """Capture with dynamic sizes, and run AttentionMasks."""
    inputs = enumerate(leaves(args, kwargs or {}))
    axes = {(index, axis) for index, leaf in inputs if isinstance(leaf, Tensor) for axis in range(leaf.dim())}
    captured = by(model, args, kwargs or {}, axes)
    return replace(captured, module=AttentionMasks()(captured.module).graph_module)


FRONT_ENDS = [capture_export, capture_dynamo]


def attention(graph_module: Any) -> list[str]:
    """Return `mask`, `causal` or `none` for each attention call of a graph."""
    kinds = []
    for node in graph_module.graph.nodes:
        if node.target is ATTENTION:
            mask, _, causal = (*node.args[3:], *(None, 0.0, False)[len(node.args) - 3 :])
            kinds.append("mask" if isinstance(mask, fx.Node) else "causal" if causal else "none")
    return kinds


class Masked(nn.Module):
    """Attention with a mask that a function computes from the module and its input [batch, length, 8]."""

    def __init__(self, mask: Callable[[Masked, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.mask = nn.Linear(8, 12), mask
        self.register_buffer("open", torch.ones((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (projection.unsqueeze(1) for projection in self.body(x).chunk(3, -1))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask(self, x))


def square(x: Tensor, **options: Any) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], **{"dtype": torch.bool, **options})


def steps(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def gap(x: Tensor) -> Tensor:
    return steps(x)[:, None] - steps(x)[None, :]


def filled(shut: Tensor, value: float) -> Tensor:
    return torch.zeros(shut.shape, dtype=torch.float64).masked_fill(shut, value)


def written(x: Tensor) -> Tensor:
    mask = square(x)
    mask[:, 1:].logical_and_(x[0, 0, 0] > 0)
    return mask


def written_before(x: Tensor) -> Tensor:
    places = steps(x)
    row = places[None, :]
    places.sub_(2)
    return row >= 0


def written_whole(x: Tensor) -> Tensor:
    mask = square(x)
    view = mask[:, 1:]
    mask.logical_and_(x[0, 0, 0] > 0)
    return view.expand(x.shape[1], -1)[:, :1]


def put_out(x: Tensor) -> Tensor:
    mask = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
    view = mask[:, :]
    torch.ge(gap(x), -9, out=mask)
    return view


@torch.library.custom_op("lorasc_masks::clone", mutates_args=())
def _other_clone(self: Tensor) -> Tensor:
    """An op with the name of an aten op and another meaning."""
    return self.logical_not()


@_other_clone.register_fake
def _(self: Tensor) -> Tensor:
    return torch.empty_like(self)


LOWEST = torch.finfo(torch.float64).min
ALWAYS: dict[str, tuple[Callable[[Masked, Tensor], Tensor], str]] = {
    "ones": (lambda m, x: square(x), "none"),
    "full": (lambda m, x: torch.full((x.shape[0], 1, 1, x.shape[1]), True), "none"),
    "positions": (lambda m, x: (steps(x) >= 0).expand(x.shape[0], 1, x.shape[1], -1), "none"),
    "below": (lambda m, x: (steps(x) > -1)[None, :], "none"),
    "not": (lambda m, x: ~(steps(x)[None, :] < 0), "none"),
    "one sequence": (lambda m, x: torch.diff(steps(x) * 2 + 3, prepend=steps(x)[:1] * 2 + 1)[None, :] == 2, "none"),
    "zeros": (lambda m, x: square(x, dtype=torch.float64) * 0, "none"),
    "nothing filled": (lambda m, x: filled(steps(x)[None, :] < 0, -torch.inf), "none"),
    "tril": (lambda m, x: square(x).tril(), "causal"),
    "not triu": (lambda m, x: ~square(x).triu(1), "causal"),
    "key <= query": (lambda m, x: steps(x)[None, :] <= steps(x)[:, None], "causal"),
    "key < query + 1": (lambda m, x: steps(x) < (steps(x) + 1).unsqueeze(1), "causal"),
    "gap": (lambda m, x: gap(x) * 3 >= 0, "causal"),
    "strange gap": (lambda m, x: (gap(x) > -1) & square(x), "causal"),
    "transposed": (lambda m, x: (gap(x) <= 0).transpose(0, 1), "causal"),
    "indexed": (lambda m, x: steps(x)[steps(x)[None, :]] <= steps(x)[steps(x)[:, None]], "causal"),
}
SOMETIMES: dict[str, Callable[[Masked, Tensor], Tensor]] = {
    "window": lambda m, x: (gap(x) >= 0) & (gap(x) < 6),
    "near": lambda m, x: gap(x).abs() < 6,
    "sixth": lambda m, x: steps(x)[None, :] != 6,
    "every other": lambda m, x: (square(x) * (x.shape[1] % 2)).bool(),
    "late": lambda m, x: gap(x) > 5 - x.shape[1] * 2,
    "slope": lambda m, x: steps(x)[:, None] * 2 >= steps(x)[None, :] * 2 - x.shape[1] // 6,
    "triangle of -inf": lambda m, x: filled(gap(x) < 0, -torch.inf),
    "triangle of the lowest": lambda m, x: filled(gap(x) < 0, LOWEST),
}
"""Masks that are redundant at the captured size, but not at others, or not provably."""
NEVER: dict[str, Callable[[Masked, Tensor], Tensor]] = {
    "buffer": lambda m, x: square(x) & m.open,
    "value": lambda m, x: square(x) & (x[0, 0, 0] == x[0, 0, 0]),
    "chance": lambda m, x: torch.rand(x.shape[1], x.shape[1]) >= 0,
    "written": lambda m, x: written(x),
    "written before": lambda m, x: written_before(x),
    "written whole": lambda m, x: written_whole(x),
    "put out": lambda m, x: put_out(x),
    "another library's": lambda m, x: _other_clone(square(x).tril()),
    "first only": lambda m, x: steps(x)[None, :] < 1,
    "other side": lambda m, x: gap(x) <= 0,
    "a step off": lambda m, x: gap(x) >= -1,
    "bias": lambda m, x: gap(x).double(),
    "weak triangle": lambda m, x: filled(gap(x) < 0, -5.0),
    "wide and never": lambda m, x: (steps(x)[None, :] < x.shape[1]) & (steps(x)[:, None] != 2),
}


OPS: dict[str, Callable[[Masked, Tensor], Tensor]] = {
    "part": lambda m, x: steps(x)[None, 1::2].repeat(3, 1)[:, :, None] - torch.arange(4, 20, 3),
    "backwards": lambda m, x: torch.arange(9, -9, -2)[:, None] * 3 + 2 >= steps(x),
    "row": lambda m, x: (gap(x)[:1] + 1).expand(4, -1) * -2,
    "transposed": lambda m, x: (gap(x)[None] * steps(x)[:1]).transpose(-1, 0),
    "differences": lambda m, x: torch.diff(gap(x) * 5, dim=0, prepend=gap(x)[:1] * 5 - 5),
    "none before": lambda m, x: torch.diff(steps(x) * 5),
    "a leap": lambda m, x: torch.diff(steps(x), prepend=steps(x)[:1]),
    "two before": lambda m, x: torch.diff(steps(x), prepend=steps(x)[:2]),
    "two alike before": lambda m, x: torch.diff(steps(x), prepend=torch.full((2,), -1)),
    "twice": lambda m, x: torch.diff(steps(x), n=2),
    "counted": lambda m, x: (gap(x) != gap(x)).cumsum(-1) + (gap(x) == gap(x)).cumsum(0),
    "chosen": lambda m, x: torch.where(steps(x) < 0, steps(x), gap(x)) + gap(x).masked_fill(gap(x) == gap(x), 7),
    "chosen by place": lambda m, x: torch.where(gap(x) < 0, 0, 1),
    "from the end": lambda m, x: steps(x)[steps(x) - 2],
    "picked": lambda m, x: gap(x)[steps(x)[:, None] * 0, steps(x)[None]] >= -3,
    "half": lambda m, x: (steps(x) * 0.5 > 1) | (steps(x) + 0.25 < 1),
    "cast": lambda m, x: (steps(x) >= 0).long() + (steps(x) < 0).double() + steps(x).float(),
    "other constants": lambda m, x: torch.full_like(gap(x), 3) + square(x, dtype=torch.long) - torch.zeros(1).long(),
    "bent": lambda m, x: torch.ones(4, 6, dtype=torch.bool).tril(-1).logical_not() & ~torch.ones(4, 6).bool().triu(2),
    "few bits": lambda m, x: torch.arange(x.shape[1], dtype=torch.uint8) - 3 >= 0,
    "one place": lambda m, x: (steps(x)[:1] + 3 >= steps(x)) & (steps(x) * 4 - 6 >= 0),
    "equal": lambda m, x: (steps(x) == steps(x)[:, None]) & (steps(x) != -1) & (gap(x) + 1 != gap(x)),
}
TABLE = {name: mask for name, (mask, _) in ALWAYS.items()} | SOMETIMES | OPS


def batch(size: int, length: int) -> Tensor:
    return torch.randn(size, length, 8, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
