"""Mistakes are one message and exit code 2; `sites`, and help."""

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
    ([*TRAIN, "data.path=a.csv"], "a.csv: FileNotFoundError: "),
    ([*TRAIN, "data.path=tiny.toml"], "tiny.toml: give a folder of images, or a file that ends with .csv, .tsv, .json"),
    ([*TRAIN, "data.train=0.95"], "data.validation is 32, but digits.parquet has 300 examples, of"),
    ([*TRAIN, "data.label_column=lable"], "no column 'lable'; nearest: 'label'; it has image, label"),
    ([*TRAIN, "data.path=tiny.csv"], "tiny.csv: no column 'image'"),
    ([*TRAIN, "data.path=images"], "images has the splits train, test"),
    ([*TRAIN, "stages.floor=2"], "StageSchedule: floor is 2"),
    ([*TRAIN, "stages.count=20"], "stages is 20, but the training has 12 optimizer steps"),
    ([*TRAIN, "stages"], "'stages' is not an override; give key=value"),
    ([*TRAIN, "spec.targets=['classifier.1.wieght']"], "matches no weight; nearest: 'classifier.1.weight'"),
    ([*TRAIN, "spec.rnk=3"], "spec has no field 'rnk'; nearest: 'rank', 'train'"),
    (
        [*TRAIN, "train.lerning_rate=3"],
        "[train]: TypeError: TrainingArguments.__init__() got an unexpected",
    ),
    ([*TRAIN, "train.output_dir=a"], "got multiple values for keyword argument 'output_dir'"),
    ([*TRAIN, "train.load_best_model_at_end=true", "train.eval_strategy=steps"], "[train]: ValueError: "),
    ([*TRAIN, "output=tiny.toml"], "tiny.toml is not a folder; give another path"),
    ([*TRAIN, "train.dataloader_drop_last=true"], "train.dataloader_drop_last would also drop examples"),
    ([*TRAIN, "model.path=absent"], "model.path is 'absent': there is no such folder with a config.json"),
    ([*TRAIN, "model.dtype=float8"], "model.dtype is 'float8'; give one of float32"),
    (["compare", "tiny.toml", "compare.rates={lora=[nan]}"], "compare.rates.lora[0] is nan; give a finite number"),
    (["compare", "tiny.toml", "compare.methods=['lorac']"], "compare.methods[0] is 'lorac'"),
    (["sites", "absent"], "model.path is 'absent'"),
    (["export", "absent", "--to", "onnx", "--output", "a.onnx"], "absent is not a run of lorasc-fx train: there is no"),
    (["export", "absent", "--to", "onxn", "--output", "a"], "invalid choice 'onxn'"),
    (["predict", "absent", "images"], "absent is not a run of lorasc-fx train"),
    (["fold", "absent", "--base", "tiny.toml", "--output", "out.safetensors"], "absent: no checkpoint in this folder"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: " ".join(value)[:60])
def test_a_mistake_is_one_message(
    workspace: Path, fails: Callable[..., None], arguments: list[str], message: str
) -> None:
    Path("tiny.csv").write_text("text,label\na,b\n")
    for split in ("train", "test"):
        for name in ("low", "high"):
            Path("images", split, name).mkdir(parents=True)
            __import__("PIL.Image").Image.new("RGB", (8, 8)).save(f"images/{split}/{name}/a.png")
    fails(arguments, message)
    assert not Path("runs").exists() or not any(Path("runs/tiny").glob("checkpoint-*"))


TABLES = [
    ("text,label\na,b,c\n", "said.csv: ParserWarning: Length of header or names does not match"),
    (
        "text,label\na,b\nc,d,e\n",
        "said.csv: ParserError: Error tokenizing data. C error: Expected 2",
    ),
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


def test_cells_are_texts(texts: Path) -> None:
    """Words for missing values and numbers stay strings."""
    from lorasc_fx.cli.config import DataConfig
    from lorasc_fx.cli.data import load_splits

    Path("said.tsv").write_text("text\tlabel\n" + "NA\tNone\n01\t001\n" * 5)
    rows = load_splits(DataConfig("said.tsv"), "text")["train"]
    assert {*rows["input"]} == {"NA", "01"}
    assert rows.features["label"].names == ["001", "None"]


def test_sites(language: Path, capsys: Capture) -> None:
    options = ["--targets", "conv", "--rank", "3", "--train", "classifier.*", "--exclude", "*.layers.*"]
    assert main(["sites", "resnet", *options]) == 0
    said = capsys.readouterr().out
    assert "resnet.embedder.embedder.convolution.weight\tconv\t6 × 3 × 7 × 7\trank 3\t459" in said
    assert "classifier.1.weight\ttrained-in-full" in said
    assert "1 sites of resnet: 459 parameters in branches" in said  # 3 * (6 + 3 * 7 * 7)
    assert main(["sites", "llama", "--targets", "*.q_proj.weight"]) == 0
    assert "1 sites of llama" in capsys.readouterr().out


def test_help_and_version(capsys: Capture) -> None:
    for arguments, text in ((["--help"], "compare"), (["train", "--help"], "--resume"), (["sites", "-h"], "--rank")):
        assert main(arguments) == 0
        assert text in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("lorasc-fx")


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fails(["sites", "llama"], "this needs the package 'tyro', which is not installed: pip install 'lorasc-fx[cli]'")


def test_a_new_process(workspace: Path) -> None:
    done = run_alone("-m", "lorasc_fx", "sites", "resnet", cwd=workspace)
    assert (done.returncode, "5 sites" in done.stdout) == (0, True), done.stderr
