"""Error and warning classes. All errors are subclasses of `LorascError`, and each has a stable code.

The message says what is wrong, where (weight name, node, file) and what to do. Its wording may change. The `code`, in
kebab-case, identifies the situation and does not change, so compare the code in programs. Each class has a default
code. docs/errors.md lists all codes.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "CODES",
    "CaptureError",
    "CheckpointError",
    "ExportError",
    "LorascError",
    "LorascWarning",
    "MissingExtra",
    "NoSites",
    "NonFiniteBranch",
    "PassError",
    "PassOrderError",
    "SpecError",
    "StateError",
    "UnknownTarget",
    "VerifyError",
    "listed",
    "named",
    "nearest",
    "path_of",
    "reason_of",
    "warn",
]

CODES = {
    "adapter-does-not-fit": "the adapter has a module name or a shape that the model does not have",
    "adapter-not-supported": "the kind of the adapter, or one of its options, is not supported",
    "already-adapted": "the model, or a part of it, belongs to another cascade, or contains layers of peft",
    "backward-not-supported": "a second derivative, or a backward of a freed output, needs tensors that were not saved",
    "base-differs": "a checkpoint, an adapter or a base file belongs to another base model",
    "buffers-differ": "(warning) the runs to merge have different buffers",
    "change-rounded-away": "(warning) the rounding of a fold loses a part of what was trained",
    "concurrent-save": "another process is writing to the same path",
    "conflicting-options": "options or arguments cannot be combined",
    "constant-adapted": "(warning) a frozen weight, which may be a constant, was adapted",
    "evaluated-with-noise": "(warning) the cascade was called in eval mode while its weights contain noise",
    "format-not-supported": "this version does not read the format version of a file",
    "frozen-parameter-changed": "(warning) a parameter that checkpoints do not contain changed after a save",
    "gradients-pending": "no optimizer step has consumed the computed gradients yet",
    "graph-not-verified": "a graph does not match its plan",
    "input-not-supported": "the parameters of a branch cannot become inputs of the graph",
    "inside-backward": "the call was made during a backward that still needs the weights",
    "inside-weights": "the call, or a write to a weight, was made inside a `with cascade.weights(...)` block",
    "invalid-adapter": "a file of a peft adapter is malformed or incomplete",
    "invalid-checkpoint": "a checkpoint, a state dict, a plan or a result file is damaged or was edited",
    "invalid-data": "a data set is malformed, too small, or does not suit the model",
    "invalid-value": "an argument or option is missing, out of range or has the wrong type",
    "late-sites": "(warning) sites were added after the optimizer was created",
    "meta-model": "a tensor of the model is on the meta device, or has no shape yet",
    "method-not-supported": "the adapter method cannot be applied to this weight, or in this call",
    "missing-extra": "an optional package is not installed",
    "model-called-inside-stage": "(warning) the user's model was called inside a stage, without the running branches",
    "model-refuses-inputs": "the model itself raises on the example inputs",
    "model-saved-inside-stage": "(warning) the state dict of the user's model was read inside a stage",
    "no-base": "the base model, or its file, is not given or not found",
    "no-branch-moved": "(warning) a stage ended, but no branch has changed",
    "no-checkpoint": "a folder contains no checkpoint or no run",
    "no-graph": "the model runs eagerly, but this call needs its graph",
    "no-sites": "no weight is left to adapt",
    "non-finite": "a branch, a weight, a state, a loss or a tensor in a file contains inf or nan",
    "not-a-model": "the model is not an nn.Module written in Python, or uses names that this package reserves",
    "not-available": "the cascade or the model lacks what the call needs (a graph, an average, a trained stage)",
    "not-captured": "no front end can capture the model as an equivalent graph",
    "not-exportable": "the format cannot express the cascade",
    "not-serializable": "a value cannot be stored as JSON, safetensors or pickle",
    "not-trainable": "a parameter cannot have a gradient, or shares memory with another one",
    "optimizer-differs": "the optimizer or scheduler differs from the saved one, or does not suit the spec",
    "optimizer-lacks-parameters": "the optimizer does not contain all trained parameters",
    "other-versions": "(warning) a checkpoint was written with other library versions",
    "pass-order": "passes cannot be sorted by their requirements",
    "path-in-the-way": "the path to write exists, and lorasc-fx does not replace it",
    "quantized-left-out": "(warning) quantized weights cannot be adapted and are not changed",
    "quantized-not-supported": "a quantized weight cannot store the result, or was not re-quantized",
    "rank-failed": "another rank raised an error or has ended",
    "rank-too-large": "the rank of an adapter is larger than the maximum rank of the inputs of a graph",
    "ranks-differ": "ranks have different weights, specs, code or checkpoint versions",
    "released": "the cascade was released",
    "requirement-not-met": "a graph does not meet a requirement of a pass",
    "rows-differ": "the number of adapters in a call of a bank differs from the number of rows of the batch",
    "rows-not-independent": "rows of a batch depend on each other, so they cannot have different adapters",
    "running-stage-folded": "(warning) a fold includes a running stage as if it had ended",
    "sharded": "the call is not supported for sharded weights",
    "sites-differ": "the sites of two runs, or of a checkpoint and a model, differ",
    "smaller-sizes-not-refused": "(warning) an ONNX file does not compute what the model computes at sizes of 0 or 1",
    "spec-differs": "a cascade, a graph or a run has another spec, or other settings, than the saved one",
    "stage-not-ended": "a stage was trained but not ended",
    "tied-weight-exported-twice": "(warning) peft stores a pair of factors for each name of a tied weight",
    "tied-weights-differ": "the names of a tied weight have different values, or are no longer tied",
    "too-many-variants": "(warning) graphs are captured repeatedly: constants change, or there are many kinds of calls",
    "trainer-not-supported": "the Trainer, one of its options, or how the callback was added does not suit a cascade",
    "training-not-kept": "(warning) the cascade was garbage collected without release: training is lost or noise stays",
    "unknown-name": "a name (of an option, a field, a device, a front end, ...) is unknown",
    "unknown-stage": "a stage has not ended in this cascade, or its weights are no longer stored",
    "unknown-target": "a pattern matches no weight",
    "unreadable-file": "a file does not exist or cannot be read",
    "weights-changed-outside": "something outside this package changed a weight or a submodule",
    "wrapper-not-supported": "a wrapper copies the cascade, or does not average all of its gradients",
    "write-failed": "a path cannot be written, or writing was interrupted. The previous content is unchanged",
    "wrong-function-result": "a function, module or pass of the user cannot be called, or returns the wrong type",
}
"""Every code with a description. Codes that start with "(warning)" belong to a LorascWarning."""

_PACKAGE = os.path.dirname(__file__) + os.sep


class LorascError(Exception):
    """Base class of all errors that this package raises on purpose."""

    code: str = ""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class LorascWarning(UserWarning):
    """Category of all warnings of this package: nothing has failed, but the user should act."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class SpecError(LorascError, ValueError):
    """A value in the spec or in a configuration is invalid."""

    code = "invalid-value"


