"""Text and image classifiers: what a run folder opens in, predictions, exports, folds, and `load`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorasc_fx as lx
from lorasc_fx.cli import load, main
from lorasc_fx.cli.config import ModelConfig
from lorasc_fx.cli.models import ModelSource
from tests.cli.test_train import build, build_base, weights
from tests.kit import tiny

Capture = pytest.CaptureFixture[str]


def predictions(run: str, inputs: str, capsys: Capture, *more: str) -> tuple[list[list[str]], str]:
    """Return the columns of each line, and what is printed to standard error."""
    capsys.readouterr()
    assert main(["predict", run, inputs, *more]) == 0
    said = capsys.readouterr()
    return [line.split("\t") for line in said.out.splitlines()], said.err


def test_an_encoder_with_mean_pooling(texts: Path, capsys: Capture) -> None:
    from transformers import AutoModel, AutoTokenizer

    assert main(["train", "texts.toml"]) == 0
    Path("new.txt").write_text("\ufeffa fine film\n\na dull film\n")
    rows, _ = predictions("runs/texts", "text:new.txt", capsys)
    assert [row[0] for row in rows] == ["text:new.txt:1", "text:new.txt:2", "text:new.txt:3"]
    assert [rows[0][1], rows[2][1]] == ["glad", "sad"]
    assert "accuracy 1.000: 60 of 60 labelled examples" in predictions("runs/texts", "csv:said.csv", capsys)[1]
    Path("other.csv").write_text("said,mood\na dull film,sad\na fine film,sad\n")
    columns = ["data.text_column=said", "data.label_column=mood"]
    rows, said = predictions("runs/texts", "csv:other.csv", capsys, *columns)
    assert [row[1] for row in rows] == ["sad", "glad"]
    assert "accuracy 0.500: 1 of 2" in said
    # The run opens as an encoder; mean pooling and the head are computed here.
    encoder, values = AutoModel.from_pretrained("runs/texts").eval(), weights("runs/texts")
    batch = AutoTokenizer.from_pretrained("runs/texts")(["a dull film", "film"], padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        pooled = (encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        expected = pooled @ values["head.weight"].T + values["head.bias"]
        cascade = load("runs/texts").eval()
        with cascade.weights("slow"):
            found = cascade(**cascade.preprocessing(["a dull film", "film"]))
    torch.testing.assert_close(found, expected)
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
    from transformers import AutoModelForSequenceClassification

    Path("said.csv").write_text("text,label\n" + "count one,up\nten nine,down\n" * 10)
    data = ["data.name=csv:said.csv", "data.test=2", "spec.train=['score.*']", "spec.targets=['*_proj.weight']"]
    assert main(["train", "language.toml", "model.task=classification", "train.max_steps=4", *data]) == 0
    model = AutoModelForSequenceClassification.from_pretrained("runs/language")
    assert model.config.id2label == {0: "down", 1: "up"}


@pytest.mark.parametrize("kind", ["hf", "timm"])
def test_images_of_libraries(place: Path, capsys: Capture, kind: str) -> None:
    """Folders of images, by the processor of transformers or by ours; random weights are told."""
    from transformers import AutoModelForImageClassification, ConvNextImageProcessor, ResNetConfig
    from transformers import ResNetForImageClassification as ResNet

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNet(ResNetConfig(num_labels=5, **sizes)).save_pretrained("resnet")
    ConvNextImageProcessor(size={"shortest_edge": 24}).save_pretrained("resnet")
    import tiny_module

    for number, row in enumerate(tiny_module.digits().select(range(60))):
        folder = Path("images", "low" if row["label"] < 5 else "high")
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{number}.png")
    name = {"hf": "hf:resnet", "timm": "timm:test_resnet"}[kind]
    head = {"hf": "classifier.*", "timm": "fc.*"}[kind]
    data = ["data.name=imagefolder:images", "data.train=0.7", "data.validation=0.1", "data.test=0.2"]
    asked = ["train", "tiny.toml", f"model.name={name}", *data, f"spec.train=['{head}']", "data.image_size=32"]
    assert main([*asked, "train.max_steps=4", "stages.count=2", "spec.noise={}"]) == 0
    assert ("starts from RANDOM weights" in capsys.readouterr().err) == (kind == "timm")
    rows, said = predictions("runs/tiny", "imagefolder:images", capsys)
    assert len(rows) == 60
    assert {row[1] for row in rows} <= {"low", "high"}
    assert "of 60 labelled examples" in said
    if kind == "hf":
        assert AutoModelForImageClassification.from_pretrained("runs/tiny").config.id2label == {0: "high", 1: "low"}
    cascade = load("runs/tiny").eval()
    with torch.no_grad(), cascade.weights("slow"):
        found = cascade(**cascade.preprocessing([row[0] for row in rows[:3]]))
    shares = getattr(found, "logits", found).softmax(-1).amax(-1)
    assert [float(row[2]) for row in rows[:3]] == pytest.approx(shares.tolist(), abs=1e-4)


def test_weights_of_timm(place: Path) -> None:
    """They are read from a file. A head of other classes is new."""
    import timm

    torch.manual_seed(1)
    saved = timm.create_model("test_resnet", num_classes=1000).state_dict()
    save_file(saved, "resnet.safetensors")
    model = ModelSource(ModelConfig("timm:test_resnet", weights="resnet.safetensors")).build(("low", "high"))
    values = model.state_dict()
    assert values["fc.weight"].shape[0] == 2
    assert all(torch.equal(values[name], saved[name]) for name in values if not name.startswith("fc."))


def test_predictions_and_exports_of_a_users_model(place: Path, capsys: Capture, fails: Callable[..., None]) -> None:
    assert main(["train", "tiny.toml", "train.max_steps=4", "stages.count=2", "spec.exclude=['0.weight']"]) == 0
    data = sys.modules["tiny_module"].digits()
    Path("images").mkdir()
    for number in range(3):
        data[number]["image"].save(f"images/{number}.png")
    rows, _ = predictions("runs/tiny", "imagefolder:images", capsys)
    assert [Path(row[0]) for row in rows] == [Path.cwd() / f"images/{number}.png" for number in range(3)]
    model = build().eval()
    model.load_state_dict(weights("runs/tiny"))
    cascade = load("runs/tiny", build_base())
    batch = cascade.preprocessing([row[0] for row in rows])
    with torch.no_grad():
        logits: torch.Tensor = model(**batch)
    assert [float(row[2]) for row in rows] == pytest.approx(logits.softmax(-1).amax(-1).tolist(), abs=1e-4)
    for to, output in (("pt2", "a.pt2"), ("onnx", "a.onnx"), ("safetensors", "a.safetensors"), ("peft", "adapter")):
        assert main(["export", "runs/tiny", "--to", to, "--output", output]) == 0
    exported: nn.Module = torch.export.load("a.pt2").module()
    torch.testing.assert_close(exported(**batch), logits)
    fails(["export", "runs/tiny", "--to", "onnx", "--output", "a.onnx", "--max-rank", "2"], "are for --to peft")
    fails(["export", "runs/tiny", "--to", "onnx", "--output", "images"], "images is a folder, but the output is a file")
    fails(["export", "runs/tiny", "--to", "peft", "--output", "a.onnx/b"], "a.onnx is a file; give another path")


def test_load_calls_no_function_that_a_run_names(place: Path) -> None:
    assert main(["train", "tiny.toml", "train.max_steps=3"]) == 0
    sys.modules.pop("tiny_module")
    with pytest.raises(lx.SpecError, match="For safety, this function is not called here"):
        load("runs/tiny")
    assert "tiny_module" not in sys.modules


def test_paths_are_relative_to_the_file(texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    (texts / "elsewhere").mkdir()
    monkeypatch.chdir(texts / "elsewhere")
    assert main(["train", "../texts.toml", "train.max_steps=2", "output=run"]) == 0
    Path("new.txt").write_text("a fine film\n")
    assert main(["train", "run/config.toml", "--resume"]) == 0
    monkeypatch.chdir(texts)
    assert any(predictions("elsewhere/run", "text:elsewhere/new.txt", capsys))
    name: Any = load("elsewhere/run").preprocessing.config.model.name
    assert name == "hf:bert"
