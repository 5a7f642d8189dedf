"""What a CascadeCallback refuses, before anything trains."""

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
        ({"epochs": True}, ("invalid-value", "epochs", "True")),
        ({"schedule": "step"}, ("invalid-value", "schedule", "step", "training, stage")),
        ({"evaluate": "slwo"}, ("invalid-value", "evaluate", "slwo", "slow, fast, trained")),
    ],
)
def test_how_stages_end(how: dict[str, Any], expected: tuple[str, ...]) -> None:
    with raises(lx.SpecError, *expected):
        CallbackOf(adapted(SPEC), **how)


def test_another_model_than_the_trainers(tmp_path: Path) -> None:
    with raises(lx.StateError, "trainer-not-supported", "Net"):
        Trainer(model=net(), args=arguments(tmp_path), callbacks=[CallbackOf(adapted(SPEC))])


def test_a_callback_that_comes_too_late(tmp_path: Path) -> None:
    cascade = adapted(SPEC)
    trainer = Trainer(model=cascade, args=arguments(tmp_path), train_dataset=rows())
    trainer.add_callback(CallbackOf(cascade))
    with raises(lx.StateError, "trainer-not-supported"):
        trainer.train()


def test_no_trainer_at_all() -> None:
    cascade = adapted(SPEC)
    with raises(lx.StateError, "trainer-not-supported"):
        CallbackOf(cascade).on_init_end(arguments(Path("unused")), None, None, model=cascade)


@pytest.mark.parametrize("more", [{"neftune_noise_alpha": 5.0}, {"bf16_full_eval": True}], ids=str)
def test_what_changes_the_model_behind_its_graphs(tmp_path: Path, more: dict[str, Any]) -> None:
    cascade, ((name, value),) = adapted(SPEC), more.items()
    with raises(lx.SpecError, "trainer-not-supported", name, value):
        Trainer(model=cascade, args=arguments(tmp_path, **more), callbacks=[CallbackOf(cascade)])


