"""Train on several processes: `torchrun --nproc-per-node 2 -m examples.ddp`. Without torchrun, it uses one process."""

from __future__ import annotations

import itertools
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import lorasc_fx as lx


def main(steps: int = 20, stages: int = 3, batch: int = 32) -> float:
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")

    torch.manual_seed(0)  # the same model and data on every process
    model = nn.Sequential(
        nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 4)
    )
    points = torch.randn(1024, 16)
    data = torch.utils.data.TensorDataset(points, (points @ torch.randn(16, 4)).argmax(1))

    spec = lx.CascadeSpec(rank=4, train=("5.*",), pace=0.7, noise=lx.Noise(0.1))
    model = lx.adapt(model.to(device), args=(points[:2].to(device),), spec=spec)
    wrapper = DistributedDataParallel(model) if count > 1 else model
    optimizer = torch.optim.AdamW(model.param_groups(lr=5e-3))

    # Each process gets a part of one global batch, so the result does not depend on the number of processes.
    loader = DataLoader(data, batch // count, sampler=DistributedSampler(data, count, rank))
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # each epoch has the same order
    loss = torch.zeros((), device=device)
    for stage in model.stages(stages, optimizer):  # every process computes the same transition
        for _ in range(steps):
            x, label = (tensor.to(device) for tensor in next(batches))
            loss = F.cross_entropy(wrapper(x), label)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if count > 1:
            dist.all_reduce(loss := loss.detach() / count)
        if rank == 0:
            print(f"stage {stage.index} of {stage.count}: loss {loss.item():.3f} on {count} processes")
    if count > 1:
        dist.destroy_process_group()
    return loss.item()


if __name__ == "__main__":
    main()
