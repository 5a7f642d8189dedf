"""Recurrent layers, embeddings and shared weights: torch's own layers in every setting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import rnn

from lorasc_fx.plan import Reason
from tests.kit.operators.case import Case, linear, of, rand, row

SEQUENCE = rand((3, 4, 6))


def recurrent(layers: int = 1, both: bool = False, projected: bool = False, prefix: str = "layer.") -> dict[str, str]:
    ends = ("", "_reverse") if both else ("",)
    kinds = ("ih", "hh", "hr") if projected else ("ih", "hh")
    names = [f"{prefix}weight_{kind}_l{layer}{end}" for layer in range(layers) for end in ends for kind in kinds]
    return dict.fromkeys(names, "recurrent")


class Head(nn.Module):
    """A recurrent layer, and a linear one behind its sequence."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        output = self.layer(x)
        return self.head(output[0]), output[1]


class Packed(nn.Module):
    """Sequences of several lengths, packed and padded again."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, state = self.layer(packed)
        padded, _ = rnn.pad_packed_sequence(output, batch_first=True)
        return self.head(padded), state[0] if isinstance(state, tuple) else state


class Cells(nn.Module):
    """Cells in a Python loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.LSTMCell(6, 5), nn.GRUCell(5, 4), nn.RNNCell(4, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        lstm, gru, rnn, outputs = None, None, None, []
        for step in x.unbind(1):
            lstm = self.first(step, lstm)
            gru = self.second(lstm[0], gru)
            rnn = self.third(gru, rnn)
            outputs.append(rnn)
        return outputs


class Stateful(nn.Module):
    """Starts an unbatched sequence from a given state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 5, num_layers=2)

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.layer(x, (hidden, cell))


def layered(layer: Callable[[], nn.Module], width: int) -> Callable[[], nn.Module]:
    return lambda: Head(layer(), width)


def lengths() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, 6, dtype=torch.float64), torch.tensor([2, 4, 3])


HEAD = linear("head.weight")
TOLD = "head.weight=linear " + " ".join(f"{name}:recurrent=*" for name in recurrent(2, both=True))
# fmt: off
RECURRENT = [
    row("lstm", layered(lambda: nn.LSTM(6, 5, batch_first=True), 5), SEQUENCE, HEAD | recurrent()),
    row("lstm_deep", layered(lambda: nn.LSTM(6, 5, 2, dropout=0.3, bidirectional=True), 10), SEQUENCE,
        HEAD | recurrent(2, both=True), aten=TOLD),
    row("lstm_projected", layered(lambda: nn.LSTM(6, 5, proj_size=4, bias=False, batch_first=True), 4), SEQUENCE,
        HEAD | recurrent(projected=True)),
    row("gru", layered(lambda: nn.GRU(6, 5, 2, bidirectional=True, batch_first=True), 10), SEQUENCE,
        HEAD | recurrent(2, both=True), aten=TOLD),
    row("rnn_tanh", layered(lambda: nn.RNN(6, 5), 5), SEQUENCE, HEAD | recurrent()),
    row("rnn_relu", layered(lambda: nn.RNN(6, 5, nonlinearity="relu", bias=False), 5), SEQUENCE, HEAD | recurrent()),
    row("lstm_state", Stateful, rand((4, 6), (2, 5), (2, 5)), recurrent(2)),
    row("lstm_packed", lambda: Packed(nn.LSTM(6, 5, batch_first=True, bidirectional=True), 10), lengths,
        HEAD | recurrent(both=True), has_graph=False),
    row("gru_packed", lambda: Packed(nn.GRU(6, 5, 2, dropout=0.2, batch_first=True), 5), lengths,
        HEAD | recurrent(2), has_graph=False),
    row("cells", Cells, SEQUENCE,
        {f'{cell}.weight_{kind}': "recurrent" for cell in ("first", "second", "third") for kind in ("ih", "hh")}),
]
# fmt: on


def ids(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 9, shape)


class Bags(nn.Module):
    def __init__(self, mode: str, **options: Any) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 5, mode=mode, **options), nn.Linear(5, 3)

    def forward(self, ids: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return self.head(self.bag(ids, offsets, weights))


def embedding(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Embedding(9, 5, **options), nn.Linear(5, 3))


TABLE = {"0.weight": "embedding", "1.weight": "linear"}
LOOKUP = {"w0": "embedding"}
BAG = {"bag.weight": "embedding", "head.weight": "linear"}
# fmt: off
EMBEDDINGS = [
    Case("embedding", embedding(), ids(3, 4), TABLE),
    Case("embedding_padding", embedding(padding_idx=2), ids(3, 4), TABLE),
    Case("embedding_padding_from_end", embedding(padding_idx=-1), ids(3, 4), TABLE),
    Case("embedding_by_frequency", embedding(scale_grad_by_freq=True), ids(3, 4), TABLE),
    Case("embedding_max_norm", embedding(max_norm=1.0), ids(3, 4), linear("1.weight"),
        {"0.weight": (Reason.MUTATED, Reason.OPAQUE)}),
    Case("F_embedding", of(lambda x, w: F.embedding(x, w, padding_idx=-2), (9, 5)), ids(3, 4), LOOKUP),
    Case("F_embedding_names", of(lambda x, w: F.embedding(weight=w, input=x), (9, 5)), ids(3, 4), LOOKUP),
    Case("indexed", of(lambda x, w: w[x], (9, 5)), ids(3, 4), LOOKUP),
    Case("index_select", of(lambda x, w: w.index_select(0, x), (9, 5)), ids(4), LOOKUP),
    Case("one_hot", of(lambda x, w: F.one_hot(x, 9).to(w.dtype) @ w, (9, 5)), ids(3, 4), linear("w0")),
    Case("bag_mean", lambda: Bags("mean"), ids(3, 4), BAG),
    Case("bag_max", lambda: Bags("max", padding_idx=1), ids(3, 4), BAG),
    Case("bag_sum_weighted", lambda: Bags("sum", include_last_offset=True),
        lambda: (torch.randint(0, 9, (6,)), torch.tensor([0, 2, 6]), torch.rand(6, dtype=torch.float64)), BAG),
    Case("bag_function", of(lambda x, w: F.embedding_bag(x, w, mode="sum"), (9, 5)), ids(3, 4), LOOKUP),
]
# fmt: on


class Repeated(nn.Module):
    """A block applied three times, a layer under two names, and an autoencoder's transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))
        self.twice = nn.ModuleList([nn.Linear(5, 5)] * 2)
        self.encode = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.block(x)
        for layer in self.twice:
            x = torch.tanh(layer(x))
        return F.linear(torch.relu(self.encode(x)), self.encode.weight.t())


class Twice(nn.Sequential):
    """One layer and one batch norm, each under two names."""

    def __init__(self) -> None:
        layer, norm = nn.Linear(5, 5), nn.BatchNorm1d(5)
        super().__init__(layer, norm, layer, nn.Linear(5, 5), norm)


class Named(nn.Module):
    """Children whose names a GraphModule has for other things, and ours."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.graph, self.model, self.branches = (nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self.graph(self.model(self.branches(x).tanh()).tanh()).tanh())


# fmt: off
SHARED = [
    Case("names_of_graph_modules", Named, rand((4, 5)),
        linear(*(f'{name}.weight' for name in ("code", "graph", "model", "branches")))),
    Case("repeated", Repeated, rand((4, 5)),
        linear("block.0.weight", "block.2.weight", "twice.0.weight", "encode.weight")),
    Case("twice", Twice, rand((4, 5)), linear("0.weight", "3.weight")),
]
# fmt: on
