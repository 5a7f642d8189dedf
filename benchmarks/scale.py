"""Memory and traffic of large models on 8 to 512 ranks: `python -m benchmarks.scale [--write]`.

The models are built on the meta device, and so are their branches: shapes are counted, nothing is run. --write writes
benchmarks/scale.md, with what `benchmarks.shards` has measured. The lines of a layer are those of every layer, so that
two layers are adapted, and all are counted.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import lorasc_fx as lx

from .fake_ranks import RESULTS as FAKE_RANKS
from .fake_ranks import table as fake_ranks_table
from .kills import RESULTS as KILLS
from .kills import table as kills_table
from .shards import RESULTS, table

PAGE = Path(__file__).with_name("scale.md")
RANK, TOKENS = 16, 4096
SPEC = lx.CascadeSpec(targets=("*.self_attn.*", "*.mlp.*"), rank=RANK, noise=lx.Noise(0.1), placement="beside")
LAYER = re.compile(r"\.layers\.\d+\.")
WEIGHT, FACTOR = 2, 4
"""Bytes of an entry: bf16 weights, activations and their gradients; fp32 factors, as narrower weights have them."""
STATES = 2
"""Numbers that AdamW keeps of each entry that trains."""
STAGES = 4
"""Stages that have ended where a checkpoint is counted: the factors of each are in it."""
NETWORK, HOST, FILES, DRAWS = 50e9, 25e9, 2e9, 10e9
"""What a rank does in a second, assumed: bytes that it sends (400 Gbit/s), copies from host to device, and writes to
files; and entries of noise that its device computes, at some 200 bytes an entry in its own memory (2 TB/s).
"""


@dataclass(frozen=True)
class Llama:
    """Sizes of a llama, as its configuration names them."""

    hidden_size: int = 8192
    intermediate_size: int = 28672
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    vocab_size: int = 128256

    def on_meta(self, layers: int) -> PreTrainedModel:
        """Return it with so many layers, without memory."""
        sizes = {**vars(self), "num_hidden_layers": layers, "pad_token_id": 0, "tie_word_embeddings": False}
        with torch.device("meta"):
            return self.built(sizes).to(torch.bfloat16)

    def built(self, sizes: dict[str, Any]) -> PreTrainedModel:
        """Return the model of a configuration."""
        return LlamaForCausalLM(LlamaConfig(**sizes))


@dataclass(frozen=True)
class Mixtral(Llama):
    """Sizes of a mixture of experts; by default those of Mixtral 8x22B."""

    hidden_size: int = 6144
    intermediate_size: int = 16384
    num_hidden_layers: int = 56
    num_attention_heads: int = 48
    vocab_size: int = 32768
    num_local_experts: int = 8

    def built(self, sizes: dict[str, Any]) -> PreTrainedModel:
        """Return the model of a configuration."""
        return MixtralForCausalLM(MixtralConfig(**sizes))


LARGEST = Llama(16384, 53248, 126, 128, 8, 128256)
"""Sizes of Llama 3.1 405B."""


@dataclass(frozen=True)
class Weight:
    """A parameter: its name, shape, and the rank of its branch, 0 without one."""

    name: str
    shape: tuple[int, ...]
    rank: int

    @property
    def entries(self) -> int:
        return math.prod(self.shape)

    @property
    def factors(self) -> tuple[int, int]:
        """Entries of lora_A and lora_B."""
        if not self.rank:
            return (0, 0)
        *experts, rows, columns = self.shape
        return self.rank * math.prod(experts) * columns, self.rank * math.prod(experts) * rows

    def drawn(self, ranks: int) -> int:
        """Entries of noise of the largest shard."""
        total = self.shape[0 if len(self.shape) < 3 or self.shape[0] % ranks == 0 else 1]
        return self.entries // total * -(-total // ranks)

    @property
    def leaf(self) -> str:
        """Name of the module that holds it."""
        return self.name.split(".")[-2]

    @property
    def block(self) -> str:
        """The layer that it belongs to, "" for those of none."""
        found = LAYER.search(self.name)
        return found[0] if found else ""

    @property
    def unit(self) -> str:
        """What FSDP2 gathers it with: its layer, or alone a matrix of none; "" for the root, which has the rest."""
        return self.block or (self.name if len(self.shape) > 1 else "")


def weights_of(llama: Llama, rank: int = RANK) -> list[Weight]:
    """Return every parameter of the model, those of the layers' linears with a branch as lorasc_fx makes it."""
    ids = torch.zeros(1, 8, dtype=torch.long)
    cascade = lx.adapt(llama.on_meta(2), kwargs={"input_ids": ids}, spec=replace(SPEC, rank=rank))
    ranks = {LAYER.sub(".layers.N.", site.weight): site.rank for site in cascade.sites}
    return [
        Weight(name, tuple(value.shape), ranks.get(LAYER.sub(".layers.N.", name), 0))
        for name, value in llama.on_meta(llama.num_hidden_layers).named_parameters()
    ]


