"""Sharded cascades (FSDP2), compared with a single process: values, memory, resharded checkpoints, and errors."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import lorasc_fx as lx
from lorasc_fx.branch import METHODS
from lorasc_fx.parallel import dcp, fsdp, segments
from tests.errors.inject import LineAt, in_turn, sigint
from tests.errors.models import Late
from tests.kit.errors import raises
from tests.kit.models import Breaking
from tests.kit.state import canonical, file_digest, text_digest, variant_for
from tests.parallel import elastic, sharding
from tests.parallel.ranks import on_ranks
from tests.parallel.test_ddp import close, group

ROOT = Path(__file__).parents[2]
__all__ = ["group"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "names", "mesh"),
    [
        (2, [name for name in sharding.SPECS if name not in METHODS], ()),
        (2, [name for name in sharding.SPECS if name in METHODS], ()),
        (4, ["fast", "dora, pissa"], ()),
        (4, ["fresh", "fast"], (2, 2)),  # two replicas of two shards
    ],
)
def test_the_numbers_of_one_process(count: int, names: list[str], mesh: tuple[int, ...]) -> None:
    wanted = {name: sharding.alone(name) for name in names}
    for rank, found in enumerate(on_ranks(count, sharding.sharded, names, mesh, limit=600)):
        for name in names:
            here = {key: each for key, each in wanted[name].items() if not rank or key[:7] != "folded/"}
            close(found, here, f"{name}/")
        assert not rank or not any("/folded/" in key for key in found)  # the first process has them
    for found in wanted.values():
        assert not torch.equal(found["slow/output"], found["base/output"])
        assert not torch.equal(found["slow/output"], found["output"])


@pytest.mark.slow
def test_a_nonfinite_branch_on_one_rank_is_skipped_on_all() -> None:
    wanted = sharding.spoilt(0, 1)
    for found in on_ranks(2, sharding.spoilt):
        close(found, wanted)
    assert torch.equal(wanted["slow/layers.1.up.weight"], sharding.blocks().layers[1].up.weight)
    assert not torch.equal(wanted["slow/layers.1.down.weight"], sharding.blocks().layers[1].down.weight)


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


def resumed(count: int, work: Callable[..., dict[str, Tensor]], *args: Any) -> list[dict[str, Tensor]]:
    """Run on several ranks, or in this process without sharding."""
    return on_ranks(count, work, *args) if count > 1 else [work(0, 1, *args)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "saving", "resuming"),
    [
        ("fresh", 2, (1, 2, 4)),
        ("fresh", 1, (2,)),
        ("ranks", 2, (1,)),  # lora_A is cut by its inputs
        ("averaged", 2, (1, 4)),
        ("dora, pissa", 2, (2,)),
    ],
)
def test_a_checkpoint_is_resharded(tmp_path: Path, name: str, saving: int, resuming: tuple[int, ...]) -> None:
    """The result equals an uninterrupted run on one process."""
    run, later = tmp_path / "run", ("folded/", "first/", "back/")
    wanted = {key: value for key, value in sharding.alone(name).items() if not key.startswith(later)}
    on_ranks(saving, sharding.saved, name, str(run), 10)
    assert sorted(version.name for version in run.iterdir()) == ["version-00000002", "version-00000003"]
    names = [f"state-{rank:05d}-of-00002.safetensors" for rank in (1, 2)] if saving == 2 else ["state.safetensors"]
    held = sorted(file.name for file in (run / "version-00000003").iterdir())
    assert held == ["manifest.json", *names]  # nothing to unpickle
    for count in resuming:
        ranks = resumed(count, sharding.resumed, str(run))
        for rank, found in enumerate(ranks):
            close(found, wanted)
            if count == saving:  # each rank goes on with its own generators
                assert torch.equal(found["drawn"], torch.rand(3, generator=torch.Generator().manual_seed(rank)))
        assert len({tuple(found["drawn"].tolist()) for found in ranks}) == count


@pytest.mark.slow
def test_checkpoints_of_replicas_hold_each_shard_once(tmp_path: Path) -> None:
    expected = {key: value for key, value in sharding.alone("fresh").items() if not key.startswith("folded/")}
    on_ranks(4, sharding.saved, "fresh", str(tmp_path / "run"), 10, (2, 2))
    files_of_version = sorted(file.name for file in (tmp_path / "run" / "version-00000003").iterdir())
    assert files_of_version[1:] == [f"state-{rank:05d}-of-00002.safetensors" for rank in (1, 2)]
    for count, mesh in ((4, (2, 2)), (1, ())):
        for found in resumed(count, sharding.resumed, str(tmp_path / "run"), mesh):
            close(found, expected)
    on_ranks(4, sharding.saved_by_dcp, "fresh", str(tmp_path / "dcp"), 10, (2, 2))
    (found,) = resumed(1, sharding.resumed_by_dcp, str(tmp_path / "dcp"), "safetensors")
    close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "saving", "resuming"), [("fresh", 2, (1, 4)), ("dora, pissa", 4, (2,))])
def test_a_checkpoint_of_dcp_is_resharded(tmp_path: Path, name: str, saving: int, resuming: tuple[int, ...]) -> None:
    """Written by torch's async_save and save. The result equals an uninterrupted run on one process."""
    wanted = {key: value for key, value in sharding.alone(name).items() if not key.startswith("folded/")}
    on_ranks(saving, sharding.saved_by_dcp, name, str(tmp_path), 7)
    for count in resuming:
        kind = "safetensors" if count == 4 else "torch"
        for found in resumed(count, sharding.resumed_by_dcp, str(tmp_path), kind):
            close(found, wanted)
    if saving == 2:
        (found,) = resumed(1, sharding.resumed_by_dcp, str(tmp_path), "safetensors")
        close(found, wanted)


