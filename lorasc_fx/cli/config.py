"""Configuration files: frozen dataclasses for the TOML tables, and errors that name the key."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from lorasc_fx.cli.compare_methods import METHODS
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
    """The model that is adapted."""

    name: str = ""
    """The model: `timm:NAME`, `hf:FOLDER`, `hf:package:NAME` (a model folder inside an installed package), or
    `python:package.module:function`."""
    weights: str = ""
    """Pretrained weights: a `.safetensors` file, or `python:package.module:function`, a function that gets the model
    and returns tensors by name. If empty, the weights of the model are kept."""
    seed: Seed = 0
    """Seed of weights that are not pretrained (a new head). It is combined with the seed of the run."""

    def __post_init__(self) -> None:
        check(self, "model")


@dataclass(frozen=True)
class DataConfig:
    """The data set, how it is split, and the shifted test sets."""

    name: str = ""
    """The data set: `csv:FILE`, `json:FILE`, `parquet:FILE`, `imagefolder:DIR`, or `python:package.module:function`, a
    function that returns inputs and their classes. The inputs are a list of texts, or images as uint8 [examples, 1 or
    3, height, width]."""
    train: Size = 0.7
    """Training examples: a number, or a fraction of the data set below 1."""
    validation: Size = 0.1
    """Validation examples, which choose the learning rate: a number or a fraction."""
    test: Size = 0.2
    """Test examples, which the tables report: a number or a fraction."""
    shifts: Annotated[tuple[str, ...], EACH_ONCE] = ()
    """Shifted test sets: names of data sets with the same classes, or functions `python:package.module:function` that
    change the test inputs."""
    shift_test: Count = 1500
    """Maximum number of examples in each shifted test set."""
    seed: Seed = 0
    """Seed of the split."""
    image_size: Count = 64
    """Height and width that images are resized to, in pixels."""
    max_length: Count = 64
    """Maximum number of tokens of a text. Longer texts are truncated."""
    text_column: str = "text"
    """Name of the column with the text."""
    image_column: str = "image"
    """Name of the column with the image: its bytes, or the path of a file."""
    label_column: str = "label"
    """Name of the column with the class."""

    def __post_init__(self) -> None:
        check(self, "data")


@dataclass(frozen=True)
class TrainConfig:
    """Length and optimizer settings of the training."""

    epochs: NotNegative = 4.0
    """Number of passes over the training examples."""
    steps: CountOrZero = 0
    """Number of optimizer steps. If 0, it follows from `epochs`."""
    stages: Count = 3
    """Number of stages of a cascade. The steps are divided evenly among them."""
    batch_size: Count = 16
    """Examples per optimizer step."""
    lr: Rate = 1e-3
    """Learning rate of AdamW."""
    weight_decay: NotNegative = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are clipped to this norm over all trained parameters. 0 turns clipping off."""
    warmup: CountOrZero = 10
    """Steps of linear warm-up at the start of each stage."""
    decay: Literal["cosine", "linear"] = "cosine"
    """Shape of the learning-rate decay within each stage."""
    floor: Annotated[float, Check(lambda share: 0 <= share <= 1, "give a share of the learning rate, from 0 to 1")] = (
        0.0
    )
    """Learning rate at the end of each stage, as a fraction of `lr` from 0 to 1. 1 means no decay."""
    frozen_norm: bool = True
    """If the model has batch norm, train it in eval mode: its running statistics stay fixed, and dropout is off."""
    seed: Seed = 0
    """Seed of the order of examples, of dropout, and of a new head."""
    device: str = "cpu"
    """Device to train on: `cpu`, `cuda`, ..."""
    threads: Annotated[int, Check(lambda count: 0 <= count <= 1024, "give a whole number from 0 to 1024")] = 0
    """Number of CPU threads. If 0, torch chooses."""
    log_every: Count = 20
    """Log metrics every this many steps."""
    checkpoint_every: CountOrZero = 0
    """Save a checkpoint every this many steps. If 0, only at the end of each stage."""

    def __post_init__(self) -> None:
        check(self, "train")
        if self.steps == self.epochs == 0:
            raise SpecError("train.epochs is 0; give a number above 0, or train.steps")


@dataclass(frozen=True)
class CompareConfig:
    """The methods, seeds and learning rates of `lorasc-fx compare`."""

    methods: Annotated[tuple[Method, ...], ONE_OR_MORE, EACH_ONCE] = ("probe", "lora", "cascade", "lorasc")
    """The methods to compare, such as `probe`, `lora`, `cascade`, `lorasc`, `full` (all: docs/command-line.md)."""
    seeds: Annotated[tuple[Seed, ...], ONE_OR_MORE, EACH_ONCE] = (0, 1, 2)
    """Seeds. Every method is trained with every learning rate once per seed."""
    lrs: Rates = (1e-3,)
    """Learning rates to try for each method."""
    rates: dict[Method, Rates] = field(default_factory=dict)
    """Learning rates for single methods, by name. They replace `lrs`."""
    select: Literal["loss", "accuracy"] = "loss"
    """Metric on the validation examples that selects the learning rate."""
    reference: Method = "lora"
    """The method with which all others are compared in the table of differences."""
    keep_weights: tuple[Method, ...] = ()
    """Methods whose folded weights are saved next to their results."""

    def __post_init__(self) -> None:
        check(self, "compare")

    def rates_of(self, method: str) -> tuple[float, ...]:
        """Return the learning rates to try for this method."""
        return self.rates.get(method, self.lrs)


@dataclass(frozen=True)
class Config:
    """The configuration of a run: model, data, training, cascade and comparison."""

    output: Annotated[str, Check(bool, "give the folder that the run writes to")] = "runs/run"
    """The run folder to write."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    spec: CascadeSpec = field(default_factory=CascadeSpec)
    compare: CompareConfig = field(default_factory=CompareConfig)

    def __post_init__(self) -> None:
        check(self)


def with_paths(config: Config, change: Callable[[str], str]) -> Config:
    """Return a configuration in which a function has changed each path of a model, weights or data."""

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
    """Read a configuration file.

    In the file, paths of models, weights and data are relative to its folder. In the result, they are relative to the
    working directory. `output` is not changed.

    Raises:
        SpecError: the file cannot be read, is not TOML, or has an unknown key or an invalid value.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "it is not UTF-8 text"
        raise SpecError(f"{path}: the configuration cannot be read: {reason}", code="unreadable-file") from fault
    except tomllib.TOMLDecodeError as fault:
        raise SpecError(f"{path}: the file is not valid TOML: {fault}", code="unreadable-file") from fault
    try:
        config: Config = decode(Config, data)
    except SpecError as fault:
        raise SpecError(f"{path}: {fault}", code=fault.code) from fault
    if path.parent == Path("."):
        return config
    return with_paths(config, lambda name: os.path.normpath(path.parent / name))


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as nested dicts."""
    data = dataclasses.asdict(dataclasses.replace(config, spec=CascadeSpec()))
    return data | {"spec": {key: value for key, value in config.spec.to_dict().items() if value is not None}}


def write_config(config: Config, path: Path) -> None:
    """Write the configuration as TOML, from which `load_config` returns an equal one.

    Relative paths are written relative to the folder of the file.
    """
    tomli_w = module_of("cli", "tomli_w")
    config = with_paths(config, lambda name: name if os.path.isabs(name) else os.path.relpath(name, path.parent))
    with replacing(path) as new:
        new.write_text(tomli_w.dumps(config_to_dict(config)), encoding="utf-8")
