"""A form that users register makes sites and computes correctly. It cannot replace a built-in form."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import lorasc_fx as lx
from examples import own_form, own_pass
from lorasc_fx.graph import FunctionForm, ModuleForm, branch_nodes, register_form
from lorasc_fx.graph.forms import REGISTERED
from lorasc_fx.passes import FoldBranches
from tests.compose.models import traced
from tests.kit.errors import raises
from tests.kit.models import merged, randomize
from tests.kit.state import weight_state
from tests.passes.cases import tracer
from tests.passes.kit import deltas, fill, insert, weights_of

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=1.0)


@pytest.fixture(scope="module", autouse=True)
def _own_op() -> None:
    """Define the op of the example again, because a test of the docs may have defined another one."""
    importlib.reload(own_form)


@torch.library.custom_op("my::skewed", mutates_args=())
def skewed(x: Tensor, kernel: Tensor) -> Tensor:
    """A product and one more term: `x W^T + sin x_0`."""
    return F.linear(x, kernel) + torch.sin(x[..., :1])


@skewed.register_fake
def _(x: Tensor, kernel: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], kernel.shape[0])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, kernel = ctx.saved_tensors
    along = grad @ kernel
    along[..., :1] += torch.cos(x[..., :1]) * grad.sum(-1, keepdim=True)
    return along, grad.flatten(0, -2).t() @ x.flatten(0, -2)


skewed.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

SKEWED = FunctionForm("my.skewed", "linear", (skewed,), ("x", "kernel"), 2, weight="kernel", x="x")


class Skewed(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(out, width) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return skewed(x, self.kernel)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(own_form.Fused(6, 8), Skewed(8, 5), nn.Linear(5, 3)).to(dtype)


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def formula(values: dict[str, Tensor], x: Tensor) -> Tensor:
    y = F.gelu(x @ values["0.weight"].t() + values["0.bias"])
    y = y @ values["1.kernel"].t() + torch.sin(y[..., :1])
    return y @ values["2.weight"].t() + values["2.bias"]


@pytest.fixture
def registered() -> Iterator[None]:
    with register_form(own_form.FORM), register_form(SKEWED):
        yield


def adapted(frontend: str = "auto") -> lx.Cascade:
    cascade = lx.adapt(net(), args=(X,), spec=SPEC, frontend=frontend)
    randomize(cascade)
    return cascade


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("frontend", ["export", "eager"])
def test_its_weight_is_a_site(frontend: str) -> None:
    cascade = adapted(frontend)
    assert {site.weight: site.form for site in cascade.sites} == {
        "0.weight": "my.linear_gelu",
        "1.kernel": "my.skewed",
        "2.weight": "",
    }
    assert cascade.refusals == ()
    if frontend != "eager":
        assert cascade.placements == {"0.weight": "weight", "1.kernel": "beside", "2.weight": "beside"}
    values = dict(net().named_parameters()) | merged(cascade, net())
    output = cascade(X)
    torch.testing.assert_close(output, formula(values, X), rtol=0, atol=1e-12)
    factors = dict(cascade.branches.named_parameters())
    got = torch.autograd.grad(output.square().sum(), list(factors.values()))
    expected = torch.autograd.grad(formula(values, X).square().sum(), list(factors.values()))
    assert all(gradient.abs().max() > 1e-3 for gradient in expected)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        released = cascade.release()
        torch.testing.assert_close(released(X), formula(values, X), rtol=0, atol=1e-12)


def test_without_it_the_weight_is_refused() -> None:
    for is_registered in (False, True, False):
        handle = register_form(SKEWED) if is_registered else None
        cascade = lx.adapt(net(), args=(X,), spec=SPEC)
        assert ("1.kernel" in {site.weight for site in cascade.sites}) is is_registered
        assert ("1.kernel" in {refusal.weight for refusal in cascade.refusals}) is not is_registered
        if handle is not None:
            handle.remove()
    assert not REGISTERED


def test_a_merged_branch_never_replaces_it() -> None:
    """The form does not say what `my.linear` computes besides the product."""
    with register_form(replace(SKEWED, name="my.linear")):
        cascade = lx.adapt(net(), args=(X,), spec=replace(SPEC, placement="merged"))
    assert cascade.placements["1.kernel"] == "beside"
    assert cascade.placements["2.weight"] == "merged"


def test_a_graph_whose_form_was_removed_is_refused() -> None:
    with register_form(SKEWED):
        inserted = insert(traced(net(), "aten", X), SPEC)
        name = next(node.name for node in inserted.graph.nodes if "skewed" in node.name)
    with raises(lx.passes.VerifyError, "graph-not-verified", name, "my.skewed"):
        FoldBranches()(inserted)


def test_a_checkpoint_says_which_form_it_needs(tmp_path: Path) -> None:
    with register_form(own_form.FORM), register_form(SKEWED):
        cascade = adapted()
        lx.save(cascade, tmp_path)
        expected = cascade(X)
    version = tmp_path / "version-00000001"
    with register_form(own_form.FORM), raises(lx.CheckpointError, "unknown-name", version, "1.kernel", SKEWED.name):
        lx.load(tmp_path, net(), args=(X,))
    with register_form(own_form.FORM), register_form(SKEWED):
        assert torch.equal(lx.load(tmp_path, net(), args=(X,))(X), expected)
    with (
        register_form(own_form.FORM),
        register_form(replace(SKEWED, name="my.skewd")),
        raises(lx.CheckpointError, "unknown-name", "my.skewed", "my.skewd"),
    ):
        lx.load(tmp_path, net(), args=(X,))


# fmt: off
INVALID = [
    (replace(SKEWED, name="aten.mm"), ("invalid-value", "aten.mm")),
    (replace(SKEWED, kind="lineer"), ("unknown-name", "kind", "my.skewed", "lineer")),
    (replace(own_form.FORM, kind="linears"), ("unknown-name", "my.linear_gelu", "linears", "linear")),
    (replace(SKEWED, weight="kernal"), ("unknown-name", "my.skewed", "kernal", "kernel")),
    (replace(SKEWED, parameters=("kernel", "x")), ("invalid-value", "parameters", "my.skewed", "kernel")),
    (FunctionForm("my.mm", "linear", (torch.ops.aten.mm.default,), ("self", "mat2"), 2, "mat2", "self"),
        ("invalid-value", "mm.default", "my.mm", "aten.mm")),
]
# fmt: on


def test_a_form_that_cannot_be_registered() -> None:
    for form, names in INVALID:
        with raises(lx.SpecError, *names):
            register_form(form)
    with register_form(SKEWED):
        for form in (SKEWED, replace(SKEWED, name="other")):
            with raises(lx.SpecError, "invalid-value", form.name, "my.skewed"):
                register_form(form)
    assert not REGISTERED


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.t() + self.bias


def test_a_form_of_a_module() -> None:
    torch.manual_seed(0)
    root, x = nn.Sequential(OwnLinear(4, 3)).double(), torch.randn(2, 4, dtype=torch.float64)
    graph_module = fx.GraphModule(root, tracer(("OwnLinear",)).trace(root))
    with pytest.raises(lx.passes.NoSites):
        insert(graph_module, SPEC)
    with register_form(ModuleForm("my.OwnLinear", "linear", OwnLinear)), torch.no_grad():
        inserted = fill(insert(graph_module, SPEC))
        weight = root[0].weight + deltas(inserted)["0.weight"]
        torch.testing.assert_close(inserted(x), F.linear(x, weight, root[0].bias), rtol=0, atol=1e-12)
        torch.testing.assert_close(FoldBranches()(inserted).graph_module(x), inserted(x), rtol=0, atol=1e-12)


class Halved(Skewed):
    """The input of the op is computed from the weight, so that its branch is added to the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return skewed(x, self.kernel / 2)


