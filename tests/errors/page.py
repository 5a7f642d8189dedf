"""Write docs/errors.md from the catalogue: `python -m tests.errors.page`. It runs every example for its message.

An example is a function of `mlp()` and its input, and runs in an empty folder. The page shows its body.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import lorasc_fx as lx
from lorasc_fx import errors
from lorasc_fx.passes import FoldBranches, InsertBranches, MatchSites, Pipeline
from lorasc_fx.util.environment import module_of
from tests.errors.models import inputs, mlp

Example = Callable[[nn.Module, Tensor], Any]


@dataclass(frozen=True)
class Entry:
    """One class of errors.

    Args:
        raised: the class. by: the calls that raise it.
        remedy: advice in addition to the message.
        examples: each raises it.
    """

    raised: type[lx.LorascError]
    by: tuple[str, ...]
    remedy: str
    examples: tuple[Example, ...]

    @property
    def bases(self) -> list[str]:
        """The base classes that catch it, too."""
        return [each.__name__ for each in self.raised.__mro__[1:] if each not in (BaseException, Exception, object)]


def body(example: Example) -> str:
    """The lines of an example."""
    lines = inspect.getsource(example).splitlines()
    return textwrap.dedent("\n".join(lines[1:]))


def a_rank(model: nn.Module, x: Tensor) -> None:
    lx.CascadeSpec(rank=0)


def a_field(model: nn.Module, x: Tensor) -> None:
    lx.CascadeSpec.from_dict({"noise": {"strenght": 0.1}})


def a_target(model: nn.Module, x: Tensor) -> None:
    lx.adapt(model, args=(x,), spec=lx.CascadeSpec(targets=("2.wieght",)))


def all_excluded(model: nn.Module, x: Tensor) -> None:
    lx.adapt(model, args=(x,), spec=lx.CascadeSpec(exclude=("*.weight",)))


def no_model(model: nn.Module, x: Tensor) -> None:
    lx.adapt(model.state_dict(), args=(x,))


def before_its_time(model: nn.Module, x: Tensor) -> None:
    InsertBranches()(fx.symbolic_trace(model))


def a_wrong_order(model: nn.Module, x: Tensor) -> None:
    Pipeline([FoldBranches(), InsertBranches(), FoldBranches()], order="solved")


def an_edited_graph(model: nn.Module, x: Tensor) -> None:
    adapted = Pipeline([MatchSites(lx.CascadeSpec()), InsertBranches()])(fx.symbolic_trace(model)).graph_module
    branch = next(node for node in adapted.graph.nodes if node.name.endswith("_lora"))
    branch.replace_all_uses_with(branch.args[0], delete_user_cb=lambda user: user is not branch)
    FoldBranches()(adapted)


def released(model: nn.Module, x: Tensor) -> None:
    cascade = lx.adapt(model, args=(x,))
    cascade.release()
    cascade(x)


def unused_gradients(model: nn.Module, x: Tensor) -> None:
    cascade = lx.adapt(model, args=(x,))
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-3))
    cascade(x).square().mean().backward()
    cascade.transition(optimizer)


def twice(model: nn.Module, x: Tensor) -> None:
    cascade = lx.adapt(model, args=(x,))
    lx.adapt(cascade.model, args=(x,))


def diverged(model: nn.Module, x: Tensor) -> None:
    cascade = lx.adapt(model, args=(x,))
    torch.nn.init.constant_(cascade.branches["2/weight"].lora_B, float("nan"))
    cascade.transition(torch.optim.AdamW(cascade.param_groups(lr=1e-3)))


def another_base(model: nn.Module, x: Tensor) -> None:
    lx.save(lx.adapt(model, args=(x,)), "run")
    other = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.Linear(6, 2))
    lx.load("run", other, args=(x,))


def no_adapter(model: nn.Module, x: Tensor) -> None:
    cascade = lx.adapt(model, args=(x,), spec=lx.CascadeSpec(rank=2, noise=lx.Noise(0.1, keep=True)))
    cascade.transition(None)
    lx.export.peft(cascade, "adapter")


def not_installed(model: nn.Module, x: Tensor) -> None:
    module_of("vision", "absent_package")


ENTRIES = (
    Entry(
        lx.LorascError,
        ("all functions of the package",),
        "`except lx.LorascError as error:` catches every error of this page. `error.code` is its code.",
        (),
    ),
    Entry(
        lx.SpecError,
        ("CascadeSpec", "Noise", "Rule", "adapt", "stages", "save", "lorasc-fx"),
        "Use a value that the message lists. For a configuration file, the message has the line.",
        (a_rank, a_field),
    ),
    Entry(
        lx.UnknownTarget,
        ("adapt", "MatchSites", "lorasc-fx"),
        "`lorasc-fx sites MODEL` lists the weights of a model, by the names that a spec takes.",
        (a_target,),
    ),
    Entry(
        lx.passes.NoSites,
        ("adapt", "InsertBranches"),
        "Widen `targets`, or remove patterns from `exclude` and `train`. The message has the reason for each weight.",
        (all_excluded,),
    ),
    Entry(
        lx.CaptureError,
        ("adapt", "load", "a call of the cascade", "folded_graph"),
        "Check that the model runs on the example inputs. If every front end fails, the message has the reason of each "
        "one: change the model there, or adapt a part of it.",
        (no_model,),
    ),
    Entry(lx.PassError, ("passes",), "Run the passes that the message names first.", (before_its_time,)),
    Entry(
        lx.passes.PassOrderError,
        ("Pipeline",),
        "Give the passes in an order in which each comes after the passes that provide its requirements.",
        (a_wrong_order,),
    ),
    Entry(
        lx.passes.VerifyError,
        ("passes", "load"),
        "Other code edited the graph, or the plan belongs to another model. Fold the branches before you edit a graph, "
        "then adapt it again.",
        (an_edited_graph,),
    ),
    Entry(
        lx.StateError,
        ("every call of a cascade", "adapt", "save"),
        "The call is not possible in the current state. First do what the message says.",
        (released, unused_gradients, twice),
    ),
    Entry(
        lx.NonFiniteBranch,
        ("transition", "stages", "release", "folded_state_dict", "folded_graph", "passes"),
        "Nothing was folded: the slow weights and the last checkpoint are still finite.",
        (diverged,),
    ),
    Entry(
        lx.CheckpointError,
        ("load", "save", "resume", "Plan.from_json"),
        "Delete a damaged version: `load` reads the newest one that exists, and `save(keep=N)` keeps several.",
        (another_base,),
    ),
    Entry(
        lx.export.ExportError,
        ("export.peft",),
        "Exclude the weights that the message names from the run, or export all folded weights with "
        "`export.safetensors`. Nothing was written.",
        (no_adapter,),
    ),
    Entry(lx.errors.MissingExtra, ("lorasc-fx",), "Run the pip command in the message.", (not_installed,)),
)


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
        "not-a-model model-refuses-inputs not-captured no-graph already-adapted not-trainable meta-model "
        "method-not-supported quantized-left-out constant-adapted late-sites too-many-variants",
    ),
    Task(
        "Training",
        ("StateError", "NonFiniteBranch"),
        "gradients-pending inside-backward inside-weights released unknown-stage not-available "
        "optimizer-lacks-parameters optimizer-differs backward-not-supported non-finite weights-changed-outside "
        "stage-not-ended quantized-not-supported no-branch-moved "
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
        "not-exportable adapter-does-not-fit adapter-not-supported invalid-adapter input-not-supported "
        "rank-too-large rows-differ rows-not-independent smaller-sizes-not-refused tied-weight-exported-twice",
    ),
    Task(
        "Trainers and several processes",
        (),
        "trainer-not-supported wrapper-not-supported sharded rank-failed ranks-differ",
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
    "model-saved-inside-stage": "The `state_dict()` of the user's model was read inside a stage, without the running "
    "branches and perhaps with noise. Copies and pickles are not noticed",
    "no-branch-moved": "A stage ended and no branch has changed: the loop calls the model instead of the cascade, or "
    "makes no optimizer step",
    "running-stage-folded": "The running stage was folded, and only the share `pace` of its change is kept. It was the "
    "first stage and neither `stages` nor `transition` was called, or `lorasc-fx` folded a run inside a stage",
    "training-not-kept": "A cascade was garbage collected while its model is alive. The training of its running stage "
    "is lost, or the model keeps the noise of the stage. Call `release` or `lx.save` before",
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