def test_deepspeed(tmp_path: Path) -> None:
    """A Trainer takes it where it is installed, so that the event is called here."""
    cascade, args = adapted(SPEC), arguments(tmp_path)
    args.deepspeed = True
    with raises(lx.SpecError, "trainer-not-supported", "deepspeed", "fsdp=True"):
        CallbackOf(cascade).on_init_end(args, None, None, model=cascade)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"version": 1, "sync_module_states": False}, ("fsdp_version", "1", "2")),
        ({"reshard_after_forward": False}, ("reshard_after_forward", "False", "True")),
        ({"activation_checkpointing": True}, ("activation_checkpointing", "graphs")),
        ({"cpu_ram_efficient_loading": True}, ("cpu_ram_efficient_loading", "materialize", "leave fsdp out")),
        ({"cpu_offload": True}, ("cpu_offload", "True", "False")),
        ({"xla": True}, ("fsdp_config", "xla")),
    ],
    ids=lambda value: next(iter(value)),
)
@pytest.mark.filterwarnings("ignore:FSDP1")
def test_options_of_fsdp(
    config: dict[str, Any], words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Trainer takes `fsdp` on several processes alone, so that the event is called here; its plugin writes into the
    environment.
    """
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "false")
    cascade = adapted(SPEC)
    args = arguments(tmp_path, fsdp=True, fsdp_config=config)
    with raises(lx.SpecError, "trainer-not-supported", *words):
        CallbackOf(cascade).on_init_end(args, None, None, model=cascade)
    assert not any(hasattr(value, "to_local") for value in cascade.parameters())


@pytest.mark.parametrize("name", ["sync_ref_model", "cast_lm_head_to_fp32"])
def test_arguments_of_trl_that_write_into_the_model(tmp_path: Path, name: str) -> None:
    cascade, args = adapted(SPEC), arguments(tmp_path)
    setattr(args, name, True)
    with raises(lx.SpecError, "trainer-not-supported", name):
        Trainer(model=cascade, args=args, callbacks=[CallbackOf(cascade)])


@pytest.mark.parametrize(
    ("how", "more", "words"),
    [
        ({}, {"lr_scheduler_type": "inverse_sqrt"}, ("inverse_sqrt", "linear", "StageSchedule")),
        ({"plateau": 1}, {"lr_scheduler_type": "cosine"}, ("plateau", "constant_with_warmup")),
        ({"plateau": 1}, {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, ("plateau", "number of")),
    ],
    ids=str,
)
def test_a_schedule_that_no_stage_can_have(
    tmp_path: Path, how: dict[str, Any], more: dict[str, Any], words: tuple[str, ...]
) -> None:
    callback = CallbackOf(adapted(SPEC), schedule="stage", **how)
    with raises(lx.SpecError, "conflicting-options", *words):
        Trainer(model=callback.cascade, args=arguments(tmp_path, **more), callbacks=[callback])


def test_epochs_of_data_without_a_length(tmp_path: Path) -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(rows())

    cascade = adapted(SPEC)
    trainer = Trainer(
        model=cascade, args=arguments(tmp_path, max_steps=3), train_dataset=Stream(), callbacks=[CallbackOf(cascade)]
    )
    with raises(lx.SpecError, "invalid-data", "epochs", "1"):  # fmt: skip
        trainer.train()


def test_a_plateau_without_evaluations(tmp_path: Path) -> None:
    cascade = adapted(SPEC)
    trainer = Trainer(
        model=cascade, args=arguments(tmp_path), train_dataset=rows(), callbacks=[CallbackOf(cascade, plateau=2)]
    )
    with raises(lx.SpecError, "conflicting-options"):  # fmt: skip
        trainer.train()


def test_a_plateau_of_which_loss(tmp_path: Path) -> None:
    cascade = adapted(SPEC)
    trainer = Trainer(
        model=cascade, args=arguments(tmp_path, eval_strategy="steps", eval_steps=1), train_dataset=rows(),
        eval_dataset={"a": rows(4), "b": rows(5)}, callbacks=[CallbackOf(cascade, plateau=2)],
    )  # fmt: skip
    with raises(lx.SpecError, "trainer-not-supported", "eval_fast_loss"):
        trainer.train()


def test_an_optimizer_without_the_branches(tmp_path: Path) -> None:
    cascade = adapted(SPEC)
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    trainer = Trainer(
        model=cascade, args=arguments(tmp_path), train_dataset=rows(), callbacks=[CallbackOf(cascade)],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
    )  # fmt: skip
    with raises(lx.StateError, "optimizer-lacks-parameters"):
        trainer.train()


@pytest.mark.parametrize(
    ("fields", "name", "asked"),
    [
        ({"lr_ratio": 16.0}, "lora_B", 0.32),
        ({"train": ("head.bias",), "train_rules": (lx.TrainRule("head.*", lr=0.5),)}, "train:head.*", 0.5),
    ],
    ids=["ratio", "rule"],
)
def test_learning_rates_of_the_spec(tmp_path: Path, fields: dict[str, Any], name: str, asked: float) -> None:
    """The Trainer's own optimizer has one for all; one of `param_groups` has what is asked for, and trains."""
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


def test_copies_on_several_devices(tmp_path: Path) -> None:
    cascade, args = adapted(SPEC), arguments(tmp_path)
    args._n_gpu = 2
    with raises(lx.SpecError, "wrapper-not-supported", "2"):
        CallbackOf(cascade).on_init_end(args, None, None, model=cascade)


@pytest.mark.parametrize("name", ["transformers"])
def test_a_package_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    getattr(lx.integrations, name)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"lorasc_fx.integrations.{name}")
    monkeypatch.delattr(lx.integrations, name)
    with raises(lx.errors.MissingExtra, "missing-extra", name, "lorasc-fx[loops]"):
        getattr(lx.integrations, name)


def test_lightning_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "lorasc_fx.integrations.lightning", raising=False)
    monkeypatch.delitem(vars(lx.integrations), "lightning", raising=False)
    with raises(lx.errors.MissingExtra, "missing-extra", "lightning"):
        _ = lx.integrations.lightning


def test_a_loop_that_is_not_there() -> None:
    assert {"progress", "transformers"} <= set(dir(lx.integrations))
    with pytest.raises(
        AttributeError,
        match=r"^module 'lorasc_fx\.integrations' has no attribute 'trasnformers'; nearest: 'transformers', 'progress'",
    ):
        _ = lx.integrations.trasnformers


def test_a_trainer_that_saves_an_unfolded_cascade(tmp_path: Path) -> None:
    """Without the callback, by `save_model` and in a checkpoint; with it neither, as the other tests show."""
    trainer = Trainer(model=adapted(SPEC), args=arguments(tmp_path / "a", max_steps=1), train_dataset=rows())
    trainer.train()
    with warns("unfolded-save"):
        trainer.save_model(str(tmp_path / "saved"))
    more = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = Trainer(model=adapted(SPEC), args=arguments(tmp_path / "b", **more), train_dataset=rows())
    with warns("unfolded-save"):
        trainer.train()


def test_accelerate_that_saves_an_unfolded_cascade(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    with warns("unfolded-save"):
        accelerator.save_model(accelerator.prepare(adapted(SPEC)), str(tmp_path))
