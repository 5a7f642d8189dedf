"""State that calls leave behind, and what a later call changes: arguments, settings, modes, containers."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.unit.cases import branches, loss_of

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Remembers(nn.Module):
    """Writes what it computed into a container that its caller holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rate = nn.Linear(5, 3), 2.0

    def forward(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        state["last"] = self.layer(x) * self.rate
        return state["last"]


def test_what_forward_writes_into_an_argument_is_written() -> None:
    x, state = torch.randn(4, 5), dict[str, torch.Tensor]()
    cascade = lx.adapt(Remembers(), (x, {}))
    assert cascade.frontend == "pieces"
    found = cascade(x, state)
    assert torch.equal(state["last"], found)
    with pytest.raises(lx.CaptureError, match="an argument after the call"):
        lx.adapt(Remembers(), (x, {}), frontend="export")


def test_a_setting_that_the_user_changes_is_another_graph() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    x = torch.randn(6, 5)
    cascade = lx.adapt(model, (x,))
    torch.manual_seed(0)
    first = cascade(x)
    model[1].p = 0.0
    assert torch.equal(cascade(x), cascade(x))
    model[1].p = 0.5
    torch.manual_seed(0)
    assert torch.equal(cascade(x), first)
    handle = model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[1].p = 0.0
    assert torch.equal(cascade(x), model(x))
    handle.remove()
    assert torch.equal(cascade(x), model(x))


def test_weights_that_nothing_can_train_are_told(tmp_path: Path) -> None:
    x = torch.randn(4, 5)
    lx.save(lx.adapt(nn.Linear(5, 3), (x,)), tmp_path)
    with pytest.raises(lx.CaptureError, match="weight is on the meta device, without numbers: give the model its weig"):
        lx.load(tmp_path, nn.Linear(5, 3, device="meta"), (x,))
    with torch.inference_mode():
        fixed = nn.Linear(5, 3)
    with pytest.raises(lx.CaptureError, match=r"weight was made in torch\.inference_mode"):
        lx.adapt(fixed, (x,))
    model = nn.Linear(5, 3)
    with torch.inference_mode():
        cascade = lx.adapt(model, (x,))
    loss_of(cascade(x)).backward()  # what adapt made is no inference tensor


class Estimated(nn.Module):
    """In train mode, a round whose gradient is passed straight through; in both, Python that no whole graph holds."""

    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = 3 * self.body(x) if x.sum() > -1e9 else x
        return self.head(self.Straight.apply(hidden) if self.training else hidden)


def test_a_function_that_a_later_mode_brings_keeps_its_backward() -> None:
    model, x = Estimated().double().eval(), torch.randn(6, 5, dtype=torch.float64)
    cascade = lx.adapt(model, (x,), spec=SPEC)
    assert cascade.frontend == "pieces"
    cascade.train()
    cascade(x).sum().backward()
    twin = Estimated().double().train()
    twin.load_state_dict(model.state_dict())
    twin(x).sum().backward()
    branch = branches(cascade)["body.weight"]
    expected = branch.scale * twin.body.weight.grad @ branch.lora_A.detach().T
    assert expected.any()
    torch.testing.assert_close(branch.lora_B.grad, expected, rtol=0, atol=1e-12)


def test_few_bits_are_no_excuse() -> None:
    """In bfloat16 as in fp64 a graph that leaves a hook out is refused."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).bfloat16()
    model.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(lx.CaptureError, match="its graph does something else"):
        lx.adapt(model, (torch.randn(4, 5, dtype=torch.bfloat16),), frontend="symbolic")


@pytest.mark.parametrize("kind", [deque, Counter, lambda: defaultdict(int)], ids=["deque", "counter", "defaultdict"])
def test_whatever_container_holds_the_state(kind: Any) -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = nn.Linear(5, 3), kind()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if isinstance(self.seen, deque):
                self.seen.append(1)
            else:
                self.seen["calls"] += 1
            return self.layer(x)

    model = Keeps()
    with pytest.raises(lx.CaptureError, match="sets its attribute seen at each call"):
        lx.adapt(model, (torch.randn(4, 5),), frontend="export")
    assert not model.seen


class Installs(nn.Module):
    """Hooks itself up at its first call, as transformers does to collect outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.ready = nn.Linear(5, 3), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.ready:
            self.layer.register_forward_hook(lambda module, args, output: output * 2)
            self.ready = True
        return self.layer(x)


@pytest.mark.parametrize("frontend", ["export", "pieces"])
def test_hooks_that_a_first_call_installs_are_there_once(frontend: str) -> None:
    model, x = Installs(), torch.randn(4, 5)
    expected = 2 * model.layer(x)
    cascade = lx.adapt(model, (x,), frontend=frontend)
    assert not model.layer._forward_hooks
    assert not model.ready
    assert torch.equal(cascade(x), expected)
    assert torch.equal(model(x), expected)
    assert torch.equal(cascade(x), expected)
