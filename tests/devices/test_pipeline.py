"""Stages of torch's pipeline parallelism, each adapted by itself: the numbers of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorasc_fx as lx
from lorasc_fx.integrations import fsdp, pipelining
from tests.devices import pipelined
from tests.devices.ranks import on_ranks
from tests.devices.test_ddp import group
from tests.kit.errors import raises
from tests.loops.kit import Branching

__all__ = ["group"]


@pytest.mark.slow
def test_two_stages_are_one_process(tmp_path: Path) -> None:
    """Names are those of the whole model, and so are noise and initial factors; a transition asks nobody."""
    base = tmp_path / "base.safetensors"
    save_file(pipelined.net().state_dict(), base)
    before, expected = load_file(base), pipelined.alone()
    first, last = on_ranks(2, pipelined.staged, str(base), str(tmp_path), limit=300)
    for name in pipelined.CUTS:
        held = {key.removeprefix(f"{name}/"): value for key, value in (first | last).items() if key.startswith(name)}
        assert held.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(held[key], value, rtol=0, atol=1e-12)
            assert key == "losses" or value.dim() < 2 or (value - before[key]).abs().max() > 1e-3
        folded = load_file(tmp_path / f"{name} 1.safetensors")
        assert folded.keys() == before.keys()
        for key, value in folded.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_adapted_graph_is_split_at_our_marks(tmp_path: Path) -> None:
    """Each process trains its stage in the graph of the whole cascade; the sum of their runs is that of one process."""
    expected = pipelined.alone()
    first, last = on_ranks(2, pipelined.split, str(tmp_path), limit=300)
    assert not first.keys() & last.keys()
    assert first.keys() | last.keys() == expected.keys()
    merged = lx.merge([tmp_path / "0", tmp_path / "1"], pipelined.net(), weights=[1, 1]).release().state_dict()
    for key, value in (first | last).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-12)
        if key != "losses":
            torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-12)
            assert value.dim() < 2 or (value - pipelined.net().state_dict()[key]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_stages_of_one_graph_compute_what_it_does() -> None:
    """Of microbatches that are given by name, too."""
    cascade = lx.adapt(pipelined.net(), args=(pipelined.batch(0)[0],), spec=pipelined.SPEC)
    x = pipelined.batch(1)[0]
    for args, kwargs in (((x,), {}), ((), {"x": x})):
        pipe = pipelining.split(cascade, ("layers.2.up", "layers.1"), args, kwargs)
        assert pipe.num_stages == 3
        value = x
        for index in range(3):
            value = pipe.get_stage_module(index)(*value if isinstance(value, tuple) else (value,))
        assert torch.equal(value, cascade(x))


@pytest.mark.usefixtures("group")
def test_what_cannot_be_split() -> None:
    x = pipelined.batch(0)[0]

    def made(**options: object) -> lx.Cascade:
        return lx.adapt(pipelined.net(), args=(x,), spec=lx.CascadeSpec.from_dict({"rank": 2, **options}))

    cascade = made()
    with raises(lx.errors.PassError, "unknown-name", "layers.7", "layers.2"):
        pipelining.split(cascade, ["layers.7"], (x,))
    for before, name in ((["embed"], "embed"), (["layers.1", "layers.1.norm"], "layers.1.norm")):
        with raises(lx.errors.PassError, "invalid-value", repr(name), "without weights"):
            pipelining.split(cascade, before, (x,))
    for options, name in (
        ({"restart_A": "gradient"}, "restart_A"),
        ({"noise": {"strength": 0.1, "redraw": "step"}}, "noise.redraw"),
        ({"nearest_full_gradient": True, "train_A": False}, "nearest_full_gradient"),
    ):
        with raises(lx.StateError, "not-shardable", name):
            pipelining.split(made(**options), ["layers.1"], (x,))
    broken = lx.adapt(Branching(), args=(torch.ones(2, 4),), spec=lx.CascadeSpec(rank=2))
    with raises(lx.StateError, "no-whole-graph", "split"):
        pipelining.split(broken, ["inner"], (torch.ones(2, 4),))
    with raises(lx.StateError, "sharded", "split"):
        pipelining.split(fsdp.shard(made()), ["layers.1"], (x,))
