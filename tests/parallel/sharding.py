"""The training of `training`, sharded or not: the functions and measurements of each process."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lorasc_fx as lx
from lorasc_fx.parallel import fsdp
from tests.kit.compare import Watch
from tests.kit.errors import raises, warns
from tests.kit.seams import SEAMS
from tests.parallel.training import TOTAL, adapted, blocks, example, full_parameters, optimizer_of, run, step, values


@functools.cache
def alone(name: str) -> dict[str, Tensor]:
    cascade = adapted(name)
    optimizer = optimizer_of(cascade)
    run(cascade, optimizer, 0, TOTAL, (0, 1))
    tensors = values(cascade)
    cascade.transition(optimizer)
    tensors |= {f"folded/{key}": value for key, value in cascade.folded_state_dict().items()}
    return tensors | back(cascade, name)


def trained(name: str) -> dict[str, Tensor]:
    """Return the results of a run on one process that a resumed run has too."""
    return {key: value for key, value in alone(name).items() if not key.startswith(("folded/", "first/", "back/"))}


def back(cascade: lx.Cascade, name: str) -> dict[str, Tensor]:
    """Use the weights of an earlier stage, and rewind to it, if the experts are still stored."""
    if name != "fast":
        return {}
    with cascade.weights(stage=1), torch.no_grad():
        tensors = full_parameters(cascade.model, "first/")
        tensors["first/output"] = cascade(example())
    cascade.rewind(2, None)
    return tensors | {f"back/{key}": value for key, value in values(cascade).items()}


class Gathered:
    """Record the shapes of tensors that are gathered."""

    def __enter__(self) -> list[torch.Size]:
        self.before, shapes = DTensor.full_tensor, list[torch.Size]()

        def full_tensor(tensor: DTensor, **options: Any) -> Tensor:
            shapes.append(tensor.shape)
            return self.before(tensor, **options)

        DTensor.full_tensor = full_tensor  # type: ignore[method-assign]
        return shapes

    def __exit__(self, *_: object) -> None:
        DTensor.full_tensor = self.before  # type: ignore[method-assign]


def sharded(rank: int, count: int, names: Iterable[str]) -> dict[str, Tensor]:
    """Train each of the cascades. The last rank is slow: it comes late to each sum of a transition."""
    tensors: dict[str, Tensor] = {}
    owner, function = SEAMS["sum over ranks"]
    real = getattr(owner, function)
    if rank == count - 1:
        setattr(owner, function, lambda *arguments: (time.sleep(0.002), real(*arguments))[1])
    for name in names:
        torch.manual_seed(100 + rank)
        cascade = fsdp.shard(adapted(name))
        assert all(hasattr(parameter, "to_local") for parameter in cascade.parameters())
        optimizer = optimizer_of(cascade)
        run(cascade, optimizer, 0, TOTAL, (rank, count))
        results = values(cascade)
        with Gathered() as shapes:
            cascade.transition(optimizer)
        ranks = {site.rank for site in cascade.sites}
        assert shapes, "the transition asked for no factor"
        if cascade.plan.spec.adapter in ("lora", "dora"):  # factors, magnitudes: no weight
            assert all(ranks & set(shape) or len(shape) == 1 for shape in shapes), shapes
        results |= {f"folded/{key}": value for key, value in fsdp.folded_state_dict(cascade).items()}
        results |= back(cascade, name)
        tensors |= {f"{name}/{key}": value for key, value in results.items()}
    setattr(owner, function, real)
    return tensors


def narrow(rank: int, count: int) -> dict[str, Tensor]:
    """Train a bf16 model with fp32 branches. Return the slow weights after a stage, and the factors."""
    cascade = lx.adapt(blocks().bfloat16(), args=(example(),), spec=lx.CascadeSpec(rank=2, pace=0.5))
    fsdp.shard(cascade)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    cascade(example())[:, rank].sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    factors = full_parameters(cascade.branches)
    cascade.transition(optimizer)
    with cascade.weights("slow"):
        return factors | full_parameters(cascade.model)


# ---- experts

EXPERTS = {2: "uniform", 3: "normal"}
"""Distribution of the noise by the number of experts: a multiple of the ranks, and another number."""


class Experts(nn.Module):
    """A dense mixture of experts with stacked weights [experts, in, out] and [experts, out, in]."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.table, self.gate = nn.Embedding(11, 6), nn.Linear(6, count)
        self.up = nn.Parameter(torch.randn(count, 6, 8) / 3)
        self.down = nn.Parameter(torch.randn(count, 6, 8) / 3)
        self.head = nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens).mean(1)
        weights = self.gate(x).softmax(-1).t().unsqueeze(-1)
        inner = F.gelu(torch.bmm(x.expand(len(weights), -1, -1), self.up))
        return self.head(x + (torch.bmm(inner, self.down.transpose(1, 2)) * weights).sum(0))


