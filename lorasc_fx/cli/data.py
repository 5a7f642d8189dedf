"""From the table `[data]` to the splits that a run uses. Nothing is downloaded: data come from files and packages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lorasc_fx.cli.batches import Examples, split_sizes
from lorasc_fx.cli.images import IMAGE_SHIFTS, ImageExamples, digits, image_folder, mnist5k, shifted
from lorasc_fx.cli.schema import DataConfig
from lorasc_fx.cli.texts import TextExamples, Texts, Tokenizer, csv_file, movie_reviews
from lorasc_fx.errors import SpecError, nearest

__all__ = ["DATA", "Splits", "is_text", "load_data"]

DATA = ("mnist5k", "digits", "rotten-tomatoes", "imdb", "imagefolder:DIR", "csv:FILE")


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of one data set, and its shifted test sets by name."""

    train: Examples
    validation: Examples
    test: Examples
    shifts: dict[str, Examples]
    classes: tuple[str, ...]


def is_text(name: str) -> bool:
    """Return whether a data set holds texts.

    Raises:
        SpecError: no data set has this name.
    """
    kind, _, rest = name.partition(":")
    known = [each.partition(":")[0] for each in DATA]
    if kind not in known or (kind in ("imagefolder", "csv")) != bool(rest):
        raise SpecError(f"no data set is called {name!r}{nearest(name, DATA)}; known: {', '.join(DATA)}")
    return kind in ("rotten-tomatoes", "imdb", "csv")


def load_data(config: DataConfig, tokenizer: Tokenizer | None) -> Splits:
    """Load, split and shift.

    Raises:
        SpecError: an unknown name, data that cannot be read, too few examples, one class alone, or a shift of another
            kind.
    """
    sizes = (config.train, config.validation, config.test)
    whole = _load(config.name, config, tokenizer)
    if sum(sizes) > len(whole):
        raise SpecError(
            f"{config.name} has {len(whole)} examples; data.train + data.validation + data.test ask for {sum(sizes)}; "
            "ask for fewer"
        )
    parts = [whole.take(index) for index in split_sizes(len(whole), sizes, config.seed)]
    for name, examples in ((config.name, whole), (f"the {config.train} training examples", parts[0])):
        (first, *others) = sorted({int(label) for label in examples.labels})
        if not others:
            raise SpecError(
                f"{name}: every label is {whole.classes[first]!r}; a classifier needs examples of two classes or more"
            )
    shifts = {name: _shift(name, config, whole, parts[2], tokenizer) for name in config.shifts}
    train, validation, test = (_ready(part, tokenizer) for part in parts)
    ready = {name: _in_turn(_ready(part, tokenizer)) for name, part in shifts.items()}
    return Splits(train, _in_turn(validation), _in_turn(test), ready, whole.classes)


def _in_turn(examples: Examples) -> Examples:
    """Order what is only ever gone through in turn, where the order costs or saves time."""
    return examples.by_length() if isinstance(examples, TextExamples) else examples


def _ready(raw: Texts | ImageExamples, tokenizer: Tokenizer | None) -> Examples:
    if isinstance(raw, ImageExamples):
        return raw
    assert tokenizer is not None  # _load has seen to it
    return TextExamples.of(raw, tokenizer)


def _load(name: str, config: DataConfig, tokenizer: Tokenizer | None) -> Texts | ImageExamples:
    kind, _, rest = name.partition(":")
    if is_text(name):
        if tokenizer is None:
            raise SpecError(f"the model takes images, and {name} holds texts; texts need a model `hf:FOLDER`")
        if kind == "csv":
            return csv_file(Path(rest), config.text_column, config.label_column)
        return movie_reviews(kind.replace("-", "_"))
    if tokenizer is not None:
        raise SpecError(
            f"the model takes texts, and {name} holds images; give a data set of texts (csv:FILE), or another model"
        )
    if kind == "imagefolder":
        return image_folder(Path(rest), config.image_size)
    return mnist5k(config.image_size) if kind == "mnist5k" else digits(config.image_size)


def _shift(
    name: str,
    config: DataConfig,
    whole: Texts | ImageExamples,
    test: Texts | ImageExamples,
    tokenizer: Tokenizer | None,
) -> Texts | ImageExamples:
    if name in IMAGE_SHIFTS:
        if not isinstance(test, ImageExamples):
            raise SpecError(
                f"data.shifts: {name!r} is a shift of images, and {config.name} holds texts; give a data set of texts"
            )
        return shifted(test.take(torch.arange(min(len(test), config.shift_test))), name, config.seed)
    known = (*DATA, *IMAGE_SHIFTS)
    if name.partition(":")[0] not in [each.partition(":")[0] for each in DATA]:
        raise SpecError(f"no shift is called {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    if name == config.name:
        raise SpecError(f"data.shifts has {name}, which is the data set itself; give others, or none")
    other = _load(name, config, tokenizer)
    if other.classes != whole.classes:
        raise SpecError(f"data.shifts: {name} has other classes than {config.name}; give a data set with the same ones")
    count = min(len(other), config.shift_test)
    return other.take(split_sizes(len(other), (count,), config.seed)[0])
