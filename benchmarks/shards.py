"""Memory of a rank whose model no process holds whole: `python -m benchmarks.shards [--write]`.

A network is written to safetensors files block by block, adapted on the meta device, sharded by FSDP2 over processes
that talk by gloo, and materialized from the files; then it trains for a step and ends a stage. Each process samples its
own anonymous memory every 2 ms (RssAnon of /proc/self/status; pages of mapped files are the system's and not counted).
Linux only. --write writes benchmarks/shards.json, of which `python -m benchmarks.scale --write` makes a table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor, nn

import lorasc_fx as lx

__all__ = ["RESULTS", "Result", "Size", "measure", "table"]

RESULTS = Path(__file__).with_name("shards.json")


@dataclass(frozen=True)
class Size:
    """A stack of blocks `x + down(gelu(up(x)))` in fp32, each a unit.

    Args:
        blocks: their number.
        width, inner: features outside and inside a block.
    """

    blocks: int = 16
    width: int = 2048
    inner: int = 8192

    @property
    def unit(self) -> int:
        """Bytes of a block."""
        return 4 * (2 * self.width * self.inner + self.width + self.inner)

    @property
    def model(self) -> int:
        """Bytes of the model."""
        return self.blocks * self.unit

    def build(self) -> nn.Module:
        """Return the network."""
        return nn.Sequential(*(_Block(self.width, self.inner) for _ in range(self.blocks)))

    def write(self, folder: Path) -> None:
        """Write its files, one a block, with their index."""
        places = {}
        for index in range(self.blocks):
            torch.manual_seed(index)
            tensors = {f"{index}.{name}": value for name, value in _Block(self.width, self.inner).state_dict().items()}
            save_file(tensors, folder / f"model-{index:05d}.safetensors")
            places |= dict.fromkeys(tensors, f"model-{index:05d}.safetensors")
        text = json.dumps({"metadata": {}, "weight_map": places})
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


class _Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return out


@dataclass(frozen=True)
class Result:
    """Bytes of the rank that has most of them.

    Args:
        ranks: number of processes.
        base: the argument of `adapt`: what keeps W0.
        held: parameters, W0 and branches of a rank, once it is materialized.
        materialize, step, transition: the most above what the process had before `adapt`, at each.
    """

    ranks: int
    base: str
    held: int
    materialize: int
    step: int
    transition: int


def measure(size: Size, ranks: int, base: str, files: Path) -> Result:
    """Return what the ranks measure.

    Args:
        size: of the network, whose files are there.
        ranks: number of processes.
        base: "memory" or "file".
        files: the folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (ranks, size, base, str(files), folder), nprocs=ranks, start_method="spawn")
        found = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    return Result(ranks, base, **{name: max(each[name] for each in found) for name in found[0]})


def _rank(rank: int, ranks: int, size: Size, base: str, files: str, folder: str) -> None:
    torch.set_num_threads(1)
    logging.getLogger("lorasc_fx").setLevel(logging.ERROR)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    x = torch.randn(4, size.width, generator=torch.Generator().manual_seed(rank))
    spec = lx.CascadeSpec(rank=8, pace=0.5, noise=lx.Noise(0.1))
    lx.adapt(
        nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), args=(torch.randn(2, 4),), spec=spec
    )  # imports its libraries
    with torch.device("meta"):
        model = size.build()
    before, found = _anonymous(), {}
    with _most(before, found, "materialize"):
        cascade = lx.adapt(model, args=(x,), spec=spec, base=base)
        lx.parallel.fsdp.shard(cascade)
        lx.materialize(cascade, files)
    found["held"] = _anonymous() - before
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-3))
    with _most(before, found, "step"):
        cascade(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with _most(before, found, "transition"):
        cascade.transition(optimizer)
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def _most(before: int, found: dict[str, int], name: str) -> Iterator[None]:
    """Note the largest anonymous memory of the process in a block."""
    done, seen = threading.Event(), [_anonymous()]

    def sample() -> None:
        while not done.is_set():
            seen.append(_anonymous())
            time.sleep(0.002)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        found[name] = max(seen) - before


def _anonymous() -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        line = next(line for line in file if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])


def table(results: dict[str, Any]) -> list[str]:
    """Return the table of benchmarks/scale.md, with what it says of itself."""
    size = Size(**results["size"])
    lines = [
        "## A model that no process holds whole",
        "",
        "`python -m benchmarks.shards --write`, and then the command above: built on the meta device, adapted, sharded",
        "by `fsdp.shard` and then materialized from its files (`lx.materialize`); then a step, and the end of a stage",
        f"with noise. {size.blocks} blocks in fp32, {_mb(size.model)} MB together; a unit is a block of",
        f"{_mb(size.unit)} MB. Processes on one CPU by gloo, where parameters and W0 lie in one memory. MB are 10^6",
        "bytes, of the rank that has most, above what it had before `adapt`; mapped files are not counted.",
        "",
        "| ranks | W0 in | shard of the parameters | held after materialize | most in materialize | in a step"
        " | at a transition |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for entry in results["results"]:
        result = Result(**entry)
        cells = [size.model / result.ranks, result.held, result.materialize, result.step, result.transition]
        lines.append(f"| {result.ranks} | {result.base} | " + " | ".join(map(_mb, cells)) + " |")
    return [
        *lines,
        "",
        "What a step takes besides is FSDP2's: a gathered block, the buffer that it comes in, and the block that is",
        "gathered meanwhile.",
    ]


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and write the results if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shards", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--blocks", type=int, default=Size.blocks)
    options = parser.parse_args(arguments)
    size = Size(options.blocks)
    with tempfile.TemporaryDirectory() as folder:
        size.write(Path(folder))
        found = [measure(size, count, base, Path(folder)) for count in options.ranks for base in ("memory", "file")]
    results = {"size": asdict(size), "results": [asdict(each) for each in found]}
    print("\n".join(table(results)))
    if options.write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
