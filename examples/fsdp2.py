"""Train a cascade whose weights are sharded by FSDP2: `torchrun --nproc-per-node 2 -m examples.fsdp2`."""

from __future__ import annotations

import itertools
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import lorasc_fx as lx


class Mixer(nn.Module):
    """A model with a list of blocks. FSDP2 gathers the weights of a block only while the block runs."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(16, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def main(steps: int = 15, stages: int = 3, batch: int = 32) -> float:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")

    torch.manual_seed(0)  # the same model and data on every process
    model = Mixer().to(device)
    points = torch.randn(1024, 16)
    data = torch.utils.data.TensorDataset(points, (points @ torch.randn(16, 4)).argmax(1))

    spec = lx.CascadeSpec(rank=4, train=("head.*",), pace=0.7, noise=lx.Noise(0.1))
    cascade = lx.adapt(model, args=(points[:2].to(device),), spec=spec)
    total = sum(parameter.numel() for parameter in cascade.parameters())
    lx.parallel.fsdp.shard(cascade)
    sharded = sum(parameter.to_local().numel() for parameter in cascade.parameters())  # type: ignore[operator]
    if rank == 0:
        print(f"{sharded} of {total} parameters are on this process")

    optimizer = torch.optim.AdamW(cascade.param_groups(lr=5e-3))
    loader = DataLoader(data, batch // count, sampler=DistributedSampler(data, count, rank))
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # each epoch has the same order
    loss = torch.zeros((), device=device)
    for stage in cascade.stages(stages, optimizer):  # each process folds its shards
        for _ in range(steps):
            x, label = (tensor.to(device) for tensor in next(batches))
            loss = F.cross_entropy(cascade(x), label)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach() / count)
        if rank == 0:
            print(f"stage {stage.index} of {stage.count}: loss {loss.item():.3f} on {count} processes")

    state = lx.parallel.fsdp.folded_state_dict(cascade)  # gathers full weights on rank 0, one at a time
    if rank == 0:
        model = Mixer()
        model.load_state_dict(state)
        print(f"loss of the folded model: {F.cross_entropy(model(points), data.tensors[1]).item():.3f}")
    dist.destroy_process_group()
    return loss.item()


if __name__ == "__main__":
    main()
