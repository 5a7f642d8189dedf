"""State that calls change, and changes between calls: arguments, modes, and Python state of every kind."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections import defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.check.guards import MAX_DEPTH, Guards
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

    handle: Any = None

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


CHANGES: dict[str, Callable[[Stateful], object]] = {  # {entries that guards report: change}
    "settings['tau']": lambda model: model.settings.update(tau=0.5),
    "steps, steps[0]": lambda model: model.steps.appendleft(3.0),
    "flags": lambda model: model.flags.add("twice"),
    "options.gain": lambda model: setattr(model.options, "gain", 1.5),
    "options.nested['bias'][0]": lambda model: model.options.nested["bias"].__setitem__(0, 0.25),
    "space.k": lambda model: setattr(model.space, "k", (2.0, "x")),
    "also['more']": lambda model: model.also.update(more=4.0),
    "act": lambda model: setattr(model, "act", torch.relu),
    "kind": lambda model: setattr(model, "kind", torch.float32),
    "table[0]": lambda model: model.table.__setitem__(0, 7.0),
    "mask": lambda model: setattr(model, "mask", torch.tensor([1.0, 0.0, 2.0])),
    "mask in place": lambda model: model.mask.mul_(3.0),
    "offset": lambda model: setattr(model, "offset", Larger()),
    "offset.forward": lambda model: setattr(model.offset, "forward", lambda x: x - 3),
    "offset._forward_hooks[1]": lambda model: model.offset.register_forward_hook(lambda _, args, output: 2 * output),
    "offset._forward_pre_hooks[1]": lambda model: model.offset.register_forward_pre_hook(
        lambda _, args: (args[0] + 1,)
    ),
}
MORE: dict[str, Callable[[Stateful], object]] = {
    "settings['nu'], settings['tau']": lambda model: model.settings.update(nu=model.settings.pop("tau")),
    "table, table[0]": lambda model: model.table.pop(),
    "layer.bias": lambda model: setattr(model.layer, "bias", nn.Parameter(torch.zeros(3))),
    "layer._forward_hooks[1]": lambda model: model.layer.register_forward_hook(scaled(2.0)),
    "": lambda model: model.layer._forward_hooks.update({0: scaled(2.0)}),
}


@pytest.mark.parametrize("entries", CHANGES | MORE)
def test_guards_report_each_change(entries: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that dynamo traces sees neither elements of sets nor writes into tensors."""
    monkeypatch.setattr("torch.utils.hooks.RemovableHandle.next_id", 0)
    model = Stateful()
    model.layer.bias = None
    model.layer.register_forward_hook(scaled(1.0))
    in_place, guards = entries.endswith("in place"), Guards(model)
    without = Guards(model, [("settings", "tau")], [model.mask])
    assert (guards.hold(), guards.hold_traced(), guards.changes(), guards.written()) == (True, True, [], [])
    (CHANGES | MORE)[entries](model)
    assert (guards.hold(), guards.hold_traced()) == (False, in_place or entries == "flags")
    changes = guards.changes()
    assert [change.entry for change in changes] == entries.removesuffix(" in place").split(", ") * bool(entries)
    assert [change.is_new for change in changes] == [not in_place] * len(changes)
    assert list(map(id, guards.written())) == [id(model.mask)] * in_place
    assert without.hold() == (entries in ("settings['tau']", "mask", "mask in place"))
    assert guards.renewed(model).hold()


def scaled(scale: float) -> Callable[..., Any]:
    return lambda _module, _args, output: output * scale


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else [float("1.5")]


EQUIVALENT: list[Callable[[], object]] = [
    lambda: float("nan"),
    lambda: (complex("1j"), [slice(1, 2), deque([float("2.5")])]),
    lambda: {"a": Options(), "b": {1, 2}},
    lambda: functools.partial(scaled(float("2.5")), [1], b="2"),
    lambda: scaled(float("2.5")),
    lambda: nested(MAX_DEPTH - 2),
]
OTHER: list[tuple[object, object]] = [
    *((1, 1.0), (float("nan"), 1.0), ((1, [2]), (1, [3])), ([1], [1, 1]), ({"a": 1}, {"a": 2}), ({"a": 1}, {"b": 1})),
    *((Options(), Options(2.0)), (scaled(1.0), scaled(2.0)), (random.Random(0), random.Random(0))),
    (functools.partial(scaled(1.0), 1), functools.partial(scaled(1.0), 2)),
    *((nested(MAX_DEPTH - 1), nested(MAX_DEPTH - 1)), (lambda x: x, lambda x: x)),
    *((torch.ones(2), torch.ones(1, 2)), (torch.ones(2), torch.ones(2).double())),
]


def test_guards_compare_objects_that_are_replaced() -> None:
    """A graph holds tensors as constants, so an equal tensor is a change, but not a new value."""
    model = Stateful()

    def changed(before: object, value: object) -> list[bool]:
        vars(model)["act"] = before
        guards = Guards(model)
        vars(model)["act"] = value
        changes = guards.changes()
        assert guards.hold() == (not changes)
        assert {change.entry for change in changes} <= {"act"}
        return [change.is_new for change in changes]

    assert [changed(make(), make()) for make in EQUIVALENT] == [[]] * len(EQUIVALENT)
    assert [changed(*pair) for pair in OTHER] == [[True]] * len(OTHER)
    assert changed([torch.ones(2)], [torch.ones(2)]) == [False]
    model.handle = model.layer.register_forward_hook(hook := scaled(2.0))
    guards = Guards(model)
    model.handle.remove()
    model.handle = model.layer.register_forward_hook(hook)  # another number and handle
    assert guards.hold()


USUAL = ("settings['tau']", "options.gain", "mask", "offset._forward_hooks[1]")


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
