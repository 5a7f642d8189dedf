"""`lorasc-fx predict` predicts the same as the released model, from files and without the data set."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.io import write_png

import lorasc_fx as lx
from experiments.data import digits
from lorasc_fx.cli import load, main
from lorasc_fx.cli.config import load_config
from lorasc_fx.cli.data import image_examples, load_data
from lorasc_fx.cli.preprocessing import Preprocessing
from tests.kit import tiny
from tests.kit.errors import raises

SHORT = ["--train.steps", "4", "--train.stages", "2", "--data.train", "32", "--data.validation", "16",
         "--data.test", "10", "--data.shifts"]  # fmt: skip


def rows(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


def test_images(place: Path, tiny_model: Callable[[], nn.Module], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny.toml", *SHORT]) == 0
    pixels, labels = digits()
    (place / "images" / "more").mkdir(parents=True)
    (place / "images" / ".DS_Store").write_bytes(b"no image")
    names = ["images/a.png", "images/b.png", "images/more/c.png"]
    for name, image in zip(names, pixels, strict=False):
        write_png(image, name)
    model = tiny_model()
    model.load_state_dict(load_file("runs/tiny/folded.safetensors"))
    examples = image_examples(pixels, labels, 12)
    with torch.no_grad():
        expected = model(*examples.batch(torch.arange(3)).args).softmax(-1)
    capsys.readouterr()
    assert main(["predict", "runs/tiny", "images"]) == 0
    found = rows(capsys.readouterr().out)
    assert [row[:2] for row in found] == [
        [name, examples.classes[int(row.argmax())]] for name, row in zip(names, expected, strict=True)
    ]
    assert [float(row[2]) for row in found] == pytest.approx(expected.amax(-1).tolist(), abs=1e-4)
    assert main(["predict", "runs/tiny", names[0]]) == 0
    assert rows(capsys.readouterr().out) == found[:1]
    with raises(lx.SpecError, "no-base", "runs/tiny", "python:tiny_model:build", "manual_seed(0)"):
        load("runs/tiny")
    torch.manual_seed(0)  # as the message says
    cascade = load("runs/tiny", tiny_model())
    args, _ = cascade.preprocessing(names)
    assert torch.equal(args[0], examples.batch(torch.arange(3)).args[0])


def test_images_of_a_table_are_resized_as_they_were_in_training(place: Path, tmp_path: Path) -> None:
    import datasets

    torch.manual_seed(0)
    paths = [str(tmp_path / f"{number}.png") for number in range(40)]
    for path in paths:
        write_png(torch.randint(256, (3, 37, 23), dtype=torch.uint8), path)  # shrunk, where ways to resize differ
    table = datasets.Dataset.from_dict({"image": paths, "label": ["x", "y"] * 20})
    table.cast_column("image", datasets.Image()).to_parquet("a.parquet")
    asked = ["--data.name", "parquet:a.parquet", *SHORT, "--data.train", "20", "--data.validation", "8",
             "--data.test", "8"]  # fmt: skip
    assert main(["train", "tiny.toml", *asked, "--model.name", "python:tiny_model:build"]) == 0
    splits = load_data(load_config(Path("runs/tiny/config.toml")).data)
    seen = torch.cat([part.batch(torch.arange(len(part))).args[0] for part in splits.test_sets.values()])
    given = Preprocessing(Path("runs/tiny"))(paths)[0][0]
    assert all(any(torch.equal(image, other) for other in given) for image in seen)


@pytest.mark.parametrize(
    ("damage", "inputs", "message"),
    [
        (lambda run: (run / "folded.safetensors").unlink(), ".", "runs/tiny has no folded.safetensors: finish it"),
        (lambda run: (run / "cascade.json").unlink(), ".", "runs/tiny has no names of classes"),
        (lambda run: save_file({"a": torch.zeros(1)}, run / "folded.safetensors"), ".",
         "the weights in runs/tiny/folded.safetensors do not fit the model python:tiny_model:build: "),
        (lambda run: (run / "folded.safetensors").write_bytes(b"no"), ".",
         "runs/tiny/folded.safetensors: these weights cannot be read: "),
        (lambda run: None, "tiny.toml", "tiny.toml: this image cannot be read"),
        (lambda run: Path("empty").mkdir(), "empty", "empty contains no images (.bmp, "),
    ],
)  # fmt: skip
def test_errors_of_runs_and_inputs(
    place: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], inputs: str, message: str
) -> None:
    assert main(["train", "tiny.toml", *SHORT]) == 0
    damage(Path("runs/tiny"))
    assert main(["predict", "runs/tiny", inputs]) == 2
    assert f"lorasc-fx: {message}" in capsys.readouterr().err


def test_a_tie_that_the_run_has_untied(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path("tiny_model.py").read_text()
    tied = (
        source.replace("    return nn", "    model = nn").rstrip()
        + "\n    model[3].bias = model[7].bias\n    return model\n"
    )
    assert main(["train", "tiny.toml", *SHORT]) == 0
    values = load_file("runs/tiny/folded.safetensors")
    values["3.bias"] = torch.ones_like(values["7.bias"])
    save_file(values, "runs/tiny/folded.safetensors")
    Path("tiny_model.py").write_text(tied)
    sys.modules.pop("tiny_model")
    assert main(["predict", "runs/tiny", "."]) == 2
    assert "has two values for 3.bias, because the run has untied it" in capsys.readouterr().err


def test_texts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fine", "dull", "a", "film"]
    Path("vocab.txt").write_text("\n".join(words))
    tiny.bert("Model", vocab_size=len(words), max_position_embeddings=512).save_pretrained("bert")
    BertTokenizer("vocab.txt").save_pretrained("bert")
    lines = "".join(f"a {word} film,{mood}\n" for word, mood in (("fine", "glad"), ("dull", "sad")) * 20)
    Path("said.csv").write_text("text,label\n" + lines)
    asked = ["--model.name", "hf:bert", "--data.name", "csv:said.csv", "--spec.targets", "linear", "--spec.train",
             "head.*", "--train.lr", "0.05", *SHORT, "--data.train", "20", "--data.validation", "8", "--data.test",
             "8", "--train.steps", "20"]  # fmt: skip
    assert main(["train", "tiny.toml", *asked]) == 0
    capsys.readouterr()
    Path("said.csv").rename("new.csv")  # predicting does not read the data set
    for file in Path("bert").glob("*token*"):  # nor the model's tokenizer: the run has one
        file.unlink()
    Path("bert/vocab.txt").unlink(missing_ok=True)
    # A line for each line of the file, whatever else Python takes for the end of a line.
    Path("two.txt").write_bytes("\ufeffa fine film\x0c\r\n\n \t\n\x85\u2028a dull film".encode())
    assert main(["predict", "runs/tiny", "two.txt"]) == 0
    said = capsys.readouterr()
    listed = rows(said.out)
    assert [row[:2] for row in listed] == [
        ["two.txt:1", "glad"], ["two.txt:2", ""], ["two.txt:3", ""], ["two.txt:4", "sad"]
    ]  # fmt: skip
    assert said.err == ""
    found = [listed[0], listed[3]]
    assert main(["predict", "runs/tiny", "new.csv"]) == 0
    said = capsys.readouterr()
    assert [row[1:] for row in rows(said.out)[:2]] == [row[1:] for row in found]
    assert said.err == "accuracy 1.000: 40 of 40 labelled examples\n"
    Path("other.csv").write_text("said,mood\na fine film,glad\na dull film,sad\n")
    assert main(["predict", "runs/tiny", "other.csv"]) == 2
    assert "no column 'text'; it has said, mood. Set data.text_column, data.im" in capsys.readouterr().err
    columns = ["--data.text-column", "said"]
    assert main(["predict", "runs/tiny", "other.csv", *columns]) == 0
    said = capsys.readouterr()
    assert ([row[1:] for row in rows(said.out)], said.err) == ([row[1:] for row in found], "")
    assert main(["predict", "runs/tiny", "other.csv", *columns, "--data.label-column", "mood"]) == 0
    assert "accuracy 1.000: 2 of 2 labelled examples" in capsys.readouterr().err
    Path("third.csv").write_text("said,mood\na fine film,glad\na dull film,bad\n")
    assert main(["predict", "runs/tiny", "third.csv", *columns, "--data.label-column", "mood"]) == 0
    said = capsys.readouterr().err
    assert "bad: these labels are unknown to the run and count as wrong. The run has the classes glad, sad" in said
    assert "accuracy 0.500: 1 of 2 labelled examples" in said
    assert main(["predict", "runs/tiny", "other.csv", *columns, "--data.label-column", "moot"]) == 2
    assert "no column 'moot'; nearest: 'mood'" in capsys.readouterr().err
    Path("two.jsonl").write_text('{"text": "a fine film"}\n{"text": "a dull film"}\n')
    assert main(["predict", "runs/tiny", "two.jsonl"]) == 0
    assert [row[1:] for row in rows(capsys.readouterr().out)] == [row[1:] for row in found]
    Path("many").mkdir()
    Path("two.jsonl").rename("many/b.jsonl")
    Path("many/a.txt").write_text("a fine film\na dull film\n")
    Path("many/notes.md").write_text("no text to be told")
    assert main(["predict", "runs/tiny", "many"]) == 0
    listed = rows(capsys.readouterr().out)
    assert [row[0] for row in listed] == ["many/a.txt:1", "many/a.txt:2", "many/b.jsonl:1", "many/b.jsonl:2"]
    assert [row[1:] for row in listed] == [row[1:] for row in found] * 2
    Path("none.txt").write_text("\n")
    Path("odd.txt").write_bytes(b"\xff")
    for name, message in (
        ("none.txt", "none.txt contains no texts; give one per line"),
        ("odd.txt", "odd.txt:1: this is not UTF-8 text; save it as UTF-8"),
    ):
        assert main(["predict", "runs/tiny", name]) == 2
        assert f"lorasc-fx: {message}" in capsys.readouterr().err
    cascade = load("runs/tiny")
    args, kwargs = cascade.preprocessing(["a fine film", "a dull film"])
    with cascade.weights("slow"), torch.no_grad():
        shares = cascade(*args, **kwargs).softmax(-1)
    assert cascade.preprocessing.classes == ("glad", "sad")
    assert shares.amax(-1).tolist() == pytest.approx([float(row[2]) for row in found], abs=1e-4)
    with raises(lx.SpecError, "invalid-value", "a fine film", "list"):
        cascade.preprocessing("a fine film")
    base = cascade.preprocessing.base()
    (Path("runs/tiny") / "checkpoint").rename("alone")  # of no run any more
    assert not hasattr(lx.load("alone", base), "preprocessing")
