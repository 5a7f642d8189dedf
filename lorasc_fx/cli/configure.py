"""From a TOML file to a `Config` and back, with errors that name file, line and the nearest valid key."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from lorasc_fx.cli.schema import Config
from lorasc_fx.cli.toml_text import KeyPath, key_lines, line_of, to_toml
from lorasc_fx.errors import SpecError, nearest
from lorasc_fx.spec import CascadeSpec, Noise, Rule, TrainRule

__all__ = ["config_to_dict", "load_config", "write_config"]

_SPEC_TABLES: dict[str, type[Any]] = {"noise": Noise, "rules": Rule, "train_rules": TrainRule}


def load_config(path: Path) -> Config:
    """Read a configuration.

    Raises:
        SpecError: the file cannot be read, is not TOML, has a key that no table knows, or a value that a key refuses.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "it is not UTF-8 text"
        raise SpecError(f"{path}: the configuration cannot be read: {reason}") from fault
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        raise SpecError(f"{path}: this is not TOML: {fault}") from fault
    reader = _Reader(path, key_lines(text))
    config = reader.table(Config, data, ())
    assert isinstance(config, Config)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain tables."""
    data = dataclasses.asdict(dataclasses.replace(config, spec=CascadeSpec()))
    data["spec"] = config.spec.to_dict()
    return data


def write_config(config: Config, path: Path) -> None:
    """Write the configuration as TOML that `load_config` reads back to an equal one."""
    path.write_text(to_toml(config_to_dict(config)), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class _Reader:
    path: Path
    lines: Mapping[KeyPath, int]

    def fail(self, at: KeyPath, message: str) -> SpecError:
        return SpecError(f"{self.path}:{line_of(self.lines, at)}: {message}")

    def known(self, cls: type[Any], data: Mapping[str, Any], at: KeyPath) -> None:
        names = [each.name for each in dataclasses.fields(cls)]
        for key in data:
            if key not in names:
                where = ".".join((*at, key))
                known = [".".join((*at, name)) for name in names]
                raise self.fail((*at, key), f"unknown key {where!r}{nearest(where, known, 1)}")

    def table(self, cls: type[Any], data: Any, at: KeyPath) -> Any:
        if not isinstance(data, Mapping):
            raise self.fail(at, f"{'.'.join(at)!r} is {data!r}; it is a table: write [{'.'.join(at)}]")
        self.known(cls, data, at)
        if cls is CascadeSpec:
            return self.spec(data, at)
        hints = get_type_hints(cls)
        values = {key: self.value(hints[key], value, (*at, key)) for key, value in data.items()}
        try:
            return cls(**values)
        except SpecError as fault:
            raise self.fail(self.blame(data, at, str(fault)), str(fault)) from fault

    def spec(self, data: Mapping[str, Any], at: KeyPath) -> CascadeSpec:
        for name, cls in _SPEC_TABLES.items():
            entries = data.get(name, [])
            for index, entry in enumerate(entries if isinstance(entries, list) else [entries]):
                if isinstance(entry, Mapping):
                    self.known(cls, entry, (*at, name, *([str(index)] if isinstance(entries, list) else [])))
        try:
            return CascadeSpec.from_dict(data)
        except (SpecError, TypeError) as fault:
            raise self.fail(self.blame(data, at, str(fault)), str(fault)) from fault

    def blame(self, data: Mapping[str, Any], at: KeyPath, message: str) -> KeyPath:
        """Find the key that a message of `__post_init__` speaks of: its first word, `rank` or `noise.strength`."""
        words = tuple(message.partition(" ")[0].rstrip(":").split("."))
        words = words[1:] if words[:1] == at[-1:] else words
        name = words[0].partition("[")[0] if words else ""
        return (*at, name, *words[1:]) if name in data else at

    def value(self, hint: Any, value: Any, at: KeyPath) -> Any:
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return self.table(hint, value, at)
        if get_origin(hint) is tuple:
            if not isinstance(value, list):
                raise self.fail(at, f"{'.'.join(at)} is {value!r}; give a list")
            return tuple(self.value(get_args(hint)[0], entry, at) for entry in value)
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if type(value) is not hint:
            kinds = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
            raise self.fail(at, f"{'.'.join(at)} is {value!r}; give {kinds[hint]}")
        return value
