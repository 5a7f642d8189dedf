"""What a node computes, in numbers: read off the sizes that a front end noted, or nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from lorasc_fx.cost.model import ConvUse, LinearUse, Use
from lorasc_fx.graph.flow import shape_of

__all__ = ["device_of", "dtype_of", "use_at", "work_of"]

_INPUT = {"addmm": 1, "baddbmm": 1, "addbmm": 1}
"""Where the first factor of a product stands, if not first."""
PRODUCTS = ("linear", "mm", "matmul", "bmm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback", *_INPUT)
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TURNED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
ATTENTION = "scaled_dot_product_attention"


def use_at(x: Any, result: fx.Node, weight: tuple[int, ...], rank: int) -> Use | None:
    """Return what an op with a weight of this shape computes of the node x; None where sizes are not known.

    Args:
        x: the op's input.
        result: node with the sizes of what the op computes.
        weight: shape; [out, in/groups, *kernel] for a convolution, a matrix for a product.
        rank: of the branch.
    """
    read = shape_of(x) if isinstance(x, fx.Node) else None
    made = shape_of(result)
    if not read or not made or 0 in read or 0 in made:
        return None
    if len(weight) == 2:
        return LinearUse(math.prod(read[:-1]), read[-1], made[-1], rank)
    if len(read) != len(weight) or len(made) != len(weight):
        return None
    return ConvUse(
        pixels=read[0] * math.prod(read[2:]),
        places=made[0] * math.prod(made[2:]),
        inner=read[1],
        outer=weight[0],
        kernel=math.prod(weight[2:]),
        rank=rank,
        groups=max(1, read[1] // weight[1]),
        in_rows=_in_rows(x, read),
    )


def work_of(node: fx.Node, name: str) -> int:
    """Return the multiply-adds of a node's forward, of an op of this name; 0 where it multiplies no matrices."""
    made = shape_of(node)
    shapes = [shape_of(each) if isinstance(each, fx.Node) else None for each in node.args]
    first, second = _INPUT.get(name, 0), _INPUT.get(name, 0) + 1
    if made is None or len(shapes) <= second or shapes[first] is None or shapes[second] is None:
        return 0
    left, right = shapes[first], shapes[second]
    if not left or not right:
        return 0
    if name in PRODUCTS:
        return math.prod(made) * left[-1]
    if name in CONVOLUTIONS:
        return math.prod(made) * math.prod(right[1:])
    if name in TURNED:
        return math.prod(left) * math.prod(right[1:])
    if name == ATTENTION:
        return math.prod(left[:-1]) * right[-2] * (left[-1] + made[-1])
    return 0


def dtype_of(node: Any) -> torch.dtype | None:
    """Return the dtype of a node's tensor, if it is known."""
    found = _noted(node, "dtype")
    return found if isinstance(found, torch.dtype) else None


def device_of(node: Any) -> torch.device | None:
    """Return the device of a node's tensor, if it is known."""
    found = _noted(node, "device")
    return found if isinstance(found, torch.device) else None


def _noted(node: Any, what: str) -> Any:
    values = (node.meta.get(name) for name in ("val", "example_value")) if isinstance(node, fx.Node) else ()
    return next((getattr(value, what, None) for value in values if isinstance(value, torch.Tensor)), None)


def _in_rows(x: fx.Node, shape: tuple[int, ...]) -> bool:
    """Whether the node's tensor [batch, channels, h, w] is in channels-last memory."""
    strides = _noted(x, "stride")
    if strides is None or len(shape) != 4 or shape[1] == 1 or shape[2] * shape[3] == 1:
        return False
    return bool(strides()[1] == 1)
