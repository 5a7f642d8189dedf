"""`lorasc-fx train`: the run folder, resuming with the same bits, several processes, and the options of the Trainer."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lorasc_fx.cli import load, main
from lorasc_fx.cli.trainer import RunCallback
from tests.cli.conftest import run_alone

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.filterwarnings("ignore:Can't initialize NVML:UserWarning")


def history(run: str) -> list[dict[str, Any]]:
    (state,) = Path(run).glob("checkpoint-*/trainer_state.json")
    lines: list[dict[str, Any]] = json.loads(state.read_text())["log_history"]
    return lines


def losses(run: str) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in history(run) if "loss" in line}


def results(run: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(Path(run, "all_results.json").read_text())
    return values


def weights(run: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(f"{run}/model.safetensors")
    return tensors


def same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in tensors)


def build() -> Any:
    """Return the base of a run with the seed 0, with a head of 10 classes."""
    from transformers import AutoModelForImageClassification, set_seed

    set_seed(0)
    labels = {number: str(number) for number in range(10)}
    more: dict[str, Any] = {"ignore_mismatched_sizes": True, "label2id": {name: n for n, name in labels.items()}}
    return AutoModelForImageClassification.from_pretrained("resnet", id2label=labels, **more)


def test_a_run_and_its_folder(workspace: Path, capsys: Capture, fails: Callable[..., None]) -> None:
    assert main(["train", "tiny.toml", "spec.rank=3"]) == 0
    said = capsys.readouterr().out
    assert "2 sites: 2 conv" in said
    assert all(f"{name}_accuracy" in said for name in ("validation", "test"))
    assert sorted(losses("runs/tiny")) == [*range(1, 13)]
    assert [line["step"] for line in history("runs/tiny") if "eval_accuracy" in line] == [4, 8, 12]  # ends of stages
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained("runs/tiny").eval()
    moving = "resnet.embedder.embedder.normalization.running_mean"
    assert torch.equal(weights("runs/tiny")[moving], build().state_dict()[moving])  # batch norms stay in eval mode
    task = load("runs/tiny").preprocessing
    batch = task.collate(task.data["test"])
    with torch.no_grad():
        logits = model(batch["pixel_values"]).logits
    accuracy = (logits.argmax(1) == batch["labels"]).double().mean().item()
    assert results("runs/tiny")["test_accuracy"] == pytest.approx(accuracy)
    assert results("runs/tiny")["test_loss"] == pytest.approx(F.cross_entropy(logits, batch["labels"]).item(), rel=1e-5)
    fails(["train", "tiny.toml", "spec.rank=3"], "runs/tiny already has a run. Give --resume to continue it")
    fails(["train", "tiny.toml", "--resume"], "runs/tiny has a run with spec = {")
    fails(["train", "tiny.toml", "--resume", "output=other"], "other/config.toml: the configuration cannot be read")
    assert main(["train", "tiny.toml", "spec.rank=3", "output=second"]) == 0
    assert losses("second") == losses("runs/tiny")
    assert same(weights("second"), weights("runs/tiny"))


@pytest.mark.parametrize("stop", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_a_stopped_run_resumes_with_the_same_bits(
    workspace: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Ctrl-C inside a stage, and at its end."""
    assert main(["train", "tiny.toml", "output=whole"]) == 0
    plain = RunCallback.on_step_end

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == stop:
            os.kill(os.getpid(), signal.SIGINT)
        plain(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(RunCallback, "on_step_end", interrupted)
        assert main(["train", "tiny.toml", "output=parts"]) == 130
    again = f"Stopped after step {stop}; continue with: lorasc-fx train parts/config.toml --resume"
    assert again in capsys.readouterr().out
    assert main(["predict", "parts", "images"]) == 2
    assert "model.path is 'parts': there is no such folder with a config.json" in capsys.readouterr().err
    assert main(["train", "parts/config.toml", "--resume"]) == 0
    assert losses("parts") == losses("whole")
    assert same(weights("parts"), weights("whole"))


def test_a_diverged_run_gives_back_ctrl_c(workspace: Path, fails: Callable[..., None]) -> None:
    before = signal.getsignal(signal.SIGINT)
    fails(["train", "tiny.toml", "train.learning_rate=1e30"], "a lower learning rate")
    assert signal.getsignal(signal.SIGINT) is before


def test_options_of_the_trainer(workspace: Path) -> None:
    """Accumulated batches give the steps of a whole batch; the Trainer's own schedule."""
    assert main(["train", "tiny.toml"]) == 0
    halves = ["train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=2"]
    assert main(["train", "tiny.toml", "output=halves", *halves]) == 0
    assert [*losses("halves").values()] == pytest.approx([*losses("runs/tiny").values()], rel=1e-5)
    assert main(["train", "tiny.toml", "output=linear", "train.lr_scheduler_type='linear'", "train.optim='sgd'"]) == 0
    rates = [line["learning_rate"] for line in history("linear") if "learning_rate" in line]
    assert rates == pytest.approx([0.01 * (1 - step / 12) for step in range(12)])
    (rate, *_) = (line["learning_rate"] for line in history("runs/tiny") if "learning_rate" in line)
    assert rate == pytest.approx(0.005)  # the first step of a warm-up of one step


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_give_the_losses_of_one(language: Path) -> None:
    """The batches divide the examples: otherwise, accelerate repeats examples so that all processes have as many."""
    sizes = ["train.max_steps=12", "data.train=40", "data.validation=8", "data.test=8"]
    common = ["-m", "lorasc_fx", "train", "language.toml", *sizes]
    one = run_alone(*common, "output=one", "train.per_device_eval_batch_size=8", cwd=language)
    assert one.returncode == 0, one.stderr
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    halves = [f"train.per_device_{part}_batch_size=4" for part in ("train", "eval")]
    two = run_alone(*launch, *common, "output=two", *halves, "train.ddp_backend='gloo'", cwd=language)
    assert two.returncode == 0, two.stderr
    expected = losses("one")
    assert losses("two").keys() == expected.keys()
    assert [*losses("two").values()] == pytest.approx([*expected.values()], rel=1e-4)
    for key in ("test_loss", "validation_loss"):
        assert results("two")[key] == pytest.approx(results("one")[key], rel=1e-4)
    for key, value in weights("one").items():
        torch.testing.assert_close(weights("two")[key], value, rtol=1e-3, atol=1e-5)
