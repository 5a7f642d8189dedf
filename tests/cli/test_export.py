"""`lorasc-fx export` and `fold --base`: a run in other formats, and errors for invalid arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lorasc_fx as lx
from lorasc_fx.cli import load, main
from lorasc_fx.cli.export import Format
from tests.kit import tiny
from tests.kit.errors import raises, warns

SHORT = ["--train.steps", "4", "--train.stages", "2", "--data.train", "16", "--data.validation", "16",
         "--data.test", "10", "--data.shifts", "--spec.train"]  # fmt: skip


@pytest.fixture
def run(place: Path, tiny_model: Callable[[], nn.Module]) -> Path:
    """Train the tiny model for a few steps, with its weights from a file, and return the run folder."""
    torch.manual_seed(3)
    save_file(tiny_model().state_dict(), "base.safetensors", metadata={"format": "pt", "more": "kept"})
    assert main(["train", "tiny.toml", "--model.weights", "base.safetensors", *SHORT]) == 0
    return place / "runs" / "tiny"


def test_a_run_is_exported(
    run: Path, place: Path, tiny_model: Callable[[], nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"pt2": "a/model.pt2", "safetensors": "a/folder", "onnx": "a/model.onnx"}
    if not _has_onnx():
        del paths["onnx"]
    for to, path in paths.items():
        capsys.readouterr()
        assert main(["export", "runs/tiny", "--to", to, "--out", path]) == 0
        assert capsys.readouterr().out == f"{path}: slow weights at step 4 of 4\n"
    assert main(["export", "runs/tiny", "--to", "safetensors", "--out", "a/folder"]) == 2
    assert "a/folder is not empty; give another path" in capsys.readouterr().err
    assert main(["export", "runs/tiny", "--to", "peft", "--out", "a/adapter"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"a/adapter: \d+ weights adapted, ranks .*", told[0])
    assert told[-1] == "a/adapter: slow weights at step 4 of 4"
    assert (place / "a" / "adapter" / "adapter_model.safetensors").is_file()
    cut = ["--max-rank", "1", "--uniform-rank"]
    assert main(["export", "runs/tiny", "--to", "peft", "--out", "a/small", *cut]) == 0
    told = capsys.readouterr().out.splitlines()
    assert all(re.search(r"rank \d+ to 1, error ", line) for line in told[1:-1])
    small = load_file(place / "a" / "small" / "adapter_model.safetensors")
    assert {each.shape[0] for name, each in small.items() if ".lora_A." in name} == {8}  # vLLM's least
    folded = load_file(run / "folded.safetensors")
    model = tiny_model()
    model.load_state_dict(folded, strict=True)
    x = torch.rand(3, 3, 12, 12)
    found = load_file(place / "a" / "folder" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in folded.items())
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.export.load("a/model.pt2").module()(x), expected, rtol=1e-5, atol=1e-5)
    if "onnx" in paths:
        import onnxruntime

        session = onnxruntime.InferenceSession("a/model.onnx", providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-5)


def _has_onnx() -> bool:
    import importlib.util

    return importlib.util.find_spec("onnxruntime") is not None


HEADS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "absent": lambda tensors: {name: value for name, value in tensors.items() if not name.startswith("7.")},
    "of other classes": lambda tensors: tensors | {"7.weight": torch.zeros(4, 32), "7.bias": torch.zeros(4)},
}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("head", HEADS)
def test_a_new_head_is_added_to_the_base(
    place: Path, tiny_model: Callable[[], nn.Module], head: str, shards: int
) -> None:
    """The base lacks the head that was trained in full, or has another one, in one file or in shards with an index."""
    tensors = tiny_model().state_dict()
    save_file(tensors, "base.safetensors")
    asked = ["train", "tiny.toml", "--model.weights", "base.safetensors", *SHORT[:-1]]
    assert main(asked) == 0
    folded = load_file("runs/tiny/folded.safetensors")
    base = HEADS[head](tensors)
    names = sorted(base)[::-1]  # a head in the first shard
    parts = [names[number::shards] for number in range(shards)]
    Path("base").mkdir()
    if shards == 1:
        save_file(base, "base/model.safetensors", metadata={"format": "pt", "more": "kept"})
    else:
        files = [f"model-{number}.safetensors" for number in range(shards)]
        for file, part in zip(files, parts, strict=True):
            save_file({name: base[name] for name in part}, f"base/{file}")
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        Path("base/model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["fold", "runs/tiny", "--base", "base", "--output", "new"]) == 0
    written = {name: value for path in Path("new").glob("*.safetensors") for name, value in load_file(path).items()}
    assert written.keys() == folded.keys()
    assert all(torch.equal(written[name], value) for name, value in folded.items())
    if shards == 1:
        with safe_open("new/model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt", "more": "kept"}
    else:
        index = json.loads(Path("new/model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == folded.keys()
        assert all(name in load_file(f"new/{file}") for name, file in index["weight_map"].items())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in folded.values())


@pytest.mark.filterwarnings("ignore:Classification head")
def test_a_classifier_of_other_classes(place: Path) -> None:
    """The base has two classes and the run has three. transformers loads the folded model with the new names."""
    from transformers import (
        AutoModelForSequenceClassification,
        BertTokenizer,
        pipeline,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "dull", "long", "film"]
    tiny.bert(vocab_size=len(words), max_position_embeddings=512, num_labels=2).save_pretrained("bert")
    Path("vocab.txt").write_text("\n".join(words))
    BertTokenizer("vocab.txt").save_pretrained("bert")
    lines = "".join(
        f"a {word} film,{mood}\n" for word, mood in (("fine", "glad"), ("dull", "sad"), ("long", "so")) * 20
    )
    Path("said.csv").write_text("text,label\n" + lines)
    asked = ["--model.name", "hf:bert", "--data.name", "csv:said.csv", "--spec.targets", "linear", "--spec.train",
             "classifier.*", *SHORT[:-1]]  # fmt: skip
    assert main(["train", "tiny.toml", *asked]) == 0
    assert main(["fold", "runs/tiny", "--base", "bert", "--output", "folded"]) == 0
    cascade = load("runs/tiny").eval()
    lx.export.safetensors(cascade, "exported", base="bert")
    args, kwargs = cascade.preprocessing(["a fine film", "a long film"])
    with cascade.weights("slow"), torch.no_grad():
        expected = cascade(*args, **kwargs).logits
    assert expected.shape == (2, 3)
    for folder in ("folded", "exported"):
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        assert model.config.id2label == {0: "glad", 1: "sad", 2: "so"}
        with torch.no_grad():
            assert torch.equal(model(**kwargs).logits, expected)
    classify = pipeline("text-classification", model=cascade, tokenizer=cascade.preprocessing.tokenizer)
    assert classify("a fine film")[0]["label"] in ("glad", "sad", "so")
    Path("bert/config.json").write_text("{")
    with raises(lx.CheckpointError, "unreadable-file", "config.json"):
        lx.export.safetensors(cascade, "again", base="bert")
    assert not Path("again").exists()


def test_a_fold_of_a_stage_that_never_ended_warns(place: Path, tiny_model: Callable[[], nn.Module]) -> None:
    """Fold a checkpoint in its second stage: the weights equal a release, and a warning says how much is kept."""
    torch.manual_seed(3)
    model = tiny_model()
    save_file(model.state_dict(), "base.safetensors")
    x = torch.randn(2, 3, 8, 8)
    cascade = lx.adapt(model, args=(x,), spec=lx.CascadeSpec(rank=2, pace=0.25))
    cascade.transition(None)
    with torch.no_grad():
        for name, factor in cascade.branches.named_parameters():
            factor.add_(0.1 * len(name))
    lx.save(cascade, "checkpoint")
    fold = ["fold", "checkpoint", "--base", "base.safetensors", "--output", "new.safetensors"]
    with warns("running-stage-folded", "checkpoint", "stage 2", "0.25"):
        assert main(fold) == 0
    found, folded = load_file("new.safetensors"), cascade.folded_state_dict()
    for name, value in folded.items():
        torch.testing.assert_close(found[name], value)
    cascade.transition(None)
    lx.save(cascade, "checkpoint")
    assert main(fold) == 0  # silent: warnings are errors here


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent", "--to", "onnx", "--out", "a.onnx"], "absent is not a run folder: there is no config.toml in it"),
        (["absent", "--to", "onxn", "--out", "a"], "invalid choice 'onxn'"),
        (["absent", "--to", "pt2"], "--output"),
        (["absent", "--to", "onnx", "--out", "a", "--max-rank", "2"], "apply to adapters, not to onnx: remove them"),
    ],
)
def test_a_users_mistake_is_one_message(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["export", *arguments]) == 2
    said = capsys.readouterr()
    assert message in " ".join((said.err + said.out).split())
    assert "Traceback" not in said.err + said.out


def test_every_format_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"`{name}`" in said for name in get_args(Format))
