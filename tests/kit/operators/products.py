"""Products: every spelling of a matrix that multiplies an input, on either side or transposed; stacks of matrices."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasc_fx.plan import Reason
from tests.kit.operators.case import Case, linear, of, rand

VMAP_IN_EXPORT = torch.__version__ < (2, 13)
"""Whether this torch.export takes torch.vmap; 2.9 does."""

X = rand((4, 5))
X3 = rand((2, 4, 5))
ONE = linear("w0")


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(7, 5), nn.Tanh(), Conv1D(3, 7))


class Own(nn.Linear):
    """A linear layer whose class and forward are the user's."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.unsqueeze(-1)).squeeze(-1) + self.bias


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = nn.Bilinear(5, 4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.pair(x, y))


def _unbound(x: Tensor, w: Tensor) -> Tensor:
    return sum(F.linear(x, part) for part in w.unbind(0))


def _split(x: Tensor, w: Tensor) -> Tensor:
    gate, up = torch.split(w, [3, 4])
    return F.silu(x @ gate.T).sum(-1, keepdim=True) * F.linear(x, up)


# fmt: off
PRODUCTS = [
    Case("own_forward", lambda: Own(5, 7), X, linear("weight")),
    Case("conv1d_of_transformers", _conv1d, X3, linear("0.weight", "2.weight")),
    Case("linear_other_way", of(lambda x, w: F.linear(w, x), (7, 5)), X, ONE),
    Case("linear_four_axes", of(F.linear, (7, 5)), rand((2, 3, 4, 5)), ONE),
    Case("linear_vector", of(F.linear, (7, 5)), rand((5,)), ONE),
    Case("addmm_left", of(lambda x, w, b: torch.addmm(b, w, x.T), (7, 5), (7, 1)), X, ONE, {"w1": Reason.NO_FORM}),
    Case("mm_left", of(lambda x, w: torch.mm(w, x.t()), (7, 5)), X, ONE),
    Case("mm_named", of(lambda x, w: torch.mm(input=x, mat2=w), (5, 7)), X, ONE),
    Case("mm_of_itself", of(lambda x, w: x.mm(w.t()).mm(w), (7, 5)), X, ONE),
    Case("matmul_operator", of(operator.matmul, (5, 7)), X3, ONE),
    Case("matmul_left", of(lambda x, w: w @ x.mT, (7, 5)), X3, ONE),
    Case("multi_dot", of(lambda x, v, w: torch.linalg.multi_dot([x, v, w]), (5, 7), (7, 3)), X, linear("w0", "w1")),
    Case("bmm", of(lambda x, w: torch.bmm(x, w.expand(2, -1, -1)), (5, 7)), X3, ONE),
    Case("bmm_left", of(lambda x, w: w.unsqueeze(0).expand(x.shape[0], -1, -1).bmm(x.mT), (7, 5)), X3, ONE),
    Case("bmm_repeat", of(lambda x, w: x.bmm(w.t().repeat(2, 1, 1)), (7, 5)), X3, ONE),
    Case("baddbmm", of(lambda x, w: torch.baddbmm(x.new_ones(2, 4, 7), x, w.expand(2, 5, 7)), (5, 7)), X3, ONE),
    Case("addbmm", of(lambda x, w: torch.addbmm(x.new_ones(4, 7), x, w.expand(2, 5, 7)), (5, 7)), X3, ONE),
    Case("inner", of(torch.inner, (7, 5)), X3, ONE),
    Case("tensordot", of(lambda x, w: torch.tensordot(x, w, dims=([2], [1])), (7, 5)), X3, ONE),
    Case("bilinear", Bilinear, rand((4, 5), (4, 4)), linear("head.weight") | {"pair.weight": "stacked"}),
    Case("vmap", of(lambda x, w: torch.vmap(lambda row: w @ row)(x), (7, 5)), X, ONE,
        has_graph=VMAP_IN_EXPORT),
    Case("einsum", of(lambda x, w: torch.einsum("bi,oi->bo", x, w), (7, 5)), X, ONE),
    Case("einsum_left", of(lambda x, w: torch.einsum("oi,bti->bto", w, x), (7, 5)), X3, ONE),
    Case("einsum_dots", of(lambda x, w: torch.einsum("...i,io->...o", x, w), (5, 7)), X3, ONE),
    Case("einsum_chain", of(lambda x, v, w: torch.einsum("bi,ri,or->bo", x, v, w), (3, 5), (7, 3)), X,
        linear("w0", "w1")),
    Case("einsum_numbers", of(lambda x, w: torch.einsum(x, [0, 1], w, [2, 1], [0, 2]), (7, 5)), X, ONE),
    Case("einsum_heads", of(lambda x, w: torch.einsum("btd,dhk->bthk", x, w), (5, 2, 3)), X3, {"w0": "stacked"}),
    Case("view", of(lambda x, w: F.linear(x, w.view(7, -1)), (7, 5, 1)), X3, {"w0": "stacked"}),
    Case("reshape", of(lambda x, v, w: x @ v.reshape(5, 7) @ w, (35, 1), (7, 3)), X, linear("w1"),
        {"w0": Reason.VECTOR}),
    Case("sliced", of(lambda x, w: F.linear(x, w[:3]) * F.linear(x, w[-3:]), (7, 5)), X, ONE),
    Case("split", of(_split, (7, 5)), X3, ONE),
    Case("joined", of(lambda x, v, w: x @ torch.cat([v, w], 1), (5, 3), (5, 4)), X, linear("w0", "w1")),
    Case("two_weights", of(lambda x, v, w: x @ (v @ w), (5, 3), (3, 7)), X, linear("w0", "w1")),
    Case("chosen_by_input", of(lambda x, w: (w[x.argmax(-1)] * x).sum(-1), (5, 5)), X, {"w0": "embedding"}),
    Case("scaled_by_input", of(lambda x, v, w: w * x.mean(0) @ v @ x.T[:4], (5, 4), (7, 5)), X, linear("w0"),
        {"w1": Reason.NO_FORM}),
]

