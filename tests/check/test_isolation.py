"""`adapt` runs the model without side effects: it restores objects, values, attributes and random generators."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lorasc_fx as lx
from lorasc_fx.check.isolation import isolation
from tests.kit.errors import raises
from tests.kit.models import build, seeded

aten = torch.ops.aten
SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0)
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Busy(nn.Module):
    """Writes into buffers, attributes and an embedding with max_norm. Draws from three random generators."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 5, _weight=torch.randn(9, 5) * 3, max_norm=1.0)
        self.norm, self.drop, self.head = nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(7, 3)
        self.fast, self.slow = nn.Linear(5, 7), nn.Linear(5, 7)
        self.calls, self.seen, self.last, self.total = 0, {"sum": 0.0}, [None], torch.zeros(1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen["sum"] += random.random() + float(np.random.rand())
        self.last.append(self.calls)
        self.total.add_(1)
        x = self.norm(self.table(ids))
        return self.mix(x) * (1.0 + self.seen["sum"])

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.tanh(self.fast(x))))


class Follows(Busy):
    """A second encoder is updated in place as the moving average of the first. No state in Python."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        for slow, fast in zip(self.slow.parameters(), self.fast.parameters(), strict=True):
            self.follow(slow, fast)
        x = self.norm(self.table(ids))
        return self.mix(x) + self.head(torch.tanh(self.slow(x)).detach())

    def follow(self, slow: nn.Parameter, fast: nn.Parameter) -> None:
        slow.data.mul_(0.9).add_(fast.data, alpha=0.1)


class Replaces(Follows):
    """Like `Follows`, but assigns new tensors."""

    def follow(self, slow: nn.Parameter, fast: nn.Parameter) -> None:
        slow.data = slow.data * 0.9 + fast.data * 0.1


def everything(model: Busy) -> dict[str, Any]:
    """Return objects, memory and values of parameters and buffers, attributes, and states of the random generators."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    state = {name: (id(value), value.data_ptr(), value.tolist()) for name, value in tensors}
    kept = model.seen, model.last, model.total
    state["attributes"] = (model.calls, [id(value) for value in kept], copy.deepcopy(kept))
    watched = {"_compiled_call_impl"}  # the cascade watches calls of the model, until the release
    state["names"] = {name: sorted(vars(module).keys() - watched) for name, module in model.named_modules()}
    state["torch"], state["random"] = torch.get_rng_state().tolist(), random.getstate()
    state["numpy"] = str(np.random.get_state())
    return state


@pytest.mark.parametrize("make", [Busy, Follows, Replaces])
@pytest.mark.parametrize("frontend", ["auto", "export", "eager"])
def test_adapt_has_no_side_effects(make: type[Busy], frontend: str) -> None:
    """The model may be adapted or refused. Later calls compute the same as calls of a model that was never adapted."""
    model, twin, ids = build(make), build(make), torch.tensor([1, 4, 8, 2, 2, 3])
    before = everything(model)
    try:
        cascade = lx.adapt(model, (ids,), spec=SPEC, frontend=frontend)
    except lx.CaptureError:
        assert frontend == "export"
        assert everything(model) == before
        return
    assert everything(model) == before
    reasons = {refusal.weight: refusal.reason for refusal in cascade.refusals}
    assert reasons["table.weight"] == lx.plan.Reason.MUTATED
    assert ("slow.weight" in reasons) == (make is not Busy)
    assert {site.weight for site in cascade.sites} == {"fast.weight", "head.weight"}
    for _ in range(3):
        torch.testing.assert_close(seeded(cascade, ids), seeded(twin, ids), rtol=0, atol=1e-12)
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=0, atol=1e-12)
    assert (model.calls, model.seen, model.last, model.total) == (twin.calls, twin.seen, twin.last, twin.total)


def _by_out(weight: Tensor) -> None:
    torch.mul(weight, 0.9, out=weight)


@torch.compile(fullgraph=True, backend="eager")
def _compiled(weight: Tensor) -> None:
    weight.mul_(0.9)


