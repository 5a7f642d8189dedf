"""Programs around a cascade that choose the device themselves: the command line, and transformers' Trainer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import lorasc_fx as lx
from lorasc_fx.cli import main
from tests.accelerator.kit import DEVICE, OTHER, assert_same, tensors
from tests.accelerator.models import Mlp, loss_of

MODEL = """
from torch import nn

def build(classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, classes),
    )
"""
CONFIG = """
[model]
name = "python:small_model:build"

[data]
name = "python:experiments.data:digits"
train = 48
validation = 16
test = 16
image_size = 12

[train]
steps = 6
stages = 3
batch_size = 8
lr = 0.01
log_every = 1
threads = 1

[spec]
rank = 2

[spec.noise]
strength = 0.1
"""


@pytest.mark.parametrize("device", [DEVICE, pytest.param(OTHER, marks=pytest.mark.slow)])
def test_the_command_line(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small_model.py").write_text(MODEL)
    (tmp_path / "small.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    runs = [tmp_path / "host", tmp_path / "device"]
    for place, run in zip(("cpu", device), runs, strict=True):
        assert main(["train", "small.toml", "--train.device", place, "--output", str(run)]) == 0
    assert_same(*(load_file(run / "folded.safetensors") for run in runs))
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in runs]
    validations = [[each for line in some if "validation" in (each := json.loads(line))] for some in lines]
    assert [each["stage"] for each in validations[1]] == [1, 2, 3]


class WithLoss(Mlp):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = super().forward(x)
        return {"loss": loss_of(logits, labels), "logits": logits}


@pytest.fixture
def new_accelerator() -> Iterator[Callable[[], None]]:
    """A function that lets accelerate choose a device again; it keeps its choice for the life of a process."""

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    yield forget
    forget()


def test_a_trainer_that_evaluates_slow_and_fast_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_accelerator: Callable[[], None]
) -> None:

    torch.manual_seed(0)
    rows = [{"x": torch.randn(12), "labels": torch.tensor(index % 12)} for index in range(16)]
    shown: list[Any] = []
    for place in ("cpu", DEVICE):
        new_accelerator()
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", place)
        torch.manual_seed(1)
        model = WithLoss().to(place)
        example = {"x": rows[0]["x"][None].to(place), "labels": rows[0]["labels"][None].to(place)}
        cascade = lx.adapt(model, kwargs=example, spec=lx.CascadeSpec(rank=2, noise=lx.Noise(0.1)))
        callback = lx.integrations.transformers.CascadeCallback(cascade, steps=3, evaluate=("slow", "fast"))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / place), per_device_train_batch_size=4, max_steps=8, eval_strategy="steps",
            eval_steps=4, logging_steps=1, report_to=[], save_strategy="no", dataloader_pin_memory=False,
            disable_tqdm=True, adam_epsilon=1e-3, learning_rate=1e-2,
        )  # fmt: skip
        trainer = Trainer(
            model=cascade, args=arguments, train_dataset=rows, eval_dataset=rows[:8], callbacks=[callback]
        )
        trainer.train()
        assert trainer.args.device == torch.device(place)
        logged = [torch.tensor(line["eval_fast_loss"]) for line in trainer.state.log_history if "eval_loss" in line]
        shown.append((tensors(cascade), logged))
    assert_same(*shown)
    assert len(logged) == 2
