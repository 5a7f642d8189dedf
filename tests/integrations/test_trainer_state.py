"""What a Trainer saves and takes up again: checkpoints without W0, resumes with the same bits, the best model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainerCallback

import lorasc_fx as lx
from tests.integrations.kit import adapted, arguments, rows, values_of, with_weights

SPEC = lx.CascadeSpec(rank=2, pace=0.5, noise=lx.Noise(0.2), train=("head.bias",))
CallbackOf = lx.integrations.transformers.CascadeCallback


def trainer_of(cascade: lx.Cascade, folder: Path, how: dict[str, Any], *callbacks: Any, **more: Any) -> Any:
    return Trainer(
        model=cascade, args=arguments(folder, **more), train_dataset=rows(), eval_dataset=rows(7),
        callbacks=[CallbackOf(cascade, **how), *callbacks],
    )  # fmt: skip


def test_the_best_model_is_the_one_that_was_measured(tmp_path: Path) -> None:
    cascade = adapted(SPEC)
    more = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 2.0}
    trainer = trainer_of(cascade, tmp_path, {"steps": 2}, load_best_model_at_end=True, **more)
    trainer.train()
    found = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(found.values())
    assert best < found[max(found)]  # it has run away since
    assert trainer.evaluate()["eval_loss"] == best
    model = cascade.release().eval()
    with torch.no_grad():
        rest = rows(7)
        x, labels = (torch.stack([each[name] for each in rest]) for name in ("x", "labels"))
        assert model(x, labels)["loss"].item() == pytest.approx(best, abs=1e-6)


@pytest.mark.filterwarnings("ignore:the state dict of a cascade:lorasc_fx.errors.LorascWarning")  # a spy reads it
def test_evaluation_and_the_saved_model_are_the_slow_weights(tmp_path: Path) -> None:
    """In the middle of a stage, beside a copy of the plain model with W0 + S by the formula."""
    x, labels = (torch.stack([each[name] for each in rows(7)]) for name in ("x", "labels"))
    for evaluate in ("slow", "fast", "trained"):
        cascade = adapted(lx.CascadeSpec(rank=2, pace=0.5, noise=lx.Noise(0.2)))
        trainer = trainer_of(cascade, tmp_path / evaluate, {"steps": 3, "evaluate": evaluate}, max_steps=5)
        trainer.add_callback(Spy(trainer, x, labels))
        trainer.train()
        assert trainer.spied == 2


class Spy(TrainerCallback):  # type: ignore[misc]
    """Evaluates and saves in the middle of training."""

    def __init__(self, trainer: Any, x: Tensor, labels: Tensor) -> None:
        self.trainer, self.x, self.labels = trainer, x, labels
        trainer.spied = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_about: Any) -> None:
        if state.global_step not in (4, 5):
            return
        cascade, (callback,) = (
            self.trainer.model,
            [each for each in self.trainer.callback_handler.callbacks if isinstance(each, CallbackOf)],
        )
        slow, fast = values_of(cascade), values_of(cascade, "fast")
        now = {name: value.double() for name, value in cascade.model.state_dict().items()}
        noise = {name: now[name] - slow[name] for name in slow}
        trained = {name: fast[name] + noise[name] for name in slow}
        assert all(value.abs().max() > 1e-3 for value in noise.values())
        wanted = {"slow": slow, "fast": fast, "trained": trained}
        told = {}
        for name, values in wanted.items():
            with torch.no_grad():
                told[name] = with_weights(cascade.model, values)(self.x, self.labels)["loss"].item()
        assert len({round(each, 4) for each in told.values()}) == 3
        assert self.trainer.evaluate()["eval_loss"] == pytest.approx(told[callback.evaluate], abs=1e-5)
        predicted = self.trainer.predict(rows(7)).metrics["test_loss"]
        assert predicted == pytest.approx(told[callback.evaluate], abs=1e-5)
        self.trainer.save_model(f"{args.output_dir}/saved")
        saved = load_file(f"{args.output_dir}/saved/model.safetensors")
        for name, value in slow.items():
            torch.testing.assert_close(saved[name].double(), value, atol=1e-6, rtol=0)
        assert set(saved) == set(cascade.model.state_dict())
        for name, value in cascade.model.state_dict().items():
            assert torch.equal(value.double(), now[name])  # put back, bit for bit
        self.trainer.spied += 1


@pytest.mark.filterwarnings("ignore:stage . ended, and no branch has moved:lorasc_fx.errors.LorascWarning")
def test_a_plateau_ends_a_stage(tmp_path: Path) -> None:
    """A learning rate of 0 is one: the fast weights stand still, and no evaluation after the first finds less."""
    cascade, stages = adapted(lx.CascadeSpec(rank=2)), []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_about: Any) -> None:
            stages.append(cascade.stage)

    more = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0, "num_train_epochs": 2}
    trainer = trainer_of(cascade, tmp_path, {"plateau": 1}, Watch(), **more)
    trainer.train()
    assert stages == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert all(entry["eval_fast_loss"] == pytest.approx(entry["eval_loss"], abs=1e-6) for entry in found)


def test_a_second_training_goes_on(tmp_path: Path) -> None:
    """The first one was cut short: its stage is folded, and no noise is left; the second begins with a stage."""
    cascade = adapted(lx.CascadeSpec(rank=2, pace=0.5, noise=lx.Noise(0.2)))
    trainer = trainer_of(cascade, tmp_path, {"steps": 4}, max_steps=6)
    trainer.train()
    assert cascade.stage == 3
    now = cascade.model.state_dict()
    for name, value in values_of(cascade).items():
        torch.testing.assert_close(now[name].double(), value, atol=1e-6, rtol=0)
    trainer.train()
    assert cascade.stage == 5
