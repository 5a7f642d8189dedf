"""A cached graph serves another model in the same state, and no model in another state."""

from __future__ import annotations

import gc
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

import lorasc_fx as lx
from tests.kit.models import batches
from tests.kit.seams import SEAMS, lower

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0)
X = batches(3, 4, 5)
LONG = torch.cat(X)

LIMIT = 6
SETTINGS = SimpleNamespace(scale=1.0, limits=[6])
SCALES = {"long": 1.0}
LOCAL = threading.local()
LOCAL.scale = 1.0


def shrink(x: Tensor) -> Tensor:
    """Scale long inputs by global variables."""
    return x * SCALES["long"] * SETTINGS.scale if len(x) > LIMIT else x


class Net(nn.Module):
    """Computes something else on long inputs than on the example."""

    power = 1

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.body, self.act, self.head = nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 3)
        self.limit, self.limits, self.config = 6, [6], SimpleNamespace(limit=6)
        self.register_buffer("offset", torch.zeros(7))

    def forward(self, x: Tensor) -> Tensor:
        limit = max(self.limit, *self.limits, self.config.limit)
        y = self.act(self.body(x) + self.offset)
        if len(x) > limit:
            y = (2 * y) ** self.power
        return shrink(self.head(y)) * LOCAL.scale + (self.body.out_features - 7)


def other_forward(x: Tensor) -> Tensor:
    return x.relu()


def patch(owner: Any, name: str, value: Any) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    return lambda model, monkeypatch: monkeypatch.setattr(owner, name, value)


def doubled(self: nn.Module, x: Tensor) -> Tensor:
    return 2 * x.tanh() if len(x) > 6 else x.tanh()


Change = Callable[[nn.Module, pytest.MonkeyPatch], Any]

