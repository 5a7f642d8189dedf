"""Error classes under one root, each error with a stable code.

A message says what is wrong, where (weight name, node, file) and what to do. Its wording may change. The `code`
(kebab-case) names the situation and does not change, so programs and tests compare it. Each class has a default code.
docs/errors.md lists all codes.
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
    "adapter-does-not-fit": "the adapter names a module, or has a shape, that the model has not",
    "adapter-not-supported": "the adapter's kind, or an option of it, cannot be expressed here",
    "already-adapted": "the model, or a part of it, belongs to a living cascade, or holds layers of peft",
    "backward-not-supported": "a second derivative, or a backward of a freed output, needs what was not kept",
    "bank-full": "a bank has no room for one more adapter",
    "base-differs": "a checkpoint, an adapter or a base file belongs to another model",
    "buffers-differ": "(warning) buffers differ between the runs that are merged",
    "concurrent-save": "another process is writing there",
    "conflicting-options": "two options, or arguments, exclude each other",
    "constant-adapted": "(warning) a frozen weight, perhaps a constant, has become a site",
    "dropout-not-applied": "(warning) a training step ran in eval mode, and dropout was asked for",
    "evaluated-with-noise": "(warning) the cascade was called in eval mode, and its weights hold noise",
    "format-not-supported": "a file has a format version that this version does not read",
    "frozen-parameter-changed": "(warning) a parameter outside of the checkpoints changed after a save",
    "gradients-pending": "gradients were computed and not yet applied by the optimizer",
    "graph-not-verified": "a graph does not agree with its plan",
    "hook-not-called": "(warning) a weight with a hook on its gradient was adapted, and gets no gradient",
    "input-not-supported": "the tensors of a branch cannot become inputs of the graph",
    "inside-backward": "the call came during a backward that still needs the weights",
    "inside-weights": "the call, or a write to a weight, came inside a `with cascade.weights(...)` block",
    "invalid-adapter": "a file of a peft adapter is malformed or incomplete",
    "invalid-checkpoint": "a checkpoint, a state dict, a plan or a result file is damaged or was edited",
    "invalid-data": "a data set is malformed, too small, or of another kind than the model takes",
    "invalid-value": "an argument or option is missing, out of range or of another type",
    "late-sites": "(warning) sites were added after the optimizer was made",
    "meta-model": "a tensor of the model has no numbers, or no shape, yet",
    "method-not-supported": "the adapter method cannot be applied to this weight, or in this call",
    "missing-extra": "an optional package is not installed",
    "model-called-inside-stage": "(warning) the user's model was called while it lacks the running branches",
    "model-refuses-inputs": "the model itself raises on the example inputs",
    "model-saved-inside-stage": "(warning) the state dict of the user's model was read inside a stage",
    "no-base": "the base model, or its file, is not named or not found",
    "no-branch-moved": "(warning) a stage ended and no branch has changed",
    "no-checkpoint": "a folder holds no checkpoint, or no run",
    "no-sites": "no weight is left to adapt",
    "no-whole-graph": "the model has graph breaks, and one whole graph is needed",
    "non-finite": "a branch, a weight, a state, a loss or a tensor in a file holds inf or nan",
    "non-finite-left-out": "(warning) a branch or a trained parameter is not finite and was left out of a fold",
    "not-a-model": "a model of Python modules was expected, without names that this package needs",
    "not-available": "the cascade, or the model, has not what the call works on (a graph, an average, a trained stage)",
    "not-captured": "no front end turns the model into a graph that computes the same",
    "not-exportable": "the format cannot express the cascade",
    "not-serializable": "a value cannot be stored as JSON, safetensors or pickle",
    "not-trainable": "a parameter has no gradient, was made in torch.inference_mode, or shares memory with another",
    "optimizer-differs": "the optimizer or scheduler differs from the saved one, or from what the spec asks for",
    "optimizer-lacks-parameters": "the optimizer does not hold all trained parameters",
    "other-versions": "(warning) a checkpoint was written by other versions",
    "pass-order": "passes cannot run in this order",
    "path-in-the-way": "something else is at the path that is to be written",
    "quantized-left-out": "(warning) quantized weights are no sites, and stay as they are",
    "quantized-not-supported": "a quantized weight cannot hold the result, or was not quantized again",
    "rank-failed": "another rank raised an error, or is gone",
    "rank-too-large": "an adapter has a larger rank than the inputs of a graph",
    "ranks-differ": "ranks have other weights, another spec, code or checkpoint version than the others",
    "released": "the cascade was released",
    "requirement-not-met": "a graph lacks what a pass requires",
    "rows-differ": "a call of a bank names adapters for another number of rows than the batch has",
    "rows-not-independent": "rows of a batch depend on each other, and cannot have several adapters",
    "running-stage-folded": "(warning) a fold takes a running stage as one that has ended",
    "sharded": "the call is not there for sharded weights",
    "sites-differ": "the sites of two runs, or of a checkpoint and a model, differ",
    "smaller-sizes-not-refused": "(warning) an ONNX file computes something else than the model at sizes of 0 or 1",
    "spec-differs": "a cascade, a graph or a run has another spec, or other settings, than the saved one",
    "stage-not-ended": "a stage was trained and not ended",
    "tied-weight-exported-twice": "(warning) peft keeps a pair of factors for each name of a tied weight",
    "tied-weights-differ": "names of one tied weight have different values, or are not tied any more",
    "too-many-variants": "(warning) graphs are captured again and again, for changing constants or many kinds of calls",
    "trainer-not-supported": "the Trainer, an option of it, or how the callback was added does not suit a cascade",
    "training-not-kept": "(warning) the cascade is gone, and what was trained is lost",
    "unfolded-save": "(warning) a trainer saves the state dict of an unfolded cascade",
    "unknown-name": "a name (of an option, a field, a device, a front end, ...) is not one of the known ones",
    "unknown-stage": "a stage has not ended in this cascade, or its weights are no longer kept",
    "unknown-target": "a pattern matches no weight",
    "unreadable-file": "a file is not there, or cannot be read",
    "weights-changed-outside": "a weight, a submodule or the base file was changed by something else than this package",
    "wrapper-not-supported": "another library cuts, copies or averages the parameters of the cascade",
    "write-failed": "a path cannot be written, or writing was interrupted; what was there stays",
    "wrong-function-result": "a function, module or pass of the user cannot be called or returns something else",
}
"""Every code with its meaning."""

_PACKAGE = os.path.dirname(__file__) + os.sep


class LorascError(Exception):
    """Root of every error that this package raises on purpose."""

    code: str = ""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class LorascWarning(UserWarning):
    """The category of all warnings of this package: nothing has failed, but the user should act."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class SpecError(LorascError, ValueError):
    """An invalid value in the spec or in a configuration."""

    code = "invalid-value"


