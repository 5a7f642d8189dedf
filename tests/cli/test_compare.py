"""`lorasc-fx compare`: the same steps for every method, rates selected on validation, and continuing after a stop."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats  # type: ignore[import-untyped]  # no stubs of its own
from torch import nn

import lorasc_fx as lx
from lorasc_fx.branch import METHODS as ADAPTERS
from lorasc_fx.cli import main
from lorasc_fx.cli.compare import Result, Run, best_rates, bootstrap_interval, t_interval
from lorasc_fx.cli.compare_methods import METHODS
from tests.kit.errors import raises


def cell(folder: Path, name: str) -> Result:
    return Result(**json.loads((folder / "results" / f"{name}.json").read_text()))


def without_time(result: Result) -> Result:
    return dataclasses.replace(result, seconds=0.0)


def test_all_methods(place: Path, tiny_model: Callable[[], nn.Module], capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["probe", "lora", "lora-summed", "cascade", "lorasc", "full"]
    assert main(["compare", "tiny.toml", "--compare.methods", *methods, "--compare.keep-weights", "lorasc"]) == 0
    said = capsys.readouterr().out
    run = place / "runs" / "tiny"
    found = {method: cell(run, f"{method}-seed1-lr0.01") for method in methods}
    assert {result.steps for result in found.values()} == {12}
    assert found["probe"].parameters == 32 * 10 + 10
    assert found["lora"].parameters == 330 + 2 * (6 + 27) + 2 * (8 + 6)
    assert found["lora-summed"].parameters == 330 + 3 * (found["lora"].parameters - 330)
    assert found["cascade"].parameters == found["lorasc"].parameters == found["lora"].parameters
    assert found["full"].parameters == 6 * 27 + 6 + 12 + 48 + 8 + 330
    assert [len(found["lorasc"].predicted[part]) for part in ("test", "blur", "mnist5k")] == [100, 50, 50]
    for method in methods:
        assert f"{method}: " in said
    assert "Difference to lora in percentage points, with 95 % intervals" in said

    model = tiny_model()
    model.load_state_dict(load_file(run / "results" / "lorasc-seed1-lr0.01.safetensors"), strict=True)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.spec is not None])
@pytest.mark.parametrize("configured", ["plain", "many"])
def test_a_method_is_made_of_any_spec(configured: str, name: str) -> None:
    """Options that a method does not have keep their defaults, and no method trains with the noise but LoRASC."""
    many = {"noise": lx.Noise(0.1), "lora_alpha": 3.0, "use_rslora": True, "dropout": 0.1, "pace": 0.3}
    spec = lx.CascadeSpec(rank=2, seed=7, **(many if configured == "many" else {}))
    method = METHODS[name]
    assert method.spec is not None
    made = method.spec(spec, 3)
    assert made.seed == 7
    assert made.noise.is_on == (name == "lorasc" and configured == "many")
    assert method.staged or made.pace == 1.0
    adapter = name.removesuffix("-stages")
    assert made.adapter == (adapter if adapter in ADAPTERS else "lora")


def test_methods_of_docs_evidence_by_name(place: Path) -> None:
    methods = ["lora-cycles", "mean", "hira", "shira-stages"]
    assert main(["compare", "tiny.toml", "--compare.methods", *methods, "--compare.seeds", "0"]) == 0
    found = {method: cell(place / "runs" / "tiny", f"{method}-seed0-lr0.01") for method in methods}
    assert {result.steps for result in found.values()} == {12}
    assert len({result.losses["validation"] for result in found.values()}) == len(methods)


def test_the_methods_differ_only_in_their_spec(place: Path) -> None:
    """With one stage, pace 1 and no noise, all predictions of LoRASC and LoRA are equal."""
    plain = ["--spec.pace", "1", "--spec.noise.strength", "0", "--train.stages", "1", "--compare.seeds", "3"]
    assert main(["compare", "tiny.toml", *plain, "--compare.methods", "lora", "cascade", "lorasc", "lora-summed"]) == 0
    run = place / "runs" / "tiny"
    same = [cell(run, f"{method}-seed3-lr0.01") for method in ("lora", "cascade", "lorasc", "lora-summed")]
    assert all(each.predicted == same[0].predicted for each in same)
    assert all(each.validation == same[0].validation for each in same)


def test_a_stopped_comparison_continues(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "tiny.toml", "--compare.methods", "lora", "lorasc", "--output", "whole"]) == 0
    assert main(["compare", "tiny.toml", "--compare.methods", "lora", "--output", "parts"]) == 0
    before = (place / "parts" / "results" / "lora-seed1-lr0.01.json").stat().st_mtime_ns
    time.sleep(0.01)
    capsys.readouterr()
    assert main(["compare", "tiny.toml", "--compare.methods", "lora", "lorasc", "--output", "parts"]) == 0
    said = capsys.readouterr().out
    assert "lorasc-seed1-lr0.01: validation" in said
    assert "lora-seed1-lr0.01: validation" not in said  # it was there
    assert (place / "parts" / "results" / "lora-seed1-lr0.01.json").stat().st_mtime_ns == before
    for name in ("lora-seed0-lr0.01", "lorasc-seed0-lr0.01", "lorasc-seed1-lr0.01"):
        assert without_time(cell(place / "whole", name)) == without_time(cell(place / "parts", name))


def test_a_diverged_run_is_shown_and_not_selected(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = ["--compare.lrs", "0.01", "1e30", "--compare.methods", "lora", "full", "--compare.seeds", "0"]
    assert main(["compare", "tiny.toml", *rates]) == 0
    assert cell(place / "runs" / "tiny", "lora-seed0-lr1e+30").diverged
    said = capsys.readouterr().out
    assert "diverged (the loss is nan at step" in said
    assert "selected by validation loss from 2 per method" in " ".join(said.split())
    assert main(["compare", "tiny.toml", "--compare.lrs", "1e30", *rates[3:], "--output", "only"]) == 0
    assert "│ diverged │" in capsys.readouterr().out


def test_the_rate_is_selected_on_validation() -> None:
    def result(lr: float, seed: int, validation: float, loss: float, test: int) -> Result:
        losses = {"validation": loss}
        return Result("lora", seed, lr, 1, 1.0, 1, validation, losses, {"test": [test]}, {"test": [1]})

    results = [
        result(0.1, 0, 0.9, 0.1, 1), result(0.1, 1, 0.5, 0.3, 1), result(0.01, 0, 0.8, 0.5, 0),
        result(0.01, 1, 0.8, 0.4, 0), Result("lora", 0, 0.001, 0, 1.0, 1, 0.0, {}, {}, {}, diverged=True),
    ]  # fmt: skip
    assert [run.lr for run in best_rates(results, "accuracy")["lora"]] == [0.01, 0.01]
    assert [run.lr for run in best_rates(results, "loss")["lora"]] == [0.1, 0.1]
    assert [run.accuracy("test") for run in best_rates(results, "accuracy")["lora"]] == [0.0, 0.0]


def test_each_method_has_its_own_grid(place: Path) -> None:
    rates = ["--compare.methods", "probe", "lora", "--compare.seeds", "0", "--compare.rates", "probe", "0.1", "0.2"]
    assert main(["compare", "tiny.toml", *rates]) == 0
    made = sorted(path.stem for path in (place / "runs" / "tiny" / "results").glob("*.json"))
    assert made == ["lora-seed0-lr0.01", "probe-seed0-lr0.1", "probe-seed0-lr0.2"]


def test_lorasc_is_evaluated_with_the_average_that_its_spec_keeps(place: Path) -> None:
    """The kept weights are those of `train` and `fold --view averaged`."""
    asked = ["--spec.average", "--train.seed", "0"]
    assert main(["train", "tiny.toml", *asked, "--output", "one"]) == 0
    assert main(["fold", "one", "--view", "averaged", "--output", "mean.safetensors"]) == 0
    methods = ["--compare.methods", "lorasc", "--compare.seeds", "0", "--compare.keep-weights", "lorasc"]
    assert main(["compare", "tiny.toml", *asked, *methods]) == 0
    mean, slow = load_file("mean.safetensors"), load_file("one/folded.safetensors")
    found = load_file("runs/tiny/results/lorasc-seed0-lr0.01.safetensors")
    assert all(torch.equal(found[name], mean[name]) for name in mean)
    assert not torch.equal(mean["0.weight"], slow["0.weight"])


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    run = Run("lora", 0, 0.1)
    path = tmp_path / f"{run.name}.json"
    path.write_text('{"method": "lo', encoding="utf-8")
    with raises(lx.CheckpointError, "invalid-checkpoint", path, "Unterminated string"):
        Result.read(tmp_path, run)


@pytest.mark.parametrize("count", [2, 3, 5, 100])
def test_t_interval_is_scipys(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64).tolist()
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = t_interval(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_equal_differences_have_no_width() -> None:
    found = t_interval([0.25, 0.25, 0.25])
    assert (found.low, found.high, found.settled) == (0.25, 0.25, True)


def test_one_seed_says_nothing() -> None:
    found = t_interval([0.01])
    assert (found.mean, found.low, found.high, found.settled) == (0.01, -math.inf, math.inf, False)


def test_bootstrap_is_near_the_normal_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.rand(2, 4000, generator=generator) < 0.9
    theirs = torch.rand(2, 4000, generator=generator) < 0.88
    found = bootstrap_interval(ours, theirs)
    each = (ours.double() - theirs.double()).mean(0)
    half = 1.96 * each.std().item() / math.sqrt(4000)
    assert found.mean == pytest.approx(each.mean().item())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert found.settled


def test_bootstrap_pairs_examples() -> None:
    right = torch.rand(1, 500, generator=torch.Generator().manual_seed(1)) < 0.7
    same = bootstrap_interval(right, right)
    assert (same.mean, same.low, same.high, same.settled) == (0, 0, 0, False)
