"""Configuration files: the tables as frozen dataclasses, read from TOML with errors that name the key."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from lorasc_fx.cli.methods import METHODS
from lorasc_fx.errors import SpecError
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.util.decode import Check, check, choice, decode
from lorasc_fx.util.extras import module_of
from lorasc_fx.util.files import replacing

Count = Annotated[int, Check(lambda count: count >= 1, "give a whole number of 1 or more")]
CountOrZero = Annotated[int, Check(lambda count: count >= 0, "give a whole number of 0 or more")]
NotNegative = Annotated[float, Check(lambda number: number >= 0, "give a number of 0 or more")]
Rate = Annotated[float, Check(lambda rate: rate > 0, "give a number above 0, a learning rate")]
Seed = Annotated[int, Check(lambda seed: 0 <= seed < 2**31, "a seed is 0 or more, and less than 2147483648")]
Method = Annotated[str, choice(METHODS)]
Size = Annotated[
    int | float,
    Check(
        lambda size: 0 < size < 1 if isinstance(size, float) else size >= 1,
        "give a whole number of examples, or a share between 0 and 1",
    ),
]
ONE_OR_MORE = Check(len, "give a list of one entry or more")
EACH_ONCE = Check(lambda entries: len(set(entries)) == len(entries), "give each entry once")
Rates = Annotated[tuple[Rate, ...], ONE_OR_MORE, EACH_ONCE]


@dataclass(frozen=True)
class ModelConfig:
    """The network that is adapted."""

    name: str = ""
    """`timm:NAME`, `hf:FOLDER` (`hf:package:NAME` is the one inside an installed package),
    or `python:package.module:function`."""
    weights: str = ""
    """Pretrained weights: a `.safetensors` file, `python:package.module:function` (is called with the model, and
    returns them by name), or empty (as the model comes)."""
    seed: Seed = 0
    """Seed of what is not pretrained (a new head); a run adds its own seed."""

    def __post_init__(self) -> None:
        check(self, "model")


@dataclass(frozen=True)
class DataConfig:
    """The examples, how they are split, and the shifted test sets."""

    name: str = ""
    """`csv:FILE`, `json:FILE`, `parquet:FILE`, `imagefolder:DIR`, or `python:package.module:function`, which returns
    inputs (a list of texts, or bytes [examples, 1 or 3, height, width]) and a class each."""
    train: Size = 0.7
    """Examples to train on: a number of them, or a share of all, below 1."""
    validation: Size = 0.1
    """Examples that choose the learning rate; a number or a share."""
    test: Size = 0.2
    """Examples that the tables report on; a number or a share."""
    shifts: Annotated[tuple[str, ...], EACH_ONCE] = ()
    """Shifted test sets: another data set's name, or a function `python:...` from the test inputs to changed ones."""
    shift_test: Count = 1500
    """Examples of each shifted test set, at most."""
    seed: Seed = 0
    """Seed of the split."""
    image_size: Count = 64
    """Height and width that images are resized to."""
    max_length: Count = 64
    """Tokens of a text, at most."""
    text_column: str = "text"
    """Column of a table that holds the text."""
    image_column: str = "image"
    """Column of a table that holds the image: its bytes, or the path of a file."""
    label_column: str = "label"
    """Column of a table that holds the class."""

    def __post_init__(self) -> None:
        check(self, "data")


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to train."""

    epochs: NotNegative = 4.0
    """Passes over the training examples."""
    steps: CountOrZero = 0
    """Optimizer steps; 0 takes them from `epochs`."""
    stages: Count = 3
    """Stages of a cascade: the steps are divided among them evenly."""
    batch_size: Count = 16
    """Examples in a step."""
    lr: Rate = 1e-3
    """Learning rate of AdamW."""
    weight_decay: NotNegative = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to this norm, taken over all trained parameters; 0 leaves them as they are."""
    warmup: CountOrZero = 10
    """Steps of linear warm-up, at the start of each stage."""
    decay: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls within each stage."""
    floor: Annotated[float, Check(lambda share: 0 <= share <= 1, "give a share of the learning rate, from 0 to 1")] = (
        0.0
    )
    """Share of the learning rate at the end of each stage, from 0 to 1; 1 is no decay."""
    frozen_norm: bool = True
    """Train a model that has batch norm in eval mode: its statistics stay the pretrained ones, and dropout is off."""
    seed: Seed = 0
    """Seed of the order of examples, dropout, and a new head."""
    device: str = "cpu"
    """`cpu`, `cuda`, ..."""
    threads: Annotated[int, Check(lambda count: 0 <= count <= 1024, "give a whole number from 0 to 1024")] = 0
    """Threads for the arithmetic; 0 leaves torch's own choice."""
    log_every: Count = 20
    """Steps between two lines of metrics."""
    checkpoint_every: CountOrZero = 0
    """Steps between two checkpoints; 0 writes one at each end of a stage."""

    def __post_init__(self) -> None:
        check(self, "train")
        if self.steps == self.epochs == 0:
            raise SpecError("train.epochs is 0; give a number above 0, or train.steps")


