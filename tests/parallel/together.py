"""What two and four processes do, one thing after the other, because starting processes takes most of the time."""

from __future__ import annotations

from torch import Tensor

from tests.parallel import sharding, training

SAVED = ("fresh", "fast", "averaged", "dora, pissa")
"""The cascades that two ranks save. With rank 1, lora_A is sharded along its inputs."""


def on_two(rank: int, count: int, folder: str) -> dict[str, Tensor]:
    results = {
        "trained": sharding.sharded(rank, count, training.SPECS),
        "spoilt": sharding.spoilt(rank, count),
        "narrow": sharding.narrow(rank, count),
        "experts": sharding.experts(rank, count, f"{folder}/experts"),
        "ddp": training.under_ddp(rank, count),
    }
    for name in SAVED:
        sharding.saved(rank, count, name, f"{folder}/{name}", 5)
    for name in ("fresh", "one process"):
        results[f"resumed/{name}"] = sharding.resumed(rank, count, f"{folder}/{name}")
    sharding.unlike(rank, count)
    sharding.refused(rank, count, f"{folder}/refused")
    return by_part(results)


def on_four(rank: int, count: int, folder: str, killed: str) -> dict[str, Tensor]:
    """Resume what two ranks have saved, and a run under DDP on all ranks and on the first two."""
    results = {
        "trained": sharding.sharded(rank, count, ("fast", "dora, pissa")),
        "ddp": training.under_ddp(rank, count, ("pissa",)),
    }
    for name in ("fresh", "averaged", "dora, pissa"):
        results[f"resumed/{name}"] = sharding.resumed(rank, count, f"{folder}/{name}")
    for part in (4, 2):
        results[f"ddp on {part}"] = training.resumed(rank, killed, part)
    return by_part(results)


def by_part(results: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{part}/{key}": value for part, tensors in results.items() for key, value in tensors.items()}