@pytest.mark.slow
def test_experts_have_the_numbers_of_one_process(tmp_path: Path) -> None:
    """Sharded by experts, or along the next axis if their number is not a multiple of the ranks."""
    expected = sharding.experts(0, 1)
    for found in on_ranks(2, sharding.experts, str(tmp_path)):
        close(found, expected)
    for number in sharding.EXPERTS:
        torch.manual_seed(1)
        cascade = lx.load(tmp_path / str(number), sharding.Experts(number).double(), args=(sharding.example(),))
        own = {key: value for key, value in expected.items() if key.startswith(f"{number}/")}
        close({f"{number}/{key}": value for key, value in sharding.values(cascade).items()}, own)


@pytest.mark.slow
def test_different_ranks_are_named_before_the_first_step() -> None:
    on_ranks(3, sharding.unlike, limit=300)


@pytest.mark.slow
@pytest.mark.parametrize("waits", [True, False])
def test_a_transition_waits_for_a_slow_rank_and_not_for_a_lost_one(waits: bool) -> None:
    """A lost rank is an error after the timeout of the group, and nothing has changed."""
    on_ranks(2, sharding.late, waits, timeout=60 if waits else 6, limit=120)


@pytest.mark.slow
def test_what_shards_refuse(tmp_path: Path) -> None:
    on_ranks(2, sharding.refused, str(tmp_path / "run"))


def test_a_graph_is_split_where_the_block_changes() -> None:
    """The segments, run one after the other, compute the same as the graph."""
    cascade = sharding.adapted("fresh")
    tokens = sharding.example()
    module = variant_for(cascade, (tokens,), {}).module
    graph = segments.segmented(module, fsdp._units(cascade))
    assert [each.unit for each in graph.segments] == ["table", "layers.0", "layers.1", "layers.2", "head", "table"]
    nodes = [node for each in graph.segments for node in each.nodes]
    assert len(set(nodes)) == len(nodes)
    units = segments.Shards({each.unit: segments.Unit([]) for each in graph.segments}, [])
    found = units(graph, graph.interpreter, tokens)
    assert torch.equal(module.graph.process_outputs(found), cascade(tokens))
    inputs = [len(each.inputs) for each in graph.segments[1:]]
    assert inputs == [1, 1, 1, 1, 2]  # the residual stream, and the tokens' sum


