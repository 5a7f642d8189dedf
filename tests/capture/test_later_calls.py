"""State that calls change, and changes between calls: arguments, modes, and Python state of every kind."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.errors import raises
from tests.kit.models import loss_of
from tests.kit.state import variant_count

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0)
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Remembers(nn.Module):
    """Writes its result into a container that the caller passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rate = nn.Linear(5, 3), 2.0

    def forward(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        state["last"] = self.layer(x) * self.rate
        return state["last"]


def test_what_forward_writes_into_an_argument_is_written() -> None:
    x, state = torch.randn(4, 5), dict[str, torch.Tensor]()
    cascade = lx.adapt(Remembers(), (x, {}))
    assert cascade.frontend == "eager"
    computed = cascade(x, state)
    assert torch.equal(state["last"], computed)
    with raises(lx.CaptureError, "not-captured", "an argument after the call"):
        lx.adapt(Remembers(), (x, {}), frontend="export")


@dataclasses.dataclass
class Options:
    gain: float = 1.0
    nested: dict[str, list[float]] = dataclasses.field(default_factory=lambda: {"bias": [0.0]})


class Offset(nn.Module):
    amount = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.amount


class Larger(Offset):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Stateful(nn.Module):
    """Reads Python state of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.offset = nn.Linear(5, 3), Offset()
        self.mask, self.table = torch.ones(3), [1.0]
        self.settings, self.steps, self.flags = {"tau": 1.0}, deque([1.0]), {"plain"}
        self.options, self.space = Options(), SimpleNamespace(k=(1.0, "x"))
        self.act, self.kind, self.also = torch.tanh, torch.float64, defaultdict(lambda: 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.offset(self.act(self.layer(x))) * self.mask / self.settings["tau"] * self.steps[0]
        y = y * (2 if "twice" in self.flags else 1) * self.options.gain + self.options.nested["bias"][0]
        y = y * self.space.k[0] * float(self.table[0]) * self.also.get("more", 1.0)
        return y.to(self.kind)


def _tensor_attribute(model: Stateful) -> None:
    model.mask = torch.tensor([1.0, 0.0, 2.0])


def _exchanged_module(model: Stateful) -> None:
    model.offset = Larger()


def _patched_forward(model: Stateful) -> None:
    model.offset.forward = lambda x: x - 3


CHANGES: dict[str, Callable[[Stateful], object]] = {
    "dict": lambda model: model.settings.update(tau=0.5),
    "deque": lambda model: model.steps.appendleft(3.0),
    "set": lambda model: model.flags.add("twice"),
    "dataclass": lambda model: setattr(model.options, "gain", 1.5),
    "nested": lambda model: model.options.nested["bias"].__setitem__(0, 0.25),
    "namespace": lambda model: setattr(model.space, "k", (2.0, "x")),
    "defaultdict": lambda model: model.also.update(more=4.0),
    "function": lambda model: setattr(model, "act", torch.relu),
    "dtype": lambda model: setattr(model, "kind", torch.float32),
    "list": lambda model: model.table.__setitem__(0, 7.0),
    "tensor": _tensor_attribute,
    "tensor_in_place": lambda model: model.mask.mul_(3.0),
    "module": _exchanged_module,
    "forward": _patched_forward,
    "hook": lambda model: model.offset.register_forward_hook(lambda _, args, output: 2 * output),
    "pre_hook": lambda model: model.offset.register_forward_pre_hook(lambda _, args: (args[0] + 1,)),
}


USUAL = ("dict", "dataclass", "tensor", "hook")


@pytest.mark.parametrize(
    ("frontend", "names"),
    [
        ("export", USUAL),
        ("eager", USUAL),
        *(pytest.param(name, tuple(CHANGES), marks=pytest.mark.slow) for name in ("export", "eager")),
    ],
)
def test_changes_of_state_by_the_user_are_noticed(frontend: str, names: tuple[str, ...]) -> None:
    """After a change, the next call agrees with the eager model. After the change is undone, no graph is captured."""
    model, x = Stateful().double(), torch.randn(4, 5, dtype=torch.float64)
    cascade = lx.adapt(model, (x,), spec=SPEC, frontend=frontend)
    for name in names:
        CHANGES[name](model)
        expected = model(x)
        assert torch.allclose(cascade(x), expected, atol=1e-12), name
        assert cascade(x).dtype == expected.dtype, name
    if frontend != "eager":
        count = variant_count(cascade)
        model.settings, model.steps, model.options = copy.deepcopy((model.settings, model.steps, model.options))
        assert torch.allclose(cascade(x), model(x), atol=1e-12)
        assert variant_count(cascade) == count  # equal values, other objects
        model.options.gain = 8.0
        assert torch.allclose(cascade(x), model(x), atol=1e-12)
        count = variant_count(cascade)
        model.settings["tau"] = 0.25
        assert torch.allclose(cascade(x), model(x), atol=1e-12)
        model.settings["tau"] = 1.0 / 2
        assert torch.allclose(cascade(x), model(x), atol=1e-12)
        assert variant_count(cascade) == count + 1


class Shows(nn.Module):
    """Stores its last result in an attribute and in a list, for others to read."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.results, self.last = nn.Linear(5, 3), [None], None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        self.last = y.detach()
        self.results[0] = self.last
        return y


def test_a_hook_that_is_registered_again_costs_no_graph() -> None:
    """Torch gives the hook a new number and a new handle. Another hook function is a change of state."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    x = torch.randn(6, 5)

    def double(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 2

    model.handle = model[0].register_forward_hook(double)  # type: ignore[assignment]
    cascade = lx.adapt(model, (x,))
    doubled = cascade(x)
    for _ in range(3):
        model.handle.remove()  # type: ignore[operator]
        model.handle = model[0].register_forward_hook(double)  # type: ignore[assignment]
        assert torch.equal(cascade(x), doubled)
    assert variant_count(cascade) == 1
    model.handle.remove()  # type: ignore[operator]
    model[0].register_forward_hook(lambda _module, _args, output: output * 3)
    assert not torch.equal(cascade(x), doubled)
    assert variant_count(cascade) == 2


def test_what_forward_sets_before_it_reads_it_costs_no_graph() -> None:
    model, x = Shows(), torch.randn(4, 5)
    cascade = lx.adapt(model, (x,), frontend="export")
    for _ in range(3):
        with cascade.weights("slow"):
            cascade(torch.randn(4, 5))
        cascade(x)
    assert variant_count(cascade) == 1


def test_inference_tensors_are_refused_as_weights_and_not_created() -> None:
    x = torch.randn(4, 5)
    with torch.inference_mode():
        fixed = nn.Linear(5, 3)
    with pytest.raises(RuntimeError, match="inference tensor"):
        lx.adapt(fixed, (x,))
    model = nn.Linear(5, 3)
    with torch.inference_mode():
        cascade = lx.adapt(model, (x,))
    loss_of(cascade(x)).backward()  # adapt has created no inference tensors
