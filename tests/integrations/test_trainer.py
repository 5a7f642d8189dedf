"""A cascade in transformers' Trainer, compared with peft in the same Trainer and with plain formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import lorasc_fx as lx
from tests.integrations.kit import adapted, arguments, losses, net, rows
from tests.kit.models import lora_of

SPEC = lx.CascadeSpec(rank=2, lora_alpha=6.0, pace=1.0)
TARGETS = ("first", "head")
LOGGED = 3e-7
"""Tolerance of the losses, which a Trainer sums in fp32. The weights are compared in fp64."""


def trainer_of(cascade: lx.Cascade, folder: Path, how: dict[str, Any], data: Any = None, **more: Any) -> Any:
    data = rows() if data is None else data
    callback = lx.integrations.transformers.CascadeCallback(cascade, **how)
    return Trainer(
        model=cascade, args=arguments(folder, **more), train_dataset=data, eval_dataset=data[:6], callbacks=[callback]
    )


class PeftTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that keeps all columns. It would prune `x`, which is not in the signature of peft's wrapper."""

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["x", "labels"]


@pytest.mark.parametrize(
    "more",
    [
        {},
        pytest.param(
            {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "weight_decay": 0.3}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"gradient_accumulation_steps": 3, "lr_scheduler_type": "linear", "label_names": ["labels"]},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "accumulated-clipped-decayed", "last-batch-short-and-linear"],
)
def test_one_stage_equals_peft_in_the_same_trainer(tmp_path: Path, more: dict[str, Any]) -> None:
    cascade = adapted(SPEC, 0.0, torch.float64)
    data = rows(18, torch.float64)
    lora = lora_of(cascade, net(0.0, torch.float64), TARGETS)
    theirs = PeftTrainer(model=lora, args=arguments(tmp_path / "peft", **more), train_dataset=data)
    theirs.train()
    ours = trainer_of(cascade, tmp_path / "ours", {"steps": 1000}, data, **more)
    ours.train()
    assert len(losses(ours)) > 3
    assert losses(ours) == pytest.approx(losses(theirs), abs=LOGGED, rel=0)
    expected = lora.merge_and_unload().state_dict()
    for name, value in cascade.release().state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-10, rtol=0)


def test_a_number_of_stages_divides_the_steps(tmp_path: Path) -> None:
    """18 rows in batches of 4 are 5 steps an epoch: 10 steps in 3 stages end after steps 3, 7 and 10."""
    cascade = adapted(SPEC, 0.0, torch.float64)
    trainer = trainer_of(cascade, tmp_path, {"stages": 3}, rows(18, torch.float64), num_train_epochs=2)
    trainer.train()
    stages = [line["stage"] for line in trainer.state.log_history if "loss" in line]
    assert stages == [1] * 3 + [2] * 4 + [3] * 3
    assert cascade.stage == 4