CHANGES: dict[str, Change] = {
    "a number": lambda model, _: setattr(model, "limit", 20),
    "a number of another type": lambda model, _: setattr(model, "limit", 6.0),
    "an entry of a list": lambda model, _: model.limits.append(20),
    "an object's attribute": lambda model, _: setattr(model.config, "limit", 20),
    "an attribute that was not there": lambda model, _: setattr(model, "more", 1),
    "an attribute of a layer": lambda model, _: setattr(model.body, "out_features", 8),
    "a buffer": lambda model, _: model.offset.fill_(1),
    "a tensor": lambda model, _: setattr(model, "held", torch.ones(1)),
    "a class": lambda model, _: setattr(model, "act", nn.ReLU()),
    "a layer twice": lambda model, _: setattr(model, "more", model.act),
    "a tie": lambda model, _: setattr(model.body, "weight", nn.Parameter(model.head.weight.data.repeat(3, 1)[:7, :5])),
    "shared memory": lambda model, _: model._buffers.update(offset=torch.zeros(14)[7:]),
    "no bias": lambda model, _: setattr(model.body, "bias", None),
    "a mode": lambda model, _: model.eval(),
    "a dtype": lambda model, _: model.float(),
    "a forward of its own": lambda model, _: setattr(model.act, "forward", other_forward),
    "a hook": lambda model, _: model.act.register_forward_hook(lambda module, args, output: output * 2),
    "a hook on inputs": lambda model, _: model.act.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "a method": patch(Net, "forward", lambda self, x: self.head(self.act(self.body(x)))),
    "a method of torch": patch(nn.Tanh, "forward", doubled),
    "a class's attribute": patch(Net, "power", 2),
    "a global variable": patch(sys.modules[__name__], "LIMIT", 20),
    "what a global object holds": patch(SETTINGS, "scale", 3.0),
    "what a global dict holds": lambda _, monkeypatch: monkeypatch.setitem(SCALES, "long", 3.0),
    "a global function": patch(sys.modules[__name__], "shrink", lambda x: x * 2 if len(x) > 6 else x),
    "the environment": lambda _, monkeypatch: monkeypatch.setenv("OF_NET", "1"),
}


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the exports. The graph cache is empty at the start."""
    monkeypatch.setattr(*SEAMS["kept graphs"], OrderedDict())
    count: list[int] = []
    before = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, **named: count.append(1) or before(*args, **named))
    return count


def net(seed: int, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options).double()


def assert_goes_as(model: nn.Module, cascade: lx.Cascade, x: Tensor) -> None:
    torch.testing.assert_close(cascade(x), model(x), rtol=0, atol=1e-12)


def test_another_model_of_the_same_state(exports: list[int]) -> None:
    first = lx.adapt(net(1), (X[0],), spec=SPEC)
    model = net(2)
    second = lx.adapt(model, (X[1],), spec=SPEC)
    assert len(exports) == 1
    assert second.frontend == "export"
    for x in (X[2], LONG):
        assert_goes_as(model, second, x)
        assert_goes_as(first.model, first, x)
    assert len(exports) == 2  # long inputs get another graph, which both models share
    optimizer = torch.optim.AdamW(second.param_groups(lr=1e-2))
    second(LONG).square().sum().backward()
    optimizer.step()
    assert not torch.equal(second(LONG), model(LONG))
    assert torch.equal(first(LONG), first.model(LONG))
    model.limit = 20  # the guards belong to the second model
    second.transition(optimizer)
    assert_goes_as(model, second, X[0])  # which is not longer than either limit
    assert len(exports) == 2
    assert_goes_as(model, second, LONG)
    assert len(exports) == 3
    first(LONG)
    assert len(exports) == 3


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_of_another_state(name: str, exports: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    lx.adapt(net(1), (X[0],), spec=SPEC)
    model = net(2)
    CHANGES[name](model, monkeypatch)
    x = X[0].to(model.head.weight.dtype)
    cascade = lx.adapt(model, (x,), spec=SPEC)
    long = LONG.to(x.dtype)
    for inputs in (x, long):  # some changes matter for a long input only
        torch.testing.assert_close(cascade(inputs), model(inputs))
    assert len(exports) > 1


def test_other_calls_and_specs(exports: list[int]) -> None:
    for x, options, new in (
        (X[0], {}, 1),
        (LONG, {}, 1),
        (X[0].clone().requires_grad_(), {}, 0),
        (X[0].t().contiguous().t(), {}, 1),
        (X[0], {"exclude": ("head",)}, 0),
    ):
        before = len(exports)
        lx.adapt(net(1), (x,), spec=lx.CascadeSpec(rank=2, **options))
        assert len(exports) == before + new
        lx.adapt(net(2), (x,), spec=lx.CascadeSpec(rank=3, **options))
        assert len(exports) == before + new
    with torch.autocast("cpu", torch.bfloat16):
        lx.adapt(net(1).float(), (X[0].float(),), spec=SPEC)
    lx.adapt(net(1).float(), (X[0].float(),), spec=SPEC)
    assert len(exports) == 5


def test_a_cached_graph_that_disagrees_is_captured_again(exports: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    lx.adapt(net(1), (X[0],), spec=SPEC)
    monkeypatch.setattr(LOCAL, "scale", 2.0)  # an object of the standard library, which is not guarded
    model = net(2)
    cascade = lx.adapt(model, (X[0],), spec=SPEC)
    assert len(exports) == 2
    assert cascade.refused_frontends == ()
    assert_goes_as(model, cascade, X[0])


def test_a_cached_graph_does_not_keep_its_model_alive(exports: list[int]) -> None:
    model = net(1)
    references = [ref(model), *map(ref, model.parameters()), *map(ref, model.buffers())]
    lx.adapt(model, (X[0],), spec=SPEC)
    del model
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
    lx.adapt(net(2), (X[0],), spec=SPEC)
    assert len(exports) == 1


def test_the_graph_cache_is_limited(exports: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    lower(monkeypatch, "graphs that are kept", 2)
    for seed, bias, count in ((1, True, 1), (2, False, 2), (3, True, 2), (4, False, 2)):
        lx.adapt(net(seed, bias=bias), (X[0],), spec=SPEC)
        assert len(exports) == count
    lx.adapt(net(5).eval(), (X[0].t().contiguous().t(),), spec=SPEC)
    lx.adapt(net(6), (X[0],), spec=SPEC)  # the oldest one was dropped
    assert len(exports) == 4
