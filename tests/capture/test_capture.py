"""There is one adapted graph per call signature, captured on demand. All graphs share the branches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorasc_fx as lx
from tests.kit.errors import raises, warns
from tests.kit.models import batches, branches, optimizer_of, randomize
from tests.kit.seams import lower


class Choosy(nn.Module):
    """Takes optional labels, a Python number, and a mask by keyword. Uses an auxiliary layer in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 7)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(7, 3)
        self.aux = nn.Linear(7, 4)

    def forward(
        self,
        x: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        scale: float = 1.0,
        mask: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        hidden = torch.tanh(self.body(x)) * scale
        if mask is not None:
            hidden = hidden * mask
        outputs = {"logits": self.head(self.drop(hidden))}
        if self.training:
            outputs["aux"] = self.aux(hidden)
        if labels is not None:
            outputs["loss"] = F.cross_entropy(outputs["logits"], labels)
        return outputs


def choosy() -> nn.Module:
    torch.manual_seed(41)
    return Choosy().double()


def same(computed: dict[str, Any], expected: dict[str, Any], **close: float) -> None:
    torch.testing.assert_close(computed, expected, **{"rtol": 0, "atol": 0, **close})


def test_every_signature_is_the_eager_model(captures: Any) -> None:
    """Arguments by position or keyword, in any batch size. A known signature captures no new graph."""
    model = choosy().eval()
    eager = copy.deepcopy(model)
    x, big = batches(1, 4, 5)[0], batches(1, 9, 5)[0]
    labels, mask = torch.tensor([0, 2, 1, 1]), (batches(1, 4, 7)[0] > 0).double()
    cascade = lx.adapt(model, (x,))
    initial = captures()
    calls: list[tuple[tuple[Any, ...], dict[str, Any], int]] = [
        ((x,), {}, 0),
        ((), {"x": x}, 0),
        ((x, None), {}, 0),
        ((x,), {"labels": None, "mask": None}, 0),
        ((big,), {}, 1),  # the second size makes the batch axis dynamic
        ((batches(1, 7, 5)[0],), {}, 0),
        ((x, labels), {}, 1),
        ((), {"labels": labels, "x": x}, 0),
        ((x,), {"mask": mask}, 1),
        ((x,), {"scale": 2.0}, 1),
        ((x,), {"scale": 3.0}, 1),
        ((x,), {"scale": 2.0}, 0),
        ((x, labels), {"scale": 2.0, "mask": mask}, 1),
    ]
    total = initial
    for args, kwargs, new in calls:
        same(cascade(*args, **kwargs), eager(*args, **kwargs))
        total += new
        assert captures() == total, kwargs
    assert total - initial == 6


class Gathers(nn.Module):
    """Takes a total and a bias by `**kwargs`, as models of transformers take `num_items_in_batch`."""

    def __init__(self, child: str) -> None:
        super().__init__()
        self.child = child
        self.add_module(child, nn.Linear(5, 3))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: torch.Tensor) -> dict[str, Any]:
        logits = self.get_submodule(self.child)(x) + kwargs["bias"]
        logits = logits if mask is None else logits * mask[:, None]
        return {"logits": logits, "loss": logits.square().sum() / kwargs["total"]}


@pytest.mark.parametrize("child", ["body", "code"])  # torch.export reserves the name `code`
def test_sizes_are_dynamic_beside_gathered_keywords(child: str, captures: Any) -> None:
    torch.manual_seed(2)
    model = Gathers(child).double()
    eager = copy.deepcopy(model)

    def call(size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, mask = batches(1, size, 5)[0], torch.ones(size, dtype=torch.float64)
        return (x, mask), {"total": torch.tensor(2.0 * size), "bias": x.new_ones(3)}

    cascade = lx.adapt(model, *call(4))
    initial = captures()
    for size, new in ((9, 1), (7, 0), (4, 0), (30, 0)):
        args, kwargs = call(size)
        before = captures()
        same(cascade(*args, **kwargs), eager(*args, **kwargs), rtol=1e-12, atol=1e-12)
        assert captures() == before + new
        same(cascade(*args, **dict(reversed(kwargs.items()))), eager(*args, **kwargs), rtol=1e-12, atol=1e-12)
    assert captures() == initial + 1
    assert [site.weight for site in cascade.sites] == [f"{child}.weight"]


def test_a_layer_of_another_mode_becomes_a_site() -> None:
    """A weight that was not reached gets a branch, a param group, noise, and its stages follow the formulas."""
    model = choosy().eval()
    original = copy.deepcopy(model)
    x = batches(1, 4, 5)[0]
    spec = lx.CascadeSpec(rank=2, pace=0.5, noise=lx.Noise(0.2))
    cascade = lx.adapt(model, (x,), spec=spec)
    assert cascade.unreached == ("aux.weight",)
    assert [site.weight for site in cascade.sites] == ["body.weight", "head.weight"]
    assert torch.equal(model.aux.weight, original.aux.weight)
    optimizer = optimizer_of(cascade)
    randomize(cascade)
    cascade.transition(optimizer)

    cascade.train()
    with warns("late-sites", "1", "aux.weight"):
        cascade(x)
    assert cascade.unreached == ()
    assert {site.weight for site in cascade.sites} == {"body.weight", "head.weight", "aux.weight"}
    assert not torch.equal(model.aux.weight, original.aux.weight)  # noise
    with cascade.weights("slow"):
        assert torch.equal(model.aux.weight, original.aux.weight)
        assert not torch.equal(model.body.weight, original.body.weight)
    with raises(lx.StateError, "optimizer-lacks-parameters"):
        cascade.transition(optimizer)
    new = branches(cascade)["aux.weight"]
    optimizer.add_param_group({"params": [new.lora_A, new.lora_B]})
    randomize(cascade, seed=8)
    delta = {name: (b.lora_B @ b.lora_A).detach() * 4.0 for name, b in branches(cascade).items()}
    cascade.transition(optimizer)
    expected = original.aux.weight + 0.5 * delta["aux.weight"]
    torch.testing.assert_close(cascade.release().aux.weight.detach(), expected.detach(), rtol=0, atol=1e-14)


class Image(nn.Module):
    """Pools an image to a grid. The constants of the graph depend on the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.stem(x))
        hidden = F.interpolate(hidden, size=(x.shape[-2] // 2, x.shape[-1] // 2))
        return self.head(hidden.flatten(2).mean(2))


def test_another_image_size(captures: Any) -> None:
    """The first new size captures a graph, and at most one more size a dynamic graph. Further sizes capture none."""
    torch.manual_seed(43)
    model = Image().double()
    eager = copy.deepcopy(model)
    cascade = lx.adapt(model, batches(1, 2, 3, 16, 16))
    initial = captures()
    for size in ((16, 16), (24, 24), (16, 24), (20, 12), (32, 32), (16, 16), (40, 28)):
        x = batches(1, 3, 3, *size)[0]
        assert torch.equal(cascade(x), eager(x)), size
    assert captures() - initial <= 2


def test_no_more_graphs_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning says that graphs are dropped. No branch is dropped."""
    lower(monkeypatch, "number of variants", 4)
    model = choosy().eval()
    x = batches(1, 4, 5)[0]
    cascade = lx.adapt(model, (x,))
    randomize(cascade)
    expected = cascade(x)["logits"]
    for scale in (2.0, 3.0, 4.0):
        cascade(x, scale=scale)
    for scale in (5.0, 6.0):
        with warns("too-many-variants", "4"):
            cascade(x, scale=scale)
    with warns("too-many-variants", "4"):
        assert torch.equal(cascade(x)["logits"], expected)