@dataclass(frozen=True)
class Figures:
    """Bytes of one rank.

    Args:
        base, factors, gradients, optimizer: that lie on the device all the time.
        gathered: whole weights that lie there for a while.
        host: W0 of the sites, in host memory.
        forward, backward, transition: sent by the rank.
    """

    base: float
    factors: float
    gradients: float
    optimizer: float
    gathered: float
    host: float
    forward: float
    backward: float
    transition: float

    @property
    def trained(self) -> float:
        return self.factors + self.gradients + self.optimizer

    @property
    def device(self) -> float:
        return self.base + self.trained + self.gathered


def fsdp2(weights: Iterable[Weight], ranks: int, replicas: int = 1) -> Figures:
    """Return the figures of `fully_shard`, a unit a layer, one for each matrix of none, and the root.

    With replicas, `ranks` hold the weights once, and gradients of what is here are summed over the replicas (HSDP).

    A gather of n bytes sends n (N-1)/N by each rank, and so does a reduce-scatter. Units are gathered in forward and in
    backward, one while the next one comes. At a transition every lora_A is gathered, for B has its rows in parts and A
    is needed whole, except where both are cut by experts; and a site has a few sums of 8 bytes.
    """
    weights = list(weights)
    share = (ranks - 1) / ranks
    base = sum(weight.entries for weight in weights)
    first = sum(weight.factors[0] for weight in weights if len(weight.shape) < 3 or weight.shape[0] % ranks)
    trained = sum(sum(weight.factors) for weight in weights)
    units: dict[str, float] = {}
    for weight in weights:
        units[weight.unit] = units.get(weight.unit, 0) + WEIGHT * weight.entries + FACTOR * sum(weight.factors)
    sizes = list({**units, "": 0.0}.values())  # in the order of the model, without the root
    sites = [weight for weight in weights if weight.rank]
    return Figures(
        base=WEIGHT * base / ranks,
        factors=FACTOR * trained / ranks,
        gradients=FACTOR * trained / ranks,
        optimizer=STATES * FACTOR * trained / ranks,
        gathered=units[""] + max(one + other for one, other in pairwise(sizes)),
        host=WEIGHT * sum(site.entries for site in sites) / ranks,
        forward=share * sum(units.values()),
        backward=share * (sum(units.values()) + FACTOR * trained)
        + 2 * (replicas - 1) / replicas * FACTOR * trained / ranks,
        transition=share * FACTOR * first + sums(len(sites), ranks * replicas),
    )


def sums(sites: int, ranks: int) -> float:
    """Return what the sums of a transition send, six of 8 bytes a site: three for the noise, and three decisions."""
    return 2 * (ranks - 1) / ranks * sites * 6 * 8


@dataclass(frozen=True)
class Layout:
    """A model on ranks: so many hold the weights once, in so many replicas."""

    model: Llama
    title: str
    ranks: int
    replicas: int = 1

    @property
    def column(self) -> str:
        """Head of its column."""
        how = f"HSDP {self.replicas} x {self.ranks}" if self.replicas > 1 else f"FSDP2, {self.ranks}"
        return f"{self.title}, {how}"


LARGER = (
    Layout(LARGEST, "405B", 64), Layout(LARGEST, "405B", 64, 8),
    Layout(Mixtral(), "8x22B", 8), Layout(Mixtral(), "8x22B", 64), Layout(Mixtral(), "8x22B", 8, 64),
)  # fmt: skip


