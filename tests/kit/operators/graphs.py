"""Models with several sites each, for tests of passes: layers, products and lookups, stacks, slices, refusals."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasc_fx.plan import Reason
from tests.kit.operators.case import Case, linear, of, rand, row, seq

COMPUTED_INDEX = torch.__version__ >= (2, 13)
"""Whether torch.export takes an index that the input computes."""


def index() -> tuple[Tensor]:
    return (torch.tensor([[1, 4, 8], [2, 3, 1]]),)


# --- layers ----------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One linear at two places, the second one on the output of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.back = nn.Linear(5, 6), nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.back(self.shared(x))))


class OneModule(nn.Module):
    """One module object under two names, called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.back = nn.Linear(5, 6), nn.Linear(6, 5)
        self.other = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.back(self.one(x)))


class NullToken(nn.Module):
    """Layers that are also applied to constants of forward, as for a null token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Linear(5, 6), nn.Conv1d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        null = self.conv(torch.ones(1, 1, 5, dtype=x.dtype)).sum() * self.embed(torch.full((1, 5), 0.5, dtype=x.dtype))
        return self.embed(x) * null + self.conv(x.unsqueeze(1)).sum()


class Tied(nn.Module):
    """Two linears with one weight and separate biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.back = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.back(self.first(x))))


class TiedHead(nn.Module):
    """A language model whose head is its table: one site, looked up and multiplied by.

    The head moves the table's padding row, and the lookup must not.
    """

    def __init__(self, padding_idx: int | None = None, product: bool = False) -> None:
        super().__init__()
        self.table, self.mix, self.back = nn.Embedding(9, 4, padding_idx), nn.Linear(4, 6), nn.Linear(6, 4)
        self.head, self.product = nn.Linear(4, 9), product
        self.head.weight = self.table.weight

    def forward(self, index: Tensor) -> Tensor:
        hidden = self.back(torch.relu(self.mix(self.table(index))))
        return hidden @ self.table.weight.t() if self.product else self.head(hidden)


class Attention(nn.Module):
    """Fused query, key and value, by names as real models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 3 * 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class PlainConv2d(nn.Conv2d):
    """A subclass that changes nothing in the forward: still a known form."""


class Gate(nn.Module):
    """Computes with its weight in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.sigmoid()


class Keyword(nn.Module):
    """Modules called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lin = nn.Conv1d(3, 5, 2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(input=self.conv(input=x))


class InPlace(nn.Module):
    """Writes into the output and the input of convolutions and linears, and computes something that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lin, self.aux = nn.Conv1d(3, 4, 3), nn.Linear(6, 5), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x)
        hidden.relu_()
        self.aux(hidden)
        out = self.lin(hidden)
        hidden.zero_()
        return F.relu(out, inplace=True)


class Quantized(nn.Module):
    """A weight in whole numbers, and a linear without one."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randint(-4, 5, (7, 5), dtype=torch.int8), requires_grad=False)
        self.lin = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(F.linear(x, self.q.double()))


class Added(nn.Module):
    """Tables that are only added, sliced and added, and indexed by the input, beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.pos, self.rows, self.bias = (nn.Parameter(torch.randn(n, 5)) for n in (4, 9, 6))
        self.lin = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        index = (x[..., 0] > 0).long()
        return self.lin(x + self.pos + self.rows[:4] + self.bias[index])


class Mixed(nn.Module):
    """A linear that is called as a module, whose weight is computed with elsewhere as well."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.back = nn.Linear(5, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.back(self.lin(x)), self.lin.weight.tanh())


class Region(nn.Module):
    """A product inside a region without autocast, as rotary embeddings have them; its weight goes in from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.lin = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            y = torch.tanh(x @ self.w.sin())
        return self.lin(y)


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


def _conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv1d(6, 5, 3, padding="same", dilation=2, bias=False),
        nn.Conv1d(5, 3, 2, padding="valid"),
    )


def _conv2d() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        nn.Conv2d(6, 12, 3, padding="same", groups=6),
        nn.GELU(),
        nn.Conv2d(12, 6, 1, bias=False),
        nn.Conv2d(6, 9, 3, padding="valid", groups=3),
    )


def _conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)),
        nn.Conv3d(4, 6, 3, padding="same", groups=2),
        nn.Conv3d(6, 3, 2, dilation=(1, 2, 1), bias=False),
    )