EXPERTS = [
    Case("experts_bmm", of(torch.bmm, (3, 5, 7)), rand((3, 4, 5)), {"w0": "stacked"}, shapes={"w0": (3, 2, 7)}),
    Case("experts_matmul", of(lambda x, w: x.unsqueeze(1) @ w, (3, 5, 7)), X3, {"w0": "stacked"}),
    Case("experts_turned", of(lambda x, w: x @ w.transpose(1, 2), (2, 7, 5)), X3, {"w0": "stacked"}),
    Case("experts_einsum", of(lambda x, w: torch.einsum("ebi,eoi->ebo", x, w), (3, 7, 5)), rand((3, 4, 5)),
        {"w0": "stacked"}, shapes={"w0": (3, 2, 5)}),
    Case("experts_unbound", of(_unbound, (3, 7, 5)), X, {"w0": "stacked"}),
]
# fmt: on


class Grouped(nn.Module):
    """Rows sorted by expert, and one grouped product in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 16, 24))
        self.register_buffer("ends", torch.tensor([2, 5, 8], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return GROUPED(x.bfloat16(), self.experts.bfloat16(), offs=self.ends).double()


GROUPED = getattr(F, "grouped_mm", torch._grouped_mm)  # public since torch 2.10


class Sorted(nn.Module):
    """Rows that a router sorts by expert, as transformers does it; `transposed` is how the up projection is stored."""

    def __init__(self, transposed: bool) -> None:
        import transformers.integrations.moe  # noqa: F401  (it makes the op)

        super().__init__()
        self.transposed, self.router = transposed, nn.Linear(5, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 5)), nn.Parameter(torch.randn(3, 5, 4))
        if transposed:
            self.up = nn.Parameter(torch.randn(3, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        grouped = torch.ops.transformers.grouped_mm_fallback.default
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        expert, order = torch.sort(chosen.reshape(-1))
        ends = torch.cumsum(torch.histc(expert.float(), bins=3, min=0, max=2), 0, dtype=torch.int32)
        up = self.up if self.transposed else self.up.transpose(-2, -1)
        gate, value = grouped(x[order // 2], up, ends).chunk(2, -1)
        rows = grouped(F.silu(gate) * value, self.down.mT, ends) * weights.reshape(-1)[order, None]
        return rows[torch.argsort(order)].view(-1, 2, 5).sum(1)


class Routed(nn.Module):
    """Each row goes through the two of its experts that a router chooses, expert by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 5)), nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        output = torch.zeros_like(x)
        for index in range(3):
            rows, column = torch.where(chosen == index)
            gate, up = F.linear(x[rows], self.up[index]).chunk(2, -1)
            hidden = F.linear(F.silu(gate) * up, self.down[index]) * weights[rows, column, None]
            output.index_add_(0, rows, hidden)
        return output


class Gathered(Routed):
    """The same, by a stack of the chosen experts' weights."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        gate, up = torch.einsum("bkoi,bi->bko", self.up[chosen], x).chunk(2, -1)
        outputs = (self.down[chosen] @ (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (outputs * weights.unsqueeze(-1)).sum(1)


_ROUTED: dict[str, Any] = {"router.weight": "linear", "up": "stacked", "down": "stacked"}

EXPERTS += [
    Case("experts_grouped", Grouped, rand((8, 16)), {"experts": "stacked"}, shapes={"experts": (3, 2, 24)}),
    Case("experts_sorted", lambda: Sorted(transposed=False), rand((9, 5)), _ROUTED),
    Case("experts_sorted_turned", lambda: Sorted(transposed=True), rand((9, 5)), _ROUTED, shapes={"up": (3, 2, 5)}),
    Case("experts_routed", Routed, rand((9, 5)), _ROUTED),
    Case("experts_gathered", Gathered, rand((9, 5)), _ROUTED),
]