def larger(layouts: Iterable[Layout] = LARGER) -> list[str]:
    """Return the lines of the tables of larger models."""
    layouts = list(layouts)
    every = {layout.model: weights_of(layout.model) for layout in layouts}
    figures = [fsdp2(every[layout.model], layout.ranks, layout.replicas) for layout in layouts]
    pairs = zip(layouts, figures, strict=True)
    moves = [Moves.of(every[layout.model], found, layout.ranks) for layout, found in pairs]
    sizes = "; ".join(
        f"{layout.title}: {sum(weight.entries for weight in every[layout.model]):,} parameters, "
        f"{sum(sum(weight.factors) for weight in every[layout.model]):,} train"
        for layout in {layout.title: layout for layout in layouts}.values()
    )
    head = ["| | " + " | ".join(layout.column for layout in layouts) + " |", "| --- |" + " ---: |" * len(layouts)]
    held = {
        "weights, bf16": "base",
        "factors, gradients, AdamW": "trained",
        "gathered for a while": "gathered",
        "**together on the device**": "device",
        "host: W0 of the sites": "host",
        "**sent in a forward**": "forward",
        "**sent in a backward**": "backward",
        "**sent at a transition**": "transition",
    }
    moved = {
        "copied from host to device at a transition": "copied",
        "**time of a transition without noise**": "transition",
        "time to draw noise": "drawing",
        "sent by peft + FSDP2 to merge": "merge",
        "its time": "merging",
        f"a rank's part of a checkpoint after {STAGES} stages": "written",
        "**its time**": "checkpoint",
        "that of peft + FSDP2": "adapter",
        "time of that": "writing",
    }
    return [
        "## Larger models",
        "",
        "Counted as above, for models like Llama 3.1 405B and Mixtral 8x22B, whose router, attention and stacked",
        f"experts are sites (rank {RANK} of each expert). {sizes}.",
        "HSDP R x N: N ranks hold the weights once, in R replicas, over which the gradients of a shard are summed.",
        "On 8 ranks each holds whole experts; 64 cut them by the axis after.",
        "",
        *head,
        *(
            f"| {told} | " + " | ".join(_told(getattr(one, name)) for one in figures) + " |"
            for told, name in held.items()
        ),
        "",
        "Times are bytes over bandwidths that are assumed: "
        f"a rank sends {NETWORK / 1e9:.0f} GB/s, copies {HOST / 1e9:.0f} GB/s",
        f"from host to device, and writes {FILES / 1e9:.0f} GB/s to files. Computing and latencies are not counted.",
        "At a transition a rank copies its W0 to the device and writes W there. peft merges whole weights, which FSDP2",
        "gathers with the factors. A checkpoint holds the running factors, AdamW's states, and the factors of each",
        "stage that has ended; that of peft, the adapter and AdamW's states, sharded.",
        f"The device of each rank computes the noise of its shards, {DRAWS / 1e9:.0f} billion entries a second",
        "with the traffic of its own memory.",
        "",
        *head,
        *(f"| {told} | " + " | ".join(one.text(name) for one in moves) + " |" for told, name in moved.items()),
        "",
    ]