@dataclass(frozen=True)
class CompareConfig:
    """What `compare` sets side by side."""

    methods: Annotated[tuple[Method, ...], ONE_OR_MORE, EACH_ONCE] = ("probe", "lora", "cascade", "lorasc")
    """From `probe`, `lora`, `lora-summed`, `cascade`, `lorasc`, `full`; see
    `lorasc_fx.cli.methods`."""
    seeds: Annotated[tuple[Seed, ...], ONE_OR_MORE, EACH_ONCE] = (0, 1, 2)
    """One run of each method and learning rate a seed."""
    lrs: Rates = (1e-3,)
    """Learning rates tried for each method."""
    rates: dict[Method, Rates] = field(default_factory=dict)
    """Learning rates of a method where they differ from `lrs`, by its name."""
    select: Literal["loss", "accuracy"] = "loss"
    """What chooses among learning rates, on the validation examples."""
    reference: Method = "lora"
    """The method that the paired differences are taken to."""
    keep_weights: tuple[Method, ...] = ()
    """Methods whose trained weights are written, folded, beside their results."""

    def __post_init__(self) -> None:
        check(self, "compare")

    def rates_of(self, method: str) -> tuple[float, ...]:
        """Return the learning rates to try for this method."""
        return self.rates.get(method, self.lrs)


@dataclass(frozen=True)
class Config:
    """A whole run: model, data, training, cascade and comparison."""

    output: Annotated[str, Check(bool, "give the folder that the run writes to")] = "runs/run"
    """Folder that the run writes to."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    spec: CascadeSpec = field(default_factory=CascadeSpec)
    compare: CompareConfig = field(default_factory=CompareConfig)

    def __post_init__(self) -> None:
        check(self)


def with_paths(config: Config, change: Callable[[str], str]) -> Config:
    """Return a configuration with a function applied to each path of a model, weights or data."""

    def changed(name: str) -> str:
        kind, _, path = name.partition(":")
        is_path = kind in ("csv", "json", "parquet", "imagefolder") or (
            kind == "hf" and not path.startswith("package:")
        )
        return f"{kind}:{change(path)}" if is_path and path else name

    model, data = config.model, config.data
    weights = change(model.weights) if model.weights.endswith(".safetensors") else model.weights
    model = dataclasses.replace(model, name=changed(model.name), weights=weights)
    data = dataclasses.replace(data, name=changed(data.name), shifts=tuple(map(changed, data.shifts)))
    return dataclasses.replace(config, model=model, data=data)


def load_config(path: Path) -> Config:
    """Read a configuration. Relative paths of models, weights and data start at the folder of the file.

    They are returned relative to the working directory. `output` is not changed.

    Raises:
        SpecError: the file cannot be read, is not TOML, has an unknown key, or an invalid value.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "it is not UTF-8 text"
        raise SpecError(f"{path}: the configuration cannot be read: {reason}", code="unreadable-file") from fault
    except tomllib.TOMLDecodeError as fault:
        raise SpecError(f"{path}: this is not TOML: {fault}", code="unreadable-file") from fault
    try:
        config: Config = decode(Config, data)
    except SpecError as fault:
        raise SpecError(f"{path}: {fault}", code=fault.code) from fault
    if path.parent == Path("."):
        return config
    return with_paths(config, lambda name: os.path.normpath(path.parent / name))


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain tables."""
    data = dataclasses.asdict(dataclasses.replace(config, spec=CascadeSpec()))
    return data | {"spec": {key: value for key, value in config.spec.to_dict().items() if value is not None}}


def write_config(config: Config, path: Path) -> None:
    """Write the configuration as TOML that `load_config` reads back to an equal one.

    Relative paths are written relative to the folder of the file.
    """
    tomli_w = module_of("cli", "tomli_w")
    config = with_paths(config, lambda name: name if os.path.isabs(name) else os.path.relpath(name, path.parent))
    with replacing(path) as new:
        new.write_text(tomli_w.dumps(config_to_dict(config)), encoding="utf-8")