def _modes() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, padding=2, padding_mode="replicate", dilation=2, groups=2),
        nn.Conv2d(6, 5, (3, 5), padding="same", padding_mode="circular", bias=False),
        nn.Conv2d(5, 5, 3, stride=2, padding=1, padding_mode="reflect", groups=5),
    )


def _modes_1d_3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 4, 4, padding=3, padding_mode="circular", stride=2),
        nn.Unflatten(2, (2, 2, 3)),
        nn.Conv3d(4, 3, 3, padding="same", padding_mode="replicate"),
    )


def _max_norm() -> nn.Module:
    """A table that its lookup renormalizes in place; its rows are short, so that the lookup does not change it."""
    return nn.Sequential(nn.Embedding(9, 4, _weight=torch.rand(9, 4) / 3, max_norm=1.0), nn.Linear(4, 3))


# --- functions -------------------------------------------------------------------------------------------------------


def _bare(x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, unused: Tensor, b: Tensor) -> Tensor:
    return F.linear(x @ w0, w1, b) + torch.einsum("bsi,io->bso", x, w2)


def _convs(x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, b: Tensor) -> Tensor:
    one = F.conv1d(x.flatten(2), w0, None, 2, 1)
    two = F.conv2d(x, w1, b, (1, 2), (0, 1), (2, 1), 3)
    three = F.conv3d(x.unsqueeze(2), w2, None, 1, (1, 0, 1))
    return one.sum() + two.sum() * 2 + three.flatten(1)


def _transposed_convs(x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, b: Tensor) -> Tensor:
    one = F.conv_transpose1d(x.flatten(2), w0, None, 2, 1)
    two = F.conv_transpose2d(x, w1, b, (1, 2), (0, 1), 0, 2, (2, 1))
    three = F.conv_transpose3d(x.unsqueeze(2), w2, None, 1, (0, 0, 1))
    return one.sum() + two.sum() * 2 + three.flatten(1)


def _keywords(x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, b: Tensor) -> Tensor:
    x = F.conv2d(stride=(2, 1), weight=w0, input=x, padding=1, groups=2)
    x = F.conv2d(x, w1, None, 1, padding="same", dilation=2)
    return F.linear(bias=b, weight=w2, input=x)


def _shapes(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    scale = w.shape[1] * w.size(0) + w.dim()
    return F.linear(x, w, b).to(w.dtype) / scale


def _products(x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, w4: Tensor, b: Tensor) -> Tensor:
    x = torch.addmm(b, x, w0).tanh()
    x = torch.mm(x, w1).tanh()
    x = torch.matmul(x.view(2, 2, -1), w2).tanh()
    return (torch.embedding(w3, (x[..., 0] > 0).long()) * x[..., :1]) @ w4


def _turned(x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, w4: Tensor, b: Tensor) -> Tensor:
    x = torch.addmm(b, x, w0.t()).tanh()
    x = (b[:1] * x[:, :1]).addmm(x.mm(torch.transpose(w1, 1, 0)), w2.T).tanh()
    x = x.view(2, 2, -1).matmul(w3.permute((-1, 0)).t().transpose(-2, -1))
    return F.linear(x, torch.permute(torch.t(w4.mT), (1, 0)))


def _both_ways(x: Tensor, w0: Tensor, w1: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, w0)), w1) + (x @ w0.t()) @ w1.t()


def _scaled_addmm(x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, b: Tensor) -> Tensor:
    x = torch.addmm(b, x, w0, beta=0.5, alpha=2.0)
    x = torch.addmm(w1, x, w2, beta=1)
    return torch.mm(x, mat2=w3)


def _contractions(x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, w4: Tensor, w5: Tensor) -> Tensor:
    x = torch.einsum("bsi,oi->bso", x, w0).tanh()
    x = torch.tensordot(x, w1, ([2], [0])).tanh()
    x = torch.bilinear(x, x, w2).tanh()
    product = w3 @ x.transpose(1, 2)
    return product.sum(-1) + torch.einsum("bsi,hid->bhsd", x, w4).sum((-1, -2)) @ w5.view(3, 5)


def _experts(x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, b: Tensor) -> Tensor:
    x = torch.bmm(x, w0).tanh()
    x = torch.einsum("eni,eoi->eno", x, w1).tanh()
    return torch.baddbmm(b, x, w2.transpose(1, 2))


