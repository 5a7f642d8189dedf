"""The door of the command line: which command, and what becomes of errors.

What the user got wrong is one sentence on standard error and exit code 2. Ctrl-C is 130. Anything else is a fault of
ours and keeps its traceback.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from lorasc_fx.errors import LorascError, SpecError, nearest
from lorasc_fx.extras import require

__all__ = ["main"]

COMMANDS = {
    "train": "train CONFIG.toml [--spec.rank 16 ...] [--resume]      adapt a model and write a run folder",
    "sites": "sites MODEL [--targets ...]                         show what would be adapted, and why not",
    "fold": "fold RUN [--base FOLDER] [--output PATH]            slow weights as safetensors, laid out as the base",
    "export": "export RUN --to FORMAT --output PATH                the folded model as pt2, onnx, safetensors or peft",
    "compare": "compare CONFIG.toml [--compare.seeds 0 1 ...]       methods side by side; goes on where it stopped",
    "report": "report RUN [--output FILE]                          one HTML page of a run: loss, experts, spectra",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s")  # what the package warns of, to standard error
    try:
        return _command(arguments)
    except LorascError as fault:
        print(f"lorasc-fx: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lorasc-fx: stopped at once; what was not written yet is lost", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lorasc-fx sites ... | head`: the reader has left, and nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as fault:  # a full disk, a missing permission
        if fault.errno is None:  # not from the operating system
            raise
        where = f"{fault.filename}: " if fault.filename is not None else ""
        print(f"lorasc-fx: {where}{fault.strerror}", file=sys.stderr)
        return 2
    except SystemExit as ended:  # tyro's help (0) and its complaints (2)
        return ended.code if isinstance(ended.code, int) else 2


def _command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        import importlib.metadata

        print(importlib.metadata.version("lorasc-fx"))
        return 0
    if name not in COMMANDS:
        raise SpecError(f"no command is called {name!r}{nearest(name, COMMANDS)}; known: {', '.join(COMMANDS)}")
    require("cli", "tyro", "rich")
    from lorasc_fx.cli import arguments as parse

    if name == "train":
        from lorasc_fx.cli.train import run_train

        config, resume, overwrite = parse.train(rest)
        return run_train(config, resume=resume, overwrite=overwrite)
    if name == "compare":
        from lorasc_fx.cli.compare import run_compare

        config, overwrite = parse.compare(rest)
        return run_compare(config, overwrite=overwrite)
    if name == "sites":
        from lorasc_fx.cli.sites import run_sites

        return run_sites(parse.sites(rest))
    if name == "export":
        from lorasc_fx.cli.export import run_export

        return run_export(parse.export(rest))
    if name == "report":
        from lorasc_fx.cli.report import run_report

        return run_report(*parse.report(rest))
    from lorasc_fx.cli.fold import run_fold

    return run_fold(parse.fold(rest))


def _usage() -> str:
    lines = "\n".join(f"  lorasc-fx {line}" for line in COMMANDS.values())
    return f"usage:\n{lines}\n\nlorasc-fx COMMAND --help says more."
