"""Configuration files: a TOML file, `key=value` overrides, and frozen dataclasses whose errors name the key."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from lorasc_fx.cli.methods import METHODS
from lorasc_fx.errors import SpecError
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.util.decode import Check, check, choice, decode
from lorasc_fx.util.environment import module_of
from lorasc_fx.util.files import replacing

Count = Annotated[int, Check(lambda count: count >= 1, "give a whole number of 1 or more")]
CountOrZero = Annotated[int, Check(lambda count: count >= 0, "give a whole number of 0 or more")]
Share = Annotated[float, Check(lambda share: 0 <= share <= 1, "give a share from 0 to 1")]
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
    """The model: `hf:FOLDER` (transformers), `timm:NAME`, or `python:package.module:function`."""
    task: Literal["auto", "language", "classification"] = "auto"
    """What a model of transformers learns. `auto`: `language` if the folder has a causal language model, otherwise
    `classification`."""
    weights: Annotated[
        str, Check(lambda path: not path or path.endswith(".safetensors"), "give a .safetensors file")
    ] = ""
    """Weights of a model of timm: a `.safetensors` file. If empty, they are random."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Dtype of a model of transformers. `auto`: the one in its files."""

    def __post_init__(self) -> None:
        check(self, "model")


@dataclass(frozen=True)
class DataConfig:
    """The data set, and how it is split."""

    name: str = ""
    """The data set: `json:FILE`, `csv:FILE`, `parquet:FILE`, `text:FILE` (one text per line), `imagefolder:DIR`, or
    `python:package.module:function`, a function that returns a `datasets.Dataset`."""
    train: Size = 0.7
    """Training examples: a number, or a share of the data set."""
    validation: Size = 0.1
    """Validation examples, which are evaluated at the end of each stage: a number or a share."""
    test: Size = 0.2
    """Test examples: a number or a share."""
    seed: Seed = 0
    """Seed of the split."""
    max_length: CountOrZero = 0
    """Maximum number of tokens. Longer texts are truncated. 0: the maximum of the model, and at most 1024."""
    image_size: Count = 64
    """Height and width of images in pixels, for models of timm and of functions."""
    text_column: str = "text"
    """Name of the column with the text."""
    image_column: str = "image"
    """Name of the column with the image."""
    label_column: str = "label"
    """Name of the column with the class."""

    def __post_init__(self) -> None:
        check(self, "data")


@dataclass(frozen=True)
class StagesConfig:
    """The stages, and the learning rate within each of them."""

    count: Count = 3
    """Number of stages. The optimizer steps of the training are divided evenly among them."""
    warmup: CountOrZero = 10
    """Steps of linear warm-up at the start of each stage."""
    floor: Share = 0.0
    """Learning rate at the end of each stage, as a share of the full one. 1 means no decay."""

    def __post_init__(self) -> None:
        check(self, "stages")


@dataclass(frozen=True)
class CompareConfig:
    """The methods, seeds and learning rates of `lorasc-fx compare`."""

    methods: Annotated[tuple[Method, ...], ONE_OR_MORE, EACH_ONCE] = ("lora", "cascade", "lorasc")
    """The methods to compare (all: docs/command-line.md). Each is compared with the first one."""
    seeds: Annotated[tuple[Seed, ...], ONE_OR_MORE, EACH_ONCE] = (0, 1, 2)
    """Seeds. Every method is trained with every learning rate once per seed."""
    lrs: Rates = (1e-3,)
    """Learning rates to try for each method."""
    rates: dict[Method, Rates] = field(default_factory=dict)
    """Learning rates for single methods, by name. They replace `lrs`."""
    keep_weights: tuple[Method, ...] = ()
    """Methods whose folded weights are saved, in `weights/RUN`."""

    def __post_init__(self) -> None:
        check(self, "compare")


@dataclass(frozen=True)
class Config:
    """A run. `train` has the keys of transformers' TrainingArguments, or of TRL's SFTConfig for a language model."""

    output: Annotated[str, Check(bool, "give the folder that the run writes to")] = "runs/run"
    """The run folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    train: dict[str, Any] = field(default_factory=dict)
    spec: CascadeSpec = field(default_factory=CascadeSpec)
    compare: CompareConfig = field(default_factory=CompareConfig)

    def __post_init__(self) -> None:
        check(self)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, and apply overrides such as `spec.rank=16`.

    Paths in the file are relative to its folder. `output`, and paths in overrides, are relative to the working
    directory. In the result all are relative to the working directory.

    Raises:
        SpecError: the file cannot be read, or a key or value is invalid.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        table.setdefault("output", f"runs/{path.stem}")
        config: Config = decode(Config, table)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as fault:
        raise SpecError(f"{path}: the configuration cannot be read: {fault}", code="unreadable-file") from fault
    except SpecError as fault:
        raise SpecError(f"{path}: {fault}", code=fault.code) from fault
    config = _with_paths(config, lambda place: os.path.normpath(path.parent / place))
    if not overrides:
        return config
    table = to_dict(config)
    for override in overrides:
        _override(table, override)
    return decode(Config, table)  # type: ignore[no-any-return]  # decode returns what its first argument says


def _override(table: dict[str, Any], override: str) -> None:
    """Set a key of nested dicts to the TOML literal after the equals sign, or to the text itself."""
    key, equals, text = override.partition("=")
    if not equals:
        raise SpecError(f"{override!r} is not an override; give key=value, such as spec.rank=16")
    *parents, name = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise SpecError(f"{key}: {parent} is not a table", code="unknown-name")
    try:
        table[name] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[name] = text


def write_config(config: Config, path: Path) -> None:
    """Write the configuration as TOML, from which `load_config` returns an equal one."""
    tomli_w = module_of("cli", "tomli_w")
    path.parent.mkdir(parents=True, exist_ok=True)
    config = _with_paths(config, lambda place: os.path.relpath(place, path.parent))
    with replacing(path) as new:
        new.write_text(tomli_w.dumps(to_dict(config)), encoding="utf-8")


def _with_paths(config: Config, change: Callable[[str], str]) -> Config:
    """Return the configuration with each relative path of a model, weights or data changed."""

    def changed(name: str) -> str:
        kind, _, place = name.partition(":")
        is_path = kind not in ("timm", "python")
        return f"{kind}:{change(place)}" if is_path and place and not os.path.isabs(place) else name

    model, data = config.model, config.data
    weights = model.weights if not model.weights or os.path.isabs(model.weights) else change(model.weights)
    model = dataclasses.replace(model, name=changed(model.name), weights=weights)
    return dataclasses.replace(config, model=model, data=dataclasses.replace(data, name=changed(data.name)))


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as nested dicts of plain values."""
    table = dataclasses.asdict(dataclasses.replace(config, spec=CascadeSpec()))
    return table | {"spec": {key: value for key, value in config.spec.to_dict().items() if value is not None}}