def small(spec: dict[str, object], model: nn.Module | None = None) -> lx.Cascade:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)) if model is None else model
    return lx.adapt(model, args=(torch.randn(2, 5),), spec=lx.CascadeSpec.from_dict({"rank": 2, **spec}))


class Scaled(nn.Module):
    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain, self.linear = nn.Parameter(gain), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.gain.sum())


def quantized() -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    quantize_(model[1], Int8WeightOnlyConfig())
    return model


REFUSED: dict[str, tuple[dict[str, object], Callable[[], nn.Module] | None, tuple[str, ...]]] = {
    "scalar": ({}, lambda: Scaled(torch.tensor(2.0)), ("sharded", "model.gain")),
    "layout": ({}, lambda: Scaled(torch.ones(2, 3).t()), ("sharded", "model.gain", "contiguous")),
    "eager": ({}, Breaking, ("no-graph",)),
    "quantized": ({}, quantized, ("quantized-not-supported", "1.weight")),
}


@pytest.mark.usefixtures("group")
def test_a_late_call_that_adapts_another_weight_is_refused() -> None:
    cascade = fsdp.shard(small({}, Late().eval()))
    cascade.train()
    with raises(lx.StateError, "sharded", "second.weight"):
        cascade(torch.randn(2, 5))


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


def test_errors_without_a_process_group() -> None:
    cascade = small({})
    with raises(lx.StateError, "not-available"):
        fsdp.shard(cascade)
    with raises(lx.StateError, "not-available", "cascade.folded_state_dict()"):
        fsdp.folded_state_dict(cascade)


