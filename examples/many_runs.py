"""Train several runs on one base at the same time: a sweep of learning rates in one pass over the data.

The base is in memory once. Each batch is repeated for each run and goes through the base in one call. Each run has its
own factors and optimizer. The results equal the results of separate runs.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lorasc_fx as lx

RATES = {"small": 1e-3, "medium": 1e-2, "large": 1e-1}


def build() -> nn.Module:
    """Return a base in fp64 with the same weights at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4)).double()


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return random inputs [16, 12] with their classes, by a random linear teacher."""
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    inputs = [torch.randn(16, 12, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(x, (x @ teacher).argmax(1)) for x in inputs]


def train_together(data: list[tuple[torch.Tensor, torch.Tensor]]) -> lx.AdapterBank:
    """Train one run per learning rate, all in one pass over the data."""
    bank = lx.AdapterBank(build(), args=(data[0][0],), targets=("linear",), max_rank=4)
    for name in RATES:
        bank.start(name, rank=4, lora_alpha=8.0, seed=3)
    optimizers = [torch.optim.AdamW(bank.parameters_of(name).values(), lr=lr) for name, lr in RATES.items()]
    for x, y in data:
        rows = [name for name in RATES for _ in x]
        outputs = bank(torch.cat([x] * len(RATES)), adapter=rows).chunk(len(RATES))
        sum(cross_entropy(output, y) for output in outputs).backward()  # each run gets gradients only from its rows
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return bank


def train_alone(data: list[tuple[torch.Tensor, torch.Tensor]], lr: float) -> lx.Cascade:
    """Train one run separately."""
    cascade = lx.adapt(build(), args=(data[0][0],), spec=lx.CascadeSpec(rank=4, lora_alpha=8.0, seed=3))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=lr))
    for x, y in data:
        cross_entropy(cascade(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return cascade


def main(steps: int = 40) -> dict[str, float]:
    """Train all runs together and separately, and return {run: largest difference of the outputs}."""
    data, (x, y) = batches(steps), batches(steps + 1)[-1]
    bank = train_together(data)
    differences = {}
    for name, lr in RATES.items():
        output, alone = bank(x, adapter=name), train_alone(data, lr)(x)
        differences[name] = (output - alone).abs().max().item()
        print(f"{name}: loss {cross_entropy(output, y):.3f}, {differences[name]:.0e} from a separate run")
    return differences


if __name__ == "__main__":
    main()
