"""Ranks that save after each step, resume from the last checkpoint, and kill themselves at a random moment, run by
torchrun as `python -m tests.parallel.elastic FOLDER NAME KILLS`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

import lorasc_fx as lx
from lorasc_fx.parallel import fsdp
from tests.parallel import sharding, training

PARTS = ("save", "transition", "step")
UNTIL = 10
"""Number of steps: two stages, and some steps of a third one."""
CALLS = "calls of rank {}.json"
"""Name of a file of each rank: the number of function calls in each part of the training."""


class Parts:
    """Counts the function calls in each part of a training, and kills the process at one of them.

    Args:
        root: whose journal gets a line of each kill.
        rank: of the process.
        part: in which it is killed; "" for none.
        draw: of the call, evenly.
    """

    def __init__(self, root: Path, rank: int, part: str, draw: random.Random) -> None:
        self.root, self.part, self.counts = root, part, dict[str, int]()
        self.at = draw.randrange(json.loads((root / CALLS.format(rank)).read_text())[part]) if part else -1

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the calls of Python and builtin functions in a block, up to the drawn one."""
        count, at = 0, self.at if part == self.part else -1

        def see(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            if event in ("call", "c_call"):
                if count == at:
                    sys.setprofile(None)
                    self._die()
                count += 1

        sys.setprofile(see)
        try:
            yield
        finally:
            sys.setprofile(None)
            self.counts[part] = count

    def _die(self) -> None:
        with open(self.root / "journal", "a", encoding="utf-8") as journal:
            journal.write(f"{self.part}\n")
        os.kill(os.getpid(), signal.SIGKILL)


def train(rank: int, count: int, folder: str, name: str, part: str = "", seed: int = 0) -> dict[str, Tensor]:
    """Train a sharded cascade to the end, from the last checkpoint if there is one. The selected rank dies."""
    draw, root = random.Random(seed), Path(folder)
    parts = Parts(root, rank, part if rank == draw.randrange(count) else "", draw)
    share = (
        (rank, count) if training.ROWS % count == 0 else (0, 1)
    )  # each rank has the whole batch where it cannot be shared
    if any(root.glob("run/version-*")):
        cascade = fsdp.shard(lx.load(root / "run", sharding.blocks(), args=(sharding.example(),)))
        optimizer = training.optimizer_of(cascade)
        done = cascade.resume(optimizer)["steps"]
    else:
        cascade, done = fsdp.shard(sharding.adapted(name)), 0
        optimizer = training.optimizer_of(cascade)
    while done < UNTIL:
        with parts("step"):
            training.step(cascade, optimizer, done, share)
        done += 1
        if training.ends_stage(done):
            with parts("transition"):
                cascade.transition(optimizer)
        with parts("save"):
            lx.save(cascade, root / "run", optimizer=optimizer, extra={"steps": done})
    if parts.counts.keys() == set(PARTS):
        (root / CALLS.format(rank)).write_text(json.dumps(parts.counts))
    return sharding.values(cascade)


def main(folder: str, name: str, kills: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    part = PARTS[restart % len(PARTS)] if restart < kills else ""
    values = train(dist.get_rank(), dist.get_world_size(), folder, name, part, restart)
    if dist.get_rank() == 0:
        save_file({key: value.contiguous() for key, value in values.items()}, Path(folder) / "result.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
