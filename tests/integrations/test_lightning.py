"""A cascade in a LightningModule, trained by Lightning's Trainer with a validation loop."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

import lorasc_fx as lx
from tests.integrations.kit import net, rows, values_of, with_weights
from tests.kit.errors import raises

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SPEC = lx.CascadeSpec(rank=2, noise=lx.Noise(0.1))
X, LABELS = torch.zeros(3, 6), torch.zeros(3, dtype=torch.long)


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.net: Any = net(0.0)
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.net(x, labels)

    def training_step(self, batch: Any, _index: int) -> torch.Tensor:
        loss: torch.Tensor = self(batch["x"], batch["labels"])["loss"]
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, _index: int) -> None:
        self.log("val_loss", self(batch["x"], batch["labels"])["loss"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def module_with_cascade() -> Any:
    module = Module()
    module.net = module.cascade = lx.adapt(module.net, (X, LABELS), spec=SPEC)
    return module


def data(count: int) -> Any:
    return DataLoader([{name: row[name] for name in ("x", "labels")} for row in rows(count)], 4)  # type: ignore[arg-type]


def trainer_of(module: Any, folder: Path, *, epochs: int = 3, **how: Any) -> Any:
    logging.getLogger("lightning.pytorch").setLevel("ERROR")
    saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, monitor="val_loss")
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[lx.integrations.lightning.CascadeCallback(module.cascade, **how), saved],
    )  # fmt: skip


def test_stages_and_validation(tmp_path: Path) -> None:
    """Compare with a plain loop. Validation uses W0 + S by the formula."""
    module = module_with_cascade()
    trainer = trainer_of(module, tmp_path / "whole")
    trainer.fit(module, data(20), data(8))
    assert module.cascade.stage == 4
    plain = module_with_cascade()
    optimizer = torch.optim.AdamW(plain.cascade.param_groups(lr=0.02))
    losses = []
    for _ in plain.cascade.stages(3, optimizer):
        for batch in data(20):
            loss = plain.cascade(batch["x"], batch["labels"])["loss"]
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert module.losses == losses
    state = module.cascade.folded_state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.cascade.folded_state_dict().items())
    plain = with_weights(module.cascade.model, values_of(module.cascade))
    with torch.no_grad():
        expected = sum(plain(batch["x"], batch["labels"])["loss"].item() for batch in data(8)) / 2
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(expected, abs=1e-6)


def test_stages_by_steps_with_an_incomplete_last_stage(tmp_path: Path) -> None:
    module = module_with_cascade()
    trainer = trainer_of(module, tmp_path, epochs=2, steps=4)
    trainer.logger, trainer.log_every_n_steps = CSVLogger(tmp_path), 1
    trainer.fit(module, data(20), data(8))
    assert module.cascade.stage == 4  # 4, 8, and the end at 10
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["stage"]]
    assert [float(line["stage"]) for line in lines] == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]


def test_a_number_of_stages_divides_the_steps(tmp_path: Path) -> None:
    module = module_with_cascade()
    trainer = trainer_of(module, tmp_path, epochs=2, stages=3)
    trainer.logger, trainer.log_every_n_steps = CSVLogger(tmp_path), 1
    trainer.fit(module, data(20), data(8))  # 10 steps
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["stage"]]
    assert [float(line["stage"]) for line in lines] == [1] * 3 + [2] * 4 + [3] * 3
    other = module_with_cascade()
    with raises(lx.SpecError, "invalid-value", "stages is 20", "10 optimizer steps"):
        trainer_of(other, tmp_path / "other", epochs=2, stages=20).fit(other, data(20), data(8))


class Manual(Module):
    """One optimizer for each factor, stepped by hand, as Lightning wants it of several."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = super().training_step(batch, index)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW([group], lr=0.02) for group in self.net.param_groups(lr=0.02)]


@pytest.mark.parametrize("how", [{"steps": 4}, {"stages": 3}, {"stages": 3, "max_steps": 20}])
def test_several_optimizers_are_as_one(how: dict[str, Any], tmp_path: Path) -> None:
    losses = []
    for kind in (Module, Manual):
        module: Any = kind()
        module.net = module.cascade = lx.adapt(module.net, (X, LABELS), spec=SPEC)
        rule = {name: value for name, value in how.items() if name != "max_steps"}
        trainer = trainer_of(module, tmp_path / kind.__name__, epochs=2, **rule)
        if kind is Manual and "max_steps" in how:  # Lightning counts the steps of each optimizer
            trainer.fit_loop.epoch_loop.max_steps = how["max_steps"]
        trainer.fit(module, data(20), data(8))
        losses.append((module.losses, module.cascade.stage))
    assert losses[0] == losses[1]
    assert losses[0][1] == 4


@pytest.mark.parametrize("kind", ["StochasticWeightAveraging", "WeightAveraging"])
def test_an_average_is_refused_before_the_training(kind: str, tmp_path: Path) -> None:
    module = module_with_cascade()
    average = getattr(lightning.pytorch.callbacks, kind)(*([1e-2] if kind.startswith("Stochastic") else []))
    trainer = trainer_of(module, tmp_path)
    trainer.callbacks.append(average)
    with raises(lx.StateError, "wrapper-not-supported", "cascade.model"):
        trainer.fit(module, data(8), data(8))
    assert trainer.global_step == 0


def test_unsupported_modules_and_arguments(tmp_path: Path) -> None:
    module, other = module_with_cascade(), module_with_cascade()
    trainer = trainer_of(other, tmp_path)
    with raises(lx.StateError, "trainer-not-supported", "Module"):
        trainer.fit(module, data(8), data(8))
    module.configure_optimizers = lambda: torch.optim.SGD(module.cascade.model.parameters(), lr=0.1)
    with raises(lx.StateError, "optimizer-lacks-parameters"):
        trainer_of(module, tmp_path).fit(module, data(8), data(8))
    module.configure_optimizers = lambda: [torch.optim.SGD(module.parameters(), lr=0.1) for _ in range(2)]
    module.automatic_optimization = False
    with raises(lx.StateError, "conflicting-options", "two optimizers hold"):
        trainer_of(module, tmp_path).fit(module, data(8), data(8))
    rates = Module()
    rates.net = lx.adapt(rates.net, (X, LABELS), spec=lx.CascadeSpec(rank=2, lr_ratio=4.0))
    callback = lx.integrations.lightning.CascadeCallback(rates.net)
    with raises(lx.SpecError, "optimizer-differs", "0.02"):
        lightning.Trainer(max_epochs=1, callbacks=[callback], default_root_dir=tmp_path, accelerator="cpu").fit(
            rates, data(8)
        )
    with raises(lx.SpecError, "conflicting-options", "epochs", "steps"):
        lx.integrations.lightning.CascadeCallback(other.cascade, epochs=1, steps=2)
    with raises(lx.SpecError, "invalid-value", "evaluate", "slow or fast"):
        lx.integrations.lightning.CascadeCallback(other.cascade, evaluate=("slow", "fast"))
