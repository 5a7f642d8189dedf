"""The functions of the package that tests replace, to let them fail, wait or count, and the limits that they lower.

Used as `monkeypatch.setattr(*SEAMS["capture"], counted)`. A function that moves changes this file, and no test.
"""

from __future__ import annotations

import sys
from typing import Any

from lorasc_fx.branch import deltas
from lorasc_fx.cascade import run, transition
from lorasc_fx.cascade.run import Run
from lorasc_fx.check import observe
from lorasc_fx.checkpoint import files
from lorasc_fx.compile import compiler, variants
from lorasc_fx.export import safetensors_files
from lorasc_fx.peft import adapter_writer as peft_writer
from lorasc_fx.shards import ProcessGroup
from lorasc_fx.state import stage

__all__ = ["LIMITS", "SEAMS", "lower", "seam"]

_MODULES = sys.modules  # `lorasc_fx.adapt` is the function, to a path by attributes

SEAMS: dict[str, tuple[Any, str]] = {
    "capture": (compiler, "capture"),
    "insert": (compiler, "insert"),
    "checksum": (_MODULES["lorasc_fx.util.fingerprint"], "checksum"),
    "backward": (observe, "projected_gradients"),
    "sum of runs": (_MODULES["lorasc_fx.adapt.merge"], "weighted_sum"),
    # checkpoints
    "write tensors": (files, "save_file"),
    "digest": (_MODULES["lorasc_fx.checkpoint"], "file_digest"),
    "sync": (_MODULES["lorasc_fx.checkpoint"], "sync"),
    "remove a folder": (_MODULES["lorasc_fx.checkpoint"], "remove"),
    "read tensors": (_MODULES["lorasc_fx.checkpoint"], "load"),
    "unpack": (_MODULES["lorasc_fx.checkpoint"], "install"),
    "unpack gradients": (_MODULES["lorasc_fx.checkpoint"], "gradients_of"),
    "load into a cascade": (_MODULES["lorasc_fx.adapt"], "load_into"),
    "write an adapter": (peft_writer, "write_tensors"),
    "write a tensor": (safetensors_files, "write_tensors"),
    # stages
    "transition": (transition, "next_stage"),
    "commit": (Run, "commit"),
    "digest of the source": (run, "source_digest"),
    "redraw": (run, "write_start"),
    "sum over ranks": (ProcessGroup, "sum"),
}

LIMITS: dict[str, tuple[tuple[Any, str], ...]] = {
    "block of a sum": ((deltas, "BLOCK"),),
    "number of variants": ((variants, "MAX_VARIANTS"),),
    "entries kept of each stage": ((stage, "MAX_FULL_ENTRIES"),),
}


def seam(name: str) -> Any:
    """Return the current function."""
    return getattr(*SEAMS[name])


def lower(monkeypatch: Any, name: str, limit: int) -> None:
    """Let a limit of the package be this one."""
    for owner, attribute in LIMITS[name]:
        monkeypatch.setattr(owner, attribute, limit)