def _routed(x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    router = F.linear(x, w0)
    chosen = router.argmax(-1)
    y = torch.bmm(x.unsqueeze(1), w1[chosen]).tanh()
    return torch.bmm(y, w2.index_select(0, chosen)).squeeze(1) * router.max(-1).values[:, None]


def _chosen(x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """One matrix of each stack, by an index of no axis that the input tells; of one of them two."""
    index = (x[0, 0] > 0).long()
    y = F.linear(F.linear(x, w0[index]).tanh(), w1[index]) @ w2[index + 1] + w0.shape[0]
    return y * F.linear(F.linear(x, w0[2 - index]), w1[2]).sum()


def _looped(x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    gates = F.linear(x, w0).softmax(-1)
    return sum(gates[:, e, None] * F.linear(F.linear(x, w1[e]).tanh(), w2[e]) for e in range(3))


def _grouped_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    import transformers.integrations.moe  # noqa: F401  (it makes the op)

    return torch.ops.transformers.grouped_mm_fallback.default(x, w, ends)


def _grouped(x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Rows that an input sorts by expert: stored stacks, transposed ones, and one with another use."""
    ends = torch.stack([(x > 0).sum() * 0 + 2, (x > 0).any() * 3, (x > 0).any() * 6]).int()
    x = _grouped_product(x, w0, ends).tanh()
    x = _grouped_product(x, w1.transpose(-2, -1), ends).tanh()
    x = _grouped_product(x, w2.permute(0, 2, 1).mT.transpose(1, 2), ends).tanh()
    return _grouped_product(x, w3, ends) + torch.bmm(x.expand(3, -1, -1), w3).sum(0)


def _grouped_at(node: str) -> str:
    form = "transformers::grouped_mm_fallback"
    return f"w0:stacked:in_out={form}@{node} w1:stacked={form}@{node}_1 w2:stacked={form}@{node}_2 w3:stacked=*"


def _packed(x: Tensor, w0: Tensor, w1: Tensor) -> Tensor:
    q, k, v = w0.chunk(3)
    scores = F.linear(x, q) @ F.linear(x, k).transpose(-1, -2)
    return scores.softmax(-1) @ F.linear(x, v) * F.linear(x, w1[2:, :])


def _slices(x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Each weight in slices of unequal or of equal size, by split, by ranges, by a view, of a kernel."""
    one, two, three = w0.split([2, 4, 6])
    x = torch.cat([F.linear(x, one), F.linear(x, two).tanh(), F.linear(x, three).sin()], -1)
    x = F.linear(x, w1[:4]).tanh() * F.linear(x, w1[4:]).sum(-1, keepdim=True)
    q, k = w2.view(2, 3, 4).unbind(0)
    x = F.linear(x, q) * F.linear(x, k).cos() + F.linear(x.sin(), q)
    return F.conv1d(x.transpose(-1, -2), w3[:2]).sum(1) * F.conv1d(x.transpose(-1, -2), w3[2:]).mean(1)


def _vector(x: Tensor, w0: Tensor, w1: Tensor) -> Tensor:
    return F.linear(x @ w0.tanh(), w1)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3, bias=False))


def _layers(kind: str, *indices: int, module: bool = False) -> str:
    """Return the sites of a sequence whose modules or calls are of one kind."""
    names = [f"nn.{kind.capitalize()}"] * 9 if module else [kind, *(f"{kind}_{number}" for number in range(1, 9))]
    return " ".join(f"{index}.weight={name}" for index, name in zip(indices, names, strict=False))


# fmt: off
_TABLE = "table.weight=nn.Embedding,nn.Linear@head mix.weight=nn.Linear back.weight=nn.Linear"
_TABLE_ATEN = "table.weight=embedding,linear_2 mix.weight=linear back.weight=linear_1"
_CONVS_2D, _MODES = (0, 1, 3, 4), (0, 1, 2, 3)

GRAPHS: list[Case] = [
    row("linear", _mlp, rand((4, 2, 5)), aten=_layers("linear", 0, 2), module=_layers("linear", 0, 2, module=True)),
    row("conv1d", _conv1d, rand((2, 4, 13)), aten=_layers("conv1d", 0, 2, 3)),
    row("convs", seq(_conv1d, lambda: nn.Unflatten(2, (2, 3)), lambda: PlainConv2d(3, 4, (1, 2), dilation=(1, 2))),
        rand((2, 4, 14)), leaves=("PlainConv2d",),
        module="0.0.weight=nn.Conv1d 0.2.weight=nn.Conv1d 0.3.weight=nn.Conv1d 2.weight=nn.Conv2d"),
    row("conv2d", _conv2d, rand((2, 4, 9, 7)), aten=_layers("conv2d", *_CONVS_2D),
        module=_layers("conv2d", *_CONVS_2D, module=True)),
    row("conv3d", _conv3d, rand((2, 2, 3, 6, 5)), aten=_layers("conv3d", 0, 1, 2),
        module=_layers("conv3d", 0, 1, 2, module=True)),
    row("padding_modes", _modes, rand((2, 3, 8, 7)), aten=_layers("conv2d", *_MODES),
        module=_layers("conv2d", *_MODES, module=True)),
    row("padding_modes_1d_3d", _modes_1d_3d, rand((2, 3, 20)), module="0.weight=nn.Conv1d 2.weight=nn.Conv3d"),
    row("shared", Shared, rand((3, 5)), aten="shared.weight=linear,linear_2 back.weight=linear_1",
        module="shared.weight=nn.Linear,nn.Linear@shared_1 back.weight=nn.Linear"),
    row("two_names", OneModule, rand((3, 5)), module="one.weight=nn.Linear,nn.Linear@one_1 back.weight=nn.Linear"),
    row("null_token", NullToken, rand((3, 5)), aten="embed.weight=linear,linear_1 conv.weight=conv1d,conv1d_1"),
    row("tied", Tied, rand((3, 5)), aten="first.weight=linear,linear_2 back.weight=linear_1"),
    row("tied_head", TiedHead, index, aten=_TABLE_ATEN, module=_TABLE),
    row("tied_by_product", lambda: TiedHead(product=True), index,
        aten="table.weight=embedding,matmul mix.weight=linear back.weight=linear_1"),
    row("padded_head", lambda: TiedHead(padding_idx=1), index, aten=_TABLE_ATEN, module=_TABLE),
    row("bare_matrices", of(_bare, (5, 4), (6, 4), (5, 6), (3, 2), (6,)), rand((2, 3, 5)), unreached=("w3",),
        aten="w0:in_out=matmul w1=linear w2=*"),
    row("positional_convs", of(_convs, (5, 3, 4), (6, 1, 3, 2), (4, 3, 1, 2, 3), (6,)), rand((2, 3, 5, 6)),
        functional="w0=F.conv1d w1=F.conv2d w2=F.conv3d"),
    row("keywords", of(_keywords, (6, 2, 3, 3), (4, 6, 3, 1), (5, 6), (5,)), rand((2, 4, 7, 6)),
        functional="w0=F.conv2d w1=F.conv2d_1 w2=F.linear"),
    row("shape_reads", of(_shapes, (6, 5), (6,)), rand((3, 5)), functional="w0=F.linear"),
    row("keyword_modules", Keyword, rand((2, 3, 7)), module="conv.weight=nn.Conv1d lin.weight=nn.Linear"),
    row("opaque", seq(lambda: nn.Linear(6, 5), Gate, lambda: nn.Linear(4, 6), Attention), rand((2, 3, 6)),
        linear("0.weight", "1.weight", "2.weight", "3.qkv.weight", "3.proj.weight"), leaves=("Attention", "Gate"),
        module="0.weight=nn.Linear 2.weight=nn.Linear"),
    row("in_place", InPlace, rand((2, 3, 8)), modes=(),
        module="conv.weight=nn.Conv1d lin.weight=nn.Linear aux.weight=nn.Linear"),
    row("whole_numbers", Quantized, rand((2, 5)), None, {"q": Reason.NOT_FLOATING}, functional="lin.weight=nn.Linear"),
    row("products", of(_products, (5, 4), (4, 6), (6, 3), (2, 5), (5, 3), (4,)), rand((4, 5)),
        aten="w0:in_out=addmm w1:in_out=mm w2:in_out=matmul w3=embedding w4:in_out=matmul_1",
        functional="w0:in_out=torch.addmm w1:in_out=torch.mm w2:in_out=torch.matmul w3=torch.embedding "
        "w4:in_out=torch.matmul_1"),
    row("turned", of(_turned, (4, 5), (6, 4), (3, 6), (7, 3), (7, 2), (4,)), rand((4, 5)),
        aten="w0=addmm w1=mm w2=addmm_1 w3=matmul w4:in_out=linear",
        functional="w0=torch.addmm w1=torch.mm w2=torch.addmm_1 w3=torch.matmul w4:in_out=F.linear"),
    row("lookups", Lookups, index, aten="w=embedding_2 table.weight=embedding plain.weight=embedding_1", leaves=("no",),
        functional="w=F.embedding table.weight=nn.Embedding plain.weight=nn.Embedding"),
    row("turned_table", TurnedTable, index, aten="w:linear:in_out=embedding,matmul mix.weight=linear"),
    row("both_ways", of(_both_ways, (6, 5), (4, 6)), rand((3, 2, 5)),
        functional="w0=F.linear,torch.matmul w1=F.linear_1,torch.matmul_1"),
    row("two_layouts", of(lambda x, w: torch.tanh(F.linear(x, w)) @ w, (6, 5)), rand((3, 2, 5)), functional="w0=*"),
    row("scaled_addmm", of(_scaled_addmm, (5, 4), (3, 6), (4, 6), (6, 5), (4,)), rand((3, 5)), None,
        {"w1": Reason.NO_FORM}, functional="w2:in_out=torch.addmm_1 w0=* w3=*"),
    row("conv_transpose", of(_transposed_convs, (4, 5, 3), (4, 6, 3, 2), (4, 3, 1, 2, 3), (12,)), rand((2, 4, 5, 6)),
        aten="w0:conv=* w1:conv=* w2:conv=*"),
    row("upsampler", seq(lambda: nn.Conv2d(3, 4, 3, padding=1), lambda: nn.ConvTranspose2d(4, 6, 2, stride=2)),
        rand((2, 3, 5, 4)), {"0.weight": "conv", "1.weight": "conv"}, module="0.weight=nn.Conv2d"),
    row("contractions", of(_contractions, (6, 5), (6, 7), (4, 7, 7), (5, 4), (3, 4, 2), (5, 3)), rand((2, 3, 5)),
        functional="w0=* w1=* w2:stacked=* w3=* w4:stacked=* w5=*"),
    row("experts", of(_experts, (3, 5, 4), (3, 6, 4), (3, 7, 6), (7,)), rand((3, 2, 5)),
        aten="w0:stacked=* w1:stacked=* w2:stacked=*"),
    row("routed", of(_routed, (3, 5), (3, 5, 4), (3, 4, 6)), rand((4, 5)), aten="w0=linear w1:stacked=* w2:stacked=*"),
    row("chosen", of(_chosen, (3, 6, 5), (3, 4, 6), (3, 4, 7)), rand((4, 5)), {}, modes=(),
        aten="w0:stacked=* w1:stacked=* w2:stacked=*" if COMPUTED_INDEX else ""),
    row("grouped", of(_grouped, (3, 5, 4), (3, 6, 4), (3, 7, 6), (3, 7, 5)), rand((6, 5)),
        aten=_grouped_at("grouped_mm_fallback"), functional=_grouped_at("grouped_mm_fallback_default")),
    row("looped", of(_looped, (3, 5), (3, 4, 5), (3, 6, 4)), rand((4, 5)),
        functional="w0=F.linear w1:stacked=* w2:stacked=*"),
    row("packed", of(_packed, (12, 5), (6, 5)), rand((2, 3, 5)), aten="w0=* w1=*"),
    row("slices", of(_slices, (12, 5), (10, 12), (6, 4), (5, 3, 2)), rand((2, 3, 5)),
        aten="w0=* w1=* w2=* w3:conv=*", functional="w0=* w1=* w2=* w3:conv=*"),
    row("region", Region, rand((3, 5)), aten="lin.weight=linear w=*"),
    row("max_norm", _max_norm, index, None, {"0.weight": Reason.MUTATED}, modes=(),
        aten="1.weight=linear", module="1.weight=nn.Linear"),
    row("added", Added, rand((2, 4, 5)), None, {"pos": Reason.NO_FORM, "rows": Reason.NO_FORM},
        aten="lin.weight=linear bias:embedding=*"),
    row("mixed_uses", Mixed, rand((3, 5)), linear("lin.weight", "back.weight"), mixed=("lin.weight",),
        module="back.weight=nn.Linear"),
    row("vector", of(_vector, (5, 1), (3, 1)), rand((4, 5)), None, {"w0": Reason.VECTOR}, functional="w1=F.linear"),
]
# fmt: on
