"""The same scenario on the CPU and on a device, and the comparison of what it shows.

`LORASC_FX_TEST_DEVICE=cuda` runs the tests on real hardware: no device is simulated, and results are compared by
tolerance, because other kernels round differently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lorasc_fx as lx
from lorasc_fx.branch.deltas import has_fp64
from tests.accelerator.device import NAME, ops
from tests.kit import tiny
from tests.kit.models import Tied

Inputs = tuple[tuple[Tensor, ...], dict[str, Tensor]]
# So many classes that two experts of rank 2 do not outgrow a head, and no stage is gone.
CLASSES, VOCABULARY, BATCH = 12, 64, 4


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 20), nn.Linear(20, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.second(F.relu(self.first(x)))))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, groups=2, padding=1, padding_mode="circular")
        self.up, self.head = nn.ConvTranspose2d(16, 14, 2, stride=2), nn.Linear(14, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.norm(self.first(x)))))
        return self.head(self.up(x).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(12, 16), nn.Linear(16, CLASSES)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def bert() -> nn.Module:
    return tiny.bert(vocab_size=VOCABULARY, hidden_size=24, num_labels=CLASSES, **tiny.QUIET)


def llama() -> nn.Module:
    return tiny.llama(vocab_size=VOCABULARY, hidden_size=24)


def _rows(*shape: int) -> Callable[[], Inputs]:
    return lambda: ((torch.randn(BATCH, *shape),), {})


def _ids(**more: Any) -> Callable[[], Inputs]:
    return lambda: ((), {"input_ids": torch.randint(3, VOCABULARY, (BATCH, 6)), **more})


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "mlp": (Mlp, _rows(12)),
    "conv": (ConvNet, _rows(3, 8, 8)),
    "attention": (Attention, _rows(5, 12)),
    "tied": (lambda: Tied(VOCABULARY, 16), lambda: ((torch.randint(VOCABULARY, (BATCH, 6)),), {})),
    "bert": (bert, _ids()),
    "llama": (llama, _ids(use_cache=False)),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, CLASSES)),
        _rows(12),
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Inputs, Tensor]:
    """Return a model, inputs and labels, on the host. The same name gives the same numbers."""
    torch.manual_seed(3)
    module, inputs = MODELS[name]
    model = module().to(dtype)
    args, kwargs = inputs()
    labels = torch.randint(CLASSES, (BATCH,))
    cast = tuple(value.to(dtype) if value.is_floating_point() else value for value in args)
    return model.train(), (cast, kwargs), labels


def loss_of(output: Any, labels: Tensor) -> Tensor:
    """The cross entropy of a model's output, of the last position of a sequence."""
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy((logits[:, -1] if logits.dim() == 3 else logits).float(), labels)


DEVICE = os.environ.get("LORASC_FX_TEST_DEVICE", NAME)
SIMULATED = DEVICE == NAME
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}
OTHER = f"{DEVICE}:1"
"""The second device, which is not the current one."""

simulated_only = pytest.mark.skipif(not SIMULATED, reason="only the simulated device has counters and switches")


two_devices = pytest.mark.skipif(
    not SIMULATED and torch.accelerator.device_count() < 2, reason=f"there is one device of {DEVICE}"
)


