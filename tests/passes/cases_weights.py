"""Cases of weights that are transposed, looked up, stacked or computed with: beside the op where a row fits, else on
the weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lorasc_fx.plan import Reason
from tests.passes.case import Case, aten, functional, functions, leaves, modules, randn, seq

__all__ = ["WEIGHT_CASES"]


INDEX = (torch.tensor([[1, 4, 8], [2, 3, 1]]),)


# --- products and lookups, beside the op ------------------------------------------------------------------------------


def _aten_products(self: Any, x: Tensor) -> Tensor:
    x = torch.addmm(self.b, x, self.w0).tanh()
    x = torch.mm(x, self.w1).tanh()
    x = (x.view(2, 2, -1) @ self.w2).tanh()
    return F.linear(x, self.w3)


def _aten_turned(self: Any, x: Tensor) -> Tensor:
    x = torch.addmm(self.b, x, self.w0.t()).tanh()
    x = torch.mm(x, self.w1.transpose(0, 1)).tanh()
    x = (x.view(2, 2, -1) @ self.w2.T).tanh()
    x = torch.matmul(x, self.w3.permute(-1, 0).t().transpose(-2, -1)).tanh()
    return F.linear(x, self.w4.t())


def _products(self: Any, x: Tensor) -> Tensor:
    x = torch.addmm(self.b, x, self.w0).tanh()
    x = torch.mm(x, self.w1).tanh()
    x = torch.matmul(x.view(2, 2, -1), self.w2).tanh()
    return (torch.embedding(self.w3, (x[..., 0] > 0).long()) * x[..., :1]) @ self.w4


def _methods(self: Any, x: Tensor) -> Tensor:
    x = (self.b * x[:, :1]).addmm(x, self.w0).tanh()
    x = x.mm(self.w1).tanh()
    return x.view(2, 2, -1).matmul(self.w2)


def _turned(self: Any, x: Tensor) -> Tensor:
    x = torch.addmm(self.b, x, self.w0.t()).tanh()
    x = x.mm(torch.transpose(self.w1, 1, 0)).tanh()
    x = (x.view(2, 2, -1) @ self.w2.T).tanh()
    x = x.matmul(self.w3.permute((1, 0))).tanh()
    return F.linear(x, torch.permute(torch.t(self.w4.mT), (1, 0)))


def _both_ways(self: Any, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, self.w0)), self.w1) + (x @ self.w0.t()) @ self.w1.t()


def _two_layouts(self: Any, x: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, self.w0)) @ self.w0


def _scaled_addmm(self: Any, x: Tensor) -> Tensor:
    x = torch.addmm(self.b, x, self.w0, beta=0.5, alpha=2.0)
    x = torch.addmm(self.w1, x, self.w2, beta=1)
    return torch.mm(x, mat2=self.w3)


class Lookups(nn.Module):
    """Tables with a padding row, looked up by modules and by functions; the padding row is asked for as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.plain = nn.Embedding(9, 4, padding_idx=1), nn.Embedding(7, 4)
        self.w = nn.Parameter(torch.randn(8, 4))

    def forward(self, index: Tensor) -> Tensor:
        return self.table(index) * self.plain(index % 7).tanh() + F.embedding(index % 8, self.w, 2)


class TurnedTable(nn.Module):
    """A table that is stored transposed, with a padding row, tied to a head."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.mix = nn.Parameter(torch.randn(4, 9)), nn.Linear(4, 5)

    def forward(self, index: Tensor) -> Tensor:
        x = torch.embedding(self.w.t(), index, 1)
        return F.pad(self.mix(x), (0, -1)) @ self.w


class PaddedHead(nn.Module):
    """A tied table with a padding row: the head moves the row, the lookup must not."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(9, 4, padding_idx=1), nn.Linear(4, 6), nn.Linear(4, 9)
        self.back = nn.Linear(6, 4)
        self.head.weight = self.table.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.back(torch.relu(self.mix(self.table(index)))))


# --- on the weight ----------------------------------------------------------------------------------------------------


def _transposed_convs(self: Any, x: Tensor) -> Tensor:
    one = F.conv_transpose1d(x.flatten(2), self.w0, None, 2, 1)
    two = F.conv_transpose2d(x, self.w1, self.b, (1, 2), (0, 1), 0, 2, (2, 1))
    three = F.conv_transpose3d(x.unsqueeze(2), self.w2, None, 1, (0, 0, 1))
    return one.sum() + two.sum() * 2 + three.flatten(1)


