"""Stage, transition, slow and fast metrics under the same names: in the Trainer's logs, TensorBoard and W&B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer
from transformers.integrations.integration_utils import rewrite_logs

import lorasc_fx as lx
from tests.integrations.kit import adapted, arguments, net, rows, values_of, with_weights

CallbackOf = lx.integrations.transformers.CascadeCallback
SPEC = lx.CascadeSpec(rank=2, pace=0.5, noise=lx.Noise(0.2))


def loss_of(weights: dict[str, torch.Tensor]) -> float:
    data = rows(6)
    x, labels = (torch.stack([row[name] for row in data]) for name in ("x", "labels"))
    return F.cross_entropy(with_weights(net(), weights)(x)["logits"], labels).item()


def share(predictions: Any) -> dict[str, float]:
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def trainer_of(cascade: lx.Cascade, folder: Path, how: dict[str, Any], **more: Any) -> Any:
    return Trainer(
        model=cascade, args=arguments(folder, **more), train_dataset=rows(12), eval_dataset=rows(6),
        callbacks=[CallbackOf(cascade, **how)], compute_metrics=share,
    )  # fmt: skip


def test_logs_tensorboard_and_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    cascade, expected = adapted(SPEC), []

    class Spy(CallbackOf):  # type: ignore[valid-type, misc]
        def on_evaluate(self, *args: Any, **about: Any) -> None:
            expected.append(tuple(loss_of(values_of(cascade, view)) for view in ("slow", "fast")))

    more = {"report_to": ["tensorboard"], "eval_strategy": "steps", "eval_steps": 2, "max_steps": 7}
    trainer = Trainer(
        model=cascade, args=arguments(tmp_path, logging_steps=1, **more), train_dataset=rows(12),
        eval_dataset=rows(6), callbacks=[Spy(cascade, steps=3, evaluate=("slow", "fast"))], compute_metrics=share,
    )  # fmt: skip
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["stage"] for entry in steps] == [1, 1, 1, 2, 2, 2, 3]
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    found = [(entry["eval_slow_loss"], entry["eval_fast_loss"]) for entry in evaluations]
    assert len(found) == 4  # after steps 2, 4, 6 and the last
    for ours, by_formula in zip(found, expected, strict=True):
        assert ours == pytest.approx(by_formula, abs=1e-6)
    assert found[0][0] != pytest.approx(found[0][1], abs=1e-4)
    for entry in evaluations:
        assert entry["eval_loss"] == entry["eval_slow_loss"]
        assert entry["eval_accuracy"] == entry["eval_slow_accuracy"]
    names = {"train/stage", "eval/slow_loss", "eval/fast_loss", "eval/slow_accuracy"}
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert names <= set(events.Tags()["scalars"])
    assert [(each.step, each.value) for each in events.Scalars("train/stage")] == list(
        zip(range(1, 8), [1, 1, 1, 2, 2, 2, 3], strict=True)
    )
    assert names <= {name for entry in steps + evaluations for name in rewrite_logs(entry)}  # as W&B is sent them


def test_a_log_of_several_steps_and_an_evaluation_of_one_kind(tmp_path: Path) -> None:
    cascade = adapted(SPEC)
    trainer = trainer_of(cascade, tmp_path, {"steps": 1, "evaluate": "fast"}, logging_steps=3, max_steps=6)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["stage"] for entry in steps] == [3, 6]
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == metrics["eval_fast_loss"]
    assert "eval_slow_loss" not in metrics
    assert "test_fast_accuracy" in trainer.predict(rows(4)).metrics
