"""Ranks that train with a save after each step, go on from the last one, and kill themselves at a drawn moment; by
torchrun as `python -m tests.devices.elastic FOLDER NAME KILLS`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

import lorasc_fx as lx
from lorasc_fx.integrations import fsdp
from tests.devices import sharding

PARTS = ("save", "transition", "step")
UNTIL = 10
"""Steps: two stages, and more of the last one."""
SECONDS = "seconds.json"
"""A file in the folder: how long the parts usually take."""


class Parts:
    """Times the parts of a training, and kills the process within one of them, at a moment that is drawn evenly.

    Args:
        root: whose journal gets a line of each kill.
        part: in which it is killed; "" for none.
        draw: of the moment.
    """

    def __init__(self, root: Path, part: str, draw: random.Random) -> None:
        self.root, self.part, self.draw = root, part, draw
        self.usual: Mapping[str, float] = json.loads((root / SECONDS).read_text()) if part else {}
        self.seconds: dict[str, list[float]] = {name: [] for name in PARTS}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time a block, which a kill ends; one that ends before the moment lives, and the next one is tried."""
        ended, begun = threading.Event(), time.monotonic()
        if part == self.part:
            threading.Thread(
                target=self._die, args=(ended, self.draw.uniform(0, self.usual[part])), daemon=True
            ).start()
        try:
            yield
        finally:
            ended.set()
            self.seconds[part].append(time.monotonic() - begun)

    def _die(self, ended: threading.Event, seconds: float) -> None:
        if not ended.wait(seconds):
            with open(self.root / "journal", "a", encoding="utf-8") as journal:
                journal.write(f"{self.part}\n")
            os.kill(os.getpid(), signal.SIGKILL)


def train(rank: int, count: int, folder: str, name: str, part: str = "", seed: int = 0) -> dict[str, Tensor]:
    """Train on shards to the end, from the last checkpoint if there is one; a rank that is drawn dies in a part."""
    draw, root = random.Random(seed), Path(folder)
    parts = Parts(root, part if rank == draw.randrange(count) else "", draw)
    if any(root.glob("run/version-*")):
        cascade = fsdp.shard(lx.load(root / "run", sharding.blocks(), args=(sharding.example(),)))
        optimizer = sharding.optimizer_of(cascade)
        done = cascade.resume(optimizer)["steps"]
    else:
        cascade, done = fsdp.shard(sharding.adapted(name)), 0
        optimizer = sharding.optimizer_of(cascade)
    while done < UNTIL:
        with parts("step"):
            sharding.step(cascade, optimizer, done, (rank, count))
        done += 1
        if sharding.ends_stage(done):
            with parts("transition"):
                cascade.transition(optimizer)
        with parts("save"):
            lx.save(cascade, root / "run", optimizer=optimizer, extra={"steps": done})
    if rank == 0 and done == UNTIL and all(parts.seconds.values()):
        (root / SECONDS).write_text(
            json.dumps({name: sorted(all_)[len(all_) // 2] for name, all_ in parts.seconds.items()})
        )
    return sharding.values(cascade)


def main(folder: str, name: str, kills: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    part = PARTS[restart % len(PARTS)] if restart < kills else ""
    found = train(dist.get_rank(), dist.get_world_size(), folder, name, part, restart)
    if dist.get_rank() == 0:
        save_file({key: value.contiguous() for key, value in found.items()}, Path(folder) / "result.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
