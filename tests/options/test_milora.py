"""A start that was added by CONTRIBUTING's recipe alone, MiLoRA (2406.09044): held against `torch.linalg.svd` in fp64.

B_0 and A_0 are the r smallest singular triplets of the weight, whose residual keeps the others. The class in
`lorasc_fx/options.py` is all that was written for it; what is shown here is that everything else then works.
"""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.passes import FoldBranches, InsertBranches, MatchSites, Pipeline, StageTransition
from tests.kit.errors import raises
from tests.kit.models import batches, branches, mlp, optimizer_of, train

RANK, ALPHA, PACE = 2, 3.0, 0.4
SCALE = ALPHA / RANK
SPEC = lx.CascadeSpec(start="milora", rank=RANK, lora_alpha=ALPHA, pace=PACE, targets=("0", "2"))
PATHS = ("0.weight", "2.weight")


def major(weight: torch.Tensor, rank: int = RANK) -> torch.Tensor:
    """The weight without its smallest singular triplets: what the graph computes with while a stage runs."""
    left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    values = torch.cat([values[:-rank], torch.zeros_like(values[-rank:])])
    return (left @ torch.diag(values) @ right).view_as(weight)


def deltas(cascade: lx.Cascade) -> dict[str, torch.Tensor]:
    """`s B A` of each branch, which at the start of a stage is what the weight lacks."""
    return {
        name: (branch.scale * branch.lora_B @ branch.lora_A).detach().clone()
        for name, branch in branches(cascade).items()
    }


def slow_weights(cascade: lx.Cascade) -> dict[str, torch.Tensor]:
    with cascade.weights("slow"):
        return {name: cascade.model.get_parameter(name).detach().clone() for name in PATHS}


def assert_started(cascade: lx.Cascade, weights: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        residual = cascade.model.get_parameter(name).detach()
        torch.testing.assert_close(residual, major(weight), rtol=0, atol=1e-12)
        torch.testing.assert_close(deltas(cascade)[name], weight - residual, rtol=0, atol=1e-12)
        b, a = branches(cascade)[name].lora_B, branches(cascade)[name].lora_A
        torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), rtol=0, atol=1e-12)  # a root of the value in either


def trained(seed: int = 0) -> tuple[lx.Cascade, dict[str, torch.Tensor]]:
    """A cascade two stages and a half on, with its slow weights by the formula, from the factors of each stage."""
    calls = batches(4, 4, 5, seed=seed)
    slow = {name: value.detach().clone() for name, value in mlp().named_parameters() if name in PATHS}
    cascade = lx.adapt(mlp(), (calls[0],), spec=SPEC)
    optimizer = optimizer_of(cascade, "sgd")
    for _ in range(2):
        assert_started(cascade, slow)
        first = deltas(cascade)
        train(cascade, optimizer, calls)
        for name, last in deltas(cascade).items():
            assert (last - first[name]).abs().max() > 1e-3
            slow[name] = slow[name] + PACE * (last - first[name])
        cascade.transition(optimizer)
    assert_started(cascade, slow)
    train(cascade, optimizer, calls[:1])
    return cascade, slow


def test_milora_works_everywhere(tmp_path: Path) -> None:
    (x,) = batches(1, 4, 5)
    base = mlp()
    cascade, slow = trained()
    now = cascade(x).detach()
    for name, weight in slow_weights(cascade).items():
        torch.testing.assert_close(weight, slow[name], rtol=0, atol=1e-12)

    # A checkpoint, inside a stage: the factors that the stage started from come back with it.
    lx.save(cascade, tmp_path / "run")
    loaded = lx.load(tmp_path / "run", mlp(), args=(x,))
    assert torch.equal(loaded(x), now)
    with cascade.weights("fast"):
        fast = {name: cascade.model.get_parameter(name).detach().clone() for name in PATHS}
    ends = {}
    for label, run in (("first", cascade), ("loaded", loaded)):
        run.transition(None)
        ends[label] = slow_weights(run)
    for name in PATHS:
        assert torch.equal(ends["first"][name], ends["loaded"][name])
        expected = slow[name] + PACE * (fast[name] - slow[name])
        torch.testing.assert_close(ends["first"][name], expected, rtol=0, atol=1e-12)
    assert_started(loaded, ends["first"])

    # peft reads the change, of twice the rank a stage, on the base as it was.
    lx.export.peft(cascade, tmp_path / "adapter", which="slow")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").merge_and_unload()
    for name in PATHS:
        torch.testing.assert_close(theirs.get_parameter(name), ends["first"][name], rtol=0, atol=1e-12)

    # A sum of runs: the next stage takes its factors out of the sum.
    other, _ = trained(seed=7)
    other.transition(None)
    merged = lx.merge([cascade, other], mlp(), (x,))
    total = {name: (weight + slow_weights(other)[name]) / 2 for name, weight in ends["first"].items()}
    assert (total["0.weight"] - ends["first"]["0.weight"]).abs().max() > 1e-3
    assert_started(merged, total)

    # Nothing is left of it in the model that is released.
    released = loaded.release()
    for name in PATHS:
        torch.testing.assert_close(released.get_parameter(name), ends["first"][name], rtol=0, atol=1e-12)


def test_milora_in_passes_on_an_owned_graph() -> None:
    model, (x,) = mlp(), batches(1, 4, 5)
    weight, before = model.get_parameter("0.weight").detach().clone(), model(x)
    inserted = Pipeline([MatchSites(SPEC), InsertBranches()])(torch.fx.symbolic_trace(model)).graph_module
    for graph in (inserted, StageTransition()(inserted).graph_module):
        assert (graph(x) - before).abs().max() < 1e-13
        torch.testing.assert_close(graph.get_parameter("0.weight"), major(weight), rtol=0, atol=1e-13)
        assert torch.equal(FoldBranches()(graph).graph_module.get_parameter("0.weight"), weight)


def test_milora_of_fused_slices_tables_convolutions_and_a_rank_above_the_matrix() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 8)
            self.fused = nn.Parameter(torch.randn(13, 8))
            self.conv = nn.Conv1d(8, 3, 2)
            self.narrow = nn.Linear(3, 1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.table(ids)
            gate, value = self.fused.split((5, 8))
            x = nn.functional.linear(x, value) * nn.functional.linear(x, gate).tanh().mean(-1, keepdim=True)
            return self.narrow(self.conv(x.transpose(1, 2)).transpose(1, 2))

    torch.manual_seed(4)
    model, ids = Odd().double(), torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(1))
    base, before = {name: value.detach().clone() for name, value in model.named_parameters()}, model(ids)
    cascade = lx.adapt(model, (ids,), spec=lx.CascadeSpec(start="milora", rank=RANK, lora_alpha=ALPHA))
    assert (cascade(ids) - before).abs().max() < 1e-12
    assert {"table.weight", "conv.weight", "narrow.weight"} <= {site.weight for site in cascade.sites}
    assert any(site.slices for site in cascade.sites)
    for site in cascade.sites:
        sizes = site.slices or (site.shape[0],)
        pairs = zip(base[site.weight].split(sizes), cascade.model.get_parameter(site.weight).split(sizes), strict=True)
        for weight, residual in pairs:
            rank = min(RANK, *weight.flatten(1).shape)
            torch.testing.assert_close(residual.detach(), major(weight, rank), rtol=0, atol=1e-12)


def test_milora_needs_a_fresh_lora_a() -> None:
    with raises(lx.SpecError, "conflicting-options", "start", "milora", "restart_A"):
        lx.CascadeSpec(start="milora", restart_A="kept")
