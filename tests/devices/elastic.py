"""A worker of torchrun that goes on from the last checkpoint, and kills itself at a drawn moment after each restart."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

import lorasc_fx as lx
from lorasc_fx.integrations import fsdp
from tests.devices import sharding

UNTIL = 20
"""Steps: the stages of `sharding.run`, and more of the last one."""
WITHIN = 0.6
"""Seconds after the beginning of a step within which a worker dies: in the step, a transition or a save."""


def train(rank: int, count: int, folder: str, name: str, restart: int | None = None) -> dict[str, Tensor]:
    """Train on shards with a save after each step; the `restart`-th time a rank dies after as many steps were saved."""
    root, draw = Path(folder), random.Random(f"{name} {restart}")
    victim, delay = draw.randrange(count), draw.uniform(0, WITHIN)
    if any(root.glob("run/version-*")):
        cascade = fsdp.shard(lx.load(root / "run", sharding.blocks(), args=(sharding.example(),)))
        optimizer = sharding.optimizer_of(cascade)
        done = cascade.resume(optimizer)["steps"]
    else:
        cascade, done = fsdp.shard(sharding.adapted(name)), 0
        optimizer = sharding.optimizer_of(cascade)

    def die() -> None:
        time.sleep(delay)
        with open(root / "journal", "a", encoding="utf-8") as journal:
            journal.write(f"{restart} on rank {rank}\n")
        os.kill(os.getpid(), signal.SIGKILL)

    armed = restart is None or rank != victim
    while done < UNTIL:
        if not armed and restart is not None and done >= restart:
            armed = True
            threading.Thread(target=die, daemon=True).start()
        sharding.run(cascade, optimizer, done, done + 1, (rank, count))
        done += 1
        lx.save(cascade, root / "run", optimizer=optimizer, extra={"steps": done})
    return sharding.values(cascade)


def main(folder: str, name: str, kills: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    found = train(dist.get_rank(), dist.get_world_size(), folder, name, restart if restart < kills else None)
    if dist.get_rank() == 0:
        save_file({key: value.contiguous() for key, value in found.items()}, Path(folder) / "result.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
