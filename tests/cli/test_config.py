"""Configuration files: round trips, and errors for invalid files."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lorasc_fx.branch import METHODS as ADAPTERS
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
from lorasc_fx.cli.export import FORMATS
from lorasc_fx.errors import SpecError
from lorasc_fx.spec import CascadeSpec, Noise, Rule
from tests.kit.errors import raises


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
    # The page describes momentum and the adapter methods in one row each.
    adapters = {*ADAPTERS, *(f"{name}-stages" for name in ADAPTERS)} - {"lora"}
    methods = [name for name in METHODS if name not in adapters and not name.startswith("momentum-")]
    names = [field.name for table in tables for field in dataclasses.fields(table)] + [*methods, *COMMANDS]
    assert [name for name in names if not re.search(rf"`[^`]*(?<![\w-]){name}(?![\w-])[^`]*`", page)] == []
    assert [name for name in (*DATA, *FORMATS) if f"`{name}`" not in page] == []


def test_the_configuration_of_the_page_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    config = load_config(written(tmp_path, text))
    assert config.compare.rates_of("lora") == (0.0001, 0.0003, 0.001)
    assert config.compare.rates_of("lorasc") == config.compare.lrs
