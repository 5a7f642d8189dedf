"""What a stage transition costs, beside the plain streaming of its bytes: `python -m benchmarks.transitions`.

Streaming is a copy of each W0 into a tensor like its weight, and of the factors: what has to be read and written at
least. The floor by operations is one `addmm` a site from W0 and all of its experts, as plain torch has it. Both are
timed beside each transition, in the same run, over the cascade's own tensors.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.state import WeightState

__all__ = ["Seconds", "product_seconds", "streaming_seconds", "transition_seconds"]

STAGES = 5


@dataclass(frozen=True)
class Seconds:
    """CPU and wall time of one run."""

    cpu: float
    wall: float


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def timed(run: Callable[[], object]) -> Seconds:
    """Return the seconds of one call; no garbage is collected within it."""
    gc.collect()
    gc.disable()
    try:
        synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        synchronize()
        return Seconds(time.process_time() - cpu, time.perf_counter() - wall)
    finally:
        gc.enable()


def least(run: Callable[[], object], rounds: int) -> Seconds:
    """Return the smallest seconds of some calls, after one that warms up."""
    run()
    found = [timed(run) for _ in range(rounds)]
    return Seconds(min(each.cpu for each in found), min(each.wall for each in found))


def streaming_seconds(cascade: lx.Cascade, rounds: int = 5) -> Seconds:
    """Return the seconds of reading W0 and the factors of every site, and of writing as many bytes as the weight has.

    The least of some rounds; tensors that are written to exist before.
    """
    pairs = [(weight, torch.empty_like(weight)) for weight in _read(cascade)]

    def run() -> None:
        for source, target in pairs:
            target.copy_(source)

    return least(run, rounds)


def product_seconds(cascade: lx.Cascade, rounds: int = 5) -> Seconds:
    """Return the seconds of `W0 + b a` over all experts, site by site, written to tensors like the weights.

    In fp32 (fp64 for fp64) and by one `addmm`; a narrower weight is copied up before and down after.
    """
    work = [_product(state) for state in cascade._run.slow.states.values()]

    def run() -> None:
        for each in work:
            each()

    return least(run, rounds)


def transition_seconds(cascade: lx.Cascade, optimizer: torch.optim.Optimizer) -> Seconds:
    """Return the seconds of one transition; the cascade is in its next stage then."""
    return timed(lambda: cascade.transition(optimizer))


def train(cascade: lx.Cascade, optimizer: torch.optim.Optimizer) -> None:
    """Give the branches numbers, and the optimizer state for them, as a step does."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _read(cascade: lx.Cascade) -> list[torch.Tensor]:
    states = cascade._run.slow.states.values()
    factors = [factor for state in states for expert in state.experts for factor in (expert.b, expert.a)]
    return [*(state.base for state in states), *factors]


def _product(state: WeightState) -> Callable[[], object]:
    dtype = torch.float64 if state.base.dtype == torch.float64 else torch.float32
    base, target = state.base.reshape(state.matrix), torch.empty(state.matrix, dtype=state.base.dtype)
    if not state.experts:
        return lambda: target.copy_(base)
    b = torch.cat([expert.b for expert in state.experts], -1).to(dtype)
    a = torch.cat([expert.a for expert in state.experts], -2).to(dtype)
    product = torch.baddbmm if state.stacked else torch.addmm
    if base.dtype == dtype:
        return lambda: product(base, b, a, out=target)
    return lambda: target.copy_(product(base.to(dtype), b, a))


def _vit() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    import timm

    return timm.create_model("vit_small_patch16_224"), {"x": torch.randn(2, 3, 224, 224)}


def _bert() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    import transformers

    return transformers.BertModel(transformers.BertConfig()), {"input_ids": torch.randint(1000, 20000, (2, 16))}


MODELS = {"ViT-S": _vit, "BERT-base": _bert}


def stages(name: str, dtype: torch.dtype, rank: int, noise: float) -> list[tuple[Seconds, Seconds, Seconds]]:
    """Return, by stage, the seconds of a transition, of streaming, and of the product."""
    model, inputs = MODELS[name]()
    inputs = {key: each.to(dtype) if each.is_floating_point() else each for key, each in inputs.items()}
    spec = lx.CascadeSpec(targets=("linear",), rank=rank, noise=lx.Noise(noise))
    cascade = lx.adapt(model.to(dtype).eval(), kwargs=inputs, spec=spec)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-3))
    rows = []
    for _ in range(STAGES):
        train(cascade, optimizer)
        seconds = transition_seconds(cascade, optimizer)
        rows.append((seconds, streaming_seconds(cascade), product_seconds(cascade)))
    return rows


def main() -> None:
    """Print the table: the least of some cascades, by stage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transitions", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*MODELS, []], help="models; all of them by default")
    parser.add_argument("--rounds", type=int, default=3, help="cascades of each model and dtype")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--noise", type=float, default=0.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"milliseconds of CPU; rank {options.rank}, noise {options.noise}, {options.threads} thread(s)\n")
    print("| model | dtype | stage | transition | streaming | product | / streaming | / product |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.names or MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            runs = [stages(name, dtype, options.rank, options.noise) for _ in range(options.rounds)]
            for stage, found in enumerate(zip(*runs, strict=True), start=1):
                ours, streaming, product = (1e3 * min(each[kind].cpu for each in found) for kind in range(3))
                ratios = [statistics.median(each[0].cpu / each[kind].cpu for each in found) for kind in (1, 2)]
                cells = f"{ours:.1f} | {streaming:.1f} | {product:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f}"
                print(f"| {name} | {str(dtype).removeprefix('torch.')} | {stage} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