WAYS: dict[str, Callable[[Tensor], object]] = {
    "in-place": lambda weight: weight.mul_(0.9),
    "view": lambda weight: weight.t()[1:2].mul_(0.9),
    "out": _by_out,
    "foreach": lambda weight: torch._foreach_mul_([weight[0], weight[1]], 0.9),
    "compiled": _compiled,
}


class Writes(nn.Module):
    """Writes into its own weight in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.head = way, nn.Linear(7, 3)
        flat = torch.randn(2 * 35)
        self.written, self.kept = (nn.Linear(5, 7, bias=False) for _ in range(2))
        self.written.weight.data, self.kept.weight.data = flat.view(2, 7, 5)  # one storage, as of an RNN's weights

    def forward(self, x: Tensor) -> Tensor:
        WAYS[self.way](self.written.weight.detach())
        return self.head(self.written(x) + self.kept(x))


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_forward_writes_is_refused(way: str) -> None:
    torch.manual_seed(0)
    model, x = Writes(way), torch.randn(4, 5)
    before = {name: (value, value.data_ptr(), value.tolist()) for name, value in model.named_parameters()}
    cascade = lx.adapt(model, (x,), spec=SPEC)
    assert {name: (value, value.data_ptr(), value.tolist()) for name, value in model.named_parameters()} == before
    assert [(refusal.weight, refusal.reason) for refusal in cascade.refusals] == [
        ("written.weight", lx.plan.Reason.MUTATED)
    ]
    assert {site.weight for site in cascade.sites} == {"kept.weight", "head.weight"}


def test_a_first_run_that_raises_does_not_count() -> None:
    """Such a run does not tell which parameters forward writes, so the next run copies again."""
    torch.manual_seed(0)
    model = Writes("in-place")
    before = {name: value.tolist() for name, value in model.named_parameters()}
    with raises(lx.CaptureError, "model-refuses-inputs"):
        lx.adapt(model, (torch.randn(4, 6),), spec=SPEC)
    cascade = lx.adapt(model, (torch.randn(4, 5),), spec=SPEC)
    assert {name: value.tolist() for name, value in model.named_parameters()} == before
    assert [refusal.weight for refusal in cascade.refusals] == ["written.weight"]


class Cache(nn.Module):
    """Writes keys with an autograd history into a cache, which it stores in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.head = how, nn.Linear(5, 3), nn.Linear(3, 2)
        cache = torch.zeros(2, 4, 3)[1] if "view" in how else torch.zeros(4, 3)
        if "buffer" in how:
            self.register_buffer("cache", cache)
        else:
            self.cache = {"parameter": nn.Parameter(cache, False), "list": [cache], "dict": {0: cache}}.get(how, cache)

    @property
    def held(self) -> Tensor:
        cache = self.cache[0] if self.how in ("list", "dict") else self.cache
        assert isinstance(cache, Tensor)
        return cache

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        self.held[places] = self.a(x)
        return self.head(self.held.clone())


CACHES = ("buffer", "buffer, a view", "attribute", "parameter", "list", "dict")


@pytest.mark.parametrize("how", CACHES)
def test_a_cache_gets_no_history_of_an_isolated_run(how: str) -> None:
    model, x, places = Cache(how), torch.randn(2, 5), torch.tensor([0, 1])
    before = model.held
    with isolation(model, (x, places), {}) as (args, kwargs):
        model(*args, **kwargs).sum().backward()
    assert model.held is before
    assert (before.grad_fn, before.requires_grad, before.count_nonzero().item()) == (None, False, 0)


@pytest.mark.parametrize("how", CACHES[:2])
def test_the_history_of_a_buffer_stays(how: str) -> None:
    """The backward of an earlier call has not run yet."""
    model, x, places = Cache(how), torch.randn(2, 5), torch.tensor([0, 1])
    output = model(x, places)
    before, history, value = model.cache, model.cache.grad_fn, model.cache.detach().clone()
    with isolation(model, (x + 1, places), {}) as (args, kwargs):
        model(*args, **kwargs).sum().backward()
    assert model.cache is before
    assert model.cache.grad_fn is history
    assert torch.equal(model.cache, value)
    model.zero_grad()
    output.sum().backward()
    torch.testing.assert_close(model.a.weight.grad, model.head.weight.sum(0)[:, None] * x.sum(0))
