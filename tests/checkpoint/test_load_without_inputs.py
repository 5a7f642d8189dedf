"""A checkpoint loaded without inputs: all that needs no graph works at once, and the first call makes the graph."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from tests.checkpoint.runs import THREE_STAGES, Run, X, interrupted, whole
from tests.checkpoint.test_resume import PLAIN, Teacher
from tests.errors.models import Net, inputs
from tests.errors.state import assert_same, unchanged
from tests.kit.errors import raises
from tests.kit.seams import SEAMS
from tests.kit.state import variant_count


def seeded_teacher() -> nn.Module:
    torch.manual_seed(3)
    return Teacher()


def test_a_parameter_that_forward_writes(tmp_path: Path) -> None:
    spec = lx.CascadeSpec(targets=("student",), rank=1)
    run = Run(spec, build=seeded_teacher, x=inputs(4, 5), frontend="export", waits=True)
    events = ("step", "step", "fold", "step")
    assert_same(interrupted(run, events, (1, 2, 3), tmp_path), whole(run, events))


def saved(folder: Path, spec: lx.CascadeSpec = PLAIN) -> lx.Cascade:
    going = Run(spec).started()
    for event in THREE_STAGES[:6]:
        getattr(going, event)()
    going.save(folder)
    return going.cascade


def test_what_needs_no_graph_works_before_the_first_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = saved(tmp_path)
    monkeypatch.setattr(*SEAMS["capture"], None)  # which nothing here calls
    cascade = lx.load(tmp_path, Net())
    assert cascade.sites == trained.sites
    assert cascade.frontend == "" == "".join(cascade.placements)
    assert "captured at its first call" in str(cascade)
    assert {refusal.weight for refusal in trained.refusals} <= {
        *cascade.unreached,
        *(r.weight for r in cascade.refusals),
    }
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    assert cascade.resume(optimizer)["losses"]
    with cascade.weights("slow"), trained.weights("slow"), torch.no_grad():
        assert torch.equal(cascade.eval()(X), trained.eval()(X))
    cascade.train()
    lx.save(cascade, tmp_path / "again", optimizer=optimizer)
    folded, expected = (each.folded_state_dict() for each in (lx.load(tmp_path / "again", Net()), trained))
    assert all(torch.equal(folded[name], expected[name]) for name in expected)
    released = cascade.release()
    assert all(torch.equal(value, expected[name]) for name, value in released.state_dict().items())


def test_what_needs_a_graph_says_so_until_the_first_call(tmp_path: Path) -> None:
    trained = saved(tmp_path)
    cascade = lx.load(tmp_path, Net())
    calls: list[Any] = [
        lambda: cascade.example,
        lambda: cascade.draw(tmp_path / "graph.svg"),
        cascade.folded_graph,
        lambda: lx.export.pt2(cascade, tmp_path / "graph.pt2"),
    ]
    for call in calls:
        with unchanged(cascade), raises(lx.StateError, "not-available"):
            call()
    graph = cascade.eval().folded_graph((X,))
    assert torch.equal(graph(X), trained.eval().folded_graph((X,))(X))
    assert variant_count(cascade) == 1
    assert cascade.frontend == trained.frontend
    assert cascade.placements == trained.placements
    assert cascade.unreached == trained.unreached
    assert cascade.refusals == trained.refusals
    assert torch.equal(cascade.example[0][0], X)


class Masked(nn.Module):
    """Token ids with a mask, which must not be all False, nested in a dictionary, and a plain option."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out, self.refuses = nn.Embedding(7, 6), nn.Linear(6, 5), False

    def forward(self, ids: torch.Tensor, extra: dict[str, Any], scale: float = 1.0) -> torch.Tensor:
        mask = extra["mask"]
        if self.refuses or not bool(mask.any()):
            raise ValueError("nothing is left")
        return self.out(self.table(ids) * mask.unsqueeze(-1)) * scale


IDS = torch.tensor([[3, 6, 0], [1, 1, 2]])
MASK = torch.tensor([[True, True, False], [True, True, True]])


def test_an_export_to_peft_runs_on_the_shapes_of_the_checkpoint(tmp_path: Path) -> None:
    cascade = lx.adapt(Masked(), (IDS, {"mask": MASK}), {"scale": 0.5}, spec=lx.CascadeSpec(rank=2))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
    cascade(IDS, {"mask": MASK}, scale=0.5).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    lx.save(cascade, tmp_path / "run")
    loaded = lx.load(tmp_path / "run", Masked())
    with unchanged(loaded):
        written = [lx.export.peft(each, tmp_path / name) for name, each in (("one", cascade), ("other", loaded))]
    assert written[0].ranks == written[1].ranks == {"table.weight": 2, "out.weight": 2}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    lx.save(loaded, tmp_path / "again")
    described = [
        json.loads((next((tmp_path / each).glob("*/manifest.json"))).read_text())["inputs"] for each in ("run", "again")
    ]
    assert described[0] == described[1]
    assert described[0]["tuple"][0]["tuple"][0] == {"tensor": [2, 3], "dtype": "int64", "fill": 6}


def test_a_model_that_raises_on_stand_ins_asks_for_inputs(tmp_path: Path) -> None:
    cascade = lx.adapt(Masked(), (IDS, {"mask": MASK}), spec=lx.CascadeSpec(rank=2))
    with torch.no_grad():
        next(iter(cascade.branches.values())).lora_B.fill_(1)
    lx.save(cascade, tmp_path / "run")
    loaded, folder = lx.load(tmp_path / "run", Masked()), tmp_path / "out"
    loaded.model.refuses = True
    with raises(lx.StateError, "not-available", "shapes", "ValueError: nothing is left", "lorasc_fx.load"):
        lx.export.peft(loaded, folder)
    assert not folder.exists()


def test_a_first_call_that_cannot_be_captured_leaves_the_cascade_as_it_was(tmp_path: Path) -> None:
    trained = saved(tmp_path)
    cascade = lx.load(tmp_path, Net())
    with unchanged(cascade), pytest.raises(RuntimeError, match="channels"):
        cascade(inputs(5, 2, 4, 4))
    hidden = X.clone().requires_grad_() * 2
    copy_of = copy.deepcopy(trained)
    torch.manual_seed(0)
    found = cascade(hidden)
    torch.manual_seed(0)
    assert torch.equal(found, copy_of(hidden))
    assert cascade.example[0][0].grad_fn is None  # or the graph of the caller would live on
