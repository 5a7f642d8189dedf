"""The command line: finds the command, parses its arguments with tyro, and reports errors.

An error of the user or of the operating system is one message on standard error, with the exit code 2. Ctrl-C gives the
exit code 130. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import importlib.util
import logging
import pkgutil
import sys
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from lorasc_fx.errors import LorascError, SpecError, nearest, path_of
from lorasc_fx.util.environment import missing, version

if TYPE_CHECKING:
    from lorasc_fx.facade import Cascade

COMMANDS = {
    "train": ("train:train", "CONFIG.toml [KEY=VALUE ...]", "train a model and write a run folder"),
    "sites": ("sites:sites", "MODEL", "list adapted weights, and why others are not"),
    "predict": ("predict:predict", "RUN DATA [KEY=VALUE ...]", "classify images or texts, or generate texts"),
    "export": ("export:export", "RUN --to FORMAT --output PATH", "write pt2, onnx, safetensors or peft"),
    "fold": ("export:fold", "RUN --base BASE --output PATH", "write the slow weights into the files of the base"),
    "compare": ("compare:compare", "CONFIG.toml [KEY=VALUE ...]", "train several methods and compare them"),
}
"""{command: (function, usage, purpose)}. tyro converts the parameters of the function to command line options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(version())
        return 0
    logging.basicConfig(format="%(message)s")  # print the package's warnings to standard error
    try:
        return _command(arguments)
    except (LorascError, OSError) as fault:  # an OSError: a full disk, a missing permission
        print(f"lorasc-fx: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lorasc-fx: stopped; unsaved results are lost", file=sys.stderr)
        return 130
    except SystemExit as end:  # tyro exits after its help (0) and its errors (2)
        return end.code if isinstance(end.code, int) else 2


def _command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name} {usage}\n      {purpose}" for name, (_, usage, purpose) in COMMANDS.items())
        print(f"usage: lorasc-fx COMMAND ...\n\n{lines}\n\nlorasc-fx COMMAND --help lists all options of a command.")
        return 0 if arguments else 2
    name = arguments[0]
    if name not in COMMANDS:
        raise SpecError(f"no command is called {name!r}{nearest(name, COMMANDS)}; known: {', '.join(COMMANDS)}")
    _require_extra()
    import tyro

    function = pkgutil.resolve_name(f"lorasc_fx.cli.{COMMANDS[name][0]}")
    return int(tyro.cli(function, prog=f"lorasc-fx {name}", args=arguments[1:], config=(tyro.conf.FlagCreatePairsOff,)))


def load(run: str | PathLike[str]) -> Cascade:
    """Load the cascade of a run of `lorasc-fx train`. The model is built from the folder in the run's configuration.

    The cascade has an attribute `preprocessing`, which converts texts or paths of images to arguments of the model, as
    in training: `cascade(**cascade.preprocessing(texts))`. `cascade.preprocessing.classes` are the names of the
    classes.

    Raises:
        SpecError: the model cannot be built.
        MissingExtra: the packages of the extra `cli` are not installed.
        StateError, CheckpointError: the folder has no run, or `lorasc_fx.load` raises.
    """
    _require_extra()
    from lorasc_fx.cli.train import open_run

    cascade, task = open_run(path_of(run))
    cascade.preprocessing = task
    return cascade


def _require_extra() -> None:
    """Raise MissingExtra if a package of the extra `cli` is not installed. This does not import them."""
    for package in ("tyro", "tomli_w", "transformers", "datasets", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise missing("cli", package)