class UnknownTarget(SpecError):
    """A target, rule or train pattern that matches no weight of the model."""

    code = "unknown-target"


class CaptureError(LorascError):
    """No front end could turn the model into a graph, or the model refused the example inputs."""

    code = "not-captured"


class PassError(LorascError):
    """A pass whose requirement is not met, or a graph that a pass cannot work on."""


class NoSites(PassError, SpecError):
    """A spec that leaves nothing to adapt. The message says why each candidate was refused."""

    code = "no-sites"


class PassOrderError(PassError):
    """Passes that cannot run in any order, or not in the given one."""

    code = "pass-order"


class VerifyError(PassError):
    """A graph that does not agree with its plan. The message lists each fault with its node."""

    code = "graph-not-verified"


class StateError(LorascError, RuntimeError):
    """A call at the wrong moment: after release, inside a backward, with the wrong optimizer."""


class NonFiniteBranch(StateError):
    """A branch that holds inf or nan at a fold."""

    code = "non-finite"


class CheckpointError(LorascError):
    """A checkpoint that is damaged, of another base, or cannot be written or read."""

    code = "invalid-checkpoint"


class ExportError(LorascError):
    """A cascade that another format cannot express, or a path that cannot be written. Names each weight."""

    code = "not-exportable"


class MissingExtra(LorascError, ImportError):
    """An optional package is not installed. The message has the pip command."""

    code = "missing-extra"


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return "; nearest: 'a', 'b'" for the known names most like `name`, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return "; nearest: " + ", ".join(repr(name) for name in near) if near else ""


def listed(known: Iterable[str]) -> str:
    """Return "; known: 'a', 'b' and 7 more" with the first known names, if none is similar."""
    names = list(known)
    return "; known: " + named(map(repr, names), 5) if names else ""


def named(names: Iterable[str], count: int = 3) -> str:
    """Return "a, b, c and 4 more" with the first names."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"


def reason_of(fault: BaseException) -> str:
    """Return why an operation failed, without the path of a file: the message names it."""
    return (isinstance(fault, OSError) and fault.strerror) or str(fault)


def path_of(path: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave.

    Raises:
        SpecError: it holds a NUL byte. Some calls of Python would raise a bare ValueError, others would find no file.
    """
    if "\0" in os.fspath(path):
        raise SpecError(f"the path {os.fspath(path)!r} holds a NUL byte, which no file system accepts. Give another")
    return Path(path)


def warn(message: str, code: str) -> None:
    """Warn at the line of the user's program: the first frame outside this package and torch."""
    torch_folder = os.path.dirname(sys.modules["torch"].__file__ or "") + os.sep
    skipped = (_PACKAGE, torch_folder, contextlib.__file__, copy.__file__)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(skipped):
        frame, level = frame.f_back, level + 1
    warnings.warn(LorascWarning(message, code=code), stacklevel=level)
