"""What can go wrong: a few types under one root, each error with a stable code.

Each message says what happened, where (weight name, node, file) and what to do; its wording may change. The `code`
(kebab-case) names the situation and does not change: it is what a program, or a test, compares. Each class has a
default; docs/errors.md lists every code. `nearest` is the one place that suggests names.
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
    "adapter-incomplete": "the adapter lacks a parameter that its configuration lists as trained",
    "adapter-not-supported": "the adapter's kind, or an option of it, cannot be expressed here",
    "already-adapted": "the model, or a part of it, belongs to a living cascade, or holds layers of peft",
    "already-materialized": "the model has its numbers already",
    "already-sharded": "the cascade, or the model, is sharded already",
    "base-ambiguous": "several tensors of the base hold the numbers of one weight",
    "base-differs": "the base file holds other numbers than the model",
    "base-file-changed": "the base file was written to while the cascade lives",
    "base-not-built": "the files of the base that a checkpoint names are not here, or build no model",
    "base-not-named": "the model has no name by which its library builds it",
    "base-tensor-missing": "the base file lacks a tensor of the model",
    "branch-left-out": "(warning) a branch that is not finite was left out of a fold",
    "branch-not-placeable": "a graph uses an adapted weight where no branch can be placed",
    "buffers-differ": "(warning) buffers differ between the runs that are merged",
    "callback-added-late": "the callback was added after the Trainer was made",
    "cascade-averaged": "an average of parameters was given the cascade",
    "changing-constant": "(warning) a Python value that graphs hold as a constant keeps changing",
    "checkpoint-other-base": "the checkpoint, or adapter, was made from another base model",
    "child-replaced": "a submodule of the cascade was assigned from outside",
    "circular-passes": "passes require each other in a circle",
    "classes-differ": "a shifted data set has other classes than the training data",
    "concurrent-save": "another process is writing there",
    "conflicting-options": "two options, or arguments, exclude each other",
    "constant-adapted": "(warning) a frozen weight, perhaps a constant, has become a site",
    "context-parallel-not-supported": "a call inside torch's context_parallel, which does not reach graphs",
    "damaged-file": "a file of a run is damaged",
    "data-not-local": "a data set, or what describes it, names files of the network",
    "data-parallel": "torch.nn.DataParallel would copy the cascade",
    "digest-mismatch": "tensors differ from the digest in their manifest",
    "dora-not-supported": "DoRA cannot be applied to this weight or in this call",
    "double-backward": "a second derivative needs the input of a branch that was not kept",
    "dropout-not-applied": "(warning) a training step ran in eval mode, and dropout was asked for",
    "empty-cell": "a cell of a table is empty, or its class is -1",
    "empty-pipeline": "a pipeline has no pass",
    "evaluated-with-noise": "(warning) the cascade was called in eval mode, and its weights hold noise",
    "export-refused": "torch.export or torch.onnx refuses the folded graph",
    "failed": "the default of a class without one; no error of this package has it",
    "file-not-found": "a file or folder is not there",
    "file-too-large": "a file is larger than anything of its kind",
    "foreign-tensor": "a checkpoint holds an entry that its plan has no place for",
    "form-exists": "a form of this name, or for this target, is registered already",
    "form-not-registered": "a graph or checkpoint uses a form that is not registered",
    "format-not-supported": "a file has a format version that this version does not read",
    "frozen-parameter-changed": "(warning) a parameter outside of the checkpoints changed after a save",
    "function-needs-arguments": "a function of the user must be callable without arguments",
    "gradients-not-cleared": "(warning) gradients add up over many steps, as nothing clears them",
    "gradients-pending": "gradients were computed and not yet applied by the optimizer",
    "graph-not-verified": "a graph does not agree with its plan",
    "hidden-weight-use": "a weight is used where neither a graph nor a module shows it",
    "hook-not-called": "(warning) a weight with a hook on its gradient was adapted, and gets no gradient",
    "import-failed": "a module of the user cannot be imported",
    "inference-tensor": "a parameter was made in torch.inference_mode",
    "inside-backward": "the call came during a backward that still needs the weights",
    "inside-weights": "the call came inside a `with cascade.weights(...)` block",
    "invalid-adapter": "a file of a peft adapter is malformed",
    "invalid-checkpoint": "a checkpoint is damaged or was edited",
    "invalid-csv": "a file is not CSV",
    "invalid-data-function": "a data function of the user returns something else than inputs and labels",
    "invalid-image-folder": "a folder is not one folder of images for each class",
    "invalid-inputs": "args or kwargs do not fit the signature of forward",
    "invalid-mesh": "a device mesh has another number of axes than the call needs",
    "invalid-plan": "a plan, as JSON, is malformed",
    "invalid-syntax": "the text of a pipeline cannot be parsed",
    "invalid-toml": "a configuration file is not TOML",
    "invalid-value": "a value is out of range or of another type",
    "late-sites": "(warning) sites were added after the optimizer was made",
    "layout-differs": "a graph reads a weight in another layout than its branch has",
    "lazy-module": "a parameter has no shape yet",
    "learning-rate-ignored": "the optimizer has other learning rates than the spec asks for",
    "live-model": "a pass for graphs that own their weights was given a graph of a live model",
    "loss-not-finite": "the loss is inf or nan",
    "meta-constant": "a tensor on the meta device is neither a parameter nor a buffer",
    "meta-model": "the model is on the meta device, without numbers",
    "metric-missing": "the evaluation does not return the metric that a stage waits for",
    "missing-argument": "a command lacks an argument",
    "missing-extra": "an optional package is not installed",
    "missing-tensor": "a checkpoint lacks a tensor of its plan",
    "model-called-inside-stage": "(warning) the user's model was called while it lacks the running branches",
    "model-not-repeatable": "the model does not repeat its output under one seed",
    "model-refuses-inputs": "the model itself raises on the example inputs",
    "model-saved-inside-stage": "(warning) the state dict of the user's model was read inside a stage",
    "name-taken": "a module has a child whose name this package needs",
    "needs-training-step": "an option needs a training step, which a graph pass has not",
    "no-average": "the spec keeps no average of the weights",
    "no-base-file": "the model did not come from a safetensors file, or the path is not one",
    "no-batch-norm": "the model has no batch norm with running statistics",
    "no-batches": "no batch was given to estimate statistics from",
    "no-branch-moved": "(warning) a stage ended and no branch has changed",
    "no-checkpoint": "a folder holds no checkpoint",
    "no-graph": "no graph was captured for this mode yet",
    "no-length": "the data have no length, and a number of epochs was given",
    "no-model-config": "a folder has no config.json",
    "no-process-group": "torch.distributed is not initialized",
    "no-sites": "no weight is left to adapt",
    "no-trainer": "the callback is not called by a Trainer",
    "no-whole-graph": "the model has graph breaks, and one whole graph is needed",
    "noise-out-of-range": "noise of this strength has no finite size for a weight",
    "non-finite-branch": "a branch, or a parameter trained in full, holds inf or nan",
    "non-finite-state": "the state of an optimizer, or a buffer of the model, holds inf or nan",
    "non-finite-tensor": "a tensor in a file holds inf or nan",
    "non-finite-weight": "a weight that is to be decomposed holds inf or nan",
    "not-a-file": "a path is a link, a folder, a pipe or a device",
    "not-a-model": "a model was expected",
    "not-a-run": "a folder holds no run",
    "not-a-state-dict": "a state dict is not that of a cascade",
    "not-captured": "no front end turns the model into a graph that computes the same",
    "not-divisible": "an axis of a weight cannot be divided by the number of processes",
    "not-exportable": "the format cannot express the cascade",
    "not-loaded": "the cascade was not made by load",
    "not-serializable": "a value cannot be stored as JSON or safetensors",
    "not-shardable": "an option, or a parameter, cannot be sharded",
    "not-sharded": "the cascade is not sharded",
    "not-tied": "a pattern of untie names no tied parameter",
    "not-trainable": "a parameter has no gradient",
    "not-utf8": "a file is not UTF-8",
    "not-writable": "a path cannot be written",
    "nothing-trained": "no site has trained yet",
    "optimizer-differs": "the optimizer or scheduler differs from the saved one",
    "optimizer-lacks-parameters": "the optimizer does not hold all trained parameters",
    "other-model": "the Trainer and the callback have different models",
    "other-versions": "(warning) a checkpoint was written by other versions",
    "out-of-memory": "there is no memory for the tensors of a file",
    "output-gone": "the output that a backward belongs to was freed",
    "pace-below-one": "(warning) a first stage is folded with a pace below 1",
    "package-not-installed": "a package that the user names is not installed",
    "parameter-left-out": "(warning) a parameter that is not finite goes on from its last value",
    "pass-order": "passes cannot run in this order",
    "path-in-the-way": "something else is at the path that is to be written",
    "pickled": "a cascade does not pickle; save and load, or release",
    "plan-mismatch": "the plan of a checkpoint does not fit the model",
    "planned-otherwise": "a graph was planned under another spec",
    "process-lost": "another process is gone",
    "quantized-left-out": "(warning) quantized weights are no sites, and stay as they are",
    "quantized-not-supported": "a quantized weight cannot hold the result",
    "rank-failed": "another rank raised an error",
    "ranks-differ": "ranks have other weights, another spec or other code than the others",
    "released": "the cascade was released",
    "requantization-failed": "the given function did not quantize a weight again",
    "requirement-not-met": "a graph lacks a fact that a pass requires",
    "run-differs": "a run is resumed with other settings",
    "run-exists": "a folder holds a run already",
    "run-has-no-data": "a run has written nothing to show yet",
    "run-not-ended": "a run has not ended, and its last stage is not folded yet",
    "running-stage-folded": "(warning) a fold takes a running stage as one that has ended",
    "sharded": "the call is not there for sharded weights",
    "shared-memory": "a parameter shares memory with another one",
    "signature-differs": "the parameters of a form are not those of its target",
    "sites-differ": "the sites of two runs, or of a run and a checkpoint, differ",
    "smaller-sizes-not-refused": "(warning) an ONNX file computes something else than the model at sizes of 0 or 1",
    "spec-differs": "a cascade has another spec than the checkpoint",
    "spec-omits-adapter": "the spec leaves out weights that the adapter changes",
    "stage-not-ended": "a stage was trained and not ended",
    "stage-not-kept": "the weights of an early stage are no longer kept",
    "state-not-saved": "a checkpoint holds no optimizer or scheduler state, or would hide one that does",
    "tie-broken": "parameters that were tied when the model was adapted are not tied any more",
    "tied-weight-exported-twice": "(warning) peft keeps a pair of factors for each name of a tied weight",
    "tied-weights-differ": "names of one tied weight have different values",
    "too-few-classes": "a data set has one class",
    "too-few-examples": "a data set has fewer examples than are needed",
    "too-many-captures": "the model was captured again too often",
    "too-many-variants": "(warning) more variants were captured than are kept",
    "torchscript-model": "the model is TorchScript",
    "trainer-option-not-supported": "an option of the Trainer that the cascade cannot follow",
    "training-not-kept": "(warning) the program ends, or the cascade is gone, and what was trained is lost",
    "unfolded-save": "(warning) a trainer saves the state dict of an unfolded cascade",
    "unknown-device": "torch does not know the device, or this machine has it not",
    "unknown-front-end": "a checkpoint names a front end that does not exist",
    "unknown-name": "a name is not one of the known ones",
    "unknown-stage": "a stage has not ended in this cascade",
    "unknown-target": "a pattern matches no weight",
    "unreadable-file": "a file cannot be read",
    "unreadable-model": "transformers cannot read a model folder",
    "unseen-write": "forward wrote into a weight by other means than operations of torch",
    "variant-after-sharding": "a graph was needed after the weights were split or sharded",
    "versions-differ": "the processes read different versions of a checkpoint",
    "weights-changed-outside": "a weight was changed by something else than this package",
    "weights-do-not-fit": "a weight file does not hold this model",
    "wrapped-too-early": "DistributedDataParallel wrapped the cascade before it had all branches",
    "wrapper-not-supported": "another library cuts or copies the parameters of the cascade",
    "write-failed": "writing was interrupted by an error; what was there stays",
    "written-inside-weights": "a weight was written inside a `with cascade.weights(...)` block",
    "wrong-dtype": "a tensor has another dtype",
    "wrong-file-ending": "the name of an output file has another ending",
    "wrong-function-result": "a function of the user returns something else",
    "wrong-gradient": "a weight does not get the gradient of the eager model",
    "wrong-modality": "the data set has texts and the model takes images, or the reverse",
    "wrong-model-output": "the model returns something else than logits",
    "wrong-pass-result": "a pass returned something else",
    "wrong-shape": "a tensor has another shape",
    "wrong-wrapper": "a cascade, or a cascade in DistributedDataParallel, was expected",
}
"""Every code, with the situation that it stands for."""

_PACKAGE = os.path.dirname(__file__) + os.sep


class LorascError(Exception):
    """Root of every error that this package raises on purpose."""

    code = "failed"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class LorascWarning(UserWarning):
    """What the user has to act on although nothing failed; the category of every warning of this package."""

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
    """A spec that leaves nothing to adapt; the message tells why each candidate was refused."""

    code = "no-sites"


class PassOrderError(PassError):
    """Passes that cannot stand in any order, or not in the one given."""

    code = "pass-order"


class VerifyError(PassError):
    """A graph that does not agree with its plan; the message lists each fault with its node."""

    code = "graph-not-verified"


class StateError(LorascError, RuntimeError):
    """A call that is right, at a moment when it is not: after release, inside a backward, with the wrong optimizer."""


class NonFiniteBranch(StateError):
    """A branch that holds inf or nan at a fold."""

    code = "non-finite-branch"


class CheckpointError(LorascError):
    """A checkpoint that is damaged, of another base, or cannot be written or read."""

    code = "invalid-checkpoint"


class ExportError(LorascError):
    """A cascade that another format cannot express, or a place where it cannot be written; names each weight."""

    code = "not-exportable"


class MissingExtra(LorascError, ImportError):
    """An optional package is not installed; the message holds the pip command."""

    code = "missing-extra"


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return "; nearest: 'a', 'b'" for the known names most like `name`, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return "; nearest: " + ", ".join(repr(name) for name in near) if near else ""


def listed(known: Iterable[str]) -> str:
    """Return "; known: 'a', 'b' and 7 more" with the first known names: the answer where none is near."""
    names = list(known)
    return "; known: " + named(map(repr, names), 5) if names else ""


def named(names: Iterable[str], count: int = 3) -> str:
    """Return "a, b, c and 4 more" with the first names."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"


def reason_of(fault: BaseException) -> str:
    """Return why an operation failed: of the file system without the path, which the message names already."""
    return (isinstance(fault, OSError) and fault.strerror) or str(fault)


def path_of(path: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave.

    Raises:
        SpecError: it holds a NUL byte, for which some calls of Python raise a bare ValueError and others find no file.
    """
    if "\0" in os.fspath(path):
        raise SpecError(f"the path {os.fspath(path)!r} holds a NUL byte, which no file system takes; give another")
    return Path(path)


def warn(message: str, code: str) -> None:
    """Warn at the line of the user's program: the first frame that is neither of this package nor of torch."""
    torch_folder = os.path.dirname(sys.modules["torch"].__file__ or "") + os.sep
    skipped = (_PACKAGE, torch_folder, contextlib.__file__, copy.__file__)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(skipped):
        frame, level = frame.f_back, level + 1
    warnings.warn(LorascWarning(message, code=code), stacklevel=level)