class UnknownTarget(SpecError):
    """A pattern in targets, rules or train matches no weight of the model."""

    code = "unknown-target"


class CaptureError(LorascError):
    """No front end could capture the model, or the model raised an error on the example inputs."""

    code = "not-captured"


class PassError(LorascError):
    """The graph does not meet a requirement of a pass, or the pass does not support the graph."""


class NoSites(PassError, SpecError):
    """The spec leaves no weight to adapt. The message gives the reason for each candidate."""

    code = "no-sites"


class PassOrderError(PassError):
    """A Pipeline has no pass, or its passes cannot be sorted by their requirements."""

    code = "pass-order"


class VerifyError(PassError):
    """A graph does not match its plan. The message lists each fault with its node."""

    code = "graph-not-verified"


class StateError(LorascError, RuntimeError):
    """The current state does not allow the call: after release, inside a backward, or with another optimizer."""


class NonFiniteBranch(StateError):
    """A branch contains inf or nan when it is folded."""

    code = "non-finite"


class CheckpointError(LorascError):
    """A checkpoint is damaged, belongs to another base model, or cannot be written or read."""

    code = "invalid-checkpoint"


class ExportError(LorascError):
    """The format cannot express the cascade, or a path cannot be written. The message names the weights."""

    code = "not-exportable"


class MissingExtra(LorascError, ImportError):
    """An optional package is not installed. The message contains the pip command."""

    code = "missing-extra"


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return "; nearest: 'a', 'b'" with the names most similar to `name`, or "" if none is similar."""
    similar = difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.5)
    return "; nearest: " + ", ".join(repr(name) for name in similar) if similar else ""


def listed(candidates: Iterable[str]) -> str:
    """Return "; known: 'a', 'b' and 7 more" with the first of these names, or "" if there are none."""
    names = list(candidates)
    return "; known: " + named(map(repr, names), 5) if names else ""


def named(names: Iterable[str], count: int = 3) -> str:
    """Return "a, b, c and 4 more" with the first `count` names."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"


def reason_of(fault: BaseException) -> str:
    """Return the text of an error. For an OSError, only the reason, because our messages already name the path."""
    return (isinstance(fault, OSError) and fault.strerror) or str(fault)


def path_of(path: str | os.PathLike[str]) -> Path:
    """Convert a path that a user gave.

    Raises:
        SpecError: the path contains a NUL byte. Some functions of Python raise ValueError for such a path, and others
            report that the file does not exist.
    """
    if "\0" in os.fspath(path):
        raise SpecError(f"the path {os.fspath(path)!r} contains a NUL byte, which no file system accepts. Give another")
    return Path(path)


def warn(message: str, code: str) -> None:
    """Issue a LorascWarning that points to the user's code: the first caller outside this package and torch."""
    torch_folder = os.path.dirname(sys.modules["torch"].__file__ or "") + os.sep
    skipped = (_PACKAGE, torch_folder, contextlib.__file__, copy.__file__)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(skipped):
        frame, level = frame.f_back, level + 1
    warnings.warn(LorascWarning(message, code=code), stacklevel=level)
