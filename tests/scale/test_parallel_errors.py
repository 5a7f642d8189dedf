"""What parts cannot do is one clear error, and all is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import lorasc_fx as lx
from lorasc_fx.integrations import fsdp, tensor_parallel
from tests.errors.state import unchanged
from tests.kit.errors import raises
from tests.kit.seams import SEAMS
from tests.kit.state import is_parallel
from tests.scale.models import IDS
from tests.scale.parallel import WORKS, Mlp, X, cascade_of, llama

pytestmark = pytest.mark.slow

PLAN = WORKS["mlp"].plan


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Two processes, of which the other one does nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def mlp(**asked: Any) -> lx.Cascade:
    return cascade_of(replace(WORKS["mlp"], spec=replace(WORKS["mlp"].spec, **asked)))


@pytest.mark.parametrize(
    ("make", "plan", "sentence"),
    [
        (mlp, {"gaet": "colwise"}, ("unknown-target", "gaet", "gate")),
        (mlp, {"gate": "columns"}, ("invalid-value", "gate", "columns")),
        (
            mlp,
            {"head": "colwise"},
            ("not-divisible", "head.weight", "[3", "10]"),
        ),
        (
            lambda: mlp(dropout=0.1),
            PLAN,
            ("not-shardable", "dropout=0.1"),
        ),
        (
            lambda: mlp(restart_A="gradient"),
            PLAN,
            ("not-shardable", "restart_A=", "gradient"),
        ),
        (
            lambda: cascade_of(WORKS["gpt"]),
            {"embed": "colwise"},
            ("not-a-linear-layer", "embed.weight"),
        ),
        (
            lambda: cascade_of(WORKS["gpt"]),
            {"places": "colwise"},
            ("not-a-linear-layer", "places"),
        ),
        (
            lambda: lx.adapt(llama(tied=True), kwargs={"input_ids": IDS}, spec=lx.CascadeSpec(targets=("linear",))),
            {"lm_head": "colwise"},
            ("not-a-linear-layer", "model.embed_tokens.weight", "lm_head.weight"),
        ),
    ],
)
def test_what_the_plan_or_the_spec_cannot_have(
    make: Any, plan: dict[str, Any], sentence: tuple[str, ...], mesh: DeviceMesh
) -> None:
    cascade = make()
    with unchanged(cascade), raises(lx.SpecError, *sentence):
        tensor_parallel.parallelize(cascade, mesh, plan)


def test_a_mesh_of_one_axis(mesh: DeviceMesh) -> None:
    for given, told in ((None, "NoneType"), (init_device_mesh("cpu", (2, 1)), "of 2 axes")):
        with raises(lx.SpecError, "invalid-mesh", "mesh", told):
            tensor_parallel.parallelize(mlp(), given, PLAN)  # type: ignore[arg-type]


def test_other_numbers_than_before_are_put_back(mesh: DeviceMesh) -> None:
    """The other process adds nothing to a sum: what comes out is not what the model computes."""
    cascade = mlp()
    kept = dict(cascade.named_parameters())
    with (
        unchanged(cascade),
        raises(lx.StateError, "outputs-differ"),
    ):
        tensor_parallel.parallelize(cascade, mesh, PLAN)
    assert all(value is kept[name] for name, value in cascade.named_parameters())
    assert not is_parallel(cascade)


def test_graphs_that_do_not_run_in_parts(mesh: DeviceMesh) -> None:
    symbolic = lx.adapt(Mlp().double().eval(), args=(X,), spec=WORKS["mlp"].spec, frontend="symbolic")
    with unchanged(symbolic), raises(lx.StateError, "graph-has-modules"):
        tensor_parallel.parallelize(symbolic, mesh, PLAN)
    broken = lx.adapt(Mlp().double().eval(), args=(X,), spec=WORKS["mlp"].spec, frontend="graph-breaks")
    with unchanged(broken), raises(lx.StateError, "no-whole-graph"):
        tensor_parallel.parallelize(broken, mesh, PLAN)


@pytest.fixture
def parted(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> lx.Cascade:
    monkeypatch.setattr(*SEAMS["compare processes"], lambda before, after: None)  # the other process does nothing
    return tensor_parallel.parallelize(mlp(), mesh, PLAN)


def test_what_a_cascade_in_parts_does_not_do(parted: lx.Cascade, mesh: DeviceMesh, tmp_path: Any) -> None:
    for call, does in (
        ("release", parted.release),
        ("folded_state_dict", parted.folded_state_dict),
        ("folded_graph", parted.folded_graph),
        ("to", parted.float),
        ("export.safetensors", lambda: lx.export.safetensors(parted, tmp_path / "out.safetensors")),
        ("parallelize", lambda: tensor_parallel.parallelize(parted, mesh, PLAN)),
    ):
        with raises(lx.StateError, "sharded", call, "tensor_parallel.gather"):
            does()
    with raises(lx.StateError, "invalid-mesh", "tensor parallelism", "mesh_dim_names"):
        fsdp.shard(parted)
    with raises(lx.StateError, "invalid-mesh", "tensor parallelism"):
        fsdp.shard(parted, mesh)
    with raises(lx.StateError, "not-sharded"):
        tensor_parallel.gather(mlp())


class Later(nn.Module):
    """Uses a second layer only in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if self.training else x


def test_a_branch_that_comes_later(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*SEAMS["compare processes"], lambda before, after: None)
    cascade = lx.adapt(Later().double().eval(), args=(X,), spec=lx.CascadeSpec(rank=2))
    tensor_parallel.parallelize(cascade, mesh, {"first": "colwise"})
    cascade.train()
    with raises(lx.StateError, "variant-after-sharding", "second/weight.lora_A"):
        cascade(X)


class Drops(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


def test_dropout_of_the_model(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*SEAMS["compare processes"], lambda before, after: None)
    cascade = lx.adapt(Drops().double().train(), args=(X,), spec=lx.CascadeSpec(rank=2))
    with unchanged(cascade), raises(lx.StateError, "dropout-not-supported", "aten.dropout.default"):
        tensor_parallel.parallelize(cascade, mesh, {"gate": "colwise"})
