"""The Trainer and accelerate on two processes, as with torchrun, equal one process on the same batches."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorasc_fx as lx
from tests.integrations.kit import adapted, arguments, rows
from tests.parallel.ranks import on_ranks

pytestmark = pytest.mark.slow

SPEC = lx.CascadeSpec(rank=2, lora_alpha=6.0, pace=0.4, noise=lx.Noise(0.1), train=("head.bias",))
FAST = lx.CascadeSpec(rank=2, lora_alpha=6.0, pace=0.7, restart="fast")
BATCH = 4
"""Rows of a batch, of all processes together."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def as_torchrun(rank: int, count: int, port: int) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "ACCELERATE_USE_CPU": "true",
        **{k: str(v) for k, v in variables.items()},
    }


def by_trainer(rank: int, count: int, port: int, folder: str, stop: int = 0) -> dict[str, Tensor]:
    """Train three epochs, or resume from the checkpoint in the folder. `stop` is the step to stop at."""
    from transformers import Trainer

    as_torchrun(rank, count, port)
    cascade = adapted(SPEC, 0.0, torch.float64)
    more: dict[str, Any] = {"per_device_train_batch_size": BATCH // count, "max_steps": stop} if stop else {}
    more |= {"per_device_train_batch_size": BATCH // count, "per_device_eval_batch_size": BATCH // count}
    trainer = Trainer(
        model=cascade,
        args=arguments(
            Path(folder), num_train_epochs=3, save_strategy="steps", save_steps=3, eval_strategy="epoch", **more
        ),
        train_dataset=rows(16, torch.float64),
        eval_dataset=rows(8, torch.float64),
        callbacks=[lx.integrations.transformers.CascadeCallback(cascade, epochs=1)],
    )
    saved = any(Path(folder).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=saved or None)
    results = {"evaluated": torch.tensor(trainer.evaluate()["eval_loss"]), "stage": torch.tensor(cascade.stage)}
    return results | {name: value.clone() for name, value in cascade.release().state_dict().items()}


def by_accelerate(rank: int, count: int, port: int, folder: str) -> dict[str, Tensor]:
    """Train in a loop with accelerate, with gradients accumulated over two batches and clipped."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    as_torchrun(rank, count, port)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    cascade = adapted(FAST, 0.0, torch.float64)
    data = [{"x": row["x"], "labels": row["labels"]} for row in rows(16, torch.float64)]
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    wrapper, optimizer, loader = accelerator.prepare(cascade, optimizer, DataLoader(data, BATCH // count))
    for stage in cascade.stages(3, optimizer):
        for batch in loader:
            with accelerator.accumulate(wrapper):
                accelerator.backward(wrapper(**batch)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapper.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(f"{folder}/{stage.number}")
    return {name: value.clone() for name, value in cascade.release().state_dict().items()}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    (one,) = on_ranks(1, by_accelerate, free_port(), str(tmp_path / "1"), group=False)
    both = on_ranks(2, by_accelerate, free_port(), str(tmp_path / "2"), group=False)
    before = adapted(FAST, 0.0, torch.float64).model.state_dict()
    assert all((one[name] - value).abs().max() > 1e-3 for name, value in before.items() if value.dim() > 1)
    for values in both:
        torch.testing.assert_close(values, one, atol=1e-10, rtol=0)


def test_a_trainer_resumes_on_any_number_of_processes(tmp_path: Path) -> None:
    """Stopped on two processes in the middle of the second stage and resumed, it equals one uninterrupted process."""
    (one,) = on_ranks(1, by_trainer, free_port(), str(tmp_path / "one"), group=False)
    on_ranks(2, by_trainer, free_port(), str(tmp_path / "two"), 6, group=False)
    shutil.copytree(tmp_path / "two", tmp_path / "other")
    ended = on_ranks(2, by_trainer, free_port(), str(tmp_path / "two"), group=False)
    ended += on_ranks(1, by_trainer, free_port(), str(tmp_path / "other"), group=False)
    for values in ended:
        assert values["stage"] == one["stage"]
        for name, value in one.items():
            torch.testing.assert_close(values[name], value, atol=1e-6 if name == "evaluated" else 1e-10, rtol=0)