def experts(rank: int, count: int, folder: str = "") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for number, distribution in EXPERTS.items():
        torch.manual_seed(1)
        noise = lx.Noise(0.1, distribution)  # type: ignore[arg-type]
        spec = lx.CascadeSpec(rank=2, pace=0.6, noise=noise, seed=5, restart_factors="B")
        cascade = lx.adapt(Experts(number).double(), args=(example(),), spec=spec)
        assert {site.weight for site in cascade.sites if site.kind == "stacked"} == {"up", "down"}
        if count > 1:
            fsdp.shard(cascade)
            stacked = [parameter for parameter in cascade.parameters() if parameter.dim() == 3]
            assert all(count * parameter.to_local().numel() == parameter.numel() for parameter in stacked)  # type: ignore[operator]
        optimizer = optimizer_of(cascade)
        run(cascade, optimizer, 0, TOTAL, (rank, count))
        if count > 1:
            lx.save(cascade, f"{folder}/{number}", optimizer=optimizer)
        tensors |= {f"{number}/{key}": value for key, value in values(cascade).items()}
    return tensors


# ---- checkpoints


def saved(rank: int, count: int, name: str, folder: str, at: int) -> None:
    cascade = adapted(name)
    if count > 1:
        fsdp.shard(cascade)
    optimizer = optimizer_of(cascade)
    run(cascade, optimizer, 0, at, (rank, count))
    torch.manual_seed(rank)
    for _ in range(3):
        lx.save(cascade, folder, optimizer=optimizer, extra={"steps": at}, keep=2)


