"""Data sets: splits that do not move, shifts, and what is said about data that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorasc_fx.cli.batches import Order, in_turn
from lorasc_fx.cli.data import Splits, load_data
from lorasc_fx.cli.images import ImageExamples, digits, image_folder, mnist5k, shifted
from lorasc_fx.cli.schema import DataConfig
from lorasc_fx.cli.texts import TextExamples, Tokenizer, csv_file, movie_reviews
from lorasc_fx.errors import SpecError

SMALL = DataConfig(name="digits", train=64, validation=16, test=32, image_size=16)


def by_letters(texts: Sequence[str]) -> list[list[int]]:
    return [[ord(letter) % 97 + 1 for letter in text[: 5 + len(text) % 9]] for text in texts]


LETTERS = Tokenizer(by_letters, 0)


def images_of(splits: Splits) -> list[torch.Tensor]:
    parts = (splits.train, splits.validation, splits.test)
    assert all(isinstance(part, ImageExamples) for part in parts)
    return [part.pixels for part in parts]  # type: ignore[attr-defined]  # asserted just above


def test_splits_are_disjoint_and_deterministic() -> None:
    first, second = images_of(load_data(SMALL, None)), images_of(load_data(SMALL, None))
    assert [len(part) for part in first] == [64, 16, 32]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = images_of(load_data(replace(SMALL, seed=1), None))
    assert not torch.equal(first[0], other[0])
    rows = torch.cat([part.flatten(1) for part in first])
    whole = digits(16).pixels.flatten(1)
    matches = (rows[:, None].eq(whole[None]).all(-1)).sum(1)  # a digit may occur twice in the data themselves
    assert len(rows.unique(dim=0)) == len(rows)
    assert matches.min() == 1


def test_a_batch_of_images_is_normalised() -> None:
    batch = mnist5k(32).batch(torch.tensor([0, 600, 4999]))
    (images,) = batch.args
    assert images.shape == (3, 3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    assert images.min().item() == -1
    assert images.max().item() == pytest.approx(1, abs=0.02)
    assert batch.labels.tolist() == [0, 1, 9]


def test_image_shifts_keep_labels_and_order() -> None:
    some = mnist5k(28).take(torch.arange(0, 5000, 500))
    noisy, blurred = shifted(some, "noise", 3), shifted(some, "blur", 3)
    assert torch.equal(noisy.pixels, shifted(some, "noise", 3).pixels)
    assert not torch.equal(noisy.pixels, shifted(some, "noise", 4).pixels)
    assert torch.equal(noisy.labels, some.labels)
    spread = (noisy.pixels.float() - some.pixels.float()).std() / 255
    assert 0.13 < spread < 0.25  # 0.25, cut off at black and white
    mean, blurred_mean = some.pixels.float().mean(), blurred.pixels.float().mean()
    assert blurred_mean == pytest.approx(mean.item(), rel=0.02)  # blurring moves light, it makes none
    assert blurred.pixels.float().std() < some.pixels.float().std()


def test_shifts_are_other_data_sets_of_the_same_classes() -> None:
    splits = load_data(replace(SMALL, shifts=("mnist5k", "noise", "blur"), shift_test=20), None)
    assert {name: len(part) for name, part in splits.shifts.items()} == {"mnist5k": 20, "noise": 20, "blur": 20}


def test_every_epoch_sees_every_example_once() -> None:
    order = Order(64, 16, seed=5)
    epochs = [torch.cat([order.index(step) for step in range(start, start + 4)]) for start in (0, 4)]
    assert all(epoch.sort().values.tolist() == list(range(64)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert Order(64, 16, seed=6).index(0).tolist() != order.index(0).tolist()


def test_in_turn_has_a_short_last_batch() -> None:
    assert [len(batch.labels) for batch in in_turn(digits(8).take(torch.arange(20)), 8)] == [8, 8, 4]


def test_reviews() -> None:
    texts = movie_reviews("rotten_tomatoes")
    assert (len(texts), sum(texts.labels), texts.classes) == (8530, 4265, ("0", "1"))
    assert len(movie_reviews("imdb")) == 25000


def test_texts_are_padded_to_their_longest() -> None:
    config = DataConfig(name="rotten-tomatoes", train=8, validation=4, test=4, shifts=("imdb",), shift_test=6)
    splits = load_data(config, LETTERS)
    assert isinstance(splits.train, TextExamples)
    assert len(splits.shifts["imdb"]) == 6
    assert isinstance(splits.test, TextExamples)
    lengths = [len(tokens) for tokens in splits.test.tokens]
    assert lengths == sorted(lengths)
    short = replace(splits.train, tokens=((5, 6, 7), (8,)), labels=torch.tensor([0, 1]))
    batch = short.batch(torch.tensor([1, 0]))
    assert batch.kwargs["input_ids"].tolist() == [[8] + [0] * 7, [5, 6, 7] + [0] * 5]
    assert batch.kwargs["attention_mask"].tolist() == [[1] + [0] * 7, [1, 1, 1] + [0] * 5]
    assert batch.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("config", "tokenizer", "message"),
    [
        (replace(SMALL, name="mnist"), None, "no data set is called 'mnist'; nearest: 'mnist5k'"),
        (replace(SMALL, name="csv:"), LETTERS, "no data set is called 'csv:'; nearest: 'csv:FILE'"),
        (
            replace(SMALL, train=5000),
            None,
            "digits has 1797 examples; data.train + data.validation + data.test ask for",
        ),
        (replace(SMALL, name="imdb"), None, "the model takes images, and imdb holds texts"),
        (SMALL, LETTERS, "the model takes texts, and digits holds images"),
        (replace(SMALL, shifts=("nose",)), None, "no shift is called 'nose'; nearest: 'noise'"),
        (replace(SMALL, shifts=("digits",)), None, "data.shifts has digits, which is the data set itself"),
        (replace(SMALL, name="imdb", shifts=("blur",)), LETTERS, "'blur' is a shift of images, and imdb holds texts"),
    ],
)
def test_what_is_wrong_is_said(config: DataConfig, tokenizer: Tokenizer | None, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_data(config, tokenizer)
    assert message in str(caught.value)


def test_csv_classes_are_sorted_names(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,said,mood\n1,"two\nlines",sad\n2,ha,glad\n', encoding="utf-8")
    texts = csv_file(path, "said", "mood")
    assert (texts.texts, texts.labels, texts.classes) == (("two\nlines", "ha"), (1, 0), ("glad", "sad"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"txt,label\na,0\n", "{path}:1: no column 'text'; nearest: 'txt'; it has txt, label"),
        (b"text,label\na,0\nb\n", "{path}:3: the cell 'label' is empty; fill it, or take the row out"),
        (b"text,label\na,0\n,1\n", "{path}:3: the cell 'text' is empty; fill it, or take the row out"),
        (b'text,label\na,0\n"b"c,1\n', "{path}:3: this is not CSV: "),
        (b"text,label\na,0\n\xff,1\n", "{path}:3: this is not UTF-8 text"),
        (b"text,label\n", "{path}: it holds no rows"),
        (b"", "{path}:1: no column 'text'; it has no columns; "),
    ],
)
def test_a_wrong_csv_is_said_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        csv_file(path, "text", "label")
    assert str(caught.value).startswith(message.format(path=path))


def test_a_csv_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"a\.csv: this file cannot be read: No such file or directory"):
        csv_file(tmp_path / "a.csv", "text", "label")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("a" * 40, "csv:a.csv: every label is 'a'; a classifier needs examples of two classes or more"),
        ("b" + "a" * 39, "the 16 training examples: every label is 'a'; a classifier needs examples of two classes"),
    ],
)
def test_one_class_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("\n".join(["text,label", *(f"text {label},{label}" for label in labels)]) + "\n")
    config = DataConfig(name="csv:a.csv", train=16, validation=8, test=8)
    with pytest.raises(SpecError) as caught:
        load_data(config, LETTERS)
    assert str(caught.value).startswith(message)


def test_a_csv_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,0\nb,1\n", encoding="utf-8-sig")
    assert csv_file(tmp_path / "a.csv", "text", "label").texts == ("a", "b")


def test_image_folder(tmp_path: Path) -> None:
    from PIL import Image

    for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (9, 5), colour).save(tmp_path / name / f"{number}.png")
    examples = image_folder(tmp_path, 6)
    assert (examples.classes, examples.labels.tolist()) == (("cat", "dog"), [0, 0, 1, 1])
    (images,) = examples.batch(torch.tensor([0, 3])).args
    assert images[:, :, 2, 2].tolist() == [[1, -1, -1], [-1, -1, 1]]


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(b"not an image")
    with pytest.raises(SpecError, match=r"cat.0\.png: this image cannot be read"):
        image_folder(tmp_path, 6)


def test_an_empty_image_folder(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="it holds no images; expected one folder a class"):
        image_folder(tmp_path, 6)
    with pytest.raises(SpecError, match="there is no such folder"):
        image_folder(tmp_path / "absent", 6)
