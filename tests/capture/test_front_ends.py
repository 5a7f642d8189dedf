"""Front ends: signatures, TorchScript, caches as arguments, torch.compile of a cascade, and memory errors."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorasc_fx as lx
from lorasc_fx.plan import Reason
from tests.kit.models import batches, branches, build, loss_of, merged, randomize, seeded

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0)


class Net(nn.Module):
    """Every front end can capture it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(5, 7), nn.Dropout(0.3), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0, *, shift: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.drop(torch.tanh(self.body(x))) * scale
        return self.head(hidden if shift is None else hidden + shift)


@pytest.mark.parametrize("name", ["export", "eager"])
def test_the_cascade_has_the_signature_of_the_model(name: str) -> None:
    model = build(Net)
    cascade = lx.adapt(model, batches(1, 4, 5), frontend=name)
    assert inspect.signature(cascade.forward) == inspect.signature(model.forward)
    assert inspect.signature(copy.deepcopy(cascade).forward) == inspect.signature(model.forward)
    assert isinstance(cascade, lx.Cascade)


COMPILERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "script": torch.jit.script,
    "trace": lambda module: torch.jit.trace(module, torch.ones(2, 7, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", ["auto", "eager"])
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_weights_inside_torchscript_are_refused(compiler: str, name: str) -> None:
    model = build(Net)
    model.drop = COMPILERS[compiler](nn.Sequential(nn.Linear(7, 7), nn.ReLU()).double())
    x = batches(1, 4, 5)[0]
    cascade = lx.adapt(model, (x,), spec=SPEC, frontend=name)
    assert [site.weight for site in cascade.sites] == ["body.weight", "head.weight"]
    assert cascade.unreached == ()
    (refusal,) = cascade.refusals
    assert (refusal.weight, refusal.reason) == ("drop.0.weight", Reason.OPAQUE)
    assert "TorchScript module drop;" in refusal.sentence
    randomize(cascade)
    body, head = merged(cascade).values()
    hidden = model.drop(torch.tanh(F.linear(x, body, model.body.bias)))
    expected = F.linear(hidden, head, model.head.bias)
    torch.testing.assert_close(seeded(cascade, x), expected, rtol=0, atol=1e-12)
    loss_of(seeded(cascade, x)).backward()
    assert all(branch.lora_B.grad.any() for branch in branches(cascade).values())


class Padded(nn.Module):
    """Pads by an amount that Python computes from the size, like the padding `SAME` of TensorFlow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        more = (-x.shape[-1]) % 4
        return self.conv(nn.functional.pad(x, (0, more, 0, more)))


def test_a_compiled_cascade_never_runs_a_graph_of_another_size() -> None:
    """The first graph has constant sizes. For another size, the compiled call raises."""
    torch.manual_seed(0)
    model, example, larger = Padded().double(), torch.randn(2, 3, 8, 8).double(), torch.randn(3, 3, 9, 9).double()
    cascade = lx.adapt(model, (example,), spec=SPEC)
    compiled = torch.compile(cascade, backend="eager", fullgraph=True)
    assert torch.equal(compiled(example), model(example))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="This call has no graph yet") as caught:
        compiled(larger)
    message, debug, _ = str(caught.value).partition("Developer debug context")
    assert debug
    assert "First call the cascade once without torch.compile, in the same mode" in message
    assert torch.equal(cascade(larger), model(larger))  # captured here, with sizes that may vary
    torch._dynamo.reset()
    again = torch.compile(cascade, backend="eager", fullgraph=True)
    for x in (larger, example, larger[:1].expand(5, -1, -1, -1)):
        assert torch.equal(again(x), model(x))


def test_a_compiled_cascade_works_in_another_mode() -> None:
    """Without fullgraph, the first call in eval mode is captured outside of the compiled code."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3)).double(), torch.randn(4, 5).double()
    cascade = lx.adapt(model, (x,), spec=SPEC)
    compiled = torch.compile(cascade, backend="eager")
    compiled(x)
    cascade.eval()
    assert torch.equal(compiled(x), cascade(x))
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_out_of_memory_does_not_try_the_next_front_end(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*args: Any, **kwargs: Any) -> Any:
        raise error("no more")

    monkeypatch.setattr(torch.export, "export", export)
    with pytest.raises(error, match="no more"):
        lx.adapt(nn.Sequential(nn.Linear(2, 3)), (torch.randn(4, 2),), spec=lx.CascadeSpec(("linear",)))
