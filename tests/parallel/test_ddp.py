"""A cascade in DistributedDataParallel, compared with a single process, and error messages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lorasc_fx as lx
from tests.errors.models import Late
from tests.kit.errors import raises, warns
from tests.parallel import sharding, training
from tests.parallel.conftest import part
from tests.parallel.ranks import RankFailed, on_ranks

ROOT = Path(__file__).parents[2]


def close(values: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_the_weights_of_one_process(two: list[dict[str, Tensor]], four: list[dict[str, Tensor]]) -> None:
    expected = {name: sharding.trained(name) for name in training.UNDER_DDP}
    for ranks, names in ((two, training.UNDER_DDP), (four, ("pissa",))):
        for values in ranks:
            for name in names:
                close(part(values, f"ddp/{name}"), expected[name])
            assert all(torch.equal(value, part(ranks[0], "ddp")[key]) for key, value in part(values, "ddp").items())
    base, fresh = training.blocks().state_dict(), expected["fresh"]
    moved = [name for name in base if not torch.equal(fresh[f"slow/{name}"], base[name])]
    assert len(moved) == 16  # every matrix, and both parameters of each normalization


def check_lost(fault: RankFailed, seconds: float) -> None:
    """The remaining process ended by itself, with an error."""
    assert seconds < 40
    assert fault.codes[0] == 1
    assert re.search("closed by peer|Timed out|timed out|reset by peer", fault.texts[0])


@pytest.mark.slow
def test_a_run_is_resumed_after_a_process_died(
    killed: tuple[RankFailed, float, str], four: list[dict[str, Tensor]]
) -> None:
    check_lost(*killed[:2])
    expected = sharding.trained("pissa")
    for count in (4, 2):
        ranks = [part(values, f"ddp on {count}") for values in four[:count]]
        for values in ranks:
            close(values, expected)
        drawn = [numbers["drawn"] for numbers in ranks]
        assert len({tuple(numbers.tolist()) for numbers in drawn}) == count
        for rank, numbers in enumerate(drawn if count == 2 else ()):  # two ranks saved their generators
            assert torch.equal(numbers, torch.rand(3, generator=torch.Generator().manual_seed(rank)))


LATE = ("wrapper-not-supported", "branches.second/weight.lora_A", "branches.second/weight.lora_B")


@pytest.mark.usefixtures("group")
def test_a_site_that_comes_after_the_wrapper() -> None:
    x = torch.randn(4, 5)
    cascade = lx.adapt(Late().eval(), args=(x,), spec=lx.CascadeSpec(rank=2))
    wrapper = DistributedDataParallel(cascade)
    wrapper(x).sum().backward()
    wrapper.train()
    with warns("late-sites", "second.weight"), raises(lx.StateError, *LATE):
        wrapper(x)
    with raises(lx.StateError, *LATE):
        wrapper.eval()(x)
    DistributedDataParallel(cascade.train())(x).sum().backward()


@pytest.mark.usefixtures("group")
def test_what_the_checkpoints_refuse(tmp_path: Path) -> None:
    cascade = training.adapted("fresh")
    wrapper, optimizer = DistributedDataParallel(cascade), training.optimizer_of(cascade)
    for wrong in (training.blocks(), DistributedDataParallel(training.blocks())):
        with raises(lx.StateError, "invalid-value", "Blocks"):
            lx.save(wrong, tmp_path)
    tokens, labels = next(training.batches(0, 0, 1))
    nn.functional.cross_entropy(wrapper(tokens), labels).backward()
    with raises(lx.StateError, "gradients-pending", "branches.table/weight.lora_B"):
        lx.save(wrapper, tmp_path / "run", optimizer=optimizer)
    assert not (tmp_path / "run").exists()
    lx.save(cascade, tmp_path / "alone", optimizer=optimizer)  # of one process: with its gradients
    optimizer.step()
    optimizer.zero_grad()
    with raises(lx.SpecError, "invalid-value", "keep", "0"):
        lx.save(wrapper, tmp_path / "run", optimizer=optimizer, keep=0)


def fails_on_one(rank: int, count: int, folder: str) -> None:
    """The last process loads another version, then cannot write, and then the first process has ended."""
    cascade = training.adapted("fresh")
    wrapper, optimizer = DistributedDataParallel(cascade), training.optimizer_of(cascade)
    for name in ("here", "there"):
        lx.save(wrapper, f"{folder}/{name}", optimizer=optimizer)
    if rank == 0:
        lx.save(cascade, f"{folder}/there", optimizer=optimizer)  # of this process alone
    dist.barrier()
    loaded = lx.load(f"{folder}/{'there' if rank else 'here'}", training.blocks(), args=(training.example(),))
    with raises(lx.StateError, "ranks-differ", "version-00000001", "version-00000002"):
        loaded.resume(training.optimizer_of(loaded))
    loaded = lx.load(f"{folder}/here", training.blocks(), args=(training.example(),))
    optimizer_of_rank = torch.optim.SGD(loaded.param_groups(lr=0.1)) if rank else training.optimizer_of(loaded)
    expected = (lx.CheckpointError, "optimizer-differs", "SGD") if rank else (lx.StateError, "rank-failed", "rank 1")
    with raises(*expected):
        loaded.resume(optimizer_of_rank)
    Path(f"{folder}/file").touch()
    with raises(lx.StateError if rank else lx.CheckpointError, "rank-failed" if rank else "write-failed"):
        lx.save(wrapper, f"{folder}/file/run")
    if rank == 0:
        with raises(lx.StateError, "rank-failed"):
            lx.save(wrapper, f"{folder}/here")


@pytest.mark.slow
def test_an_error_of_one_process_is_one_of_all(tmp_path: Path) -> None:
    on_ranks(2, fails_on_one, str(tmp_path), timeout=10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_the_example_runs_by_torchrun(name: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", f"examples.{name}"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^stage 3 of 3: loss [01]\.\d+ on 2 processes$", done.stdout, re.MULTILINE), done.stdout
    if name == "fsdp2":
        local, total = map(int, re.search(r"^(\d+) of (\d+) parameters", done.stdout, re.MULTILINE).groups())  # type: ignore[union-attr]
        assert total / 2 <= local < 0.51 * total
