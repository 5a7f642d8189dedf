"""LoRASC written out in fp64 from docs/algorithm.md alone, without lorasc_fx.

A weight is a dense matrix: W0, S, what its running stage started from, and N. The model is called with
`W0 + start + N + delta`, so that autograd differentiates the formula of the adapter method. SGD with momentum is
written out. A stage's fresh lora_A and noise come from their documented address; the random start of other methods is
taken from the branch.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.cascade.methods import DELTAS, ZEROS, Tensors
from tests.cascade.nets import loss_of


@dataclass(frozen=True)
class Law:
    """What is asked: the fields of a spec that change numbers, and the optimizer's."""

    pace: float
    restart: str
    restart_factors: str
    optimizer_state: Any
    slow_train: bool
    seed: int
    strength: float
    distribution: str
    keep: bool
    adapter: str
    lr: float = 0.05
    momentum: float = 0.5


@dataclass
class Delta:
    """S of a weight, what the running stage started from, and W0; [out, ...] as the weight is stored."""

    base: Tensor
    slow: Tensor
    start: Tensor


@dataclass
class Adapter:
    """What is trained for a site, what is fixed in a stage, and the scale; None where a stage begins."""

    trained: dict[str, Tensor] | None
    fixed: Tensors
    scale: float


def hashed(source: torch.Generator, count: int) -> Tensor:
    """U of the first entries of a block, the only one of its weight, in integers of Python."""
    assert count <= 32768
    key, factor = torch.randint(-(1 << 31), 1 << 31, (2, 1), generator=source).flatten().tolist()
    table = torch.randint(-(1 << 31), 1 << 31, (32768,), generator=torch.Generator().manual_seed(0))[:count].tolist()
    numbers = []
    for entry in table:
        x = ((entry ^ key) * (factor | 1)) % (1 << 32)
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % (1 << 32)
        x = ((x ^ (x >> 15)) * 0x846CA68B) % (1 << 32)
        numbers.append(x - (1 << 32) if x >> 31 else x)
    return torch.tensor(numbers, dtype=torch.int32).float() / 2**32


def address(seed: int, stage: int, purpose: str, name: str) -> torch.Generator:
    """The generator of an address (algorithm.md, "Randomness")."""
    digest = hashlib.sha256(b"\0".join(str(part).encode() for part in (seed, stage, purpose, name))).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


