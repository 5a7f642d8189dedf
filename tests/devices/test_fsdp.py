"""FSDP2 under a cascade: the numbers of one process from shards, memory, checkpoints that are cut anew, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.integrations import fsdp, segments
from tests.devices import sharding
from tests.devices.ranks import on_ranks
from tests.devices.test_ddp import close, group
from tests.errors.models import exactly

ROOT = Path(__file__).parents[2]
__all__ = ["group"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_the_numbers_of_one_process(count: int) -> None:
    names = list(sharding.SPECS)
    wanted = {name: sharding.alone(name) for name in names}
    ranks = on_ranks(count, sharding.sharded, names, limit=100)
    for rank, found in enumerate(ranks):
        for name in names:
            here = {key: value for key, value in wanted[name].items() if not rank or not key.startswith("folded/")}
            close(found, here, f"{name}/")
        assert not rank or not any("/folded/" in key for key in found)  # the first process has them
    assert not torch.equal(wanted["fresh"]["slow/output"], wanted["fresh"]["base/output"])
    assert not torch.equal(wanted["fresh"]["slow/output"], wanted["fresh"]["output"])


@pytest.mark.slow
def test_memory_falls_with_the_number_of_processes() -> None:
    for count in (2, 4):
        for found in on_ranks(count, sharding.measured):
            whole, held, base, peak = found["bytes"].tolist()
            assert whole / count <= held < 1.1 * whole / count, (count, found)  # uneven rows are padded
            assert base < 1.05 * whole / count, (count, found)
            assert 0 < peak < 3.1 * whole / 12, (count, found)  # a block, the next one, and the root


@pytest.mark.slow
def test_a_checkpoint_is_cut_anew(tmp_path: Path) -> None:
    name, at = "fresh", 10
    wanted = {key: value for key, value in sharding.alone(name).items() if not key.startswith("folded/")}
    on_ranks(2, sharding.saved, name, str(tmp_path), at)
    files = sorted(each.name for each in (tmp_path / "step-00000001").iterdir())
    assert len(files) == 3
    assert all(each.endswith(".safetensors") or each == "manifest.json" for each in files)  # nothing to unpickle
    for count in (4, 1):
        for found in on_ranks(count, sharding.resumed, str(tmp_path)):
            close(found, wanted)


@pytest.mark.slow
def test_what_shards_refuse(tmp_path: Path) -> None:
    on_ranks(2, sharding.refused, str(tmp_path))


def test_units_are_blocks_by_path() -> None:
    model = sharding.blocks()
    units = {name: segments.unit_of(name, each) for name, each in model.named_parameters()}
    assert units["layers.1.up.weight"] == units["layers.1.norm.bias"] == units["layers.1.mix"] == "layers.1"
    assert (units["head.weight"], units["head.bias"]) == ("head", "")
    assert units["start"] == units["norm.weight"] == ""


def test_a_graph_is_cut_where_it_goes_on_to_another_block() -> None:
    """And each part computes what the graph does, one after the other."""
    cascade = sharding.adapted("fresh")
    tokens = sharding.example()
    module = cascade.variant((tokens,), {}).module
    graph = segments.cut(module, fsdp._units(cascade))
    assert [each.unit for each in graph.segments] == ["", "table", "layers.0", "layers.1", "layers.2", "head", "table"]
    nodes = [node for each in graph.segments for node in each.nodes]
    assert len(set(nodes)) == len(nodes)
    found = graph.run((tokens,), lambda segment, values: segment.run(module, values))
    assert torch.equal(module.graph.process_outputs(found), cascade(tokens))
    assert [len(each.inputs) for each in graph.segments[2:]] == [
        1,
        1,
        1,
        1,
        2,
    ]  # the residual stream, and the tokens' sum


@pytest.mark.parametrize(
    ("spec", "model", "sentence"),
    [
        (
            {"restart_A": "gradient"},
            None,
            "shard: restart_A is 'gradient', which needs whole weights; give another in the spec",
        ),
        (
            {"on_nonfinite": "skip"},
            None,
            "shard: on_nonfinite is 'skip', which needs whole weights; give another in the spec",
        ),
        (
            {"optimizer_state": 0.5},
            None,
            "shard: optimizer_state is 0.5: the smallest entries of a whole state are not found in a shard; give "
            "'reset' or 'kept' in the spec",
        ),
    ],
)
@pytest.mark.usefixtures("group")
def test_what_shard_refuses(spec: dict[str, object], model: nn.Module | None, sentence: str) -> None:
    x = torch.randn(2, 5)
    cascade = lx.adapt(
        nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), args=(x,), spec=lx.CascadeSpec.from_dict({"rank": 2, **spec})
    )
    before = dict(cascade.named_parameters())
    with pytest.raises(lx.StateError, match=exactly(sentence)):
        fsdp.shard(cascade)
    assert all(each is before[name] for name, each in cascade.named_parameters())
    cascade(x).sum().backward()
