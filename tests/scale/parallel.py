"""The training that is run in one process and in parts, and the models of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import lorasc_fx as lx
from tests.kit.state import weight_states
from tests.scale.models import IDS, llama


class Mlp(nn.Module):
    """A gated net, with a norm, a bias in each layer, and a head that stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(6, 12), nn.Linear(6, 12)
        self.down = nn.Linear(12, 10)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.down(F.silu(self.gate(x)) * self.up(x))))


class Attention(nn.Module):
    """Causal attention with a mask of its own, spelled by hand."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            each(x).view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
            for each in (self.q, self.k, self.v)
        )
        scores = q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.places = nn.Parameter(torch.randn(9, 16) / 4)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = Attention(16, 4)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places[: ids.shape[1]]
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x)


def exact_llama() -> nn.Module:
    """The llama with norms in its own dtype: those of transformers round to fp32, and not alike in another order."""
    model = llama()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon))
    return model


@dataclass(frozen=True)
class Work:
    build: Callable[[], nn.Module]
    kwargs: dict[str, Tensor]
    plan: dict[str, Any]
    spec: lx.CascadeSpec


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TOKENS = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(1))
SPEC = lx.CascadeSpec(rank=2, lora_alpha=3, pace=0.5, noise=lx.Noise(0.2), train=("*norm*",))
KEPT = lx.CascadeSpec(
    rank=3, pace=0.7, noise=lx.Noise(0.1, "normal", keep=True), restart="fast", restart_A="kept", optimizer_state="kept"
)
LLAMA = {
    "*.q_proj": "colwise",
    "*.k_proj": "colwise",
    "*.v_proj": "colwise",
    "*.o_proj": "rowwise",
    "*.gate_proj": "colwise",
    "*.up_proj": "colwise",
    "*.down_proj": "rowwise",
    "lm_head": "colwise",
}
WORKS = {
    "mlp": Work(Mlp, {"x": X}, {"gate": "colwise", "up.weight": "colwise", "down": "rowwise"}, SPEC),
    "mlp, kept": Work(Mlp, {"x": X}, {"gate": "colwise", "up": "colwise", "down": "rowwise", "head": "rowwise"}, KEPT),
    "mlp, pissa": Work(
        Mlp,
        {"x": X},
        {"gate": "colwise", "up": "colwise", "down": "rowwise", "head": "rowwise"},
        lx.CascadeSpec(rank=2, pace=0.5, noise=lx.Noise(0.2), start="pissa"),
    ),
    "mlp, averaged": Work(
        Mlp,
        {"x": X},
        {"gate": "colwise", "up": "colwise", "down": "rowwise", "head": "rowwise"},
        lx.CascadeSpec(
            rank=2,
            pace=0.5,
            noise=lx.Noise(0.2, "filter", redraw="step"),
            average="ema",
            average_decay=0.4,
            on_nonfinite="skip",
            optimizer_state=0.5,
        ),
    ),
    "mlp, ranks": Work(
        Mlp,
        {"x": X},
        {"gate": "colwise", "up": "colwise", "down": "rowwise", "head": "rowwise"},
        lx.CascadeSpec(ranks=(3, 1, 2), pace=0.5, noise=lx.Noise(0.2), restart_A="kept", use_rslora=True),
    ),
    "gpt": Work(
        Gpt,
        {"ids": TOKENS},
        {"attention.o": "rowwise", "attention.*": "colwise", "up": "colwise", "down": "rowwise"},
        SPEC,
    ),
    "llama": Work(exact_llama, {"input_ids": IDS}, LLAMA, SPEC),
}


def cascade_of(work: Work) -> lx.Cascade:
    torch.manual_seed(0)
    model = work.build().double().eval()
    return lx.adapt(model, kwargs=work.kwargs, spec=work.spec)


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def train(cascade: lx.Cascade, work: Work) -> dict[str, Tensor]:
    """Train three stages of three steps; return all that was seen on the way, whole."""
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=2e-2))
    seen: dict[str, Tensor] = {}
    for stage in cascade.stages(3, optimizer):
        for step in range(3):
            at = f"{stage.index}.{step}"
            output = cascade(**work.kwargs)
            logits = getattr(output, "logits", output)
            seen[f"output {at}"] = logits.detach().clone()
            (logits.square().mean() + logits.sin().sum()).backward()
            for name, parameter in cascade.named_parameters():
                if parameter.grad is not None:
                    seen[f"gradient {at} {name}"] = whole(parameter.grad).detach().clone()
            norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.5)
            seen[f"norm {at}"] = whole(norm).detach().clone()
            optimizer.step()
            optimizer.zero_grad()
        averaged = ("averaged",) if work.spec.average != "off" else ()
        for which in ("slow", "fast", "base", *averaged):
            with cascade.weights(which), torch.no_grad():
                output = cascade(**work.kwargs)
                seen[f"{which} {stage.index}"] = getattr(output, "logits", output).clone()
        for name, parameter in cascade.named_parameters():
            seen[f"weight {stage.index} {name}"] = whole(parameter).detach().clone()
    return seen


def step(cascade: lx.Cascade, optimizer: torch.optim.Optimizer, work: Work) -> Tensor:
    """One step; returns the output before it."""
    output = cascade(**work.kwargs)
    output.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return output.detach()


def optimizer_of(cascade: lx.Cascade) -> torch.optim.Optimizer:
    return torch.optim.AdamW(cascade.param_groups(lr=2e-2))


def saved_in_parts(rank: int, mesh: DeviceMesh, name: str, folder: str) -> None:
    """Train in parts, save, and go on in parts from what was saved, with the numbers of the cascade that was saved."""
    from lorasc_fx.integrations import tensor_parallel

    work = WORKS[name]
    cascade = tensor_parallel.parallelize(cascade_of(work), mesh, work.plan)
    optimizer = optimizer_of(cascade)
    for _ in range(2):
        step(cascade, optimizer, work)
        cascade.transition(optimizer)
        step(cascade, optimizer, work)
    lx.save(cascade, f"{folder}/run", optimizer=optimizer, extra={"rank": rank})
    torch.manual_seed(0)
    loaded = lx.load(f"{folder}/run", work.build().double().eval(), kwargs=work.kwargs)
    tensor_parallel.parallelize(loaded, mesh, work.plan)
    resumed = optimizer_of(loaded)
    assert loaded.resume(resumed) == {"rank": 0}
    seen = {f"output {at}": step(cascade, optimizer, work) for at in range(3)}
    for at in range(3):
        torch.testing.assert_close(step(loaded, resumed, work), seen[f"output {at}"], rtol=1e-12, atol=1e-12)
    save_file(seen, Path(folder) / f"saved {rank}.safetensors")


def from_files(rank: int, mesh: DeviceMesh, names: tuple[str, ...], folder: str) -> None:
    """Build each of these works on the meta device, cut it there, and train what its files give."""
    from lorasc_fx.integrations import tensor_parallel

    for name in names:
        work = WORKS[name]
        with torch.device("meta"):
            model = work.build().double().eval()
        cascade = tensor_parallel.parallelize(lx.adapt(model, kwargs=work.kwargs, spec=work.spec), mesh, work.plan)
        assert all(each.is_meta for each in cascade.parameters())
        lx.materialize(cascade, f"{folder}/{name}.safetensors")
        held = [each.to_local() if hasattr(each, "to_local") else each for each in model.parameters()]
        seen = {"local model": torch.tensor([sum(each.numel() for each in held)]), **train(cascade, work)}
        again = {f"gathered {key}": value for key, value in end(tensor_parallel.gather(cascade)).items()}
        save_file({**seen, **again}, Path(folder) / f"{name} {rank}.safetensors")


def end(cascade: lx.Cascade) -> dict[str, Tensor]:
    """Return the released weights."""
    return {f"released {name}": value.detach().clone() for name, value in cascade.release().state_dict().items()}


def in_parts(rank: int, mesh: DeviceMesh, names: tuple[str, ...], folder: str) -> None:
    """Train each of these works in parts, and write what was seen."""
    from lorasc_fx.integrations import tensor_parallel

    for name in names:
        work = WORKS[name]
        cascade = cascade_of(work)
        assert tensor_parallel.parallelize(cascade, mesh, work.plan) is cascade
        held = {
            f"local {name}": torch.tensor(
                [sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in ps)]
            )
            for name, ps in (("model", cascade.model.parameters()), ("branches", cascade.branches.parameters()))
        }
        held["local slow"] = torch.tensor([sum(state.base.numel() for state in weight_states(cascade).values())])
        seen = train(cascade, work)
        again = {f"gathered {key}": value for key, value in end(tensor_parallel.gather(cascade)).items()}
        save_file({**held, **seen, **again}, Path(folder) / f"{name} {rank}.safetensors")
