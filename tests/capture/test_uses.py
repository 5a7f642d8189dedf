"""The weights that an eager call uses, and the kinds of their sites, follow from the ops on them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasc_fx.capture.uses import uses_in_a_call


class Uses(nn.Module):
    """Uses each weight in another way."""

    def __init__(self) -> None:
        super().__init__()
        names = "direct both added product constant scaled divided rows looked_up normed unused shape alone bent"
        for name in names.split():
            self.register_parameter(name, nn.Parameter(torch.randn(4, 4)))
        self.kernel, self.bias = nn.Parameter(torch.randn(4, 4, 1)), nn.Parameter(torch.randn(4))
        self.register_buffer("mask", torch.ones(4, 4))

    def forward(self, x: Tensor, ids: Tensor) -> list[Tensor]:
        gate = x.mean() + self.bias
        return [
            F.linear(x, self.direct, self.bias),
            F.linear(x, self.both) + self.both.sum(),
            torch.addmm(self.added, x, self.product),
            F.linear(x, self.constant * self.mask * 2.0),
            F.linear(x, gate * self.scaled),
            F.conv1d(x[None], (self.kernel / gate).mul(self.mask[..., None])),
            F.linear(x, (self.divided / x.mean()).t()),
            self.rows[ids],
            F.embedding(ids, self.looked_up),
            (x @ self.normed).sum() * F.linear(x, self.normed / self.normed.norm()),
            x.new_ones(self.shape.shape).to(self.shape),
            self.alone.sum(),
            (self.bent * x.mean()).tanh(),
        ]


def test_uses_of_weights_in_an_eager_call() -> None:
    model = Uses()
    uses = uses_in_a_call(model, (torch.randn(4, 4), torch.tensor([1, 2])), {})
    linear = ["bias", "both", "constant", "direct", "divided", "normed", "product", "scaled"]
    other = {"kernel": "conv", "looked_up": "embedding", "rows": "embedding"}
    assert uses.kinds == dict.fromkeys(("added", "alone", "bent"), "") | dict.fromkeys(linear, "linear") | other
    assert uses.beside == {"direct", "looked_up"}
    nodes = [(node.target, node.kwargs) for node in uses.graph.graph.nodes if node.op == "call_function"]
    assert [target for target, _ in nodes] == [F.linear, F.embedding]
    weights = [[str(value.target) for value in kwargs.values() if value.op == "get_attr"] for _, kwargs in nodes]
    assert weights == [["model.direct"], ["model.looked_up"]]
