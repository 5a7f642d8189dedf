"""FSDP2 under a cascade: the numbers of one process from shards, memory, checkpoints that are cut anew, and errors."""

from __future__ import annotations

import json
import re
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import lorasc_fx as lx
from lorasc_fx.integrations import fsdp, segments, sharded_files
from tests.devices import sharding
from tests.devices.ranks import on_ranks
from tests.devices.test_ddp import close, group
from tests.errors.inject import SIGNALS, LineAt, in_turn
from tests.kit.errors import raises
from tests.kit.state import canonical, file_digest, text_digest, variant_for

ROOT = Path(__file__).parents[2]
__all__ = ["group"]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "names"), [(2, ["fresh", "fast", "merged"]), (4, ["fast"])])
def test_the_numbers_of_one_process(count: int, names: list[str]) -> None:
    wanted = {name: sharding.alone(name) for name in names}
    ranks = on_ranks(count, sharding.sharded, names, limit=100)
    for rank, found in enumerate(ranks):
        for name in names:
            here = {key: value for key, value in wanted[name].items() if not rank or not key.startswith("folded/")}
            close(found, here, f"{name}/")
        assert not rank or not any("/folded/" in key for key in found)  # the first process has them
    for found in wanted.values():
        assert not torch.equal(found["slow/output"], found["base/output"])
        assert not torch.equal(found["slow/output"], found["output"])


@pytest.mark.slow
def test_base_and_branches_keep_their_dtypes() -> None:
    for found in on_ranks(2, sharding.narrow):
        for name, base in sharding.blocks().bfloat16().named_parameters():
            assert found[name].dtype == torch.bfloat16
            a, b = found.get(f"{name.replace('.', '/')}.lora_A"), found.get(f"{name.replace('.', '/')}.lora_B")
            if a is None or b is None:
                assert torch.equal(found[name], base)
                continue
            assert a.dtype == b.dtype == torch.float32
            delta = (a.t() @ b.t() if name.endswith("mix") else b @ a).view(base.shape)
            exact = base.double() + 0.5 * delta.double() * (8.0 / 2)
            assert (found[name].double() - exact).abs().max() < 2**-8 * exact.abs().max()
            assert not torch.equal(found[name], base)


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
    files = sorted(each.name for each in (tmp_path / "version-00000001").iterdir())
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
    module = variant_for(cascade, (tokens,), {}).module
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


def small(spec: dict[str, object], model: nn.Module | None = None) -> lx.Cascade:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)) if model is None else model
    return lx.adapt(model, args=(torch.randn(2, 5),), spec=lx.CascadeSpec.from_dict({"rank": 2, **spec}))


class Scaled(nn.Module):
    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain, self.linear = nn.Parameter(gain), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.gain.sum())


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum().item() > 1e9 else self.linear(-x)


def quantized() -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    quantize_(model[1], Int8WeightOnlyConfig())
    return model