class Packet(Skewed):
    """Calls the op by its packet, as most programs do."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.my.skewed(x, self.kernel)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("layer", "frontend", "placement", "share"),
    [(Halved, "export", "weight", 0.5), (Packet, "export", "beside", 1.0), (Skewed, "eager", "beside", 1.0)],
)
def test_spellings(layer: type[Skewed], frontend: str, placement: str, share: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), layer(8, 5), nn.Linear(5, 3)).double()
    values = {name: value.detach().clone() for name, value in model.named_parameters()}
    cascade = lx.adapt(model, args=(X,), spec=SPEC, frontend=frontend)
    assert cascade.placements["1.kernel"] == placement
    randomize(cascade)
    values |= merged(cascade)
    with torch.no_grad():
        y = F.linear(X, values["0.weight"], values["0.bias"])
        y = F.linear(y, share * values["1.kernel"]) + torch.sin(y[..., :1])
        expected = F.linear(y, values["2.weight"], values["2.bias"])
        torch.testing.assert_close(cascade(X), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(cascade.release()(X), expected, rtol=0, atol=1e-12)


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["own_form", "own_pass"])
def test_contributing_shows_the_example(name: str) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    example = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert f"```python\n{example}```\n" in page


def test_own_pass_limits_every_branch_and_is_folded() -> None:
    torch.manual_seed(0)
    inserted, folded = own_pass.main()
    x = torch.ones(2, 6)
    with torch.no_grad():
        free = FoldBranches()(inserted).graph_module
        for weight, delta in deltas(inserted).items():
            before = weight_state(inserted, weight).base
            share = min(1.0, float(0.2 * before.norm() / delta.norm()))
            assert share < 0.9
            torch.testing.assert_close(weights_of(folded)[weight].detach(), before + share * delta)
        assert not branch_nodes(folded)
        assert (free(x) - folded(x)).abs().max() > 1e-2
