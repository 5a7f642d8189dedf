"""`python -m tests.errors.page` writes docs/errors.md: the classes and the codes of `lorasc_fx.errors`."""

from __future__ import annotations

from pathlib import Path

from lorasc_fx import errors

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"

HEAD = """# Errors

Each error and each warning has a `code` that does not change between versions; the words of its message may. If an
error is raised, model, branches, optimizer and files are as before the call. `except lx.LorascError as error:` catches
every error of the package; `error.code` is its code.

Warnings are of the class `lorasc_fx.errors.LorascWarning` (a `UserWarning`). They name the line
of your program. Those about training are given once per cascade.

Classes, with their bases besides LorascError:
"""

CLASSES = (
    *("SpecError", "UnknownTarget", "NoSites", "CaptureError", "PassError", "PassOrderError", "VerifyError"),
    *("StateError", "NonFiniteBranch", "CheckpointError", "ExportError", "MissingExtra"),
)
"""The classes of errors, in the order of the page."""

TASKS = {
    "Writing a spec": "invalid-value conflicting-options unknown-name unknown-target no-sites",
    "Adapting a model": (
        "not-a-model model-refuses-inputs not-captured no-graph already-adapted not-trainable meta-model "
        "method-not-supported quantized-left-out constant-adapted late-sites too-many-variants"
    ),
    "Training": (
        "gradients-pending inside-backward inside-weights released unknown-stage not-available "
        "optimizer-lacks-parameters optimizer-differs backward-not-supported non-finite weights-changed-outside "
        "stage-not-ended quantized-not-supported no-branch-moved "
        "evaluated-with-noise model-called-inside-stage model-saved-inside-stage training-not-kept "
        "running-stage-folded change-rounded-away"
    ),
    "Saving, loading and merging": (
        "base-differs spec-differs sites-differ tied-weights-differ no-checkpoint no-base invalid-checkpoint "
        "format-not-supported unreadable-file write-failed path-in-the-way concurrent-save not-serializable "
        "frozen-parameter-changed buffers-differ other-versions"
    ),
    "Exporting, importing and serving": (
        "not-exportable adapter-does-not-fit adapter-not-supported invalid-adapter input-not-supported "
        "rank-too-large rows-differ rows-not-independent smaller-sizes-not-refused tied-weight-exported-twice"
    ),
    "Trainers and several processes": "trainer-not-supported wrapper-not-supported sharded rank-failed ranks-differ",
    "Running passes on a graph": "requirement-not-met pass-order graph-not-verified wrong-function-result",
    "Using the command line": ("missing-extra invalid-data"),
}
"""The codes of errors and warnings by task, in the order of the page."""


def meaning(code: str) -> str:
    """Return the text of a code."""
    text = errors.CODES[code]
    return text.replace("(warning) ", "Warning: ", 1)


def page() -> str:
    """Return the whole text."""
    classes = []
    for name in CLASSES:
        kind = getattr(errors, name)
        bases = [base.__name__ for base in kind.__mro__[1:] if base not in (errors.LorascError, Exception, object)]
        caught = ", ".join(base for base in bases if base != "BaseException")
        classes.append(f"`{name}{caught and f'({caught})'}`")
    parts = [HEAD.rstrip(), f"{'; '.join(classes)}."]
    for title, codes in TASKS.items():
        parts += [f"## {title}", "\n".join(f"- `{code}`: {meaning(code)}" for code in codes.split())]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
