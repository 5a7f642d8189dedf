"""Processes that are started once for all tests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import Tensor

from tests.parallel import sharding, together, training
from tests.parallel.ranks import RankFailed, on_ranks


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """Create a process group with only this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the checkpoints of `two`."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="session")
def two(folder: Path) -> list[dict[str, Tensor]]:
    """The results of `together.on_two`, by rank."""
    sharding.saved(0, 1, "fresh", str(folder / "one process"), 5)
    return on_ranks(2, together.on_two, str(folder), limit=900)


@pytest.fixture(scope="session")
def killed(folder: Path) -> tuple[RankFailed, float, str]:
    """A run under DDP whose last process dies: the error, the seconds, and the folder of its checkpoint."""
    run, began = str(folder / "killed"), time.monotonic()
    with pytest.raises(RankFailed) as caught:
        on_ranks(2, training.saved_then_killed, "pissa", run, 3, limit=40, timeout=5)
    return caught.value, time.monotonic() - began, run


@pytest.fixture(scope="session")
def four(two: object, killed: tuple[RankFailed, float, str], folder: Path) -> list[dict[str, Tensor]]:
    """The results of `together.on_four`, by rank."""
    return on_ranks(4, together.on_four, str(folder), killed[2], limit=900)


def part(results: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of one part of the results of a rank."""
    return {key.removeprefix(f"{name}/"): value for key, value in results.items() if key.startswith(f"{name}/")}
