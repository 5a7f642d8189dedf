"""Processes of a tensor parallel run, on the CPU by gloo."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.devices.ranks import processes


def spawn(work: Callable[..., None], *args: Any, world: int = 2) -> None:
    """Run `work(rank, mesh, *args)` in as many processes; a fault in one of them is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / 'store'}"
        processes(work)
        mp.start_processes(_begin, (work, world, store, args), nprocs=world, start_method="forkserver")


def _begin(rank: int, work: Callable[..., None], world: int, store: str, args: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        mesh: DeviceMesh = init_device_mesh("cpu", (world,))
        work(rank, mesh, *args)
    finally:
        dist.destroy_process_group()