def _contractions(self: Any, x: Tensor) -> Tensor:
    x = torch.einsum("bsi,oi->bso", x, self.w0).tanh()
    x = torch.tensordot(x, self.w1, ([2], [0])).tanh()
    x = torch.bilinear(x, x, self.w2).tanh()
    first = self.w3 @ x.transpose(1, 2)
    return first.sum(-1) + torch.einsum("bsi,hid->bhsd", x, self.w4).sum((-1, -2)) @ self.w5.view(3, 5)


def _experts(self: Any, x: Tensor) -> Tensor:
    x = torch.bmm(x, self.w0).tanh()
    x = torch.einsum("eni,eoi->eno", x, self.w1).tanh()
    return torch.baddbmm(self.b, x, self.w2.transpose(1, 2))


def _routed(self: Any, x: Tensor) -> Tensor:
    router = F.linear(x, self.w0)
    chosen = router.argmax(-1)
    y = torch.bmm(x.unsqueeze(1), self.w1[chosen]).tanh()
    return torch.bmm(y, self.w2.index_select(0, chosen)).squeeze(1) * router.max(-1).values[:, None]


def _chosen(self: Any, x: Tensor) -> Tensor:
    """One matrix of each stack, by an index of no axis that the input tells; of one of them two."""
    index = (x[0, 0] > 0).long()
    y = F.linear(F.linear(x, self.w0[index]).tanh(), self.w1[index]) @ self.w2[index + 1] + self.w0.shape[0]
    return y * F.linear(F.linear(x, self.w0[2 - index]), self.w1[2]).sum()


def _looped(self: Any, x: Tensor) -> Tensor:
    gates = F.linear(x, self.w0).softmax(-1)
    return sum(gates[:, e, None] * F.linear(F.linear(x, self.w1[e]).tanh(), self.w2[e]) for e in range(3))


def _grouped_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    import transformers.integrations.moe  # noqa: F401  (it makes the op)

    return torch.ops.transformers.grouped_mm_fallback.default(x, w, ends)


def _grouped(self: Any, x: Tensor) -> Tensor:
    """Rows that an input sorts by expert: stacks as they are stored, transposed, and beside another use."""
    ends = torch.stack([(x > 0).sum() * 0 + 2, (x > 0).any() * 3, (x > 0).any() * 6]).int()
    x = _grouped_product(x, self.w0, ends).tanh()
    x = _grouped_product(x, self.w1.transpose(-2, -1), ends).tanh()
    x = _grouped_product(x, self.w2.permute(0, 2, 1).mT.transpose(1, 2), ends).tanh()
    return _grouped_product(x, self.w3, ends) + torch.bmm(x.expand(3, -1, -1), self.w3).sum(0)


def _grouped_at(node: str) -> str:
    form = "transformers::grouped_mm_fallback"
    return f"w0:experts:in_out={form}@{node} w1:experts={form}@{node}_1 w2:experts={form}@{node}_2 w3:experts=*"


def _packed(self: Any, x: Tensor) -> Tensor:
    q, k, v = self.w0.chunk(3)
    gate = F.linear(x, self.w1[:, :4].contiguous()[:, :4]) if x.shape[-1] == 4 else F.linear(x, self.w1[2:, :])
    scores = F.linear(x, q) @ F.linear(x, k).transpose(-1, -2)
    return scores.softmax(-1) @ F.linear(x, v) * gate


def _slices(self: Any, x: Tensor) -> Tensor:
    """Each weight in slices of unequal or of equal size, by split, by ranges, by a view, of a kernel."""
    one, two, three = self.w0.split([2, 4, 6])
    x = torch.cat([F.linear(x, one), F.linear(x, two).tanh(), F.linear(x, three).sin()], -1)
    x = F.linear(x, self.w1[:4]).tanh() * F.linear(x, self.w1[4:]).sum(-1, keepdim=True)
    q, k = self.w2.view(2, 3, 4).unbind(0)
    x = F.linear(x, q) * F.linear(x, k).cos() + F.linear(x.sin(), q)
    return F.conv1d(x.transpose(-1, -2), self.w3[:2]).sum(1) * F.conv1d(x.transpose(-1, -2), self.w3[2:]).mean(1)


