"""Write docs/errors.md from the catalogue: `python -m tests.errors.page`. It runs every example for its message."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import lorasc_fx as lx
from lorasc_fx import errors
from tests.errors.catalogue import ENTRIES, Entry, Example, body
from tests.errors.models import inputs, mlp

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"

HEAD = """# Errors

Each error and each warning has a `code` that does not change between versions. Compare the code in a program, and look
it up on this page. The message says what is wrong, where, and what to do; its words may change. If an error is raised,
nothing has changed: model, branches, optimizer and files are as before the call.

Warnings are of the class `lorasc_fx.errors.LorascWarning` (a `UserWarning`). Each is given once per cascade, at the
line of your program. `warnings.filterwarnings("error", category=lorasc_fx.errors.LorascWarning)` turns them into
errors.

In the examples, `model` is a `Sequential` of `nn.Linear(5, 7)`, a `Tanh`, `nn.Linear(7, 6)` and `nn.Linear(6, 2)`, and
`x` is its input. `python -m tests.errors.page` runs them and writes this page.
"""


@dataclass(frozen=True)
class Task:
    """A section of the page: what the user was doing.

    Args:
        title: of the section.
        classes: names of the errors that are mostly raised there.
        codes: of errors and warnings, in the order of the table.
    """

    title: str
    classes: tuple[str, ...]
    codes: str


TASKS = (
    Task(
        "Writing a spec",
        ("SpecError", "UnknownTarget", "NoSites"),
        "invalid-value conflicting-options unknown-name unknown-target no-sites",
    ),
    Task(
        "Adapting a model",
        ("CaptureError",),
        "not-a-model model-refuses-inputs not-captured no-whole-graph already-adapted not-trainable meta-model "
        "method-not-supported quantized-left-out constant-adapted hook-not-called late-sites too-many-variants",
    ),
    Task(
        "Training",
        ("StateError", "NonFiniteBranch"),
        "gradients-pending inside-backward inside-weights released unknown-stage not-available "
        "optimizer-lacks-parameters optimizer-differs backward-not-supported non-finite weights-changed-outside "
        "stage-not-ended quantized-not-supported no-branch-moved non-finite-left-out dropout-not-applied "
        "evaluated-with-noise model-called-inside-stage model-saved-inside-stage training-not-kept "
        "running-stage-folded",
    ),
    Task(
        "Saving, loading and merging",
        ("CheckpointError",),
        "base-differs spec-differs sites-differ tied-weights-differ no-checkpoint no-base invalid-checkpoint "
        "format-not-supported unreadable-file write-failed path-in-the-way concurrent-save not-serializable "
        "frozen-parameter-changed buffers-differ other-versions",
    ),
    Task(
        "Exporting, importing and serving",
        ("ExportError",),
        "not-exportable adapter-does-not-fit adapter-not-supported invalid-adapter input-not-supported bank-full "
        "rank-too-large rows-differ rows-not-independent smaller-sizes-not-refused tied-weight-exported-twice",
    ),
    Task(
        "Trainers and several processes",
        (),
        "trainer-not-supported wrapper-not-supported sharded rank-failed ranks-differ unfolded-save",
    ),
    Task(
        "Running passes on a graph",
        ("PassError", "PassOrderError", "VerifyError"),
        "requirement-not-met pass-order graph-not-verified wrong-function-result",
    ),
    Task("Using the command line", ("MissingExtra",), "missing-extra invalid-data"),
)
"""The sections of the page. Each class except LorascError, and each code, is in one of them."""

WARNINGS = {
    "constant-adapted": "Fewer than half of the sites, in number and in entries, were frozen before `adapt`, and no "
    "target names them in full: the weight may be a constant. Exclude it, or name it in `targets`",
    "evaluated-with-noise": "The cascade was called in eval mode inside a stage with noise. Evaluate inside "
    '`weights("slow")` or `weights("fast")`',
    "frozen-parameter-changed": "A parameter that is neither adapted nor trained changed after a save. Later "
    "checkpoints load only onto its new values",
    "model-called-inside-stage": "The user's model was called inside a stage, without the running branches and perhaps "
    "with noise. Call the cascade. Calls of submodules are not noticed",
    "model-saved-inside-stage": "The user's model was copied, pickled, or its `state_dict()` was read inside a stage, "
    "without the running branches and perhaps with noise",
    "no-branch-moved": "A stage ended and no branch has changed: the loop calls the model instead of the cascade, or "
    "makes no optimizer step",
    "running-stage-folded": "The running stage was folded, and only the share `pace` of its change is kept. It was the "
    "first stage and neither `stages` nor `transition` was called, or `lorasc-fx` folded a run inside a stage",
    "training-not-kept": "A cascade was garbage collected while its model is alive, so the training of its running "
    "stage is lost. Call `release` or `lx.save` before",
    "unfolded-save": "A trainer, or accelerate's `save_model`, wrote the state dict of a cascade as if it were the "
    "model's state dict",
}
"""Meanings of warnings that need more words than in `errors.CODES`."""


def message_of(entry: Entry, example: Example) -> str:
    """Run an example in an empty folder. Return its error as Python prints it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        try:
            example(mlp(), inputs(2, 5))
        except entry.raised as error:
            if type(error) is not entry.raised and entry.raised is not lx.LorascError:
                raise
            return f"{type(error).__name__} [{error.code}]: {error}"
    raise AssertionError(f"{example.__name__} raised no {entry.raised.__name__}")


def of_class(entry: Entry) -> str:
    """Return the part of the page on one class."""
    sentence = " ".join((entry.raised.__doc__ or "").split())
    bases = ", ".join(f"`{name}`" for name in entry.bases if name != "LorascError")
    by = ", ".join(f"`{each}`" if " " not in each else each for each in entry.by)
    facts = [f"Raised by {by}."] + ([f"Subclass of {bases}."] if bases else [])
    lines = [f"### {entry.raised.__name__}", "", f"{sentence} {' '.join(facts)}", "", entry.remedy]
    for example in entry.examples:
        lines += ["", "```text", body(example), "", message_of(entry, example), "```"]
    return "\n".join(lines)


def meaning(code: str) -> str:
    """Return the text of a code in the table."""
    text = errors.CODES[code]
    if not text.startswith("(warning) "):
        return text
    text = WARNINGS.get(code, text.removeprefix("(warning) "))
    return f"Warning: {text[0].lower()}{text[1:]}"


def section(task: Task, entries: Mapping[str, Entry]) -> str:
    """Return one section."""
    rows = [f"| `{code}` | {meaning(code)} |" for code in task.codes.split()]
    table = "\n".join(["| code | meaning |", "|---|---|", *rows])
    return "\n\n".join([f"## {task.title}", *(of_class(entries[name]) for name in task.classes), table])


def page() -> str:
    """Return the whole text."""
    entries = {entry.raised.__name__: entry for entry in ENTRIES}
    root = of_class(entries.pop("LorascError")).replace("### ", "## ")
    assert sorted(name for task in TASKS for name in task.classes) == sorted(entries)
    assert sorted(code for task in TASKS for code in task.codes.split()) == sorted(errors.CODES)
    return "\n\n".join([HEAD.rstrip(), root, *(section(task, entries) for task in TASKS)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