@dataclass(frozen=True)
class Moves:
    """Bytes that a rank moves at a transition and for a checkpoint, and what peft on FSDP2 would move.

    Args:
        sent, copied: at a transition, to other ranks and from host to device.
        drawn: entries of noise.
        merge: sent where peft merges.
        written, adapter: of a checkpoint, here and of peft.
    """

    sent: float
    copied: float
    drawn: float
    merge: float
    written: float
    adapter: float

    @classmethod
    def of(cls, weights: Iterable[Weight], figures: Figures, ranks: int) -> Moves:
        """Return them."""
        weights = list(weights)
        sites = sum(weight.entries for weight in weights if weight.rank)
        factors = FACTOR * sum(sum(weight.factors) for weight in weights)
        return cls(
            sent=figures.transition,
            copied=figures.host,
            drawn=sum(weight.drawn(ranks) for weight in weights if weight.rank),
            merge=(ranks - 1) / ranks * (WEIGHT * sites + factors),
            written=(1 + STATES + STAGES) * factors / ranks,
            adapter=(1 + STATES) * factors / ranks,
        )

    @property
    def seconds(self) -> dict[str, float]:
        """Times by name."""
        return {
            "transition": self.sent / NETWORK + self.copied / HOST,
            "drawing": self.drawn / DRAWS,
            "merging": self.merge / NETWORK,
            "checkpoint": self.written / FILES,
            "writing": self.adapter / FILES,
        }

    def text(self, name: str) -> str:
        """Return bytes or a time."""
        seconds = self.seconds.get(name)
        if seconds is None:
            return _told(getattr(self, name))
        return f"{seconds:.2f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def page(llama: Llama, ranks: Iterable[int] = (8, 64)) -> str:
    """Return benchmarks/scale.md."""
    weights = weights_of(llama)
    base, trained = sum(weight.entries for weight in weights), sum(sum(weight.factors) for weight in weights)
    columns = [(f"FSDP2, {count} ranks", fsdp2(weights, count)) for count in ranks]
    rows = [
        ("weights, bf16", "base"), ("lora_A and lora_B, fp32", "factors"), ("their gradients", "gradients"),
        ("AdamW's states", "optimizer"), ("gathered for a while", "gathered"), ("**together on the device**", "device"),
        ("host: W0 of the sites", "host"), ("**sent in a forward**", "forward"), ("**sent in a backward**", "backward"),
        ("**sent at a transition**", "transition"),
    ]  # fmt: skip
    lines = [
        "# Scale",
        "",
        "`python -m benchmarks.scale --write` writes this page. The first part is of a model on the meta device:",
        "shapes are counted, nothing is run.",
        f"A llama of {base:,} parameters ({llama.num_hidden_layers} layers, {llama.hidden_size} wide,",
        f"{llama.intermediate_size} in between, {llama.num_attention_heads} heads, {llama.num_key_value_heads} of keys",
        f"and values, {llama.vocab_size} tokens), rank {RANK} on every linear of the layers: {trained:,} entries train",
        f"({100 * trained / base:.2f} %). Bytes of one rank, GB of 10^9; a step of {TOKENS} tokens.",
        "",
        "| | " + " | ".join(name for name, _ in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    lines += [
        f"| {told} | " + " | ".join(_told(getattr(figures, field)) for _, figures in columns) + " |"
        for told, field in rows
    ]
    lines += [
        "",
        "Activations are not counted: they are those of the frozen model and of the branches' inputs.",
        'With `base="file"` W0 is mapped from the files of the model, and needs no host memory.',
        "",
        "FSDP2: each layer is a unit, and so are the embedding and the head. A gather of n bytes sends n (N-1)/N by",
        "each rank, and so does the reduce-scatter of gradients; frozen weights have none. Units are gathered in",
        "forward and again in backward, the next one while one computes. What is sent does not depend on the tokens.",
        "FSDP2 cuts rows and pads them; lora_A, of fewer rows than ranks, is cut by its inputs.",
        "",
        "A transition moves no weight: W0, B and S lie in the same parts, noise is drawn for the shard alone,",
        "and standard deviations and decisions are six sums of 8 bytes a site. FSDP2 gathers each lora_A once, as",
        "rows of S need it whole.",
        "",
        *fake_ranks_table(json.loads(FAKE_RANKS.read_text(encoding="utf-8"))),
        "",
        *larger(),
        *table(json.loads(RESULTS.read_text(encoding="utf-8"))),
        "",
        *kills_table(json.loads(KILLS.read_text(encoding="utf-8"))),
        "",
        "What shards refuse, with the reasons, is a table in [Devices](../docs/devices.md#fsdp2).",
    ]
    return "\n".join(lines) + "\n"


def _told(size: float) -> str:
    """Return bytes as GB, or as MB or kB where they are few."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= 0.1 * unit:
            return f"{size / unit:.1f} {name}" if size < 100 * unit else f"{size / unit:,.0f} {name}"
    return "0"


def main(arguments: list[str] | None = None) -> None:
    """Print the page, and write it if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args(arguments)
    logging.getLogger("lorasc_fx").setLevel(logging.ERROR)
    text = page(Llama())
    print(text, end="")
    if options.write:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