def _no_slices(self: Any, x: Tensor) -> Tensor:
    """Ranges that overlap, that leave rows out, that cut columns, beside a use of the whole, that mix rows, and one
    that is computed with.
    """
    x = torch.cat([F.linear(x, self.w0[:3]), F.linear(x, self.w0[2:])], -1).tanh()
    x = F.linear(x, self.w1[:3]) + F.linear(x, self.w1[4:])
    x = F.linear(x, self.w2[:, :3]).tanh() + F.linear(x, self.w2[:, 2:])
    x = F.linear(x, self.w3[:2]).sum(-1, keepdim=True) + F.linear(x, self.w3[2:]) + F.linear(x, self.w3)[..., :4]
    x = F.linear(x, self.w4[::2]) + F.linear(x, self.w4[1::2]).sin()
    return F.linear(x, self.w5[:2]) + F.linear(x, self.w5[2:].tanh())


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardized first, as in NFNet and BiT."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-3), self.bias, self.stride, self.padding)


def _weight_norm() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(5, 7)), nn.Tanh(), parametrizations.weight_norm(nn.Linear(7, 3))
    )


def _spectral_norm() -> nn.Module:
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Conv1d(3, 5, 2)), parametrizations.spectral_norm(nn.Linear(6, 4))
    )


class Recurrent(nn.Module):
    """Two layers of an LSTM, both ways, and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 3, 2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(6, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x)[0])[0]


class Heads(nn.Module):
    """torch's attention: packed, and with query, key and value of their own widths."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.MultiheadAttention(6, 2, batch_first=True)
        self.apart = nn.MultiheadAttention(6, 2, batch_first=True, kdim=5, vdim=4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.packed(x, x, x, need_weights=False)
        return self.apart(y, x[..., :5], x[..., :4])[0]


class Region(nn.Module):
    """A product inside a region without autocast, as rotary embeddings have them; its weight goes in from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.lin = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            y = torch.tanh(x @ self.w.sin())
        return self.lin(y)


class MaxNorm(nn.Module):
    """A table that its lookup renormalizes in place; its rows are short, so that it stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lin = nn.Embedding(9, 4, _weight=torch.rand(9, 4) / 3, max_norm=1.0), nn.Linear(4, 3)

    def forward(self, index: Tensor) -> Tensor:
        return self.lin(self.table(index))


class Positions(nn.Module):
    """Tables that are only added, sliced and added, and indexed by the input, beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.pos, self.rows, self.bias = (nn.Parameter(torch.randn(n, 5)) for n in (4, 9, 6))
        self.lin = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        index = (x[..., 0] > 0).long()
        return self.lin(x + self.pos + self.rows[:4] + self.bias[index])


class Mixed(nn.Module):
    """A linear that is called as a module, whose weight is standardized elsewhere as well."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.back = nn.Linear(5, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.back(self.lin(x)), self.lin.weight.tanh())


def _vector(self: Any, x: Tensor) -> Tensor:
    return F.linear(x @ self.w0.tanh(), self.w1)


def _upsampler() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 6, 2, stride=2))


_GATES = [f"lstm.weight_{part}_l{layer}{way}" for layer in (0, 1) for way in ("", "_reverse") for part in ("ih", "hh")]

