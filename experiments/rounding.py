"""`python -m experiments.rounding [run | page | steps]`: what folds into few bits lose (docs/quantized.md).

First, the weights of SmolLM2-135M are rounded to a grid. Then an adapter of the last layers is trained in fp32, in four
ways: it is never merged; it is merged once; it is merged after each of three stages, and the next stage trains a new
adapter on the rounded weights; or it is trained on the grid.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorasc_fx as lx
from experiments.evidence.methods import METHODS, Method
from experiments.evidence.runs import PROTOCOL
from experiments.evidence.tasks import IGNORED, TASKS, Task, measure
from experiments.evidence.train import train

RESULTS, PAGE = Path(__file__).with_name("rounding.jsonl"), Path(__file__).parents[1] / "docs" / "quantized.md"
NAMES, RATES, SEEDS = ("extract", "tweets"), (0.00125, 0.0025, 0.005), (0, 1, 2)
START, END = "<!-- rounding -->", "<!-- end of rounding -->"


def int4(weight: Tensor) -> Tensor:
    """Round to 15 values, scaled for each group of 32 inputs."""
    groups = weight.reshape(-1, 32)
    scale = groups.abs().amax(1, keepdim=True).clamp_min(1e-12) / 7
    return ((groups / scale).round() * scale).view(weight.shape)


def nvfp4(weight: Tensor) -> Tensor:
    """Round as torchao's NVFP4 does: 4-bit floating-point numbers in groups of 16, with scales in fp8."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    half = weight.to(torch.bfloat16)
    scale = per_tensor_amax_to_scale(half.abs().amax())
    return NVFP4Tensor.to_nvfp4(half, per_tensor_scale=scale).dequantize().to(weight.dtype)


GRIDS: dict[str, Callable[[Tensor], Tensor]] = {"bf16": lx.spec.GRIDS["bfloat16"], "int4": int4, "nvfp4": nvfp4}


def rounded(state: dict[str, Tensor], grid: str) -> dict[str, Tensor]:
    """Return the weights, and round all matrices except the head to a grid."""
    return {
        name: GRIDS[grid](value) if value.dim() == 2 and "head" not in name else value for name, value in state.items()
    }


def trained(task: Task, state: dict[str, Tensor], spec: dict[str, Any], rate: float, seed: int, steps: int) -> Any:
    """Train one stage of LoRA. Return the weights, and their metrics on the validation examples."""
    model = task.model()
    model.load_state_dict(state)
    training = tomllib.loads(PROTOCOL.read_text(encoding="utf-8"))["training"] | {"steps": steps}
    examples = task.pool.at(torch.randperm(len(task.pool), generator=torch.Generator().manual_seed(seed))[:200])
    method: Method = METHODS["lora"]
    method = Method(method.about, spec={"pace": 1.0, **spec})
    return train(task, examples, model.requires_grad_(True), method, training, rate, seed, {})


def run(name: str, seed: int, steps: int = 40) -> list[dict[str, Any]]:
    """Return the rows of a task and a seed: loss and exact match for each grid and each way of training."""
    torch.set_num_threads(1)
    task = TASKS[name]()
    start = {key: value.detach().clone() for key, value in task.model().state_dict().items()}
    tries = {rate: trained(task, start, {}, rate, 100, steps)[1]["loss"] for rate in RATES}
    rate = min(tries, key=lambda tried: tries[tried])

    def row(grid: str, way: str, state: dict[str, Tensor]) -> dict[str, Any]:
        model: nn.Module = task.model()
        model.load_state_dict(state)
        return {"task": name, "seed": seed, "rate": rate, "grid": grid, "way": way, **measure(model.eval(), task.test)}

    rows = [row("fp32", "start", start)]
    for grid, function in GRIDS.items():
        base = rounded(start, grid)
        apart, _ = trained(task, base, {}, rate, seed, steps)
        stages = base
        for number in range(3):
            stages = rounded(trained(task, stages, {}, rate, seed + 10 * number, steps // 3)[0], grid)
        on_grid, _ = trained(task, base, {"grid": function}, rate, seed, steps)
        rows += [row(grid, "start", base), row(grid, "unmerged", apart), row(grid, "merged once", rounded(apart, grid))]
        rows += [row(grid, "merged per stage", stages), row(grid, "trained on the grid", on_grid)]
    return rows


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table in Markdown. Its numbers are means over seeds."""
    import pandas as pd

    frame = pd.DataFrame(rows)
    table = frame.pivot_table(index=["grid", "way"], columns="task", values=["loss", "accuracy"], sort=False)
    yield "|grid|weights|" + "|".join(f"{name}: loss|exact" for name in NAMES) + "|"
    yield "|---|---|" + "---|---|" * len(NAMES)
    for (grid, way), means in table.iterrows():
        cells = "|".join(f"{means['loss', name]:.3f}|{means['accuracy', name]:.2f}" for name in NAMES)
        yield f"|{grid}|{way}|{cells}|"


class Plain(nn.Module):
    """A linear layer that trains LoRA through the rounding in plain torch, as axolotl does for NVFP4."""

    def __init__(self, linear: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with the rounded sum of the weight and its delta."""
        weight = self.linear.weight + 2.0 * self.b @ self.a
        weight = weight + (int4(weight) - weight).detach()
        return nn.functional.linear(x, weight, self.linear.bias)


def steps(rounds: int = 15) -> None:
    """Time alternate steps on the grid int4 by lorasc-fx and plain torch. Print median and quartiles of the ratio."""
    torch.set_num_threads(1)
    task = TASKS["extract"]()
    batch = task.pool.at(torch.arange(4))
    plain = task.model().requires_grad_(False)
    for parent in list(plain.layers.modules()):
        for leaf, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, leaf, Plain(layer))
    spec = lx.CascadeSpec(targets=("layers.*",), exclude=("*norm*",), rank=8, lora_alpha=16.0, grid=int4, pace=1.0)
    ours = lx.adapt(task.model(), args=batch.inputs, spec=spec)
    seconds: dict[nn.Module, list[float]] = {plain: [], ours: []}
    for _ in range(rounds + 2):
        for model, times in seconds.items():
            began = time.process_time()
            logits = model(*batch.inputs).flatten(0, -2)
            nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORED).backward()
            times.append(time.process_time() - began)
    ratios = sorted(adapted / eager for adapted, eager in zip(seconds[ours][2:], seconds[plain][2:], strict=True))
    count = len(ratios)
    print(f"{ratios[count // 2]:.2f} [{ratios[count // 4]:.2f}, {ratios[3 * count // 4]:.2f}] of plain torch")


def main(arguments: list[str]) -> int:
    """Make the runs and write the page, only write the page, or time steps."""
    if arguments == ["steps"]:
        steps()
        return 0
    if arguments == ["run"]:
        jobs = [(name, seed) for name in NAMES for seed in SEEDS]
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            tables = list(pool.map(run, *zip(*jobs, strict=True)))
        RESULTS.write_text("".join(f"{json.dumps(row)}\n" for rows in tables for row in rows), encoding="utf-8")
    rows = [json.loads(text) for text in RESULTS.read_text(encoding="utf-8").splitlines()]
    before, _, table = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = table.partition(END)
    PAGE.write_text(f"{before}{START}\n" + "\n".join(lines(rows)) + f"\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
