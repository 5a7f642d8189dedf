"""A cascade in a loop of accelerate's: beside the plain loop with peft, and resumed with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

import lorasc_fx as lx
from tests.integrations.kit import adapted, net, rows
from tests.kit.state import branches_of


def loader(dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    data = [(each["x"], each["labels"]) for each in rows(16, dtype)]
    return DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator())  # type: ignore[arg-type]


class Run:
    """A training: accumulation over two batches, clipping, a transition every two steps."""

    def __init__(self, spec: lx.CascadeSpec, precision: str = "no") -> None:
        set_seed(3)
        self.accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        self.plain = adapted(spec)
        optimizer = torch.optim.AdamW(self.plain.param_groups(lr=0.05))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 8)
        self.cascade, self.optimizer, self.schedule = self.accelerator.prepare(self.plain, optimizer, schedule)
        self.losses: list[float] = []

    def go(self, start: int, end: int) -> None:
        """Take batches from one to another; every second one makes a step."""
        for batch in range(start, end):
            generator = torch.Generator().manual_seed(batch)
            chosen = torch.randint(16, (4,), generator=generator)
            data = rows(16)
            x, labels = (torch.stack([data[index][name] for index in chosen.tolist()]) for name in ("x", "labels"))
            self.cascade.train()
            with self.accelerator.accumulate(self.cascade):
                loss = self.cascade(x, labels)["loss"]
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.cascade.parameters(), 0.1)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            self.losses.append(loss.item())
            if batch % 4 == 3:
                self.plain.transition(self.optimizer)

    def weights(self) -> dict[str, Tensor]:
        return dict(self.plain.folded_state_dict())


@pytest.mark.parametrize(
    ("fields", "precision"),
    [
        ({"noise": lx.Noise(0.2), "train": ("head.bias",)}, "no"),
        ({"restart": "fast", "optimizer_state": "kept"}, "bf16"),
        ({"ranks": (2, 1, 3), "noise": lx.Noise(0.2, redraw="step")}, "no"),
    ],
    ids=["noise", "bf16", "ranks-redrawn"],
)
@pytest.mark.parametrize("at", [4, 5, 6, 7])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, fields: dict[str, Any], precision: str, at: int) -> None:
    """Also between two batches of one step, whose gradients wait."""
    spec = lx.CascadeSpec(**{"rank": 2, **fields})
    whole = Run(spec, precision)
    whole.go(0, at)
    whole.accelerator.save_state(str(tmp_path / "state"))
    whole.go(at, 14)
    resumed = Run(spec, precision)
    resumed.accelerator.load_state(str(tmp_path / "state"))
    resumed.go(at, 14)
    assert resumed.losses == whole.losses[at:]
    assert resumed.plain.stage == whole.plain.stage == 4
    for name, value in resumed.weights().items():
        assert torch.equal(value, whole.weights()[name]), name


def test_what_is_saved_holds_no_base(tmp_path: Path) -> None:
    run = Run(lx.CascadeSpec(rank=2))
    run.go(0, 6)
    run.accelerator.save_state(str(tmp_path))
    held = load_file(tmp_path / "model.safetensors")
    shapes = {tuple(each.shape) for each in run.plain.model.parameters()}
    assert {name for name, value in held.items() if tuple(value.shape) in shapes} == set()
    assert any(name.startswith("expert/first.weight") for name in held)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_losses_are_those_of_peft(precision: str) -> None:
    """The same loop, without accelerate, clipping by torch, with peft's LoRA: one stage at pace 1."""
    cascade = adapted(lx.CascadeSpec(rank=2, lora_alpha=6.0, pace=1.0), 0.0)
    lora = get_peft_model(net(0.0), LoraConfig(r=2, lora_alpha=6, target_modules=["first", "head"]))
    for name, branch in branches_of(cascade).items():
        layer = lora.base_model.model.get_submodule(name.removesuffix(".weight"))
        layer.lora_A["default"].weight.data.copy_(branch.lora_A.detach())
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    ours, optimizer, batches = accelerator.prepare(cascade, optimizer, loader())
    seen, found, expected = [], [], []
    for _ in range(4):
        for x, labels in batches:
            with accelerator.accumulate(ours):
                loss = ours(x, labels)["loss"]
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(ours.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
            seen.append((x, labels))
            found.append(loss.item())
    trained = [each for each in lora.parameters() if each.requires_grad]
    plain = torch.optim.AdamW(trained, lr=0.05)
    for index, (x, labels) in enumerate(seen):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = lora(x, labels)["loss"]
        (loss / 2).backward()
        expected.append(loss.item())
        if index % 2:
            torch.nn.utils.clip_grad_norm_(trained, 0.1)
            plain.step()
            plain.zero_grad()
    assert sum(found[-4:]) < sum(found[:4]) - 0.2
    assert found == pytest.approx(expected, abs=1e-5 if precision == "no" else 2e-2, rel=0)