WEIGHT_CASES: tuple[Case, ...] = (
    Case(
        "aten_products",
        functional(_aten_products, (5, 4), (4, 6), (6, 3), (2, 3), bias=4),
        randn(4, 5),
        aten,
        "w0:in_out=addmm w1:in_out=mm w2:in_out=matmul w3=linear",
    ),
    Case(
        "aten_turned",
        functional(_aten_turned, (4, 5), (6, 4), (3, 6), (7, 3), (7, 2), bias=4),
        randn(4, 5),
        aten,
        "w0=addmm w1=mm w2=matmul w3=matmul_1 w4:in_out=linear",
    ),
    Case(
        "aten_lookups",
        Lookups,
        lambda: INDEX,
        aten,
        "w=embedding_2 table.weight=embedding plain.weight=embedding_1",
    ),
    Case("aten_turned_table", TurnedTable, lambda: INDEX, aten, "w:linear:in_out=embedding,matmul mix.weight=linear"),
    Case(
        "aten_padded_head",
        PaddedHead,
        lambda: INDEX,
        aten,
        "table.weight=embedding,linear_2 mix.weight=linear back.weight=linear_1",
        aliases={"table.weight": ("head.weight",)},
    ),
    Case(
        "functional_products",
        functional(_products, (5, 4), (4, 6), (6, 3), (2, 5), (5, 3), bias=4),
        randn(4, 5),
        functions,
        ("w0:in_out=torch.addmm w1:in_out=torch.mm w2:in_out=torch.matmul w3=torch.embedding w4:in_out=torch.matmul_1"),
    ),
    Case(
        "functional_methods",
        functional(_methods, (5, 4), (4, 6), (6, 3), bias=4),
        randn(4, 5),
        functions,
        "w0:in_out=torch.addmm w1:in_out=torch.mm w2:in_out=torch.matmul",
    ),
    Case(
        "functional_turned",
        functional(_turned, (4, 5), (6, 4), (3, 6), (7, 3), (7, 2), bias=4),
        randn(4, 5),
        functions,
        "w0=torch.addmm w1=torch.mm w2=torch.matmul w3=torch.matmul_1 w4:in_out=F.linear",
    ),
    Case(
        "functional_both_ways",
        functional(_both_ways, (6, 5), (4, 6)),
        randn(3, 2, 5),
        functions,
        "w0=F.linear,torch.matmul w1=F.linear_1,torch.matmul_1",
    ),
    Case("functional_two_layouts", functional(_two_layouts, (6, 5)), randn(3, 2, 5), functions, "w0=*"),
    Case(
        "functional_scaled_addmm",
        functional(_scaled_addmm, (5, 4), (3, 6), (4, 6), (6, 5), bias=4),
        randn(3, 5),
        functions,
        "w2:in_out=torch.addmm_1 w0=* w3=*",
        refusals={"w1": Reason.NO_FORM},
    ),
    Case(
        "functional_lookups",
        Lookups,
        lambda: INDEX,
        leaves("no"),
        "w=F.embedding table.weight=nn.Embedding plain.weight=nn.Embedding",
    ),
    Case(
        "module_padded_head",
        PaddedHead,
        lambda: INDEX,
        modules,
        "table.weight=nn.Embedding,nn.Linear@head mix.weight=nn.Linear back.weight=nn.Linear",
        aliases={"table.weight": ("head.weight",)},
    ),
    Case(
        "aten_conv_transpose",
        functional(_transposed_convs, (4, 5, 3), (4, 6, 3, 2), (4, 3, 1, 2, 3), bias=12),
        randn(2, 4, 5, 6),
        aten,
        "w0:conv=* w1:conv=* w2:conv=*",
    ),
    Case(
        "module_conv_transpose",
        _upsampler,
        randn(2, 3, 5, 4),
        modules,
        "0.weight=nn.Conv2d",
        refusals={"1.weight": Reason.OPAQUE},
    ),
    Case(
        "functional_contractions",
        functional(_contractions, (6, 5), (6, 7), (4, 7, 7), (5, 4), (3, 4, 2), (5, 3)),
        randn(2, 3, 5),
        functions,
        "w0=* w1=* w2:experts=* w3=* w4:experts=* w5=*",
    ),
    Case(
        "aten_experts",
        functional(_experts, (3, 5, 4), (3, 6, 4), (3, 7, 6), bias=7),
        randn(3, 2, 5),
        aten,
        "w0:experts=* w1:experts=* w2:experts=*",
    ),
    Case(
        "aten_routed",
        functional(_routed, (3, 5), (3, 5, 4), (3, 4, 6)),
        randn(4, 5),
        aten,
        "w0=linear w1:experts=* w2:experts=*",
    ),
    Case(
        "aten_chosen",
        functional(_chosen, (3, 6, 5), (3, 4, 6), (3, 4, 7)),
        randn(4, 5),
        aten,
        (
            "w0:experts=on-indexed-expert@select_2,on-indexed-expert@select_5 w1:experts=* "
            "w2:experts=on-indexed-expert@select_4"
        ),
    ),
    *(
        Case(
            f"{dialect}_grouped",
            functional(_grouped, (3, 5, 4), (3, 6, 4), (3, 7, 6), (3, 7, 5)),
            randn(6, 5),
            trace,
            found,
        )
        for dialect, trace, found in (
            ("aten", aten, _grouped_at("grouped_mm_fallback")),
            ("functional", functions, _grouped_at("grouped_mm_fallback_default")),
        )
    ),
    Case(
        "functional_looped",
        functional(_looped, (3, 5), (3, 4, 5), (3, 6, 4)),
        randn(4, 5),
        functions,
        "w0=F.linear w1:experts=* w2:experts=*",
    ),
    Case(
        "aten_packed", functional(_packed, (12, 5), (6, 5)), randn(2, 3, 5), aten, "w0=* w1=*", slices={"w0": (4, 4, 4)}
    ),
    *(
        Case(
            f"{dialect}_slices",
            functional(_slices, (12, 5), (10, 12), (6, 4), (5, 3, 2)),
            randn(2, 3, 5),
            trace,
            "w0=* w1=* w2=* w3:conv=*",
            slices={"w0": (2, 4, 6), "w1": (4, 6), "w2": (3, 3), "w3": (2, 3)},
        )
        for dialect, trace in (("aten", aten), ("functional", functions))
    ),
    *(
        Case(
            f"{dialect}_no_slices",
            functional(_no_slices, (5, 4), (7, 6), (4, 5), (6, 4), (6, 4), (4, 3)),
            randn(2, 3, 4),
            trace,
            "w0=* w1=* w2=* w3=* w4=* w5=*",
        )
        for dialect, trace in (("aten", aten), ("functional", functions))
    ),
    Case(
        "aten_standardized",
        seq(lambda: Standardized(3, 4, 3, stride=2), lambda: nn.Conv2d(4, 6, 2)),
        randn(2, 3, 7, 8),
        aten,
        "1.weight=conv2d_1 0.weight:conv=*",
    ),
    Case(
        "aten_weight_norm",
        _weight_norm,
        randn(4, 5),
        aten,
        "0.parametrizations.weight.original1=* 2.parametrizations.weight.original1=*",
        refusals={
            "0.parametrizations.weight.original0": Reason.VECTOR,
            "2.parametrizations.weight.original0": Reason.VECTOR,
        },
    ),
    Case(
        "aten_spectral_norm",
        _spectral_norm,
        randn(4, 3, 7),
        aten,
        "0.parametrizations.weight.original:conv=* 1.parametrizations.weight.original=*",
    ),
    Case(
        "aten_recurrent",
        Recurrent,
        randn(2, 4, 5),
        aten,
        " ".join(f"{name}:recurrent=*" for name in (*_GATES, "gru.weight_ih_l0", "gru.weight_hh_l0")),
    ),
    Case(
        "aten_attention",
        Heads,
        randn(2, 4, 6),
        aten,
        (
            "packed.in_proj_weight=linear packed.out_proj.weight=linear_1 apart.q_proj_weight=linear_2 "
            "apart.k_proj_weight=linear_3 apart.v_proj_weight=linear_4 apart.out_proj.weight=linear_5"
        ),
        exact=False,
    ),
    Case(
        "aten_encoder_layer",
        lambda: nn.TransformerEncoderLayer(6, 2, 10, batch_first=True),
        randn(2, 4, 6),
        aten,
        (
            "self_attn.in_proj_weight=linear self_attn.out_proj.weight=linear_1 linear1.weight=linear_2 "
            "linear2.weight=linear_3"
        ),
        exact=False,
    ),
    Case("aten_region", Region, randn(3, 5), aten, "lin.weight=linear w=*"),
    Case(
        "aten_max_norm",
        MaxNorm,
        lambda: INDEX,
        aten,
        "lin.weight=linear",
        refusals={"table.weight": Reason.MUTATED},
    ),
    Case(
        "module_max_norm",
        MaxNorm,
        lambda: INDEX,
        modules,
        "lin.weight=nn.Linear",
        refusals={"table.weight": Reason.MUTATED},
    ),
    Case(
        "aten_positions",
        Positions,
        randn(2, 4, 5),
        aten,
        "lin.weight=linear bias:embedding=*",
        refusals={"pos": Reason.NO_FORM, "rows": Reason.NO_FORM},
    ),
    Case(
        "module_mixed_uses",
        Mixed,
        randn(3, 5),
        modules,
        "back.weight=nn.Linear",
        refusals={"lin.weight": Reason.MIXED_USES},
    ),
    Case(
        "functional_vector",
        functional(_vector, (5, 1), (3, 1)),
        randn(4, 5),
        functions,
        "w1=F.linear",
        refusals={"w0": Reason.VECTOR},
    ),
)
