"""DoRA in passes, parameter groups, casts and compilers, and the cases that it does not support."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

import lorasc_fx as lx
from tests.kit.errors import raises
from tests.kit.models import SCALE, Breaking, batches, branches, mlp, randomize, train
from tests.peft.dora_kit import PLAIN, adapted, norms, weights


def test_passes_without_a_cascade() -> None:
    from lorasc_fx.passes import FoldBranches, InsertBranches, MatchSites, Pipeline, StageTransition

    model, (x,) = mlp(), batches(1, 4, 5)
    base, before = weights(model), model(x)
    pipeline = Pipeline([MatchSites(lx.CascadeSpec(**{**PLAIN, "pace": 0.5})), InsertBranches()])
    inserted = pipeline(torch.fx.symbolic_trace(model)).graph_module
    torch.testing.assert_close(inserted(x), before, rtol=0, atol=1e-14)
    assert torch.equal(FoldBranches()(inserted).graph_module.get_parameter("0.weight"), base["0.weight"])
    branch = inserted.branches.get_submodule("0/weight")
    with torch.no_grad():
        branch.lora_B.fill_(0.3)
        branch.lora_magnitude_vector.mul_(1.5)
    moved = base["0.weight"] + SCALE * branch.lora_B.detach() @ branch.lora_A.detach()
    fast = branch.lora_magnitude_vector.detach()[:, None] / norms(moved) * moved
    slow = (base["0.weight"] + fast) / 2
    folded = FoldBranches()(inserted).graph_module
    torch.testing.assert_close(folded.get_parameter("0.weight"), slow, rtol=0, atol=1e-14)
    assert [node.name for node in folded.graph.nodes] == [
        node.name for node in torch.fx.symbolic_trace(mlp()).graph.nodes
    ]
    after = StageTransition()(inserted).graph_module
    torch.testing.assert_close(after(x), folded(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(branch.lora_magnitude_vector, norms(slow).flatten(), rtol=0, atol=1e-14)


def test_parameter_groups() -> None:
    cascade = adapted(mlp(), batches(1, 4, 5)[0])
    groups = {group["name"]: group["params"] for group in cascade.param_groups(lr=0.1)}
    assert list(groups) == ["lora_A", "lora_B", "lora_magnitude_vector"]
    assert [tuple(each.shape) for each in groups["lora_magnitude_vector"]] == [(7,), (6,), (2,)]
    assert sum(site.parameters for site in cascade.sites) == sum(
        each.numel() for own in groups.values() for each in own
    )


def test_weights_without_a_place_for_magnitudes() -> None:
    """The error names them before anything is changed."""
    model = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 3)).double()
    held = weights(model)
    ids = torch.tensor([[1, 2, 3]])
    with raises(lx.SpecError, "method-not-supported", "dora", "0.weight", "embedding"):
        lx.adapt(model, (ids,), spec=lx.CascadeSpec(adapter="dora"))
    assert all(torch.equal(value, held[name]) for name, value in weights(model).items())
    assert all(value.requires_grad for value in model.parameters())
    assert len(lx.adapt(model, (ids,), spec=lx.CascadeSpec(adapter="dora", exclude=("0.weight",))).sites) == 1


def test_sums_are_refused() -> None:
    x = batches(1, 4, 5)[0]
    cascade = adapted(mlp(), x)
    randomize(cascade)
    with raises(lx.SpecError, "method-not-supported", "1"):
        lx.merge([cascade], mlp(), (x,))


class TwoWays(nn.Module):
    """A model that uses its weight in eval mode in a way that magnitudes do not support."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) if self.training else x @ torch.tanh(self.lin.weight).t()


def test_a_later_use_without_a_place_for_magnitudes() -> None:
    x = batches(1, 4, 5)[0]
    cascade = adapted(TwoWays().double(), x)
    held = cascade(x).detach()
    cascade.eval()
    with raises(lx.PassError, "method-not-supported", "lin.weight"):
        cascade(x)
    cascade.train()
    assert torch.equal(cascade(x), held)


def test_graph_breaks_are_refused() -> None:
    model, x = Breaking().double(), batches(1, 4, 5)[0]
    with raises(lx.SpecError, "method-not-supported", "dora", "Breaking", "linear.weight"):
        adapted(model, x, "graph-breaks")
    assert all(value.requires_grad for value in model.parameters())


def test_a_branch_beside_its_op_is_an_error() -> None:
    branch = branches(adapted(mlp(), batches(1, 4, 5)[0]))["0.weight"]
    for at, given in {"on_weight": (torch.zeros(7, 5),), "beside": (torch.zeros(4, 7), torch.zeros(4, 5))}.items():
        with raises(lx.StateError, "method-not-supported", "0.weight", at):
            branch(*given, at=at)


def test_a_row_scaled_to_zero_cannot_be_exported(tmp_path: Path) -> None:
    cascade = adapted(mlp(), batches(1, 4, 5)[0])
    randomize(cascade)
    with torch.no_grad():
        branches(cascade)["2.weight"].lora_magnitude_vector[1] = 0
    with raises(lx.export.ExportError, "not-exportable", "2.weight", "0"):
        lx.export.peft(cascade, tmp_path / "adapter")


def test_casts_and_copies() -> None:
    """A cast keeps an untrained running stage untrained. A copy trains independently."""
    x = batches(1, 4, 5)[0]
    cascade = adapted(mlp(), x)
    base = {name: value.float() for name, value in weights(mlp()).items()}
    cascade.float()
    assert all(torch.equal(value, base[name]) for name, value in weights(copy.deepcopy(cascade).release()).items())
    twin = copy.deepcopy(cascade)
    train(twin, torch.optim.SGD(twin.param_groups(lr=0.1)), [x.float()])
    assert all(torch.equal(value, base[name]) for name, value in weights(cascade.release()).items())
    assert not any(torch.equal(value, base[name]) for name, value in weights(twin.release()).items())
