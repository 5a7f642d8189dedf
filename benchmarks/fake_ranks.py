"""A step and a transition of the 70B model as one rank of 64: `python -m benchmarks.fake_ranks [--write]`.

The model is built, adapted and sharded by FSDP2 on the meta device, in torch's `fake` process group, whose other ranks
do nothing. The shards of rank 0 are then read from files in which only its rows are written; the rest are holes.
Forward and backward run under FakeTensorMode: weights that are gathered, activations and gradients have shapes and no
memory. The optimizer's step, on gradients of ones, and the transition run on the shards themselves. --write writes
benchmarks/fake_ranks.json, of which `python -m benchmarks.scale --write` makes a table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import lorasc_fx as lx
from lorasc_fx.parallel import fsdp

__all__ = ["RESULTS", "Sent", "fake_ranks", "first_rows", "sharded", "step", "table", "write_files"]

RESULTS = Path(__file__).with_name("fake_ranks.json")
PARTS = ("forward", "backward", "AdamW's step", "transition")
GATHERS, SCATTERS, SUMS = (
    ("_allgather_base_", "all_gather_into_tensor"),
    ("_reduce_scatter_base_",),
    ("allreduce_", "all_reduce"),
)
"""Ops of an all-gather, of a reduce-scatter and of an all-reduce."""


class Sent(TorchDispatchMode):
    """Counts collectives by kind, and the bytes that a rank sends by them: a ring of all ranks.

    Raises:
        AssertionError: there is a collective of another kind.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.bytes, self.seen = ranks, 0.0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        name = func.__name__.partition(".")[0]
        share = (self.ranks - 1) / self.ranks
        if "c10d" in func.namespace and name in (*SUMS, "all_gather_into_tensor"):
            given = args[0] if isinstance(args[0], Tensor) else args[0][0]
            size = given.numel() * given.element_size()
            self.bytes += 2 * share * size if "reduce" in name else share * size * self.ranks
            self.seen[name] += 1
        elif "c10d" in func.namespace and name in ("_allgather_base_", *SCATTERS):
            self.bytes += share * max(each.numel() * each.element_size() for each in args[:2])
            self.seen[name] += 1
        elif "c10d" in func.namespace and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            raise AssertionError(f"{func} is another collective than FSDP2 and transitions make")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """Be rank 0 of a group whose others do nothing: what it gathers is its own shard for each of them."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def first_rows(name: str, shape: Iterable[int], ranks: int) -> Tensor:
    """Return the rows of a weight that rank 0 has, in bf16: N(0, 0.02^2), by the weight's name."""
    rows, *rest = shape
    source = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(math.ceil(rows / ranks), *rest, generator=source).mul_(0.02).bfloat16()


def write_files(model: nn.Module, ranks: int, folder: Path) -> None:
    """Write the files of a model in bf16, one a tensor, with their index; what other ranks read of them are holes."""
    places = {}
    for number, (name, value) in enumerate(model.state_dict().items()):
        places[name] = f"model-{number:05d}.safetensors"
        entry = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [0, 2 * value.numel()]}
        head = json.dumps({name: entry}).encode()
        with (folder / places[name]).open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.write(first_rows(name, value.shape, ranks).view(torch.uint8).numpy().tobytes())
            file.truncate(8 + len(head) + 2 * value.numel())
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def sharded(model: nn.Module, ids: Tensor, spec: lx.CascadeSpec, folder: Path) -> lx.Cascade:
    """Return the cascade of a model on the meta device, sharded there, with the shards of this rank."""
    buffers = {name: torch.ones(value.shape, dtype=value.dtype) for name, value in model.named_buffers()}
    write_files(model, dist.get_world_size(), folder)
    cascade = fsdp.shard(lx.adapt(model, kwargs={"input_ids": ids}, spec=spec))
    return lx.materialize(cascade, folder, buffers=buffers)


def step(cascade: lx.Cascade, optimizer: torch.optim.Optimizer, ids: Tensor) -> dict[str, Sent]:
    """Train for a step; return what each part of it sends.

    Raises:
        AssertionError: a factor has no gradient, or one that is not cut as the factor is.
    """
    found = {name: Sent(dist.get_world_size()) for name in PARTS[:3]}
    with FakeTensorMode(allow_non_fake_inputs=True):
        with found["forward"]:
            logits = cascade(input_ids=ids).logits
        with found["backward"]:
            logits.float().sum().backward()
    for name, factor in cascade.branches.named_parameters():
        gradient: Any = factor.grad
        assert (gradient.shape, gradient.dtype) == (factor.shape, factor.dtype), name
        assert gradient.placements == factor.placements, name
        assert gradient.to_local().shape == factor.to_local().shape, name
        factor.grad = torch.ones_like(factor)  # of which the shard has numbers
    with found["AdamW's step"]:
        optimizer.step()
        optimizer.zero_grad()
    return found


def measure(model: nn.Module, ranks: int, tokens: int, spec: lx.CascadeSpec) -> dict[str, Any]:
    """Return the collectives of a step and a transition by kind, and the bytes that a rank sends."""
    with tempfile.TemporaryDirectory() as folder, fake_ranks(ranks):
        ids = torch.zeros(1, tokens, dtype=torch.long)
        cascade = sharded(model, ids, spec, Path(folder))
        optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-3))
        found = step(cascade, optimizer, ids)
        with Sent(ranks) as found["transition"]:
            cascade.transition(optimizer)
    counts = {name: {"seen": dict(sent.seen), "bytes": sent.bytes} for name, sent in found.items()}
    return {"layers": len(model.model.layers), "ranks": ranks, "tokens": tokens, **counts}  # type: ignore[union-attr, arg-type]


def table(results: dict[str, Any]) -> list[str]:
    """Return the table of benchmarks/scale.md, with what it says of itself."""
    kinds = {"all-gathers": GATHERS, "reduce-scatters": SCATTERS, "all-reduces": SUMS}
    lines = [
        "## A step as one rank of 64",
        "",
        "`python -m benchmarks.fake_ranks --write`, and then the command above: the collectives that the 70B model",
        f"({results['layers']} layers, a step of {results['tokens']} tokens) makes under FSDP2 as rank 0 of "
        f"{results['ranks']}, in torch's `fake` process",
        "group, whose other ranks do nothing. It is adapted and sharded on the meta device. Forward and backward run",
        "on fake tensors, of shapes alone; AdamW's step, on gradients of ones, and the transition on the shards of the",
        "rank. Bytes are sent by the rank: those of the formulas above; a transition has four sums more.",
        "",
        f"| | {' | '.join(kinds)} | sent |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for part in PARTS:
        seen = results[part]["seen"]
        counts = " | ".join(f"{sum(seen.get(name, 0) for name in names):,}" for names in kinds.values())
        lines.append(f"| {part} | {counts} | {results[part]['bytes']:,.0f} B |")
    return [
        *lines,
        "",
        "A unit (a layer, the embedding, the head, the root) is gathered once in forward and once in backward; those",
        "that train have one reduce-scatter. A transition gathers the lora_A of each site, and no weight.",
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and write the results if asked to."""
    from .scale import SPEC, Llama  # which makes a page of the results

    parser = argparse.ArgumentParser(prog="python -m benchmarks.fake_ranks", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--layers", type=int, default=Llama.num_hidden_layers)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args(arguments)
    logging.getLogger("lorasc_fx").setLevel(logging.ERROR)
    results = measure(Llama().on_meta(options.layers), options.ranks, options.tokens, SPEC)
    print("\n".join(table(results)))
    if options.write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
