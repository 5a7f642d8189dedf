"""The command line: finds the command, parses its arguments with tyro, and reports errors.

An error of the user or of the operating system is one message on standard error, with the exit code 2. Ctrl-C gives the
exit code 130. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from lorasc_fx.errors import LorascError, SpecError, nearest
from lorasc_fx.util.extras import require
from lorasc_fx.util.version import version

COMMANDS = {
    "train": ("CONFIG.toml [--resume] [OPTIONS]", "adapt a model and write a run folder"),
    "sites": ("MODEL [OPTIONS]", "list adapted weights, and why others are not"),
    "fold": ("RUN [--base FOLDER] [--output PATH]", "write the slow weights as safetensors"),
    "export": ("RUN --to FORMAT --output PATH", "write the model as pt2, onnx, safetensors or peft"),
    "compare": ("CONFIG.toml [OPTIONS]", "train several methods and compare them"),
    "predict": ("RUN FILE-or-FOLDER", "classify images or texts"),
    "report": ("RUN [--output FILE]", "write an HTML page about a run or a comparison"),
}
"""Arguments and purpose of each command. It is `run_NAME` in the module NAME, or in the module in `_MODULES`."""

_MODULES = {"fold": "export"}

_IMPORT_WARNINGS = {
    "torchao": "Failed to load ",
    "torchao.kernel.intmm": "Warning: Detected no triton",
    "torch.utils._pytree": "%s is an Enum subclass",
}
"""Prefixes of warnings, by logger, from the import of torchao by transformers. They are hidden, because no command uses
torchao."""


def _differs(prefix: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(prefix)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s")  # print the package's warnings to standard error
    for name, prefix in _IMPORT_WARNINGS.items():
        logging.getLogger(name).addFilter(partial(_differs, prefix))
    try:
        return _command(arguments)
    except LorascError as fault:
        print(f"lorasc-fx: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lorasc-fx: stopped; unsaved results are lost", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has closed the pipe, as in `lorasc-fx sites ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as fault:  # a full disk, a missing permission
        if fault.errno is None:  # it does not come from the operating system
            raise
        where = f"{fault.filename}: " if fault.filename is not None else ""
        print(f"lorasc-fx: {where}{fault.strerror}", file=sys.stderr)
        return 2
    except SystemExit as end:  # tyro exits after its help (0) and its errors (2)
        return end.code if isinstance(end.code, int) else 2


def _command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        usages = {f"lorasc-fx {name} {options}": purpose for name, (options, purpose) in COMMANDS.items()}
        width = max(map(len, usages))
        lines = "\n".join(f"  {usage:{width}}  {purpose}" for usage, purpose in usages.items())
        print(f"Fine-tune models by staged low-rank adaptation.\n\nusage:\n{lines}\n")
        print("`lorasc-fx COMMAND --help` lists the options of a command. OPTIONS override keys of CONFIG.toml.")
        return 0 if arguments else 2
    name, options = arguments[0], arguments[1:]
    if name == "--version":
        print(version())
        return 0
    if name not in COMMANDS:
        raise SpecError(
            f"no command is called {name!r}{nearest(name, COMMANDS)}; known: {', '.join(COMMANDS)}", code="unknown-name"
        )
    require("cli", "tyro", "rich")
    import tyro

    run: Callable[[Any], int] = pkgutil.resolve_name(f"lorasc_fx.cli.{_MODULES.get(name, name)}:run_{name}")
    kind = get_type_hints(run)["arguments"]
    if name not in ("train", "compare"):
        return run(tyro.cli(kind, prog=f"lorasc-fx {name}", args=options))
    path = Path(options.pop(0)) if options and not options[0].startswith("-") else None
    if path is None and "-h" not in options and "--help" not in options:
        raise SpecError(f"{name} needs a configuration file first: lorasc-fx {name} CONFIG.toml")
    from lorasc_fx.cli.config import Config, load_config

    config = Config() if path is None else load_config(path)
    if path is not None and config.output == Config.output:
        config = replace(config, output=f"runs/{path.stem}")
    default = kind(config)
    return run(tyro.cli(kind, prog=f"lorasc-fx {name} {path or 'CONFIG.toml'}", args=options, default=default))