def drawn_anew(model: nn.Module, rank: int) -> nn.Module:
    """Set different values of the fully trained parameters on each rank, like a script without a seed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(1 + rank)
    return model


def resumed(rank: int, count: int, folder: str) -> dict[str, Tensor]:
    """Resume from a checkpoint, sharded if there are several ranks."""
    cascade = lx.load(folder, drawn_anew(blocks(), rank), args=(example(),))
    if count > 1:
        fsdp.shard(cascade)
    optimizer = optimizer_of(cascade)
    extra = cascade.resume(optimizer)
    assert list(extra) == ["steps"]
    drawn = torch.rand(3)
    run(cascade, optimizer, extra["steps"], TOTAL, (rank, count))
    return {**values(cascade), "drawn": drawn}


# ---- inf in a branch


def spoilt(rank: int, count: int) -> dict[str, Tensor]:
    """Set inf in a branch, or in a parameter trained in full, on the last process only. Every process raises."""
    model = blocks()
    spec = lx.CascadeSpec(rank=2, pace=0.6, train=("*norm*",), seed=5)
    cascade = lx.adapt(model, args=(example(),), spec=spec)
    if count > 1:
        fsdp.shard(cascade)
    optimizer = optimizer_of(cascade)
    step(cascade, optimizer, 0, (rank, count))
    optimizer.zero_grad()
    for spoils in (cascade.branches["layers/1/up/weight"].lora_B, cascade.model.get_parameter("norm.weight")):
        values_of_rank = spoils.to_local() if count > 1 else spoils.detach()  # type: ignore[operator]
        good = values_of_rank[-1].clone()
        with torch.no_grad():
            values_of_rank[-1] = float("inf") if rank == count - 1 else good
        with raises(lx.NonFiniteBranch, "non-finite"):
            cascade.transition(optimizer)
        with torch.no_grad():
            values_of_rank[-1] = good
    cascade.transition(optimizer)
    return values(cascade)


# ---- memory


def storages(tensors: Any) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


class Peak(Watch):
    """Measures the peak memory of gathered weights, after every operation."""

    most = 0

    def __init__(self, cascade: lx.Cascade) -> None:
        super().__init__(lambda *_: self.measure(cascade))

    def measure(self, cascade: lx.Cascade) -> None:
        plain = [parameter for parameter in cascade.parameters() if not hasattr(parameter, "to_local")]
        self.most = max(self.most, sum(storages(plain).values()))


# ---- different ranks

HOWS: dict[str, Callable[[lx.Cascade, int], object]] = {
    "shard": lambda cascade, count: fsdp.shard(cascade),
    "DistributedDataParallel": lambda cascade, count: DistributedDataParallel(cascade)(torch.ones(2, 5)),
}


def unlike(rank: int, count: int) -> None:
    """Different weights, specs or code on the second rank are an error on every rank."""
    for call, wrap in HOWS.items():
        for difference, name in {"weight": "weight 1.weight", "spec": "spec.pace", "code": "lorasc-fx", "": ""}.items():
            torch.manual_seed(0)
            model, change = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)), difference if rank == 1 else ""
            if change == "weight":
                model[1].weight.data[0, 0] += 1
            spec = lx.CascadeSpec(rank=2, pace=0.5 if change == "spec" else 0.25)
            cascade = lx.adapt(model.eval(), args=(torch.ones(2, 5),), spec=spec)
            owner, function = SEAMS["digest of the source"]
            with pytest.MonkeyPatch.context() as patch:
                if change == "code":
                    patch.setattr(owner, function, lambda: "0" * 64)
                if difference:
                    with raises(lx.StateError, "ranks-differ", call, f"rank 1 differs in {name}"):
                        wrap(cascade, count)
                else:
                    wrap(cascade, count)


# ---- a rank that does not come


def late(rank: int, count: int) -> None:
    """The last rank starts a transition after the timeout of the group."""
    cascade = fsdp.shard(adapted("fresh"))
    optimizer = optimizer_of(cascade)
    step(cascade, optimizer, 0, (rank, count))
    before = {name: parameter.to_local().clone() for name, parameter in cascade.named_parameters()}  # type: ignore[operator]
    if rank == count - 1:
        time.sleep(12)
    with raises(lx.StateError, "rank-failed", "timeout", "last checkpoint"):
        cascade.transition(optimizer)
    assert cascade.stage == 1
    for name, parameter in cascade.named_parameters():
        assert torch.equal(parameter.to_local(), before[name]), name  # type: ignore[operator]


# ---- what is refused


def refused(rank: int, count: int, folder: str) -> None:
    tokens = example()
    model = blocks()
    fully_shard(model.layers[1])
    with raises(lx.StateError, "sharded", "layers.1.mix", "parallel.fsdp.shard"):
        lx.adapt(model, args=(tokens,), spec=lx.CascadeSpec(rank=2))
    cascade = fsdp.shard(adapted("fresh"))
    optimizer = optimizer_of(cascade)
    for call in (cascade.release, cascade.folded_state_dict, cascade.folded_graph, lambda: cascade.to(torch.float32)):
        with raises(lx.StateError, "sharded"):
            call()
    with warns("evaluated-with-noise", "1"), torch.no_grad():
        cascade.eval()(tokens)
    cascade.train()
    with raises(lx.StateError, "sharded"):
        fsdp.shard(cascade)
    with raises(lx.StateError, "sharded"):
        torch.compile(cascade, backend="eager")(tokens)
    cascade(tokens).sum().backward()
    with raises(lx.StateError, "gradients-pending"):
        cascade.transition(optimizer)
    with raises(lx.StateError, "gradients-pending"):
        lx.save(cascade, folder, optimizer=optimizer)
    optimizer.zero_grad()
    with torch.no_grad():
        if rank == count - 1:  # one process alone has met it
            cascade.branches["head/weight"].lora_B.to_local().fill_(float("nan"))
    weight = cascade.model.get_parameter("layers.1.up.weight").to_local().data  # type: ignore[operator]
    if rank == 0:  # likewise
        weight.neg_()
    weight_name = "layers.1.up.weight" if rank == 0 else "a weight on another process"
    with raises(lx.StateError, "weights-changed-outside", weight_name):
        cascade.transition(optimizer)
    if rank == 0:
        weight.neg_()
    before = {name: parameter.detach().clone() for name, parameter in cascade.named_parameters()}
    with raises(lx.NonFiniteBranch, "non-finite", "head.weight", "1"):
        cascade.transition(optimizer)
    with raises(lx.NonFiniteBranch, "non-finite", "head.weight" if rank == count - 1 else "another rank"):
        lx.save(cascade, folder, optimizer=optimizer)
    assert not os.path.exists(folder)
    for name, parameter in cascade.named_parameters():
        torch.testing.assert_close(parameter.to_local(), before[name].to_local(), rtol=0, atol=0, equal_nan=True)  # type: ignore[operator]
