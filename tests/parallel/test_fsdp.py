"""Sharded cascades (FSDP2), compared with a single process: values, memory, resharded checkpoints, and errors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import lorasc_fx as lx
from lorasc_fx.integrations.transformers import CascadeCallback
from lorasc_fx.parallel import fsdp
from lorasc_fx.shards import ProcessGroup, ShardSpec, chunk_of
from tests.errors.inject import EVERY, LineAt, in_turn, sigint
from tests.errors.models import Late
from tests.integrations.kit import arguments
from tests.kit.errors import raises
from tests.kit.models import Breaking, train
from tests.kit.state import canonical, file_digest, text_digest
from tests.parallel import sharding, training
from tests.parallel.conftest import part
from tests.parallel.ranks import on_ranks
from tests.parallel.test_ddp import close


@pytest.mark.slow
@pytest.mark.parametrize("name", training.SPECS)
def test_the_numbers_of_one_process(name: str, two: list[dict[str, Tensor]]) -> None:
    expected = sharding.alone(name)
    check_trained(name, two)
    assert not torch.equal(expected["slow/output"], expected["base/output"])
    assert not torch.equal(expected["slow/output"], expected["output"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fast", "dora, pissa"])
def test_the_numbers_of_one_process_on_four(name: str, four: list[dict[str, Tensor]]) -> None:
    check_trained(name, four)


def check_trained(name: str, ranks: list[dict[str, Tensor]]) -> None:
    """The first rank has all values of a run on one process, and the others all but the folded state dict."""
    for rank, values in enumerate(ranks):
        expected, trained = sharding.alone(name), part(values, f"trained/{name}")
        close(trained, {key: value for key, value in expected.items() if not rank or not key.startswith("folded/")})
        assert not rank or not any(key.startswith("folded/") for key in trained)


@pytest.mark.slow
def test_inf_on_one_rank_raises_on_all(two: list[dict[str, Tensor]]) -> None:
    expected = sharding.spoilt(0, 1)
    for values in two:
        close(part(values, "spoilt"), expected)


@pytest.mark.slow
def test_base_and_branches_keep_their_dtypes(two: list[dict[str, Tensor]]) -> None:
    for tensors in two:
        values = part(tensors, "narrow")
        for name, base in training.blocks().bfloat16().named_parameters():
            assert values[name].dtype == torch.bfloat16
            a, b = values.get(f"{name.replace('.', '/')}.lora_A"), values.get(f"{name.replace('.', '/')}.lora_B")
            if a is None or b is None:
                assert torch.equal(values[name], base)
                continue
            assert a.dtype == b.dtype == torch.float32
            delta = (a.t() @ b.t() if name.endswith("mix") else b @ a).view(base.shape)
            exact = base.double() + 0.5 * delta.double() * (8.0 / 2)
            assert (values[name].double() - exact).abs().max() < 2**-8 * exact.abs().max()
            assert not torch.equal(values[name], base)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "saving", "resuming"),
    [
        ("fresh", 2, 1), ("fresh", 2, 2), ("fresh", 2, 4), ("one process", 1, 2), ("fast", 2, 1),
        ("averaged", 2, 1), ("averaged", 2, 4), ("dora, pissa", 2, 4),
    ],
)  # fmt: skip
def test_a_checkpoint_is_resharded(
    name: str, saving: int, resuming: int, folder: Path, request: pytest.FixtureRequest
) -> None:
    """The result equals an uninterrupted run on one process."""
    expected = sharding.trained("fresh" if name == "one process" else name)
    results = request.getfixturevalue("four" if resuming == 4 else "two")
    run = folder / name
    assert sorted(version.name for version in run.iterdir()) == ["version-00000002", "version-00000003"]
    names = [f"state-{rank:05d}-of-00002.safetensors" for rank in (1, 2)] if saving == 2 else ["state.safetensors"]
    files = sorted(file.name for file in (run / "version-00000003").iterdir())
    assert files == ["manifest.json", *names]  # nothing to unpickle
    if resuming == 1:
        ranks = [sharding.resumed(0, 1, str(run))]
    else:
        ranks = [part(values, f"resumed/{name}") for values in results]
    for rank, values in enumerate(ranks):
        close(values, expected)
        if saving == resuming:  # each rank goes on with its own generators
            assert torch.equal(values["drawn"], torch.rand(3, generator=torch.Generator().manual_seed(rank)))
    assert len({tuple(values["drawn"].tolist()) for values in ranks}) == len(ranks) == resuming


@pytest.mark.slow
def test_experts_have_the_numbers_of_one_process(two: list[dict[str, Tensor]], folder: Path) -> None:
    """Sharded by experts, or along the next axis if their number is not a multiple of the ranks."""
    expected = sharding.experts(0, 1)
    for values in two:
        close(part(values, "experts"), expected)
    for number in sharding.EXPERTS:
        torch.manual_seed(1)
        model = sharding.Experts(number).double()
        cascade = lx.load(folder / "experts" / str(number), model, args=(training.example(),))
        close(training.values(cascade), part(expected, str(number)))


@pytest.mark.slow
def test_a_lost_rank_is_an_error_after_the_timeout() -> None:
    """And nothing has changed."""
    on_ranks(2, sharding.late, timeout=6, limit=120)


def layers() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def small(spec: dict[str, object], make: Callable[[], nn.Module] = layers) -> lx.Cascade:
    return lx.adapt(make(), args=(torch.randn(2, 5),), spec=lx.CascadeSpec.from_dict({"rank": 2, **spec}))


def quantized() -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = layers()
    quantize_(model[1], Int8WeightOnlyConfig())
    return model


REFUSED: dict[str, tuple[dict[str, object], Callable[[], nn.Module], tuple[str, ...]]] = {
    "eager": ({}, Breaking, ("no-graph",)),
    "quantized": ({}, quantized, ("quantized-not-supported", "1.weight")),
    "grid": ({"grid": "bfloat16"}, layers, ("not-available", "grid=None")),
}


@pytest.mark.usefixtures("group")
def test_a_late_call_that_adapts_another_weight_is_refused() -> None:
    cascade = fsdp.shard(small({}, lambda: Late().eval()))
    cascade.train()
    with raises(lx.StateError, "sharded", "second.weight"):
        cascade(torch.randn(2, 5))


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("group")
def test_what_shard_refuses(case: str) -> None:
    spec, make, expected = REFUSED[case]
    cascade = small(spec, make)
    before = dict(cascade.named_parameters())
    with raises(lx.StateError, *expected):
        fsdp.shard(cascade)
    assert all(parameter is before[name] for name, parameter in cascade.named_parameters())
    cascade(torch.randn(2, 5)).sum().backward()


def test_errors_without_a_process_group() -> None:
    cascade = small({})
    with raises(lx.StateError, "not-available"):
        fsdp.shard(cascade)
    with raises(lx.StateError, "not-available", "cascade.folded_state_dict()"):
        fsdp.folded_state_dict(cascade)


@pytest.mark.usefixtures("group")
def test_collectives_of_one_process() -> None:
    group, full = ProcessGroup.of(), torch.arange(35.0).view(7, 5) + 100
    assert [group.any(False), group.any(True), group.all(False), group.all(True)] == [False, True] * 2
    assert [group.rank, group.size, group.max(-2.0), str(group.max(torch.nan))] == [0, 1, -2, "nan"]
    assert all(torch.equal(collective(full.t()), full.t()) for collective in (group.sum_tensor, group.broadcast))
    for axis, total in enumerate(full.shape):
        shard = ShardSpec(0, total, total, group, axis)
        assert torch.equal(shard.gather(full), full)
        variances = [shard.std(rows) ** 2 for rows in (full[:1, :1], full[:1, :2], full)]
        assert variances == pytest.approx([0, 0.5, 105], rel=1e-12)
    for total, size in ((7, 3), (9, 4), (2, 4), (8, 2)):
        expected = [(int(chunk[0]), len(chunk)) for chunk in torch.arange(total).chunk(size)]
        assert [chunk_of(total, size, rank) for rank in range(size)] == expected + [(total, 0)] * (size - len(expected))


@pytest.mark.usefixtures("group")
def test_one_process_holds_all_rows(tmp_path: Path) -> None:
    x = torch.randn(2, 5)
    cascade = small({"train": ["1.bias"]})
    cascade(x).sum().backward()
    with raises(lx.StateError, "gradients-pending"):
        fsdp.shard(cascade)
    for parameter in cascade.parameters():
        parameter.grad = None
    expected = cascade(x)
    fsdp.shard(cascade)
    torch.testing.assert_close(cascade(x), expected, rtol=0, atol=0)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
    train(cascade, optimizer, [x])
    lx.save(cascade, tmp_path, optimizer=optimizer)
    loaded = fsdp.shard(lx.load(tmp_path, layers(), args=(x,)))
    for (name, value), right in zip(cascade.named_parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(training.full(value), training.full(right), rtol=0, atol=0, msg=name)
    resumed = torch.optim.AdamW(loaded.param_groups(lr=0.1))
    loaded.resume(resumed)
    for value, right in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(training.full(value[key]), training.full(right[key]))
            assert type(value[key]) is type(right[key]) is DTensor


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


LORA_B = "branch/0.weight/lora_B"
DAMAGED: dict[str, tuple[Callable[[Any, Any], object], tuple[str, ...]]] = {
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
    cascade, x, model = small({}), torch.randn(2, 5), layers()
    with torch.no_grad():
        cascade.branches["0/weight"].lora_B.normal_()
    for folder in ("whole", "damaged"):
        lx.save(cascade, tmp_path / folder)
    expected = cascade(x)
    with_shards(tmp_path / "damaged" / "version-00000001", change)
    with raises(lx.CheckpointError, "invalid-checkpoint", *names):
        lx.load(tmp_path / "damaged", model, args=(x,))
    with_shards(tmp_path / "whole" / "version-00000001", lambda *_: None)
    torch.testing.assert_close(lx.load(tmp_path / "whole", model, args=(x,))(x), expected, rtol=0, atol=0)


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
    assert [version.name for version in (tmp_path / "run").iterdir()] == ["version-00000001"]


@pytest.mark.usefixtures("group")
def test_an_interrupted_shard_changes_nothing() -> None:
    """Interrupted by Ctrl-C at lines of this package. Without an interrupt it succeeds."""
    cascade, x = small({"train": ["1.bias"], "noise": {"strength": 0.1}}), torch.randn(2, 5)
    expected = cascade(x)
    places = range(1, EVERY, 41)
    failures = in_turn(lambda at: LineAt(at, sigint), lambda: fsdp.shard(cascade), (cascade,), places)
    assert failures > 20
    assert all(isinstance(parameter, DTensor) for parameter in cascade.parameters())
    torch.testing.assert_close(cascade(x), expected, rtol=1e-5, atol=1e-6)  # the size of the noise is summed in fp64


@pytest.mark.usefixtures("group")
def test_a_trainer_refuses_a_sharded_cascade(tmp_path: Path) -> None:
    cascade = fsdp.shard(small({}))
    with raises(lx.SpecError, "trainer-not-supported", "sharded", "parallel.fsdp.shard"):
        CascadeCallback(cascade).on_init_end(arguments(tmp_path), None, None, model=cascade)


@pytest.mark.usefixtures("group")
def test_a_sharded_cascade_is_drawn_and_not_copied() -> None:
    cascade = fsdp.shard(small({}))
    assert "branch, rank" in cascade.draw()
    with raises(lx.StateError, "sharded", "deepcopy", "lorasc_fx.load"):
        copy.deepcopy(cascade)
