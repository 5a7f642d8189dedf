"""What stands behind each command's name: a configuration file, overrides, flags. Parsed by tyro."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from lorasc_fx.cli.configure import load_config
from lorasc_fx.cli.export import ExportArguments
from lorasc_fx.cli.fold import FoldArguments
from lorasc_fx.cli.schema import Config
from lorasc_fx.cli.sites import SitesArguments
from lorasc_fx.errors import SpecError

__all__ = ["compare", "export", "fold", "report", "sites", "train"]


@dataclass(frozen=True)
class _Train:
    """Adapt a model as a configuration file says; each of its keys can be given here as well."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    resume: bool = False
    """Go on with the run that stands in the output folder."""
    overwrite: bool = False
    """Delete the run that stands in the output folder, and start again."""


@dataclass(frozen=True)
class _Compare:
    """Train several methods as a configuration file says; each of its keys can be given here as well."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    overwrite: bool = False
    """Delete the results that stand in the output folder, and start again."""


@dataclass(frozen=True)
class _Report:
    """Write one HTML page of a run, that needs no network: loss, slow and fast weights, experts, spectra, sites."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    output: Path | None = None
    """File to write; RUN/report.html if not given."""


def train(arguments: list[str]) -> tuple[Config, bool, bool]:
    """Return the configuration, overrides in place, whether to resume, and whether to overwrite."""
    path, rest = _config_path("train", arguments)
    parsed = tyro.cli(_Train, prog=f"lorasc-fx train {path or 'CONFIG.toml'}", args=rest, default=_Train(_loaded(path)))
    return parsed.config, parsed.resume, parsed.overwrite


def compare(arguments: list[str]) -> tuple[Config, bool]:
    """Return the configuration, overrides in place, and whether to overwrite."""
    path, rest = _config_path("compare", arguments)
    prog = f"lorasc-fx compare {path or 'CONFIG.toml'}"
    parsed = tyro.cli(_Compare, prog=prog, args=rest, default=_Compare(_loaded(path)))
    return parsed.config, parsed.overwrite


def sites(arguments: list[str]) -> SitesArguments:
    """Return what `sites` is asked."""
    return tyro.cli(SitesArguments, prog="lorasc-fx sites", args=arguments)


def fold(arguments: list[str]) -> FoldArguments:
    """Return what `fold` is asked."""
    return tyro.cli(FoldArguments, prog="lorasc-fx fold", args=arguments)


def export(arguments: list[str]) -> ExportArguments:
    """Return what `export` is asked."""
    return tyro.cli(ExportArguments, prog="lorasc-fx export", args=arguments)


def report(arguments: list[str]) -> tuple[Path, Path | None]:
    """Return the folder of the run, and the file to write."""
    parsed = tyro.cli(_Report, prog="lorasc-fx report", args=arguments)
    return parsed.run, parsed.output


def _config_path(command: str, arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Take the configuration file off the front; only help goes without one."""
    if arguments and not arguments[0].startswith("-"):
        return Path(arguments[0]), arguments[1:]
    if "-h" in arguments or "--help" in arguments:
        return None, arguments
    raise SpecError(f"{command} needs a configuration file first: lorasc-fx {command} CONFIG.toml")


def _loaded(path: Path | None) -> Config:
    if path is None:
        return Config()
    config = load_config(path)
    return config if config.output != Config.output else replace(config, output=f"runs/{path.stem}")