def test_axes_that_ranks_do_not_divide() -> None:
    """These are the inputs, if the rank changes between stages."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        cascade = small({"rank": [2, 3]})
        before = dict(cascade.named_parameters())
        with raises(lx.StateError, "sharded", "2 processes", "5 inputs", "0.weight"):
            fsdp.shard(cascade)
        assert all(each is before[name] for name, each in cascade.named_parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_one_process_holds_all_rows(tmp_path: Path) -> None:
    x = torch.randn(2, 5)
    model, base = (nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)) for _ in range(2))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    cascade = small({"train": ["1.bias"]}, model)
    with raises(lx.StateError, "invalid-value", "3"):
        fsdp.shard(cascade, init_device_mesh("cpu", (1, 1, 1)))
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
    base.load_state_dict(start)
    lx.save(cascade, tmp_path, optimizer=optimizer)
    loaded = fsdp.shard(lx.load(tmp_path, base, args=(x,)))
    for (name, one), other in zip(cascade.named_parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(sharding.whole(one), sharding.whole(other), rtol=0, atol=0, msg=name)
    resumed = torch.optim.AdamW(loaded.param_groups(lr=0.1))
    loaded.resume(resumed)
    for one, other in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(sharding.whole(one[key]), sharding.whole(other[key]))
            assert type(one[key]) is type(other[key]) is DTensor


def with_shards(path: Path, change: Callable[[dict[str, object], list[dict[str, Tensor]]], object]) -> None:
    """Rewrite a checkpoint as one of two ranks with half of the rows each, damage it, and sign it again."""
    manifest, tensors = json.loads((path / "manifest.json").read_text()), load_file(path / "state.safetensors")
    cut = [name for name in tensors if name.startswith("branch/")]
    halves = {name: tensors[name].chunk(2) for name in cut}
    files = [
        {**(tensors if rank == 0 else {}), **{name: halves[name][rank].clone() for name in cut}} for rank in (0, 1)
    ]
    manifest["shards"] = dict.fromkeys(cut, 0)
    change(manifest, files)
    (path / "state.safetensors").unlink()
    names = [f"state-{rank}-of-00002.safetensors" for rank in ("00001", "00002")]
    for name, file in zip(names, files, strict=True):
        save_file(file, path / name)
    digests = {name: file_digest(path / name) for name in names}
    manifest["files"] = {name: digests[name] for name in manifest.pop("order", names)}
    manifest["digest"] = text_digest(canonical(manifest))
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.usefixtures("group")
def test_what_a_checkpoint_of_dcp_must_be(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    start = copy.deepcopy(model.state_dict())

    def base() -> nn.Module:
        fresh = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        fresh.load_state_dict(start)
        return fresh

    cascade, x = fsdp.shard(small({"pace": 0.5}, model)), torch.randn(2, 5)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
    loss = cascade(x).sum()
    loss.backward()
    with raises(lx.StateError, "gradients-pending", "state_dict"):
        dcp.state_dict(cascade)
    optimizer.step()
    optimizer.zero_grad()
    state = dcp.state_dict(cascade, optimizer=optimizer, extra={"steps": 3})
    with torch.no_grad():  # with gradients, branches that have no hooks are merged into small weights
        wanted = cascade(x)
    folders = {name: str(tmp_path / name) for name in ("good", "damaged", "other", "empty")}
    changed = {**state, LORA_B: state[LORA_B] + 1}
    written = {"good": state, "damaged": changed, "other": {"weight": torch.ones(2)}}
    for name, tensors in written.items():
        checkpoint.save(tensors, storage_writer=HuggingFaceStorageWriter(folders[name], save_distributed=True))
    for name, code in (
        ("damaged", "invalid-checkpoint"),
        ("other", "invalid-checkpoint"),
        ("empty", "unreadable-file"),
    ):
        with raises(lx.CheckpointError, code, folders[name]):
            dcp.load(HuggingFaceStorageReader(folders[name]), base(), (x,))
    loaded = dcp.load(HuggingFaceStorageReader(folders["good"]), base(), (x,))
    resumed = torch.optim.AdamW(loaded.param_groups(lr=0.1))
    assert loaded.resume(resumed) == {"steps": 3}
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), wanted, rtol=0, atol=0)
    apart = dcp.state_dict(loaded, optimizer=resumed)  # of one process, without the generators of each rank
    assert state.keys() == apart.keys()
    assert not any(isinstance(value, DTensor) for value in apart.values())


LORA_B = "branch/0.weight/lora_B"
DAMAGED: dict[str, tuple[Callable[[Any, Any], object], tuple[str, ...]]] = {
    "no axis": (lambda manifest, files: manifest["shards"].update({LORA_B: True}), ("shards", LORA_B)),
    "another axis": (lambda manifest, files: manifest["shards"].update({LORA_B: 1}), ("damaged", "dimension 1")),
    "a missing shard": (lambda manifest, files: files[1].pop(LORA_B), (LORA_B,)),
    "a missing first shard": (lambda manifest, files: files[0].pop(LORA_B), (LORA_B,)),
    "no shard": (lambda manifest, files: manifest["shards"].pop(LORA_B), (LORA_B,)),
    "more rows": (lambda manifest, files: files[1].update({LORA_B: torch.zeros(9, 2)}), (LORA_B, "(13, 2)", "(7, 2)")),
    "another order": (
        lambda manifest, files: manifest.update(
            order=["state-00002-of-00002.safetensors", "state-00001-of-00002.safetensors"]
        ),
        ("files", "state-00001-of-00002"),
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_of_several_ranks(tmp_path: Path, case: str) -> None:
    change, names = DAMAGED[case]
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    cascade, x = small({}, model), torch.randn(2, 5)
    with torch.no_grad():
        cascade.branches["0/weight"].lora_B.normal_()
    for folder in ("whole", "damaged"):
        lx.save(cascade, tmp_path / folder)
    wanted = cascade(x)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model.load_state_dict(start)
    with_shards(tmp_path / "damaged" / "version-00000001", change)
    with raises(lx.CheckpointError, "invalid-checkpoint", *names):
        lx.load(tmp_path / "damaged", model, args=(x,))
    with_shards(tmp_path / "whole" / "version-00000001", lambda *_: None)
    torch.testing.assert_close(lx.load(tmp_path / "whole", model, args=(x,))(x), wanted, rtol=0, atol=0)


@pytest.mark.usefixtures("group")
def test_a_frozen_parameter_that_changes_after_shard(tmp_path: Path) -> None:
    """No checkpoint contains it, so its fingerprint of the full parameter before `shard` is compared."""
    cascade = small({})
    fsdp.shard(cascade)
    cascade(torch.randn(2, 5)).sum().backward()
    for parameter in cascade.branches.parameters():
        parameter.grad = None
    lx.save(cascade, tmp_path / "run")
    with torch.no_grad():
        cascade.model.get_parameter("0.bias").add_(1)
    with raises(lx.StateError, "weights-changed-outside", "0.bias"):
        lx.save(cascade, tmp_path / "run")
    assert [each.name for each in (tmp_path / "run").iterdir()] == ["version-00000001"]


@pytest.mark.usefixtures("group")
def test_an_interrupted_shard_changes_nothing() -> None:
    """Interrupted by Ctrl-C at lines of this package. Without an interrupt it succeeds."""
    cascade, x = small({"train": ["1.bias"], "noise": {"strength": 0.1}}), torch.randn(2, 5)
    wanted = cascade(x)
    call, faults = partial(fsdp.shard, cascade), (KeyboardInterrupt,)
    failures = in_turn(lambda at: LineAt(at, sigint), call, (cascade,), faults, step=41)
    assert failures > 20
    assert all(isinstance(each, DTensor) for each in cascade.parameters())
    torch.testing.assert_close(cascade(x), wanted, rtol=1e-5, atol=1e-6)  # the size of the noise is summed in fp64


@pytest.mark.usefixtures("group")
def test_gradients_of_two_dtypes_in_one_block() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).bfloat16()
    spec = lx.CascadeSpec(rank=2, train=("0.bias",))
    cascade = lx.adapt(model, args=(torch.randn(2, 5).bfloat16(),), spec=spec)
    with raises(lx.StateError, "sharded", "0.bias"):
        fsdp.shard(cascade)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_torchrun_restarts_killed_ranks(tmp_path: Path) -> None:
    """Killed in a save, a transition and a step. The final checkpoint equals that of an uninterrupted run."""
    name, count, kills = "fresh", 2, 3
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    wanted, *_ = on_ranks(count, elastic.train, str(tmp_path / "whole"), name, limit=300)
    for rank in range(count):
        (tmp_path / "whole" / elastic.CALLS.format(rank)).rename(tmp_path / "killed" / elastic.CALLS.format(rank))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--monitor-interval", "0.1"]
    command += ["--nproc-per-node", str(count), "--max-restarts", str(kills), "-m", "tests.parallel.elastic"]
    apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # or gloo looks for ranks of before the restart (torch 2.13)
    done = subprocess.run(
        [*command, str(tmp_path / "killed"), name, str(kills)],
        cwd=ROOT, env=os.environ | apart, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    killed_in = (tmp_path / "killed" / "journal").read_text(encoding="utf-8").split()
    assert killed_in == list(elastic.PARTS)
    found = load_file(tmp_path / "killed" / "result.safetensors")
    assert found.keys() == wanted.keys()
    assert [key for key, value in found.items() if not torch.equal(value, wanted[key])] == []
    assert [path.name[:8] for path in (tmp_path / "killed" / "run").iterdir()] == ["version-"]


@pytest.mark.slow
def test_the_example_runs_by_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "examples.fsdp2"], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^stage 3 of 3: loss [01]\.\d+ on 2 processes$", done.stdout, re.MULTILINE), done.stdout
    here, whole = map(int, re.search(r"^(\d+) of (\d+) parameters", done.stdout, re.MULTILINE).groups())  # type: ignore[union-attr]
    assert whole / 2 <= here < 0.51 * whole


@pytest.mark.usefixtures("group")
def test_a_sharded_cascade_is_drawn_and_not_copied() -> None:
    cascade = fsdp.shard(small({}))
    assert "branch, rank" in cascade.draw()
    with raises(lx.StateError, "sharded", "deepcopy", "lorasc_fx.load"):
        copy.deepcopy(cascade)
