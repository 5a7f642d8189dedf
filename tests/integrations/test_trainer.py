"""A cascade in transformers' Trainer: losses, metrics, what is saved, resumed and best, and errors before training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

import lorasc_fx as lx
from tests.integrations.kit import (
    adapted,
    arguments,
    llama,
    losses,
    net,
    rows,
    texts,
    values_of,
    with_weights,
)
from tests.kit.errors import raises
from tests.kit.models import lora_of

SPEC = lx.CascadeSpec(rank=2, pace=0.5, noise=lx.Noise(0.2), train=("head.bias",))
CallbackOf = lx.integrations.transformers.CascadeCallback


def trainer_of(cascade: lx.Cascade, folder: Path, how: dict[str, Any], *callbacks: Any, **more: Any) -> Any:
    return Trainer(
        model=cascade, args=arguments(folder, **more), train_dataset=rows(), eval_dataset=rows(7),
        callbacks=[CallbackOf(cascade, **how), *callbacks],
    )  # fmt: skip


@pytest.mark.parametrize("how", [{"steps": 2}, {"stages": 1}, {"steps": 99}, {"epochs": 99}])
def test_the_best_model_is_the_one_that_was_measured(tmp_path: Path, how: dict[str, int]) -> None:
    """With one stage by the fast weights, because the slow ones are the base until it ends."""
    cascade = adapted(SPEC if how == {"steps": 2} else lx.CascadeSpec(rank=2, pace=1.0))
    more = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 2.0}
    trainer = trainer_of(cascade, tmp_path, how, load_best_model_at_end=True, **more)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses.values())
    assert best < losses[max(losses)]  # it has run away since
    assert len({*losses.values()}) == (len(losses) // 2 + 1 if how == {"steps": 2} else len(losses))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)
    cascade.eval()
    with torch.no_grad(), cascade.weights("slow"):  # what save_model and release return
        data = rows(7)
        x, labels = (torch.stack([row[name] for row in data]) for name in ("x", "labels"))
        assert cascade(x, labels)["loss"].item() == pytest.approx(best, abs=1e-6)


@pytest.mark.filterwarnings("ignore:the state dict of a cascade:lorasc_fx.errors.LorascWarning")  # a spy reads it
def test_evaluation_and_the_saved_model_are_the_slow_weights(tmp_path: Path) -> None:
    """In the middle of a stage, beside a copy of the plain model with W0 + S by the formula."""
    x, labels = (torch.stack([row[name] for row in rows(7)]) for name in ("x", "labels"))
    for evaluate in ("slow", "fast"):
        cascade = adapted(lx.CascadeSpec(rank=2, pace=0.5, noise=lx.Noise(0.2)))
        trainer = trainer_of(cascade, tmp_path / evaluate, {"steps": 3, "evaluate": evaluate}, max_steps=5)
        trainer.add_callback(Spy(trainer, evaluate, x, labels))
        trainer.train()
        assert trainer.spied == 2


class Spy(TrainerCallback):  # type: ignore[misc]
    """Evaluates and saves in the middle of training."""

    def __init__(self, trainer: Any, evaluate: str, x: Tensor, labels: Tensor) -> None:
        self.trainer, self.evaluate, self.x, self.labels = trainer, evaluate, x, labels
        trainer.spied = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_about: Any) -> None:
        if state.global_step not in (4, 5):
            return
        cascade = self.trainer.model
        slow, fast = values_of(cascade), values_of(cascade, "fast")
        noisy = {name: value.double() for name, value in cascade.model.state_dict().items()}
        assert all((noisy[name] - slow[name]).abs().max() > 1e-3 for name in slow)  # noise
        weights = {"slow": slow, "fast": fast}
        losses = {}
        for name, values in weights.items():
            with torch.no_grad():
                losses[name] = with_weights(cascade.model, values)(self.x, self.labels)["loss"].item()
        assert len({round(loss, 4) for loss in losses.values()}) == 2
        assert self.trainer.evaluate()["eval_loss"] == pytest.approx(losses[self.evaluate], abs=1e-5)
        predicted = self.trainer.predict(rows(7)).metrics["test_loss"]
        assert predicted == pytest.approx(losses[self.evaluate], abs=1e-5)
        self.trainer.save_model(f"{args.output_dir}/saved")
        saved = load_file(f"{args.output_dir}/saved/model.safetensors")
        for name, value in slow.items():
            torch.testing.assert_close(saved[name].double(), value, atol=1e-6, rtol=0)
        assert set(saved) == set(cascade.model.state_dict())
        for name, value in cascade.model.state_dict().items():
            assert torch.equal(value.double(), noisy[name])  # restored bit for bit
        self.trainer.spied += 1


def test_a_second_training_goes_on(tmp_path: Path) -> None:
    """The first one was cut short: its stage is folded, and no noise is left; the second begins with a stage."""
    cascade = adapted(lx.CascadeSpec(rank=2, pace=0.5, noise=lx.Noise(0.2)))
    trainer = trainer_of(cascade, tmp_path, {"steps": 4}, max_steps=6)
    trainer.train()
    assert cascade.stage == 3
    state = cascade.model.state_dict()
    for name, value in values_of(cascade).items():
        torch.testing.assert_close(state[name].double(), value, atol=1e-6, rtol=0)
    trainer.train()
    assert cascade.stage == 5


def test_a_number_of_stages_divides_the_steps(tmp_path: Path) -> None:
    """20 rows in batches of 4 are 5 steps an epoch: 10 steps in 3 stages end after steps 3, 7 and 10."""
    cascade = adapted(SPEC)
    trainer = trainer_of(cascade, tmp_path, {"stages": 3}, num_train_epochs=2)
    trainer.train()
    assert [line["stage"] for line in trainer.state.log_history if "loss" in line] == [1] * 3 + [2] * 4 + [3] * 3
    assert cascade.stage == 4


TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
LINEARS = lx.CascadeSpec(
    targets=tuple(f"*.{name}.weight" for name in TARGETS), rank=2, lora_alpha=6.0, pace=1.0, placement="beside"
)


def adapted_llama(spec: lx.CascadeSpec = LINEARS) -> lx.Cascade:
    rows = texts(2)
    kwargs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    kwargs["num_items_in_batch"] = torch.tensor(11)
    return lx.adapt(llama().train(), kwargs=kwargs, spec=spec)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize(
    ("more", "close"),
    [
        ({"gradient_accumulation_steps": 2}, 1e-6),  # normed by the tokens of both batches, shifted by one
        ({"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2}, 1e-6),  # labels shifted by the Trainer
        ({"bf16": True}, 2e-2),
    ],
    ids=["tokens", "smoothed", "bf16"],
)
def test_the_losses_are_those_of_peft_in_the_same_trainer(tmp_path: Path, more: dict[str, Any], close: float) -> None:
    data = texts(12)
    cascade = adapted_llama()
    theirs = Trainer(
        model=lora_of(cascade, llama(), TARGETS),
        args=arguments(tmp_path, **more),
        train_dataset=data,
        eval_dataset=data,
    )
    theirs.train()
    callback = lx.integrations.transformers.CascadeCallback(cascade, steps=1000, evaluate="fast")
    ours = Trainer(
        model=cascade, args=arguments(tmp_path, **more), train_dataset=data, eval_dataset=data, callbacks=[callback]
    )
    ours.train()
    assert len(losses(ours)) > 2
    assert losses(ours) == pytest.approx(losses(theirs), abs=close, rel=0)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], abs=close)
    assert ours.state.total_flos > 0


NOISY = lx.CascadeSpec(rank=2, pace=0.5, noise=lx.Noise(0.2))


def loss_of(weights: dict[str, torch.Tensor]) -> float:
    data = rows(6)
    x, labels = (torch.stack([row[name] for row in data]) for name in ("x", "labels"))
    return F.cross_entropy(with_weights(net(), weights)(x)["logits"], labels).item()


def share(predictions: Any) -> dict[str, float]:
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def test_logs_tensorboard_and_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    cascade, expected = adapted(NOISY), []

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
    losses = [(entry["eval_slow_loss"], entry["eval_fast_loss"]) for entry in evaluations]
    assert len(losses) == 4  # after steps 2, 4, 6 and the last
    for ours, by_formula in zip(losses, expected, strict=True):
        assert ours == pytest.approx(by_formula, abs=1e-6)
    assert losses[0][0] != pytest.approx(losses[0][1], abs=1e-4)
    for entry in evaluations:
        assert entry["eval_loss"] == entry["eval_slow_loss"]
        assert entry["eval_accuracy"] == entry["eval_slow_accuracy"]
    names = {"train/stage", "eval/slow_loss", "eval/fast_loss", "eval/slow_accuracy"}
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert names <= set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("train/stage")] == list(
        zip(range(1, 8), [1, 1, 1, 2, 2, 2, 3], strict=True)
    )
    assert names <= {name for entry in steps + evaluations for name in rewrite_logs(entry)}  # as W&B is sent them


PLAIN = lx.CascadeSpec(rank=2)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"epochs": 1, "steps": 2}, ("conflicting-options", "epochs", "steps")),
        ({"steps": 0}, ("invalid-value", "steps", "0")),
        ({"stages": 0}, ("invalid-value", "stages", "0")),
        ({"stages": 2, "epochs": 1}, ("conflicting-options", "epochs", "stages")),
        ({"epochs": True}, ("invalid-value", "epochs", "True")),
        ({"evaluate": "slwo"}, ("invalid-value", "evaluate", "slow, fast")),
        ({"evaluate": ("slow", "best")}, ("invalid-value", "evaluate", "slow, fast")),
    ],
    ids=str,
)
def test_how_stages_end_and_are_evaluated(how: dict[str, Any], expected: tuple[str, ...]) -> None:
    with raises(lx.SpecError, *expected):
        CallbackOf(adapted(PLAIN), **how)


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(rows())


FOREIGN = torch.optim.SGD(net().parameters(), lr=0.1)
OPTION = "trainer-not-supported"
TRAININGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], tuple[Any, ...]]] = {
    "neftune": ({}, {"neftune_noise_alpha": 5.0}, {}, (OPTION, "neftune_noise_alpha", 5.0)),
    "cast evaluation": ({}, {"bf16_full_eval": True}, {}, (OPTION, "bf16_full_eval", True)),
    "no length": ({}, {"max_steps": 3}, {"train_dataset": Stream()}, ("invalid-data", "epochs", "1")),
    "more stages than steps": ({"stages": 4}, {"max_steps": 3}, {}, ("invalid-value", "stages is 4", "3 optimizer")),
    "another optimizer": (
        {}, {}, {"optimizers": (FOREIGN, torch.optim.lr_scheduler.ConstantLR(FOREIGN))},
        ("optimizer-lacks-parameters",),
    ),
    "another model": ({}, {}, {"model": net()}, (OPTION, "Net")),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAININGS)
def test_unsupported_trainings(case: str, tmp_path: Path) -> None:
    how, more, changes, expected = TRAININGS[case]
    cascade = adapted(PLAIN)
    usual = {"model": cascade, "train_dataset": rows(), "callbacks": [CallbackOf(cascade, **how)]}
    with raises((lx.SpecError, lx.StateError), *expected):
        Trainer(args=arguments(tmp_path, **more), **{**usual, **changes}).train()


def test_the_callback_needs_its_trainer_from_the_start(tmp_path: Path) -> None:
    cascade = adapted(PLAIN)
    trainer = Trainer(model=cascade, args=arguments(tmp_path), train_dataset=rows())
    trainer.add_callback(CallbackOf(cascade))
    with raises(lx.StateError, OPTION):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("deepspeed", True, (OPTION, "deepspeed", "DistributedDataParallel", "parallel.fsdp.shard")),
        ("fsdp", True, (OPTION, "fsdp")),
        ("_n_gpu", 2, ("wrapper-not-supported", "2")),
        ("sync_ref_model", True, (OPTION, "sync_ref_model")),  # of TRL, which write into the model
        ("cast_lm_head_to_fp32", True, (OPTION, "cast_lm_head_to_fp32")),
        ("use_vllm", True, (OPTION, "use_vllm=False")),  # of TRL, which would sample from other weights
        ("vllm_server_base_url", "http://localhost:8000", (OPTION, "use_vllm=False")),  # as for AsyncGRPO
    ],
)
def test_unsupported_training_arguments(name: str, value: Any, expected: tuple[str, ...], tmp_path: Path) -> None:
    """These need other packages or several devices, so the test calls the event itself."""
    cascade, args = adapted(PLAIN), arguments(tmp_path)
    setattr(args, name, value)
    with raises(lx.SpecError, *expected):
        CallbackOf(cascade).on_init_end(args, None, None, model=cascade)


def test_learning_rates_of_the_spec(tmp_path: Path) -> None:
    """The Trainer's own optimizer has a single rate, which is an error. An optimizer with `param_groups` trains."""
    spec = lx.CascadeSpec(rank=2, lr_ratio=16.0)
    cascade = adapted(spec)
    trainer = Trainer(model=cascade, args=arguments(tmp_path), train_dataset=rows(), callbacks=[CallbackOf(cascade)])
    with raises(lx.SpecError, "optimizer-differs", "lora_B", 0.32, "0.02"):
        trainer.train()
    cascade = adapted(spec)
    trainer = Trainer(
        model=cascade, args=arguments(tmp_path, warmup_steps=2, lr_scheduler_type="linear"), train_dataset=rows(),
        callbacks=[CallbackOf(cascade)], optimizers=(torch.optim.AdamW(cascade.param_groups(lr=0.02)), None),
    )  # fmt: skip
    trainer.train()
    assert cascade.stage == 3


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "lorasc_fx.integrations.transformers")
    monkeypatch.delitem(vars(lx.integrations), "transformers")
    with raises(lx.errors.MissingExtra, "missing-extra", "transformers", "lorasc-fx[loops]"):
        _ = lx.integrations.transformers


def test_a_trainer_of_the_model_that_was_adapted(tmp_path: Path) -> None:
    """Its weights are frozen. torch would only say that a tensor does not require grad."""
    cascade = adapted(PLAIN)
    with raises(lx.StateError, "trainer-not-supported", "Trainer(model=cascade", "CascadeCallback"):
        Trainer(model=cascade.model, args=arguments(tmp_path), train_dataset=rows()).train()
    Trainer(model=cascade.model, args=arguments(tmp_path), eval_dataset=rows(7)).evaluate()
