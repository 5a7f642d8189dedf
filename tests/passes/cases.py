"""Small graphs, at least one for every row of graph/forms.py, and what a match has to find in each.

Here: the forms beside which a branch stands, and what is refused; forms on the weight are in cases_weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasc_fx import CascadeSpec, Rule
from lorasc_fx.plan import Reason
from tests.passes.case import SPEC, Case, aten, functional, functions, leaves, modules, randn, seq
from tests.passes.cases_weights import WEIGHT_CASES

__all__ = ["ADAPTABLE", "BY_NAME", "CASES", "SPEC", "Case", "Encoder"]

# --- models ----------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One linear at two places, the second one on the output of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.back = nn.Linear(5, 6), nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.back(self.shared(x))))


class NullToken(nn.Module):
    """Layers that are also applied to constants of forward, as for a null token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Linear(5, 6), nn.Conv1d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        null = self.conv(torch.ones(1, 1, 5, dtype=x.dtype)).sum() * self.embed(torch.full((1, 5), 0.5, dtype=x.dtype))
        return self.embed(x) * null + self.conv(x.unsqueeze(1)).sum()


class Tied(nn.Module):
    """Two linears with one weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.back = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.back(self.first(x))))


class TiedHead(nn.Module):
    """An embedding whose table is the head's weight: one site, looked up and multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(9, 4), nn.Linear(4, 4 + 2), nn.Linear(4, 9, bias=False)
        self.back = nn.Linear(6, 4)
        self.head.weight = self.table.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.back(torch.relu(self.mix(self.table(index)))))


class Attention(nn.Module):
    """Fused query, key and value, by names as real models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 3 * 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.fc1, self.fc2 = nn.LayerNorm(6), Attention(), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.fc2(F.gelu(self.fc1(x)))


class Encoder(nn.Module):
    """Two blocks, a head, a bare matrix of positions, and a layer that nothing calls; a tree comes out."""

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


class Conv2dSame(nn.Conv2d):
    """As timm's: padding computed from the input's size, in a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        pad = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(x.shape[-2:], self.stride, (3, 3), strict=True)]
        x = F.pad(x, [pad[1] // 2, pad[1] - pad[1] // 2, pad[0] // 2, pad[0] - pad[0] // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


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


class OneModule(nn.Module):
    """One module object under two names, called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.back = nn.Linear(5, 6), nn.Linear(6, 5)
        self.other = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.back(self.one(x)))


class Quantized(nn.Module):
    """A weight in whole numbers, and a linear without one."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randint(-4, 5, (7, 5), dtype=torch.int8), requires_grad=False)
        self.lin = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(F.linear(x, self.q.double()))


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


def _bare(self: Any, x: Tensor) -> Tensor:
    return F.linear(x @ self.w0, self.w1, self.b) + torch.einsum("bsi,io->bso", x, self.w2)


def _keywords(self: Any, x: Tensor) -> Tensor:
    x = F.conv2d(x, stride=(2, 1), weight=self.w0, padding=1, groups=2)
    x = F.conv2d(x, self.w1, None, 1, padding="same", dilation=2)
    return F.linear(bias=self.b, weight=self.w2, input=x)


def _shapes(self: Any, x: Tensor) -> Tensor:
    scale = self.w0.shape[1] * self.w0.size(0) + self.w0.dim()
    return F.linear(x, self.w0, self.b).to(self.w0.dtype) / scale


def _convs(self: Any, x: Tensor) -> Tensor:
    one = F.conv1d(x.flatten(2), self.w0, None, 2, 1)
    two = F.conv2d(x, self.w1, self.b, (1, 2), (0, 1), (2, 1), 3)
    three = F.conv3d(x.unsqueeze(2), self.w2, None, 1, (1, 0, 1))
    return one.sum() + two.sum() * 2 + three.flatten(1)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3, bias=False))


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


COMPUTED_INDEX = torch.__version__ >= (2, 13)
"""Whether torch.export takes an index that the input computes."""

