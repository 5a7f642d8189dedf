"""Text and image classifiers: what a run folder opens in, predictions, exports, folds, and `load`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorasc_fx.cli import load, main
from tests.cli.test_train import weights
from tests.kit import tiny

Capture = pytest.CaptureFixture[str]


def predictions(run: str, inputs: str, capsys: Capture, *more: str) -> list[list[str]]:
    """Return the columns of each line."""
    capsys.readouterr()
    assert main(["predict", run, inputs, *more]) == 0
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def test_an_encoder_with_mean_pooling(texts: Path, capsys: Capture) -> None:
    from transformers import AutoModel, AutoTokenizer

    assert main(["train", "texts.toml"]) == 0
    Path("new.txt").write_text("\ufeffa fine film\n\na dull film\n")
    rows = predictions("runs/texts", "new.txt", capsys)
    assert [row[0] for row in rows] == ["new.txt:1", "new.txt:2", "new.txt:3"]
    assert [rows[0][1], rows[2][1]] == ["glad", "sad"]
    Path("other.csv").write_text("said,mood\na dull film,sad\na fine film,sad\n")
    rows = predictions("runs/texts", "other.csv", capsys, "data.text_column=said")
    assert [row[1] for row in rows] == ["sad", "glad"]
    # The run opens as an encoder; mean pooling and the head are computed here.
    encoder, values = AutoModel.from_pretrained("runs/texts").eval(), weights("runs/texts")
    batch = AutoTokenizer.from_pretrained("runs/texts")(["a dull film", "film"], padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        pooled = (encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        expected = pooled @ values["head.weight"].T + values["head.bias"]
        cascade = load("runs/texts").eval()
        with cascade.weights("slow"):
            logits = cascade(**cascade.preprocessing(["a dull film", "film"])).logits
    torch.testing.assert_close(logits, expected)
    assert cascade.preprocessing.classes == ("glad", "sad")


def test_a_classifier_of_transformers(texts: Path, capsys: Capture) -> None:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    tiny.bert(vocab_size=9, initializer_range=0.3, **tiny.QUIET).save_pretrained("bert")
    assert main(["train", "texts.toml", "spec.train=['classifier.*']"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained("runs/texts").eval()
    assert model.config.id2label == {0: "glad", 1: "sad"}
    assert main(["export", "runs/texts", "--to", "peft", "--output", "adapter"]) == 0
    adapter = json.loads(Path("adapter/adapter_config.json").read_text())
    assert (adapter["task_type"], adapter["base_model_name_or_path"]) == ("SEQ_CLS", "bert")
    assert main(["fold", "runs/texts", "--base", "bert", "--output", "folded"]) == 0
    cascade = load("runs/texts").eval()
    batch = cascade.preprocessing(["a fine film", "film"])
    with torch.no_grad():
        with cascade.weights("slow"):
            expected = cascade(**batch).logits
        assert torch.equal(model(**batch).logits, expected)
        folded = AutoModelForSequenceClassification.from_pretrained("folded").eval()
        assert folded.config.id2label == {0: "glad", 1: "sad"}
        assert torch.equal(folded(**batch).logits, expected)


def test_a_causal_model_as_a_classifier(language: Path) -> None:
    """The last token before the padding is classified, although the folder names no token for padding."""
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained("llama", pad_token_id=None).save_pretrained("llama")
    Path("said.csv").write_text("text,label\n" + "count one,up\nten nine eight,down\n" * 10)
    data = ["data.path=said.csv", "data.test=2", "spec.train=['score.*']", "spec.targets=['*_proj.weight']"]
    assert main(["train", "language.toml", "train.max_steps=4", *data]) == 0
    model = AutoModelForSequenceClassification.from_pretrained("runs/language")
    assert model.config.id2label == {0: "down", 1: "up"}


def test_images_predictions_and_exports(workspace: Path, capsys: Capture, fails: Callable[..., None]) -> None:
    """Folders of images, by the processor of the model."""
    import datasets
    from transformers import AutoModelForImageClassification

    for number, row in enumerate(
        datasets.load_dataset("parquet", data_files="digits.parquet")["train"].select(range(60))
    ):
        folder = Path("images", "low" if row["label"] < 5 else "high")
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{number}.png")
    data = ["data.path=images", "data.train=0.7", "data.validation=0.1", "data.test=0.2"]
    assert main(["train", "tiny.toml", *data, "train.max_steps=4", "stages.count=2", "spec.noise={}"]) == 0
    rows = predictions("runs/tiny", "images", capsys)
    assert len(rows) == 60
    assert {row[1] for row in rows} <= {"low", "high"}
    rows = predictions("runs/tiny", "images/low", capsys)
    assert Path(rows[0][0]).parent == Path.cwd() / "images/low"
    model = AutoModelForImageClassification.from_pretrained("runs/tiny").eval()
    assert model.config.id2label == {0: "high", 1: "low"}
    cascade = load("runs/tiny").eval()
    batch = cascade.preprocessing([Path(row[0]) for row in rows])
    with torch.no_grad():
        logits: torch.Tensor = model(**batch).logits
        with cascade.weights("slow"):
            assert torch.equal(cascade(**batch).logits, logits)
    assert [float(row[2]) for row in rows] == pytest.approx(logits.softmax(-1).amax(-1).tolist(), abs=1e-4)
    for to, output in (("pt2", "a.pt2"), ("onnx", "a.onnx"), ("safetensors", "a.safetensors"), ("peft", "adapter")):
        assert main(["export", "runs/tiny", "--to", to, "--output", output]) == 0
    exported: nn.Module = torch.export.load("a.pt2").module()
    torch.testing.assert_close(exported(**batch).logits, logits)
    fails(["export", "runs/tiny", "--to", "onnx", "--output", "a.onnx", "--max-rank", "2"], "are for --to peft")
    fails(["export", "runs/tiny", "--to", "onnx", "--output", "images"], "images is not a file")
    fails(["export", "runs/tiny", "--to", "peft", "--output", "a.onnx/b"], "Not a directory")


def test_paths_are_relative_to_the_file(texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    (texts / "elsewhere").mkdir()
    monkeypatch.chdir(texts / "elsewhere")
    assert main(["train", "../texts.toml", "train.max_steps=2", "output=run"]) == 0
    Path("new.txt").write_text("a fine film\n")
    assert main(["train", "run/config.toml", "--resume"]) == 0
    monkeypatch.chdir(texts)
    assert any(predictions("elsewhere/run", "elsewhere/new.txt", capsys))
    folder: Any = load("elsewhere/run").preprocessing.config.model.path
    assert folder == "bert"
