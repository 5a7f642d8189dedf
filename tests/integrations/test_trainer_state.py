"""What a Trainer saves and takes up again: checkpoints without W0, resumes with the same bits, the best model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import lorasc_fx as lx
from tests.errors.state import unchanged
from tests.integrations.kit import adapted, arguments, losses, merged, rows, with_weights
from tests.kit.errors import raises
from tests.kit.seams import SEAMS
from tests.kit.state import replace_plan

SPEC = lx.CascadeSpec(rank=2, pace=0.5, noise=lx.Noise(0.2), train=("head.bias",))
CallbackOf = lx.integrations.transformers.CascadeCallback


class Crash(TrainerCallback):  # type: ignore[misc]
    """The machine dies after this step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_about: Any) -> None:
        if state.global_step > self.step:
            raise KeyboardInterrupt


def trainer_of(cascade: lx.Cascade, folder: Path, how: dict[str, Any], *callbacks: Any, **more: Any) -> Any:
    return Trainer(
        model=cascade, args=arguments(folder, **more), train_dataset=rows(), eval_dataset=rows(7),
        callbacks=[CallbackOf(cascade, **how), *callbacks],
    )  # fmt: skip


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "epochs": ({"epochs": 1}, {}, {}),
    "steps-accumulated": ({"steps": 2}, {"gradient_accumulation_steps": 2, "num_train_epochs": 3}, {}),
    "schedule": ({"steps": 3, "schedule": "stage"}, {"lr_scheduler_type": "linear", "warmup_steps": 1}, {}),
    "plateau": ({"plateau": 0}, {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.5}, {}),
    "ranks-redrawn": ({"steps": 2}, {}, {"ranks": (2, 1, 3), "noise": lx.Noise(0.2, redraw="step")}),
    "dora": ({"steps": 3}, {}, {"use_dora": True, "train": ()}),
    "pissa-averaged": ({"steps": 3}, {}, {"start": "pissa", "average": "ema", "noise": lx.Noise()}),
    "fast-kept": ({"steps": 3}, {"bf16": True}, {"restart": "fast", "optimizer_state": "kept", "restart_A": "kept"}),
    "best": (
        {"steps": 3},
        {
            "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.3,
            "metric_for_best_model": "eval_loss",
        },
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "steps"),
    [("epochs", (3,)), *(pytest.param(case, (3, 4), marks=pytest.mark.slow) for case in CASES)],
    ids=str,
)
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, case: str, steps: tuple[int, ...]) -> None:
    """Interrupted in the middle of a stage, and right after a transition; dropout and shuffled data go on as well."""
    how, more, fields = CASES[case]
    spec = lx.CascadeSpec(**{**SPEC.__dict__, **fields})
    more = {"save_strategy": "steps", "save_steps": 1, **more}
    whole = adapted(spec)
    first = trainer_of(whole, tmp_path / "whole", how, **more)
    first.train()
    assert whole.stage > 1
    expected = whole.folded_state_dict()
    for step in steps:
        folder = tmp_path / f"cut-{step}"
        with pytest.raises(KeyboardInterrupt):
            trainer_of(adapted(spec), folder, how, Crash(step), **more).train()
        resumed = adapted(spec)
        torch.manual_seed(99)  # a new process
        second = trainer_of(resumed, folder, how, **more)
        second.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert losses(second) == losses(first)
        assert resumed.stage == whole.stage
        for name, value in resumed.folded_state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_a_checkpoint_holds_no_copy_of_the_base(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 600), nn.Linear(600, 400)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.last(torch.relu(self.first(x)))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    kwargs = {"x": torch.zeros(2, 6), "labels": torch.zeros(2, dtype=torch.long)}
    cascade = lx.adapt(Wide(), kwargs=kwargs, spec=lx.CascadeSpec(rank=2), frontend="symbolic")
    base = 4 * sum(each.numel() for each in cascade.model.parameters())
    branches = 4 * sum(each.numel() for each in cascade.branches.parameters())
    trainer = trainer_of(cascade, tmp_path, {"steps": 5}, save_strategy="steps", save_steps=9)
    trainer.train()
    (folder,) = (path for path in tmp_path.iterdir() if path.name == "checkpoint-9")
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert base > 900_000
    # branch, one expert, two states of Adam; and the manifest with the states of the random generators
    assert 4 * branches < written < 4 * branches + 80_000
    held = load_file(folder / "model.safetensors")
    assert not {tuple(each.shape) for each in held.values()} & {(600, 6), (400, 600)}
    trainer.save_model(str(tmp_path / "whole"))
    assert (tmp_path / "whole" / "model.safetensors").stat().st_size > base


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
        found = merged(cascade)
        slow = {name: value for name, value in found.items() if not name.startswith("fast")}
        fast = {name.removeprefix("fast "): value for name, value in found.items() if name.startswith("fast")}
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