class Plain:
    """A cascade of `model` (copied, in fp64).

    Args:
        matrices: names of the weights that carry noise or a branch.
        trained: names of what is trained in full.
        start_of: returns what a method other than lora has drawn or decomposed at the start of a stage, by weight name.
    """

    def __init__(
        self,
        model: nn.Module,
        law: Law,
        matrices: Sequence[str],
        trained: Sequence[str],
        start_of: Callable[[str], tuple[dict[str, Tensor], dict[str, Tensor]]],
    ) -> None:
        self.model, self.law = copy.deepcopy(model).double().requires_grad_(False), law
        self.frozen = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.original = dict(self.frozen)
        self.deltas = {name: self.begin(name) for name in matrices}
        self.trained = {name: Delta(self.frozen[name], self.frozen[name], self.frozen[name]) for name in trained}
        self.values = {name: self.frozen[name].clone() for name in trained}
        self.adapters: dict[str, Adapter] = {}
        self.taken = start_of
        self.velocity: dict[tuple[str, str], Tensor] = {}
        self.stage, self.idle, self.moved = 1, False, False

    def begin(self, name: str) -> Delta:
        """A weight that no stage has changed."""
        zero = torch.zeros_like(self.frozen[name])
        return Delta(self.original[name], zero, zero)

    def add_site(self, name: str, rank: int, scale: float) -> None:
        """A branch for a weight, as the running stage starts it."""
        self.deltas.setdefault(name, self.begin(name))
        self.adapters[name] = Adapter(None, {}, scale)
        if self.law.adapter == "lora":
            zero = torch.zeros(self.matrix(name)[0], rank, dtype=torch.float64)
            self.adapters[name].trained = {"lora_A": self.fresh(name, rank), "lora_B": zero}

    def adapter(self, name: str) -> Adapter:
        """The adapter of a site. At the start of a stage it is taken from the branch, if the method is not lora."""
        adapter = self.adapters[name]
        if adapter.trained is None:
            adapter.trained, adapter.fixed = self.taken(name)
            assert not adapter.trained[ZEROS[self.law.adapter]].any()
            weight = (self.deltas[name].base + self.started(name)).flatten(1)
            if self.law.adapter == "delora":
                adapter.fixed = {"w": weight.norm(dim=0)}
            elif self.law.adapter == "lora-xs":  # the nearest matrix of this rank is unique, its factors are not
                u, values, vh = torch.linalg.svd(weight, full_matrices=False)
                rank = len(adapter.fixed["A"])
                nearest = u[:, :rank] @ torch.diag(values[:rank]) @ vh[:rank]
                torch.testing.assert_close(adapter.fixed["B"] @ adapter.fixed["A"], nearest, rtol=1e-5, atol=1e-5)
        return adapter

    @property
    def begun(self) -> bool:
        """Whether the stage has trained."""
        zeros = [(self.adapter(name).trained or {})[ZEROS[self.law.adapter]] for name in self.adapters]
        return self.moved or any(bool(value.any()) for value in zeros)

    def matrix(self, name: str) -> tuple[int, int]:
        """[out, in / groups * prod(kernel)]."""
        shape = self.original[name].shape
        return shape[0], math.prod(shape[1:])

    def fresh(self, name: str, rank: int) -> Tensor:
        """Kaiming uniform as LoRA: U(-1/sqrt(columns), 1/sqrt(columns))."""
        bound = self.matrix(name)[1] ** -0.5
        draw = torch.rand(rank, self.matrix(name)[1], generator=address(self.law.seed, self.stage, "lora_A", name))
        return (draw * (2 * bound) - bound).double()  # fp32 until here, as all draws

    # ---- values

    def started(self, name: str) -> Tensor:
        """What the running stage started from, without W0; when idle, S."""
        return self.deltas[name].slow if self.idle else self.deltas[name].start

    def noise(self, name: str) -> Tensor | float:
        """N_t = strength * std(W0 + start) * U(-1/2, 1/2), or a normal of the same variance; none when idle."""
        law, delta = self.law, self.deltas[name]
        if self.idle or not law.strength:
            return 0.0
        shape = delta.base.shape
        unit = hashed(address(law.seed, self.stage, "noise", name), math.prod(shape)).view(shape)
        if law.distribution == "normal":
            unit = torch.erfinv(unit * (2 - 2**-23)) * 2**0.5 * 12**-0.5
        return law.strength * (delta.base + delta.start).std() * unit.double()

    def live(self, name: str, noise: Tensor | float = 0.0) -> Tensor | float:
        """The delta of the branch, as the weight is stored. Some methods multiply the weight, in a call with noise."""
        if name not in self.adapters:
            return 0.0
        adapter, delta = self.adapter(name), self.deltas[name]
        assert adapter.trained is not None
        weight = (delta.base + self.started(name) + noise).flatten(1)
        return DELTAS[self.law.adapter](adapter.trained, adapter.fixed, weight, adapter.scale).view(delta.base.shape)

    def present(self) -> dict[str, Tensor]:
        """Values of all parameters: W_t, parameters trained in full, and the unchanged rest."""
        weights = {n: delta.base + self.started(n) + self.noise(n) for n, delta in self.deltas.items()}
        return self.frozen | weights | self.values

    def weights(self, view: str) -> dict[str, Tensor]:
        """W0 + S, W0 + F or W0, without noise."""
        if view == "base":
            changed = {name: delta.base for name, delta in (self.deltas | self.trained).items()}
        elif view == "fast":
            changed = {n: delta.base + self.started(n) + self.live(n) for n, delta in self.deltas.items()} | self.values
        else:
            changed = {name: delta.base + delta.slow for name, delta in self.deltas.items()}
            changed |= {n: trained.slow for n, trained in self.trained.items()} if self.law.slow_train else self.values
        return self.frozen | {name: value.detach() for name, value in changed.items()}

    def __call__(self, *args: Any, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The model with W_t and its branches, or with other weights."""
        if weights is None:
            present = self.present()
            weights = present | {n: present[n] + self.live(n, self.noise(n)) for n in self.adapters}
        arguments = [
            argument.double() if argument is not None and argument.is_floating_point() else argument
            for argument in args
        ]
        return functional_call(self.model, dict(weights), tuple(arguments))

    # ---- operations

    def leaves(self) -> dict[tuple[str, str], Tensor]:
        """Tensors that an optimizer holds."""
        leaves = {(n, key): value for n in self.adapters for key, value in (self.adapter(n).trained or {}).items()}
        return leaves | {(name, "value"): value for name, value in self.values.items()}

    def step(self, *args: Any) -> Tensor:
        """One step of SGD with momentum; returns the output before it."""
        leaves = self.leaves()
        for leaf in leaves.values():
            leaf.requires_grad_()
        output = self(*args)
        gradients = torch.autograd.grad(loss_of(output), list(leaves.values()), allow_unused=True)
        for (key, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            leaf.requires_grad_(False)
            if gradient is not None:
                self.velocity[key] = self.law.momentum * self.velocity.get(key, 0) + gradient
                leaf.sub_(self.law.lr * self.velocity[key])
        self.moved |= bool(self.values)
        return output.detach()

    def slow_update(self) -> None:
        """S_t = S_{t-1} + pace * (F_t - S_{t-1}), and what the next stage starts from."""
        law = self.law
        for name, delta in self.deltas.items():
            start, kept = self.started(name), self.noise(name) if law.keep else 0.0
            fast = start + self.live(name)
            slow = delta.slow + law.pace * (fast - delta.slow)
            self.deltas[name] = Delta(delta.base, slow + kept, (slow if law.restart == "slow" else fast) + kept)
        for name, trained in self.trained.items():
            fast = self.values[name].clone()
            slow = trained.slow + law.pace * (fast - trained.slow) if law.slow_train else fast
            self.trained[name] = Delta(trained.base, slow, slow if law.restart == "slow" else fast)

    def transition(self, idle: bool = False, resets_optimizer: bool = True) -> None:
        """End the stage; With `resets_optimizer`, the optimizer takes part."""
        law = self.law
        self.slow_update()
        self.stage, self.idle, self.moved = self.stage + 1, idle, False
        for name, adapter in self.adapters.items():
            last, adapter.trained = adapter.trained, None
            if law.adapter == "lora":
                assert last is not None
                a = self.fresh(name, len(last["lora_A"])) if law.restart_factors == "both" else last["lora_A"]
                adapter.trained = {"lora_A": a, "lora_B": torch.zeros_like(last["lora_B"])}
        for key in [key for key in self.velocity if key[1] != "value"] if resets_optimizer else ():
            if law.optimizer_state == "reset":
                del self.velocity[key]
            elif law.optimizer_state != "kept":
                self.velocity[key] = pruned(self.velocity[key], law.optimizer_state)
        self.rest()

    def end_idle(self) -> None:
        """Start the stage that comes after a loop's last one."""
        self.idle = False
        for adapter in self.adapters.values() if self.law.adapter != "lora" else ():
            adapter.trained = None  # the start of a stage may differ from the slow weights
        self.rest()

    def rest(self) -> None:
        """Put what is trained in full at the start of its stage."""
        for name, trained in self.trained.items():
            self.values[name] = (trained.slow if self.idle else trained.start).clone()

    def cast(self, dtype: torch.dtype) -> None:
        """Everything that lives in the parameters is rounded; W0 and S are not."""
        changed = {*self.deltas, *self.trained}
        self.frozen = {n: v if n in changed else v.to(dtype).double() for n, v in self.frozen.items()}

    def loaded(self) -> None:
        """Restore the dtype of frozen parameters: a checkpoint is loaded onto the base before any cast."""
        self.frozen = dict(self.original)

    def released(self) -> dict[str, Tensor]:
        """The slow weights; a stage that has trained is folded first."""
        ended = copy.copy(self)
        ended.deltas, ended.trained = dict(self.deltas), dict(self.trained)
        if self.begun:
            ended.slow_update()
        slow = {name: delta.base + delta.slow for name, delta in ended.deltas.items()}
        return self.frozen | slow | {name: trained.slow for name, trained in ended.trained.items()}


def pruned(value: Tensor, share: float) -> Tensor:
    """The share of the entries that are smallest in magnitude set to zero, by sorting."""
    order = value.abs().flatten().argsort()
    flat = value.flatten().clone()
    flat[order[: round(share * value.numel())]] = 0
    return flat.view_as(value)
