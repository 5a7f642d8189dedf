"""`lorasc-fx compare`: what is trained, that it continues, its tables, and its statistics against closed formulas."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lorasc_fx as lx
from lorasc_fx.cli import main
from lorasc_fx.cli.compare import Result, Trial, best_rates, configured, tables
from lorasc_fx.cli.config import METHODS, CompareConfig, Config, load_config
from lorasc_fx.cli.data import load_splits
from lorasc_fx.cli.trainer import RunCallback
from tests.cli.test_train import results

Capture = pytest.CaptureFixture[str]


def test_a_comparison_and_its_continuation(
    workspace: Path, capsys: Capture, fails: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["compare", "tiny.toml", "compare.methods=['lora', 'cascade']"]
    plain = RunCallback.on_step_end

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        if Path("runs/tiny/results/lora-seed0-lr0.01.json").exists():
            os.kill(os.getpid(), signal.SIGINT)
        plain(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(RunCallback, "on_step_end", interrupted)
        assert main(options) == 130
    assert "Stopped after 1 runs." in capsys.readouterr().out
    assert main(options) == 0
    files = {path: path.read_text() for path in Path("runs/tiny/results").iterdir()}
    assert len(files) == 4
    capsys.readouterr()
    assert main(options) == 0
    said = capsys.readouterr().out
    assert "validation 0." not in said  # nothing is trained again
    assert all(path.read_text() == text for path, text in files.items())
    assert "| lora | 0.01 | 424 |" in said
    assert "| cascade | " in said.split("points over lora")[1]
    assert said.startswith(Path("runs/tiny/tables.md").read_text().strip()[:40])
    fails([*options, "spec.rank=3"], "runs/tiny has a run with spec = {")


def test_lorasc_is_what_train_trains(workspace: Path) -> None:
    assert main(["train", "tiny.toml"]) == 0
    assert main(["compare", "tiny.toml", "compare.methods=['lorasc']", "compare.seeds=[0]", "output=both"]) == 0
    compared, trained = json.loads(Path("both/results/lorasc-seed0-lr0.01.json").read_text()), results("runs/tiny")
    assert (compared["loss"], compared["accuracy"]) == (trained["validation_loss"], trained["validation_accuracy"])
    assert statistics.fmean(compared["correct"]) == pytest.approx(trained["test_accuracy"])


def test_a_language_model_and_what_it_forgets(language: Path, capsys: Capture, fails: Callable[..., None]) -> None:
    """Exact completions are those that the trained model generates; the loss of the text is computed here."""
    Path("general.txt").write_text("seven two nine\none one four\n")
    options = ["spec.noise.strength=0.5", "compare.methods=['lorasc']", "compare.lrs=[0.02]", "compare.seeds=[0]"]
    options += ["compare.text=general.txt", "data.path=pairs.jsonl", "train.num_train_epochs=4"]
    assert main(["train", "language.toml", *options, "train.seed=0"]) == 0
    capsys.readouterr()
    assert main(["compare", "language.toml", *options, "output=both"]) == 0
    result = json.loads(Path("both/results/lorasc-seed0-lr0.02.json").read_text())
    assert f"| {result['forgetting']:+.3f} |" in capsys.readouterr().out
    test = load_splits(load_config(Path("language.toml"), options).data, "language")["test"]
    Path("asked.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in test["prompt"]))
    given = [completion.strip() for completion in test["completion"]]
    assert main(["predict", "runs/language", "asked.jsonl", "--max-new-tokens", "8"]) == 0
    lines = [json.loads(line)["completion"].strip() for line in capsys.readouterr().out.splitlines()]
    assert result["correct"] == [int(line == answer) for line, answer in zip(lines, given, strict=True)]
    assert 0 < sum(result["correct"]) < len(given)
    losses = [loss_of_texts(folder, ["seven two nine", "one one four"]) for folder in ("llama", "runs/language")]
    assert result["forgetting"] == pytest.approx(losses[1] - losses[0], rel=1e-4)
    again = ["compare", "language.toml", *options]
    fails([*again, "output=both", "compare.text=''"], "both has a run with compare.text = ")
    fails([*again, "output=new", "compare.text=missing.txt"], "missing.txt")
    assert not Path("new").exists()
    fails([*again, "output=packed", "train.packing=true"], "compare counts exact completions of separate examples")
    fails(["compare", "tiny.toml", "compare.text=general.txt"], "compare.text measures what a language model forgets")


def loss_of_texts(folder: str, texts: list[str]) -> float:
    """Return the mean loss of all tokens after the first one of each text, which ends with the end token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    losses = []
    for text in texts:
        ids = torch.tensor([tokenizer(f"{text} </s>", add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            losses.append(F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


def test_a_diverged_run(workspace: Path, capsys: Capture) -> None:
    options = ["compare.methods=['lora', 'cascade']", "compare.lrs=[1e30]", "compare.seeds=[0]"]
    assert main(["compare", "tiny.toml", *options, "output=diverged"]) == 0
    said = capsys.readouterr().out
    assert "cascade-seed0-lr1e+30: diverged" in said
    assert "| cascade | 1e+30 |" in said


def result(correct: str, loss: float = 1.0, accuracy: float = 0.5) -> Result:
    """Return a result whose prediction of each example is right where a letter is 1."""
    return {"lr": 0.1, "parameters": 7, "seconds": 1.0, "loss": loss, "accuracy": accuracy,
            "correct": [int(letter) for letter in correct], "forgetting": math.nan}  # fmt: skip


def test_the_intervals() -> None:
    """Student's t over two seeds by its closed formula; equal predictions give intervals of zero width."""
    config = Config(compare=CompareConfig(methods=("lora", "lorasc", "cascade")))
    found = {
        Trial("lora", 0, 0.1): result("1000"), Trial("lora", 1, 0.1): result("1100"),
        Trial("lorasc", 0, 0.1): result("1110"), Trial("lorasc", 1, 0.1): result("1110"),
        Trial("cascade", 0, 0.1): result("1000"), Trial("cascade", 1, 0.1): result("1100"),
    }  # fmt: skip
    accuracies, differences = tables(config, found)
    assert "| lorasc | 0.1 | 7 | 1.0 | 50.0 ± 0.0 | 75.0 ± 0.0 |" in accuracies
    half = 12.706 * 12.5 / 1  # t(0.975, 1) * stdev / sqrt(2), with stdev = 17.68
    assert f"| lorasc | +37.5 | {37.5 - half:+.1f} to {37.5 + half:+.1f} |" in differences
    (row,) = (line for line in differences.splitlines() if line.startswith("| cascade | +0.0 |"))
    assert row.endswith("| +0.0 to +0.0 |")


def test_the_best_rate() -> None:
    """The mean over seeds decides; of equal rates the smallest; a diverged run loses."""
    found = {
        Trial("lora", 0, 0.1): result("1", 1.0, 0.9), Trial("lora", 1, 0.1): result("1", 3.0, 0.5),
        Trial("lora", 0, 0.2): result("1", 2.0, 0.6), Trial("lora", 1, 0.2): result("1", 2.0, 0.6),
        Trial("lora", 0, 0.3): result("1", 0.1, 0.9), Trial("lora", 1, 0.3): result("", math.inf, 0.0),
    }  # fmt: skip
    assert best_rates(found)["lora"][0] is found[Trial("lora", 0, 0.1)]
    del found[Trial("lora", 0, 0.1)], found[Trial("lora", 1, 0.1)]
    assert best_rates(found)["lora"][0] is found[Trial("lora", 0, 0.2)]


def test_what_a_method_trains() -> None:
    spec = lx.CascadeSpec(rank=4, noise=lx.Noise(0.1), pace=0.7, restart="fast", average=True)
    configs = {name: configured(Trial(name, 2, 0.1), Config(spec=spec, train={"seed": 5})) for name in METHODS}
    assert {name: config.stages.count for name, config in configs.items()} == {"lora": 1, "cascade": 3, "lorasc": 3}
    assert configs["lora"].spec == configs["cascade"].spec == lx.CascadeSpec(rank=4, pace=1.0, seed=2)
    assert configs["lorasc"].spec == replace(spec, seed=2)
    assert all(config.train == {"seed": 7, "learning_rate": 0.1} for config in configs.values())
