"""Write docs/errors.md from the catalogue: `python -m tests.errors.page`. Every message on it was raised just now."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import lorasc_fx as lx
from lorasc_fx import errors
from tests.errors.catalogue import ENTRIES, Entry, Example, body
from tests.errors.models import inputs, mlp

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"

HEAD = """# Errors

Each error and each warning has a `code`, which does not change: compare it in a program, and look it up in the table
below. Its message says what happened, where, and what to do, in words that may change; an unknown name is answered with
the nearest known ones.
Whatever raises has changed nothing. In the examples `model` is a `Sequential` of `nn.Linear(5, 7)`, a `Tanh`,
`nn.Linear(7, 6)` and `nn.Linear(6, 2)`, and `x` is its input. `python -m tests.errors.page` runs them and writes this
page.
"""


TAIL = """
## LorascWarning

What you have to act on although nothing failed is a `LorascWarning` (a `UserWarning`), given at the line of your
program, once a cascade: `warnings.filterwarnings("error", category=lorasc_fx.errors.LorascWarning)` makes it an error.
The logger `lorasc_fx` holds at INFO what was done and how long it took.

- A stage ended and no branch has moved: the loop calls the model and not the cascade, or no step was made.
- A first stage that has trained is folded (`release`, `folded_state_dict`, `folded_graph`, an export, `merge`) under a
  `pace` below 1, and neither `stages` nor `transition` was called: that share of what it has trained is kept.
- `lorasc-fx fold` or `export` meets a run, or a checkpoint, whose running stage has trained and never ended: it is
  folded as it is, and the `pace` of the spec counts.
- A cascade is garbage collected while its model lives, and what the running stage has trained goes with it.
- The cascade is called in eval mode inside a stage with noise; `weights("slow")` and `weights("fast")` hold none.
- The user's model is called, copied (`deepcopy`) or pickled (`torch.save`), or its `state_dict()` is read, inside a
  stage: it lacks the running branches, and may hold noise. Calls of its submodules are not seen.
- A Trainer of transformers or trl, or accelerate's `save_model`, writes the state dict of a cascade as if it were that
  of a model.
- `adapt` made a site of a weight that had `requires_grad=False`, where such sites are fewer than half of all, in number
  and in entries, and no target names the weight in full: a constant written as a layer. A frozen backbone is silent.
- A parameter that is neither adapted nor trained was changed after a save: later checkpoints load onto its new numbers
  only.
- A weight that is adapted has a hook on its gradient, which it no longer gets.
- A site came with a call after the optimizer was made.
- A branch, or a parameter trained in full, was left out of a fold because it is not finite (`on_nonfinite="skip"`).
- More than 32 variants were captured; `merge` found buffers that differ; a checkpoint was written by other versions;
  `export.peft` wrote a tied weight twice.
"""


def message_of(entry: Entry, example: Example) -> str:
    """Run an example in an empty folder; return what it raised, as Python prints it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        try:
            example(mlp(), inputs(2, 5))
        except entry.raised as error:
            if type(error) is not entry.raised and entry.raised is not lx.LorascError:
                raise
            return f"{type(error).__name__} [{error.code}]: {error}"
    raise AssertionError(f"{example.__name__} raised no {entry.raised.__name__}")


def section(entry: Entry) -> str:
    """One class."""
    sentence = " ".join((entry.raised.__doc__ or "").split())
    bases = ", ".join(f"`{name}`" for name in entry.bases)
    by = ", ".join(f"`{each}`" if " " not in each else each for each in entry.by)
    facts = [f"Raised by {by}."] + ([f"Is a {bases} as well."] if bases else [])
    lines = [f"## {entry.raised.__name__}", "", f"{sentence} {' '.join(facts)}", "", entry.remedy]
    for example in entry.examples:
        lines += ["", "```text", body(example), "", message_of(entry, example), "```"]
    return "\n".join(lines)


def codes() -> str:
    """The table of codes."""
    rows = [f"| `{code}` | {meaning} |" for code, meaning in errors.CODES.items()]
    return "\n".join(["## Codes", "", "| code | meaning |", "|---|---|", *rows])


def page() -> str:
    """The whole text."""
    return "\n\n".join([HEAD.rstrip(), *map(section, ENTRIES), TAIL.strip(), codes()]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