CASES: tuple[Case, ...] = (
    # ATen
    Case("aten_linear", _mlp, randn(4, 2, 5), aten, "0.weight=linear 2.weight=linear_1"),
    Case("aten_conv1d", _conv1d, randn(2, 4, 13), aten, "0.weight=conv1d 2.weight=conv1d_1 3.weight=conv1d_2"),
    Case(
        "aten_conv2d",
        _conv2d,
        randn(2, 4, 9, 7),
        aten,
        "0.weight=conv2d 1.weight=conv2d_1 3.weight=conv2d_2 4.weight=conv2d_3",
    ),
    Case("aten_conv3d", _conv3d, randn(2, 2, 3, 6, 5), aten, "0.weight=conv3d 1.weight=conv3d_1 2.weight=conv3d_2"),
    Case(
        "aten_padding_modes",
        _modes,
        randn(2, 3, 8, 7),
        aten,
        "0.weight=conv2d 1.weight=conv2d_1 2.weight=conv2d_2 3.weight=conv2d_3",
    ),
    Case(
        "aten_unbatched",
        seq(
            lambda: nn.Conv1d(3, 4, 3, groups=1, padding=1),
            lambda: nn.Conv1d(4, 8, 2, groups=4),
            lambda: nn.Linear(7, 5),
        ),
        randn(3, 8),
        aten,
        "0.weight=conv1d 1.weight=conv1d_1 2.weight=linear",
    ),
    Case("aten_shared", Shared, randn(3, 5), aten, "shared.weight=linear,linear_2 back.weight=linear_1"),
    Case(
        "aten_null_token",
        NullToken,
        randn(3, 5),
        aten,
        "embed.weight=linear,linear_1 conv.weight=conv1d,conv1d_1",
    ),
    Case(
        "aten_tied",
        Tied,
        randn(3, 5),
        aten,
        "first.weight=linear,linear_2 back.weight=linear_1",
        aliases={"first.weight": ("second.weight",)},
    ),
    Case(
        "aten_tied_head",
        TiedHead,
        lambda: (torch.tensor([[1, 4, 8], [0, 3, 2]]),),
        aten,
        "table.weight=embedding,linear_2 mix.weight=linear back.weight=linear_1",
        aliases={"table.weight": ("head.weight",)},
    ),
    Case(
        "aten_bare_matrices",
        functional(_bare, (5, 4), (6, 4), (5, 6), (3, 2), bias=6),
        randn(2, 3, 5),
        aten,
        "w0:in_out=matmul w1=linear w2=*",
        unreached=("w3",),
    ),
    Case(
        "aten_encoder",
        Encoder,
        randn(2, 4, 6),
        aten,
        (
            "blocks.0.attn.qkv.weight=linear blocks.0.attn.proj.weight=linear_1 "
            "blocks.1.attn.qkv.weight=linear_4 blocks.1.attn.proj.weight=linear_5 head.weight=linear_8"
        ),
        {
            "pos": Reason.NO_FORM,
            "blocks.0.fc1.weight": Reason.EXCLUDED,
            "blocks.1.fc1.weight": Reason.EXCLUDED,
            "blocks.0.fc2.weight": Reason.TRAINED,
            "blocks.1.fc2.weight": Reason.EXCLUDED,
        },
        ("spare.weight",),
        spec=CascadeSpec(
            exclude=("*.fc1", "blocks.1.fc2.*"),
            train=("*.fc2",),
            rules=(Rule("*.qkv", rank=2), Rule("linear", lora_alpha=7.0), Rule("head", rank=1)),
            rank=3,
            lora_alpha=4.0,
            use_rslora=True,
            pace=0.3,
        ),
    ),
    # functions
    Case(
        "functional_convs",
        functional(_convs, (5, 3, 4), (6, 1, 3, 2), (4, 3, 1, 2, 3), bias=6),
        randn(2, 3, 5, 6),
        functions,
        "w0=F.conv1d w1=F.conv2d w2=F.conv3d",
    ),
    Case(
        "functional_keywords",
        functional(_keywords, (6, 2, 3, 3), (4, 6, 3, 1), (5, 6), bias=5),
        randn(2, 4, 7, 6),
        functions,
        "w0=F.conv2d w1=F.conv2d_1 w2=F.linear",
    ),
    Case("functional_shape_reads", functional(_shapes, (6, 5), bias=6), randn(3, 5), functions, "w0=F.linear"),
    # modules
    Case("module_linear", _mlp, randn(4, 5), modules, "0.weight=nn.Linear 2.weight=nn.Linear"),
    Case(
        "module_convs",
        seq(_conv1d, lambda: nn.Unflatten(2, (2, 3)), lambda: PlainConv2d(3, 4, (1, 2), dilation=(1, 2))),
        randn(2, 4, 14),
        leaves("PlainConv2d"),
        "0.0.weight=nn.Conv1d 0.2.weight=nn.Conv1d 0.3.weight=nn.Conv1d 2.weight=nn.Conv2d",
    ),
    Case(
        "module_conv2d",
        _conv2d,
        randn(2, 4, 9, 7),
        modules,
        "0.weight=nn.Conv2d 1.weight=nn.Conv2d 3.weight=nn.Conv2d 4.weight=nn.Conv2d",
    ),
    Case(
        "module_conv3d",
        _conv3d,
        randn(2, 2, 3, 6, 5),
        modules,
        "0.weight=nn.Conv3d 1.weight=nn.Conv3d 2.weight=nn.Conv3d",
    ),
    Case(
        "module_padding_modes",
        _modes,
        randn(2, 3, 8, 7),
        modules,
        "0.weight=nn.Conv2d 1.weight=nn.Conv2d 2.weight=nn.Conv2d 3.weight=nn.Conv2d",
    ),
    Case("module_padding_modes_1d_3d", _modes_1d_3d, randn(2, 3, 20), modules, "0.weight=nn.Conv1d 2.weight=nn.Conv3d"),
    Case(
        "module_unbatched",
        seq(
            lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
            lambda: nn.Conv2d(4, 4, 2, groups=4),
            lambda: nn.Flatten(0),
            lambda: nn.Linear(4 * 4 * 3, 5),
        ),
        randn(3, 5, 4),
        modules,
        "0.weight=nn.Conv2d 1.weight=nn.Conv2d 3.weight=nn.Linear",
    ),
    Case("module_keywords", Keyword, randn(2, 3, 7), modules, "conv.weight=nn.Conv1d lin.weight=nn.Linear"),
    Case(
        "module_shared",
        Shared,
        randn(3, 5),
        modules,
        "shared.weight=nn.Linear,nn.Linear@shared_1 back.weight=nn.Linear",
    ),
    Case(
        "module_two_names",
        OneModule,
        randn(3, 5),
        modules,
        "one.weight=nn.Linear,nn.Linear@one_1 back.weight=nn.Linear",
        aliases={"one.weight": ("other.weight",)},
    ),
    Case(
        "module_tied_head",
        TiedHead,
        lambda: (torch.tensor([[1, 4, 8], [0, 3, 2]]),),
        modules,
        "table.weight=nn.Embedding,nn.Linear@head mix.weight=nn.Linear back.weight=nn.Linear",
        aliases={"table.weight": ("head.weight",)},
    ),
    Case(
        "module_opaque",
        seq(lambda: nn.Linear(6, 5), Gate, lambda: nn.Linear(4, 6), Attention),
        randn(2, 3, 6),
        leaves("Attention", "Gate"),
        "0.weight=nn.Linear 2.weight=nn.Linear",
        {"1.weight": Reason.OPAQUE, "3.qkv.weight": Reason.OPAQUE, "3.proj.weight": Reason.OPAQUE},
    ),
    Case(
        "module_own_forward",
        seq(lambda: Conv2dSame(3, 6, 3, stride=2, groups=3), lambda: nn.Conv2d(6, 4, 1)),
        randn(2, 3, 7, 6),
        leaves("Conv2dSame"),
        "1.weight=nn.Conv2d",
        {"0.weight": Reason.OPAQUE},
    ),
    Case(
        "module_in_place",
        InPlace,
        randn(2, 3, 8),
        modules,
        "conv.weight=nn.Conv1d lin.weight=nn.Linear aux.weight=nn.Linear",
    ),
    Case(
        "functional_whole_numbers",
        Quantized,
        randn(2, 5),
        functions,
        "lin.weight=nn.Linear",
        {"q": Reason.NOT_FLOATING},
    ),
    *(case for case in WEIGHT_CASES if case.name != "aten_chosen" or COMPUTED_INDEX),
)

BY_NAME = {case.name: case for case in CASES}
ADAPTABLE = tuple(case for case in CASES if case.sites)
"""Cases with a site: all that an insertion can work on."""