def move(tree: Any, device: str | torch.device) -> Any:
    """Return the tree with its tensors on another device."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), tree)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters and buffers of a module, on the host."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in named}


def assert_same(tree: Any, expected: Any, label: str = "") -> None:
    """Compare the tensors of two trees: bit for bit on the simulated device, by tolerance on a real one."""
    assert pytree.tree_structure(tree) == pytree.tree_structure(expected), label
    for (path, value), expected_value in zip(
        pytree.tree_flatten_with_path(tree)[0], pytree.tree_leaves(expected), strict=True
    ):
        where = f"{label}{pytree.keystr(path)}"
        if not isinstance(value, Tensor):
            assert value == expected_value, where
        elif SIMULATED:
            a, b = value.cpu(), expected_value.cpu()
            assert (a.dtype, a.shape) == (b.dtype, b.shape), where
            assert torch.equal(a, b), f"{where}: {int((a != b).sum())} of {a.numel()} entries differ"
        else:
            torch.testing.assert_close(expected_value.cpu(), value.cpu(), **TOLERANCE)


class Side:
    """A model, its inputs, its cascade and its optimizer on one device."""

    folder: Path

    def __init__(
        self, name: str, device: str, spec: lx.CascadeSpec, dtype: torch.dtype = torch.float32, adapted: bool = True
    ) -> None:
        self.name, self.device, self.spec, self.dtype = name, torch.device(device), spec, dtype
        self.model, (self.args, self.kwargs), self.labels = move_all(build(name, dtype), device)
        self.shown: list[tuple[str, Any]] = []
        if adapted:
            self.adopt(lx.adapt(*self.inputs, spec=spec))

    @property
    def inputs(self) -> tuple[Any, Any, Any]:
        """The arguments of `adapt` and its relatives: a model, and its inputs."""
        return self.model, self.args, self.kwargs

    def adopt(self, cascade: lx.Cascade) -> lx.Cascade:
        """Go on with this cascade, and with an optimizer for it."""
        self.cascade = cascade
        # A large eps: a tiny gradient, which real hardware rounds differently, must not become a full step.
        self.optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-2), eps=1e-3)
        return cascade

    def twin(self, device: str | None = None, adapted: bool = False) -> Side:
        """A new start with the same values, here or on another device; not adapted yet, or adapted."""
        return Side(self.name, device or str(self.device), self.spec, self.dtype, adapted)

    def show(self, label: str, tree: Any) -> None:
        """Keep a copy of tensors, to be compared with the other side."""
        self.shown.append(
            (label, pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), tree))
        )

    def call(self, module: nn.Module | None = None) -> Any:
        output = (self.cascade if module is None else module)(*self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output.logits

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            loss_of(self.call(), self.labels).backward()
            self.optimizer.step()
        self.optimizer.zero_grad()

    def transition(self) -> None:
        self.step()
        self.cascade.transition(self.optimizer)

    def to(self, device: str | torch.device) -> None:
        """Move the cascade, the inputs and the state of the optimizer."""
        self.device = torch.device(device)
        self.cascade.to(device)
        self.args, self.kwargs, self.labels = move((self.args, self.kwargs, self.labels), device)
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # which moves it to the parameters' device

    def is_at_home(self) -> bool:
        """Whether all parameters and buffers are on the device of this side."""
        home = torch.empty(0, device=self.device).device
        return all(tensor.device == home for tensor in (*self.cascade.parameters(), *self.cascade.buffers()))


def move_all(built: tuple[nn.Module, Any, Tensor], device: str) -> tuple[nn.Module, Any, Tensor]:
    model, inputs, labels = built
    return model.to(device), move(inputs, device), labels.to(device)


Scenario = Callable[[Side], None]


def compare(
    name: str, spec: lx.CascadeSpec, *scenarios: Scenario, device: str = DEVICE, folder: Path | None = None
) -> None:
    """Run scenarios one after the other on the CPU and on the device, and compare all that they show."""
    host, accelerated = Side(name, "cpu", spec), Side(name, device, spec)
    if folder is not None:
        host.folder, accelerated.folder = folder / "host", folder / "device"
        host.folder.mkdir(), accelerated.folder.mkdir()
    for scenario in scenarios:
        scenario(host)
        scenario(accelerated)
        for (label, one), (_, expected) in zip(host.shown, accelerated.shown, strict=True):
            assert_same(one, expected, f"{scenario.__name__}: {label}")
        assert accelerated.is_at_home(), f"{scenario.__name__} left something on another device"
        host.shown.clear(), accelerated.shown.clear()


@contextmanager
def counted() -> Iterator[Mapping[str, int]]:
    """Count the operations of the simulated device; the numbers are there after the block."""
    counts: dict[str, int] = {}
    ops.reset_counters()
    yield counts
    counts.update(ops.counters())


@contextmanager
def without_fp64() -> Iterator[None]:
    """Let the simulated device refuse fp64, as Apple's MPS does."""
    ops.set_without_fp64(True)
    has_fp64.cache_clear()
    try:
        yield
    finally:
        ops.set_without_fp64(False)
        has_fp64.cache_clear()


def at_each_allocation(call: Callable[[], Any], check: Callable[[], Any]) -> int:
    """Let a call run out of memory at each allocation that can be the first to fail; return how often it did.

    Args:
        call: what runs out of memory.
        check: called after each failure.
    """
    limit, failures = ops.in_use(0), 0
    while True:
        ops.set_memory_limit(limit)
        try:
            call()
            return failures
        except torch.OutOfMemoryError:
            limit, failures = ops.refused(), failures + 1
        finally:
            ops.set_memory_limit(-1)
        check()
