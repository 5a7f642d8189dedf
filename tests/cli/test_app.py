"""Mistakes are one message and exit code 2; `sites`, help, and a reader that closes the pipe."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasc_fx.cli import main
from tests.cli.conftest import run_alone

Capture = pytest.CaptureFixture[str]
TRAIN = ["train", "tiny.toml"]
MISTAKES: list[tuple[list[str], str]] = [
    (["trian", "x.toml"], "no command is called 'trian'; nearest: 'train'; known: train, sites"),
    (["train"], "required"),
    (["train", "absent.toml"], "absent.toml: the configuration cannot be read: "),
    ([*TRAIN, "data.name=csv:a.csv"], "csv:a.csv: there is no such file or folder"),
    ([*TRAIN, "data.name=csv"], "unknown data set 'csv'; nearest: 'csv'; known: json:FILE"),
    ([*TRAIN, "data.train=0.95"], "data.validation is 32, but python:tiny_module:digits has 300 examples, of"),
    ([*TRAIN, "data.label_column=lable"], "no column 'lable'; nearest: 'label'; it has image, label"),
    ([*TRAIN, "data.name=python:tiny_module:boom"], "python:tiny_module:boom: ValueError: of the user"),
    ([*TRAIN, "data.name=python:tiny_module:nothing"], "returned a NoneType; it must return a datasets.Dataset"),
    ([*TRAIN, "data.name=csv:tiny.csv"], "csv:tiny.csv: no column 'image'"),
    ([*TRAIN, "data.name=imagefolder:images"], "imagefolder:images has the splits train, test"),
    ([*TRAIN, "stages.floor=2"], "stages.floor is 2; give a share from 0 to 1"),
    ([*TRAIN, "stages.count=20"], "stages is 20, but the training has 12 optimizer steps"),
    ([*TRAIN, "stages"], "'stages' is not an override; give key=value"),
    ([*TRAIN, "output.name=3"], "output.name: output is not a table"),
    ([*TRAIN, "spec.targets=['0.wieght']"], "matches no weight; nearest: '0.weight'"),
    ([*TRAIN, "spec.rnk=3"], "spec has no field 'rnk'; nearest: 'rank', 'train'"),
    ([*TRAIN, "train.lerning_rate=3"], "train.lerning_rate is not a key of TrainingArguments; nearest: 'learning"),
    ([*TRAIN, "train.learning_rate=fast"], "train.learning_rate is 'fast'; give a finite number"),
    ([*TRAIN, "train.output_dir=a"], "train.output_dir is not a key of TrainingArguments; give output"),
    ([*TRAIN, "train.load_best_model_at_end=true", "train.eval_strategy=steps"], "[train]: ValueError: "),
    ([*TRAIN, "output=tiny.toml"], "tiny.toml is a file, but the output is a folder"),
    ([*TRAIN, "model.name=bert-base"], "unknown model 'bert-base'; known: hf:FOLDER"),
    ([*TRAIN, "model.name=hf:absent"], "hf:absent: there is no such folder with a config.json"),
    ([*TRAIN, "model.name=timm:resnet_18"], "timm:resnet_18: "),
    ([*TRAIN, "model.name=python:tiny_module:nothing"], "returned a NoneType; it must return an nn.Module"),
    ([*TRAIN, "model.name=python:tiny_module:biuld"], "python:tiny_module:biuld: AttributeError: "),
    ([*TRAIN, "model.weights=tiny.toml"], "model.weights is 'tiny.toml'; give a .safetensors file"),
    ([*TRAIN, "model.weights=a.safetensors"], "model.weights is for models of timm"),
    ([*TRAIN, "model.name=timm:test_resnet", "model.weights=a.safetensors"], "timm:test_resnet: FileNotFoundError"),
    ([*TRAIN, "model.dtype=float8"], "model.dtype is 'float8'; give one of float32"),
    (["compare", "tiny.toml", "compare.rates={lora=[nan]}"], "compare.rates.lora[0] is nan; give a number above 0"),
    (["compare", "tiny.toml", "compare.methods=['lorac']"], "compare.methods[0] is 'lorac'"),
    (["sites", "python:tiny_module:build"], "unknown or invalid; give one, such as --input 2 3 64 64"),
    (["sites", "python:tiny_module:build", "--input", "2", "5"], "raises on the example inputs"),
    (["sites", "hf:"], "unknown model 'hf:'"),
    (["export", "absent", "--to", "onnx", "--output", "a.onnx"], "absent is not a run of lorasc-fx train: there is no"),
    (["export", "absent", "--to", "onxn", "--output", "a"], "invalid choice 'onxn'"),
    (["predict", "absent", "imagefolder:images"], "absent is not a run of lorasc-fx train"),
    (["fold", "absent", "--base", "tiny.toml", "--output", "out.safetensors"], "absent: no checkpoint in this folder"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: " ".join(value)[:60])
def test_a_mistake_is_one_message(place: Path, fails: Callable[..., None], arguments: list[str], message: str) -> None:
    Path("tiny.csv").write_text("text,label\na,b\n")
    for split in ("train", "test"):
        for name in ("low", "high"):
            Path("images", split, name).mkdir(parents=True)
            __import__("PIL.Image").Image.new("RGB", (8, 8)).save(f"images/{split}/{name}/a.png")
    fails(arguments, message)
    assert not Path("runs").exists() or not any(Path("runs/tiny").glob("checkpoint-*"))


TABLES = [
    ("text,label\na,b,c\n", "the header has 2 cells (text, label), and the next row 3"),
    ("text,label\na,b\nc,d,e\n", "Expected 2 fields in line 3, saw 3"),
    ("text,label\na,b\nc\n", "the label of example 2 is empty"),
    ("text,label\na,b\n ,b\n", "the input of example 2 is empty"),
    ("text,label\na,b\nc,b\n", "2 examples of 1 classes"),
    ("text,label\na,1.1\nc,1.2\nd,1.3\n", "3 examples of 3 classes"),
]


@pytest.mark.parametrize(("text", "message"), TABLES)
def test_a_damaged_table(texts: Path, fails: Callable[..., None], text: str, message: str) -> None:
    Path("said.csv").write_text(text)
    fails(["train", "texts.toml"], message)
    assert not Path("runs").exists()


def test_cells_are_texts(texts: Path, fails: Callable[..., None]) -> None:
    """Words for missing values and numbers stay what they are."""
    from lorasc_fx.cli.config import DataConfig
    from lorasc_fx.cli.data import read_examples

    Path("said.tsv").write_text("text\tlabel\n" + "NA\tNone\n01\t001\n" * 2)
    rows = read_examples(DataConfig(), "text", "csv:said.tsv")
    assert rows["input"][:2] == ["NA", "01"]
    assert rows.features["label"].names == ["001", "None"]
    fails(["train", "texts.toml", "data.max_length=33"], "data.max_length is 33, but the model takes at most 32 tokens")


def test_sites(place: Path, capsys: Capture) -> None:
    asked = ["--input", "2", "3", "12", "12", "--targets", "conv", "--rank", "3", "--train", "7.*"]
    assert main(["sites", "python:tiny_module:build", *asked]) == 0
    said = capsys.readouterr().out
    assert "0.weight\tconv\t6 × 3 × 3 × 3\trank 3\t99" in said
    assert "7.weight\ttrained-in-full" in said
    assert "2 sites of python:tiny_module:build: 141 parameters in branches" in said  # 3 * (6 + 27) + 3 * (8 + 6)


def test_sites_of_libraries(language: Path, capsys: Capture) -> None:
    assert main(["sites", "hf:llama", "--targets", "*.q_proj.weight"]) == 0
    assert "1 sites of hf:llama" in capsys.readouterr().out
    assert main(["sites", "timm:test_resnet", "--targets", "conv"]) == 0
    assert "sites of timm:test_resnet" in capsys.readouterr().out


def test_help_and_version(capsys: Capture) -> None:
    for arguments, told in ((["--help"], "compare"), (["train", "--help"], "--resume"), (["sites", "-h"], "--rank")):
        assert main(arguments) == 0
        assert told in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("lorasc-fx")


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fails(["sites", "hf:llama"], "this needs the package 'tyro', which is not installed: pip install 'lorasc-fx[cli]'")


def test_a_new_process(place: Path) -> None:
    """`python -m lorasc_fx` finds modules in the working folder, and survives a reader that closes the pipe."""
    command = ["sites", "python:tiny_module:build", "--input", "2", "3", "12", "12"]
    done = run_alone("-m", "lorasc_fx", *command, cwd=place)
    assert (done.returncode, "3 sites" in done.stdout) == (0, True), done.stderr
    closed = "import os, sys; r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)"
    code = f"{closed}; from lorasc_fx.cli import main; sys.exit(main({command!r}))"
    done = run_alone("-c", code, cwd=place)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