def test_states_that_do_not_fit(tmp_path: Path) -> None:
    cascade = adapted(SPEC)
    trainer_of(cascade, tmp_path, {"steps": 2}, save_strategy="steps", save_steps=3, max_steps=3).train()
    state = cascade.state_dict()
    other = adapted(lx.CascadeSpec(rank=3))
    with raises(lx.CheckpointError, "spec-differs", "load_state_dict", "head.bias"):  # fmt: skip
        other.load_state_dict(state)
    folded = cascade.folded_state_dict()
    with raises(lx.CheckpointError, "invalid-checkpoint", "load_state_dict", "first.weight"):  # fmt: skip
        cascade.load_state_dict(folded)
    damaged = {name: value.clone() for name, value in state.items()}
    damaged["branch/first.weight/lora_A"][0, 0] += 1
    with raises(lx.CheckpointError, "invalid-checkpoint", "load_state_dict", "lorasc_fx.manifest"):  # fmt: skip
        cascade.load_state_dict(damaged)
    model = adapted(SPEC).release()
    with torch.no_grad():
        model.first.weight[0, 0] += 1  # type: ignore[union-attr, index, operator]
    kwargs = {"labels": torch.zeros(3, dtype=torch.long)}
    moved = lx.adapt(model, args=(torch.zeros(3, 6),), kwargs=kwargs, spec=SPEC, frontend="symbolic")
    with raises(lx.CheckpointError, "base-differs", "load_state_dict", "first.weight"):  # fmt: skip
        moved.load_state_dict(state)
    fewer = adapted(SPEC)
    replace_plan(fewer, fewer.plan.__class__(fewer.plan.spec, fewer.plan.sites[:1], 1))
    with raises(lx.CheckpointError, "sites-differ", "load_state_dict", "head.weight"):  # fmt: skip
        fewer.load_state_dict(state)
    save_file(dict(state), tmp_path / "state.safetensors")
    again = adapted(SPEC)
    assert not any(again.load_state_dict(load_file(tmp_path / "state.safetensors"), strict=True))
    assert all(
        torch.equal(value, cascade.folded_state_dict()[name]) for name, value in again.folded_state_dict().items()
    )


def test_a_state_goes_through_a_wrapper_and_is_taken_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DistributedDataParallel and its like put a name before each key; and what raises on the way changes nothing."""
    spec = lx.CascadeSpec(rank=2, noise=lx.Noise(0.1), train=("head.bias",))
    cascade = adapted(spec)
    trainer_of(cascade, tmp_path, {"steps": 2}, max_steps=5).train()
    state = nn.ModuleDict({"module": cascade}).state_dict()
    assert all(name.startswith("module.") for name in state)

    def refuse(*_: Any) -> None:
        raise MemoryError("in the middle")

    other = adapted(spec)
    optimizer = torch.optim.AdamW(other.param_groups(lr=0.1))
    for _ in range(2):
        other(torch.ones(3, 6), torch.zeros(3, dtype=torch.long))["loss"].backward()  # gradients that wait
        with monkeypatch.context() as patch:
            patch.setattr(*SEAMS["unpack gradients"], refuse)  # the last values to be decoded
            with unchanged(other, optimizer), pytest.raises(MemoryError, match=r"^in the middle$"):
                nn.ModuleDict({"module": other}).load_state_dict(state)
        optimizer.step()
        optimizer.zero_grad()
        other.transition(optimizer)
    assert not any(nn.ModuleDict({"module": other}).load_state_dict(state, strict=True))
    assert other.stage == cascade.stage == 4
    for name, value in other.folded_state_dict().items():
        assert torch.equal(value, cascade.folded_state_dict()[name])
    for name, value in other.model.state_dict().items():  # noise included
        assert torch.equal(value, cascade.model.state_dict()[name])


def test_a_second_training_goes_on(tmp_path: Path) -> None:
    """The first one was cut short: its stage is folded, and no noise is left; the second begins with a stage."""
    cascade = adapted(lx.CascadeSpec(rank=2, pace=0.5, noise=lx.Noise(0.2)))
    trainer = trainer_of(cascade, tmp_path, {"steps": 4}, max_steps=6)
    trainer.train()
    assert cascade.stage == 3
    found = {name: value for name, value in merged(cascade).items() if not name.startswith("fast")}
    now = cascade.model.state_dict()
    for name, value in found.items():
        torch.testing.assert_close(now[name].double(), value, atol=1e-6, rtol=0)
    trainer.train()
    assert cascade.stage == 5
