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
from tests.errors.models import exactly
from tests.loops.kit import adapted, arguments, net, rows

SPEC = lx.CascadeSpec(rank=2)
CallbackOf = lx.integrations.transformers.CascadeCallback


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"epochs": 1, "steps": 2}, "epochs and steps both say when a stage ends; give one of them"),
        ({"steps": 0}, "steps is 0; a stage ends after a whole number, 1 or more"),
        ({"epochs": True}, "epochs is True; a stage ends after a whole number, 1 or more"),
        ({"evaluate": "slwo"}, "evaluate is 'slwo'; give one of slow, fast, trained"),
    ],
)
def test_how_stages_end(how: dict[str, Any], sentence: str) -> None:
    with pytest.raises(lx.SpecError, match=exactly(f"CascadeCallback: {sentence}")):
        CallbackOf(adapted(SPEC), **how)


def test_after_release() -> None:
    cascade = adapted(SPEC)
    cascade.release()
    with pytest.raises(lx.StateError, match=r"^CascadeCallback: this cascade was released; "):
        CallbackOf(cascade)


def test_another_model_than_the_trainers(tmp_path: Path) -> None:
    sentence = (
        "CascadeCallback: the Trainer's model is Net, and not the cascade that the callback was given; "
        "give both the same (and no model_init)"
    )
    with pytest.raises(lx.StateError, match=exactly(sentence)):
        Trainer(model=net(), args=arguments(tmp_path), callbacks=[CallbackOf(adapted(SPEC))])


def test_a_callback_that_comes_too_late(tmp_path: Path) -> None:
    cascade = adapted(SPEC)
    trainer = Trainer(model=cascade, args=arguments(tmp_path), train_dataset=rows())
    trainer.add_callback(CallbackOf(cascade))
    sentence = (
        "CascadeCallback: the Trainer was made without it, and has read off the cascade what it needs; "
        "give it as Trainer(callbacks=[...])"
    )
    with pytest.raises(lx.StateError, match=exactly(sentence)):
        trainer.train()


def test_no_trainer_at_all() -> None:
    cascade = adapted(SPEC)
    sentence = "CascadeCallback: nobody that called on_init_end is a Trainer; it works in one only"
    with pytest.raises(lx.StateError, match=exactly(sentence)):
        CallbackOf(cascade).on_init_end(arguments(Path("unused")), None, None, model=cascade)


@pytest.mark.parametrize(
    "more", [{"neftune_noise_alpha": 5.0}, {"activation_checkpointing": True}, {"bf16_full_eval": True}], ids=str
)
def test_what_changes_the_model_behind_its_graphs(tmp_path: Path, more: dict[str, Any]) -> None:
    cascade, ((name, value),) = adapted(SPEC), more.items()
    sentence = (
        f"CascadeCallback: {name} is {value!r}; it changes the model behind the graphs that were captured of it. "
        "Leave it out"
    )
    with pytest.raises(lx.SpecError, match=exactly(sentence)):
        Trainer(model=cascade, args=arguments(tmp_path, **more), callbacks=[CallbackOf(cascade)])


def test_epochs_of_data_without_a_length(tmp_path: Path) -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(rows())

    cascade = adapted(SPEC)
    trainer = Trainer(
        model=cascade, args=arguments(tmp_path, max_steps=3), train_dataset=Stream(), callbacks=[CallbackOf(cascade)]
    )
    with pytest.raises(lx.SpecError, match=exactly(
        "CascadeCallback: epochs is 1, and the data have no length; give steps=..."
    )):  # fmt: skip
        trainer.train()


def test_a_plateau_without_evaluations(tmp_path: Path) -> None:
    cascade = adapted(SPEC)
    trainer = Trainer(
        model=cascade, args=arguments(tmp_path), train_dataset=rows(), callbacks=[CallbackOf(cascade, plateau=2)]
    )
    with pytest.raises(lx.SpecError, match=exactly(
        "CascadeCallback: plateau looks at evaluations, and eval_strategy is 'no'; give another"
    )):  # fmt: skip
        trainer.train()


def test_a_plateau_of_which_loss(tmp_path: Path) -> None:
    cascade = adapted(SPEC)
    trainer = Trainer(
        model=cascade, args=arguments(tmp_path, eval_strategy="steps", eval_steps=1), train_dataset=rows(),
        eval_dataset={"a": rows(4), "b": rows(5)}, callbacks=[CallbackOf(cascade, plateau=2)],
    )  # fmt: skip
    with pytest.raises(
        lx.SpecError, match=r"^CascadeCallback: plateau looks at eval_fast_loss, and the evaluation gives"
    ):
        trainer.train()


def test_an_optimizer_without_the_branches(tmp_path: Path) -> None:
    cascade = adapted(SPEC)
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    trainer = Trainer(
        model=cascade, args=arguments(tmp_path), train_dataset=rows(), callbacks=[CallbackOf(cascade)],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
    )  # fmt: skip
    with pytest.raises(lx.StateError, match=r"^the optimizer does not hold branches\."):
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
    sentence = (
        f"CascadeCallback: {name} is to have the learning rate {asked:g} (lr_ratio, train_rules), and has 0.02 in the "
        "Trainer's optimizer; give it optimizers=(torch.optim.AdamW(cascade.param_groups(lr=...)), None)"
    )
    with pytest.raises(lx.SpecError, match=exactly(sentence)):
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
    sentence = (
        "CascadeCallback: the Trainer would copy the cascade to 2 devices at each step (DataParallel), "
        "and no copy has graphs; start one process a device by torchrun, or show one device only"
    )
    with pytest.raises(lx.SpecError, match=exactly(sentence)):
        CallbackOf(cascade).on_init_end(args, None, None, model=cascade)


@pytest.mark.parametrize("name", ["accelerate", "transformers"])
def test_a_package_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    getattr(lx.integrations, name)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"lorasc_fx.integrations.{name}")
    monkeypatch.delattr(lx.integrations, name)
    sentence = f"this needs the package {name!r}, which is not installed: pip install 'lorasc-fx[loops]'"
    with pytest.raises(lx.errors.MissingExtra, match=exactly(sentence)):
        getattr(lx.integrations, name)


def test_a_loop_that_is_not_there() -> None:
    assert {"accelerate", "progress", "transformers"} <= set(dir(lx.integrations))
    with pytest.raises(
        AttributeError,
        match=r"^module 'lorasc_fx\.integrations' has no attribute 'trasnformers'; nearest: 'transformers', 'progress'",
    ):
        _ = lx.integrations.trasnformers


def test_a_trainer_that_saves_an_unfolded_cascade(tmp_path: Path) -> None:
    """Without the callback, by `save_model` and in a checkpoint; with it neither, as the other tests show."""
    told = "^a trainer saves an unfolded cascade: .*CascadeCallback"
    trainer = Trainer(model=adapted(SPEC), args=arguments(tmp_path / "a", max_steps=1), train_dataset=rows())
    trainer.train()
    with pytest.warns(lx.errors.LorascWarning, match=told):
        trainer.save_model(str(tmp_path / "saved"))
    more = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = Trainer(model=adapted(SPEC), args=arguments(tmp_path / "b", **more), train_dataset=rows())
    with pytest.warns(lx.errors.LorascWarning, match=told):
        trainer.train()


def test_accelerate_that_saves_an_unfolded_cascade(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    with pytest.warns(lx.errors.LorascWarning, match="^a trainer saves an unfolded cascade: "):
        accelerator.save_model(accelerator.prepare(adapted(SPEC)), str(tmp_path))
