"""Errors that a CascadeCallback raises before anything trains."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer

import lorasc_fx as lx
from tests.integrations.kit import adapted, arguments, net, rows
from tests.kit.errors import raises, warns

SPEC = lx.CascadeSpec(rank=2)
CallbackOf = lx.integrations.transformers.CascadeCallback


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"epochs": 1, "steps": 2}, ("conflicting-options", "epochs", "steps")),
        ({"steps": 0}, ("invalid-value", "steps", "0")),
        ({"stages": 0}, ("invalid-value", "stages", "0")),
        ({"stages": 2, "epochs": 1}, ("conflicting-options", "epochs", "stages")),
        ({"epochs": True}, ("invalid-value", "epochs", "True")),
        ({"evaluate": "slwo"}, ("invalid-value", "evaluate", "slwo", "slow, fast, trained")),
        *(
            ({"evaluate": given}, ("invalid-value", "evaluate", "slow, fast, trained"))
            for given in ((), ("slow", "slow"), ("slow", "best"), "best")
        ),
    ],
    ids=str,
)
def test_how_stages_end_and_are_evaluated(how: dict[str, Any], expected: tuple[str, ...]) -> None:
    with raises(lx.SpecError, *expected):
        CallbackOf(adapted(SPEC), **how)


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(rows())


FOREIGN = torch.optim.SGD(net().parameters(), lr=0.1)
OPTION = "trainer-not-supported"
STEPS = {"eval_strategy": "steps", "eval_steps": 1}
TRAININGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], tuple[Any, ...]]] = {
    "neftune": ({}, {"neftune_noise_alpha": 5.0}, {}, (OPTION, "neftune_noise_alpha", 5.0)),
    "cast evaluation": ({}, {"bf16_full_eval": True}, {}, (OPTION, "bf16_full_eval", True)),
    "no length": ({}, {"max_steps": 3}, {"train_dataset": Stream()}, ("invalid-data", "epochs", "1")),
    "more stages than steps": ({"stages": 4}, {"max_steps": 3}, {}, ("invalid-value", "stages is 4", "3 optimizer")),
    "no evaluations": ({"plateau": 2}, {}, {}, ("conflicting-options",)),
    "which loss": (
        {"plateau": 2}, STEPS, {"eval_dataset": {"a": rows(4), "b": rows(5)}}, (OPTION, "eval_fast_loss")
    ),
    "another optimizer": (
        {}, {}, {"optimizers": (FOREIGN, torch.optim.lr_scheduler.ConstantLR(FOREIGN))},
        ("optimizer-lacks-parameters",),
    ),
    "another model": ({}, {}, {"model": net()}, (OPTION, "Net")),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAININGS)
def test_unsupported_trainings(case: str, tmp_path: Path) -> None:
    how, more, given, expected = TRAININGS[case]
    cascade = adapted(SPEC)
    usual = {"model": cascade, "train_dataset": rows(), "callbacks": [CallbackOf(cascade, **how)]}
    with raises((lx.SpecError, lx.StateError), *expected):
        Trainer(args=arguments(tmp_path, **more), **{**usual, **given}).train()


def test_the_callback_needs_its_trainer_from_the_start(tmp_path: Path) -> None:
    cascade = adapted(SPEC)
    with raises(lx.StateError, OPTION):
        CallbackOf(cascade).on_init_end(arguments(Path("unused")), None, None, model=cascade)
    trainer = Trainer(model=cascade, args=arguments(tmp_path), train_dataset=rows())
    trainer.add_callback(CallbackOf(cascade))
    with raises(lx.StateError, OPTION):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("deepspeed", True, (OPTION, "deepspeed", "DistributedDataParallel")),
        ("fsdp", True, (OPTION, "fsdp", "DistributedDataParallel", "parallel.fsdp.shard")),
        ("_n_gpu", 2, ("wrapper-not-supported", "2")),
        ("sync_ref_model", True, (OPTION, "sync_ref_model")),  # of TRL, which write into the model
        ("cast_lm_head_to_fp32", True, (OPTION, "cast_lm_head_to_fp32")),
    ],
)
def test_unsupported_training_arguments(name: str, value: Any, expected: tuple[str, ...], tmp_path: Path) -> None:
    """These need other packages or several devices, so the test calls the event itself."""
    cascade, args = adapted(SPEC), arguments(tmp_path)
    setattr(args, name, value)
    with raises(lx.SpecError, *expected):
        CallbackOf(cascade).on_init_end(args, None, None, model=cascade)


@pytest.mark.parametrize(
    ("fields", "name", "asked"),
    [
        ({"lr_ratio": 16.0}, "lora_B", 0.32),
        ({"train": ("head.bias",), "train_rules": (lx.TrainRule("head.*", lr=0.5),)}, "train:head.*", 0.5),
    ],
    ids=["ratio", "rule"],
)
def test_learning_rates_of_the_spec(tmp_path: Path, fields: dict[str, Any], name: str, asked: float) -> None:
    """The Trainer's own optimizer has a single rate, which is an error. An optimizer with `param_groups` trains."""
    spec = lx.CascadeSpec(rank=2, **fields)
    cascade = adapted(spec)
    trainer = Trainer(model=cascade, args=arguments(tmp_path), train_dataset=rows(), callbacks=[CallbackOf(cascade)])
    with raises(lx.SpecError, "optimizer-differs", name, asked, "0.02"):
        trainer.train()
    cascade = adapted(spec)
    trainer = Trainer(
        model=cascade, args=arguments(tmp_path, warmup_steps=2, lr_scheduler_type="linear"), train_dataset=rows(),
        callbacks=[CallbackOf(cascade)], optimizers=(torch.optim.AdamW(cascade.param_groups(lr=0.02)), None),
    )  # fmt: skip
    trainer.train()
    assert cascade.stage == 3


@pytest.mark.parametrize(
    ("package", "inner", "told"),
    [("transformers", (), "lorasc-fx[loops]"), ("lightning", ("lightning.pytorch",), "pip install lightning")],
)
def test_a_missing_package(package: str, inner: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (package, *inner):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"lorasc_fx.integrations.{package}", raising=False)
    monkeypatch.delitem(vars(lx.integrations), package, raising=False)
    with raises(lx.errors.MissingExtra, "missing-extra", package, told):
        getattr(lx.integrations, package)


def test_an_unknown_integration() -> None:
    assert {"lightning", "transformers"} <= set(dir(lx.integrations))
    with pytest.raises(
        AttributeError,
        match=r"^module 'lorasc_fx\.integrations' has no attribute 'trasnformers'; nearest: 'transformers'",
    ):
        _ = lx.integrations.trasnformers


def test_a_loop_without_the_callback_warns_of_an_unfolded_save(tmp_path: Path) -> None:
    """By `save_model` and in a checkpoint. With the callback neither warns, as the other tests show."""
    trainer = Trainer(model=adapted(SPEC), args=arguments(tmp_path / "a", max_steps=1), train_dataset=rows())
    trainer.train()
    more = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    other = Trainer(model=adapted(SPEC), args=arguments(tmp_path / "b", **more), train_dataset=rows())
    accelerator = accelerate.Accelerator(cpu=True)
    for call in (
        lambda: trainer.save_model(str(tmp_path / "saved")),
        other.train,
        lambda: accelerator.save_model(accelerator.prepare(adapted(SPEC)), str(tmp_path)),
    ):
        with warns("unfolded-save"):
            call()