REFUSED: dict[str, tuple[dict[str, object], Callable[[], nn.Module] | None, tuple[str, ...]]] = {
    "gradient": (
        {"restart_A": "gradient"},
        None,
        ("not-shardable", "restart_A", "'gradient'"),
    ),
    "skip": (
        {"on_nonfinite": "skip"},
        None,
        ("not-shardable", "on_nonfinite", "'skip'"),
    ),
    "dora": (
        {"use_dora": True},
        None,
        ("not-shardable", "use_dora", "True"),
    ),
    "start": (
        {"start": "pissa"},
        None,
        ("not-shardable", "start", "'pissa'"),
    ),
    "average": (
        {"average": "ema"},
        None,
        ("not-shardable", "average", "'ema'"),
    ),
    "redraw": (
        {"noise": {"strength": 0.1, "redraw": "step"}},
        None,
        ("not-shardable", "noise.redraw", "'step'"),
    ),
    "filter": (
        {"noise": {"strength": 0.1, "distribution": "filter"}},
        None,
        ("not-shardable", "noise.distribution", "'filter'"),
    ),
    "pruned": (
        {"optimizer_state": 0.5},
        None,
        ("not-shardable", "optimizer_state", "0.5"),
    ),
    "scalar": ({}, lambda: Scaled(torch.tensor(2.0)), ("not-shardable", "model.gain")),
    "layout": ({}, lambda: Scaled(torch.ones(2, 3).t()), ("not-shardable", "model.gain", "contiguous")),
    "pieces": (
        {},
        Breaks,
        ("no-whole-graph",),
    ),
    "quantized": ({}, quantized, ("quantized-not-supported", "1.weight")),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("group")
def test_what_shard_refuses(case: str) -> None:
    spec, make, expected = REFUSED[case]
    cascade = small(spec, make() if make is not None else None)
    before = dict(cascade.named_parameters())
    with raises(lx.StateError, *expected):
        fsdp.shard(cascade)
    assert all(each is before[name] for name, each in cascade.named_parameters())
    cascade(torch.randn(2, 5)).sum().backward()


def test_what_is_said_without_a_group(tmp_path: Path) -> None:
    cascade = small({})
    with raises(lx.StateError, "no-process-group"):
        fsdp.shard(cascade)
    with raises(lx.StateError, "no-process-group"):
        fsdp.load(tmp_path, nn.Linear(5, 7))
    for call, way in (
        (partial(fsdp.save, cascade, tmp_path), "lorasc_fx.save"),
        (partial(fsdp.resume, cascade), "cascade.resume"),
        (partial(fsdp.folded_state_dict, cascade), "cascade.folded_state_dict()"),
    ):
        with raises(lx.StateError, "not-sharded", way):
            call()


@pytest.mark.usefixtures("group")
def test_one_process_holds_all_rows_and_damage_is_told(tmp_path: Path) -> None:
    x = torch.randn(2, 5)
    cascade = small({"train": ["1.bias"]})
    with raises(lx.StateError, "invalid-mesh", "2"):
        fsdp.shard(cascade, init_device_mesh("cpu", (1, 1)))
    cascade(x).sum().backward()
    with raises(lx.StateError, "gradients-pending"):
        fsdp.shard(cascade)
    for each in cascade.parameters():
        each.grad = None
    wanted = cascade(x)
    fsdp.shard(cascade)
    torch.testing.assert_close(cascade(x), wanted, rtol=0, atol=0)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
    cascade(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    path = fsdp.save(cascade, tmp_path, optimizer=optimizer)
    umask = path.stat().st_mode & 0o777 ^ 0o777
    assert all(each.stat().st_mode & 0o777 == 0o666 & ~umask for each in path.iterdir())
    base = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    manifest = path / "manifest.json"
    whole = json.loads(manifest.read_text())

    def refuse(code: str, *names: str) -> None:
        with raises(lx.CheckpointError, code, *names):
            fsdp.load(tmp_path, base, args=(x,))

    refuse("checkpoint-other-base", "0.weight")
    name = next(iter(whole["tensors"]))
    for change, word in (({"kind": "other"}, "format"), ({"parked": True}, "digest")):
        manifest.write_text(json.dumps(whole | change))
        refuse("invalid-checkpoint", "manifest.json", word)
    manifest.write_text(json.dumps(whole))
    more = path / "more.safetensors"
    more.write_bytes(b"")
    refuse("invalid-checkpoint", "manifest.json", "files")
    more.unlink()
    file = next(path.glob("*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refuse("invalid-checkpoint", file.name, "digest")
    file.write_bytes(data)
    with raises(lx.CheckpointError, "no-checkpoint"):
        fsdp.load(tmp_path / "empty", base, args=(x,))
    plan, told = cascade.plan, whole["tensors"]
    with raises(lx.CheckpointError, "invalid-checkpoint"):
        sharded_files.described(path, told | {"foreign": {}}, plan)
    with raises(lx.CheckpointError, "invalid-checkpoint", name):
        sharded_files.described(path, told | {name: {"shape": [1 << 40]}}, plan)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    for other, row, word in (
        ("branch/0.weight/lora_B", 1 << 40, "bytes"),
        ("optimizer/0/exp_avg", 1 << 16, "bytes"),
        ("branch/0.weight/lora_B", 1, "plan"),
    ):
        info = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        info[other]["saved_offsets"][0] = row
        forged = header | {"__metadata__": header["__metadata__"] | {"DCP_SHARDING_INFO": json.dumps(info)}}
        text = json.dumps(forged).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        shape = [told[other]["shape"][0] + row, *told[other]["shape"][1:]]
        claims = whole | {"files": {file.name: file_digest(file)}}
        claims["tensors"] = told | {other: told[other] | {"shape": shape}}
        claims["digest"] = text_digest(canonical(claims))
        manifest.write_text(json.dumps(claims))
        refuse("invalid-checkpoint", other, word)


@pytest.mark.usefixtures("group")
def test_shards_of_what_is_trained_in_full_keep_their_rule() -> None:
    """Two biases follow the slow rule by a rule of their own, or against it: W0 + pace (W - W0) for the first only."""
    rules = [{"pattern": "0.bias", "slow": True, "lr": 0.5}, {"pattern": "1.bias", "slow": False}]
    cascade = small({"train": ["*.bias"], "train_rules": rules, "pace": 0.25})
    start = {name: cascade.model.get_parameter(name).detach().clone() for name in ("0.bias", "1.bias")}
    fsdp.shard(cascade)
    with torch.no_grad():
        for name in start:
            cascade.model.get_parameter(name).add_(1)
    cascade.transition(None)
    for name, pace in (("0.bias", 0.25), ("1.bias", 1.0)):
        torch.testing.assert_close(sharding.whole(cascade.model.get_parameter(name).detach()), start[name] + pace)


@pytest.mark.usefixtures("group")
def test_a_frozen_parameter_that_changes_after_shard(tmp_path: Path) -> None:
    """No checkpoint holds it, and its fingerprint is that of the whole parameter before."""
    cascade = small({})
    fsdp.shard(cascade)
    cascade(torch.randn(2, 5)).sum().backward()
    for parameter in cascade.branches.parameters():
        parameter.grad = None
    fsdp.save(cascade, tmp_path / "run")
    with torch.no_grad():
        cascade.model.get_parameter("0.bias").add_(1)
    with raises(lx.StateError, "weights-changed-outside", "0.bias"):
        fsdp.save(cascade, tmp_path / "run")
    assert [each.name for each in (tmp_path / "run").iterdir()] == ["version-00000001"]


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.usefixtures("group")
def test_an_interrupted_shard_changes_nothing(name: str) -> None:
    """By Ctrl-C or a timeout at lines of ours; then it goes through."""
    number, kind = SIGNALS[name]
    cascade, x = small({"train": ["1.bias"], "noise": {"strength": 0.1}}), torch.randn(2, 5)
    wanted = cascade(x)
    act = partial(signal.raise_signal, number)
    failures = in_turn(lambda at: LineAt(at, act), partial(fsdp.shard, cascade), (cascade,), (kind,), step=41)
    assert failures > 20
    assert all(isinstance(each, DTensor) for each in cascade.parameters())
    torch.testing.assert_close(cascade(x), wanted, rtol=0, atol=0)


@pytest.mark.usefixtures("group")
def test_shard_waits_for_whoever_works_with_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    cascade, begun, go_on = small({}), threading.Event(), threading.Event()
    real = fsdp._units

    def units(held: lx.Cascade) -> dict[int, str]:
        begun.set()
        assert go_on.wait(60)
        return real(held)

    monkeypatch.setattr(fsdp, "_units", units)
    other = threading.Thread(target=cascade.transition, args=(None,))
    sharding_thread = threading.Thread(target=fsdp.shard, args=(cascade,))
    sharding_thread.start()
    assert begun.wait(60)
    other.start()
    other.join(0.5)
    assert other.is_alive()
    assert cascade.stage == 1
    go_on.set()
    sharding_thread.join(60)
    other.join(60)
    assert cascade.stage == 2
    assert all(isinstance(each, DTensor) for each in cascade.parameters())


@pytest.mark.usefixtures("group")
def test_gradients_of_two_dtypes_in_one_block() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).bfloat16()
    cascade = lx.adapt(model, args=(torch.randn(2, 5).bfloat16(),), spec=lx.CascadeSpec(rank=2, train=("0.bias",)))
    with raises(lx.StateError, "not-shardable"):
        fsdp.shard(cascade)


@pytest.mark.slow
def test_the_example_runs_by_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "examples.fsdp2"], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^stage 3 of 3: loss [01]\.\d+ on 2 processes$", done.stdout, re.MULTILINE), done.stdout
    here, whole = map(int, re.search(r"^(\d+) of (\d+) numbers", done.stdout, re.MULTILINE).groups())  # type: ignore[union-attr]
    assert whole / 2 <= here < 1.01 * whole / 2
