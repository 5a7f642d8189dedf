"""The command line: commands, their arguments (parsed by tyro), and error reporting.

Errors of the user or the operating system are one sentence on standard error and exit code 2. Ctrl-C is 130. Anything
else is a bug and keeps its traceback.
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
    "train": "train CONFIG.toml [--spec.rank 16 ...] [--resume]      adapt a model and write a run folder",
    "sites": "sites MODEL [--targets ...]                         show what would be adapted, and why not",
    "fold": "fold RUN [--base FOLDER] [--output PATH]            slow weights as safetensors, laid out as the base",
    "export": "export RUN --to FORMAT --output PATH                the folded model as pt2, onnx, safetensors or peft",
    "compare": "compare CONFIG.toml [--compare.seeds 0 1 ...]       methods side by side; goes on where it stopped",
    "predict": "predict RUN FILE-or-FOLDER                       classes of images or texts, by a run's folded weights",
    "report": "report RUN [--output FILE]                          one HTML page of a run or a comparison",
}
"""The usage of each command, by its name: `run_NAME` of the module of that name, or of the one in `_MODULES`."""

_MODULES = {"fold": "export"}

_LOADING = {
    "torchao": "Failed to load ",
    "torchao.kernel.intmm": "Warning: Detected no triton",
    "torch.utils._pytree": "%s is an Enum subclass",
}
"""Starts of warnings, by logger, that torchao causes when transformers imports it. No command uses torchao."""


def _is_other(start: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(start)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s")  # warnings of the package, to standard error
    for name, start in _LOADING.items():
        logging.getLogger(name).addFilter(partial(_is_other, start))
    try:
        return _command(arguments)
    except LorascError as fault:
        print(f"lorasc-fx: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lorasc-fx: stopped at once; what was not written yet is lost", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lorasc-fx sites ... | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as fault:  # a full disk, a missing permission
        if fault.errno is None:  # not from the operating system
            raise
        where = f"{fault.filename}: " if fault.filename is not None else ""
        print(f"lorasc-fx: {where}{fault.strerror}", file=sys.stderr)
        return 2
    except SystemExit as ended:  # tyro's help (0) and errors (2)
        return ended.code if isinstance(ended.code, int) else 2


def _command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = "\n".join(f"  lorasc-fx {line}" for line in COMMANDS.values())
        print(f"usage:\n{lines}\n\nlorasc-fx COMMAND --help says more.")
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
